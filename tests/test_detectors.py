"""Detectors: published sizes, losses that are finite and fall, and what they put out."""

from collections import OrderedDict

import pytest
import torch
from torchvision.models import detection
from torchvision.ops import box_iou

from hrnet import HRNet, HRNetConfig
from hrnet.detectors.centernet import CenterNet, gaussians, radius
from hrnet.detectors.dense import FCOS, RetinaNet
from hrnet.detectors.rcnn import RCNN

TINY = HRNetConfig(8, modules=(1, 1, 1), blocks=1, stem=(1, 16))
SMALL = {"proposals": 100, "sampled": 32}
KINDS = {
    "faster": (RCNN, SMALL | {"width": 64}),
    "mask": (RCNN, SMALL | {"width": 64, "masks": True}),
    "cascade": (RCNN, SMALL | {"width": 64, "cascade": True}),
    "cascade mask": (RCNN, SMALL | {"width": 64, "cascade": True, "masks": True}),
    "retinanet": (RetinaNet, {"anchors": 16, "finest": 4}),
    "fcos": (FCOS, {}),
    "fcos from stride 4": (FCOS, {"finest": 4}),
    "centernet": (CenterNet, {}),
}


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


def make(kind, seed=0, **more):
    torch.manual_seed(seed)
    backbone = HRNet(TINY)
    detector, settings = KINDS[kind]
    return backbone, detector(backbone.channels, 5, pyramid=32, **settings, **more)


@pytest.mark.parametrize(
    ("preset", "neck", "mask", "cascade", "both", "fcos"),
    [("w18", 12_582_036, 30.1, 55.1, 63.1, 17.5), ("w32", 32_379_072, 49.9, 74.9, 82.9, 37.3)],
)
def test_published_sizes(preset, neck, mask, cascade, both, fcos):
    """Of backbone and neck; and in millions, as the paper counts them, of whole detectors."""
    with torch.device("meta"):
        backbone = HRNet(preset)
        neck_alone = RCNN(backbone.channels, 80).neck
        heads = [
            RCNN(backbone.channels, 80, masks=m, cascade=c) for m, c in ((True, False), (False, True), (True, True))
        ]
        heads.append(FCOS(backbone.channels, 80))
    assert parameters(backbone, neck_alone) == neck
    assert [round(parameters(backbone, head) / 1e6, 1) for head in heads] == [mask, cascade, both, fcos]


