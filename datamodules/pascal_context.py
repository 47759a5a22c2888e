"""PASCAL-Context: the pictures of VOC 2010, labelled everywhere, in 59 classes, measured by mIoU.

`python -m datamodules.pascal_context check ROOT` says what is missing or faulty in a copy, and where to get it.
`python -m datamodules.pascal_context convert ROOT FOLDER` writes the masks from the original release's MATLAB files.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from datamodules.mask_files import values_of
from datamodules.mask_folder import check, need
from datamodules.masks import MaskData
from datamodules.transforms import DataError

# Number among the original 459, which are in alphabetical order, and name. The masks hold the place in this list, from
# 1 (official pascal_ctx.py); 59_labels.txt and OpenMMLab name them in another order, which no mask has.
CLASSES = {
    **{2: "aeroplane", 9: "bag", 18: "bed", 19: "bedclothes", 22: "bench", 23: "bicycle", 25: "bird", 31: "boat"},
    **{33: "book", 34: "bottle", 44: "building", 45: "bus", 46: "cabinet", 59: "car", 65: "cat", 68: "ceiling"},
    **{72: "chair", 80: "cloth", 85: "computer", 98: "cow", 104: "cup", 105: "curtain", 113: "dog", 115: "door"},
    **{144: "fence", 158: "floor", 159: "flower", 162: "food", 187: "grass", 189: "ground", 207: "horse"},
    **{220: "keyboard", 232: "light", 258: "motorbike", 259: "mountain", 260: "mouse", 284: "person", 295: "plate"},
    **{296: "platform", 308: "potted plant", 324: "road", 326: "rock", 347: "sheep", 349: "shelves", 354: "sidewalk"},
    **{355: "sign", 360: "sky", 366: "snow", 368: "sofa", 397: "table", 415: "track", 416: "train", 420: "tree"},
    **{424: "truck", 427: "tv monitor", 440: "wall", 445: "water", 454: "window", 458: "wood"},
}
IMAGES_FROM = "the VOC 2010 trainval archive from host.robots.ox.ac.uk/pascal/VOC/voc2010"
LABELS_FROM = (
    "trainval.tar.gz from cs.stanford.edu/~roozbeh/pascal-context, by `python -m datamodules.pascal_context convert "
    "ROOT FOLDER` (or with trainval_merged.json from OpenMMLab's converter pascal_context.py)"
)


class PascalContext(MaskData):
    """PASCAL-Context: `JPEGImages/*.jpg` and `SegmentationClassContext/*.png` (0 background, 1 to 59), by the lists
    `ImageSets/SegmentationContext/train.txt` or, with the same pictures, VOC's own `ImageSets/Main/train.txt`: 4,998
    pictures to learn from and 5,105 to evaluate.

    Args:
        root: folder of JPEGImages, or one that holds it as VOCdevkit/VOC2010.
        classes: 59, where background does not count, or 60, where it is class 0.
        train, val, test: names of the lists; test None is val.
        masks: folder of the masks.
        size, base, eval_size: see `datamodules.ade20k.Ade20k`.
        **kwargs: see `MaskData`.

    Raises:
        DataError: if folders or lists are missing, or images and masks do not belong together.
    """

    def __init__(
        self,
        root: str = "data/pascal_context",
        classes: Literal[59, 60] = 59,
        train: str = "train",
        val: str = "val",
        test: str | None = None,
        masks: str = "SegmentationClassContext",
        size: tuple[int, int] = (520, 520),
        base: int | None = 520,
        eval_size: int | tuple[int, int] | None = 520,
        **kwargs: Any,
    ) -> None:
        self.root, self.masks = devkit(Path(root)), masks
        self.splits = {"train": train, "val": val, "test": test or val}
        first = 60 - classes
        values = values_of(range(first, 60))
        values[60:255] = -1  # nothing of this set: something else lies there
        super().__init__(
            ["background", *CLASSES.values()][first:], values, size=size, base=base, eval_size=eval_size, **kwargs
        )

    def place(self, split: str) -> str:
        return f"{self.root} ({self.splits[split]}.txt)"

    def pairs(self, split: str) -> list[tuple[Path, Path]]:
        images, masks = self.root / "JPEGImages", self.root / self.masks
        need([images], IMAGES_FROM)
        need([masks], LABELS_FROM)
        name = f"{self.splits[split]}.txt"
        lists = [self.root / "ImageSets" / kind / name for kind in ("SegmentationContext", "Main")]
        path = next((path for path in lists if path.is_file()), None)
        if path is None:
            raise DataError(f"{lists[0]}: no such file, nor {lists[1]}; it comes with {IMAGES_FROM}")
        names = path.read_text().split()
        found = [(images / f"{name}.jpg", masks / f"{name}.png") for name in names]
        for kind, files, source in (
            ("images", [a for a, _ in found], IMAGES_FROM),
            ("masks", [b for _, b in found], LABELS_FROM),
        ):
            missing = [file.name for file in files if not file.is_file()]
            if missing:
                folder = files[0].parent
                raise DataError(
                    f"{folder}: {len(missing)} {kind} of {path} are missing (first {missing[:3]}); {source}"
                )
        return found


def devkit(root: Path) -> Path:
    """The folder of JPEGImages: `root`, or VOCdevkit/VOC2010 in it."""
    inner = root / "VOCdevkit" / "VOC2010"
    return inner if inner.is_dir() else root


def convert(folder: Path, masks: Path) -> int:
    """Write the masks of the original release's `*.mat` (1 to 459; what is not of the 59 becomes background).

    Args:
        folder: of the MATLAB files. masks: where to.

    Returns: how many.

    Raises:
        DataError: if there is none, or one cannot be read.
    """
    from scipy.io import loadmat

    numbers = np.zeros(460, np.uint8)
    numbers[list(CLASSES)] = np.arange(1, 60)
    paths = sorted(folder.glob("*.mat"))
    if not paths:
        raise DataError(f"{folder}: no *.mat; unpack trainval.tar.gz from cs.stanford.edu/~roozbeh/pascal-context")
    masks.mkdir(parents=True, exist_ok=True)
    for path in paths:
        try:
            mask = numbers[np.asarray(loadmat(path)["LabelMap"])]
        except Exception as error:  # scipy raises whatever a broken file leads it to
            raise DataError(f"{path}: no mask of PASCAL-Context ({error}); unpack it anew") from None
        Image.fromarray(mask).save(masks / f"{path.stem}.png")
    return len(paths)


def main(args: Sequence[str] | None = None) -> None:
    """`check` or `convert`."""
    parser = argparse.ArgumentParser(prog="python -m datamodules.pascal_context", description=__doc__)
    parser.add_argument("command", choices=["check", "convert"])
    parser.add_argument("root")
    parser.add_argument("folder", nargs="?", help="of the *.mat files, to convert")
    given = parser.parse_args(args)
    if given.command == "check":
        return check(PascalContext, ["check", given.root])
    if given.folder is None:
        parser.error("convert ROOT FOLDER: which folder holds the *.mat files?")
    try:
        masks = devkit(Path(given.root)) / "SegmentationClassContext"
        print(f"{convert(Path(given.folder), masks)} masks written to {masks}")
    except (DataError, OSError) as error:
        raise SystemExit(str(error)) from None


if __name__ == "__main__":
    main()
