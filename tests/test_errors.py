"""Error types: hand-made cases with known answers, and properties."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from datamodules import box_errors, pose_errors
from datamodules.box_ap import BoxAP, encoded
from datamodules.box_data import coco_of
from datamodules.boxes import Boxed
from datamodules.calibration import Reliability
from datamodules.iou import MeanIoU
from datamodules.keypoints import Instance
from datamodules.mask_errors import LabelErrors, MaskErrors, edge_distance, most_confused
from datamodules.pose_errors import PoseErrors, keypoint_errors
from datamodules.similarity import oks
from tasks.pose import COCO

K, SIGMAS = len(COCO.names), np.array(COCO.sigmas)
AREA = 100.0**2


def person(rng, at):
    """Keypoints `[K, 2]` far enough from each other that none is near another's place."""
    grid = np.stack(np.meshgrid(np.arange(5), np.arange(4)), -1).reshape(-1, 2)[:K]
    return np.asarray(at) + 100.0 * rng.permutation(grid)


def kinds(pose, people, own=0, visible=None):
    stacked = np.array([np.c_[p, np.full(K, 2.0) if visible is None else visible] for p in people])
    kind, similarity = keypoint_errors(pose, stacked, np.full(len(people), AREA), own, SIGMAS, COCO.flip_index)
    return [pose_errors.KINDS[k] if k >= 0 else "" for k in kind], similarity


def away(similarity):
    """Distances in pixels at which a keypoint has this similarity."""
    return np.sqrt(-np.log(similarity) * 2 * AREA) * 2 * SIGMAS


def test_a_mirrored_pose_has_inversions_only():
    pose = person(np.random.default_rng(0), (0, 0))
    found, _ = kinds(pose[COCO.flip_index], [pose])
    assert found == ["good"] + ["inversion"] * (K - 1)  # a nose is its own partner


@pytest.mark.parametrize(
    ("similarity", "kind"), [(1, "good"), (0.851, "good"), (0.849, "jitter"), (0.501, "jitter"), (0.499, "miss")]
)
def test_a_shift_by_a_known_amount(similarity, kind):
    pose = person(np.random.default_rng(1), (0, 0))
    direction = np.array([0.6, 0.8])
    found, value = kinds(pose + away(similarity)[:, None] * direction, [pose])
    assert set(found) == {kind}
    np.testing.assert_allclose(value, similarity, atol=1e-6)


def test_a_neighbours_keypoints_are_swaps():
    rng = np.random.default_rng(2)
    people = [person(rng, (0, 0)), person(rng, (1000, 0)), person(rng, (0, 1000))]
    pose = people[0].copy()
    pose[3], pose[5], pose[8] = people[1][3], people[2][COCO.flip_index[5]], people[2][9]
    found, _ = kinds(pose, people)
    assert [found[i] for i in (3, 5, 8)] == ["swap", "swap", "miss"]  # a wrist is not an elbow's counterpart
    assert found.count("good") == K - 3
    alone, _ = kinds(pose, people[:1])
    assert [alone[i] for i in (3, 5, 8)] == ["miss"] * 3


def test_unlabelled_keypoints_are_no_errors_and_no_places():
    pose = person(np.random.default_rng(3), (0, 0))
    visible = np.full(K, 2.0)
    visible[5] = 0
    wrong = pose.copy()
    wrong[6] = pose[5]  # the left shoulder's place, which is not labelled
    found, similarity = kinds(wrong, [pose], visible=visible)
    assert found[5] == ""
    assert found[6] == "miss"
    assert np.isnan(similarity[5])


