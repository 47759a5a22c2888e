"""`python -m tasks.<task> analyse RUN.ckpt [--worst N] [options of validate]`: what a network gets wrong, as HTML.

It validates as `validate` does, in one process, and writes `report.html` and `report.json` into the run's folder.
"""

import json
import math
import os
import platform
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lightning as L
import torch
import yaml
from lightning.pytorch.callbacks import Callback

from tasks import report
from tasks.arguments import SettingError, content_of, data_in_files, taken
from tasks.base import Task
from tasks.callbacks import folder_of
from tasks.findings import pick
from tasks.resume import find_checkpoint, read_checkpoint, rows_of

ONE = (
    "analyse looks at every sample in one process, and here are {}; leave --trainer.devices and --trainer.num_nodes "
    "out, and start it without torchrun or srun"
)


def arguments(task: type[Task], args: list[str]) -> list[str]:
    """Those of `validate` with the callback below: the checkpoint's own data and way to evaluate, unless others are
    named, in one process.

    Raises:
        SettingError: without a checkpoint or weights, or with several processes.
    """
    name = task.__module__.rsplit(".", 1)[-1]
    if args and not args[0].startswith("-"):
        args = ["--ckpt_path", *args]
    given, rest = taken(args, "--ckpt_path")
    if given is None and not any(a.startswith(("--model.init_from", "-h", "--help", "--print")) for a in args):
        raise SettingError(f"say what to analyse: python -m {task.__module__} analyse CHECKPOINT (or best, or last)")
    for option in ("devices", "num_nodes"):  # before any process waits for another
        asked = yaml.safe_load(taken(args, f"--trainer.{option}")[0] or "1")
        asked = len(asked) if isinstance(asked, list) else asked
        if isinstance(asked, int) and asked != 1:
            raise SettingError(ONE.format(asked))
    added = ["--trainer.devices=1"]
    if given is not None:
        root = taken(args, "--trainer.default_root_dir")[0] or "runs"
        path = find_checkpoint(Path(root) / name, given) if given in ("best", "last") else Path(given)
        if path.suffix != ".onnx":
            named = any(a == "--data" or a.startswith("--data=") for a in rest) or data_in_files(rest)
            added += settings_of(path, not named)
        added += [f"--model.init_from={path}" if ".ckpt#" in str(path) else f"--ckpt_path={path}"]
    worst, rest = taken(rest, "--worst")
    count = [] if worst is None else [f"--trainer.callbacks.worst={worst}"]  # of the callback named last
    return ["validate", *added, *rest, "--trainer.callbacks+=tasks.analyse.Analysis", *count]


def settings_of(checkpoint: Path, data: bool) -> list[str]:
    """What the run of a checkpoint says in its config.yaml and the checkpoint does not: its data, if they are wanted,
    and how it is evaluated. Of a joint run, those of the part behind the `#`.

    Raises:
        SettingError: for a joint checkpoint without a part.
    """
    file, _, part = str(checkpoint).partition("#") if ".ckpt#" in str(checkpoint) else (str(checkpoint), "", "")
    kept = read_checkpoint(Path(file))["hyper_parameters"]
    if isinstance(kept.get("tasks"), dict):
        if part not in kept["tasks"]:
            modules = {name: task["class_path"].rpartition(".")[0] for name, task in kept["tasks"].items()}
            each = ", ".join(f"python -m {module} analyse {file}#{name}" for name, module in modules.items())
            raise SettingError(f"{checkpoint}: a joint network is analysed task by task: {each}")
        kept = kept["tasks"][part]["init_args"]
    path = Path(file).parent.parent / "config.yaml"
    if not path.is_file():
        return []
    config = content_of(path)
    if part:
        config = {
            "model": config["model"]["tasks"][part].get("init_args"),
            "data": config["data"]["init_args"]["parts"][part],
        }
    model = {k: v for k, v in (config.get("model") or {}).items() if k in ("flip_test", "evaluation") and k not in kept}
    found = [f"--model.{k}={json.dumps(v)}" for k, v in model.items()]
    return [f"--data={json.dumps(config['data'])}", *found] if data and config.get("data") else found


