"""What a joint run shows: each task's pictures and predictions, and pictures with everything in them."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from PIL import Image
from pycocotools import mask as rle

from datamodules.drawing import grid
from tasks.callbacks import Pictures, Predictions
from tasks.detection import Detection
from tasks.pose import Pose
from tasks.segmentation import Segmentation


class JointPictures(Pictures):
    """The same for every task of a joint run."""

    def on_validation_batch_end(
        self, trainer: L.Trainer, task: Any, outputs: Any, batch: Any, index: int, loader: int = 0
    ) -> None:
        name = trainer.datamodule.learned[loader]  # type: ignore[attr-defined]
        super().on_validation_batch_end(trainer, task, {name: outputs}, {name: batch}, index)

    on_test_batch_end = on_validation_batch_end  # type: ignore[assignment]

    @rank_zero_only
    def save(self, trainer: L.Trainer, task: Any, batch: Any, outputs: Any, name: str) -> None:
        for part, samples in batch.items():
            found = None if outputs is None else outputs[part]
            count = min(self.count, len(samples["image"]))
            picture = grid([task.tasks[part].picture(samples, found, i) for i in range(count)])
            self.put(trainer, picture, f"{name}_{part}", f"{'first_batch' if found is None else 'predictions'}_{part}")


class JointPredictions(Predictions):
    """The same for every task of a joint run, in files with its name."""

    def keep(self, trainer: L.Trainer, metric: Any, split: str) -> None:
        for name, part in metric.items():
            super().keep(trainer, part, f"{split}_{name}")


class Everything:
    """What all tasks find in pictures, as their `overlay` draws it: of each picture a dict with a list a task. Label
    maps are written as they come.

    Attributes:
        folder: where to; the callback that gathers predictions sets it.
    """

    def __init__(self, instances: Sequence[Any], tasks: Mapping[str, Any]) -> None:
        self.instances, self.tasks = instances, tasks
        self.folder = Path("predictions")
        self.found: dict[int, dict[str, Any]] = {}

    def update(self, predictions: list[dict[str, Any]], batch: Any) -> None:
        for i, prediction in zip(batch["id"].tolist(), predictions, strict=True):
            item: dict[str, Any] = {"image_id": self.instances[i].image_id}
            for name, result in prediction.items():
                file = self.folder / f"masks_{name}" / f"{Path(self.instances[i].path).stem}_{item['image_id']}.png"
                item[name] = items_of(self.tasks[name], result, file)
            self.found[i] = item

    def results(self) -> list[dict[str, Any]]:
        return [self.found[i] for i in sorted(self.found)]


def items_of(task: Any, result: Any, file: Path) -> list[dict[str, Any]]:
    """A task's `infer` result in builtins, as its `overlay` takes it; a label map goes to `file`."""
    if isinstance(task, Segmentation):
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(result).save(file)
        return [{"mask_file": str(file)}]
    if isinstance(task, Pose):
        points = np.concatenate([result["keypoints"], result["score"][..., None]], axis=-1)
        return [
            {"bbox": box, "keypoints": pose.ravel().tolist(), "score": float(pose[:, 2].mean())}
            for box, pose in zip(result["boxes"].tolist(), points, strict=True)
        ]
    if isinstance(task, Detection):
        items = []
        for i, (x0, y0, x1, y1) in enumerate(result["boxes"].tolist()):
            label = int(result["labels"][i])
            item = {"category_id": task.category_ids[label], "category": result["names"][i]}
            item |= {"bbox": [x0, y0, x1 - x0, y1 - y0], "score": float(result["scores"][i])}
            if "masks" in result:
                code: Any = rle.encode(np.asfortranarray(result["masks"][i].astype(np.uint8)))
                item["segmentation"] = {"size": code["size"], "counts": code["counts"].decode()}
            items.append(item)
        return items
    return [{"classes": json.loads(json.dumps(result))}]


def people(found: Mapping[str, Any], classes: Sequence[str], threshold: float = 0.3) -> list[list[float]]:
    """Boxes x, y, w, h of the people in a detection's `infer` result, or of all things if no class is called person."""
    boxes = zip(found["boxes"].tolist(), found["scores"].tolist(), found["names"], strict=True)
    return [
        [x0, y0, x1 - x0, y1 - y0]
        for (x0, y0, x1, y1), score, name in boxes
        if score >= threshold and (name == "person" or "person" not in classes)
    ]
