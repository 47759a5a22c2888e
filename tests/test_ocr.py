"""Segmentation networks from official weights: the whole forward pass computed once more, with nothing but the file."""

import itertools
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hrnet import HRNet, HRNetConfig
from hrnet.checkpoints import WeightsError, read
from hrnet.heads import OCR, HRNetV2, ObjectContext
from hrnet.inference import Protocol, starts
from hrnet.weights import InitFrom, load, write

TINY = HRNetConfig(8, modules=(1, 2, 2), blocks=1, stem=(1, 8), upsample="bilinear")
NORMS = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


class Net(nn.Module):
    def __init__(self, head=OCR, config=TINY, seed=0, classes=19, align_corners=False, **kwargs):
        super().__init__()
        torch.manual_seed(seed)
        self.backbone = HRNet(replace(config, align_corners=align_corners))
        self.head = head(self.backbone.channels, classes, align_corners=align_corners, **kwargs)
        self.eval()

    def forward(self, x):
        return self.head(self.backbone(x))


@torch.no_grad()
def trained(*args, **kwargs):
    """A network whose every tensor matters, and whose batch norms know its maps: values stay near 1."""
    net = Net(*args, **kwargs)
    for name, parameter in net.named_parameters():
        if parameter.ndim == 4:
            parameter.normal_(std=(1 / parameter[0].numel()) ** 0.5)
        elif name.endswith("bias"):
            parameter.normal_(std=0.2)
        else:
            parameter.uniform_(0.5, 1.5)
    norms = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
    for m in norms:
        m.momentum = 1
    net.train()(torch.randn(2, 3, 64, 64))
    return net.eval()


@pytest.fixture(scope="module")
def image():
    return torch.randn(2, 3, 64, 97, generator=torch.Generator().manual_seed(0))


