"""What it costs until the first batch is there, by the number of annotations.

python benchmarks/startup.py [--images 118287] [--root FOLDER]

Synthesised files of COCO's size (train2017: 118,287 images; 262,465 people, 149,813 of them with keypoints; 860,001
objects of 80 classes with polygons), of a tenth and of a hundredth of it, a picture for every record. Each row is a
process of its own: construction, `setup`, the metric, and the first batch of two workers. With `fit` the metric is that
of the smallest file. The peer only reads: pycocotools' `COCO(file)`. Exits with 1 if a row takes more than GOAL.
"""

import argparse
import json
import mmap
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from memory import usage

SHARES = (100, 10, 1)
IMAGES, PEOPLE, LEARNED, OBJECTS = 118_287, 262_465, 149_813, 860_001
WIDTH, HEIGHT = 640, 480
LINKS = 50_000
"""Names a file may have; ext4 allows 65,000."""
PEER = "pycocotools"
KINDS = ("keypoints", "boxes", "masks")
ROWS = (*KINDS, *(f"{kind}, fit" for kind in KINDS), f"{PEER}, keypoints", f"{PEER}, instances")
GOAL = 60, 4096
"""Seconds, and MiB at most."""
LATER = 100
"""Batches after which a worker is looked at again."""


def pictures(root: Path, images: int) -> None:
    """`images` names of a grey JPEG."""
    from PIL import Image

    folder = root / "images"
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(images):
        path, source = folder / f"{i + 1:012d}.jpg", root / f"grey_{i // LINKS}.jpg"
        if not source.is_file():
            Image.new("RGB", (WIDTH, HEIGHT), (120, 130, 140)).save(source)
        if not path.exists():
            os.link(source, path)


def boxes(rng: np.random.Generator, count: int) -> np.ndarray:
    """x, y, width, height within the picture, two decimals."""
    size = np.exp(rng.uniform(np.log(12), np.log(400), (count, 2)))
    place = rng.uniform(0, 1, (count, 2)) * (np.array([WIDTH, HEIGHT]) - size - 1)
    return np.concatenate([place, size], 1).round(2)


def outline(rng: np.random.Generator, box: np.ndarray) -> list[list[float]]:
    """A polygon, of as many points as COCO's have: 30 in the mean; one in four objects is in two parts."""
    parts = []
    for _ in range(1 + (rng.random() < 0.25)):
        angle = np.sort(rng.uniform(0, 2 * np.pi, 6 + rng.poisson(18)))
        points = box[:2] + box[2:] * (0.5 + 0.5 * np.stack([np.cos(angle), np.sin(angle)], 1))
        parts.append(points.round(2).ravel().tolist())
    return parts


def people(count: int, images: int) -> Iterator[dict[str, Any]]:
    rng = np.random.default_rng(0)
    for i, box in enumerate(boxes(rng, count)):
        points = np.zeros((17, 3), int)
        if i * 7919 % PEOPLE < LEARNED:
            points[:, :2] = box[:2] + rng.uniform(0, 1, (17, 2)) * box[2:]
            points[:, 2] = rng.integers(0, 3, 17)
            points[0, 2] = 2
            points *= points[:, 2:] > 0
        yield record(i, box, images, 1, outline(rng, box)) | {
            "keypoints": points.ravel().tolist(),
            "num_keypoints": int((points[:, 2] > 0).sum()),
        }


def objects(count: int, images: int) -> Iterator[dict[str, Any]]:
    rng = np.random.default_rng(0)
    for i, box in enumerate(boxes(rng, count)):
        yield record(i, box, images, int(rng.integers(1, 81)), outline(rng, box))


def record(i: int, box: np.ndarray, images: int, category: int, polygons: list[list[float]]) -> dict[str, Any]:
    return {
        "segmentation": polygons,
        "area": round(float(box[2] * box[3] * 0.6), 4),
        "iscrowd": 0,
        "image_id": 1 + (i * 7919) % images,
        "bbox": box.tolist(),
        "category_id": category,
        "id": i + 1,
    }


def write(path: Path, images: int, categories: list[dict[str, Any]], annotations: Iterator[dict[str, Any]]) -> None:
    if path.is_file():
        return
    records = [
        {
            "license": 3,
            "file_name": f"{i:012d}.jpg",
            "coco_url": f"http://images.cocodataset.org/train2017/{i:012d}.jpg",
            "height": HEIGHT,
            "width": WIDTH,
            "date_captured": "2013-11-14 11:18:45",
            "flickr_url": f"http://farm9.staticflickr.com/8186/{i:010d}_45f2d8d2e5_z.jpg",
            "id": i,
        }
        for i in range(1, images + 1)
    ]
    part = path.with_suffix(".part")
    with part.open("w") as file:
        file.write(json.dumps({"categories": categories, "images": records})[:-1] + ', "annotations": [')
        for i, annotation in enumerate(annotations):
            file.write(", " * (i > 0) + json.dumps(annotation))
        file.write("]}")
    part.rename(path)


