"""The command line: what a run leaves behind, going on with it, predicting, and what it says to bad input."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import yaml
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from hrnet import HRNetConfig
from hrnet.codecs import Heatmap
from hrnet.dialects import to_dialect
from tasks.arguments import CONFIGS, SettingError, with_default_data
from tasks.pose import Pose

LONG = ["--trainer.max_epochs=1", "--trainer.limit_train_batches=2", "--trainer.log_every_n_steps=1"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def fitted(cli, small, folder):
    """A run of two steps and one validation."""
    return cli(folder, "fit", *small, *LONG)


def checkpoint(run, name="best"):
    return run.folder / "checkpoints" / f"{name}.ckpt"


def evaluated(run, split):
    return {k.removeprefix(f"{split}/"): v for k, v in run.numbers.items() if k.startswith(f"{split}/")}


def refused(capfd, cli, *args):
    """The message of a call that has to fail: short, no traceback, exit code not zero."""
    with pytest.raises(SystemExit) as error:
        cli(*args)
    code = error.value.code
    assert code not in (0, None)
    text = (code if isinstance(code, str) else "") + capfd.readouterr().err
    assert "Traceback" not in text
    assert "usage:" not in text
    message = code if isinstance(code, str) else text[text.find("error:") :]
    assert len(message.strip().splitlines()) <= 12, message
    return message


def test_no_option_is_abbreviated(cli, small, tmp_path, capfd):
    """`sigm` would be taken for `sigma`, and a sweep would have a column of that name."""
    assert "'sigm' is not accepted" in refused(capfd, cli, tmp_path, "fit", *small, "--model.codec.sigm=1")


def test_a_wrong_value_of_the_command_line_is_no_files(cli, small, tmp_path, capfd):
    said = refused(capfd, cli, tmp_path, "fit", *small, "--data.size=192")
    assert "size: Expected a list such as [1, 2]. Got value: 192" in said
    assert ".yaml" not in said


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("model.codec.sigm=1", "sigma"),
        ("data.batchsize=1", "batch_size"),
        ("data.augmentation.rotatoin=5", "rotation"),
        ("trainer.max_epoch=1", "_epochs"),
    ],
)
def test_what_a_misspelt_option_may_have_been(given, meant, cli, small, tmp_path, capfd):
    assert f"{meant}?" in refused(capfd, cli, tmp_path, "fit", *small, f"--{given}")
    (tmp_path / "mouse.yaml").write_text(given.replace(".", ": {").replace("=", ": ") + "}" * given.count("."))
    said = refused(capfd, cli, tmp_path, "fit", *small, "-c", tmp_path / "mouse.yaml")
    assert f"{meant}?" in said
    assert "mouse.yaml" in said


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("model: {codec: {encoding: upd}}", "quantised"),
        ("trainer: {max_epochs: many}", "Expected int or null. Got value: many"),
        (
            "data: {class_path: datamodules.mpii.Mpii, init_args: {batch_size: x}}",
            "batch_size: Expected a <class 'int'>",
        ),
        ("dta: {batch_size: 3}", "did you mean data?"),
        (
            "model: {optimizer: {class_path: torch.optim.Adam, init_args: {lr: 0.001, weight_dekay: 1}}}",
            "mouse.yaml; did you mean weight_decay?",
        ),
    ],
)
def test_the_file_of_a_wrong_value_is_named(text, said, cli, tmp_path, capfd):
    """In a folder below the working directory; the parser is in that folder meanwhile."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/mouse.yaml").write_text(text)
    message = refused(capfd, cli, tmp_path, "fit", "-c", "mine/mouse.yaml")
    assert "mine/mouse.yaml" in message
    assert said in message
    assert len(message.splitlines()) <= 3


# What a run leaves behind


def test_fit_leaves_everything_it_promises(fitted):
    assert fitted.trainer.global_step == 2
    left = {p.relative_to(fitted.folder).as_posix() for p in fitted.folder.rglob("*") if p.is_file()}
    assert left >= {
        *("checkpoints/best.ckpt", "checkpoints/last.ckpt", "config.yaml", "metrics.csv"),
        *("pictures/first_batch.jpg", "pictures/epoch_000.jpg"),
    }
    first, after = (cv2.imread(str(fitted.folder / "pictures" / f"{n}.jpg")) for n in ("first_batch", "epoch_000"))
    assert first.shape == (2 * 256, 2 * 192, 3)  # small inputs are drawn four times as large
    assert after.shape == (4 * 256, 2 * 3 * 192, 3)
    header = (fitted.folder / "metrics.csv").read_text().splitlines()[0].split(",")
    assert {"train/loss", "val/loss", "val/AP", "val/PCK@0.2", "val/score", "lr-Adam", "epoch", "step"} <= set(header)


def test_what_to_try_is_of_this_run(cli, small, tmp_path):
    """`--ckpt_path best` looks below runs alone."""
    run = cli(tmp_path, "fit", *small, "--trainer.default_root_dir=mine", "--trainer.max_steps=1")
    (path,) = re.findall(r"predict --ckpt_path (\S+)", run.printed)
    assert path.startswith("mine/pose/version_0/")
    assert (tmp_path / path).is_file()


