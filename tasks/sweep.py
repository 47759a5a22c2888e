"""A W&B sweep without an account: the same YAML's grid or random search, a process a trial, shared out over the GPUs.

python -m tasks.sweep configs/sweeps/width.yaml
python -m tasks.sweep configs/sweeps/learning_rate.yaml --trials 20 --set trainer.max_epochs=10 --root /data/runs

With an account the file is W&B's own: `wandb sweep configs/sweeps/width.yaml`, then `wandb agent ID` wherever there is
a GPU. Here trials lie in runs/sweeps/NAME; what has ended is not run again, what was stopped goes on, and a table and a
plot come at the end.
"""

import argparse
import csv
import difflib
import hashlib
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from datamodules.loader import cores
from tasks.arguments import SettingError, content_of
from tasks.search import Sweep, grid, read_sweep, trials_of
from tasks.sweep_table import shortened, write_plot, write_tables

STOPPED = {130, 143, -signal.SIGINT, -signal.SIGTERM}
"""Exit codes of a run that was told to stop."""
REFUSED = "exit code 2:"
"""Begins what is said of a run whose command line the parser did not take."""
UNJUDGED = "it logged no"
"""Begins what is said of a run that ended without the metric; another metric is looked up, not trained for."""


@dataclass(frozen=True)
class Trial:
    """One run of a sweep.

    Args:
        values: of the sweep's parameters. name: those that vary, to be read.
        command: that runs it.
        folder: of its runs, its log and `trial.json`, what is known of it.
    """

    values: dict[str, Any]
    name: str
    command: list[str]
    folder: Path

    @property
    def record(self) -> dict[str, Any]:
        """`status` ("ended", "stopped" or "failed") and `seconds` in all; of an ended one `metric`, what it is judged
        `by`, and `parameters`."""
        path = self.folder / "trial.json"
        return json.loads(path.read_text()) if path.is_file() else {"status": "new", "seconds": 0.0}

    @property
    def log(self) -> Path:
        return self.folder / "log.txt"

    def start(self, environment: dict[str, str]) -> subprocess.Popen:
        self.folder.mkdir(parents=True, exist_ok=True)
        with self.log.open("a") as log:  # in a session of its own: Ctrl-C is passed on by us, once
            return subprocess.Popen(
                self.command, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True
            )

    def finish(self, code: int, seconds: float, metric: str) -> dict[str, Any]:
        """Note what became of it."""
        record: dict[str, Any] = {"status": "ended", "seconds": round(self.record["seconds"] + seconds, 1)}
        if code in STOPPED:
            record["status"] = "stopped"
        elif code:
            said = fault_of(self.log.read_text(errors="replace"))
            record |= {"status": "failed", "why": f"exit code {code}: {said}"}
        else:
            rows = newest_rows(self.folder)
            found = [float(row[metric]) for row in rows if row.get(metric)]
            if found:
                record |= {"metric": found[-1], "parameters": parameters_of(self.folder)}
            else:
                names = [k for k in (rows[0] if rows else {}) if k.startswith("val/")]
                near = difflib.get_close_matches(metric, names, 1)
                hint = f"; did you mean {near[0]}?" if near else ""
                record |= {"status": "failed", "why": f"{UNJUDGED} {metric}, but {', '.join(names) or 'nothing'}{hint}"}
        part = self.folder / "trial.part"
        part.write_text(json.dumps({"values": self.values, "command": self.command, "by": metric} | record, indent=1))
        part.replace(self.folder / "trial.json")
        return record


def fault_of(log: str) -> str:
    """The line of a log that says why its run failed, or its last one."""
    lines = [line.strip() for line in log.splitlines() if line.strip()] or ["it said nothing"]
    return next((x for x in reversed(lines) if re.search(r"Error: *\S|not accepted|error: .*[^:]$", x)), lines[-1])


def newest(folder: Path, pattern: str) -> Path | None:
    found = sorted(folder.glob(pattern), key=lambda path: path.stat().st_mtime)
    return found[-1] if found else None


def newest_rows(folder: Path) -> list[dict[str, str]]:
    """Of the `metrics.csv` of a trial's newest run."""
    path = newest(folder, "*/version_*/metrics.csv")
    if path is None:
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def parameters_of(folder: Path) -> int | None:
    """How many numbers a trial's network has learned."""
    path = newest(folder, "*/version_*/checkpoints/*.ckpt")
    if path is None:
        return None
    state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)["state_dict"]
    return sum(v.numel() for k, v in state.items() if not k.endswith(("running_mean", "running_var", "_tracked")))


