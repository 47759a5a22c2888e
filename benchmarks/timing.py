"""Ratios to a peer of the same run, printed and kept for the plots."""

import json
import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path

import torch

from hrnet.bench import medians

__all__ = ["machine", "medians", "report"]
FOLDER = Path("runs/bench")
NOTHING: dict[str, str] = {}


def machine() -> str:
    """What the figures are of."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    flags = next((line.split() for line in lines if line.startswith("flags")), [])
    bf16 = ", ".join(flag for flag in flags if "bf16" in flag) or "none"
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False).stdout
    return (
        f"{name}, {torch.get_num_threads()} threads, bf16 instructions: {bf16}; Python {platform.python_version()}, "
        f"torch {torch.__version__}; commit {commit.strip()}"
    )


def report(
    benchmark: str, case: str, peer: str, seconds: Mapping[str, float], notes: Mapping[str, str] = NOTHING
) -> None:
    """Print a case's rows, with times the peer's speed, and keep them in runs/bench/<benchmark>.json.

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
