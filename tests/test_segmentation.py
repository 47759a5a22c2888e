"""The segmentation task: its losses and options, from Python and from the command line, and weights of others."""

import json
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import cv2
import lightning as L
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from datamodules.masks import Masked
from datamodules.rendered import RenderedMasks
from datamodules.transforms import DataError, read_image
from hrnet import HRNetConfig
from hrnet.checkpoints import read
from hrnet.heads import OCR, HRNetV1, HRNetV2
from hrnet.inference import Protocol
from hrnet.losses import OHEM, CrossEntropy
from hrnet.weights import write
from tasks.export import export, run_by
from tasks.schedules import Poly
from tasks.segmentation import LabelMaps, Segmentation

TINY = HRNetConfig(8, modules=(1, 1, 1), blocks=1, stem=(1, 16))
SmallOCR = partial(OCR, width=32, key=16)


def build(seed=0, **kwargs):
    """A task whose untrained network sees every class somewhere."""
    torch.manual_seed(seed)
    return Segmentation(**{"backbone": TINY, "num_classes": 5, "init": "kaiming", **kwargs}).eval()


@pytest.mark.parametrize(("init", "low", "high"), [("normal", 0.0008, 0.0012), ("kaiming", 0.05, 0.3)])
def test_init_is_of_backbone_and_head(init, low, high):
    """The official std of 0.001, or by the number of inputs."""
    task = build(init=init)
    stds = [m.weight.std().item() for m in task.modules() if isinstance(m, nn.Conv2d) and m.weight.numel() > 2000]
    stds.append(task.head.last_layer[-1].weight.std().item())
    assert low < min(stds) <= max(stds) < high


@pytest.fixture(scope="module")
def data(cache):
    module = RenderedMasks(str(cache), 12, 6, size=(64, 48), batch_size=4, workers=0)
    module.setup("fit")
    return module


@pytest.fixture
def batch():
    rng = np.random.default_rng(0)
    image = np.stack([cv2.GaussianBlur(rng.normal(size=(64, 96, 3)), (0, 0), 6) for _ in range(2)])
    image = torch.tensor((128 + 700 * image).clip(0, 255), dtype=torch.uint8).permute(0, 3, 1, 2)
    mask = torch.tensor(rng.integers(0, 5, (2, 64, 96)), dtype=torch.uint8)
    mask[:, :9] = 255
    return {"image": image, "mask": mask, "size": torch.tensor([[64, 96]] * 2), "id": torch.arange(2)}


def full(logits, size=(64, 96), align_corners=False):
    return F.interpolate(logits, size, mode="bilinear", align_corners=align_corners)


# Losses


@torch.no_grad()
@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("weights", [None, [1.0, 2.0, 0.5, 1.0, 3.0]])
def test_loss_is_cross_entropy_at_the_labels_size(weights, align_corners, batch):
    task = build(class_weights=weights, align_corners=align_corners)
    features = task(batch["image"])
    losses = task.loss(features, batch)
    assert set(losses) == {"label"}
    weight = None if weights is None else torch.tensor(weights)
    logits = full(task.head(features), align_corners=align_corners)
    expected = F.cross_entropy(logits, batch["mask"].long(), weight, ignore_index=255)
    torch.testing.assert_close(losses["label"], expected)


@torch.no_grad()
@pytest.mark.parametrize("weights", [None, [1.0, 2.0, 0.5, 1.0, 3.0]])
@pytest.mark.parametrize("loss", [CrossEntropy(), OHEM(0.7, 100)])
def test_ocr_has_two_losses(loss, weights, batch):
    task = build(head=SmallOCR, loss=loss, class_weights=weights)
    assert task.align_corners  # the head's own choice, where nobody makes one
    losses = task.loss(task(batch["image"]), batch)
    output, coarse = (full(x, align_corners=True) for x in task.head.both(task(batch["image"])))
    torch.testing.assert_close(losses["label"], loss(output, batch["mask"], task.weight))
    expected = F.cross_entropy(coarse, batch["mask"].long(), task.weight, ignore_index=255)
    torch.testing.assert_close(losses["coarse"], 0.4 * expected)
    other = build(head=SmallOCR, loss=loss, class_weights=weights, auxiliary=0.1)
    torch.testing.assert_close(other.loss(task(batch["image"]), batch)["coarse"], 0.1 * expected)


