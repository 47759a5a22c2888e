"""The detection task by its command line: it fits, says what is wrong, judges as pycocotools does, and predicts."""

import json
import shutil
from functools import partial

import cv2
import numpy as np
import pytest
import torch
from pycocotools import mask as rle
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from datamodules.boxes import collate
from datamodules.coco_instances import CocoInstances
from datamodules.rendered import RenderedBoxes
from datamodules.transforms import DataError
from hrnet import HRNetConfig
from hrnet.checkpoints import WeightsError
from hrnet.detectors.centernet import CenterNet
from hrnet.detectors.rcnn import RCNN
from tasks.arguments import SettingError
from tasks.detection import Detection, Limits
from tasks.pose import Pose
from tasks.schedules import WarmupMultiStep

TINY = HRNetConfig(8, modules=(1, 1, 1), blocks=1, stem=(1, 16))
NETWORK = [
    "--model.backbone={width: 8, modules: [1, 1, 1], blocks: 1, stem: [1, 16]}",
    "--model.detector.pyramid=16",
    "--model.detector.proposals=200",
    "--model.detector.sampled=32",
]


@pytest.fixture(scope="module")
def options(short):
    return [*short, "--data.shorter=120", "--data.longer=160"]


@pytest.fixture(scope="module")
def masked(cli, options, tmp_path_factory):
    """A short run of Mask R-CNN."""
    folder = tmp_path_factory.mktemp("masked")
    more = [
        "--trainer.max_epochs=1",
        "--model.evaluation.score=0.01",
        "--data.masks=true",
        "--model.detector.masks=true",
    ]
    return folder, cli(folder, "fit", *options, *NETWORK, "--model.detector.width=32", *more, task=Detection)


def test_fit_leaves_everything(masked):
    _, run = masked
    assert {"train/objectness", "train/mask", "val/AP", "val/AP50", "val/mask_AP", "val/score"} <= set(run.numbers)
    assert run.numbers["val/score"] == run.numbers["val/AP"]
    assert (run.folder / "checkpoints/best.ckpt").is_file()
    assert {p.name for p in (run.folder / "pictures").iterdir()} >= {"first_batch.jpg", "epoch_000.jpg"}


def test_validation_is_pycocotools_on_the_written_files(masked, cli, options):
    folder, fitted = masked
    run = cli(
        folder, "validate", "--ckpt_path=last", *options, "--data.masks=true", *NETWORK, "--model.detector.width=32",
        "--model.detector.masks=true", "--data.per_class=true", "--model.evaluation.score=0.01", task=Detection,
    )  # fmt: skip
    truth = run.trainer.datamodule.cache.folder / "annotations/instances_val.json"
    for kind, name, prefix in (("bbox", "val", ""), ("segm", "val_masks", "mask_")):
        ground = COCO(str(truth))
        evaluator = COCOeval(ground, ground.loadRes(str(run.folder / f"predictions/{name}.json")), kind)
        evaluator.evaluate()
        evaluator.accumulate()
        evaluator.summarize()
        assert run.numbers[f"val/{prefix}AP"] == pytest.approx(evaluator.stats[0], abs=1e-6)
        assert run.numbers[f"val/{prefix}AR100"] == pytest.approx(evaluator.stats[8], abs=1e-6)
    assert run.numbers["val/AP"] == pytest.approx(fitted.numbers["val/AP"], abs=1e-4)
    assert "val/AP/person" in run.numbers


def test_predict_a_folder(masked, cli, tmp_path):
    folder, fitted = masked
    source = fitted.trainer.datamodule.cache.folder / "val"
    photos = tmp_path / "photos"
    photos.mkdir()
    for i in (0, 1):
        shutil.copy(source / f"{i:06d}.jpg", photos)
    cv2.imwrite(str(photos / "upright.png"), np.full((90, 50, 3), 127, np.uint8))
    run = cli(
        folder, "predict", "--ckpt_path=last", f"--data.path={photos}", "--data.workers=0",
        "--model.evaluation={score: 0.01, detections: 7}", task=Detection,
    )  # fmt: skip
    items = json.loads((run.folder / "predictions/results.json").read_text())
    assert 7 < len(items) <= 3 * 7
    for item in items:
        image = cv2.imread(item["file_name"])
        x, y, w, h = item["bbox"]
        assert x >= 0
        assert y >= 0
        assert x + w <= image.shape[1] + 1e-3
        assert y + h <= image.shape[0] + 1e-3
        assert item["category"] == run.model.class_names[item["category_id"] - 1]
        assert rle.decode(item["segmentation"]).shape == image.shape[:2]
    assert {p.name for p in (run.folder / "predictions").glob("*.jpg")} == {"000000.jpg", "000001.jpg", "upright.jpg"}
    assert run.trainer.datamodule.shorter == 120  # as it was trained


