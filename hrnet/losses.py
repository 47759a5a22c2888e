"""Losses that torch, torchvision and torchmetrics lack."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class JointsMSE:
    """Weighted mean squared error of heatmaps, halved (official loss.py JointsMSELoss; mmpose's is twice as large).

    Args:
        topk: online hard keypoint mining: mean over the `topk` worst joints of each sample (official
            JointsOHKMMSELoss, 8 there); None takes all joints.
    """

    topk: int | None = None

    def __call__(self, output: Tensor, target: Tensor, weight: Tensor) -> Tensor:
        """Scalar loss of `output` and `target` `[B, K, h, w]` and `weight` `[B, K]`, in fp32 under mixed precision.

        Raises:
            ValueError: if `topk` exceeds the number of joints.
        """
        error = ((output.float() - target) * weight[..., None, None]).square().mean((-2, -1))
        if self.topk is not None:
            if self.topk > error.shape[1]:
                raise ValueError(f"topk={self.topk}, but there are only {error.shape[1]} keypoints")
            error = error.topk(self.topk, dim=1).values
        return error.mean() / 2


@dataclass(frozen=True)
class CrossEntropy:
    """Cross-entropy of every labelled pixel, the mean weighted by class; 0 where no pixel is labelled.

    Args:
        ignore: the label that does not count.
    """

    ignore: int = 255

    def __call__(self, logits: Tensor, label: Tensor, weight: Tensor | None = None) -> Tensor:
        """Scalar loss in fp32.

        Args:
            logits: `[B, C, H, W]`. label: integers `[B, H, W]`, 0 to C - 1 or `ignore`.
            weight: `[C]`, of the classes.
        """
        error = F.cross_entropy(logits.float(), label.long(), weight, ignore_index=self.ignore, reduction="sum")
        valid = label != self.ignore
        total = valid.sum() if weight is None else weight[label.long().where(valid, 0)].where(valid, 0).sum()
        return error / total.clamp(min=torch.finfo(torch.float32).tiny)


@dataclass(frozen=True)
class OHEM:
    """Cross-entropy of the hardest pixels (official criterion.py OhemCrossEntropy): of those whose own class got less
    than `threshold`, and of the `keep` worst at least.

    Args:
        threshold: probability below which a pixel is hard; 0.9 in the official YAML.
        keep: pixels of the batch that are kept however easy they are.
        ignore: the label that does not count.
    """

    threshold: float = 0.9
    keep: int = 131072
    ignore: int = 255

    def __post_init__(self) -> None:
        if not 0 <= self.threshold <= 1 or self.keep < 0:
            raise ValueError(f"threshold is a probability and keep a number of pixels, got {self}")

    def __call__(self, logits: Tensor, label: Tensor, weight: Tensor | None = None) -> Tensor:
        """Scalar loss, see `CrossEntropy`; the official mean is over the kept pixels, not over their weights."""
        logits, label = logits.float(), label.long()
        error = F.cross_entropy(logits, label, weight, ignore_index=self.ignore, reduction="none").flatten()
        valid = (label != self.ignore).flatten()
        with torch.no_grad():
            own = logits.softmax(1).gather(1, label.where(label != self.ignore, 0)[:, None]).flatten()
            # Sorting what does not count to the end spares the host to ask how many count.
            ranked = own.where(valid, 2.0).sort().values
            last = (valid.sum() - 1).clamp(min=0, max=self.keep)
            kept = valid & (own < ranked.gather(0, last[None]).clamp(min=self.threshold))
        return error.where(kept, 0).sum() / kept.sum().clamp(min=1)
