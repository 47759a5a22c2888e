"""Top-1 and top-5 accuracy, and which class is taken for which."""

from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.functional.classification import multiclass_confusion_matrix
from torchmetrics.utilities import dim_zero_cat

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
        """The confusion matrix, rows (labels) summing to one, RGB uint8; None for more classes than could be seen."""
        count = len(self.class_names)
        if count > 100:
            return None
        counts = self.confusion().float()
        share = (counts / counts.sum(1, keepdim=True).clamp(min=1)).cpu().numpy()
        cell = max(8, min(48, 800 // count))
        margin = 130
        heat = cv2.applyColorMap((share * 255).round().astype(np.uint8), cv2.COLORMAP_VIRIDIS)[..., ::-1]
        board = np.full((margin + cell * count, margin + cell * count, 3), 255, np.uint8)
        board[margin:, margin:] = heat.repeat(cell, 0).repeat(cell, 1)
        for i, name in enumerate(self.class_names):
            at = margin + i * cell + cell // 2 + 4
            if cell >= 12:
                cv2.putText(board, name[:16], (4, at), cv2.FONT_HERSHEY_SIMPLEX, 0.4, (0, 0, 0), 1, cv2.LINE_AA)
                label = np.full((cell, margin, 3), 255, np.uint8)
                place = (4, cell // 2 + 4)
                cv2.putText(label, name[:16], place, cv2.FONT_HERSHEY_SIMPLEX, 0.4, (0, 0, 0), 1, cv2.LINE_AA)
                board[:margin, margin + i * cell : margin + (i + 1) * cell] = np.rot90(label)
            if cell >= 32:
                ink = (0, 0, 0) if share[i, i] > 0.6 else (255, 255, 255)
                text = f"{100 * share[i, i]:.0f}"
                cv2.putText(board, text, (at - 12, at), cv2.FONT_HERSHEY_SIMPLEX, 0.4, ink, 1, cv2.LINE_AA)
        return board
