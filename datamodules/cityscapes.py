"""Cityscapes: street scenes of 1024 x 2048 pixels in 19 classes, measured by mIoU.

`python -m datamodules.cityscapes check ROOT` says what is missing or faulty in a copy, and where to get it.
"""

from pathlib import Path
from typing import Any, Literal

from datamodules.mask_files import values_of
from datamodules.mask_folder import check, need
from datamodules.masks import MaskData
from datamodules.transforms import DataError

# Number in the files, name, colour and weight in the loss of every class (cityscapesscripts labels.py; official
# cityscapes.py).
CLASSES = [
    (7, "road", (128, 64, 128), 0.8373),
    (8, "sidewalk", (244, 35, 232), 0.918),
    (11, "building", (70, 70, 70), 0.866),
    (12, "wall", (102, 102, 156), 1.0345),
    (13, "fence", (190, 153, 153), 1.0166),
    (17, "pole", (153, 153, 153), 0.9969),
    (19, "traffic light", (250, 170, 30), 0.9754),
    (20, "traffic sign", (220, 220, 0), 1.0489),
    (21, "vegetation", (107, 142, 35), 0.8786),
    (22, "terrain", (152, 251, 152), 1.0023),
    (23, "sky", (70, 130, 180), 0.9539),
    (24, "person", (220, 20, 60), 0.9843),
    (25, "rider", (255, 0, 0), 1.1116),
    (26, "car", (0, 0, 142), 0.9037),
    (27, "truck", (0, 0, 70), 1.0865),
    (28, "bus", (0, 60, 100), 1.0955),
    (31, "train", (0, 80, 100), 1.0865),
    (32, "motorcycle", (0, 0, 230), 1.1529),
    (33, "bicycle", (119, 11, 32), 1.0507),
]
WEIGHTS = [weight for *_, weight in CLASSES]
SOURCE = "leftImg8bit_trainvaltest.zip and gtFine_trainvaltest.zip from cityscapes-dataset.com (free, by registration)"


class Cityscapes(MaskData):
    """Cityscapes with fine labels in its own layout: `leftImg8bit/train/aachen/*_leftImg8bit.png` and
    `gtFine/train/aachen/*_gtFine_labelIds.png`.

    Args:
        root: folder of leftImg8bit and gtFine.
        train: "train", or "trainval" for both, as for the published figures on the test set; `val` then says nothing.
        val: folder of the split to evaluate.
        test: None is val: the public labels of the test split are all "ignore", and only the benchmark's server
            measures on it (in the numbers of labelIds, where `predict` writes 0 to 18).
        labels: which files hold the masks: "labelIds", 0 to 33 as released, of which 19 are classes, or
            "labelTrainIds", 0 to 18, as the Cityscapes scripts and some copies have them.
        size, base, class_weights: see `MaskData`; "official" are the 19 numbers that the official code always
            applies, whatever its setting says; null leaves them out.
        **kwargs: see `MaskData`.

    Raises:
        DataError: if folders are missing, or images and masks do not belong together.
    """

    def __init__(
        self,
        root: str = "data/cityscapes",
        train: Literal["train", "trainval"] = "train",
        val: str = "val",
        test: str | None = None,
        labels: Literal["labelIds", "labelTrainIds"] = "labelIds",
        size: tuple[int, int] = (512, 1024),
        base: int | None = 2048,
        class_weights: list[float] | Literal["official", "median", "log"] | None = "official",
        **kwargs: Any,
    ) -> None:
        self.root, self.labels = Path(root), labels
        self.splits = {
            "train": ["train", "val"] if train == "trainval" else [train],
            "val": [val],
            "test": [test or val],
        }
        numbers, names, palette, _ = zip(*CLASSES, strict=True)
        super().__init__(
            names,
            values_of(range(len(numbers)) if labels == "labelTrainIds" else numbers),
            palette,
            size=size,
            base=base,
            class_weights=WEIGHTS if class_weights == "official" else class_weights,
            **kwargs,
        )

    def place(self, split: str) -> str:
        return " and ".join(str(self.root / "leftImg8bit" / name) for name in self.splits[split])

    def pairs(self, split: str) -> list[tuple[Path, Path]]:
        folders = [(self.root / "leftImg8bit" / name, self.root / "gtFine" / name) for name in self.splits[split]]
        need([folder for pair in folders for folder in pair], SOURCE)
        found: list[tuple[Path, Path]] = []
        for images, masks in folders:
            pictures = files(images, "_leftImg8bit.png")
            labelled = files(masks, f"_gtFine_{self.labels}.png")
            other = "labelTrainIds" if self.labels == "labelIds" else "labelIds"
            if not labelled and files(masks, f"_gtFine_{other}.png"):
                raise DataError(f"{masks}: no *_{self.labels}.png but *_{other}.png: set `labels: {other}`")
            lone, spare = sorted(pictures.keys() - labelled.keys()), sorted(labelled.keys() - pictures.keys())
            if lone or spare:
                raise DataError(
                    f"{images}: {len(lone)} images without a mask in {masks} (first {lone[:3]}), {len(spare)} masks "
                    f"without an image (first {spare[:3]}); unpack {SOURCE} anew"
                )
            found += [(pictures[name], labelled[name]) for name in sorted(pictures)]
        return found


def files(folder: Path, ending: str) -> dict[str, Path]:
    """Files a folder deeper that end so, by what stands before: "aachen/aachen_000000_000019"."""
    return {p.relative_to(folder).as_posix().removesuffix(ending): p for p in folder.glob(f"*/*{ending}")}


if __name__ == "__main__":
    check(Cityscapes)
