"""Whole detectors of OpenMMLab's: what their weights find there, computed here anew from their own names, is found."""

import json
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torchvision.ops import batched_nms, roi_align

from hrnet import HRNetConfig
from hrnet.checkpoints import WeightsError, read
from hrnet.detectors.rcnn import RCNN
from hrnet.dialects import to_dialect
from hrnet.weights import InitFrom, load
from tasks.detection import Detection

TINY = HRNetConfig(8, modules=(1, 1, 1), blocks=1, stem=(1, 8))
CLASSES = 3
KINDS = {"faster": {}, "mask": {"masks": True}, "cascade": {"cascade": True}, "both": {"masks": True, "cascade": True}}


def build(seed, **kind):
    torch.manual_seed(seed)
    head = partial(RCNN, pyramid=16, width=32, proposals=1000, samples=0, **kind)
    model = Detection(TINY, head, num_classes=CLASSES).eval()
    for name, parameter in model.head.named_parameters():
        if name.endswith("weight") and "neck" not in name:
            torch.nn.init.normal_(parameter, std=1.2 / parameter[0].numel() ** 0.5)
    return model


def decode(boxes, deltas, scale):
    centre, size = (boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]
    deltas = deltas / torch.tensor(scale)
    middle = centre + deltas[:, :2] * size
    half = size * deltas[:, 2:].clamp(max=float(np.log(1000 / 16))).exp() / 2
    return torch.cat([middle - half, middle + half], 1)


def clip(boxes, height, width):
    return boxes.clamp(min=0).minimum(torch.tensor([width, height, width, height]))


def proposals(state, levels, size):
    boxes, scores, level = [], [], []
    for i, x in enumerate(levels):
        stride = 4 * 2**i
        x = F.conv2d(x, state["rpn_head.rpn_conv.weight"], state["rpn_head.rpn_conv.bias"], padding=1).relu()
        score = F.conv2d(x, state["rpn_head.rpn_cls.weight"], state["rpn_head.rpn_cls.bias"]).sigmoid()[0]
        delta = F.conv2d(x, state["rpn_head.rpn_reg.weight"], state["rpn_head.rpn_reg.bias"])[0]
        anchors = []
        for a, ratio in enumerate((0.5, 1.0, 2.0)):
            w, h = 8 * stride / ratio**0.5, 8 * stride * ratio**0.5
            for cell in np.ndindex(*x.shape[-2:]):
                cy, cx = cell[0] * stride, cell[1] * stride
                anchors.append((a, *cell, cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2))
        anchors = torch.tensor(anchors, dtype=torch.float64)
        a, y, x0 = anchors[:, :3].long().unbind(1)
        moves = delta.view(3, 4, *delta.shape[1:])[a, :, y, x0]
        found = score[a, y, x0]
        best = found.topk(min(1000, len(found))).indices
        boxes.append(clip(decode(anchors[best, 3:].float(), moves[best], (1.0, 1, 1, 1)), *size))
        scores.append(found[best])
        level.append(torch.full((len(best),), i))
    boxes, scores, level = torch.cat(boxes), torch.cat(scores), torch.cat(level)
    real = ((boxes[:, 2:] - boxes[:, :2]) > 1e-3).all(1)
    boxes, scores, level = boxes[real], scores[real], level[real]
    return boxes[batched_nms(boxes, scores, level, 0.7)[:1000]]


def pooled(levels, boxes, cells):
    scale = ((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])).sqrt()
    target = (scale / 56 + 1e-6).log2().floor().clamp(0, 3).long()
    rois = torch.cat([torch.zeros(len(boxes), 1), boxes], 1)
    each = [
        roi_align(levels[t], roi[None], cells, 1 / (4 * 2 ** int(t)), 0, True)
        for t, roi in zip(target, rois, strict=True)
    ]
    return torch.cat(each)


