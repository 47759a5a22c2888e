"""Images from files, and geometry that says what it did: every crop returns the matrix it was made with."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

cv2.setNumThreads(0)  # loader workers are the parallelism; OpenCV's own threads only fight them


class DataError(ValueError):
    """Data that cannot be used; the message names the file, the record and the remedy."""


def read_image(path: str | Path, rows: int | None = None) -> Array:
    """RGB `[H, W, 3]` of an image file, EXIF orientation ignored (labels are made on the stored pixels).

    Args:
        rows: how many from the top are needed: there may be fewer than H then, but not fewer than these. None is all.

    Raises:
        DataError: naming the file if it is missing, is no image, or is cut off (OpenCV would fill in grey).
    """
    try:
        data = np.fromfile(path, np.uint8)
    except OSError as error:
        raise DataError(f"{path}: cannot read the image ({error.strerror}); check the image folder") from None
    if not len(data):
        raise DataError(f"{path}: the image file is empty; copy it anew")
    if not _ends(data):
        _read_all(path)
    if rows is not None:
        data = top_of_jpeg(data, rows)
    image = cv2.imdecode(data, cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION)
    if image is None:
        raise DataError(f"{path}: not an image OpenCV can read; convert it to JPEG or PNG, or remove its record")
    return image


def read_upright(path: str | Path, rows: int | None = None) -> Array:
    """RGB uint8 `[H, W, 3]` of an image file of any kind (grey, CMYK, palette, 16-bit, with alpha), turned as its EXIF
    orientation says: for labels that do not depend on places. All rows, whatever `rows` says: the file may be turned.

    Raises:
        DataError: naming the file if it is missing, is no image, or is cut off.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with Image.open(path) as file:
            image = ImageOps.exif_transpose(file)
            if image.mode.startswith(("I", "F")):  # Pillow would cut 16 bits off at 255
                values = np.asarray(image).astype(np.float32)
                values /= 257 if values.max() > 255 else 1
                return np.repeat(values.round().clip(0, 255).astype(np.uint8)[..., None], 3, axis=2)
            return np.array(image.convert("RGB"))
    except FileNotFoundError:
        raise DataError(f"{path}: cannot read the image (no such file); check the image folder") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        if isinstance(error, UnidentifiedImageError) and cv2.haveImageReader(str(path)):
            return read_image(path)  # some formats only OpenCV knows
        raise DataError(f"{path}: broken or no image ({error}); copy it anew, or remove it") from None


def rgb(image: Any) -> Array:
    """RGB uint8 `[H, W, 3]` of a path, upright, or of such an array, which is returned.

    Raises:
        DataError: if it cannot be read, or is anything else.
    """
    if isinstance(image, str | Path):
        return read_upright(image)
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        kind = f"{image.dtype} {list(image.shape)}" if hasattr(image, "shape") else type(image).__name__
        raise DataError(f"an image must be a path or an RGB uint8 array [H, W, 3], got {kind}")
    return image


def _ends(data: Array) -> bool:
    """Whether a JPEG or PNG has its end marker near its end; other formats pass."""
    start, end = data[:4].tobytes(), data[-64:].tobytes()
    if start[:2] == b"\xff\xd8":
        return b"\xff\xd9" in end
    if start == b"\x89PNG":
        return b"IEND" in end
    return True


