"""Faults in annotations, found before the first step and told all at once, each with what it would have done."""

import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from datamodules.fields import ANNOTATION, IMAGE, LIMIT, mistyped
from datamodules.files import Files
from datamodules.keypoints import Keypoints
from datamodules.transforms import DataError, read_image


@dataclass
class Report:
    """What a check found.

    Attributes:
        path: the file checked. faults: for each kind of fault (with consequence and remedy) the records that have it.
        faulty, images: indices of the annotations, and of the image records, that have any. notes: what is odd but no
            fault.
    """

    path: Path
    faults: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    faulty: set[int] = field(default_factory=set)
    images: set[int] = field(default_factory=set)
    notes: list[str] = field(default_factory=list)

    def add(self, fault: str, record: str, index: int | None = None, image: int | None = None) -> None:
        self.faults[fault].append(record)
        if index is not None:
            self.faulty.add(index)
        if image is not None:
            self.images.add(image)

    def drop_from(self, content: dict[str, Any]) -> None:
        """Take the faulty records, and annotations of images that are gone, out of a COCO file's content."""
        images = [x for i, x in enumerate(content["images"]) if i not in self.images]
        left = {x["id"] for x in images}
        taken = [a for i, a in enumerate(content["annotations"]) if i not in self.faulty]
        content |= {"images": images, "annotations": [a for a in taken if a.get("image_id") in left]}

    def __str__(self) -> str:
        lines = [f"{self.path}: {len(self.faults)} kind(s) of fault"] if self.faults else [f"{self.path}: no fault"]
        for fault, records in self.faults.items():
            shown = ", ".join(records[:3]) + (f" and {len(records) - 3} more" if len(records) > 3 else "")
            lines.append(f"  - {fault}\n    in {shown}")
        return "\n".join(lines + [f"  note: {note}" for note in self.notes])

    def settle(self, faulty: Literal["error", "drop"]) -> None:
        """Raise a `DataError` that lists every fault, or ("drop") warn and let the caller leave out `faulty`."""
        if not self.faults:
            return
        if faulty == "error":
            raise DataError(f"{self}\n  Mend these, or leave the faulty records out with `faulty: drop`.")
        rank_zero_warn(f"{len(self.faulty) + len(self.images)} records are left out:\n{self}")


