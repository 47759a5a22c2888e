"""Mask files: reading them, what their values mean, and their colours."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from datamodules.transforms import Array, DataError
from datamodules.whole import strictly

IGNORE = 255
"""The label that does not count."""


def resized(image: Array, size: int | tuple[int, int] | None) -> Array:
    """`image` `[H, W, 3]` brought to `size`, (H, W) or the longer side, as OpenCV does it; None leaves it."""
    if size is None:
        return image
    if isinstance(size, int):
        height, width = image.shape[:2]
        factor = size / max(height, width)
        size = (int(height * factor + 0.5), int(width * factor + 0.5))
    return cv2.resize(image, (size[1], size[0]), interpolation=cv2.INTER_LINEAR)


def values_of(numbers: Sequence[int]) -> Array:
    """`[256]` for `MaskDataset`: the classes 0, 1, ... are stored as `numbers`, and nothing else counts."""
    values = np.full(256, IGNORE, np.int16)
    values[list(numbers)] = np.arange(len(numbers))
    return values


def dims(path: Path) -> tuple[int, int]:
    """(W, H) of an image file, from its header.

    Raises:
        DataError: if there is none.
    """
    try:
        with Image.open(path) as file:
            return file.size
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; check the image and mask folders") from None
    except Exception as error:
        raise DataError(f"{path}: broken or no image ({error}); copy it anew, or remove it") from None


def read_mask(
    path: str,
    values: Array | dict[tuple[int, int, int], int],
    size: tuple[int, ...] | None = None,
    read: Callable[[str], Array] | None = None,
) -> Array:
    """Class numbers uint8 `[H, W]` of a mask file, 255 = ignore.

    Args:
        values: see `MaskDataset`. size: (H, W) that it has to have. read: what `stored_by(values)` reads, by another
            reader.

    Raises:
        DataError: naming the file and the value that is of no class.
    """
    stored = (read or stored_by(values))(path)
    if size is not None and stored.shape[:2] != tuple(size[:2]):
        raise DataError(f"{path}: the mask is {stored.shape[1::-1]} and its image {size[1::-1]} (W, H) pixels large")
    if isinstance(values, dict):
        return of_colours(stored, values, path)
    unknown = values < 0
    if unknown.any() and (alien := np.flatnonzero(histogram(stored).astype(bool) & unknown)).size:
        known = sum(int((values == c).any()) for c in range(256) if c != IGNORE)
        raise DataError(
            f"{path}: holds {alien.tolist()}, which no class has ({known} classes); name what it is in the class "
            f"list, or leave it out by `ignore: {alien.tolist()}`"
        )
    return cv2.LUT(stored, values.astype(np.uint8))


def histogram(values: Array) -> Array:
    """How often each of 0 to 255 occurs in uint8 `[H, W]`."""
    return cv2.calcHist([values], [0], None, [256], [0, 256]).ravel()


def stored_by(values: Array | dict[tuple[int, int, int], int]) -> Callable[[str], Array]:
    """What reads masks of such values: `read_numbers` or `read_colours`."""
    return read_colours if isinstance(values, dict) else read_numbers


def read_numbers(path: str) -> Array:
    """The numbers in a mask file, uint8 `[H, W]`.

    Raises:
        DataError: if it is missing, broken, a picture, or of other numbers.
    """
    with opened(path) as file:
        stored, mode = np.asarray(file), file.mode
    if stored.ndim != 2:
        raise DataError(
            f"{path}: a picture of mode {mode} where one number a pixel was expected; for masks that give classes by "
            f"colour say so, `classes: {{road: '#804080', ...}}` (datamodules.mask_folder)"
        )
    if stored.dtype not in (bool, np.uint8) and (stored.max(initial=0) > 255 or stored.min(initial=0) < 0):
        raise DataError(f"{path}: holds the value {int(stored.max())}; masks hold 0 to 255")
    return stored.astype(np.uint8, copy=False)


def read_colours(path: str) -> Array:
    """The colours in a mask file, RGB uint8 `[H, W, 3]`. Raises DataError if it is missing or broken."""
    with opened(path) as file:
        return np.asarray(file.convert("RGB"))


@contextmanager
def opened(path: str) -> Iterator[Image.Image]:
    try:
        with strictly(path) as file:
            yield file
    except FileNotFoundError:
        raise DataError(f"{path}: no such mask; every image needs one") from None
    except DataError:
        raise
    except (OSError, SyntaxError, ValueError) as error:
        raise DataError(f"{path}: broken or no image ({error}); copy it anew, or remove it") from None


def of_colours(stored: Array, values: dict[tuple[int, int, int], int], path: str) -> Array:
    """Class numbers of an RGB mask `[H, W, 3]`."""
    code = (stored[..., 0].astype(np.int32) << 16) | (stored[..., 1].astype(np.int32) << 8) | stored[..., 2]
    keys = np.array([(r << 16) | (g << 8) | b for r, g, b in values])
    order = keys.argsort()
    numbers = np.array(list(values.values()), np.uint8)[order]
    place = np.searchsorted(keys[order], code).clip(max=len(keys) - 1)
    wrong = keys[order][place] != code
    if wrong.any():
        y, x = np.argwhere(wrong)[0]
        colour = "#{:02x}{:02x}{:02x}".format(*stored[y, x])
        raise DataError(
            f"{path}: the colour {colour} at x {x}, y {y} is no class's; add it to `classes` or to `ignore` (a mask "
            f"saved as JPEG, or resized smoothly, has such colours and is no good)"
        )
    return numbers[place]


def distinct(count: int) -> list[list[int]]:
    """As many colours that differ: hues by the golden angle, at changing brightness."""
    found: list[list[int]] = []
    for i in range(2 * count + 8):
        hsv = np.array([[[(i * 68.754) % 180, (200, 150)[i // 3 % 2], (255, 190, 130)[i % 3]]]], np.uint8)
        colour = cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)[0, 0].tolist()
        if colour not in found:
            found.append(colour)
    return found[:count]
