"""Any folder of images and masks: one mask a picture, with a number or a colour for every class.

`python -m datamodules.mask_folder check ROOT [--classes ...]` reads everything and says what is wrong.
"""

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch.utils.data import DataLoader

from datamodules.base import DataModule
from datamodules.fields import read_text
from datamodules.images import IMAGES, found_in
from datamodules.mask_files import IGNORE, dims, read_mask
from datamodules.masks import MaskData, MaskDataset, Masked, collate
from datamodules.transforms import Array, DataError, read_upright

MASKS = {".png", ".bmp", ".tif", ".tiff", ".gif"}


class MaskFolder(MaskData):
    """Images and masks of the same names, in a folder a split: `images/train/a.jpg` and `masks/train/a.png`.

    Args:
        root: folder that all other paths start from.
        classes: names in the order of the masks' values; a file with a name a line; or a mapping from names to what the
            masks hold: a number, a list of numbers, or a colour "#rrggbb" (or a list of them).
        ignore: numbers or colours that do not count, such as 255.
        train, val, test: names of the splits' folders, or of `.txt` files with an image a line; None as test is val.
        images, masks: folders, `{}` stands for the split.
        suffix: what a mask's name has behind the image's, such as "_mask".
        **kwargs: see `MaskData`.

    Raises:
        DataError: if folders are missing, an image has no mask or the reverse.
    """

    def __init__(
        self,
        root: str = "data/masks",
        classes: str | list[str] | dict[str, int | str | list[int | str]] = "classes.txt",
        ignore: list[int | str] | None = None,
        train: str = "train",
        val: str = "val",
        test: str | None = None,
        images: str = "images/{}",
        masks: str = "masks/{}",
        suffix: str = "",
        **kwargs: Any,
    ) -> None:
        self.root, self.images, self.masks, self.suffix = Path(root), images, masks, suffix
        self.splits = {"train": train, "val": val, "test": test or val}
        try:
            names, values, palette = meaning(self.listed(classes), ignore or ())
            kwargs.setdefault("palette", palette)
            super().__init__(names, values, **kwargs)
        except DataError as error:  # of names and values, which do not know where they are from
            text = str(error)
            raise DataError(text if root in text else f"{self.root}: {text}") from None

    def listed(self, classes: str | list[str] | dict[str, Any]) -> list[str] | Mapping[str, Any]:
        if not isinstance(classes, str):
            return classes
        path = self.root / classes
        if not path.is_file():
            raise DataError(
                f"{path}: no such file; write the classes' names there, one a line in the order of the masks' values, "
                f"or give them by `classes: [sky, road, ...]`"
            )
        names = [line.strip() for line in read_text(path).rstrip().splitlines()]
        if "" in names:
            raise DataError(f"{path}: line {names.index('') + 1} is empty, so that the names behind it would shift")
        return names

    def place(self, split: str) -> str:
        return str(self.folders(split)[0])

    def folders(self, split: str) -> tuple[Path, Path]:
        name = "" if self.splits[split].endswith(".txt") else self.splits[split]
        return self.root / self.images.format(name), self.root / self.masks.format(name)

    def setup(self, stage: str) -> None:
        if stage == "test" and self.splits["test"] == self.splits["val"]:
            rank_zero_info(f"no test split is named: these are the numbers of {self.splits['val']}")
        super().setup(stage)

    def pairs(self, split: str) -> list[tuple[Path, Path]]:
        images, masks = self.folders(split)
        for folder in (images, masks):
            if not folder.is_dir():
                raise DataError(f"{folder}: no such folder; `images` and `masks` say where they are ({{}} = the split)")
        shown, marked = below(images, IMAGES), below(masks, MASKS)
        if images == masks:  # side by side, told apart by the suffix, or by what cannot be a mask
            suffix = self.suffix
            shown = [p for p in shown if (not p.stem.endswith(suffix) if suffix else p.suffix.lower() not in MASKS)]
        pictures = named(shown, images, "")
        found = named([p for p in marked if p.stem.endswith(self.suffix)], masks, self.suffix)
        if self.splits[split].endswith(".txt"):
            path = self.root / self.splits[split]
            if not path.is_file():
                raise DataError(f"{path}: no such list of images; write one a line, or name the split's folder instead")
            lines = [Path(line.strip()) for line in read_text(path).splitlines() if line.strip()]
            wanted = {(p.with_suffix("") if p.suffix.lower() in IMAGES else p).as_posix() for p in lines}
            if missing := sorted(wanted - pictures.keys() - found.keys()):
                raise DataError(f"{path}: {len(missing)} of its images are not in {images}, first {missing[:3]}")
            pictures = {n: p for n, p in pictures.items() if n in wanted}
            found = {n: p for n, p in found.items() if n in wanted}
        lone, spare = sorted(pictures.keys() - found.keys()), sorted(found.keys() - pictures.keys())
        if lone or spare:
            called = f"its image and {self.suffix}" if self.suffix else "its image"
            raise DataError(
                f"{images}: {len(lone)} images without a mask in {masks} (first {lone[:3]}), {len(spare)} masks "
                f"without an image (first {spare[:3]}); a mask is called as {called}, and is {'/'.join(sorted(MASKS))}"
            )
        return [(pictures[name], found[name]) for name in sorted(pictures)]


