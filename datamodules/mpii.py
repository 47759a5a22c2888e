"""MPII Human Pose: people with 16 joints, measured by PCKh.

`python -m datamodules.mpii check ROOT` says what is missing or faulty in a copy, and where to get it.
"""

import argparse
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torchmetrics import Metric

from datamodules.checks import Report
from datamodules.coco_file import SIGMAS, pairs_of, read_json
from datamodules.fields import LIMIT
from datamodules.keypoints import Instance, KeypointData, Keypoints
from datamodules.metrics import PCKh
from datamodules.transforms import Array, DataError, PoseAugmentation

NAMES = [
    *("right_ankle", "right_knee", "right_hip", "left_hip", "left_knee", "left_ankle", "pelvis", "thorax"),
    *("upper_neck", "head_top", "right_wrist", "right_elbow", "right_shoulder"),
    *("left_shoulder", "left_elbow", "left_wrist"),
]
PARENTS = [1, 2, 6, 6, 3, 4, 6, 6, 7, 8, 11, 12, 7, 7, 13, 14]  # official mpii.py; the pelvis is its own
FACTS = Keypoints(
    names=NAMES,
    skeleton=[[joint, parent] for joint, parent in enumerate(PARENTS) if joint != parent],
    flip_pairs=pairs_of(NAMES),
    sigmas=[SIGMAS.get(name.split("_")[-1], 0.05) for name in NAMES],  # COCO's; MPII is not measured by OKS
)
SHAPES: dict[str, tuple[int, ...]] = {"center": (2,), "scale": (), "joints": (16, 2), "joints_vis": (16,)}
IMAGES_FROM = "the archive of images on human-pose.mpi-inf.mpg.de"
LABELS_FROM = "the MPII annotations linked in the README of the official HRNet or Simple Baselines pose code"
Truth = tuple[Array, Array, Array]


def read_truth(path: Path) -> Truth:
    """gt_valid.mat: keypoints `[N, 16, 2]` in 0-based image pixels, visible `[N, 16]` (0 or 2), head sizes `[N]` in
    pixels (0.6 of the head box's diagonal); row n is person n of valid.json. Raises DataError naming a bad file."""
    from scipy.io import loadmat

    try:
        with ProcessPoolExecutor(1) as pool:  # a broken file can end the process that reads it
            content = pool.submit(loadmat, path).result()
        joints, missing, boxes = (
            np.asarray(content[key], dtype=np.float64).reshape(*shape, -1)
            for key, shape in (("pos_gt_src", (16, 2)), ("jnt_missing", (16,)), ("headboxes_src", (2, 2)))
        )
    except Exception as error:  # whatever a broken file leads scipy to
        raise DataError(f"{path}: not MPII's gt_valid.mat ({error}); fetch it from {LABELS_FROM}") from None
    visible = 2.0 * (missing.T == 0)
    # 1-based as the json (the official evaluation adds 1 to predictions); what is missing may be nan.
    keypoints = np.where(visible[..., None] > 0, joints.transpose(2, 0, 1) - 1, 0.0)
    return keypoints, visible, 0.6 * np.linalg.norm(boxes[1] - boxes[0], axis=0)


def check_mpii(path: Path, images: Path, truth: Path | None = None) -> tuple[Report, list[Any], Truth | None]:
    """Read an annotation file and gt_valid.mat (`truth`, if it belongs to it) and find all that is wrong with them:
    the report, the persons, the ground truth (None if there is none)."""
    report, persons, found = Report(path), [], None
    try:
        persons = read_json(path)
        if not isinstance(persons, list) or not persons or not all(isinstance(p, dict) for p in persons):
            persons = []
            raise DataError(f"{path}: not a list of persons")
    except DataError as error:
        report.add(f"no annotations: put {LABELS_FROM} there", str(error))
    for name in sorted({str(p.get("image")) for p in persons}) if images.is_dir() else ["there is no such folder"]:
        if not (images / name).is_file():
            report.add(f"images that are not in {images}: put {IMAGES_FROM} there, or set `images`", name)
    for i, person in enumerate(persons):
        name = f"person {i} ({person.get('image')})"
        for key, shape in SHAPES.items():
            if not _is_array(person.get(key), shape):
                fault = f"`{key}` missing, not finite, or not of shape {list(shape)}: it cannot be learned"
                report.add(fault, f"{name}: {str(person.get(key))[:40]}", i)
            elif key == "scale" and person[key] <= 0:
                report.add("scale that is not positive: there is nothing to crop", f"{name}: {person[key]}", i)
    if truth is not None and not truth.is_file():
        report.notes.append(
            f"{truth} is missing (see {LABELS_FROM}): heads are measured from head_top to upper_neck, "
            "so that PCKh is not the official figure"
        )
    elif truth is not None and persons:
        try:
            found = read_truth(truth)
            _check_truth(report, persons, found, truth)
        except DataError as error:
            report.add("unreadable ground truth: there would be no PCKh", str(error))
    return report, persons, found


def _is_array(value: Any, shape: tuple[int, ...]) -> bool:
    try:
        array = np.array(value)
    except (TypeError, ValueError):
        return False
    return array.dtype.kind in "biuf" and array.shape == shape and bool((np.abs(array) <= LIMIT).all())


