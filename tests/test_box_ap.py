"""COCO's AP: equal to pycocotools' on the written JSON, whatever the images hold, and to itself over two processes."""

import copy
import json

import numpy as np
import pytest
import torch
from pycocotools import mask as rle
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torchmetrics import MetricCollection

from datamodules.box_ap import STATS, BoxAP, evaluate

NAMES, IDS = ["a", "b", "c"], [3, 7, 90]
SIZE = (96, 128)


def rectangle(box):
    mask = np.zeros(SIZE, np.uint8, order="F")
    x, y, w, h = (round(v) for v in box)
    mask[y : y + h, x : x + w] = 1
    code = rle.encode(mask)
    return {"size": code["size"], "counts": code["counts"].decode()}


def scene(seed=0, images=7, objects=9):
    """A truth with a crowd region and an image without objects, and a prediction near it: 130 boxes in one image."""
    rng = np.random.default_rng(seed)
    truth = {"images": [], "annotations": [], "categories": [{"id": i, "name": n} for i, n in zip(IDS, NAMES)]}
    batches = []
    for image in range(images):
        truth["images"].append({"id": 100 + image, "height": SIZE[0], "width": SIZE[1]})
        count = 0 if image == 2 else objects
        corner = rng.uniform(0, 60, (count, 2))
        extent = rng.uniform(4, 36, (count, 2))
        labels = rng.integers(0, 3, count)
        for i in range(count):
            box = [*corner[i].tolist(), *extent[i].tolist()]
            truth["annotations"].append(
                {
                    "id": len(truth["annotations"]),  # from 0, which COCO's own evaluation takes for "no match"
                    "image_id": 100 + image,
                    "category_id": IDS[labels[i]],
                    "bbox": box,
                    "area": box[2] * box[3],
                    "iscrowd": int(i == 0 and image == 1),
                    "segmentation": rectangle(box),
                }
            )
        more = 121 if image == 4 else 3
        boxes = np.concatenate([corner, corner + extent], 1) + rng.normal(0, 1.5, (count, 4))
        noise = rng.uniform(0, 50, (more, 2))
        boxes = np.concatenate([boxes, np.concatenate([noise, noise + rng.uniform(3, 30, (more, 2))], 1)])
        found = np.concatenate([labels, rng.integers(0, 3, more)])
        scores = rng.uniform(0.05, 1, len(boxes)).round(2)  # with ties
        prediction = {
            "boxes": [torch.tensor(boxes * 2, dtype=torch.float32)],
            "scores": [torch.tensor(scores, dtype=torch.float32)],
            "labels": [torch.tensor(found)],
            "masks": [torch.tensor(rng.uniform(0.48, 1, (len(boxes), 28, 28)), dtype=torch.float32)],
        }
        batch = {
            "id": torch.tensor([image]),
            "to_image": torch.tensor([[[0.5, 0, 0], [0, 0.5, 0]]]),
            "original": torch.tensor([SIZE]),
        }
        batches.append((prediction, batch))
    return truth, batches


def make(truth, kind="bbox", backend="numpy", **kwargs):
    return BoxAP(truth, [i["id"] for i in truth["images"]], IDS, NAMES, kind, backend=backend, **kwargs)


def reference(truth, items, kind):
    truth = copy.deepcopy(truth)
    for a in truth["annotations"]:
        a["id"] += 1
    ground = COCO()
    ground.dataset = truth
    ground.createIndex()
    evaluator = COCOeval(ground, ground.loadRes(items), kind)
    evaluator.evaluate()
    evaluator.accumulate()
    evaluator.summarize()
    return dict(zip(STATS, evaluator.stats))


@pytest.mark.parametrize("backend", ["numpy", "pycocotools", "faster"])
@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_as_pycocotools_on_the_written_file(kind, backend):
    truth, batches = scene()
    metric = make(truth, kind, backend)
    for prediction, batch in batches:
        metric.update(prediction, batch)
    values = metric.compute()
    items = json.loads(json.dumps(metric.results()))
    assert len(items) > 150
    prefix = "mask_" if kind == "segm" else ""
    for name, value in reference(truth, items, kind).items():
        assert float(values[prefix + name]) == pytest.approx(value, abs=1e-6)
    assert 0.05 < values[prefix + "AP"] < 0.95


