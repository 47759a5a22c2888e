"""A run that was stopped goes on as if it had not been: same weights, same numbers, nothing torn."""

import errno
import io
import os
import signal
import time
from pathlib import Path

import pytest
import torch

from hrnet.checkpoints import WeightsError
from tasks.arguments import CONFIGS
from tasks.classification import Classification
from tasks.detection import Detection
from tasks.pose import Pose
from tasks.resume import WholeCheckpoints, find_checkpoint, read_checkpoint, rows_of, same_run
from tasks.segmentation import Segmentation

TINY = "--model.backbone={width: 8, modules: [1, 1, 1], blocks: 1, stem: [1, 16]}"
OCR = "{class_path: hrnet.heads.OCR, init_args: {width: 32, key: 16}}"
CALLBACKS = """
trainer:
  max_epochs: 2
  log_every_n_steps: 1
  callbacks:
    - class_path: lightning.pytorch.callbacks.ModelCheckpoint
      init_args: {filename: best, monitor: val/score, mode: max, enable_version_counter: false}
last: {every_n_steps: 2}
"""


class Gone(Exception):
    """The process, as far as what it leaves is concerned."""


@pytest.fixture(scope="module")
def options(short, tmp_path_factory):
    path = tmp_path_factory.mktemp("options") / "often.yaml"
    path.write_text(CALLBACKS)
    return ["-c", path, *short, "--ckpt_path=auto"]


OWN = {
    Pose: [TINY, "--data.size=[64,48]"],
    Segmentation: ["-c", "ocr.yaml"],
    Detection: [TINY, "--model.detector={pyramid: 16, width: 32}", "--data.shorter=64", "--data.longer=96"],
    Classification: [
        TINY,
        "--data.size=64",
        "--model.mixup=0.2",
        "--model.cutmix=1",
        "--model.optimizer=torch.optim.SGD",
        "--model.optimizer.lr=0.01",
    ],
}


def state(folder):
    return torch.load(folder / "checkpoints/last.ckpt", weights_only=True)