class Analysis(Callback):
    """Collects what the task's `findings` say of every sample, the worst ones as pictures, and how long it all takes.

    Args:
        worst: how many pictures.
    """

    def __init__(self, worst: int = 12) -> None:
        self.worst = worst
        self.samples: list[dict[str, Any]] = []
        self.pictures: dict[int, bytes] = {}
        self.seen: set[int] = set()
        self.seconds: list[dict[str, float]] = []  # of every batch
        self.now: dict[str, float] | None = None
        self.mark = 0.0

    def setup(self, trainer: L.Trainer, task: Any, stage: str) -> None:
        if trainer.world_size > 1:
            raise SettingError(ONE.format(trainer.world_size))

    def on_validation_start(self, trainer: L.Trainer, task: Any) -> None:
        self.data: Any = trainer.datamodule  # type: ignore[attr-defined]
        self.findings = task.findings(task, self.data)
        self.hooks = [task.register_forward_pre_hook(self.before), task.register_forward_hook(self.after)]
        self.mark = clock()

    def before(self, *args: Any) -> None:
        self.entered = clock()

    def after(self, *args: Any) -> None:
        if self.now is not None:
            self.now["backbone"] += clock() - self.entered

    def on_validation_batch_start(self, trainer: L.Trainer, task: Any, batch: Any, index: int, loader: int = 0) -> None:
        start = clock()
        self.now = {"images": len(batch["id"]), "loading": start - self.mark, "backbone": 0.0, "start": start}

    def on_validation_batch_end(
        self, trainer: L.Trainer, task: Any, outputs: Any, batch: Any, index: int, loader: int = 0
    ) -> None:
        assert self.now is not None
        self.seconds.append(self.now | {"step": clock() - self.now.pop("start")})
        self.now = None
        ids = batch["id"].tolist()
        fresh = [i for i, number in enumerate(ids) if number not in self.seen and ids.index(number) == i]
        if len(fresh) < len(ids):  # what took the place of a sample that could not be read
            batch, outputs, ids = pick(batch, fresh), pick(outputs, fresh), [ids[i] for i in fresh]
        self.seen.update(ids)
        instances = getattr(self.data.datasets["val"], "instances", None)
        for i, (number, judged) in enumerate(zip(ids, self.findings.add(outputs, batch), strict=True)):
            if judged is None or math.isnan(judged[0]):
                continue
            file = str(instances[number].path) if instances else f"sample {number}"
            one = {"id": number, "file": file, "score": judged[0], "what": judged[1]}
            self.samples.append(one)
            worst = sorted(self.samples, key=lambda s: s["score"])[: self.worst]
            if any(s is one for s in worst):
                self.pictures[number] = report.jpeg(task.picture(batch, outputs, i))
                self.pictures = {s["id"]: self.pictures[s["id"]] for s in worst}
            self.samples = worst
        self.mark = clock()

    def on_validation_end(self, trainer: L.Trainer, task: Any) -> None:
        for hook in self.hooks:
            hook.remove()
        folder = folder_of(trainer)
        if folder is None:  # of a trial run
            return
        metrics = {k.removeprefix("val/"): float(v) for k, v in trainer.callback_metrics.items() if k[:4] == "val/"}
        numbers: dict[str, Any] = {
            "task": type(task).__module__,
            "checkpoint": str(trainer.ckpt_path or task.origin or "untrained"),
            "data": f"{type(self.data).__module__}.{type(self.data).__name__}",
            "samples": len(self.seen),
            "metrics": metrics,
            "findings": self.findings.numbers(),
            "measure": self.findings.measure,
            "worst": self.samples,
            "speed": self.speed(),
            "machine": machine(trainer, task, self.data),
        }
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "report.json").write_text(json.dumps(without_nan(numbers), indent=1))
        path = folder / "report.html"
        rows = rows_of(Path(str(trainer.ckpt_path)).parent.parent) if trainer.ckpt_path else []
        path.write_text(self.html(numbers, rows))
        print(f"\nreport:  {path}\nnumbers: {folder / 'report.json'}", flush=True)

    def html(self, numbers: dict[str, Any], rows: list[dict[str, str]]) -> str:
        shots = [
            report.picture(self.pictures[s["id"]], [f"{numbers['measure']} {s['score']:.3f}", s["file"], s["what"]])
            for s in numbers["worst"]
        ]
        table = [{"metric": k, "value": v} for k, v in numbers["metrics"].items()]
        about = f"{numbers['samples']:,} samples of {numbers['data']}, {numbers['checkpoint']}"
        parts = [
            report.paragraph(about, "soft"),
            report.section("Metrics", report.table(table)),
            curves(rows),
            *self.findings.parts(numbers["findings"]),
            report.section(
                "Worst samples",
                report.paragraph(f"those of the lowest {numbers['measure']}, the worst first", "soft"),
                report.side_by_side(*shots),
            ),
            report.section(
                "Speed",
                report.table([numbers["speed"]]),
                report.paragraph(
                    "Seconds an image, the first batch left out where there are more: waiting for the loader; the "
                    "backbone's passes; the rest of a step, which is head, loss, decoding and metric.",
                    "soft",
                ),
                report.table([{"": k, " ": v} for k, v in numbers["machine"].items()]),
            ),
        ]
        return report.page(f"{numbers['task'].rsplit('.', 1)[-1]}: what it gets wrong".capitalize(), parts)

    def speed(self) -> dict[str, float]:
        """Seconds an image and images a second."""
        counted = self.seconds[1:] or self.seconds
        total = {k: sum(s[k] for s in counted) for k in ("images", "loading", "backbone", "step")}
        images, spent = max(1.0, total["images"]), total["loading"] + total["step"]
        return {
            "loading": total["loading"] / images,
            "backbone": total["backbone"] / images,
            "rest of the step": (total["step"] - total["backbone"]) / images,
            "images a second": images / spent if spent else float("nan"),
        }


