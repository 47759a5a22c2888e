"""One annotation file in COCO's keypoint format: what it says of the skeleton, its people, and a detector's boxes."""

import gc
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from datamodules.fields import ANNOTATION, mistyped, numbers, records
from datamodules.keypoints import Instance, Keypoints
from datamodules.transforms import DataError

LISTS = ("images", "annotations", "categories")
SIGMAS = {
    "nose": 0.026,
    "eye": 0.025,
    "ear": 0.035,
    "shoulder": 0.079,
    "elbow": 0.072,
    "wrist": 0.062,
    "hip": 0.107,
    "knee": 0.087,
    "ankle": 0.089,
}
"""COCO's OKS constants by body part."""


def paths_of(
    root: Path, train: str, val: str, test: str | None, train_images: str, val_images: str, test_images: str | None
) -> dict[str, tuple[Path, Path]]:
    """Annotation file and image folder of each split; no test split is the validation split."""
    return {
        "train": (root / train, root / train_images),
        "val": (root / val, root / val_images),
        "test": (root / (test or val), root / (test_images or val_images)),
    }


@contextmanager
def without_collection() -> Iterator[None]:
    """Millions of new objects, none of which is garbage: looking for it takes longer than making them."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def read_json(path: str | Path, record: Callable[[dict[str, Any]], Any] | None = None) -> Any:
    """The content of a JSON file.

    Args:
        record: what becomes of each object as soon as it is read, so that what is not kept never adds up.

    Raises:
        DataError: naming the file, and the place where it stops being JSON.
    """
    try:
        with open(path) as file, without_collection():
            return json.load(file, object_hook=record)
    except OSError as error:
        raise DataError(
            f"{path}: cannot read the annotation file ({error.strerror}); check root and file name"
        ) from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not valid JSON ({error}); was the download or the export cut off?") from None


class CocoFile:
    """One annotation file in COCO's keypoint format.

    Args:
        path: of the JSON. images: folder that its file names start from.
        category: name of the category to take, where those with keypoints differ in them.
        flip_pairs, sigmas: override what is told from the names (0-based index pairs; COCO's unit).

    Attributes:
        content: the JSON. facts: of the skeleton. categories: ids of the categories taken.

    Raises:
        DataError: if the file is no COCO keypoint file.
    """

    def __init__(
        self,
        path: str | Path,
        images: str | Path,
        category: str | None = None,
        flip_pairs: Sequence[Sequence[int]] | None = None,
        sigmas: Sequence[float] | None = None,
    ) -> None:
        self.path, self.images = Path(path), Path(images)
        content = read_json(path, without_outline)  # not read here, and most of COCO's memory
        self.content = records(content, path, LISTS, "a COCO keypoint file")
        self.categories, names, skeleton = self._category(category)
        self.facts = Keypoints(
            names=names,
            skeleton=[[a - 1, b - 1] for a, b in skeleton if 0 < a <= len(names) and 0 < b <= len(names)],
            flip_pairs=[list(p) for p in flip_pairs] if flip_pairs is not None else pairs_of(names, self.path),
            sigmas=list(sigmas) if sigmas is not None else sigmas_of(names),
        )
        if len(self.facts.sigmas) != len(names):
            raise DataError(f"{path}: {len(names)} keypoints, but {len(self.facts.sigmas)} sigmas were given")

    def _category(self, wanted: str | None) -> tuple[list[int], list[str], list[list[int]]]:
        categories = self.content["categories"]
        chosen = [c for c in categories if c.get("keypoints") is not None and wanted in (None, c.get("name"))]
        if not chosen:
            there = [c.get("name") for c in categories]
            raise DataError(
                f"{self.path}: no category {f'named {wanted!r} ' if wanted else ''}with a list `keypoints` "
                f"among {there}; is this an instances file instead of a keypoint file?"
            )
        lists = {tuple(c["keypoints"]) for c in chosen}
        if len(lists) > 1:
            raise DataError(
                f"{self.path}: categories {[c.get('name') for c in chosen]} have different keypoints; "
                f"choose one by `category`"
            )
        names = list(lists.pop())
        ids = [c["id"] for c in chosen]
        if not names:  # some converters leave the names out
            lengths = Counter(len(a["keypoints"]) for a in self.content["annotations"] if numbers(a.get("keypoints")))
            if not lengths:
                raise DataError(f"{self.path}: neither the category nor any annotation has keypoints")
            names = [f"keypoint_{i + 1}" for i in range(lengths.most_common(1)[0][0] // 3)]
        return ids, names, chosen[0].get("skeleton") or []

    def instances(self) -> list[Instance]:
        """Those with at least one labelled keypoint, boxes clipped to the image, crowd left out (official coco.py)."""
        images = {image["id"]: image for image in self.content["images"]}
        paths = {image["id"]: str(self.images / image["file_name"]) for image in self.content["images"]}
        taken = [
            a
            for a in self.content["annotations"]
            if a.get("category_id") in self.categories and not a.get("iscrowd", 0) and any(a.get("keypoints", []))
        ]
        given = np.array([a["bbox"] for a in taken], dtype=np.float64).reshape(-1, 4)
        size = [(images[a["image_id"]]["width"], images[a["image_id"]]["height"]) for a in taken]
        low = given[:, :2].clip(0)
        high = np.minimum(np.array(size).reshape(-1, 2) - 1.0, low + (given[:, 2:] - 1).clip(0))
        area = [a.get("area", a["bbox"][2] * a["bbox"][3]) for a in taken]
        kept = np.flatnonzero(~(np.array(area) <= 0) & ~(high < low).any(1)).tolist()
        # Each instance has its rows of these arrays, which processes share page by page.
        boxes = np.concatenate([low, high - low], 1)
        points = np.array([a["keypoints"] for a in taken], dtype=np.float64).reshape(-1, len(self.facts.names), 3)
        return [
            Instance(
                path=paths[taken[i]["image_id"]],
                image_id=taken[i]["image_id"],
                box=boxes[i],
                keypoints=points[i, :, :2],
                visible=points[i, :, 2],
                id=taken[i]["id"],
                category_id=taken[i]["category_id"],
                area=area[i],
                norm=max(taken[i]["bbox"][2:]),
            )
            for i in kept
        ]

    def detections(self, path: str | Path, threshold: float = 0.0) -> list[Instance]:
        """Instances of a detector's boxes in COCO-results JSON (image_id, category_id, bbox, score) for these images.

        Raises:
            DataError: if the file has another form, or no box of it belongs to an image here.
        """
        items = read_json(path)
        wanted = {"image_id", "category_id", "bbox", "score"}
        if not isinstance(items, list) or any(not isinstance(x, dict) or None in map(x.get, wanted) for x in items):
            raise DataError(f"{path}: a box file is a list of objects with {', '.join(sorted(wanted))}")
        fields = {k: ANNOTATION[k] for k in wanted}
        if wrong := [(i, text) for i, item in enumerate(items) if (text := mistyped(item, fields))]:
            raise DataError(f"{path}: {len(wrong)} boxes with faults, the first, item {wrong[0][0]}, has {wrong[0][1]}")
        images = {image["id"]: image for image in self.content["images"]}
        k = len(self.facts.names)
        found = [
            Instance(
                path=str(self.images / images[item["image_id"]]["file_name"]),
                image_id=item["image_id"],
                box=np.array(item["bbox"], dtype=np.float64),
                keypoints=np.zeros((k, 2)),
                visible=np.zeros(k),
                id=i,
                category_id=item["category_id"],
                score=float(item["score"]),
            )
            for i, item in enumerate(items)
            if item["image_id"] in images and item["category_id"] in self.categories and item["score"] >= threshold
        ]
        if not found:
            raise DataError(
                f"{path}: none of its {len(items)} boxes is of category {self.categories} in an image of {self.path}; "
                f"compare the image and category ids of both files"
            )
        sound = [i.box.shape == (4,) and np.isfinite(i.box).all() and (i.box[2:] > 0).all() for i in found]
        bad = [i for i, fits in zip(found, sound, strict=True) if not fits]
        if bad:
            raise DataError(f"{path}: {len(bad)} boxes are not x, y, width, height; item {bad[0].id} is {bad[0].box}")
        return found


def without_outline(record: dict[str, Any]) -> dict[str, Any]:
    record.pop("segmentation", None)
    return record


def pairs_of(names: Sequence[str], path: str | Path = "") -> list[list[int]]:
    """0-based (left, right) pairs, told from "left"/"right" (or a lone l/r) in the names.

    Raises:
        DataError: if a left keypoint has no right one, or the reverse: the flip would teach the wrong side.
    """

    def other(name: str) -> str:
        swap = {"left": "right", "right": "left", "l": "r", "r": "l"}
        return re.sub(
            r"left|right|(?<![a-z])[lr](?![a-z])", lambda m: swap[m.group().lower()], name, flags=re.IGNORECASE
        ).lower()

    index = {name.lower(): i for i, name in enumerate(names)}
    pairs, alone = [], []
    for name, i in index.items():
        partner = other(name)
        if partner == name:
            continue
        if partner not in index:
            alone.append(names[i])
        elif re.search(r"left|(?<![a-z])l(?![a-z])", name):
            pairs.append([i, index[partner]])
    if alone:
        raise DataError(
            f"{path}: keypoints {alone} have no counterpart on the other side, so a mirror image would be mislabelled; "
            f"rename them or give `flip_pairs`"
        )
    return pairs


def sigmas_of(names: Sequence[str]) -> list[float]:
    """OKS constants by name: COCO's for its body parts, 0.05 for keypoints it does not know."""
    found = [next((s for part, s in SIGMAS.items() if part in name.lower()), None) for name in names]
    unknown = [name for name, s in zip(names, found, strict=True) if s is None]
    if unknown:
        shown = ", ".join(unknown[:6]) + (f" and {len(unknown) - 6} more" if len(unknown) > 6 else "")
        rank_zero_info(f"OKS sigma 0.05 taken for {shown}; give data.sigmas for numbers to compare with others")
    return [0.05 if s is None else s for s in found]
