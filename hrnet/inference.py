"""Class scores of whole images: by windows, at several scales, with the mirror image (official test protocol of
segmentation, seg/lib/datasets/base_dataset.py and cityscapes.py)."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Network = Callable[[Tensor], Tensor]
"""Logits `[B, C, h, w]` of images `[B, 3, H, W]`."""


@dataclass(frozen=True)
class Protocol:
    """How an image is looked at.

    Args:
        window: (H, W) of the windows that slide over it, where it is larger; None looks at the whole.
        stride: from window to window, as a share of it; officially 1 for Cityscapes, 2/3 elsewhere.
        scales: sizes to look at, relative to the image.
        flip: look at the mirror image as well, and average the logits.
        average: what is averaged over windows and scales: "exp" of the logits as officially, or their "softmax".
        align_corners: of the resizing of logits; belongs to the weights, so the segmentation task sets it.
    """

    window: tuple[int, int] | None = None
    stride: float = 2 / 3
    scales: tuple[float, ...] = (1.0,)
    flip: bool = False
    average: Literal["exp", "softmax"] = "exp"
    align_corners: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.stride <= 1:
            raise ValueError(f"stride is a share of the window, above 0 and at most 1, got {self.stride}")
        if self.window is not None and min(self.window) < 1:
            raise ValueError(f"a window is (H, W) in pixels, got {self.window}")
        if self.average not in ("exp", "softmax"):
            raise ValueError(f"average must be exp or softmax, got {self.average!r}")
        if not self.scales or min(self.scales) <= 0:
            raise ValueError(f"scales must be positive, got {self.scales}")

    def __call__(
        self, network: Network, image: Tensor, size: tuple[int, int], flip_index: Tensor | None = None
    ) -> Tensor:
        """Scores `[B, C, *size]`, to be compared within a pixel, in fp32.

        Args:
            network: gives logits of any resolution.
            image: `[B, 3, H, W]`.
            size: (H, W) of the scores.
            flip_index: Long `[C]`, the class that each becomes in a mirror (LIP's left and right).
        """
        total: Tensor | None = None
        for scale in self.scales:
            scaled = image
            if scale != 1:  # as OpenCV does it, whatever the network does
                scaled = F.interpolate(image.float(), scaled_size(image, scale), mode="bilinear", align_corners=False)
            scores = self.resized(self.slide(network, scaled, flip_index), size)
            total = scores if total is None else total + scores
        assert total is not None
        return total

    def slide(self, network: Network, image: Tensor, flip_index: Tensor | None) -> Tensor:
        """Mean scores of all windows that cover a pixel, `[B, C, H, W]` of the image's own size."""
        size = (image.shape[-2], image.shape[-1])
        window = size if self.window is None else (min(self.window[0], size[0]), min(self.window[1], size[1]))
        scores = counts = None
        for y in starts(size[0], window[0], self.stride):
            for x in starts(size[1], window[1], self.stride):
                place = (..., slice(y, y + window[0]), slice(x, x + window[1]))
                if window == size:
                    return self.scores(network, image, flip_index)
                part = self.scores(network, image[place], flip_index)
                if scores is None or counts is None:
                    scores = part.new_zeros(*part.shape[:2], *size)
                    counts = part.new_zeros(size)
                scores[place] += part
                counts[place] += 1
        assert scores is not None
        assert counts is not None
        return scores / counts

    def scores(self, network: Network, image: Tensor, flip_index: Tensor | None) -> Tensor:
        logits = network(torch.cat([image, image.flip(-1)]) if self.flip else image)
        logits = self.resized(logits.float(), image.shape[-2:])
        if self.flip:
            logits, mirrored = logits.chunk(2)
            mirrored = mirrored.flip(-1)
            logits = (logits + (mirrored if flip_index is None else mirrored.index_select(1, flip_index))) / 2
        # exp overflows fp32 at 88; no trained network comes near.
        return logits.clamp(max=80).exp() if self.average == "exp" else logits.softmax(1)

    def resized(self, x: Tensor, size: tuple[int, ...] | torch.Size) -> Tensor:
        if tuple(x.shape[-2:]) == tuple(size):
            return x
        return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=self.align_corners)


def scaled_size(image: Tensor, scale: float) -> tuple[int, int]:
    """(H, W) by the official rounding of the longer side, the other in proportion, 32 at least."""
    height, width = image.shape[-2:]
    longer = int(max(height, width) * scale + 0.5)
    ratio = longer / max(height, width)
    return max(32, int(height * ratio + 0.5)), max(32, int(width * ratio + 0.5))


def starts(length: int, window: int, stride: float) -> list[int]:
    """Where windows begin along an axis: every `stride` of a window, the last one moved back to end with the image."""
    step = max(1, int(window * stride))
    count = max(0, math.ceil((length - window) / step)) + 1
    return [min(i * step, length - window) for i in range(count)]
