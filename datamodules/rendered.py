"""The embedded default: scenes drawn by the project itself, kept in a cache folder in COCO's format."""

import csv
import json
import multiprocessing
import os
import shutil
import sys
import threading
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from pycocotools import mask as rle
from torchmetrics import Metric, MetricCollection
from tqdm import tqdm

from datamodules import scenes
from datamodules.box_data import BoxData
from datamodules.boxes import Boxed
from datamodules.coco_file import CocoFile, pairs_of, sigmas_of
from datamodules.coco_instances import boxed, read_instances
from datamodules.image_folder import ImageFolder
from datamodules.keypoints import Instance, KeypointData, Keypoints
from datamodules.loader import cores
from datamodules.mask_folder import MaskFolder
from datamodules.metrics import KeypointAP, KeypointError
from datamodules.transforms import DataError


@dataclass(frozen=True)
class Cache:
    """Scenes on disk: where they are, and how to draw them.

    Args:
        root, train, val, seed, scene: see `Rendered`.
    """

    root: Path
    train: int
    val: int
    seed: int
    scene: tuple[int, int]

    @property
    def folder(self) -> Path:
        """Of exactly these settings: other settings never overwrite it."""
        height, width = self.scene
        return self.root / f"v{scenes.VERSION}-{height}x{width}-{self.train}+{self.val}-seed{self.seed}"

    def fill(self) -> None:
        """Draw what is not there yet."""
        for number, (split, count) in enumerate((("train", self.train), ("val", self.val))):
            # Another seed for each split: no scene of one is in the other.
            if not complete(self.folder, split, count, 2 * self.seed + number, self.scene):
                write(self.folder, split, count, 2 * self.seed + number, self.scene)


class Rendered(KeypointData):
    """People in drawn scenes, COCO's 17 keypoints.

    Args:
        root: cache folder; drawn on first use, deterministic by `seed`.
        train, val: numbers of scenes (of some 2.3 people each).
        seed: of the drawing.
        scene: (H, W) of a scene.
        **kwargs: see `KeypointData`.
    """

    def __init__(
        self,
        root: str = "runs/data/rendered",
        train: int = 2000,
        val: int = 200,
        seed: int = 0,
        scene: tuple[int, int] = (240, 320),
        **kwargs: Any,
    ) -> None:
        names = list(scenes.KEYPOINTS)
        facts = Keypoints(names, [[a - 1, b - 1] for a, b in scenes.SKELETON], pairs_of(names), sigmas_of(names))
        super().__init__(facts, **kwargs)
        self.cache = Cache(Path(root), train, val, seed, scene)

    def prepare_data(self) -> None:
        self.cache.fill()

    def file(self, split: str) -> CocoFile:
        folder = self.cache.folder
        return CocoFile(folder / "annotations" / f"person_keypoints_{split}.json", folder / split)

    def instances(self, split: str) -> list[Instance]:
        return self.file("val" if split == "test" else split).instances()

    def metric(self, split: str = "val") -> Metric | MetricCollection:
        instances = self.datasets[split].instances  # type: ignore[attr-defined]
        ap = KeypointAP(instances, self.file("val").content, self.facts.sigmas)
        return MetricCollection({"ap": ap, "error": KeypointError(instances)}, compute_groups=False)


class RenderedLabels(ImageFolder):
    """The same scenes, labelled by their kind: indoor, street, field, beach.

    Args:
        root, train, val, seed, scene: see `Rendered`.
        **kwargs: see `ImageFolder`.
    """

    def __init__(
        self,
        root: str = "runs/data/rendered",
        train: int = 2000,
        val: int = 200,
        seed: int = 0,
        scene: tuple[int, int] = (240, 320),
        **kwargs: Any,
    ) -> None:
        self.cache = Cache(Path(root), train, val, seed, scene)
        lists = "annotations/labels_train.csv", "annotations/labels_val.csv"
        images = {"train": "train", "val": "val", "test": "val"}
        super().__init__(str(self.cache.folder), lists[0], lists[1], images=images, **kwargs)

    def prepare_data(self) -> None:
        self.cache.fill()

    def classes(self) -> list[str]:
        return sorted(scenes.SCENE_CLASSES)  # known before anything is drawn