def mmdet(state, levels, size, cascade):
    """Boxes `[N, 5]` with scores and labels, and masks, as mmdet's R-CNNs give them."""
    boxes, logits = proposals(state, levels, size), []
    scales = [(10.0, 10, 5, 5), (20.0, 20, 10, 10), (30.0, 30, 15, 15)]
    for i in range(3 if cascade else 1):
        name = f"roi_head.bbox_head.{i}." if cascade else "roi_head.bbox_head."
        x = pooled(levels, boxes, 7).flatten(1)
        for layer in ("shared_fcs.0", "shared_fcs.1"):
            x = F.linear(x, state[f"{name}{layer}.weight"], state[f"{name}{layer}.bias"]).relu()
        logits.append(F.linear(x, state[f"{name}fc_cls.weight"], state[f"{name}fc_cls.bias"]))
        moves = F.linear(x, state[f"{name}fc_reg.weight"], state[f"{name}fc_reg.bias"])
        if cascade:
            boxes = clip(decode(boxes, moves, scales[i]), *size)
    scores = (sum(logits) / len(logits)).softmax(1)[:, :-1]  # the background is the last
    each = []
    for c in range(CLASSES):
        placed = boxes if cascade else clip(decode(boxes, moves[:, 4 * c : 4 * c + 4], scales[0]), *size)
        each.append(placed)
    every, score = torch.stack(each, 1).flatten(0, 1), scores.flatten()
    label = torch.arange(CLASSES).repeat(len(boxes))
    good = (score > 0.05) & ((every[:, 2:] - every[:, :2]) >= 0.01).all(1)
    every, score, label = every[good], score[good], label[good]
    kept = batched_nms(every, score, label, 0.5)[:100]
    every, score, label = every[kept], score[kept], label[kept]
    masks = []
    for i in range(3 if cascade else 1):
        name = f"roi_head.mask_head.{i}." if cascade else "roi_head.mask_head."
        if f"{name}upsample.weight" not in state:
            return every, score, label, None
        x = pooled(levels, every, 14)
        for j in range(4):
            x = F.conv2d(
                x, state[f"{name}convs.{j}.conv.weight"], state[f"{name}convs.{j}.conv.bias"], padding=1
            ).relu()
        x = F.conv_transpose2d(x, state[f"{name}upsample.weight"], state[f"{name}upsample.bias"], stride=2).relu()
        x = F.conv2d(x, state[f"{name}conv_logits.weight"], state[f"{name}conv_logits.bias"])
        masks.append(x[torch.arange(len(x)), label].sigmoid())
    return every, score, label, torch.stack(masks).mean(0)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_the_same_is_found(kind, tmp_path):
    options = KINDS[kind]
    source = build(0, **options)
    state, unknown = to_dialect(source.state_dict(), "mmdet-cascade" if options.get("cascade") else "mmdet")
    assert not unknown
    torch.save({"state_dict": state, "meta": {"CLASSES": ("a", "b", "c")}}, tmp_path / "theirs.pth")
    model = Detection.from_weights(str(tmp_path / "theirs.pth"))
    assert model.class_names == ["a", "b", "c"]
    assert model.head.masks == options.get("masks", False)
    image = torch.randint(0, 256, (1, 3, 160, 224), dtype=torch.uint8)  # the coarsest level has cut off a rest
    batch = {"image": image, "size": torch.tensor([[150, 220]])}
    maps = model(image)
    found = model.head.detect(maps, batch)[0]
    boxes, scores, labels, masks = mmdet(state, model.head.neck(maps), (150, 220), options.get("cascade", False))
    assert len(boxes) > 20
    assert torch.equal(found["labels"], labels)
    assert torch.allclose(found["scores"], scores, atol=1e-5)
    assert torch.allclose(found["boxes"], boxes, atol=1e-2)
    if masks is not None:
        assert torch.allclose(found["masks"], masks, atol=1e-4)


@pytest.mark.parametrize("dialect", ["official-detection", "maskrcnn-benchmark", "mmdet"])
@pytest.mark.parametrize("kind", KINDS)
def test_there_and_back(dialect, kind, tmp_path):
    cascade = KINDS[kind].get("cascade", False)
    if cascade and dialect == "maskrcnn-benchmark":
        pytest.skip("has no cascades")
    name = {"official-detection": "official-cascade", "mmdet": "mmdet-cascade"}[dialect] if cascade else dialect
    source, target = build(0, **KINDS[kind]), build(1, **KINDS[kind])
    state, _ = to_dialect(source.state_dict(), name)
    torch.save(state, tmp_path / "a.pth")
    file = read(tmp_path / "a.pth")
    assert (file.dialect, file.head, file.others) == (name, "detection", [])
    load(target, InitFrom(str(tmp_path / "a.pth")))
    loaded = target.state_dict()
    for key, value in source.state_dict().items():
        other = loaded[key]
        if dialect == "mmdet" and not cascade and "box_predictor.bbox_pred" in key:
            value, other = value[4:], other[4:]  # of the background, which is read by nothing
        assert torch.equal(value, other), key


def test_other_classes_start_anew(tmp_path):
    """What one does with a published detector: all of it but the classes is kept."""
    torch.save(to_dialect(build(0).state_dict(), "mmdet")[0], tmp_path / "a.pth")
    model = Detection(TINY, partial(RCNN, pyramid=16, width=32), num_classes=5)
    with pytest.raises(WeightsError, match="strict: false"):
        load(model, InitFrom(str(tmp_path / "a.pth")))
    report = load(model, InitFrom(str(tmp_path / "a.pth"), strict=False))
    assert len(report.mismatched) == 4
    assert all("box_predictor" in line for line in report.mismatched)


def test_predicts_without_training(tmp_path, cli, rendered):
    source = build(0, masks=True)
    torch.save({"state_dict": to_dialect(source.state_dict(), "mmdet")[0]}, tmp_path / "theirs.pth")
    pictures = rendered.cache.folder / "val"
    options = ["--trainer.accelerator=cpu", "--data.workers=0", "--data.shorter=64", "--trainer.precision=32-true"]
    run = cli(
        tmp_path, "predict", f"--model.init_from={tmp_path}/theirs.pth", f"--data.path={pictures}", *options,
        task=Detection,
    )  # fmt: skip
    items = json.loads((run.folder / "predictions/results.json").read_text())
    assert items
    assert "segmentation" in items[0]


def test_names_of_coco(tmp_path):
    torch.manual_seed(0)
    model = Detection(TINY, partial(RCNN, pyramid=16, width=32), num_classes=80)
    torch.save(to_dialect(model.state_dict(), "official-detection")[0], tmp_path / "a.pth")
    found = Detection.from_weights(str(tmp_path / "a.pth"))
    assert (found.class_names[0], found.class_names[-1]) == ("person", "toothbrush")
    assert (found.category_ids[0], found.category_ids[-1], len(found.category_ids)) == (1, 90, 80)
    assert found.head.stages[0].box_roi_pool.samples == 2
