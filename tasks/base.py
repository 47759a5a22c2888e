"""What all tasks share: steps, losses summed and logged, optimiser, normalisation, metric, weights to start from."""

import functools
import inspect
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, is_dataclass
from typing import Any, Literal, Self

import lightning as L
import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection

from datamodules.order import seed_of
from hrnet import PRESETS, HRNet, HRNetConfig
from hrnet.checkpoints import WeightsError, config_of, grouped, is_source, read, summary
from hrnet.resnet import RESNETS, ResNet
from hrnet.weights import InitFrom, load
from tasks.arguments import SettingError
from tasks.findings import LossFindings


class Task(L.LightningModule):
    """A backbone, a head, and how they learn.

    A subclass says `loss(features, batch)` and `predict(features, batch)`, and `picture(batch, prediction, index)`.

    Args:
        backbone: an `HRNetConfig`, a preset's name such as "w48", or pretrained weights, which tell the network:
            `timm:<model name>`, a file or a URL.
        head: built by the subclass.
        maps: how many of the backbone's maps the head reads.
        init: official initialisation of the backbone, see `HRNet`.
        optimizer, lr_scheduler: callables that take parameters, and the optimiser.
        lr_interval: whether the schedule counts epochs or steps.
        init_from: weights to start from; a path, or path, part and strictness.
        mean, std: of the input's normalisation, RGB in 0..1.
        channels_last: memory format; faster on GPUs with tensor cores and on most CPUs.
    """

    mean: Tensor
    std: Tensor
    heads: tuple[str, ...] = ()
    """Kinds of heads (`hrnet.checkpoints.HEADS`) that its published networks have."""
    facts: tuple[str, ...] = ()
    protocol: tuple[str, ...] = ()
    unkept: tuple[str, ...] = ()
    """Settings that no checkpoint keeps, for its would win over the command line's: of evaluation alone, or files."""
    findings: Any = LossFindings
    """Class of what `analyse` finds wrong, see `tasks.findings`."""
    head_lr = 1.0
    """Factor on the head's learning rate."""
    drawn: float | None = None
    """Least score of what pictures show, `--drawn` of predict; None where there is no such choice."""

    def __init__(
        self,
        backbone: HRNetConfig | str | Mapping[str, Any],
        maps: int,
        init: Literal["kaiming", "normal"],
        optimizer: OptimizerCallable | None,
        lr_scheduler: LRSchedulerCallable | None,
        lr_interval: Literal["epoch", "step"],
        init_from: str | InitFrom | None,
        mean: tuple[float, float, float],
        std: tuple[float, float, float],
        channels_last: bool,
    ) -> None:
        super().__init__()
        if isinstance(backbone, str) and backbone not in PRESETS and is_source(backbone):
            init_from = init_from or InitFrom(backbone, part="backbone")
            backbone = config_of(backbone)
        network: Any = ResNet if backbone in RESNETS else HRNet
        self.backbone = network(backbone, maps, init)
        self.origin: dict[str, str] | None = None  # of the weights that training started from
        self.optimizer, self.lr_scheduler, self.lr_interval = optimizer, lr_scheduler, lr_interval
        self.init_from = InitFrom(init_from) if isinstance(init_from, str) else init_from
        self.channels_last = channels_last
        # Not persistent: weights from elsewhere should not have to carry them.
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1) * 255, persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1) * 255, persistent=False)
        self.metrics = nn.ModuleDict()

    def keep_hyperparameters(self) -> None:
        """Call at the end of a subclass's `__init__`: what a checkpoint must hold to build the task again.

        Plain values only, so that it can be read with `weights_only=True`; built in Python or by the command line, the
        same form.
        """
        hparams = dict(self.hparams)
        if "_instantiator" not in hparams:
            hparams = {k: plain(v) for k, v in hparams.items()}
            hparams = {k: v for k, v in hparams.items() if v is not None and not callable(v)}
            hparams["_instantiator"] = "lightning.pytorch.cli.instantiate_module"
        for key in (*self.unkept, "init_from"):
            hparams.pop(key, None)
        hparams["backbone"] = plain(self.backbone.config)  # not a name: the file it may stand for need not be there
        self.hparams.clear()
        self.save_hyperparameters(hparams)
        self._hparams_name = "kwargs"

    @classmethod
    def arguments(cls, args: list[str]) -> list[str]:
        """The command line's, after what the task itself makes of them."""
        return args

    @classmethod
    def from_weights(cls, source: str, **settings: Any) -> Self:
        """A published checkpoint as a task, ready to predict: network, number of outputs and protocol are the file's.

        Args:
            source: see `InitFrom`; a checkpoint of our own runs comes with all its settings.
            **settings: of the task's constructor; they win over the file's.
        """
        file = read(source)
        if file.dialect == "hrnet" and "backbone" in file.protocol:
            return cls.load_from_checkpoint(source, map_location="cpu").eval()
        accepted = inspect.signature(cls).parameters
        found = {k: v for k, v in file.protocol.items() if k in accepted}
        task = cls(**found | {"backbone": file.config} | settings)
        rank_zero_info(load(task, InitFrom(source)))
        return task.eval()

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """In evaluation mode and without gradients, and afterwards as it was."""
        training = self.training
        self.eval()
        if self.channels_last:  # as `setup` does: other layouts may have other kernels, which round otherwise
            self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        try:
            with torch.inference_mode():
                yield
        finally:
            self.train(training)

    def loss(self, features: list[Tensor], batch: Any) -> dict[str, Tensor]:
        """Named losses of the backbone's maps for a batch; their sum is minimised."""
        raise NotImplementedError

    def predict(self, features: list[Tensor], batch: Any) -> dict[str, Tensor]:
        """The prediction, in the coordinates of the batch."""
        raise NotImplementedError

    def picture(self, batch: Any, prediction: dict[str, Tensor] | None, index: int) -> Any:
        """RGB uint8 `[H, W, 3]` of one sample: label beside prediction, or the label alone."""
        raise NotImplementedError

    def forward(self, image: Tensor) -> list[Tensor]:
        """The backbone's maps of images, uint8 RGB `[B, 3, H, W]`."""
        x = self.normalised(image)
        if self.channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        return self.backbone(x)

    def normalised(self, image: Tensor) -> Tensor:
        """As the network expects it: 0..255 by mean and standard deviation."""
        return (image.float() - self.mean) / self.std

    def on_fit_start(self) -> None:
        batch: int = self.trainer.datamodule.batch_size  # type: ignore[attr-defined]
        resumed = self.trainer.ckpt_path is not None  # whose optimiser is read after this
        rate = "that of the checkpoint" if resumed else f"{rate_of(self.trainer):g}"
        rank_zero_info(f"{images_a_step(self.trainer)} images a step, learning rate {rate}")
        norms = [m for m in self.modules() if isinstance(m, nn.BatchNorm2d) and m.training]
        if self.trainer.world_size > 1 and batch < 8 and norms:
            rank_zero_warn(
                f"batch norm sees the {batch} images of one process; where GPUs hold no more, share its statistics by "
                f"--trainer.sync_batchnorm true"
            )

    def on_train_batch_start(self, batch: Any, index: int) -> None:
        """Seed what is random in a step (dropout, mixup, sampled boxes), so that a resumed run draws the same."""
        if "PL_GLOBAL_SEED" in os.environ:
            seed = int(os.environ["PL_GLOBAL_SEED"])
            torch.manual_seed(seed_of(seed, self.current_epoch, index, self.global_rank))

    def training_step(self, batch: Any, index: int) -> Tensor:
        losses = self.loss(self(batch["image"]), batch)
        total = torch.stack(list(losses.values())).sum()
        size = len(batch["image"])
        self.log("train/loss", total, prog_bar=True, batch_size=size)
        if len(losses) > 1:
            self.log_dict({f"train/{k}": v for k, v in losses.items()}, batch_size=size)
        return total

    def validation_step(self, batch: Any, index: int) -> dict[str, Tensor]:
        return self.evaluate(batch, "val")

    def test_step(self, batch: Any, index: int) -> dict[str, Tensor]:
        return self.evaluate(batch, "test")

    def predict_step(self, batch: Any, index: int) -> dict[str, Tensor]:
        return self.predict(self.features(batch), batch)

    def features(self, batch: Any) -> list[Tensor]:
        """All that `predict` wants of the backbone, in one pass: the images' maps, and behind them others'."""
        return self(batch["image"])

    def evaluate(self, batch: Any, split: str) -> dict[str, Tensor]:
        features = self.features(batch)
        losses = self.loss([x[: len(batch["image"])] for x in features], batch)
        total = torch.stack(list(losses.values())).sum()
        self.log(f"{split}/loss", total, batch_size=len(batch["image"]), sync_dist=True)
        prediction = self.predict(features, batch)
        metric: Any = self.metrics[split]
        metric.update(prediction, batch)
        return prediction

    def on_validation_epoch_end(self) -> None:
        self.log_metric("val")

    def on_test_epoch_end(self) -> None:
        self.log_metric("test")

    def log_metric(self, split: str) -> float:
        """Log the data set's numbers, and its first one once more as `<split>/score`, which checkpoints go by."""
        metric = self.metrics[split]
        assert isinstance(metric, Metric | MetricCollection)
        values = {k: float(v) for k, v in metric.compute().items()}
        metric.reset()
        self.log_dict({f"{split}/{k}": v for k, v in values.items()})
        score = next(iter(values.values()))
        self.log(f"{split}/score", score, prog_bar=True)
        return score

    def setup(self, stage: str) -> None:
        if self.channels_last:
            self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        for split in {"fit": ["val"], "validate": ["val"], "test": ["test"]}.get(stage, []):
            self.metrics[split] = data.metric(split)
        self.take_weights(stage)

    def take_weights(self, stage: str) -> None:
        """Load what `init_from` names, and report it."""
        if self.init_from is not None:
            report = load(self, self.init_from)
            rank_zero_info(report)
            if report.protocol and stage == "fit" and self.init_from.part == "all":
                rank_zero_info(f"{report.path}: was trained with {summary(report.protocol)}")
            learned, own = report.protocol.get("class_names"), getattr(self, "class_names", None)
            if stage == "fit" and own and learned and list(learned) != list(own) and self.init_from.part != "backbone":
                rank_zero_warn(
                    f"{report.path} was trained for {shown(learned)}, the data are of {shown(own)}: layers for as many "
                    f"classes were taken over, those for another number start anew"
                )
            self.origin = {"path": report.path, "dialect": report.dialect, "sha256": report.hash}
            self.init_from = None  # once: a test after a fit must not start anew

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["origin"] = self.origin

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse another network's checkpoint in a few words, before torch does in a hundred lines."""
        state, own = checkpoint["state_dict"], self.state_dict()
        alien = [k for k in own | state if k not in own or k not in state or state[k].shape != own[k].shape]
        if alien:
            remedy = "give the configuration it was trained with, or start from it by init_from"
            if shapes := [(k, [*state[k].shape], [*own[k].shape]) for k in alien if k in state and k in own]:
                remedy = "{} is {} there and {} here (of other classes or keypoints?); ".format(*shapes[0]) + remedy
            if any(k.startswith("tasks.") for k in alien):
                remedy = "of a joint run, python -m tasks.joint split makes one checkpoint a task"
            raise WeightsError(
                f"the checkpoint is of another model than this one: {len(alien)} of {len(own)} tensors differ "
                f"({grouped(alien)}); {remedy}"
            )
        self.origin = checkpoint.get("origin")
        if "loops" in checkpoint:
            finish_epoch(checkpoint["loops"]["fit_loop"])

    def groups(self) -> Any:
        """What the optimiser is called with: parameters, or groups of them, whose `factor` is on the learning rate."""
        if self.head_lr == 1:
            return self.parameters()
        head = {id(p) for p in self.head.parameters()}  # type: ignore[union-attr]
        parts = [[p for p in self.parameters() if (id(p) in head) == mine] for mine in (False, True)]
        return [{"params": parts[0]}, {"params": parts[1], "factor": self.head_lr}]

    def configure_optimizers(self) -> Any:
        if self.optimizer is None:
            raise SettingError("this task was built without an optimizer; give `optimizer` (model.optimizer of a YAML)")
        optimizer = self.optimizer(self.groups())
        for group in optimizer.param_groups:
            group["lr"] *= group.get("factor", 1)
        if self.lr_scheduler is None:
            return optimizer
        scheduler: Any = self.lr_scheduler(optimizer)
        if getattr(scheduler, "total", 0) is None:  # the length of the run, which the trainer knows
            steps = self.trainer.estimated_stepping_batches
            scheduler.total = steps if self.lr_interval == "step" else self.trainer.max_epochs  # type: ignore[attr-defined]
        length = self.trainer.estimated_stepping_batches if self.lr_interval == "step" else self.trainer.max_epochs
        ends = [x for x in (getattr(scheduler, "total", None), length) if x and x > 0]
        if ends and getattr(scheduler, "warmup", 0) > min(ends) / 3:
            rank_zero_warn(
                f"the learning rate rises for {scheduler.warmup} of all {min(ends)} {self.lr_interval}s "
                f"(lr_scheduler.warmup): few are left to learn at full rate"
            )
        if getattr(scheduler, "epochs", 0) is None:
            scheduler.epochs = self.trainer.max_epochs  # type: ignore[attr-defined]
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": self.lr_interval}}


