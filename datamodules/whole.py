"""Whether image files are whole, seen without decoding them: decoders fill in what is missing, and say nothing."""

import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Bytes = NDArray[np.uint8]


def whole(data: Bytes) -> bool:
    """False if a file uint8 `[N]` is a PNG that is broken, or a JPEG or WebP that may be; other formats pass."""
    start = data[:4].tobytes()
    if start[:2] == b"\xff\xd8":
        return whole_jpeg(data)
    if start == b"\x89PNG":
        return whole_png(data)
    return start != b"RIFF" or int.from_bytes(data[4:8].tobytes(), "little") + 8 == len(data)


def whole_jpeg(data: Bytes) -> bool:
    """Whether segment follows segment up to the end marker. What is in them is not looked at."""
    marks = np.flatnonzero(data[:-1] == 0xFF)
    kinds = data[marks + 1]
    marks = marks[(kinds > 0) & (kinds < 0xFF) & (kinds & 0xF8 != 0xD0)]  # within a scan: no stuffing, no restarts
    view, at, components = data.data, 2, 0
    while at + 1 < len(view) and view[at] == 0xFF:
        kind, length = view[at + 1], int.from_bytes(view[at + 2 : at + 4], "big")
        if kind == 0xD9:
            return True
        if kind in (0xC0, 0xC1) and at + 9 < len(view):  # sequential
            components = view[at + 9]
        alone = kind == 0xDA and at + 4 < len(view) and view[at + 4] == components
        at += 1 if kind == 0xFF else 2 + length  # filling has no length
        if kind == 0xDA:  # what is coded goes on to the next marker
            after = marks[np.searchsorted(marks, at) :]
            if not len(after) or (alone and view[int(after[0]) + 1] != 0xD9):
                return False  # one scan holds all there is
            at = int(after[0])
    return False


def whole_png(data: Bytes) -> bool:
    """Whether the checksums of all parts but the dispensable ones are right, up to the end marker."""
    view, at = data.data, 8
    while at + 12 <= len(view):
        name, end = bytes(view[at + 4 : at + 8]), at + 8 + int.from_bytes(view[at : at + 4], "big")
        if name[:1].isupper() and zlib.crc32(view[at + 4 : end]) != int.from_bytes(view[end : end + 4], "big"):
            return False
        if name == b"IEND":
            return True
        at = end + 4
    return False


@contextmanager
def strictly(path: str | Path | BytesIO) -> Iterator[Image.Image]:
    """`Image.open`, which does not look at all of a PNG's checksums: an OSError if they are wrong."""
    with Image.open(path) as file:
        if file.format == "PNG":
            inside = isinstance(path, BytesIO)
            data = np.frombuffer(path.getbuffer(), np.uint8) if inside else np.fromfile(path, np.uint8)  # type: ignore[union-attr, arg-type]
            if not whole(data):
                raise OSError("a wrong checksum, or no end")
        yield file
