"""Keypoint data in COCO's format: COCO itself, and anything labelled in the same way, whatever its keypoints.

`python -m datamodules.coco_keypoints check ANNOTATIONS IMAGES` refuses, before training, what would give a silent zero.
"""

import argparse
from itertools import zip_longest
from pathlib import Path
from typing import Any, Literal

import numpy as np
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torchmetrics import Metric, MetricCollection

from datamodules.checks import check_keypoints
from datamodules.coco_file import CocoFile, paths_of
from datamodules.drawing import draw_keypoints, grid, write_image
from datamodules.fields import numbers
from datamodules.keypoints import Instance, KeypointData, KeypointDataset
from datamodules.metrics import KeypointAP, KeypointError
from datamodules.transforms import DataError


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
        self.paths = paths_of(self.root, train, val, test, train_images, val_images, test_images)
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
                    if "area" not in a and numbers(a.get("bbox")) and len(a["bbox"]) == 4:
                        a["area"] = 0.53 * a["bbox"][2] * a["bbox"][3]
            known = next(iter(self.files.values()), None)
            if known is not None and known.facts.names != file.facts.names:
                names = zip_longest(known.facts.names, file.facts.names)
                i, (a, b) = next((i, pair) for i, pair in enumerate(names) if pair[0] != pair[1])
                raise DataError(
                    f"{annotations}: keypoints differ from those of {known.path}: number {i} is {b!r} here and {a!r} "
                    f"there; names and order have to be equal"
                )
            self.files[split] = file
        return self.files[split]

    def instances(self, split: str) -> list[Instance]:
        file = self.file(split)
        decode = self.faulty == "drop"  # what cannot be read shall be dropped too
        report = check_keypoints(file.content, file.path, file.images, file.facts, file.categories, decode)
        report.settle(self.faulty)
        for note in report.notes:
            rank_zero_warn(note)
        report.drop_from(file.content)
        if split != "train":  # said, since the APs are not comparable
            if split == "test" and self.paths["test"] == self.paths["val"]:
                rank_zero_info("no test split is named: the validation split is tested")
            rank_zero_info(f"boxes of {split}: {self.boxes or 'ground truth'}")
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