@pytest.mark.parametrize("bf16", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", KINDS)
def test_losses_are_finite_and_fall(kind, bf16):
    backbone, detector = make(kind)
    x, batch = torch.randn(2, 3, 128, 160), make_batch()
    optimizer = torch.optim.Adam([*backbone.parameters(), *detector.parameters()], 2e-3)
    totals = []
    steps = 1 if bf16 else 8  # emulated where the processor has none
    for _ in range(steps):
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
    assert bf16 or totals[-1] < 0.7 * totals[0]


@pytest.mark.parametrize("kind", KINDS)
def test_detections_lie_in_their_images(kind):
    backbone, detector = make(kind, score=0.0)
    batch = make_batch()
    with torch.inference_mode():
        results = detector.eval().detect(backbone.eval()(torch.randn(2, 3, 128, 160)), batch)
    for result, (height, width) in zip(results, batch["size"].tolist(), strict=True):
        boxes, scores, labels = result["boxes"], result["scores"], result["labels"]
        assert 0 < len(boxes) == len(scores) == len(labels) <= 100
        assert (boxes[:, 2:] > boxes[:, :2]).all()
        assert boxes.min() >= 0
        assert (boxes[:, [0, 2]] <= width).all()
        assert (boxes[:, [1, 3]] <= height).all()
        assert scores.diff().max() <= 0
        assert set(labels.tolist()) <= set(range(5))
        if "mask" in kind:
            assert result["masks"].shape == (len(boxes), 28, 28)
            assert 0 <= result["masks"].min() <= result["masks"].max() <= 1


@pytest.mark.parametrize("kind", ["mask", "cascade mask"])
def test_masks_are_learned_where_they_are_read(kind):
    """In the channel of the object's own class: 0 and 3 of five."""
    backbone, detector = make(kind)
    losses = detector.loss(backbone(torch.randn(2, 3, 128, 160)), make_batch())
    sum(v for k, v in losses.items() if k.startswith("mask")).backward()
    learned = detector.mask_heads[0][1].mask_fcn_logits.bias.grad != 0
    assert learned.nonzero().flatten().tolist() == [0, 3]


@pytest.mark.parametrize("kind", KINDS)
def test_images_without_objects(kind):
    backbone, detector = make(kind)
    batch = make_batch()
    batch["boxes"], batch["labels"] = [batch["boxes"][1]] * 2, [batch["labels"][1]] * 2
    batch["masks"] = [batch["masks"][1]] * 2
    losses = detector.loss(backbone(torch.randn(2, 3, 128, 160)), batch)
    assert all(v.isfinite() for v in losses.values())
    torch.stack(list(losses.values())).sum().backward()


def test_centres_may_move_so_far():
    """Within the radius a box still overlaps as much as asked, and no further in one of the three ways."""
    for w, h in ((10.0, 20.0), (7.0, 3.0), (50.0, 50.0)):
        r = float(radius(torch.tensor([[w, h]]), 0.7))
        moves = [(r, r, w + r, h + r), (-r, -r, w + r, h + r), (r, r, w - r, h - r)]
        overlaps = box_iou(torch.tensor([[0, 0, w, h]]), torch.tensor(moves))
        assert overlaps.min().item() == pytest.approx(0.7, abs=1e-4)


def test_bumps():
    bumps = gaussians(torch.tensor([[3, 2], [0, 0]]), torch.tensor([2.7, 0.4]), (6, 8))
    assert bumps.shape == (2, 6, 8)
    assert bumps[0, 2, 3] == bumps[1, 0, 0] == 1
    assert (bumps[0] > 0).sum() == 25
    assert (bumps[1] > 0).sum() == 1
    assert torch.allclose(bumps[0, :5], bumps[0, :5].flip(0))


def test_centres_are_found_again():
    """What the targets say, put through decoding, gives the boxes back."""
    batch = make_batch()
    detector = CenterNet([8, 16, 32, 64], 5, pyramid=32)
    height, width = (s // 4 for s in batch["image"].shape[-2:])
    heat = torch.full((2, 5, height, width), -9.0)
    offset, size = torch.zeros(2, 2, height, width), torch.zeros(2, 2, height, width)
    for box, label in zip(batch["boxes"][0] / 4, batch["labels"][0].tolist(), strict=True):
        centre, extent = (box[:2] + box[2:]) / 2, box[2:] - box[:2]
        x, y = centre.long().tolist()
        heat[0, label, y, x] = 5
        offset[0, :, y, x], size[0, :, y, x] = centre - centre.long(), extent
    detector.look = lambda maps: (heat, offset, size)
    first, second = detector.detect([], batch)
    assert len(second["boxes"]) == 0
    assert torch.allclose(first["boxes"].sort(0).values, batch["boxes"][0].sort(0).values, atol=1e-4)
    losses = detector.loss([], batch)
    assert losses["offset"] == losses["size"] == 0
    assert losses["heatmap"] < 0.1


def test_one_stage_detectors_are_torchvisions():
    """The same output and loss as torchvision's own model with the neck for its backbone."""
    for kind, theirs in ((RetinaNet, detection.RetinaNet), (FCOS, detection.FCOS)):
        torch.manual_seed(0)
        backbone = HRNet(TINY)
        ours = kind(backbone.channels, 5, pyramid=64)

        class Whole(torch.nn.Module):
            out_channels = 64

            def forward(self, x, backbone=backbone, neck=ours.neck):
                return OrderedDict((str(i), level) for i, level in enumerate(neck(backbone(x))))

        anchors, head = ours.detector.anchor_generator, ours.detector.head
        model = theirs(Whole(), 5, min_size=128, max_size=160, anchor_generator=anchors, head=head)
        image = torch.rand(3, 128, 160)
        batch = {"image": image[None], "size": torch.tensor([[128, 160]])}
        batch |= {"boxes": make_batch()["boxes"][:1], "labels": make_batch()["labels"][:1]}
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in (model.transform.image_mean, model.transform.image_std))
        maps = backbone(((image - mean) / std)[None])
        expected = model([image], [{"boxes": batch["boxes"][0], "labels": batch["labels"][0]}])
        found = ours.loss(maps, batch)
        assert sorted(v.item() for v in expected.values()) == pytest.approx(
            sorted(v.item() for v in found.values()), 1e-4
        )