def test_predict_a_video(masked, cli, tmp_path):
    folder, fitted = masked
    source = fitted.trainer.datamodule.cache.folder / "val"
    writer = cv2.VideoWriter(str(tmp_path / "a.mp4"), cv2.VideoWriter.fourcc(*"mp4v"), 10, (320, 240))
    for i in (0, 1, 2):
        writer.write(cv2.imread(str(source / f"{i:06d}.jpg")))
    writer.release()
    options = ["--ckpt_path=last", f"--data.path={tmp_path / 'a.mp4'}", "--data.workers=1"]
    run = cli(folder, "predict", *options, "--model.evaluation.score=0.01", task=Detection)
    items = json.loads((run.folder / "predictions/results.json").read_text())
    assert {item["image_id"] for item in items} == {0, 1, 2}
    assert cv2.VideoCapture(str(run.folder / "predictions/overlay.mp4")).get(cv2.CAP_PROP_FRAME_COUNT) == 3


def test_limits_out_of_range():
    for wrong in ({"score": 2}, {"nms": 0}, {"nms": 5}, {"detections": 0}):
        with pytest.raises(SettingError, match=f"evaluation.{next(iter(wrong))}"):
            Limits(**wrong)


def test_people_are_found_before_their_poses(masked, cli, small, tmp_path):
    """One command: boxes of the detector are what the pose network crops."""
    folder, fitted = masked
    cli(folder, "fit", *small, NETWORK[0], "--trainer.max_epochs=1", "--trainer.limit_train_batches=1", task=Pose)
    photos = tmp_path / "photos"
    photos.mkdir()
    for i in (0, 1):
        shutil.copy(fitted.trainer.datamodule.cache.folder / f"val/{i:06d}.jpg", photos)
    checkpoint = torch.load(fitted.folder / "checkpoints/last.ckpt", weights_only=True)
    checkpoint["state_dict"]["head.stages.0.box_predictor.cls_score.bias"][1] += 3  # sees people everywhere
    torch.save(checkpoint, tmp_path / "people.ckpt")
    options = ["--ckpt_path=last", f"--data.path={photos}", "--data.workers=0", "--data.box_threshold=0.0501"]
    run = cli(folder, "predict", *options, f"--detector={tmp_path / 'people.ckpt'}", task=Pose)
    boxes = json.loads((folder / "runs/pose/boxes_0.json").read_text())
    detector = Detection.load_from_checkpoint(tmp_path / "people.ckpt", weights_only=True)
    found = detector.infer(photos / "000000.jpg")
    assert {b["category_id"] for b in boxes} == {1}
    assert sum(b["image_id"] == 0 for b in boxes) == found["names"].count("person")
    taken = [b for b in boxes if b["score"] >= 0.0501]
    assert len(run.trainer.datamodule.datasets["predict"]) == len(taken) > 0
    assert json.loads((run.folder / "predictions/results.json").read_text())


def test_a_detector_that_sees_nobody(masked, cli, tmp_path, monkeypatch):
    folder, _ = masked
    monkeypatch.setenv("HRNET_TRACEBACK", "1")
    cv2.imwrite(str(tmp_path / "grey.png"), np.full((90, 50, 3), 127, np.uint8))
    checkpoint = torch.load(folder / "runs/detection/version_0/checkpoints/last.ckpt", weights_only=True)
    checkpoint["state_dict"]["head.stages.0.box_predictor.cls_score.bias"][0] += 30
    torch.save(checkpoint, tmp_path / "blind.ckpt")
    with pytest.raises(DataError, match=r"found no person in .*grey\.png"):
        cli(
            folder,
            "predict",
            f"--data.path={tmp_path / 'grey.png'}",
            f"--detector={tmp_path / 'blind.ckpt'}",
            task=Pose,
        )


