"""MPII as the official code reads it: the crop, the labels, the measure; and what a faulty copy is told."""

import json
import os
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from jsonargparse import ArgumentParser
from scipy.io import savemat

from datamodules.checks import Report
from datamodules.mpii import FACTS, Mpii, main
from datamodules.transforms import DataError, apply, crop_matrix, crop_of_box, invert, warp

# Official mpii.py.
FLIP_PAIRS = [[0, 5], [1, 4], [2, 3], [10, 15], [11, 14], [12, 13]]
DATASET_JOINTS = "rank rkne rhip lhip lkne lank pelv thor neck head rwri relb rsho lsho lelb lwri".split()


def official_matrix(center, scale, size):
    """The affine [2, 3] of mpii.py `_get_db` and transforms.py `get_affine_transform`, without rotation."""
    c, s = np.array(center, dtype=float), scale
    if c[0] != -1:
        c[1] += 15 * s
        s = s * 1.25
    c -= 1
    w, h = size[1], size[0]
    source = np.array([c, c + [0, -0.5 * 200 * s], c + [0, -0.5 * 200 * s]])
    target = np.array([[w * 0.5, h * 0.5], [w * 0.5, h * 0.5 - 0.5 * w], [w * 0.5, h * 0.5 - 0.5 * w]])
    for points in (source, target):
        direct = points[0] - points[1]
        points[2] = points[1] + [-direct[1], direct[0]]
    return np.linalg.solve(np.c_[source, np.ones(3)], target).T


def person(i, rng, **other):
    joints = rng.uniform(20, 100, (16, 2)).round(1)
    return {
        "image": f"{i // 2:09d}.jpg",  # two people an image
        "center": [60.0, 55.0],
        "scale": 0.5,
        "joints": joints.tolist(),
        "joints_vis": [1] * 16,
    } | other


def truth_of(persons, head=20.0):
    """What gt_valid.mat would hold: head boxes with a diagonal of `head` pixels."""
    joints = np.array([p["joints"] for p in persons], dtype=float).transpose(1, 2, 0)
    boxes = np.zeros((2, 2, len(persons)))
    boxes[1] = head * np.array([[0.6], [0.8]])
    missing = 1 - np.array([p["joints_vis"] for p in persons], dtype=float).T
    names = np.array([DATASET_JOINTS], dtype=object)
    return {"pos_gt_src": joints, "jnt_missing": missing, "headboxes_src": boxes, "dataset_joints": names}


@pytest.fixture
def copy_of_mpii(tmp_path):
    """A small copy in the official layout: write(val=..., truth=...) replaces parts of it."""
    rng = np.random.default_rng(0)
    persons = [person(i, rng) for i in range(6)]
    (tmp_path / "annot").mkdir()
    (tmp_path / "images").mkdir()
    for name in {p["image"] for p in persons}:
        cv2.imwrite(str(tmp_path / "images" / name), rng.integers(0, 255, (120, 130, 3), dtype=np.uint8))

    def write(train=persons, val=persons, truth=None):
        (tmp_path / "annot/train.json").write_text(json.dumps(train))
        (tmp_path / "annot/valid.json").write_text(json.dumps(val))
        if truth is not None:
            savemat(tmp_path / "annot/gt_valid.mat", truth)
        return tmp_path, persons

    return write


def test_facts():
    assert len(FACTS.names) == len(FACTS.sigmas) == 16
    assert sorted(map(sorted, FACTS.flip_pairs)) == FLIP_PAIRS
    assert all(FACTS.names[a].startswith("left") for a, _ in FACTS.flip_pairs)
    assert [i for i, upper in enumerate(FACTS.upper) if upper] == list(range(7, 16))
    assert len(FACTS.skeleton) == 15
    assert {joint for limb in FACTS.skeleton for joint in limb} == set(range(16))


