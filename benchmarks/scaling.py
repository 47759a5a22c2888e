"""How cost grows with the work: resolution, width, batch, loader workers and processes.

python benchmarks/scaling.py DATA/coco-sample
"""

import json
import multiprocessing
import sys
import time
from typing import Any

import torch
from timing import FOLDER, medians

from datamodules.coco_keypoints import CocoKeypoints
from hrnet.bench import called, pair
from hrnet.fast import Fast

AXES: dict[str, list[tuple[str, int, tuple[int, int]]]] = {
    "resolution": [("w18", 1, (64 * k, 48 * k)) for k in (2, 4, 6, 8)],
    "width": [(preset, 1, (256, 192)) for preset in ("w18_small_v1", "w18", "w32", "w48")],
    "batch": [("w18", batch, (256, 192)) for batch in (1, 2, 4, 8)],
}


def label(axis: str, case: tuple[str, int, tuple[int, int]]) -> str:
    preset, batch, (height, width) = case
    return {"resolution": f"{height}x{width}", "width": preset, "batch": str(batch)}[axis]


def forward() -> dict[str, Any]:
    """Milliseconds an image, of timm's network and of ours in bf16."""
    found: dict[str, Any] = {}
    for axis, cases in AXES.items():
        print(f"\nforward, by {axis}\n\n| | timm, ms an image | fast, bf16 | times timm |\n|---|---|---|---|")
        for case in cases:
            preset, batch, size = case
            ours, theirs = pair(preset)
            image = torch.randn(batch, 3, *size)
            calls = {"timm": called(theirs, image), "fast, bf16": called(Fast(ours, torch.bfloat16), image)}
            each = {k: 1000 * v / batch for k, v in medians(calls).items()}
            found.setdefault(axis, []).append({"label": label(axis, case)} | each)
            ratio = each["timm"] / each["fast, bf16"]
            print(f"| {label(axis, case)} | {each['timm']:.1f} | {each['fast, bf16']:.1f} | {ratio:.2f} |", flush=True)
    return found


def loading(root: str) -> dict[str, Any]:
    """Training crops of a second, by loader workers."""
    rows = []
    print("\npose loader, 256x192, by workers\n\n| | crops a second |\n|---|---|")
    for workers in (0, 1, 2):
        data = CocoKeypoints(root, workers=workers, batch_size=16)
        data.setup("fit")
        data.datasets["train"] = torch.utils.data.ConcatDataset([data.datasets["train"]] * 20)
        loader, count = iter(data.train_dataloader()), 0
        next(loader)  # workers have started
        start = time.perf_counter()
        for batch in loader:
            count += len(batch["image"])
        rows.append({"label": str(workers), "crops a second": count / (time.perf_counter() - start)})
        print(f"| {workers} | {rows[-1]['crops a second']:.0f} |", flush=True)
    return {"workers": rows}


def work(ready: Any, finished: Any) -> None:
    torch.set_num_threads(1)
    ours, _ = pair("w18_small_v1")
    network, image = Fast(ours, torch.bfloat16), torch.randn(4, 3, 256, 192)
    network(image)
    ready.wait()
    count, end = 0, time.perf_counter() + 5
    while time.perf_counter() < end:
        network(image)
        count += len(image)
    finished.put(count / 5)


def processes() -> dict[str, Any]:
    """Images a second of W18-small-v1 in bf16, by processes of one thread."""
    rows, context = [], multiprocessing.get_context("spawn")
    print("\nforward, W18-small-v1 in bf16, by processes of one thread\n\n| | images a second |\n|---|---|")
    for number in (1, 2):
        ready, finished = context.Barrier(number), context.Queue()
        each = [context.Process(target=work, args=(ready, finished)) for _ in range(number)]
        for process in each:
            process.start()
        rows.append({"label": str(number), "images a second": sum(finished.get() for _ in each)})
        for process in each:
            process.join()
        print(f"| {number} | {rows[-1]['images a second']:.0f} |", flush=True)
    return {"processes": rows}


if __name__ == "__main__":
    (root,) = sys.argv[1:]
    found = forward() | loading(root) | processes()
    FOLDER.mkdir(parents=True, exist_ok=True)
    (FOLDER / "scaling.json").write_text(json.dumps(found, indent=1))