def test_fit_says_where_everything_lies(fitted):
    text = fitted.printed
    for words in ("2 steps", "val/score", "best.ckpt", "metrics.csv", "pictures"):
        assert words in text
    learned = fitted.numbers["val/score"] > 0
    assert f"predict --ckpt_path {'best' if learned else 'last'}" in text  # at 0 the first validation is the best
    assert ("never above 0" in text) is not learned
    for path in re.findall(r"\S+/(?:best\.ckpt|metrics\.csv|pictures)", text):
        assert (fitted.folder.parents[2] / path).exists()


def test_a_finished_run_says_that_nothing_is_left_to_train(fitted, cli, tmp_path):
    again = cli(tmp_path, "fit", "-c", fitted.folder / "config.yaml", f"--ckpt_path={checkpoint(fitted, 'last')}")
    assert "nothing was left to train" in again.printed
    assert "try it" not in again.printed


def test_score_is_the_first_number_of_the_data(fitted):
    assert fitted.numbers["val/score"] == fitted.numbers["val/AP"]


def test_fit_that_stops_inside_an_epoch_is_summed_up_too(cli, small, tmp_path):
    run = cli(tmp_path, "fit", *small, "--trainer.max_steps=2")
    assert run.trainer.global_step == 2
    assert checkpoint(run, "last").is_file()
    assert "--ckpt_path last" in run.printed  # no advice that cannot be followed
    assert not checkpoint(run, "best").exists()


def test_saved_config_runs_again_alike(fitted, cli, tmp_path):
    again = cli(tmp_path, "fit", "-c", fitted.folder / "config.yaml")
    assert again.numbers == pytest.approx(fitted.numbers, rel=1e-5)
    first, second = (yaml.safe_load((run.folder / "config.yaml").read_text()) for run in (fitted, again))
    assert first == second
    judged = cli(tmp_path, "validate", "-c", fitted.folder / "config.yaml", f"--ckpt_path={checkpoint(fitted, 'last')}")
    assert judged.numbers["val/AP"] == fitted.numbers["val/AP"]


def test_checkpoint_of_the_command_line_is_plain_and_loads(fitted):
    content = torch.load(checkpoint(fitted), weights_only=True)
    assert not {"flip_test", "init_from"} & content["hyper_parameters"].keys()
    loaded = type(fitted.model).load_from_checkpoint(checkpoint(fitted, "last"))
    assert loaded.size == (64, 48)
    assert loaded.backbone.config.width == 16
    own = {k: v for k, v in fitted.model.state_dict().items() if not k.startswith("metrics")}
    assert all(torch.equal(v, own[k]) for k, v in loaded.state_dict().items())


# Going on


@pytest.mark.parametrize(("command", "split"), [("validate", "val"), ("test", "test")])
def test_evaluating_best_gives_the_numbers_of_fit(command, split, fitted, cli, small, folder):
    run = cli(folder, command, *small, "--ckpt_path=best")
    expected = evaluated(fitted, "val")
    assert {"AP", "AR", "PCK@0.2", "MAE", "loss", "score"} <= expected.keys()
    assert evaluated(run, split) == pytest.approx(expected, rel=1e-5, nan_ok=True)
    written = json.loads((run.folder / "predictions" / f"{split}.json").read_text())
    assert 0 < len(written) <= len(run.trainer.datamodule.datasets[split])


@pytest.mark.skipif(not os.environ.get("HRNET_TEST_DATA"), reason="real data: set HRNET_TEST_DATA")
@pytest.mark.parametrize("boxes", ["null", "test_coco_det_AP_H_56.json"], ids=["ground truth", "detector"])
def test_validate_writes_what_pycocotools_judges_alike(boxes, cli, tmp_path):
    root = Path(os.environ["HRNET_TEST_DATA"]) / "keypoint-formats" / "coco"
    run = cli(
        tmp_path,
        *("validate", "--data=CocoKeypoints", f"--data.root={root}", "--data.val=test_coco.json"),
        *("--data.val_images=.", f"--data.boxes={boxes}", "--data.size=[64,48]", "--data.workers=0"),
        *("--model.backbone=w18_small_v1", "--trainer.enable_progress_bar=false", "--trainer.accelerator=cpu"),
    )
    truth = COCO(str(root / "test_coco.json"))
    results = truth.loadRes(str(run.folder / "predictions" / "val.json"))
    evaluation = COCOeval(truth, results, "keypoints")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    names = ("AP", "AP50", "AP75", "APM", "APL", "AR", "AR50", "AR75", "ARM", "ARL")
    assert [run.numbers[f"val/{name}"] for name in names] == pytest.approx(evaluation.stats[:10].tolist(), abs=1e-6)


def test_flip_test_is_chosen_when_evaluating(fitted, cli, small, folder):
    path = checkpoint(fitted)
    runs = {
        value: cli(folder, "validate", *small, f"--ckpt_path={path}", f"--model.flip_test={value}")
        for value in ("true", "false")
    }
    assert [run.model.flip_test for run in runs.values()] == [True, False]
    assert evaluated(runs["true"], "val") == pytest.approx(evaluated(fitted, "val"), rel=1e-5, nan_ok=True)
    assert runs["true"].numbers["val/loss"] == pytest.approx(runs["false"].numbers["val/loss"])
    assert runs["true"].numbers["val/MAE"] != runs["false"].numbers["val/MAE"]


