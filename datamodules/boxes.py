"""Images with boxes, and masks of instances: how they are read and augmented, and the batch they make."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NotRequired, TypedDict

import albumentations as A
import cv2
import numpy as np
import torch
from pycocotools import mask as rle
from torch import Tensor
from torch.utils.data import Dataset

from datamodules.transforms import Array, DataError, read_image

PADDING = (124, 116, 104)
"""What images are padded with: the mean of ImageNet, all but zero to a network that subtracts it (officially zero)."""


class BoxBatch(TypedDict):
    """A batch for the detection task. Images are padded at the right and below to the largest, and to 32.

    image: uint8 RGB `[B, 3, H, W]`. size: Long `[B, 2]`, (h, w) of each image without padding. original: Long `[B, 2]`,
    (h, w) of its file. boxes: B times float `[N, 4]`, x0, y0, x1, y1 in pixels of `image`, x1 and y1 exclusive. labels:
    B times Long `[N]`, 0 to C - 1. masks: B times uint8 `[N, H, W]`, in training where they are asked for. to_image:
    float `[B, 2, 3]`, from pixels of `image` to pixels of the original (corners, not centres). id: Long `[B]`, the
    image's index in its data set.
    """

    image: Tensor
    size: Tensor
    original: Tensor
    boxes: list[Tensor]
    labels: list[Tensor]
    masks: NotRequired[list[Tensor]]
    to_image: Tensor
    id: Tensor


@dataclass(slots=True)
class Boxed:
    """An image and what is in it.

    Attributes:
        path, image_id, width, height: of the image; a size of 0 is not known.
        boxes: float `[N, 4]`, x0, y0, x1, y1 in pixels. labels: `[N]`, 0 to C - 1.
        crowd: bool `[N]`: regions of many that are not told apart. They are no part of training, and in evaluation
            nothing found there is wrong.
        segmentations: polygons or RLE of each, as COCO has them; or none at all.
    """

    path: str
    image_id: int
    width: int = 0
    height: int = 0
    boxes: Array = field(default_factory=lambda: np.zeros((0, 4)))
    labels: Array = field(default_factory=lambda: np.zeros(0, np.int64))
    crowd: Array = field(default_factory=lambda: np.zeros(0, bool))
    segmentations: list[Any] = field(default_factory=list)


@dataclass(frozen=True)
class BoxAugmentation:
    """What training changes; the default is the official recipe (det/configs/hrnet): mirror images only.

    Args:
        flip: probability of a mirror image.
        shorter: lengths of the shorter side, of which one is drawn (multi-scale training); empty is the data's own.
        scale: range of a further factor on the image's size (large-scale jitter: 0.1 to 2 with a crop).
        crop: (H, W) of a window cut at random where the image is larger; objects of which less than a tenth is left in
            it are forgotten.
        colour: strength of jitter in brightness, contrast, saturation and hue, 0 to 1.
    """

    flip: float = 0.5
    shorter: tuple[int, ...] = ()
    scale: tuple[float, float] = (1.0, 1.0)
    crop: tuple[int, int] | None = None
    colour: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.flip <= 1 or not 0 <= self.colour <= 1:
            raise DataError(f"flip and colour are 0 to 1, got {self.flip} and {self.colour}")
        if not 0 < self.scale[0] <= self.scale[1]:
            raise DataError(f"scale is a range of positive factors, the smaller first, got {list(self.scale)}")
        if self.crop is not None and min(self.crop) < 32:
            raise DataError(f"crop is (H, W) in pixels, at least 32, got {list(self.crop)}")

    def look(self) -> A.Compose | None:
        """What changes colours only, or None."""
        c = self.colour
        if not c:
            return None
        return A.Compose([A.ColorJitter((1 - c, 1 + c), (1 - c, 1 + c), (1 - c, 1 + c), (-c / 8, c / 8), p=0.8)])


class BoxDataset(Dataset):
    """Images brought to one scale, with their boxes.

    Args:
        instances: what to read.
        shorter, longer: the shorter side becomes `shorter`, unless the longer one would exceed `longer`.
        augmentation: None for evaluation.
        masks: whether to draw the instances' masks; training only.
        read: RGB uint8 `[H, W, 3]` of an instance's path.
    """

    def __init__(
        self,
        instances: Sequence[Boxed],
        shorter: int,
        longer: int,
        augmentation: BoxAugmentation | None = None,
        masks: bool = False,
        read: Callable[[str], Array] = read_image,
    ) -> None:
        self.instances, self.shorter, self.longer, self.read = instances, shorter, longer, read
        self.augmentation, self.masks = augmentation, masks and augmentation is not None
        self.look = augmentation.look() if augmentation else None

    def __len__(self) -> int:
        return len(self.instances)

    def __getitem__(self, index: int) -> dict[str, Any]:
        instance, augment = self.instances[index], self.augmentation or BoxAugmentation(flip=0)
        image = self.read(instance.path)
        height, width = image.shape[:2]
        if instance.width and (width, height) != (instance.width, instance.height):
            raise DataError(
                f"{instance.path}: the image is {width}x{height}, its record says {instance.width}x{instance.height}: "
                f"boxes would be misplaced; correct the record, or store the image as it was labelled"
            )
        rng = np.random.default_rng(int(torch.randint(2**62, ())) if self.augmentation else 0)
        shorter = int(rng.choice(augment.shorter)) if augment.shorter else self.shorter
        ratio = min(shorter / min(height, width), self.longer / max(height, width)) * rng.uniform(*augment.scale)
        size = max(1, int(height * ratio + 0.5)), max(1, int(width * ratio + 0.5))
        image = cv2.resize(image, size[::-1], interpolation=cv2.INTER_LINEAR)
        scale = np.array([size[1] / width, size[0] / height])  # of x and y: not quite the same
        kept = ~instance.crowd if self.augmentation else np.ones(len(instance.boxes), bool)
        boxes = instance.boxes[kept] * np.tile(scale, 2)
        window = (0, 0, *size)
        if augment.crop is not None:
            top, left = (int(rng.integers(max(0, a - b) + 1)) for a, b in zip(size, augment.crop, strict=True))
            window = (top, left, min(size[0], top + augment.crop[0]), min(size[1], left + augment.crop[1]))
            image = image[window[0] : window[2], window[1] : window[3]]
            whole = boxes - np.tile([left, top], 2)
            boxes = whole.clip(0, np.tile(image.shape[1::-1], 2))
            extent = [(b[:, 2:] - b[:, :2]).prod(1) for b in (boxes, whole)]
            boxes, cut = boxes[rest := extent[0] >= 0.1 * extent[1]], (boxes != whole).any(1)[rest]
            kept[np.flatnonzero(kept)] = rest
        masks = None
        if self.masks:
            given = [s for s, k in zip(instance.segmentations, kept, strict=True) if k]
            masks = np.empty((len(given), *image.shape[:2]), np.uint8)
            for mask, outline in zip(masks, given, strict=True):
                mask[:] = draw(outline, (height, width), size)[window[0] : window[2], window[1] : window[3]]
            if augment.crop is not None:  # what is left of an object may not fill what is left of its box
                for i in np.flatnonzero(cut):
                    boxes[i] = bounds(masks[i])
                shown = (boxes[:, 2:] > boxes[:, :2]).all(1)
                kept[np.flatnonzero(kept)] = shown
                boxes, masks = boxes[shown], masks[shown]
        if rng.random() < augment.flip:
            image = cv2.flip(image, 1)
            boxes[:, [0, 2]] = image.shape[1] - boxes[:, [2, 0]]
            for mask in () if masks is None else masks:
                mask[:] = cv2.flip(mask, 1)
        if self.look is not None:
            self.look.set_random_seed(int(rng.integers(2**31)))
            image = self.look(image=np.ascontiguousarray(image))["image"]
        sample = {
            "image": torch.from_numpy(np.stack(cv2.split(image))),
            "original": torch.tensor([height, width]),
            "boxes": torch.from_numpy(boxes.astype(np.float32)),
            "labels": torch.from_numpy(instance.labels[kept].astype(np.int64)),
            "to_image": torch.tensor([[1 / scale[0], 0, 0], [0, 1 / scale[1], 0]], dtype=torch.float32),
            "id": index,
        }
        return sample if masks is None else sample | {"masks": torch.from_numpy(masks)}


def bounds(mask: Array) -> Array:
    """x0, y0, x1, y1 of what a mask `[H, W]` shows; zeros if nothing."""
    x, y = np.flatnonzero(mask.any(0)), np.flatnonzero(mask.any(1))
    return np.array([x[0], y[0], x[-1] + 1, y[-1] + 1] if len(x) else np.zeros(4), np.float64)


def draw(segmentation: Any, original: tuple[int, int], size: tuple[int, int]) -> Array:
    """uint8 `[h, w]` of the polygons or the RLE of an image of `original` size (H, W), at `size`."""
    if isinstance(segmentation, dict):
        code = segmentation
        if isinstance(code["counts"], list):
            code = rle.frPyObjects(code, *code["size"])
        return cv2.resize(rle.decode(code), size[::-1], interpolation=cv2.INTER_NEAREST)
    factor = np.array([size[1] / original[1], size[0] / original[0]])  # polygons are scaled before they are drawn
    scaled = [(np.reshape(polygon, (-1, 2)) * factor).ravel().tolist() for polygon in segmentation]
    columns = rle.decode(rle.merge(rle.frPyObjects(scaled, *size))).T  # which lie one after the other in memory
    return cv2.transpose(columns)


def collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """A batch, padded to a common size that 32 divides."""
    sizes = [sample["image"].shape[1:] for sample in samples]
    height, width = (-(-max(size[i] for size in sizes) // 32) * 32 for i in (0, 1))
    image = torch.tensor(PADDING, dtype=torch.uint8).view(1, 3, 1, 1).repeat(len(samples), 1, height, width)
    for canvas, sample, (h, w) in zip(image, samples, sizes, strict=True):
        canvas[:, :h, :w] = sample["image"]
    batch = {
        "image": image,
        "size": torch.tensor([list(size) for size in sizes]),
        "original": torch.stack([sample["original"] for sample in samples]),
        "boxes": [sample["boxes"] for sample in samples],
        "labels": [sample["labels"] for sample in samples],
        "to_image": torch.stack([sample["to_image"] for sample in samples]),
        "id": torch.tensor([sample["id"] for sample in samples]),
    }
    if "masks" in samples[0]:
        batch["masks"] = [
            torch.nn.functional.pad(sample["masks"], (0, width - w, 0, height - h))
            for sample, (h, w) in zip(samples, sizes, strict=True)
        ]
    return batch
