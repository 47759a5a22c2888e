"""The paper's ablations on the embedded data, beside its numbers: does each switch move the metric its way?

make ablations        (42 runs, 58 minutes on two slow cores; stopped, it goes on where it was)

Every one is a sweep of configs/sweeps, to be run on COCO and Cityscapes as well; each has its table and plot in
runs/sweeps/NAME. All of them end in runs/sweeps/ablations.md and .png.
"""

import argparse
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from textwrap import fill
from typing import Any, NamedTuple

import torch

from tasks.search import read_sweep
from tasks.sweep import planned, setting, sweep
from tasks.sweep_table import SEED, groups, mean_and_spread, shortened


class Ablation(NamedTuple):
    """What a sweep of configs/sweeps stands for.

    title: with the metric's published counterpart. paper: of each of the sweep's values in order, the setting there and
    its number, or None. source: of these. brief: which of the values is `configs/pose/brief.yaml` as it stands, if any.
    """

    sweep: str
    title: str
    paper: list[tuple[str, float] | None]
    source: str
    brief: int | None = None


HRNET, HRNETV2 = "arXiv 1908.07919", "arXiv 1904.04514, as cited by others"
ABLATIONS = [
    Ablation("fusion", "exchanges, pose", [("1 in all", 70.8), ("3", 71.9), ("8", 73.4)], f"{HRNET}, table 12", 2),
    Ablation(
        "resolution",
        "stride of the heatmaps",
        [("stride 16", 55.0), ("8", 68.9), ("4", 74.4)],
        f"{HRNET}, resolution ablation",
        2,
    ),
    Ablation("representation_pose", "V1, V2: pose", [("V1-W32", 73.4), ("V2-W32", 73.6)], HRNET, 0),
    Ablation("representation_segmentation", "V1, V2: segmentation", [("V1-W48", 80.6), ("V2-W48", 81.1)], HRNETV2),
    Ablation("representation_detection", "V1p, V2p: detection", [("V1p-W32", 37.4), ("V2p-W32", 39.4)], HRNETV2),
    Ablation("width", "width, pose", [("W32", 74.4), None, ("W48", 75.1)], f"{HRNET}, table 1", 1),
    Ablation("input_size", "input size, pose", [("256x192", 74.4), None, ("384x288", 75.8)], f"{HRNET}, table 1", 1),
    Ablation("pretraining", "pretraining, pose", [("none", 73.4), ("ImageNet", 74.4)], f"{HRNET}, table 1"),
    Ablation("resnet", "network at like cost, pose", [("ResNet-50", 70.4), ("W32", 74.4)], f"{HRNET}, table 1"),
]


def pretrain(more: list[str]) -> None:
    """Classification of the embedded scenes, from which `configs/sweeps/pretraining.yaml` starts."""
    place = ["--trainer.default_root_dir=runs/pretraining", "--ckpt_path=auto"]
    subprocess.run([sys.executable, "-m", "tasks.classification", "fit", *place, *more], check=True)


def share(ablation: Ablation, root: str, settings: dict[str, Any], runs: dict[Any, dict[str, Any]]) -> None:
    """Note the runs of the brief recipe for its place in this sweep, too.

    Args:
        runs: `rows_of` trials by their seed.
    """
    found = read_sweep(Path(f"configs/sweeps/{ablation.sweep}.yaml"), settings)
    for trial in planned(found, None, 0, [], Path(root) / "sweeps" / ablation.sweep):
        row = runs.get(trial.values[SEED])
        if is_brief(ablation, trial.values) and row and trial.record["status"] != "ended":
            trial.folder.mkdir(parents=True, exist_ok=True)
            (trial.folder / "trial.json").write_text(json.dumps(row | {"values": trial.values}, indent=1))


def is_brief(ablation: Ablation, values: dict[str, Any]) -> bool:
    """Whether a trial of an ablation is the brief recipe as it stands."""
    parameters = read_sweep(Path(f"configs/sweeps/{ablation.sweep}.yaml")).parameters
    return ablation.brief is not None and all(
        values[name] == spec["values"][ablation.brief] for name, spec in parameters.items() if name != SEED
    )


def compared(effect: float, spread: float, paper: float) -> str:
    """Whether an effect goes the paper's way, or is none: two single runs of equal networks would differ as much."""
    if math.isnan(effect):
        return "not run"
    if abs(effect) <= spread:
        return "within spread"
    return "agrees" if effect * paper > 0 else "differs"


