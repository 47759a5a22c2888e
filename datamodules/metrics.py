"""The number that each keypoint benchmark asks for: COCO's AP, MPII's PCKh, distances in pixels.

Torchmetrics that keep one row per sample and drop repeated ids in `compute`: what a distributed
sampler repeats counts once; number of processes, batch size and order do not change the result.

`prediction`: `keypoints` float [B, K, 2], input pixels, x first; `score` float [B, K]. `batch`:
`id` int [B], index into `instances`; `image` [B, 3, H, W]; `to_image` float [B, 2, 3], affine from
input pixels to pixels of the original image.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy import ndarray as Array
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from datamodules.coco_eval import AREAS, Found, mean_known, numbered, precision_recall, reference
from datamodules.similarity import keypoint_similarity, oks_nms, soft_oks_nms

if TYPE_CHECKING:
    from datamodules.keypoints import Instance

PCKH_GROUPS = {
    "Head": (9, 9), "Shoulder": (12, 13), "Elbow": (11, 14), "Wrist": (10, 15),
    "Hip": (2, 3), "Knee": (1, 4), "Ankle": (0, 5),
}  # fmt: skip
COCO_STATS = ("AP", "AP50", "AP75", "APM", "APL", "AR", "AR50", "AR75", "ARM", "ARL")


class _Samples(Metric):
    """What the metrics below share: predictions in image pixels, one row per sample."""

    full_state_update = False

    def __init__(self, instances: list[Instance], num_keypoints: int, **kwargs: Any):
        super().__init__(**kwargs)
        self.instances = instances
        k = self.num_keypoints = num_keypoints
        self._shapes: dict = {"ids": (), "keypoints": (k, 2), "scores": (k,), "areas": ()}
        for name in self._shapes:
            self.add_state(name, default=[], dist_reduce_fx="cat")

    def update(self, prediction: dict[str, Tensor], batch: dict[str, Any]) -> None:
        """Store one batch (keys: module docstring) on the metric's device, without a CPU-GPU sync.
        Raises ValueError where shapes do not fit each other or the number of keypoints."""
        ids = batch["id"].to(self.device, torch.long)
        keypoints = prediction["keypoints"].detach().to(self.device, torch.float32)
        scores = prediction["score"].detach().to(self.device, torch.float32)
        matrix = batch["to_image"].to(self.device, torch.float32)
        # Products and sums by hand: autocast would run a matmul in bf16 and lose whole pixels.
        mapped = (matrix[:, None, :, :2] * keypoints[:, :, None]).sum(-1) + matrix[:, None, :, 2]
        determinant = matrix[:, 0, 0] * matrix[:, 1, 1] - matrix[:, 0, 1] * matrix[:, 1, 0]
        areas = determinant.abs() * math.prod(batch["image"].shape[-2:])  # prod(scale * 200)
        rows = dict(zip(self._shapes, (ids, mapped, scores, areas), strict=True))
        for name, value in rows.items():
            if value.shape != (len(ids), *self._shapes[name]):
                raise ValueError(f"{name}: {[*value.shape]}, not {[len(ids), *self._shapes[name]]}")
        for name, value in rows.items():
            getattr(self, name).append(value)

    def sync(self, *args: Any, **kwargs: Any) -> None:
        """As in torchmetrics, also where a process saw nothing: it has to send an empty tensor of
        the right type and rank, or the gathering fails (torchmetrics would send float [0])."""
        for name, shape in self._shapes.items():
            if isinstance(state := getattr(self, name), list) and not state:
                kind = torch.long if name == "ids" else torch.float32
                state.append(torch.empty((0, *shape), dtype=kind, device=self.device))
        super().sync(*args, **kwargs)

    def _seen(self) -> tuple[list[Instance], Array, Array, Array]:
        """The N different samples by rising id, in image pixels: instances, keypoints [N, K, 2],
        scores [N, K], areas [N] of the crops; float64."""
        states = [dim_zero_cat(getattr(self, name)).cpu().numpy() for name in self._shapes]
        ids, first = np.unique(states[0], return_index=True)
        keypoints, scores, areas = (state[first].astype(np.float64) for state in states[1:])
        return [self.instances[i] for i in ids], keypoints, scores, areas

    def _errors(self) -> tuple[list[Instance], Array, Array]:
        """The N instances seen, distances [N, K] in image pixels, which are labelled [N, K]."""
        instances, keypoints, scores, _ = self._seen()
        truth = np.array([i.keypoints for i in instances], dtype=float).reshape(keypoints.shape)
        visible = np.array([i.visible for i in instances]).reshape(scores.shape) > 0
        return instances, np.linalg.norm(keypoints - truth, axis=-1), visible

    def _report(self, values: dict[str, float]) -> dict[str, Tensor]:
        return {k: torch.tensor(float(v), device=self.device) for k, v in values.items()}


class KeypointAP(_Samples):
    """COCO's keypoint AP and AR, rescored and suppressed as in official lib/dataset/coco.py.
    instances: what the data set yields; if these are a detector's boxes, give `ground_truth`.
    ground_truth: COCO annotations, as dict (left as it is) or path of a JSON file; None: made of
        `instances`. Gaps are filled: `iscrowd` 0; `keypoints` none labelled; `num_keypoints`
        counted; `bbox` around the labelled ones; `area` 0.53 of the box (mmpose's choice too).
        Several categories are averaged; crowds and objects without labelled keypoints ignored.
    sigmas: one per keypoint, for any K, or ValueError is raised (COCO's own: .025 to .107).
    nms: "oks", "soft" or None, among the poses of one image and category.
    score_threshold: the box score is multiplied by the mean of the keypoint scores above it (or 0).
    backend: "numpy" for `coco_eval.py`; or, to compare, "pycocotools", or "faster" for
        faster-coco-eval: the same digits, later.
    """

    def __init__(
        self, instances: list[Instance], ground_truth: dict[str, Any] | str | None,
        sigmas: list[float], nms: str | None = "oks", nms_threshold: float = 0.9,
        score_threshold: float = 0.2, backend: str = "numpy", **kwargs: Any,
    ):  # fmt: skip
        super().__init__(instances, len(sigmas), **kwargs)
        if nms not in ("oks", "soft", None) or backend not in ("numpy", "pycocotools", "faster"):
            raise ValueError(f"unknown nms {nms!r} or backend {backend!r}")
        if isinstance(ground_truth, str | Path):
            ground_truth = dict(json.loads(Path(ground_truth).read_text()))
        self.ground_truth = _complete(ground_truth or _from_instances(instances), len(sigmas))
        self.sigmas, self.nms, self.nms_threshold = np.array(sigmas), nms, nms_threshold
        self.score_threshold, self.backend = score_threshold, backend

    def results(self) -> list[dict[str, Any]]:
        """Items of a COCO results file, plain numbers: image_id, category_id, score, keypoints (x,
        y in image pixels, the heatmap's score, K times over). To be called by all processes."""
        with self.sync_context(dist_sync_fn=self.dist_sync_fn):
            return self._items(*self._found()[:4])

    def _found(self) -> tuple[Array, Array, Array, Array, list[Instance]]:
        """Image ids, category ids, scores [N] and keypoints [N, K, 3] of what is left after
        suppression, sorted by image and category; and the instances seen."""
        instances, keypoints, scores, areas = self._seen()
        valid = scores > self.score_threshold
        score = (scores * valid).sum(1) / np.maximum(valid.sum(1), 1) * [i.score for i in instances]
        images = np.array([int(i.image_id) for i in instances], int)
        categories = np.array([int(i.category_id) for i in instances], int)
        rows = np.lexsort((categories, images))
        if len(rows) and self.nms is not None:
            place = [images[rows], categories[rows]]
            new = np.any([np.diff(x, prepend=x[0]) != 0 for x in place], axis=0)
            if self.nms == "oks":
                pose = keypoints[rows], score[rows], areas[rows]
                rows = rows[oks_nms(*pose, self.sigmas, self.nms_threshold, np.cumsum(new))]
            else:
                kept = []
                for part in np.split(rows, np.flatnonzero(new)):
                    pose = keypoints[part], score[part], areas[part]
                    kept.append(part[soft_oks_nms(*pose, self.sigmas, self.nms_threshold)])
                rows = np.concatenate(kept)
        triples = np.concatenate([keypoints[rows], scores[rows][..., None]], -1)
        return images[rows], categories[rows], score[rows], triples, instances

    def _items(self, *found: Array) -> list[dict[str, Any]]:
        images, categories, scores, keypoints = found
        columns = images, categories, scores, keypoints.reshape(len(images), 3 * self.num_keypoints)
        names = "image_id", "category_id", "score", "keypoints"
        return [dict(zip(names, row, strict=True)) for row in zip(*(c.tolist() for c in columns), strict=True)]

    def compute(self) -> dict[str, Tensor]:
        """AP, AP50, AP75, APM, APL, AR, AR50, AR75, ARM, ARL in [0, 1]; M: objects of 32^2 to 96^2
        square pixels, L: above. -1: no such object in the ground truth. All 0: no prediction.
        Once every instance was seen, all images of the ground truth count, also those without a
        box; before (a sanity check, limited batches) only the images seen."""
        *found, seen = self._found()
        if not len(found[0]):
            return self._report(dict.fromkeys(COCO_STATS, 0.0))
        images = sorted({i.image_id for i in seen}) if len(seen) < len(self.instances) else None
        if self.backend == "numpy":
            precision, recall = self._tables(*found, images=images)
        else:
            items = self._items(*found)
            precision, recall = reference(self.ground_truth, items, "keypoints", self.backend, images, self.sigmas)
        AP = precision[..., 0], precision[0, ..., 0], precision[5, ..., 0], precision[..., 1], precision[..., 2]
        AR = recall[:, :, 0], recall[0, :, 0], recall[5, :, 0], recall[:, :, 1], recall[:, :, 2]
        values = [mean_known(x) for x in (*AP, *AR)]
        return self._report(dict(zip(COCO_STATS, values, strict=True)))

    def _tables(self, *found: Array, images: list[int] | None) -> tuple[Array, Array]:
        image_ids, category_ids, scores, keypoints = found
        poses = np.ascontiguousarray(keypoints[..., :2])
        area = np.ptp(poses[..., 0], axis=1) * np.ptp(poses[..., 1], axis=1)
        every = Found(image_ids, category_ids, area, scores)
        annotations, truth, counted, rows = numbered(self.ground_truth, every, images)
        truth.ignore = truth.crowd | (np.array([a["num_keypoints"] for a in annotations], int) == 0)
        labels = np.array([a["keypoints"] for a in annotations], float).reshape(-1, self.num_keypoints, 3)
        boxes = np.array([a["bbox"] for a in annotations], float).reshape(-1, 4)

        def similarity(detection: Array, thing: Array) -> Array:
            pairs = rows[detection], thing
            return keypoint_similarity(poses, labels, boxes, truth.area, self.sigmas, *pairs)

        areas = [AREAS[name] for name in ("all", "medium", "large")]
        return precision_recall(truth, counted, similarity, len(self.ground_truth["categories"]), areas, (20,))


def _from_instances(instances: list[Instance]) -> dict[str, Any]:
    annotations = []
    for i in instances:
        points, box = np.c_[i.keypoints, i.visible].ravel().tolist(), [float(v) for v in i.box]
        new = {"image_id": int(i.image_id), "category_id": int(i.category_id), "keypoints": points}
        annotations.append(new | {"bbox": box, "area": float(i.area) if i.area > 0 else None})
    return {"images": [{"id": int(i.image_id)} for i in instances], "annotations": annotations}


def _complete(ground_truth: dict[str, Any], num_keypoints: int) -> dict[str, Any]:
    """What the evaluation reads, in a new dict, with the gaps filled (see `KeypointAP`)."""
    wanted = "image_id", "category_id", "keypoints", "num_keypoints", "bbox", "area", "iscrowd"
    annotations: list[dict] = []
    for old in ground_truth["annotations"]:
        new = {key: old[key] for key in wanted if old.get(key) not in (None, [])}
        points = new.get("keypoints", [0] * 3 * num_keypoints)
        if len(points) != 3 * num_keypoints:
            what = f"{len(points) // 3} keypoints, but {num_keypoints} sigmas"
            raise ValueError(f"annotation {old.get('id')}: {what}")
        gaps = {"keypoints": points, "num_keypoints": sum(v > 0 for v in points[2::3]), "iscrowd": 0}
        if "bbox" not in new:
            labelled = np.reshape(points, (-1, 3))[np.array(points[2::3]) > 0, :2]
            low, high = (labelled.min(0), labelled.max(0)) if len(labelled) else np.zeros((2, 2))
            gaps["bbox"] = [*low.tolist(), *(high - low).tolist()]
        new = gaps | new | {"id": len(annotations) + 1}  # COCOeval reads id 0 as "not matched"
        annotations.append({"area": 0.53 * new["bbox"][2] * new["bbox"][3]} | new)
    categories = [{"id": c} for c in sorted({a["category_id"] for a in annotations})]
    images = [{"id": i} for i in sorted({image["id"] for image in ground_truth["images"]})]
    return {"images": images, "annotations": annotations, "categories": categories}


class PCKh(_Samples):
    """MPII's measure: labelled joints no further off than a part of the head's size, in percent.
    The 16 joints are in MPII's order; `Instance.norm` is 0.6 times the diagonal of the head box; if
    there is none, ValueError. The mean is over all labelled joints but pelvis and thorax (6, 7).
    What the official code (lib/dataset/mpii.py) prints as "Mean@0.1" is `PCKh@0.11` here.
    """

    def __init__(self, instances: list[Instance], **kwargs: Any):
        super().__init__(instances, 16, **kwargs)
        bad = [i.id for i in instances if np.any(np.asarray(i.visible) > 0) and not i.norm > 0]
        if bad:
            raise ValueError(f"no head size for {len(bad)} instances, as annotation {bad[0]}")

    def compute(self) -> dict[str, Tensor]:
        """PCKh@0.5, PCKh@0.1, PCKh@0.11 and, at 0.5, Head, Shoulder, Elbow, Wrist, Hip, Knee, Ankle
        (mean of the right and the left joint's value), each in [0, 100]; nan without joints."""
        instances, distance, visible = self._errors()
        relative = distance / np.array([i.norm for i in instances])[:, None]
        counted = visible & ~np.isin(np.arange(16), (6, 7))
        values = {f"PCKh@{t}": 100 * _mean(relative[counted] <= t) for t in (0.5, 0.1, 0.11)}
        joint = [100 * _mean(relative[visible[:, k], k] <= 0.5) for k in range(16)]
        values |= {name: (joint[a] + joint[b]) / 2 for name, (a, b) in PCKH_GROUPS.items()}
        return self._report(values)


class KeypointError(_Samples):
    """Distances between prediction and label, for data without a benchmark of their own.
    thresholds: of PCK, as parts of `Instance.norm` (pixels); instances without a norm (nan) count
        in MAE and RMSE only.
    """

    def __init__(self, instances: list[Instance], thresholds: Any = (0.2,), **kwargs: Any):
        super().__init__(instances, len(instances[0].keypoints) if instances else 0, **kwargs)
        self.thresholds = [float(t) for t in thresholds]

    def compute(self) -> dict[str, Tensor]:
        """All over labelled keypoints (visible > 0), nan where there are none.
        MAE: mean Euclidean distance, pixels of the original image; DeepLabCut calls this "RMSE".
        RMSE: root of the mean squared distance, same pixels. PCK@t: part of the keypoints with
        distance / norm <= t, in [0, 1]. NME: mean over samples of the sample's mean distance /
        norm, a fraction; papers on faces print it times 100."""
        instances, distance, visible = self._errors()
        norm = np.array([i.norm if i.norm > 0 else float("nan") for i in instances])
        relative = distance / norm[:, None]
        known = visible & np.isfinite(relative)
        sample = [r[v].mean() for r, v in zip(relative, known, strict=True) if v.any()]
        values = {f"PCK@{t:g}": _mean(relative[known] <= t) for t in self.thresholds}
        values |= {"MAE": _mean(distance[visible]), "NME": _mean(np.array(sample))}
        values["RMSE"] = math.sqrt(_mean(distance[visible] ** 2))
        return self._report(values)


def _mean(values: Array) -> float:
    return float(values.mean()) if values.size else float("nan")
