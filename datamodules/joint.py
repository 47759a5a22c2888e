"""Data of several tasks, for a network that learns them at once: a data module that holds data modules."""

from typing import Any

from lightning.pytorch.utilities.combined_loader import CombinedLoader
from torch.utils.data import DataLoader

from datamodules.base import DataModule
from datamodules.order import Order
from datamodules.transforms import DataError


class JointData(DataModule):
    """One data module a task. Every training step has one batch of each, `{task's name: batch}`.

    So every step has every loss, weights mean what they say, and all processes of a run do the same. How often a sample
    is seen follows from the batch sizes: a task that should see more has larger batches.

    Args:
        parts: data modules by the names of the tasks.
        steps: training steps an epoch; None is as many as the task with the most batches needs for one pass. Each
            task's data run on by themselves: pass after pass in the order of a run of its own, wherever the epochs end.

    Attributes:
        learned: names of the tasks that a run trains (set by it); all, to validate and to test.
        batch_size: images of a step, over all of these.
    """

    def __init__(self, parts: dict[str, DataModule], steps: int | None = None) -> None:
        if not parts:
            raise DataError("data.parts is empty: give a data module for each task, by the task's name")
        if steps is not None and steps < 1:
            raise DataError(f"data.steps is a number of steps an epoch, at least 1, got {steps}")
        super().__init__(sum(part.batch_size for part in parts.values()), workers=0)
        self.parts, self.steps = parts, steps
        self.learn(list(parts))

    def learn(self, names: list[str]) -> None:
        """Train and validate these tasks alone."""
        self.learned = names
        self.batch_size = sum(self.parts[name].batch_size for name in names)

    def prepare_data(self) -> None:
        for part in self.parts.values():
            part.prepare_data()

    def setup(self, stage: str) -> None:
        for part in self.parts.values():
            part.trainer = self.trainer
            part.setup(stage)

    def teardown(self, stage: str) -> None:
        for part in self.parts.values():
            part.teardown(stage)

    def train_dataloader(self) -> Any:
        loaders = {name: self.parts[name].train_dataloader() for name in self.learned}
        if len(loaders) > 1 or self.steps is not None:
            steps = self.steps or max(len(loader) for loader in loaders.values())
            for name, loader in loaders.items():
                order = loader.sampler
                assert isinstance(order, Order)
                if order.num_samples < order.batch_size:
                    raise DataError(
                        f"data.parts.{name}: {len(order.dataset)} samples are fewer than a batch of all processes; "  # type: ignore[arg-type]
                        f"lower data.parts.{name}.batch_size to {max(1, order.num_samples)} or less"
                    )
                order.steps = steps
        # All are of one length; "max_size_cycle", Lightning's default, would begin them anew at the end of an epoch.
        return CombinedLoader(loaders, "min_size")

    def val_dataloader(self) -> Any:
        return {name: self.parts[name].val_dataloader() for name in self.learned}

    def test_dataloader(self) -> Any:
        return {name: self.parts[name].test_dataloader() for name in self.learned}

    def predict_dataloader(self) -> DataLoader:
        raise DataError("to predict, give --data.path: one picture is looked at for all tasks")
