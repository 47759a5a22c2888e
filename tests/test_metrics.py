"""The metrics against loops written from the official rules, and against pycocotools itself."""

import copy
import json
import math
import os
import pickle
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from datamodules.metrics import (
    COCO_STATS,
    KeypointAP,
    KeypointError,
    PCKh,
)
from datamodules.similarity import oks, oks_nms, soft_oks_nms

SIGMAS = np.array([26, 25, 25, 35, 35, 79, 79, 72, 72, 62, 62, 107, 107, 87, 87, 89, 89]) / 1000
SIZE = (32, 24)  # height, width of the input


@dataclass
class Instance:
    image_id: int
    id: int
    category_id: int
    box: np.ndarray
    keypoints: np.ndarray
    visible: np.ndarray
    score: float = 1.0
    area: float = float("nan")
    norm: float = float("nan")
    path: str = ""


def make_instances(count=40, k=17, seed=0, categories=1, images=12, norm=True):
    rng = np.random.default_rng(seed)
    made = []
    for i in range(count):
        x, y, w, h = *rng.uniform(0, 300, 2), *rng.uniform(20, 160, 2)
        keypoints = np.array([x, y]) + rng.uniform(0, 1, (k, 2)) * [w, h]
        visible = rng.integers(0, 3, k) * (rng.random() > 0.1)
        made.append(
            Instance(
                image_id=int(rng.integers(1, images + 1)),
                id=i,  # begins at 0, as some files do
                category_id=int(rng.integers(1, categories + 1)),
                box=np.array([x, y, w, h]),
                keypoints=keypoints,
                visible=visible,
                area=float(w * h * rng.uniform(0.4, 0.8)),
                norm=float(rng.uniform(10, 40)) if norm else float("nan"),
            )
        )
    return made


def twins(instances):
    """Every instance twice, the second one with a lower box score: work for the suppression."""
    return instances + [replace(i, score=0.7) for i in instances]


def make_batch(instances, ids, noise=0.0, score=None, seed=0):
    """A prediction `noise` times the box size off, and the batch; equal ids get equal ones."""
    linear, points, scores = [], [], []
    for i in ids:
        rng = np.random.default_rng([seed, i])
        instance = instances[i]
        x, y, w, h = instance.box
        matrix = np.array([[w / SIZE[1], 0.1, x], [-0.1, h / SIZE[0], y]])
        matrix += rng.normal(0, 0.01, (2, 3))
        target = instance.keypoints + rng.normal(0, noise + 1e-9, instance.keypoints.shape) * [w, h]
        linear.append(matrix)
        points.append(np.linalg.solve(matrix[:, :2], (target - matrix[:, 2]).T).T)
        random = rng.uniform(0, 1, len(target))
        scores.append(random if score is None else np.full(len(target), score))
    batch = {
        "id": torch.tensor(ids, dtype=torch.long),
        "image": torch.zeros(len(ids), 3, *SIZE, dtype=torch.uint8),
        "to_image": torch.tensor(np.array(linear), dtype=torch.float32),
    }
    prediction = {
        "keypoints": torch.tensor(np.array(points), dtype=torch.float32),
        "score": torch.tensor(np.array(scores), dtype=torch.float32),
    }
    return prediction, batch


def fill(metric, order, size=7, **kwargs):
    for start in range(0, len(order), size):
        metric.update(*make_batch(metric.instances, list(order[start : start + size]), **kwargs))
    return metric


def numbers(metric):
    return {k: v.item() for k, v in metric.compute().items()}


def same(a, b):
    assert a.keys() == b.keys()
    assert all(a[k] == b[k] or (math.isnan(a[k]) and math.isnan(b[k])) for k in a), (a, b)


# --- OKS and suppression, against loops ---------------------------------------------------------


def loop_oks(a, b, area_a, area_b, sigmas):
    total = 0.0
    for k in range(len(sigmas)):
        squared = (a[k][0] - b[k][0]) ** 2 + (a[k][1] - b[k][1]) ** 2
        e = squared / (2 * sigmas[k]) ** 2 / ((area_a + area_b) / 2 + np.spacing(1)) / 2
        total += math.exp(-e)
    return total / len(sigmas)


