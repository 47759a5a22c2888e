"""Labelled pictures in tar files, as WebDataset lays them out: for millions of files, which file systems are slow with.

`python -m datamodules.shards pack FOLDER OUT` makes shards of a folder a class, and `python -m datamodules.shards check
ROOT` reads every picture of some and counts the classes.
"""

import argparse
import glob
import os
import re
import shutil
import tarfile
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any, ClassVar
from uuid import uuid4

import numpy as np

from datamodules.image_folder import ImageFolder, look_at
from datamodules.shard_index import Samples, samples_of
from datamodules.tars import Shard, read_member
from datamodules.transforms import Array, DataError


class Shards(ImageFolder):
    """Labelled pictures in tar files: `KEY.jpg` (png, webp, ...) and `KEY.cls`, the class's number, for every KEY.

    Every sample is found by its place in its shard, so that all is as with a folder: the same exact shuffling for any
    number of processes, and the same going on amid an epoch; shards need neither be shuffled nor be of one size, nor as
    many as there are processes. At the first start the shards' headers are read, and an index is kept beside them, or,
    where that cannot be written, in ~/.cache/hrnet-lightning; a shard that has changed is read again.

    Nothing is streamed: shards are files, on a disk or a network's disk. An object store works where it is mounted
    (`gcsfuse`, `mount-s3`, `rclone mount --vfs-cache-mode full`), best with a cache on a local disk, for samples are
    read in random order, each by one request for its bytes; or copied to the machine beforehand (`aws s3 sync`).
    `decoded` keeps on a local disk what was read from a slow one, as much as there is room for.

    Args:
        root: folder that all other paths start from.
        train, val, test: the shards of a split: a path with `*`, `{000..146}` or `{a,b}`. None as test is val.
        classes: file of the classes' names, one a line, the first that of number 0.
        field: of `KEY.json` that holds the class's number, instead of `KEY.cls`.
        **kwargs: see `ImageFolder`.

    Attributes:
        num_classes, class_names: of `classes`, there as soon as the module is constructed.

    Raises:
        DataError: naming shards and members that are at fault: see `datamodules.tars` and `datamodules.shard_index`;
            if a split is missing, a label has no name or, in training, a name no picture.
    """

    read: ClassVar[Callable[..., Array]] = staticmethod(read_member)

    def __init__(
        self,
        root: str = "data/shards",
        train: str = "train-*.tar",
        val: str = "val-*.tar",
        test: str | None = None,
        classes: str = "classes.txt",
        field: str | None = None,
        **kwargs: Any,
    ) -> None:
        self.names, self.field = Path(root) / classes, field
        for path in (root, train, val, test or val):
            if "://" in path or path.startswith("pipe:"):
                raise DataError(f"{path}: nothing is streamed; mount the bucket, or copy the shards to this machine")
        self.patterns = {"train": train, "val": val, "test": test or val}
        self.samples: dict[str, Samples] = {}
        super().__init__(root, train, val, test, None, **kwargs)

    def classes(self) -> list[str]:
        """The classes' names; the label is the place."""
        try:
            names = [line.strip() for line in self.names.read_text().rstrip().splitlines()]
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{self.names}: cannot be read ({error}); give the classes' names, one a line") from None
        if len(names) < 2:
            raise DataError(f"{self.names}: {len(names)} class ({names}); to classify takes two at least")
        if "" in names or len(set(names)) < len(names):
            twice = sorted({name for name in names if names.count(name) > 1} - {""}) or ["an empty line"]
            raise DataError(f"{self.names}: {twice[:5]} where every line is a class's name, and each another")
        return names

    def prepare_data(self) -> None:
        """One process a machine makes the index, which the others then find."""
        stage = self.trainer.state.fn.value if self.trainer and self.trainer.state.fn else "fit"
        for split in {"fit": ["train", "val"], "validate": ["val"], "test": ["test"]}.get(stage, []):
            self.instances(split)

    def instances(self, split: str) -> Samples:
        if split not in self.samples:
            pattern = str(self.paths[split])
            shards = [Shard.at(path) for path in paths_of(self.root, self.patterns[split])]
            found = samples_of(pattern, shards, self.field)
            if len(wrong := np.flatnonzero(found.label >= self.num_classes)):
                first = found[int(wrong[0])]
                raise DataError(
                    f"{first.path}: class {first.label}, and {len(wrong) - 1} more that are none of the "
                    f"{self.num_classes} of {self.names}, 0 to {self.num_classes - 1}; complete it, or mend the labels"
                )
            count = np.bincount(found.label, minlength=self.num_classes)
            if split == "train" and len(empty := np.flatnonzero(count == 0)):
                names = ", ".join(self.class_names[i] for i in empty[:10])
                raise DataError(
                    f"{pattern}: {len(empty)} classes of {self.names} without any picture: {names}; are shards missing?"
                )
            self.samples[split] = found
        return self.samples[split]


