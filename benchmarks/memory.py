"""Whether a long run keeps its memory: a fit of the embedded poses by the command line, watched from outside.

python benchmarks/memory.py [--steps 2000]

Two persistent workers to train and two to validate; a validation, a checkpoint and pictures every epoch of 100 steps.
Of each process what it has allocated (anonymous pages, in memory or swapped; also those that forked processes share, so
that it does not change when one of them writes to its copy): the least seen within every 100 steps; the first 200 are
warm-up. Exits with 1 if that of a process grows by more than BOUND.
"""

import argparse
import csv
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

EVERY, WARM = 100, 200
BOUND = 2.0
"""KiB a step: 200 MiB in 100,000 steps, where COCO's 210 epochs of pose have 245,000 of 128."""
BACKBONE = "{width: 8, modules: [1, 1, 1], blocks: 1, stem: [1, 16]}"


def usage(process: int) -> dict[str, float]:
    """RSS, PSS, anonymous and private memory (pages that no other process has) of a process, MiB."""
    text = Path(f"/proc/{process}/smaps_rollup").read_text()
    size = {name: int(value) / 1024 for name, value in re.findall(r"^(\w+):\s+(\d+) kB", text, re.MULTILINE)}
    private, anonymous = size["Private_Clean"] + size["Private_Dirty"], size["Anonymous"] + size["Swap"]
    return {"rss": size["Rss"], "pss": size["Pss"], "private": private, "anonymous": anonymous}


def children(process: int) -> list[int]:
    """Loader workers: forked, so of the same command line; oldest first."""
    own = Path(f"/proc/{process}/cmdline").read_bytes()
    listed = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    return [int(c) for c in listed if Path(f"/proc/{c}/cmdline").read_bytes() == own]


def command(root: Path, steps: int) -> list[str]:
    options = {
        "model.backbone": BACKBONE,
        "data.root": root / "data",
        "data.train": 400,
        "data.val": 20,
        "data.size": "[64,48]",
        "data.batch_size": 8,
        "data.workers": 2,
        "trainer.max_steps": steps,
        "trainer.max_epochs": -1,
        "trainer.limit_train_batches": EVERY,
        "trainer.accelerator": "cpu",
        "trainer.precision": "32-true",
        "trainer.default_root_dir": root / "runs",
        "trainer.enable_progress_bar": "false",
    }
    return [sys.executable, "-m", "tasks.pose", "fit", *(f"--{k}={v}" for k, v in options.items())]


def step_of(root: Path) -> int:
    """The last step that `metrics.csv` tells of."""
    path = root / "runs/pose/version_0/metrics.csv"
    if not path.is_file():
        return 0
    with path.open() as file:
        return max(
            (int(row["step"]) + 1 for row in csv.DictReader(file) if (row.get("step") or "").isdecimal()), default=0
        )


def watch(root: Path, steps: int) -> dict[str, list[dict[str, float]]]:
    """By process its memory in every hundred steps that a worker was there to see.

    Raises:
        SystemExit: with the end of what the run printed, if it fails.
    """
    found: dict[str, list[dict[str, float]]] = {}
    log = root / "log"
    with log.open("w") as file:
        run = subprocess.Popen(command(root, steps), stdout=file, stderr=subprocess.STDOUT)
        while run.poll() is None:
            time.sleep(0.2)
            window = step_of(root) // EVERY
            try:
                workers = children(run.pid)
                sizes = [usage(process) for process in (run.pid, *workers)]
            except (OSError, KeyError):
                continue  # one has ended meanwhile
            if workers:
                names = ["main", *(f"worker {i + 1}" for i in range(len(workers)))]
                for name, size in zip(names, sizes, strict=True):
                    rows = found.setdefault(name, [])
                    if rows and rows[-1]["step"] == window * EVERY:
                        rows[-1] = {
                            key: min(value, rows[-1][key]) for key, value in (size | {"step": window * EVERY}).items()
                        }
                    else:
                        rows.append(size | {"step": window * EVERY})
    if run.returncode:
        raise SystemExit(log.read_text()[-3000:])
    return found


def slope(rows: list[dict[str, float]]) -> float:
    """KiB a step after the warm-up: the median over all pairs of rows (Theil and Sen's), which what comes and goes does
    not bend."""
    step, size = (np.array([row[k] for row in rows if row["step"] >= WARM]) for k in ("step", "anonymous"))
    first, second = np.triu_indices(len(step), 1)
    return (
        float(1024 * np.median((size[second] - size[first]) / (step[second] - step[first])))
        if len(step) > 2
        else np.nan
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=2000)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as root:
        found = watch(Path(root), given.steps)
    steps = sorted({int(row["step"]) for rows in found.values() for row in rows})
    print("MiB\n\n| from step |" + "".join(f" {name} |" for name in found) + "\n|---|" + "---|" * len(found))
    for step in steps:
        cells = [next((r for r in rows if r["step"] == step), None) for rows in found.values()]
        print(f"| {step} |" + "".join(f" {c['anonymous']:.1f} |" if c else " |" for c in cells))
    growth = {name: slope(rows) for name, rows in found.items()}
    print("\n| | KiB a step | MiB in 100,000 steps |\n|---|---|---|")
    for name, value in growth.items():
        print(f"| {name} | {value:+.2f} | {value * 1e5 / 1024:+.0f} |")
    if len(found) < 3 or not all(value <= BOUND for value in growth.values()):
        raise SystemExit(f"not flat, more than {BOUND} KiB a step; or the run was too short to tell")


if __name__ == "__main__":
    main()