def check_keypoints(
    content: dict[str, Any],
    path: Path,
    images: Path,
    facts: Keypoints,
    categories: list[int],
    decode: bool = False,
) -> Report:
    """Check a COCO keypoint file.

    Args:
        content: the JSON. path: where it came from. images: the image folder. facts: of the skeleton. categories: ids
            taken. decode: also decode every image (minutes for COCO); else only see that they exist.
    """
    report = Report(path)
    used = {a["image_id"] for a in content["annotations"] if isinstance(a.get("image_id"), int | str)}
    sizes = check_images(report, content["images"], images, decode, used)
    seen: set[Any] = set()
    known = {c.get("id") for c in content["categories"]}
    sound, counts = plainly_sound(content["annotations"], sizes, categories, known, len(facts.names))
    visible, hidden, inside_box, in_image, normalised = counts
    for i in np.flatnonzero(~sound).tolist():
        a = content["annotations"][i]
        name = f"annotation {a.get('id', f'number {i}')}"
        if fault := mistyped(a, ANNOTATION):
            report.add(fault, name, i)
            continue
        if a.get("category_id") not in categories:
            if a.get("category_id") not in known:
                report.add("category_id that no category has: the record would be passed over in silence", name, i)
            continue
        if a.get("id") is None:
            report.add("no id: COCO's evaluation could not tell the record from others", name, i)
            continue
        if a["id"] in seen:
            report.add("annotation ids used twice: COCO's evaluation would drop one of each", name, i)
        seen.add(a["id"])
        if a.get("image_id") not in sizes:
            report.add(
                "image_id that no image has: the record has no picture", f"{name} (image_id {a.get('image_id')})", i
            )
            continue
        points = a.get("keypoints")
        if points is None or len(points) != 3 * len(facts.names):
            got = "none" if points is None else f"{len(points)} numbers"
            report.add(
                f"keypoints that are not x, y, v for each of the category's {len(facts.names)}: "
                f"joints would be learned under each other's names",
                f"{name} ({got})",
                i,
            )
            continue
        p = np.array(points, dtype=np.float64).reshape(-1, 3)
        if a.get("iscrowd", 0) or not p.any():
            continue  # neither learned nor, in COCO's evaluation, counted
        _check_instance(report, a, p, name, i, sizes[a["image_id"]])
        if i in report.faulty:
            continue
        labelled = p[p[:, 2] > 0, :2]
        x, y, w, h = a["bbox"]
        width, height = sizes[a["image_id"]]
        visible += len(labelled)
        hidden += int((p[:, 2] == 1).sum())
        inside_box += int(_within(labelled, x - 0.1 * w, y - 0.1 * h, 1.2 * w, 1.2 * h).sum())
        in_image += int(_within(labelled, -1, -1, width + 1, height + 1).sum())
        normalised += int(((labelled >= 0) & (labelled <= 1)).all(1).sum())
    if visible:
        if normalised > 0.9 * visible:
            report.add("keypoints between 0 and 1: they must be pixels, or all would lie in one corner", str(path))
        elif inside_box < 0.5 * visible:
            report.add(
                "most keypoints lie outside their own box: wrong box format or ids that do not match; "
                "the crop would not show what is labelled, AP would stay near 0",
                str(path),
            )
        if in_image < 0.98 * visible:
            report.notes.append(f"{visible - in_image} of {visible} labelled keypoints lie outside their image")
        if hidden == visible:
            report.notes.append("no keypoint has v=2: with `hidden: ignore` nothing would be learned")
    elif content["annotations"] and not report.faults:
        report.add("no annotation has a labelled keypoint: nothing to learn or to evaluate", str(path))
    beyond = sorted(
        {tuple(e) for c in content["categories"] for e in c.get("skeleton") or [] if not _in(e, len(facts.names))}
    )
    if beyond:
        report.notes.append(
            f"skeleton {beyond} is not between 1 and {len(facts.names)} (COCO counts from 1): not drawn"
        )
    if not sizes or not content["annotations"]:
        report.add("an empty data set: no images or no annotations (is it the right file?)", str(path))
    return report


