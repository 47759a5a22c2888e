"""The number that each keypoint benchmark asks for: COCO's AP, MPII's PCKh, distances in pixels.

Three torchmetrics with `update(prediction, batch)` and `compute() -> dict of float tensors`. All
keep one row per sample and drop repeated ids in `compute`: a sample that a distributed sampler
repeats to fill its last round counts once, and neither the number of processes nor the batch size
nor the order changes the result.

`prediction`: `keypoints` float [B, K, 2], input pixels, x first; `score` float [B, K].
`batch`: `id` int [B], index into `instances`; `image` [B, 3, H, W]; `to_image` float [B, 2, 3],
affine from input pixels to pixels of the original image.
"""

from __future__ import annotations

import contextlib
import io
import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from numpy import ndarray as Array
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

if TYPE_CHECKING:
    from datamodules.base import Instance

COCO_STATS = ("AP", "AP50", "AP75", "APM", "APL", "AR", "AR50", "AR75", "ARM", "ARL")


def oks(a: Array, b: Array, area: Array, sigmas: Array) -> Array:
    """Object keypoint similarity, in [0, 1], of broadcast poses `a`, `b` [..., K, 2] -> [...].

    `area` [...]: square pixels of the poses (for two detections the mean of both, as official);
    `sigmas` [K] as COCO lists them. All K keypoints count: the visibility threshold of the official
    code is never switched on (and if it were, would look at only one of the two poses).
    """
    error = ((a - b) ** 2).sum(-1) / (2 * sigmas) ** 2 / (area[..., None] + np.spacing(1)) / 2
    return np.exp(-error).mean(-1)


def oks_nms(
    keypoints: Array, scores: Array, areas: Array, sigmas: Array, threshold: float = 0.9
) -> Array:  # fmt: skip
    """Greedy suppression among the poses of one image: indices kept, best score first.

    keypoints [N, K, 2], scores [N], areas [N] (padded box, square pixels), sigmas [K]. A pose goes
    if its OKS with a better one is above `threshold`; of equal scores the first is the better.
    Source: official lib/nms/nms.py.
    """
    left, keep = np.argsort(-scores, kind="stable"), []
    while left.size:
        best, left = left[0], left[1:]
        keep.append(best)
        area = (areas[best] + areas[left]) / 2
        left = left[oks(keypoints[best], keypoints[left], area, sigmas) <= threshold]
    return np.array(keep, dtype=np.intp)


def soft_oks_nms(
    keypoints: Array, scores: Array, areas: Array, sigmas: Array,
    threshold: float = 0.9, max_detections: int = 20,
) -> Array:  # fmt: skip
    """As `oks_nms`, but near poses stay and lose score (times exp(-OKS^2 / threshold)).

    As in the official code, the lowered scores only decide which `max_detections` poses are kept:
    the caller goes on with the scores it had.
    """
    left, scores, keep = np.arange(len(scores)), scores.astype(np.float64), []
    while left.size and len(keep) < max_detections:
        best = left[scores[left].argmax()]
        keep.append(best)
        left = left[left != best]
        area = (areas[best] + areas[left]) / 2
        scores[left] *= np.exp(-(oks(keypoints[best], keypoints[left], area, sigmas) ** 2) / threshold)
    return np.array(keep, dtype=np.intp)


