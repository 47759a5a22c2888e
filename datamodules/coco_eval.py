"""COCO's average precision and recall, with the digits of pycocotools, but over arrays of all images at once.

pycocotools' cocoeval.py loops in Python over images, categories, ranges of area, thresholds, detections and objects.
Here the n-th detections of all images are matched in one step, for all ranges and thresholds together.
"""

import contextlib
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from pycocotools import mask as rle

from datamodules.transforms import Array

THRESHOLDS = np.linspace(0.5, 0.95, 10)
RECALLS = np.linspace(0, 1, 101)
AREAS = {"all": (0, 1e10), "small": (0, 32**2), "medium": (32**2, 96**2), "large": (96**2, 1e10)}
Similarity = Callable[[Array, Array], Array]


@dataclass
class Truth:
    """N labelled objects.

    Args:
        image, category: numbers from 0, int `[N]`.
        area: square pixels, float `[N]`.
        crowd: may be matched many times, bool `[N]`.
        ignore: counts neither as found nor as missed, as a crowd, bool `[N]`.
    """

    image: Array
    category: Array
    area: Array
    crowd: Array
    ignore: Array


@dataclass
class Found:
    """N detections: as `Truth`, with scores `[N]` that are not nan."""

    image: Array
    category: Array
    area: Array
    score: Array


def objects(
    annotations: list[dict[str, Any]], images: dict[Any, int], categories: dict[Any, int]
) -> tuple[list[dict[str, Any]], Truth]:
    """Those of a COCO file's annotations that are in the images and categories given (by id, with their numbers)."""
    kept = [a for a in annotations if a["image_id"] in images and a["category_id"] in categories]
    crowd = np.array([bool(a.get("iscrowd")) for a in kept], bool)
    image = np.array([images[a["image_id"]] for a in kept], int)
    category = np.array([categories[a["category_id"]] for a in kept], int)
    return kept, Truth(image, category, np.array([a["area"] for a in kept], float), crowd, crowd)


def precision_recall(
    truth: Truth,
    found: Found,
    similarity: Similarity,
    categories: int,
    areas: Sequence[tuple[float, float]] = tuple(AREAS.values()),
    most: Sequence[int] = (1, 10, 100),
) -> tuple[Array, Array]:
    """Precision at 101 recalls, and recall, of T = 10 thresholds, C categories, A ranges of area; -1 without objects.

    Args:
        truth, found: their order decides between equals, as in pycocotools.
        similarity: of pairs of a row of `found` and one of `truth`, int `[P]` each -> `[P]`. They come by category and
            image: all pairs of those, detection by detection.
        most: detections an image and category, rising; precision is that of the last.

    Returns:
        precision `[T, 101, C, A]`, recall `[T, C, A, len(most)]`.
    """
    order = np.lexsort((-found.score, found.image, found.category))
    rank = rank_in(found.category[order], found.image[order])
    order, rank = order[rank < most[-1]], rank[rank < most[-1]]
    low, high = np.array(areas).T
    ignore = truth.ignore[:, None] | (truth.area[:, None] < low) | (truth.area[:, None] > high)
    area = found.area[order, None]
    hit, wasted = match(truth, found, similarity, order, ignore)
    wasted |= ~hit & ((area < low) | (area > high))[..., None]
    hit &= ~wasted

    precision = -np.ones((len(THRESHOLDS), len(RECALLS), categories, len(areas)))
    recall = -np.ones((len(THRESHOLDS), categories, len(areas), len(most)))
    by_score = np.lexsort(
        (-found.score[order], found.category[order])
    )  # of equals the lower image first, then its rank
    ends = np.searchsorted(found.category[order][by_score], np.arange(categories + 1))
    for category in range(categories):
        wanted = (~ignore[truth.category == category]).sum(0)
        rows = by_score[ends[category] : ends[category + 1]]
        right, wrong = hit[rows], ~(hit[rows] | wasted[rows])
        for a in np.flatnonzero(wanted):
            for m, limit in enumerate(most):
                recall[:, category, a, m] = right[rank[rows] < limit, a].sum(0) / wanted[a]
            precision[:, :, category, a] = interpolated(right[:, a].T, wrong[:, a].T, wanted[a])
    return precision, recall