def plainly_sound(
    annotations: list[dict[str, Any]],
    sizes: dict[Any, tuple[float, float]],
    categories: list[int],
    known: set[Any],
    joints: int,
) -> tuple[np.ndarray, list[int]]:
    """Which annotations have no fault for certain `[N]`, found for all at once; the others are looked at one by one.

    Of the labelled keypoints of those also: how many there are, are hidden, are within a box somewhat larger than
    theirs, are within their image, and are 0 to 1.
    """
    nothing = np.zeros(len(annotations), dtype=bool), [0] * 5
    try:
        taken = np.array([a["category_id"] in categories for a in annotations], dtype=bool)
        sound = np.array([t or a["category_id"] in known for t, a in zip(taken, annotations, strict=True)], dtype=bool)
        used = [a for a, t in zip(annotations, taken, strict=True) if t]
        lengths = {len(a["keypoints"]) for a in used}
        if lengths != {3 * joints} or not once([a["id"] for a in used]).all() or not plain_flags(used):
            return nothing
        p = plain_numbers([a["keypoints"] for a in used]).reshape(-1, joints, 3)
        size = np.array([sizes[a["image_id"]] for a in used], dtype=np.float64)
        box = plain_numbers([a["bbox"] for a in used])
        area = plain_numbers([a["area"] for a in used])
        none = np.array([a.get("num_keypoints", 1) == 0 for a in used], dtype=bool)
        none_known = np.array(["num_keypoints" in a for a in used], dtype=bool)
        passed = np.array([bool(a.get("iscrowd", 0)) for a in used], dtype=bool) | ~p.any((1, 2))
    except (KeyError, TypeError, ValueError, OverflowError):
        return nothing
    if box.shape != (len(used), 4):
        return nothing
    labelled = p[..., 2] > 0
    fine = plain_boxes(box, size) & (box[:, 2:] > 0).all(1) & np.isfinite(area) & (area > 0)
    fine &= (np.abs(p) <= LIMIT).all((1, 2)) & np.isin(p[..., 2], (0, 1, 2)).all(1)
    fine &= ~none_known | (none == ~labelled.any(1))
    sound[taken] = fine | passed
    rows = np.flatnonzero(fine & ~passed)
    labelled, p, size, box = labelled[rows], p[rows], size[rows, None], box[rows, None]
    xy, margin = p[..., :2], 0.1 * box[..., 2:]
    low, high = box[..., :2] - margin, box[..., :2] - margin + 1.2 * box[..., 2:]
    inside = ((xy >= low) & (xy <= high)).all(2)
    in_image = ((xy >= -1) & (xy <= size)).all(2)
    normalised = ((xy >= 0) & (xy <= 1)).all(2)
    counted = (labelled, p[..., 2] == 1, labelled & inside, labelled & in_image, labelled & normalised)
    return sound, [int(c.sum()) for c in counted]


