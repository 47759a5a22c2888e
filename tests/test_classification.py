"""The classification task: its loss and options, from Python and from the command line, and backbones that move."""

import json
import shutil

import cv2
import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from torch.utils.data import default_collate

from datamodules.rendered import RenderedLabels
from hrnet import PRESETS, HRNet, HRNetConfig, checkpoints, heads
from hrnet.checkpoints import WeightsError
from hrnet.weights import InitFrom
from tasks.arguments import CONFIGS
from tasks.classification import Classification
from tasks.schedules import WarmupCosine

TINY = HRNetConfig(8, modules=(1, 1, 1), blocks=1, stem=(1, 16))


def build(seed=0, **kwargs):
    torch.manual_seed(seed)
    return Classification(**{"backbone": TINY, "num_classes": 4, "size": 64, "resize": 73, **kwargs}).eval()


@pytest.fixture(scope="module")
def data(cache):
    module = RenderedLabels(str(cache), 12, 6, size=64, batch_size=4, workers=0)
    module.setup("fit")
    return module


@pytest.fixture(scope="module")
def batch(data):
    return default_collate([data.datasets["val"][i] for i in range(4)])


def test_scenes_have_their_labels(data):
    assert data.class_names == ["beach", "field", "indoor", "street"]
    assert len(data.datasets["train"]) == 12
    assert len({i.label for i in data.datasets["train"].instances}) > 1


@torch.no_grad()
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_loss_is_cross_entropy(smoothing, batch):
    task = build(label_smoothing=smoothing)
    features = task(batch["image"])
    expected = F.cross_entropy(task.head(features), batch["label"], label_smoothing=smoothing)
    torch.testing.assert_close(task.loss(features, batch)["label"], expected)


def test_published_sizes():
    for name, count in (("w18", 21_299_004), ("w64", 128_059_944)):
        with torch.device("meta"):
            task = Classification(backbone=PRESETS[name])
        assert sum(p.numel() for p in task.parameters()) == count


def test_mixed_labels_are_learned(batch):
    task = build(mixup=0.4, cutmix=1.0).train()
    image, label = task.mix(batch["image"].float(), batch["label"])
    assert label.shape == (4, 4)
    torch.testing.assert_close(label.sum(1), torch.ones(4))
    loss = task.loss(task(image), {"image": image, "label": label})["label"]
    assert loss.isfinite()
    assert task.picture({"image": image, "label": label}, None, 0).dtype == np.uint8


def test_frozen_parts_do_not_move(batch):
    task = build(freeze=["backbone.conv1", "backbone.bn1", "backbone.stage2"]).train()
    before = {k: v.clone() for k, v in task.state_dict().items()}
    task.on_train_start()
    optimizer = torch.optim.SGD(task.parameters(), lr=0.1)
    task.loss(task(batch["image"]), batch)["label"].backward()
    optimizer.step()
    moved = {k for k, v in task.state_dict().items() if not torch.equal(v, before[k])}
    assert not [k for k in moved if k.startswith(("backbone.conv1", "backbone.bn1", "backbone.stage2"))]
    assert [k for k in moved if k.startswith("backbone.stage3")]
    assert [k for k in moved if k.startswith("backbone.layer1") and "running" in k]


def test_teacher_is_learned_from_and_not_saved(batch):
    task = build(distillation=0.7, temperature=2.0).train()
    own = task.state_dict().keys()
    teacher = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(3, 4))
    task.teacher = [teacher]
    assert task.state_dict().keys() == own
    features = task(batch["image"])
    losses = task.loss(features, batch)
    logits, target = task.logits(features), teacher(task.normalised(batch["image"]))
    expected = F.kl_div((logits / 2).log_softmax(-1), (target / 2).softmax(-1), reduction="batchmean") * 4 * 0.7
    torch.testing.assert_close(losses["teacher"], expected)
    torch.testing.assert_close(losses["label"], 0.3 * F.cross_entropy(logits, batch["label"]))
    assert set(task.eval().loss(features, batch)) == {"label"}


@torch.no_grad()
@pytest.mark.parametrize(("head", "length"), [(heads.Classification, 2048), (heads.Pooled, 15 * TINY.width)])
def test_embedding_is_what_the_classifier_sees(head, length, batch):
    task = build(head=head)
    vector = task.embed(batch["image"])
    assert vector.shape == (4, length)
    torch.testing.assert_close(task.head.classifier(vector), task.logits(task(batch["image"])))