def top_of_jpeg(data: Array, rows: int) -> Array:
    """A JPEG that decodes to the first `rows` rows of `data` and a few more, bit for bit; written over `data`.

    Rows come in order in a file of one sequential scan, so that a smaller height in its header is all there is to do,
    and the decoder stops there. Any other file is returned as it is.

    Args:
        data: uint8 `[N]` of a file that ends as it should.
    """
    view, at, frame = memoryview(data), 2, 0
    if bytes(view[:2]) != b"\xff\xd8":
        return data
    while at + 10 < len(view) and view[at] == 0xFF:
        marker, length = view[at + 1], int.from_bytes(view[at + 2 : at + 4], "big")
        if marker in (0xC0, 0xC1):  # a sequential frame, entropy coded by Huffman
            frame = at
        elif marker == 0xDA:  # the first scan: the only one, if it has all components of the frame
            end = len(view) - 64 + bytes(view[-64:]).rfind(b"\xff\xd9") if len(view) > 64 else 0
            height, width = (int.from_bytes(view[frame + i : frame + i + 2], "big") for i in (5, 7))
            rows = max(rows, 0) + 8  # chroma is interpolated between rows
            # Some of the data has to be left over, a row of blocks at least: the decoder looks a few bytes ahead.
            spare = width >= 128 and rows + 32 < height
            if frame and view[at + 4] == view[frame + 9] and at < end and spare:
                view[frame + 5 : frame + 7] = rows.to_bytes(2, "big")
                return data[:end]  # without an end marker, which libjpeg would come to earlier than it expects
            return data
        elif marker in (0xC2, 0xC3, *range(0xC5, 0xC8), *range(0xC9, 0xCC), *range(0xCD, 0xDA), 0xFF):
            return data  # progressive, lossless, arithmetic; or nothing that has a length
        at += 2 + length
    return data


