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


def numbered(
    truth: dict[str, Any], found: Found, images: Sequence[Any] | None = None
) -> tuple[list[dict[str, Any]], Truth, Found, Array]:
    """What counts of the content of a COCO file and of detections, of which image and category are given by id.

    Args:
        images: ids, where not all of the truth's count.

    Returns:
        the annotations that count, as they are and as arrays; the detections that count; the rows that they had.
        Categories are numbered in the truth's order.

    Raises:
        ValueError: detections in images that the truth does not have.
    """
    known = {x["id"] for x in truth["images"]}
    if unknown := set(np.unique(found.image).tolist()) - known:
        raise ValueError(f"detections in {len(unknown)} images that the truth does not have, as {min(unknown)}")
    image_numbers = {i: n for n, i in enumerate(sorted(known if images is None else set(images)))}
    category_numbers = {c["id"]: n for n, c in enumerate(truth["categories"])}
    kept = [a for a in truth["annotations"] if a["image_id"] in image_numbers and a["category_id"] in category_numbers]
    crowd = np.array([bool(a.get("iscrowd")) for a in kept], bool)
    image = np.array([image_numbers[a["image_id"]] for a in kept], int)
    category = np.array([category_numbers[a["category_id"]] for a in kept], int)
    objects = Truth(image, category, np.array([a["area"] for a in kept], float), crowd, crowd)
    image = np.array([image_numbers.get(i, -1) for i in found.image.tolist()], int)
    category = np.array([category_numbers.get(i, -1) for i in found.category.tolist()], int)
    rows = np.flatnonzero((image >= 0) & (category >= 0))
    return kept, objects, Found(image[rows], category[rows], found.area[rows], found.score[rows]), rows


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


def listed(annotation: dict[str, Any]) -> dict[str, Any]:
    """A copy, since the tools write to it, with polygons as they know them."""
    polygons = annotation.get("segmentation")
    lists = {"segmentation": [np.asarray(p).tolist() for p in polygons]} if isinstance(polygons, list) else {}
    return annotation | lists


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
        ground.dataset = truth | {"annotations": [listed(a) for a in truth["annotations"]]}
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
