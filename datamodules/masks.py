"""Images with a class for every pixel: what all segmentation data share, and the batch they yield."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypedDict

import albumentations as A
import cv2
import numpy as np
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate
from torchmetrics import Metric

from datamodules.base import DataModule
from datamodules.iou import MeanIoU
from datamodules.mask_files import IGNORE, dims, distinct, histogram, read_mask, resized, stored_by
from datamodules.transforms import Array, DataError, read_image


class MaskBatch(TypedDict):
    """A batch for the segmentation task.

    image: uint8 RGB `[B, 3, H, W]`. mask: uint8 `[B, h, w]`, class numbers, 255 = ignore; of the image's size in
    training, of the original's in evaluation. size: Long `[B, 2]`, the (h, w) to predict at. id: Long `[B]`, the
    sample's index in its data set.
    """

    image: Tensor
    mask: Tensor
    size: Tensor
    id: Tensor


@dataclass(frozen=True)
class MaskAugmentation:
    """Random crops for segmentation; defaults are the official recipe (seg/lib/datasets/base_dataset.py).

    Args:
        scale: range of the factor on the image's size; official code draws 0.5 to 2.1, the paper says 0.5 to 2.
        step: of its grid; 0 draws from the whole range.
        rotation: largest angle in degrees.
        flip: probability of a mirror image.
        brightness: probability of adding one number of -10 to 10 to all values (official, off in its recipes).
        colour: strength of jitter in brightness, contrast, saturation and hue, 0 to 1; not official, 0 is none.
        blur: probability of a slight Gaussian blur.
        focus: probability that a crop is laid around a pixel of one of the image's classes, all as likely, so that
            rare and small things are seen more often than they are; not official, 0 is any place.
    """

    scale: tuple[float, float] = (0.5, 2.1)
    step: float = 0.1
    rotation: float = 0.0
    flip: float = 0.5
    brightness: float = 0.0
    colour: float = 0.0
    blur: float = 0.0
    focus: float = 0.0

    def factor(self, rng: np.random.Generator) -> float:
        low, high = self.scale
        if self.step == 0 or low == high:
            return float(rng.uniform(low, high))
        return float(low + self.step * rng.integers(round((high - low) / self.step) + 1))

    def look(self) -> A.Compose | None:
        """What changes colours only, or None."""
        steps: list[Any] = []
        if self.colour:
            c = self.colour
            steps.append(A.ColorJitter((1 - c, 1 + c), (1 - c, 1 + c), (1 - c, 1 + c), (-c / 8, c / 8), p=0.8))
            steps.append(A.RandomGamma((100 - 50 * c, 100 + 80 * c), p=0.5))
        if self.blur:
            steps.append(A.GaussianBlur((3, 5), p=self.blur))
        return A.Compose(steps) if steps else None


@dataclass(slots=True)
class Masked:
    """A picture and its mask; "" where there is none."""

    path: str
    image_id: int
    mask: str = ""


class MaskDataset(Dataset):
    """Pictures and masks; in training random crops of `size`, else the whole.

    Args:
        instances: what to read.
        values: class number of every stored value 0 to 255, `[256]`, 255 = ignore, -1 = not expected; or of colours
            `{(r, g, b): number}`.
        size: (H, W) of training crops.
        base: longer side that the image is brought to before the random factor; None leaves it.
        augmentation: None for evaluation.
        eval_size: what evaluation resizes images (not masks) to: (H, W), or the longer side; None leaves them.
        swaps: pairs of classes that a mirror exchanges.
        read: RGB uint8 `[H, W, 3]` of an instance's path.
        stored: what a mask file holds, as `stored_by(values)` reads it; None is that.
    """

    def __init__(
        self,
        instances: Sequence[Masked],
        values: Array | dict[tuple[int, int, int], int],
        size: tuple[int, int],
        base: int | None = None,
        augmentation: MaskAugmentation | None = None,
        eval_size: int | tuple[int, int] | None = None,
        swaps: Sequence[Sequence[int]] = (),
        read: Callable[[str], Array] = read_image,
        stored: Callable[[str], Array] | None = None,
    ) -> None:
        self.stored = stored
        self.instances, self.values, self.size, self.base, self.read = instances, values, size, base, read
        self.augmentation, self.eval_size = augmentation, eval_size
        self.look = augmentation.look() if augmentation else None
        self.mirrored = np.arange(256, dtype=np.uint8)
        for a, b in swaps:
            self.mirrored[[a, b]] = b, a

    def __len__(self) -> int:
        return len(self.instances)

    def __getitem__(self, index: int) -> dict[str, Any]:
        instance = self.instances[index]
        image = self.read(instance.path)
        mask = read_mask(instance.mask, self.values, image.shape[:2], self.stored) if instance.mask else None
        size = image.shape[:2]
        if self.augmentation is not None:
            assert mask is not None
            image, mask = self.crop(image, mask)
            size = self.size
        else:
            image = resized(image, self.eval_size)
        sample = {"image": np.stack(cv2.split(image)), "size": np.array(size), "id": index}
        return sample if mask is None else sample | {"mask": mask}

    def crop(self, image: Array, mask: Array) -> tuple[Array, Array]:
        """A random crop at a random scale, black and ignored beyond the image: one warp for all of it."""
        augment = self.augmentation
        assert augment is not None
        rng = np.random.default_rng(int(torch.randint(2**62, ())))
        height, width = image.shape[:2]
        factor = augment.factor(rng) * (1 if self.base is None else self.base / max(height, width))
        scaled = np.array([width, height]) * factor
        target = np.array([self.size[1], self.size[0]])
        # Where the image is smaller it is padded at the right and below, as officially.
        room = np.maximum(scaled - target, 0)
        offset = np.minimum(np.floor(rng.random(2) * (room + 1)), room)
        if rng.random() < augment.focus and (pixel := pixel_of_any_class(mask, rng)) is not None:
            offset = np.clip(np.floor(pixel * factor - rng.random(2) * target), 0, room)
        matrix = np.array([[factor, 0.0, factor / 2 - 0.5 - offset[0]], [0.0, factor, factor / 2 - 0.5 - offset[1]]])
        if augment.rotation:
            angle = rng.uniform(-augment.rotation, augment.rotation)
            centre = (target - 1) / 2
            turn = cv2.getRotationMatrix2D((float(centre[0]), float(centre[1])), angle, 1.0)
            matrix = turn @ np.vstack([matrix, [0, 0, 1]])
        flip = rng.random() < augment.flip
        if flip:
            matrix[0] = -matrix[0]
            matrix[0, 2] += target[0] - 1
        place = (int(target[0]), int(target[1]))
        image = cv2.warpAffine(image, matrix, place, flags=cv2.INTER_LINEAR)
        mask = cv2.warpAffine(mask, matrix, place, flags=cv2.INTER_NEAREST, borderValue=IGNORE)
        mask = cv2.LUT(mask, self.mirrored) if flip else mask
        if rng.random() < augment.brightness:
            image = np.clip(image.astype(np.int16) + rng.integers(-10, 11), 0, 255).astype(np.uint8)
        if self.look is not None:
            self.look.set_random_seed(int(rng.integers(2**31)))
            image = self.look(image=image)["image"]
        return image, mask


def pixel_of_any_class(mask: Array, rng: np.random.Generator) -> Array | None:
    """(x, y) of a random pixel of a random class of `mask`; None if all is ignored."""
    present = np.flatnonzero(histogram(mask)[:IGNORE])
    if not len(present):
        return None
    pixels = np.flatnonzero(mask == rng.choice(present))
    y, x = divmod(int(rng.choice(pixels)), mask.shape[1])
    return np.array([x, y])


class MaskData(DataModule):
    """Loaders of images and masks. A subclass says `pairs(split)`.

    Args:
        class_names: of the classes 0, 1, ...
        values: see `MaskDataset`.
        palette: RGB of every class, for pictures; None chooses.
        size: (H, W) of training crops.
        base, augmentation, eval_size: see `MaskDataset`.
        class_weights: of the loss: a number a class; or from the frequencies in the training masks, "median" (median
            frequency balancing) or "log" (ENet, 1 / ln(1.02 + share)), which reads them all once; None is none.
        flip_pairs: classes that a mirror exchanges, such as left and right arm.
        eval_batch_size: 1 unless all images are of one size.
        **kwargs: see `DataModule`.

    Attributes:
        num_classes, class_names, palette, class_weights, flip_pairs: facts that the command line gives to the task.

    Raises:
        DataError: if a split is empty, images and masks do not belong together, or a mask holds other values.
    """

    kind = MaskDataset
    """What reads the samples."""

    def __init__(
        self,
        class_names: Sequence[str],
        values: Array | dict[tuple[int, int, int], int],
        palette: Sequence[Sequence[int]] | None = None,
        size: tuple[int, int] = (512, 1024),
        base: int | None = None,
        augmentation: MaskAugmentation = MaskAugmentation(),
        eval_size: int | tuple[int, int] | None = None,
        class_weights: list[float] | Literal["median", "log"] | None = None,
        flip_pairs: Sequence[Sequence[int]] = (),
        eval_batch_size: int | None = 1,
        **kwargs: Any,
    ) -> None:
        super().__init__(eval_batch_size=eval_batch_size, **kwargs)
        self.class_names, self.values = list(class_names), values
        self.num_classes = len(self.class_names)
        if len(set(self.class_names)) < self.num_classes:
            raise DataError(f"two classes have the same name: {sorted(self.class_names)}")
        if min(size) < 32:
            raise DataError(f"size is (H, W) of training crops in pixels, at least 32 each, got {list(size)}")
        self.palette = [list(map(int, c)) for c in palette] if palette else distinct(self.num_classes)
        self.size, self.base, self.augmentation, self.eval_size = size, base, augmentation, eval_size
        self.flip_pairs = [list(map(int, pair)) for pair in flip_pairs]
        self.class_weights = self.weights(class_weights)

    def pairs(self, split: str) -> list[tuple[Path, Path]]:
        """Image and mask of every sample of "train", "val" or "test"."""
        raise NotImplementedError

    def weights(self, how: list[float] | Literal["median", "log"] | None) -> list[float] | None:
        if how is None:
            return None
        if not isinstance(how, str):
            if len(how) != self.num_classes:
                raise DataError(f"class_weights has {len(how)} numbers for {self.num_classes} classes")
            return [float(x) for x in how]
        self.prepare_data()  # the masks may have to be made first
        counts = self.pixels("train")
        seen = counts.sum(0) > 0
        if how == "log":
            found = 1 / np.log(1.02 + counts.sum(0) / max(1, counts.sum()))
        else:  # of the pixels of those images that show the class (arXiv 1411.4734)
            shown = np.where(counts > 0, counts.sum(1, keepdims=True), 0).sum(0)
            share = counts.sum(0) / np.maximum(shown, 1)
            found = np.median(share[seen]) / np.where(seen, share, 1)
        found = np.where(seen, found, 1.0)
        rank_zero_info(
            "class weights: " + ", ".join(f"{n} {w:.3g}" for n, w in zip(self.class_names, found, strict=True))
        )
        return [round(float(x), 4) for x in found]

    def pixels(self, split: str) -> Array:
        """Pixels `[N, C]` of every class in every mask of a split."""
        read = self.reader(stored_by(self.values))
        masks = (read_mask(str(mask), self.values, read=read) for _, mask in self.pairs(split))  # one at a time
        return np.array([np.bincount(mask.ravel(), minlength=256)[: self.num_classes] for mask in masks])

    def instances(self, split: str) -> list[Masked]:
        pairs = self.pairs(split)
        if not pairs:
            raise DataError(f"{self.place(split)}: the {split} split is empty; add images, or name another folder")
        faults = [fault for pair in pairs if (fault := self.shifted(*pair))]
        if faults:
            raise DataError(
                f"{len(faults)} masks are of another size (W, H) than their images, so that labels would shift: "
                f"{'; '.join(faults[:3])}"
            )
        return [Masked(str(image), i, str(mask)) for i, (image, mask) in enumerate(pairs)]

    def shifted(self, image: Path, mask: Path) -> str:
        """What is wrong with the sizes of a pair; "" if nothing is, or if it will be skipped when it is read."""
        try:
            a, b = dims(image), dims(mask)
        except DataError:
            if self.skip:
                return ""
            raise
        return "" if a == b else f"{mask} is {b}, {image} is {a}"

    def place(self, split: str) -> str:
        """Where a split lies, for messages."""
        return split

    def setup(self, stage: str) -> None:
        for split in {"fit": ["train", "val"], "validate": ["val"], "test": ["test"]}[stage]:
            if split not in self.datasets:
                train = split == "train"
                self.datasets[split] = self.kind(
                    self.instances(split),
                    self.values,
                    self.size,
                    self.base,
                    self.augmentation if train else None,
                    self.eval_size,
                    self.flip_pairs,
                    self.reader(),
                    self.reader(stored_by(self.values)),
                )

    def loader(self, split: str, **options: Any) -> DataLoader:
        return super().loader(split, collate_fn=collate, **options)

    def metric(self, split: str = "val") -> Metric:
        """mIoU and what belongs to it."""
        return MeanIoU(self.class_names)


def collate(samples: list[dict[str, Any]]) -> Any:
    """As torch does, with a word on images of different sizes."""
    sizes = {(*sample["image"].shape[1:], *sample["size"].tolist()) for sample in samples}
    if len(sizes) > 1:
        shown = [list(size[2:]) for size in sorted(sizes)[:3]]
        raise DataError(f"images of a batch differ in size (H, W: {shown}): set data.eval_batch_size to 1")
    return default_collate(samples)