def test_last_goes_on(fitted, cli, small, tmp_path):
    shutil.copytree(fitted.folder, tmp_path / "runs" / "pose" / "version_0")
    run = cli(tmp_path, "fit", *small, *LONG, "--ckpt_path=last", "--trainer.max_epochs=2")
    assert run.trainer.global_step == 4
    steps = torch.load(checkpoint(run, "last"), weights_only=True)["optimizer_states"][0]["state"][0]["step"]
    assert steps == 4  # the optimiser's memory went on as well
    assert run.folder.name == "version_0"
    assert fitted.trainer.global_step == 2
    before, after = ((folder / "metrics.csv").read_text().splitlines() for folder in (fitted.folder, run.folder))
    assert after[: len(before)] == before
    assert len(after) > len(before)


def test_same_command_goes_on_without_complaint(fitted, cli, small, tmp_path, recwarn):
    (tmp_path / "own.yaml").write_text("model: {backbone: w18_small_v1, codec: {sigma: 2}}")
    shutil.copytree(fitted.folder, tmp_path / "runs" / "pose" / "version_0")
    cli(tmp_path, "validate", "-c", tmp_path / "own.yaml", *small, "--ckpt_path=last")
    assert not [w for w in recwarn if "ignored" in str(w.message)]


def test_newest_run_is_taken(fitted, cli, small, tmp_path):
    root = tmp_path / "runs" / "pose"
    for name in ("version_1", "version_0"):
        time.sleep(0.05)
        shutil.copytree(fitted.folder, root / name, copy_function=shutil.copyfile)
    run = cli(tmp_path, "validate", *small, "--ckpt_path=last")
    assert "version_0" in str(run.trainer.ckpt_path)


WIDE = ["--data.size=[192,144]", "--data.batch_size=1"]  # an epoch of some 28 steps, a few seconds


def goes_on_from(folder, cli, small):
    """The stopped run in `folder` goes on where it was."""
    step = torch.load(folder / "runs/pose/version_0/checkpoints/last.ckpt", weights_only=True)["global_step"]
    assert step > 0
    run = cli(folder, "fit", *small, *WIDE, "--ckpt_path=last", f"--trainer.max_steps={step + 2}")
    assert run.trainer.global_step == step + 2


@pytest.mark.slow
def test_interrupted_run_goes_on(cli, small, tmp_path):
    """Ctrl-C, as a shell sends it."""
    command = [sys.executable, "-m", "tasks.pose", "fit", *small, *WIDE, "--trainer.max_epochs=50"]
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen(command, cwd=tmp_path, stdout=log, stderr=subprocess.STDOUT)
        try:
            sign, end = tmp_path / "runs/pose/version_0/pictures/first_batch.jpg", time.monotonic() + 300
            while not sign.exists() and process.poll() is None and time.monotonic() < end:
                time.sleep(0.05)
            time.sleep(1)
            assert process.poll() is None, (tmp_path / "log").read_text()[-2000:]
            process.send_signal(signal.SIGINT)
            process.wait(180)
        finally:
            process.kill()
            process.wait()
    last, text = tmp_path / "runs/pose/version_0/checkpoints/last.ckpt", (tmp_path / "log").read_text()
    assert last.is_file(), text[-2000:]
    assert process.returncode != 0
    assert "Traceback" not in text
    goes_on_from(tmp_path, cli, small)


def test_terminated_run_goes_on(cli, small, tmp_path, monkeypatch, capfd):
    """As a cluster stops it: SIGTERM amid a step."""
    step, before = Pose.training_step, signal.getsignal(signal.SIGTERM)

    def third(self, batch, index):
        if self.global_step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, batch, index)

    monkeypatch.setattr(Pose, "training_step", third)
    try:
        with pytest.raises(SystemExit) as stopped:
            cli(tmp_path, "fit", *small, *WIDE, "--trainer.max_epochs=50")
    finally:
        signal.signal(signal.SIGTERM, before)
    monkeypatch.undo()
    assert stopped.value.code == 128 + signal.SIGTERM
    assert "Traceback" not in capfd.readouterr().err
    goes_on_from(tmp_path, cli, small)


# Predicting


@pytest.fixture(scope="module")
def photos(rendered, tmp_path_factory):
    """Three pictures of two sizes, one in a folder below."""
    root = tmp_path_factory.mktemp("photos")
    (root / "more").mkdir()
    source = sorted((rendered.cache.folder / "val").glob("*.jpg"))
    shutil.copy(source[0], root / "a.jpg")
    shutil.copy(source[1], root / "more" / "a.jpg")
    cv2.imwrite(str(root / "b.jpg"), cv2.resize(cv2.imread(str(source[2])), (640, 333)))
    return root


QUIET = [
    "--trainer.enable_progress_bar=false",
    "--trainer.accelerator=cpu",
    "--trainer.precision=32-true",
    "--data.workers=0",
]


