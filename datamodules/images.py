"""Pictures and videos to predict on: a folder, a pattern, files, a list of files, or a video."""

import glob
import os
from collections import Counter
from collections.abc import Sequence
from copy import copy
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from numpy.typing import NDArray
from PIL import ExifTags, Image

from datamodules.checks import Report
from datamodules.coco_file import read_json
from datamodules.fields import ANNOTATION, mistyped
from datamodules.keypoints import Instance, KeypointData, KeypointDataset, Keypoints
from datamodules.transforms import DataError, read_upright
from datamodules.video import Video

IMAGES = {".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
VIDEOS = {".avi", ".mkv", ".mov", ".mp4", ".webm"}


class Images(KeypointData):
    """Images or a video without labels, to predict on; `datasets["predict"]` is there after `setup("predict")`.

    Images are turned as their EXIF orientation says, and so boxes are of the upright image. An image's id is the number
    that its file name consists of, if all do and differ (000000000785.jpg), else its place from 1 in sorted order; of a
    video the frame's number from 0. A video has one worker at most.

    Args:
        path: a folder (with all below it), a pattern (*.jpg), an image, a text file of images one a line (starting from
            its folder or the working directory), several of these, or one video file.
        boxes: what to crop: JSON list of objects with `bbox` (x, y, w, h in pixels), `image_id` or `file_name`, and
            optionally `score` (else 1) and `category_id`, as COCO results are; None takes whole images.
        box_threshold: least score of those boxes.
        category_id: the category to take of boxes that have one; None takes all.
        **kwargs: see `KeypointData`.

    Raises:
        DataError: at `setup`, if there is nothing to predict on or the boxes do not fit; a broken image when reached.
    """

    def __init__(
        self,
        path: str | list[str],
        boxes: str | None = None,
        box_threshold: float = 0.0,
        category_id: int | None = 1,
        **kwargs: Any,
    ) -> None:
        super().__init__(Keypoints(names=[]), **kwargs)
        self.path, self.boxes, self.box_threshold, self.category_id = path, boxes, box_threshold, category_id
        self.files: dict[int, Path] = {}
        self.names: dict[int, str] = {}
        self.video: Video | None = None

    def setup(self, stage: str) -> None:
        if stage != "predict":
            raise DataError(f"{self.path}: Images has no labels, so there is nothing to {stage}; use it with predict")
        if "predict" not in self.datasets:
            self._find()
            self.datasets["predict"] = self.dataset(self.instances("predict"))

    def _find(self) -> None:
        paths = [self.path] if isinstance(self.path, str) else self.path
        files, self.video = found_in(self.path)
        if self.video is not None:
            self.workers = min(self.workers, 1)  # every worker would decode the whole: four are half as fast as one
            self.files = dict.fromkeys(range(len(self.video)), files[0])
            self.names = {i: f"frame_{i:06d}" for i in self.files}
            return
        folder = Path(paths[0]).expanduser()
        if len(paths) > 1 or not folder.is_dir():
            folder = Path(os.path.commonpath([file.parent for file in files]))
        self.files = dict(zip(ids_of(files), files, strict=True))
        self.names = {i: Path(os.path.relpath(file, folder)).as_posix() for i, file in self.files.items()}

    def image(self, image_id: int) -> NDArray[np.uint8]:
        """RGB `[H, W, 3]` of an image or a frame, the caller's own. Raises KeyError for an unknown id."""
        if self.video is not None and image_id in self.files:
            return self.video[image_id].copy()
        return read_upright(self.files[image_id])

    def name(self, image_id: int) -> str:  # type: ignore[override]  # Lightning's attribute of this name is unused
        """The file's name, relative to the folder given or common to all; frame_000012 of a video."""
        return self.names[image_id]

    def dataset(self, instances: Sequence[Instance], train: bool = False) -> KeypointDataset:
        # A copy reads for itself: with one capture, `image` would throw the loader back to the first frame.
        read = self.reader(read_upright) if self.video is None else copy(self.video).read
        return KeypointDataset(instances, self.facts, self.size, padding=self.padding, udp=self.udp, read=read)

    def instances(self, split: str) -> list[Instance]:
        if self.boxes is not None:
            return self._boxed(Path(self.boxes))
        rank_zero_info("no boxes are given: each whole picture is taken as one box, which fits pictures of one person")
        return [self._instance(i, [0, 0, *self._size(i)]) for i in self.files]

    def _size(self, image_id: int) -> tuple[int, int]:
        """(W, H) of an image or a frame."""
        if self.video is not None:
            return self.video.size
        try:
            return upright_size(self.files[image_id])
        except DataError:
            if not self.skip:
                raise
            return 1, 1  # it cannot be read either, and is skipped then

    def _instance(self, image_id: int, box: Sequence[float], **given: Any) -> Instance:
        path = str(self.files[image_id]) + (f"#{image_id}" if self.video else "")
        area, nothing = float(box[2] * box[3]), np.zeros((0, 2))
        return Instance(path, image_id, np.array(box, dtype=np.float64), nothing, nothing[:, 0], area=area, **given)

    def _boxed(self, path: Path) -> list[Instance]:
        items = read_json(path)
        if not isinstance(items, list) or not all(isinstance(item, dict) and "bbox" in item for item in items):
            raise DataError(f"{path}: a box file is a list of objects with bbox, score, and image_id or file_name")
        ids = {name: i for i, name in self.names.items()}
        bases = Counter(Path(name).name for name in ids)
        ids |= {Path(name).name: i for name, i in ids.items() if bases[Path(name).name] == 1}
        report, found, elsewhere = Report(path), [], []
        for number, item in enumerate(items):
            record = f"item {number}: {str(item)[:100]}"
            if wrong := mistyped(item, {"category_id": ANNOTATION["category_id"]}):
                report.add(f"boxes with a {wrong}", record)
                continue
            try:
                x, y, w, h, score = (float(v) for v in [*item["bbox"], item.get("score", 1.0)])
            except (TypeError, ValueError):
                x = y = w = h = score = float("nan")
            if not np.isfinite([x, y, w, h, score]).all() or w <= 0 or h <= 0:
                report.add("boxes that are not x, y, width, height (in pixels, with an area) and a score", record)
                continue
            category = item.get("category_id", self.category_id)
            if score < self.box_threshold or (self.category_id is not None and category != self.category_id):
                continue
            image_id = ids.get(str(item["file_name"])) if "file_name" in item else item.get("image_id")
            if "file_name" not in item and not isinstance(image_id, int):
                report.add("boxes without a file_name or a number as image_id", record)
                continue
            if image_id not in self.files:
                elsewhere.append(record)  # a detector's file of a whole data set fits a folder of some of its images
                continue
            category = 1 if category is None else category
            found.append(self._instance(image_id, [x, y, w, h], id=number, score=score, category_id=category))
        if report.faults:
            raise DataError(str(report))
        if elsewhere and not found:
            raise DataError(
                f"{path}: its boxes are of images that are not in {self.path} (first {elsewhere[0]}); "
                f"give the images they were made on"
            )
        if elsewhere:
            rank_zero_warn(f"{path}: {len(elsewhere)} boxes of images that are not in {self.path} are passed over")
        if not found:
            raise DataError(
                f"{path}: none of its {len(items)} boxes is left; lower box_threshold ({self.box_threshold}) or "
                f"change category_id ({self.category_id})"
            )
        return sorted(found, key=lambda instance: instance.image_id)  # a video is read in order


def upright_size(path: Path) -> tuple[int, int]:
    """(W, H) of an image as `read_upright` reads it, from its header where Pillow knows the format.

    Raises:
        DataError: if it cannot be read.
    """
    try:
        with Image.open(path) as image:
            turned = image.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8)
            return image.size[::-1] if turned else image.size
    except Exception:  # whatever is wrong, reading says it better
        height, width = read_upright(path).shape[:2]
        return width, height