def clock() -> float:
    """Seconds, once the device has done what it was told."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.perf_counter()


def machine(trainer: L.Trainer, task: Any, data: Any) -> dict[str, Any]:
    """What the figures of speed hold for."""
    device = str(trainer.strategy.root_device)
    cpu = platform.processor() or platform.machine()
    if (about := Path("/proc/cpuinfo")).is_file():
        cpu = next((x.split(":")[1].strip() for x in about.read_text().splitlines() if x.startswith("model name")), cpu)
    if device.startswith("cuda"):
        device = f"{torch.cuda.get_device_name(task.device)}, {cpu}"
    return {
        "device": cpu if device == "cpu" else device,
        "processors, threads": f"{os.cpu_count()}, {torch.get_num_threads()}",
        "precision": str(trainer.precision),
        "images a batch": data.eval_batch_size,
        "loader workers": data.workers,
        "parameters": sum(p.numel() for p in task.parameters()),
        "versions": ", ".join(
            [f"Python {platform.python_version()}", *(f"{p} {version(p)}" for p in ("torch", "lightning"))]
        ),
    }


def curves(rows: list[dict[str, str]]) -> str:
    """Learning curves of a run's `metrics.csv`; nothing without."""
    found: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        for name, value in row.items():
            if name not in ("step", "epoch") and value not in ("", None) and row.get("step"):
                found.setdefault(name, []).append((float(row["step"]), float(value)))
    groups: dict[str, list[str]] = {
        "Loss": [n for n in ("train/loss", "val/loss") if n in found],
        "Score": [n for n in ("val/score",) if n in found],
        "Learning rate": [n for n in found if n.startswith("lr-")],
    }
    plots = [report.plot(title, {n: found[n] for n in names}, "step") for title, names in groups.items()]
    return report.section("Learning curves", report.side_by_side(*filter(None, plots))) if any(plots) else ""


def without_nan(value: Any) -> Any:
    """As JSON knows it, which has no NaN: null."""
    if isinstance(value, dict):
        return {k: without_nan(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