def lines_of(ablation: Ablation, rows: list[dict[str, Any]]) -> list[list[str]]:
    """A row a setting; effects are differences to the ablation's first setting."""
    found, lines = groups(rows), []
    first, spread, _ = mean_and_spread(found[0])
    base = ablation.paper[0]
    for i, (group, theirs) in enumerate(zip(found, ablation.paper, strict=True)):
        mean, own, count = mean_and_spread(group)
        line = [ablation.title if i == 0 else "", shown(ablation, group)]
        line.append(f"{100 * mean:.1f} ± {100 * own:.1f} ({count})")
        line.append("" if theirs is None else f"{theirs[1]:.1f} ({theirs[0]})")
        line.append(f"{100 * (mean - first):+.1f}" if i else "")
        if i and theirs and base:
            effect = theirs[1] - base[1]
            line += [f"{effect:+.1f}", compared(mean - first, math.hypot(own, spread), effect)]
        else:
            line += ["", ""]
        lines.append([*line, "" if i else ablation.source])
    return lines


def shown(ablation: Ablation, group: list[dict[str, Any]]) -> str:
    """The setting of a group of trials, in a few letters."""
    (name,) = (n for n in read_sweep(Path(f"configs/sweeps/{ablation.sweep}.yaml")).swept if n != SEED)
    value = shortened(group[0]["values"][name])
    return "pretrained" if value.endswith(".ckpt") else value.removeprefix("hrnet.heads.")


def plot(results: list[tuple[Ablation, list[dict[str, Any]]]], path: Path) -> None:
    """A panel an ablation: here in blue with the spread over seeds, the paper's in grey on an axis of its own."""
    try:
        import matplotlib
    except ImportError:
        print(f"no {path}: matplotlib is not installed (pip install -e '.[bench]')")
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    columns, lines = min(3, len(results)), -(-len(results) // 3)
    figure, axes = plt.subplots(lines, columns, figsize=(3.8 * columns, 2.9 * lines), squeeze=False)
    for axis in axes.flat[len(results) :]:
        axis.remove()
    for axis, (ablation, rows) in zip(axes.flat, results, strict=False):
        numbers = [mean_and_spread(group) for group in groups(rows)]
        places = range(len(numbers))
        means, spreads = [100 * n[0] for n in numbers], [100 * n[1] for n in numbers]
        axis.errorbar(places, means, spreads, color="tab:blue", marker="o", capsize=3)
        other = axis.twinx()
        known = [(i, p[1]) for i, p in enumerate(ablation.paper) if p is not None]
        other.plot([i for i, _ in known], [n for _, n in known], color="0.6", marker="s", linestyle="--")
        axis.set_xticks(places, [fill(shown(ablation, group), 20) for group in groups(rows)])
        axis.margins(x=0.2)
        axis.set_title(ablation.title, fontsize=9)
        for one, colour in ((axis, "tab:blue"), (other, "0.5")):
            one.tick_params(labelsize=7)
            one.tick_params(axis="y", colors=colour)
    figure.suptitle("here on drawn scenes (blue, left), the paper (grey, right)", fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=90)
    print(path)


def main() -> None:
    parser = argparse.ArgumentParser(description="The paper's ablations on the embedded data, beside its numbers.")
    parser.add_argument("--only", nargs="+", choices=[a.sweep for a in ABLATIONS], help="of all of them")
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="NAME=VALUE", help="for every trial")
    parser.add_argument("--root", default="runs")
    parser.add_argument("--jobs", type=int, help="trials at once (default: one a GPU, or one a core)")
    given = parser.parse_args()
    jobs = given.jobs or (None if torch.cuda.is_available() else os.cpu_count())
    settings = dict(setting(text) for text in given.set)
    chosen = [a for a in ABLATIONS if not given.only or a.sweep in given.only]
    if any(a.sweep == "pretraining" for a in chosen):
        pretrain([f"--{k}={v}" for k, v in settings.items() if k.startswith(("data.", "trainer."))])
    results: list[tuple[Ablation, list[dict[str, Any]]]] = []
    brief: dict[Any, dict[str, Any]] = {}  # five sweeps have the same run for one of their settings
    for ablation in chosen:
        share(ablation, given.root, settings, brief)
        rows = sweep(f"configs/sweeps/{ablation.sweep}.yaml", given.root, settings=settings, jobs=jobs)
        brief |= {
            row["values"][SEED]: row for row in rows if row["status"] == "ended" and is_brief(ablation, row["values"])
        }
        results.append((ablation, rows))
    header = [
        "ablation",
        "setting",
        "here (seeds)",
        "paper",
        "effect here",
        "effect in the paper",
        "direction",
        "source",
    ]
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    lines += ["| " + " | ".join(line) + " |" for ablation, rows in results for line in lines_of(ablation, rows)]
    lines += [
        "",
        "Here: AP of keypoints and boxes, and mIoU, in percent, on drawn scenes after a few hundred steps: mean and "
        "standard deviation over the seeds. Effects are differences to an ablation's first setting; within spread are "
        "those below the root of the two squared deviations' sum. The paper's are on COCO and Cityscapes val.",
    ]
    folder = Path(given.root) / "sweeps"
    (folder / "ablations.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    plot(results, folder / "ablations.png")
    if missing := sum(row["status"] != "ended" for _, rows in results for row in rows):
        raise SystemExit(f"{missing} trials have not ended; the same command tries them again")


if __name__ == "__main__":
    main()