def mean_known(values: Array) -> float:
    """Of precisions or recalls; -1 if there are none."""
    known = values[values > -1]
    return float(known.mean()) if known.size else -1.0


def interpolated(right: Array, wrong: Array, wanted: int) -> Array:
    """Precision at 101 recalls `[T, 101]`, the best at this or a higher one, of detections `[T, N]`, best first."""
    right, wrong = np.cumsum(right, 1, dtype=float), np.cumsum(wrong, 1, dtype=float)
    best = np.zeros((len(right), right.shape[1] + 1))  # beyond the last detection it is 0
    best[:, -2::-1] = np.maximum.accumulate((right / (wrong + right + np.spacing(1)))[:, ::-1], 1)
    place = [np.searchsorted(row, RECALLS) for row in right / wanted]
    return np.take_along_axis(best, np.array(place), 1)


def match(truth: Truth, found: Found, similarity: Similarity, order: Array, ignore: Array) -> tuple[Array, Array]:
    """Which detections are matched, and which of them with an ignored object, bool `[N, A, T]`.

    A detection, best score first, takes of the objects that are left the most similar one (of equals the last), and an
    ignored one only if there is no other.
    """
    shape = len(order), ignore.shape[1], len(THRESHOLDS)
    hit, wasted = np.zeros(shape, bool), np.zeros(shape, bool)
    detection, thing = pairs(truth, found, order)
    value = similarity(order[detection], thing)
    near = value >= THRESHOLDS[0]
    detection, thing, value = detection[near], thing[near], value[near]
    number = len(value)
    if not number:
        return hit, wasted
    # Step n takes the n-th detection of every image and category, of those that are near something.
    first = np.flatnonzero(np.diff(detection, prepend=-1))
    busy = order[detection[first]]
    step = np.repeat(rank_in(found.category[busy], found.image[busy]), np.diff(first, append=number))
    queue = np.argsort(step, kind="stable")
    detection, thing, value = detection[queue], thing[queue], value[queue]
    ends = np.searchsorted(step[queue], np.arange(step.max() + 2))
    # Numbers that rise with what is preferred: any object that counts above any ignored one.
    by_value = np.lexsort((thing, value))
    preference = np.empty(number, np.int64)
    preference[by_value] = np.arange(number)
    preference = preference[:, None] + number * ~ignore[thing]
    enough = value[:, None] >= np.minimum(THRESHOLDS, 1 - 1e-10)
    taken = np.zeros((len(truth.area), *shape[1:]), bool)
    for start, end in pairwise(ends):
        here, which = detection[start:end], thing[start:end]
        free = enough[start:end, None] & (~taken[which] | truth.crowd[which, None, None])
        starts = np.flatnonzero(np.diff(here, prepend=-1))
        best = np.maximum.reduceat(np.where(free, preference[start:end, :, None], -1), starts, axis=0)
        row, a, t = np.nonzero(best >= 0)
        best = best[row, a, t]
        taken[thing[by_value[best % number]], a, t] = True
        hit[here[starts][row], a, t] = True
        wasted[here[starts][row], a, t] = best < number
    return hit, wasted


def pairs(truth: Truth, found: Found, order: Array) -> tuple[Array, Array]:
    """All pairs of the same image and category, detection by detection: places in `order`, and rows of `truth`."""
    images = 1 + max(truth.image.max(initial=0), found.image.max(initial=0))
    label, place = truth.category * images + truth.image, (found.category * images + found.image)[order]
    sort = np.argsort(label, kind="stable")
    start, end = (np.searchsorted(label[sort], place, side) for side in ("left", "right"))
    count = end - start
    detection = np.repeat(np.arange(len(order)), count)
    return detection, sort[np.arange(len(detection)) + np.repeat(start - (np.cumsum(count) - count), count)]


def rank_in(*keys: Array) -> Array:
    """Position among the neighbours that have the same keys, from 0, int `[N]`."""
    place = np.arange(len(keys[0]))
    new = np.any([np.diff(key, prepend=-1) != 0 for key in keys], axis=0)
    return place - np.maximum.accumulate(np.where(new, place, 0))


