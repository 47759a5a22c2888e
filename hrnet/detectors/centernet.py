"""Objects as points (arXiv 1904.07850): a heatmap of centres, and at every centre its offset and the object's size."""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import batched_nms, clip_boxes_to_image

from hrnet.heads import HRNetV2p


class CenterNet(nn.Module):
    """Needs no anchors, and no suppression beyond local maxima: the lightest detector here.

    Args:
        channels: of the backbone's four maps, which are mixed at the finest one's resolution.
        num_classes: without a background.
        pyramid, width: channels of the mixed map, and of the layer before each output.
        overlap: a place counts as nearly a centre if a box moved there would overlap the true one so much.
        offset, size: weights of these losses beside the heatmap's (officially 1 and 0.1, in cells of stride 4).
        score, nms, detections: least score, overlap of suppression (1 is none, as officially), and number of what is
            put out.
        representation: that the mixed map is made of, see `HRNetV2p`.
    """

    maps: int = 4
    stride = 4

    def __init__(
        self,
        channels: list[int],
        num_classes: int,
        pyramid: int = 256,
        width: int = 64,
        overlap: float = 0.7,
        offset: float = 1.0,
        size: float = 0.1,
        score: float = 0.05,
        nms: float = 1.0,
        detections: int = 100,
        representation: Literal["v1", "v2"] = "v2",
    ) -> None:
        super().__init__()
        self.neck = HRNetV2p(channels, pyramid, levels=1, representation=representation)
        self.maps = self.neck.maps

        def output(channels: int) -> nn.Sequential:
            return nn.Sequential(
                nn.Conv2d(pyramid, width, 3, padding=1), nn.ReLU(inplace=True), nn.Conv2d(width, channels, 1)
            )

        self.heatmap, self.offset, self.size = output(num_classes), output(2), output(2)
        for head, bias in ((self.heatmap, -2.19), (self.offset, 0.5), (self.size, 0.0)):  # centres are rare: 0.1
            nn.init.normal_(head[2].weight, std=0.001)  # type: ignore[arg-type]
            nn.init.constant_(head[2].bias, bias)  # type: ignore[arg-type]
        self.overlap, self.weights = overlap, (offset, size)
        self.score, self.nms, self.detections = score, nms, detections

    def look(self, maps: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """fp32: logits `[B, C, h, w]`, offsets and sizes `[B, 2, h, w]` in cells, x first."""
        x = F.relu(self.neck(maps)[0])
        return self.heatmap(x).float(), self.offset(x).float(), self.size(x).float()

    def loss(self, maps: list[Tensor], batch: Any) -> dict[str, Tensor]:
        """Named losses; arguments as `RCNN.loss`."""
        logits, offsets, sizes = self.look(maps)
        height, width = logits.shape[-2:]
        goal = torch.zeros_like(logits)
        image, cell, extent, place = [], [], [], []
        for i, (boxes, labels) in enumerate(zip(batch["boxes"], batch["labels"], strict=True)):
            scaled = boxes / self.stride
            centre, wide = (scaled[:, :2] + scaled[:, 2:]) / 2, scaled[:, 2:] - scaled[:, :2]
            at = centre.long().clamp(min=0)
            at = torch.minimum(at, at.new_tensor([width - 1, height - 1]))
            bumps = gaussians(at, radius(wide, self.overlap), (height, width))
            goal[i] = goal[i].scatter_reduce(0, labels[:, None, None].expand_as(bumps), bumps, "amax")
            image.append(torch.full_like(labels, i))
            cell.append(at)
            extent.append(wide)
            place.append(centre - at)
        where, x, y = torch.cat(image), *torch.cat(cell).unbind(1)
        count = max(1, len(where))
        found = offsets[where, :, y, x], sizes[where, :, y, x]
        errors = [
            F.l1_loss(a, torch.cat(b), reduction="sum") / count for a, b in zip(found, (place, extent), strict=True)
        ]
        return {
            "heatmap": focal(logits, goal) / count,
            "offset": self.weights[0] * errors[0],
            "size": self.weights[1] * errors[1],
        }

    def detect(self, maps: list[Tensor], batch: Any) -> list[dict[str, Tensor]]:
        """`boxes`, `labels` and `scores` of every image; see `RCNN.detect`."""
        logits, offsets, sizes = self.look(maps)
        heat = logits.sigmoid()
        heat = heat * (heat == F.max_pool2d(heat, 3, 1, 1))
        width = heat.shape[-1]
        results = []
        for peaks, offset, size, limit in zip(heat, offsets, sizes, batch["size"].tolist(), strict=True):
            scores, index = peaks.flatten().topk(min(self.detections, peaks.numel()))
            labels, cell = index // peaks[0].numel(), index % peaks[0].numel()
            centre = torch.stack([cell % width, cell // width], 1) + offset.flatten(1)[:, cell].T
            half = size.flatten(1)[:, cell].T.clamp(min=0) / 2
            boxes = clip_boxes_to_image(torch.cat([centre - half, centre + half], 1) * self.stride, tuple(limit))
            kept = (scores >= self.score) & (boxes[:, 2:] > boxes[:, :2]).all(1)
            boxes, scores, labels = boxes[kept], scores[kept], labels[kept]
            if self.nms < 1:
                left = batched_nms(boxes, scores, labels, self.nms)
                boxes, scores, labels = boxes[left], scores[left], labels[left]
            results.append({"boxes": boxes, "scores": scores, "labels": labels})
        return results


def radius(size: Tensor, overlap: float) -> Tensor:
    """How far, in cells, both corners of boxes `[N, 2]` (w, h) may move and still overlap the box so much, `[N]`.

    The least of three cases: both outwards, both inwards, both the same way. The official code (CornerNet's) solves
    their quadratic equations wrongly.
    """
    w, h = size.clamp(min=1e-3).unbind(1)
    total, area = w + h, w * h
    shifted = (total - (total**2 - 4 * area * (1 - overlap) / (1 + overlap)).clamp(min=0).sqrt()) / 2
    inside = (total - (total**2 - 4 * area * (1 - overlap)).clamp(min=0).sqrt()) / 4
    outside = ((total**2 + 4 * area * (1 - overlap) / overlap).sqrt() - total) / 4
    return torch.stack([shifted, inside, outside]).amin(0)


def gaussians(centre: Tensor, reach: Tensor, size: tuple[int, int]) -> Tensor:
    """Bumps `[N, h, w]`, 1 at the `centre` (x, y) and 0 beyond the `reach`, of which sigma is a third."""
    reach = reach.floor().clamp(min=0)[:, None, None]
    y = torch.arange(size[0], device=centre.device)[None, :, None] - centre[:, 1, None, None]
    x = torch.arange(size[1], device=centre.device)[None, None, :] - centre[:, 0, None, None]
    sigma = (2 * reach + 1) / 6
    near = (x.abs() <= reach) & (y.abs() <= reach)
    return (-(x**2 + y**2) / (2 * sigma**2)).exp() * near


def focal(logits: Tensor, goal: Tensor) -> Tensor:
    """Focal loss of heatmaps, gentler near a centre, summed (paper, eq. 1)."""
    p, centre = logits.sigmoid(), goal == 1
    hit = F.logsigmoid(logits) * (1 - p) ** 2
    miss = F.logsigmoid(-logits) * p**2 * (1 - goal) ** 4
    return -torch.where(centre, hit, miss).sum()
