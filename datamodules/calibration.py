"""Whether a score says how often it is right: reliability diagrams, expected calibration error (arXiv 1706.04599)."""

from typing import Any

import numpy as np

from datamodules.transforms import Array


class Reliability:
    """Scores in bins of equal width, and how many of each bin were right.

    Args:
        bins: of 0 to 1; 15 as in the paper.
    """

    def __init__(self, bins: int = 15) -> None:
        self.sums = np.zeros((3, bins))  # how many there are, their scores, how many of them are right

    def add(self, score: Array, right: Array) -> None:
        """Scores of any shape, cut to 0..1 (nan counts nowhere), and bool of the same shape."""
        known = np.isfinite(score)
        score, right = np.asarray(score, np.float64)[known].clip(0, 1), np.asarray(right)[known]
        bins = self.sums.shape[1]
        place = np.minimum((score * bins).astype(int), bins - 1)
        for row, weight in zip(self.sums, (None, score, right.astype(np.float64)), strict=True):
            row += np.bincount(place, weight, bins)

    def numbers(self) -> dict[str, Any]:
        """`count`; `ece`, the mean distance of score and share of right ones over all, nan without any; and lists over
        the bins: `counts`, `scores` (means) and `right` (shares), None in an empty bin."""
        count, score, right = self.sums
        full = np.maximum(count, 1)
        error = np.abs(score - right).sum() / count.sum() if count.sum() else float("nan")
        means = ([float(x) if n else None for x, n in zip(part / full, count, strict=True)] for part in (score, right))
        return {
            "count": int(count.sum()),
            "ece": float(error),
            "counts": count.astype(int).tolist(),
            **dict(zip(("scores", "right"), means, strict=True)),
        }