def test_defaults_are_official_and_settable(tmp_path):
    data = Mpii(str(tmp_path))  # reads nothing yet
    assert data.size == (256, 256)
    assert data.num_keypoints == 16
    augmentation = data.augmentation
    assert (augmentation.scale, augmentation.rotation, augmentation.half_body, augmentation.flip) == (0.25, 30, 0, 0.5)
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Mpii, "data")
    arguments = ["--data.size=[128, 128]", "--data.augmentation.scale=0.1", "--data.udp=true", "--data.batch_size=3"]
    data = parser.instantiate_classes(parser.parse_args(arguments)).data
    assert (tuple(data.size), data.augmentation.scale, data.udp, data.batch_size) == ((128, 128), 0.1, True, 3)
    assert data.augmentation.rotation == 30


@given(
    x=st.one_of(st.just(-1.0), st.floats(0, 2000)),
    y=st.floats(0, 2000),
    scale=st.floats(0.2, 12),
    size=st.sampled_from([(256, 256), (384, 384), (256, 192)]),
)
def test_crop_is_the_official_one(tmp_path_factory, x, y, scale, size):
    record = person(0, np.random.default_rng(0), center=[x, y], scale=scale)
    data = Mpii(".", size=size)
    data.files["val"] = (Report(Path("valid.json")), [record], None)
    (instance,) = data.instances("val")
    matrix = crop_matrix(*crop_of_box(instance.box, size, data.padding), size)
    corners = np.array([[x, y], [x - 100 * scale, y + 100 * scale], [x + 100 * scale, y - 50 * scale]])
    expected = apply(official_matrix([x, y], scale, size), corners)
    # Crops are computed from float32 points: of coordinates near 1000 that leaves 6e-5, times the magnification.
    assert np.abs(apply(matrix, corners) - expected).max() < 1e-3 * max(1, size[1] / (200 * scale))


def test_labels_are_zero_based_and_nobody_is_dropped(copy_of_mpii):
    rng = np.random.default_rng(1)
    hidden = person(0, rng, joints_vis=[0] * 16)
    half = person(1, rng, joints_vis=[1, 0] * 8)
    root, _ = copy_of_mpii(train=[hidden, half])
    data = Mpii(str(root), ground_truth=None, batch_size=2, workers=0)
    data.setup("fit")
    instances = data.datasets["train"].instances
    assert [i.visible.tolist() for i in instances] == [[0] * 16, [2, 0] * 8]
    np.testing.assert_allclose(instances[1].keypoints, np.array(half["joints"]) - 1)
    assert instances[0].image_id == instances[1].image_id  # two people in one image
    assert [i.id for i in instances] == [0, 1]
    batch = next(iter(data.train_dataloader()))
    assert batch["image"].shape == (2, 3, 256, 256)
    assert batch["keypoints"].shape == (2, 16, 2)


def perfect(data, split="val", off=0.0):
    """The metric's verdict on predictions `off` pixels (of the image) to the right of the labels."""
    metric = data.metric(split)
    for batch in data.val_dataloader():
        truth = torch.tensor(np.stack([data.datasets[split].instances[i].keypoints for i in batch["id"]]))
        truth[..., 0] += off
        points = [
            apply(invert(m.numpy().astype(float)), k.numpy()) for m, k in zip(batch["to_image"], truth, strict=True)
        ]
        metric.update({"keypoints": torch.tensor(np.stack(points)), "score": torch.ones(len(truth), 16)}, batch)
    return {name: float(value) for name, value in metric.compute().items()}


@pytest.mark.parametrize(("off", "expected"), [(0.0, 100.0), (5.9, 100.0), (6.1, 0.0)])
def test_ground_truth_file_gives_labels_and_head_size(copy_of_mpii, off, expected):
    root, persons = copy_of_mpii()
    truth = truth_of(persons, head=20.0)
    truth["jnt_missing"][3, 1] = 1
    truth["pos_gt_src"][3, :, 1] = np.nan  # as may be where a joint is missing
    copy_of_mpii(truth=truth)
    data = Mpii(str(root), workers=0)
    data.setup("validate")
    instances = data.datasets["val"].instances
    np.testing.assert_allclose([i.norm for i in instances], 0.6 * 20)
    assert instances[1].visible[3] == 0
    assert np.isfinite(instances[1].keypoints).all()
    np.testing.assert_allclose(instances[2].keypoints, np.array(persons[2]["joints"]) - 1)
    assert perfect(data, off=off)["PCKh@0.5"] == expected  # half of 12 pixels


