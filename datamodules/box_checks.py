"""Faults in files of boxes and instances, found before the first step and told all at once."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from pycocotools import mask as rle

from datamodules.box_data import BoxData
from datamodules.boxes import Boxed
from datamodules.checks import Report, check_images, once, plain_boxes, plain_flags, plain_numbers
from datamodules.fields import ANNOTATION, mistyped
from datamodules.transforms import Array, DataError

BOX = {k: v for k, v in ANNOTATION.items() if k not in ("bbox", "area", "keypoints", "num_keypoints")}


def check_instances(
    content: dict[str, Any], path: Path, images: Path, masks: bool = False, decode: bool = False
) -> Report:
    """Check a COCO instances file.

    Boxes and masks of no extent are no fault but a note: COCO itself has some, and they are left out of training as
    officially (in evaluation they count as never found, as pycocotools has it).

    Args:
        content: the JSON. path: where it came from. images: the image folder. masks: whether masks are needed.
        decode: also read every image (minutes for COCO); else only see that they exist.
    """
    report = Report(path)
    sizes = check_images(report, content["images"], images, decode)
    known = {c.get("id") for c in content["categories"]}
    for name, count in Counter(c.get("name") for c in content["categories"]).items():
        if count > 1:
            report.add("categories of one name: their predictions could not be told apart", str(name))
    seen: set[Any] = set()
    sound, crowd, fractions = plainly_sound(content["annotations"], sizes, known, masks)
    flat = []
    for i in np.flatnonzero(~sound).tolist():
        a = content["annotations"][i]
        name = f"annotation {a.get('id', f'number {i}')}"
        if wrong := mistyped(a, BOX):
            report.add(wrong, name, i)
            continue
        if a.get("category_id") not in known:
            report.add("category_id that no category has", f"{name} (category_id {a.get('category_id')})", i)
            continue
        if a.get("id") is not None and a["id"] in seen:
            report.add("annotation ids used twice: COCO's evaluation would drop one of each", name, i)
        seen.add(a.get("id"))
        if a.get("image_id") not in sizes:
            report.add("image_id that no image has", f"{name} (image_id {a.get('image_id')})", i)
            continue
        crowd += bool(a.get("iscrowd"))
        box = a.get("bbox")
        if not numbers(box) or len(box) != 4:
            report.add("bbox that is not four finite numbers (x, y, width, height)", f"{name} ({box})", i)
            continue
        area = a.get("area")
        if area is not None and not numbers([area]):
            report.add("area that is no number", f"{name} ({area})", i)
            continue
        (x, y, w, h), (width, height) = box, sizes[a["image_id"]]
        fractions += all(0 <= v <= 1 for v in box)
        if w < 0 or h < 0:
            report.add("bbox of negative width or height", f"{name} ({box})", i)
        elif w < 1 or h < 1 or (area is not None and area <= 0):
            flat.append(str(a.get("id")))
        elif x >= width or y >= height or x + w <= 0 or y + h <= 0:
            report.add("bbox wholly outside its image", f"{name} ({box}, image {width}x{height})", i)
        elif (x + w > 1.1 * width + 2 or y + h > 1.1 * height + 2) and w > x and h > y:
            report.add(
                "bbox that reaches far beyond its image: x1, y1, x2, y2 instead of x, y, width, height?",
                f"{name} ({box}, image {width}x{height})",
                i,
            )
        if masks and (fault := fault_of(a.get("segmentation"), (height, width))):
            report.add(fault, name, i)
    if fractions and fractions > 0.9 * len(content["annotations"]):
        report.add("boxes between 0 and 1: they must be pixels", str(path))
    if not sizes or not content["annotations"]:
        report.add("an empty data set: no images or no annotations (is it the right file?)", str(path))
    elif crowd == len(content["annotations"]):
        report.add("all annotations are crowd regions: nothing to learn, and nothing that COCO's AP counts", str(path))
    if flat:
        shown = ", ".join(flat[:5]) + (", ..." if len(flat) > 5 else "")
        report.notes.append(f"{len(flat)} boxes narrower than a pixel or without area are not learned (ids {shown})")
    return report


def plainly_sound(
    annotations: list[dict[str, Any]], sizes: dict[Any, tuple[float, float]], known: set[Any], masks: bool
) -> tuple[Array, int, int]:
    """Which annotations have no fault for certain `[N]`, found for all at once; the others are looked at one by one.

    Of those also how many are crowds, and how many have boxes between 0 and 1.
    """
    nothing = np.zeros(len(annotations), dtype=bool), 0, 0
    try:
        sound: Array = np.array([a["category_id"] in known for a in annotations], dtype=bool)
        sound &= once([a["id"] for a in annotations])
        size = np.array([sizes[a["image_id"]] for a in annotations], dtype=np.float64)
        box = plain_numbers([a["bbox"] for a in annotations])
        area = plain_numbers([1.0 if a.get("area") is None else a["area"] for a in annotations])
        crowd = np.array([bool(a.get("iscrowd")) for a in annotations], dtype=bool)
    except (KeyError, TypeError, ValueError, OverflowError):
        return nothing
    if box.shape != (len(annotations), 4) or not plain_flags(annotations):
        return nothing
    sound &= plain_boxes(box, size) & (box[:, 2:] >= 1).all(1) & np.isfinite(area) & (area > 0)
    for start in range(0, len(annotations) if masks else 0, 2**16):
        part = slice(start, start + 2**16)
        sound[part] &= plain_outlines([a.get("segmentation") for a in annotations[part]], size[part])
    return sound, int(crowd[sound].sum()), int(((box >= 0) & (box <= 1)).all(1)[sound].sum())  # type: ignore[index]


def plain_outlines(segmentations: list[Any], sizes: Array) -> Array:
    """Which of them are sound polygons, read as arrays, in images of `sizes` (W, H) `[N, 2]`."""
    sound = np.array([isinstance(s, list) and len(s) > 0 for s in segmentations], dtype=bool)
    for i in np.flatnonzero(sound).tolist():
        sound[i] = all(isinstance(p, np.ndarray) and len(p) > 5 and not len(p) % 2 for p in segmentations[i])
    rows = np.flatnonzero(sound)
    if len(rows):
        chosen = [segmentations[i] for i in rows.tolist()]
        points = np.concatenate([p for polygons in chosen for p in polygons]).reshape(-1, 2)
        counts = np.array([sum(map(len, polygons)) // 2 for polygons in chosen])
        starts = np.cumsum(counts) - counts
        low, high = (f.reduceat(points, starts) for f in (np.minimum, np.maximum))
        near = (low / sizes[rows] >= -9.5) & (high / sizes[rows] <= 10.5)  # not so NaN
        sound[rows] = (near & (high > 0) & (low < sizes[rows])).all(1)
    return sound


def fault_of(segmentation: Any, size: tuple[float, float]) -> str:
    """What is wrong with a mask of an image of `size` (H, W); "" if nothing is."""
    if isinstance(segmentation, dict):
        if list(segmentation.get("size", ())) != [*map(int, size)]:
            return (
                f"segmentation (RLE) of another size than its image: {segmentation.get('size')} for {list(size)} (H, W)"
            )
        counts = segmentation.get("counts")
        if not counts:
            return "segmentation (RLE) without counts"
        if isinstance(counts, list):
            sound = numbers(counts) and min(counts) >= 0 and sum(counts) == size[0] * size[1]
        else:
            try:
                sound = rle.decode(segmentation).shape == tuple(size)
            except (ValueError, TypeError):
                sound = False
        return "" if sound else "segmentation (RLE) whose counts are broken, or do not sum up to its size"
    if not isinstance(segmentation, list) or not segmentation:
        return "no segmentation: masks cannot be learned (`masks: false` learns boxes alone)"
    if not all(numbers(polygon) for polygon in segmentation):
        return "segmentation with a polygon that is not finite numbers"
    if any(len(polygon) < 6 or len(polygon) % 2 for polygon in segmentation):
        return "segmentation with a polygon of less than three points"
    points = np.concatenate([np.reshape(polygon, (-1, 2)) for polygon in segmentation])
    if (points.max(0) <= 0).any() or (points.min(0) >= size[::-1]).any():
        return "segmentation wholly outside its image"
    if (np.abs(points / size[::-1] - 0.5) > 10).any():  # to draw it would take for ever
        return "segmentation that reaches far beyond its image"
    return ""


def numbers(values: Any) -> bool:
    """Whether these are a list, or an array, of finite numbers."""
    if isinstance(values, np.ndarray):
        return bool(np.isfinite(values).all())
    if not isinstance(values, list | tuple) or not all(isinstance(v, int | float) for v in values):
        return False
    return bool(np.isfinite(np.array(values, dtype=np.float64)).all())


def check_boxed(instances: list[Boxed], report: Report, faulty: Literal["error", "drop"]) -> list[Boxed]:
    """`instances` with their boxes cut at the image's border, and without those of no extent, of which it warns.

    Raises:
        DataError: with all faults, of `report` and found here, unless they are to be dropped.
    """
    flat, seen = [], 0
    for instance in instances:
        boxes = instance.boxes
        limit = np.tile([instance.width or np.inf, instance.height or np.inf], 2)
        sound = np.isfinite(boxes).all(1)
        inside = (boxes[:, 2:] > 0).all(1) & (boxes[:, :2] < limit[:2]).all(1)
        for i in np.flatnonzero(~sound):
            report.add("boxes that are not finite numbers", f"{instance.path} ({boxes[i]})", seen + int(i))
        for i in np.flatnonzero(sound & (boxes[:, 2:] < boxes[:, :2]).any(1)):
            report.add("boxes whose corners are exchanged", f"{instance.path} ({boxes[i]})", seen + int(i))
        for i in np.flatnonzero(sound & ~inside):
            report.add("boxes wholly outside their image", f"{instance.path} ({boxes[i]})", seen + int(i))
        seen += len(boxes)
        boxes = instance.boxes = boxes.clip(0, limit)
        wide = (boxes[:, 2:] - boxes[:, :2] >= 1).all(1)
        flat += [instance.path] * int((sound & inside & ~wide).sum())
        kept = np.asarray(sound & inside & wide)
        instance.boxes, instance.labels, instance.crowd = boxes[kept], instance.labels[kept], instance.crowd[kept]
        if instance.segmentations:
            instance.segmentations = [s for s, k in zip(instance.segmentations, kept.tolist(), strict=True) if k]
    if instances and all(i.crowd.all() for i in instances):
        report.add("no object in any image, or all are difficult: nothing to learn", str(report.path))
    report.settle(faulty)
    if flat:
        rank_zero_warn(f"{len(flat)} boxes narrower than a pixel are left out, the first in {flat[0]}")
    return instances


def tell(make: Callable[[], BoxData]) -> None:
    """What a `check` prints of data: every split's images, and its objects by class; exits with the faults."""
    try:
        data = make()
        for split in ("train", "val", "test"):
            instances = data.instances(split)
            for instance in instances:
                height, width = data.read(instance.path).shape[:2]
                if instance.width and (width, height) != (instance.width, instance.height):
                    raise DataError(
                        f"{instance.path}: the image is {width}x{height}, its record says "
                        f"{instance.width}x{instance.height}"
                    )
            counts = np.bincount(np.concatenate([i.labels for i in instances]), minlength=data.num_classes)
            empty = sum(not len(i.boxes) for i in instances)
            print(f"{split}: {len(instances)} images, {empty} of them without objects")
            print("  " + ", ".join(f"{name} {n}" for name, n in zip(data.class_names, counts, strict=True)))
        print("no fault")
    except (DataError, OSError) as error:
        raise SystemExit(f"{type(error).__name__}: {error}") from None
