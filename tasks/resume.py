"""Runs that go on where they were: whole checkpoints, also amid an epoch; which one to take; and the run's numbers."""

import csv
import errno
import io
import os
import signal
import threading
import zipfile
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.utilities.exceptions import SIGTERMException
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_only, rank_zero_warn

from hrnet.checkpoints import WeightsError, check_sums

ROWS = "metrics_rows"
"""Where a checkpoint keeps how many rows `metrics.csv` had, and the row that was to come next, if any."""
COMMAND = "command.txt"
"""File of a run's folder: `same_run` of the command that began it."""


class Last(ModelCheckpoint):
    """Writes `last.ckpt`, from which the run goes on as if it had not been stopped: after every epoch, every so many
    steps within one, before the last step of one (validation may take long), where `max_steps` or `max_time` end one,
    and on Ctrl-C or SIGTERM.

    The first Ctrl-C ends the run after the step under way, the second at once. A signal to one process of several ends
    all of them after the same step.

    Args:
        every_n_steps: steps of the optimiser.
    """

    sign = signal.SIGTERM
    """That ended the run, if one did."""

    def __init__(self, every_n_steps: int = 1000) -> None:
        super().__init__(filename="last", save_top_k=1, save_on_train_epoch_end=True, enable_version_counter=False)
        self.every_n_steps = every_n_steps
        self.before: Any = None
        self.due: dict[str, float] | None = None
        self.told = torch.zeros(1, dtype=torch.int32)
        self.group: Any = None
        self.work: Any = None
        self.answer = self.told

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.is_global_zero and self.dirpath is not None:
            for part in Path(self.dirpath).glob(".*.part"):  # what a run that was killed was writing
                part.unlink()
        if threading.current_thread() is threading.main_thread():
            self.before = signal.signal(signal.SIGINT, lambda *_: self.interrupt(trainer))

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # A schedule as long as the run asks for the loaders before the checkpoint is read; Lightning then forgets to
        # tell them their place in the epoch.
        trainer.fit_loop._load_combined_loader_states()
        for callback in trainer.early_stopping_callbacks:
            if callback.stopped_epoch or callback.wait_count >= callback.patience:
                rank_zero_info("EarlyStopping has ended this run: it is not trained on")
                trainer.should_stop = True
        if trainer.world_size > 1:
            # Lightning's handler broadcasts within the signal, amid whatever the processes are at, which can stop them
            # for ever; and its question of every step makes GPUs wait.
            self.group = torch.distributed.new_group(backend="gloo")
            trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = self.agree  # type: ignore[method-assign]
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, lambda *_: self.told.fill_(1))

    def interrupt(self, trainer: L.Trainer) -> None:
        rank_zero_info("\nCtrl-C: the run ends after this step; once more ends it at once")
        signal.signal(signal.SIGINT, self.before)
        Last.sign = signal.SIGINT
        if trainer.world_size > 1:
            self.told.fill_(1)
        else:  # between two steps Lightning looks
            trainer._signal_connector.received_sigterm = True  # type: ignore[attr-defined]

    def agree(self) -> None:
        """Before a step: end, if any process had been told to before the last one; that answer is there by now."""
        if self.work is not None:
            self.work.wait()
            self.work = None
            if self.answer.item():
                raise SIGTERMException
        self.answer = self.told.clone()
        self.work = torch.distributed.all_reduce(
            self.answer, torch.distributed.ReduceOp.MAX, group=self.group, async_op=True
        )

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        loop = trainer.fit_loop.epoch_loop
        left = trainer.num_training_batches - loop.batch_progress.current.ready
        if left == 0 or loop._should_accumulate():  # the epoch's end is not to be skipped, nor gradients to be lost
            return
        # Not saved again at the end of such an epoch, which Lightning would count as whole.
        ends = trainer.should_stop or trainer.global_step == trainer.max_steps
        if left == 1 or ends or trainer.global_step % self.every_n_steps == 0:
            log = trainer._logger_connector
            if log.should_update_logs:  # of this step, but after this
                numbers = {k: float(v) for k, v in log.metrics["log"].items()}
                self.due = {"epoch": trainer.current_epoch, "step": loop._batches_that_stepped} | numbers
            self.save(trainer)
            self.due = None

    def on_exception(self, trainer: L.Trainer, pl_module: Any, exception: BaseException) -> None:
        # Other exceptions may have come amid a step.
        stopped = isinstance(exception, SIGTERMException) and trainer.state.fn == "fit"
        if stopped and trainer.training and not trainer.fit_loop.epoch_loop._should_accumulate():
            self.save(trainer)

    def save(self, trainer: L.Trainer) -> None:
        if not self._should_skip_saving_checkpoint(trainer):
            self._save_none_monitor_checkpoint(trainer, self._monitor_candidates(trainer))

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        if trainer.is_global_zero and isinstance(trainer.logger, CSVLogger):
            trainer.logger.save()  # before the checkpoint, or rows would be missing
            checkpoint[ROWS] = len(rows_of(Path(trainer.logger.log_dir))), self.due

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        checkpoint["callbacks"].pop("Timer", None)  # `max_time` is of a process, not of all that went on in turn

    def teardown(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        if self.before is not None:
            signal.signal(signal.SIGINT, self.before)
            self.before = None


class WholeCheckpoints(TorchCheckpointIO):
    """Writes a checkpoint beside its place and moves it there when it lies on the disk: whatever ends the process, or
    fills the disk, leaves the former one whole."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        if "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        path = Path(path)
        part = path.with_name(f".{path.name}.part")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with part.open("wb") as file:
                file.write(buffer.getbuffer())
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, path)
        except OSError as error:
            part.unlink(missing_ok=True)
            former = f"; the one before, of {path}, is whole" if path.is_file() else ""
            reason = "the disk is full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else error.strerror
            raise OSError(
                f"{path}: cannot write the checkpoint ({reason}){former}; make room, and go on with --ckpt_path last"
            ) from None


OWN = ("trainer.", "last.", "ckpt_path", "data.workers", "data.timeout", "data.skip")
"""Options that may differ from one part of a run to the next."""


def same_run(args: list[str]) -> str:
    """What of a command tells one run from another, an option a line, however they were ordered and written."""
    options: list[str] = []
    for arg in args:
        if arg.startswith("-") and not arg.lstrip("-")[:1].isdigit():
            options.append(arg.lstrip("-"))
        elif options:  # the value of the option before
            options[-1] += f"={arg}"
    return "\n".join(sorted(option for option in options if not option.startswith(OWN)))


def another(run: Path, command: str) -> str:
    """That a run is of another command than this one, and where they differ."""
    there, here = set((run / COMMAND).read_text().splitlines()), set(command.splitlines())
    parts = [f"{', '.join(sorted(a - b)) or 'nothing more'}" for a, b in ((there, here), (here, there))]
    return (
        f"{run} is of another command (there {parts[0]}; here {parts[1]}): a new run (--ckpt_path last goes on there)"
    )


def find_runs(root: Path, which: str, command: str | None = None) -> list[Path]:
    """The `best.ckpt` or `last.ckpt` of all runs below `root`, the newest last; see `find_checkpoint`."""
    found = sorted(root.glob(f"*/checkpoints/{which}.ckpt"), key=lambda path: path.stat().st_mtime)
    if command is not None:
        notes = [path.parents[1] / COMMAND for path in found]
        found = [p for p, note in zip(found, notes, strict=True) if not note.is_file() or note.read_text() == command]
    return found


def find_checkpoint(root: Path, which: str, command: str | None = None) -> Path:
    """`best.ckpt` or `last.ckpt` of the newest run below `root` that has one; in place of a last one that cannot be
    read, that run's best.

    Args:
        command: `same_run` of the runs that count; None is any.

    Raises:
        WeightsError: if there is none.
    """
    found = find_runs(root, which, command)
    if not found:
        raise WeightsError(f"no {which}.ckpt in any run below {root}; give the checkpoint's path")
    path = found[-1]
    try:
        read_checkpoint(path)
    except WeightsError as error:
        other = path.with_name("best.ckpt")
        if which == "best" or not other.is_file():
            raise
        try:
            read_checkpoint(other)
        except WeightsError:
            folder = path.parents[1]
            raise WeightsError(f"{error} Nor is {other}. Move {folder} away to begin anew") from None
        rank_zero_warn(f"{error} Goes on from {other} instead")
        return other
    return path


def read_checkpoint(path: Path) -> dict[str, Any]:
    """A checkpoint of one of our runs; a `WeightsError` if `path` is none."""
    if not path.is_file():
        raise WeightsError(f"{path}: no such checkpoint")
    try:
        if zipfile.is_zipfile(path):
            check_sums(path)
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except WeightsError:
        raise
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        if not path.stat().st_size:
            raise WeightsError(f"{path}: the file is empty") from None
        if "TorchScript" in reason:
            raise WeightsError(f"{path}: an exported TorchScript; `predict` runs exported .onnx files") from None
        if "weights only" in reason.lower().replace("_", " "):
            raise WeightsError(
                f"{path}: loading it could run code, which no checkpoint of a run needs, or it is cut off; weights of "
                f"others come by --model.init_from"
            ) from None
        raise WeightsError(f"{path}: not a readable checkpoint of a run ({reason}); is it cut off?") from None
    parts = [content.get(k) if isinstance(content, dict) else None for k in ("state_dict", "hyper_parameters")]
    if not all(isinstance(part, dict) for part in parts):
        raise WeightsError(
            f"{path}: weights, but no checkpoint of a run; --ckpt_path goes on with a run, "
            f"to start from these weights say --model.init_from {path}"
        )
    return content


def rows_of(folder: Path) -> list[dict[str, str]]:
    """The rows of a run's `metrics.csv`."""
    path = folder / "metrics.csv"
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def take_up(logger: CSVLogger, rows: tuple[int, dict[str, float] | None] | None) -> None:
    """Go on with the `metrics.csv` that lies in the logger's folder, from where a checkpoint's `ROWS` say."""
    if getattr(rank_zero_only, "rank", 0):
        return
    number, due = rows or (None, None)
    kept: list[dict[str, Any]] = [*rows_of(Path(logger.log_dir))[:number]]
    if due is not None:
        kept.append(due)
    experiment = logger.experiment  # has removed the file
    if kept:
        experiment.metrics_keys = sorted(set().union(*kept))
        with open(experiment.metrics_file_path, "w", newline="") as file:
            writer = csv.DictWriter(file, experiment.metrics_keys)
            writer.writeheader()
            writer.writerows(kept)
