"""What a W&B run has beyond metrics, configuration and pictures: its id kept, and the best checkpoint."""

import os
from netrc import NetrcParseError, netrc
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from tasks.callbacks import folder_of

ID = "wandb_id"
"""File of a run's folder that holds the id of its W&B run."""


class WandbRun(Callback):
    """Keeps the W&B run's id in the run's folder, so that a resumed run is the same one there too, and puts the best
    checkpoint there as an artifact `<task>-<id>` with the aliases "best" and "latest".

    `WandbLogger(log_model=True)` would name `last.ckpt` best as well.
    """

    @rank_zero_only
    def on_fit_start(self, trainer: L.Trainer, task: Any) -> None:
        folder = folder_of(trainer)
        if folder is not None and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            folder.mkdir(parents=True, exist_ok=True)
            (folder / ID).write_text(logger_of(trainer).experiment.id)

    @rank_zero_only
    def on_fit_end(self, trainer: L.Trainer, task: Any) -> None:
        import wandb

        for checkpoint in trainer.checkpoint_callbacks:
            if isinstance(checkpoint, ModelCheckpoint) and checkpoint.monitor and checkpoint.best_model_path:
                run, score = logger_of(trainer).experiment, checkpoint.best_model_score
                numbers = {checkpoint.monitor: None if score is None else float(score)}
                artifact = wandb.Artifact(f"{task.__module__.rsplit('.', 1)[-1]}-{run.id}", "model", metadata=numbers)
                artifact.add_file(checkpoint.best_model_path)
                run.log_artifact(artifact, aliases=["best", "latest"])


def logger_of(trainer: L.Trainer) -> WandbLogger:
    return next(logger for logger in trainer.loggers if isinstance(logger, WandbLogger))


def prepare(former: Path | None) -> None:
    """Say to `wandb.init` what its environment leaves open: to take up the run of the folder that this one goes on in,
    to keep what the code has beyond its commit, and to stay offline where no account is set up."""
    os.environ.setdefault("WANDB_SAVE_CODE", "true")
    if former is not None and (former / ID).is_file():
        os.environ.setdefault("WANDB_RUN_ID", (former / ID).read_text().strip())
        os.environ.setdefault("WANDB_RESUME", "allow")
    if not account():
        os.environ.setdefault("WANDB_MODE", "offline")


def account() -> bool:
    """Whether Weights & Biases could log in without asking."""
    try:
        return "WANDB_API_KEY" in os.environ or netrc().authenticators("api.wandb.ai") is not None
    except (OSError, NetrcParseError):
        return False
