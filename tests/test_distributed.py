"""Runs of two processes, as a shell starts them: they end, and their numbers are those of one."""

import csv
import subprocess
import sys

import pytest

from tasks.detection import Detection
from tasks.segmentation import Segmentation

TWO = ["--trainer.devices=2", "--trainer.strategy=ddp"]
BACKBONE = "--model.backbone={width: 8, modules: [1, 1, 1], blocks: 1, stem: [1, 16]}"


@pytest.fixture(scope="module")
def options(small, tmp_path_factory):
    root = tmp_path_factory.mktemp("seven")
    scenes = [f"--data.root={root}", "--data.train=8", "--data.val=7"]  # two processes see one of seven twice
    return [*small, *scenes, "--data.eval_batch_size=2", "--trainer.max_epochs=1"]


def numbers(folder):
    """The last line of every column of a run's `metrics.csv`."""
    with (folder / "metrics.csv").open() as file:
        return {k: v for row in csv.DictReader(file) for k, v in row.items() if v}


def test_two_processes_fit_and_count_every_picture_once(options, cli, tmp_path):
    command = [sys.executable, "-m", "tasks.segmentation", "fit", *options, BACKBONE, *TWO]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    folder = tmp_path / "runs/segmentation/version_0"
    assert (folder / "pictures/epoch_000.jpg").is_file()
    assert f"{folder.relative_to(tmp_path)}/metrics.csv" in done.stdout
    path = folder / "checkpoints/last.ckpt"
    alone = cli(tmp_path, "validate", *options, f"--ckpt_path={path}", task=Segmentation)
    both, one = numbers(folder), numbers(alone.folder)
    judged = {k for k in one if k.startswith("val/") and k != "val/loss"}  # the loss is Lightning's mean of two means
    assert len(judged) > 10
    assert {k: both[k] for k in judged} == {k: one[k] for k in judged}


def test_two_processes_detect_in_equal_batches(short, cli, tmp_path):
    """Upright and lying pictures go apart; still no process has a batch more than the other, or it would wait."""
    batches = ["--data.batch_size=2", "--data.eval_batch_size=4"]
    given = [*short, *batches, BACKBONE, "--model.detector={pyramid: 16, width: 32}", "--trainer.max_epochs=1"]
    command = [sys.executable, "-m", "tasks.detection", "fit", *given, *TWO]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    folder = tmp_path / "runs/detection/version_0"
    alone = cli(tmp_path, "validate", *given, f"--ckpt_path={folder / 'checkpoints/last.ckpt'}", task=Detection)
    both, one = numbers(folder), numbers(alone.folder)
    assert "3 steps" in done.stdout
    judged = {k for k in one if k.startswith("val/")}
    assert len(judged) >= 12
    assert {k: float(both[k]) for k in judged} == pytest.approx({k: float(one[k]) for k in judged}, abs=1e-5)