def test_masks_survive_the_metric():
    truth, batches = scene()
    metric = make(truth, "segm")
    metric.update(*batches[0])
    prediction, _ = batches[0]
    boxes = prediction["boxes"][0].numpy() / 2
    for item, box in zip(metric.results(), boxes):
        mask = rle.decode(item["segmentation"])
        assert mask.shape == SIZE
        y, x = np.nonzero(mask)
        assert x.min() >= np.floor(box[0]) - 2
        assert x.max() <= np.ceil(box[2]) + 2
        assert y.min() >= np.floor(box[1]) - 2
        assert y.max() <= np.ceil(box[3]) + 2


def test_per_class_means_to_the_whole():
    truth, batches = scene()
    metric = make(truth, per_class=True)
    for prediction, batch in batches:
        metric.update(prediction, batch)
    values = metric.compute()
    assert np.mean([float(values[f"AP/{name}"]) for name in NAMES]) == pytest.approx(float(values["AP"]), abs=1e-6)


def test_perfect_is_one_and_nothing_is_zero():
    truth, batches = scene()
    perfect, nothing = make(truth), make(truth)
    for image, (_, batch) in enumerate(batches):
        own = [a for a in truth["annotations"] if a["image_id"] == 100 + image]
        boxes = torch.tensor([a["bbox"] for a in own], dtype=torch.float32).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        labels = torch.tensor([IDS.index(a["category_id"]) for a in own], dtype=torch.long)
        perfect.update({"boxes": [boxes * 2], "labels": [labels], "scores": [torch.ones(len(own))]}, batch)
        empty = {"boxes": [torch.zeros(0, 4)], "labels": [labels[:0]], "scores": [torch.zeros(0)]}
        nothing.update(empty, batch)
    assert float(perfect.compute()["AP"]) == pytest.approx(1)
    assert float(nothing.compute()["AP"]) == 0


def test_images_seen_twice_count_once():
    truth, batches = scene()
    once, twice = make(truth, "segm"), make(truth, "segm")
    for prediction, batch in batches:
        once.update(prediction, batch)
    for prediction, batch in [*batches, *batches[:3]]:
        twice.update(prediction, batch)
    assert once.results() == twice.results()


def test_a_part_of_the_images_is_judged_alone():
    truth, batches = scene()
    metric = make(truth)
    metric.update(*batches[0])
    own = {**truth, "images": truth["images"][:1]}
    own["annotations"] = [a for a in truth["annotations"] if a["image_id"] == 100]
    assert float(metric.compute()["AP"]) == pytest.approx(reference(own, metric.results(), "bbox")["AP"], abs=1e-6)


def test_boxes_and_masks_together():
    truth, batches = scene()
    parts = {kind: make(truth, kind) for kind in ("bbox", "segm")}
    metric = MetricCollection(parts, compute_groups=False)
    for prediction, batch in batches:
        metric.update(prediction, batch)
    values = metric.compute()
    assert next(iter(values)) == "AP"
    assert {"AP", "mask_AP"} <= set(values)


def _process(rank, file, queue):
    torch.set_num_threads(1)  # a forked process has no threads but its own
    torch.distributed.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    truth, batches = scene()
    metric = make(truth, "segm")
    mine = [*batches, batches[0]][rank::2]  # seven images by two: one is seen by both
    for prediction, batch in mine:
        metric.update(prediction, batch)
    values = {k: float(v) for k, v in metric.compute().items()}
    items = metric.results()
    queue.put((values, items))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def test_two_processes_give_the_same_digits(tmp_path):
    context = torch.multiprocessing.get_context("fork")
    queue = context.Queue()
    processes = [context.Process(target=_process, args=(rank, tmp_path / "store", queue)) for rank in range(2)]
    for process in processes:
        process.start()
    found = [queue.get(timeout=120) for _ in processes]
    for process in processes:
        process.join()
    truth, batches = scene()
    metric = make(truth, "segm")
    for prediction, batch in batches:
        metric.update(prediction, batch)
    alone = {k: float(v) for k, v in metric.compute().items()}
    for values, items in found:
        assert values == alone
        assert items == metric.results()


@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_nothing_found(kind):
    """0 where there is something to find, -1 where not: as for any other detections."""
    truth = scene()[0]
    small = [a for a in truth["annotations"] if a["area"] < 32**2]
    truth = truth | {"annotations": small[:1] or [truth["annotations"][0] | {"area": 100.0}]}
    values = evaluate(truth, [], kind)
    assert values[0] == values[3] == 0
    assert values[4] == values[5] == -1


def test_unknown_backend():
    with pytest.raises(ValueError, match="backend"):
        make(scene()[0], backend="fast")
