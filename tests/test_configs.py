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
from test_mask_sets import ade, cityscapes, lip, pair, pascal
from test_mask_sets import coco as coco_stuff

from datamodules.ade20k import Ade20k
from datamodules.cityscapes import Cityscapes
from datamodules.coco_instances import CocoInstances
from datamodules.coco_keypoints import CocoKeypoints
from datamodules.coco_stuff import CocoStuff
from datamodules.image_folder import ImageFolder
from datamodules.lip import Lip
from datamodules.mask_folder import MaskFolder
from datamodules.mpii import Mpii
from datamodules.pascal_context import PascalContext
from datamodules.pascal_voc import PascalVoc
from datamodules.shards import Shards, pack
from hrnet import PRESETS, HRNetConfig
from hrnet.heads import OCR, HRNetV2
from hrnet.losses import OHEM, CrossEntropy
from tasks.arguments import CONFIGS
from tasks.cli import main

OVERLAYS = ("logging", "experiments", "sweeps", "joint")  # the last has data in parts: tests/test_joint.py
NOT_ALONE = ("default.yaml", "predict.yaml")  # layers below or beside the others; tests/test_cli.py uses them
RECIPES = [p for p in sorted(CONFIGS.glob("*/*.yaml")) if p.name not in NOT_ALONE and p.parent.name not in OVERLAYS]


SMALL = [64, 64]
"""What pixels are labelled in here: the published crops take minutes on a CPU."""


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
    return ["--data.ground_truth=null"]


def image_folder(data, config, root):
    """The drawn pictures as two classes."""
    images = sorted(data.file("val").images.iterdir())
    for i, image in enumerate(images):
        for split in ("train", "val"):
            folder = root / split / "ab"[i % 2]
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copy(image, folder)


def shards(data, config, root):
    """The same, packed."""
    image_folder(data, config, root / "folder")
    pack(str(root / "folder"), str(root / "shards"), 2)
    return [f"--data.root={root / 'shards'}"]


def masks(write, *more):
    """A tree of tiny pictures and masks; what more it takes to look at them small."""

    def lay(data, config, root):
        write(root)
        return [f"--data.size={SMALL}", *more]

    return lay


def coco_stuff_10k(root):
    """As the converted 10k set: lists of pictures instead of folders."""
    coco_stuff(root)
    (root / "imageLists").mkdir()
    for split, name in (("train", "train2017"), ("test", "val2017")):
        names = [f"{name}/{p.stem}" for p in (root / "images" / name).iterdir()]
        (root / f"imageLists/{split}.txt").write_text("\n".join(names))


def mask_folder(root):
    """CamVid's: eleven classes and what is none of them."""
    (root / "classes.txt").write_text("\n".join(f"class {i}" for i in range(11)))
    for split in ("train", "val", "test"):
        for i in range(2):
            pair(root / f"images/{split}/{i}.jpg", root / f"masks/{split}/{i}.png", range(12), i)


SCALE = ["--data.shorter=64", "--data.longer=96", "--model.norm_eval=false"]  # its weights are not here


def instances(data, config, root):
    """The drawn things, where the configuration says."""
    facts = {name: p.default for name, p in signature(CocoInstances).parameters.items()}
    places = facts | config["data"]["init_args"]
    source = data.cache.folder / "annotations/instances_val.json"
    for split in ("train", "val", "test"):
        if places[split] is None:
            continue
        (root / places[split]).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, root / places[split])
        images = places[f"{split}_images"] or places["val_images"]
        shutil.copytree(data.file("val").images, root / images, dirs_exist_ok=True)
    return SCALE


def voc(data, config, root):
    """Two pictures of each year with a car in it."""
    for year, splits in (("VOC2007", ("trainval", "test")), ("VOC2012", ("trainval",))):
        for folder in ("Annotations", "JPEGImages", "ImageSets/Main"):
            (root / year / folder).mkdir(parents=True)
        for i in (0, 1):
            shutil.copy(data.file("val").images / f"{i:06d}.jpg", root / year / "JPEGImages")
            (root / year / f"Annotations/{i:06d}.xml").write_text(
                "<annotation><object><name>car</name><bndbox><xmin>20</xmin><ymin>30</ymin><xmax>150</xmax>"
                "<ymax>120</ymax></bndbox></object></annotation>"
            )
        for split in splits:
            (root / year / f"ImageSets/Main/{split}.txt").write_text("000000\n000001\n")
    return SCALE