def test_official_pckh_formula(copy_of_mpii):
    """Against lib/dataset/mpii.py `evaluate`, written out, on 1-based predictions."""
    rng = np.random.default_rng(3)
    records = [person(i, rng, joints_vis=rng.integers(0, 2, 16).tolist()) for i in range(6)]
    truth = truth_of(records, head=30.0)
    root, _ = copy_of_mpii(val=records, truth=truth)
    data = Mpii(str(root), workers=0)
    data.setup("validate")
    noise = rng.normal(0, 8, (6, 16, 2))
    metric = data.metric()
    for batch in data.val_dataloader():
        image = np.array([p["joints"] for p in records])[batch["id"]] - 1 + noise[batch["id"]]
        points = [apply(invert(m.numpy().astype(float)), k) for m, k in zip(batch["to_image"], image, strict=True)]
        metric.update({"keypoints": torch.tensor(np.stack(points)), "score": torch.ones(len(image), 16)}, batch)
    predictions = (np.array([p["joints"] for p in records]) - 1 + noise) + 1.0
    visible = 1 - truth["jnt_missing"]
    error = np.linalg.norm(predictions.transpose(1, 2, 0) - truth["pos_gt_src"], axis=1)
    head = 0.6 * np.linalg.norm(truth["headboxes_src"][1] - truth["headboxes_src"][0], axis=0)
    met = ((error / head <= 0.5) & (visible > 0)).sum(1)
    count = visible.sum(1)
    counted = [j for j in range(16) if j not in (6, 7)]
    expected = (100 * met / count)[counted] @ (count[counted] / count[counted].sum())
    assert float(metric.compute()["PCKh@0.5"]) == pytest.approx(expected, abs=1e-3)


def test_without_ground_truth_file_the_head_is_its_joints(copy_of_mpii):
    rng = np.random.default_rng(2)
    headless = person(1, rng, joints_vis=[1] * 9 + [0] + [1] * 6)
    root, _ = copy_of_mpii(val=[person(0, rng), headless])
    data = Mpii(str(root), workers=0)
    with pytest.warns(UserWarning, match="not the official figure"):
        data.setup("validate")
    whole, lacking = data.datasets["val"].instances
    assert whole.norm == pytest.approx(np.linalg.norm(whole.keypoints[9] - whole.keypoints[8]))
    assert np.isnan(lacking.norm)
    with pytest.warns(UserWarning, match="1 of 2 people have no head size"):
        assert perfect(data)["PCKh@0.5"] == 100
    assert lacking.visible.any()  # only the metric leaves them out


FAULTS = {
    "image": ({"image": "gone.jpg"}, "gone.jpg"),
    "joints": ({"joints": [[1.0, 2.0]] * 15}, "`joints` missing, not finite, or not of shape [16, 2]"),
    "joints_vis": ({"joints_vis": [1] * 17}, "`joints_vis` missing"),
    "nan": ({"center": [float("nan"), 3.0]}, "`center` missing, not finite"),
    "text": ({"scale": "big"}, "`scale` missing"),
    "scale": ({"scale": 0.0}, "scale that is not positive"),
}


@pytest.mark.parametrize("kind", FAULTS)
def test_fault_is_told(copy_of_mpii, kind):
    change, message = FAULTS[kind]
    root, persons = copy_of_mpii()
    copy_of_mpii(train=[persons[0], persons[1] | change])
    with pytest.raises(DataError) as caught:
        Mpii(str(root)).setup("fit")
    assert message in str(caught.value)
    assert "gone.jpg" in str(caught.value) or "person 1 (000000000.jpg)" in str(caught.value)


