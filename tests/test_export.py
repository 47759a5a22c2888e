"""Exported networks: one file for any size, the same numbers, and predictions from it."""

import json
import shutil
from functools import cache

import numpy as np
import onnxruntime
import pytest
import torch

from hrnet import HRNetConfig
from hrnet.checkpoints import WeightsError
from hrnet.heads import HRNetV2
from tasks.classification import Classification
from tasks.export import export
from tasks.pose import Pose

TINY = HRNetConfig(8, modules=(1, 1, 1), blocks=1, stem=(1, 16))


def pose(**kwargs):
    torch.manual_seed(0)
    task = Pose(**{"backbone": TINY, "init": "kaiming", "size": (64, 48), **kwargs})
    torch.nn.init.normal_(task.head.final_layer.weight, std=0.3) if hasattr(task.head, "final_layer") else None
    return task.eval()


def classification():
    torch.manual_seed(0)
    return Classification(backbone=TINY, num_classes=4, size=64, resize=73).eval()


KINDS = {"pose": pose, "class": classification, "V2": lambda: pose(head=HRNetV2)}


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A task of some kind and its exported file, which is written once."""
    folder = tmp_path_factory.mktemp("exported")

    @cache
    def write(kind, suffix):
        task, path = KINDS[kind](), folder / f"{kind}{suffix}"
        assert export(task, path) < 1e-4
        return task, path

    return write


@torch.no_grad()
@pytest.mark.parametrize(
    ("kind", "suffix"), [*((k, ".pt") for k in KINDS), pytest.param("class", ".onnx", marks=pytest.mark.slow)]
)
def test_file_gives_the_same_at_any_size(kind, suffix, exported):
    task, path = exported(kind, suffix)
    if suffix == ".onnx":
        session = onnxruntime.InferenceSession(str(path))
    else:
        loaded = torch.jit.load(path)
    for size in ((1, 3, 64, 48), (3, 3, 96, 224), (2, 3, 77, 131)):
        image = torch.rand(size) * 255
        expected = task.head(task(image))
        found = session.run(None, {"image": image.numpy()})[0] if suffix == ".onnx" else loaded(image)
        found = torch.as_tensor(found)
        assert (found - expected).abs().max() / expected.abs().max() < 1e-4


def test_other_endings_are_refused(tmp_path):
    with pytest.raises(WeightsError, match=r"\.onnx and \.pt"):
        export(pose(), tmp_path / "a.trt")


@pytest.fixture(scope="module")
def run(cli, small, tmp_path_factory):
    short = ["--trainer.max_epochs=1", "--trainer.max_steps=2", "--data.padding=1.5"]
    backbone = "--model.backbone={width: 8, modules: [1, 1, 1], blocks: 1, stem: [1, 16]}"
    return cli(tmp_path_factory.mktemp("runs"), "fit", *small, backbone, *short)


@pytest.mark.slow
def test_command_exports_and_predict_runs_it(run, cli, rendered, tmp_path, capsys):
    checkpoint = run.folder / "checkpoints" / "last.ckpt"
    with pytest.raises(SystemExit) as done:
        cli(tmp_path, "export", checkpoint, tmp_path / "a.onnx")
    assert not done.value.code
    meta = onnxruntime.InferenceSession(str(tmp_path / "a.onnx")).get_modelmeta().custom_metadata_map
    kept = json.loads(meta["hyper_parameters"])
    assert kept["codec"]["encoding"] == "udp"
    assert (kept["udp"], kept["padding"], kept["size"]) == (True, 1.5, [64, 48])
    shutil.copy(rendered.datasets["val"].instances[0].path, tmp_path / "p.jpg")
    quiet = ["--trainer.enable_progress_bar=false", "--trainer.accelerator=cpu", "--trainer.precision=32-true"]
    found = []
    for path in (checkpoint, tmp_path / "a.onnx"):
        call = ["predict", f"--ckpt_path={path}", f"--data.path={tmp_path / 'p.jpg'}", "--data.workers=0", *quiet]
        folder = cli(tmp_path, *call).folder
        found.append(json.loads((folder / "predictions" / "results.json").read_text())[0]["keypoints"])
    a, b = (np.array(keypoints).reshape(-1, 3) for keypoints in found)
    np.testing.assert_allclose(a[:, 2], b[:, 2], atol=1e-5)
    assert np.isclose(a[:, :2], b[:, :2], atol=1e-2).all(1).mean() > 0.8  # two steps: nearly flat maps have ties


def test_exported_network_does_not_learn(run, cli, small, tmp_path):
    with pytest.raises(SystemExit, match="does not learn"):
        cli(tmp_path, "fit", *small, f"--ckpt_path={tmp_path / 'a.onnx'}")
    (tmp_path / "a.onnx").write_text("no such thing")
    with pytest.raises(SystemExit, match=r"a\.onnx: not a readable ONNX file"):
        cli(tmp_path, "validate", *small, f"--ckpt_path={tmp_path / 'a.onnx'}")
