"""What a sweep ends in: a table of its trials, of its settings over their seeds, and a plot."""

import csv
import statistics
from collections.abc import Sequence
from pathlib import Path
from textwrap import fill
from typing import Any

from tasks.search import Sweep

SEED = "seed_everything"
"""The parameter over which trials of equal settings are repetitions."""

Row = dict[str, Any]


def groups(rows: Sequence[Row]) -> list[list[Row]]:
    """The trials of equal settings, whatever their seeds."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(repr({k: v for k, v in row["values"].items() if k != SEED}), []).append(row)
    return list(found.values())


def mean_and_spread(group: Sequence[Row]) -> tuple[float, float, int]:
    """Of the ended trials: mean, standard deviation (0 of a single one), and how many they are."""
    metrics = [row["metric"] for row in group if row["status"] == "ended"]
    if not metrics:
        return float("nan"), float("nan"), 0
    return statistics.mean(metrics), statistics.stdev(metrics) if len(metrics) > 1 else 0.0, len(metrics)


def write_tables(rows: Sequence[Row], sweep: Sweep, folder: Path) -> str:
    """`table.csv`, a row a trial, and `table.md`, a row a setting: mean and standard deviation over its seeds,
    parameters of the network, minutes a trial. Random search is sorted, the best first.

    Returns:
        The Markdown.
    """
    names = list(rows[0]["values"])
    with (folder / "table.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([*names, sweep.metric, "parameters", "seconds", "status", "folder"])
        for row in rows:
            known = [row.get(k, "") for k in ("metric", "parameters", "seconds", "status", "folder")]
            writer.writerow([*(row["values"][n] for n in names), *known])
    shown = [n for n in sweep.swept if n != SEED]
    every = groups(rows)
    if sweep.method == "random":
        sign = -1 if sweep.goal == "maximize" else 1
        every.sort(key=lambda g: sign * mean_and_spread(g)[0] if mean_and_spread(g)[2] else float("inf"))
    seeds = SEED in names
    header = [*shown, sweep.metric, *(["trials"] if seeds else []), "parameters", "minutes"]
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    for group in every:
        mean, spread, count = mean_and_spread(group)
        number = f"{mean:.4f}" + (f" ± {spread:.4f}" if count > 1 else "") if count else group[0]["status"]
        ended = [row for row in group if row["status"] == "ended"]
        size = f"{ended[0]['parameters']:,}" if ended and ended[0]["parameters"] else ""
        minutes = f"{statistics.mean(row['seconds'] for row in ended) / 60:.1f}" if ended else ""
        cells = [shortened(group[0]["values"][n]) for n in shown]
        counts = [f"{count}" if count == len(group) else f"{count} of {len(group)}"] if seeds else []
        lines.append("| " + " | ".join([*cells, number, *counts, size, minutes]) + " |")
    text = "\n".join(lines)
    (folder / "table.md").write_text(text + "\n")
    return text


def shortened(value: Any) -> str:
    """A value in a table's cell."""
    return f"{value:.4g}" if isinstance(value, float) else str(value).replace("|", r"\|")


def write_plot(rows: Sequence[Row], sweep: Sweep, path: Path) -> None:
    """The metric over every parameter that was varied, a panel each: a dot a trial, and the mean of each value."""
    try:
        from matplotlib.figure import Figure  # not pyplot, whose backend is a notebook's own
    except ImportError:
        print(f"no {path.name}: matplotlib is not installed (pip install -e '.[bench]')", flush=True)
        return

    ended = [row for row in rows if row["status"] == "ended"]
    names = [n for n in sweep.swept if n != SEED] or [SEED]
    figure = Figure(figsize=(4 * len(names), 3.2))
    axes = figure.subplots(1, len(names), squeeze=False, sharey=True)
    for axis, name in zip(axes.flat, names, strict=True):
        values = [row["values"].get(name) for row in ended]
        spec = sweep.parameters.get(name, {})
        if "values" in spec or not all(isinstance(v, int | float) for v in values):
            ticks = [v for v in spec.get("values", dict.fromkeys(values)) if v in values]
            places: list[Any] = [ticks.index(v) for v in values]
            axis.set_xticks(range(len(ticks)), [fill(str(v)[-60:], 20) for v in ticks])
            means = [[r["metric"] for r, p in zip(ended, places, strict=True) if p == i] for i in range(len(ticks))]
            axis.plot(
                range(len(ticks)), [statistics.mean(m) for m in means], color="tab:blue", marker="_", markersize=16
            )
            axis.margins(x=0.2)
        else:
            places = values
            if "log" in spec.get("distribution", ""):
                axis.set_xscale("log")
        axis.plot(places, [row["metric"] for row in ended], "o", color="0.3", markersize=4, alpha=0.7)
        axis.set_xlabel(name, fontsize=9)
        axis.tick_params(labelsize=8)
    axes.flat[0].set_ylabel(sweep.metric, fontsize=9)
    figure.suptitle(sweep.path.stem, fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=90)
    print(path, flush=True)