@pytest.mark.parametrize("head", [HRNetV2, SmallOCR])
@pytest.mark.parametrize("loss", [CrossEntropy(), OHEM()])
def test_training_goes_on_where_nothing_is_labelled(loss, head, batch):
    task = build(loss=loss, head=head, class_weights=[1.0] * 5).train()
    optimizer = torch.optim.SGD(task.parameters(), lr=0.1)
    batch["mask"][:] = 255
    total = sum(task.loss(task(batch["image"]), batch).values())
    total.backward()
    optimizer.step()
    assert total == 0
    assert all(p.isfinite().all() for p in task.parameters())


# What it is built of


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("upsample", ["bilinear", "nearest"])
@pytest.mark.parametrize("head", [HRNetV2, SmallOCR, partial(HRNetV2, align_corners=True)])
def test_upsampling_is_one_choice(head, upsample, align_corners, batch):
    config = replace(TINY, upsample="nearest", align_corners=not align_corners)
    task = build(backbone=config, head=head, upsample=upsample, align_corners=align_corners)
    assert task.backbone.config == replace(TINY, upsample=upsample, align_corners=align_corners)
    assert task.head.align_corners == task.evaluation.align_corners == align_corners
    assert task.hparams["backbone"]["align_corners"] == align_corners


@torch.no_grad()
def test_align_corners_matters_everywhere(batch):
    task, other = build(), build(align_corners=True)
    a, b = (t(batch["image"]) for t in (task, other))
    assert not torch.allclose(a[0], b[0], rtol=0.01)
    assert not torch.allclose(task.head(a), other.head(a), rtol=0.01)
    assert not torch.allclose(task.scores([], batch["image"], (64, 96)), other.scores([], batch["image"], (64, 96)))


@torch.no_grad()
def test_v1_as_head(batch):
    task = build(head=HRNetV1)
    features = task(batch["image"])
    assert len(features) == 1
    assert task.loss(features, batch)["label"].isfinite()
    assert torch.equal(task.predict(features, batch)["label"], full(task.head(features)).argmax(1))


@pytest.mark.parametrize("head", [HRNetV1, HRNetV2, SmallOCR])
def test_every_parameter_learns(head, batch):
    task = build(head=head).train()
    sum(task.loss(task(batch["image"]), batch).values()).backward()
    assert [name for name, p in task.named_parameters() if p.grad is None] == []


# Predictions


@torch.no_grad()
def test_prediction_is_the_protocols(batch):
    protocol = Protocol((48, 64), scales=(0.75, 1.0), flip=True, average="softmax")
    task = build(evaluation=protocol, flip_pairs=[[1, 2]], align_corners=True)
    mirror = torch.tensor([0, 2, 1, 3, 4])

    def network(x):
        return task.head(task(x))

    expected = replace(protocol, align_corners=True)(network, batch["image"], (64, 96), mirror)
    found = task.predict(task(batch["image"]), batch)["label"]
    assert found.dtype == torch.uint8
    assert len(found.unique()) > 2
    assert torch.equal(found, expected.argmax(1).to(torch.uint8))
    assert torch.equal(task.predict_step(batch, 0)["label"], found)


@torch.no_grad()
@pytest.mark.parametrize("window", [None, (64, 96)])
def test_what_is_known_of_the_image_serves_the_image_alone(window, batch):
    """Not a part of the same size of a larger one."""
    task, passes = build(evaluation=Protocol(window, scales=(1.0, 2.0), flip=True)), []
    expected = task.scores([], batch["image"], (64, 96))
    features = task.features(batch)
    task.backbone.register_forward_hook(lambda *_: passes.append(1))
    assert torch.equal(task.scores(features, batch["image"], (64, 96)), expected)
    assert len(passes) == (1 if window is None else 1 + 3 * 3)


@torch.no_grad()
def test_prediction_mirrors_with_the_image(batch):
    task = build(evaluation=Protocol(flip=True), flip_pairs=[[1, 2]])
    here, there = (task.predict([], batch | {"image": x})["label"] for x in (batch["image"], batch["image"].flip(-1)))
    swapped = torch.tensor([0, 2, 1, 3, 4], dtype=torch.uint8)[there.long()].flip(-1)
    assert (swapped == here).float().mean() > 0.999


