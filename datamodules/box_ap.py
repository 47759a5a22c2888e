"""COCO's average precision of boxes and of masks."""

import contextlib
import io
import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from pycocotools import mask as rle
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from datamodules.transforms import Array

STATS = ("AP", "AP50", "AP75", "APS", "APM", "APL", "AR1", "AR10", "AR100", "ARS", "ARM", "ARL")


class BoxAP(Metric):
    """All twelve numbers of COCO, 0 to 1; -1 where the data hold nothing of the kind.

    Args:
        truth: content of a COCO file, left as it is. Gaps are filled: `iscrowd` 0, `area` that of the box.
        image_ids: of the images, by the `id` of a batch.
        category_ids, class_names: of the labels 0, 1, ...
        kind: "bbox", or "segm" for masks, of which the numbers are called "mask_AP" and so on.
        per_class: whether to report `AP/<name>` of every class too.
        backend: "pycocotools", or "faster" for faster-coco-eval: the same digits, sooner.

    `update(prediction, batch)` takes lists, an item an image: `boxes` `[N, 4]` x0, y0, x1, y1 in pixels of the batch,
    `scores`, `labels`, and for masks `masks` `[N, m, m]`, probabilities over the boxes.
    """

    full_state_update = False
    shapes = {  # noqa: RUF012 (of every state: kind, and what a row has)
        "ids": (torch.long, ()),
        "counts": (torch.long, ()),
        "sizes": (torch.long, (2,)),
        "boxes": (torch.float32, (4,)),
        "scores": (torch.float32, ()),
        "labels": (torch.long, ()),
        "lengths": (torch.long, ()),
        "codes": (torch.uint8, ()),
    }

    def __init__(
        self,
        truth: dict[str, Any],
        image_ids: Sequence[int],
        category_ids: Sequence[int],
        class_names: Sequence[str],
        kind: Literal["bbox", "segm"] = "bbox",
        per_class: bool = False,
        backend: str = "faster",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if backend not in ("pycocotools", "faster"):
            raise ValueError(f"backend is pycocotools or faster, got {backend!r}")
        self.image_ids, self.category_ids, self.class_names = list(image_ids), list(category_ids), list(class_names)
        self.kind, self.per_class, self.backend = kind, per_class, backend
        wanted = set(category_ids)
        annotations = [dict(a) for a in truth["annotations"] if a["category_id"] in wanted]
        for number, a in enumerate(annotations, 1):
            a["id"] = number  # COCO's evaluation takes 0 for "not matched"
            a["iscrowd"] = int(a.get("iscrowd") or 0)
            a["area"] = a["area"] if a.get("area") is not None else a["bbox"][2] * a["bbox"][3]
            if kind == "bbox":
                a.pop("segmentation", None)
        categories = [{"id": i, "name": n} for i, n in zip(category_ids, class_names, strict=True)]
        self.truth = {"images": truth["images"], "annotations": annotations, "categories": categories}
        for name in self.shapes:
            self.add_state(name, default=[], dist_reduce_fx="cat")

    @property
    def suffix(self) -> str:
        """Of the file that the results are written to."""
        return "_masks" if self.kind == "segm" else ""

    def update(self, prediction: dict[str, list[Tensor]], batch: dict[str, Any]) -> None:
        boxes = on_images(prediction["boxes"], batch)
        rows: dict[str, Any] = {
            "ids": batch["id"],
            "counts": torch.tensor([len(part) for part in boxes]),
            "sizes": batch["original"],
            "boxes": torch.cat(boxes),
            "scores": torch.cat(prediction["scores"]),
            "labels": torch.cat(prediction["labels"]),
        }
        if self.kind == "segm":
            codes = [c for part in masks_of(prediction["masks"], boxes, batch) for c in part]
            text = [np.frombuffer(code["counts"], np.uint8) for code in codes]
            rows["lengths"] = torch.tensor([len(x) for x in text], dtype=torch.long)
            rows["codes"] = torch.from_numpy(np.concatenate([np.zeros(0, np.uint8), *text]))
        for name, value in rows.items():
            getattr(self, name).append(value.detach().to(self.device, self.shapes[name][0]))

    def sync(self, *args: Any, **kwargs: Any) -> None:
        """As in torchmetrics, also where a process saw nothing: it has to send empty tensors of the right kind."""
        for name, (kind, shape) in self.shapes.items():
            if isinstance(state := getattr(self, name), list) and not state:
                state.append(torch.empty((0, *shape), dtype=kind, device=self.device))
        super().sync(*args, **kwargs)

    def results(self) -> list[dict[str, Any]]:
        """Items of a COCO results file. To be called by all processes."""
        with self.sync_context(dist_sync_fn=self.dist_sync_fn):
            return self.items_seen()[0]

    def items_seen(self) -> tuple[list[dict[str, Any]], list[int]]:
        """Items of a COCO results file, and the ids of the images seen, every image once."""

        def all_of(name: str) -> Array:
            value = getattr(self, name)
            return dim_zero_cat(value).cpu().numpy() if len(value) else np.zeros(0, np.int64)

        ids, counts = all_of("ids"), all_of("counts")
        boxes, scores, labels, lengths = (all_of(name) for name in ("boxes", "scores", "labels", "lengths"))
        sizes = all_of("sizes").tolist()
        codes = all_of("codes").tobytes() if self.kind == "segm" else b""
        start = np.cumsum(counts) - counts
        ends = np.cumsum(lengths)
        items = []
        seen, first = np.unique(ids, return_index=True)
        for index, place in zip(seen, first, strict=True):
            image_id = self.image_ids[index]
            for row in range(start[place], start[place] + counts[place]):
                item = {
                    "image_id": image_id,
                    "category_id": self.category_ids[labels[row]],
                    "score": float(scores[row]),
                }
                if self.kind == "segm":
                    code = codes[ends[row] - lengths[row] : ends[row]].decode()
                    item["segmentation"] = {"size": sizes[place], "counts": code}
                else:
                    x0, y0, x1, y1 = (float(v) for v in boxes[row])
                    item["bbox"] = [x0, y0, x1 - x0, y1 - y0]
                items.append(item)
        return items, [self.image_ids[index] for index in seen]

    def compute(self) -> dict[str, Tensor]:
        """Of all of the truth once every image was seen; before (a sanity check, limited batches) of what was seen."""
        items, seen = self.items_seen()
        prefix = "mask_" if self.kind == "segm" else ""
        names = [f"AP/{name}" for name in self.class_names] if self.per_class else []
        values = evaluate(
            self.truth, items, self.kind, self.backend, None if len(seen) == len(self.image_ids) else seen
        )
        named = dict(zip([*STATS, *names], values, strict=False))
        return {prefix + k: torch.tensor(v, device=self.device) for k, v in named.items()}


def evaluate(
    truth: dict[str, Any], items: list[dict[str, Any]], kind: str, backend: str, images: Sequence[int] | None = None
) -> list[float]:
    """COCO's twelve numbers, then AP of each category in order."""
    if backend == "faster":
        from faster_coco_eval import COCO
        from faster_coco_eval import COCOeval_faster as COCOeval
    else:
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval
    count = len(truth["categories"])
    if not items and truth["annotations"]:  # the tools want one at least: this one matches nothing
        first = truth["images"][0] if images is None else next(x for x in truth["images"] if x["id"] == images[0])
        place: dict[str, Any] = {"bbox": [0.0, 0.0, 0.0, 0.0]}
        if kind == "segm":
            nothing = np.zeros((first["height"], first["width"]), np.uint8, order="F")
            place = {"segmentation": rle.encode(nothing)}
        items = [{"image_id": first["id"], "category_id": truth["categories"][0]["id"], "score": 0.0} | place]
    if not items:
        return [-1.0] * (12 + count)
    with contextlib.redirect_stdout(io.StringIO()):  # both print tables and timings
        ground = COCO()
        ground.dataset = truth | {"annotations": [dict(a) for a in truth["annotations"]]}  # will be written to
        ground.createIndex()
        evaluator = COCOeval(ground, ground.loadRes([dict(item) for item in items]), kind)
        if images is not None:
            evaluator.params.imgIds = sorted(images)
        for step in (evaluator.evaluate, evaluator.accumulate, evaluator.summarize):
            step()
    precision = np.asarray(evaluator.eval["precision"])[:, :, :, 0, -1]  # of all areas, 100 an image
    order = {c: k for k, c in enumerate(evaluator.params.catIds)}
    each = []
    for category in truth["categories"]:
        part = precision[:, :, order[category["id"]]]
        each.append(float(part[part > -1].mean()) if (part > -1).any() else -1.0)
    return [float(v) for v in evaluator.stats[:12]] + each


def on_images(boxes: list[Tensor], batch: dict[str, Any]) -> list[Tensor]:
    """A batch's boxes in the pixels of the original images, within them."""
    placed = []
    for part, matrix, size in zip(boxes, batch["to_image"], batch["original"], strict=True):
        scale = matrix[:, :2].diag().float().to(part.device)
        limit = size.flip(0).repeat(2).to(part.device)
        placed.append(torch.minimum((part.float() * scale.repeat(2)).clamp(min=0), limit))
    return placed


def masks_of(
    masks: list[Tensor], boxes: list[Tensor], batch: dict[str, Any], threshold: float = 0.5
) -> list[list[dict[str, Any]]]:
    """RLE of every mask `[N, m, m]` of every image, in the image's own size; `boxes` are in its pixels."""
    found = []
    for part, places, size in zip(masks, boxes, batch["original"].tolist(), strict=True):
        each = zip(part.float().cpu().numpy(), places.double().cpu().numpy(), strict=True)
        found.append([rle.encode(paste(mask, box, size, threshold)) for mask, box in each])  # one frame at a time
    return found


def paste(mask: Array, box: Array, size: Sequence[int], threshold: float = 0.5) -> Array:
    """uint8 `[H, W]` of a mask `[m, m]` over a box, interpolated between the centres of cells and of pixels (as mmdet
    does, and torchvision, which rounds boxes, does not)."""
    frame = np.zeros(tuple(size), np.uint8, order="F")
    weights, place = [], []
    for low, high, length in ((box[1], box[3], size[0]), (box[0], box[2], size[1])):
        start, stop = max(0, math.floor(low)), min(length, math.ceil(high))
        at = (np.arange(start, stop) + 0.5 - low) / max(high - low, 1e-6) * len(mask) - 0.5
        weights.append((1 - np.abs(at[:, None] - np.arange(len(mask)))).clip(min=0))
        place.append(slice(start, max(start, stop)))
    frame[place[0], place[1]] = weights[0] @ mask @ weights[1].T >= threshold
    return frame