def loop_nms(keypoints, scores, areas, sigmas, threshold):
    left = sorted(range(len(scores)), key=lambda i: -scores[i])
    keep = []
    while left:
        best = left.pop(0)
        keep.append(best)
        rest = []
        for i in left:
            if loop_oks(keypoints[best], keypoints[i], areas[best], areas[i], sigmas) <= threshold:
                rest.append(i)
        left = rest
    return keep


def loop_soft(keypoints, scores, areas, sigmas, threshold, most):
    left = dict(enumerate(scores))
    keep = []
    while left and len(keep) < most:
        best = max(left, key=left.get)
        keep.append(best)
        del left[best]
        for i in left:
            overlap = loop_oks(keypoints[best], keypoints[i], areas[best], areas[i], sigmas)
            left[i] *= math.exp(-(overlap**2) / threshold)
    return keep


@pytest.mark.parametrize("seed", range(8))
def test_suppression_is_that_of_plain_loops(seed):
    rng = np.random.default_rng(seed)
    k, n = [17, 4][seed % 2], 30
    sigmas = rng.uniform(0.03, 0.1, k)
    centers = rng.uniform(0, 100, (6, k, 2))
    noise = rng.normal(0, 1, (n, k, 2)) * rng.uniform(0, 8, (n, 1, 1))
    poses = centers[rng.integers(0, 6, n)] + noise
    scores, areas = rng.random(n), rng.uniform(500, 9000, n)
    pair = oks(poses[:, None], poses[None], (areas[:, None] + areas) / 2, sigmas)
    both = list(zip(poses, areas, strict=True))
    loop = [[loop_oks(a, b, area_a, area_b, sigmas) for b, area_b in both] for a, area_a in both]
    np.testing.assert_allclose(pair, loop, rtol=1e-12)
    for threshold in (0.9, 0.3):
        arguments = (poses, scores, areas, sigmas, threshold)
        hard = oks_nms(*arguments)
        assert hard.tolist() == loop_nms(*arguments)
        assert soft_oks_nms(*arguments).tolist() == loop_soft(*arguments, 20)
        assert soft_oks_nms(*arguments, max_detections=5).tolist() == loop_soft(*arguments, 5)
    assert 1 < len(oks_nms(*arguments)) < n  # both cases occur
    groups = np.arange(n) // 10 * 3  # several images at once
    each = [
        10 * g + loop_np
        for g in range(3)
        for loop_np in loop_nms(*(x[10 * g : 10 * g + 10] for x in arguments[:3]), sigmas, 0.3)
    ]
    assert oks_nms(*arguments, groups).tolist() == each


def test_suppression_of_nothing_and_of_equals():
    empty = np.zeros((0, 3, 2)), np.zeros(0), np.zeros(0), np.ones(3)
    assert oks_nms(*empty).size == soft_oks_nms(*empty).size == 0
    equal = np.zeros((3, 3, 2)), np.zeros(3), np.ones(3), np.ones(3)
    assert oks_nms(*equal).tolist() == [0]  # the first of equal ones, also with score 0
    assert soft_oks_nms(*equal).tolist() == [0, 1, 2]


# --- COCO AP ------------------------------------------------------------------------------------


def ground_truth_of(instances, images=12):
    return {
        "images": [{"id": i} for i in range(1, images + 1)],
        "categories": [{"id": c} for c in sorted({i.category_id for i in instances})],
        "annotations": [
            {
                "id": i.id + 1,
                "image_id": i.image_id,
                "category_id": i.category_id,
                "bbox": i.box.tolist(),
                "area": i.area,
                "iscrowd": int(i.id % 11 == 0),
                "keypoints": np.c_[i.keypoints, i.visible].ravel().tolist(),
                "num_keypoints": int((i.visible > 0).sum()),
            }
            for i in instances
        ],
    }


def independent(truth, results, folder, sigmas, images=None):
    """pycocotools as its manual says, through files."""
    (folder / "truth.json").write_text(json.dumps(truth))
    (folder / "results.json").write_text(json.dumps(results))
    coco = COCO(str(folder / "truth.json"))
    evaluator = COCOeval(coco, coco.loadRes(str(folder / "results.json")), "keypoints")
    evaluator.params.kpt_oks_sigmas = np.array(sigmas)
    if images is not None:
        evaluator.params.imgIds = images
    evaluator.evaluate()
    evaluator.accumulate()
    evaluator.summarize()
    return evaluator.stats


