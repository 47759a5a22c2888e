"""Boxes and instance masks in COCO's format: COCO itself, and anything labelled in the same way, whatever its classes.

`python -m datamodules.coco_instances check ANNOTATIONS IMAGES` refuses, before training, what would give a silent zero.
"""

import argparse
from collections import Counter
from pathlib import Path
from typing import Any, Literal

import numpy as np
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from datamodules.box_checks import check_instances
from datamodules.box_data import BoxData
from datamodules.boxes import BoxDataset, Boxed
from datamodules.coco_file import LISTS, paths_of, read_json, without_outline
from datamodules.drawing import draw_boxes, fitted, grid, write_image
from datamodules.fields import records, whole
from datamodules.mask_files import distinct
from datamodules.transforms import DataError


class CocoInstances(BoxData):
    """COCO instances, or one's own data in the same format; the classes are read from the file.

    Args:
        root: folder that all other paths start from.
        train, val, test: annotation files; test None is val.
        train_images, val_images, test_images: folders of the images.
        classes: names of the categories to take, in the order of their labels; None takes all by rising id.
        faulty: "error" refuses faulty records, all at once; "drop" reads every image first, leaves out what is faulty,
            and says how many.
        **kwargs: see `BoxData`.

    Raises:
        DataError: if a file is missing or faulty, at construction or `setup`.
    """

    def __init__(
        self,
        root: str = "data/coco",
        train: str = "annotations/instances_train2017.json",
        val: str = "annotations/instances_val2017.json",
        test: str | None = None,
        train_images: str = "train2017",
        val_images: str = "val2017",
        test_images: str | None = None,
        classes: list[str] | None = None,
        faulty: Literal["error", "drop"] = "error",
        masks: bool = False,
        **kwargs: Any,
    ) -> None:
        self.paths = paths_of(Path(root), train, val, test, train_images, val_images, test_images)
        self.faulty = faulty
        self.contents: dict[Path, dict[str, Any]] = {}
        content = read_instances(self.paths["val"][0], masks)
        self.contents[self.paths["val"][0]] = content
        found = {c["id"]: str(c["name"]) for c in sorted(content["categories"], key=lambda c: c["id"])}
        twice = [name for name, n in Counter(found.values()).items() if n > 1]
        if twice:
            raise DataError(f"{self.paths['val'][0]}: several categories are named {twice}")
        if unknown := [name for name in classes or () if name not in found.values()]:
            raise DataError(f"{self.paths['val'][0]}: no category is named {unknown}; there are {[*found.values()]}")
        ids = {name: i for i, name in found.items()}
        names = classes or [*found.values()]
        self.all_classes = not classes
        super().__init__(names, [ids[name] for name in names], masks=masks, **kwargs)

    def content(self, split: str) -> dict[str, Any]:
        """The annotation file of a split, read once, with the same categories as the others."""
        path = self.paths[split][0]
        if path not in self.contents:
            content = read_instances(path, self.masks)
            there = {c["id"]: c["name"] for c in content["categories"]}
            wrong = [n for i, n in zip(self.category_ids, self.class_names, strict=True) if there.get(i) != n]
            used = Counter(a["category_id"] for a in content["annotations"] if whole(a.get("category_id")))
            alone = [there[i] for i in there if i not in self.category_ids and used[i]] if self.all_classes else []
            if alone:
                raise DataError(
                    f"{path}: categories {alone} are not in {self.paths['val'][0]}, and what they hold would not be "
                    f"learned; add them there, or name the `classes` that you want"
                )
            if wrong:
                raise DataError(
                    f"{path}: categories {wrong} have other ids here, or are missing, than in {self.paths['val'][0]}: "
                    f"labels would change their meaning"
                )
            self.contents[path] = content
        return self.contents[path]

    def instances(self, split: str) -> list[Boxed]:
        path, images = self.paths[split]
        content = self.content(split)
        if split == "test" and self.paths["test"] == self.paths["val"]:
            rank_zero_info("no test split is named: the validation split is tested")
        decode = self.faulty == "drop"  # what cannot be read shall be dropped too
        report = check_instances(content, path, images, self.masks, decode)
        report.settle(self.faulty)
        for note in report.notes:
            rank_zero_warn(f"{path}: {note}")
        report.drop_from(content)
        if not content["images"]:
            raise DataError(f"{path}: every image of it has faults, none is left; mend them")
        return boxed(content, images, self.category_ids, self.masks)

    def truth(self, split: str) -> dict[str, Any]:
        return self.content(split)


def read_instances(path: Path, masks: bool) -> dict[str, Any]:
    """The content of a COCO instances file; without masks their outlines, most of its memory, are left out,
    and with them polygons are float64 arrays.

    Raises:
        DataError: if it is none.
    """
    content = records(read_json(path, compact if masks else without_outline), path, LISTS, "a COCO file")
    if not content["categories"] or any(c.get("name") is None for c in content["categories"]):
        raise DataError(f"{path}: `categories` is empty, or lacks an id or a name; predictions could not be told apart")
    for annotation in content["annotations"]:
        annotation.pop("keypoints", None)
    return content


