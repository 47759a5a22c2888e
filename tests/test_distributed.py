"""Runs of several processes, as a shell starts them: they end, and their numbers are those of one."""

import contextlib
import csv
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch
import yaml
from test_resume import same

from tasks.arguments import CONFIGS
from tasks.callbacks import gathered
from tasks.classification import Classification
from tasks.detection import Detection
from tasks.joint import Joint
from tasks.pose import Pose
from tasks.segmentation import Segmentation

TWO = ["--trainer.devices=2", "--trainer.strategy=ddp"]
BACKBONE = "--model.backbone={width: 8, modules: [1, 1, 1], blocks: 1, stem: [1, 16]}"
TASKS = {
    Pose: ["--data.size=[64,48]"],
    Segmentation: [],
    Detection: ["--model.detector={pyramid: 16, width: 32}"],
    Classification: [],
}


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
    forked = ["--trainer.devices=2", "--trainer.strategy=ddp_fork"]  # what is imported is so once
    command = [sys.executable, "-m", "tasks.segmentation", "fit", *options, BACKBONE, *forked]
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


def test_what_several_processes_predict_is_gathered(monkeypatch):
    """A picture that two of them have seen counts once, with all that one has found in it."""
    seen = [[{"image_id": i, "of": rank} for i in ids] for rank, ids in enumerate(([0, 2, 2, 4], [1, 3, 0]))]
    for name, answer in (("is_initialized", True), ("get_world_size", 2)):
        monkeypatch.setattr(torch.distributed, name, lambda answer=answer: answer)
    monkeypatch.setattr(torch.distributed, "all_gather_object", lambda parts, own: parts.__setitem__(slice(2), seen))
    found = [(item["image_id"], item["of"]) for item in gathered(seen[1])]
    assert found == [(0, 0), (1, 1), (2, 0), (2, 0), (3, 1), (4, 0)]


@pytest.mark.distributed
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


# `make test-distributed`

ONE_THREAD = os.environ | {"OMP_NUM_THREADS": "1"}
"""Two round otherwise than one, which each of several processes has."""


def start(folder, task, *given):
    """A command line in processes of its own; the first's."""
    command = [sys.executable, "-m", task.__module__, *map(str, given)]
    with (folder / "log").open("a") as log:
        return subprocess.Popen(
            command, cwd=folder, env=ONE_THREAD, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )


def finished(folder, task, *given):
    """Such a call's text, once it is over and went well."""
    process = start(folder, task, *given)
    try:
        code = process.wait(300)
    finally:
        end(process)
    text = (folder / "log").read_text()
    assert code == 0, text[-3000:]
    return text


def end(process):
    """Whatever is left of a call."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def newest(folder, task):
    runs = (folder / "runs" / task.__module__.split(".")[1]).iterdir()
    return max(runs, key=lambda run: int(run.name.split("_")[1]))


@pytest.fixture(scope="module")
def uneven(short, tmp_path_factory):
    """Eleven scenes to train on and seven to judge, which neither two nor three processes share evenly."""
    root = tmp_path_factory.mktemp("uneven")
    scenes = [f"--data.root={root}", "--data.train=11", "--data.val=7"]
    return [*short, *scenes, BACKBONE, "--data.batch_size=2", "--data.eval_batch_size=1"]


@pytest.mark.distributed
@pytest.mark.parametrize("processes", [2, 3])
@pytest.mark.parametrize("task", TASKS)
def test_every_command_counts_as_one_process_does(task, processes, uneven, tmp_path):
    given = [*uneven, *TASKS[task]]
    several = [f"--trainer.devices={processes}", "--trainer.strategy=ddp"]
    finished(tmp_path, task, "fit", *given, *several, "--trainer.max_epochs=2")
    fit = newest(tmp_path, task)
    path = f"--ckpt_path={fit / 'checkpoints/last.ckpt'}"
    for command in ("validate", "test"):
        found = []
        for how in ([], several):
            finished(tmp_path, task, command, *given, path, *how)
            found.append({k: v for k, v in numbers(newest(tmp_path, task)).items() if not k.endswith("/loss")})
        assert len(found[0]) >= 4
        assert found[0] == found[1]  # as text: to the last digit
        if command == "validate":
            assert {k: v for k, v in numbers(fit).items() if k in found[0] and "val/" in k}.items() <= found[0].items()
    photos = tmp_path / "photos"
    photos.mkdir()
    pictures = sorted((next(tmp_path.parent.glob("uneven*")) / "").rglob("val/*.jpg"))[:7]
    for picture in pictures:
        (photos / picture.name).write_bytes(picture.read_bytes())
    plain = [a for a in given if not a.startswith(("--data.root", "--data.train", "--data.val", "--data.size"))]
    results = []
    for how in ([], several):
        finished(tmp_path, task, "predict", *plain, path, f"--data.path={photos}", *how)
        folder = newest(tmp_path, task) / "predictions"
        own = folder.parent.name.encode()  # which files name
        results.append(
            {p.name: p.read_bytes().replace(own, b"") for p in folder.rglob("*") if p.suffix in (".json", ".png")}
        )
    assert results[0] == results[1]
    assert json.loads(results[0]["results.json"])


@pytest.mark.distributed
def test_two_processes_learn_four_tasks(tmp_path):
    """Each with its own batch statistics, and weights that are learned; stopped, the run goes on."""
    content = yaml.safe_load((CONFIGS / "joint/rendered.yaml").read_text())
    model, data = content["model"], content["data"]["init_args"]
    model |= {"backbone": {"width": 8, "modules": [1, 1, 1], "blocks": 1, "stem": [1, 16]}, "weighting": "uncertainty"}
    model["tasks"]["detection"]["init_args"]["detector"]["init_args"] |= {"pyramid": 16, "width": 32, "proposals": 30}
    sizes = {
        "pose": {"size": [64, 48]},
        "detection": {"shorter": 64, "longer": 96},
        "segmentation": {"size": [48, 64]},
        "classification": {"size": 64},
    }
    for name, part in data["parts"].items():
        part["init_args"] |= sizes[name] | {"root": str(tmp_path / "scenes"), "train": 11, "val": 7, "workers": 0}
        part["init_args"] |= {"batch_size": 2, "eval_batch_size": 1}
    data["steps"] = 3
    content["trainer"] = {"max_epochs": 2, "accelerator": "cpu", "precision": "32-true", "enable_progress_bar": False}
    config = tmp_path / "joint.yaml"
    config.write_text(yaml.safe_dump(content))
    finished(tmp_path, Joint, "fit", "-c", config, *TWO)
    both = numbers(newest(tmp_path, Joint))
    path = newest(tmp_path, Joint) / "checkpoints/last.ckpt"
    finished(tmp_path, Joint, "validate", "-c", config, f"--ckpt_path={path}")
    alone = {k: v for k, v in numbers(newest(tmp_path, Joint)).items() if "val/" in k and not k.endswith("/loss")}
    assert len(alone) > 40
    assert {k: both[k] for k in alone} == alone
    finished(tmp_path, Joint, "fit", "-c", config, *TWO, "--ckpt_path=last", "--trainer.max_epochs=3")
    assert torch.load(path, weights_only=True)["global_step"] == 9


LEARN = """
import sys
import lightning as L
import torch
from datamodules.rendered import Rendered
from tasks.pose import Pose

