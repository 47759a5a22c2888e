"""What a run leaves behind beside numbers: pictures, predictions, a summary one can read. And ways to run faster."""

import json
import re
from collections import defaultdict
from pathlib import Path
from typing import Any, Literal

import cv2
import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from datamodules.drawing import grid, write_image
from datamodules.transforms import DataError
from datamodules.video import Video
from hrnet.fast import Fast, compile_blocks, folded, parallel


class Faster(Callback):
    """Runs the backbone as `hrnet.fast.Fast`, and the head with batch norm folded in, while `validate`, `test` and
    `predict` run; the backbone in bf16 if the trainer does.

    Args:
        compiled: see `Fast`.
    """

    def __init__(self, compiled: bool = False) -> None:
        self.compiled = compiled
        self.network: Any = None

    def on_validation_start(self, trainer: L.Trainer, task: Any) -> None:
        if trainer.state.fn == TrainerFn.FITTING or not any(True for _ in task.backbone.parameters()):
            return  # weights that change cannot be folded; and an exported network has none
        self.network = task.backbone, task.head
        dtype = torch.bfloat16 if trainer.precision == "bf16-mixed" else torch.float32
        task.backbone, task.head = Fast(task.backbone, dtype, self.compiled), folded(task.head)

    on_test_start = on_predict_start = on_validation_start  # type: ignore[assignment]

    def on_validation_end(self, trainer: L.Trainer, task: Any) -> None:
        if self.network is not None:
            (task.backbone, task.head), self.network = self.network, None

    on_test_end = on_predict_end = on_validation_end  # type: ignore[assignment]


class FasterTraining(Callback):
    """Trains the same network faster on a GPU.

    Args:
        how: "compiled" lets torch.compile merge what it can, once for each kind of residual block, which takes seconds
            and not the minutes of the whole; "parallel" gives each branch a CUDA stream of its own.
    """

    def __init__(self, how: Literal["compiled", "parallel"]) -> None:
        self.how = how

    def on_fit_start(self, trainer: L.Trainer, task: Any) -> None:
        if self.how == "compiled":
            compile_blocks(task.backbone)
        else:
            parallel(task.backbone)


class Pictures(Callback):
    """Draws the first training batch as the network sees it, and labels beside predictions after every validation.

    Args:
        count: samples a picture.
    """

    def __init__(self, count: int = 8) -> None:
        self.count = count

    def on_train_batch_start(self, trainer: L.Trainer, task: Any, batch: Any, index: int) -> None:
        if trainer.global_step == 0 and index == 0:
            self.save(trainer, task, batch, None, "first_batch")

    def on_validation_batch_end(
        self, trainer: L.Trainer, task: Any, outputs: Any, batch: Any, index: int, loader: int = 0
    ) -> None:
        if index == 0 and not trainer.sanity_checking:
            self.save(trainer, task, batch, outputs, f"epoch_{trainer.current_epoch:03d}")

    on_test_batch_end = on_validation_batch_end  # type: ignore[assignment]

    def on_validation_epoch_end(self, trainer: L.Trainer, task: Any) -> None:
        if not trainer.sanity_checking:
            self.save_metrics(trainer, task.metrics["val"], f"epoch_{trainer.current_epoch:03d}")

    def on_test_epoch_end(self, trainer: L.Trainer, task: Any) -> None:
        self.save_metrics(trainer, task.metrics["test"], "test")

    def save_metrics(self, trainer: L.Trainer, metric: Any, name: str) -> None:
        """What a metric can draw, such as a confusion matrix."""
        for part in metric.modules():
            if not hasattr(part, "picture"):
                continue
            with part.sync_context():  # of what all processes have seen
                picture = part.picture()
            if picture is not None:
                self.put(trainer, picture, f"{type(part).__name__.lower()}_{name}", type(part).__name__.lower())

    @rank_zero_only
    def save(self, trainer: L.Trainer, task: Any, batch: Any, outputs: Any, name: str) -> None:
        picture = grid([task.picture(batch, outputs, i) for i in range(min(self.count, len(batch["image"])))])
        self.put(trainer, picture, name, "first_batch" if outputs is None else "predictions")

    @rank_zero_only
    def put(self, trainer: L.Trainer, picture: Any, name: str, key: str) -> None:
        """Beside the checkpoints, and to every logger that shows pictures."""
        folder = folder_of(trainer)
        if trainer.fast_dev_run or folder is None:  # type: ignore[attr-defined]
            return
        folder = folder / "pictures"
        folder.mkdir(parents=True, exist_ok=True)
        write_image(str(folder / f"{name}.jpg"), picture)
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                logger.log_image(key, [picture], step=trainer.global_step)
            elif isinstance(logger, TensorBoardLogger):
                logger.experiment.add_image(key, np.ascontiguousarray(picture), trainer.global_step, dataformats="HWC")


