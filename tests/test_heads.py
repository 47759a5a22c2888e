"""The four representations: shapes, definitions written out, official initialisation."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hrnet.heads import Classification, HRNetV1, HRNetV2, HRNetV2p, concatenate

CHANNELS = [4, 8, 16, 32]


def make_maps(height, width, batch=2, channels=CHANNELS):
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(batch, c, math.ceil(height / 2**i), math.ceil(width / 2**i), generator=generator)
        for i, c in enumerate(channels)
    ]


def test_v1_reads_the_finest_map_alone():
    head = HRNetV1(CHANNELS, 5)
    maps = make_maps(16, 12)
    expected = torch.einsum("bchw,kc->bkhw", maps[0], head.final_layer.weight[:, :, 0, 0])
    assert torch.allclose(head(maps), expected, atol=1e-6)  # the bias is 0
    assert torch.equal(head(maps[:1]), head(maps))
    assert HRNetV1.maps == 1


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("head", [HRNetV1, HRNetV2])
def test_kernel_keeps_the_size(head, kernel):
    assert head(CHANNELS, 5, kernel=kernel)(make_maps(16, 13)).shape == (2, 5, 16, 13)


@pytest.mark.parametrize("align_corners", [False, True])
def test_v2_is_concatenation_and_two_convolutions(align_corners):
    head = HRNetV2(CHANNELS, 5, align_corners=align_corners).eval()
    nn.init.normal_(head.last_layer[1].running_mean)
    for i in (0, 3):
        nn.init.normal_(head.last_layer[i].weight)
    maps = make_maps(15, 13)
    up = [maps[0]]
    up += [F.interpolate(x, (15, 13), mode="bilinear", align_corners=align_corners) for x in maps[1:]]
    first, bn, _, last = head.last_layer
    x = F.conv2d(torch.cat(up, 1), first.weight, first.bias)
    x = (x - bn.running_mean[:, None, None]) / (bn.running_var[:, None, None] + 1e-5).sqrt()
    expected = F.conv2d(x.clamp(min=0), last.weight, last.bias)
    assert torch.allclose(head(maps), expected, atol=1e-4)


def test_align_corners_lays_corners_on_corners():
    x = torch.arange(6.0).reshape(1, 1, 2, 3)
    y = concatenate([torch.zeros(1, 1, 8, 12), x], align_corners=True)[0, 1]
    assert y[0, 0] == 0
    assert y[0, -1] == 2
    assert y[-1, 0] == 3
    assert y[-1, -1] == 5


@pytest.mark.parametrize("pool", ["average", "max"])
def test_pyramid_pools_the_mixed_map(pool):
    head = HRNetV2p(CHANNELS, 6, pool=pool)
    maps = make_maps(32, 48)
    levels = head(maps)
    assert [tuple(y.shape[-2:]) for y in levels] == [(32, 48), (16, 24), (8, 12), (4, 6), (2, 3)]
    mixed = head.reduction_conv(concatenate(maps, False))
    for i, y in enumerate(levels):
        windows = mixed.unfold(2, 2**i, 2**i).unfold(3, 2**i, 2**i)
        pooled = windows.mean((-1, -2)) if pool == "average" else windows.amax((-1, -2))
        assert torch.allclose(y, head.fpn_conv[i](pooled), atol=1e-5)


@pytest.mark.parametrize("levels", [1, 3, 6])
def test_pyramid_has_the_levels_asked_for(levels):
    assert len(HRNetV2p(CHANNELS, 6, levels=levels)(make_maps(64, 64))) == levels


@pytest.mark.parametrize("size", [(8, 8), (9, 33), (15, 31)])
def test_pyramid_of_small_maps_is_never_empty(size):
    for y in HRNetV2p(CHANNELS, 6)(make_maps(*size)):
        assert y.numel() > 0
        assert torch.isfinite(y).all()


@pytest.mark.parametrize("size", [(16, 16), (56, 40), (15, 9)])
def test_classification_gives_logits(size):
    head = Classification(CHANNELS, 7).eval()
    assert head(make_maps(*size)).shape == (2, 7)


def test_classification_bias_is_an_option():
    counts = [sum(p.numel() for p in Classification(CHANNELS, 10, bias=b).parameters()) for b in (True, False)]
    assert counts[0] - counts[1] == 256 + 512 + 1024 + 2048


def test_v1_starts_at_std_0001_and_bias_0():
    head = HRNetV1([256], 400).final_layer
    assert head.weight.std().item() == pytest.approx(0.001, rel=0.02)
    assert torch.all(head.bias == 0)


def test_v2_starts_at_std_0001_and_leaves_biases_to_torch():
    torch.manual_seed(0)
    head = HRNetV2([32, 64, 128, 256], 300)
    for i in (0, 3):
        conv = head.last_layer[i]
        bound = 1 / math.sqrt(conv.weight[0].numel())
        assert conv.weight.std().item() == pytest.approx(0.001, rel=0.02)
        assert conv.bias.abs().max().item() <= bound
        assert conv.bias.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.15)


def test_classification_starts_as_official():
    torch.manual_seed(0)
    head = Classification([18, 36, 72, 144])
    for m in head.modules():
        if isinstance(m, nn.Conv2d):
            std = math.sqrt(2 / (m.out_channels * m.kernel_size[0] * m.kernel_size[1]))
            assert m.weight.std().item() == pytest.approx(std, rel=5 / math.sqrt(2 * m.weight.numel()))
    bound = 1 / math.sqrt(2048)
    assert head.classifier.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.01)


def test_pyramid_starts_as_official():
    torch.manual_seed(0)
    for m in HRNetV2p([32, 64, 128, 256]).modules():
        if isinstance(m, nn.Conv2d):
            fan_in = m.weight[0].numel()
            assert m.weight.std().item() == pytest.approx(math.sqrt(1 / fan_in), rel=0.02)
            assert m.weight.abs().max().item() <= math.sqrt(3 / fan_in)
            assert torch.all(m.bias == 0)


@pytest.mark.parametrize("head", [HRNetV1, HRNetV2, HRNetV2p, Classification])
def test_heads_use_every_parameter(head):
    module = head(CHANNELS, 5)
    output = module(make_maps(32, 32))
    sum(y.square().sum() for y in (output if isinstance(output, list) else [output])).backward()
    assert [key for key, p in module.named_parameters() if p.grad is None] == []
