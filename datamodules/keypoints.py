"""Keypoints of boxed instances: crops to learn from and to judge, and what data modules of them share."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypedDict

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchmetrics import Metric, MetricCollection

from datamodules.base import DataModule
from datamodules.transforms import (
    Array,
    PoseAugmentation,
    apply,
    crop_matrix,
    crop_of_box,
    invert,
    mirror,
    read_image,
    read_reduced,
    reduced,
    rows_of,
    warp,
    warp_mirrored,
)


@dataclass(slots=True)
class Instance:
    """One thing to find keypoints of: a person, an animal, a face.

    Attributes:
        path: of the image; "file.mp4#12" is frame 12 of a video.
        box: x, y, w, h in image pixels; score: of that box, 1.0 for ground truth.
        keypoints: `[K, 2]` image pixels; visible: `[K]`, 0 not labelled, 1 labelled but hidden, 2 visible.
        area: of the object in square pixels, what OKS is measured against.
        norm: reference length in pixels for PCK-like metrics, nan if the data set has none.
    """

    path: str
    image_id: int
    box: Array
    keypoints: Array
    visible: Array
    id: int = 0
    category_id: int = 1
    score: float = 1.0
    area: float = 0.0
    norm: float = float("nan")


class KeypointBatch(TypedDict):
    """A batch for the pose task.

    image: uint8 RGB `[B, 3, H, W]`. keypoints: float `[B, K, 2]`, pixels of `image`, x first. visible: float `[B, K]`,
    above 0 where a joint is labelled and to be learned. to_image: float `[B, 2, 3]`, from pixels of `image` to pixels
    of the original. id: Long `[B]`, the sample's index in its data set, unique.
    """

    image: Tensor
    keypoints: Tensor
    visible: Tensor
    to_image: Tensor
    id: Tensor


@dataclass(frozen=True)
class Keypoints:
    """The facts of a kind of skeleton.

    Attributes:
        names: of the K keypoints. skeleton: 0-based pairs to draw. flip_pairs: 0-based (left, right) pairs that a
            mirror swaps. sigmas: OKS constants, COCO's unit (0.025 for an eye).
    """

    names: list[str]
    skeleton: list[list[int]] = field(default_factory=list)
    flip_pairs: list[list[int]] = field(default_factory=list)
    sigmas: list[float] = field(default_factory=list)

    @property
    def flip_index(self) -> list[int]:
        """For every keypoint the one it becomes in a mirror."""
        index = list(range(len(self.names)))
        for a, b in self.flip_pairs:
            index[a], index[b] = b, a
        return index

    @property
    def upper(self) -> list[bool]:
        """Which keypoints belong to the upper body, told by name, for half-body crops."""
        lower = ("hip", "knee", "ankle", "foot", "toe", "heel", "pelvis", "tail", "hock", "hind")
        return [not any(part in name.lower() for part in lower) for name in self.names]


class KeypointDataset(Dataset):
    """Crops of instances.

    Args:
        instances: what to crop.
        facts: of their skeleton.
        size: (H, W) of the crop.
        augmentation: None for evaluation.
        padding: of the box before cropping.
        hidden: "supervise" learns labelled but hidden joints as the official code does, "ignore" leaves them out of the
            loss (evaluation always counts them, as COCO does).
        udp: crop by UDP's matrix.
        read: RGB uint8 `[H, W, 3]` of an instance's path; in training also given how many rows of it are needed.
        reduced: read JPEGs at 1 / 2, 1 / 4 or 1 / 8 of their size where the crop is smaller by as much: faster for
            large photographs, and other pixels, smoother ones.
    """

    def __init__(
        self,
        instances: Sequence[Instance],
        facts: Keypoints,
        size: tuple[int, int],
        augmentation: PoseAugmentation | None = None,
        padding: float = 1.25,
        hidden: Literal["supervise", "ignore"] = "supervise",
        udp: bool = False,
        read: Callable[..., Array] = read_image,
        reduced: bool = False,
    ) -> None:
        self.instances, self.facts, self.size, self.read = instances, facts, size, read
        self.augmentation, self.padding, self.hidden, self.udp = augmentation, padding, hidden, udp
        self.flip_index = np.array(facts.flip_index, dtype=np.int64)
        self.upper = np.array(facts.upper, dtype=bool)
        self.reduced = reduced
        self.last: tuple[str, Array] | None = None

    def __len__(self) -> int:
        return len(self.instances)

    def __getitem__(self, index: int) -> dict[str, np.ndarray | int]:
        instance = self.instances[index]
        keypoints, visible = instance.keypoints, instance.visible
        centre, extent = crop_of_box(instance.box, self.size, self.padding)
        rotation, flip = 0.0, False
        augment = self.augmentation
        if augment is not None:
            # Seeded from torch's generator, which `Seeded` seeds by epoch and sample.
            rng = np.random.default_rng(int(torch.randint(2**62, ())))
            half = augment.half(keypoints, visible, self.upper, self.size, rng)
            if half is not None:
                centre, extent = half
            extent = extent * augment.factor(rng)
            rotation = augment.angle(rng)
            flip = rng.random() < augment.flip
        matrix = crop_matrix(centre, extent, self.size, rotation, self.udp)
        image, factor, width = self.picture(instance.path, matrix, extent)
        if flip:
            # The centre is mirrored before the rotation is applied, so that both senses of rotation stay equal.
            matrix = crop_matrix(np.array([width - 1 - centre[0], centre[1]]), extent, self.size, rotation, self.udp)
            keypoints, visible = keypoints[self.flip_index], visible[self.flip_index]
        if factor == 1:
            crop = (warp_mirrored if flip else warp)(image, matrix, self.size)
        matrix = mirror(matrix, width) if flip else matrix
        if factor > 1:
            crop = warp(image, reduced(matrix, factor), self.size)
        learned = visible > (0 if self.hidden == "supervise" else 1)
        placed = np.where((visible > 0)[:, None], apply(matrix, keypoints), 0)
        return {
            "image": np.stack(cv2.split(crop)),
            "keypoints": placed.astype(np.float32),
            "visible": learned.astype(np.float32),
            "to_image": invert(matrix).astype(np.float32),
            "id": index,
        }

    def picture(self, path: str, matrix: Array, extent: Array) -> tuple[Array, int, int]:
        """What the crop by `matrix` is made of: the picture or its top; what it is reduced by; and its true width."""
        if self.reduced:
            factor = max((f for f in (2, 4, 8) if (extent[::-1] >= np.multiply(f, self.size)).all()), default=1)
            if factor > 1:
                return read_reduced(path, factor)
        if self.augmentation is not None:
            image = self.read(path, rows_of(matrix, self.size))
        else:  # people of one picture come one after the other
            if self.last is None or self.last[0] != path:
                self.last = path, self.read(path)
            image = self.last[1]
        return image, 1, image.shape[1]


class KeypointData(DataModule):
    """Top-down keypoint data: what `CocoKeypoints`, `Mpii` and `Rendered` share.

    Args:
        facts: of the skeleton; its fields become attributes that the command line links to the task.
        size: (H, W) of the network's input.
        padding: of the box before it is cropped, officially 1.25.
        augmentation: of training crops.
        hidden: whether joints that are labelled but hidden are learned ("supervise", official) or left out ("ignore").
        udp: crop by UDP's matrix; goes with the codec's `encoding: udp`.
        reduced: see `KeypointDataset`; for training.
        **kwargs: see `DataModule`.

    Attributes:
        num_keypoints, keypoint_names, skeleton, flip_pairs, sigmas: facts, there as soon as the module is constructed.
    """

    def __init__(
        self,
        facts: Keypoints,
        size: tuple[int, int] = (256, 192),
        padding: float = 1.25,
        augmentation: PoseAugmentation = PoseAugmentation(),  # noqa: B008 (frozen)
        hidden: Literal["supervise", "ignore"] = "supervise",
        udp: bool = False,
        reduced: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if min(size) < 1:
            raise ValueError(f"size is height and width of the crops in pixels, at least 1 each, got {list(size)}")
        self.facts = facts
        self.num_keypoints = len(facts.names)
        self.keypoint_names = facts.names
        self.skeleton = facts.skeleton
        self.flip_pairs = facts.flip_pairs
        self.sigmas = facts.sigmas
        self.size, self.padding, self.augmentation = (size[0], size[1]), padding, augmentation
        self.hidden, self.udp, self.reduced = hidden, udp, reduced

    def instances(self, split: str) -> list[Instance]:
        """Instances of "train", "val" or "test"; a subclass says where from."""
        raise NotImplementedError

    def metric(self, split: str = "val") -> Metric | MetricCollection:
        """A fresh metric of the data set's own protocol: `update(prediction, batch)`, `compute() -> dict`."""
        raise NotImplementedError

    def dataset(self, instances: Sequence[Instance], train: bool = False) -> KeypointDataset:
        return KeypointDataset(
            instances,
            self.facts,
            self.size,
            self.augmentation if train else None,
            self.padding,
            self.hidden if train else "supervise",
            self.udp,
            self.reader(),
            self.reduced and train,
        )

    def setup(self, stage: str) -> None:
        splits = {"fit": ["train", "val"], "validate": ["val"], "test": ["test"], "predict": ["predict"]}[stage]
        for split in splits:
            if split not in self.datasets:
                source = "val" if split == "predict" else split
                instances, first = self.instances(source), dict[str, int]()
                if split != "train":  # people of one picture together, so that it is decoded once
                    instances = sorted(instances, key=lambda i: first.setdefault(i.path, len(first)))
                self.datasets[split] = self.dataset(instances, train=split == "train")
