"""Semantic segmentation: a class for every pixel, by HRNetV2 or OCR (paper, section 5; arXiv 1909.11065).

`python -m tasks.segmentation fit|validate|test|predict`
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from PIL import Image
from torch import Tensor, nn

from datamodules import ade20k, cityscapes, coco_stuff, lip
from datamodules.drawing import write_text
from datamodules.mask_files import IGNORE, distinct, resized
from datamodules.masks import Masked
from datamodules.transforms import Array, rgb
from hrnet import PRESETS, HRNetConfig
from hrnet.backbone import resolve
from hrnet.checkpoints import config_of, is_source
from hrnet.heads import OCR, HRNetV2
from hrnet.inference import Protocol
from hrnet.losses import OHEM, CrossEntropy
from hrnet.weights import InitFrom
from tasks.base import Task
from tasks.cli import main
from tasks.findings import MaskFindings

PUBLISHED = {
    19: [name for _, name, *_ in cityscapes.CLASSES],
    20: lip.NAMES,
    150: [name.strip() for name in ade20k.NAMES.split(",")],
    171: [name.strip() for name in coco_stuff.NAMES.split(",")],
}
"""Taken where no data and no checkpoint say otherwise: what the official models of so many classes predict."""


class Segmentation(Task):
    """A class for every pixel.

    Args:
        backbone: an `HRNetConfig`, a preset's name such as "w48", or `timm:<name>` for pretrained weights.
        head: class of the head; called with the maps' channels and the number of classes.
        upsample, align_corners: of the exchanges in the backbone, of the head and of the logits: one choice for all of
            them, so it goes over the backbone's, the head's and the evaluation's. Officially bilinear, align_corners
            False for the plain models on Cityscapes, LIP and PASCAL-Context, True with OCR, ADE20K and COCO-Stuff; None
            is the head's own, False for HRNetV2 and True for OCR.
        loss: called with logits, labels and class weights; None is cross-entropy.
        auxiliary: weight of the loss of a head's coarse output, if it has one (OCR; officially 0.4).
        head_lr: factor on the head's learning rate; officially 10 for PASCAL-Context and COCO-Stuff, else 1.
        evaluation: how images are looked at in evaluation and prediction; by default once, as a whole.
        num_classes, class_names, palette, class_weights, flip_pairs: facts of the data (linked on the command line).
        eval_size: to which the data resize pictures in evaluation, so that a checkpoint knows.
        init: of backbone and head. The official "normal" (std 0.001) is for networks that start from ImageNet weights;
            from scratch "kaiming" learns much faster.
        optimizer, lr_scheduler, lr_interval, init_from, mean, std, channels_last: see `Task`.
    """

    heads = ("segmentation", "segmentation with OCR", "pose")  # the last: HRNetV1
    facts = ("num_classes", "class_names", "palette", "class_weights", "flip_pairs", "eval_size")
    protocol = ("eval_size",)
    unkept = ("evaluation",)
    findings = MaskFindings
    tells_confidence = False
    """Whether `predict` says how sure it is of every pixel, too."""

    flip_index: Tensor
    weight: Tensor | None

    def __init__(
        self,
        backbone: HRNetConfig | str = PRESETS["w48"],
        head: Callable[[list[int], int], nn.Module] = HRNetV2,
        upsample: Literal["bilinear", "nearest"] = "bilinear",
        align_corners: bool | None = None,
        loss: CrossEntropy | OHEM | Callable[..., Any] | None = None,
        auxiliary: float = 0.4,
        head_lr: float = 1.0,
        evaluation: Protocol = Protocol(),  # noqa: B008 (frozen)
        init: Literal["kaiming", "normal"] = "normal",
        optimizer: OptimizerCallable | None = None,
        lr_scheduler: LRSchedulerCallable | None = None,
        lr_interval: Literal["epoch", "step"] = "step",
        init_from: str | InitFrom | None = None,
        mean: tuple[float, float, float] = (0.485, 0.456, 0.406),
        std: tuple[float, float, float] = (0.229, 0.224, 0.225),
        channels_last: bool = True,
        num_classes: int = 19,
        class_names: list[str] | None = None,
        palette: list[list[int]] | None = None,
        class_weights: list[float] | None = None,
        flip_pairs: list[list[int]] | None = None,
        eval_size: int | tuple[int, int] | None = None,
    ) -> None:
        if isinstance(backbone, str) and is_source(backbone):
            init_from = init_from or InitFrom(backbone, part="backbone")
            backbone = config_of(backbone)
        with torch.random.fork_rng(devices=[]):
            trial = head([1] * 4, 1)  # what it reads, and how it up-samples
        maps: int = getattr(trial, "maps", 4)
        if align_corners is None:
            align_corners = bool(getattr(trial, "align_corners", False))
        network = replace(resolve(backbone), upsample=upsample, align_corners=align_corners)
        super().__init__(network, maps, init, optimizer, lr_scheduler, lr_interval, init_from, mean, std, channels_last)
        self.save_hyperparameters()
        self.keep_hyperparameters()
        self.head = head(self.backbone.channels, num_classes)
        if hasattr(self.head, "align_corners"):
            self.head.align_corners = align_corners  # type: ignore[assignment]
        if init == "kaiming":
            for module in self.head.modules():
                if isinstance(module, nn.Conv2d):  # by fan-in: few classes by fan-out would have large first logits
                    nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        for module in self.head.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = network.bn_momentum
        self.head_lr = head_lr
        self.align_corners, self.pixel_loss, self.auxiliary = align_corners, loss or CrossEntropy(), auxiliary
        self.evaluation = replace(evaluation, align_corners=align_corners)
        self.class_names = class_names or PUBLISHED.get(num_classes) or [str(i) for i in range(num_classes)]
        colours = [colour for _, _, colour, _ in cityscapes.CLASSES] if num_classes == 19 else distinct(num_classes)
        self.palette = np.array(palette or colours, np.uint8)
        self.eval_size = eval_size
        weight = None if class_weights is None else torch.tensor(class_weights, dtype=torch.float32)
        self.register_buffer("weight", weight, persistent=False)
        index = torch.arange(num_classes)
        for a, b in flip_pairs or ():
            index[a], index[b] = b, a
        self.register_buffer("flip_index", index, persistent=False)

    def loss(self, features: list[Tensor], batch: Any) -> dict[str, Tensor]:
        outputs = self.head.both(features) if isinstance(self.head, OCR) else (self.head(features),)
        names, label = ("label", "coarse"), batch["mask"]
        losses = {}
        for name, logits in zip(names, outputs, strict=False):
            full = F.interpolate(logits.float(), label.shape[-2:], mode="bilinear", align_corners=self.align_corners)
            # The official coarse loss is plain cross-entropy, also where the main one is OHEM.
            loss = CrossEntropy() if name == "coarse" else self.pixel_loss
            losses[name] = loss(full, label, self.weight) * (1 if name == "label" else self.auxiliary)
        return losses

    def predict(self, features: list[Tensor], batch: Any) -> dict[str, Tensor]:
        """`label` uint8 `[B, h, w]`, the best class of every pixel, at the batch's `size`; where that is asked for
        `confidence` `[B, h, w]`, its share of all scores."""
        scores = self.scores(features, batch["image"], size_of(batch))
        found = {"label": scores.argmax(1).to(torch.uint8 if scores.shape[1] <= 256 else torch.int32)}
        return found | {"confidence": scores.amax(1) / scores.sum(1)} if self.tells_confidence else found

    def scores(self, features: list[Tensor], image: Tensor, size: tuple[int, int]) -> Tensor:
        """Scores `[B, C, *size]` by the protocol; what was computed of the whole image already is used."""
        known = features if self.evaluation.window is None else []

        def network(x: Tensor) -> Tensor:
            if known and len(known[0]) == len(x) and x.shape[-2:] == image.shape[-2:]:
                maps = known
            else:
                if (least := min(x.shape[-2:])) < 32:  # smaller than the network's coarsest cell
                    x = F.interpolate(x.float(), scale_factor=32 / least, mode="bilinear")
                maps = self(x)
            return self.head(maps)

        return self.evaluation(network, image, size, self.flip_index)

    def features(self, batch: Any) -> list[Tensor]:
        image = batch["image"]
        return self(torch.cat([image, image.flip(-1)]) if self.evaluation.flip else image)

    def evaluate(self, batch: Any, split: str) -> dict[str, Tensor]:
        if self.evaluation.window is None:
            return super().evaluate(batch, split)
        prediction = self.predict([], batch)  # without the loss, which would look at the whole image at once
        metric: Any = self.metrics[split]
        metric.update(prediction, batch)
        return prediction

    def predict_step(self, batch: Any, index: int) -> dict[str, Tensor]:
        # By windows the whole image may be too large to look at; and `scores` looks at it if nobody has.
        return self.predict([], batch)

    def collector(self, instances: list[Masked]) -> "LabelMaps":
        """What `predict` gathers its output in."""
        return LabelMaps(instances, self.class_names, self.palette)

    def infer(self, images: str | Path | Array | Sequence[Any]) -> Any:
        """Class numbers of every pixel, uint8 `[H, W]`, of a picture in its own size.

        Args:
            images: a path or an RGB uint8 array `[H, W, 3]`, or a list of them, which gives a list.

        Raises:
            DataError: if an image cannot be read, or is no such array.
        """
        if isinstance(images, str | Path | np.ndarray):
            return self.infer([images])[0]
        results = []
        with self.evaluating():
            for given in images:
                image = rgb(given)
                shown = resized(image, self.eval_size)
                tensor = torch.from_numpy(np.ascontiguousarray(shown)).permute(2, 0, 1)[None].to(self.device)
                batch = {"image": tensor, "size": torch.tensor([image.shape[:2]])}
                results.append(self.predict_step(batch, 0)["label"][0].cpu().numpy())
        return results

    def picture(self, batch: Any, prediction: dict[str, Tensor] | None, index: int) -> Array:
        """The input, its labels, and what was predicted, side by side: RGB uint8; ignored pixels are black."""
        panels = [
            batch["image"][index].permute(1, 2, 0).cpu().numpy(),
            self.coloured(batch["mask"][index].cpu().numpy()),
        ]
        if prediction is not None:
            panels.append(self.coloured(prediction["label"][index].cpu().numpy()))
        height, width = panels[1].shape[:2]
        zoom = min(1.0, 480 / max(height, width))  # eight large pictures would make too large a one
        place = (round(width * zoom), round(height * zoom))
        panels = [np.ascontiguousarray(cv2.resize(p, place, interpolation=cv2.INTER_NEAREST)) for p in panels]
        for panel, text in zip(panels, ("image", "label", "prediction"), strict=False):
            write_text(panel, text, (4, 14))
        return np.concatenate(panels, axis=1)

    def coloured(self, label: Array) -> Array:
        """RGB `[H, W, 3]` of class numbers."""
        return table(self.palette)[label].copy()

    def draw(self, image: Array, label: Array, strength: float = 0.5) -> Array:
        """`image` (RGB uint8 `[H, W, 3]`) under the colours of `infer`'s result, with the names of what was found."""
        mixed = cv2.addWeighted(image, 1 - strength, self.coloured(label), strength, 0)
        share = np.bincount(label.ravel(), minlength=256)[: len(self.class_names)] / label.size
        size = max(1.0, max(image.shape[:2]) / 640)
        step = round(18 * size)
        for row, i in enumerate(i for i in np.argsort(-share) if share[i] > 0.002):
            y = 4 + row * step
            cv2.rectangle(mixed, (4, y), (4 + step - 4, y + step - 4), self.palette[i].tolist(), -1)
            write_text(mixed, self.class_names[i], (8 + step, y + step - 6), size)
        return mixed

    def overlay(self, image: Array, items: list[dict[str, Any]]) -> Array:
        """`image` under what `collector` found in it."""
        for item in items:
            image = self.draw(image, np.asarray(Image.open(item["mask_file"])))
        return image


