"""Samples that cannot be read, and loader workers that die or hang."""

import gc
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
from test_resume import TINY
from torch.utils.data import Dataset

from datamodules.base import DataModule
from datamodules.broken import Skipping, read
from datamodules.loader import Loader, begin_worker
from datamodules.transforms import DataError
from tasks.endings import told
from tasks.segmentation import Segmentation


class Numbers(Dataset):
    """0, 1, ...; and what happens at some of them."""

    def __init__(self, count, **happens):
        self.count, self.happens = count, {int(k[1:]): v for k, v in happens.items()}

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        happens = self.happens.get(index)
        if happens == "broken":
            raise DataError(f"{index}.jpg: the image file is empty")
        if happens == "bug":
            raise KeyError(index)
        if happens == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if happens == "stops":  # nothing but SIGKILL reaches it, as one that waits for a dead disk
            os.kill(os.getpid(), signal.SIGSTOP)
        if happens == "hangs":
            time.sleep(60)
        return index


def loaded(numbers, split="val", **options):
    data = DataModule(2, **options)
    data.datasets[split] = numbers
    return [int(i) for batch in data.loader(split) for i in batch]


@pytest.mark.parametrize("workers", [0, 2])
def test_next_one_stands_in(workers):
    numbers = Numbers(8, _2="broken", _3="broken", _7="broken")
    assert loaded(numbers, skip=0.5, workers=workers) == [0, 1, 4, 4, 4, 5, 6, 0]
    assert set(loaded(numbers, "train", skip=0.5, workers=workers)) == {0, 1, 4, 5, 6}


def test_too_many_are_not_skipped():
    with pytest.raises(DataError, match=r"2 of 8 samples cannot be read, .* share of 0\.2 .*2\.jpg: the image"):
        loaded(Numbers(8, _2="broken", _3="broken"), skip=0.2, workers=0)


def test_first_ends_the_run_by_default():
    with pytest.raises(DataError, match=r"^2\.jpg: the image file is empty$"):
        loaded(Numbers(8, _2="broken"), workers=0)


def test_a_bug_is_not_skipped():
    with pytest.raises(KeyError):
        loaded(Numbers(8, _2="bug"), skip=0.9, workers=0)


def test_what_was_skipped_is_listed_once(tmp_path):
    data = Skipping(Numbers(8, _2="broken"), 0.5, tmp_path / "list")
    for _ in range(3):
        assert data[2] == 3
    assert read(tmp_path / "list") == {2: "2.jpg: the image file is empty"}
    assert len((tmp_path / "list").read_text().splitlines()) == 1


def test_dead_worker_is_told():
    with pytest.raises(DataError, match=r"DataLoader worker .*memory is short.*--shm-size"):
        loaded(Numbers(8, _5="killed"), workers=2)


def test_hanging_worker_is_told(capfd):
    with pytest.raises(DataError, match="no batch within 8 seconds"):
        loaded(Numbers(8, _5="hangs"), workers=2, timeout=8)
    assert "in __getitem__" in capfd.readouterr().err


def test_stopped_worker_is_not_waited_for():
    began = time.monotonic()
    with pytest.raises(DataError, match="no batch within 2 seconds"):
        loaded(Numbers(8, _0="stops"), workers=1, timeout=2)
    gc.collect()
    assert time.monotonic() - began < 30


def test_worker_that_is_told_to_end_goes_on_once():
    """Schedulers tell every process of a run."""

    def work():
        begin_worker(0)
        for sign in (signal.SIGINT, signal.SIGTERM):
            os.kill(os.getpid(), sign)
        os.write(pipe[1], b"goes on")
        os.kill(os.getpid(), signal.SIGTERM)

    pipe = os.pipe()
    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    process.join(30)
    assert os.read(pipe[0], 20) == b"goes on"
    assert process.exitcode == -signal.SIGTERM


STOPPED = """
import signal, sys
from tasks.cli import main
from tasks.segmentation import Segmentation

sign = getattr(signal, sys.argv.pop())

class Stopped(Segmentation):
    def validation_step(self, batch, index):
        if index == 1:
            signal.raise_signal(sign)
        return super().validation_step(batch, index)

Stopped.__module__ = "tasks.segmentation"
main(Stopped)
"""


@pytest.mark.parametrize("sign", ["SIGINT", pytest.param("SIGTERM", marks=pytest.mark.slow)])
def test_a_run_that_is_stopped_while_it_validates_ends(sign, cache, tmp_path):
    """With the workers of both loaders, which outlive the first signal."""
    (tmp_path / "stopped.py").write_text(STOPPED)
    scenes = [f"--data.root={cache}", "--data.train=12", "--data.val=6", "--data.eval_batch_size=1", "--data.workers=1"]
    few = ["--trainer.num_sanity_val_steps=0", "--trainer.max_epochs=2", "--trainer.accelerator=cpu"]
    command = [sys.executable, "stopped.py", "fit", *scenes, *few, TINY, sign]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 128 + getattr(signal, sign), done.stderr[-2000:]
    assert f"stopped by {sign}" in done.stderr + done.stdout


def test_worker_killed_while_the_process_does_something_else():
    """PyTorch's error comes at once, wherever the process is."""
    text = "DataLoader worker (pid 7) is killed by signal: Killed."
    assert "memory is short" in str(told(RuntimeError(text)))
    assert "--ckpt_path last" in str(told(RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer")))
    with pytest.raises(RuntimeError, match="a bug"):
        told(RuntimeError("a bug"))


def test_run_goes_on_without_broken_pictures(short, cache, cli, tmp_path, recwarn):
    root = tmp_path / "data"
    shutil.copytree(cache, root)
    pictures = sorted(root.rglob("train/*.jpg"))
    pictures[3].write_bytes(pictures[3].read_bytes()[:-500])
    given = [*short, TINY, "--trainer.max_epochs=1", f"--data.root={root}", "--data.skip=0.2"]
    run = cli(tmp_path, "fit", *given, task=Segmentation)
    (listed,) = read(run.folder / "skipped_train.jsonl").values()
    assert str(pictures[3]) in listed
    assert any("1 of 12 samples of train could not be read" in str(w.message) for w in recwarn)


def test_loader_is_a_dataloader_to_lightning():
    assert Loader(Numbers(4), 2).state_dict() == {}
