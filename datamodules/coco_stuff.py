"""COCO-Stuff: COCO's pictures in 171 classes, 80 of things and 91 of stuff, measured by mIoU.

`python -m datamodules.coco_stuff check ROOT` says what is missing or faulty in a copy, and where to get it.
`python -m datamodules.coco_stuff convert ROOT` writes the masks of the 10k set, which comes as MATLAB files.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from datamodules.mask_folder import MaskFolder, check, need
from datamodules.transforms import DataError

UNUSED = [11, 25, 28, 29, 44, 65, 67, 68, 70, 82, 90]
"""What the masks could hold but never do: COCO's eleven classes without an instance."""
NUMBERS = [i for i in range(182) if i not in UNUSED]
NAMES = """
    person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, fire hydrant, stop sign,
    parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant, bear, zebra, giraffe, backpack, umbrella,
    handbag, tie, suitcase, frisbee, skis, snowboard, sports ball, kite, baseball bat, baseball glove, skateboard,
    surfboard, tennis racket, bottle, wine glass, cup, fork, knife, spoon, bowl, banana, apple, sandwich, orange,
    broccoli, carrot, hot dog, pizza, donut, cake, chair, couch, potted plant, bed, dining table, toilet, tv, laptop,
    mouse, remote, keyboard, cell phone, microwave, oven, toaster, sink, refrigerator, book, clock, vase, scissors,
    teddy bear, hair drier, toothbrush, banner, blanket, branch, bridge, building-other, bush, cabinet, cage, cardboard,
    carpet, ceiling-other, ceiling-tile, cloth, clothes, clouds, counter, cupboard, curtain, desk-stuff, dirt,
    door-stuff, fence, floor-marble, floor-other, floor-stone, floor-tile, floor-wood, flower, fog, food-other, fruit,
    furniture-other, grass, gravel, ground-other, hill, house, leaves, light, mat, metal, mirror-stuff, moss, mountain,
    mud, napkin, net, paper, pavement, pillow, plant-other, plastic, platform, playingfield, railing, railroad, river,
    road, rock, roof, rug, salad, sand, sea, shelf, sky-other, skyscraper, snow, solid-other, stairs, stone, straw,
    structural-other, table, tent, textile-other, towel, tree, vegetable, wall-brick, wall-concrete, wall-other,
    wall-panel, wall-stone, wall-tile, wall-wood, water-other, waterdrops, window-blind, window-other, wood
"""
SOURCE = (
    "images from cocodataset.org, and stuffthingmaps_trainval2017.zip (or cocostuff-10k-v1.1.zip, with images of its "
    "own) from github.com/nightrome/cocostuff"
)


class CocoStuff(MaskFolder):
    """COCO-Stuff: `images/train2017/*.jpg` and `stuffthingmaps/train2017/*.png`, which hold COCO's numbers minus 1, 0
    to 181, and 255 for what has no label; 118,287 pictures to learn from and 5,000 to evaluate.

    The published HRNets are of the 10k set, 9,000 and 1,000 of these pictures with masks of their own: convert it (see
    above), and set `train: imageLists/train.txt` and `val: imageLists/test.txt`.

    Args:
        root: folder that all paths start from.
        train, val, test: names of the splits' folders, or of `.txt` files with an image a line; None as test is val.
        images, masks: folders, `{}` stands for the split; None looks for images/{} or {}, and for stuffthingmaps/{} or
            annotations/{}.
        train_ids: take the masks `*_labelTrainIds.png`, 0 to 170, that OpenMMLab's converter writes for 164k.
        size, base, eval_size: see `datamodules.ade20k.Ade20k`.
        **kwargs: see `MaskData`.

    Raises:
        DataError: if folders are missing, or images and masks do not belong together.
    """

    def __init__(
        self,
        root: str = "data/coco",
        train: str = "train2017",
        val: str = "val2017",
        test: str | None = None,
        images: str | None = None,
        masks: str | None = None,
        train_ids: bool = False,
        size: tuple[int, int] = (520, 520),
        base: int | None = 520,
        eval_size: int | tuple[int, int] | None = 520,
        **kwargs: Any,
    ) -> None:
        split = "" if train.endswith(".txt") else train

        def first(*names: str) -> str:
            return next((name for name in names if (Path(root) / name.format(split)).is_dir()), names[0])

        super().__init__(
            root,
            dict(zip((n.strip() for n in NAMES.split(",")), range(171) if train_ids else NUMBERS, strict=True)),
            [255],
            train=train,
            val=val,
            test=test,
            images=images or first("images/{}", "{}"),
            masks=masks or first("stuffthingmaps/{}", "annotations/{}"),
            suffix="_labelTrainIds" if train_ids else "",
            size=size,
            base=base,
            eval_size=eval_size,
            **kwargs,
        )

    def pairs(self, split: str) -> list[tuple[Path, Path]]:
        images, masks = self.folders(split)
        if next(masks.glob("*.mat"), None) and not next(masks.glob("*.png"), None):
            raise DataError(f"{masks}: MATLAB files; `python -m datamodules.coco_stuff convert {self.root}` reads them")
        need([images, masks], SOURCE)
        if not self.suffix and next(masks.glob("*_labelTrainIds.png"), None):
            raise DataError(f"{masks}: masks by OpenMMLab's converter (*_labelTrainIds.png); set `train_ids: true`")
        return super().pairs(split)


def convert(root: Path) -> int:
    """Write stuffthingmaps/*.png of annotations/*.mat (0 no label, 1 to 182), and return how many.

    Raises:
        DataError: naming the file that is none of COCO-Stuff 10k.
    """
    from scipy.io import loadmat

    (root / "stuffthingmaps").mkdir(exist_ok=True)
    paths = sorted((root / "annotations").glob("*.mat"))
    for path in paths:
        try:
            stored = np.asarray(loadmat(path)["S"])
        except Exception as error:  # scipy raises whatever a broken file leads it to
            raise DataError(f"{path}: no mask of COCO-Stuff 10k ({error}); unpack it anew") from None
        mask = np.where(stored == 0, 255, stored.astype(np.int32) - 1).astype(np.uint8)
        Image.fromarray(mask).save(root / "stuffthingmaps" / f"{path.stem}.png")
    return len(paths)


def main(args: Sequence[str] | None = None) -> None:
    """`check` or `convert`."""
    parser = argparse.ArgumentParser(prog="python -m datamodules.coco_stuff", description=__doc__)
    parser.add_argument("command", choices=["check", "convert"])
    parser.add_argument("root")
    given = parser.parse_args(args)
    if given.command == "check":
        lists = "imageLists/train.txt", "imageLists/test.txt"
        small = all((Path(given.root) / name).is_file() for name in lists)
        return check(lambda root: CocoStuff(root, *(lists if small else ())), args)
    try:
        print(f"{convert(Path(given.root))} masks written to {given.root}/stuffthingmaps")
    except (DataError, OSError) as error:
        raise SystemExit(str(error)) from None


if __name__ == "__main__":
    main()