def test_warm_up_and_cosine():
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    schedule, rates = WarmupCosine(optimizer, warmup=4, total=24, minimum=0.1), []
    for _ in range(25):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert rates[14] == pytest.approx(0.55)
    assert rates[24] == pytest.approx(0.1)
    with pytest.raises(ValueError, match="warmup"):
        WarmupCosine(optimizer, warmup=5, total=5)


# Backbones by name


def test_backbone_by_file_or_timm_name(tmp_path, monkeypatch):
    theirs = timm.create_model("hrnet_w18_small", num_classes=10)
    torch.save(theirs.state_dict(), tmp_path / "a.pth")
    monkeypatch.setattr("hrnet.checkpoints.timm_model", lambda name: theirs)
    for name in (str(tmp_path / "a.pth"), "timm:hrnet_w18_small.gluon_in1k"):
        task = build(backbone=name)
        assert task.backbone.config == PRESETS["w18_small_v1"]
        assert task.init_from == InitFrom(name, part="backbone")
        task.trainer = type("Trainer", (), {"datamodule": None})()
        task.setup("predict")
        own, other = task.backbone.state_dict(), theirs.state_dict()
        assert all(torch.equal(v, other[k]) for k, v in own.items())
        assert task.origin["path"] == name
        assert task.hparams["backbone"]["width"] == 16  # the file need not be there later


def test_timm_names(monkeypatch):
    with pytest.raises(ValueError, match=r"unknown HRNet preset 'w23'.*w32"):
        build(backbone="timm:hrnet_w23")
    with pytest.raises(WeightsError, match=r"no pretrained 'hrnet_w33\.ms_in1k'; near it: .*hrnet_w32\.ms_in1k"):
        checkpoints.read("timm:hrnet_w33.ms_in1k")


