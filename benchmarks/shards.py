"""Pictures from tar files beside the same from a folder: `taskset -c 1 python benchmarks/shards.py DATA/coco-sample`.

Writes many small JPEGs, smaller copies of the sample's, as a folder a class, packs them, and compares what it takes to
be ready (with no index yet; with one), to a first batch, and a sample. Files are in the page cache: what a disk or a
network adds for every file that is opened is not measured.
"""

import argparse
import logging
import tempfile
from collections.abc import Callable
from pathlib import Path

import cv2
import torch
from timing import medians, report

from datamodules.image_folder import ImageFolder
from datamodules.shards import Shards, pack


def write(root: Path, pictures: list[Path], count: int, side: int, classes: int = 100) -> None:
    """`count` JPEGs to train on, and one a class to judge; the shorter side is `side`."""
    contents = []
    for path in pictures:
        image = cv2.imread(str(path))
        factor = side / min(image.shape[:2])
        contents.append(cv2.imencode(".jpg", cv2.resize(image, None, fx=factor, fy=factor))[1].tobytes())
    for split, number in (("train", count), ("val", classes)):
        for i in range(number):
            path = root / split / f"class_{i % classes:03d}" / f"{i:06d}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(contents[i % len(contents)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path, help="folder with pictures below it, as coco-sample")
    parser.add_argument("--count", type=int, default=20000, help="pictures to train on (default: 20000)")
    parser.add_argument("--side", type=int, default=128, help="their shorter side in pixels (default: 128)")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--batches", type=int, default=10, help="of a timing of samples (default: 10)")
    parser.add_argument("--workers", type=int, default=0, help="processes of the loaders (default: this one)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.WARNING)
    options = {"size": 112, "batch_size": args.batch_size, "workers": args.workers}
    with tempfile.TemporaryDirectory() as temporary:
        folder, shards = f"{temporary}/folder", f"{temporary}/shards"
        write(Path(folder), sorted(args.root.rglob("*.jpg"))[:20], args.count, args.side)
        pack(folder, shards)

        def files() -> ImageFolder:
            data = ImageFolder(folder, **options)
            data.setup("fit")
            return data

        def indexed() -> Shards:
            data = Shards(shards, **options)
            data.setup("fit")
            return data

        def anew() -> Shards:
            for index in Path(shards).glob("*.npz"):
                index.unlink()
            return indexed()

        def begun(make: Callable[[], ImageFolder]) -> Callable[[], None]:
            return lambda: next(iter(make().train_dataloader()))

        def running(make: Callable[[], ImageFolder]) -> Callable[[], None]:
            batches = iter([])

            def call() -> None:
                nonlocal batches
                for _ in range(args.batches):
                    if (batch := next(batches, None)) is None:
                        batches = iter(loader)
                        batch = next(batches)
                    assert len(batch["label"]) == args.batch_size

            loader = make().train_dataloader()
            return call

        case = f"{args.count} JPEGs of {args.side} pixels, batches of {args.batch_size}, {args.workers} workers"
        makers = {"folder": files, "shards, no index yet": anew, "shards": indexed}
        report("shards", f"ready: {case}", "folder", medians(makers))
        report("shards", f"first batch: {case}", "folder", medians({k: begun(make) for k, make in makers.items()}))
        seconds = medians({name: running(makers[name]) for name in ("folder", "shards")})
        each = {name: value / (args.batches * args.batch_size) for name, value in seconds.items()}
        notes = {name: f"{1 / value:.0f} samples a second" for name, value in each.items()}
        report("shards", f"a sample: {case}", "folder", each, notes)


if __name__ == "__main__":
    main()
