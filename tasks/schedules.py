"""Learning rates that torch has no class for."""

import math
from collections.abc import Sequence
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from tasks.base import images_a_step


class WarmupCosine(LambdaLR):
    """Linear from near zero over `warmup`, then half a cosine down to `minimum` at `total`; epochs, or steps with
    `lr_interval: step`.

    Args:
        total: None is the length of the run.
        minimum: as a share of the optimiser's learning rate.
    """

    def __init__(self, optimizer: Optimizer, warmup: int, total: int | None = None, minimum: float = 0.0) -> None:
        if not 0 <= warmup < (total or warmup + 1):
            raise ValueError(f"warmup must be at least 0 and less than total, got {warmup} and {total}")
        self.total, self.warmup = total, warmup

        def factor(now: int) -> float:
            if now < warmup:
                return (now + 1) / (warmup + 1)
            if self.total is None:
                return 1.0
            share = min(1.0, (now - warmup) / max(1, self.total - warmup))
            return minimum + (1 - minimum) * (1 + math.cos(math.pi * share)) / 2

        super().__init__(optimizer, factor)

    def state_dict(self) -> dict[str, Any]:
        return lengthless(super().state_dict())


class Poly(LambdaLR):
    """(1 - now / total) ** power, as the official segmentation code (and DeepLab) count steps.

    Args:
        total: epochs, or steps with `lr_interval: step`; None is the length of the run.
    """

    def __init__(self, optimizer: Optimizer, total: int | None = None, power: float = 0.9) -> None:
        self.total = total

        def factor(now: int) -> float:
            return 1.0 if self.total is None else max(0.0, 1 - now / self.total) ** power

        super().__init__(optimizer, factor)

    def state_dict(self) -> dict[str, Any]:
        return lengthless(super().state_dict())


class WarmupMultiStep(LambdaLR):
    """Linear over the first steps, then constant but for falls by `gamma` at some epochs: how detectors are trained
    (det/configs/hrnet). Counts steps: goes with `lr_interval: step`.

    Args:
        milestones: epochs at whose ends the rate falls; [8, 11] of 12 is "1x", [20, 23] of 24 (official) "2x".
        warmup: steps.
        ratio: of the first step's rate, officially a third.
        total: steps; None is the length of the run, of which `epochs` are told with it.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        milestones: Sequence[int],
        gamma: float = 0.1,
        warmup: int = 500,
        ratio: float = 1 / 3,
        total: int | None = None,
        epochs: int | None = None,
    ) -> None:
        self.total, self.epochs, self.warmup = total, epochs, warmup

        def factor(now: int) -> float:
            start = ratio + (1 - ratio) * now / warmup if now < warmup else 1.0
            if not self.total or not self.epochs:
                return start
            # In whole numbers: a rounded quotient would fall a step too early or too late.
            return start * gamma ** sum(now * self.epochs >= m * self.total for m in milestones)

        super().__init__(optimizer, factor)

    def state_dict(self) -> dict[str, Any]:
        return lengthless(super().state_dict())


def lengthless(state: dict[str, Any]) -> dict[str, Any]:
    """Without the run's length, so that one that goes on for longer learns for longer."""
    return {k: v for k, v in state.items() if k not in ("total", "epochs", "warmup")}


class ScaledRate(Callback):
    """The learning rate in proportion to the images a step: of all processes, accumulated ones included.

    Args:
        images: for which the optimiser's learning rate is meant.
    """

    def __init__(self, images: int) -> None:
        if images < 1:
            raise ValueError(f"images must be at least 1, got {images}")
        self.images = images

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # When a run is resumed, optimiser and schedule are restored after this.
        factor = images_a_step(trainer) / self.images
        for group in (group for optimizer in trainer.optimizers for group in optimizer.param_groups):
            for key in group.keys() & {"lr", "initial_lr"}:
                group[key] *= factor
        for config in trainer.lr_scheduler_configs:
            scheduler: Any = config.scheduler
            if hasattr(scheduler, "base_lrs"):
                scheduler.base_lrs = [rate * factor for rate in scheduler.base_lrs]
        if trainer.ckpt_path is None:
            rank_zero_info(f"learning rate times {factor:g}: meant for {self.images} images a step")
