"""AP of boxes, masks and keypoints against pycocotools end to end, mIoU against the official confusion matrix.

On made-up data: python benchmarks/evaluation.py, or with --images 5000 --rounds 3 (of which pycocotools takes minutes).
"""

import argparse
import contextlib
import io
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from pycocotools import mask as rle
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from timing import medians, report

from datamodules.box_ap import BoxAP, evaluate
from datamodules.iou import MeanIoU
from datamodules.keypoints import Instance
from datamodules.metrics import KeypointAP

SIGMAS = np.array([26, 25, 25, 35, 35, 79, 79, 72, 72, 62, 62, 107, 107, 87, 87, 89, 89]) / 1000
CATEGORIES = 80
HEIGHT, WIDTH = 480, 640
CLASSES = 19


def pycocotools(truth, items, kind):
    """The official evaluation as its manual says, from dicts in memory (copied, because it writes to them)."""
    with contextlib.redirect_stdout(io.StringIO()):
        ground = COCO()
        ground.dataset = truth
        ground.createIndex()
        evaluator = COCOeval(ground, ground.loadRes([dict(item) for item in items]), kind)
        evaluator.evaluate()
        evaluator.accumulate()
        evaluator.summarize()
    return evaluator.stats


def random_boxes(rng, number):
    size = np.exp(rng.normal(4.2, 0.9, (number, 2))).clip(4, [WIDTH, HEIGHT])
    return np.concatenate([rng.uniform(0, 1, (number, 2)) * ([WIDTH, HEIGHT] - size), size], 1)


def outline(rng, box, noise=0.0):
    """A blob in a box, the same in all but for noise: polygon, RLE."""
    radius = np.random.default_rng(0).uniform(0.5, 1, 24) * (1 + noise * rng.normal(size=24))
    angle = np.linspace(0, 2 * np.pi, 24, endpoint=False)
    points = box[:2] + box[2:] / 2 * (1 + radius[:, None] * np.stack([np.cos(angle), np.sin(angle)], 1))
    frame = cv2.fillPoly(np.zeros((HEIGHT, WIDTH), np.uint8), [points.round().astype(np.int32)], 1)
    code = rle.encode(np.asfortranarray(frame))
    return [points.ravel().tolist()], {"size": code["size"], "counts": code["counts"].decode()}