def synthesise(root: Path, images: int) -> None:
    from datamodules import scenes

    pictures(root, images)
    person = {"id": 1, "name": "person", "keypoints": list(scenes.KEYPOINTS), "skeleton": []}
    classes = [{"id": i, "name": f"class {i}", "supercategory": "thing"} for i in range(1, 81)]
    for share in SHARES:
        few = max(1, images // share)
        write(root / f"keypoints_{share}.json", few, [person], people(PEOPLE * few // IMAGES, few))
        write(root / f"instances_{share}.json", few, classes, objects(OBJECTS * few // IMAGES, few))


def measure(root: Path, kind: str, share: int) -> dict[str, float]:
    """In a fresh process. Seconds by the clock and of the processor, and MiB."""
    path = root / f"{'keypoints' if 'keypoints' in kind else 'instances'}_{share}.json"
    found: dict[str, float] = {"annotations": counted(path)}
    clocks = time.perf_counter, time.process_time
    if kind.startswith(PEER):
        from pycocotools.coco import COCO

        begun = [clock() for clock in clocks]
        COCO(path)
        found["seconds"], found["cpu"] = (c() - b for c, b in zip(clocks, begun, strict=True))
        return found | {"peak": peak()}
    import torch

    from datamodules.coco_instances import CocoInstances
    from datamodules.coco_keypoints import CocoKeypoints

    torch.set_num_threads(1)
    stage = "fit" if kind.endswith("fit") else "validate"
    files = {"train": path.name, "val": path.name if stage == "validate" else path.name.replace(f"_{share}.", "_100.")}
    options: dict[str, Any] = {"root": str(root), "train_images": "images", "val_images": "images", "workers": 2}
    options |= {"masks": True} if kind.startswith("masks") else {}
    make: Callable[..., Any] = CocoKeypoints if kind.startswith("keypoints") else CocoInstances
    begun = [clock() for clock in clocks]
    data = make(**files, **options)
    data.setup(stage)
    metric = data.metric("val")
    loader = data.loader("train" if stage == "fit" else "val")
    batches = iter(loader)
    next(batches)
    found["seconds"], found["cpu"] = (c() - b for c, b in zip(clocks, begun, strict=True))
    found["peak"] = peak()
    worker = loader._iterator._workers[0].pid  # type: ignore[union-attr]
    found["pss"], found["worker"] = usage(os.getpid())["pss"], usage(worker)["private"]
    for _ in zip(range(LATER), batches, strict=False):
        pass
    found["later"] = usage(worker)["private"]
    del metric
    return found


def counted(path: Path) -> int:
    """The annotations of a file that `synthesise` wrote, without parsing it."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text:
        return sum(1 for _ in re.finditer(b'"iscrowd"', text))


def peak() -> float:
    """The most this process has had, MiB; of the process alone, unlike `ru_maxrss`."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+)", status)[1]) / 1024  # type: ignore[index]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=IMAGES)
    parser.add_argument("--root", help="folder to keep the files in, some 0.9 GB; else a temporary one")
    parser.add_argument("--only", default="", help="rows that begin so")
    parser.add_argument("--measure", nargs=2, metavar=("KIND", "SHARE"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.measure:
        print(json.dumps(measure(Path(given.root), given.measure[0], int(given.measure[1]))))
        return
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(given.root or temporary)
        synthesise(root, given.images)
        rows(root, given.only)


def rows(root: Path, only: str) -> None:
    print(
        "| | annotations | seconds | of the processor | times the smallest | peak, MiB | main, PSS | worker, private "
        f"| after {LATER} batches |\n|---|---|---|---|---|---|---|---|---|"
    )
    missed = []
    for kind in [k for k in ROWS if k.startswith(only)]:
        first = 0.0
        for share in SHARES:
            call = [sys.executable, __file__, "--root", str(root), "--measure", kind, str(share)]
            done = subprocess.run(call, capture_output=True, text=True, check=False)
            if done.returncode:
                raise SystemExit(done.stderr)
            found = json.loads(done.stdout.splitlines()[-1])
            first = first or found["cpu"]
            cells = [f"{found[k]:.0f}" if k in found else "" for k in ("peak", "pss", "worker", "later")]
            times = f"{found['seconds']:.1f} | {found['cpu']:.1f} | {found['cpu'] / first:.1f}"
            print(f"| {kind} | {found['annotations']:,} | {times} | {' | '.join(cells)} |", flush=True)
            if not kind.startswith(PEER) and (found["seconds"] > GOAL[0] or found["peak"] > GOAL[1]):
                missed.append(f"{kind}, {found['annotations']:,} annotations")
    if missed:
        raise SystemExit(f"more than {GOAL[0]} seconds or {GOAL[1]} MiB: {'; '.join(missed)}")


if __name__ == "__main__":
    main()
