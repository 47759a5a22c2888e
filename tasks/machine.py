"""What the machine is asked before a run: whether it is fast in bf16, and whether there is a place to write to."""

import tempfile
from pathlib import Path

import torch


def fast_bf16() -> bool:
    """Whether bf16 pays here: on every current GPU and on CPUs made for it. Never fp16: HRNets give NaN in it."""
    return torch.cuda.is_available() or getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()


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
