"""Images from files, and geometry that says what it did: every crop returns the matrix it was made with."""

import math
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from datamodules.jpeg import frame_of_jpeg, size_in, top_of_jpeg
from datamodules.whole import strictly, whole

Array = NDArray[Any]

REDUCED = {2: cv2.IMREAD_REDUCED_GRAYSCALE_2, 4: cv2.IMREAD_REDUCED_GRAYSCALE_4, 8: cv2.IMREAD_REDUCED_GRAYSCALE_8}
"""OpenCV's flags; IMREAD_COLOR_RGB beside them makes it colour."""

cv2.setNumThreads(0)  # loader workers are the parallelism; OpenCV's own threads only fight them


class DataError(ValueError):
    """Data that cannot be used; the message names the file, the record and the remedy."""


def read_image(path: str | Path, rows: int | None = None) -> Array:
    """RGB `[H, W, 3]` of an image file, EXIF orientation ignored (labels are made on the stored pixels).

    Args:
        rows: how many to return from the top, at least 1; JPEGs are decoded little further. None is all.

    Raises:
        DataError: naming the file if it is missing, is no image, or is cut off (OpenCV would fill in grey).
    """
    data = _bytes_of(path)
    if rows is None:
        return _decoded(path, data)
    rows = max(rows, 1)
    return _decoded(path, top_of_jpeg(data, rows))[:rows]


def _bytes_of(path: str | Path) -> Array:
    """uint8 `[N]` of a file that is a whole image, as far as one sees without decoding it with OpenCV."""
    try:
        data = np.fromfile(path, np.uint8)
    except OSError as error:
        raise DataError(f"{path}: cannot read the image ({error.strerror}); check the image folder") from None
    _check_whole(path, data)
    return data


def _check_whole(path: object, data: Array) -> None:
    if not len(data):
        raise DataError(f"{path}: the image file is empty; copy it anew")
    if not whole(data):
        _read_all(path, data)


def _decoded(path: object, data: Array, flags: int = cv2.IMREAD_COLOR_RGB) -> Array:
    image = cv2.imdecode(data, flags | cv2.IMREAD_IGNORE_ORIENTATION)
    if image is None:
        raise DataError(f"{path}: not an image OpenCV can read; convert it to JPEG or PNG, or remove its record")
    return image


def read_reduced(path: str | Path, factor: int) -> tuple[Array, int, int]:
    """RGB of a JPEG at 1 / 2, 1 / 4 or 1 / 8 of its size, as `read_image`; the factor; and the width in the file.

    Every pixel is the mean, more or less, of factor x factor. Other formats come whole, with a factor of 1.

    Raises:
        DataError: as `read_image`.
    """
    data = _bytes_of(path)
    frame, _ = frame_of_jpeg(data)
    flag = REDUCED.get(factor)
    if flag is None or not frame:
        image = _decoded(path, data)
        return image, 1, image.shape[1]
    return _decoded(path, data, flag | cv2.IMREAD_COLOR_RGB), factor, size_in(data, frame)[1]


def read_upright(path: str | Path, rows: int | None = None) -> Array:
    """RGB uint8 `[H, W, 3]` of an image file of any kind (grey, CMYK, palette, 16-bit, with alpha), turned as its EXIF
    orientation says: for labels that do not depend on places. All rows, whatever `rows` says: the file may be turned.

    Raises:
        DataError: naming the file if it is missing, is no image, or is cut off.
    """
    try:
        return _upright(path, path)
    except FileNotFoundError:
        raise DataError(f"{path}: cannot read the image (no such file); check the image folder") from None
    except UnidentifiedImageError as error:
        if cv2.haveImageReader(str(path)):
            return read_image(path)  # some formats only OpenCV knows
        raise DataError(f"{path}: broken or no image ({error}); copy it anew, or remove it") from None


def upright_of(data: bytes, name: object) -> Array:
    """What `read_upright` returns for a file of these bytes; `name` is what messages call it.

    Raises:
        DataError: if it is no image, or is cut off.
    """
    try:
        return _upright(name, BytesIO(data))
    except UnidentifiedImageError:
        values = np.frombuffer(data, np.uint8)
        _check_whole(name, values)
        return _decoded(name, values)


def _upright(name: object, source: str | Path | BytesIO) -> Array:
    try:
        with strictly(source) as file:
            image = ImageOps.exif_transpose(file)
            if image.mode.startswith(("I", "F")):  # Pillow would cut 16 bits off at 255
                values = np.asarray(image).astype(np.float32)
                values /= 257 if values.max() > 255 else 1
                return np.repeat(values.round().clip(0, 255).astype(np.uint8)[..., None], 3, axis=2)
            return np.array(image.convert("RGB"))
    except (FileNotFoundError, UnidentifiedImageError):
        raise
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"{name}: broken or no image ({error}); copy it anew, or remove it") from None


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


def _read_all(name: object, data: Array) -> None:
    """Decode with Pillow, which refuses files that OpenCV would silently complete."""
    try:
        with strictly(BytesIO(data.tobytes())) as image:
            image.load()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = "cannot identify it" if isinstance(error, UnidentifiedImageError) else error
        raise DataError(f"{name}: broken or truncated image ({reason}); copy it anew, or leave it out") from None


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
    # By three points in float32, as officially: rounded otherwise, one pixel in a thousand differs by one level.
    half, (x, y) = extent[0] * 0.5, (size[1] * 0.5, size[0] * 0.5)
    target = np.array([(x, y), (x, y - x), (0, y - x)], np.float32)
    source = np.array([centre, (centre[0] + half * sin, centre[1] - half * cos), (0, 0)], np.float32)
    down = source[0] - source[1]
    source[2] = source[1] + [-down[1], down[0]]
    return np.asarray(cv2.getAffineTransform(source, target))


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


def reduced(matrix: Array, factor: int) -> Array:
    """`matrix` for an image of which a pixel stands for factor x factor pixels: x is the middle of factor x and on."""
    return matrix @ np.array([[factor, 0, (factor - 1) / 2], [0, factor, (factor - 1) / 2], [0, 0, 1]])


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
