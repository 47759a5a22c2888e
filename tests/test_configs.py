"""Every configuration of the project: it parses, builds, and takes a batch through a training and a validation step.

Where a configuration names data that are not shipped, a few drawn pictures are laid out as it expects its data.
"""

import importlib
import json
import shutil
from inspect import signature

import numpy as np
import pytest
import timm
import yaml

from datamodules.coco_keypoints import CocoKeypoints
from datamodules.image_folder import ImageFolder
from datamodules.mpii import Mpii
from tasks.cli import CONFIGS, main

OVERLAYS = ("logging", "experiments")
NOT_ALONE = ("default.yaml", "predict.yaml")  # layers below or beside the others; tests/test_cli.py uses them
RECIPES = [p for p in sorted(CONFIGS.glob("*/*.yaml")) if p.name not in NOT_ALONE and p.parent.name not in OVERLAYS]


def coco(data, config, root):
    """The drawn people, where the configuration says."""
    facts = {name: p.default for name, p in signature(CocoKeypoints).parameters.items()}
    places = facts | config["data"]["init_args"]
    for split in ("train", "val"):
        file = root / places[split]
        file.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(data.file("val").path, file)
        shutil.copytree(data.file("val").images, root / places[f"{split}_images"], dirs_exist_ok=True)


def mpii(data, config, root):
    """The drawn pictures with joints anywhere."""
    joints = np.random.default_rng(0).uniform(20, 200, (4, 16, 2)).round(1).tolist()
    images = sorted(p.name for p in data.file("val").images.iterdir())
    people = [
        {"image": image, "center": [110.0, 110.0], "scale": 1.0, "joints": points, "joints_vis": [1] * 16}
        for image, points in zip(images, joints, strict=False)
    ]
    (root / "annot").mkdir()
    for name in ("train", "valid"):
        (root / "annot" / f"{name}.json").write_text(json.dumps(people))
    shutil.copytree(data.file("val").images, root / "images")


def image_folder(data, config, root):
    """The drawn pictures as two classes."""
    images = sorted(data.file("val").images.iterdir())
    for i, image in enumerate(images):
        for split in ("train", "val"):
            folder = root / split / "ab"[i % 2]
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copy(image, folder)


LAYOUTS = {"CocoKeypoints": coco, "Mpii": mpii, "ImageFolder": image_folder}


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_recipe(path, rendered, tmp_path, monkeypatch):
    config = yaml.safe_load(path.read_text())
    kind = config["data"]["class_path"].rsplit(".", 1)[-1]
    if kind in LAYOUTS:
        LAYOUTS[kind](rendered, config, tmp_path)
        data = [f"--data.root={tmp_path}"]
        if kind == "Mpii":
            data.append("--data.ground_truth=null")
    else:
        data = [f"--data.root={rendered.root}", "--data.train=12", "--data.val=6"]
    task = importlib.import_module(f"tasks.{path.parent.name}")
    tasks = [v for v in vars(task).values() if isinstance(v, type) and v.__module__ == task.__name__]
    quick = ["--trainer.fast_dev_run=true", "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"]
    small = ["--data.batch_size=2", "--data.eval_batch_size=2", "--data.workers=0"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["test"])
    monkeypatch.setattr(
        "hrnet.checkpoints.timm_model", lambda name: timm.create_model(name).eval()
    )  # not downloaded here
    run = main(next(t for t in tasks if hasattr(t, "facts")), ["fit", f"--config={path}", *data, *small, *quick])
    assert run.trainer.global_step == 1
    loss, batch = run.trainer.callback_metrics["train/loss"], next(iter(run.datamodule.train_dataloader()))
    assert loss.isfinite()
    size = config["data"]["init_args"]["size"]
    assert batch["image"].shape[-2:] == (tuple(size) if isinstance(size, list) else (size, size))
    for key in ("lr", "weight_decay"):  # what the recipe says is what the optimiser has
        said = run.config.fit.model.optimizer.init_args[key]
        assert run.trainer.optimizers[0].defaults[key] == said


def test_published_recipes_are_there_and_say_what_is_published():
    for data, sizes in (("coco", ("256x192", "384x288")), ("mpii", ("256x256",))):
        for width in (32, 48):
            for size in sizes:
                path = CONFIGS / "pose" / f"{data}_w{width}_{size}.yaml"
                config = yaml.safe_load(path.read_text())
                assert config["model"]["backbone"] == {"width": width}
                assert config["data"]["init_args"]["size"] == [int(n) for n in size.split("x")]
                assert config["model"]["codec"] == {"sigma": 3 if size == "384x288" else 2}
                assert "Published" in path.read_text()
    recipe = yaml.safe_load((CONFIGS / "pose" / "default.yaml").read_text())
    assert recipe["trainer"] == {"max_epochs": 210}
    assert recipe["model"]["optimizer"] == {"class_path": "torch.optim.Adam", "init_args": {"lr": 0.001}}
    assert recipe["model"]["lr_scheduler"]["init_args"] == {"milestones": [170, 200], "gamma": 0.1}


def test_layouts_are_of_data_modules():
    assert {CocoKeypoints.__name__, Mpii.__name__, ImageFolder.__name__} == LAYOUTS.keys()
