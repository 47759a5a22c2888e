"""Losses that torch, torchvision and torchmetrics lack."""

from dataclasses import dataclass

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