def test_without_network_it_says_what_to_download(monkeypatch):
    def fail(*args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr(timm, "create_model", fail)
    with pytest.raises(
        WeightsError, match=r"download model\.safetensors and config\.json from https://huggingface\.co/timm/hrnet_w32"
    ):
        checkpoints.read("timm:hrnet_w32.ms_in1k")
    monkeypatch.setattr(torch.hub, "download_url_to_file", fail)
    with pytest.raises(WeightsError, match=r"download it by other means to .*a\.pth"):
        checkpoints.read("https://nowhere.invalid/a.pth?x=1")


# The command line


@pytest.fixture(scope="module")
def options(cache):
    values = {"data.root": cache, "data.train": 12, "data.val": 6, "data.size": 64, "data.batch_size": 4}
    values |= {"data.workers": 0, "model.backbone": "w18_small_v1", "trainer.enable_progress_bar": "false"}
    values |= {"trainer.max_epochs": 1, "trainer.accelerator": "cpu", "trainer.precision": "32-true"}
    return [f"--{k}={v}" for k, v in values.items()]


@pytest.fixture(scope="module")
def call(cli):
    return lambda folder, *args: cli(folder, *args, task=Classification)


@pytest.fixture(scope="module")
def fitted(call, options, tmp_path_factory):
    return call(tmp_path_factory.mktemp("runs"), "fit", *options)


def test_fit_leaves_a_confusion_matrix(fitted):
    assert fitted.trainer.global_step == 3
    assert fitted.numbers["val/score"] == fitted.numbers["val/top1"]
    assert cv2.imread(str(fitted.folder / "pictures" / "accuracy_epoch_000.jpg")).shape == (130 + 4 * 48,) * 2 + (3,)


def test_best_gives_the_numbers_of_fit(fitted, call, options):
    run = call(fitted.folder.parents[2], "validate", *options, "--ckpt_path=best")
    assert run.numbers["val/top1"] == pytest.approx(fitted.numbers["val/top1"])
    assert run.numbers["val/loss"] == pytest.approx(fitted.numbers["val/loss"], rel=1e-4)


def test_predict_names_classes(fitted, call, data, tmp_path):
    for i, instance in enumerate(data.datasets["val"].instances[:3]):
        shutil.copy(instance.path, tmp_path / f"{i}.jpg")
    quiet = ["--data.workers=0", "--trainer.enable_progress_bar=false", "--trainer.precision=32-true"]
    path = fitted.folder / "checkpoints" / "best.ckpt"
    run = call(
        tmp_path, "predict", f"--ckpt_path={path}", f"--data.path={tmp_path}", "--trainer.accelerator=cpu", *quiet
    )
    results = json.loads((run.folder / "predictions" / "results.json").read_text())
    assert [item["file_name"] for item in results] == [str(tmp_path / f"{i}.jpg") for i in range(3)]
    assert run.cli.datamodule.size == 64
    loaded = Classification.load_from_checkpoint(path)
    for item in results:
        assert {c["class"] for c in item["classes"]} == set(data.class_names)
        expected = loaded.infer(item["file_name"])
        assert item["classes"][0]["class"] == expected[0]["class"]
        assert item["classes"][0]["score"] == pytest.approx(expected[0]["score"], abs=1e-4)
    assert len(list((run.folder / "predictions").glob("*.jpg"))) == 3


@pytest.mark.slow
def test_average_of_weights(call, options, tmp_path):
    layers = ["-c", CONFIGS / "classification/rendered.yaml", "-c", CONFIGS / "experiments/ema.yaml"]
    run = call(tmp_path, "fit", *layers, *options)
    loaded = Classification.load_from_checkpoint(run.folder / "checkpoints" / "last.ckpt")
    assert loaded.backbone.config.width == 16


def test_backbones_move_between_tasks(fitted, call, cli, options, small, tmp_path, caplog):
    path = fitted.folder / "checkpoints" / "best.ckpt"
    part = [f"--model.init_from.path={path}", "--model.init_from.part=backbone"]
    pose = cli(tmp_path, "fit", *small, *part, "--trainer.max_epochs=1", "--trainer.limit_train_batches=2")
    assert "left out on purpose" in caplog.text
    kept = torch.load(pose.folder / "checkpoints" / "last.ckpt", weights_only=True)["origin"]
    assert kept["path"] == str(path)
    assert len(kept["sha256"]) == 64
    back = [f"--model.init_from.path={pose.folder / 'checkpoints' / 'last.ckpt'}", "--model.init_from.part=backbone"]
    with pytest.raises(SystemExit, match="missing in the file"):  # pose has no use for the coarser last maps
        call(tmp_path, "validate", *options, *back)
    run = call(tmp_path, "validate", *options, *back, "--model.init_from.strict=false")
    own, other = run.model.backbone.state_dict(), pose.model.backbone.state_dict()
    assert all(torch.equal(v, own[k]) for k, v in other.items())


def test_backbone_of_another_width_is_adopted(call, options, tmp_path):
    """Unless one is asked for: then it is said that they differ."""
    torch.save(HRNet("w18_small_v2").state_dict(), tmp_path / "a.pth")
    part = [f"--model.init_from.path={tmp_path / 'a.pth'}", "--model.init_from.part=backbone"]
    run = call(tmp_path, "validate", *(o for o in options if "backbone" not in o), *part)
    assert run.model.backbone.config == PRESETS["w18_small_v2"]
    with pytest.raises(SystemExit, match="of another shape"):
        call(tmp_path, "validate", *options, *part)


def test_imagenet_names():
    names = Classification(backbone="w18_small_v1").class_names
    assert (names[0], names[-1]) == ("tench, Tinca tinca", "toilet tissue, toilet paper, bathroom tissue")


def test_checkpoint_of_another_task_is_refused(fitted, cli, small, tmp_path):
    path = fitted.folder / "checkpoints" / "best.ckpt"
    with pytest.raises(SystemExit):
        cli(tmp_path, "validate", *small, f"--ckpt_path={path}")


def test_pretrained_model_predicts_without_training(tmp_path, monkeypatch, call):
    """A published checkpoint, head included, becomes the task."""
    theirs = timm.create_model("hrnet_w18_small", num_classes=4).eval()
    torch.save(theirs.state_dict(), tmp_path / "a.pth")
    cv2.imwrite(str(tmp_path / "p.jpg"), np.random.default_rng(0).integers(0, 255, (80, 90, 3), dtype=np.uint8))
    model = [f"--model.init_from={tmp_path / 'a.pth'}"]
    quiet = ["--data.workers=0", "--trainer.enable_progress_bar=false", "--trainer.precision=32-true"]
    run = call(tmp_path, "predict", *model, f"--data.path={tmp_path / 'p.jpg'}", "--trainer.accelerator=cpu", *quiet)
    found = json.loads((run.folder / "predictions" / "results.json").read_text())[0]["classes"]
    config = timm.data.resolve_data_config({}, model=theirs) | {"crop_pct": 0.875, "interpolation": "bilinear"}
    from PIL import Image

    tensor = timm.data.create_transform(**config)(Image.open(tmp_path / "p.jpg").convert("RGB"))[None]
    with torch.no_grad():
        expected = theirs(tensor).softmax(-1)[0]
    assert int(found[0]["class"]) == int(expected.argmax())
    assert found[0]["score"] == pytest.approx(float(expected.max()), abs=2e-3)
