"""Object detection and instance segmentation on the HRNetV2p pyramid (paper, section 6).

`python -m tasks.detection fit|validate|test|predict`
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np
import torch
import yaml
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from pycocotools import mask as rle
from torch import Tensor, nn
from tqdm import tqdm

from datamodules.box_ap import BoxAP, masks_of, on_images, paste
from datamodules.boxes import BoxDataset, Boxed, collate
from datamodules.drawing import draw_boxes, write_text
from datamodules.images import found_in, ids_of
from datamodules.mask_files import distinct
from datamodules.transforms import Array, DataError, rgb
from hrnet import PRESETS, HRNetConfig
from hrnet.checkpoints import WeightsError
from hrnet.detectors.rcnn import RCNN
from hrnet.weights import InitFrom
from tasks.arguments import SettingError
from tasks.base import Task, images_a_step, rate_of, shown
from tasks.cli import main
from tasks.findings import BoxFindings
from tasks.resume import find_checkpoint, read_checkpoint


@dataclass(frozen=True)
class Limits:
    """Which boxes are put out; None leaves it to the detector.

    Args:
        score: least score. nms: overlap above which the less sure of two boxes of a class goes. detections: how many of
            an image.
    """

    score: float | None = None
    nms: float | None = None
    detections: int | None = None

    def __post_init__(self) -> None:
        if self.score is not None and not 0 <= self.score < 1:
            raise SettingError(f"evaluation.score is a probability, 0 to 1, got {self.score}")
        if self.nms is not None and not 0 < self.nms <= 1:
            raise SettingError(f"evaluation.nms is an overlap, above 0 and at most 1 (none), got {self.nms}")
        if self.detections is not None and self.detections < 1:
            raise SettingError(f"evaluation.detections is a number of boxes, at least 1, got {self.detections}")


class Detection(Task):
    """Boxes of objects, and their masks.

    Args:
        backbone: an `HRNetConfig`, a preset's name such as "w18", or `timm:<name>` for pretrained weights.
        detector: class of the detector, called with the maps' channels and the number of classes; `RCNN` (Faster, Mask,
            Cascade), `RetinaNet`, `FCOS`, `CenterNet`, or anything with `loss(maps, batch)` and `detect(maps, batch)`.
        norm_eval: keep the backbone's batch statistics as they were loaded, and learn the rest: officially so, for two
            images a GPU say little about a batch. It takes pretrained weights.
        evaluation: which boxes are put out in evaluation and prediction.
        num_classes, class_names, category_ids, shorter, longer: facts of the data (linked on the command line).
        init, optimizer, lr_scheduler, lr_interval, init_from, mean, std, channels_last: see `Task`.
    """

    heads = ("detection",)
    facts = ("num_classes", "class_names", "category_ids", "shorter", "longer")
    protocol = ("shorter", "longer")
    unkept = ("evaluation",)
    drawn: float = 0.3
    findings = BoxFindings

    def __init__(
        self,
        backbone: HRNetConfig | str = PRESETS["w18"],
        detector: Callable[[list[int], int], nn.Module] = RCNN,
        norm_eval: bool = False,
        evaluation: Limits = Limits(),
        init: Literal["kaiming", "normal"] = "kaiming",
        optimizer: OptimizerCallable | None = None,
        lr_scheduler: LRSchedulerCallable | None = None,
        lr_interval: Literal["epoch", "step"] = "step",
        init_from: str | InitFrom | None = None,
        mean: tuple[float, float, float] = (0.485, 0.456, 0.406),
        std: tuple[float, float, float] = (0.229, 0.224, 0.225),
        channels_last: bool = True,
        num_classes: int = 80,
        class_names: list[str] | None = None,
        category_ids: list[int] | None = None,
        shorter: int = 800,
        longer: int = 1333,
    ) -> None:
        with torch.random.fork_rng(devices=[]):
            maps: int = getattr(detector([1] * 4, 1), "maps", 4)  # what it reads
        super().__init__(
            backbone, maps, init, optimizer, lr_scheduler, lr_interval, init_from, mean, std, channels_last
        )
        self.save_hyperparameters()
        self.keep_hyperparameters()
        self.head = detector(self.backbone.channels, num_classes)
        for name, value in asdict(evaluation).items():
            if value is not None:
                setattr(self.head, name, value)
        self.norm_eval = norm_eval
        self.class_names = class_names or [str(i) for i in range(num_classes)]
        self.category_ids = category_ids or list(range(1, num_classes + 1))
        self.shorter, self.longer = shorter, longer
        self.palette = distinct(num_classes)

    def setup(self, stage: str) -> None:
        fresh = self.init_from is None and not self.trainer.ckpt_path
        if stage == "fit" and self.norm_eval and fresh:
            raise WeightsError(
                "norm_eval keeps batch statistics as they were loaded, but no weights are: give --model.backbone "
                "timm:<name> or --model.init_from.path, or to train from scratch --model.norm_eval false"
            )
        masks, wanted = getattr(self.head, "masks", False), getattr(self.trainer.datamodule, "masks", False)  # type: ignore[attr-defined]
        if stage != "predict" and masks != wanted:
            raise DataError(
                f"the detector has {'a' if masks else 'no'} mask head, but data.masks is {wanted}; set both"
            )
        super().setup(stage)

    def on_fit_start(self) -> None:
        super().on_fit_start()
        if isinstance(self.trainer.optimizers[0], torch.optim.SGD):
            rate = rate_of(self.trainer) * 16 / images_a_step(self.trainer)
            rank_zero_info(f"in proportion {rate:g} for 16 images; officially 0.02 (R-CNNs) or 0.01 (FCOS)")

    def on_train_start(self) -> None:
        self.train()  # which Lightning leaves to the model

    def train(self, mode: bool = True) -> "Detection":
        super().train(mode)
        if self.norm_eval:
            for module in self.backbone.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()
        return self

    def loss(self, features: list[Tensor], batch: Any) -> dict[str, Tensor]:
        return self.head.loss(features, batch)  # type: ignore[operator]

    def predict(self, features: list[Tensor], batch: Any) -> dict[str, list[Tensor]]:  # type: ignore[override]
        """Lists, an item an image: `boxes` `[N, 4]` x0, y0, x1, y1 in pixels of the batch, `scores` and `labels` `[N]`,
        and with a mask head `masks` `[N, 28, 28]`, probabilities over each box."""
        found = self.head.detect(features, batch)  # type: ignore[operator]
        return {name: [part[name] for part in found] for name in found[0]}

    def evaluate(self, batch: Any, split: str) -> dict[str, Tensor]:
        """Without a loss: torchvision's parts have one in training mode alone."""
        prediction = self.predict(self(batch["image"]), batch)
        metric: Any = self.metrics[split]
        metric.update(prediction, batch)
        return prediction  # type: ignore[return-value]

    def collector(self, instances: list[Boxed]) -> "Found":
        """What `predict` gathers its output in."""
        return Found(instances, self.class_names, self.category_ids, getattr(self.head, "masks", False))

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        names = checkpoint.get("hyper_parameters", {}).get("class_names")
        if names is not None and list(names) != self.class_names:
            raise WeightsError(
                f"the checkpoint's classes {shown(names)} are not the data's {shown(self.class_names)}; use the data "
                f"it was trained for (`-c` with the config.yaml of its run), or start from it by init_from"
            )
        super().on_load_checkpoint(checkpoint)

    def infer(self, images: str | Path | Array | Sequence[Any]) -> Any:
        """Objects of images, in their own pixels.

        Args:
            images: a path or an RGB uint8 array `[H, W, 3]`, or a list of them, which gives a list.

        Returns:
            `boxes` `[N, 4]` x0, y0, x1, y1, `scores` `[N]`, `labels` `[N]`, `names`, and with a mask head `masks` bool
            `[N, H, W]`; the surest first.

        Raises:
            DataError: if an image cannot be read, or is no such array.
        """
        if isinstance(images, str | Path | np.ndarray):
            return self.infer([images])[0]
        results = []
        with self.evaluating():
            for given in images:
                image = rgb(given)
                data = BoxDataset([Boxed("", 0)], self.shorter, self.longer, read=lambda _, image=image: image)  # type: ignore[misc]
                batch = {k: v.to(self.device) if isinstance(v, Tensor) else v for k, v in collate([data[0]]).items()}
                prediction: Any = self.predict_step(batch, 0)
                boxes = on_images(prediction["boxes"], batch)
                result = {
                    "boxes": boxes[0].cpu().numpy(),
                    "scores": prediction["scores"][0].cpu().numpy(),
                    "labels": prediction["labels"][0].cpu().numpy(),
                    "names": [self.class_names[i] for i in prediction["labels"][0].tolist()],
                }
                if "masks" in prediction:
                    codes = masks_of(prediction["masks"], boxes, batch)[0]
                    result["masks"] = (
                        rle.decode(codes).astype(bool).transpose(2, 0, 1)
                        if codes
                        else np.zeros((0, *image.shape[:2]), bool)
                    )
                results.append(result)
        return results

    def picture(self, batch: Any, prediction: Any, index: int) -> Array:
        """Labels, and beside them what was found with a score of `drawn` or more: RGB uint8."""
        image = batch["image"][index].permute(1, 2, 0).cpu().numpy()
        factor = min(1.0, 640 / max(image.shape[:2]))
        image = cv2.resize(image, None, fx=factor, fy=factor, interpolation=cv2.INTER_AREA) if factor < 1 else image

        def panel(boxes: Tensor, labels: Tensor, scores: Tensor | None, title: str, masks: list[Array]) -> Array:
            names = [self.class_names[i] for i in labels.tolist()]
            texts = names if scores is None else [f"{n} {s:.2f}" for n, s in zip(names, scores.tolist(), strict=True)]
            colours = [self.palette[i] for i in labels.tolist()]
            drawn = draw_boxes(image, boxes.float().cpu().numpy() * factor, colours, texts, masks)
            write_text(drawn, title, (4, drawn.shape[0] - 6))
            return drawn

        place = image.shape[:2]
        known = [cv2.resize(m.cpu().numpy(), place[::-1]) for m in batch["masks"][index]] if "masks" in batch else []
        panels = [panel(batch["boxes"][index], batch["labels"][index], None, "label", known)]
        if prediction is not None:
            sure = prediction["scores"][index] >= self.drawn
            boxes, labels, scores = (prediction[name][index][sure].float() for name in ("boxes", "labels", "scores"))
            found = prediction["masks"][index][sure].float().cpu().numpy() if "masks" in prediction else []
            masks = [paste(m, b, place) for m, b in zip(found, boxes.cpu().numpy() * factor, strict=False)]
            panels.append(panel(boxes, labels.long(), scores, "prediction", masks))
        return np.concatenate(panels, axis=1)

    def draw(self, image: Array, result: dict[str, Any], threshold: float | None = None) -> Array:
        """`image` (RGB uint8 `[H, W, 3]`) with an `infer` result's objects of `threshold`, or else `drawn`, or more."""
        threshold = self.drawn if threshold is None else threshold
        rows = [i for i, score in enumerate(result["scores"]) if score >= threshold][::-1]  # the surest on top
        colours = [self.palette[result["labels"][i]] for i in rows]
        texts = [f"{self.class_names[result['labels'][i]]} {result['scores'][i]:.2f}" for i in rows]
        masks = [result["masks"][i] for i in rows] if "masks" in result else None
        return draw_boxes(image, np.asarray(result["boxes"])[rows].reshape(-1, 4), colours, texts, masks)

    def overlay(self, image: Array, items: list[dict[str, Any]]) -> Array:
        """`image` with what `collector` found in it."""
        items = [
            item for item in items if item["score"] >= self.drawn
        ]  # `draw` shows no others: decode no masks for nothing
        label = {category: i for i, category in enumerate(self.category_ids)}
        boxes = np.array([item["bbox"] for item in items], dtype=np.float64).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        result: dict[str, Any] = {
            "boxes": boxes,
            "scores": [item["score"] for item in items],
            "labels": [label[item["category_id"]] for item in items],
        }
        if items and "segmentation" in items[0]:
            result["masks"] = [rle.decode(item["segmentation"]) for item in items]
        return self.draw(image, result)


