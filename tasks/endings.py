"""How a run ends that cannot go on: what it says, and what it leaves."""

import errno
import shutil
from pathlib import Path

import torch

from datamodules.loader import KILLED, killed
from datamodules.transforms import DataError
from hrnet.checkpoints import WeightsError
from tasks.arguments import SettingError
from tasks.guards import NotFinite
from tasks.resume import COMMAND

REFUSALS = (DataError, WeightsError, SettingError, NotFinite, OSError)
"""Faults of what a run is given, which end in one message."""


def discard(folder: Path | None) -> None:
    """Remove the folder of a run that ended before it had anything to show."""
    if folder is not None and folder.is_dir():
        left = {p.name for p in folder.rglob("*") if p.is_file()}
        if left <= {"config.yaml", "hparams.yaml", "metrics.csv", COMMAND}:
            shutil.rmtree(folder)


def told(error: RuntimeError) -> Exception:
    """What a `RuntimeError` of PyTorch means, where it is no fault of the code; any other is raised again."""
    text = str(error)
    if KILLED in text:
        return killed(error)
    if "gloo" in text or isinstance(error, getattr(torch.distributed, "DistError", ())):
        return SettingError(
            "another process of this run has ended: it has said why above, or a signal has killed it (short memory?). "
            "The run goes on with --ckpt_path last"
        )
    raise error


def message(error: Exception) -> str:
    """What is printed of an error that ends a run."""
    # An error of a loader's worker brings the worker's traceback as its message; its last part is ours.
    text = str(error).rsplit(f"{type(error).__name__}: ", 1)[-1].strip()
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        text += "\nThe disk is full. Checkpoints that were written are whole: make room, and go on (--ckpt_path last)"
    return f"\n{type(error).__name__}: {text}\n(HRNET_TRACEBACK=1 shows where)"