class RenderedMasks(MaskFolder):
    """The same scenes, with a class for every pixel.

    Args:
        root, train, val, seed, scene: see `Rendered`.
        **kwargs: see `MaskFolder`.
    """

    def __init__(
        self,
        root: str = "runs/data/rendered",
        train: int = 2000,
        val: int = 200,
        seed: int = 0,
        scene: tuple[int, int] = (240, 320),
        **kwargs: Any,
    ) -> None:
        self.cache = Cache(Path(root), train, val, seed, scene)
        super().__init__(str(self.cache.folder), list(scenes.SEMANTIC), images="{}", masks="semantic/{}", **kwargs)

    def prepare_data(self) -> None:
        self.cache.fill()


class RenderedBoxes(BoxData):
    """The same scenes, with a box and a mask for every thing.

    Args:
        root, train, val, seed, scene: see `Rendered`.
        **kwargs: see `BoxData`.
    """

    def __init__(
        self,
        root: str = "runs/data/rendered",
        train: int = 2000,
        val: int = 200,
        seed: int = 0,
        scene: tuple[int, int] = (240, 320),
        shorter: int = 240,
        longer: int = 320,
        **kwargs: Any,
    ) -> None:
        self.cache = Cache(Path(root), train, val, seed, scene)
        super().__init__(list(scenes.CLASSES), shorter=shorter, longer=longer, **kwargs)

    def prepare_data(self) -> None:
        self.cache.fill()

    def truth(self, split: str) -> dict[str, Any]:
        split = "val" if split == "test" else split
        return read_instances(self.cache.folder / "annotations" / f"instances_{split}.json", self.masks)

    def instances(self, split: str) -> list[Boxed]:
        images = self.cache.folder / ("val" if split == "test" else split)
        return boxed(self.truth(split), images, self.category_ids, self.masks)


def write(
    root: str | os.PathLike,
    split: str,
    count: int,
    seed: int,
    size: tuple[int, int] = (240, 320),
    workers: int | None = None,
) -> None:
    """Store scenes 0 .. count - 1 of `seed` under `root`, laid out as COCO does.

    `<split>/000000.jpg`, `semantic/<split>/000000.png` (values index SEMANTIC) and in
    `annotations`: `instances_<split>.json`, `person_keypoints_<split>.json` (the same people, the
    same ids) and `labels_<split>.csv` (file_name, label). Does nothing where `complete`. The files
    appear when all are made, and a second process that writes the same split waits.

    Args:
        count: number of scenes, at least 1.
        workers: drawing processes, None for one a CPU, 0 to draw in this process.

    Raises:
        OSError: `root` cannot be written.
        DataError: count below 1.
        ValueError: arguments that `draw` rejects.
    """
    if count < 1:
        raise DataError(f"{root}: {count} scenes to draw, at least 1 it must be (train, val)")
    root = Path(root)
    try:
        (root / "annotations").mkdir(parents=True, exist_ok=True)
        (root / "semantic").mkdir(exist_ok=True)
        lock = root / f".{split}.lock"
        lock.touch()
    except OSError as error:
        raise OSError(error.errno, f"cannot write scenes to {root}: {error.strerror}") from error
    with lock.open() as handle:
        if sys.platform != "win32":
            import fcntl

            fcntl.flock(handle, fcntl.LOCK_EX)  # freed by the system even if this process is killed
        if complete(root, split, count, seed, size):
            return
        part = root / f".{split}.part"
        shutil.rmtree(part, ignore_errors=True)  # left by a killed process
        try:
            _write_files(part, split, count, seed, size, workers)
            # the instances file is what `complete` reads: it goes first and comes last
            files = _layout(split)
            (root / files[-1]).unlink(missing_ok=True)
            for name in files:
                if (root / name).is_dir():
                    shutil.rmtree(root / name)
                os.replace(part / name, root / name)
        finally:
            shutil.rmtree(part, ignore_errors=True)


def complete(root: str | os.PathLike, split: str, count: int, seed: int, size: tuple[int, int] = (240, 320)) -> bool:
    """Whether `write` with these arguments and this VERSION has finished in `root`."""
    images, _, _, _, instances = (Path(root) / name for name in _layout(split))
    try:
        info = json.loads(instances.read_text())["info"]
    except (OSError, ValueError, KeyError):
        return False
    return info == _info(count, seed, size) and (images / f"{count - 1:06d}.jpg").is_file()


