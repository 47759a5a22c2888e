"""An average of the weights over training, which is evaluated and kept in place of the last ones."""

from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import WeightAveraging
from torch import Tensor


class EMA(WeightAveraging):
    """Exponential moving average of weights and buffers.

    The decay from step to step is `decay`, but (1 + n) / (10 + n) as long as that is less after n steps: with a fixed
    one the average would hold the random initial weights for some thousand steps.

    Args:
        decay: 0 to 1; of 0.999 the average is over about the last thousand steps.
        **kwargs: see Lightning's `WeightAveraging`.

    Raises:
        ValueError: if `decay` is not in 0 to 1.
    """

    def __init__(self, decay: float = 0.999, **kwargs: Any) -> None:
        if not 0 <= decay <= 1:
            raise ValueError(f"decay must be between 0 and 1, got {decay}")
        super().__init__(multi_avg_fn=self.average, **kwargs)
        self.decay, self.steps = decay, 0

    def on_train_batch_end(self, trainer: L.Trainer, task: Any, outputs: Any, batch: Any, index: int) -> None:
        self.steps = trainer.global_step  # known to the host, unlike the count of torch's AveragedModel
        super().on_train_batch_end(trainer, task, outputs, batch, index)

    def average(self, averages: list[Tensor], currents: list[Tensor], _: Any) -> None:
        """Move `averages` towards `currents`; tensors of one device and kind."""
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        if averages[0].is_floating_point():
            torch._foreach_lerp_(averages, currents, 1 - decay)
        else:
            torch._foreach_copy_(averages, currents)