def paths_of(root: Path, pattern: str) -> list[str]:
    """The files that a pattern stands for: `*`, `?` and `[ab]` those there are, in sorted order; braces all they name.

    Raises:
        DataError: if there is none, or one is named twice.
    """
    found: list[str] = []
    for path in expanded(pattern):
        some = sorted(glob.glob(path, root_dir=root, recursive=True)) if glob.has_magic(path) else [path]
        if not some:
            raise DataError(f"{root / path}: no such shard; check the folder and the pattern")
        found += some
    if len(set(found)) < len(found):
        twice = next(path for path in found if found.count(path) > 1)
        raise DataError(f"{root / pattern}: names {twice} twice; take each shard once")
    return [str(root / path) for path in found]


def expanded(pattern: str) -> Iterator[str]:
    """`{a,b}` and `{08..11}` written out, as a shell does.

    Raises:
        DataError: if braces hold neither, or further braces.
    """
    braces = re.search(r"\{([^{}]*)\}", pattern)
    if braces is None:
        yield pattern
        return
    inner, span = braces[1], re.fullmatch(r"(\d+)\.\.(\d+)", braces[1])
    faulty = int(span[1]) > int(span[2]) if span else "," not in inner
    if faulty or "{" in pattern[: braces.start()]:
        raise DataError(f"{pattern}: braces hold a range, {{000..146}}, or names, {{a,b}}")
    width = len(span[1]) if span else 0
    for part in (f"{i:0{width}d}" for i in range(int(span[1]), int(span[2]) + 1)) if span else inner.split(","):
        yield from expanded(pattern[: braces.start()] + part + pattern[braces.end() :])


def pack(folder: str, out: str, per_shard: int = 1000) -> None:
    """Write shards of an `ImageFolder`'s train/, val/ and, if there is one, test/; and classes.txt.

    Files are copied as they are, in the folder's order, so that a sample keeps its number; the same files make the same
    bytes. `out` appears when it is complete.

    Raises:
        DataError: if the folder is at fault, or there is something in `out` already.
    """
    if per_shard < 1:
        raise DataError(f"{per_shard} pictures a shard; take 1 at least")
    test = "test" if (Path(folder) / "test").is_dir() else None
    data, place = ImageFolder(folder, test=test, workers=0), Path(out).absolute()
    if place.exists() and (not place.is_dir() or any(place.iterdir())):
        raise DataError(f"{out}: there is something already; name a new folder")
    part = place.with_name(f"{place.name}.{uuid4().hex}.part")
    part.mkdir(parents=True)
    try:
        for split in ("train", "val", "test")[: 3 if test else 2]:
            instances = data.instances(split)
            for number, start in enumerate(range(0, len(instances), per_shard)):
                with tarfile.open(part / f"{split}-{number:06d}.tar", "w", format=tarfile.PAX_FORMAT) as tar:
                    for instance in instances[start : start + per_shard]:
                        path = Path(str(instance.path))
                        key = f"{data.class_names[instance.label]}/{instance.image_id:08d}"
                        for ending, content in (
                            (path.suffix.lower(), path.read_bytes()),
                            (".cls", str(instance.label).encode()),
                        ):
                            header = tarfile.TarInfo(key + ending)
                            header.size = len(content)
                            tar.addfile(header, BytesIO(content))
            print(f"{split}: {len(instances)} pictures in {-(-len(instances) // per_shard)} shards")
        (part / "classes.txt").write_text("".join(f"{name}\n" for name in data.class_names))
        os.replace(part, place)
        print(f"{out} is complete; python -m datamodules.shards check {out} reads every picture")
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


def main() -> None:
    """`pack`: make shards of a folder a class. `check`: read every picture of some, and count the classes."""
    parser = argparse.ArgumentParser(prog="python -m datamodules.shards", description=main.__doc__)
    commands = parser.add_subparsers(required=True, dest="command")
    packing = commands.add_parser("pack")
    packing.add_argument("folder", help="folder with a folder of pictures a class in train/ and val/")
    packing.add_argument("out", help="new folder for the shards")
    packing.add_argument("--per_shard", type=int, default=1000, help="pictures a shard (default: 1000)")
    check = commands.add_parser("check")
    check.add_argument("root", help="folder of the shards")
    for name, default in (("train", "train-*.tar"), ("val", "val-*.tar"), ("classes", "classes.txt")):
        check.add_argument(f"--{name}", default=default, help=f"see Shards (default: {default})")
    check.add_argument("--test", help="a third split")
    check.add_argument("--field", help="of KEY.json that holds the class's number (default: KEY.cls)")
    args = vars(parser.parse_args())
    try:
        if args.pop("command") == "pack":
            pack(**args)
        else:
            look_at(Shards(**args, workers=0), ("train", "val", "test") if args["test"] else ("train", "val"))
    except (DataError, OSError) as error:
        raise SystemExit(f"{type(error).__name__}: {error}") from None


if __name__ == "__main__":
    main()