def made_boxes(images, masks=False, detections=20, seed=0):
    """A truth like COCO's, some 7 objects of 80 categories an image, 1 % crowds; and detections, 65 % near one."""
    rng = np.random.default_rng(seed)
    share = 1 / np.arange(1, CATEGORIES + 1)
    share /= share.sum()
    truth = {"categories": [{"id": c + 1, "name": f"c{c}"} for c in range(CATEGORIES)]} | {"annotations": []}
    truth["images"] = [{"id": i + 1, "width": WIDTH, "height": HEIGHT} for i in range(images)]
    items = []
    for image in range(1, images + 1):
        boxes = random_boxes(rng, rng.poisson(7)).round(2)
        kinds = rng.choice(CATEGORIES, len(boxes) // 3 + 1, p=share)  # a picture holds many of few kinds
        labels = rng.choice(kinds, len(boxes))
        for box, label in zip(boxes, labels, strict=True):
            crowd = rng.random() < 0.01
            new = {"bbox": box.tolist(), "area": float(box[2:].prod() * rng.uniform(0.4, 0.8)), "iscrowd": int(crowd)}
            new |= {"id": len(truth["annotations"]) + 1, "image_id": image, "category_id": int(label) + 1}
            truth["annotations"].append(new | ({"segmentation": outline(rng, box)[crowd]} if masks else {}))
        found, scores, guess = random_boxes(rng, detections), rng.beta(1, 5, detections), rng.choice(kinds, detections)
        near = np.flatnonzero(rng.random(detections) < (0.65 if len(boxes) else 0))
        if len(near):
            which = rng.integers(0, len(boxes), len(near))
            noise = rng.exponential(0.08, (len(near), 1)) * rng.normal(size=(len(near), 4))
            found[near] = boxes[which] + noise * np.tile(boxes[which, 2:], 2)
            scores[near] = np.exp(-6 * np.abs(noise).mean(1)) * rng.beta(5, 2, len(near))
            guess[near] = np.where(rng.random(len(near)) < 0.1, guess[near], labels[which])
        found[:, 2:] = found[:, 2:].clip(1)
        rows = found.astype(np.float32).astype(float), scores.astype(np.float32).round(3).astype(float), guess
        for box, score, label in zip(*rows, strict=True):
            shape = {"segmentation": outline(rng, box, 0.05)[1]} if masks else {"bbox": box.tolist()}
            items.append({"image_id": image, "category_id": int(label) + 1, "score": float(score)} | shape)
    return truth, items


def filled_boxes(truth, items, kind, backend):
    """The metric as it is after the last batch."""
    ids, categories = [x["id"] for x in truth["images"]], truth["categories"]
    metric = BoxAP(truth, ids, [c["id"] for c in categories], [c["name"] for c in categories], kind, backend=backend)
    metric.ids.append(torch.arange(len(ids)))
    metric.counts.append(torch.bincount(torch.tensor([item["image_id"] - 1 for item in items]), minlength=len(ids)))
    metric.sizes.append(torch.tensor([[HEIGHT, WIDTH]]).expand(len(ids), 2))
    metric.scores.append(torch.tensor([item["score"] for item in items], dtype=torch.float32))
    metric.labels.append(torch.tensor([item["category_id"] - 1 for item in items]))
    if kind == "segm":
        codes = [item["segmentation"]["counts"].encode() for item in items]
        metric.lengths.append(torch.tensor([len(code) for code in codes]))
        metric.codes.append(torch.frombuffer(bytearray(b"".join(codes)), dtype=torch.uint8))
        metric.boxes.append(torch.zeros(len(items), 4))
    else:
        boxes = torch.tensor([item["bbox"] for item in items])
        boxes[:, 2:] += boxes[:, :2]
        metric.boxes.append(boxes)
    metric._update_count = 1
    return metric


def computed(filled, make):
    """A new metric, which reads the truth, with what the filled one has seen: its numbers."""
    metric = make()
    for name in filled._defaults:
        setattr(metric, name, getattr(filled, name))
    metric._update_count = 1
    return torch.stack(list(metric.compute().values())).double().numpy()


def average_precision(kind, images, rounds):
    truth, items = made_boxes(images, kind == "segm")
    filled = {name: filled_boxes(truth, items, kind, name) for name in ("numpy", "faster")}
    items = filled["numpy"].results()  # exactly what the metric holds
    ids, categories = filled["numpy"].image_ids, filled["numpy"].category_ids
    names = filled["numpy"].class_names
    calls = {"pycocotools": lambda: pycocotools(truth, items, kind)}
    for name, metric in filled.items():
        make = lambda name=name: BoxAP(truth, ids, categories, names, kind, backend=name)  # noqa: E731
        calls[f"BoxAP, {name}"] = lambda metric=metric, make=make: computed(metric, make)
    right = calls["pycocotools"]()
    notes = {f"BoxAP, {n}": deviation(evaluate(truth, items, kind, n)[:12], right) for n in ("numpy", "faster")}
    case = f"{'mask' if kind == 'segm' else 'box'} AP, {images:,} images x 20 detections, {rounds} rounds"
    report("evaluation", case, "pycocotools", medians(calls, rounds), notes)


def deviation(found, right):
    assert right[0] > 0.1
    return f"AP {right[0]:.3f}, largest deviation {np.abs(np.asarray(found) - right).max():.1e}"


def keypoint_precision(images, rounds, seed=0):
    """Some two people an image, a fifth without labels, 2 % crowds; 20 poses an image, 60 % near a person."""
    rng = np.random.default_rng(seed)
    annotations, instances, poses = [], [], []
    for image in range(1, images + 1):
        people = []
        for _ in range(rng.poisson(2)):
            size = np.exp(rng.normal(4.3, 0.6, 2)).clip(10, 400) * [0.7, 1.3]
            corner = rng.uniform(0, 400, 2)
            points = corner + rng.uniform(0.05, 0.95, (17, 2)) * size
            visible = rng.choice(3, 17, p=[0.35, 0.1, 0.55]) * (rng.random() < 0.8)
            new = {"keypoints": np.c_[points * (visible[:, None] > 0), visible].ravel().tolist(), "image_id": image}
            new |= {"num_keypoints": int((visible > 0).sum()), "bbox": [*corner.tolist(), *size.tolist()]}
            new |= {"area": float(size.prod() * rng.uniform(0.4, 0.7)), "iscrowd": int(rng.random() < 0.02)}
            annotations.append(new | {"id": len(annotations) + 1, "category_id": 1})
            people.append((corner, size, points))
        for _ in range(20):
            if people and rng.random() < 0.6:
                corner, size, points = people[rng.integers(len(people))]
                noise = rng.exponential(0.06)
                points, score = points + rng.normal(0, noise, (17, 2)) * size, np.exp(-4 * noise) * rng.beta(6, 2)
            else:
                corner, size, score = rng.uniform(0, 400, 2), rng.uniform(30, 200, 2), rng.beta(1, 4)
                points = corner + rng.uniform(0, 1, (17, 2)) * size
            place = {"image_id": image, "id": len(instances), "category_id": 1, "path": Path("none")}
            labels = {"keypoints": points, "visible": np.ones(17), "box": np.array([*corner, *size])}
            instances.append(Instance(**place, **labels, score=float(score)))
            poses.append(points)
    truth = {"images": [{"id": i + 1} for i in range(images)], "annotations": annotations, "categories": [{"id": 1}]}
    areas = [1.25**2 * i.box[2] * i.box[3] for i in instances]
    states = {"ids": np.arange(len(instances)), "keypoints": np.array(poses, np.float32)}
    states |= {"scores": rng.uniform(0.1, 1, (len(instances), 17)).astype(np.float32), "areas": np.array(areas, "f4")}

    def make():
        return KeypointAP(instances, truth, SIGMAS.tolist())

    filled = make()
    for name, value in states.items():
        getattr(filled, name).append(torch.from_numpy(value))
    filled._update_count = 1
    items = filled.results()
    calls = {"pycocotools": lambda: pycocotools(truth, items, "keypoints")}
    calls["KeypointAP, suppression included"] = lambda: computed(filled, make)
    right = calls["pycocotools"]()
    notes = {k: deviation(call(), right) + " (float32)" for k, call in calls.items() if k != "pycocotools"}
    case = f"keypoint AP, {images:,} images x 2 people x 20 poses, {rounds} rounds"
    report("evaluation", case, "pycocotools", medians(calls, rounds), notes)


def label_maps(number, noise=False, size=(1024, 2048), seed=0):
    """Truth and prediction, uint8: regions with ragged edges, some ignored; or noise, where every pixel is its own."""
    rng = np.random.default_rng(seed)
    if noise:
        truth, guess = rng.integers(0, CLASSES, (2, number, *size), dtype=np.uint8)
        truth[rng.random(truth.shape) < 0.1] = 255
        return truth, guess

    def smooth(height, width):
        return cv2.resize(rng.normal(size=(height, width)).astype("f4"), size[::-1], interpolation=cv2.INTER_CUBIC)

    pairs = []
    for _ in range(number):
        best, label = np.full((2, *size), -np.inf, "f4"), np.zeros((2, *size), np.uint8)
        for c in range(CLASSES):
            score = 3 * smooth(9, 17) + smooth(33, 65) + 0.3 * smooth(257, 513)
            for k, value in enumerate((score, score + 0.15 * smooth(65, 129) + 0.05 * smooth(257, 513))):
                better = value > best[k]
                best[k][better], label[k][better] = value[better], c
        label[0][smooth(33, 65) > 1.2] = 255
        pairs.append(label)
    return np.stack(pairs, 1)


def official_confusion(truth, guess):
    """get_confusion_matrix of HRNet-Semantic-Segmentation's lib/utils/utils.py, from label maps on."""
    truth = np.asarray(truth, dtype=int)
    valid = truth != 255
    index = (truth[valid] * CLASSES + guess[valid]).astype("int32")
    counts = np.bincount(index)
    matrix = np.zeros((CLASSES, CLASSES))
    for i in range(CLASSES):
        for j in range(CLASSES):
            if i * CLASSES + j < len(counts):
                matrix[i, j] = counts[i * CLASSES + j]
    return matrix


def mean_iou(noise, rounds, different=10, times=10):
    truth, guess = label_maps(different, noise)
    names = [str(c) for c in range(CLASSES)]

    def ours(boundary):
        metric = MeanIoU(names, boundary=boundary)
        for i in range(times * different):
            k = slice(i % different, i % different + 1)
            batch = {"mask": torch.from_numpy(truth[k]), "id": torch.tensor([i])}
            metric.update({"label": torch.from_numpy(guess[k])}, batch)
        metric.compute()
        return metric.confusion().numpy()

    pairs = times * list(zip(truth, guess, strict=True))
    calls = {
        "official confusion matrix": lambda: sum(official_confusion(*pair) for pair in pairs),
        "MeanIoU, boundary=0": lambda: ours(0),
    }
    if not noise:
        calls["MeanIoU"] = lambda: ours(0.02)
    right = calls["official confusion matrix"]()
    notes = {k: f"largest deviation {np.abs(calls[k]() - right).max():.0f} pixels" for k in list(calls)[1:]}
    kind = "of noise" if noise else f"of regions, pixel accuracy {right.diagonal().sum() / right.sum():.2f}"
    case = f"mIoU, {times * different} maps ({different} different) of 1024x2048 {kind}, {rounds} rounds"
    report("evaluation", case, "official confusion matrix", medians(calls, rounds), notes)


def pooled_edges(truth, guess, width):
    """Boundary counts `[3, C]` of one pair, by max_pool2d of floats, as MeanIoU had it."""

    def near(label, valid):
        low, high = label.where(valid, 1e4), label.where(valid, -1e4)
        pad, kernel = (width,) * 4, 2 * width + 1
        low, high = F.pad(-low, pad, value=1.0), F.pad(high, pad, value=-1.0)
        low, high = (F.max_pool2d(F.max_pool2d(x[:, None], (1, kernel), 1), (kernel, 1), 1)[:, 0] for x in (low, high))
        return (-low != label) | (high != label)

    valid = truth != 255
    at_truth, at_guess = near(truth.float(), valid) & valid, near(guess.float(), valid | True) & valid
    parts = truth[at_truth & at_guess & (truth == guess)], truth[at_truth], guess[at_guess]
    return torch.stack([torch.bincount(x, minlength=CLASSES) for x in parts])


def boundary(rounds):
    truth, guess = (torch.from_numpy(x) for x in label_maps(1, seed=1))
    batch = {"mask": truth, "id": torch.zeros(1, dtype=torch.long)}

    def ours():
        metric = MeanIoU([str(c) for c in range(CLASSES)])
        metric.update({"label": guess}, batch)
        return metric.edges[0][0]

    width = round(0.02 * (1024**2 + 2048**2) ** 0.5)
    calls = {"max_pool2d": lambda: pooled_edges(truth, guess, width), "MeanIoU": ours}
    notes = {"MeanIoU": f"largest deviation {(ours() - pooled_edges(truth, guess, width)).abs().max()} pixels"}
    report(
        "evaluation",
        f"boundaries of one pair of 1024x2048, {rounds} rounds",
        "max_pool2d",
        medians(calls, rounds),
        notes,
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=1000, help="of boxes and keypoints; a quarter of it for masks")
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    average_precision("bbox", arguments.images, arguments.rounds)
    keypoint_precision(arguments.images, arguments.rounds)
    average_precision("segm", arguments.images // 4, arguments.rounds)
    mean_iou(False, arguments.rounds)
    mean_iou(True, arguments.rounds, times=3)
    boundary(arguments.rounds)