def _check_truth(report: Report, persons: list[Any], truth: Truth, path: Path) -> None:
    keypoints, visible, head = truth
    if not len(keypoints) == len(visible) == len(head) == len(persons):
        fault = "another number of persons than the json: all would be measured against someone else"
        report.add(fault, f"{path} ({len(keypoints)} poses, {len(head)} heads; json {len(persons)})")
        return
    for i in np.flatnonzero((visible > 0).any(1) & ~(head > 0)):
        report.add(f"no head size in {path.name}: PCKh has no unit", f"person {i} ({persons[i].get('image')})", int(i))
    if not (np.abs(keypoints) <= LIMIT).all():
        report.add("joints that are not finite, though not missing: they could never be met", str(path))
    if not report.faulty:
        joints = np.array([p["joints"] for p in persons], dtype=np.float64) - 1
        both = (visible > 0) & (np.array([p["joints_vis"] for p in persons]) > 0)
        apart = np.linalg.norm(keypoints - joints, axis=-1)[both] / np.broadcast_to(head[:, None], both.shape)[both]
        if len(apart) and np.median(apart) > 0.5:  # half a head: PCKh's own threshold
            report.add("joints far from the json's: rows or joints are in another order", str(path))


class Mpii(KeypointData):
    """MPII Human Pose with the official files, crops, augmentation and measure.

    A person is cropped as a square of 200 px times `scale`, padded by 1.25 (official mpii.py); nobody is left out.

    Args:
        root: folder that all other paths start from.
        train, val, test: annotation files; test None is val (MPII's own test labels are not public).
        images: folder of the images.
        ground_truth: gt_valid.mat, the labels and head sizes to measure `val` by. Without (None or no such file) a head
            is as long as from head_top to upper_neck: not the official figure, and who lacks one is not measured.
        size: (H, W) of the network's input.
        augmentation: of training crops; the default is the official one for MPII.
        **kwargs: see `KeypointData`.

    Raises:
        DataError: at `setup`, with all faults of the files at once.
    """

    def __init__(
        self,
        root: str = "data/mpii",
        train: str = "annot/train.json",
        val: str = "annot/valid.json",
        test: str | None = None,
        images: str = "images",
        ground_truth: str | None = "annot/gt_valid.mat",
        size: tuple[int, int] = (256, 256),
        augmentation: PoseAugmentation = PoseAugmentation(scale=0.25, rotation=30.0, half_body=0.0),  # noqa: B008 (frozen)
        **kwargs: Any,
    ) -> None:
        super().__init__(FACTS, size=size, augmentation=augmentation, **kwargs)
        self.images = Path(root) / images
        self.paths = {"train": Path(root) / train, "val": Path(root) / val, "test": Path(root) / (test or val)}
        self.ground_truth = None if ground_truth is None else Path(root) / ground_truth
        self.files: dict[str, tuple[Report, list[Any], Truth | None]] = {}

    def check(self, splits: Sequence[str] = ("train", "val")) -> list[Report]:
        """What is wrong with the files of these splits; a good one has no `faults`."""
        for split in set(splits) - self.files.keys():
            official = split != "train" and self.paths[split] == self.paths["val"]
            self.files[split] = check_mpii(self.paths[split], self.images, self.ground_truth if official else None)
        return [self.files[split][0] for split in splits]

    def instances(self, split: str) -> list[Instance]:
        reports = self.check(["train", "val"] if split == "train" else [split])  # before training, both at once
        faulty = [str(report) for report in reports if report.faults]
        if faulty:
            raise DataError("\n".join(faulty))
        report, persons, truth = self.files[split]
        for note in report.notes:
            rank_zero_warn(note)
        numbers = {name: i + 1 for i, name in enumerate(dict.fromkeys(p["image"] for p in persons))}
        found = []
        for i, person in enumerate(persons):
            centre, side = np.array(person["center"], dtype=np.float64), 200.0 * person["scale"]
            if centre[0] != -1:
                centre[1] += 15 * person["scale"]  # so as not to cut off feet
            else:
                side /= 1.25  # without a position: the official code does not pad
            if truth is not None:
                keypoints, visible, norm = (part[i] for part in truth)
            else:
                keypoints = np.array(person["joints"], dtype=np.float64) - 1
                visible = 2.0 * (np.array(person["joints_vis"]) > 0)
                neck, top = 8, 9
                norm = np.linalg.norm(keypoints[top] - keypoints[neck]) if visible[[neck, top]].all() else np.nan
            found.append(
                Instance(
                    path=str(self.images / person["image"]),
                    image_id=numbers[person["image"]],
                    box=np.array([*(centre - 1 - side / 2), side, side]),
                    keypoints=keypoints,
                    visible=visible,
                    id=i,
                    area=0.53 * side**2,
                    norm=float(norm),
                )
            )
        return found

    def metric(self, split: str = "val") -> Metric:
        instances = self.datasets[split].instances  # type: ignore[attr-defined]
        lost = sum(bool(i.visible.any()) and not i.norm > 0 for i in instances)
        if lost:
            rank_zero_warn(f"{lost} of {len(instances)} people have no head size: PCKh leaves them out")
        return PCKh([i if i.norm > 0 else replace(i, visible=np.zeros(16)) for i in instances])


def main(args: Sequence[str] | None = None) -> int:
    """The command line; returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m datamodules.mpii", description="Is this copy of MPII complete?")
    parser.add_argument("command", choices=["check"])
    parser.add_argument("root", help="folder with images/ and annot/")
    reports = Mpii(parser.parse_args(args).root).check()
    print(*reports, sep="\n")
    return int(any(report.faults for report in reports))


if __name__ == "__main__":
    raise SystemExit(main())
