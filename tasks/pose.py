"""Top-down pose: boxes are cropped, HRNetV1 puts out a heatmap a keypoint (paper, section 4).

`python -m tasks.pose fit|validate|test|predict`
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jsonargparse import set_parsing_settings
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn

from datamodules.drawing import draw_keypoints, heatmap_overlay, write_text
from datamodules.keypoints import Instance, KeypointDataset, Keypoints
from datamodules.metrics import KeypointAP
from datamodules.transforms import DataError, rgb
from hrnet import PRESETS, HRNetConfig
from hrnet.checkpoints import WeightsError
from hrnet.codecs import Heatmap
from hrnet.heads import HRNetV1
from hrnet.losses import JointsMSE
from hrnet.weights import InitFrom
from tasks.arguments import SettingError, taken
from tasks.base import Task, plain
from tasks.cli import main
from tasks.detection import write_boxes
from tasks.findings import PoseFindings

set_parsing_settings(subclasses_enabled=[Heatmap])  # a codec of one's own is named by its class

COCO = Keypoints(
    names=[
        *("nose", "left_eye", "right_eye", "left_ear", "right_ear", "left_shoulder", "right_shoulder", "left_elbow"),
        *("right_elbow", "left_wrist", "right_wrist", "left_hip", "right_hip", "left_knee", "right_knee"),
        *("left_ankle", "right_ankle"),
    ],
    skeleton=[
        *([15, 13], [13, 11], [16, 14], [14, 12], [11, 12], [5, 11], [6, 12], [5, 6], [5, 7], [6, 8]),
        *([7, 9], [8, 10], [1, 2], [0, 1], [0, 2], [1, 3], [2, 4], [3, 5], [4, 6]),
    ],
    flip_pairs=[[i, i + 1] for i in range(1, 17, 2)],
    sigmas=[0.026, *np.repeat([0.025, 0.035, 0.079, 0.072, 0.062, 0.107, 0.087, 0.089], 2).tolist()],
)
"""Taken where no data say otherwise: what a COCO checkpoint predicts."""


class Pose(Task):
    """Keypoints of boxed instances.

    Args:
        backbone: an `HRNetConfig`, or a preset's name such as "w48"; or "resnet18", ..., see `ResNet`.
        head: class of the head; called with the maps' channels and the number of keypoints.
        codec: how keypoints become heatmaps and come back; its stride follows the `level` that a head reads, if any.
        loss: called with output, target `[B, K, h, w]` and weight `[B, K]`; None is `JointsMSE()`.
        flip_test: average with the mirrored image's output; evaluation only.
        num_keypoints, keypoint_names, skeleton, flip_pairs, sigmas: facts of the data (linked on the command line).
        size, padding, udp: how the data crop boxes, so that a checkpoint knows what it was fed.
        init, optimizer, lr_scheduler, lr_interval, init_from, mean, std, channels_last: see `Task`.
    """

    heads = ("pose", "segmentation")  # the latter: face and hand networks on all four maps
    facts = ("num_keypoints", "keypoint_names", "skeleton", "flip_pairs", "sigmas", "size", "padding", "udp")
    """What the command line passes from the data to the task when fitting and evaluating..."""
    protocol = ("size", "padding", "udp")
    unkept = ("flip_test",)
    drawn: float = 0.2
    """...and from the task to the data when predicting."""
    findings = PoseFindings

    flip_index: Tensor

    def __init__(
        self,
        backbone: HRNetConfig | str = PRESETS["w32"],
        head: Callable[[list[int], int], nn.Module] = HRNetV1,
        codec: Heatmap = Heatmap(),  # noqa: B008 (frozen)
        loss: JointsMSE | Callable[..., Any] | None = None,
        flip_test: bool = True,
        init: Literal["kaiming", "normal"] = "normal",
        optimizer: OptimizerCallable | None = None,
        lr_scheduler: LRSchedulerCallable | None = None,
        lr_interval: Literal["epoch", "step"] = "epoch",
        init_from: str | InitFrom | None = None,
        mean: tuple[float, float, float] = (0.485, 0.456, 0.406),
        std: tuple[float, float, float] = (0.229, 0.224, 0.225),
        channels_last: bool = True,
        num_keypoints: int = 17,
        keypoint_names: list[str] = COCO.names,
        skeleton: list[list[int]] = COCO.skeleton,
        flip_pairs: list[list[int]] = COCO.flip_pairs,
        sigmas: list[float] = COCO.sigmas,
        size: tuple[int, int] = (256, 192),
        padding: float = 1.25,
        udp: bool = False,
    ) -> None:
        maps = getattr(head, "maps", 4) if isinstance(head, type) else getattr(head([1] * 4, 1), "maps", 4)
        super().__init__(
            backbone, maps, init, optimizer, lr_scheduler, lr_interval, init_from, mean, std, channels_last
        )
        self.save_hyperparameters()
        self.keep_hyperparameters()
        self.head = head(self.backbone.channels, num_keypoints)
        if level := getattr(self.head, "level", 0):  # it reads a coarser map
            codec = replace(codec, stride=self.backbone.strides[level])
        self.codec, self.joint_loss, self.flip_test = codec, loss or JointsMSE(), flip_test
        if (codec.encoding == "udp") != udp:
            rank_zero_warn(
                f"codec.encoding is {codec.encoding!r} but data.udp is {udp}: crops and heatmaps then mean places that "
                f"are up to half a pixel apart; set both or neither"
            )
        self.skeleton_facts = Keypoints(keypoint_names, skeleton, flip_pairs, sigmas)
        self.size, self.padding, self.udp = (size[0], size[1]), padding, udp
        index = torch.tensor(self.skeleton_facts.flip_index)
        self.register_buffer("flip_index", index, persistent=False)

    @classmethod
    def arguments(cls, args: list[str]) -> list[str]:
        """`predict --detector CHECKPOINT` finds the people first, by a run of tasks.detection."""
        detector, rest = taken(args, "--detector")
        if detector is None:
            return args
        path, _ = taken(rest, "--data.path")
        if rest[:1] != ["predict"] or path is None:
            raise SettingError("--detector goes with `predict --data.path PHOTOS`; to evaluate, give --data.boxes")
        threshold = [] if taken(rest, "--data.box_threshold")[0] else ["--data.box_threshold=0.3"]
        root = taken(rest, "--trainer.default_root_dir")[0] or "runs"
        return [*rest, f"--data.boxes={write_boxes(detector, path, Path(root) / 'pose')}", *threshold]

    def heatmaps(self, features: list[Tensor]) -> Tensor:
        """The head's output `[B, K, h, w]`, in fp32 under mixed precision too: decoding wants more digits than bf16."""
        with torch.autocast(features[0].device.type, enabled=False):
            return self.head([x.float() for x in features])

    def features(self, batch: Any) -> list[Tensor]:
        """Of the images and, for the flip test, of their mirror images."""
        image = batch["image"]
        return self(torch.cat([image, image.flip(-1)]) if self.flip_test else image)

    def loss(self, features: list[Tensor], batch: Any) -> dict[str, Tensor]:
        size = batch["image"].shape[-2:]
        target, weight = self.codec.encode(batch["keypoints"], batch["visible"], size)
        return {"heatmap": self.joint_loss(self.heatmaps(features), target, weight)}

    def predict(self, features: list[Tensor], batch: Any) -> dict[str, Tensor]:
        """`keypoints` `[B, K, 2]` in input pixels, `score` `[B, K]`, and the `heatmap` they were read from."""
        if self.flip_test:
            if len(features[0]) == len(batch["image"]):
                features = self.features(batch)
            straight, mirrored = self.heatmaps(features).chunk(2)
            heatmap = self.codec.merge(straight, mirrored, self.flip_index)
        else:
            heatmap = self.heatmaps(features)
        keypoints, score = self.codec.decode(heatmap, batch["image"].shape[-2:])
        return {"keypoints": keypoints, "score": score, "heatmap": heatmap}

    def collector(self, instances: list[Instance]) -> KeypointAP:
        """What `predict` gathers its output in: `results()` are rescored, suppressed, and in image coordinates."""
        return KeypointAP(instances, None, self.skeleton_facts.sigmas)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        hparams = checkpoint.get("hyper_parameters", {})
        names = hparams.get("keypoint_names")
        if names is not None and list(names) != self.skeleton_facts.names:
            raise WeightsError(
                f"the checkpoint's keypoints {list(names)} are not the data's {self.skeleton_facts.names}; "
                f"use the data it was trained for (`-c` with the config.yaml of its run), or start from it by init_from"
            )
        super().on_load_checkpoint(checkpoint)
        for name in self.protocol:
            trained, now = hparams.get(name), self.hparams[name]
            if trained is not None and plain(trained) != plain(now):
                rank_zero_warn(f"the checkpoint was trained with data.{name} = {trained}, now it is {now}")

    def infer(self, images: str | Path | np.ndarray | Sequence[Any], boxes: Sequence[Any] | None = None) -> Any:
        """Keypoints of images, in their own coordinates.

        Args:
            images: a path or an RGB uint8 array `[H, W, 3]`, or a list of them (or one array `[N, H, W, 3]`).
            boxes: for each image a list of boxes x, y, w, h in its pixels (for one image, its list of boxes); None
                takes the whole image as one box.

        Returns:
            `keypoints` `[N, K, 2]`, `score` `[N, K]` and `boxes` `[N, 4]`; for a list of images a list of these.

        Raises:
            DataError: if an image cannot be read, is no such array, or a box has no area or is outside of it.
        """
        if isinstance(images, str | Path) or (isinstance(images, np.ndarray) and images.ndim != 4):
            return self.infer([images], None if boxes is None else [boxes])[0]
        results = []
        with self.evaluating():
            for i, image in enumerate(images):
                array = rgb(image)
                chosen = checked_boxes([[0, 0, *array.shape[1::-1]]] if boxes is None else boxes[i], array)
                instances = [
                    Instance("", 0, np.array(b, dtype=np.float64), np.zeros((0, 2)), np.zeros(0)) for b in chosen
                ]
                facts, read = self.skeleton_facts, lambda _, array=array: array
                data = KeypointDataset(instances, facts, self.size, padding=self.padding, udp=self.udp, read=read)
                found = []
                for start in range(0, len(data), 32):
                    batch = torch.utils.data.default_collate(
                        [data[j] for j in range(start, min(start + 32, len(data)))]
                    )
                    batch = {k: v.to(self.device) for k, v in batch.items()}
                    prediction = self.predict_step(batch, 0)
                    found.append((to_image(prediction["keypoints"], batch["to_image"]), prediction["score"]))
                k = len(self.skeleton_facts.names)
                results.append(
                    {
                        "keypoints": torch.cat([f[0] for f in found]).cpu().numpy() if found else np.zeros((0, k, 2)),
                        "score": torch.cat([f[1] for f in found]).cpu().numpy() if found else np.zeros((0, k)),
                        "boxes": np.array(chosen, dtype=np.float64).reshape(-1, 4),
                    }
                )
        return results

    def picture(self, batch: Any, prediction: dict[str, Tensor] | None, index: int) -> np.ndarray:
        """Labels, prediction and the heatmaps' maximum on one input, side by side: RGB uint8 `[H, 3 W, 3]`; without a
        prediction the labels alone."""
        image = batch["image"][index].permute(1, 2, 0).cpu().numpy()
        zoom = max(1, round(256 / image.shape[0]))  # small inputs are shown larger, or nothing could be told from them
        image = image.repeat(zoom, 0).repeat(zoom, 1)
        truth = batch["keypoints"][index].float().cpu().numpy() * zoom + (zoom - 1) / 2
        shown = batch["visible"][index].cpu().numpy() > 0
        facts = self.skeleton_facts
        labelled = draw_keypoints(image, truth, shown, facts, radius=3) if len(truth) else image
        write_text(labelled, "label", (4, 14))
        if prediction is None:
            return labelled
        guess = prediction["keypoints"][index].float().cpu().numpy() * zoom + (zoom - 1) / 2
        predicted = draw_keypoints(image, guess, np.ones(len(guess), dtype=bool), facts, radius=3)
        heatmap = prediction["heatmap"][index].amax(0).float().cpu().numpy()
        write_text(predicted, f"prediction {float(prediction['score'][index].mean()):.2f}", (4, 14))
        covered = heatmap_overlay(image, heatmap)
        write_text(covered, "heatmaps", (4, 14))
        return np.concatenate([labelled, predicted, covered], axis=1)

    def draw(self, image: np.ndarray, result: dict[str, Any], threshold: float | None = None) -> np.ndarray:
        """`image` (RGB uint8 `[H, W, 3]`) with an `infer` result's keypoints above `threshold`, or else `drawn`."""
        threshold = self.drawn if threshold is None else threshold
        radius = max(2, round(max(image.shape[:2]) / 200))
        for keypoints, score in zip(result["keypoints"], result["score"], strict=True):
            image = draw_keypoints(image, keypoints, score > threshold, self.skeleton_facts, radius)
        return image

    def overlay(self, image: np.ndarray, items: list[dict[str, Any]]) -> np.ndarray:
        """`image` with the poses of `collector`'s items, and each one's score."""
        poses = np.array([item["keypoints"] for item in items]).reshape(len(items), -1, 3)
        canvas = self.draw(image, {"keypoints": poses[..., :2], "score": poses[..., 2]})
        for item, pose in zip(items, poses, strict=True):
            if not (pose[:, 2] > self.drawn).any():  # no keypoint is drawn either
                continue
            place = pose[:, :2].min(0).clip(0, np.array(canvas.shape[1::-1]) - 20)
            write_text(canvas, f"{item['score']:.2f}", place, max(canvas.shape[:2]) / 640)
        return canvas