def filled(sweep: Sweep, values: dict[str, Any], configs: list[str]) -> list[str]:
    """The sweep's command for one trial, as a W&B agent fills it in.

    Args:
        values: of the swept parameters; None becomes the text None, which the tasks' command line takes for null.
        configs: in place of those the command names by `-c`, if any. W&B's logger (`configs/logging/`) is left out.

    Raises:
        SettingError: for a macro that only W&B's agent knows.
    """
    macros = {
        "${env}": [] if os.name == "nt" else ["/usr/bin/env"],
        "${interpreter}": [sys.executable],
        "${program}": [sweep.program],
        "${args}": [f"--{name}={value}" for name, value in values.items()],
    }
    command, found, words = [], 0, iter(sweep.command)
    for word in words:
        if word in ("-c", "--config"):
            path, found = next(words, ""), found + 1
            if Path(path).parent.name == "logging" or (configs and found > 1):
                continue
            for config in configs or [path]:
                command += [word, config]
        elif word.startswith("${") and word not in macros:
            raise SettingError(f"{sweep.path}: command: {word} is not known here; there are {', '.join(macros)}")
        else:
            command += macros.get(word, [word])
    return command


def planned(sweep: Sweep, count: int | None, seed: int, configs: list[str], folder: Path) -> list[Trial]:
    """The trials, each in a folder named by its command and what the YAMLs in it hold: what is the same is the same
    trial."""
    trials = []
    for values in trials_of(sweep, count, seed):
        command = filled(sweep, values, configs)
        files = [file for word, file in itertools.pairwise(command) if word in ("-c", "--config")]
        what = [[x for x in command if x != sys.executable], [content_of(Path(x)) for x in files if Path(x).is_file()]]
        name = hashlib.sha1(json.dumps(what, default=str).encode()).hexdigest()[:10]
        place = [f"--trainer.default_root_dir={folder / name}", "--ckpt_path=auto"]
        said = ", ".join(f"{k.rsplit('.', 1)[-1]} {shortened(values[k])}" for k in sweep.swept)
        trials.append(Trial(values, said, command + place, folder / name))
    return list({trial.folder: trial for trial in trials}.values())  # a draw may come twice