def test_predict_writes_poses_and_overlays(fitted, cli, folder, photos):
    run = cli(folder, "predict", "--ckpt_path=best", f"--data.path={photos}", *QUIET)
    results = json.loads((run.folder / "predictions" / "results.json").read_text())
    assert {item["file_name"] for item in results} == {str(p) for p in photos.rglob("*.jpg")}
    assert run.cli.datamodule.size == (64, 48)  # the checkpoint's, not a default
    loaded = type(fitted.model).load_from_checkpoint(checkpoint(fitted))
    for item in results:
        found = np.array(item["keypoints"]).reshape(17, 3)
        expected = loaded.infer(item["file_name"])
        near = np.isclose(found[:, :2], expected["keypoints"][0], atol=1e-3).all(1)
        assert near.mean() > 0.8  # after two steps heatmaps are so flat that rounding may choose another maximum
        np.testing.assert_allclose(found[:, 2], expected["score"][0], atol=1e-5)
    overlays = sorted((run.folder / "predictions").glob("*.jpg"))
    assert len(overlays) == 3
    assert {cv2.imread(str(p)).shape for p in overlays} == {(240, 320, 3), (333, 640, 3)}
    assert "3 predictions in 3 images" in run.printed


@pytest.mark.parametrize(("least", "empty"), [("0", False), ("1", True)])
def test_overlays_show_what_is_sure_enough(fitted, cli, folder, photos, least, empty):
    run = cli(folder, "predict", "--ckpt_path=best", f"--data.path={photos}", f"--drawn={least}", *QUIET)
    assert (f"in 3 of 3 nothing is drawn, for no score was high enough (--drawn {least})" in run.printed) == empty
    assert len(json.loads((run.folder / "predictions" / "results.json").read_text())) == 3


def test_predict_takes_boxes(fitted, cli, folder, photos, tmp_path):
    boxes = [{"file_name": "b.jpg", "bbox": [100, 50, 200, 250], "score": 0.9}]
    boxes.append({"file_name": "b.jpg", "bbox": [300, 40, 200, 250], "score": 0.8})
    (tmp_path / "boxes.json").write_text(json.dumps(boxes))
    path = f"--data.boxes={tmp_path / 'boxes.json'}"
    run = cli(folder, "predict", f"--ckpt_path={checkpoint(fitted)}", f"--data.path={photos}", path, *QUIET)
    results = json.loads((run.folder / "predictions" / "results.json").read_text())
    assert {item["file_name"] for item in results} <= {str(photos / "b.jpg")}
    loaded = type(fitted.model).load_from_checkpoint(checkpoint(fitted))
    expected = loaded.infer(photos / "b.jpg", [box["bbox"] for box in boxes])["keypoints"]
    assert len(results) in (1, 2)  # one, if suppression thinks both are the same person
    for item in results:
        found = np.array(item["keypoints"]).reshape(17, 3)[:, :2]
        assert np.abs(expected - found).max((1, 2)).min() < 1e-3


def test_predict_without_a_checkpoint_says_so(cli, photos, tmp_path, caplog):
    cli(tmp_path, "predict", f"--data.path={photos}", *QUIET, "--model.backbone=w18_small_v1", "--model.size=[64,48]")
    assert "the network is untrained" in caplog.text


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """An mmpose checkpoint of a network, a codec and a crop that are no default of ours."""
    torch.manual_seed(0)
    pose = Pose(backbone=HRNetConfig(8, modules=(1, 1, 1), blocks=1, stem=(1, 8)), init="kaiming")
    state, _ = to_dialect({k: v for k, v in pose.state_dict().items() if k.startswith(("backbone", "head"))}, "mmpose")
    config = "codec = dict(type='UDPHeatmap', input_size=(96, 128), sigma=3)\nmean=[127.5, 127.5, 127.5]"
    path = tmp_path_factory.mktemp("published") / "a.pth"
    torch.save({"state_dict": state, "meta": {"cfg": config}}, path)
    return path


def test_published_model_brings_its_protocol_to_predict(published, cli, photos, tmp_path):
    quiet = ["--trainer.enable_progress_bar=false", "--trainer.accelerator=cpu", "--data.workers=0"]
    run = cli(tmp_path, "predict", f"--model.init_from={published}", f"--data.path={photos}", *quiet)
    assert run.model.backbone.config.width == 8
    assert run.model.codec == Heatmap(3, encoding="udp", decoding="dark", blur=11)
    assert run.model.mean.flatten().tolist() == pytest.approx([127.5] * 3, abs=1e-3)
    data = run.cli.datamodule
    assert (tuple(data.size), data.udp) == ((128, 96), True)
    same = Pose.from_weights(str(published))
    assert (same.codec, same.size, same.udp) == (run.model.codec, (128, 96), True)


