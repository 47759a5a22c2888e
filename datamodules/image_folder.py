"""Images with one label each: a folder a class as ImageNet is laid out, or a list of files and labels.

`python -m datamodules.image_folder check ROOT` reads every picture and counts the classes.
"""

import argparse
import csv
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypedDict

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from torch.utils.data import Dataset
from torchmetrics import Metric
from torchvision.transforms import InterpolationMode, v2

from datamodules.accuracy import Accuracy
from datamodules.base import DataModule
from datamodules.fields import read_text
from datamodules.images import IMAGES, files_of
from datamodules.tars import Member
from datamodules.transforms import Array, DataError, read_upright


class LabelBatch(TypedDict):
    """image: uint8 RGB `[B, 3, S, S]`. label: Long `[B]`, -1 for none. id: Long `[B]`, index of the sample."""

    image: Tensor
    label: Tensor
    id: Tensor


@dataclass(frozen=True)
class LabelAugmentation:
    """Random crops for classification; defaults are the official ImageNet recipe (cls/tools/train.py).

    Args:
        scale, ratio: of the random crop's area to the picture's, and its aspect.
        flip: probability of a mirror image.
        operations, magnitude: of RandAugment; 0 operations is none.
        erase: probability of random erasing.
    """

    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5
    operations: int = 0
    magnitude: int = 9
    erase: float = 0.0

    def transform(self, size: int) -> v2.Transform:
        steps: list[Any] = [v2.RandomResizedCrop(size, self.scale, self.ratio, antialias=True)]
        steps.append(v2.RandomHorizontalFlip(self.flip))
        if self.operations:
            steps.append(v2.RandAugment(self.operations, self.magnitude, interpolation=InterpolationMode.BILINEAR))
        if self.erase:
            steps.append(v2.RandomErasing(self.erase))
        return v2.Compose(steps)


def centre(size: int, resize: int) -> v2.Transform:
    """The official test protocol: the shorter side to `resize`, and the middle of `size`."""
    return v2.Compose([v2.Resize(resize, antialias=True), v2.CenterCrop(size)])


@dataclass(slots=True)
class Labelled:
    """A picture, by its file or its place in a shard, and its class, -1 where there is none."""

    path: str | Member
    image_id: int
    label: int = -1


class LabelDataset(Dataset):
    """Pictures, transformed.

    Args:
        instances: what to read.
        transform: of uint8 `[3, H, W]` to uint8 `[3, S, S]`.
        read: RGB uint8 `[H, W, 3]` of an instance's path.
    """

    def __init__(
        self, instances: Sequence[Labelled], transform: v2.Transform, read: Callable[..., Array] = read_upright
    ) -> None:
        self.instances, self.transform, self.read = instances, transform, read

    def __len__(self) -> int:
        return len(self.instances)

    def __getitem__(self, index: int) -> dict[str, Any]:
        instance = self.instances[index]
        image = torch.from_numpy(self.read(instance.path)).permute(2, 0, 1)
        return {"image": self.transform(image), "label": instance.label, "id": index}