def _read_all(path: str | Path) -> None:
    """Decode with Pillow, which refuses files that OpenCV would silently complete."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            image.load()
    except (OSError, SyntaxError) as error:
        raise DataError(f"{path}: broken or truncated image ({error}); copy it anew, or leave it out") from None


def crop_of_box(box: Array, size: tuple[int, int], padding: float = 1.25) -> tuple[Array, Array]:
    """Centre (x, y) and extent (w, h) of the crop a box stands for: grown to the aspect of `size` (H, W), then by
    `padding` (official coco.py _box2cs).

    Args:
        box: x, y, w, h in image pixels.
    """
    x, y, w, h = (float(v) for v in box)
    aspect = size[1] / size[0]
    if w > aspect * h:
        h = w / aspect
    elif w < aspect * h:
        w = h * aspect
    centre = np.array([x + box[2] / 2, y + box[3] / 2], dtype=np.float64)
    return centre, np.array([w, h], dtype=np.float64) * padding


def crop_matrix(centre: Array, extent: Array, size: tuple[int, int], rotation: float = 0.0, udp: bool = False) -> Array:
    """The affine `[2, 3]` from image pixels to the pixels of a crop.

    Args:
        centre, extent: of the crop in image pixels, (x, y) and (w, h).
        size: (H, W) of the crop.
        rotation: degrees.
        udp: lay the outermost pixel centres on the outline (UDP); False is the official map, whose scale follows the
            width alone and whose centre is W / 2, half a pixel off the middle (official transforms.py
            get_affine_transform).
    """
    radians = math.pi * rotation / 180
    sin, cos = math.sin(radians), math.cos(radians)
    if udp:
        target = np.array([size[1] - 1, size[0] - 1])
        linear = (target / extent)[:, None] * np.array([[cos, sin], [-sin, cos]])
        return np.concatenate([linear, (target / 2 - linear @ centre)[:, None]], axis=1)
    # By three points in float32, as there: rounded otherwise, one pixel in a thousand differs by one level.
    half, up = extent[0] * 0.5, np.float32(size[1] * 0.5)
    source = np.array([centre, (centre[0] + half * sin, centre[1] - half * cos), (0, 0)], np.float32)
    x, y = source[0] - source[1]
    source[2] = source[1] + np.array([-y, x])
    middle = size[1] * 0.5, size[0] * 0.5
    target_points = np.float32([middle, (middle[0], middle[1] - up), (middle[0] - up, middle[1] - up)])
    return cv2.getAffineTransform(source, target_points)


def mirror(matrix: Array, width: int) -> Array:
    """`matrix` preceded by the mirror image of an image of that width: x -> width - 1 - x."""
    flipped = matrix.copy()
    flipped[:, 0] = -matrix[:, 0]
    flipped[:, 2] = matrix[:, 2] + matrix[:, 0] * (width - 1)
    return flipped


def apply(matrix: Array, points: Array) -> Array:
    """`points` `[..., 2]` mapped by an affine `[2, 3]`."""
    return points @ matrix[:, :2].T + matrix[:, 2]


def invert(matrix: Array) -> Array:
    """The affine `[2, 3]` that undoes `matrix`."""
    return cv2.invertAffineTransform(np.asarray(matrix, dtype=np.float64))


def rows_of(matrix: Array, size: tuple[int, int]) -> int:
    """How many rows of an image, from the top, the crop of `size` (H, W) by `matrix` is made of; may exceed it."""
    _, (a, b, y) = invert(matrix)
    return int(y + max(0, a * (size[1] - 1)) + max(0, b * (size[0] - 1))) + 3


def warp(image: Array, matrix: Array, size: tuple[int, int]) -> Array:
    """The crop of `size` (H, W): bilinear, black outside the image."""
    return cv2.warpAffine(image, matrix, (size[1], size[0]), flags=cv2.INTER_LINEAR)


def warp_mirrored(image: Array, matrix: Array, size: tuple[int, int]) -> Array:
    """`warp` of the mirror image of `image`, of which no more is made than the crop needs.

    By `mirror(matrix, W)` the same picture comes out but for rounding: one pixel in a thousand differs by one level.
    """
    (a, b, x), (c, d, y) = invert(matrix)
    width, height = size[1] - 1, size[0] - 1
    left, top = x + min(0, a * width) + min(0, b * height), y + min(0, c * width) + min(0, d * height)
    right, bottom = x + max(0, a * width) + max(0, b * height), y + max(0, c * width) + max(0, d * height)
    h, w = image.shape[:2]
    x0, x1, y0, y1 = (
        int(min(max(v, 0), most)) for v, most in ((left - 2, w), (right + 3, w), (top - 2, h), (bottom + 3, h))
    )
    mirrored = np.empty_like(image)
    if x0 < x1 and y0 < y1:
        mirrored[y0:y1, x0:x1] = cv2.flip(image[y0:y1, w - x1 : w - x0], 1)
    return warp(mirrored, matrix, size)


@dataclass(frozen=True)
class PoseAugmentation:
    """Random crops for pose training, as in official JointsDataset.py; defaults are its COCO recipe.

    Args:
        scale: s of the factor clip(1 + s * N(0, 1), 1 - s, 1 + s) on the crop's extent.
        rotation: r of the angle clip(r * N(0, 1), -2 r, 2 r) in degrees.
        rotation_probability: how often to rotate at all.
        flip: probability of a mirror image, left and right joints swapped.
        half_body: probability to crop the upper or the lower body alone.
        half_body_keypoints: only for people with more visible joints than this.
    """

    scale: float = 0.35
    rotation: float = 45.0
    rotation_probability: float = 0.6
    flip: float = 0.5
    half_body: float = 0.3
    half_body_keypoints: int = 8

    def half(
        self, keypoints: Array, visible: Array, upper: Array, size: tuple[int, int], rng: np.random.Generator
    ) -> tuple[Array, Array] | None:
        """Centre and extent of a half-body crop, or None where the official rule keeps the whole.

        Args:
            keypoints, visible: `[K, 2]` and `[K]` of one person.
            upper: bool `[K]`, which joints belong to the upper body.
            size: (H, W) of the crop.
        """
        seen = visible > 0
        if seen.sum() <= self.half_body_keypoints or rng.random() >= self.half_body:
            return None
        above, below = keypoints[seen & upper], keypoints[seen & ~upper]
        # A normal draw below 0.5, as officially: the upper body in 69 % of cases, not in half of them.
        if rng.standard_normal() < 0.5 and len(above) > 2:
            chosen = above
        else:
            chosen = below if len(below) > 2 else above
        if len(chosen) < 2:
            return None
        low, high = chosen.min(0), chosen.max(0)
        centre = chosen.mean(0)
        _, extent = crop_of_box(np.array([*low, *(high - low)]), size, padding=1.5)
        return centre, extent

    def factor(self, rng: np.random.Generator) -> float:
        return float(np.clip(1 + self.scale * rng.standard_normal(), 1 - self.scale, 1 + self.scale))

    def angle(self, rng: np.random.Generator) -> float:
        if rng.random() > self.rotation_probability:
            return 0.0
        return float(np.clip(rng.standard_normal() * self.rotation, -2 * self.rotation, 2 * self.rotation))
