"""What is wrong with a pose, keypoint by keypoint, after Ronchi and Perona (arXiv 1707.05388)."""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np

from datamodules.calibration import Reliability
from datamodules.keypoints import Instance, Keypoints
from datamodules.transforms import Array

KINDS = ("good", "jitter", "inversion", "swap", "miss")
GOOD, NEAR = 0.85, 0.5
"""Keypoint similarities from which on a keypoint is good, and from which on it is near a place at all."""
PERSON = 0.1
"""OKS from which on a pose is taken to be of a person at all."""


def similarities(pose: Array, people: Array, areas: Array, sigmas: Array) -> Array:
    """Keypoint similarity exp(-d^2 / (2 area (2 sigma)^2)) of a pose `[K, 2]` and of people `[P, K, 3]` (x, y, above 0
    where labelled; areas `[P]` in square pixels) -> `[P, K]`, -1 where there is no label."""
    squared = ((people[..., :2] - pose) ** 2).sum(-1)
    value = np.exp(-squared / (2 * sigmas) ** 2 / (areas[:, None] + np.spacing(1)) / 2)
    return np.where(people[..., 2] > 0, value, -1)


def keypoint_errors(
    pose: Array, people: Array, areas: Array, own: int, sigmas: Array, flip_index: Sequence[int]
) -> tuple[Array, Array]:
    """The kind of each keypoint, and its similarity to the label.

    A keypoint belongs to the place that it is most similar to: its own label, that of its mirror partner (inversion),
    or that of the keypoint or its partner in another person (swap); so in the authors' code. None of them as near as
    similarity 0.5 is a miss; its own from 0.85 on is good, below jitter.

    Args:
        pose: `[K, 2]`, pixels.
        people: `[P, K, 3]`, all people of the image (x, y, above 0 where labelled). areas: `[P]`, square pixels.
        own: which of the people the pose is meant for.
        sigmas: `[K]`, as COCO lists them. flip_index: for every keypoint its mirror partner.

    Returns:
        places in `KINDS` `[K]`, -1 for what is not labelled; similarities `[K]`, nan there.
    """
    index = list(flip_index)
    values = similarities(pose, people, areas, sigmas)
    partners = similarities(pose, people[:, index], areas, sigmas)
    others = np.arange(len(people)) != own
    # Of equals the first: a nose is its own partner.
    places = np.stack([values[own], *values[others], partners[own], *partners[others]])
    best, which = places.max(0), places.argmax(0)
    kind = np.select(
        [best < NEAR, (which == 0) & (best >= GOOD), which == 0, which == len(people)],
        [KINDS.index(name) for name in ("miss", "good", "jitter", "inversion")],
        KINDS.index("swap"),
    )
    labelled = people[own, :, 2] > 0
    return np.where(labelled, kind, -1), np.where(labelled, values[own], np.nan)


class PoseErrors:
    """Counts the errors of predictions, a pose of each person: where a detector's boxes give several of one, of the
    surest.

    Args:
        instances: what was cropped. facts: of their skeleton.
        truth: annotations as COCO has them, where the instances are a detector's boxes, without labels.
    """

    def __init__(
        self, instances: Sequence[Instance], facts: Keypoints, truth: Sequence[dict[str, Any]] | None = None
    ) -> None:
        self.instances, self.facts, self.sigmas = instances, facts, np.array(facts.sigmas)
        people: dict[int, list[tuple[Array, float]]] = defaultdict(list)
        self.own: dict[int, int] = {}  # place of a labelled instance among the people of its image
        for i, instance in enumerate(instances):
            if instance.visible.any():
                self.own[i] = len(people[instance.image_id])
                area = instance.area if instance.area > 0 else 0.53 * float(np.prod(instance.box[2:]))
                people[instance.image_id].append((np.c_[instance.keypoints, instance.visible], area))
        for annotation in () if people else truth or ():
            points = np.reshape(annotation["keypoints"], (-1, 3)).astype(float)
            if points[:, 2].any():
                people[annotation["image_id"]].append((points, annotation["area"]))
        self.people = {i: (np.array([p for p, _ in x]), np.array([a for _, a in x])) for i, x in people.items()}
        self.rows: dict[tuple[int, int], tuple[float, Array, Array, Array]] = {}
        self.strangers = 0

    def add(self, number: int, pose: Array, scores: Array) -> tuple[float, str] | None:
        """Judge the pose `[K, 2]` (pixels of the image) and its scores `[K]` of instance `number`.

        Returns:
            its OKS and what is wrong, or None if there is nobody that it could be meant for.
        """
        image = self.instances[number].image_id
        people, areas = self.people.get(image, (np.zeros((0, len(self.sigmas), 3)), np.zeros(0)))
        value = similarities(pose, people, areas, self.sigmas)
        with np.errstate(invalid="ignore"):
            oks = np.where(value >= 0, value, 0).sum(1) / (value >= 0).sum(1)
        own = self.own.get(number, int(oks.argmax()) if len(oks) and oks.max() >= PERSON else -1)
        if own < 0:
            self.strangers += 1
            return None
        kind, similarity = keypoint_errors(pose, people, areas, own, self.sigmas, self.facts.flip_index)
        sure = scores[scores > 0.2]  # as COCO's AP is made of them
        score = float(sure.mean() if len(sure) else 0) * self.instances[number].score
        former = self.rows.get((image, own))
        if former is None or former[0] < score:
            self.rows[image, own] = score, kind, similarity, scores
        return float(oks[own]), self.told(kind)

    def told(self, kind: Array) -> str:
        """The errors of a pose in words."""
        names = np.array(self.facts.names)
        parts = [f"{k}: {', '.join(names[kind == n])}" for n, k in enumerate(KINDS) if k != "good" and n in kind]
        return "; ".join(reversed(parts)) or "all good"

    def numbers(self) -> dict[str, Any]:
        """Counts of each kind in all and for each keypoint, mean OKS and by how much it would rise if a kind were put
        right, and whether the scores hold what they promise."""
        k = len(self.sigmas)
        rows = list(self.rows.values())
        kinds = np.array([row[1] for row in rows]).reshape(-1, k)
        similarity = np.array([row[2] for row in rows]).reshape(-1, k)
        labelled = kinds >= 0
        counts = np.array([(kinds == n).sum(0) for n in range(len(KINDS))])
        each = np.maximum(labelled.sum(1), 1)
        lost = np.where(labelled, 1 - np.nan_to_num(similarity), 0) / each[:, None]
        oks = 1 - lost.sum(1)
        keypoints, poses = Reliability(), Reliability()
        keypoints.add(np.array([row[3] for row in rows]).reshape(-1, k)[labelled], similarity[labelled] >= NEAR)
        poses.add(np.array([row[0] for row in rows]), oks >= NEAR)
        return {
            "poses": len(rows),
            "poses of nobody": self.strangers,
            "people without a pose": sum(len(areas) for _, areas in self.people.values()) - len(rows),
            "mean OKS": float(oks.mean()) if len(rows) else float("nan"),
            "counts": dict(zip(KINDS, counts.sum(1).tolist(), strict=True)),
            "OKS lost": {name: float((lost * (kinds == n)).sum() / max(1, len(rows))) for n, name in enumerate(KINDS)},
            "keypoints": {
                name: dict(zip(KINDS, column, strict=True))
                for name, column in zip(self.facts.names, counts.T.tolist(), strict=True)
            },
            "calibration": {"keypoint": keypoints.numbers(), "pose": poses.numbers()},
        }