class ImageFolder(DataModule):
    """Pictures with one label each.

    Args:
        root: folder that all other paths start from.
        train, val, test: a folder with a folder of pictures a class; or a list, `.csv` with the columns file_name and
            label or `.txt` with "file label" a line. None as test is val.
        images: folders that the files of such lists start from, one a split; None is the list's own.
        size: side of the network's square input.
        resize: shorter side before the middle is cut out for evaluation; None is size / 0.875, the official ratio.
        augmentation: of training pictures.
        **kwargs: see `DataModule`.

    Attributes:
        num_classes, class_names: told by the training split, there as soon as the module is constructed.

    Raises:
        DataError: if a split is missing, has fewer than two classes, an empty one, or one that training has not.
    """

    read: ClassVar[Callable[..., Array]] = staticmethod(read_upright)
    """RGB uint8 `[H, W, 3]` of an instance's path."""

    def __init__(
        self,
        root: str = "data/imagenet",
        train: str = "train",
        val: str = "val",
        test: str | None = None,
        images: dict[str, str] | None = None,
        size: int = 224,
        resize: int | None = None,
        augmentation: LabelAugmentation = LabelAugmentation(),
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.root, self.images = Path(root), images or {}
        self.paths = {"train": self.root / train, "val": self.root / val, "test": self.root / (test or val)}
        self.size, self.resize, self.augmentation = size, resize or int(size / 0.875), augmentation
        self.found: dict[str, list[tuple[Path, str]]] = {}
        self.class_names = self.classes()
        self.num_classes = len(self.class_names)

    def classes(self) -> list[str]:
        """Names of the training classes, sorted; the label is the place."""
        names = sorted({label for _, label in self.files("train")})
        if len(names) < 2:
            raise DataError(f"{self.paths['train']}: {len(names)} class ({names}); to classify takes two at least")
        return names

    def files(self, split: str) -> list[tuple[Path, str]]:
        """Every picture of a split and its class."""
        if split not in self.found:
            path = self.paths[split]
            if path.is_dir():
                self.found[split] = of_folder(path)
            else:
                self.found[split] = of_list(path, self.root / self.images.get(split, str(path.parent)))
        return self.found[split]

    def instances(self, split: str) -> Sequence[Labelled]:
        number = {name: i for i, name in enumerate(self.class_names)}
        files = self.files(split)
        alien = sorted({label for _, label in files} - number.keys())
        if alien:
            raise DataError(
                f"{self.paths[split]}: classes {alien[:5]} are not among the {len(number)} of {self.paths['train']}; "
                f"give both splits the same class names"
            )
        return [Labelled(str(path), i, number[label]) for i, (path, label) in enumerate(files)]

    def setup(self, stage: str) -> None:
        for split in {"fit": ["train", "val"], "validate": ["val"], "test": ["test"]}[stage]:
            if split not in self.datasets:
                train = split == "train"
                transform = self.augmentation.transform(self.size) if train else centre(self.size, self.resize)
                self.datasets[split] = LabelDataset(self.instances(split), transform, self.reader(self.read))

    def metric(self, split: str = "val") -> Metric:
        """Top-1 and top-5 accuracy."""
        return Accuracy(self.class_names)


class Photos(DataModule):
    """Pictures without labels, to predict on.

    Args:
        path: a folder, a pattern, a picture, a `.txt` list of them, or several of these.
        size, resize: see `ImageFolder`.
        **kwargs: see `DataModule`.
    """

    def __init__(self, path: str | list[str], size: int = 224, resize: int | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.path, self.size, self.resize = path, size, resize or int(size / 0.875)

    def setup(self, stage: str) -> None:
        if stage != "predict":
            raise DataError(f"{self.path}: no labels, so there is nothing to {stage}; use it with predict")
        paths = [self.path] if isinstance(self.path, str) else self.path
        files = sorted({file for path in paths for file in files_of(path)})
        if not files:
            raise DataError(f"{self.path}: no picture found (of {', '.join(sorted(IMAGES))})")
        found = [Labelled(str(file), i) for i, file in enumerate(files)]
        self.datasets["predict"] = LabelDataset(found, centre(self.size, self.resize), self.reader(read_upright))


def of_folder(root: Path) -> list[tuple[Path, str]]:
    """Pictures of a folder a class, with their class.

    Raises:
        DataError: naming classes without any picture.
    """
    found, empty, others = [], [], 0
    for folder in sorted(p for p in root.iterdir() if p.is_dir() and p.name[0] != "."):
        files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name[0] != ".")
        pictures = [p for p in files if p.suffix.lower() in IMAGES]
        others += len(files) - len(pictures)
        if not pictures:
            empty.append(folder.name)
        found += [(p, folder.name) for p in pictures]
    if empty:
        raise DataError(f"{root}: classes without any picture: {', '.join(empty[:10])}; fill or remove their folders")
    if others:
        rank_zero_warn(f"{root}: {others} files that are no pictures are passed over")
    return found


def of_list(path: Path, images: Path) -> list[tuple[Path, str]]:
    """Pictures of a list of files and labels.

    Raises:
        DataError: naming the list, and lines without a label or of pictures that do not exist.
    """
    if not path.is_file():
        raise DataError(f"{path}: no such file or folder; give a folder a class, or a list")
    text = read_text(path)
    if path.suffix == ".csv":
        reader = csv.DictReader(text.splitlines())
        if not {"file_name", "label"} <= set(reader.fieldnames or []):
            raise DataError(f"{path}: its first line must name the columns file_name and label")
        rows = [(row["file_name"], row["label"]) for row in reader]
    else:
        rows = [tuple((line.rsplit(maxsplit=1) + [""])[:2]) for line in text.splitlines() if line.strip()]  # type: ignore[misc]
    faulty = [name for name, label in rows if not label or not (images / name).is_file()]
    if faulty:
        raise DataError(f"{path}: {len(faulty)} of {len(rows)} have no label or no file, first {images / faulty[0]}")
    return [(images / name, label) for name, label in rows]


def look_at(data: ImageFolder, splits: Sequence[str]) -> None:
    """Read every picture of the splits, and print how many there are of the classes.

    Raises:
        DataError: naming what cannot be read.
    """
    broken = []
    for split in splits:
        instances = data.instances(split)
        for instance in instances:
            try:
                data.read(instance.path)
            except DataError as error:
                broken.append(str(error))
        counts = Counter(data.class_names[i.label] for i in instances)
        (least, low), (most, high) = counts.most_common()[-1], counts.most_common(1)[0]
        print(f"{split}: {len(instances)} pictures, {len(counts)} classes of {low} ({least}) to {high} ({most})")
    if broken:
        raise DataError(f"{len(broken)} broken pictures:\n  " + "\n  ".join(broken[:20]))


def main() -> None:
    """`check`: read every picture of the splits, and count the classes."""
    parser = argparse.ArgumentParser(prog="python -m datamodules.image_folder", description=main.__doc__)
    check = parser.add_subparsers(required=True).add_parser("check")
    check.add_argument("root", help="folder with a folder of pictures a class in train/ and val/")
    args = parser.parse_args()
    try:
        look_at(ImageFolder(args.root, workers=0), ("train", "val"))
    except (DataError, OSError) as error:
        raise SystemExit(f"{type(error).__name__}: {error}") from None


if __name__ == "__main__":
    main()