def checked_boxes(boxes: Any, image: np.ndarray) -> np.ndarray:
    """Boxes x, y, w, h `[N, 4]` that lie in the image at least in part, or a `DataError`."""
    found = np.array(boxes, dtype=np.float64)
    if found.size == 0:
        return found.reshape(0, 4)
    if found.ndim != 2 or found.shape[1] != 4:
        raise DataError(f"boxes of an image are a list of [x, y, w, h], got shape {list(found.shape)}")
    x, y, w, h = found.T
    sound = np.isfinite(found).all(1) & (w > 0) & (h > 0)
    sound &= (x < image.shape[1]) & (y < image.shape[0]) & (x + w > 0) & (y + h > 0)
    if not sound.all():
        bad = found[~sound][0].tolist()
        raise DataError(f"box {bad} has no area within the image of {image.shape[1]}x{image.shape[0]} (x, y, w, h)")
    return found


def to_image(keypoints: Tensor, matrix: Tensor) -> Tensor:
    """`[B, K, 2]` of input pixels in the pixels of the original images, by `to_image` `[B, 2, 3]`."""
    return torch.einsum("bij,bkj->bki", matrix[:, :, :2], keypoints) + matrix[:, None, :, 2]


if __name__ == "__main__":
    from tasks.pose import Pose as Imported  # a class of __main__ could not be found again by its checkpoints

    main(Imported)
