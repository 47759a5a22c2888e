"""Boxes in PASCAL VOC's XML, of VOC itself or of any labelling tool that writes it.

`python -m datamodules.pascal_voc check ROOT --train VOC2012/train --val VOC2012/val`
"""

import argparse
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from datamodules.box_checks import check_boxed, tell
from datamodules.box_data import BoxData
from datamodules.boxes import Boxed
from datamodules.checks import Report
from datamodules.fields import read_text
from datamodules.images import IMAGES
from datamodules.transforms import DataError


class PascalVoc(BoxData):
    """VOC boxes. Objects marked `difficult` are no part of training, and in evaluation nothing found there is wrong.

    Args:
        root: folder that the splits start from; VOCdevkit for VOC itself.
        train, val, test: each a list of "folder/list" (root/folder/ImageSets/Main/list.txt, with Annotations and
            JPEGImages beside ImageSets), or of folders that hold XML files anywhere below; test None is val.
        classes: names in the order of their labels; None takes all that occur, in alphabetical order.
        faulty: "error" refuses faulty boxes, all at once; "drop" leaves them out and says how many.
        **kwargs: see `BoxData`.

    Raises:
        DataError: if a file is missing or faulty, at construction or `setup`.
    """

    def __init__(
        self,
        root: str = "data/VOCdevkit",
        train: Sequence[str] = ("VOC2012/train",),
        val: Sequence[str] = ("VOC2012/val",),
        test: Sequence[str] | None = None,
        classes: list[str] | None = None,
        faulty: Literal["error", "drop"] = "error",
        **kwargs: Any,
    ) -> None:
        self.root, self.faulty = Path(root), faulty
        self.parts = {"train": list(train), "val": list(val), "test": list(test or val)}
        self.files = {split: [f for part in parts for f in self.listed(part)] for split, parts in self.parts.items()}
        if classes is None:
            classes = sorted(
                {name for files in self.files.values() for f in files for name, *_ in read_xml(f)["objects"]}
            )
        if not classes:
            raise DataError(f"{root}: no object in any file of {self.parts}")
        super().__init__(classes, **kwargs)
        if self.masks:
            raise DataError(f"{root}: VOC's XML files hold boxes alone; set data.masks to false")

    def listed(self, part: str) -> list[Path]:
        """The XML files of a part of a split."""
        folder, _, name = part.rpartition("/")
        place = self.root / folder / "ImageSets" / "Main" / f"{name}.txt"
        if place.is_file():
            stems = [line.split()[0] for line in read_text(place).splitlines() if line.strip()]
            files = [self.root / folder / "Annotations" / f"{stem}.xml" for stem in stems]
            if missing := [f for f in files if not f.is_file()]:
                raise DataError(
                    f"{place}: {len(missing)} of {len(files)} files it lists do not exist, first {missing[0]}"
                )
        else:
            files = sorted((self.root / part).rglob("*.xml"))
        if not files:
            raise DataError(
                f"{place} is no list, and there is no XML file below {self.root / part}: check root and splits"
            )
        return files

    def instances(self, split: str) -> list[Boxed]:
        report, found = Report(self.root), []
        label = {name: i for i, name in enumerate(self.class_names)}
        for number, file in enumerate(self.files[split], 1):
            content = read_xml(file)
            known = [o for o in content["objects"] if o[0] in label]
            for name in sorted({o[0] for o in content["objects"]} - set(label)):
                report.add(f"classes that are not in `classes` ({', '.join(self.class_names)})", f"{name} in {file}")
            # VOC counts from 1, and means the last pixel itself.
            boxes = np.array([o[1] for o in known], np.float64).reshape(-1, 4) - (1, 1, 0, 0)
            found.append(
                Boxed(
                    str(image_of(file, content["filename"])),
                    number,
                    content["size"][0],
                    content["size"][1],
                    boxes,
                    np.array([label[o[0]] for o in known], np.int64),
                    np.array([o[2] for o in known], bool),
                )
            )
        return check_boxed(found, report, self.faulty)


def read_xml(path: Path) -> dict[str, Any]:
    """`filename`, `size` (W, H; 0 where not given) and `objects`: name, (xmin, ymin, xmax, ymax), difficult.

    Raises:
        DataError: if it is no such file.
    """
    try:
        tree = ET.parse(path).getroot()
        objects = [
            (
                str(node.findtext("name")).strip(),
                [float(node.findtext(f"bndbox/{side}", "nan")) for side in ("xmin", "ymin", "xmax", "ymax")],
                node.findtext("difficult", "0").strip() == "1",
            )
            for node in tree.iter("object")
        ]
        size = [int(float(tree.findtext(f"size/{side}") or 0)) for side in ("width", "height")]
    except (ET.ParseError, ValueError, OSError) as error:
        raise DataError(f"{path}: not a VOC annotation ({error})") from None
    if any(name in ("", "None") for name, *_ in objects):
        raise DataError(f"{path}: an object without a name")
    return {"filename": tree.findtext("filename") or "", "size": size, "objects": objects}


def image_of(file: Path, name: str) -> Path:
    """The picture that an XML file is about: of its own name, or the one it names, beside it or in a sister folder.

    Raises:
        DataError: if there is none.
    """
    folders = [file.parent, *(file.parent.parent / f for f in ("JPEGImages", "images", "Images"))]
    for folder in folders:
        for candidate in (*(folder / (file.stem + end) for end in (".jpg", *sorted(IMAGES))), folder / name):
            if candidate.is_file():
                return candidate
    raise DataError(f"{file}: its picture ({name or file.stem}) is in none of {', '.join(map(str, folders))}")


def main() -> None:
    """`check`: report every fault of VOC boxes, and count the classes."""
    parser = argparse.ArgumentParser(prog="python -m datamodules.pascal_voc", description=main.__doc__)
    check = parser.add_subparsers(required=True).add_parser("check")
    check.add_argument("root")
    check.add_argument("--train", nargs="+", default=["VOC2012/train"])
    check.add_argument("--val", nargs="+", default=["VOC2012/val"])
    args = parser.parse_args()
    tell(lambda: PascalVoc(args.root, args.train, args.val))


if __name__ == "__main__":
    main()