@torch.no_grad()
@pytest.mark.parametrize(
    ("evaluation", "looks"),
    [
        (Protocol(), [(2, 64, 96)]),
        (Protocol(flip=True), [(4, 64, 96)]),
        (Protocol((64, 96)), [(2, 64, 96)]),
        (Protocol((64, 64), stride=1), [(2, 64, 64)] * 2),
    ],
)
def test_nothing_is_computed_twice(evaluation, looks, batch):
    """Nor, with windows, the whole image, which may be too large."""
    task, seen = build(evaluation=evaluation), []
    task.backbone.register_forward_pre_hook(lambda module, args: seen.append((len(args[0]), *args[0].shape[-2:])))
    task.predict_step(batch, 0)
    assert seen == looks
    seen.clear()
    task.metrics["val"] = RenderedMasks.metric(type("Data", (), {"class_names": list("abcde")})())
    task.log = lambda *args, **kwargs: None
    task.evaluate(batch, "val")
    assert seen == looks


@torch.no_grad()
def test_prediction_is_of_the_labels_size(batch, data, cache):
    task = build()
    assert task.predict(task(batch["image"]), batch | {"mask": torch.zeros(2, 33, 47)})["label"].shape == (2, 33, 47)
    del batch["mask"]
    assert task.predict(task(batch["image"]), batch | {"size": torch.tensor([[50, 41]])})["label"].shape == (2, 50, 41)
    resized = RenderedMasks(str(cache), 12, 6, eval_size=(120, 160), eval_batch_size=2, workers=0)
    resized.setup("validate")
    batch = next(iter(resized.val_dataloader()))
    assert batch["image"].shape[-2:] == (120, 160)
    prediction = task.predict(task(batch["image"]), batch)
    assert prediction["label"].shape == batch["mask"].shape == (2, 240, 320)
    expected = full(task.head(task(batch["image"])), (120, 160)).exp()
    assert torch.equal(prediction["label"], full(expected, (240, 320)).argmax(1))


def test_infer(tmp_path):
    rng = np.random.default_rng(0)
    pictures = [rng.integers(0, 256, (*size, 3), dtype=np.uint8) for size in ((64, 96), (33, 130))]
    cv2.imwrite(str(tmp_path / "a.png"), pictures[0][..., ::-1])
    task = build().train()
    found = task.infer([*pictures, tmp_path / "a.png"])
    assert task.training
    assert [f.shape for f in found] == [(64, 96), (33, 130), (64, 96)]
    assert found[0].dtype == np.uint8
    assert np.array_equal(found[0], found[2])
    assert np.array_equal(found[0], task.infer(str(tmp_path / "a.png")))
    with torch.no_grad():
        image = torch.tensor(pictures[1]).permute(2, 0, 1)[None]
        expected = full(task.eval().head(task(image)), (33, 130)).argmax(1)[0]
    assert np.array_equal(found[1], expected)
    resized = build(eval_size=(64, 64))
    assert resized.infer(pictures[1]).shape == (33, 130)
    for wrong in (pictures[0].astype(np.float32), pictures[0][..., 0], np.zeros((64, 64, 4), np.uint8)):
        with pytest.raises(DataError, match=r"RGB uint8 array \[H, W, 3\]"):
            task.infer(wrong)


def test_pictures(batch):
    task = build(palette=[[i, 2 * i, 3 * i] for i in range(10, 60, 10)], class_names=list("abcde"))
    picture = task.picture(batch, None, 0)
    assert picture.shape == (64, 2 * 96, 3)
    assert not picture[:9, 96 + 60 :].any()  # ignored
    assert np.array_equal(picture[40, 96 + 5], np.array([10, 20, 30]) * (int(batch["mask"][0, 40, 5]) + 1))
    assert task.picture(batch, {"label": batch["mask"]}, 1).shape == (64, 3 * 96, 3)
    image, label = np.full((200, 200, 3), 100, np.uint8), np.full((200, 200), 4, np.uint8)
    assert task.draw(image, label)[-1, -1].tolist() == [75, 100, 125]
    assert (image == 100).all()


