"""Training samples in an order that depends on nothing but seed and epoch, and that a resumed run takes up again."""

import os
import random
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch.utils.data import Dataset, get_worker_info
from torch.utils.data.distributed import DistributedSampler


class Order(DistributedSampler):
    """Every epoch another order of all samples, shared out over processes: N of them with batches of B see, step by
    step, what one with batches of N x B does.

    Yields (seed, epoch, index), for `Seeded`. The seed is that of `seed_everything`, or 0.

    Args:
        dataset: sized.
        batch_size: samples a batch and process.
        groups: of every sample; each batch is of one group, except for what is left at the end.
        processes, rank: how many share the samples, and which of them this is.

    Attributes:
        begun: an epoch, and how many of its batches to leave out.
        steps: batches an epoch, for a run that counts epochs otherwise than in passes over these samples: the passes
            follow each other as they would, each in its own order, wherever such an epoch ends. None is one pass.
    """

    steps: int | None = None

    def __init__(
        self,
        dataset: Dataset,
        batch_size: int,
        groups: Sequence[Any] | None = None,
        processes: int = 1,
        rank: int = 0,
    ) -> None:
        whole = len(dataset) >= batch_size * processes  # type: ignore[arg-type]
        seed = int(os.environ.get("PL_GLOBAL_SEED", 0))
        super().__init__(dataset, processes, rank, seed=seed, drop_last=whole)
        self.batch_size, self.groups = batch_size, groups
        self.begun = (-1, 0)

    def __len__(self) -> int:
        return super().__len__() if self.steps is None else self.steps * self.batch_size

    def __iter__(self) -> Iterator[tuple[int, int, int]]:  # type: ignore[override]
        if self.steps is None:
            keys = self.one_pass(self.epoch)
        else:
            batches = self.num_samples // self.batch_size  # of a pass
            number, begun = divmod(self.epoch * self.steps, batches)
            passes = range(number, number + -(-(begun + self.steps) // batches))
            keys = [key for p in passes for key in self.one_pass(p)[: batches * self.batch_size]]
            keys = keys[begun * self.batch_size :][: len(self)]
        return iter(keys[self.skipped() * self.batch_size :])

    def one_pass(self, number: int) -> list[tuple[int, int, int]]:
        """All samples of this process once, in the order of the `number`th epoch."""
        generator = torch.Generator().manual_seed(seed_of(self.seed, number))
        order = torch.randperm(len(self.dataset), generator=generator).tolist()  # type: ignore[arg-type]
        if self.groups is not None:
            order = grouped(order, self.groups, self.batch_size * self.num_replicas)
        order = order[: self.total_size] if self.drop_last else (order * self.num_replicas)[: self.total_size]
        return [(self.seed, number, index) for index in order[self.rank :: self.num_replicas]]

    def skipped(self) -> int:
        """Batches that are left out of this epoch."""
        return self.begun[1] if self.begun[0] == self.epoch else 0


def grouped(order: Sequence[int], groups: Sequence[Any], size: int) -> list[int]:
    """`order`, rearranged so that each `size` in a row are of one group; what is left over comes last."""
    waiting: dict[Any, list[int]] = {}
    found: list[int] = []
    for index in order:
        group = waiting.setdefault(groups[index], [])
        group.append(index)
        if len(group) == size:
            found += group
            group.clear()
    return found + [index for group in waiting.values() for index in group]


class Seeded(Dataset):
    """A data set whose samples are random (by torch, numpy or Python) by seed, epoch and index alone: whichever worker
    draws them, and whatever it drew before."""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, key: tuple[int, int, int] | int) -> Any:
        # A plain index is that of another sampler, such as overfit_batches puts there: the same sample every time.
        place = key if isinstance(key, tuple) else (0, 0, key)
        seed = seed_of(*place)
        with isolate_rng(include_cuda=False) if get_worker_info() is None else nullcontext():
            torch.default_generator.manual_seed(seed)
            np.random.seed(seed % 2**32)  # noqa: NPY002 (for data sets that draw from it)
            random.seed(seed)
            return self.dataset[place[-1]]


def seed_of(*parts: int) -> int:
    """A seed of 63 bits from whole numbers."""
    return int(np.random.SeedSequence([part % 2**64 for part in parts]).generate_state(1, np.uint64)[0] >> 1)
