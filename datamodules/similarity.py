"""How alike two objects are, of boxes, of masks and of poses; and suppression of poses that are too alike."""

from itertools import pairwise
from typing import Any

import numpy as np
from pycocotools import mask as rle

from datamodules.transforms import Array


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


def oks(a: Array, b: Array, area: Array, sigmas: Array) -> Array:
    """Object keypoint similarity, in [0, 1], of broadcast poses `a`, `b` [..., K, 2] -> [...].
    `area` [...]: square pixels (of two detections the mean, as official); `sigmas` [K] as COCO
    lists them. All K keypoints count: the official visibility threshold is never switched on (and
    if it were, would look at only one of the two poses)."""
    offset = a - b
    squared = offset[..., 0] ** 2 + offset[..., 1] ** 2
    error = squared / (2 * sigmas) ** 2 / (area[..., None] + np.spacing(1)) / 2
    return np.exp(-error).mean(-1)


def oks_nms(
    keypoints: Array, scores: Array, areas: Array, sigmas: Array, threshold: float = 0.9, groups: Array | None = None
) -> Array:
    """Greedy suppression among the poses of one image: indices kept, best score first.
    keypoints [N, K, 2], scores [N], areas [N] (padded box, square pixels), sigmas [K]. A pose goes
    if its OKS with a better one is above `threshold`; of equal scores the first is the better
    (official lib/nms/nms.py leaves that open). groups: int [N], rising numbers of the images, if there are
    several: indices then come image by image."""
    groups = np.zeros(len(scores), int) if groups is None else groups
    left, keep = np.lexsort((-scores, groups)), [np.zeros(0, int)]
    number = len(sigmas)
    few = min(number, number - int(number * threshold) + 2)  # so many far ones, and the OKS is below the threshold
    some = np.ascontiguousarray(keypoints[:, :few])
    while left.size:  # one pose of every image a time
        best = np.diff(groups[left], prepend=-1) != 0
        keep.append(left[best])
        above, left = left[best][np.cumsum(best) - 1][~best], left[~best]
        area = (areas[above] + areas[left]) / 2
        at_most = (oks(some[above], some[left], area, sigmas[:few]) * few + number - few) / number
        near = np.flatnonzero(~(at_most <= threshold - 1e-6))
        overlap = oks(keypoints[above[near]], keypoints[left[near]], area[near], sigmas)
        left = np.delete(left, near[~(overlap <= threshold)])
    kept = np.concatenate(keep)
    return kept[np.argsort(groups[kept], kind="stable")]


def soft_oks_nms(
    keypoints: Array, scores: Array, areas: Array, sigmas: Array,
    threshold: float = 0.9, max_detections: int = 20,
) -> Array:  # fmt: skip
    """As `oks_nms`, but near poses stay and lose score (times exp(-OKS^2 / threshold)). As in the
    official code this only decides which `max_detections` are kept: the caller's scores stay."""
    left, scores, keep = np.arange(len(scores)), scores.astype(float), np.empty(0, dtype=int)
    while left.size and keep.size < max_detections:
        best = left[scores[left].argmax()]
        keep, left = np.append(keep, best), left[left != best]
        overlap = oks(keypoints[best], keypoints[left], (areas[best] + areas[left]) / 2, sigmas)
        scores[left] *= np.exp(-(overlap**2) / threshold)
    return keep