class MaskPhotos(DataModule):
    """Pictures or a video without masks, to predict on.

    Args:
        path: a folder, a pattern, a picture, a `.txt` list of them, several of these, or one video.
        eval_size: see `MaskDataset`.
        **kwargs: see `DataModule`.
    """

    def __init__(
        self, path: str | list[str], eval_size: int | tuple[int, int] | None = None, batch_size: int = 1, **kwargs: Any
    ) -> None:
        super().__init__(batch_size, **kwargs)
        self.path, self.eval_size = path, eval_size

    def setup(self, stage: str) -> None:
        if stage != "predict":
            raise DataError(f"{self.path}: no masks, so there is nothing to {stage}; use it with predict")
        files, video = found_in(self.path)
        if video is not None:
            self.workers = min(self.workers, 1)  # every worker would decode the whole
            found = [Masked(f"{files[0]}#{i}", i) for i in range(len(video))]
        else:
            found = [Masked(str(file), i) for i, file in enumerate(files)]
        read = self.reader(read_upright) if video is None else video.read
        self.datasets["predict"] = MaskDataset(found, np.zeros(256), (1, 1), eval_size=self.eval_size, read=read)

    def loader(self, split: str, **options: Any) -> DataLoader:
        return super().loader(split, collate_fn=collate, **options)


def named(files: list[Path], folder: Path, suffix: str) -> dict[str, Path]:
    """Files by their names below `folder`, without ending and suffix.

    Raises:
        DataError: if two are called the same.
    """
    found: dict[str, Path] = {}
    for path in files:
        name = path.relative_to(folder).with_suffix("").as_posix().removesuffix(suffix)
        if name in found:
            raise DataError(f"{path} and {found[name].name} have one name; which is meant? Remove one")
        found[name] = path
    return found


def below(folder: Path, kinds: set[str]) -> list[Path]:
    return [p for p in folder.rglob("*") if p.suffix.lower() in kinds and p.name[0] != "."]


def meaning(
    classes: Sequence[str] | Mapping[str, Any], ignore: Sequence[int | str] = ()
) -> tuple[list[str], Array | dict[tuple[int, int, int], int], list[list[int]] | None]:
    """Names, what the masks' values stand for, and the palette if colours are given.

    Raises:
        DataError: if a value stands for two classes, or numbers and colours are mixed.
    """
    names = list(classes)
    given: list[Any] = list(classes.values()) if isinstance(classes, Mapping) else list(range(len(names)))
    stored: dict[int, list[Any]] = {i: v if isinstance(v, list) else [v] for i, v in enumerate(given)}
    if len(names) < 2:
        raise DataError(f"classes are {names}: to segment takes two at least (background counts as one)")
    stored = {i: [v.lower() if isinstance(v, str) else v for v in values] for i, values in stored.items()}
    left_out = [v.lower() if isinstance(v, str) else v for v in ignore]
    kinds = {isinstance(v, str) for values in [*stored.values(), left_out] for v in values}
    if len(kinds) > 1:
        raise DataError("classes and ignore mix numbers with colours; give either (colours are '#rrggbb')")
    table = [(v, i) for i, values in stored.items() for v in values]
    twice = {v for v, _ in table if sum(v == w for w, _ in table) > 1 or v in left_out}
    if twice:
        raise DataError(
            f"{sorted(twice)} stand for two classes, or for a class and for what is ignored (colours are '#rrggbb')"
        )
    if kinds == {True}:
        colours = {rgb(v): i for v, i in table} | {rgb(str(v)): IGNORE for v in left_out}
        return names, colours, [list(rgb(stored[i][0])) for i in range(len(names))]
    values = np.full(256, -1, np.int16)
    for v, i in [*table, *((v, IGNORE) for v in left_out)]:
        if not 0 <= int(v) <= 255:
            raise DataError(f"{v}: masks hold 0 to 255")
        values[int(v)] = i
    return names, values, None