def close(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()


# The networks of the official segmentation code, from names and definitions alone


def convolve(state, x, name, norm=None, stride=1, relu=True):
    """A convolution as its weights say, then the batch norm and the ReLU if there is one."""
    weight = state[f"{name}.weight"]
    x = F.conv2d(x, weight, state.get(f"{name}.bias"), stride, padding=weight.shape[-1] // 2)
    if norm is None:
        return x
    weight, bias, mean, var = (state[f"{norm}.{part}"][:, None, None] for part in NORMS[:4])
    x = (x - mean) / (var + 1e-5).sqrt() * weight + bias
    return x.clamp(min=0) if relu else x


def unit(state, x, name):
    """A basic block or a bottleneck: by the number of its convolutions."""
    last = 3 if f"{name}.conv3.weight" in state else 2
    y = x
    for i in range(1, last + 1):
        y = convolve(state, y, f"{name}.conv{i}", f"{name}.bn{i}", relu=i < last)
    if f"{name}.downsample.0.weight" in state:
        x = convolve(state, x, f"{name}.downsample.0", f"{name}.downsample.1", relu=False)
    return (x + y).clamp(min=0)


def chain(state, x, name):
    """All units of a numbered list."""
    for i in itertools.count():
        if f"{name}.{i}.conv1.weight" not in state:
            return x
        x = unit(state, x, f"{name}.{i}")


def resize(x, like, align_corners):
    return F.interpolate(x, like.shape[-2:], mode="bilinear", align_corners=align_corners)


def fused(state, maps, name, align_corners):
    out = []
    for i, target in enumerate(maps):
        total = torch.zeros_like(target)
        for j, x in enumerate(maps):
            path = f"{name}.{i}.{j}"
            if j > i:
                x = resize(convolve(state, x, f"{path}.0", f"{path}.1", relu=False), target, align_corners)
            for k in range(i - j):
                x = convolve(state, x, f"{path}.{k}.0", f"{path}.{k}.1", 2, relu=k < i - j - 1)
            total = total + x
        out.append(total.clamp(min=0))
    return out


def trunk(state, x, align_corners):
    """The concatenated maps."""
    for i in (1, 2):
        x = convolve(state, x, f"conv{i}", f"bn{i}", stride=2)
    maps = [chain(state, x, "layer1")]
    for stage in (2, 3, 4):
        moved = []
        for i in range(stage):
            path = f"transition{stage - 1}.{i}"
            x = maps[min(i, len(maps) - 1)]
            if f"{path}.0.weight" in state:
                x = convolve(state, x, f"{path}.0", f"{path}.1")
            elif f"{path}.0.0.weight" in state:
                x = convolve(state, x, f"{path}.0.0", f"{path}.0.1", 2)
            moved.append(x)
        maps = moved
        for m in itertools.count():
            if f"stage{stage}.{m}.branches.0.0.conv1.weight" not in state:
                break
            maps = [chain(state, x, f"stage{stage}.{m}.branches.{b}") for b, x in enumerate(maps)]
            maps = fused(state, maps, f"stage{stage}.{m}.fuse_layers", align_corners)
    return torch.cat([maps[0], *(resize(x, maps[0], align_corners) for x in maps[1:])], 1)


def plain(state, x, align_corners):
    x = convolve(state, trunk(state, x, align_corners), "last_layer.0", "last_layer.1")
    return convolve(state, x, "last_layer.3")


def ocr(state, x, align_corners):
    """Segmentation and coarse segmentation (seg_hrnet_ocr.py), sums written as einsum."""

    def project(x, name, times):
        for i in range(times):
            x = convolve(state, x, f"{block}.{name}.{2 * i}", f"{block}.{name}.{2 * i + 1}.0")
        return x

    block = "ocr_distri_head.object_context_block"
    x = trunk(state, x, align_corners)
    coarse = convolve(state, convolve(state, x, "aux_head.0", "aux_head.1"), "aux_head.3")
    pixels = convolve(state, x, "conv3x3_ocr.0", "conv3x3_ocr.1")
    share = coarse.exp() / coarse.exp().sum((2, 3), keepdim=True)
    objects = torch.einsum("bkhw,bchw->bck", share, pixels)[..., None]
    query, key, value = project(pixels, "f_pixel", 2), project(objects, "f_object", 2), project(objects, "f_down", 1)
    alike = torch.einsum("bchw,bck->bkhw", query, key[..., 0]) / query.shape[1] ** 0.5
    context = torch.einsum("bkhw,bck->bchw", alike.softmax(1), value[..., 0])
    x = torch.cat([project(context, "f_up", 1), pixels], 1)
    x = convolve(state, x, "ocr_distri_head.conv_bn_dropout.0", "ocr_distri_head.conv_bn_dropout.1.0")
    return convolve(state, x, "cls_head"), coarse


def contents(path, dtype=torch.float64):
    """An official file's tensors under the network's own names."""
    return {key.removeprefix("model."): value.to(dtype) for key, value in torch.load(path).items()}


@torch.no_grad()
@pytest.mark.parametrize("align_corners", [False, True])
def test_plain_network_is_the_official_one(align_corners, image, tmp_path):
    assert write(trained(HRNetV2, seed=1).state_dict(), tmp_path / "a.pth", "official-segmentation") == []
    net = Net(HRNetV2, seed=2, align_corners=align_corners)
    load(net, InitFrom(str(tmp_path / "a.pth")))
    expected = plain(contents(tmp_path / "a.pth"), image.double(), align_corners)
    assert expected.shape == (2, 19, 16, 25)
    assert close(net(image), expected) < 1e-5
    assert close(plain(contents(tmp_path / "a.pth"), image.double(), not align_corners), expected) > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("align_corners", [False, True])
def test_ocr_is_the_official_one(align_corners, image, tmp_path):
    assert write(trained(seed=1).state_dict(), tmp_path / "a.pth", "official-segmentation") == []
    net = Net(seed=2, align_corners=align_corners)
    load(net, InitFrom(str(tmp_path / "a.pth")))
    expected = ocr(contents(tmp_path / "a.pth"), image.double(), align_corners)
    features = net.backbone(image)
    for found, wanted in zip(net.head.both(features), expected, strict=True):
        assert wanted.shape == (2, 19, 16, 25)
        assert close(found, wanted) < 1e-5
    assert torch.equal(net.head(features), net.head.both(features)[0])
    other = ocr(contents(tmp_path / "a.pth"), image.double(), not align_corners)
    assert all(close(a, b) > 1e-3 for a, b in zip(other, expected, strict=True))


@torch.no_grad()
@pytest.mark.slow
def test_w48_with_ocr_is_the_official_one(tmp_path):
    write(
        trained(config=HRNetConfig(48, upsample="bilinear")).state_dict(), tmp_path / "a.pth", "official-segmentation"
    )
    file = read(tmp_path / "a.pth")
    with torch.device("meta"):
        net = Net(config=file.config, align_corners=file.config.align_corners)
    net.load_state_dict(file.state, assign=True)
    x = torch.randn(1, 3, 64, 96)
    expected = ocr(contents(tmp_path / "a.pth", torch.float32), x, True)
    for found, wanted in zip(net.head.both(net.backbone(x)), expected, strict=True):
        assert close(found, wanted) < 1e-4


@pytest.mark.parametrize(("head", "count"), [(HRNetV2, 65_859_379), (OCR, 70_372_678)])
def test_published_sizes(head, count):
    with torch.device("meta"):
        assert sum(p.numel() for p in Net(head, HRNetConfig(48)).parameters()) == count


def test_names_are_the_official_ones():
    with torch.device("meta"):
        names = set(OCR([8, 16, 32, 64], 19).state_dict())
    block, mixed = "ocr_distri_head.object_context_block", "ocr_distri_head.conv_bn_dropout"
    pairs = [("conv3x3_ocr.0", "conv3x3_ocr.1"), ("aux_head.0", "aux_head.1"), (f"{mixed}.0", f"{mixed}.1.0")]
    pairs += [(f"{block}.{f}.{i}", f"{block}.{f}.{i + 1}.0") for f in ("f_pixel", "f_object") for i in (0, 2)]
    pairs += [(f"{block}.{f}.0", f"{block}.{f}.1.0") for f in ("f_down", "f_up")]
    expected = {f"{convolution}.weight" for convolution, _ in pairs}
    expected |= {f"{norm}.{part}" for _, norm in pairs for part in NORMS}
    expected |= {f"{name}.{part}" for name in ("aux_head.3", "cls_head") for part in ("weight", "bias")}
    expected |= {"conv3x3_ocr.0.bias", "aux_head.0.bias"}
    assert names == expected


MMSEG = {  # OpenMMLab's names of the head's convolutions, and of those with batch norms
    "decode_head.0.convs.0": True,
    "decode_head.0.conv_seg": False,
    "decode_head.1.bottleneck": True,
    "decode_head.1.object_context_block.query_project.0": True,
    "decode_head.1.object_context_block.query_project.1": True,
    "decode_head.1.object_context_block.key_project.0": True,
    "decode_head.1.object_context_block.key_project.1": True,
    "decode_head.1.object_context_block.value_project": True,
    "decode_head.1.object_context_block.out_project": True,
    "decode_head.1.object_context_block.bottleneck": True,
    "decode_head.1.conv_seg": False,
}


@torch.no_grad()
def test_there_and_back_officially(image, tmp_path):
    source, target = trained(seed=1, align_corners=True), Net(seed=2, align_corners=True)
    assert write(source.state_dict(), tmp_path / "a.pth", "official-segmentation") == []
    file = read(tmp_path / "a.pth")
    assert file.dialect == "official-segmentation"
    assert file.head == "segmentation with OCR"
    assert file.config == replace(TINY, align_corners=True)
    assert file.others == []
    report = load(target, InitFrom(str(tmp_path / "a.pth")))
    assert not report.missing + report.unexpected + report.mismatched + report.dropped
    own, other = target.state_dict(), source.state_dict()
    assert own.keys() == other.keys() == file.state.keys()
    assert all(torch.equal(v, other[k]) for k, v in own.items())
    assert torch.equal(target(image), source(image))


@torch.no_grad()
def test_there_and_back_by_openmmlab(image, tmp_path):
    source, target = trained(seed=1), Net(seed=2)
    assert write(source.state_dict(), tmp_path / "a.pth", "mmseg-ocr") == []
    stored = torch.load(tmp_path / "a.pth")["state_dict"]
    names = {f"{n}.conv.weight" if norm else f"{n}.weight" for n, norm in MMSEG.items()}
    names |= {f"{n}.bn.{part}" for n, norm in MMSEG.items() if norm for part in NORMS}
    names |= {f"{n}.bias" for n, norm in MMSEG.items() if not norm}
    assert {key for key in stored if not key.startswith("backbone.")} == names
    file = read(tmp_path / "a.pth")
    assert file.dialect == "mmseg-ocr"
    assert file.head == "segmentation with OCR"
    assert file.config == TINY
    report = load(target, InitFrom(str(tmp_path / "a.pth")))
    assert not report.missing + report.unexpected + report.mismatched
    for found, wanted in zip(*(net.head.both(net.backbone(image)) for net in (target, source)), strict=True):
        assert close(found, wanted) < 1e-5
    for name in ("aux_head", "conv3x3_ocr"):
        assert not getattr(target.head, name)[0].bias.any()
    write(file.state, tmp_path / "b.pth", "mmseg-ocr")
    again = torch.load(tmp_path / "b.pth")["state_dict"]
    assert stored.keys() == again.keys()
    assert all(torch.equal(v, again[k]) for k, v in stored.items())


@pytest.mark.parametrize(
    ("dialect", "head", "classes", "align_corners"),
    [
        ("official-segmentation", OCR, 19, True),
        ("official-segmentation", OCR, 59, True),
        ("official-segmentation", HRNetV2, 19, False),
        ("official-segmentation", HRNetV2, 60, False),
        ("official-segmentation", HRNetV2, 150, True),
        ("official-segmentation", HRNetV2, 171, True),
        ("mmseg-ocr", OCR, 19, False),
        ("mmseg-ocr", OCR, 150, False),
        ("mmseg", HRNetV2, 150, False),
    ],
)
def test_file_tells_how_it_was_trained(dialect, head, classes, align_corners, tmp_path):
    write(Net(head, classes=classes).state_dict(), tmp_path / "a.safetensors", dialect)
    file = read(tmp_path / "a.safetensors")
    assert file.dialect == dialect
    assert file.config == replace(TINY, align_corners=align_corners)
    expected = {"upsample": "bilinear", "align_corners": align_corners, "head": head, "num_classes": classes}
    assert {k: file.protocol[k] for k in expected} == expected


def test_openmmlabs_settings_come_along(tmp_path):
    text = """
model = dict(type='EncoderDecoder', data_preprocessor=dict(type='SegDataPreProcessor',
    mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], bgr_to_rgb=True),
    test_cfg=dict(mode='slide', crop_size=(769, 512), stride=(513, 341)))
"""
    write(Net(HRNetV2, classes=2).state_dict(), tmp_path / "a.pth", "mmseg")
    names = {"classes": ("road", "car"), "palette": [[128, 64, 128], [0, 0, 142]]}
    content = torch.load(tmp_path / "a.pth") | {"meta": {"cfg": text, "dataset_meta": names}}
    torch.save(content, tmp_path / "a.pth")
    protocol = read(tmp_path / "a.pth").protocol
    assert protocol["class_names"] == ["road", "car"]
    assert protocol["palette"] == names["palette"]
    assert protocol["mean"] == pytest.approx((0.485, 0.456, 0.406))
    assert isinstance(protocol["evaluation"], Protocol)
    assert protocol["evaluation"].window == (769, 512)
    assert starts(2000, 769, protocol["evaluation"].stride)[:3] == [0, 513, 1026]
    assert "bgr" not in protocol


def test_one_head_does_not_pass_for_the_other(tmp_path):
    write(Net(HRNetV2).state_dict(), tmp_path / "a.pth", "official-segmentation")
    with pytest.raises(WeightsError, match=r"head\.cls_head\.weight|head\.ocr_distri_head"):
        load(Net(OCR), InitFrom(str(tmp_path / "a.pth")))


def test_coarse_output_learns_by_itself_and_through_the_objects():
    head = OCR([4, 8], 3, width=16, key=8).train()
    maps = [torch.randn(2, 4, 8, 8), torch.randn(2, 8, 4, 4)]
    head(maps).square().mean().backward()
    assert [name for name, p in head.named_parameters() if p.grad is None] == []
    assert head.aux_head[3].weight.grad.any()


def test_same_object_everywhere_is_the_context_of_every_pixel():
    """Whatever the attention: its shares sum to one."""
    torch.manual_seed(0)
    context = ObjectContext(16, 8, 0.0).eval()
    pixels, objects = torch.randn(2, 16, 5, 6), torch.randn(2, 16, 1, 1)
    torch.testing.assert_close(context(pixels, objects.expand(-1, -1, 4, -1)), context(pixels, objects))


@torch.no_grad()
def test_mixed_precision_gives_nearly_the_same():
    torch.manual_seed(0)
    head, maps = OCR([8, 16], 5, width=32, key=16).eval(), [torch.randn(2, 8, 16, 24), torch.randn(2, 16, 8, 12)]
    with torch.autocast("cpu", torch.bfloat16):
        found = head.both(maps)
        assert head.both([x * 1e4 for x in maps])[0].isfinite().all()
    for half, full in zip(found, head.both(maps), strict=True):
        assert half.dtype == torch.bfloat16
        assert close(half.float(), full) < 0.02