LAYOUTS = {
    "CocoInstances": instances,
    "PascalVoc": voc,
    "CocoKeypoints": coco,
    "Mpii": mpii,
    "ImageFolder": image_folder,
    "Shards": shards,
    "MaskFolder": masks(mask_folder),
    "Cityscapes": masks(cityscapes, "--data.base=64"),
    "PascalContext": masks(pascal, "--data.eval_size=64"),
    "Lip": masks(lip, f"--data.eval_size={SMALL}"),
    "Ade20k": masks(ade, "--data.eval_size=64"),
    "CocoStuff": masks(coco_stuff_10k, "--data.eval_size=64"),
}


def kind(path):
    config = yaml.safe_load(path.read_text())
    return path.parent.name, config["data"]["class_path"], dict(config["model"].get("detector", {})).get("class_path")


FIRST = {kind(p): p for p in reversed(RECIPES)}
"""Of its data and detector; `make smoke-configs` has the others as well."""


@pytest.mark.parametrize(
    "path",
    [pytest.param(p, marks=() if p in FIRST.values() else pytest.mark.slow) for p in RECIPES],
    ids=[f"{p.parent.name}/{p.stem}" for p in RECIPES],
)
def test_recipe(path, rendered, tmp_path, monkeypatch):
    config = yaml.safe_load(path.read_text())
    kind = config["data"]["class_path"].rsplit(".", 1)[-1]
    if kind in LAYOUTS:
        data = [f"--data.root={tmp_path}", *(LAYOUTS[kind](rendered, config, tmp_path) or [])]
    else:
        data = [f"--data.root={rendered.cache.root}", "--data.train=12", "--data.val=6"]
    task = importlib.import_module(f"tasks.{path.parent.name}")
    tasks = [v for v in vars(task).values() if isinstance(v, type) and v.__module__ == task.__name__]
    quick = ["--trainer.fast_dev_run=true", "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"]
    small = ["--data.batch_size=2", "--data.eval_batch_size=2", "--data.workers=0"]
    backbone = config["model"].get("backbone")
    if isinstance(backbone, dict):  # as wide as it says but not as deep, which takes seconds; below, sizes are compared
        small += ["--model.backbone.modules=[1,1,1]", "--model.backbone.blocks=1"]
    if "RCNN" in str(config["model"].get("detector")):
        small += [
            f"--model.detector.{k}={v}"
            for k, v in {"pyramid": 64, "width": 64, "proposals": 200, "sampled": 64}.items()
        ]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["test"])
    monkeypatch.setattr(
        "hrnet.checkpoints.timm_model", lambda name: timm.create_model(name).eval()
    )  # not downloaded here
    run = main(next(t for t in tasks if hasattr(t, "facts")), ["fit", f"--config={path}", *data, *small, *quick])
    assert run.trainer.global_step == 1
    if isinstance(backbone, dict):
        assert run.model.backbone.config.width == backbone["width"]
    loss, batch = run.trainer.callback_metrics["train/loss"], next(iter(run.datamodule.train_dataloader()))
    assert loss.isfinite()
    if path.parent.name == "detection":
        assert np.isfinite(run.trainer.callback_metrics["val/AP"])
        return
    size = SMALL if f"--data.size={SMALL}" in data else config["data"]["init_args"]["size"]
    assert batch["image"].shape[-2:] == (tuple(size) if isinstance(size, list) else (size, size))
    for key in ("lr", "weight_decay"):  # what the recipe says is what the optimiser has
        said = run.config.fit.model.optimizer.init_args[key]
        assert run.trainer.optimizers[0].defaults[key] == said
    if path.parent.name == "segmentation":
        hard = path.stem.startswith(("ade20k", "coco_stuff"))
        assert isinstance(run.model.head, OCR if path.stem.endswith("_ocr") else HRNetV2)
        assert run.model.pixel_loss == (OHEM() if hard else CrossEntropy())
        assert len(run.model.class_names) == run.datamodule.num_classes
        assert run.trainer.callback_metrics["val/mIoU"].isfinite()


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


