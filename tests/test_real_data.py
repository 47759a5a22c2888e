"""Real files of the formats that people have: what goes in comes out, and the number is COCO's own.

`HRNET_TEST_DATA` names a folder with coco-sample, keypoint-formats, lsp-extended and openfield.
"""

import contextlib
import io
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from scipy.optimize import linear_sum_assignment

from datamodules.box_ap import evaluate, masks_of, on_images
from datamodules.boxes import BoxAugmentation, collate
from datamodules.checks import check_keypoints
from datamodules.coco_file import CocoFile
from datamodules.coco_instances import CocoInstances, read_instances
from datamodules.coco_keypoints import CocoKeypoints
from datamodules.metrics import COCO_STATS, KeypointAP
from datamodules.transforms import DataError, PoseAugmentation, apply, invert
from hrnet.detectors.rcnn import targets

pytestmark = pytest.mark.skipif(
    not os.environ.get("HRNET_TEST_DATA"), reason="real data: set HRNET_TEST_DATA to the folder that holds it"
)
DATA = Path(os.environ.get("HRNET_TEST_DATA", ""))
FORMATS = "keypoint-formats"
SAMPLE = "coco-sample/annotations/person_keypoints_val2017.json"
INSTANCES = "annotations/instances_val2017.json"
SMALL = f"{FORMATS}/coco/test_coco.json"
DETECTIONS = f"{FORMATS}/coco/test_coco_det_AP_H_56.json"


def module(file, images=None, train=None, **settings):
    """A data module over one file; the images lie beside it unless told."""
    images = images or str(Path(file).parent)
    settings = {"size": (256, 192), "workers": 0, "batch_size": 16} | settings
    data = CocoKeypoints(str(DATA), train or file, file, train_images=images, val_images=images, **settings)
    data.setup("fit" if train else "validate")
    return data


def sample(**settings):
    return module(SAMPLE, "coco-sample/val2017", **settings)


def feed(data, metric, predict):
    """`metric` after the whole validation split, `predict(batch) -> keypoints in input pixels, score`."""
    for batch in data.val_dataloader():
        keypoints, score = predict(batch)
        metric.update({"keypoints": keypoints, "score": score}, batch)
    return metric


def ap_of(data):
    metric = data.metric("val")
    return metric if isinstance(metric, KeypointAP) else metric["ap"]


def truth(batch):
    return batch["keypoints"], torch.ones(batch["keypoints"].shape[:2])


def noisy(data, pixels, seed=0):
    """Ground truth moved by some image pixels, with scores of their own; reproducible."""
    generator = torch.Generator().manual_seed(seed)

    def predict(batch):
        linear = batch["to_image"][:, :, :2]
        moved = torch.randn(batch["keypoints"].shape, generator=generator) * pixels
        shift = (torch.linalg.inv(linear) @ moved.mT).mT
        score = torch.rand(batch["keypoints"].shape[:2], generator=generator)
        return batch["keypoints"] + shift, score

    return predict


def to_boxes(instances, truths):
    """For each detected box the ground truth it shows (or None): each person gets the best box, no box two people."""
    overlap = np.zeros((len(truths), len(instances)))
    for t, true in enumerate(truths):
        for i, instance in enumerate(instances):
            if true.image_id == instance.image_id:
                a, b = true.box, instance.box
                w, h = np.minimum(a[:2] + a[2:], b[:2] + b[2:]) - np.maximum(a[:2], b[:2])
                common = max(0.0, w) * max(0.0, h)
                overlap[t, i] = common / (a[2] * a[3] + b[2] * b[3] - common)
    people, boxes = linear_sum_assignment(overlap, maximize=True)
    return {b: truths[p] for p, b in zip(people, boxes) if overlap[p, b] > 0}


def seen_in(data, shown, pixels=0.0):
    """Predictions for detected boxes: the person shown, scored 1 (moved: at random), or nothing, scored 0."""
    rng = np.random.default_rng(0)

    def predict(batch):
        keypoints = np.zeros((len(batch["id"]), data.num_keypoints, 2))
        score = np.zeros(keypoints.shape[:2])
        for row, (i, to_image) in enumerate(zip(batch["id"].tolist(), batch["to_image"].double().numpy())):
            if i in shown:
                moved = shown[i].keypoints + pixels * rng.standard_normal(shown[i].keypoints.shape)
                keypoints[row] = apply(invert(to_image), moved)
                score[row] = rng.random(data.num_keypoints) if pixels else 1
        return torch.tensor(keypoints, dtype=torch.float32), torch.tensor(score, dtype=torch.float32)

    return predict


def independent(file, results, sigmas=None):
    """The ten numbers by pycocotools alone, from the two files."""
    with contextlib.redirect_stdout(io.StringIO()):
        annotations = COCO(str(file))
        evaluation = COCOeval(annotations, annotations.loadRes(str(results)), "keypoints")
        if sigmas is not None:
            evaluation.params.kpt_oks_sigmas = np.array(sigmas)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation.stats[:10]