class Found(nn.Module):
    """Items of a COCO results file, with names: image_id, category_id, category, bbox (x, y, width, height in pixels of
    the picture), score, and with masks segmentation (RLE)."""

    def __init__(self, instances: Sequence[Boxed], names: list[str], ids: list[int], masks: bool) -> None:
        super().__init__()
        nothing: dict[str, Any] = {"images": [], "annotations": []}
        images = [instance.image_id for instance in instances]
        kinds = ("bbox", "segm") if masks else ("bbox",)
        self.parts = nn.ModuleList(BoxAP(nothing, images, ids, names, kind) for kind in kinds)  # type: ignore[arg-type]
        self.names = dict(zip(ids, names, strict=True))

    def update(self, prediction: Any, batch: Any) -> None:
        for part in self.parts:
            part.update(prediction, batch)  # type: ignore[operator]

    def results(self) -> list[dict[str, Any]]:
        """To be called by all processes."""
        items: list[list[dict[str, Any]]] = [part.results() for part in self.parts]  # type: ignore[operator]
        for item, *masks in zip(*items, strict=True):
            item["category"] = self.names[item["category_id"]]
            for mask in masks:
                item["segmentation"] = mask["segmentation"]
        return items[0]


def write_boxes(checkpoint: str, path: str, folder: Path) -> Path:
    """Find people (all objects, if no class of the checkpoint is called so) in the pictures or the video of `path`, and
    write their boxes as COCO results to a new file in `folder`.

    Raises:
        WeightsError: if `checkpoint` is none of a detection run; "last" and "best" are the newest run's.
    """
    if checkpoint in ("last", "best"):
        checkpoint = str(find_checkpoint(folder.parent / "detection", checkpoint))
    if "detector" not in read_checkpoint(Path(checkpoint))["hyper_parameters"]:
        raise WeightsError(
            f"{checkpoint}: not a checkpoint of a detection run; --detector wants one of tasks.detection"
        )
    model = Detection.load_from_checkpoint(checkpoint, map_location="cpu", weights_only=True)
    if torch.accelerator.is_available():
        model.to(torch.accelerator.current_accelerator())
    files, video = found_in(yaml.safe_load(path) if path.startswith("[") and not Path(path).exists() else path)
    pictures = enumerate(video) if video is not None else zip(ids_of(files), files, strict=True)  # type: ignore[arg-type, var-annotated]
    wanted = {"person"} & set(model.class_names) or set(model.class_names)
    items = []
    for image_id, picture in tqdm(pictures, total=len(video or files), desc="detecting", unit="image"):
        found = model.infer(picture)
        for box, score, name in zip(found["boxes"].tolist(), found["scores"].tolist(), found["names"], strict=True):
            if name in wanted:
                place = [*box[:2], box[2] - box[0], box[3] - box[1]]
                items.append({"image_id": image_id, "category_id": 1, "bbox": place, "score": score})
    if not items:
        raise DataError(
            f"{checkpoint}: found no {' or '.join(sorted(wanted))} in {path}; is it trained for such pictures?"
        )
    folder.mkdir(parents=True, exist_ok=True)
    number = len([*folder.glob("boxes_*.json")])
    file = folder / f"boxes_{number}.json"
    file.write_text(json.dumps(items))
    print(f"{len(items)} boxes in {len(video or files)} images: {file}", flush=True)
    return file


if __name__ == "__main__":
    from tasks.detection import Detection as Imported  # not of __main__, see tasks.pose

    main(Imported)
