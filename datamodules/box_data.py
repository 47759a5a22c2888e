"""Loaders of images with boxes, and what COCO's metric wants to know of them: what all detection data share."""

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from pycocotools import mask as rle
from torch.utils.data import DataLoader
from torchmetrics import Metric, MetricCollection

from datamodules.base import DataModule
from datamodules.box_ap import BoxAP
from datamodules.boxes import BoxAugmentation, BoxDataset, Boxed, collate
from datamodules.transforms import DataError, read_image


class BoxData(DataModule):
    """Loaders of images and boxes. A subclass says `instances(split)`.

    Args:
        class_names: of the classes 0, 1, ...
        category_ids: their numbers in files of results; None counts from 1.
        shorter, longer, masks: see `BoxDataset`; officially 800 and 1333.
        augmentation: of training.
        empty: whether to train on images that show nothing (officially not).
        per_class: whether to report AP of each class as well.
        backend: of the metric, see `BoxAP`.
        batch_size: 2 a process, as officially.
        eval_batch_size: 1, as officially; more pads images to a common size, which changes what the network sees.
        **kwargs: see `DataModule`.

    Attributes:
        num_classes, class_names, category_ids, shorter, longer: facts that the command line gives to the task.
    """

    read = staticmethod(read_image)
    """What reads the images."""

    def __init__(
        self,
        class_names: Sequence[str],
        category_ids: Sequence[int] | None = None,
        shorter: int = 800,
        longer: int = 1333,
        augmentation: BoxAugmentation = BoxAugmentation(),  # noqa: B008 (frozen)
        masks: bool = False,
        empty: bool = False,
        per_class: bool = False,
        backend: str = "numpy",
        batch_size: int = 2,
        eval_batch_size: int | None = 1,
        **kwargs: Any,
    ) -> None:
        super().__init__(batch_size, eval_batch_size=eval_batch_size, **kwargs)
        if not 32 <= shorter <= longer:
            raise DataError(
                f"shorter and longer are sides of images in pixels, at least 32 and in this order, got {shorter} and "
                f"{longer}"
            )
        if backend not in ("numpy", "faster", "pycocotools"):
            raise DataError(f"backend is numpy, faster or pycocotools, got {backend!r}")
        self.class_names, self.num_classes = list(class_names), len(class_names)
        self.category_ids = list(category_ids) if category_ids else list(range(1, self.num_classes + 1))
        self.shorter, self.longer, self.augmentation, self.masks = shorter, longer, augmentation, masks
        self.empty, self.per_class, self.backend = empty, per_class, backend

    def instances(self, split: str) -> list[Boxed]:
        """All images of "train", "val" or "test", and what is in them."""
        raise NotImplementedError

    def truth(self, split: str) -> dict[str, Any]:
        """What is to be found, as a COCO file has it."""
        return coco_of(self.datasets[split].instances, self.class_names, self.category_ids)  # type: ignore[attr-defined]

    def metric(self, split: str = "val") -> Metric | MetricCollection:
        """COCO's AP of boxes, and of masks if there are any."""
        truth, ids = self.truth(split), [i.image_id for i in self.datasets[split].instances]  # type: ignore[attr-defined]
        kinds: tuple[Literal["bbox", "segm"], ...] = ("bbox", "segm") if self.masks else ("bbox",)
        parts = {
            kind: BoxAP(truth, ids, self.category_ids, self.class_names, kind, self.per_class, self.backend)
            for kind in kinds
        }
        return MetricCollection(parts, compute_groups=False) if self.masks else parts["bbox"]  # type: ignore[arg-type]

    def setup(self, stage: str) -> None:
        for split in {"fit": ["train", "val"], "validate": ["val"], "test": ["test"]}[stage]:
            if split in self.datasets:
                continue
            found = instances = self.instances(split)
            if split == "train" and not self.empty:
                count = len(instances)
                instances = [i for i in instances if not i.crowd.all()]
                if count > len(instances):
                    rank_zero_info(
                        f"{count - len(instances)} of {count} training images show no object and are left out"
                    )
            if not instances:
                shown = f" with an object, of {len(found)} such as {found[0].path}" if found else ""
                raise DataError(f"the {split} split has no image{shown}; look at its labels, or name another")
            augmentation = self.augmentation if split == "train" else None
            read = self.reader(self.read)
            self.datasets[split] = BoxDataset(instances, self.shorter, self.longer, augmentation, self.masks, read)

    def loader(self, split: str, **options: Any) -> DataLoader:
        if split == "train":  # upright or lying images together, so that little is padded
            options["groups"] = [i.width > i.height for i in self.datasets[split].instances]  # type: ignore[attr-defined]
        return super().loader(split, collate_fn=collate, **options)


def coco_of(instances: Sequence[Boxed], names: Sequence[str], ids: Sequence[int]) -> dict[str, Any]:
    """The content of a COCO file."""
    annotations: list[dict[str, Any]] = []
    for instance in instances:
        for i, (box, label, crowd) in enumerate(zip(instance.boxes, instance.labels, instance.crowd, strict=True)):
            annotation: dict[str, Any] = {
                "id": len(annotations) + 1,
                "image_id": instance.image_id,
                "category_id": ids[label],
                "bbox": [float(v) for v in (*box[:2], *(box[2:] - box[:2]))],
                "area": float((box[2:] - box[:2]).prod()),
                "iscrowd": int(crowd),
            }
            if instance.segmentations and instance.segmentations[i] is not None:
                outline = [np.asarray(polygon).ravel().tolist() for polygon in instance.segmentations[i]]
                code = rle.merge(rle.frPyObjects(outline, instance.height, instance.width))
                annotation |= {"segmentation": outline, "area": float(rle.area(code))}
            annotations.append(annotation)
    return {
        "images": [{"id": i.image_id, "file_name": i.path, "width": i.width, "height": i.height} for i in instances],
        "annotations": annotations,
        "categories": [{"id": i, "name": name} for i, name in zip(ids, names, strict=True)],
    }
