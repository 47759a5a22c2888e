"""Pictures of what the benchmarks left in runs/bench: a PNG each, in benchmarks/plots.

python benchmarks/plots.py
"""

import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from timing import FOLDER

PLOTS = Path(__file__).parent / "plots"


def bars(name: str, cases: dict[str, list[dict[str, Any]]]) -> None:
    """Times the peer's speed, a panel a case."""
    columns = 2 if len(cases) > 1 else 1
    rows = -(-len(cases) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(7 * columns, 2.6 * rows), squeeze=False)
    for axis in axes.flat[len(cases) :]:
        axis.remove()
    for axis, (case, entries) in zip(axes.flat, cases.items(), strict=False):
        labels, ratios = [e["name"] for e in entries], [e["ratio"] for e in entries]
        colours = ["0.7" if e["ratio"] == 1 else "tab:blue" for e in entries]
        axis.bar_label(axis.barh(labels, ratios, color=colours), fmt="%.2f", padding=2)
        axis.invert_yaxis()
        axis.axvline(1, color="0.3", linewidth=0.8)
        axis.set_title(case, fontsize=9)
        axis.tick_params(labelsize=8)
        axis.margins(x=0.12)
    figure.supxlabel("times the peer's speed (grey: the peer)", fontsize=9)
    save(figure, name)


def lines(name: str, groups: dict[str, list[dict[str, Any]]]) -> None:
    """A panel an axis of growth, a line each candidate."""
    figure, axes = plt.subplots(1, len(groups), figsize=(3.4 * len(groups), 3.2))
    for axis, (title, rows) in zip(axes, groups.items(), strict=True):
        for key in rows[0].keys() - {"label"}:
            axis.plot([r["label"] for r in rows], [r[key] for r in rows], marker="o", label=key)
        axis.set_title(title, fontsize=9)
        axis.set_ylim(bottom=0)
        axis.set_ylabel("ms an image" if "timm" in rows[0] else "a second", fontsize=8)
        axis.legend(fontsize=7)
        axis.tick_params(labelsize=7)
    save(figure, name)


def losses(name: str, found: dict[str, list[list[float]]]) -> None:
    figure, axis = plt.subplots(figsize=(6, 3.6))
    for (key, runs), colour in zip(found.items(), ("tab:blue", "tab:orange"), strict=False):
        for i, run in enumerate(runs):
            smooth = [sum(run[max(0, k - 9) : k + 1]) / len(run[max(0, k - 9) : k + 1]) for k in range(len(run))]
            axis.plot(smooth, color=colour, linewidth=0.9, label=key if i == 0 else None)
    axis.set_yscale("log")
    axis.set_xlabel("step")
    axis.set_ylabel("loss, mean of 10 steps")
    axis.legend()
    save(figure, name)


def save(figure: Any, name: str) -> None:
    PLOTS.mkdir(exist_ok=True)
    figure.tight_layout()
    figure.savefig(PLOTS / f"{name}.png", dpi=90)
    print(PLOTS / f"{name}.png")


if __name__ == "__main__":
    for path in sorted(FOLDER.glob("*.json")):
        draw = {"scaling": lines, "curves": losses}.get(path.stem, bars)
        draw(path.stem, json.loads(path.read_text()))
