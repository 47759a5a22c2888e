"""Broken files of every kind, given to what reads them: each has to be read right, or refused by one clear error.

python benchmarks/fuzz.py [--kind KIND ...] [--count N] [--seed S]
python benchmarks/fuzz.py --kind KIND --at I [--seed S]      (input I alone, with its traceback)

Every input is a sound file with a few faults, drawn by kind, seed and number. A child process reads them, so that a
crash, or no answer after ten seconds of its work or a minute of waiting, is a finding about one input alone.
"""

import argparse
import faulthandler
import multiprocessing
import os
import signal
import tempfile
import traceback
import warnings
from collections import Counter
from multiprocessing.connection import Connection
from pathlib import Path
from random import Random

import fuzz_labels  # noqa: F401 (its kinds)
import fuzz_runs  # noqa: F401
from fuzz_kinds import KINDS, Wrong

from datamodules.transforms import DataError
from hrnet.checkpoints import WeightsError
from tasks.arguments import SettingError

WORK, WAIT = 10, 60  # seconds for one input, of the processor and of the clock
REFUSALS = (DataError, WeightsError, SettingError, OSError)


def judged(kind: str, seed: int, number: int, folder: Path) -> str:
    """ "right", "our error", or what is wrong."""
    trial, _ = KINDS[kind]
    try:
        trial(folder, Random(f"{kind} {seed} {number}"))
    except REFUSALS as error:
        text = str(error)
        return "our error" if str(folder) in text and len(text) < 20_000 else f"names no file: {text[:200]!r}"
    except Wrong as error:
        return f"wrong: {error}"
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        own = [f for f in frames if Path(f.filename).parent.name in ("datamodules", "hrnet", "tasks")] or frames
        place = f"{Path(own[-1].filename).name}:{own[-1].lineno}"
        return f"{type(error).__name__} at {place}: {str(error)[:120]}"
    return "right"


def work(pipe: Connection, kind: str, seed: int, numbers: range, folder: Path) -> None:
    """The child: one judgement after the other."""
    log = os.open(folder / "printed", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)  # libraries in C print as well
    os.dup2(log, 2)
    warnings.simplefilter("ignore")
    faulthandler.register(signal.SIGPROF, chain=True)
    for number in numbers:
        signal.setitimer(signal.ITIMER_PROF, WORK)
        faulthandler.dump_traceback_later(WAIT, exit=True)
        pipe.send(judged(kind, seed, number, folder))
    faulthandler.cancel_dump_traceback_later()
    signal.setitimer(signal.ITIMER_PROF, 0)


def fuzz(kind: str, seed: int, count: int) -> dict[int, str]:
    """The judgement of every input."""
    found: dict[int, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        while len(found) < count:
            ours, its = multiprocessing.Pipe(duplex=False)
            given = (its, kind, seed, range(len(found), count), Path(folder))
            child = multiprocessing.get_context("fork").Process(target=work, args=given)
            child.start()
            its.close()
            try:
                while len(found) < count:
                    found[len(found)] = ours.recv()
            except EOFError:
                child.join()
                last = (Path(folder) / "printed").read_text(errors="replace").split("most recent call first")[-1][:300]
                hangs = child.exitcode in (1, -signal.SIGPROF)
                found[len(found)] = f"{'hangs' if hangs else f'exit {child.exitcode}'}: {last}"
            child.join()
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--count", type=int, help="inputs of each kind (default: as many as are worth it)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--at", type=int, help="one input alone")
    given = parser.parse_args()
    if given.at is not None:
        with tempfile.TemporaryDirectory() as folder:
            faulthandler.dump_traceback_later(WAIT, exit=True)
            KINDS[given.kind[0]][0](Path(folder), Random(f"{given.kind[0]} {given.seed} {given.at}"))
        return 0
    total: Counter[str] = Counter()
    print(f"{'kind':12} {'inputs':>7} {'right':>7} {'our error':>10} {'findings':>9}")
    for kind in given.kind:
        found = fuzz(kind, given.seed, given.count or KINDS[kind][1])
        bad = {number: text for number, text in found.items() if text not in ("right", "our error")}
        row = Counter(found.values()) & Counter({"right": len(found), "our error": len(found)})
        row |= Counter(findings=len(bad), inputs=len(found))
        total += row
        print(f"{kind:12} " + "{inputs:7} {right:7} {our error:10} {findings:9}".format_map(row), flush=True)
        alike: dict[str, list[int]] = {}
        for number, text in bad.items():
            alike.setdefault(text.split(": ")[0] if text[:5] != "wrong" else text[:40], []).append(number)
        for numbers in alike.values():
            first = bad[numbers[0]].replace("\n", " ")
            print(
                f"    {len(numbers)} x {first}\n      --kind {kind} --seed {given.seed} --at {numbers[0]}", flush=True
            )
    print(f"{'all':12} " + "{inputs:7} {right:7} {our error:10} {findings:9}".format_map(total))
    return int(bool(total["findings"]))


if __name__ == "__main__":
    raise SystemExit(main())