class LabelMaps:
    """Index PNGs, written as they come: a folder of large pictures does not fit into memory.

    Attributes:
        folder: where to; the callback that gathers predictions sets it.
    """

    def __init__(self, instances: list[Masked], names: list[str], palette: Array) -> None:
        self.instances, self.names, self.palette = instances, names, palette
        self.folder = Path("predictions")
        taken: set[str] = set()
        self.files, self.written = [], set[int]()
        for instance in instances:  # two folders may hold the same file name
            stem = name = instance_name(instance)
            number = 1
            while name in taken:
                number += 1
                name = f"{stem}_{number}"
            taken.add(name)
            self.files.append(f"{name}.png")

    def update(self, prediction: dict[str, Tensor], batch: Any) -> None:
        place = self.folder / "masks"
        place.mkdir(parents=True, exist_ok=True)
        for i, label in zip(batch["id"].tolist(), prediction["label"].cpu().numpy(), strict=True):
            picture = Image.fromarray(label)
            picture.putpalette(table(self.palette).ravel().tolist())  # viewers show colours, programs read numbers
            picture.save(place / self.files[i])
            self.written.add(i)

    def results(self) -> list[dict[str, Any]]:
        """What share of each picture is of which class, and where its mask is."""
        found = []
        for i in sorted(self.written):
            path = self.folder / "masks" / self.files[i]
            label = np.asarray(Image.open(path))
            share = np.bincount(label.ravel(), minlength=256)[: len(self.names)] / label.size
            kept = {self.names[i]: round(float(s), 5) for i, s in enumerate(share) if s > 0}
            found.append({"image_id": self.instances[i].image_id, "mask_file": str(path), "share": kept})
        cv2.imwrite(str(self.folder / "legend.png"), cv2.cvtColor(self.legend(), cv2.COLOR_RGB2BGR))
        return found

    def legend(self) -> Array:
        """Number, colour and name of every class."""
        board = np.full((20 * len(self.names) + 8, 300, 3), 255, np.uint8)
        for i, name in enumerate(self.names):
            y = 4 + 20 * i
            cv2.rectangle(board, (4, y), (34, y + 16), self.palette[i].tolist(), -1)
            cv2.putText(board, f"{i} {name}", (42, y + 13), cv2.FONT_HERSHEY_SIMPLEX, 0.45, (0, 0, 0), 1, cv2.LINE_AA)
        return board


def instance_name(instance: Masked) -> str:
    """A picture's file name without its end; frame_000012 of a video."""
    if frame := re.fullmatch(r".*#(\d+)", instance.path):
        return f"frame_{int(frame.group(1)):06d}"
    return Path(instance.path).stem


def table(palette: Array) -> Array:
    """RGB of every number `[256, 3]`; what is no class is black."""
    found = np.zeros((256, 3), np.uint8)
    found[: min(len(palette), IGNORE)] = palette[:IGNORE]
    return found


def size_of(batch: Mapping[str, Any]) -> tuple[int, int]:
    """(h, w) to predict at: the masks', or what the batch says of its pictures, which are then of one size."""
    if "mask" in batch:
        return batch["mask"].shape[-2], batch["mask"].shape[-1]
    height, width = batch["size"][0].tolist()
    return int(height), int(width)


if __name__ == "__main__":
    from tasks.segmentation import Segmentation as Imported  # not of __main__, see tasks.pose

    main(Imported)