def test_a_detector_is_for_prediction_and_of_detection(masked, cli, small, monkeypatch):
    folder, _ = masked
    monkeypatch.setenv("HRNET_TRACEBACK", "1")
    with pytest.raises(SettingError, match="predict"):
        cli(folder, "fit", *small, "--detector=last", task=Pose)
    checkpoint = folder / "runs/pose/version_0/checkpoints/last.ckpt"
    with pytest.raises(WeightsError, match="not a checkpoint of a detection run"):
        cli(folder, "predict", f"--detector={checkpoint}", "--data.path=photos", task=Pose)
    with pytest.raises(WeightsError, match="detector is no single network"):
        cli(folder, "export", folder / "runs/detection/version_0/checkpoints/last.ckpt", "out.onnx", task=Detection)


def test_infer_is_predict(masked, cli):
    _, run = masked
    model = Detection.load_from_checkpoint(run.folder / "checkpoints/last.ckpt", weights_only=True)
    path = run.trainer.datamodule.cache.folder / "val/000000.jpg"
    one = model.infer(path)
    many = model.infer([path, cv2.imread(str(path))[..., ::-1].copy()])
    assert len(one["boxes"]) == len(one["scores"]) == len(one["names"]) == len(one["masks"])
    assert np.array_equal(one["boxes"], many[0]["boxes"])
    assert one["masks"].shape[1:] == (240, 320)
    assert model.draw(cv2.imread(str(path)), one, threshold=0).shape == (240, 320, 3)
    with pytest.raises(DataError, match="uint8"):
        model.infer(np.zeros((4, 4), np.float32))


@pytest.mark.parametrize("detector", ["dense.RetinaNet", "dense.FCOS", "centernet.CenterNet", "rcnn.RCNN"])
def test_any_detector_by_its_name(detector, cli, options, tmp_path):
    more = ["--model.detector.cascade=true", "--model.detector.width=32"] if detector == "rcnn.RCNN" else []
    run = cli(
        tmp_path, "fit", *options, NETWORK[0], f"--model.detector=hrnet.detectors.{detector}",
        "--model.detector.pyramid=32", *more, "--trainer.max_epochs=1", "--trainer.limit_train_batches=2",
        task=Detection,
    )  # fmt: skip
    assert type(run.model.head).__name__ == detector.split(".")[1]
    assert np.isfinite(run.numbers["train/loss"])


def test_a_step_on_images_without_objects(cache):
    data = RenderedBoxes(str(cache), 12, 6, workers=0)
    data.setup("fit")
    samples = [data.datasets["train"][i] for i in range(2)]
    for sample in samples:
        sample["boxes"], sample["labels"] = sample["boxes"][:0], sample["labels"][:0]
    batch = collate(samples)
    for detector in (RCNN, CenterNet):
        task = Detection(TINY, detector=lambda c, n, d=detector: d(c, n, pyramid=16), num_classes=6)
        losses = task.loss(task(batch["image"]), batch)
        torch.stack(list(losses.values())).sum().backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in task.parameters())


def test_the_official_schedule():
    """500 steps up from a third; then a tenth after the 8th and the 11th of 12 epochs, to the step."""
    task = Detection(
        TINY, optimizer=partial(torch.optim.SGD, lr=0.02), lr_scheduler=partial(WarmupMultiStep, milestones=[8, 11])
    )
    each = 7330
    task.trainer = type("Trainer", (), {"estimated_stepping_batches": 12 * each, "max_epochs": 12})()
    schedule = task.configure_optimizers()["lr_scheduler"]["scheduler"]
    assert task.lr_interval == "step"

    def rate(step):
        return 0.02 * schedule.lr_lambdas[0](step)

    assert rate(0) == pytest.approx(0.02 / 3)
    assert rate(250) == pytest.approx(0.02 * 2 / 3)
    assert [rate(step) for step in (500, 8 * each - 1)] == [0.02, 0.02]
    assert [rate(step) for step in (8 * each, 11 * each - 1)] == pytest.approx([0.002, 0.002])
    assert [rate(step) for step in (11 * each, 12 * each - 1)] == pytest.approx([0.0002, 0.0002])