def test_published_model_brings_its_protocol_to_validate(published, cli, small, tmp_path):
    """But what one asks for by name is as one says."""
    args = [a for a in small if not a.startswith("--data.size")]
    run = cli(tmp_path, "validate", *args, f"--model.init_from={published}", "--model.codec.decoding=quarter")
    assert run.model.codec == Heatmap(3, encoding="udp", decoding="quarter", blur=11)
    assert (tuple(run.cli.datamodule.size), run.cli.datamodule.udp, run.model.size) == ((128, 96), True, (128, 96))
    assert len(run.model.skeleton_facts.names) == run.cli.datamodule.num_keypoints
    run = cli(tmp_path, "validate", *small, f"--model.init_from={published}")
    assert tuple(run.cli.datamodule.size) == (64, 48)


# Loggers


def test_tensorboard_overlay(cli, small, tmp_path):
    run = cli(
        tmp_path, "fit", "-c", CONFIGS / "pose/rendered.yaml", "-c", CONFIGS / "logging/tensorboard.yaml", *small, *LONG
    )
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(next((tmp_path / "runs/tensorboard").rglob("events*")).parent)).Reload()
    assert {"val/AP", "val/score"} <= set(events.Tags()["scalars"])
    assert {"first_batch", "predictions"} <= set(events.Tags()["images"])
    assert (run.folder / "metrics.csv").is_file()


def test_wandb_overlay_needs_no_account(cli, small, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))  # no netrc, no settings
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("WANDB_MODE", "online")  # so that it is put back afterwards...
    monkeypatch.delenv("WANDB_MODE")  # ...and the command line has to find it out
    import wandb

    try:
        run = cli(tmp_path, "fit", "-c", CONFIGS / "logging/wandb.yaml", *small, *LONG)
    finally:
        wandb.finish()
    assert list((tmp_path / "runs" / "wandb").glob("offline-run-*/*.wandb"))
    assert list((tmp_path / "runs" / "wandb").rglob("media/images/*"))
    assert (run.folder / "metrics.csv").is_file()


@pytest.mark.slow
def test_wandb_run_goes_on_and_keeps_the_best(cli, small, tmp_path, monkeypatch):
    import wandb

    for name in ("WANDB_RUN_ID", "WANDB_RESUME"):
        monkeypatch.setenv(name, "")  # so that it is put back afterwards
        monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_MODE", "offline")
    kept = []
    monkeypatch.setattr(wandb.Run, "log_artifact", lambda _, artifact, aliases: kept.append((artifact, aliases)))
    given = ["-c", CONFIGS / "logging/wandb.yaml", *small, *LONG]
    try:
        folder = cli(tmp_path, "fit", *given).folder
        name = wandb.run.id
        assert (folder / "wandb_id").read_text() == name
    finally:
        wandb.finish()
    command = [sys.executable, "-m", "tasks.pose", "fit", *given, "--ckpt_path=last", "--trainer.max_epochs=2"]
    subprocess.run([*map(str, command)], cwd=tmp_path, check=True, capture_output=True, timeout=300)
    assert (folder / "wandb_id").read_text() == name
    assert len(list((tmp_path / "runs/wandb").glob(f"offline-run-*-{name}"))) == 2
    ((best, aliases),) = kept
    assert best.name == f"pose-{name}"
    assert list(best.manifest.entries) == ["best.ckpt"]
    assert aliases == ["best", "latest"]
    assert 0 <= best.metadata["val/score"] <= 1


# Which data

GIVEN = "<given>.yaml"
TABLE = [
    ([], None),
    (["--help"], None),
    (["fit"], "rendered"),
    (["validate", "--ckpt_path=best"], "rendered"),
    (["test"], "rendered"),
    (["predict", "--data.path", "x"], "predict"),
    (["fit", "--data.root=x"], "rendered"),
    (["fit", "--data", "Mpii"], None),
    (["fit", "--data=Mpii"], None),
    (["predict", "--data", "Images", "--data.path", "x"], None),
    (["fit", "-c", "with_data.yaml"], None),
    (["fit", "--config", "with_data.yaml"], None),
    (["fit", "--config=with_data.yaml"], None),
    (["fit", "-c=with_data.yaml"], None),
    (["fit", "-c", "without.yaml"], "rendered"),
    (["fit", "-c", "empty.yaml"], "rendered"),
    (["fit", "-c", "settings.yaml"], "rendered"),
    (["fit", "-c", "absent.yaml"], "rendered"),
    (["fit", "-c", "without.yaml", "-c", "with_data.yaml"], None),
    (["predict", "-c", "without.yaml", "--data.path=x"], "predict"),
    (["predict", "-c", "photos.yaml"], None),
    (["predict", "-c", "short.yaml", "--data.path=x"], None),
]


@pytest.mark.parametrize(("args", "expected"), TABLE, ids=[" ".join(a) or "nothing" for a, _ in TABLE])
def test_default_data(args, expected, tmp_path, monkeypatch):
    (tmp_path / "with_data.yaml").write_text("data: datamodules.mpii.Mpii\n")
    (tmp_path / "without.yaml").write_text("trainer: {max_epochs: 1}\n")
    (tmp_path / "empty.yaml").write_text("# nothing yet\n")
    (tmp_path / "settings.yaml").write_text("data: {batch_size: 4}\n")
    (tmp_path / "photos.yaml").write_text("data: {class_path: datamodules.images.Images, init_args: {path: x}}\n")
    (tmp_path / "short.yaml").write_text("data: Images\n")
    monkeypatch.chdir(tmp_path)
    got = with_default_data("pose", args)
    if expected is None:
        assert got == args
    else:
        assert got == [args[0], "--config", str(CONFIGS / "pose" / f"{expected}.yaml"), *args[1:]]


