"""Boxes and polygons in YOLO's text files: a data.yaml, images/ and labels/.

`python -m datamodules.yolo check data.yaml`
"""

import argparse
from pathlib import Path
from typing import Any, Literal

import numpy as np
import yaml
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from datamodules.box_checks import check_boxed, tell
from datamodules.box_data import BoxData
from datamodules.boxes import Boxed
from datamodules.checks import Report
from datamodules.fields import read_text
from datamodules.images import files_of, upright_size
from datamodules.transforms import DataError, read_upright


class Yolo(BoxData):
    """Labels of the Ultralytics tools and what exports to them.

    A label file has a line an object: its class, then x and y of its centre, width and height, or the corners of its
    outline; all as fractions of the image. It lies beside its image, or in `labels` where the path has `images`. An
    image without one shows nothing. Images are turned as their EXIF orientation says, as those tools do.

    Args:
        root: the data.yaml (`path`, `train`, `val`, `test`, `names`), or its folder.
        faulty: "error" refuses faulty lines, all at once; "drop" leaves them out and says how many.
        **kwargs: see `BoxData`; `masks` wants outlines.

    Raises:
        DataError: if a file is missing or faulty, at construction or `setup`.
    """

    read = staticmethod(read_upright)

    def __init__(self, root: str = "data/data.yaml", faulty: Literal["error", "drop"] = "error", **kwargs: Any) -> None:
        self.file = Path(root) / "data.yaml" if Path(root).is_dir() else Path(root)
        self.faulty = faulty
        try:
            self.content = yaml.safe_load(read_text(self.file))
        except (ValueError, RecursionError, yaml.YAMLError) as error:  # an impossible date is a ValueError
            raise DataError(f"{self.file}: not a readable data.yaml ({error})") from None
        names = self.content.get("names") if isinstance(self.content, dict) else None
        if isinstance(names, dict):
            if {*names} != {*range(len(names))}:
                raise DataError(f"{self.file}: `names` must count from 0 without gaps, got {[*names]}")
            names = [names[i] for i in range(len(names))]
        if not names or not isinstance(names, list) or not all(isinstance(name, str | int) for name in names):
            raise DataError(f"{self.file}: no `names`: a list of the classes in the order of their numbers")
        super().__init__([str(name) for name in names], **kwargs)

    def images(self, split: str) -> list[Path]:
        """The images of a split."""
        given = self.content.get(split) or (self.content.get("val") if split == "test" else None)
        if not given:
            raise DataError(f"{self.file}: says nothing of {split}")
        base, parts = self.content.get("path") or "", given if isinstance(given, list) else [given]
        if wrong := [place for place in (base, *parts) if not isinstance(place, str) or "\0" in place]:
            raise DataError(f"{self.file}: `path` and {split} name folders or files, not {wrong[0]!r:.40}")
        base, files = self.file.parent / base, []
        for part in parts:
            # Exports disagree on what "../train/images" starts from; what is there counts.
            places = [base / part, self.file.parent / part, self.file.parent / str(part).removeprefix("../")]
            place = next((p for p in places if p.exists()), None)
            if place is None:
                raise DataError(f"{self.file}: {split} names {part}, which is none of {', '.join(map(str, places))}")
            files += files_of(str(place))
        return sorted(files)

    def instances(self, split: str) -> list[Boxed]:
        report, found, bare = Report(self.file), [], []
        for number, image in enumerate(self.images(split), 1):
            if not label_file(image).is_file():
                bare.append(str(label_file(image)))
            width, height = upright_size(image)
            boxes, labels, outlines = [], [], []
            for label, points in self.lines(label_file(image), report):
                scaled = points.reshape(-1, 2) * (width, height)
                corners = (scaled[0] - scaled[1] / 2, scaled[0] + scaled[1] / 2)
                if len(scaled) > 2:
                    corners = scaled.min(0), scaled.max(0)
                boxes.append(np.concatenate(corners))
                labels.append(label)
                outlines.append([scaled.ravel()] if len(scaled) > 2 else None)
            if self.masks and None in outlines:
                report.add("boxes without an outline: masks cannot be learned (`masks: false`)", str(label_file(image)))
            placed = np.array(boxes, np.float64).reshape(-1, 4)
            crowd = np.zeros(len(boxes), bool)
            found.append(Boxed(str(image), number, width, height, placed, np.array(labels, np.int64), crowd, outlines))
        if bare:
            rank_zero_warn(
                f"{self.file}: {len(bare)} of {len(found)} images of {split} have no label file, and so show nothing "
                f"(first missing {bare[0]})"
            )
        return check_boxed(found, report, self.faulty)

    def lines(self, file: Path, report: Report) -> list[tuple[int, Any]]:
        """Class and fractions of every sound line of a label file."""
        found = []
        for number, line in enumerate(read_text(file).splitlines() if file.is_file() else [], 1):
            if not line.strip():
                continue
            where = f"{file}:{number}"
            try:
                label, *numbers = (float(x) for x in line.split())
            except ValueError:
                report.add("lines that are not numbers", where)
                continue
            points = np.array(numbers)
            if len(numbers) != 4 and (len(numbers) < 6 or len(numbers) % 2):
                report.add("lines that are not a class and 4 numbers, or a class and corners", where)
            elif not label.is_integer() or not 0 <= label < self.num_classes:
                report.add(f"classes other than 0 to {self.num_classes - 1}", f"{where} ({label:g})")
            elif not (np.isfinite(points).all() and (points >= -0.01).all() and (points <= 1.01).all()):
                report.add("numbers that are no fractions of the image (pixels?)", where)
            else:
                found.append((int(label), points))
        return found


def label_file(image: Path) -> Path:
    """Where the labels of an image are: beside it, or in `labels` instead of the last `images` of its path."""
    beside = image.with_suffix(".txt")
    parts = list(beside.parts)
    if "images" in parts[:-1] and not beside.is_file():
        parts[len(parts) - 2 - parts[-2::-1].index("images")] = "labels"
    return Path(*parts)


def main() -> None:
    """`check`: report every fault of a data.yaml and its labels, and count the classes."""
    parser = argparse.ArgumentParser(prog="python -m datamodules.yolo", description=main.__doc__)
    check = parser.add_subparsers(required=True).add_parser("check")
    check.add_argument("root", help="data.yaml, or its folder")
    check.add_argument("--masks", action="store_true", help="that all have outlines")
    args = parser.parse_args()
    tell(lambda: Yolo(args.root, masks=args.masks))


if __name__ == "__main__":
    main()
