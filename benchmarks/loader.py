"""Samples a second and core: `taskset -c 1 python benchmarks/loader.py DATA/coco-sample`.

The peer does what JointsDataset of the official pose code does (loads the whole picture, flips, warps, normalises and
draws heatmaps in the loader), written anew from its steps. A call goes once over all people through a `DataLoader`.
"""

import argparse
import copy
import functools
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from timing import medians, report
from torch.utils.data import DataLoader, Dataset, Subset
from torchvision import transforms

import datamodules.decoded
from datamodules import boxes
from datamodules import masks as masks_
from datamodules.base import DataModule
from datamodules.cityscapes import Cityscapes
from datamodules.coco_instances import CocoInstances
from datamodules.coco_keypoints import CocoKeypoints
from datamodules.decoded import Decoded
from datamodules.image_folder import LabelAugmentation, LabelDataset, Labelled, centre
from datamodules.keypoints import KeypointDataset
from datamodules.transforms import PoseAugmentation, crop_of_box, read_upright

SIZE, MAPS, SIGMA = (192, 256), (48, 64), 2
"""(W, H) of crops and of heatmaps, as the official settings have them."""


def official_matrix(centre: np.ndarray, scale: np.ndarray, rotation: float) -> np.ndarray:
    """By three points in float32: the middle, the middle of the upper edge, and one at a right angle to both."""

    def third(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return b + np.array([b[1] - a[1], a[0] - b[0]], dtype=np.float32)

    width, angle = (scale * 200.0)[0], np.pi * rotation / 180
    up = [width * 0.5 * np.sin(angle), width * -0.5 * np.cos(angle)]
    source, target = np.zeros((3, 2), dtype=np.float32), np.zeros((3, 2), dtype=np.float32)
    source[0], source[1] = centre, centre + up
    target[0] = [SIZE[0] * 0.5, SIZE[1] * 0.5]
    target[1] = target[0] + np.array([0, SIZE[0] * -0.5], dtype=np.float32)
    source[2], target[2] = third(source[0], source[1]), third(target[0], target[1])
    return cv2.getAffineTransform(source, target)


class Official(Dataset):
    """The steps of the official loader, in its order."""

    def __init__(self, data: KeypointDataset) -> None:
        self.pairs, self.upper, self.train = data.facts.flip_pairs, data.upper, data.augmentation is not None
        self.records = []
        for instance in data.instances:
            centre, extent = crop_of_box(instance.box, SIZE[::-1])
            joints, seen = np.zeros((len(instance.keypoints), 3)), np.zeros((len(instance.keypoints), 3))
            joints[:, :2], seen[:, :2] = instance.keypoints, (instance.visible > 0)[:, None]
            self.records.append(
                {"image": instance.path, "center": centre, "scale": extent / 200, "joints": joints, "seen": seen}
            )
        normalise = transforms.Normalize(mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225])
        self.transform = transforms.Compose([transforms.ToTensor(), normalise])

    def __len__(self) -> int:
        return len(self.records)

    def crop(self, image: np.ndarray, centre: Any, scale: Any, rotation: float) -> tuple[np.ndarray, np.ndarray]:
        matrix = official_matrix(centre, scale, rotation)
        return cv2.warpAffine(image, matrix, SIZE, flags=cv2.INTER_LINEAR), matrix

    def read(self, path: str) -> np.ndarray:
        return cv2.cvtColor(cv2.imread(path, cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION), cv2.COLOR_BGR2RGB)

    def half(self, joints: np.ndarray, seen: np.ndarray) -> Any:
        upper = [j for j, s, u in zip(joints, seen, self.upper, strict=True) if s[0] > 0 and u]
        lower = [j for j, s, u in zip(joints, seen, self.upper, strict=True) if s[0] > 0 and not u]
        chosen = upper if (np.random.randn() < 0.5 and len(upper) > 2) or len(lower) <= 2 else lower  # noqa: NPY002
        if len(chosen) < 2:
            return None
        points = np.array(chosen, dtype=np.float32)
        low, high = np.amin(points, axis=0), np.amax(points, axis=0)
        _, extent = crop_of_box(np.array([*low[:2], *(high - low)[:2]]), SIZE[::-1], 1.5)
        return points.mean(axis=0)[:2], extent / 200

    def __getitem__(self, index: int) -> Any:
        record = copy.deepcopy(self.records[index])
        image = self.read(record["image"])
        joints, seen, centre, scale, rotation = record["joints"], record["seen"], record["center"], record["scale"], 0
        if self.train:
            if np.sum(seen[:, 0]) > 8 and np.random.rand() < 0.3:  # noqa: NPY002
                centre, scale = self.half(joints, seen) or (centre, scale)
            scale = scale * np.clip(np.random.randn() * 0.35 + 1, 0.65, 1.35)  # noqa: NPY002
            rotation = np.clip(np.random.randn() * 45, -90, 90) if random.random() <= 0.6 else 0  # noqa: NPY002
            if random.random() <= 0.5:
                image = image[:, ::-1, :]
                joints[:, 0] = image.shape[1] - joints[:, 0] - 1
                for a, b in self.pairs:
                    joints[[a, b]], seen[[a, b]] = joints[[b, a]], seen[[b, a]]
                joints = joints * seen
                centre[0] = image.shape[1] - centre[0] - 1
        crop, matrix = self.crop(image, centre, scale, rotation)
        tensor = self.transform(crop)
        for i in range(len(joints)):
            if seen[i, 0] > 0:
                joints[i, :2] = np.dot(matrix, np.array([joints[i, 0], joints[i, 1], 1.0]))[:2]
        target, weight = self.heatmaps(joints, seen)
        meta = {"image": record["image"], "joints": joints, "seen": seen, "center": centre, "scale": scale}
        return tensor, torch.from_numpy(target), torch.from_numpy(weight), meta | {"rotation": float(rotation)}

    def heatmaps(self, joints: np.ndarray, seen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        weight = seen[:, :1].astype(np.float32)
        target = np.zeros((len(joints), MAPS[1], MAPS[0]), dtype=np.float32)
        reach = SIGMA * 3
        for i in range(len(joints)):
            stride = np.array(SIZE) / np.array(MAPS)
            x, y = int(joints[i][0] / stride[0] + 0.5), int(joints[i][1] / stride[1] + 0.5)
            start, end = [x - reach, y - reach], [x + reach + 1, y + reach + 1]
            if start[0] >= MAPS[0] or start[1] >= MAPS[1] or end[0] < 0 or end[1] < 0:
                weight[i] = 0
                continue
            across = np.arange(0, 2 * reach + 1, 1, np.float32)
            patch = np.exp(-((across - reach) ** 2 + (across[:, None] - reach) ** 2) / (2 * SIGMA**2))
            left, right = max(0, -start[0]), min(end[0], MAPS[0]) - start[0]
            top, bottom = max(0, -start[1]), min(end[1], MAPS[1]) - start[1]
            if weight[i] > 0.5:
                place = target[i][max(0, start[1]) : min(end[1], MAPS[1]), max(0, start[0]) : min(end[0], MAPS[0])]
                place[...] = patch[top:bottom, left:right]
        return target, weight


@contextmanager
def timed(spent: dict[str, float], **places: list[tuple[Any, str]]) -> Iterator[None]:
    """Sums the seconds within functions, by the names of `places`: lists of (module, function)."""

    def wrapped(name: str, function: Callable) -> Callable:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                spent[name] = spent.get(name, 0) + time.perf_counter() - start

        return call

    before = [(owner, name, getattr(owner, name)) for places_ in places.values() for owner, name in places_]
    for key, places_ in places.items():
        for owner, name in places_:
            setattr(owner, name, wrapped(key, getattr(owner, name)))
    try:
        yield
    finally:
        for owner, name, function in before:
            setattr(owner, name, function)


def shares(call: Callable[[], Any]) -> str:
    """Where the time of a call goes."""
    spent: dict[str, float] = {}
    start = time.perf_counter()
    decode = [(cv2, "imread"), (cv2, "imdecode"), (np, "fromfile"), (datamodules.decoded, "load")]
    with timed(spent, decode=decode, warp=[(cv2, "warpAffine")]):
        call()
    whole = time.perf_counter() - start
    parts = {name: spent.get(name, 0) / whole for name in ("decode", "warp")}
    return ", ".join(f"{name} {value:.0%}" for name, value in (parts | {"rest": 1 - sum(parts.values())}).items())


class Drawn:
    """An augmentation that gives what it was told."""

    def __init__(self, centre: np.ndarray, extent: np.ndarray, rotation: float, flip: bool) -> None:
        self.centre, self.extent, self.rotation, self.flip = centre, extent, rotation, float(flip)

    def half(self, *_: Any) -> tuple[np.ndarray, np.ndarray]:
        return self.centre.copy(), self.extent

    def factor(self, _: Any) -> float:
        return 1.0

    def angle(self, _: Any) -> float:
        return self.rotation


def differing(data: KeypointDataset, peer: Official, rounds: int = 4) -> tuple[int, int]:
    """Pixels of random crops that are not the official pipeline's, and how many there are."""
    rng, wrong, count, kept = np.random.default_rng(0), 0, 0, data.augmentation
    for index, instance in enumerate(data.instances * rounds):
        index %= len(data)
        centre, extent = crop_of_box(instance.box, SIZE[::-1])
        extent = extent * PoseAugmentation().factor(rng)
        rotation, flip = PoseAugmentation().angle(rng), rng.random() < 0.5
        data.augmentation = Drawn(centre, extent, rotation, flip)  # type: ignore[assignment]
        ours = data[index]["image"].transpose(1, 2, 0)  # type: ignore[union-attr]
        image = peer.read(instance.path)
        if flip:
            image, centre = image[:, ::-1, :], np.array([image.shape[1] - centre[0] - 1, centre[1]])
        theirs, _ = peer.crop(image, centre, extent / 200, rotation)
        wrong, count = wrong + int((ours != theirs).any(2).sum()), count + theirs.shape[0] * theirs.shape[1]
    data.augmentation = kept
    return wrong, count


def through(data: Dataset, batch: int, workers: int, collate: Any = None) -> Callable[[], None]:
    loader = DataLoader(data, batch, num_workers=workers, persistent_workers=workers > 0, collate_fn=collate)

    def call() -> None:
        for _ in loader:
            pass

    return call


def people(root: str, folder: str) -> Iterator[tuple[str, str, dict[str, Dataset], Official]]:
    """Case, peer, candidates of the pose loader."""
    data = CocoKeypoints(root, workers=0)
    data.setup("fit")
    for split in ("train", "val"):
        ours: Any = data.datasets[split]
        peer, train = Official(ours), split == "train"
        candidates: dict[str, Dataset] = {"official style": peer, "exact": ours}
        if train:
            data.reduced = True
            candidates["reduced"] = data.dataset(ours.instances, train)
            data.reduced = False
        data.decoded = Decoded(folder, free=1)
        candidates["decoded"] = data.dataset(ours.instances, train)
        data.decoded = None
        case = f"{len(ours)} people in {len({i.path for i in ours.instances})} pictures"
        yield f"pose {split}, {case}", "official style", candidates, peer


def others(root: str, folder: str) -> Iterator[tuple[str, dict[str, Dataset], Any, int]]:
    """Case, candidates, collate function and batch size of the other loaders."""
    kept = Decoded(folder, free=1)
    for masks in (False, True):
        both: dict[str, Dataset] = {}
        for name, decoded in (("exact", None), ("decoded", kept)):
            data: DataModule = CocoInstances(root, workers=0, masks=masks, decoded=decoded)
            data.setup("fit")
            both[name] = Subset(data.datasets["train"], range(32))
        yield "boxes and masks train, 800 x 1333" if masks else "boxes train, 800 x 1333", both, boxes.collate, 2
    pictures = [Labelled(str(p), i, 0) for i, p in enumerate(sorted((Path(root) / "train2017").glob("*.jpg")))]
    read = functools.partial(kept.read, read_upright)
    for name, transform in (("train", LabelAugmentation().transform(224)), ("val", centre(224, 256))):
        plain, fast = LabelDataset(pictures, transform), LabelDataset(pictures, transform, read)
        yield f"labels {name}, 224 x 224", {"exact": plain, "decoded": fast}, None, 32
    street = Path(folder) / "cityscapes"
    street_scenes(street, pictures)
    for split in ("train", "val"):
        both = {}
        for name, decoded in (("exact", None), ("decoded", kept)):
            data = Cityscapes(str(street), workers=0, decoded=decoded)
            data.setup("fit")
            both[name] = data.datasets[split]
        yield f"Cityscapes' layout {split}, PNGs of 1024 x 2048 (enlarged photographs)", both, masks_.collate, 1


def street_scenes(root: Path, pictures: list[Labelled], count: int = 4) -> None:
    """As large as Cityscapes' and laid out as they are: enlarged photographs, and blocks of all its numbers."""
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for i, picture in enumerate(pictures[:count]):
            image = cv2.resize(cv2.imread(picture.path), (2048, 1024), interpolation=cv2.INTER_CUBIC)
            mask = cv2.resize(rng.integers(0, 34, (16, 32), np.uint8), (2048, 1024), interpolation=cv2.INTER_NEAREST)
            for kind, ending, content in (
                ("leftImg8bit", "leftImg8bit", image),
                ("gtFine", "gtFine_labelIds", mask),
            ):
                place = root / kind / split / "town" / f"town_{i}_{ending}.png"
                place.parent.mkdir(parents=True, exist_ok=True)
                cv2.imwrite(str(place), content)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", help="folder in COCO's layout, as coco-sample")
    parser.add_argument("--workers", type=int, default=0, help="processes of every loader (default: this one)")
    parser.add_argument("--batch-size", type=int, default=32, help="of people")
    parser.add_argument("--pose", action="store_true", help="the pose loader alone")
    parser.add_argument("--folder", help="of the decoded pictures (default: a temporary one)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        folder, where = args.folder or temporary, f"batch {args.batch_size}, {args.workers} workers"
        for case, peer, candidates, official in people(args.root, folder):
            calls = {name: through(each, args.batch_size, args.workers) for name, each in candidates.items()}
            seconds = medians(calls)
            notes = {name: shares(call) for name, call in calls.items()} if not args.workers else {}
            for name in ("exact", "decoded") if official.train else ():
                wrong, count = differing(candidates[name], official)  # type: ignore[arg-type]
                notes[name] = f"{notes.get(name, '')}; {wrong} of {count} pixels differ"
            seconds = {name: value / len(official) for name, value in seconds.items()}
            report("loader", f"{case}, {where}", peer, seconds, notes)
        for case, candidates, collate, batch in () if args.pose else others(args.root, folder):
            calls = {k: through(each, batch, args.workers, collate) for k, each in candidates.items()}
            count = len(next(iter(candidates.values())))  # type: ignore[arg-type]
            seconds = {name: value / count for name, value in medians(calls).items()}
            report("loader", f"{case}, batch {batch}, {args.workers} workers", "exact", seconds)


if __name__ == "__main__":
    main()