def test_all_faults_of_both_files_at_once(copy_of_mpii, capsys):
    root, persons = copy_of_mpii()
    bad = [persons[0] | change for change, _ in FAULTS.values()]
    copy_of_mpii(train=bad, val=bad)
    with pytest.raises(DataError) as caught:
        Mpii(str(root)).setup("fit")
    for _, message in FAULTS.values():
        assert str(caught.value).count(message) >= 2
    assert main(["check", str(root)]) == 1
    assert "human-pose.mpi-inf.mpg.de" in capsys.readouterr().out


def test_faulty_ground_truth_file(copy_of_mpii):
    root, persons = copy_of_mpii()
    headless, infinite = truth_of(persons), truth_of(persons)
    headless["headboxes_src"][:, :, 2] = 0
    infinite["pos_gt_src"][4, 0, 3] = np.inf
    for truth, message in [
        (truth_of(persons[:-1]), "another number of persons than the json"),
        (headless, "no head size in gt_valid.mat"),
        (infinite, "joints that are not finite"),
        (truth_of(persons[::-1]), "rows or joints are in another order"),
        ({"x": np.zeros(3)}, "not MPII's gt_valid.mat"),
    ]:
        copy_of_mpii(truth=truth)
        with pytest.raises(DataError, match=message):
            Mpii(str(root)).setup("validate")
    (root / "annot/gt_valid.mat").write_bytes(b"no matlab")
    with pytest.raises(DataError, match=r"not MPII's gt_valid\.mat"):
        Mpii(str(root)).setup("validate")


def test_ground_truth_file_belongs_to_val_alone(copy_of_mpii):
    root, persons = copy_of_mpii()
    copy_of_mpii(truth=truth_of(persons))
    shutil.copy(root / "annot/valid.json", root / "annot/own.json")
    official, own = Mpii(str(root)), Mpii(str(root), test="annot/own.json")
    for data in (official, own):
        data.setup("test")
    assert official.datasets["test"].instances[0].norm == pytest.approx(12)
    assert own.datasets["test"].instances[0].norm != pytest.approx(12)


def test_check_command(copy_of_mpii, tmp_path_factory, capsys):
    root, persons = copy_of_mpii()
    assert main(["check", str(root)]) == 0
    assert "gt_valid.mat is missing" in capsys.readouterr().out  # a note: it can be trained without
    copy_of_mpii(truth=truth_of(persons))
    assert main(["check", str(root)]) == 0
    assert "missing" not in capsys.readouterr().out
    assert main(["check", str(tmp_path_factory.mktemp("empty"))]) == 1
    told = capsys.readouterr().out
    for part in ("train.json", "valid.json", "images that are not in", "human-pose.mpi-inf.mpg.de", "official HRNet"):
        assert part in told
    (root / "annot/valid.json").write_text('{"images": []}')
    assert main(["check", str(root)]) == 1
    assert "not a list of persons" in capsys.readouterr().out


def test_real_samples():
    if "HRNET_TEST_DATA" not in os.environ:
        pytest.skip("HRNET_TEST_DATA is not set")
    root = Path(os.environ["HRNET_TEST_DATA"]) / "keypoint-formats/mpii"
    data = Mpii(str(root), train="test_mpii.json", val="test_mpii.json", images="", ground_truth=None, workers=0)
    data.setup("fit")
    data.setup("validate")
    records = json.loads((root / "test_mpii.json").read_text())
    dataset = data.datasets["val"]
    assert len(dataset) == len(records) == 5
    for sample, record, instance in zip(map(dataset.__getitem__, range(5)), records, dataset.instances, strict=True):
        matrix = official_matrix(record["center"], record["scale"], (256, 256))
        seen = np.array(record["joints_vis"]) > 0
        np.testing.assert_allclose(
            sample["keypoints"][seen], apply(matrix, np.array(record["joints"]) - 1)[seen], atol=1e-3
        )
        # The same square of pixels, but for cv2's own rounding to a 32nd of a pixel.
        expected = warp(dataset.read(instance.path), matrix, (256, 256)).transpose(2, 0, 1)
        assert np.abs(sample["image"].astype(int) - expected).mean() < 0.1
        assert ((sample["keypoints"][seen] > 0) & (sample["keypoints"][seen] < 256)).mean() > 0.9
    assert perfect(data)["PCKh@0.5"] == 100