def devices() -> list[str]:
    """GPUs to share trials over, as CUDA_VISIBLE_DEVICES has them; none on a CPU."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    count = torch.cuda.device_count()
    return visible.split(",")[:count] if visible is not None else [str(i) for i in range(count)]


def run(trials: list[Trial], metric: str, jobs: int | None = None) -> None:
    """Run what has not ended yet, `jobs` at once (one a GPU, one on a CPU). Ctrl-C and SIGTERM stop the trials, too,
    each after the step it is at."""
    gpus = devices()
    jobs = jobs or len(gpus) or 1
    environment = dict(os.environ)
    if not gpus and jobs > 1:  # trials side by side are the parallelism
        environment.setdefault("OMP_NUM_THREADS", str(max(1, cores() // jobs)))
    for trial in trials:
        ended = trial.record["status"] == "ended" or trial.record.get("why", "").startswith(UNJUDGED)
        if ended and trial.record.get("by", metric) != metric:
            trial.finish(0, 0.0, metric)
    waiting = [trial for trial in trials if trial.record["status"] != "ended"]
    number = {trial.folder: i for i, trial in enumerate(trials, 1)}
    print(f"{len(trials)} trials, {len(trials) - len(waiting)} of them ended before, {jobs} at once", flush=True)
    running: dict[int, tuple[Trial, subprocess.Popen, float]] = {}
    refused: list[Trial] = []

    def done(slot: int) -> None:
        trial, process, start = running[slot]
        record = trial.finish(process.wait(), time.monotonic() - start, metric)
        del running[slot]  # not before: Ctrl-C may come any time
        said = {
            "ended": f"{metric} {record.get('metric', 0):.4f}",
            "failed": f"FAILED, {record.get('why')}; {trial.log}",
        }
        print(
            f"[{number[trial.folder]}/{len(trials)}] {trial.name}: {said.get(record['status'], 'stopped')}, "
            f"{record['seconds']:.0f} s",
            flush=True,
        )
        why = record.get("why", "")
        if not waiting or not why.startswith((UNJUDGED, REFUSED)) or any(t.record["status"] == "ended" for t in trials):
            return
        refused.append(trial)
        if why.startswith(UNJUDGED) or len(refused) > 1:  # before a day is lost on it
            print(
                f"{'the metric' if why.startswith(UNJUDGED) else 'the command line'} is at fault, so the other "
                f"{len(waiting)} are not tried",
                flush=True,
            )
            waiting.clear()
        else:  # or one of the values is: is the trial that shares the fewest of them refused as well?
            waiting.sort(key=lambda other: sum(other.values[k] == v for k, v in trial.values.items()))

    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        while waiting or running:
            for slot in [s for s in range(jobs) if s not in running][: len(waiting)]:
                more = {"CUDA_VISIBLE_DEVICES": gpus[slot % len(gpus)]} if gpus else {}
                trial = waiting.pop(0)
                running[slot] = trial, trial.start(environment | more), time.monotonic()
            for slot in [s for s, (_, process, _) in running.items() if process.poll() is not None]:
                done(slot)
            time.sleep(0.1)
    except KeyboardInterrupt:
        for _, process, _ in running.values():
            process.terminate()
        for slot in [*running]:
            done(slot)
        raise
    finally:
        signal.signal(signal.SIGTERM, before)


def rows_of(trials: list[Trial]) -> list[dict[str, Any]]:
    """What is known of the trials: `values`, `folder`, and what their `record` says."""
    return [{"values": trial.values, "folder": str(trial.folder)} | trial.record for trial in trials]


def sweep(
    path: str | Path,
    root: str | Path = "runs",
    trials: int | None = None,
    settings: dict[str, Any] | None = None,
    configs: list[str] | None = None,
    seed: int = 0,
    jobs: int | None = None,
) -> list[dict[str, Any]]:
    """Run a sweep and write `table.csv`, `table.md` and `plot.png` to its folder, `root`/sweeps/NAME.

    Args:
        path: the sweep's YAML. root: of all runs.
        trials: how many, of a grid at most; None is all of it, or `run_cap`.
        settings: further parameters by name; they win over the YAML's.
        configs: in place of those that the command names.
        seed: of random search. jobs: see `run`.

    Returns:
        `rows_of` its trials.

    Raises:
        SettingError: if the sweep is none.
    """
    found = read_sweep(Path(path), settings or {})
    folder = Path(root) / "sweeps" / Path(path).stem
    every = planned(found, trials, seed, configs or [], folder)
    wanted, note = trials or found.run_cap, ""
    if found.method == "grid" and wanted and wanted < (size := len([*grid(found)])):
        note = f" the first {wanted} of {size} settings,"
    print(f"{path}:{note}", end=" ")
    try:
        run(every, found.metric, jobs)
    finally:
        rows = rows_of(every)
        if any(row["status"] == "ended" for row in rows):
            print(write_tables(rows, found, folder), flush=True)
            values = [row["metric"] for row in rows if row["status"] == "ended"]
            if len(values) > 1 and len({*values}) == 1:
                print(f"{found.metric} is {values[0]:.4f} in all of them: more steps, or another metric, may tell more")
            write_plot(rows, found, folder / "plot.png")
    return rows


def setting(text: str) -> tuple[str, Any]:
    """A name and what YAML makes of the value; `{values: [...]}` and the like are parameters to sweep."""
    name, mark, value = text.removeprefix("--").partition("=")
    if not (name and mark):
        raise SettingError(f"--set {text}: wants NAME=VALUE")
    try:
        return name, yaml.safe_load(value)
    except yaml.YAMLError:
        return name, value


def main(args: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tasks.sweep", description="Run a W&B sweep without an account.")
    parser.add_argument("path", help="a W&B sweep, such as configs/sweeps/width.yaml")
    parser.add_argument("--trials", type=int, help="how many (random search: needed, if the YAML has no run_cap)")
    parser.add_argument("--root", default="runs", help="where runs/sweeps/NAME goes instead of runs")
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="NAME=VALUE", help="for every trial")
    parser.add_argument("--config", action="append", default=[], help="in place of the command's own -c")
    parser.add_argument("--seed", type=int, default=0, help="of random search")
    parser.add_argument("--jobs", type=int, help="trials at once (default: one a GPU, or one)")
    given = parser.parse_args(args)
    try:
        settings = dict(setting(text) for text in given.set)
        rows = sweep(given.path, given.root, given.trials, settings, given.config, given.seed, given.jobs)
    except (SettingError, OSError) as error:
        raise SystemExit(f"\n{type(error).__name__}: {error}") from None
    except KeyboardInterrupt:
        raise SystemExit("\nstopped; the same command goes on") from None
    if left := [row for row in rows if row["status"] != "ended"]:
        raise SystemExit(f"{len(left)} of {len(rows)} trials have not ended; the same command tries them again")


if __name__ == "__main__":
    main()