@pytest.mark.parametrize("backend", ["numpy", "pycocotools", "faster"])
@pytest.mark.parametrize(
    ("k", "categories", "nms"),
    [(17, 1, "oks"), (4, 3, "soft"), (17, 2, None)],
)
def test_ap_is_that_of_a_separate_pycocotools_run(tmp_path, capfd, k, categories, nms, backend):
    if backend == "faster":
        pytest.importorskip("faster_coco_eval")
    truth_of = make_instances(60, k, categories=categories)
    truth = ground_truth_of(truth_of)
    before = copy.deepcopy(truth)
    sigmas = SIGMAS[:k]
    metric = KeypointAP(twins(truth_of), truth, sigmas.tolist(), nms=nms, backend=backend)
    order = np.random.default_rng(1).permutation(120)
    fill(metric, [*order, *order[:30]], noise=0.04)
    capfd.readouterr()
    ours = numbers(metric)
    assert capfd.readouterr() == ("", "")  # silent
    results = metric.results()
    assert len(results) == (120 if nms is None else len(results)) <= 120
    assert set(results[0]) == {"image_id", "category_id", "keypoints", "score"}
    assert truth == before
    stats = independent(truth, results, tmp_path, sigmas)
    np.testing.assert_allclose([ours[name] for name in COCO_STATS], stats, atol=1e-6)
    assert 0.05 < ours["AP"] < 0.95
    same(ours, numbers(metric))  # the evaluation leaves nothing behind


@pytest.mark.parametrize("seed", range(4))
def test_results_follow_the_official_rescoring_and_suppression(seed):
    instances = make_instances(30, seed=seed, images=4)
    instances = twins([replace(i, score=0.9 - 0.01 * i.id) for i in instances])
    truth = ground_truth_of(instances[:30])
    metric = KeypointAP(instances, truth, SIGMAS.tolist(), "oks", 0.5, score_threshold=0.25)
    prediction, batch = make_batch(instances, list(range(60)), noise=0.02, seed=seed)
    prediction["score"][[3, 33]] = 0.25  # twins; not above the threshold: the pose scores 0
    metric.update(prediction, batch)
    expected = []
    matrix = batch["to_image"].double().numpy()
    points = prediction["keypoints"].double().numpy()
    for image_id in range(1, 5):
        people = []
        for i, instance in enumerate(instances):
            if instance.image_id != image_id:
                continue
            pose = [matrix[i] @ [x, y, 1] for x, y in points[i]]
            good = [s for s in prediction["score"][i].tolist() if s > 0.25]
            score = instance.score * (sum(good) / len(good) if good else 0)
            area = abs(np.linalg.det(matrix[i][:, :2])) * SIZE[0] * SIZE[1]
            people.append((pose, score, area, i))
        poses, scores, areas, _ = zip(*people, strict=True)
        for n in loop_nms(poses, scores, areas, SIGMAS, 0.5):
            triples = np.c_[np.array(poses[n]), prediction["score"][people[n][3]]]
            expected.append((image_id, scores[n], triples.ravel()))
    results = metric.results()
    assert [r["image_id"] for r in results] == [e[0] for e in expected]
    assert 30 <= len(results) < 60
    np.testing.assert_allclose([r["score"] for r in results], [e[1] for e in expected], atol=1e-6)
    found = [r["keypoints"] for r in results]
    np.testing.assert_allclose(found, [e[2] for e in expected], atol=1e-3)
    assert all(type(v) is float for r in results for v in (*r["keypoints"], r["score"]))


def test_images_that_count(tmp_path):
    """All of the ground truth once all instances were seen, before that only the images seen."""
    instances = make_instances(40)
    truth = ground_truth_of(instances)
    boxes = [i for i in instances if i.image_id <= 10]  # a detector that missed two images
    metric = KeypointAP(boxes, truth, SIGMAS.tolist())
    fill(metric, range(len(boxes)), noise=0.03)
    stats = independent(truth, metric.results(), tmp_path, SIGMAS)
    np.testing.assert_allclose(list(numbers(metric).values()), stats, atol=1e-6)
    whole = numbers(metric)
    metric.reset()
    part = [i for i, box in enumerate(boxes) if box.image_id <= 9]
    fill(metric, part, noise=0.03)
    stats = independent(truth, metric.results(), tmp_path, SIGMAS, list(range(1, 10)))
    np.testing.assert_allclose(list(numbers(metric).values()), stats, atol=1e-6)
    assert numbers(metric)["AR"] > whole["AR"]


