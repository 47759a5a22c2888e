"""Image classification: the ImageNet network, which all others start from (paper, appendix B).

`python -m tasks.classification fit|validate|test|predict`
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from timm.data import ImageNetInfo
from torch import Tensor, nn
from torchvision.transforms import v2

from datamodules.drawing import write_text
from datamodules.image_folder import Labelled, centre
from datamodules.transforms import Array, DataError, rgb
from hrnet import PRESETS, HRNetConfig
from hrnet.checkpoints import WeightsError, timm_model
from hrnet.heads import Classification as ClassificationHead
from hrnet.weights import InitFrom
from tasks.base import Task
from tasks.cli import main
from tasks.findings import LabelFindings


class Classification(Task):
    """One label a picture.

    Args:
        backbone: an `HRNetConfig`, a preset's name such as "w18", or `timm:<name>` for pretrained weights.
        head: class of the head; called with the maps' channels and the number of classes.
        label_smoothing: share of the label that all classes get alike.
        mixup, cutmix: alpha of the mix of two pictures; 0 is none, with both one is drawn a batch.
        teacher: a timm model whose output is learned too (knowledge distillation); its input is ours.
        distillation: share of the teacher in the loss. temperature: of both outputs in it.
        freeze: beginnings of names of parameters that do not learn, such as "backbone" or "backbone.stage2".
        num_classes, class_names: facts of the data (linked on the command line).
        size, resize: how the data cut pictures, so that a checkpoint knows what it was fed.
        init, optimizer, lr_scheduler, lr_interval, init_from, mean, std, channels_last: see `Task`.
    """

    heads = ("classification",)
    facts = ("num_classes", "class_names", "size", "resize")
    protocol = ("size", "resize")
    unkept = ("teacher",)
    findings = LabelFindings

    def __init__(
        self,
        backbone: HRNetConfig | str = PRESETS["w18"],
        head: Callable[[list[int], int], nn.Module] = ClassificationHead,
        label_smoothing: float = 0.0,
        mixup: float = 0.0,
        cutmix: float = 0.0,
        teacher: str | None = None,
        distillation: float = 0.5,
        temperature: float = 1.0,
        freeze: list[str] | None = None,
        init: Literal["kaiming", "normal"] = "kaiming",
        optimizer: OptimizerCallable | None = None,
        lr_scheduler: LRSchedulerCallable | None = None,
        lr_interval: Literal["epoch", "step"] = "epoch",
        init_from: str | InitFrom | None = None,
        mean: tuple[float, float, float] = (0.485, 0.456, 0.406),
        std: tuple[float, float, float] = (0.229, 0.224, 0.225),
        channels_last: bool = True,
        num_classes: int = 1000,
        class_names: list[str] | None = None,
        size: int = 224,
        resize: int = 256,
    ) -> None:
        super().__init__(backbone, 4, init, optimizer, lr_scheduler, lr_interval, init_from, mean, std, channels_last)
        self.save_hyperparameters()
        self.keep_hyperparameters()
        self.head = head(self.backbone.channels, num_classes)
        self.class_names = class_names or default_names(num_classes)
        self.label_smoothing, self.size, self.resize = label_smoothing, size, resize
        self.distillation, self.temperature, self.frozen = distillation, temperature, tuple(freeze or ())
        mixes = [kind(alpha=a, num_classes=num_classes) for kind, a in ((v2.MixUp, mixup), (v2.CutMix, cutmix)) if a]
        self.mix = v2.RandomChoice(mixes) if mixes else None
        self.teacher_name = teacher
        self.teacher: list[nn.Module] = []  # in a list: no part of the network, nor of its checkpoints
        names = [name for name, _ in self.named_parameters()]
        idle = [f for f in self.frozen if not any(name.startswith(f) for name in names)]
        if idle:
            raise ValueError(
                f"freeze: no parameter's name begins with {idle}; they begin with {sorted(beginnings(names))}"
            )
        if not 0 <= label_smoothing < 1 or min(mixup, cutmix) < 0:
            raise ValueError(
                f"label_smoothing is 0 to 1, mixup and cutmix are 0 or more; got {label_smoothing}, {mixup}, {cutmix}"
            )
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(not (self.frozen and name.startswith(self.frozen)))

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if stage == "fit" and self.teacher_name is not None and not self.teacher:
            teacher: Any = timm_model(self.teacher_name).requires_grad_(False)
            if teacher.num_classes != len(self.class_names):
                raise WeightsError(
                    f"the teacher {self.teacher_name} knows {teacher.num_classes} classes, the data have "
                    f"{len(self.class_names)}: it has to have learned the same ones"
                )
            self.teacher = [teacher]

    def on_train_start(self) -> None:
        for name, module in self.named_modules():
            if self.frozen and f"{name}.".startswith(tuple(f"{f}." for f in self.frozen)):
                module.eval()  # frozen batch norm does not move either

    def training_step(self, batch: Any, index: int) -> Tensor:
        if self.mix is not None:
            image, label = self.mix(batch["image"].float(), batch["label"])
            batch = batch | {"image": image, "label": label}
        return super().training_step(batch, index)

    def loss(self, features: list[Tensor], batch: Any) -> dict[str, Tensor]:
        logits = self.logits(features)
        losses = {"label": F.cross_entropy(logits, batch["label"], label_smoothing=self.label_smoothing)}
        if self.training and self.teacher:
            with torch.no_grad():
                target = self.teacher[0].to(self.device)(self.normalised(batch["image"])).float() / self.temperature
            ours = (logits / self.temperature).log_softmax(-1)
            apart = F.kl_div(ours, target.log_softmax(-1), reduction="batchmean", log_target=True)
            losses["label"] = losses["label"] * (1 - self.distillation)
            losses["teacher"] = apart * self.temperature**2 * self.distillation
        return losses

    def logits(self, features: list[Tensor]) -> Tensor:
        return self.head(features).float()

    def predict(self, features: list[Tensor], batch: Any) -> dict[str, Tensor]:
        """`probability` `[B, C]`."""
        return {"probability": self.logits(features).softmax(-1)}

    def embed(self, images: str | Path | Array | Tensor | Sequence[Any]) -> Tensor:
        """`[B, 2048]` (of the ImageNet head), the pooled vectors before the classifier; for retrieval.

        Args:
            images: as for `infer`, or uint8 RGB `[B, 3, H, W]`, taken as it is.
        """
        if isinstance(images, str | Path | np.ndarray):
            images = [images]
        if not isinstance(images, Tensor):
            images = torch.stack([self.tensor(image) for image in images])
        if images.dtype != torch.uint8:
            raise DataError(f"images must be RGB of 0 to 255, uint8, got {images.dtype}")
        with self.evaluating():
            return self.head.pooled(self(images.to(self.device))).float()  # type: ignore[operator]

    def tensor(self, image: str | Path | Array) -> Tensor:
        """A picture as the network looks at it, uint8 `[3, S, S]`."""
        return centre(self.size, self.resize)(torch.tensor(rgb(image)).permute(2, 0, 1))

    def collector(self, instances: list[Labelled]) -> "TopFive":
        """What `predict` gathers its output in."""
        return TopFive(instances, self.class_names)

    def infer(self, images: str | Path | Array | Sequence[Any]) -> Any:
        """The five best classes of a picture: `[{"class": name, "score": probability}, ...]`, best first.

        Args:
            images: a path or an RGB uint8 array `[H, W, 3]`, or a list of them, which gives a list of these.
        """
        if isinstance(images, str | Path | np.ndarray):
            return self.infer([images])[0]
        results = []
        with self.evaluating():
            for image in images:
                batch = {"image": self.tensor(image)[None].to(self.device)}
                probability = self.predict_step(batch, 0)["probability"]
                results.append(best_five(probability[0], self.class_names))
        return results

    def picture(self, batch: Any, prediction: dict[str, Tensor] | None, index: int) -> Array:
        """The input, what it shows, and what was found in it: RGB uint8 `[S + 40, S, 3]`, S at least 160."""
        image = batch["image"][index].float().clamp(0, 255).byte().permute(1, 2, 0).cpu().numpy()
        zoom = max(1, round(160 / image.shape[0]))
        image = image.repeat(zoom, 0).repeat(zoom, 1)
        board = np.concatenate([image, np.full((40, image.shape[1], 3), 255, np.uint8)])
        label = batch["label"][index]
        true = int(label.argmax() if label.ndim else label)
        lines = [(self.class_names[true], (0, 0, 0))]
        if prediction is not None:
            probability, found = prediction["probability"][index].max(-1)
            ink = (0, 130, 0) if int(found) == true else (200, 0, 0)
            lines.append((f"{self.class_names[int(found)]} {float(probability):.2f}", ink))
        for i, (text, ink) in enumerate(lines):
            place = (3, image.shape[0] + 15 + 18 * i)
            cv2.putText(board, text[:24], place, cv2.FONT_HERSHEY_SIMPLEX, 0.45, ink, 1, cv2.LINE_AA)
        return board

    def overlay(self, image: Array, items: list[dict[str, Any]]) -> Array:
        """`image` with the best class and its score written on it."""
        board = image.copy()
        size = max(board.shape[:2]) / 640
        for item in items:
            text = f"{item['classes'][0]['class']} {item['classes'][0]['score']:.2f}"
            write_text(board, text, (8 * size, 28 * size), 1.8 * size)
        return board


def default_names(count: int) -> list[str]:
    """ImageNet's names for a thousand classes, numbers for any other count."""
    if count != 1000:
        return [str(i) for i in range(count)]
    info = ImageNetInfo()
    return [info.index_to_description(i) for i in range(count)]


def beginnings(names: list[str]) -> set[str]:
    """The first two parts of dotted names."""
    return {".".join(name.split(".")[:2]) for name in names}


def best_five(probability: Tensor, names: list[str]) -> list[dict[str, Any]]:
    score, index = probability.topk(min(5, len(names)))
    return [{"class": names[i], "score": s} for i, s in zip(index.tolist(), score.tolist(), strict=True)]


class TopFive:
    """The five best classes of every picture."""

    def __init__(self, instances: list[Labelled], names: list[str]) -> None:
        self.instances, self.names = instances, names
        self.found: dict[int, list[dict[str, Any]]] = {}

    def update(self, prediction: dict[str, Tensor], batch: Any) -> None:
        for i, probability in zip(batch["id"].tolist(), prediction["probability"], strict=True):
            self.found[i] = best_five(probability, self.names)

    def results(self) -> list[dict[str, Any]]:
        return [{"image_id": self.instances[i].image_id, "classes": self.found[i]} for i in sorted(self.found)]


if __name__ == "__main__":
    from tasks.classification import Classification as Imported  # not of __main__, see tasks.pose

    main(Imported)
