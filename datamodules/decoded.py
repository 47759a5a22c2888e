"""Pictures kept decoded on a disk: exact, several times faster than JPEG or PNG, several times larger."""

import errno
import os
import shutil
import struct
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from uuid import uuid4

import numpy as np
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from datamodules.tars import Member
from datamodules.transforms import Array, DataError

HEADER = struct.Struct("<5q")
"""What a file begins with: size and time of the picture's own file, height, width, channels. Then the values, uint8."""


@dataclass(frozen=True)
class Decoded:
    """A folder of decoded pictures, filled as they are first read, for all processes and later runs.

    What is stored is what the reader returned, so that nothing changes but time. A file is known by its absolute path;
    one that has changed (in size or time) is decoded anew. A picture takes H x W x 3 bytes, 0.9 MB at 640 x 480.
    It pays while the folder fits into memory beside all else, or its disk reads faster than the processor decodes; a
    folder in memory (/dev/shm) does as well. Nothing is ever deleted: remove the folder by hand.

    Args:
        folder: where, best on a local disk; it may serve many data sets.
        free: gigabytes to leave free on that disk; below, pictures are decoded each time, as without.

    Raises:
        DataError: if the folder cannot be written to; and whatever the reader raises.
    """

    folder: str
    free: float = 20.0

    def __post_init__(self) -> None:
        if not self.folder:
            raise DataError("decoded pictures need a folder: data.decoded.folder is empty")
        if self.free < 0:
            raise DataError(f"free is how many gigabytes to leave free, 0 at least, got {self.free}")

    def read(self, reader: Callable[..., Array], path: str | Member, rows: int | None = None) -> Array:
        """What `reader(path)` returns, or `rows` rows from its top, at least 1."""
        try:
            status = os.stat(path.shard.path if isinstance(path, Member) else path)
        except OSError:
            return reader(path)  # which says what is wrong
        name = f"{reader.__module__}.{reader.__qualname__} {os.path.abspath(str(path))}"
        name = blake2b(os.fsencode(name), digest_size=16).hexdigest()
        place, stamp = os.path.join(self.folder, name[:2], name), (status.st_size, status.st_mtime_ns)
        image = load(place, stamp, rows)
        if image is None:
            if not self.room():
                return reader(path) if rows is None else reader(path, rows)
            image = reader(path)
            self.store(Path(place), stamp, image)
        return image if rows is None else image[: max(rows, 1)]

    def room(self) -> bool:
        """Whether there is more left on the disk than `free`."""
        try:
            os.makedirs(self.folder, exist_ok=True)
            left = shutil.disk_usage(self.folder).free / 1e9
        except OSError as error:
            raise self.refused(error) from None
        if left < self.free:
            rank_zero_warn(
                f"{self.folder}: less than {self.free} GB left there (`free`); other pictures are decoded each time"
            )
        return left >= self.free

    def store(self, place: Path, stamp: tuple[int, int], image: Array) -> None:
        """Write a picture, at once in the eyes of other processes."""
        part = place.with_name(f"{place.name}.{uuid4().hex}.part")
        try:
            place.parent.mkdir(exist_ok=True)
            try:
                with open(part, "wb") as file:
                    file.write(HEADER.pack(*stamp, *image.shape, *(0,) * (3 - image.ndim)))  # 0: no channels
                    file.write(np.ascontiguousarray(image).data)
                os.replace(part, place)
            except BaseException:
                part.unlink(missing_ok=True)
                raise
        except OSError as error:
            raise self.refused(error) from None

    def refused(self, error: OSError) -> DataError:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        remedy = "make room, or raise `free`, at which no more is written" if full else "name another folder"
        return DataError(f"{self.folder}: cannot keep decoded pictures here ({error.strerror}); {remedy}")


def load(place: str, stamp: tuple[int, int], rows: int | None = None) -> Array | None:
    """The picture in a file, the caller's own; None if there is none, or of another stamp, or not all of it."""
    try:
        with open(place, "rb", buffering=0) as file:
            head = file.read(HEADER.size)
            if len(head) < HEADER.size or HEADER.unpack(head)[:2] != stamp:
                return None
            height, width, channels = HEADER.unpack(head)[2:]
            whole = HEADER.size + height * width * (channels or 1)
            if min(height, width, channels) < 0 or os.fstat(file.fileno()).st_size != whole:
                return None  # a crash of the machine
            rows = height if rows is None else min(max(rows, 1), height)
            image = np.empty((rows, width, channels) if channels else (rows, width), np.uint8)
            return image if file.readinto(image.data) == image.nbytes else None
    except OSError:  # if it is there but cannot be read, writing will say why
        return None
