"""The kinds of files of benchmarks/fuzz.py: a sound one, faults in it, our reader, and what a plain reading gives."""

import copy
import io
import json
import math
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import cv2
import numpy as np
from PIL import Image

from datamodules.image_folder import ImageFolder
from datamodules.images import upright_size
from datamodules.mask_files import dims, read_mask, values_of
from datamodules.mask_folder import MaskFolder
from datamodules.transforms import read_image, read_reduced, read_upright

Trial = Callable[[Path, Random], None]
KINDS: dict[str, tuple[Trial, int]] = {}
STRANGE: list[Any] = [None, math.nan, math.inf, -math.inf, 1e308, -1, 0, 0.5, 2**70, True, "", "7", "NaN", "x" * 300]
STRANGE += ["\0", "nowhere/..", "\ud800", [], {}, [[]], [None], ["a"], {"id": 1}, [1, 2, 3, 4], [[1, [2]], 3]]


class Wrong(Exception):
    """Read without a complaint, but not what the file says."""


def kind(count: int) -> Callable[[Trial], Trial]:
    def keep(trial: Trial) -> Trial:
        KINDS[trial.__name__] = trial, count
        return trial

    return keep


def expect(right: Any, text: str) -> None:
    if not right:
        raise Wrong(text)


def bent(data: bytes, chance: Random) -> bytes:
    """Bytes with a few faults; sometimes with none."""
    for _ in range(chance.choice((0, 1, 1, 1, 2, 5))):
        a, b = sorted(chance.randrange(len(data) + 1) for _ in range(2))
        end = min(len(data), a + chance.choice((1, 4, 64)))
        part, bit = data[a:end], bytes([data[a] ^ 1 << chance.randrange(8)]) if a < end else b""
        data = chance.choice(
            (
                data[:a] + bit + data[a + 1 :],
                data[:a] + bit + data[a + 1 :],
                data[:a],  # cut off
                data[:a] + data[end:],
                data[:a] + data[b:],
                data[:b] + data[a:],  # repeated
                data[:a] + part * 3 + data[end:],
                data[:b] + part + data[b:],  # spliced
                data[:a] + chance.randbytes(end - a) + data[end:],
                data[:a] + chance.choice((b"\0", b"\xff", b"\x7f")) * (end - a) + data[end:],
                data + chance.randbytes(chance.choice((1, 100))),
            )
        )
    return data


def places(tree: Any) -> Iterator[tuple[Any, Any]]:
    """Every container of a tree with every key or index of it."""
    for key in list(tree) if isinstance(tree, dict) else range(len(tree)) if isinstance(tree, list) else ():
        yield tree, key
        yield from places(tree[key])


def warped(tree: Any, chance: Random) -> Any:
    """A tree of dicts and lists with a few faults; sometimes with none."""
    holder = [copy.deepcopy(tree)]
    for _ in range(chance.choice((0, 1, 1, 1, 2, 4))):
        found = list(places(holder))
        where, key = chance.choice(found)
        other, its = chance.choice(found)
        value = where[key]
        match chance.randrange(9):
            case 0:
                del where[key]
            case 1 if isinstance(where, dict):
                where[chance.choice((f"{key}s", key.upper() if isinstance(key, str) else 0, ""))] = where.pop(key)
            case 2 if isinstance(where, list):
                where.append(copy.deepcopy(value))
            case 3 if isinstance(value, int | float):
                where[key] = chance.choice((-value, str(value), value * 1e6, value / 1e3, [value], float(value)))
            case 4:
                where[key] = copy.deepcopy(other[its])
            case 5:
                where[key] = type(value)()
            case _:
                where[key] = copy.deepcopy(chance.choice(STRANGE))
        if not holder:
            return None
    return holder[0]


def written(path: Path, content: Any, chance: Random) -> Any:
    """Write JSON with faults in its structure, or now and then in its text; returns what a plain reading gives."""
    data = json.dumps(warped(content, chance)).encode()
    data = bent(data, chance) if chance.random() < 0.15 else data
    path.write_bytes(data)
    try:
        return json.loads(data.decode())
    except (ValueError, RecursionError):
        return None