@pytest.mark.parametrize(
    ("paths", "files"),
    [
        (["x/a.jpg", "x/b.png"], ["a.png", "b.png"]),
        (["x/a.jpg", "y/a.jpg"], ["a.png", "a_2.png"]),
        (["x/v.mp4#0", "x/v.mp4#12"], ["frame_000000.png", "frame_000012.png"]),
        (["set#2/a.jpg", "x/b#3.jpg"], ["a.png", "b#3.png"]),
        (["x/a.jpg", "y/a.jpg", "x/a_1.jpg"], None),
    ],
)
def test_names_of_masks(paths, files):
    found = LabelMaps([Masked(p, i) for i, p in enumerate(paths)], ["a"], np.zeros((1, 3), np.uint8)).files
    assert len(set(found)) == len(paths)
    assert files is None or found == files


# The schedule


@pytest.mark.parametrize(("total", "power"), [(10, 0.9), (7, 0.9), (10, 2.0)])
def test_poly(total, power):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.5)
    schedule, rates = Poly(optimizer, total, power), []
    for _ in range(total + 2):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    assert rates == pytest.approx([0.5 * max(0, 1 - i / total) ** power for i in range(total + 2)])


@pytest.mark.parametrize(("interval", "total"), [("step", 60), ("epoch", 12)])
def test_poly_takes_its_length_from_the_trainer(interval, total):
    task = build(optimizer=partial(torch.optim.SGD, lr=1.0), lr_scheduler=Poly, lr_interval=interval)
    task.trainer = type("Trainer", (), {"estimated_stepping_batches": 60, "max_epochs": 12})()
    found = task.configure_optimizers()["lr_scheduler"]
    assert (found["scheduler"].total, found["interval"]) == (total, interval)
    task.lr_scheduler = partial(Poly, total=5)
    assert task.configure_optimizers()["lr_scheduler"]["scheduler"].total == 5


# The command line


@pytest.fixture(scope="module")
def call(cli):
    return lambda folder, *args: cli(folder, *args, task=Segmentation)


@pytest.fixture(scope="module")
def options(small):
    return [*small, "--data.eval_batch_size=3", "--trainer.max_epochs=1"]


TINY_BACKBONE = "--model.backbone={width: 8, modules: [1, 1, 1], blocks: 1, stem: [1, 16]}"


QUIET = ["--data.workers=0", "--trainer.enable_progress_bar=false", "--trainer.precision=32-true"]
QUIET += ["--trainer.accelerator=cpu"]


@pytest.fixture(scope="module")
def fitted(call, options, tmp_path_factory):
    return call(tmp_path_factory.mktemp("runs"), "fit", *options, TINY_BACKBONE)


@pytest.fixture(scope="module")
def ocr_run(call, options, tmp_path_factory):
    head = "{class_path: hrnet.heads.OCR, init_args: {width: 32, key: 16}}"
    loss = "{class_path: hrnet.losses.OHEM, init_args: {threshold: 0.7, keep: 1000}}"
    given = [f"--model.head={head}", f"--model.loss={loss}", "--model.align_corners=true", "--model.auxiliary=0.3"]
    given += ["--data.class_weights=median", "--data.flip_pairs=[[1,2]]", "--trainer.log_every_n_steps=1"]
    return call(tmp_path_factory.mktemp("ocr"), "fit", *options, TINY_BACKBONE, *given)