class TestTruthIsPerfect:
    @pytest.mark.parametrize("udp", [False, True])
    @pytest.mark.parametrize(
        ("make", "people"),
        [(sample, 68), (lambda **settings: module(SMALL, **settings), 12)],
        ids=["coco-sample", "keypoint-formats"],
    )
    def test_with_its_own_boxes(self, make, people, udp):
        data = make(udp=udp)
        metric = feed(data, data.metric("val"), truth)
        values = metric.compute()
        assert len(data.datasets["val"]) == people
        for name in COCO_STATS:
            assert values[name] == pytest.approx(1), name
        assert values["MAE"] < 0.01

    def test_with_a_detectors_boxes(self):
        data = module(SMALL, boxes=DETECTIONS)
        truths = data.file("val").instances()
        shown = to_boxes(data.datasets["val"].instances, truths)
        assert len(shown) == len(truths)
        values = feed(data, data.metric("val"), seen_in(data, shown)).compute()
        for name in COCO_STATS:
            assert values[name] == pytest.approx(1), name

    def test_a_mirrored_or_shifted_one_is_not(self):
        data = module(SMALL)
        order = data.facts.flip_index
        swapped = feed(data, ap_of(data), lambda b: (b["keypoints"][:, order], truth(b)[1])).compute()
        assert swapped["AP"] < 0.2
        shifted = feed(data, ap_of(data), lambda b: (b["keypoints"] + 5, truth(b)[1])).compute()
        assert 0.1 < shifted["AP"] < 0.95


class TestNumbers:
    """The ten of `compute` are those of pycocotools from the written results."""

    def compare(self, data, metric, file, tmp_path, sigmas=None):
        results = tmp_path / "results.json"
        results.write_text(json.dumps(metric.results()))
        ours = metric.compute()
        theirs = independent(DATA / file, results, sigmas)
        np.testing.assert_allclose([float(ours[name]) for name in COCO_STATS], theirs, atol=1e-6)
        return ours

    @pytest.mark.parametrize("pixels", [2.0, 6.0])
    @pytest.mark.parametrize("nms", ["oks", "soft", None])
    def test_of_noisy_predictions(self, tmp_path, pixels, nms):
        data = sample(nms=nms)
        values = self.compare(data, feed(data, ap_of(data), noisy(data, pixels)), SAMPLE, tmp_path)
        assert 0.05 < values["AP"] < 0.99

    def test_of_noisy_predictions_in_detected_boxes(self, tmp_path):
        data = module(SMALL, boxes=DETECTIONS)
        shown = to_boxes(data.datasets["val"].instances, data.file("val").instances())
        metric = feed(data, data.metric("val"), seen_in(data, shown, pixels=4.0))
        values = self.compare(data, metric, SMALL, tmp_path)
        assert 0.05 < values["AP"] < 0.99

    def test_of_several_categories(self, tmp_path):
        file = f"{FORMATS}/ap10k/test_ap10k.json"
        data = module(file)
        metric = feed(data, ap_of(data), noisy(data, 25.0))
        values = self.compare(data, metric, file, tmp_path, data.sigmas)
        assert 0.05 < values["AP"] < 0.99


# file, settings, keypoints, left-right pairs, people with labelled keypoints.
OTHERS = {
    "coco": (SMALL, {}, 17, 8, 12),
    "whole-body": (f"{FORMATS}/coco/test_coco_wholebody.json", {}, 17, 8, 12),
    "crowdpose": (f"{FORMATS}/crowdpose/test_crowdpose.json", {"area_from_box": True}, 14, 6, 4),
    "ap10k": (f"{FORMATS}/ap10k/test_ap10k.json", {}, 17, 7, 2),
    "wflw": (f"{FORMATS}/wflw/test_wflw.json", {}, 98, 0, 4),
    "300w": (f"{FORMATS}/300w/test_300w.json", {}, 68, 0, 2),
}


class TestFormats:
    @pytest.mark.parametrize(("file", "settings", "keypoints", "pairs", "people"), OTHERS.values(), ids=OTHERS)
    def test_load(self, file, settings, keypoints, pairs, people):
        data = module(file, **settings)
        assert (data.num_keypoints, len(data.flip_pairs), len(data.datasets["val"])) == (keypoints, pairs, people)
        batch = next(iter(data.val_dataloader()))
        assert batch["image"].shape == (people, 3, 256, 192)
        assert batch["visible"].any(1).all()

    @pytest.mark.parametrize("udp", [False, True])
    @pytest.mark.parametrize("train", [False, True], ids=["evaluation", "training"])
    @pytest.mark.parametrize("name", OTHERS)
    def test_keypoints_come_home(self, name, train, udp):
        """Through `to_image`, against the numbers in the file."""
        file, settings, *_ = OTHERS[name]
        data = module(file, udp=udp, augmentation=PoseAugmentation(flip=0), **settings)
        labels = {a["id"]: a for a in json.loads((DATA / file).read_text())["annotations"]}
        dataset = data.dataset(data.datasets["val"].instances, train=train)
        for instance, shot in zip(dataset.instances, (dataset[i] for i in range(len(dataset)))):
            true = np.array(labels[instance.id]["keypoints"]).reshape(-1, 3)
            seen = true[:, 2] > 0
            assert np.array_equal(shot["visible"] > 0, seen)
            home = apply(shot["to_image"].astype(float), shot["keypoints"].astype(float))
            assert np.abs(home - true[:, :2])[seen].max() < 0.01

    @pytest.mark.parametrize(("file", "settings"), [o[:2] for o in OTHERS.values()], ids=OTHERS)
    def test_truth_is_perfect(self, file, settings):
        data = module(file, **settings)
        assert feed(data, ap_of(data), truth).compute()["AP"] == pytest.approx(1)

    def test_crowdpose_without_areas_is_told_the_remedy(self):
        with pytest.raises(DataError, match=r"test_crowdpose\.json(.|\n)*no area.*`area_from_box: true`"):
            module(OTHERS["crowdpose"][0])


