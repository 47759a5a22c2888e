"""Several tasks on one backbone, learned at once.

`python -m tasks.joint fit|validate|test|predict`; `python -m tasks.joint split CHECKPOINT FOLDER` writes a checkpoint
for each task.
"""

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.core.mixins.hparams_mixin import _given_hyperparameters_context
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn

from datamodules.transforms import Array, rgb
from hrnet import PRESETS, HRNet, HRNetConfig
from hrnet.checkpoints import WeightsError, part_of
from hrnet.weights import InitFrom
from tasks.arguments import SettingError, taken
from tasks.base import Task, plain
from tasks.cli import main
from tasks.detection import Detection
from tasks.joint_pictures import Everything, people
from tasks.joint_settings import Weight, call_of, checked, facts_of, refuse, values
from tasks.pose import Pose
from tasks.resume import read_checkpoint


class Joint(Task):
    """Any tasks on one backbone. Each keeps its head, losses, decoding and metric; the backbone sees a batch of each in
    turn, and the weighted sum of their losses is minimised.

    The backbone begins with the weights of the first task that learns, and puts out as many maps as the widest head
    reads. A task that is the only one to learn so does exactly what it does in a run of its own.

    Args:
        tasks: classes of the tasks with their settings, by any names; optimiser, schedule and backbone are not theirs.
        backbone: an `HRNetConfig`, a preset's name such as "w18", or `timm:<name>` for pretrained weights. How it
            up-samples is said here, also for segmentation, whose own default is "bilinear".
        weights: of the tasks' losses; 1 where none is given. `{0: 0.1, 10: 1}` goes from 0.1 in epoch 0 to 1 in epoch
            10, linearly, and stays there. A task of weight 0 is not run in training; if that is so for good, it takes
            no part in `fit` at all.
        weighting: "uncertainty" learns a variance a task on top (Kendall et al., arXiv 1705.07115): exp(-s) L + s / 2,
            from s = 0, where L is the weighted loss.
        statistics: "shared" normalises all tasks' batches by one running mean and variance in evaluation; "own" keeps
            one a task. In training each batch is normalised by itself either way.
        frozen: the backbone stays as it was loaded, with its batch statistics; heads learn.
        parts: facts of each task's data: data modules (linked on the command line), or what a checkpoint keeps of them.
        optimizer, lr_scheduler, lr_interval, init_from, channels_last: see `Task`; init_from is for the backbone. Heads
            start from another run by their own task's `init_from: {path: ..., part: head}`.

    Raises:
        SettingError: if tasks, data and weights are not of the same names, or a setting is not a single task's affair.
    """

    facts = ("parts",)

    def __init__(
        self,
        tasks: dict[str, Callable[..., Task]] | None = None,
        backbone: HRNetConfig | str = PRESETS["w18_small_v1"],
        weights: dict[str, Weight] | None = None,
        weighting: Literal["fixed", "uncertainty"] = "fixed",
        statistics: Literal["shared", "own"] = "shared",
        frozen: bool = False,
        optimizer: OptimizerCallable | None = None,
        lr_scheduler: LRSchedulerCallable | None = None,
        lr_interval: Literal["epoch", "step"] = "step",
        init_from: str | InitFrom | None = None,
        channels_last: bool = True,
        parts: Any = None,
    ) -> None:
        random, norm = torch.get_rng_state(), ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
        super().__init__(backbone, 1, "kaiming", optimizer, lr_scheduler, lr_interval, init_from, *norm, channels_last)
        self.save_hyperparameters(ignore=["parts"])
        tasks, config = tasks or {}, self.backbone.config
        self.weights = checked(tasks, parts, weights or {})
        if frozen and statistics == "own":
            raise SettingError("model.frozen keeps the backbone's batch statistics; leave model.statistics at shared")
        built: dict[str, Task] = {}
        self.hparams["parts"] = {}
        for name, make in tasks.items():
            torch.set_rng_state(random)  # each begins as it would alone
            kind, settings = call_of(make)
            facts = facts_of(name, kind, (parts or {}).get(name, {}))
            shared = {"backbone": config, "channels_last": channels_last}
            if "upsample" in inspect.signature(kind).parameters:
                shared["upsample"] = config.upsample
            written = self.hparams["tasks"][name]  # as YAML has it, or as Python
            written = written if isinstance(written, dict) else plain(partial(kind, **settings))
            kept = {k: v for k, v in written.get("init_args", {}).items() if not callable(v)}
            kept |= facts | {k: plain(v) for k, v in shared.items()}
            with _given_hyperparameters_context(kept, "lightning.pytorch.cli.instantiate_module"):
                built[name] = kind(**settings | facts | shared)
            refuse(name, built[name], config)
            own = {k: v for k, v in built[name].hparams.items() if k not in (*facts, *shared, "_instantiator")}
            self.hparams["tasks"] = self.hparams["tasks"] | {name: plain(kind) | {"init_args": own}}
            self.hparams["parts"][name] = facts
        self.keep_hyperparameters()
        self.learned = [name for name, weight in self.weights.items() if max(values(weight))]
        self.maps = {name: len(task.backbone.channels) for name, task in built.items()}
        first = built[self.learned[0]].backbone
        self.backbone = HRNet(config, max(self.maps.values()), first.hparams["init"])  # type: ignore[arg-type]
        self.backbone.load_state_dict(first.state_dict(), strict=False)
        others = [name for name in built if statistics == "own" and name != self.learned[0]]  # whose are the backbone's
        self.statistics = nn.ModuleDict({name: Statistics(self.backbone) for name in others})
        for name, task in built.items():
            del task.backbone
            own_set = self.statistics[name] if name in others else None
            # Not as a module: the backbone is no part of the task's weights.
            task.__dict__["backbone"] = Shared(self.backbone, self.maps[name], own_set)
            task.__dict__["log"] = partial(self.log_of, name)
        self.tasks = nn.ModuleDict(built)
        unsure = self.learned if weighting == "uncertainty" else []
        self.log_variance = nn.ParameterDict({name: nn.Parameter(torch.zeros(())) for name in unsure})
        self.frozen = frozen
        self.backbone.requires_grad_(not frozen)
        for name in built.keys() - self.learned:  # DDP fails on parameters that nothing is made of
            self.tasks[name].requires_grad_(False)
        for layers in self.backbone.stage4[-1].fuse_layers[max(self.maps[n] for n in self.learned) :]:  # type: ignore[union-attr, index]
            layers.requires_grad_(False)

    @classmethod
    def arguments(cls, args: list[str]) -> list[str]:
        if args[:1] == ["split"]:
            if len(args) != 3:
                raise SettingError("python -m tasks.joint split CHECKPOINT FOLDER")
            split(Path(args[1]), Path(args[2]))
            raise SystemExit
        fast, _ = taken(args, "--fast")
        if fast not in (None, "no") and args[0] != "fit":
            raise SettingError("--fast is for a single task: give it the joint checkpoint, --model.init_from FILE#pose")
        return args

    def setup(self, stage: str) -> None:
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        if self.channels_last:
            self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if stage == "fit":
            data.learn(self.learned)
        names = getattr(data, "learned", [])  # pictures to predict are of no task
        for name, task in self.tasks.items():
            task.trainer = View(self.trainer, data.parts[name] if name in names else data)  # type: ignore[assignment]
            if name in names or not names:
                task.setup(stage)  # type: ignore[operator]
        for split in {"fit": ["val"], "validate": ["val"], "test": ["test"]}.get(stage, []):
            found: dict[str, Any] = {name: self.tasks[name].metrics for name in names}
            self.metrics[split] = nn.ModuleDict({name: metrics[split] for name, metrics in found.items()})
        self.take_weights(stage)
        if self.origin is not None and not self.trainer.ckpt_path:  # type: ignore[attr-defined]
            for own in self.statistics.values():
                own.load_state_dict(Statistics(self.backbone).state_dict())
        if stage == "fit" and self.frozen and self.origin is None and not self.trainer.ckpt_path:  # type: ignore[attr-defined]
            raise WeightsError(
                "model.frozen keeps the backbone as it was loaded, but no weights are: give --model.backbone "
                "timm:<name>, or --model.init_from.path FILE --model.init_from.part backbone"
            )

    def on_fit_start(self) -> None:
        super().on_fit_start()
        strategy = self.trainer.strategy
        idle = [name for name in self.learned if min(values(self.weights[name])) == 0]
        if idle and isinstance(strategy, DDPStrategy) and not strategy._ddp_kwargs.get("find_unused_parameters"):
            raise SettingError(
                f"model.weights: {', '.join(idle)} has weight 0 in some epochs, when its head takes no part; on "
                f"several processes say --trainer.strategy ddp_find_unused_parameters_true, or give it a small weight"
            )

    def on_train_start(self) -> None:
        if self.frozen:
            self.backbone.eval()  # so that its batch statistics do not move; after validation Lightning leaves it so
        for name in self.learned:
            self.tasks[name].on_train_start()  # type: ignore[operator]

    def weight(self, name: str) -> float:
        """Of a task's loss in this epoch."""
        given = self.weights[name]
        if not isinstance(given, dict):
            return given
        epochs = sorted(given)
        return float(np.interp(self.current_epoch, epochs, [given[epoch] for epoch in epochs]))

    def training_step(self, batch: dict[str, Any], index: int) -> Tensor:
        losses = []
        for name, part in batch.items():
            weight = self.weight(name)
            if not weight:
                continue
            self.on_train_batch_start(part, index)  # seeds anew: a task draws what it would draw alone
            loss = self.tasks[name].training_step(part, index) * weight  # type: ignore[operator]
            if name in self.log_variance:
                s = self.log_variance[name]
                self.log(f"train/{name}/weight", weight * (-s.detach()).exp(), batch_size=1)
                loss = (-s).exp() * loss + s / 2
            losses.append(loss)
        total = torch.stack(losses).sum()
        self.log("train/loss", total, prog_bar=True, batch_size=1)
        return total

    def validation_step(self, batch: Any, index: int, dataloader_idx: int = 0) -> dict[str, Tensor]:
        return self.evaluate(batch, "val", dataloader_idx)

    def test_step(self, batch: Any, index: int, dataloader_idx: int = 0) -> dict[str, Tensor]:
        return self.evaluate(batch, "test", dataloader_idx)

    def evaluate(self, batch: Any, split: str, loader: int = 0) -> dict[str, Tensor]:
        return self.tasks[self.trainer.datamodule.learned[loader]].evaluate(batch, split)  # type: ignore[attr-defined, operator]

    def log_of(self, task: str, /, name: str, value: Any, **options: Any) -> None:
        """Log what a task logs as train/loss as train/<task>/loss."""
        split, _, rest = name.partition("/")
        self.log(f"{split}/{task}/{rest}", value, **options | {"prog_bar": False, "add_dataloader_idx": False})

    def log_metric(self, split: str) -> float:
        """Each task's numbers as `<split>/<task>/*`, and the mean of their scores as `<split>/score`."""
        scores = [self.tasks[name].log_metric(split) for name in self.trainer.datamodule.learned]  # type: ignore[attr-defined, operator]
        score = sum(scores) / len(scores)
        self.log(f"{split}/score", score, prog_bar=True)
        return score

    def groups(self) -> Any:
        factors = {name: task.head_lr for name, task in self.tasks.items() if task.head_lr != 1}
        if not factors and not self.log_variance:
            return self.parameters()
        groups: list[dict[str, Any]] = [
            {"params": [*self.tasks[name].parameters()], "factor": factor} for name, factor in factors.items()
        ]
        if self.log_variance:  # of which decay would be a prior
            groups.append({"params": [*self.log_variance.values()], "weight_decay": 0.0})
        taken = {id(p) for group in groups for p in group["params"]}
        return [{"params": [p for p in self.parameters() if id(p) not in taken]}, *groups]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        shared = {"backbone": plain(self.backbone.config)}
        checkpoint["parts"] = {
            name: {"maps": self.maps[name], "hyper_parameters": dict(task.hparams) | shared}  # type: ignore[arg-type]
            for name, task in self.tasks.items()
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        for name, part in checkpoint.get("parts", {}).items():  # of the same classes, keypoints, ...?
            task: Any = self.tasks[name]
            task.on_load_checkpoint({"hyper_parameters": part["hyper_parameters"], "state_dict": task.state_dict()})

    def predict_step(self, batch: Any, index: int) -> Any:
        return [self.infer(image.permute(1, 2, 0).cpu().numpy()) for image in batch["image"]]

    def collector(self, instances: Sequence[Any]) -> Everything:
        """What `predict` gathers its output in."""
        return Everything(instances, dict(self.tasks.items()))

    def overlay(self, image: Array, items: list[dict[str, Any]]) -> Array:
        """`image` with what `collector` found in it, task by task; regions below boxes and poses."""
        for item in items:
            found = [name for name in self.tasks if item[name]]
            for name in sorted(found, key=lambda name: "mask_file" not in item[name][0]):
                image = self.tasks[name].overlay(image, item[name])  # type: ignore[operator]
        return image

    def infer(self, images: str | Path | Array | Sequence[Any]) -> Any:
        """What each task's `infer` says of images, by the tasks' names. Where boxes are found, poses are those of the
        people in them (of all things, if no class is called person), of a score of 0.3 or more.

        Args:
            images: a path or an RGB uint8 array `[H, W, 3]`, or a list of them, which gives a list.
        """
        if isinstance(images, list | tuple):
            return [self.infer(image) for image in images]
        image, boxes = rgb(images), None
        found: dict[str, Any] = {}
        for name, task in sorted(self.tasks.items(), key=lambda item: isinstance(item[1], Pose)):  # boxes first
            found[name] = task.infer([image], [boxes])[0] if isinstance(task, Pose) and boxes is not None else None
            found[name] = found[name] or task.infer(image)  # type: ignore[operator]
            if isinstance(task, Detection):
                boxes = people(found[name], task.class_names)
        return found


class Statistics(nn.Module):
    """A set of batch norm statistics for a backbone."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        for name, buffer in backbone.named_buffers():
            self.register_buffer(name.replace(".", "/"), buffer.clone())


class Shared:
    """The backbone as one of several tasks sees it: as many maps as it reads, by its own statistics if it has any."""

    def __init__(self, backbone: HRNet, maps: int, own: nn.Module | None) -> None:
        self.backbone, self.maps, self.own, self.config = backbone, maps, own, backbone.config

    def __call__(self, image: Tensor) -> list[Tensor]:
        if self.own is None:
            return self.backbone(image)[: self.maps]
        places = [(module, name) for module in self.backbone.modules() for name in module._buffers]
        former = [module._buffers[name] for module, name in places]
        try:
            for (module, name), own in zip(places, self.own.buffers(), strict=True):
                module._buffers[name] = own
            return self.backbone(image)[: self.maps]
        finally:
            for (module, name), buffer in zip(places, former, strict=True):
                module._buffers[name] = buffer


class View:
    """The trainer as one of several tasks sees it: with its own data."""

    def __init__(self, trainer: Any, data: Any) -> None:
        self.whole, self.datamodule = trainer, data

    def __getattr__(self, name: str) -> Any:
        return getattr(self.whole, name)


def split(path: Path, folder: Path) -> None:
    """Write a checkpoint for every task of a joint one, which is as if it came from a run of its own."""
    content = read_checkpoint(path)
    folder.mkdir(parents=True, exist_ok=True)
    for name in content.get("parts") or [""]:
        torch.save(part_of(content, name, str(path)), folder / f"{name}.ckpt")
        print(folder / f"{name}.ckpt", flush=True)


if __name__ == "__main__":
    from tasks.joint import Joint as Imported  # not of __main__, see tasks.pose

    main(Imported)
