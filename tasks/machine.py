"""What the machine is asked before a run: whether it is fast in bf16, and whether there is a place to write to."""

import tempfile
from pathlib import Path
from typing import Any

import torch

from tasks.arguments import SettingError


def fast_bf16() -> bool:
    """Whether bf16 pays here: on every current GPU and on CPUs made for it. Never fp16: HRNets give NaN in it."""
    return torch.cuda.is_available() or getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()


def set_precision(trainer: Any) -> None:
    """The machine's own where a trainer's configuration has none; a `SettingError` for what it has not, or harms."""
    if trainer.precision is None:
        trainer.precision = "bf16-mixed" if fast_bf16() else "32-true"
    if str(trainer.precision) in ("bf16-true", "16-true", "64-true", "bf16", "64", "transformer-engine"):
        raise SettingError(f"trainer.precision {trainer.precision}: weights and losses stay in fp32; take bf16-mixed")
    if trainer.sync_batchnorm and not torch.cuda.is_available():
        raise SettingError("trainer.sync_batchnorm: torch shares batch statistics on GPUs only, and there is none")


def check_writable(folder: Path) -> None:
    """Raise an `OSError` that names the folder, before any time is spent, if it cannot be written to."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(
            f"{folder}: cannot write there ({error.strerror}); choose another --trainer.default_root_dir"
        ) from None
