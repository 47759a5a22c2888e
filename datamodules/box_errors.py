"""What is wrong with boxes or masks, and what it costs, after TIDE (arXiv 2008.08115)."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from pycocotools import mask as rle

from datamodules.box_ap import encoded
from datamodules.boxes import Boxed
from datamodules.calibration import Reliability
from datamodules.coco_eval import interpolated
from datamodules.transforms import Array

KINDS = ("right", "classification", "localisation", "both", "duplicate", "background", "ignored")
ERRORS = (*KINDS[1:6], "missed")
FOREGROUND, BACKGROUND = 0.5, 0.1
"""IoU from which on a box is of an object, and up to which it is of none."""


def overlap(shapes: Any, truth: Boxed) -> Array:
    """IoU `[D, G]` of boxes x0, y0, x1, y1 `[D, 4]`, or of a list of D masks (RLE), with an image's objects; of crowds
    the share that lies in them."""
    if not len(shapes) or not len(truth.labels):
        return np.zeros((len(shapes), len(truth.labels)))
    if isinstance(shapes, list):
        things: Any = [encoded(each, *shapes[0]["size"]) for each in truth.segmentations]
    else:
        shapes, things = (np.c_[b[:, :2], b[:, 2:] - b[:, :2]].astype(np.float64) for b in (shapes, truth.boxes))
    return np.asarray(rle.iou(shapes, things, truth.crowd.astype(np.uint8)))


def box_errors(
    iou: Array, labels: Array, scores: Array, true_labels: Array, crowd: Array
) -> tuple[Array, Array, Array]:
    """Kinds of the D boxes (or masks) found in an image of G objects.

    Boxes are matched as COCO does at IoU 0.5. What is left over lies on an object of its class by IoU 0.1 to 0.5
    (localisation), else on one of another class by 0.5 (classification), else by 0.5 on one of its class that a surer
    box has taken (duplicate), else on nothing by more than 0.1 (background), else it has both faults; in that order, as
    in the authors' code. What lies in a crowd of its class is ignored.

    Args:
        iou: `[D, G]`, see `overlap`. labels, scores: `[D]`. true_labels, crowd: of the objects.

    Returns:
        places in `KINDS` `[D]`; the object `[D]` that is found, or would be if a classification or localisation error
        were mended, else -1; objects `[G]` that no box found and none such could find, bool: missed.
    """
    kind, thing = np.full(len(labels), KINDS.index("background")), np.full(len(labels), -1)
    missed = ~crowd
    if not iou.size:
        return kind, thing, missed
    same = labels[:, None] == true_labels
    plain = np.where(crowd, 0, iou)
    ours, others = np.where(same, plain, 0), np.where(same, 0, plain)
    crowded = np.where(same & crowd, iou, 0).max(1) >= FOREGROUND
    used = np.zeros(len(crowd), bool)
    order = np.argsort(-scores, kind="stable")
    for d in order:
        free = np.where(used, 0, ours[d])
        best = len(free) - 1 - free[::-1].argmax()  # of equals the last, as in pycocotools
        if free[best] >= FOREGROUND:
            kind[d], thing[d], used[best] = KINDS.index("right"), best, True
    for d in order:
        if kind[d] == KINDS.index("right"):
            continue
        if crowded[d]:
            kind[d] = KINDS.index("ignored")
        elif BACKGROUND <= ours[d].max() <= FOREGROUND:
            kind[d], thing[d] = KINDS.index("localisation"), ours[d].argmax()
        elif others[d].max() >= FOREGROUND:
            kind[d], thing[d] = KINDS.index("classification"), others[d].argmax()
        elif ours[d].max() >= FOREGROUND:
            kind[d] = KINDS.index("duplicate")
        elif plain[d].max() > BACKGROUND:
            kind[d] = KINDS.index("both")
    thing[(kind != KINDS.index("right")) & used[thing]] = -1  # found already
    missed &= ~used
    missed[thing[thing >= 0]] = False
    return kind, thing, missed


class BoxErrors:
    """Counts the errors of predictions, and what AP at IoU 0.5 would gain without each kind.

    Args:
        instances: the images and what is in them. class_names: of the labels.
        threshold: score of the boxes that are counted one by one, and shown; AP counts all of them.
    """

    def __init__(self, instances: Sequence[Boxed], class_names: Sequence[str], threshold: float = 0.3) -> None:
        self.instances, self.class_names, self.threshold = instances, list(class_names), threshold
        self.found: list[Array] = []  # of every box: class, score, kind, class of its object, number of its object
        self.objects: list[Array] = []  # of every object: class, crowd, missed
        self.counts = np.zeros((len(class_names), len(KINDS) + 1), int)  # above the threshold; the last are missed

    def add(self, number: int, shapes: Any, labels: Array, scores: Array) -> tuple[float, str]:
        """Judge what was found in image `number`: boxes or masks as for `overlap`, in its pixels, labels, scores `[N]`.

        Returns:
            F1 of the boxes above the threshold at IoU 0.5 (1 if there is nothing and nothing was found), and what is
            wrong.
        """
        truth = self.instances[number]
        iou, known = overlap(shapes, truth), (truth.labels, truth.crowd)
        order = np.argsort(-scores, kind="stable")
        counted = [d for c in np.unique(labels) for d in order[labels[order] == c][:100]]  # as many as COCO's AP counts
        kind, thing, missed = box_errors(iou[counted], labels[counted], scores[counted], *known)
        start = sum(map(len, self.objects))
        itself = np.where(thing >= 0, truth.labels[thing] if len(truth.labels) else 0, -1)
        columns = labels[counted], scores[counted], kind, itself, np.where(thing >= 0, thing + start, -1)
        self.found.append(np.stack([c.astype(np.float64) for c in columns], 1))
        self.objects.append(np.stack([truth.labels, truth.crowd, missed], 1).astype(int))
        sure = scores >= self.threshold
        kind, _, missed = box_errors(iou[sure], labels[sure], scores[sure], *known)
        np.add.at(self.counts, (labels[sure], kind), 1)
        self.counts[:, -1] += np.bincount(truth.labels[missed], minlength=len(self.counts))
        right, ignored = (int((kind == KINDS.index(name)).sum()) for name in ("right", "ignored"))
        total = len(kind) - ignored + int((~truth.crowd).sum())
        tally = [(int((kind == KINDS.index(name)).sum()), name) for name in ERRORS[:-1]] + [
            (int(missed.sum()), "missed")
        ]
        text = ", ".join(f"{n} {name}" for n, name in tally if n)
        return 2 * right / total if total else 1.0, text or "nothing wrong"

    def numbers(self) -> dict[str, Any]:
        """Counts above the threshold for each class; AP at IoU 0.5 of all boxes, and by how much it would rise if all
        errors of a kind were mended; and whether the scores hold what they promise."""
        found = np.concatenate([np.zeros((0, 5)), *self.found])
        objects = np.concatenate([np.zeros((0, 3), int), *self.objects])
        number = len(self.class_names)
        plain = average_precision(found, objects, number)
        gains = {name: mended(found, objects, number, name) - plain for name in ERRORS}
        right = found[:, 2] == KINDS.index("right")
        reliability = Reliability()
        counts = found[:, 2] != KINDS.index("ignored")
        reliability.add(found[counts, 1], right[counts])
        wanted = np.bincount(objects[objects[:, 1] == 0, 0], minlength=number)
        names = [*KINDS, "missed"]
        return {
            "threshold": self.threshold,
            "AP50": mean(plain),
            "counts": dict(zip(names, self.counts.sum(0).tolist(), strict=True)),
            # Rounding of recall may cost a little: as in the authors' code that is none.
            "AP50 gained": {name: max(0.0, mean(gain)) for name, gain in gains.items()},
            "classes": {
                name: {"objects": int(n), "AP50": float(ap), **dict(zip(names, row, strict=True))}
                for name, n, ap, row in zip(self.class_names, wanted, plain, self.counts.tolist(), strict=True)
            },
            "calibration": reliability.numbers(),
        }


def average_precision(found: Array, objects: Array, number: int, fewer: Array | None = None) -> Array:
    """AP at IoU 0.5 of each class `[C]`, nan for those without objects.

    Args:
        found: `[N, 5]`, objects `[M, 3]`: as `BoxErrors` keeps them. fewer: objects of each class not to count `[C]`.
    """
    wanted = np.bincount(objects[objects[:, 1] == 0, 0], minlength=number)
    left = wanted if fewer is None else wanted - fewer
    values = np.where(wanted > 0, 0.0, np.nan)
    rows = found[found[:, 2] != KINDS.index("ignored")]
    rows = rows[np.argsort(-rows[:, 1], kind="stable")]
    for c in np.flatnonzero(left > 0):
        right = rows[rows[:, 0] == c, 2] == KINDS.index("right")
        values[c] = interpolated(right[None], ~right[None], left[c]).mean()
    return values


def mended(found: Array, objects: Array, number: int, name: str) -> Array:
    """AP of each class if all errors of a kind were mended: of the boxes that could find one object, whatever their
    error, the surest does, with its class; all others of the kind go. What is missed is not looked for."""
    if name == "missed":
        return average_precision(found, objects, number, np.bincount(objects[objects[:, 2] > 0, 0], minlength=number))
    wrong = found[:, 2] == KINDS.index(name)
    found = found.copy()
    candidates = np.flatnonzero((found[:, 2] != KINDS.index("right")) & (found[:, 4] >= 0))
    candidates = candidates[np.argsort(-found[candidates, 1], kind="stable")]
    _, first = np.unique(found[candidates, 4], return_index=True)
    best = candidates[first]
    best = best[wrong[best]]
    found[best, 2], found[best, 0] = KINDS.index("right"), found[best, 3]
    wrong[best] = False
    return average_precision(found[~wrong], objects, number)


def mean(values: Array) -> float:
    """Of what is known; nan if nothing is."""
    known = values[np.isfinite(values)]
    return float(known.mean()) if len(known) else float("nan")
