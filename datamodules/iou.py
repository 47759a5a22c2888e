"""Intersection over union: of regions, and of their boundaries."""

from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from datamodules.drawing import draw_confusion
from datamodules.mask_files import IGNORE
from datamodules.transforms import Array


class MeanIoU(Metric):
    """mIoU, pixel accuracy, mean accuracy, boundary mIoU and the IoU of every class, counted on the device.

    Every sample counts once, whatever a distributed sampler repeats.

    A class that occurs neither in the labels nor in the prediction is absent: its IoU is nan and no part of the means.
    (The official code counts it as 0; on its data sets all classes occur.)

    Args:
        class_names: of the C classes.
        boundary: width of the boundary as a share of the image's diagonal (arXiv 2103.16562: 0.02); 0 leaves boundary
            mIoU out.

    It holds C * C numbers a sample: 4 MB for 3,000 Cityscapes images, 180 MB for ADE20K's 2,000.
    """

    full_state_update = False
    ids: Any
    counts: Any
    edges: Any

    def __init__(self, class_names: list[str], boundary: float = 0.02, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.class_names, self.boundary = class_names, boundary
        for name in ("ids", "counts", "edges"):
            self.add_state(name, default=[], dist_reduce_fx="cat")

    def update(self, prediction: dict[str, Tensor], batch: dict[str, Any]) -> None:
        """`prediction["label"]` and `batch["mask"]` `[B, H, W]`, 255 in the latter does not count; `id` `[B]`."""
        guess, truth, number = prediction["label"], batch["mask"], len(self.class_names)
        if number <= IGNORE:  # bytes are much faster, and hold all classes and one number for "ignored"
            guess, truth = guess.to(torch.uint8), truth.to(torch.uint8)
        else:
            guess, truth = guess.int(), truth.int().where(truth != IGNORE, number)
        self.ids.append(batch["id"])
        self.counts.append(pair_counts(truth, guess, number)[:, :-1, :-1].contiguous())
        if self.boundary:
            diagonal = (truth.shape[-2] ** 2 + truth.shape[-1] ** 2) ** 0.5
            width = max(1, round(self.boundary * diagonal))
            truth = truth.clamp(max=number)
            ignored = -(truth == torch.full_like(truth, number)).to(guess.dtype) & number
            edges = at_edge(truth, width, number), torch.maximum(at_edge(guess, width, number), ignored)
            pairs = pair_counts(*edges, number)
            parts = pairs.diagonal(dim1=1, dim2=2), pairs.sum(2), pairs.sum(1)
            self.edges.append(torch.stack(parts, 1)[..., :-1].int())

    def sync(self, *args: Any, **kwargs: Any) -> None:
        """As in torchmetrics, also where a process saw nothing: it has to send empty tensors of the right kind."""
        number = len(self.class_names)
        kinds = {
            "ids": ((), torch.long),
            "counts": ((number, number), torch.int32),
            "edges": ((3, number), torch.int32),
        }
        for name, (shape, kind) in kinds.items():
            if isinstance(state := getattr(self, name), list) and not state and (self.boundary or name != "edges"):
                state.append(torch.empty((0, *shape), dtype=kind, device=self.device))
        super().sync(*args, **kwargs)

    def once(self, values: Any) -> Tensor:
        """What was kept of each sample, of every sample once, `[N, ...]`."""
        ids = dim_zero_cat(self.ids)
        order = ids.argsort()
        first = torch.ones(len(ids), dtype=torch.bool, device=ids.device)
        first[1:] = ids[order][1:] != ids[order][:-1]
        return dim_zero_cat(values)[order[first]]

    def confusion(self) -> Tensor:
        """Pixels `[C, C]`, rows the labels."""
        return self.once(self.counts).long().sum(0)

    def picture(self) -> Array | None:
        """See `draw_confusion`."""
        return draw_confusion(self.confusion().cpu().numpy(), self.class_names)

    def compute(self) -> dict[str, Tensor]:
        counts = self.confusion().double()
        hit, labelled, guessed = counts.diag(), counts.sum(1), counts.sum(0)
        iou = hit / (labelled + guessed - hit)  # 0 / 0 is nan: absent
        values = {
            "mIoU": iou.nanmean(),
            "pixel_accuracy": hit.sum() / counts.sum().clamp(min=1),
            "mean_accuracy": (hit / labelled).nanmean(),
        }
        if self.boundary:
            both, edge, guess = self.once(self.edges).long().sum(0).double()
            values["boundary_mIoU"] = (both / (edge + guess - both)).nanmean()
        values |= {f"IoU/{name}": value for name, value in zip(self.class_names, iou, strict=True)}
        return {k: v.float() for k, v in values.items()}


def pair_counts(truth: Tensor, guess: Tensor, number: int) -> Tensor:
    """How often each class was taken for each, int32 `[B, number + 1, number + 1]`, of classes `[B, H, W]` from 0 to
    `number`; without asking the host for anything. A higher `truth` counts nowhere, or as `number`."""
    size = number + 1
    if truth.device.type == "cpu" and truth.dtype == torch.uint8:
        pairs = zip(truth.numpy(), guess.numpy(), strict=True)
        return torch.from_numpy(np.stack([byte_pair_counts(*pair, size) for pair in pairs]))
    offset = torch.arange(len(truth), device=truth.device)[:, None, None] * size**2
    code = (truth.clamp(max=number).long() * size + guess + offset).flatten()
    counts = torch.zeros(len(truth) * size**2, dtype=torch.int32, device=truth.device)
    return counts.scatter_add_(0, code, torch.ones_like(code, dtype=torch.int32)).view(-1, size, size)


def byte_pair_counts(truth: Array, guess: Array, size: int) -> Array:
    """The same of one image, uint8 `[H, W]`, of classes below `size`."""
    # A count just written has to be waited for. So neighbours, which are mostly alike, are counted apart.
    lanes = 256 // size
    guess = guess + (np.arange(guess.shape[1]) % lanes * size).astype(np.uint8)
    counts = np.zeros(size * 256, np.int32)
    rows = max(1, 2**24 // guess.shape[1])  # OpenCV returns float32
    for start in range(0, len(guess), rows):
        pair = cv2.merge([guess[start : start + rows], truth[start : start + rows]]).view("<u2")
        counts += cv2.calcHist([pair], [0], None, [size * 256], [0, size * 256]).ravel().astype(np.int32)
    return counts.reshape(size, 256)[:, : lanes * size].reshape(size, lanes, size).sum(1, dtype=np.int32)


def at_edge(label: Tensor, width: int, number: int) -> Tensor:
    """The class `[B, H, W]` of pixels with another class, or the image's end, within `width` of them (a square, as
    repeated 3x3 erosion has it), and `number` for all others. What is `number` before is no other class."""
    label = label.clone()
    inner = label[:, width:-width, width:-width]
    if inner.numel():
        # On the CPU torch is slow to multiply bytes and to compare them with a plain number: hence these forms.
        none = (label == torch.full_like(label, number)).to(label.dtype)
        low, high = number - label, (label + 1) & (none - 1)  # both 0 for what is no class
        same = (greatest(low, width) == number - inner) & (greatest(high, width) == inner + 1)
        torch.maximum(inner, -same.to(label.dtype) & number, out=inner)
    return label


def greatest(x: Tensor, width: int) -> Tensor:
    """The maximum within `width`, by windows that double; of where they fit, `[B, H - 2 width, W - 2 width]`."""
    for axis in (1, 2):
        size, whole = 1, 2 * width + 1
        while size < whole:
            step = min(size, whole - size)
            count = x.shape[axis] - step
            x = torch.maximum(x.narrow(axis, 0, count), x.narrow(axis, step, count))
            size += step
    return x
