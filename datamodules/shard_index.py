"""Which samples are in shards: found once, and kept in a file for later runs.

A sample is a picture and its label, two members of one key: `n01/dog_7.jpg` and `n01/dog_7.cls`. As in WebDataset the
key ends at the first dot after the last slash.
"""

import json
import os
import zipfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from datamodules.checks import Report
from datamodules.image_folder import Labelled
from datamodules.images import IMAGES
from datamodules.tars import Member, Shard, files_in
from datamodules.transforms import Array, DataError

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "hrnet-lightning"
"""Where indices go whose shards lie where nothing can be written."""

PICTURES = {ending[1:] for ending in IMAGES}
VERSION = 1
"""To be raised when indices change."""

Piece = dict[str, Array]
"""Of the samples of one shard in its order. int64 `[N]`: offset, size, label; length: of names. names: uint8, UTF-8."""

NUMBERS = ("offset", "size", "label", "length")


class Samples(Sequence[Labelled]):
    """Labelled pictures in shards, each made when it is asked for: millions take no more than their numbers and names.

    Args:
        shards: in order. pieces: of each.
    """

    def __init__(self, shards: Sequence[Shard], pieces: Sequence[Piece]) -> None:
        self.shards = list(shards)
        self.first = np.cumsum([0] + [len(piece["label"]) for piece in pieces])
        columns = {key: np.concatenate([piece[key] for piece in pieces]) for key in NUMBERS}
        self.offset, self.size, self.label = (columns[key] for key in NUMBERS[:3])
        self.ends = np.cumsum(np.concatenate([[0], columns["length"]]))
        self.names = b"".join(piece["names"].tobytes() for piece in pieces)

    def __len__(self) -> int:
        return len(self.label)

    def __getitem__(self, index: int) -> Labelled:  # type: ignore[override]  # no slices
        index = range(len(self))[index]
        shard = self.shards[int(np.searchsorted(self.first, index, "right")) - 1]
        name = self.names[self.ends[index] : self.ends[index + 1]].decode()
        member = Member(shard, name, int(self.offset[index]), int(self.size[index]))
        return Labelled(member, index, int(self.label[index]))


def samples_of(pattern: str, shards: Sequence[Shard], field: str | None) -> Samples:
    """What is in these shards, from their index or, as far as there is none or they have changed, from their headers.

    Args:
        pattern: that the shards are of, as named in messages. field: see `Shards`.

    Raises:
        DataError: naming every shard and member at fault.
    """
    folder = os.path.abspath(os.path.dirname(shards[0].path))
    own = os.path.basename(pattern), field  # so that the folder can be moved with its index
    places = [Path(folder) / f"index-{key_of(*own)}.npz", CACHE / f"index-{key_of(*own, folder)}.npz"]
    kept = load(places[1]) | load(places[0])
    keys = [(os.path.relpath(shard.path, folder), shard.size, shard.time) for shard in shards]
    new = [shard for key, shard in zip(keys, shards, strict=True) if key not in kept]
    report = Report(Path(pattern))
    if new:
        rank_zero_info(f"{pattern}: the headers of {len(new)} shards are read, once")
    with ThreadPoolExecutor(8) as pool:  # a network's disk takes its time for each
        looked = dict(zip(new, pool.map(partial(look, field=field), new), strict=True))
    for _, faults, _ in looked.values():
        for fault, record in faults:
            report.add(fault, record)
    if report.faults:
        raise DataError(str(report))
    if others := [name for _, _, passed in looked.values() for name in passed]:
        rank_zero_warn(f"{pattern}: {len(others)} members that are no pictures are passed over, first {others[0]}")
    pieces = [kept[key] if key in kept else looked[shard][0] for key, shard in zip(keys, shards, strict=True)]
    if new:
        save(places, keys, pieces)
    return Samples(shards, pieces)


def key_of(*parts: str | None) -> str:
    """Of an index's file name."""
    return blake2b(json.dumps([VERSION, *parts]).encode(), digest_size=8).hexdigest()


