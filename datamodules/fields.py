"""What the fields of a file's records have to be, looked at before anything is made of them."""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from datamodules.transforms import DataError

LIMIT = 1e15
"""What no coordinate, size or area of a picture comes near; float32 and int64 hold it."""


def whole(value: Any) -> bool:
    return type(value) is int and abs(value) <= LIMIT


def name(value: Any) -> bool:
    return whole(value) or type(value) is str


def text(value: Any) -> bool:
    return type(value) is str and value != "" and "\0" not in value


def number(value: Any) -> bool:
    return type(value) in (int, float) and not LIMIT < abs(value) < math.inf  # NaN has consequences, told elsewhere


def size(value: Any) -> bool:
    return number(value) and 0 < value < math.inf


def numbers(value: Any) -> bool:
    return type(value) is list and all(map(number, value))


def texts(value: Any) -> bool:
    return type(value) is list and all(map(text, value))


def pairs(value: Any) -> bool:
    return type(value) is list and all(numbers(pair) and len(pair) == 2 for pair in value)


def flag(value: Any) -> bool:
    return type(value) is bool or (type(value) is int and value in (0, 1))


Field = tuple[str, Callable[[Any], bool]]
IMAGE: dict[str, Field] = {
    "id": ("is not a whole number or text", name),
    "file_name": ("is not text", text),
    "width": ("is not a positive number", size),
    "height": ("is not a positive number", size),
}
ANNOTATION: dict[str, Field] = {
    "id": ("is not a whole number", whole),
    "image_id": ("is not a whole number or text", name),
    "category_id": ("is not a whole number", whole),
    "bbox": ("are not finite numbers", numbers),
    "area": ("is not a number", number),
    "iscrowd": ("is not 0 or 1", flag),
    "keypoints": ("are not finite numbers", numbers),
    "num_keypoints": ("is not a number", number),
    "score": ("is not a number", number),
}
CATEGORY: dict[str, Field] = {
    "id": ("is not a whole number", whole),
    "name": ("is not text", text),
    "keypoints": ("are not a list of names", texts),
    "skeleton": ("is not a list of pairs of numbers", pairs),
}


def read_text(path: str | Path) -> str:
    """A text file.

    Raises:
        DataError: if it cannot be read, or is not UTF-8.
    """
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); check its name and folder") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: no text in UTF-8 ({error}); save it so, or copy it anew") from None


def mistyped(record: Mapping[str, Any], fields: Mapping[str, Field]) -> str:
    """Which field of a record is there and of another kind than it has to be; "" if none is. None stands for missing.

    Only kinds are looked at: whether numbers are sensible is for who knows what they are for.
    """
    for key, (kind, fits) in fields.items():
        value = record.get(key)
        if value is not None and not fits(value):
            return f"`{key}` that {kind}"
    return ""


def records(content: Any, path: str | Path, lists: tuple[str, ...], what: str) -> dict[str, Any]:
    """`content` of a COCO file, after a look at its `lists` and its categories.

    Raises:
        DataError: if a list is missing, or holds anything but objects; or if a category's fields are of another kind.
    """
    missing = [k for k in lists if not isinstance(content, dict) or not isinstance(content.get(k), list)]
    if missing:
        raise DataError(f"{path}: no list {', '.join(missing)}; {what} holds {', '.join(lists)}")
    for key in lists:
        for i, record in enumerate(content[key]):
            if type(record) is not dict:
                raise DataError(f"{path}: {key}[{i}] is {str(record)[:40]!r}, not an object; export it anew")
    for i, category in enumerate(content["categories"]):
        if category.get("id") is None or (wrong := mistyped(category, CATEGORY)):
            wrong = "no `id`" if category.get("id") is None else wrong
            raise DataError(f"{path}: categories[{i}] ({category.get('name')!r:.40}) has {wrong}; correct it there")
    return content
