"""Keypoints <-> heatmaps, batched and on the device. A codec owns encoding, decoding and how a mirrored output is laid
over the straight one, so the three can never disagree."""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Heatmap:
    """Gaussian heatmaps of 1/`stride` of the image's size.

    Args:
        sigma: of the Gaussian in heatmap pixels; officially 2 at 256x192 and 3 at 384x288.
        stride: image pixels a heatmap pixel.
        encoding: "quantised", the official target: the Gaussian sits on the nearest heatmap pixel, cut at 3 sigma
            (official JointsDataset.generate_target); "subpixel": on the true place, whole map (DARK, arXiv
            1910.06278); "udp": on the true place, cut at 3 sigma, and positions scaled by (size - 1), so that a
            mirrored heatmap needs no shift (UDP, arXiv 1911.07524).
        decoding: "quarter", the official arg-max moved a quarter pixel towards the higher neighbour; "dark": a Taylor
            step on the blurred log-heatmap.
        blur: odd kernel size of DARK's blur; None chooses the one that fits sigma (11 for 2, 17 for 3).

    Raises:
        ValueError: for values outside these.
    """

    sigma: float = 2.0
    stride: int = 4
    encoding: Literal["quantised", "subpixel", "udp"] = "quantised"
    decoding: Literal["quarter", "dark"] = "quarter"
    blur: int | None = None

    def __post_init__(self) -> None:
        if self.sigma <= 0 or self.stride < 1:
            raise ValueError(f"sigma and stride must be positive, got {self.sigma} and {self.stride}")
        if self.encoding not in ("quantised", "subpixel", "udp"):
            raise ValueError(f"encoding must be quantised, subpixel or udp, got {self.encoding!r}")
        if self.decoding not in ("quarter", "dark"):
            raise ValueError(f"decoding must be quarter or dark, got {self.decoding!r}")
        if self.blur is not None and (self.blur < 1 or self.blur % 2 == 0):
            raise ValueError(f"blur must be an odd kernel size, got {self.blur}")

    def shape(self, size: tuple[int, int]) -> tuple[int, int]:
        """Heatmap (h, w) of an image of `size` (H, W): what a stride of two convolutions leaves."""
        return -(-size[0] // self.stride), -(-size[1] // self.stride)

    def scale(self, size: tuple[int, int], like: Tensor) -> Tensor:
        """Image pixels a heatmap pixel, (x, y), for an image of `size` (H, W)."""
        if self.encoding == "udp":
            h, w = self.shape(size)
            return like.new_tensor([(size[1] - 1) / (w - 1), (size[0] - 1) / (h - 1)])
        return like.new_tensor([self.stride, self.stride])

    def encode(self, keypoints: Tensor, visible: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Targets of a batch.

        Args:
            keypoints: float `[B, K, 2]`, image pixels, x first.
            visible: `[B, K]`, above 0 where a joint is to be learned.
            size: (H, W) of the image.

        Returns:
            Heatmaps float `[B, K, h, w]` in 0..1 and weights float `[B, K]`, 0 where a joint is not visible or its
            window lies wholly outside (the official out-of-range rule).
        """
        h, w = self.shape(size)
        limit = keypoints.new_tensor([w, h])
        keypoints = torch.where((visible > 0)[..., None], keypoints, 0)  # what is not labelled may be anything
        mu = keypoints.float() / self.scale(size, keypoints)
        nearest = (mu + 0.5).trunc()  # int() truncates towards zero, so do the official targets
        centre = nearest if self.encoding == "quantised" else mu
        radius = int(3 * self.sigma)
        inside = ((nearest - radius < limit) & (nearest + radius + 1 >= 0)).all(-1)
        weight = ((visible > 0) & inside).float()

        def profile(axis: int, length: int) -> Tensor:
            grid = torch.arange(length, device=mu.device, dtype=mu.dtype)
            values = torch.exp(-((grid - centre[..., axis, None]) ** 2) / (2 * self.sigma**2))
            if self.encoding == "subpixel":
                return values
            return values * ((grid - nearest[..., axis, None]).abs() <= radius)

        # A Gaussian is the product of its two profiles: h + w exponentials a joint instead of h * w.
        target = profile(1, h)[..., :, None] * profile(0, w)[..., None, :]
        return target * weight[..., None, None], weight

    def decode(self, heatmaps: Tensor, size: tuple[int, int] | None = None) -> tuple[Tensor, Tensor]:
        """Keypoints of heatmaps.

        Args:
            heatmaps: `[B, K, h, w]`.
            size: (H, W) of the image; h * stride, w * stride if left out.

        Returns:
            Keypoints float `[B, K, 2]` in image pixels, x first, and scores `[B, K]`, the maxima. A map without a
            positive value gives (0, 0), as officially.
        """
        heatmaps = heatmaps.float()
        h, w = heatmaps.shape[-2:]
        score, index = heatmaps.flatten(2).max(-1)
        x, y = index % w, index.div(w, rounding_mode="floor")
        place = torch.stack([x, y], -1)
        offset = self._quarter(heatmaps, place) if self.decoding == "quarter" else self._dark(heatmaps, place)
        keypoints = (place + offset) * (score > 0)[..., None]
        return keypoints * self.scale(size or (h * self.stride, w * self.stride), heatmaps), score

    def merge(self, straight: Tensor, mirrored: Tensor, flip_index: Tensor) -> Tensor:
        """The flip test: mean of the output and of that of the mirrored image, mirrored back.

        Args:
            straight, mirrored: heatmaps `[B, K, h, w]` of the image and of the image flipped left to right.
            flip_index: Long `[K]`, for every joint the joint it becomes in a mirror.
        """
        mirrored = mirrored.flip(-1).index_select(1, flip_index)
        if self.encoding != "udp":
            # Heatmap pixel j means image pixel stride * j, whose mirror image lies 0.75 of a heatmap pixel off; the
            # official remedy is a shift by one (column 0 keeps its value).
            mirrored = torch.cat([mirrored[..., :1], mirrored[..., :-1]], -1)
        return (straight + mirrored) / 2

    def _quarter(self, heatmaps: Tensor, place: Tensor) -> Tensor:
        h, w = heatmaps.shape[-2:]
        around = neighbours(heatmaps, place, [(1, 0), (-1, 0), (0, 1), (0, -1)])
        sign = torch.stack([(around[0] - around[1]).sign(), (around[2] - around[3]).sign()], -1)
        x, y = place.unbind(-1)
        # The official rule leaves out column 1 but not w - 2; UDP's point is symmetry, so there neither.
        low = 0 if self.encoding == "udp" else 1
        inside = (x > low) & (x < w - 1) & (y > low) & (y < h - 1)
        return 0.25 * sign * inside[..., None]

    def _dark(self, heatmaps: Tensor, place: Tensor) -> Tensor:
        kernel = self.blur or 2 * round((self.sigma - 0.8) / 0.3) + 3
        udp = self.encoding == "udp"
        offset = self._taylor(gaussian_blur(heatmaps, kernel), place, narrow=udp)
        if not udp:
            limit = place.new_tensor(heatmaps.shape[:1:-1])
            return offset * ((place > 1) & (place < limit - 2)).all(-1, keepdim=True)
        # Near a border the blur sees half a Gaussian and pulls the peak up to a pixel inwards (as the published UDP
        # code does); there the map itself is expanded, around the nearest place that has all its neighbours.
        limit = place.new_tensor(heatmaps.shape[:1:-1]) - 1
        near = ((place < 2 * self.sigma) | (place > limit - 2 * self.sigma)).any(-1, keepdim=True)
        inner = place.clamp(min=1).minimum((limit - 1).clamp(min=1))
        sharp = inner - place + self._taylor(heatmaps, inner, narrow=True)
        return torch.where(near, sharp, offset)

    @staticmethod
    def _taylor(maps: Tensor, place: Tensor, narrow: bool) -> Tensor:
        """Offset `[B, K, 2]` from `place` to the maximum of the log-map's second-order expansion there; `narrow` takes
        UDP's second derivatives and clipping, else DARK's."""
        logs = (maps.clamp(1e-3, 50) if narrow else maps.clamp(min=1e-10)).log()
        step = 1 if narrow else 2
        n = neighbours(
            logs,
            place,
            [(0, 0), (1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (-1, -1), (1, -1), (-1, 1)]
            + [(step, 0), (-step, 0), (0, step), (0, -step)],
        )
        dx, dy = (n[1] - n[2]) / 2, (n[3] - n[4]) / 2
        # Sums of mirror pairs first, here and in the blur: then a mirrored map decodes to the mirror bit by bit.
        dxx = (n[9] + n[10] - 2 * n[0]) / step**2
        dyy = (n[11] + n[12] - 2 * n[0]) / step**2
        # Over both diagonals, where UDP's own formula takes one: else a mirrored map had another maximum.
        dxy = (n[5] + n[6] - (n[7] + n[8])) / 4
        determinant = dxx * dyy - dxy**2
        offset = torch.stack([dxy * dy - dyy * dx, dxy * dx - dxx * dy], -1)
        sound = determinant.abs() > 1e-12
        peak = torch.where(sound[..., None], offset / determinant.where(sound, 1.0)[..., None], 0.0)
        # Under noise the maximum may lie beyond the arg-max's neighbour, but further only where the expansion fails.
        return peak.clamp(-2, 2)


SMALL_BLURS = {
    1: [1.0],
    3: [0.25, 0.5, 0.25],
    5: [0.0625, 0.25, 0.375, 0.25, 0.0625],
    7: [0.03125, 0.109375, 0.21875, 0.28125, 0.21875, 0.109375, 0.03125],
}
"""cv2's Gaussians up to size 7, which are tables."""


def neighbours(maps: Tensor, place: Tensor, steps: list[tuple[int, int]]) -> list[Tensor]:
    """Values `[B, K]` of `maps` `[B, K, h, w]` at `place` `[B, K, 2]` moved by each (dx, dy); edges repeat outwards."""
    h, w = maps.shape[-2:]
    flat = maps.flatten(2)
    x, y = place.unbind(-1)
    return [
        flat.gather(2, ((y + dy).clamp(0, h - 1) * w + (x + dx).clamp(0, w - 1))[..., None])[..., 0] for dx, dy in steps
    ]


def gaussian_blur(maps: Tensor, kernel: int) -> Tensor:
    """`maps` `[B, K, h, w]` under cv2's Gaussian of that kernel size (zeros outside), each keeping its maximum."""
    if kernel in SMALL_BLURS:
        taps = maps.new_tensor(SMALL_BLURS[kernel])
    else:
        sigma = 0.3 * ((kernel - 1) * 0.5 - 1) + 0.8
        grid = torch.arange(kernel, device=maps.device, dtype=maps.dtype) - (kernel - 1) / 2
        taps = torch.exp(-(grid**2) / (2 * sigma**2))
        taps = taps / taps.sum()
    reach = kernel // 2
    blurred = maps
    for axis, pad in ((-1, (reach, reach)), (-2, (0, 0, reach, reach))):
        length, padded = maps.shape[axis], F.pad(blurred, pad)
        blurred = blurred * taps[reach]
        for i in range(reach):
            pair = padded.narrow(axis, i, length) + padded.narrow(axis, kernel - 1 - i, length)
            blurred = blurred + pair * taps[i]
    before, after = maps.amax((-2, -1), keepdim=True), blurred.amax((-2, -1), keepdim=True)
    return blurred * before / after.where(after != 0, 1.0)