class Still(Pose):  # batch norm in evaluation mode: on CPUs its statistics cannot be shared
    def train(self, mode=True):
        return super().train(False)

    def on_train_batch_end(self, outputs, batch, index):
        total = self.all_gather(outputs["loss"].detach()).mean()
        if self.global_rank == 0:
            print("loss", float(total), flush=True)

if __name__ == "__main__":
    root, processes = sys.argv[1], int(sys.argv[2])
    L.seed_everything(0, verbose=False)
    data = Rendered(root, 11, 7, size=(64, 48), batch_size=4 // processes, workers=1)
    backbone = dict(width=8, modules=[1, 1, 1], blocks=1, stem=[1, 16])
    task = Still(backbone, optimizer=lambda p: torch.optim.SGD(p, 0.01), num_keypoints=data.num_keypoints,
                 keypoint_names=data.keypoint_names, flip_pairs=data.flip_pairs, skeleton=data.skeleton,
                 sigmas=data.sigmas, size=(64, 48)).eval()
    L.Trainer(max_epochs=2, accelerator="cpu", devices=processes, strategy="ddp" if processes > 1 else "auto",
              logger=False, enable_checkpointing=False, enable_progress_bar=False, limit_val_batches=0).fit(task, data)
    if task.global_rank == 0:
        torch.save({k: v.detach() for k, v in task.state_dict().items()}, f"weights{processes}.pt")
"""


@pytest.mark.distributed
def test_two_processes_learn_what_one_does_with_twice_the_batch(uneven, tmp_path):
    (tmp_path / "learn.py").write_text(LEARN)
    root = next(a for a in uneven if a.startswith("--data.root")).split("=")[1]
    losses = []
    for processes in (1, 2):
        command = [sys.executable, "learn.py", root, str(processes)]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        losses.append([float(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("loss")])
    assert len(losses[0]) > 8
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    one, two = (torch.load(tmp_path / f"weights{n}.pt", weights_only=True) for n in (1, 2))
    assert max((one[k] - two[k]).abs().max() for k in one if one[k].is_floating_point()) < 1e-5


@pytest.mark.distributed
def test_two_nodes(uneven, tmp_path):
    """As torchrun starts them, here on one machine."""
    given = ["fit", *uneven, *TASKS[Pose], "--trainer.max_epochs=2", "--ckpt_path=auto"]
    nodes = ["--trainer.num_nodes=2", "--trainer.devices=1", "--trainer.strategy=ddp"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    run = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1", "--master_addr=127.0.0.1"]
    both = [
        subprocess.Popen(
            [*run, f"--master_port={port}", f"--node_rank={rank}", "-m", "tasks.pose", *map(str, [*given, *nodes])],
            cwd=tmp_path,
            env=ONE_THREAD,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in (0, 1)
    ]
    said = [process.communicate(timeout=300)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], said[0][-3000:]
    assert "4 images a step" in said[0]
    assert "metrics:" in said[0]
    assert "metrics:" not in said[1]  # one of them speaks
    one = tmp_path / "one_node"
    one.mkdir()
    finished(one, Pose, *given, *TWO)
    a, b = (torch.load(newest(f, Pose) / "checkpoints/last.ckpt", weights_only=True) for f in (tmp_path, one))
    assert same(a["state_dict"], b["state_dict"])


@pytest.mark.distributed
@pytest.mark.parametrize("ranks", [[0], [1], [0, 1]])
def test_sigterm_to_any_process_ends_all_after_one_step(ranks, uneven, tmp_path):
    given = ["fit", *uneven, *TASKS[Pose], *TWO, "--trainer.max_epochs=500", "--ckpt_path=auto"]
    pictures = tmp_path / "runs/pose/version_0/pictures"
    for _ in range(2):
        shutil.rmtree(pictures, ignore_errors=True)
        process, deadline = start(tmp_path, Pose, *given), time.monotonic() + 120
        try:
            while not [*pictures.glob("epoch*")] and process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.05)
            time.sleep(1)
            pids = [process.pid, child(process.pid)]
            for rank in ranks:
                os.kill(pids[rank], signal.SIGTERM)
            assert process.wait(60) == 143, (tmp_path / "log").read_text()[-3000:]
            ended = time.monotonic()
            while others(process.pid) and time.monotonic() < ended + 30:
                time.sleep(0.1)
            assert not others(process.pid)
        finally:
            end(process)
    steps = torch.load(newest(tmp_path, Pose) / "checkpoints/last.ckpt", weights_only=True)["global_step"]
    assert steps > 0


@pytest.mark.distributed
def test_sigterm_to_all_that_a_run_consists_of_ends_it_after_one_step(uneven, tmp_path):
    """As schedulers send it: to loader workers, too."""
    given = [*uneven, *TASKS[Pose], "--data.train=40", "--data.workers=2", "--trainer.max_epochs=500"]
    process, deadline = start(tmp_path, Pose, "fit", *given), time.monotonic() + 120
    try:
        rows = tmp_path / "runs/pose/version_0/checkpoints/last.ckpt"
        while not rows.is_file() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(1)
        os.killpg(process.pid, signal.SIGTERM)
        assert process.wait(60) == 143, (tmp_path / "log").read_text()[-3000:]
        assert not others(process.pid)
    finally:
        end(process)
    assert "Traceback" not in (tmp_path / "log").read_text()


@pytest.mark.distributed
@pytest.mark.parametrize("rank", [0, 1])
def test_dead_process_ends_the_run_which_goes_on(rank, uneven, tmp_path):
    given = ["fit", *uneven, *TASKS[Pose], *TWO, "--trainer.max_epochs=40", "--ckpt_path=auto"]
    folder = tmp_path / "stopped"
    folder.mkdir()
    process = start(folder, Pose, *given)
    try:
        last = folder / "runs/pose/version_0/checkpoints/last.ckpt"
        deadline = time.monotonic() + 120
        while not last.is_file() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        assert last.is_file(), (folder / "log").read_text()[-3000:]
        time.sleep(1)
        os.kill(process.pid if rank == 0 else child(process.pid), signal.SIGKILL)
        began = time.monotonic()
        while others(process.pid) and time.monotonic() < began + 90:
            process.poll()
            time.sleep(0.2)
        waited = time.monotonic() - began
        assert not others(process.pid)
        assert waited < 60
        assert process.wait(5) != 0
    finally:
        end(process)
    print(f"{waited:.1f} s after process {rank} died all had ended", (folder / "log").read_text()[-1500:])
    finished(folder, Pose, *[a for a in given if "max_epochs" not in a], "--trainer.max_epochs=42")
    alone = tmp_path / "alone"
    alone.mkdir()
    finished(alone, Pose, *[a for a in given if "max_epochs" not in a], "--trainer.max_epochs=42")
    a, b = (torch.load(f / "runs/pose/version_0/checkpoints/last.ckpt", weights_only=True) for f in (folder, alone))
    assert same(a["state_dict"], b["state_dict"])


def others(group):
    """Processes of the group that still run."""
    found = subprocess.run(["ps", "-eo", "pid,pgid,stat"], capture_output=True, text=True, check=True).stdout
    rows = [line.split() for line in found.splitlines()[1:]]
    return [int(pid) for pid, pgid, stat in rows if int(pgid) == group and not stat.startswith("Z")]


def child(parent):
    """The process of the second rank."""
    found = subprocess.run(["ps", "-eo", "pid,ppid,args"], capture_output=True, text=True, check=True).stdout
    rows = [line.split(None, 2) for line in found.splitlines()[1:]]
    return next(int(pid) for pid, ppid, args in rows if int(ppid) == parent and "tasks.pose" in args)