def gathered(items: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those of all processes, ordered by image_id; a picture's are of one process only, for a sampler gives some
    pictures to two of them, so that all have as many."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return items
    parts: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(parts, items)
    whose: dict[int, int] = {}
    found = [x for rank, part in enumerate(parts) for x in part if whose.setdefault(x["image_id"], rank) == rank]
    return sorted(found, key=lambda item: item["image_id"])


class Predictions(Callback):
    """Writes what `predict` found: `predictions/results.json` (COCO results, with file names) and overlay pictures, or
    one overlay video; and what `validate` and `test` judged: `predictions/val.json`, as COCO's own tools read it.

    A task's `collector(instances)` is updated with each batch and has `results()`, items with an `image_id`: those that
    its process has seen, or if it is a metric (a module), those of all.

    Args:
        pictures: whether to draw overlays.
    """

    def __init__(self, pictures: bool = True) -> None:
        self.pictures = pictures

    def on_validation_epoch_end(self, trainer: L.Trainer, task: Any) -> None:
        if trainer.state.fn != TrainerFn.FITTING:
            self.keep(trainer, task.metrics["val"], "val")

    def on_test_epoch_end(self, trainer: L.Trainer, task: Any) -> None:
        self.keep(trainer, task.metrics["test"], "test")

    def keep(self, trainer: L.Trainer, metric: Any, split: str) -> None:
        for part in metric.modules():
            if hasattr(part, "results"):
                results = part.results()  # by all processes
                folder = folder_of(trainer)
                if trainer.is_global_zero and folder is not None:
                    path = folder / "predictions" / f"{split}{getattr(part, 'suffix', '')}.json"
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_text(json.dumps(results))
                    print(f"\n{len(results)} predictions in COCO's results format: {path}", flush=True)
                    if hasattr(part, "truth"):  # with its numbering of images, and its classes
                        path.with_name(f"{path.stem}_truth.json").write_text(
                            json.dumps(part.truth, default=np.ndarray.tolist)  # polygons
                        )

    def on_predict_start(self, trainer: L.Trainer, task: Any) -> None:
        self.dataset = trainer.datamodule.datasets["predict"]  # type: ignore[attr-defined]
        self.metric = task.collector(self.dataset.instances)
        if isinstance(self.metric, torch.nn.Module):
            self.metric.to(task.device)  # what processes exchange must lie where they can
        folder = trainer.log_dir  # told to all processes
        if hasattr(self.metric, "folder") and folder is not None:  # what writes as it goes
            self.metric.folder = Path(folder) / "predictions"

    def on_predict_batch_end(
        self, trainer: L.Trainer, task: Any, outputs: Any, batch: Any, index: int, loader: int = 0
    ) -> None:
        self.metric.update(outputs, batch)

    def on_predict_end(self, trainer: L.Trainer, task: Any) -> None:
        results = self.metric.results()
        if not isinstance(self.metric, torch.nn.Module):  # metrics do so themselves
            results = gathered(results)
        folder = folder_of(trainer)
        if not trainer.is_global_zero or folder is None:
            return
        folder = folder / "predictions"
        folder.mkdir(parents=True, exist_ok=True)
        first = {instance.image_id: instance for instance in reversed(self.dataset.instances)}
        for item in results:
            item["file_name"] = first[item["image_id"]].path
        (folder / "results.json").write_text(json.dumps(results))
        print(f"\n{len(results)} predictions in {len(first)} images: {folder / 'results.json'}", flush=True)
        if self.pictures:
            self.draw(task, results, first, folder)

    def draw(self, task: Any, results: list[dict[str, Any]], first: dict[int, Any], folder: Path) -> None:
        """Overlays of every image, also of those where nothing was found; frames of a video as one video."""
        found = defaultdict(list)
        for item in results:
            found[item["image_id"]].append(item)
        one = next(iter(first.values())).path
        if re.fullmatch(r".*#\d+", one):
            video, path = Video(one.rsplit("#", 1)[0]), folder / "overlay.mp4"
            writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"mp4v"), video.fps, video.size)
            for i in range(len(video)):  # also frames that there was nothing to look for in
                writer.write(cv2.cvtColor(task.overlay(video[i], found[i]), cv2.COLOR_RGB2BGR))
            writer.release()
            print(f"overlays:   {path}", flush=True)
            return
        taken, empty = set(), 0
        for image_id in sorted(first):
            path = Path(first[image_id].path)
            name = f"{path.stem}_{image_id}" if path.stem in taken else path.stem  # two folders may hold the same name
            taken.add(name)
            try:
                image = self.dataset.read(str(path))
            except DataError:  # it was skipped
                continue
            overlay = task.overlay(image, found[image_id])
            empty += np.array_equal(image, overlay)
            write_image(str(folder / f"{name}.jpg"), overlay)
        hint = "" if task.drawn is None else f" (--drawn {task.drawn:g})"
        note = f"; in {empty} of {len(first)} nothing is drawn, for no score was high enough{hint}" if empty else ""
        print(f"overlays:   {folder}{note}", flush=True)


