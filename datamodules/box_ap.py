"""COCO's average precision of boxes and of masks."""

import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from pycocotools import mask as rle
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from datamodules.coco_eval import Found, mean_known, numbered, precision_recall, reference
from datamodules.similarity import box_iou, mask_iou
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
        backend: "numpy" for `coco_eval.py`; or, to compare, "pycocotools", or "faster" for faster-coco-eval: the same
            digits, later.

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
        backend: str = "numpy",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if backend not in ("numpy", "pycocotools", "faster"):
            raise ValueError(f"backend is numpy, pycocotools or faster, got {backend!r}")
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
            return self.items(*self.found()[:4])

    def found(self) -> tuple[Array, Array, Array, Any, Array]:
        """Of all detections image and label (positions in `image_ids` and `category_ids`), score, and box x, y, width,
        height `[N, 4]` or RLE; then the images seen. Every image once, in order."""

        def all_of(name: str) -> Array:
            value = getattr(self, name)
            return dim_zero_cat(value).cpu().numpy() if len(value) else np.zeros((0, *self.shapes[name][1]), np.int64)

        seen, first = np.unique(all_of("ids"), return_index=True)
        starts = np.cumsum(counts := all_of("counts")) - counts
        counts = counts[first]
        rows = np.repeat(starts[first] - (np.cumsum(counts) - counts), counts) + np.arange(counts.sum())
        shape: Any = all_of("boxes")[rows].astype(np.float64)
        shape[:, 2:] -= shape[:, :2]
        if self.kind == "segm":
            lengths, codes = all_of("lengths"), all_of("codes").tobytes()
            ends = np.cumsum(lengths)
            sizes = np.repeat(all_of("sizes")[first], counts, axis=0).tolist()
            places = zip((ends - lengths)[rows].tolist(), ends[rows].tolist(), sizes, strict=True)
            shape = [{"size": size, "counts": codes[start:end].decode()} for start, end, size in places]
        return np.repeat(seen, counts), all_of("labels")[rows], all_of("scores")[rows].astype(np.float64), shape, seen

    def items(self, images: Array, labels: Array, scores: Array, shape: Any) -> list[dict[str, Any]]:
        """What was found as items of a COCO results file."""
        name = "segmentation" if self.kind == "segm" else "bbox"
        shape = shape if self.kind == "segm" else shape.tolist()
        return [
            {"image_id": self.image_ids[i], "category_id": self.category_ids[label], "score": score, name: one}
            for i, label, score, one in zip(images, labels, scores.tolist(), shape, strict=True)
        ]

    def compute(self) -> dict[str, Tensor]:
        """Of all of the truth once every image was seen; before (a sanity check, limited batches) of what was seen."""
        images, labels, scores, shapes, seen = self.found()
        prefix = "mask_" if self.kind == "segm" else ""
        names = [f"AP/{name}" for name in self.class_names] if self.per_class else []
        part = None if len(seen) == len(self.image_ids) else [self.image_ids[i] for i in seen]
        if self.backend == "numpy":
            image_ids, category_ids = np.array(self.image_ids)[images], np.array(self.category_ids)[labels]
            values = summary(*by_arrays(self.truth, image_ids, category_ids, scores, shapes, self.kind, part))
        else:
            values = evaluate(self.truth, self.items(images, labels, scores, shapes), self.kind, self.backend, part)
        named = dict(zip([*STATS, *names], values, strict=False))
        return {prefix + k: torch.tensor(v, device=self.device) for k, v in named.items()}


def evaluate(
    truth: dict[str, Any],
    items: list[dict[str, Any]],
    kind: str,
    backend: str = "numpy",
    images: Sequence[int] | None = None,
) -> list[float]:
    """COCO's twelve numbers, then AP of each category in order; of the `images` given (by id), or of all."""
    if backend != "numpy" and items:  # the tools want one at least
        return summary(*reference(truth, items, kind, backend, images))
    ids, labels, scores = (np.array([x[key] for x in items]) for key in ("image_id", "category_id", "score"))
    shapes = [item["segmentation" if kind == "segm" else "bbox"] for item in items]
    return summary(*by_arrays(truth, ids, labels, scores, shapes, kind, images))


def summary(precision: Array, recall: Array) -> list[float]:
    """COCO's twelve numbers, then AP of each category."""
    AP = [precision[..., 0], precision[0, ..., 0], precision[5, ..., 0], *(precision[..., a] for a in (1, 2, 3))]
    AR = [*(recall[:, :, 0, m] for m in (0, 1, 2)), *(recall[:, :, a, -1] for a in (1, 2, 3))]
    each = [precision[:, :, category, 0] for category in range(precision.shape[2])]
    return [mean_known(x) for x in (*AP, *AR, *each)]


def by_arrays(
    truth: dict[str, Any],
    image_ids: Array,
    category_ids: Array,
    scores: Array,
    shapes: Any,
    kind: str,
    images: Sequence[int] | None,
) -> tuple[Array, Array]:
    """As `precision_recall`, of N detections: ids and scores `[N]`, and boxes x, y, width, height `[N, 4]` or RLEs."""
    if kind == "segm":
        area = np.array([rle.area(code) for code in shapes], float)  # rle.area takes 255 at most
    else:
        boxes = np.array(shapes, float).reshape(-1, 4)
        area = boxes[:, 2] * boxes[:, 3]
    annotations, objects, found, rows = numbered(truth, Found(image_ids, category_ids, area, scores), images)
    if kind == "segm":
        sizes = {x["id"]: (x["height"], x["width"]) for x in truth["images"]}

        def similarity(detection: Array, thing: Array) -> Array:
            used = {i: annotations[i] for i in set(thing.tolist())}
            outlines = {i: encoded(a["segmentation"], *sizes[a["image_id"]]) for i, a in used.items()}
            return mask_iou([shapes[row] for row in rows], outlines, objects.crowd, detection, thing)
    else:
        true_boxes = np.array([a["bbox"] for a in annotations], float).reshape(-1, 4)

        def similarity(detection: Array, thing: Array) -> Array:
            return box_iou(boxes[rows[detection]], true_boxes[thing], objects.crowd[thing])

    return precision_recall(objects, found, similarity, len(truth["categories"]))


def encoded(segmentation: Any, height: int, width: int) -> dict[str, Any]:
    """RLE of what COCO files hold: polygons, runs as numbers, or RLE."""
    if isinstance(segmentation, list):
        return rle.merge(rle.frPyObjects(segmentation, height, width))
    return rle.frPyObjects(segmentation, height, width) if isinstance(segmentation["counts"], list) else segmentation


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
