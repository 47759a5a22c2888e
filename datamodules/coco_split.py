"""One COCO file made two, as labelling tools export one and learning takes two.

python -m datamodules.coco_split data/mouse/all.json            # writes train.json and val.json beside it
python -m datamodules.coco_split all.json --val 0.1 --folder data/mouse --seed 1
"""

import argparse
import json
import random
from pathlib import Path
from typing import Any

from datamodules.coco_file import LISTS, read_json
from datamodules.fields import records
from datamodules.transforms import DataError


def split(content: dict[str, Any], val: float = 0.2, seed: int = 0) -> tuple[dict[str, Any], dict[str, Any]]:
    """Two COCO files out of one: pictures drawn by chance, each with all that is labelled in it; all else is in both.

    Args:
        content: with the lists `images` and `annotations`. val: share of the pictures in the second, above 0 and below
            1; each has one at least.

    Raises:
        DataError: for another share, fewer than two pictures, one without an id, or an annotation of none of them.
    """
    ids = [image.get("id") for image in content["images"]]
    others = {annotation.get("image_id") for annotation in content["annotations"]} - {*ids}
    if not 0 < val < 1:
        raise DataError(f"--val is a share of the pictures, above 0 and below 1, got {val:g}")
    if len(ids) < 2:
        raise DataError(f"there is nothing to split: `images` lists {len(ids)}")
    if None in ids:
        raise DataError(f"images[{ids.index(None)}] has no `id`")
    if others:
        raise DataError(f"annotations are of pictures that `images` does not list: `image_id` {next(iter(others))!r}")
    count = min(max(round(val * len(ids)), 1), len(ids) - 1)
    kept = set(random.Random(seed).sample(ids, count))

    def part(second: bool) -> dict[str, Any]:
        chosen = {
            name: [record for record in content[name] if (record[key] in kept) is second]
            for name, key in (("images", "id"), ("annotations", "image_id"))
        }
        return content | chosen

    return part(False), part(True)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m datamodules.coco_split", description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path, help="keypoints or boxes in COCO's format")
    parser.add_argument("--val", type=float, default=0.2, help="share of the pictures to judge by (0.2)")
    parser.add_argument("--folder", type=Path, help="of train.json and val.json; the file's own if not given")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    folder = args.folder or args.file.parent
    paths = [folder / "train.json", folder / "val.json"]
    try:
        content = records(read_json(args.file), args.file, LISTS, "a COCO file")
        if there := [str(path) for path in paths if path.exists()]:
            raise DataError(f"{there[0]} is there already; name another --folder")
        parts = split(content, args.val, args.seed)
        folder.mkdir(parents=True, exist_ok=True)
        for path, part in zip(paths, parts, strict=True):
            path.write_text(json.dumps(part))
            print(f"{path}: {len(part['images'])} pictures, {len(part['annotations'])} annotations")
    except (DataError, OSError) as error:
        raise SystemExit(f"{type(error).__name__}: {error}") from None


if __name__ == "__main__":
    main()
