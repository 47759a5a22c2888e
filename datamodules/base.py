"""What every data module has in common."""

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch.utils.data import DataLoader, Dataset

from datamodules.broken import Skipping, read
from datamodules.decoded import Decoded
from datamodules.loader import Loader, begin_worker, cores
from datamodules.order import Order, Seeded
from datamodules.transforms import Array, read_image


class DataModule(L.LightningDataModule):
    """Loaders over `self.datasets`, which `setup` of a subclass fills by split: "train", "val", "test", "predict".

    Args:
        batch_size: samples a batch and process.
        workers: loader processes; None takes one a core that may be used, 8 at most. They live as long as the loader,
            each two batches ahead, and compute in one thread each (torch sees to its own, `transforms` to OpenCV's).
        eval_batch_size: for validation, test and prediction; None is batch_size.
        decoded: where pictures are kept decoded; None decodes them each time.
        skip: share of a split's samples that may be skipped because they cannot be read; with 0 the first ends the run.
        timeout: seconds without a batch after which workers are taken to hang.
    """

    def __init__(
        self,
        batch_size: int = 32,
        workers: int | None = None,
        eval_batch_size: int | None = None,
        decoded: Decoded | None = None,
        skip: float = 0.0,
        timeout: float = 600.0,
    ) -> None:
        super().__init__()
        if batch_size < 1 or (eval_batch_size is not None and eval_batch_size < 1):
            raise ValueError(f"batch_size must be at least 1, got {batch_size} and {eval_batch_size}")
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size or batch_size
        if workers is not None and workers < 0:
            raise ValueError(f"workers must be at least 0, got {workers}")
        self.workers = min(cores(), 8) if workers is None else workers
        self.decoded = decoded
        if not 0 <= skip < 1 or timeout < 0:
            raise ValueError(f"skip is a share, below 1, and timeout in seconds; got {skip} and {timeout}")
        self.skip, self.timeout = skip, timeout
        self.datasets: dict[str, Dataset] = {}
        self.lists: dict[str, Path] = {}  # of what was skipped
        self.common = ""  # what is to be said of pictures that are learned from and judged by

    def reader(self, read: Callable[..., Array] = read_image) -> Callable[..., Array]:
        """What reads pictures: `read`, or what it has read before."""
        return read if self.decoded is None else partial(self.decoded.read, read)

    def loader(self, split: str, **options: Any) -> DataLoader:
        """Of a split. options: of `DataLoader`, beyond those below; and `groups`, see `Order`."""
        dataset, groups = self.datasets[split], options.pop("groups", None)
        if self.skip:
            self.lists[split] = self.list_of_skipped(split)
            dataset = Skipping(dataset, self.skip, self.lists[split])
        options |= {
            "num_workers": self.workers,
            "persistent_workers": self.workers > 0,
            "pin_memory": torch.cuda.is_available(),
            "timeout": self.timeout if self.workers else 0,
            "worker_init_fn": begin_worker,
        }
        if split != "train":
            return Loader(dataset, batch_size=self.eval_batch_size, **options)
        processes, rank = (self.trainer.world_size, self.trainer.global_rank) if self.trainer else (1, 0)
        order = Order(dataset, self.batch_size, groups, processes, rank)
        options |= {"batch_size": self.batch_size, "sampler": order, "drop_last": order.drop_last}
        return Loader(Seeded(dataset), **options)

    def list_of_skipped(self, split: str) -> Path:
        """Where to keep it: in the run's folder, if there is one."""
        folder = Path((self.trainer.log_dir if self.trainer else None) or tempfile.mkdtemp())
        folder.mkdir(parents=True, exist_ok=True)
        return folder / f"skipped_{split}.jsonl"

    def teardown(self, stage: str) -> None:
        for split, path in self.lists.items():
            if found := read(path):
                count = len(self.datasets[split])  # type: ignore[arg-type]
                rank_zero_warn(
                    f"{len(found)} of {count} samples of {split} could not be read and were skipped; {path} lists "
                    f"them, the first: {next(iter(found.values()))}"
                )

    def train_dataloader(self) -> DataLoader:
        train, val = (getattr(self.datasets.get(name), "instances", []) for name in ("train", "val"))
        judged = {str(i.path) for i in val}
        if both := judged.intersection(str(i.path) for i in train):
            self.common = (
                f"{len(both)} of {len(judged)} pictures of val are learned from as well, such as {min(both)}: what is "
                f"measured on them was learned by heart"
            )
            rank_zero_warn(self.common)
        return self.loader("train")

    def val_dataloader(self) -> DataLoader:
        return self.loader("val")

    def test_dataloader(self) -> DataLoader:
        return self.loader("test")

    def predict_dataloader(self) -> DataLoader:
        return self.loader("predict")
