"""The order of training samples: by seed and epoch alone, the same for any number of workers and processes."""

from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import Dataset

from datamodules.base import DataModule
from datamodules.loader import Loader
from datamodules.order import Order, Seeded
from datamodules.rendered import Rendered


class Noise(Dataset):
    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        return {"id": index, "noise": torch.rand(()), "numpy": np.random.rand()}  # noqa: NPY002


def loader(count=23, batch=4, workers=0, processes=1, rank=0, groups=None):
    data = DataModule(batch, workers)
    data.datasets["train"] = Noise(count)
    data.trainer = SimpleNamespace(world_size=processes, global_rank=rank)
    return data.loader("train", groups=groups)


def epoch(of, number):
    of.sampler.set_epoch(number)
    return list(of)


def equal(some, others):
    return len(some) == len(others) and all(
        torch.equal(a[k], b[k]) for a, b in zip(some, others, strict=True) for k in a
    )


def test_the_same_for_any_number_of_workers():
    none, two = loader(), loader(workers=2)
    for number in (0, 1):
        assert equal(epoch(none, number), epoch(two, number))
    assert equal(epoch(two, 0), epoch(none, 0))
    assert not equal(epoch(none, 0), epoch(none, 1))


def test_another_seed_is_another_order(monkeypatch):
    first = epoch(loader(), 0)
    monkeypatch.setenv("PL_GLOBAL_SEED", "1")
    assert [b["id"].tolist() for b in epoch(loader(), 0)] != [b["id"].tolist() for b in first]


def test_what_the_process_draws_itself_is_not_disturbed():
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    data = Seeded(Noise(5))
    assert data[0, 0, 2]["noise"] == data[0, 0, 2]["noise"]
    assert torch.equal(torch.rand(2), expected)


@given(st.integers(1, 60), st.integers(1, 7), st.integers(1, 4), st.booleans())
def test_processes_share_the_batches_of_one(count, batch, processes, grouping):
    groups = [i % 3 == 0 for i in range(count)] if grouping else None
    one = epoch(loader(count, batch * processes, groups=groups), 2)
    many = [epoch(loader(count, batch, processes=processes, rank=r, groups=groups), 2) for r in range(processes)]
    assert len({len(each) for each in many}) == 1  # or they would wait for each other
    if count < batch * processes:  # all of them, and some twice
        assert {i for each in many for b in each for i in b["id"].tolist()} == set(range(count))
        return
    assert len(one) == len(many[0]) == count // (batch * processes)
    for whole, *parts in zip(one, *many, strict=True):
        assert Counter(whole["id"].tolist()) == Counter(i for part in parts for i in part["id"].tolist())
    noise = {int(i): float(n) for b in one for i, n in zip(b["id"], b["noise"], strict=True)}
    assert all(noise[int(i)] == float(n) for each in many for b in each for i, n in zip(b["id"], b["noise"]))


@pytest.mark.parametrize("count", [8, 21])
def test_groups_go_together(count):
    groups = (np.random.default_rng(count).random(count) < 0.4).tolist()
    batches = [b["id"].tolist() for b in epoch(loader(count, groups=groups), 0)]
    seen = [i for batch in batches for i in batch]
    assert len(seen) == len(set(seen)) == count // 4 * 4
    mixed = [len({groups[i] for i in batch}) > 1 for batch in batches]
    assert sum(mixed) <= 1
    assert not any(mixed[:-2])


@pytest.mark.parametrize("workers", [0, 2])
def test_goes_on_amid_an_epoch(workers):
    whole, interrupted = loader(workers=workers), loader(workers=workers)
    expected = [epoch(whole, number) for number in (3, 4)]
    interrupted.sampler.set_epoch(3)
    batches = iter(interrupted)
    for _ in range(2):
        next(batches)
    state = interrupted.state_dict()
    resumed = loader(workers=workers)
    resumed.load_state_dict(state)
    assert len(resumed) == len(whole)
    assert equal(epoch(resumed, 3), expected[0][2:])
    place = {"seed": 0, "epoch": 3, "batches": 5, "of": 5}
    assert resumed.state_dict() == place | {"images": 4, "samples": len(whole.dataset)}
    assert equal(epoch(resumed, 4), expected[1])


def test_overfits_the_same_samples(cache):
    """overfit_batches puts a plain sampler there."""
    data = Rendered(str(cache), 12, 6, workers=0)
    data.setup("fit")
    fixed = Loader(Seeded(data.datasets["train"]), 4)
    assert equal(list(fixed), list(fixed))
    assert fixed.state_dict() == {}


def test_order_takes_small_sets_whole():
    assert sorted(i for _, _, i in Order(Noise(3), 8)) == [0, 1, 2]