class TestCounts:
    @pytest.mark.parametrize("folder", ["lsp-extended", "openfield"])
    def test_load_whole(self, folder):
        counts, keypoints, pairs = {
            "lsp-extended": ((1997, 500), 14, 6),
            "openfield": ((92, 24), 4, 1),
        }[folder]
        train, val = (f"{folder}/annotations/{split}.json" for split in ("train", "val"))
        data = module(val, f"{folder}/images", train)
        assert (len(data.datasets["train"]), len(data.datasets["val"])) == counts
        assert (data.num_keypoints, len(data.flip_pairs)) == (keypoints, pairs)
        for batch in (next(iter(data.train_dataloader())), next(iter(data.val_dataloader()))):
            assert batch["image"].shape == (16, 3, 256, 192)
            assert batch["visible"].any()

    @pytest.mark.parametrize(("split", "people"), [("train", 86), ("val", 68)])
    def test_coco_sample(self, split, people):
        path = DATA / f"coco-sample/annotations/person_keypoints_{split}2017.json"
        assert len(CocoFile(path, DATA / f"coco-sample/{split}2017").instances()) == people

    def test_truth_of_the_mouse_is_perfect(self):
        data = module("openfield/annotations/val.json", "openfield/images")
        values = feed(data, data.metric("val"), truth).compute()
        assert values["AP"] == pytest.approx(1)
        assert values["RMSE"] < 0.01


class TestCheck:
    @pytest.mark.parametrize(
        ("file", "images"),
        [
            ("coco-sample/annotations/person_keypoints_train2017.json", "coco-sample/train2017"),
            (SAMPLE, "coco-sample/val2017"),
            (SMALL, f"{FORMATS}/coco"),
            ("openfield/annotations/train.json", "openfield/images"),
            ("openfield/annotations/val.json", "openfield/images"),
            (f"{FORMATS}/wflw/test_wflw.json", f"{FORMATS}/wflw"),
            (f"{FORMATS}/300w/test_300w.json", f"{FORMATS}/300w"),
            (f"{FORMATS}/ap10k/test_ap10k.json", f"{FORMATS}/ap10k"),
        ],
    )
    def test_real_files_have_no_fault(self, file, images):
        found = CocoFile(DATA / file, DATA / images)
        report = check_keypoints(found.content, found.path, found.images, found.facts, found.categories, decode=True)
        assert not report.faults, str(report)

    def test_instances_file_is_told_apart(self):
        with pytest.raises(DataError, match=r"instances_val2017\.json: .*instances file instead of a keypoint file"):
            CocoFile(DATA / "coco-sample/annotations/instances_val2017.json", DATA)


@pytest.mark.parametrize("shorter", [800, 320])
def test_perfect_masks_score_high(shorter):
    """What a perfect mask head would put out, brought to the pictures, is what is labelled, but for its 28x28 cells."""
    root = DATA / "coco-sample"
    images = {"train": INSTANCES, "val": INSTANCES, "train_images": "val2017"}
    data = CocoInstances(str(root), masks=True, shorter=shorter, augmentation=BoxAugmentation(flip=0), **images)
    data.setup("fit")
    dataset, items = data.datasets["train"], []
    for i in range(min(30, len(dataset))):
        sample, instance = dataset[i], dataset.instances[i]
        goal = targets(sample["masks"], sample["boxes"], torch.arange(len(sample["boxes"])), 28)
        batch = collate([sample])
        codes = masks_of([goal], on_images([sample["boxes"]], batch), batch)[0]
        for label, code in zip(sample["labels"].tolist(), codes, strict=True):
            category = data.category_ids[label]
            items.append({"image_id": instance.image_id, "category_id": category, "score": 1.0, "segmentation": code})
    truth = read_instances(root / INSTANCES, masks=True)
    values = evaluate(truth, items, "segm", "faster", sorted({item["image_id"] for item in items}))
    assert values[0] > (0.97 if shorter == 800 else 0.9)