def box_iou(a: Array, b: Array, crowd: Array) -> Array:
    """IoU of boxes x, y, width, height, `[N, 4]` each -> `[N]`; of `a` and a crowd `b` the part of `a` in it."""
    a, b = a.T, b.T
    size = np.minimum(a[:2] + a[2:], b[:2] + b[2:]) - np.maximum(a[:2], b[:2])
    both = np.where((size > 0).all(0), size[0] * size[1], 0)
    area = a[2] * a[3]
    return both / np.where(both > 0, np.where(crowd, area, area + b[2] * b[3] - both), 1)


def mask_iou(a: Any, b: Any, crowd: Array, detection: Array, thing: Array) -> Array:
    """As `box_iou`, of RLEs `a` and `b`, by number; `detection` and `thing` are the pairs of `precision_recall`."""
    value = np.zeros(len(detection))
    first = np.flatnonzero(np.diff(detection, prepend=-1))
    block = first[np.flatnonzero(np.diff(thing[first], prepend=-1))]  # where an image and category begins
    for start, end in pairwise([*block, len(value)]):
        things = thing[start:end][detection[start:end] == detection[start]]
        masks = [a[i] for i in detection[start : end : len(things)]]
        value[start:end] = rle.iou(masks, [b[i] for i in things], crowd[things].astype(np.uint8)).ravel()
    return value


def keypoint_similarity(
    a: Array, b: Array, boxes: Array, area: Array, sigmas: Array, detection: Array, thing: Array
) -> Array:
    """OKS of poses `a` `[N, K, 2]` and labels `b` `[M, K, 3]` for pairs of them, int `[P]` each -> `[P]`. Of an object
    without labelled keypoints those count as right that lie in its box made three times as wide and high."""
    value = np.zeros(len(detection))
    order = np.argsort(b[..., 2] <= 0, axis=1, kind="stable")  # what is labelled comes first
    count = (b[..., 2] > 0).sum(1)
    for k in np.unique(count[thing]):
        rows = np.flatnonzero(count[thing] == k)
        for part in np.array_split(rows, 1 + len(rows) // 16384):  # which fits the cache
            d, g = detection[part], thing[part]
            which = order[g, : k or None]
            pose = a[d[:, None], which]
            if k:
                offset = pose - b[g[:, None], which, :2]
            else:
                low, size = boxes[g, None, :2], boxes[g, None, 2:]
                offset = np.maximum(0, low - size - pose) + np.maximum(0, pose - (low + size * 2))
            error = offset[..., 0] ** 2 + offset[..., 1] ** 2
            error = error / ((sigmas * 2) ** 2)[which] / (area[g, None] + np.spacing(1)) / 2
            value[part] = np.exp(-error).sum(1) / error.shape[1]
    return value


def reference(
    truth: dict[str, Any],
    items: list[dict[str, Any]],
    kind: str,
    backend: str,
    images: Sequence[int] | None = None,
    sigmas: Array | None = None,
) -> tuple[Array, Array]:
    """What `precision_recall` returns, by pycocotools or ("faster") faster-coco-eval, of at least one detection.

    Args:
        truth, items: contents of a COCO file and of a results file, left as they are.
        kind: "bbox", "segm" or "keypoints". images: ids, if not all count. sigmas: of the keypoints.
    """
    if backend == "faster":
        from faster_coco_eval import COCO
        from faster_coco_eval import COCOeval_faster as COCOeval
    else:
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval
    with contextlib.redirect_stdout(io.StringIO()):  # both print tables and timings
        ground = COCO()
        ground.dataset = truth | {"annotations": [dict(a) for a in truth["annotations"]]}  # will be written to
        ground.createIndex()
        evaluator = COCOeval(ground, ground.loadRes([dict(item) for item in items]), kind)
        if sigmas is not None:
            evaluator.params.kpt_oks_sigmas = sigmas
        if images is not None:
            evaluator.params.imgIds = sorted(images)
        evaluator.evaluate()
        evaluator.accumulate()
    place = {c: k for k, c in enumerate(evaluator.params.catIds)}
    order = [place[c["id"]] for c in truth["categories"]]
    precision, recall = (np.asarray(evaluator.eval[name]) for name in ("precision", "recall"))
    return precision[..., -1][:, :, order], recall[:, order]
