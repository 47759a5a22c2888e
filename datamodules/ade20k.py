"""ADE20K as in the MIT scene parsing benchmark: any scene, in 150 classes, measured by mIoU.

`python -m datamodules.ade20k check ROOT` says what is missing or faulty in a copy, and where to get it.
"""

from pathlib import Path
from typing import Any

from datamodules.mask_folder import MaskFolder, check, need
from datamodules.transforms import DataError

NAMES = """
    wall, building, sky, floor, tree, ceiling, road, bed, windowpane, grass, cabinet, sidewalk, person, earth, door,
    table, mountain, plant, curtain, chair, car, water, painting, sofa, shelf, house, sea, mirror, rug, field, armchair,
    seat, fence, desk, rock, wardrobe, lamp, bathtub, railing, cushion, base, box, column, signboard, chest of drawers,
    counter, sand, sink, skyscraper, fireplace, refrigerator, grandstand, path, stairs, runway, case, pool table,
    pillow, screen door, stairway, river, bridge, bookcase, blind, coffee table, toilet, flower, book, hill, bench,
    countertop, stove, palm, kitchen island, computer, swivel chair, boat, bar, arcade machine, hovel, bus, towel,
    light, truck, tower, chandelier, awning, streetlight, booth, television receiver, airplane, dirt track, apparel,
    pole, land, bannister, escalator, ottoman, bottle, buffet, poster, stage, van, ship, fountain, conveyer belt,
    canopy, washer, plaything, swimming pool, stool, barrel, basket, waterfall, tent, bag, minibike, cradle, oven, ball,
    food, step, tank, trade name, microwave, pot, animal, bicycle, lake, dishwasher, screen, blanket, sculpture, hood,
    sconce, vase, traffic light, tray, ashcan, fan, pier, crt screen, plate, monitor, bulletin board, shower, radiator,
    glass, clock, flag
"""
SOURCE = "ADEChallengeData2016.zip of the MIT scene parsing benchmark, sceneparsing.csail.mit.edu"


class Ade20k(MaskFolder):
    """ADE20K's 150 classes in the benchmark's layout: `images/training/*.jpg` and `annotations/training/*.png`, 0 for
    what does not count and 1 to 150 for the classes; 20,210 pictures to learn from and 2,000 to evaluate.

    Args:
        root: folder that all paths start from, ADEChallengeData2016. Its objectInfo150.txt, if there, says the names.
        train, val, test: folders of the splits; test None is val (the benchmark keeps the labels of its own).
        size: see `MaskData`.
        base: see `MaskData`. The official code brings the shorter side to 520 first, but then the longer side to 520
            times the random scale, so that nothing of it remains; here it is one step.
        eval_size: longer side that pictures (not masks) are brought to in evaluation, as officially; None leaves them.
        **kwargs: see `MaskData`.

    Raises:
        DataError: if folders are missing, or images and masks do not belong together.
    """

    def __init__(
        self,
        root: str = "data/ADEChallengeData2016",
        train: str = "training",
        val: str = "validation",
        test: str | None = None,
        size: tuple[int, int] = (520, 520),
        base: int | None = 520,
        eval_size: int | tuple[int, int] | None = 520,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            root,
            {name: i + 1 for i, name in enumerate(names_in(Path(root) / "objectInfo150.txt"))},
            [0, 255],
            train=train,
            val=val,
            test=test,
            images="images/{}",
            masks="annotations/{}",
            size=size,
            base=base,
            eval_size=eval_size,
            **kwargs,
        )

    def pairs(self, split: str) -> list[tuple[Path, Path]]:
        need(self.folders(split), SOURCE)
        return super().pairs(split)


def names_in(path: Path) -> list[str]:
    """The classes' names in objectInfo150.txt, the first of each one's synonyms; without the file the same from here.

    Raises:
        DataError: if it lists other than 150 different ones.
    """
    if not path.is_file():
        return [name.strip() for name in NAMES.split(",")]
    lines = [line.split("\t") for line in path.read_text().splitlines()[1:] if line.strip()]
    names = [line[-1].split(",")[0].strip() for line in lines]
    if len(set(names)) != 150:
        raise DataError(f"{path}: {len(set(names))} names where 150 were expected; copy it anew, or remove it")
    return names


if __name__ == "__main__":
    check(Ade20k)