def test_predict_with_the_file_that_the_network_was_trained_by(tmp_path):
    """Its data give way to the pictures, wherever it stands."""
    (tmp_path / "mouse.yaml").write_text("data: datamodules.mpii.Mpii\n")
    file, rest = ["-c", f"{tmp_path}/mouse.yaml"], ["--data.path=x", "--ckpt_path=best"]
    pictures = ["--config", str(CONFIGS / "pose/predict.yaml")]
    assert with_default_data("pose", ["predict", rest[0], *file, rest[1]]) == ["predict", *file, *pictures, *rest]
    with pytest.raises(SettingError, match=r"--data\.path FOLDER"):
        with_default_data("pose", ["predict", *file])


# Bad input: one clear message


@pytest.fixture
def coco(rendered, tmp_path):
    """A copy of the scenes to spoil, and the options that read it as COCO data."""
    root = tmp_path / "coco"
    shutil.copytree(rendered.cache.folder, root)
    options = {
        "data": "CocoKeypoints",
        "data.root": root,
        "data.train": "annotations/person_keypoints_train.json",
        "data.val": "annotations/person_keypoints_val.json",
        "data.train_images": "train",
        "data.val_images": "val",
        "data.size": "[64,48]",
        "data.batch_size": 4,
        "data.workers": 0,
        "model.backbone": "w18_small_v1",
        "trainer.max_epochs": 1,
        "trainer.enable_progress_bar": "false",
        "trainer.accelerator": "cpu",
    }
    return root, [f"--{key}={value}" for key, value in options.items()]


def spoil(root, split, change):
    path = root / "annotations" / f"person_keypoints_{split}.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def left_by(folder):
    """Files of runs: nothing half-written may be among them."""
    return [p.name for p in (folder / "runs").rglob("*") if p.is_file()]


def test_good_coco_data_pass(coco, cli, tmp_path):
    run = cli(tmp_path, "fit", *coco[1], "--trainer.limit_train_batches=2")
    assert run.trainer.global_step == 2


def test_missing_image(coco, cli, tmp_path, capfd):
    root, options = coco
    (root / "train" / "000003.jpg").unlink()
    message = refused(capfd, cli, tmp_path, "fit", *options)
    assert "000003.jpg" in message
    assert str(root / "train") in message
    assert not [name for name in left_by(tmp_path) if name.endswith((".ckpt", ".jpg"))]


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("split", ["train", "val"])
def test_truncated_jpeg(split, workers, coco, cli, tmp_path, capfd):
    root, options = coco
    for path in (root / split).iterdir():
        path.write_bytes(path.read_bytes()[:3000])
    message = refused(capfd, cli, tmp_path, "fit", *options, f"--data.workers={workers}")
    assert re.search(rf"{split}/0000\d\d\.jpg: broken or truncated", message)
    assert "copy it anew" in message
    assert not [name for name in left_by(tmp_path) if name.endswith((".ckpt", ".jpg"))]


def test_truncated_jpeg_to_predict_on(fitted, cli, photos, tmp_path, capfd):
    shutil.copytree(photos, tmp_path / "photos")
    path = tmp_path / "photos" / "b.jpg"
    path.write_bytes(path.read_bytes()[:4000])
    call = ["predict", f"--ckpt_path={checkpoint(fitted)}", f"--data.path={tmp_path / 'photos'}", *QUIET]
    assert "b.jpg: broken or no image" in refused(capfd, cli, tmp_path, *call)
    assert "results.json" not in left_by(tmp_path)


SPOILT = {
    "no annotations": (lambda c: c["annotations"].clear(), "empty data set"),
    "no images": (lambda c: (c["images"].clear(), c["annotations"].clear()), "empty data set"),
    "no labelled keypoint": (
        lambda c: [a.update(keypoints=[0] * 51, num_keypoints=0) for a in c["annotations"]],
        "no annotation has a labelled keypoint",
    ),
    "image id of no image": (lambda c: c["annotations"][0].update(image_id=77), "image_id that no image has"),
    "too few keypoints": (lambda c: c["annotations"][0]["keypoints"].pop(), "category's 17"),
    "nan box": (lambda c: c["annotations"][0].update(bbox=[0, 0, float("nan"), 3]), "four finite numbers"),
    "negative box": (lambda c: c["annotations"][0].update(bbox=[5, 5, -4, 3]), "no width or height"),
    "box of no area": (lambda c: c["annotations"][0].update(bbox=[5, 5, 0, 3]), "no width or height"),
    "no area": (lambda c: c["annotations"][0].pop("area"), "area_from_box"),
    "no categories": (lambda c: c.pop("categories"), "no list categories"),
    "instances instead": (lambda c: c["categories"][0].pop("keypoints"), "keypoint file"),
}


