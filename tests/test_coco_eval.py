"""Precision and recall over arrays: pycocotools' tables number by number, with ties, crowds, edges of area and gaps."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as rle

from datamodules.box_ap import by_arrays, evaluate, summary
from datamodules.coco_eval import reference
from datamodules.metrics import KeypointAP

SIGMAS = np.array([0.026, 0.079, 0.107, 0.062])
EDGES = [0, 1, 1023.999, 1024, 1024.001, 5000, 9215.999, 9216, 9216.001, 20000]
HEIGHT, WIDTH = 60, 80


def coded(box):
    mask = np.zeros((HEIGHT, WIDTH), np.uint8, order="F")
    x, y, w, h = (int(v) for v in box)
    mask[y : y + h, x : x + w] = 1
    code = rle.encode(mask)
    return {"size": code["size"], "counts": code["counts"].decode()}


def outline(box, rng):
    """A polygon, runs as numbers, or RLE."""
    x, y, w, h = box
    kind = rng.integers(3)
    if kind == 0:
        return [[x, y, x + w, y, x + w, y + h, x, y + h]]
    code = coded(box)
    if kind == 1:
        flat = rle.decode(code).ravel(order="F")
        starts = np.flatnonzero(np.diff(flat, prepend=0))
        return {"size": code["size"], "counts": np.diff([0, *starts, flat.size]).tolist()}
    return code


def box_of(rng, coarse):
    """Few different ones, so that overlaps tie and hit the thresholds; some are empty."""
    step = 10 if coarse else 1
    x, y, w, h = (int(v) // step * step for v in rng.integers(0, 40, 4))
    return [float(v) for v in (x, y, min(w, WIDTH - x), min(h, HEIGHT - y))]


def scene(seed, images, objects, detections, coarse):
    rng = np.random.default_rng(seed)
    ids = [int(i) for i in rng.permutation(50)[:images]]
    categories = [int(i) for i in rng.permutation(20)[: rng.integers(1, 4)]]
    truth = {"images": [{"id": i, "height": HEIGHT, "width": WIDTH} for i in ids], "annotations": []}
    truth["categories"] = [{"id": i} for i in categories]
    for _ in range(objects):
        box = box_of(rng, coarse)
        visible = rng.integers(0, 3, 4) * (rng.random() < 0.8)
        truth["annotations"].append(
            {
                "id": len(truth["annotations"]) + 1,
                "image_id": int(rng.choice(ids)),
                "category_id": int(
                    rng.choice([*categories, 99], p=[0.95 / len(categories)] * len(categories) + [0.05])
                ),
                "bbox": box,
                "area": float(rng.choice(EDGES)),
                "iscrowd": int(rng.random() < 0.2),
                "segmentation": outline([*box[:2], max(box[2], 1), max(box[3], 1)], rng),
                "keypoints": np.c_[rng.integers(0, 6, (4, 2)) * 10, visible].ravel().tolist(),
                "num_keypoints": int((visible > 0).sum()),
            }
        )
    items = []
    for _ in range(detections):
        near = truth["annotations"][rng.integers(objects)] if objects and rng.random() < 0.7 else None
        box = list(near["bbox"]) if near else box_of(rng, coarse)
        if near and rng.random() < 0.7:
            box[2] = min(box[2] * rng.choice([0.5, 0.75, 0.9, 0.95]), WIDTH - box[0])
        points = np.reshape(near["keypoints"], (4, 3))[:, :2] if near else rng.integers(0, 6, (4, 2)) * 10
        points = points + rng.choice([0, 0, 0.5, 3, 50], (4, 1))
        items.append(
            {
                "image_id": near["image_id"] if near else int(rng.choice(ids)),
                "category_id": near["category_id"]
                if near and rng.random() < 0.9
                else int(rng.choice([*categories, 98])),
                "score": float(rng.integers(0, 5) / 4 if coarse else rng.random()),
                "bbox": box,
                "segmentation": coded(box),
                "keypoints": np.c_[points, np.ones(4)].ravel().tolist(),
            }
        )
    part = [ids[i] for i in range(images) if rng.random() < 0.5] or None
    return truth, items, part if rng.random() < 0.4 else None


def only(items, kind):
    name = {"bbox": "bbox", "segm": "segmentation", "keypoints": "keypoints"}[kind]
    return [{k: item[k] for k in ("image_id", "category_id", "score", name)} for item in items], name


def ours(truth, items, kind, part):
    items, name = only(items, kind)
    columns = [np.array([item[key] for item in items]) for key in ("image_id", "category_id", "score")]
    shapes = [item[name] for item in items]
    if kind != "keypoints":
        return by_arrays(truth, *columns, shapes, kind, part)
    metric = KeypointAP([], {"images": [], "annotations": []}, SIGMAS.tolist())
    metric.ground_truth = truth
    return metric._tables(*columns, np.array(shapes).reshape(-1, 4, 3), images=part)


def same(truth, items, kind, part):
    found = ours(truth, items, kind, part)
    expected = reference(
        truth, only(items, kind)[0], kind, "pycocotools", part, SIGMAS if kind == "keypoints" else None
    )
    for a, b in zip(found, expected):
        np.testing.assert_array_equal(a, b)
    return found


@pytest.mark.parametrize("kind", ["bbox", "segm", "keypoints"])
@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 5), st.integers(0, 25), st.integers(1, 60), st.booleans())
def test_tables_are_those_of_pycocotools(kind, seed, images, objects, detections, coarse):
    truth, items, part = scene(seed, images, objects, detections, coarse)
    same(truth, items, kind, part)


@pytest.mark.parametrize("kind", ["bbox", "segm", "keypoints"])
def test_more_detections_than_count(kind):
    """Of 400 in two images only the best 100 (20 poses) of an image and category, and the best 1 and 10."""
    for seed in range(3):
        truth, items, _ = scene(seed, 2, 30, 800, seed == 0)
        precision, recall = same(truth, items, kind, None)
        assert precision.max() > 0
        assert (np.diff(recall, axis=-1) >= 0).all()


def test_every_number_of_the_summary():
    """The twelve as pycocotools sums them up, and each class as its own evaluation."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    truth, items, _ = scene(3, 6, 60, 200, False)
    items, _ = only(items, "bbox")
    values = evaluate(truth, items, "bbox")
    ground = COCO()
    ground.dataset = truth
    ground.createIndex()
    found = ground.loadRes([dict(item) for item in items])

    def stats(**parameters):
        evaluator = COCOeval(ground, found, "bbox")
        vars(evaluator.params).update(parameters)
        evaluator.evaluate()
        evaluator.accumulate()
        evaluator.summarize()
        return evaluator.stats

    np.testing.assert_allclose(values[:12], stats(), rtol=0, atol=1e-12)
    each = [stats(catIds=[category["id"]])[0] for category in truth["categories"]]
    assert len(each) > 1
    np.testing.assert_allclose(values[12:], each, rtol=0, atol=1e-12)
    assert evaluate(truth, items, "bbox", "faster") == pytest.approx(values, abs=1e-12)


def test_nothing_at_all():
    truth = {"images": [{"id": 1, "height": 5, "width": 5}], "annotations": [], "categories": [{"id": 1}]}
    for kind in ("bbox", "segm"):
        assert evaluate(truth, [], kind) == [-1.0] * 13
    empty = np.zeros(0)
    precision, recall = by_arrays(truth | {"images": []}, empty, empty, empty, [], "bbox", None)
    assert summary(precision, recall) == [-1.0] * 13


def test_a_detection_in_an_unknown_image():
    truth, items, _ = scene(0, 2, 5, 5, True)
    items[3]["image_id"] = 77
    with pytest.raises(ValueError, match="1 images that the truth does not have, as 77"):
        evaluate(truth, items, "bbox")