class _Samples(Metric):
    """What the metrics below share: predictions in image pixels, one row per sample."""

    full_state_update = False

    def __init__(self, instances: Sequence[Instance], num_keypoints: int, **kwargs: Any):
        super().__init__(**kwargs)
        self.instances = instances
        k = num_keypoints
        self._shapes: dict[str, tuple] = dict(ids=(), keypoints=(k, 2), scores=(k,), areas=())
        for name in self._shapes:
            self.add_state(name, default=[], dist_reduce_fx="cat")

    def update(self, prediction: dict[str, Tensor], batch: dict[str, Any]) -> None:
        """Store one batch (keys: module docstring) on the metric's device, without a CPU-GPU sync.

        Raises ValueError where shapes fit neither each other nor the number of keypoints.
        """
        ids = batch["id"].to(self.device, torch.long)
        keypoints = prediction["keypoints"].detach().to(self.device, torch.float32)
        scores = prediction["score"].detach().to(self.device, torch.float32)
        matrix = batch["to_image"].to(self.device, torch.float32)
        for name, value in (("keypoints", keypoints), ("scores", scores)):
            if value.shape != (len(ids), *self._shapes[name]):
                raise ValueError(f"{name}: {[*value.shape]}, not {[len(ids), *self._shapes[name]]}")
        # Products and sums by hand: autocast would run a matmul in bf16 and lose whole pixels.
        mapped = (matrix[:, None, :, :2] * keypoints[:, :, None]).sum(-1) + matrix[:, None, :, 2]
        determinant = matrix[:, 0, 0] * matrix[:, 1, 1] - matrix[:, 0, 1] * matrix[:, 1, 0]
        height, width = batch["image"].shape[-2:]
        self.ids.append(ids)
        self.keypoints.append(mapped)
        self.scores.append(scores)
        self.areas.append(determinant.abs() * (height * width))  # official: prod(scale * 200)

    def sync(self, *args: Any, **kwargs: Any) -> None:
        """As in torchmetrics, also where a process saw nothing: it has to send an empty tensor of
        the right type and rank, or the gathering fails (torchmetrics would send float [0])."""
        for name, shape in self._shapes.items():
            state = getattr(self, name)
            if isinstance(state, list) and not state:
                kind = torch.long if name == "ids" else torch.float32
                state.append(torch.empty((0, *shape), dtype=kind, device=self.device))
        super().sync(*args, **kwargs)

    def _seen(self) -> tuple[list[Instance], Array, Array, Array]:
        """The N different samples in the order of the list: instances, keypoints [N, K, 2] in image
        pixels, scores [N, K], areas [N] of the crops in square image pixels; float64."""
        states = [dim_zero_cat(getattr(self, name)).cpu().numpy() for name in self._shapes]
        ids, first = np.unique(states[0], return_index=True)
        if ids.size and not 0 <= ids[0] <= ids[-1] < len(self.instances):
            raise ValueError(f"ids {ids[0]}..{ids[-1]}, but {len(self.instances)} instances")
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
    """COCO's keypoint AP and AR, after the official rescoring and OKS suppression.

    instances: what the data set yields; if these are a detector's boxes, give `ground_truth`.
    ground_truth: COCO annotations, as dict (left as it is) or path of a JSON file; None: made of
        `instances`. Gaps are filled: `iscrowd` 0; `keypoints` none labelled; `num_keypoints`
        counted; `bbox` around the labelled ones; `area` 0.53 of the box (mmpose's choice too).
        Several categories are averaged; crowds and objects without labelled keypoints ignored.
    sigmas: one per keypoint, for any K (COCO's own: from .025 for an eye to .107 for a hip).
    nms: "oks", "soft" or None, among the poses of one image and category.
    score_threshold: the box score is multiplied by the mean of the keypoint scores above it (0 if
        there are none).
    backend: "pycocotools", or "faster" for faster-coco-eval: the same digits in half the time.

    Raises ValueError where annotations have another number of keypoints than `sigmas`, or instances
    lie in images that the ground truth does not list. Source: official lib/dataset/coco.py.
    """

    def __init__(
        self,
        instances: Sequence[Instance],
        ground_truth: dict[str, Any] | str | None,
        sigmas: Sequence[float],
        nms: str | None = "oks",
        nms_threshold: float = 0.9,
        score_threshold: float = 0.2,
        backend: str = "pycocotools",
        **kwargs: Any,
    ):
        super().__init__(instances, len(sigmas), **kwargs)
        if nms not in ("oks", "soft", None) or backend not in ("pycocotools", "faster"):
            raise ValueError(f"unknown nms {nms!r} or backend {backend!r}")
        if ground_truth is not None and not isinstance(ground_truth, dict):
            ground_truth = json.loads(Path(ground_truth).read_text())
        self.ground_truth = _complete(ground_truth or _from_instances(instances), len(sigmas))
        unknown = {i.image_id for i in instances} - {i["id"] for i in self.ground_truth["images"]}
        if unknown:
            raise ValueError(f"{len(unknown)} images not in the ground truth, as {min(unknown)}")
        self.sigmas, self.nms, self.nms_threshold = np.array(sigmas), nms, nms_threshold
        self.score_threshold, self.backend = score_threshold, backend

    def results(self) -> list[dict[str, Any]]:
        """Items of a COCO results file, plain numbers: image_id, category_id, keypoints (x, y in
        image pixels and the heatmap's score, K times over), score. With several processes all have
        to call this, and all get all items."""
        with self.sync_context(dist_sync_fn=self.dist_sync_fn):
            return self._results(*self._seen())

    def _results(
        self, instances: list[Instance], keypoints: Array, scores: Array, areas: Array
    ) -> list[dict[str, Any]]:  # fmt: skip
        valid = scores > self.score_threshold
        score = (scores * valid).sum(1) / np.maximum(valid.sum(1), 1)
        score = score * np.array([i.score for i in instances])
        triples = np.concatenate([keypoints, scores[..., None]], -1).reshape(len(instances), -1)
        groups = defaultdict(list)
        for row, i in enumerate(instances):
            groups[int(i.image_id), int(i.category_id)].append(row)
        items = []
        for (image_id, category_id), members in sorted(groups.items()):
            rows = np.array(members)
            if self.nms is not None:
                suppress = oks_nms if self.nms == "oks" else soft_oks_nms
                pose = keypoints[rows], score[rows], areas[rows]
                rows = rows[suppress(*pose, self.sigmas, self.nms_threshold)]
            for row in rows:
                item = {"image_id": image_id, "category_id": category_id}
                items.append(item | {"keypoints": triples[row].tolist(), "score": float(score[row])})
        return items

    def compute(self) -> dict[str, Tensor]:
        """AP, AP50, AP75, APM, APL, AR, AR50, AR75, ARM, ARL, each in [0, 1].

        M and L: objects of 32^2 to 96^2 square pixels, and above. -1 means "no such object in the
        ground truth", as pycocotools says it. Without any prediction all are 0. Once every instance
        was seen, all images of the ground truth count, also those without a box; before that (a
        sanity check, limited batches) only the images that were seen.
        """
        seen = self._seen()
        results = self._results(*seen)
        if not results:
            return self._report(dict.fromkeys(COCO_STATS, 0.0))
        if self.backend == "faster":
            from faster_coco_eval import COCO
            from faster_coco_eval import COCOeval_faster as COCOeval
        else:
            from pycocotools.coco import COCO
            from pycocotools.cocoeval import COCOeval
        with contextlib.redirect_stdout(io.StringIO()):  # both print tables and timings
            truth = COCO()
            annotations = [dict(a) for a in self.ground_truth["annotations"]]  # will be written to
            truth.dataset = self.ground_truth | {"annotations": annotations}
            truth.createIndex()
            evaluator = COCOeval(truth, truth.loadRes(results), "keypoints")
            evaluator.params.kpt_oks_sigmas = self.sigmas
            if len(seen[0]) < len(self.instances):
                evaluator.params.imgIds = sorted({i.image_id for i in seen[0]})
            evaluator.evaluate()
            evaluator.accumulate()
            evaluator.summarize()
        return self._report(dict(zip(COCO_STATS, evaluator.stats[:10], strict=True)))