@pytest.fixture(scope="module")
def photos(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    for i, instance in enumerate(data.datasets["val"].instances[:2]):
        shutil.copy(instance.path, folder / f"{i}.jpg")
    cv2.imwrite(str(folder / "2.png"), cv2.imread(instance.path)[:90, :131])
    return folder


def test_fit_leaves_numbers_pictures_and_checkpoints(fitted, data):
    assert fitted.trainer.global_step == 3
    assert fitted.numbers["val/score"] == fitted.numbers["val/mIoU"]
    assert {f"val/IoU/{name}" for name in data.class_names} < set(fitted.numbers)
    assert {"val/loss", "val/pixel_accuracy", "val/mean_accuracy", "val/boundary_mIoU"} < set(fitted.numbers)
    assert {p.name for p in (fitted.folder / "checkpoints").iterdir()} == {"best.ckpt", "last.ckpt"}
    pictures = {"first_batch.jpg", "epoch_000.jpg", "meaniou_epoch_000.jpg"}  # the last is the confusion matrix
    assert {p.name for p in (fitted.folder / "pictures").iterdir()} >= pictures
    assert cv2.imread(str(fitted.folder / "pictures" / "first_batch.jpg")).shape == (2 * 64, 2 * 2 * 48, 3)
    assert "mIoU" in fitted.printed
    assert (fitted.model.class_names, fitted.model.palette.tolist()) == (data.class_names, data.palette)
    assert fitted.model.backbone.config == replace(TINY, upsample="bilinear")


def test_schedule_is_as_long_as_the_run(fitted):
    schedule = fitted.trainer.lr_scheduler_configs[0]
    assert (schedule.interval, schedule.scheduler.total) == ("step", 3)


def test_best_gives_the_numbers_of_fit(fitted, call, options):
    run = call(fitted.folder.parents[2], "validate", *options, "--ckpt_path=best")
    for name, value in fitted.numbers.items():
        if name.startswith("val/"):
            assert run.numbers[name] == pytest.approx(value, rel=1e-4, nan_ok=True)


def test_same_options_go_on(fitted, call, options):
    """The backbone asked for is the checkpoint's, whose up-sampling the task has set."""
    path = fitted.folder / "checkpoints" / "last.ckpt"
    given = [TINY_BACKBONE, f"--ckpt_path={path}", "--trainer.max_epochs=2", "--trainer.limit_val_batches=0"]
    assert call(fitted.folder.parents[2], "fit", *options, *given).trainer.global_step == 6


def test_longer_run_has_its_own_length(fitted, call, options):
    """Gone on with for another epoch, the rate does not stay at the zero where the first ended."""
    path = fitted.folder / "checkpoints" / "last.ckpt"
    given = [f"--ckpt_path={path}", "--trainer.max_epochs=2", "--trainer.limit_val_batches=0"]
    run = call(fitted.folder.parents[2], "fit", *options, *given)
    assert run.trainer.global_step == 6
    assert run.trainer.lr_scheduler_configs[0].scheduler.total == 6
    own, before = run.model.state_dict(), fitted.model.state_dict()
    assert not torch.equal(own["head.last_layer.3.weight"], before["head.last_layer.3.weight"])


def test_evaluation_is_chosen_anew(fitted, call, options, data):
    """A checkpoint says nothing of it; and pictures may be brought to another size."""
    path = fitted.folder / "checkpoints" / "best.ckpt"
    asked = ["window=[64,96]", "scales=[0.5,1]", "flip=true", "stride=1", "average=softmax"]
    given = [f"--ckpt_path={path}", "--data.eval_size=[120,160]", *(f"--model.evaluation.{a}" for a in asked)]
    run = call(fitted.folder.parents[2], "validate", *options, *given)
    assert run.model.evaluation == Protocol((64, 96), 1, (0.5, 1.0), True, "softmax")
    loaded = Segmentation.load_from_checkpoint(path)
    assert loaded.evaluation == Protocol()
    loaded.evaluation, loaded.eval_size = run.model.evaluation, (120, 160)
    metric = data.metric()
    for i, sample in enumerate(data.datasets["val"]):
        found = torch.tensor(loaded.infer(sample["image"].transpose(1, 2, 0)))[None]
        metric.update({"label": found}, {"mask": torch.tensor(sample["mask"])[None], "id": torch.tensor([i])})
        if i == len(data.datasets["val"]) - 1:
            break
    expected = {k: float(v) for k, v in metric.compute().items()}
    assert run.numbers["val/mIoU"] == pytest.approx(expected["mIoU"], abs=1e-4)
    assert run.numbers["val/pixel_accuracy"] == pytest.approx(expected["pixel_accuracy"], abs=1e-4)
    assert "val/loss" not in run.numbers


def test_predict_writes_masks_of_the_pictures_size(fitted, call, photos, data):
    path = fitted.folder / "checkpoints" / "best.ckpt"
    # One by one, as `infer` has them: sums of a larger batch are rounded otherwise, and a pixel's class may turn.
    given = [f"--ckpt_path={path}", f"--data.path={photos}", "--data.batch_size=1", *QUIET]
    run = call(fitted.folder.parents[2], "predict", *given)
    folder = run.folder / "predictions"
    results = json.loads((folder / "results.json").read_text())
    assert [r["file_name"] for r in results] == [str(photos / name) for name in ("0.jpg", "1.jpg", "2.png")]
    loaded = Segmentation.load_from_checkpoint(path)
    for item in results:
        mask, image = Image.open(folder / "masks" / Path(item["mask_file"]).name), read_image(item["file_name"])
        assert mask.mode == "P"
        assert mask.getpalette()[: 3 * len(data.palette)] == [x for colour in data.palette for x in colour]
        label = np.asarray(mask)
        assert label.shape == image.shape[:2]
        assert np.array_equal(label, loaded.infer(image))
        share = {name: float((label == i).mean()) for i, name in enumerate(data.class_names)}
        assert item["share"] == pytest.approx({k: v for k, v in share.items() if v}, abs=1e-5)
    for name, picture in (("0.jpg", "0.jpg"), ("2.jpg", "2.png")):
        assert cv2.imread(str(folder / name)).shape == cv2.imread(str(photos / picture)).shape
    legend = cv2.imread(str(folder / "legend.png"))[..., ::-1]
    assert all((legend[12 + 20 * i, 20] == colour).all() for i, colour in enumerate(data.palette))


def test_predict_on_a_video(fitted, call, tmp_path):
    video = cv2.VideoWriter(str(tmp_path / "v.mp4"), cv2.VideoWriter.fourcc(*"mp4v"), 10, (96, 64))
    for i in range(3):
        video.write(np.full((64, 96, 3), 80 * i, np.uint8))
    video.release()
    path = fitted.folder / "checkpoints" / "best.ckpt"
    run = call(tmp_path, "predict", f"--ckpt_path={path}", f"--data.path={tmp_path / 'v.mp4'}", *QUIET)
    masks = sorted((run.folder / "predictions" / "masks").iterdir())
    assert [m.name for m in masks] == [f"frame_{i:06d}.png" for i in range(3)]
    assert all(Image.open(m).size == (96, 64) for m in masks)
    overlay = cv2.VideoCapture(str(run.folder / "predictions" / "overlay.mp4"))
    assert overlay.get(cv2.CAP_PROP_FRAME_COUNT) == 3


def test_ocr_ohem_and_class_weights_by_command_line(ocr_run, data, cache):
    model = ocr_run.model
    assert isinstance(model.head, OCR)
    assert model.pixel_loss == OHEM(0.7, 1000)
    assert model.auxiliary == 0.3
    assert model.backbone.config == replace(TINY, upsample="bilinear", align_corners=True)
    assert model.head.align_corners
    expected = RenderedMasks(str(cache), 12, 6, class_weights="median").class_weights
    assert model.weight.tolist() == pytest.approx(expected)
    assert model.flip_index.tolist()[:4] == [0, 2, 1, 3]
    parts = [ocr_run.numbers[f"train/{name}"] for name in ("label", "coarse")]
    assert ocr_run.numbers["train/loss"] == pytest.approx(sum(parts), rel=1e-4)
    assert all(x > 0 for x in parts)


@pytest.mark.parametrize("loss", [CrossEntropy(254), OHEM(0.5, 7)])
def test_hyperparameters_make_the_same_task(loss, tmp_path):
    """Built in Python, kept as plain values."""
    task = build(loss=loss, head=SmallOCR, align_corners=True, flip_pairs=[[1, 2]], class_weights=[1.0] * 5)
    torch.save(
        {"state_dict": task.state_dict(), "hyper_parameters": dict(task.hparams), "hparams_name": "kwargs"}
        | {"pytorch-lightning_version": L.__version__},
        tmp_path / "a.ckpt",
    )
    loaded = Segmentation.load_from_checkpoint(tmp_path / "a.ckpt")
    assert loaded.pixel_loss == loss
    assert loaded.flip_index.tolist() == [0, 2, 1, 3, 4]
    after = loaded.state_dict()
    assert all(torch.equal(v, after[k]) for k, v in task.state_dict().items())


def test_checkpoint_brings_all_of_it_along(ocr_run, data):
    loaded = Segmentation.load_from_checkpoint(ocr_run.folder / "checkpoints" / "last.ckpt")
    assert isinstance(loaded.head, OCR)
    assert (loaded.align_corners, loaded.head.align_corners, loaded.backbone.config.align_corners) == (True,) * 3
    assert loaded.pixel_loss == OHEM(0.7, 1000)
    assert loaded.class_names == data.class_names
    assert loaded.weight.tolist() == ocr_run.model.weight.tolist()


def test_run_with_ohem_is_evaluated(ocr_run, call, options, tmp_path):
    path = ocr_run.folder / "checkpoints" / "last.ckpt"
    facts = ["--data.class_weights=median", "--data.flip_pairs=[[1,2]]"]
    run = call(ocr_run.folder.parents[2], "validate", *options, *facts, f"--ckpt_path={path}")
    assert run.model.pixel_loss == OHEM(0.7, 1000)
    assert run.numbers["val/mIoU"] == pytest.approx(ocr_run.numbers["val/mIoU"], rel=1e-4)
    assert run.numbers["val/loss"] == pytest.approx(ocr_run.numbers["val/loss"], rel=1e-4)
    with pytest.raises(SystemExit, match="not of resnet18; leave"):
        call(tmp_path, "validate", *options, f"--ckpt_path={path}", "--model.backbone=resnet18")


def test_start_from_a_run_up_samples_as_it_did(ocr_run, call, photos, data, tmp_path):
    path = ocr_run.folder / "checkpoints" / "last.ckpt"
    run = call(tmp_path, "predict", f"--model.init_from={path}", f"--data.path={photos}", *QUIET)
    assert isinstance(run.model.head, OCR)
    assert run.model.class_names == data.class_names
    assert (run.model.align_corners, run.model.backbone.config.align_corners) == (True, True)
    assert run.model.palette.tolist() == data.palette


# Weights of others


@pytest.fixture(scope="module")
def official(tmp_path_factory):
    """An official OCR model of seven classes, and the task whose weights it has."""
    path = tmp_path_factory.mktemp("official") / "a.pth"
    config = HRNetConfig(10, modules=(1, 2, 1), blocks=2, stem=(1, 8))
    task = build(seed=3, backbone=config, head=OCR, num_classes=7, align_corners=True)
    write(task.state_dict(), path, "official-segmentation")
    return path, task


def test_published_weights_are_a_task(official, batch):
    path, source = official
    task = Segmentation.from_weights(str(path))
    assert task.backbone.config == source.backbone.config
    assert isinstance(task.head, OCR)
    assert (len(task.class_names), task.align_corners) == (7, True)
    image = batch["image"][0].permute(1, 2, 0).numpy()
    assert np.array_equal(task.infer(image), source.infer(image))
    assert len(np.unique(source.infer(image))) > 1
    wrong = Segmentation.from_weights(str(path), align_corners=False)
    assert not np.array_equal(wrong.infer(image), source.infer(image))


def test_published_weights_predict_without_training(official, call, photos, tmp_path):
    path, source = official
    run = call(tmp_path, "predict", f"--model.init_from={path}", f"--data.path={photos}", *QUIET)
    folder = run.folder / "predictions"
    for item in json.loads((folder / "results.json").read_text()):
        found = np.asarray(Image.open(folder / "masks" / Path(item["mask_file"]).name))
        expected = source.infer(item["file_name"])
        assert (found == expected).mean() > 0.999
    assert len(np.unique(expected)) > 1


def test_fine_tuning_up_samples_as_the_weights_were_trained(call, options, data, tmp_path):
    task = build(head=OCR, num_classes=len(data.class_names), align_corners=True)
    write(task.state_dict(), tmp_path / "a.pth", "official-segmentation")
    assert read(tmp_path / "a.pth").protocol["align_corners"]
    given = [f"--model.init_from={tmp_path / 'a.pth'}", "--trainer.max_steps=1", "--trainer.limit_val_batches=0"]
    run = call(tmp_path, "fit", *options, *given)
    assert isinstance(run.model.head, OCR)
    assert run.model.align_corners
    assert run.model.backbone.config == task.backbone.config


# Exported


@torch.no_grad()
@pytest.mark.slow
def test_exported_network_scores_the_same(tmp_path, batch):
    task = build(head=SmallOCR, align_corners=True, evaluation=Protocol((48, 64), flip=True))
    assert export(task, tmp_path / "a.onnx") < 1e-4
    expected = task.scores([], batch["image"], (64, 96))
    run_by(task, str(tmp_path / "a.onnx"))
    torch.testing.assert_close(task.scores([], batch["image"], (64, 96)), expected, rtol=1e-3, atol=1e-4)