def same(a, b):
    """Of two checkpoints' parts, bit by bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a == b


PARTS = ("state_dict", "optimizer_states", "lr_schedulers", "global_step", "epoch")


@pytest.fixture(scope="module")
def whole(cli, options, tmp_path_factory):
    """A run that nothing stops."""
    return cli(tmp_path_factory.mktemp("whole"), "fit", *options, *OWN[Pose])


def stop_at(monkeypatch, task, method, count):
    """The `count`th call of a step ends the process."""
    step, calls = getattr(task, method), []

    def counted(self, batch, index):
        calls.append(1)
        if len(calls) == count:
            raise Gone
        return step(self, batch, index)

    monkeypatch.setattr(task, method, counted)


@pytest.mark.parametrize(
    ("method", "count"),
    [
        ("training_step", 7),
        ("validation_step", 2),  # after the one of the sanity check
        *[pytest.param("training_step", count, marks=pytest.mark.slow) for count in (1, 2, 4, 8, 11)],
        pytest.param("validation_step", 3, marks=pytest.mark.slow),
    ],
)
def test_goes_on_bit_by_bit(method, count, whole, cli, options, tmp_path, monkeypatch):
    with monkeypatch.context() as stopped:
        stop_at(stopped, Pose, method, count)
        with pytest.raises(Gone):
            cli(tmp_path, "fit", *options, *OWN[Pose])
    run = cli(tmp_path, "fit", *options, *OWN[Pose])
    a, b = state(whole.folder), state(run.folder)
    assert {k for k in PARTS if not same(a[k], b[k])} == set()
    best = [x.folder / "checkpoints/best.ckpt" for x in (whole, run)]
    assert same(*(torch.load(path, weights_only=True)["state_dict"] for path in best))
    assert rows_of(run.folder) == rows_of(whole.folder)


@pytest.mark.slow
def test_goes_on_again_and_again(whole, cli, options, tmp_path, monkeypatch):
    for count in (3, 2, 1, 3, 4):
        with monkeypatch.context() as stopped:
            stop_at(stopped, Pose, "training_step", count)
            with pytest.raises(Gone):
                cli(tmp_path, "fit", *options, *OWN[Pose])
    run = cli(tmp_path, "fit", *options, *OWN[Pose])
    assert same(state(whole.folder)["state_dict"], state(run.folder)["state_dict"])
    assert rows_of(run.folder) == rows_of(whole.folder)
    assert len(list(run.folder.parent.iterdir())) <= 2


@pytest.mark.parametrize(
    "task", [Detection, *(pytest.param(task, marks=pytest.mark.slow) for task in (Segmentation, Classification))]
)
def test_what_is_random_in_a_step_is_drawn_again(task, cli, options, tmp_path, monkeypatch):
    """Dropout, sampled boxes, mixed images."""
    where = [tmp_path / "whole", tmp_path / "stopped"]
    for folder in where:
        folder.mkdir()
        (folder / "ocr.yaml").write_text(f"model: {{{TINY[8:].replace('=', ': ')}, head: {OCR}}}")
    options = [*options, "--trainer.max_epochs=2", "--trainer.limit_train_batches=3", "--trainer.limit_val_batches=1"]
    first = cli(where[0], "fit", *options, *OWN[task], task=task)
    with monkeypatch.context() as stopped:
        stop_at(stopped, task, "training_step", 3)  # amid an epoch
        with pytest.raises(Gone):
            cli(where[1], "fit", *options, *OWN[task], task=task)
    second = cli(where[1], "fit", *options, *OWN[task], task=task)
    a, b = state(first.folder), state(second.folder)
    assert {k for k in PARTS if not same(a[k], b[k])} == set()


def test_auto_is_of_the_same_command(cli, options, tmp_path):
    few = ["--trainer.max_epochs=1", "--trainer.limit_train_batches=1", "--trainer.limit_val_batches=1"]
    given = [*options, *OWN[Pose], *few]
    first = cli(tmp_path, "fit", *given)
    other = cli(tmp_path, "fit", *given, "--model.optimizer.lr=0.01")
    assert other.folder != first.folder
    again = cli(tmp_path, "fit", *given, "--trainer.max_epochs=2")  # the trainer's do not count
    assert again.folder == first.folder
    assert again.trainer.current_epoch == 2


@pytest.mark.parametrize("end", ["max_steps=3", pytest.param("max_time=00:00:00:01", marks=pytest.mark.slow)])
def test_what_ends_amid_an_epoch_goes_on_there(end, whole, cli, options, tmp_path, monkeypatch):
    step = Pose.training_step
    with monkeypatch.context() as slow:
        slow.setattr(Pose, "training_step", lambda *args: time.sleep(0.4) or step(*args))
        first = cli(tmp_path, "fit", *options, *OWN[Pose], f"--trainer.{end}")
    assert 1 <= first.trainer.global_step <= 3
    run = cli(tmp_path, "fit", *options, *OWN[Pose])
    a, b = state(whole.folder), state(run.folder)
    assert {k for k in PARTS if not same(a[k], b[k])} == set()


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ("--data.batch_size=3", "3 images in a batch .* had 4, amid an epoch"),
        ("--data.train=9", r"\d+ samples in the data .* had \d+, amid an epoch"),
    ],
)
def test_other_data_amid_an_epoch_are_refused_and_the_run_is_left_as_it_was(other, said, cli, options, tmp_path):
    given = [*options, *OWN[Pose], "--trainer.max_steps=2"]
    first = cli(tmp_path, "fit", *given)
    notes = [(first.folder / name).read_text() for name in ("config.yaml", "command.txt")]
    with pytest.raises(SystemExit, match=said):
        cli(tmp_path, "fit", *given, "--trainer.max_steps=4", "--ckpt_path=last", other)
    assert notes == [(first.folder / name).read_text() for name in ("config.yaml", "command.txt")]


def test_a_run_that_early_stopping_has_ended_is_not_trained_on(cli, options, tmp_path):
    path = tmp_path / "early.yaml"
    path.write_text(
        "trainer: {callbacks+: [{class_path: lightning.pytorch.callbacks.EarlyStopping, "
        "init_args: {monitor: val/loss, mode: max, patience: 1}}]}"
    )
    given = [*options, "-c", path, *OWN[Pose], "--trainer.max_epochs=9", "--trainer.limit_train_batches=1"]
    first = cli(tmp_path, "fit", *given)
    assert first.trainer.current_epoch < 9
    again = cli(tmp_path, "fit", *given)
    assert again.folder == first.folder
    assert again.trainer.global_step == first.trainer.global_step


def test_one_run_however_its_command_is_written():
    one = ["fit", "-c", "a.yaml", "--data.batch_size=4", "--data.skip", "0.1", "--model.sigma", "-2"]
    two = [
        "fit",
        "--model.sigma=-2",
        "--data.workers=3",
        "--data.batch_size",
        "4",
        "-c",
        "a.yaml",
        "--trainer.devices=2",
    ]
    assert same_run(one) == same_run(two)
    assert same_run(one) != same_run([*two, "--model.sigma=3"])


def test_checkpoints_with_code_do_not_run_it(tmp_path):
    path = tmp_path / "evil.ckpt"
    torch.save({"state_dict": {}, "hyper_parameters": {"a": Gone("code")}}, path)
    with pytest.raises(WeightsError, match=r"evil\.ckpt: loading it could run code"):
        read_checkpoint(path)


SLURM = {"JOB_ID": 7, "JOB_NAME": "pose", "NTASKS": 1, "PROCID": 0, "LOCALID": 0, "NODEID": 0, "NODELIST": "localhost"}


@pytest.mark.parametrize(
    ("sign", "variables"),
    [
        (signal.SIGTERM, {}),
        *(pytest.param(*c, marks=pytest.mark.slow) for c in ((signal.SIGINT, {}), (signal.SIGTERM, SLURM))),
    ],
    ids=str,
)
def test_signal_ends_after_the_step(sign, variables, whole, cli, options, tmp_path, monkeypatch):
    step, before = Pose.training_step, signal.getsignal(signal.SIGTERM)
    for name, value in variables.items():
        monkeypatch.setenv(f"SLURM_{name}", str(value))

    def third(self, batch, index):
        if self.global_step == 3:
            os.kill(os.getpid(), sign)
        return step(self, batch, index)

    with monkeypatch.context() as stopped:
        stopped.setattr(Pose, "training_step", third)
        with pytest.raises(SystemExit) as end:
            cli(tmp_path, "fit", *options, *OWN[Pose])
    signal.signal(signal.SIGTERM, before)
    assert end.value.code == 128 + sign
    assert state(tmp_path / "runs/pose/version_0")["global_step"] == 4
    run = cli(tmp_path, "fit", *options, *OWN[Pose])
    assert same(state(whole.folder)["state_dict"], state(run.folder)["state_dict"])
    assert rows_of(run.folder) == rows_of(whole.folder)


def test_scaled_rate_is_scaled_once(cli, options, tmp_path, monkeypatch):
    given = [*options, *OWN[Pose], "-c", CONFIGS / "experiments/scaled_lr.yaml", "--trainer.accumulate_grad_batches=2"]
    with monkeypatch.context() as stopped:
        stop_at(stopped, Pose, "training_step", 6)
        with pytest.raises(Gone):
            cli(tmp_path, "fit", *given)
    run = cli(tmp_path, "fit", *given)
    scheduler = run.trainer.lr_scheduler_configs[0].scheduler
    assert scheduler.base_lrs == [pytest.approx(0.002 * 4 * 2 / 128)]


def test_finished_run_is_not_begun_again(whole, cli, options):
    before = state(whole.folder)
    run = cli(whole.folder.parents[2], "fit", *options, *OWN[Pose])
    assert run.folder == whole.folder
    assert same(state(run.folder)["state_dict"], before["state_dict"])


def test_torn_last_is_replaced_by_best(whole, tmp_path, recwarn):
    folder = tmp_path / "version_0/checkpoints"
    folder.mkdir(parents=True)
    content = (whole.folder / "checkpoints/last.ckpt").read_bytes()
    (folder / "best.ckpt").write_bytes((whole.folder / "checkpoints/best.ckpt").read_bytes())
    (folder / "last.ckpt").write_bytes(content[: len(content) // 2])
    assert find_checkpoint(tmp_path, "last") == folder / "best.ckpt"
    assert "cut off" in str(recwarn[-1].message)
    (folder / "best.ckpt").write_bytes(b"")
    with pytest.raises(WeightsError, match=r"Nor is .*best.ckpt. Move .*version_0 away to begin anew"):
        find_checkpoint(tmp_path, "last")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_full_disk_leaves_the_former_checkpoint(number, tmp_path, monkeypatch):
    path, writer = tmp_path / "last.ckpt", WholeCheckpoints()
    writer.save_checkpoint({"state_dict": {"a": torch.ones(3)}, "hyper_parameters": {}}, path)

    class Full(io.FileIO):
        def write(self, data):
            super().write(bytes(data)[:10])
            raise OSError(number, os.strerror(number))

    with monkeypatch.context() as full:
        full.setattr(Path, "open", lambda self, mode: Full(str(self), mode))
        with pytest.raises(OSError, match=r"last\.ckpt: cannot write.*is whole"):
            writer.save_checkpoint({"state_dict": {"a": torch.zeros(3)}}, path)
    assert read_checkpoint(path)["state_dict"]["a"].sum() == 3
    assert [p.name for p in tmp_path.iterdir()] == ["last.ckpt"]
