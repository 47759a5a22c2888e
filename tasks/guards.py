"""What keeps a run from ruin: losses and gradients that are no numbers."""

from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import Tensor

PATIENCE = 20
"""Steps in a row that are skipped before the run ends."""


class NotFinite(ArithmeticError):
    """A loss, a gradient or a weight is NaN or infinite; the message says where, and what to do."""


class Finite(Callback):
    """Ends a run whose loss is NaN or infinite, before a checkpoint is spoiled, and keeps the batch that did it.

    The loss is looked at one step later, when it is there: no step waits for it.

    Args:
        action: "stop", or "skip" to leave out the steps of such gradients: weights, the optimiser's memory and batch
            norm's statistics stay as they were. That waits for every step.

    Raises:
        NotFinite: in training, and instead of writing a checkpoint.
    """

    def __init__(self, action: Literal["stop", "skip"] = "stop") -> None:
        self.action = action
        self.last: tuple[Tensor, Any, Any, str] | None = None
        self.kept: list[Tensor] = []
        self.skipped = self.in_a_row = 0

    def on_train_batch_start(self, trainer: L.Trainer, task: Any, batch: Any, index: int) -> None:
        if self.action == "skip" and not self.kept:  # of the first batch that the step is made of
            self.kept = [b.clone() for b in task.buffers()]

    def on_before_optimizer_step(self, trainer: L.Trainer, task: Any, optimizer: Any) -> None:
        if self.action != "skip":
            return
        kept, self.kept = self.kept, []
        grads = [p.grad for p in task.parameters() if p.grad is not None]
        if not grads or torch.stack(torch._foreach_norm(grads)).isfinite().all():
            self.in_a_row = 0
            return
        optimizer.zero_grad(set_to_none=True)  # without gradients, a step changes nothing
        for buffer, former in zip(task.buffers(), kept, strict=True):
            buffer.copy_(former)
        self.skipped, self.in_a_row = self.skipped + 1, self.in_a_row + 1
        task.log("train/skipped", float(self.skipped), batch_size=1)
        if self.in_a_row >= PATIENCE:
            where = f"{PATIENCE} steps in a row, up to step {trainer.global_step}"
            raise NotFinite(f"gradients were NaN or infinite in {where}. {remedy(trainer, skip=True)}")

    def on_train_batch_end(self, trainer: L.Trainer, task: Any, outputs: Any, batch: Any, index: int) -> None:
        self.look(trainer)
        if self.action == "stop" and isinstance(outputs, dict) and "loss" in outputs:
            where = f"step {trainer.global_step} (epoch {trainer.current_epoch}, batch {index})"
            loss = outputs["loss"].detach().to("cpu", non_blocking=True)
            there = torch.cuda.Event() if outputs["loss"].is_cuda else None
            if there is not None:
                there.record()
            self.last = loss, there, batch, where

    def on_train_epoch_end(self, trainer: L.Trainer, task: Any) -> None:
        self.look(trainer)

    def on_save_checkpoint(self, trainer: L.Trainer, task: Any, checkpoint: dict[str, Any]) -> None:
        self.look(trainer)
        weights = [p.detach() for p in task.parameters()]
        if weights and not torch.stack(torch._foreach_norm(weights)).isfinite().all():
            what = remedy(trainer, skip=self.action == "skip")
            raise NotFinite(f"weights are NaN or infinite, so no checkpoint of them is written. {what}")

    def look(self, trainer: L.Trainer) -> None:
        """At the loss of the step before."""
        if self.last is None:
            return
        (loss, there, batch, where), self.last = self.last, None
        if there is not None:
            there.synchronize()
        if loss.isfinite():
            return
        saved, last = "", trainer.checkpoint_callback
        if isinstance(last, ModelCheckpoint) and last.dirpath is not None:  # the same for all processes
            path = Path(last.dirpath).parent / f"not_finite_{trainer.global_rank}.pt"
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.save({"where": where, "batch": batch}, path)
            saved = f"; {path} keeps the batch (torch.load)"
        ids = batch.get("id") if isinstance(batch, dict) else None
        of = f" of samples {ids.tolist()}" if isinstance(ids, Tensor) else ""
        raise NotFinite(f"the loss is {loss.item()} in {where}{of}{saved}. {remedy(trainer, skip=False)}")


def remedy(trainer: L.Trainer, skip: bool) -> str:
    """What to do, where it can be done."""
    callback = trainer.checkpoint_callback
    folder = getattr(callback, "dirpath", None)
    path = None if folder is None else Path(folder) / "last.ckpt"
    changes = "gradients clipped (--trainer.gradient_clip_val), in fp32 (--trainer.precision 32-true)"
    if not skip:
        changes += ", or leaving such steps out (--nonfinite skip)"
    if path is None or not path.is_file():
        return f"Begin again with a lower learning rate (--model.optimizer.lr), {changes}"
    return (
        f"Go on (--ckpt_path last) with {changes}; or begin anew from these weights with a lower learning rate "
        f"(--model.init_from {path} --model.optimizer.lr ...)"
    )