@pytest.mark.parametrize("split", [pytest.param("train", marks=pytest.mark.slow), "val"])
@pytest.mark.parametrize(("change", "words"), SPOILT.values(), ids=SPOILT.keys())
def test_faulty_annotations(change, words, split, coco, cli, tmp_path, capfd):
    root, options = coco
    spoil(root, split, change)
    message = refused(capfd, cli, tmp_path, "fit", *options)
    assert words in message
    assert f"person_keypoints_{split}.json" in message
    assert left_by(tmp_path) in ([], ["config.yaml"])


def test_missing_annotations(coco, cli, tmp_path, capfd):
    message = refused(capfd, cli, tmp_path, "fit", *coco[1], "--data.val=annotations/absent.json")
    assert "absent.json: cannot read the annotation file" in message
    assert left_by(tmp_path) == []


def test_empty_folder_to_predict_on(fitted, cli, tmp_path, capfd):
    (tmp_path / "photos").mkdir()
    call = ["predict", f"--ckpt_path={checkpoint(fitted)}", f"--data.path={tmp_path / 'photos'}", *QUIET]
    assert "no image found" in refused(capfd, cli, tmp_path, *call)


def test_no_run_to_go_on_with(cli, small, tmp_path, capfd):
    for name in ("last", "best"):
        message = refused(capfd, cli, tmp_path, "fit", *small, f"--ckpt_path={name}")
        assert f"no {name}.ckpt in any run below" in message


@pytest.mark.parametrize("command", ["fit", "validate"])
@pytest.mark.parametrize("what", ["nonexistent", "text", "cut off", "weights alone", "another object", "code"])
def test_not_a_checkpoint(what, command, fitted, cli, small, tmp_path, capfd):
    path = tmp_path / "x.ckpt"
    good = checkpoint(fitted)
    if what == "text":
        path.write_text("hello")
    elif what == "cut off":
        path.write_bytes(good.read_bytes()[:100_000])
    elif what == "weights alone":
        torch.save(torch.load(good, weights_only=True)["state_dict"], path)
    elif what == "another object":
        torch.save([1, 2, 3], path)
    elif what == "code":
        torch.save({"state_dict": {}, "hyper_parameters": {"a": np.zeros(2)}}, path)
    message = refused(capfd, cli, tmp_path, command, *small, f"--ckpt_path={path}")
    assert "x.ckpt" in message
    if what == "weights alone":
        assert "init_from" in message
    assert left_by(tmp_path) == []


def test_checkpoint_of_a_foreign_run(cli, small, tmp_path, capfd):
    """Somebody else's Lightning checkpoint: the right form, another network."""
    content = {"state_dict": {"layer.weight": torch.zeros(2, 2)}, "hyper_parameters": {"hidden": 2}}
    torch.save(content | {"pytorch-lightning_version": "2.6.6", "global_step": 1, "epoch": 0}, tmp_path / "x.ckpt")
    message = refused(capfd, cli, tmp_path, "validate", *small, f"--ckpt_path={tmp_path / 'x.ckpt'}")
    assert "hidden" in message or "x.ckpt" in message


def mouse(content):
    """Another skeleton of as many, or of fewer keypoints."""
    content["categories"][0].update(keypoints=["snout", "tail"], skeleton=[[1, 2]])
    for a in content["annotations"]:
        a["keypoints"] = a["keypoints"][:6]
        a["num_keypoints"] = sum(v > 0 for v in a["keypoints"][2::3])


def renamed(content):
    content["categories"][0]["keypoints"][0] = "snout"


@pytest.mark.parametrize("command", ["fit", "validate"])
@pytest.mark.parametrize("change", [mouse, renamed])
def test_checkpoint_of_other_keypoints(change, command, fitted, coco, cli, tmp_path, capfd):
    root, options = coco
    for split in ("train", "val"):
        spoil(root, split, change)
    message = refused(capfd, cli, tmp_path, command, *options, f"--ckpt_path={checkpoint(fitted)}")
    assert "snout" in message
    assert "init_from" in message


def test_checkpoint_of_another_backbone(fitted, cli, small, folder, tmp_path, capfd):
    """Asked for on the command line or in a file; the same one, and none, are run."""
    path = f"--ckpt_path={checkpoint(fitted)}"
    (tmp_path / "w32.yaml").write_text("model: {backbone: {width: 32}}")
    for asked in (["--model.backbone=w32"], ["--model.backbone.width", "32"], ["-c", tmp_path / "w32.yaml"]):
        message = refused(capfd, cli, tmp_path, "validate", *asked, *small, path)
        assert re.search(r"the checkpoint is of width 16(, .*)?, not of width 32(, |;)", message)
        assert "init_from" in message
    run = cli(folder, "validate", *small, "--model.backbone=w18_small_v1", path)
    assert run.model.backbone.config.width == 16
    assert run.numbers["val/AP"] == pytest.approx(fitted.numbers["val/AP"])


def test_one_batch_is_one_batch(cli, small, tmp_path):
    """The parser would make all of it: 1 is read as 1.0, 100 %."""
    for one in (["--trainer.limit_train_batches=1"], ["--trainer.limit_train_batches", "1"]):
        run = cli(tmp_path, "fit", *small, "--trainer.max_epochs=1", *one)
        assert run.trainer.global_step == 1
    assert cli(tmp_path, "fit", *small, *LONG, "--trainer.limit_train_batches=1.0").trainer.global_step > 2


