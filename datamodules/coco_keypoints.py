"""Keypoint data in COCO's format: COCO itself, and anything labelled in the same way, whatever its keypoints.

`python -m datamodules.coco_keypoints check ANNOTATIONS IMAGES` refuses, before training, what would give a silent zero.
"""

import argparse
import json
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torchmetrics import Metric, MetricCollection

from datamodules.base import Instance, KeypointData, KeypointDataset, Keypoints
from datamodules.checks import check_keypoints
from datamodules.drawing import draw_keypoints, grid, write_image
from datamodules.metrics import KeypointAP, KeypointError
from datamodules.transforms import DataError

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


def read_json(path: str | Path) -> Any:
    """The content of a JSON file.

    Raises:
        DataError: naming the file, and the place where it stops being JSON.
    """
    try:
        with open(path) as file:
            return json.load(file)
    except OSError as error:
        raise DataError(
            f"{path}: cannot read the annotation file ({error.strerror}); check root and file name"
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
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
        content = read_json(path)
        missing = [
            k for k in ("images", "annotations", "categories") if not isinstance(content, dict) or k not in content
        ]
        if missing:
            raise DataError(
                f"{path}: no list {', '.join(missing)}; a COCO keypoint file holds images, annotations and categories"
            )
        for annotation in content["annotations"]:
            annotation.pop("segmentation", None)  # not read here, and most of COCO's memory
        self.content: dict[str, Any] = content
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
        chosen = [c for c in categories if "keypoints" in c and wanted in (None, c.get("name"))]
        if not chosen:
            there = [c.get("name") for c in categories]
            raise DataError(
                f"{self.path}: no category {f'named {wanted!r} ' if wanted else ''}with a list `keypoints` "
                f"among {there}; is this an instances file instead of a keypoint file?"
            )
        lists = {tuple(c["keypoints"]) for c in chosen}
        if len(lists) > 1:
            raise DataError(
                f"{self.path}: categories {[c['name'] for c in chosen]} have different keypoints; "
                f"choose one by `category`"
            )
        names = list(lists.pop())
        ids = [c["id"] for c in chosen]
        if not names:  # some converters leave the names out
            lengths = Counter(len(a["keypoints"]) for a in self.content["annotations"] if "keypoints" in a)
            if not lengths:
                raise DataError(f"{self.path}: neither the category nor any annotation has keypoints")
            names = [f"keypoint_{i + 1}" for i in range(lengths.most_common(1)[0][0] // 3)]
        return ids, names, chosen[0].get("skeleton", [])

    def instances(self) -> list[Instance]:
        """Those with at least one labelled keypoint, boxes clipped to the image, crowd left out (official coco.py)."""
        images = {image["id"]: image for image in self.content["images"]}
        found = []
        for a in self.content["annotations"]:
            if a.get("category_id") not in self.categories or a.get("iscrowd", 0) or not any(a.get("keypoints", [])):
                continue
            image = images[a["image_id"]]
            x, y, w, h = a["bbox"]
            x1, y1 = max(0.0, x), max(0.0, y)
            x2 = min(image["width"] - 1.0, x1 + max(0.0, w - 1))
            y2 = min(image["height"] - 1.0, y1 + max(0.0, h - 1))
            if a.get("area", w * h) <= 0 or x2 < x1 or y2 < y1:
                continue
            points = np.array(a["keypoints"], dtype=np.float64).reshape(-1, 3)
            found.append(
                Instance(
                    path=str(self.images / image["file_name"]),
                    image_id=a["image_id"],
                    box=np.array([x1, y1, x2 - x1, y2 - y1]),
                    keypoints=points[:, :2],
                    visible=points[:, 2],
                    id=a["id"],
                    category_id=a["category_id"],
                    area=a.get("area", w * h),
                    norm=max(w, h),
                )
            )
        return found

    def detections(self, path: str | Path, threshold: float = 0.0) -> list[Instance]:
        """Instances of a detector's boxes in COCO-results JSON (image_id, category_id, bbox, score) for these images.

        Raises:
            DataError: if the file has another form, or no box of it belongs to an image here.
        """
        items = read_json(path)
        wanted = {"image_id", "category_id", "bbox", "score"}
        if not isinstance(items, list) or any(wanted - item.keys() for item in items):
            raise DataError(f"{path}: a box file is a list of objects with {', '.join(sorted(wanted))}")
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
        bad = [i for i in found if not (np.isfinite(i.box).all() and i.box[2] > 0 and i.box[3] > 0)]
        if bad:
            raise DataError(f"{path}: {len(bad)} boxes are not x, y, width, height; item {bad[0].id} is {bad[0].box}")
        return found


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
        rank_zero_info(f"OKS sigma 0.05 taken for {shown}; give `sigmas` for numbers to compare with others")
    return [0.05 if s is None else s for s in found]


class CocoKeypoints(KeypointData):
    """COCO keypoints, or one's own data in the same format; everything about the skeleton is read from the file.

    Args:
        root: folder that all other paths start from.
        train, val, test: annotation files; test None is val.
        train_images, val_images, test_images: folders of the images.
        boxes: detector's boxes for evaluation (COCO-results JSON); None takes the ground truth's.
        box_threshold: least score of those boxes.
        category: the category to take, where several have different keypoints.
        flip_pairs, sigmas: override what the names tell.
        torso: two keypoint names whose distance is PCK's unit; None takes the longer side of the box.
        nms: "oks" (official), "soft", or null for none.
        nms_threshold: OKS above which the lower scored of two is dropped (officially 0.9).
        faulty: "error" refuses faulty records, all at once; "drop" leaves them out and says how many.
        area_from_box: fill in missing areas as 0.53 of the box (mmpose's rule for data without masks).
        **kwargs: see `KeypointData`.

    Raises:
        DataError: if a file is missing or faulty, at construction or `setup`.
    """

    def __init__(
        self,
        root: str = "data/coco",
        train: str = "annotations/person_keypoints_train2017.json",
        val: str = "annotations/person_keypoints_val2017.json",
        test: str | None = None,
        train_images: str = "train2017",
        val_images: str = "val2017",
        test_images: str | None = None,
        boxes: str | None = None,
        box_threshold: float = 0.0,
        category: str | None = None,
        flip_pairs: list[list[int]] | None = None,
        sigmas: list[float] | None = None,
        torso: list[str] | None = None,
        nms: Literal["oks", "soft"] | None = "oks",
        nms_threshold: float = 0.9,
        faulty: Literal["error", "drop"] = "error",
        area_from_box: bool = False,
        **kwargs: Any,
    ) -> None:
        self.root = Path(root)
        self.paths = {
            "train": (self.root / train, self.root / train_images),
            "val": (self.root / val, self.root / val_images),
            "test": (self.root / (test or val), self.root / (test_images or val_images)),
        }
        self.boxes, self.box_threshold = boxes, box_threshold
        self.category, self.given_pairs, self.given_sigmas, self.torso = category, flip_pairs, sigmas, torso
        self.nms, self.nms_threshold, self.faulty, self.area_from_box = nms, nms_threshold, faulty, area_from_box
        self.files: dict[str, CocoFile] = {}
        super().__init__(self.file("val").facts, **kwargs)
        if torso is not None and (len(torso) != 2 or set(torso) - set(self.facts.names)):
            raise DataError(f"torso must name two of {self.facts.names}, got {torso}")

    def file(self, split: str) -> CocoFile:
        """The annotation file of a split, read once."""
        if split not in self.files:
            annotations, images = self.paths[split]
            same = next((f for f in self.files.values() if (f.path, f.images) == (annotations, images)), None)
            file = same or CocoFile(annotations, images, self.category, self.given_pairs, self.given_sigmas)
            if self.area_from_box:
                for a in file.content["annotations"]:
                    a.setdefault("area", 0.53 * a["bbox"][2] * a["bbox"][3])
            known = next(iter(self.files.values()), None)
            if known is not None and known.facts.names != file.facts.names:
                raise DataError(
                    f"{annotations}: keypoints {file.facts.names} differ from {known.path}: {known.facts.names}"
                )
            self.files[split] = file
        return self.files[split]

    def instances(self, split: str) -> list[Instance]:
        file = self.file(split)
        report = check_keypoints(file.content, file.path, file.images, file.facts, file.categories)
        report.settle(self.faulty)
        for note in report.notes:
            rank_zero_warn(note)
        file.content["annotations"] = [a for i, a in enumerate(file.content["annotations"]) if i not in report.faulty]
        if split != "train" and self.boxes is not None:
            return file.detections(self.root / self.boxes, self.box_threshold)
        found = file.instances()
        if not found:
            raise DataError(f"{file.path}: no annotation has a labelled keypoint; nothing to learn or to evaluate")
        if self.torso is not None:
            a, b = (self.facts.names.index(name) for name in self.torso)
            for instance in found:
                both = instance.visible[a] > 0 and instance.visible[b] > 0
                length = float(np.linalg.norm(instance.keypoints[a] - instance.keypoints[b]))
                instance.norm = length if both and length > 0 else float("nan")
        return found

    def metric(self, split: str = "val") -> Metric | MetricCollection:
        instances = self.datasets[split].instances  # type: ignore[attr-defined]
        file = self.file(split)
        taken = [a for a in file.content["annotations"] if a["category_id"] in file.categories]
        truth = file.content | {"annotations": taken}
        ap = KeypointAP(instances, truth, self.facts.sigmas, nms=self.nms, nms_threshold=self.nms_threshold)
        if self.boxes is not None:
            return ap
        return MetricCollection({"ap": ap, "error": KeypointError(instances)}, compute_groups=False)


def main() -> None:
    """`check`: report every fault of a keypoint file and draw its first crops as a network would see them."""
    parser = argparse.ArgumentParser(prog="python -m datamodules.coco_keypoints", description=main.__doc__)
    check = parser.add_subparsers(required=True).add_parser("check")
    check.add_argument("annotations", help="keypoint file in COCO's format")
    check.add_argument("images", help="folder of its images")
    check.add_argument("--boxes", help="a detector's boxes for it (COCO-results JSON)")
    check.add_argument("--category", help="the category to take, where several have different keypoints")
    check.add_argument("--draw", default="check.jpg", help="picture of the first crops (default: %(default)s)")
    args = parser.parse_args()
    try:
        file = CocoFile(args.annotations, args.images, args.category)
        report = check_keypoints(file.content, file.path, file.images, file.facts, file.categories, decode=True)
        print(report)
        if report.faults:
            raise SystemExit(1)
        instances = file.instances()
        names = file.facts.names
        print(f"{len(instances)} instances in {len({i.image_id for i in instances})} images, {len(names)} keypoints:")
        for i, (name, sigma) in enumerate(zip(names, file.facts.sigmas, strict=True)):
            partner = names[file.facts.flip_index[i]]
            print(f"  {i:3d} {name}  sigma {sigma}" + (f"  mirrors to {partner}" if partner != name else ""))
        if args.boxes:
            print(f"{len(file.detections(args.boxes))} boxes of {args.boxes} fit")
        dataset = KeypointDataset(instances, file.facts, (256, 192))
        pictures = []
        for sample in (dataset[i] for i in range(min(8, len(dataset)))):
            image = np.asarray(sample["image"]).transpose(1, 2, 0)
            shown = np.asarray(sample["visible"]) > 0
            pictures.append(draw_keypoints(image, np.asarray(sample["keypoints"]), shown, file.facts))
        write_image(args.draw, grid(pictures, columns=4))
        print(f"left is drawn warm, right cold, as labelled: {args.draw}")
    except (DataError, OSError) as error:
        raise SystemExit(f"{type(error).__name__}: {error}") from None


if __name__ == "__main__":
    main()