def test_ap_without_a_file_and_with_gaps_in_it():
    instances = make_instances(30)
    perfect = fill(KeypointAP(instances, None, SIGMAS.tolist()), range(30), score=1.0)
    assert numbers(perfect)["AP"] == 1
    truth = ground_truth_of(instances)
    for annotation in truth["annotations"]:
        gone = ["area", "iscrowd", "num_keypoints"]
        # Without keypoints the box is all there is to tell what to ignore.
        for key in gone + ["bbox"] * (annotation["num_keypoints"] > 0):
            del annotation[key]
    truth["annotations"].append({"id": 99, "image_id": 1, "category_id": 1, "bbox": [0, 0, 5, 5]})
    metric = KeypointAP(instances, truth, SIGMAS.tolist())
    made = metric.ground_truth["annotations"]
    assert [a["id"] for a in made] == list(range(1, 32))
    assert made[-1]["num_keypoints"] == 0
    assert made[-1]["area"] == pytest.approx(0.53 * 25)
    labelled = next(i for i, x in enumerate(instances) if x.visible.any())
    points = instances[labelled].keypoints[instances[labelled].visible > 0]
    low, size = points.min(0), np.ptp(points, axis=0)
    np.testing.assert_allclose(made[labelled]["bbox"], [*low, *size])
    assert "area" not in truth["annotations"][0]
    assert numbers(fill(metric, range(30), score=1.0))["AP"] == 1


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_ap_where_there_is_nothing():
    instances = make_instances(8)
    metric = KeypointAP(instances, None, SIGMAS.tolist())
    assert numbers(metric) == dict.fromkeys(COCO_STATS, 0.0)
    assert metric.results() == []
    small = [replace(i, area=2000.0, visible=np.ones(17)) for i in instances]
    found = numbers(fill(KeypointAP(small, None, SIGMAS.tolist()), range(8), score=1.0))
    assert found["APL"] == found["ARL"] == -1  # no such objects
    assert found["APM"] == found["AP"] == 1


def test_ap_rejects_what_does_not_fit():
    instances = make_instances(5)
    truth = ground_truth_of(instances)
    with pytest.raises(ValueError, match="17 keypoints, but 4 sigmas"):
        KeypointAP(instances, truth, [0.05] * 4)
    with pytest.raises(ValueError, match="unknown nms"):
        KeypointAP(instances, truth, SIGMAS.tolist(), nms="hard")
    metric = KeypointAP(instances, truth, SIGMAS.tolist())
    prediction, batch = make_batch(instances, [0, 1])
    with pytest.raises(ValueError, match="scores"):
        metric.update(prediction | {"score": prediction["score"][:, :5]}, batch)
    metric.update(prediction, batch | {"id": torch.tensor([0, 5])})
    with pytest.raises(IndexError):
        metric.compute()


@pytest.mark.parametrize(
    "file",
    [
        "coco-sample/annotations/person_keypoints_val2017.json",
        "keypoint-formats/coco/test_coco.json",
    ],
)
def test_ground_truth_fed_back_is_perfect(file, tmp_path):
    if "HRNET_TEST_DATA" not in os.environ:
        pytest.skip("HRNET_TEST_DATA is not set: no real annotations")
    path = Path(os.environ["HRNET_TEST_DATA"]) / file
    truth = json.loads(path.read_text())
    instances = []
    for a in truth["annotations"]:
        if a["iscrowd"] or not a["num_keypoints"]:
            continue
        points = np.array(a["keypoints"], dtype=float).reshape(-1, 3)
        box = np.array(a["bbox"])
        kinds = a["image_id"], a["id"], a["category_id"]
        instances.append(Instance(*kinds, box, points[:, :2], points[:, 2], area=a["area"]))
    metric = KeypointAP(instances, str(path), SIGMAS.tolist())
    found = numbers(fill(metric, range(len(instances)), score=1.0))
    assert [found[name] for name in COCO_STATS] == [1.0] * 10
    metric.reset()
    fill(metric, [*range(len(instances)), 0, 1], noise=0.03)
    stats = independent(truth, metric.results(), tmp_path, SIGMAS)
    np.testing.assert_allclose(list(numbers(metric).values()), stats, atol=1e-6)