def images_a_step(trainer: L.Trainer) -> int:
    """Of all processes, accumulated ones included."""
    return trainer.datamodule.batch_size * trainer.world_size * trainer.accumulate_grad_batches  # type: ignore[attr-defined]


def rate_of(trainer: L.Trainer) -> float:
    """The optimiser's learning rate, before a schedule changes it."""
    group = trainer.optimizers[0].param_groups[0]
    return float(group.get("initial_lr", group["lr"]))


def finish_epoch(progress: dict[str, Any]) -> None:
    """Mark an epoch that was trained to its end as complete in a checkpoint's `fit_loop`.

    Such a checkpoint is written just before Lightning counts the epoch, which with `max_steps` it then does wrongly: it
    skips one, or adds a batch to it.
    """
    epoch, batch = progress["epoch_progress"], progress["epoch_loop.batch_progress"]
    if epoch["current"]["ready"] == epoch["current"]["processed"]:
        for counts in (epoch["current"], epoch["total"]):
            counts["completed"] = counts["processed"]
        batch["current"] = dict.fromkeys(batch["current"], 0)
        batch["is_last_batch"] = False


def plain(value: Any) -> Any:
    """As YAML holds it: a class or a partial call of one by its path, a dataclass as its fields (with its path, where
    another may stand in its place: losses, and what is derived from one), a tuple as a list."""
    if isinstance(value, type):
        return {"class_path": f"{value.__module__}.{value.__qualname__}"}
    if isinstance(value, functools.partial) and isinstance(value.func, type) and not value.args:
        return plain(value.func) | {"init_args": {k: plain(v) for k, v in value.keywords.items()}}
    if isinstance(value, tuple):
        return list(value)
    if not is_dataclass(value) or isinstance(value, type):
        return value
    named = callable(value) or is_dataclass(type(value).__base__)
    return plain(type(value)) | {"init_args": asdict(value)} if named else asdict(value)


def shown(names: Sequence[str]) -> str:
    """The first of many names."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