def _from_instances(instances: Sequence[Instance]) -> dict[str, Any]:
    annotations = []
    for i in instances:
        points = np.c_[i.keypoints, i.visible].ravel().tolist()
        new = {"image_id": int(i.image_id), "category_id": int(i.category_id), "keypoints": points}
        area = float(i.area) if i.area > 0 else None
        annotations.append(new | {"bbox": [float(v) for v in i.box], "area": area})
    return {"images": [{"id": int(i.image_id)} for i in instances], "annotations": annotations}


def _complete(ground_truth: dict[str, Any], num_keypoints: int) -> dict[str, Any]:
    """What the evaluation reads, in a new dict, with the gaps filled (see `KeypointAP`)."""
    wanted = "image_id", "category_id", "keypoints", "num_keypoints", "bbox", "area", "iscrowd"
    annotations = []
    for old in ground_truth["annotations"]:
        new = {key: old[key] for key in wanted if old.get(key) not in (None, [])}
        points = np.array(new.setdefault("keypoints", [0] * 3 * num_keypoints), dtype=float)
        if points.size != 3 * num_keypoints:
            what = f"{points.size // 3} keypoints, but there are {num_keypoints} sigmas"
            raise ValueError(f"annotation {old.get('id')}, category {new['category_id']}: {what}")
        points = points.reshape(-1, 3)
        labelled = points[points[:, 2] > 0, :2] if points[:, 2].any() else np.zeros((1, 2))
        low, high = labelled.min(0), labelled.max(0)
        new.setdefault("num_keypoints", int((points[:, 2] > 0).sum()))
        new.setdefault("bbox", [*low.tolist(), *(high - low).tolist()])
        new.setdefault("area", 0.53 * new["bbox"][2] * new["bbox"][3])
        new.setdefault("iscrowd", 0)
        # The file's id may be 0, which COCOeval reads as "not matched".
        annotations.append(new | {"id": len(annotations) + 1})
    categories = [{"id": c} for c in sorted({a["category_id"] for a in annotations})]
    images = [{"id": i} for i in sorted({image["id"] for image in ground_truth["images"]})]
    return {"images": images, "annotations": annotations, "categories": categories}