# --- PCKh and distances, against loops ----------------------------------------------------------


def in_image(prediction, batch):
    m, p = batch["to_image"].double().numpy(), prediction["keypoints"].double().numpy()
    return [[m[i] @ [x, y, 1] for x, y in p[i]] for i in range(len(p))]


def test_pckh_is_that_of_plain_loops():
    instances = make_instances(50, 16)
    metric = PCKh(instances)
    prediction, batch = make_batch(instances, list(range(50)), noise=0.1)
    metric.update(prediction, batch)
    poses = in_image(prediction, batch)

    def pckh(threshold):
        right, count = [0] * 16, [0] * 16
        for pose, instance in zip(poses, instances, strict=True):
            for j in range(16):
                if instance.visible[j]:
                    d = math.dist(pose[j], instance.keypoints[j])
                    count[j] += 1
                    right[j] += d / instance.norm <= threshold
        share = [100 * r / c for r, c in zip(right, count, strict=True)]
        used = [j for j in range(16) if j not in (6, 7)]
        total = sum(count[j] for j in used)
        return share, sum(share[j] * count[j] / total for j in used)

    share, mean = pckh(0.5)
    expected = {
        "PCKh@0.5": mean,
        "PCKh@0.1": pckh(0.1)[1],
        "PCKh@0.11": pckh(0.11)[1],
        "Head": share[9],
        "Shoulder": (share[12] + share[13]) / 2,
        "Elbow": (share[11] + share[14]) / 2,
        "Wrist": (share[10] + share[15]) / 2,
        "Hip": (share[2] + share[3]) / 2,
        "Knee": (share[1] + share[4]) / 2,
        "Ankle": (share[0] + share[5]) / 2,
    }
    assert numbers(metric) == pytest.approx(expected, abs=1e-4)
    assert 5 < mean < 95


def test_pckh_needs_head_sizes_and_joints():
    with pytest.raises(ValueError, match="no head size for"):
        PCKh(make_instances(5, 16, norm=False))
    unseen = [replace(i, visible=np.zeros(16)) for i in make_instances(5, 16)]
    assert all(math.isnan(v) for v in numbers(fill(PCKh(unseen), range(5))).values())


def test_threshold_itself_is_right():
    one = make_instances(1, 16)[0]
    one = replace(one, keypoints=np.zeros((16, 2)), visible=np.ones(16), norm=16.0)
    prediction = {"keypoints": torch.zeros(1, 16, 2), "score": torch.ones(1, 16)}
    prediction["keypoints"][..., 0] = 8
    batch = {
        "id": torch.tensor([0]),
        "image": torch.zeros(1, 3, 4, 4),
        "to_image": torch.eye(3)[None, :2],
    }
    metric = PCKh([one])
    metric.update(prediction, batch)
    assert numbers(metric)["PCKh@0.5"] == 100
    error = KeypointError([one], thresholds=(0.49, 0.5))
    error.update(prediction, batch)
    assert numbers(error) == {"RMSE": 8, "MAE": 8, "NME": 0.5, "PCK@0.49": 0, "PCK@0.5": 1}


def test_without_a_norm_only_pixels_are_told():
    instances = make_instances(4, 5, norm=False)
    values = numbers(fill(KeypointError(instances), range(4)))
    assert {k for k, v in values.items() if math.isnan(v)} == {"PCK@0.2", "NME"}


def test_distances_are_those_of_plain_loops():
    instances = make_instances(30, 5, norm=True)
    metric = KeypointError(instances, thresholds=[0.05, 0.2])
    prediction, batch = make_batch(instances, list(range(30)), noise=0.1)
    metric.update(prediction, batch)
    distances, relative, means = [], [], []
    for pose, instance in zip(in_image(prediction, batch), instances, strict=True):
        length = instance.norm
        found = [math.dist(pose[j], instance.keypoints[j]) for j in range(5) if instance.visible[j]]
        distances += found
        relative += [d / length for d in found]
        if found:
            means.append(sum(found) / len(found) / length)
    n = len(distances)
    expected = {
        "RMSE": math.sqrt(sum(d * d for d in distances) / n),
        "MAE": sum(distances) / n,
        "NME": sum(means) / len(means),
        "PCK@0.05": sum(r <= 0.05 for r in relative) / n,
        "PCK@0.2": sum(r <= 0.2 for r in relative) / n,
    }
    assert numbers(metric) == pytest.approx(expected, rel=1e-5)


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_distances_without_labels_are_nan():
    instances = [replace(i, visible=np.zeros(17)) for i in make_instances(4)]
    assert all(math.isnan(v) for v in numbers(fill(KeypointError(instances), range(4))).values())
    assert all(math.isnan(v) for v in numbers(KeypointError(instances)).values())