def rgb(colour: str) -> tuple[int, int, int]:
    """ "#804080" as three numbers."""
    text = colour.removeprefix("#")
    try:
        assert len(text) == 6
        return int(text[:2], 16), int(text[2:4], 16), int(text[4:], 16)
    except (ValueError, AssertionError):
        raise DataError(f"{colour!r} is no colour; write '#rrggbb'") from None


def report(data: MaskData, splits: Sequence[str]) -> list[str]:
    """Every fault of a data set's files, and its class frequencies printed."""
    faults = []
    for split in splits:
        try:
            pairs = data.pairs(split)
        except DataError as error:
            faults.append(str(error))
            continue
        counts, before = np.zeros(256, np.int64), len(faults)
        for image, mask in pairs:
            try:
                width, height = dims(image)
                counts += np.bincount(read_mask(str(mask), data.values, (height, width)).ravel(), minlength=256)
            except DataError as error:
                faults.append(str(error))
        note = f"; {bad} of them are faulty, and not counted" if (bad := len(faults) - before) else ""
        print(f"{split}: {len(pairs)} images, {counts[IGNORE] / max(1, counts.sum()):.1%} of the pixels ignored{note}")
        if not pairs:
            faults.append(f"{data.place(split)}: the {split} split is empty")
        elif not bad and not counts[:IGNORE].any():
            faults.append(f"{data.place(split)}: not one pixel of the {split} split is of a class; what do masks hold?")
        share = counts[: data.num_classes] / max(1, counts[: data.num_classes].sum())
        print("  " + ", ".join(f"{n} {s:.2%}" for n, s in zip(data.class_names, share, strict=True)))
        absent = [n for n, s in zip(data.class_names, share, strict=True) if s == 0]
        if absent and pairs:
            print(f"  never seen: {', '.join(absent)}")
    return faults


def finish(faults: list[str]) -> None:
    """Exit with what was found."""
    if faults:
        shown = "\n".join(f"- {fault}" for fault in faults[:20])
        raise SystemExit(f"{len(faults)} faults\n{shown}" + ("\n..." if len(faults) > 20 else ""))
    print("no fault")


def need(folders: Sequence[Path], source: str) -> None:
    """Refuse to go on without folders.

    Raises:
        DataError: naming all that are missing, and where to get what they hold.
    """
    missing = [str(folder) for folder in folders if not folder.is_dir()]
    if missing:
        raise DataError(f"{', '.join(missing)}: no such folder; it comes with {source}")


def check(kind: Callable[[str], MaskData], args: Sequence[str] | None = None) -> None:
    """The command line of a data set in its own layout, whose class is called with ROOT: exit with all its faults."""
    parser = argparse.ArgumentParser(description="Read every image's header and every mask, and say what is wrong.")
    parser.add_argument("command", choices=["check"])
    parser.add_argument("root")
    try:
        data = kind(parser.parse_args(args).root)
    except DataError as error:
        raise SystemExit(str(error)) from None
    finish(report(data, ["train", "val"]))


def main() -> None:
    """Read every image's header and every mask of a folder, and say what is wrong."""
    parser = argparse.ArgumentParser(prog="python -m datamodules.mask_folder", description=main.__doc__)
    parser.add_argument("command", choices=["check"])
    parser.add_argument("root")
    parser.add_argument("--classes", help="a file below ROOT, or JSON: a list of names, or a mapping", default=None)
    parser.add_argument("--ignore", help="a number, or a JSON list of numbers or colours", default="[]")
    for name in ("train", "val", "test", "images", "masks", "suffix"):
        parser.add_argument(f"--{name}")
    args = parser.parse_args()
    given = {k: v for k, v in vars(args).items() if v is not None and k not in ("command", "root", "ignore")}
    if str(given.get("classes", "")).startswith(("[", "{")):
        given["classes"] = json.loads(given["classes"])
    ignored = json.loads(args.ignore)
    try:
        data = MaskFolder(args.root, ignore=ignored if isinstance(ignored, list) else [ignored], **given)
    except DataError as error:
        raise SystemExit(str(error)) from None
    finish(report(data, ["train", "val"] + (["test"] if args.test else [])))


if __name__ == "__main__":
    main()
