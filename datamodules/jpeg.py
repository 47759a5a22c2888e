"""The headers of JPEG files: how large the picture is, and how to decode no more of it than its top."""

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]


def frame_of_jpeg(data: Bytes) -> tuple[int, bool]:
    """Where the frame header of a JPEG begins, and whether its rows come in order, undivided: it is sequential, of one
    scan, without restart markers. 0 if that is not found, or there is no JPEG."""
    view, at, frame, divided = data.data, 2, 0, False
    if bytes(view[:2]) != b"\xff\xd8":
        return 0, False
    while at + 10 < len(view) and view[at] == 0xFF and view[at + 1] != 0xFF:
        marker, length = view[at + 1], int.from_bytes(view[at + 2 : at + 4], "big")
        if marker == 0xDA:  # the first scan; the only one, if it has all components of the frame
            return frame, frame > 0 and view[frame + 1] <= 0xC1 and view[at + 4] == view[frame + 9] and not divided
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            frame = at
        elif marker == 0xDD:
            divided = bytes(view[at + 4 : at + 6]) != b"\0\0"
        at += 2 + length
    return 0, False


def top_of_jpeg(data: Bytes, rows: int) -> Bytes:
    """A JPEG whose first `rows` rows are those of `data`, bit for bit, with not many more; written over `data`.

    Where rows come in order a smaller height in the header is all there is to do: the decoder stops there. Any other
    file is returned as it is.

    Args:
        data: uint8 `[N]` of a file that ends as it should.
        rows: at least 1.
    """
    frame, ordered = frame_of_jpeg(data)
    tail = data[-64:].tobytes()
    end = tail.rfind(b"\xff\xd9")
    if not ordered or end < 0:
        return data
    height, width = size_in(data, frame)
    rows += 8  # chroma is interpolated between rows: the last are others than in the whole
    if width < 128 or rows + 32 >= height:
        return data  # some data has to be left over, a row of blocks at least: the decoder looks a few bytes ahead
    data[frame + 5 : frame + 7] = divmod(rows, 256)
    return data[: end - len(tail)]  # without an end marker, which would be met too early and complained of


def size_in(data: Bytes, frame: int) -> tuple[int, int]:
    """(H, W) in the frame header of a JPEG."""
    height, width = data[frame + 5 : frame + 9].view(">u2").tolist()
    return height, width