def picture(chance: Random, height: int = 0, width: int = 0, channels: int = 3) -> np.ndarray:
    """Smooth, so that decoders differ little, uint8 `[H, W, channels]`."""
    height, width = height or chance.randint(1, 90), width or chance.randint(1, 200)
    small = np.random.default_rng(chance.getrandbits(32)).integers(0, 256, (3, 3, channels), np.uint8)
    return cv2.resize(small, (width, height), interpolation=cv2.INTER_LINEAR).reshape(height, width, channels)


def strict(path: Path) -> Image.Image | None:
    """Pillow's decoding; None where it refuses, or where a PNG's checksums are wrong, which it does not always see."""
    data, at = path.read_bytes(), 8
    try:
        with Image.open(path) as file:
            file.load()
            while file.format == "PNG" and at < len(data):
                length, name = struct.unpack(">I4s", data[at : at + 8])
                sound = zlib.crc32(data[at + 4 : at + 8 + length]) == struct.unpack_from(">I", data, at + 8 + length)[0]
                if name[0] < 97 and not sound:  # a critical one
                    return None
                at += 12 + length
                if name == b"IEND":
                    break
            return file
    except Exception:
        return None


def encoded(chance: Random, form: str) -> bytes:
    """A small picture as a file's bytes."""
    buffer, pixels = io.BytesIO(), picture(chance)
    if form != "jpeg":
        mode = chance.choice(("RGB", "RGB", "RGBA", "P", "L", "LA", "I;16", "1") if form == "png" else ("RGB", "L"))
        image = Image.fromarray(pixels).convert(mode if mode != "I;16" else "L")
        if mode == "I;16":
            image = Image.fromarray(np.asarray(image).astype(np.uint16) * 257)
        image.save(buffer, form)
        return buffer.getvalue()
    if chance.random() < 0.3:
        options = [cv2.IMWRITE_JPEG_RST_INTERVAL, chance.choice((0, 1, 4)), cv2.IMWRITE_JPEG_PROGRESSIVE, 0]
        return cv2.imencode(".jpg", pixels, options)[1].tobytes()
    exif = Image.Exif()
    exif[274] = chance.randint(0, 9)
    given = {"quality": chance.randint(20, 98), "progressive": chance.random() < 0.3, "exif": exif}
    image = Image.fromarray(pixels).convert(chance.choice(("RGB", "RGB", "RGB", "L", "CMYK")))
    image.save(buffer, "jpeg", subsampling=chance.randrange(3), **given)
    return buffer.getvalue()


def near(ours: np.ndarray, theirs: Image.Image, text: str) -> None:
    """Whether pixels are those of Pillow, as far as two decoders agree."""
    expect(ours.shape == (theirs.height, theirs.width, 3), f"{text}: shape {ours.shape} for {theirs.size}")
    if theirs.mode in ("RGB", "L", "RGBA", "P", "LA", "1"):
        apart = np.abs(ours.astype(int) - np.asarray(theirs.convert("RGB")).astype(int)).max()
        expect(apart <= 4, f"{text}: levels differ by {apart} ({theirs.format} {theirs.mode})")


def photos(folder: Path, names: list[str], width: int = 64, height: int = 48) -> None:
    for name in names:
        if not (folder / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture(Random(0), height, width)).save(folder / name)