# --- every sample once --------------------------------------------------------------------------


def all_metrics():
    people = make_instances(24, 16, images=5)
    sigmas = SIGMAS[:16].tolist()
    return [KeypointAP(people, None, sigmas), PCKh(people), KeypointError(people)]


@settings(max_examples=15, deadline=None)
@given(
    order=st.permutations(range(24)),
    repeated=st.lists(st.integers(0, 23), max_size=10),
    size=st.integers(1, 30),
)
def test_order_batches_and_repetition_do_not_matter(order, repeated, size):
    for metric, other in zip(all_metrics(), all_metrics(), strict=True):
        fill(metric, [*order, *repeated], size, noise=0.05)
        fill(other, range(24), 24, noise=0.05)
        same(numbers(metric), numbers(other))


def process(rank, folder):
    if rank:
        torch.set_num_threads(1)  # a forked process has no threads but its own
    store = f"file://{folder}/store"
    patience = timedelta(seconds=120)
    torch.distributed.init_process_group(
        "gloo",
        init_method=store,
        rank=rank,
        world_size=2,
        timeout=patience,
    )
    # Uneven, repeated within and between the processes; then one process that saw nothing.
    shares = [([*range(9), 3, 4], range(7, 24)), (range(24), [])]
    found = []
    for share in shares:
        for metric in all_metrics():
            fill(metric, list(share[rank]), size=5, noise=0.05)
            found.append(numbers(metric))
            same(found[-1], numbers(metric))
            if isinstance(metric, KeypointAP):
                found.append(metric.results())
    Path(folder, f"{rank}.pickle").write_bytes(pickle.dumps(found))
    torch.distributed.destroy_process_group()


def test_two_processes_find_what_one_finds(tmp_path):
    other = torch.multiprocessing.get_context("fork").Process(target=process, args=(1, tmp_path))
    other.start()
    process(0, tmp_path)
    other.join()
    assert other.exitcode == 0
    alone = []
    for metric in all_metrics():
        fill(metric, range(24), size=24, noise=0.05)
        alone.append(numbers(metric))
        if isinstance(metric, KeypointAP):
            alone.append(metric.results())
    assert not any(math.isnan(v) for n in alone if isinstance(n, dict) for v in n.values())
    for rank in range(2):
        assert pickle.loads((tmp_path / f"{rank}.pickle").read_bytes()) == alone + alone


def test_reset_pickle_and_move():
    for metric, fresh in zip(all_metrics(), all_metrics(), strict=True):
        fill(metric, range(5), noise=0.3)
        metric.reset()
        fill(metric, range(24), noise=0.05)
        again = pickle.loads(pickle.dumps(metric)).to("cpu")
        fill(fresh, range(24), noise=0.05)
        same(numbers(metric), numbers(fresh))
        same(numbers(again), numbers(fresh))
        assert not metric.state_dict()  # checkpoints stay free of it


def test_autocast_costs_no_precision():
    for metric, plain in zip(all_metrics(), all_metrics(), strict=True):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            fill(metric, range(24), noise=0.05)
        same(numbers(metric), numbers(fill(plain, range(24), noise=0.05)))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_update_does_not_wait_for_the_gpu():
    for metric, plain in zip(all_metrics(), all_metrics(), strict=True):
        metric.to("cuda")
        prediction, batch = make_batch(metric.instances, list(range(24)), noise=0.05)
        prediction, batch = ({k: v.cuda() for k, v in d.items()} for d in (prediction, batch))
        try:
            torch.cuda.set_sync_debug_mode("error")
            metric.update(prediction, batch)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert all(v.is_cuda for v in metric.compute().values())
        expected = numbers(fill(plain, range(24), size=24, noise=0.05))
        assert numbers(metric) == pytest.approx(expected, rel=1e-4)