def test_half_of_udp_is_told(cli, small, tmp_path):
    with pytest.warns(UserWarning, match="set both or neither"):
        cli(tmp_path, "fit", *small, *LONG, "--model.codec.encoding=quantised")


def test_predict_warns_of_nothing(fitted, cli, photos, tmp_path, recwarn):
    cli(tmp_path, "predict", f"--ckpt_path={checkpoint(fitted)}", f"--data.path={photos}", *QUIET)
    assert not [w for w in recwarn if "the checkpoint was trained with" in str(w.message)]


def test_refused_runs_leave_no_folder(cli, small, tmp_path, capfd):
    refused(capfd, cli, tmp_path, "fit", *small, "--model.init_from=absent.pth")
    assert not list(tmp_path.glob("runs/*/*"))


def test_predict_wants_a_path(cli, tmp_path, capfd):
    assert "--data.path FOLDER" in refused(capfd, cli, tmp_path, "predict", "--model.backbone=w32")


@pytest.mark.parametrize(("text", "said"), [("hello", "it begins with b'hello'"), ("version https://git-lfs.x", "LFS")])
def test_weights_that_are_text(text, said, cli, small, tmp_path, capfd):
    (tmp_path / "a.pth").write_text(text)
    message = refused(capfd, cli, tmp_path, "fit", *small, f"--model.init_from={tmp_path / 'a.pth'}")
    assert "a.pth: no checkpoint of torch" in message
    assert said in message


def test_init_from(fitted, cli, small, tmp_path, caplog):
    run = cli(tmp_path, "validate", *small, f"--model.init_from={checkpoint(fitted)}")
    assert run.numbers["val/MAE"] == pytest.approx(fitted.numbers["val/MAE"], rel=1e-5)
    assert "tensors loaded" in caplog.text


def test_init_from_nonexistent(cli, small, tmp_path, capfd):
    message = refused(capfd, cli, tmp_path, "fit", *small, "--model.init_from=absent.pth")
    assert "absent.pth: no such checkpoint" in message
    assert left_by(tmp_path) in ([], ["config.yaml"])


def test_init_from_another_width(fitted, cli, small, tmp_path, capfd):
    from_ = f"--model.init_from={checkpoint(fitted)}"
    message = refused(capfd, cli, tmp_path, "fit", *small, "--model.backbone=w18_small_v2", from_)
    assert "does not fit" in message
    assert "init_from.strict: false" in message


@pytest.mark.parametrize("command", ["fit", "predict"])
def test_unwritable_output(command, fitted, cli, small, photos, tmp_path, capfd):
    (tmp_path / "file").write_text("")
    data = small if command == "fit" else [f"--data.path={photos}", f"--ckpt_path={checkpoint(fitted)}", *QUIET]
    message = refused(capfd, cli, tmp_path, command, *data, f"--trainer.default_root_dir={tmp_path / 'file' / 'runs'}")
    assert str(tmp_path / "file" / "runs") in message
    assert "default_root_dir" in message


def test_unwritable_cache(cli, small, tmp_path, capfd):
    (tmp_path / "file").write_text("")
    message = refused(capfd, cli, tmp_path, "fit", *small, f"--data.root={tmp_path / 'file' / 'data'}")
    assert str(tmp_path / "file" / "data") in message


WRONG = {
    "unknown option": ["--model.widht=3"],
    "unknown data option": ["--data.sise=3"],
    "unknown preset": ["--model.backbone=w99"],
    "wrong type": ["--data.batch_size=many"],
    "batch of none": ["--data.batch_size=0"],
    "wrong codec": ["--model.codec.sigma=-1"],
    "width of none": ["--model.backbone.width=0"],
    "unknown data": ["--data=Nothing"],
    "absent config": ["-c", "absent.yaml"],
}


@pytest.mark.parametrize(("name", "args"), WRONG.items(), ids=WRONG.keys())
def test_wrong_option(name, args, cli, small, tmp_path, capfd):
    message = refused(capfd, cli, tmp_path, "fit", *small, *args)
    option, _, value = args[-1].partition("=")
    assert (value or option).split(".")[0] in message or option.lstrip("-").rsplit(".", 1)[-1] in message
    assert left_by(tmp_path) == []


def test_typo_in_yaml(cli, small, tmp_path, capfd):
    for number, text in enumerate(
        ("model: {codec: {sgima: 2}}", "trainer: {max_epoch: 1}", "modle: {flip_test: true}", "model: [")
    ):
        path = tmp_path / f"{number}.yaml"
        path.write_text(text)
        message = refused(capfd, cli, tmp_path, "fit", "-c", path, *small)
        assert re.search(r"sgima|max_epoch|modle|\.yaml", message)
    assert left_by(tmp_path) == []


def test_exit_code_and_streams_of_a_refusal(tmp_path):
    """As a shell sees it."""
    command = [sys.executable, "-m", "tasks.pose", "validate", "--ckpt_path", "absent.ckpt"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1
    assert "absent.ckpt: no such checkpoint" in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) <= 6, done.stderr