def look(shard: Shard, field: str | None) -> tuple[Piece, list[tuple[str, str]], list[str]]:
    """The samples in a shard; faults, each with the member that has it; and members that are of no sample."""
    ending = "cls" if field is None else "json"
    pictures, labels = dict[str, tuple[str, int, int]](), dict[str, tuple[str, int]]()
    faults, others = list[tuple[str, str]](), list[str]()
    try:
        for name, offset, size, start in files_in(shard):
            base = name.rpartition("/")[2].partition(".")
            key, kind = name[: len(name) - len(base[2])], base[2].lower()
            found: dict[str, Any] = pictures if kind in PICTURES else labels
            if not base[0] or (kind not in PICTURES and kind != ending):
                if kind not in ("cls", "json"):
                    others.append(f"{shard.path}#{name}")
            elif key in found:
                fault = f"keys twice in one shard: which picture has which {ending}? Give each sample a key of its own"
                faults.append((fault, f"{shard.path}#{name} and {found[key][0]}"))
            elif kind in PICTURES:
                pictures[key] = name, offset, size
            else:
                content = start if size <= len(start) else Member(shard, name, offset, size).read()
                try:
                    labels[key] = name, class_number(content, field)
                except ValueError as error:
                    labels[key] = name, -1
                    fault = f"labels that are no class number, 0 or above{told(field)}"
                    faults.append((fault, f"{shard.path}#{name}: {error}"))
    except DataError as error:
        return {}, [*faults, ("shards that cannot be read to their end", str(error))], others
    if not pictures:
        faults.append((f"shards without any picture ({', '.join(sorted(PICTURES))})", shard.path))
    fault = f"pictures without a label, KEY.{ending}{told(field)}: pack them anew, or name the right `field`"
    faults += [(fault, f"{shard.path}#{name}") for key, (name, _, _) in pictures.items() if key not in labels]
    fault = "labels without a picture: pack the shard anew"
    faults += [(fault, f"{shard.path}#{name}") for key, (name, _) in labels.items() if key not in pictures]
    if faults:
        return {}, faults, others
    rows = [(offset, size, labels[key][1], len(name.encode())) for key, (name, offset, size) in pictures.items()]
    piece = dict(zip(NUMBERS, np.array(rows, np.int64).T.copy(), strict=True))
    names = "".join(name for name, _, _ in pictures.values()).encode()
    return piece | {"names": np.frombuffer(names, np.uint8)}, [], others


def told(field: str | None) -> str:
    return "" if field is None else f" (its field {field})"


def class_number(content: bytes, field: str | None) -> int:
    """Of a `.cls` or, where a field is named, a `.json`. Raises ValueError, quoting it."""
    if field is None:
        words = content.strip()
        if not words.isdigit() or len(words) > 9:
            raise ValueError(repr(content[:30])[1:])
        return int(words)
    try:
        value = json.loads(content)[field]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ValueError(f"{type(error).__name__} {str(error)[:80]}") from None
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 10**9:
        raise ValueError(repr(value)[:30])
    return value


def load(place: Path) -> dict[tuple[str, int, int], Piece]:
    """Pieces by name, size and time of their shards; none if there is no such file, or not all of it."""
    try:
        with np.load(place, allow_pickle=False) as file:
            columns = {key: file[key] for key in (*NUMBERS, "names", "shards", "stamps", "counts")}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return {}
    found, first, begin = {}, 0, 0
    for name, (size, time), count in zip(columns["shards"], columns["stamps"], columns["counts"], strict=True):
        piece = {key: columns[key][first : first + count] for key in NUMBERS}
        end = begin + int(piece["length"].sum())
        found[str(name), int(size), int(time)] = piece | {"names": columns["names"][begin:end]}
        first, begin = first + count, end
    return found


def save(places: Iterable[Path], keys: Sequence[tuple[str, int, int]], pieces: Sequence[Piece]) -> None:
    """Write an index to the first place that can be written to, at once in the eyes of other processes."""
    columns = {key: np.concatenate([piece[key] for piece in pieces]) for key in (*NUMBERS, "names")}
    columns["shards"] = np.array([name for name, _, _ in keys])
    columns["stamps"] = np.array([stamp for _, *stamp in keys], np.int64)
    columns["counts"] = np.array([len(piece["label"]) for piece in pieces], np.int64)
    for place in places:
        part = place.with_name(f"{place.name}.{uuid4().hex}.part")
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            try:
                with part.open("wb") as file:
                    np.savez(file, **columns)  # type: ignore[arg-type]
                os.replace(part, place)
                return
            except BaseException:
                part.unlink(missing_ok=True)
                raise
        except OSError:
            continue
    rank_zero_warn(f"{CACHE}: the index of the shards cannot be kept, and is made at every start; set XDG_CACHE_HOME")
