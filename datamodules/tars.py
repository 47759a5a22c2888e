"""Files within tar files: found by the headers alone, and read where they lie, without unpacking anything.

Names of members are names and nothing else: none is ever used as a path on a disk.
"""

import os
import threading
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from io import FileIO

from datamodules.transforms import Array, DataError, upright_of

BLOCK = 512
LONG = 1 << 20
"""Bytes that a name, or other words about a member, may take."""


@dataclass(frozen=True)
class Shard:
    """A tar file as it was when it was looked at.

    Attributes:
        path: of the file. size: in bytes. time: of its last change, in ns.
    """

    path: str
    size: int
    time: int

    @classmethod
    def at(cls, path: str) -> "Shard":
        """Raises DataError if there is none."""
        try:
            status = os.stat(path)
        except OSError as error:
            raise DataError(f"{path}: cannot read the shard ({error.strerror}); copy it there") from None
        return cls(path, status.st_size, status.st_mtime_ns)


@dataclass(frozen=True, slots=True)
class Member:
    """A file within a shard: its name there, where its bytes begin, and how many they are."""

    shard: Shard
    name: str
    offset: int
    size: int

    def __str__(self) -> str:
        return f"{self.shard.path}#{self.name}"

    def read(self) -> bytes:
        """Its bytes.

        Raises:
            DataError: if the shard cannot be read, or is no longer what it was.
        """
        try:
            data = os.pread(OPENED.file(self.shard).fileno(), self.size, self.offset)
        except OSError as error:
            raise DataError(f"{self}: cannot read the shard ({error.strerror}); is its disk still there?") from None
        if len(data) != self.size:
            raise DataError(f"{self}: the shard ends before it; copy the shard anew")
        return data


def read_member(member: Member, rows: int | None = None) -> Array:
    """RGB uint8 `[H, W, 3]` of a picture in a shard, as `read_upright` of its file.

    Raises:
        DataError: naming shard and member if it cannot be read, is no image, or is cut off.
    """
    return upright_of(member.read(), member)


class Opened(threading.local):
    """Shards that are open for reading, at most `most`, of every thread and process its own.

    The one that was used longest ago is closed for another.
    """

    def __init__(self, most: int = 128) -> None:
        self.most, self.process = most, os.getpid()
        self.files: OrderedDict[Shard, FileIO] = OrderedDict()

    def file(self, shard: Shard) -> FileIO:
        if self.process != os.getpid():  # forked
            self.__init__(self.most)  # type: ignore[misc]
        if shard in self.files:
            self.files.move_to_end(shard)
            return self.files[shard]
        file = FileIO(shard.path)
        status = os.fstat(file.fileno())
        if (status.st_size, status.st_mtime_ns) != (shard.size, shard.time):
            file.close()
            raise DataError(f"{shard.path}: the shard has changed since it was indexed; start anew")
        while len(self.files) >= self.most:
            self.files.popitem(last=False)[1].close()
        self.files[shard] = file
        return file


OPENED = Opened()


def files_in(shard: Shard) -> Iterator[tuple[str, int, int, bytes]]:
    """Name, offset and size of every file in a shard, in its order; and its bytes, up to the first 512.

    Formats are those of tarfile: V7, ustar, GNU, pax. Folders, links and devices are passed over.

    Raises:
        DataError: if it is no tar, is compressed, is cut off, or has a sparse file; naming the last member seen.
    """
    try:
        file = OPENED.file(shard)
        yield from _files_in(shard, file.fileno())
    except OSError as error:
        raise DataError(f"{shard.path}: cannot read the shard ({error.strerror}); copy it anew") from None


def _files_in(shard: Shard, file: int) -> Iterator[tuple[str, int, int, bytes]]:
    offset, last, given = 0, "", dict[str, str]()
    while True:
        head = os.pread(file, 2 * BLOCK, offset)
        if len(head) < BLOCK:
            where = (
                f"cut off after {last}: a tar ends with an empty block" if last else "no tar file, or a stump of one"
            )
            raise DataError(f"{shard.path}: {where}; copy the shard anew")
        block, offset = head[:BLOCK], offset + BLOCK
        if not any(block):
            return
        try:
            name, size, kind = parsed(block)
        except ValueError:
            where = f"no header where one should be, after {last}" if last else "no tar file"
            raise DataError(f"{shard.path}: {where}; copy the shard anew, unpacked if it is compressed") from None
        about = kind in b"LKxg"  # words about the next member, or about all
        if not about:
            name, size = given.get("path", name), int(given.get("size", size))
        held = kind not in b"123456"  # links, devices and folders may name a size, but have no content
        if held and offset + size > shard.size:
            raise DataError(f"{shard.path}#{name}: goes beyond the end of the shard, which was cut off; copy it anew")
        if about and size > LONG:
            raise DataError(f"{shard.path}#{name}: {size} bytes of words about a member; pack the shard anew")
        if kind == b"L":
            given["path"] = text(os.pread(file, size, offset))
        elif kind == b"x":
            given |= records(os.pread(file, size, offset), f"{shard.path}#{name}")
        elif not about:
            if kind == b"S" or any(key.startswith("GNU.sparse") for key in given):
                raise DataError(f"{shard.path}#{name}: a sparse file; pack the shard anew, without --sparse")
            if held:
                yield name, offset, size, head[BLOCK : BLOCK + size]
            given, last = {}, name
        offset += -(-size // BLOCK) * BLOCK if held else 0


def parsed(block: bytes) -> tuple[str, int, bytes]:
    """Name, size and type of a header. Raises ValueError if it is none."""
    if number(block[148:156]) != sum(block) - sum(block[148:156]) + 8 * 32:
        raise ValueError("checksum")
    name, kind = text(block[:100]), block[156:157]
    if block[257:263] == b"ustar\0" and block[345]:
        name = f"{text(block[345:500])}/{name}"
    if kind == b"\0":
        kind = b"5" if name.endswith("/") else b"0"
    return name, number(block[124:136]), kind


def number(field: bytes) -> int:
    """Octal digits, or where these did not suffice the bytes themselves. Raises ValueError."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    value = int(field.split(b"\0")[0].strip() or b"0", 8)
    if value < 0:
        raise ValueError("negative")
    return value


def text(field: bytes) -> str:
    return field.split(b"\0")[0].decode(errors="backslashreplace")


def records(words: bytes, name: str) -> dict[str, str]:
    """Of a pax header: lines "length key=value"."""
    found = {}
    try:
        while words.rstrip(b"\0"):
            length = int(words.split(b" ")[0])
            key, value = words[: max(length, 0)].split(b" ", 1)[1].split(b"=", 1)
            found[text(key)] = text(value.removesuffix(b"\n"))
            words = words[length:]
        if int(found.get("size", 0)) < 0:
            raise ValueError("negative")
    except (ValueError, IndexError):
        raise DataError(f"{name}: a broken pax header; pack the shard anew") from None
    return found