def _info(count: int, seed: int, size: tuple[int, int]) -> dict[str, Any]:
    return {"version": scenes.VERSION, "seed": seed, "count": count, "size": list(size)}


def _layout(split: str) -> list[str]:
    """Paths below the root: two folders, three files."""
    notes = [f"labels_{split}.csv", f"person_keypoints_{split}.json", f"instances_{split}.json"]
    return [split, f"semantic/{split}", *(f"annotations/{name}" for name in notes)]


def _write_files(root: Path, split: str, count: int, seed: int, size: tuple[int, int], workers: int | None) -> None:
    images, semantic, labels, keypoints, instances = (root / name for name in _layout(split))
    for folder in (images, semantic, labels.parent):
        folder.mkdir(parents=True)
    store = partial(_store, images, semantic, seed, size)
    progress = partial(tqdm, total=count, desc=f"drawing {split}", unit="scene")
    workers = cores() if workers is None else workers
    if workers:
        # fork, where there is one: spawned processes would import the caller's whole program (torch: 10 s each) first.
        context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
        with ProcessPoolExecutor(min(workers, count), context, _end_with_parent) as pool:
            records = list(progress(pool.map(store, range(count), chunksize=8)))
    else:
        records = list(progress(map(store, range(count))))
    names = [f"{index:06d}.jpg" for index in range(count)]
    coco = {
        "info": _info(count, seed, size),
        "licenses": [],
        "images": [{"id": i, "file_name": name, "height": size[0], "width": size[1]} for i, name in enumerate(names)],
        "categories": [{"id": i + 1, "name": name} for i, name in enumerate(scenes.CLASSES)],
    }
    notes = [note for _, notes in records for note in notes]
    people = []
    for number, note in enumerate(notes, 1):
        note["id"] = number
        if note["category_id"] == 1:
            people.append(dict(note))
            del note["keypoints"], note["num_keypoints"]
    person = {"id": 1, "name": "person", "keypoints": scenes.KEYPOINTS, "skeleton": scenes.SKELETON}
    keypoints.write_text(json.dumps(coco | {"categories": [person], "annotations": people}))
    instances.write_text(json.dumps(coco | {"annotations": notes}))
    with labels.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["file_name", "label"])
        writer.writerows(zip(names, (scenes.SCENE_CLASSES[label] for label, _ in records), strict=True))


def _end_with_parent() -> None:
    """Otherwise a drawing process whose parent was killed would wait for it for ever, and hold its lock."""

    def wait() -> None:
        parent = multiprocessing.parent_process()
        assert parent is not None
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _store(
    images: Path, semantic: Path, seed: int, size: tuple[int, int], index: int
) -> tuple[int, list[dict[str, Any]]]:
    """Draw and save one scene; return its label and its COCO annotations."""
    scene = scenes.draw(seed, index, size)
    options = [cv2.IMWRITE_JPEG_QUALITY, 95]
    picture = cv2.cvtColor(scene.image, cv2.COLOR_RGB2BGR)
    if not cv2.imwrite(str(images / f"{index:06d}.jpg"), picture, options):
        raise OSError(f"cannot write a picture to {images}")
    if not cv2.imwrite(str(semantic / f"{index:06d}.png"), scene.semantic):
        raise OSError(f"cannot write a picture to {semantic}")
    notes = []
    for thing in scene.instances:
        code = rle.encode(np.asfortranarray(thing.mask, np.uint8))
        note = {
            "image_id": index,
            "category_id": thing.category,
            "iscrowd": 0,
            "area": int(np.count_nonzero(thing.mask)),
            "bbox": [float(value) for value in thing.box],
            "segmentation": {"size": code["size"], "counts": code["counts"].decode()},
        }
        if thing.keypoints is not None:
            note["keypoints"] = [round(float(value), 2) for value in thing.keypoints.ravel()]
            note["num_keypoints"] = int(np.count_nonzero(thing.keypoints[:, 2]))
        notes.append(note)
    return scene.label, notes
