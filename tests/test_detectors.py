"""Detectors: published sizes, losses that are finite and fall, and what they put out."""

import pytest
import torch

from hrnet import HRNet, HRNetConfig
from hrnet.detectors.rcnn import RCNN

TINY = HRNetConfig(8, modules=(1, 1, 1), blocks=1, stem=(1, 16))
KINDS = [{}, {"masks": True}, {"cascade": True}, {"cascade": True, "masks": True}]


def parameters(*modules):
    return sum(p.numel() for module in modules for p in module.parameters())


def make_batch():
    """Two images of different sizes; the second shows nothing."""
    boxes = torch.tensor([[10.0, 10.0, 60.0, 70.0], [50.0, 20.0, 140.0, 100.0]])
    masks = torch.zeros(2, 128, 160, dtype=torch.uint8)
    for mask, (x0, y0, x1, y1) in zip(masks, boxes.int().tolist(), strict=True):
        mask[y0:y1, x0:x1] = 1
    return {
        "image": torch.zeros(2, 3, 128, 160, dtype=torch.uint8),
        "size": torch.tensor([[128, 150], [120, 160]]),
        "boxes": [boxes, torch.zeros(0, 4)],
        "labels": [torch.tensor([0, 3]), torch.zeros(0, dtype=torch.long)],
        "masks": [masks, torch.zeros(0, 128, 160, dtype=torch.uint8)],
    }


def make(kind, seed=0):
    torch.manual_seed(seed)
    backbone = HRNet(TINY)
    return backbone, RCNN(backbone.channels, 5, pyramid=32, width=64, **kind)


@pytest.mark.parametrize(
    ("preset", "neck", "mask", "cascade"),
    [("w18", 12_582_036, 30.1, 55.1), ("w32", 32_379_072, 49.9, 74.9)],
)
def test_published_sizes(preset, neck, mask, cascade):
    """Of backbone and neck; millions of Mask and of Cascade R-CNN as the paper counts them."""
    backbone = HRNet(preset)
    assert parameters(backbone, RCNN(backbone.channels, 80).neck) == neck
    assert round(parameters(backbone, RCNN(backbone.channels, 80, masks=True)) / 1e6, 1) == mask
    assert round(parameters(backbone, RCNN(backbone.channels, 80, cascade=True)) / 1e6, 1) == cascade


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_losses_are_finite_and_fall(kind, bf16):
    backbone, detector = make(kind)
    x, batch = torch.randn(2, 3, 128, 160), make_batch()
    optimizer = torch.optim.Adam([*backbone.parameters(), *detector.parameters()], 1e-3)
    totals = []
    for _ in range(12):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            losses = detector.loss(backbone(x), batch)
        assert all(v.isfinite() and v.dtype == torch.float32 for v in losses.values())
        total = torch.stack(list(losses.values())).sum()
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        totals.append(total.item())
    unused = [name for name, p in detector.named_parameters() if p.grad is None]
    assert unused == []  # DDP fails on them
    assert totals[-1] < 0.7 * totals[0]


@pytest.mark.parametrize("kind", KINDS)
def test_detections_lie_in_their_images(kind):
    backbone, detector = make({**kind, "score": 0.0})
    batch = make_batch()
    with torch.inference_mode():
        results = detector.eval().detect(backbone.eval()(torch.randn(2, 3, 128, 160)), batch)
    for result, (height, width) in zip(results, batch["size"].tolist(), strict=True):
        boxes, scores, labels = result["boxes"], result["scores"], result["labels"]
        assert 0 < len(boxes) == len(scores) == len(labels) <= 100
        assert boxes.min() >= 0
        assert (boxes[:, [0, 2]] <= width).all()
        assert (boxes[:, [1, 3]] <= height).all()
        assert scores.diff().max() <= 0
        assert set(labels.tolist()) <= set(range(5))
        if kind.get("masks"):
            assert result["masks"].shape == (len(boxes), 28, 28)
            assert 0 <= result["masks"].min() <= result["masks"].max() <= 1


def test_images_without_objects():
    backbone, detector = make({"masks": True})
    batch = make_batch()
    batch["boxes"], batch["labels"] = [batch["boxes"][1]] * 2, [batch["labels"][1]] * 2
    batch["masks"] = [batch["masks"][1]] * 2
    losses = detector.loss(backbone(torch.randn(2, 3, 128, 160)), batch)
    assert all(v.isfinite() for v in losses.values())
    torch.stack(list(losses.values())).sum().backward()
