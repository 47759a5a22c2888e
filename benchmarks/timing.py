"""Fair comparisons: candidates take turns, medians count, and ratios to a peer of the same run are printed."""

import json
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

FOLDER = Path("runs/bench")


def medians(candidates: Mapping[str, Callable[[], Any]], rounds: int = 7, least: float = 0.0) -> dict[str, float]:
    """Median seconds a call, of candidates that take turns, after one call of each that does not count.

    Args:
        candidates: what to call, by name.
        rounds: timings of each.
        least: seconds that a timing takes at least; short calls are repeated within it.
    """
    repeats = {}
    for name, call in candidates.items():
        call()
        start = time.perf_counter()
        call()
        repeats[name] = max(1, round(least / (time.perf_counter() - start)))
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, call in candidates.items():
            start = time.perf_counter()
            for _ in range(repeats[name]):
                call()
            times[name].append((time.perf_counter() - start) / repeats[name])
    return {name: statistics.median(each) for name, each in times.items()}


def report(benchmark: str, case: str, peer: str, seconds: Mapping[str, float], notes: Mapping[str, str] = {}) -> None:
    """Print a case's rows, times the peer's speed last, and keep them in runs/bench/<benchmark>.json for the plots.

    Args:
        benchmark: names the file. case: what was measured, replacing an earlier one of this name.
        peer: the candidate that the others are compared with.
        seconds: by candidate. notes: a remark by candidate, as its deviation.
    """
    print(f"\n{case}\n")
    print(f"| | ms | times {peer} | |\n|---|---|---|---|")
    rows = []
    for name, value in seconds.items():
        rows.append({"name": name, "seconds": value, "ratio": seconds[peer] / value, "note": notes.get(name, "")})
        print(f"| {name} | {1000 * value:.2f} | {rows[-1]['ratio']:.2f} | {rows[-1]['note']} |", flush=True)
    path = FOLDER / f"{benchmark}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    kept = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(kept | {case: rows}, indent=1))