def pictures(folder: Path, chance: Random, form: str) -> None:
    path = folder / f"picture.{form}"
    path.write_bytes(bent(encoded(chance, form), chance))
    truth, way = strict(path), chance.randrange(5)
    if way == 0:
        image = read_upright(path)
        expect(truth is not None, "read_upright reads what is broken")
        expect(upright_size(path) == image.shape[1::-1], "upright_size says another size")
    elif way == 1 and form == "jpeg":
        factor = chance.choice((2, 4, 8))
        image, by, width = read_reduced(path, factor)
        assert truth is not None or not expect(False, "read_reduced reads what is broken")
        expect(width == truth.width, "read_reduced says another width")
        size = [-(-x // by) for x in (truth.height, truth.width)]
        expect([*image.shape[:2]] == size, f"read_reduced: {image.shape} of {truth.size} by {by}")
    elif way == 2:
        rows = chance.randint(1, 60)
        top, whole = read_image(path, rows), read_image(path)
        expect(np.array_equal(top, whole[:rows]), "the top read alone differs")
    else:
        image = read_image(path)
        assert truth is not None or not expect(False, "read_image reads what is broken")
        near(image, truth, "read_image")


@kind(2500)
def jpeg(folder: Path, chance: Random) -> None:
    pictures(folder, chance, "jpeg")


@kind(1500)
def png(folder: Path, chance: Random) -> None:
    pictures(folder, chance, "png")


@kind(400)
def bmp(folder: Path, chance: Random) -> None:
    pictures(folder, chance, "bmp")


@kind(400)
def webp(folder: Path, chance: Random) -> None:
    pictures(folder, chance, "webp")


@kind(1200)
def mask(folder: Path, chance: Random) -> None:
    form = chance.choice(("png", "png", "png", "gif", "tiff", "bmp"))
    numbers = picture(chance, channels=1)[..., 0] // 52  # 0 to 4
    colours = {(0, 0, 0): 0, (128, 64, 128): 1, (255, 0, 0): 2, (0, 255, 0): 3, (9, 9, 9): 255}
    values, stored = values_of([0, 1, 2, 3, 4]) if chance.random() < 0.7 else colours, numbers
    values = np.where(np.arange(256) > 4, -1, values) if not isinstance(values, dict) else values
    if isinstance(values, dict):
        stored = np.array(list(colours), np.uint8)[numbers]
    image, path = Image.fromarray(stored), folder / f"mask.{form}"
    if chance.random() < 0.4 and stored.ndim == 2:
        image.putpalette(bytes(range(60)))
    buffer = io.BytesIO()
    image.save(buffer, form)
    path.write_bytes(bent(buffer.getvalue(), chance))
    truth = strict(path)
    size = dims(path)
    labels = read_mask(str(path), values, size[::-1] if chance.random() < 0.5 else None)
    assert truth is not None or not expect(False, f"a broken mask is read ({form})")
    expect(labels.dtype == np.uint8 and labels.shape == truth.size[::-1], "another size")
    plain = np.asarray(truth.convert("RGB") if isinstance(values, dict) else truth, int).reshape(*labels.shape, -1)
    for (y, x), label in np.ndenumerate(labels):
        value = tuple(plain[y, x].tolist())
        expect(label == (values[value] if isinstance(values, dict) else values[value[0]]), f"{value} read as {label}")


@kind(500)
def lists(folder: Path, chance: Random) -> None:
    photos(folder, ["a.png", "b.png", "c.png", "masks/a.png"])
    Image.fromarray(np.zeros((48, 64), np.uint8)).save(folder / "masks/a.png")
    kind = chance.choice(("csv", "txt", "classes"))
    if kind == "classes":
        (folder / "names.txt").write_bytes(data := bent(b"sky\nroad\ncar\n", chance))
        photos(folder, ["photos/a.png"])
        masks = MaskFolder(str(folder), "names.txt", train=".", val=".", images="photos", masks="masks", workers=0)
        masks.setup("fit")
        expect(list(masks.class_names) == [line.strip() for line in data.decode().rstrip().splitlines()], "other names")
        return
    rows = [("a.png", "cat"), ("b.png", "dog"), ("c.png", "dog")]
    text = "file_name,label\n" if kind == "csv" else ""
    text += "".join(f"{a}{',' if kind == 'csv' else ' '}{b}\n" for a, b in rows)
    (folder / f"list.{kind}").write_bytes(data := bent(text.encode(), chance))
    found = ImageFolder(str(folder), f"list.{kind}", f"list.{kind}", size=32, workers=0)
    found.setup("fit")
    names = found.class_names
    for instance in found.datasets["train"].instances:
        line = f"{Path(instance.path).name}{',' if kind == 'csv' else ' '}{names[instance.label]}"
        expect(line in data.decode().replace('"', ""), f"{line!r} is not in the list")