def test_norm_eval():
    task = Detection(TINY, norm_eval=True)
    task.train()
    norms = [m for m in task.backbone.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert not any(m.training for m in norms)
    assert all(m.weight.requires_grad for m in norms)
    assert task.head.training


def test_fit_keeps_batch_statistics_where_asked(masked, cli, options, tmp_path):
    _, former = masked
    path = former.folder / "checkpoints/last.ckpt"
    given = [
        *options,
        *NETWORK,
        "--trainer.max_epochs=1",
        f"--model.init_from.path={path}",
        "--model.init_from.part=backbone",
    ]
    run = cli(tmp_path, "fit", *given, "--model.norm_eval=true", task=Detection)
    before, after = former.model.backbone.state_dict(), run.model.backbone.state_dict()
    assert run.trainer.global_step > 1
    kept = [torch.equal(after[k], before[k]) for k in after if "running" in k]
    assert kept
    assert all(kept)
    assert not torch.equal(after["conv1.weight"], before["conv1.weight"])


def test_norm_eval_wants_weights(cli, options, tmp_path, monkeypatch):
    monkeypatch.setenv("HRNET_TRACEBACK", "1")
    with pytest.raises(WeightsError, match="norm_eval"):
        cli(tmp_path, "fit", *options, *NETWORK, "--model.norm_eval=true", task=Detection)


@pytest.mark.parametrize("place", ["data.masks", "model.detector.masks"])
def test_masks_of_one_side_alone(place, cli, options, tmp_path, monkeypatch):
    monkeypatch.setenv("HRNET_TRACEBACK", "1")
    with pytest.raises(DataError, match="mask head"):
        cli(tmp_path, "fit", *options, *NETWORK, f"--{place}=true", task=Detection)


def test_other_classes_are_refused(masked, cli, options, monkeypatch):
    folder, run = masked
    monkeypatch.setenv("HRNET_TRACEBACK", "1")
    source = run.trainer.datamodule.cache.folder
    arguments = [o for o in options if "data.train" not in o and "data.val" not in o and "data.root" not in o]
    with pytest.raises(WeightsError, match="classes"):
        cli(
            folder, "validate", "--ckpt_path=last", "--data=datamodules.coco_instances.CocoInstances",
            f"--data.root={source}", "--data.train=annotations/instances_train.json",
            "--data.val=annotations/instances_val.json", "--data.train_images=train", "--data.val_images=val",
            "--data.classes=[ball, person]", "--data.masks=true", *arguments, *NETWORK, "--model.detector.masks=true",
            "--model.detector.width=32", task=Detection,
        )  # fmt: skip


@pytest.mark.slow
def test_learning_a_picture_by_heart(cache):
    """Boxes, classes and their places are right end to end: otherwise AP could not become high."""
    torch.manual_seed(0)
    data = RenderedBoxes(str(cache), 12, 6, shorter=96, longer=128, workers=0, batch_size=2)
    data.setup("fit")
    source = data.datasets["train"]
    source.augmentation = None
    batch = collate([source[0], source[1]])
    task = Detection(TINY, detector=lambda c, n: CenterNet(c, n, pyramid=32), num_classes=6)
    task.train()
    optimizer = torch.optim.AdamW(task.parameters(), 3e-3)
    for _ in range(120):
        losses = task.loss(task(batch["image"]), batch)
        optimizer.zero_grad()
        torch.stack(list(losses.values())).sum().backward()
        optimizer.step()
    for module in task.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = None
            module.reset_running_stats()
    with torch.no_grad():
        for _ in range(3):
            task(batch["image"])
        prediction = task.eval().predict(task(batch["image"]), batch)
    metric = CocoInstances.metric(data, "train")
    metric.image_ids = metric.image_ids[:2]
    metric.truth["images"] = metric.truth["images"][:2]
    metric.truth["annotations"] = [a for a in metric.truth["annotations"] if a["image_id"] in metric.image_ids]
    metric.update(prediction, batch)
    assert float(metric.compute()["AP50"]) > 0.9
