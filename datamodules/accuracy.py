"""Top-1 and top-5 accuracy, and which class is taken for which."""

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.functional.classification import multiclass_confusion_matrix
from torchmetrics.utilities import dim_zero_cat

from datamodules.drawing import draw_confusion
from datamodules.transforms import Array


class Accuracy(Metric):
    """Accuracy by rank of the true class. Every sample counts once, whatever a distributed sampler repeats.

    Args:
        class_names: of the classes; top-5 is left out where there are no more than five.
    """

    full_state_update = False
    rows: Any

    def __init__(self, class_names: list[str], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.class_names = class_names
        self.add_state("rows", default=[], dist_reduce_fx="cat")

    def update(self, prediction: dict[str, Tensor], batch: dict[str, Any]) -> None:
        """`prediction["probability"]` `[B, C]`; `batch`: `label` `[B]` and `id` `[B]`."""
        probability, label = prediction["probability"].detach(), batch["label"]
        true = probability.gather(1, label[:, None])
        # Of equal ones the first counts as the better, as arg-max takes it.
        before = torch.arange(probability.shape[1], device=label.device) < label[:, None]
        rank = ((probability > true) | ((probability == true) & before)).sum(1)
        self.rows.append(torch.stack([batch["id"], label, probability.argmax(1), rank], 1))

    def seen(self) -> Tensor:
        """`[N, 4]` of every sample once: id, label, predicted class, rank of the label."""
        rows = dim_zero_cat(self.rows)
        order = rows[:, 0].argsort()
        rows = rows[order]
        first = torch.ones(len(rows), dtype=torch.bool, device=rows.device)
        first[1:] = rows[1:, 0] != rows[:-1, 0]
        return rows[first]

    def compute(self) -> dict[str, Tensor]:
        rank = self.seen()[:, 3]
        values = {"top1": (rank < 1).float().mean()}
        if len(self.class_names) > 5:
            values["top5"] = (rank < 5).float().mean()
        return values

    def confusion(self) -> Tensor:
        """`[C, C]` counts, rows the labels."""
        rows = self.seen()
        return multiclass_confusion_matrix(rows[:, 2], rows[:, 1], len(self.class_names))

    def picture(self) -> Array | None:
        """See `draw_confusion`."""
        return draw_confusion(self.confusion().cpu().numpy(), self.class_names)
