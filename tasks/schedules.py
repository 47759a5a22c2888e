"""Learning rates that torch has no class for."""

import math

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


class WarmupCosine(LambdaLR):
    """Linear from near zero over `warmup`, then half a cosine down to `minimum` at `total`; epochs, or steps with
    `lr_interval: step`.

    Args:
        minimum: as a share of the optimiser's learning rate.
    """

    def __init__(self, optimizer: Optimizer, warmup: int, total: int, minimum: float = 0.0) -> None:
        if not 0 <= warmup < total:
            raise ValueError(f"warmup must be at least 0 and less than total, got {warmup} and {total}")

        def factor(now: int) -> float:
            if now < warmup:
                return (now + 1) / (warmup + 1)
            share = min(1.0, (now - warmup) / (total - warmup))
            return minimum + (1 - minimum) * (1 + math.cos(math.pi * share)) / 2

        super().__init__(optimizer, factor)