# Of the official YAMLs: crop (H, W), base, pictures a GPU, epochs, lr, weight decay; then align_corners, BN momentum.
CITYSCAPES = ([512, 1024], 2048, 3, 484, 0.01, 0.0005)
LIP = ([473, 473], 473, 10, 150, 0.007, 0.0005)
ADE = ([520, 520], 520, 4, 120, 0.02, 0.0001)
SEGMENTATION = {
    "cityscapes_w48": (*CITYSCAPES, False, 0.01),
    "cityscapes_w48_ocr": (*CITYSCAPES, True, 0.1),
    "cityscapes_w18_small_v1": (*CITYSCAPES, False, 0.01),
    "cityscapes_w18_small_v2": (*CITYSCAPES, False, 0.01),
    "pascal_context_w48": ([480, 480], 520, 4, 200, 0.004, 0.0001, False, 0.01),
    "pascal_context_w48_ocr": ([520, 520], 520, 4, 200, 0.001, 0.0001, True, 0.1),
    "lip_w48": (*LIP, False, 0.01),
    "lip_w48_ocr": (*LIP, True, 0.1),
    "ade20k_w48": (*ADE, True, 0.1),
    "ade20k_w48_ocr": (*ADE, True, 0.1),
    "coco_stuff_w48_ocr": ([520, 520], 520, 4, 110, 0.001, 0.0001, True, 0.1),
}


@pytest.mark.parametrize("name", SEGMENTATION)
def test_published_segmentation_recipes(name):
    path = CONFIGS / "segmentation" / f"{name}.yaml"
    text, config = path.read_text(), yaml.safe_load(path.read_text())
    data, model = config["data"]["init_args"], config["model"]
    optimizer, backbone = model["optimizer"]["init_args"], model["backbone"]
    said = (data["size"], data["base"], data["batch_size"], config["trainer"]["max_epochs"])
    said += (optimizer["lr"], optimizer["weight_decay"], model.get("align_corners", False))
    assert (*said, backbone.get("bn_momentum", 0.1)) == SEGMENTATION[name]
    assert text.startswith(
        f"# python -m tasks.segmentation fit -c configs/segmentation/{name}.yaml --data.root {data['root']} "
    )
    for part in ("--model.init_from.part backbone", "Published: mIoU", "--model.evaluation.flip true"):
        assert part in text
    assert HRNetConfig(**backbone | {"bn_momentum": 0.1}) == PRESETS[name[name.index("w") :].removesuffix("_ocr")]


DETECTION = {  # width, epochs, milestones, lr, then detector
    "coco_faster_w18": (18, 12, [8, 11], 0.02, {}),
    "coco_faster_w32": (32, 12, [8, 11], 0.02, {}),
    "coco_faster_w48": (48, 12, [8, 11], 0.02, {}),
    "coco_mask_w18": (18, 12, [8, 11], 0.02, {"masks": True}),
    "coco_mask_w32": (32, 12, [8, 11], 0.02, {"masks": True}),
    "coco_cascade_w32": (32, 20, [16, 19], 0.02, {"cascade": True}),
    "coco_cascade_mask_w32": (32, 20, [16, 19], 0.02, {"cascade": True, "masks": True}),
    "coco_fcos_w18": (18, 24, [16, 22], 0.01, {}),
    "coco_fcos_w32": (32, 24, [16, 22], 0.01, {}),
}


@pytest.mark.parametrize("name", DETECTION)
def test_published_detection_recipes(name):
    path, default = (
        CONFIGS / "detection" / f"{name}.yaml",
        yaml.safe_load((CONFIGS / "detection/default.yaml").read_text()),
    )
    text, config = path.read_text(), yaml.safe_load(path.read_text())
    model = default["model"] | config["model"]
    epochs = (default["trainer"] | config.get("trainer", {}))["max_epochs"]
    milestones, detector = model["lr_scheduler"]["init_args"]["milestones"], model["detector"]
    optimizer = model["optimizer"]["init_args"]
    said = (model["backbone"]["width"], epochs, milestones, optimizer["lr"], detector.get("init_args", {}))
    assert said == DETECTION[name]
    assert HRNetConfig(**model["backbone"]) == PRESETS[f"w{said[0]}"]
    assert (optimizer["momentum"], optimizer["weight_decay"], model["norm_eval"]) == (0.9, 0.0001, True)
    assert detector["class_path"].endswith("FCOS" if "fcos" in name else "RCNN")
    assert config["data"]["init_args"].get("masks", False) == ("mask" in name)
    assert text.startswith(f"# python -m tasks.detection fit -c configs/detection/{name}.yaml --data.root data/coco ")
    assert f"--model.optimizer.lr {optimizer['lr'] / 8:g})" in text


def test_layouts_are_of_data_modules():
    modules = (
        CocoInstances,
        PascalVoc,
        CocoKeypoints,
        Mpii,
        ImageFolder,
        Shards,
        MaskFolder,
        Cityscapes,
        PascalContext,
        Lip,
        Ade20k,
        CocoStuff,
    )
    assert {module.__name__ for module in modules} == LAYOUTS.keys()