def found_in(path: str | list[str]) -> tuple[list[Path], Video | None]:
    """The pictures, in sorted order, or the one video (its file, and itself) that `path` or paths stand for.

    Raises:
        DataError: if there is none, or a video among others.
    """
    files = sorted(
        {Path(os.path.abspath(file)) for p in ([path] if isinstance(path, str) else path) for file in files_of(p)}
    )
    if not files:
        raise DataError(f"{path}: no image found (of {', '.join(sorted(IMAGES))}); a video is given by itself")
    if not any(file.suffix.lower() in VIDEOS for file in files):
        return files, None
    if len(files) > 1:
        raise DataError(f"{path}: a video goes alone; predict on one after the other")
    return files, Video(files[0])


def ids_of(files: list[Path]) -> list[int]:
    """The numbers that the files' names consist of, if all do and differ (000000000785.jpg); else from 1."""
    numbers = [int(file.stem) for file in files if file.stem.isascii() and file.stem.isdecimal()]
    return numbers if len(set(numbers)) == len(files) else list(range(1, len(files) + 1))


def files_of(path: str) -> list[Path]:
    """The image files, or the one video, that `path` stands for."""
    place = Path(path).expanduser()
    if place.is_dir():
        return [p for p in place.rglob("*") if p.suffix.lower() in IMAGES and p.name[0] != "." and p.is_file()]
    if place.is_file() and place.suffix.lower() != ".txt":
        return [place]
    if place.is_file():
        lines = [line.strip() for line in place.read_text(errors="replace").splitlines() if line.strip()]
        listed = [next((p for p in (place.parent / line, Path(line)) if p.is_file()), None) for line in lines]
        missing = [line for line, file in zip(lines, listed, strict=True) if file is None]
        if missing:
            raise DataError(f"{path}: {len(missing)} of {len(lines)} images listed do not exist, first {missing[0]}")
        return [file for file in listed if file is not None]
    if glob.has_magic(path):
        return [p for p in map(Path, glob.glob(str(place), recursive=True)) if p.suffix.lower() in IMAGES]
    raise DataError(f"{path}: does not exist; give a folder, a pattern, an image, a .txt list of images or a video")