def compact(record: dict[str, Any]) -> dict[str, Any]:
    """Polygons as arrays, a quarter of the memory that lists of numbers take; what is none is left as it is."""
    if isinstance(polygons := record.get("segmentation"), list):
        record["segmentation"] = [array_of(p) for p in polygons]
    return record


def array_of(polygon: Any) -> Any:
    try:
        found = np.array(polygon)
    except ValueError:
        return polygon
    return found.astype(np.float64, copy=False) if found.ndim == 1 and found.dtype.kind in "if" else polygon


def boxed(content: dict[str, Any], images: Path, ids: list[int], masks: bool) -> list[Boxed]:
    """All images of a checked file; boxes cut at the image's border, and those of no extent left out (official
    coco.py)."""
    label = {category: i for i, category in enumerate(ids)}
    place = {image["id"]: i for i, image in enumerate(content["images"])}
    taken = [a for a in content["annotations"] if a["category_id"] in label and a["image_id"] in place]
    box = np.array([a["bbox"] for a in taken], dtype=np.float64).reshape(-1, 4)
    area = np.array([1 if a.get("area") is None else a["area"] for a in taken])
    own = np.array([place[a["image_id"]] for a in taken], dtype=np.int64)
    rows = np.flatnonzero((box[:, 2:] >= 1).all(1) & (area > 0))
    rows = rows[np.argsort(own[rows], kind="stable")]
    # Each image has its rows of these arrays, which processes share page by page.
    size = np.array([(image["width"], image["height"]) for image in content["images"]]).reshape(-1, 2)
    start, extent = box[rows, :2], box[rows, 2:]
    boxes = np.concatenate([start, start + extent], 1).clip(0, np.tile(size[own[rows]], 2))
    chosen = [taken[i] for i in rows.tolist()]
    labels = np.array([label[a["category_id"]] for a in chosen], dtype=np.int64)
    crowd = np.array([bool(a.get("iscrowd")) for a in chosen], dtype=bool)
    ends = np.searchsorted(own[rows], np.arange(len(size) + 1)).tolist()
    found = []
    for image, first, last in zip(content["images"], ends, ends[1:], strict=False):
        part = slice(first, last)
        found.append(
            Boxed(
                str(images / image["file_name"]),
                image["id"],
                image["width"],
                image["height"],
                boxes[part],
                labels[part],
                crowd[part],
                [a["segmentation"] for a in chosen[part]] if masks else [],
            )
        )
    return found


def main() -> None:
    """`check`: report every fault of an instances file, count its classes, and draw its first images."""
    parser = argparse.ArgumentParser(prog="python -m datamodules.coco_instances", description=main.__doc__)
    check = parser.add_subparsers(required=True).add_parser("check")
    check.add_argument("annotations", help="instances file in COCO's format")
    check.add_argument("images", help="folder of its images")
    check.add_argument("--masks", action="store_true", help="also check the masks")
    check.add_argument("--draw", default="check.jpg", help="picture of the first images (default: %(default)s)")
    args = parser.parse_args()
    try:
        content = read_instances(Path(args.annotations), masks=args.masks)
        report = check_instances(content, Path(args.annotations), Path(args.images), args.masks, decode=True)
        print(report)
        if report.faults:
            raise SystemExit(1)
        categories = sorted(content["categories"], key=lambda c: c["id"])
        names, ids = [c["name"] for c in categories], [c["id"] for c in categories]
        images = boxed(content, Path(args.images), ids, args.masks)
        counts = Counter(a["category_id"] for a in content["annotations"])
        empty = sum(not len(i.boxes) for i in images)
        print(f"{len(images)} images, {empty} of them without objects; {len(names)} classes:")
        for i, name in zip(ids, names, strict=True):
            print(f"  {i:3d} {name}: {counts[i]}")
        if absent := [n for i, n in zip(ids, names, strict=True) if not counts[i]]:
            print(f"never seen: {', '.join(absent)}")
        data = BoxDataset([i for i in images if len(i.boxes)][:8], 240, 320)
        colours = distinct(len(names))
        pictures = []
        for sample in (data[i] for i in range(len(data))):
            labels = sample["labels"].tolist()
            image = sample["image"].permute(1, 2, 0).numpy()
            texts = [names[x] for x in labels]
            pictures.append(draw_boxes(image, sample["boxes"].numpy(), [colours[x] for x in labels], texts))
        write_image(args.draw, grid([fitted(p, (320, 320)) for p in pictures], columns=4))
        print(f"the first images: {args.draw}")
    except (DataError, OSError) as error:
        raise SystemExit(f"{type(error).__name__}: {error}") from None


if __name__ == "__main__":
    main()