class PCKh(_Samples):
    """MPII's measure: labelled joints no further off than a part of the head's size, in percent.

    The 16 joints are in MPII's order and `Instance.norm` is 0.6 times the diagonal of the head box.
    Pelvis and thorax (6, 7) do not count in the mean, where every other labelled joint weighs the
    same. What the official code prints as "Mean@0.1" is `PCKh@0.11` here.

    Raises ValueError where an instance with a labelled joint has no norm above 0.
    Source: official lib/dataset/mpii.py.
    """

    groups: ClassVar = {
        "Head": (9,), "Shoulder": (12, 13), "Elbow": (11, 14), "Wrist": (10, 15),
        "Hip": (2, 3), "Knee": (1, 4), "Ankle": (0, 5),
    }  # fmt: skip

    def __init__(self, instances: Sequence[Instance], **kwargs: Any):
        super().__init__(instances, 16, **kwargs)
        bad = [i.id for i in instances if np.any(np.asarray(i.visible) > 0) and not i.norm > 0]
        if bad:
            raise ValueError(f"no head size for {len(bad)} instances, as annotation {bad[0]}")

    def compute(self) -> dict[str, Tensor]:
        """PCKh@0.5, PCKh@0.1, PCKh@0.11 and, at 0.5, Head, Shoulder, Elbow, Wrist, Hip, Knee, Ankle
        (mean of the right and the left joint's value), each in [0, 100]; nan without joints."""
        instances, distance, visible = self._errors()
        relative = distance / np.array([i.norm for i in instances])[:, None]
        counted = visible.copy()
        counted[:, 6:8] = False
        values = {f"PCKh@{t}": 100 * _mean(relative[counted] <= t) for t in (0.5, 0.1, 0.11)}
        joint = [100 * _mean(relative[visible[:, k], k] <= 0.5) for k in range(16)]
        values |= {k: sum(joint[j] for j in v) / len(v) for k, v in self.groups.items()}
        return self._report(values)


class KeypointError(_Samples):
    """Distances between prediction and label, for data without a benchmark of their own.

    thresholds: of PCK, as parts of the norm. The norm is `Instance.norm` in pixels, or, where that
    is not above 0 (nan: the data set has none), the longer side of the box, as is usual for PCK.
    """

    def __init__(self, instances: Sequence[Instance], thresholds: Any = (0.2,), **kwargs: Any):
        super().__init__(instances, len(instances[0].keypoints) if instances else 0, **kwargs)
        self.thresholds = [float(t) for t in thresholds]

    def compute(self) -> dict[str, Tensor]:
        """All over labelled keypoints (visible > 0); nan where there are none.

        MAE: mean Euclidean distance, pixels of the original image; DeepLabCut calls this "RMSE".
        RMSE: root of the mean squared distance, same pixels; never below MAE.
        PCK@t: part of the keypoints with distance / norm <= t, in [0, 1].
        NME: mean over samples of the sample's mean distance / norm, as a fraction; papers on faces
            print it times 100.
        """
        instances, distance, visible = self._errors()
        norm = np.array([i.norm if i.norm > 0 else max(i.box[2:]) for i in instances])[:, None]
        relative = distance / norm
        count = visible.sum(1)
        sample = np.where(visible, relative, 0).sum(1)[count > 0] / count[count > 0]
        values = {"RMSE": np.sqrt(_mean(distance[visible] ** 2)), "MAE": _mean(distance[visible])}
        values |= {"NME": _mean(sample)}
        values |= {f"PCK@{t:g}": _mean(relative[visible] <= t) for t in self.thresholds}
        return self._report(values)


def _mean(values: Array) -> float:
    return float(values.mean()) if values.size else float("nan")