def plain_boxes(boxes: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Which boxes x, y, w, h `[N, 4]` are finite, and neither outside their image (W, H) nor far beyond it."""
    start, extent = boxes[:, :2], boxes[:, 2:]
    end = start + extent
    far = (end > 1.1 * sizes + 2).any(1) & (extent > start).all(1)
    return (np.abs(boxes) <= LIMIT).all(1) & (start < sizes).all(1) & (end > 0).all(1) & ~far


def once(values: Sequence[Any]) -> np.ndarray:
    """Which of these whole numbers come only once, bool `[N]`; a TypeError if they are others."""
    found = np.array(values)
    if found.dtype.kind != "i":
        raise TypeError(found.dtype)
    _, place, count = np.unique(found, return_inverse=True, return_counts=True)
    return count[place] == 1


def plain_numbers(values: Sequence[Any]) -> np.ndarray:
    """float64 of numbers, or of lists of as many; a TypeError if they are others."""
    found = np.array(values)
    if found.dtype.kind not in "if":
        raise TypeError(found.dtype)
    return found.astype(np.float64, copy=False)


def plain_flags(annotations: Sequence[dict[str, Any]]) -> bool:
    """Whether all say 0 or 1 of being a crowd, or nothing."""
    return all(a.get("iscrowd") in (None, 0, 1) for a in annotations)  # it may be a list, too


def check_images(
    report: Report, images: list[dict[str, Any]], folder: Path, decode: bool, used: set[Any] | None = None
) -> dict[Any, tuple[float, float]]:
    """Check a COCO file's image records; returns (W, H) by id.

    Args:
        decode: also read every image, else only see that they exist. used: ids of the images that are needed; None is
            all.
    """
    sizes: dict[Any, tuple[float, float]] = {}
    place: dict[Any, int] = {}
    files = Files(folder)
    for i, image in enumerate(images):
        lacking = [k for k in IMAGE if image.get(k) is None]
        if lacking:
            fault = f"image records without {', '.join(lacking)}: they cannot be found or cropped"
            report.add(fault, f"images[{i}]", image=i)
            continue
        if fault := mistyped(image, IMAGE):
            report.add(f"images with a {fault}", f"images[{i}] ({str(image)[:80]})", image=i)
            continue
        if image["id"] in sizes:
            fault = "image ids used twice: labels would go to the wrong image"
            report.add(fault, f"image {image['id']}", image=i)
            report.images.add(place[image["id"]])
        sizes[image["id"]], place[image["id"]] = (image["width"], image["height"]), i
        if used is None or image["id"] in used:
            _check_image(report, image, i, files, decode)
    named = Counter(image["file_name"] for image in images if isinstance(image.get("file_name"), str))
    if twice := [name for name, count in named.items() if count > 1]:
        report.notes.append(f"{len(twice)} pictures are listed more than once, such as {twice[0]}")
    return sizes


def _check_image(report: Report, image: dict[str, Any], i: int, files: Files, decode: bool) -> None:
    if not files.has(image["file_name"]):
        bare, remedy = re.split(r"[\\/]", image["file_name"])[-1], "check the folder (train_images, val_images)"
        if bare != image["file_name"] and files.has(bare):
            remedy = "they are there without what `file_name` has before the last / or \\, so leave that out"
        report.add(f"images that are not in {files.folder}: {remedy}", image["file_name"], image=i)
    elif decode:
        try:
            height, width = read_image(files.folder / image["file_name"]).shape[:2]
        except DataError as error:
            report.add("images that cannot be read", str(error), image=i)
            return
        if (width, height) != (image["width"], image["height"]):
            report.add(
                "images of another size than their record says: labels would be displaced",
                f"{image['file_name']} ({width}x{height}, record {image['width']}x{image['height']})",
                image=i,
            )


def _check_instance(
    report: Report, a: dict[str, Any], points: np.ndarray, name: str, i: int, size: tuple[float, float]
) -> None:
    box = a.get("bbox")
    if box is None or len(box) != 4 or not np.isfinite(np.array(box, dtype=np.float64)).all():
        report.add("bbox that is not four finite numbers (x, y, width, height)", f"{name} ({box})", i)
        return
    x, y, w, h = box
    if w <= 0 or h <= 0:
        report.add("bbox of no width or height: there is nothing to crop", f"{name} ({box})", i)
    elif x >= size[0] or y >= size[1] or x + w <= 0 or y + h <= 0:
        report.add("bbox wholly outside its image: the crop would be black", f"{name} ({box}, image {size})", i)
    elif (x + w > 1.1 * size[0] + 2 or y + h > 1.1 * size[1] + 2) and w > x and h > y:
        report.add(
            "bbox that reaches far beyond its image: x1, y1, x2, y2 instead of x, y, width, height? "
            "The crop would be far too wide and AP low",
            f"{name} ({box}, image {size})",
            i,
        )
    if a.get("area") is None:
        report.add(
            "no area: OKS is measured against it, COCO's evaluation cannot run (`area_from_box: true` fills it in)",
            name,
            i,
        )
    elif not np.isfinite(a["area"]) or a["area"] <= 0:
        report.add("area that is not positive: OKS would be 0 for every prediction", f"{name} (area {a['area']})", i)
    if not np.isfinite(points).all():
        report.add("keypoints that are not finite numbers: the loss would become NaN", name, i)
    elif not np.isin(points[:, 2], (0, 1, 2)).all():
        report.add(
            "visibility other than 0 (not labelled), 1 (hidden), 2 (visible)",
            f"{name} (v = {sorted(set(points[:, 2].tolist()))})",
            i,
        )
    elif "num_keypoints" in a and (a["num_keypoints"] == 0) != (not (points[:, 2] > 0).any()):
        report.add(
            "num_keypoints that contradicts the keypoints: COCO's evaluation would ignore the record",
            f"{name} (num_keypoints {a['num_keypoints']})",
            i,
        )


def _in(pair: Any, count: int) -> bool:
    return len(pair) == 2 and all(0 < end <= count for end in pair)


def _within(points: np.ndarray, x: float, y: float, w: float, h: float) -> np.ndarray:
    return (points[:, 0] >= x) & (points[:, 1] >= y) & (points[:, 0] <= x + w) & (points[:, 1] <= y + h)
