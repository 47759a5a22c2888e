"""What is wrong with classes, of pixels and of pictures: which is taken for which, and where."""

from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np

from datamodules.calibration import Reliability
from datamodules.mask_files import IGNORE
from datamodules.transforms import Array

BANDS = (1, 2, 4, 8, 16)
"""Distances to a boundary in pixels, up to which errors are counted apart."""


def most_confused(confusion: Array, names: Sequence[str], most: int = 15) -> list[dict[str, Any]]:
    """Pairs of classes, most often confused first, of counts `[C, C]` (rows are labels)."""
    wrong = confusion * (1 - np.eye(len(confusion), dtype=confusion.dtype))
    total, all_wrong = confusion.sum(1), max(1, int(wrong.sum()))
    order = np.argsort(-wrong, axis=None, kind="stable")[:most]
    pairs = [divmod(int(i), len(confusion)) for i in order if wrong.flat[i] > 0]
    return [
        {
            "label": names[a],
            "taken for": names[b],
            "count": int(wrong[a, b]),
            "of the label": float(wrong[a, b] / total[a]),
            "of all errors": float(wrong[a, b] / all_wrong),
        }
        for a, b in pairs
    ]


def edge_distance(label: Array) -> Array:
    """How far each pixel of `[H, W]` is from a pixel of another class, float; 1 beside one, infinite if there is none.
    What is ignored is no class."""
    edge = np.zeros(label.shape, bool)
    for a, b in ((np.s_[:-1], np.s_[1:]), (np.s_[:, :-1], np.s_[:, 1:])):
        differ = (label[a] != label[b]) & (label[a] != IGNORE) & (label[b] != IGNORE)
        edge[a] |= differ
        edge[b] |= differ
    if not edge.any():
        return np.full(label.shape, np.inf, np.float32)
    return cv2.distanceTransform((~edge).astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE) + 1


def class_iou(confusion: Array) -> Array:
    """IoU of each class `[C]` of counts `[C, C]`, nan for those that occur neither in labels nor in predictions."""
    hit = confusion.diagonal().astype(float)
    union = confusion.sum(0) + confusion.sum(1) - hit
    return np.divide(hit, union, out=np.full(len(hit), np.nan), where=union > 0)


class MaskErrors:
    """Counts pixels that are wrong.

    Args:
        class_names: of the C classes.
    """

    def __init__(self, class_names: Sequence[str]) -> None:
        self.class_names = list(class_names)
        number = len(self.class_names)
        self.confusion = np.zeros((number, number), np.int64)
        self.bands = np.zeros((2, len(BANDS) + 1), np.int64)  # pixels, and those that are wrong
        self.reliability = Reliability()

    def add(self, truth: Array, guess: Array, confidence: Array | None = None) -> tuple[float, str]:
        """Judge a picture: classes `[H, W]` as labelled (255: ignored) and as found, and how sure that was, 0..1.

        Returns:
            mean IoU of the classes in it, nan if all is ignored, and what is wrong most of all.
        """
        number = len(self.class_names)
        counted = truth != IGNORE
        label, found = truth[counted].astype(np.int64), guess[counted].astype(np.int64)
        confusion = np.bincount(label * number + found, minlength=number**2).reshape(number, number)
        self.confusion += confusion
        wrong = label != found
        band = np.searchsorted(BANDS, edge_distance(truth)[counted])
        self.bands += [np.bincount(band, weight, len(BANDS) + 1).astype(int) for weight in (None, wrong)]
        if confidence is not None:
            self.reliability.add(confidence[counted], ~wrong)
        iou = class_iou(confusion)
        if not len(label):
            return float("nan"), "all of it is ignored"
        worst = most_confused(confusion, self.class_names, 3)
        pairs = "; ".join(f"{p['label']} taken for {p['taken for']}: {p['count'] / len(label):.1%}" for p in worst)
        return float(np.nanmean(iou)), f"{wrong.mean():.1%} of its pixels are wrong" + (f" ({pairs})" if pairs else "")

    def numbers(self) -> dict[str, Any]:
        """IoU and confusion of the classes, errors by distance to a boundary of the labels, and calibration."""
        ends = [*(f"up to {d}" for d in BANDS), f"beyond {BANDS[-1]}"]
        return {
            "pixels": int(self.confusion.sum()),
            "wrong": int(self.bands[1].sum()),
            "IoU": dict(zip(self.class_names, class_iou(self.confusion).tolist(), strict=True)),
            "confused": most_confused(self.confusion, self.class_names),
            "confusion": self.confusion.tolist(),
            "boundary": {end: {"pixels": int(n), "wrong": int(w)} for end, n, w in zip(ends, *self.bands, strict=True)},
            "calibration": {"pixel": self.reliability.numbers()},
        }


class LabelErrors:
    """Counts pictures that are wrong.

    Args:
        class_names: of the C classes.
    """

    def __init__(self, class_names: Sequence[str]) -> None:
        self.class_names = list(class_names)
        self.confusion = np.zeros((len(self.class_names),) * 2, np.int64)
        self.reliability = Reliability()

    def add(self, label: int, probability: Array) -> tuple[float, str] | None:
        """Judge a picture by the probabilities `[C]`; a label of -1 is none.

        Returns:
            the label's probability, and what it was taken for; or None.
        """
        if label < 0:
            return None
        found = int(probability.argmax())
        self.confusion[label, found] += 1
        self.reliability.add(probability[found : found + 1], np.array([found == label]))
        name, other = self.class_names[label], self.class_names[found]
        text = f"{name} taken for {other} ({probability[found]:.2f})" if found != label else f"{name}, found"
        return float(probability[label]), text

    def numbers(self) -> dict[str, Any]:
        """Recall and precision of the classes, their confusion, and calibration."""
        hit, label, found = self.confusion.diagonal(), self.confusion.sum(1), self.confusion.sum(0)
        return {
            "pictures": int(label.sum()),
            "wrong": int(label.sum() - hit.sum()),
            "classes": {
                name: {
                    "pictures": int(n),
                    "recall": h / n if n else float("nan"),
                    "precision": h / f if f else float("nan"),
                }
                for name, n, h, f in zip(self.class_names, label.tolist(), hit.tolist(), found.tolist(), strict=True)
            },
            "confused": most_confused(self.confusion, self.class_names),
            "confusion": self.confusion.tolist(),
            "calibration": {"label": self.reliability.numbers()},
        }