class Summary(Callback):
    """Says at the end where everything lies and what to do with it."""

    def __init__(self) -> None:
        self.trained = False

    def on_train_start(self, trainer: L.Trainer, task: Any) -> None:
        self.trained = True

    def on_fit_end(self, trainer: L.Trainer, task: Any) -> None:
        checkpoints = [c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint)]
        best = next((c for c in checkpoints if c.monitor), None)
        folder = folder_of(trainer)
        if not trainer.is_global_zero or trainer.fast_dev_run or folder is None:  # type: ignore[attr-defined]
            return
        if not self.trained:
            print(
                f"\nnothing was left to train: the checkpoint is of epoch {trainer.current_epoch}, step "
                f"{trainer.global_step}; a larger --trainer.max_epochs goes on",
                flush=True,
            )
            return
        which = "last"
        lines = ["", f"trained for {trainer.current_epoch} epochs, {trainer.global_step} steps"]
        lines += numbers(trainer, "val/")
        if best is not None and best.best_model_score is not None:
            nothing = best.mode == "max" and float(best.best_model_score) == 0  # the first of equals is kept
            which = "last" if nothing else "best"
            lines.append(f"best {best.monitor} {float(best.best_model_score):.4f}: {best.best_model_path}")
            if nothing:
                lines.append(
                    f"{best.monitor} was never above 0: best.ckpt is of the first validation, last.ckpt of the last"
                )
        if note := getattr(trainer.datamodule, "common", ""):  # type: ignore[attr-defined]
            lines.append(note)
        if Path(trainer.default_root_dir).resolve() != Path("runs").resolve():  # where `best` is not looked for
            which = str(folder / f"checkpoints/{which}.ckpt")
        lines += [
            f"metrics:    {folder / 'metrics.csv'}",
            f"pictures:   {folder / 'pictures'}",
            f"try it:     python -m {type(task).__module__} predict --ckpt_path {which} --data.path YOUR_PHOTOS",
        ]
        print("\n".join(lines), flush=True)


def folder_of(trainer: L.Trainer) -> Path | None:
    """The run's folder, for the first process alone: `trainer.log_dir` is a broadcast and waits for all of them."""
    if not trainer.loggers:
        return None
    logger = trainer.loggers[0]
    folder = logger.log_dir if isinstance(logger, CSVLogger | TensorBoardLogger) else logger.save_dir
    return None if folder is None else Path(folder)


def numbers(trainer: L.Trainer, prefix: str) -> list[str]:
    """The logged metrics of a split, five a line."""
    values = [
        f"{k.removeprefix(prefix)} {float(v):.4f}" for k, v in trainer.callback_metrics.items() if k.startswith(prefix)
    ]
    return ["  ".join(values[i : i + 5]) for i in range(0, len(values), 5)]
