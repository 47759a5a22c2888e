"""LIP, Look into Person: people cut out, in 20 parts and clothes, measured by mIoU.

`python -m datamodules.lip check ROOT` says what is missing or faulty in a copy, and where to get it.
"""

from pathlib import Path
from typing import Any

import cv2

from datamodules.mask_files import resized
from datamodules.mask_folder import MaskFolder, check, need
from datamodules.masks import MaskAugmentation, MaskDataset
from datamodules.transforms import Array

NAMES = [
    *("background", "hat", "hair", "glove", "sunglasses", "upper-clothes", "dress", "coat", "socks", "pants"),
    *("jumpsuits", "scarf", "skirt", "face", "left-arm", "right-arm", "left-leg", "right-leg", "left-shoe"),
    "right-shoe",
]
SOURCE = "TrainVal_images.zip and TrainVal_parsing_annotations.zip of the single-person set at sysu-hcp.net/lip"


class Squeezed(MaskDataset):
    """Brings pictures and masks to `eval_size` before they are scaled and cut.

    The official code mirrors before it pads, so that black borders are always at the right and below; here they are
    where the mirror puts them.
    """

    def crop(self, image: Array, mask: Array) -> tuple[Array, Array]:
        if self.eval_size is not None:
            image = resized(image, self.eval_size)
            mask = cv2.resize(mask, image.shape[1::-1], interpolation=cv2.INTER_NEAREST)
        return super().crop(image, mask)


class Lip(MaskFolder):
    """LIP in its own layout: `TrainVal_images/train_images/*.jpg` and
    `TrainVal_parsing_annotations/train_segmentations/*.png`; 30,462 people to learn from and 10,000 to evaluate.

    As officially every picture is brought to `eval_size`, whatever its shape; the random scale, and the cut to `size`,
    come after. Left and right change places in a mirror image, so that the `_reversed` masks are not needed.

    Args:
        root: folder that all paths start from.
        train, val, test: what comes before `_images` and `_segmentations`; test None is val (LIP's own has no labels).
        size, base, augmentation: see `MaskData`; official code draws scales of 0.5 to 1.6.
        eval_size: (H, W) that pictures are brought to, in training as well; masks to evaluate by keep their size.
        **kwargs: see `MaskData`.

    Raises:
        DataError: if folders are missing, or images and masks do not belong together.
    """

    kind = Squeezed

    def __init__(
        self,
        root: str = "data/lip",
        train: str = "train",
        val: str = "val",
        test: str | None = None,
        size: tuple[int, int] = (473, 473),
        base: int | None = 473,
        augmentation: MaskAugmentation = MaskAugmentation(scale=(0.5, 1.6)),  # noqa: B008 (frozen)
        eval_size: int | tuple[int, int] | None = (473, 473),
        **kwargs: Any,
    ) -> None:
        super().__init__(
            root,
            NAMES,
            [255],
            train=train,
            val=val,
            test=test,
            images="TrainVal_images/{}_images",
            masks="TrainVal_parsing_annotations/{}_segmentations",
            size=size,
            base=base,
            augmentation=augmentation,
            eval_size=eval_size,
            flip_pairs=[[14, 15], [16, 17], [18, 19]],
            **kwargs,
        )

    def pairs(self, split: str) -> list[tuple[Path, Path]]:
        need(self.folders(split), SOURCE)
        return super().pairs(split)


if __name__ == "__main__":
    check(Lip)