def posed(count=6, images=3):
    rng = np.random.default_rng(4)
    instances = []
    for i in range(count):
        points = person(rng, (700 * (i // images), 0)) + rng.uniform(-5, 5, (K, 2))
        visible = rng.choice([0.0, 1, 2], K, p=[0.2, 0.2, 0.6])
        box = np.array([0, 0, 500, 400], float)
        instances.append(Instance(f"{i % images}.jpg", i % images, box, points, visible, i, area=AREA))
    return instances


def test_perfect_poses_have_no_error():
    instances = posed()
    errors = PoseErrors(instances, COCO)
    for i, instance in enumerate(instances):
        assert errors.add(i, instance.keypoints, np.ones(K)) == (pytest.approx(1), "all good")
    numbers = errors.numbers()
    labelled = sum(int((i.visible > 0).sum()) for i in instances)
    assert numbers["counts"] == {"good": labelled, "jitter": 0, "inversion": 0, "swap": 0, "miss": 0}
    assert numbers["mean OKS"] == pytest.approx(1)
    assert numbers["people without a pose"] == 0
    assert numbers["calibration"]["pose"]["ece"] == pytest.approx(0)


@given(st.integers(0, 10**6), st.floats(1, 300))
def test_pose_counts_sum_up(seed, noise):
    rng, instances = np.random.default_rng(seed), posed()
    errors = PoseErrors(instances, COCO)
    for i, instance in enumerate(instances):
        pose = instance.keypoints + rng.normal(0, noise, (K, 2))
        judged = errors.add(i, pose, rng.random(K))
        seen = instance.visible > 0
        expected = oks(pose[seen], instance.keypoints[seen], np.array(AREA), SIGMAS[seen])
        assert judged[0] == pytest.approx(float(expected), abs=1e-9)
    numbers = errors.numbers()
    labelled = sum(int((i.visible > 0).sum()) for i in instances)
    assert sum(numbers["counts"].values()) == labelled == numbers["calibration"]["keypoint"]["count"]
    for kind, count in numbers["counts"].items():
        assert count == sum(row[kind] for row in numbers["keypoints"].values())
    assert sum(numbers["OKS lost"].values()) == pytest.approx(1 - numbers["mean OKS"])
    json.dumps(numbers)


def test_of_a_detectors_boxes_the_surest_pose_counts_and_strangers_do_not():
    people = posed(2, 1)
    truth = [
        {"image_id": p.image_id, "keypoints": np.c_[p.keypoints, p.visible].ravel().tolist(), "area": p.area}
        for p in people
    ]
    blank = [
        Instance("0.jpg", 0, p.box, np.zeros((K, 2)), np.zeros(K), score=s)
        for p, s in zip([*people] * 2, (0.9, 0.9, 0.5, 0.5))
    ]
    errors = PoseErrors(blank, COCO, truth)
    shift = away(0.7)[:, None] * [1, 0]
    assert errors.add(0, people[0].keypoints, np.ones(K))[1] == "all good"
    assert errors.add(2, people[0].keypoints + shift, np.ones(K))[1].startswith("jitter: ")  # the same one, less sure
    assert errors.add(3, people[0].keypoints + 5000, np.ones(K)) is None
    numbers = errors.numbers()
    assert numbers["poses"] == numbers["poses of nobody"] == numbers["people without a pose"] == 1
    assert numbers["counts"]["jitter"] == 0


TRUE = np.array([[0, 0, 100, 100], [200, 0, 300, 100], [0, 200, 100, 300]], float)
CLASSES = np.array([0, 1, 1])


def box_kinds(boxes, labels, scores=None, crowd=None):
    scores = np.linspace(0.9, 0.5, len(boxes)) if scores is None else np.array(scores)
    crowd = np.zeros(3, bool) if crowd is None else np.array(crowd)
    iou = box_errors.overlap(np.array(boxes, float).reshape(-1, 4), Boxed("a", 0, 400, 400, TRUE, CLASSES, crowd))
    found = box_errors.box_errors(iou, np.array(labels, int), scores, CLASSES, crowd)
    return [box_errors.KINDS[k] for k in found[0]], found[1].tolist(), found[2].tolist()


def test_perfect_boxes_have_no_error():
    assert box_kinds(TRUE, CLASSES) == (["right"] * 3, [0, 1, 2], [False] * 3)


@pytest.mark.parametrize(
    ("box", "label", "kind", "missed"),
    [
        ([0, 0, 100, 100], 1, "classification", [False, True, True]),
        ([0, 0, 100, 40], 0, "localisation", [False, True, True]),  # IoU 0.4
        ([0, 0, 100, 40], 1, "both", [True, True, True]),
        ([0, 0, 100, 5], 0, "background", [True, True, True]),  # IoU 0.05
        ([500, 500, 600, 600], 0, "background", [True, True, True]),
    ],
)
def test_one_box_of_each_kind(box, label, kind, missed):
    found, _, left = box_kinds([box], [label])
    assert found == [kind]
    assert left == missed


def test_duplicates_and_what_the_surer_box_takes():
    twice = np.repeat(TRUE, 2, axis=0)
    found, _, missed = box_kinds(twice, np.repeat(CLASSES, 2), [0.9, 0.8, 0.3, 0.7, 0.6, 0.6])
    assert found == ["right", "duplicate", "duplicate", "right", "right", "duplicate"]
    assert not any(missed)


def test_crowds_are_ignored_and_nothing_found_is_missed():
    found, _, missed = box_kinds([[10, 10, 20, 20], [10, 10, 20, 20]], [0, 1], crowd=[True, False, False])
    assert found == ["ignored", "background"]
    assert missed == [False, True, True]
    assert box_kinds([], [])[2] == [True] * 3


@st.composite
def scenes(draw):
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    instances, found = [], []
    for i in range(4):
        n = int(rng.integers(0, 5))
        corner, size = rng.uniform(0, 120, (n, 2)), rng.uniform(15, 70, (n, 2))
        crowd = rng.random(n) < 0.15
        instances.append(Boxed(f"{i}.jpg", i, 200, 200, np.c_[corner, corner + size], rng.integers(0, 3, n), crowd))
        copies = rng.integers(0, n, 3 * n) if n else np.zeros(0, int)
        boxes = instances[i].boxes[copies] + rng.normal(0, 10, (len(copies), 4))
        boxes = np.r_[boxes, [[150, 150, 170, 170]]].clip(0, 200)
        boxes[:, 2:] = np.maximum(boxes[:, 2:], boxes[:, :2] + 1)
        labels = np.r_[instances[i].labels[copies], 0]
        other = rng.random(len(labels)) < 0.3
        labels[other] = rng.integers(0, 3, other.sum())
        found.append((boxes.astype(np.float32), labels, rng.permutation(len(boxes)) / len(boxes) * 0.9 + i / 1000))
    return instances, found


@given(scenes())
def test_box_counts_sum_up_and_ap_is_cocos(scene):
    instances, found = scene
    errors = box_errors.BoxErrors(instances, ["a", "b", "c"], threshold=0)
    metric = BoxAP(coco_of(instances, ["a", "b", "c"], [1, 2, 3]), range(4), [1, 2, 3], ["a", "b", "c"])
    for i, (boxes, labels, scores) in enumerate(found):
        f1, _ = errors.add(i, boxes.astype(np.float64), labels, scores)
        assert 0 <= f1 <= 1
        batch = {
            "id": torch.tensor([i]),
            "original": torch.tensor([[200, 200]]),
            "to_image": torch.eye(3)[None, :2],
        }
        columns = {"boxes": boxes, "labels": labels, "scores": scores}
        metric.update({k: [torch.from_numpy(v)] for k, v in columns.items()}, batch)
    numbers = errors.numbers()
    counts = numbers["counts"]
    objects = sum(int((~i.crowd).sum()) for i in instances)
    assert sum(counts[k] for k in box_errors.KINDS) == sum(len(f[0]) for f in found)
    assert objects == sum(row["objects"] for row in numbers["classes"].values())
    assert counts["right"] + counts["missed"] <= objects
    for kind, count in counts.items():
        assert count == sum(row[kind] for row in numbers["classes"].values())
    expected = float(metric.compute()["AP50"])
    if objects:
        assert numbers["AP50"] == pytest.approx(expected, abs=1e-6)
        assert max(numbers["AP50 gained"].values()) <= 1 - numbers["AP50"] + 1e-9
    json.dumps(numbers)


@given(scenes())
def test_rectangular_masks_have_the_errors_of_their_boxes(scene):
    def polygons(boxes):
        return [[[x0, y0, x1, y0, x1, y1, x0, y1]] for x0, y0, x1, y1 in boxes.tolist()]

    boxes, masks = (box_errors.BoxErrors(scene[0], ["a", "b", "c"]) for _ in range(2))
    for i, (found, labels, scores) in enumerate(scene[1]):
        truth = scene[0][i]
        truth.boxes[:] = truth.boxes.round()
        truth.segmentations[:] = polygons(truth.boxes)
        whole = found.astype(np.float64).round()
        codes = [encoded(each, 200, 200) for each in polygons(whole)]
        assert boxes.add(i, whole, labels, scores) == masks.add(i, codes, labels, scores)
    np.testing.assert_equal(boxes.numbers(), masks.numbers())


def boxes_of(errors, *found):
    for i, (boxes, labels, scores) in enumerate(found):
        errors.add(i, np.array(boxes, float), np.array(labels), np.array(scores))
    return errors.numbers()


def test_mending_the_only_error_there_is_gives_all_of_ap():
    """AP of one class with two objects, of which one is found by another name, place, or not at all."""
    truth = [Boxed("a", 0, 400, 400, TRUE[1:], CLASSES[1:] - 1, np.zeros(2, bool))]
    cases = {
        "classification": ([TRUE[1], TRUE[2]], [0, 1], [0.9, 0.8]),
        "localisation": ([TRUE[1], TRUE[2] - [0, 60, 0, 0] + [0, 0, 100, 0]], [0, 0], [0.9, 0.8]),
        "missed": ([TRUE[1]], [0], [0.9]),
    }
    for kind, found in cases.items():
        numbers = boxes_of(box_errors.BoxErrors(truth, ["thing", "other"]), found)
        assert numbers["AP50"] == pytest.approx(51 / 101)  # recall 0.5
        gains = numbers["AP50 gained"]
        assert gains.pop(kind) == pytest.approx(50 / 101)
        assert set(gains.values()) == {0.0}


def test_surer_rubbish_costs_precision():
    truth = [Boxed("a", 0, 400, 400, TRUE[:1], CLASSES[:1], np.zeros(1, bool))]
    for kind, box in (("background", [300, 300, 390, 390]), ("duplicate", TRUE[0])):
        numbers = boxes_of(box_errors.BoxErrors(truth, ["thing"]), ([box, TRUE[0] + 1], [0, 0], [0.9, 0.8]))
        expected = 0.5 if kind == "background" else 0
        assert numbers["AP50 gained"][kind] == pytest.approx(expected)
        assert numbers["counts"][kind] == 1


def test_distance_to_an_edge():
    label = np.zeros((6, 9), np.uint8)
    label[:, 4:] = 1
    assert edge_distance(label)[2].tolist() == [4, 3, 2, 1, 1, 2, 3, 4, 5]
    label[:, 4] = 255  # what is ignored parts them
    assert np.isinf(edge_distance(label)).all()
    assert np.isinf(edge_distance(np.zeros((4, 4), np.uint8))).all()


def test_a_shifted_region_is_wrong_at_its_boundary_only():
    truth = np.zeros((60, 80), np.uint8)
    truth[:, 40:] = 1
    shifted = np.zeros_like(truth)
    shifted[:, 43:] = 1
    errors = MaskErrors(["a", "b", "c"])
    score, text = errors.add(truth, shifted, np.where(shifted == truth, 1.0, 0.0))
    numbers = errors.numbers()
    assert [b["wrong"] for b in numbers["boundary"].values()] == [60, 60, 60, 0, 0, 0]
    assert sum(b["pixels"] for b in numbers["boundary"].values()) == 60 * 80 == numbers["pixels"]
    assert numbers["confused"] == [
        {"label": "b", "taken for": "a", "count": 180, "of the label": 180 / 2400, "of all errors": 1.0}
    ]
    assert numbers["IoU"]["a"] == pytest.approx(2400 / 2580)
    assert np.isnan(numbers["IoU"]["c"])
    assert score == pytest.approx((2400 / 2580 + 2220 / 2400) / 2)
    assert text.startswith("3.8% of its pixels are wrong (b taken for a: 3.8%)")
    assert numbers["calibration"]["pixel"]["ece"] == 0


@given(st.integers(0, 10**6))
def test_mask_counts_sum_up_and_iou_is_the_metrics(seed):
    rng = np.random.default_rng(seed)
    names = ["a", "b", "c", "d"]
    errors, metric = MaskErrors(names), MeanIoU(names, boundary=0)
    for i in range(3):
        truth = np.kron(rng.choice([0, 1, 2, 255], (4, 5)), np.ones((5, 5))).astype(np.uint8)
        guess = np.where(rng.random(truth.shape) < 0.3, rng.integers(0, 4, truth.shape), truth % 4).astype(np.uint8)
        errors.add(truth, guess, rng.random(truth.shape))
        columns = {"label": guess}, {"mask": truth, "id": np.array(i)}
        metric.update(*({k: torch.from_numpy(np.asarray(v))[None] for k, v in c.items()} for c in columns))
    numbers = errors.numbers()
    assert errors.confusion.tolist() == metric.confusion().tolist()
    assert numbers["wrong"] == errors.confusion.sum() - errors.confusion.trace()
    assert sum(b["pixels"] for b in numbers["boundary"].values()) == numbers["calibration"]["pixel"]["count"]
    for name, iou in numbers["IoU"].items():
        assert iou == pytest.approx(float(metric.compute()[f"IoU/{name}"]), nan_ok=True)


def test_perfect_masks_and_ignored_ones():
    errors = MaskErrors(["a", "b"])
    label = np.eye(20, dtype=np.uint8)
    assert errors.add(label, label) == (1.0, "0.0% of its pixels are wrong")
    score, text = errors.add(np.full((4, 4), 255, np.uint8), np.zeros((4, 4), np.uint8))
    assert np.isnan(score)
    assert text == "all of it is ignored"
    numbers = errors.numbers()
    assert numbers["wrong"] == 0
    assert numbers["confused"] == []
    assert numbers["pixels"] == 400


def test_pictures_taken_for_others():
    errors = LabelErrors(["a", "b", "c"])
    assert errors.add(0, np.array([0.7, 0.2, 0.1])) == (0.7, "a, found")
    assert errors.add(1, np.array([0.75, 0.2, 0.05])) == (0.2, "b taken for a (0.75)")
    assert errors.add(-1, np.array([0.7, 0.2, 0.1])) is None
    numbers = errors.numbers()
    assert numbers["confusion"] == [[1, 0, 0], [1, 0, 0], [0, 0, 0]]
    assert numbers["wrong"] == 1
    assert numbers["classes"]["a"] == {"pictures": 1, "recall": 1.0, "precision": 0.5}
    assert numbers["confused"] == most_confused(np.array(numbers["confusion"]), ["a", "b", "c"])


def test_reliability():
    sure, right = (
        np.r_[np.full(80, 0.75), np.full(20, 0.25), np.nan],
        np.r_[np.arange(80) < 60, np.arange(20) < 10, True],
    )
    diagram = Reliability(10)
    diagram.add(sure[:50], right[:50])
    diagram.add(sure[50:], right[50:])
    numbers = diagram.numbers()
    assert numbers["count"] == 100
    assert numbers["ece"] == pytest.approx(0.2 * 0.25)  # those of 0.75 keep their word
    assert numbers["counts"][7] == 80
    assert numbers["right"][2] == 0.5
    assert numbers["right"][0] is None
    edge = Reliability()
    edge.add(np.array([1.0, 1.7, -0.2]), np.array([True, True, False]))  # heatmaps go beyond 0 to 1
    assert edge.numbers()["ece"] == 0
    assert np.isnan(Reliability().numbers()["ece"])
