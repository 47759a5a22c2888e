"""The network against the published counts (FACTS) and against timm; sizes, fusions, gradients, initialisation."""

import math

import lightning as L
import pytest
import timm
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from hrnet import PRESETS, HRNet, HRNetConfig
from hrnet.blocks import BasicBlock, Bottleneck
from hrnet.heads import Classification, HRNetV1, HRNetV2, HRNetV2p

# Parameters: classification, keys of its state_dict, trunk, pose (17), segmentation (19). GiMAC as printed:
# classification at 224, pose at 256x192 and 384x288, segmentation at 1024x2048.
PUBLISHED = {
    "w18_small_v1": (13_187_464, 552, 1_477_920, 1_284_961, 1_540_819, "1.492", "0.532", "1.196", "31.10"),
    "w18_small_v2": (15_597_464, 990, 3_860_720, 3_616_675, 3_939_579, "2.417", "1.430", "3.217", "71.58"),
    "w18": (21_299_004, 1956, 9_562_260, 9_318_215, 9_641_119, "3.989", "2.969", "6.681", "137.28"),
    "w30": (37_712_220, 1956, 25_812_276, 25_135_883, 26_024_695, "7.549", "6.389", "14.376", "301.36"),
    "w32": (41_232_680, 1956, 29_305_536, 28_536_113, 29_546_515, "8.308", "7.120", "16.020", "336.42"),
    "w40": (57_557_160, 1956, 45_521_216, 44_319_753, 45_894_435, "11.820", "10.500", "23.626", "498.67"),
    "w44": (67_064_984, 1956, 54_974_640, 53_521_205, 55_424_779, "13.861", "12.466", "28.047", "593.02"),
    "w48": (77_469_864, 1956, 65_325_120, 63_595_745, 65_859_379, "16.091", "14.614", "32.882", "696.18"),
    "w64": (128_059_944, 1956, 115_697_600, 112_624_785, 116_640_339, "26.911", "25.042", "56.345", "1196.91"),
}
TINY = {"width": 4, "modules": (1, 2, 2), "blocks": 1, "stem": (1, 8)}


@pytest.fixture(autouse=True)
def one_thread():
    """These maps are small: threads that wait for each other on a busy machine cost ten times what they compute."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def network(config, outputs, head, num_outputs):
    backbone = HRNet(config, outputs)
    return nn.ModuleDict({"backbone": backbone, "head": head(backbone.channels, num_outputs)})


def run(net, image):
    return net["head"](net["backbone"](image))


def parameters(module):
    return sum(p.numel() for p in module.parameters())


def gimac(net, height, width):
    """Multiply-adds of convolutions and linear layers, in 2**30."""
    macs, hooks = 0, []

    def count(module, inputs, output):
        nonlocal macs
        per_output = module.weight[0].numel()
        macs += output.numel() * per_output

    for module in net.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            hooks.append(module.register_forward_hook(count))
    net.eval()
    with torch.no_grad():
        run(net, torch.empty(1, 3, height, width, device="meta"))
    for hook in hooks:
        hook.remove()
    return macs / 2**30


def some(presets):
    """The others differ from these in width alone."""
    kept = ("w18_small_v1", "w18_small_v2", "w32")
    return [p if p in kept else pytest.param(p, marks=pytest.mark.slow) for p in presets]


def randomise(module, seed=0):
    """Weights and BN statistics that keep activations alive and tell every layer from its neighbour."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for m in module.modules():
            if isinstance(m, nn.BatchNorm2d):
                m.weight.uniform_(0.5, 1.0, generator=generator)
                m.bias.normal_(0, 0.2, generator=generator)
                m.running_mean.normal_(0, 0.2, generator=generator)
                m.running_var.uniform_(0.5, 1.5, generator=generator)
            elif isinstance(m, nn.Conv2d):
                m.weight.normal_(0, math.sqrt(1 / m.weight[0].numel()), generator=generator)
                if m.bias is not None:
                    m.bias.normal_(0, 0.1, generator=generator)
    return module


def relative(ours, theirs):
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def published(preset):
    """On no device: with a head each for classes, keypoints and pixels."""
    with torch.device("meta"):
        classification = network(preset, 4, Classification, 1000)
        return classification, network(preset, 1, HRNetV1, 17), network(preset, 4, HRNetV2, 19)


@pytest.mark.parametrize("preset", some(PUBLISHED))
def test_parameters_are_the_published_ones(preset):
    cls, keys, trunk, pose, seg, *_ = PUBLISHED[preset]
    classification, keypoints, segmentation = published(preset)
    assert parameters(classification) == cls
    assert len(classification.state_dict()) == keys
    assert parameters(classification["backbone"]) == trunk
    assert parameters(keypoints) == pose
    assert parameters(segmentation) == seg


@pytest.mark.parametrize("preset", some(PUBLISHED))
def test_multiplications_are_the_published_ones(preset):
    printed = PUBLISHED[preset][5:]
    classification, keypoints, segmentation = published(preset)
    measured = (
        gimac(classification, 224, 224),
        gimac(keypoints, 256, 192),
        gimac(keypoints, 384, 288),
        gimac(segmentation, 1024, 2048),
    )
    for value, text in zip(measured, printed, strict=True):
        digits = len(text.split(".")[1])
        assert f"{value:.{digits}f}" == text


def test_presets_are_the_nine_of_the_table():
    assert list(PRESETS) == list(PUBLISHED)


@pytest.mark.parametrize(("preset", "count"), [("w18", 12_582_036), ("w32", 32_379_072)])
def test_pyramid_parameters(preset, count):
    with torch.device("meta"):
        assert parameters(network(preset, 4, HRNetV2p, 256)) == count


@pytest.mark.parametrize("preset", some(PRESETS))
def test_outputs_equal_timm(preset):
    name = {"w18_small_v1": "small", "w18_small_v2": "small_v2"}.get(preset, preset)
    name = f"hrnet_w18_{name}" if name.startswith("small") else f"hrnet_{name}"
    # On "meta" and then emptied: timm's own initialisation of 128 M weights would cost more than the comparison.
    with torch.device("meta"):
        theirs = timm.create_model(name, pretrained=False)
        ours = network(preset, 4, Classification, 1000)
    theirs = randomise(theirs.to_empty(device="cpu")).eval()
    nn.init.normal_(theirs.classifier.weight, std=0.02)
    nn.init.normal_(theirs.classifier.bias, std=0.1)
    state = {k: v for k, v in theirs.state_dict().items() if not k.endswith("num_batches_tracked")}
    taken = set()
    for part in ours.values():
        own = {k: state[k] for k in part.state_dict() if k in state}
        missing, unexpected = part.load_state_dict(own, strict=False, assign=True)
        assert not unexpected
        assert all(k.endswith("num_batches_tracked") for k in missing)
        taken |= own.keys()
    assert taken == state.keys()
    ours.eval()
    image = torch.randn(1, 3, 64, 96, generator=torch.Generator().manual_seed(1))
    expected = []
    theirs.stage4.register_forward_hook(lambda module, inputs, output: expected.extend(output))
    with torch.no_grad():
        maps = ours["backbone"](image)
        assert relative(ours["head"](maps), theirs(image)) <= 1e-5
    assert len(maps) == len(expected) == 4
    for ours_map, theirs_map in zip(maps, expected, strict=True):
        assert theirs_map.std() > 1e-3  # a comparison of zeros would show nothing
        assert relative(ours_map, theirs_map) <= 1e-5


def test_gradients_equal_timm():
    theirs = randomise(timm.create_model("hrnet_w18_small", pretrained=False)).train()
    ours = network("w18_small_v1", 4, Classification, 1000).train()
    state = theirs.state_dict()
    for part in ours.values():
        part.load_state_dict({k: state[k] for k in part.state_dict()})
    image = torch.randn(4, 3, 96, 64, generator=torch.Generator().manual_seed(1))
    direction = torch.randn(4, 1000, generator=torch.Generator().manual_seed(2))
    x, y = image.clone().requires_grad_(), image.clone().requires_grad_()
    (run(ours, x) * direction).sum().backward()
    (theirs(y) * direction).sum().backward()
    assert relative(x.grad, y.grad) <= 1e-5
    expected = dict(theirs.named_parameters())
    compared = 0
    for part in ours.values():
        for key, parameter in part.named_parameters():
            scale = expected[key].grad.abs().max().clamp(min=1e-3)
            assert ((parameter.grad - expected[key].grad).abs().max() / scale).item() <= 1e-4, key
            compared += 1
    assert compared == len(expected)
    # Training-mode statistics too.
    statistics = theirs.state_dict()
    for key, value in ours["backbone"].state_dict().items():
        assert torch.allclose(value, statistics[key], rtol=1e-4, atol=1e-6), key


@pytest.fixture(scope="module")
def small():
    return {mode: HRNet(HRNetConfig(**TINY, upsample=mode), 4).eval() for mode in ("nearest", "bilinear")}


@settings(max_examples=30, deadline=None)
@given(height=st.integers(32, 140), width=st.integers(32, 140), mode=st.sampled_from(["nearest", "bilinear"]))
def test_any_size_from_32(small, height, width, mode):
    with torch.no_grad():
        maps = small[mode](torch.randn(1, 3, height, width))
    for i, y in enumerate(maps):
        stride = 4 * 2**i
        assert y.shape == (1, TINY["width"] * 2**i, math.ceil(height / stride), math.ceil(width / stride))
        assert torch.isfinite(y).all()


@pytest.mark.parametrize("size", [(33, 47), (96, 64), (75, 131)])
def test_presets_take_odd_sizes(size):
    net = network("w18_small_v1", 4, HRNetV2, 5).eval()
    with torch.no_grad():
        assert run(net, torch.randn(1, 3, *size)).shape == (1, 5, math.ceil(size[0] / 4), math.ceil(size[1] / 4))


@pytest.mark.parametrize("size", [(31, 64), (64, 31), (1, 1)])
def test_below_32_is_refused(small, size):
    with pytest.raises(ValueError, match="at least 32x32"):
        small["nearest"](torch.zeros(1, 3, *size))


@pytest.mark.parametrize("width", [673, 690, 701])
def test_odd_size_computes_what_its_padded_image_does(width):
    """Nearest up-sampling of a size that 32 does not divide: no map is stretched. Beyond the reach of the right border
    the maps equal those of the image padded to a multiple of 32 (measured reach of this network: under 320 pixels)."""
    net = randomise(HRNet(HRNetConfig(**TINY | {"modules": (1, 1, 1)}))).eval()
    image = torch.randn(1, 3, 64, width, generator=torch.Generator().manual_seed(3))
    padded = F.pad(image, (0, 704 - width))
    with torch.no_grad():
        for stride, y, z in zip(net.strides, net(image), net(padded), strict=True):
            columns = (width - 320) // stride
            assert relative(y[..., :columns], z[..., :columns]) < 1e-5


@pytest.mark.parametrize("upsample", ["nearest", "bilinear"])
@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("size", [(16, 24), (13, 19)])
def test_fusion_is_sum_of_paths(upsample, align_corners, size):
    """One exchange against its definition: identity, 1x1 + BN + up-sampling, or a chain of strided 3x3, summed."""
    config = HRNetConfig(**TINY, upsample=upsample, align_corners=align_corners)
    module = randomise(HRNet(config)).eval().stage4[0]
    maps, (h, w) = [], size
    for i in range(4):
        maps.append(torch.randn(2, TINY["width"] * 2**i, h, w))
        h, w = math.ceil(h / 2), math.ceil(w / 2)

    def bn(layer, x):
        return F.batch_norm(x, layer.running_mean, layer.running_var, layer.weight, layer.bias)

    def block(unit, x):
        y = F.relu(bn(unit.bn1, F.conv2d(x, unit.conv1.weight, padding=1)))
        return F.relu(bn(unit.bn2, F.conv2d(y, unit.conv2.weight, padding=1)) + x)

    with torch.no_grad():
        fused = module(list(maps))
        branches = []
        for branch, x in zip(module.branches, maps, strict=True):
            for unit in branch:
                x = block(unit, x)
            branches.append(x)
        for target in range(4):
            total = torch.zeros_like(maps[target])
            for source in range(4):
                y, path = branches[source], module.fuse_layers[target][source]
                if source > target:
                    y = bn(path[1], F.conv2d(y, path[0].weight))
                    if upsample == "bilinear":
                        y = F.interpolate(y, total.shape[-2:], mode="bilinear", align_corners=align_corners)
                    else:
                        for axis in (-2, -1):
                            y = y.repeat_interleave(2 ** (source - target), axis)
                        y = y[..., : total.shape[-2], : total.shape[-1]]
                elif source < target:
                    for i, step in enumerate(path):
                        y = bn(step[1], F.conv2d(y, step[0].weight, stride=2, padding=1))
                        y = F.relu(y) if i < len(path) - 1 else y
                total = total + y
            assert torch.allclose(fused[target], F.relu(total), rtol=1e-4, atol=1e-5)


def test_align_corners_and_upsample_matter():
    settings_ = [("nearest", False), ("bilinear", False), ("bilinear", True)]
    nets = [randomise(HRNet(HRNetConfig(**TINY, upsample=u, align_corners=a))).eval() for u, a in settings_]
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        first, second, third = (net(image)[0] for net in nets)
    assert relative(first, second) > 1e-3
    assert relative(second, third) > 1e-3


@pytest.mark.parametrize(
    ("fusion", "fusing"),
    [
        ("within", [[True], [True] * 4, [True] * 3]),
        ("across", [[True], [False, False, False, True], [False, False, True]]),
        ("final", [[False], [False] * 4, [False, False, True]]),
    ],
)
@pytest.mark.parametrize("outputs", [1, 4])
def test_fusion_ablation_fuses_where_it_says(fusion, fusing, outputs):
    with torch.device("meta"):
        net = HRNet(HRNetConfig(32, fusion=fusion), outputs)
    stages = [net.stage2, net.stage3, net.stage4]
    assert [[len(module.fuse_layers) > 0 for module in stage] for stage in stages] == fusing
    assert len(net.stage4[-1].fuse_layers) == outputs
    for branches, stage in zip((2, 3, 4), stages, strict=True):
        for module in stage:
            assert len(module.fuse_layers) in (0, branches, outputs)


@pytest.mark.parametrize("fusion", ["within", "across", "final"])
@pytest.mark.parametrize("upsample", ["nearest", "bilinear"])
@pytest.mark.parametrize("outputs", [1, 2, 3, 4])
def test_every_parameter_gets_a_gradient(fusion, upsample, outputs):
    """DDP fails on parameters that have none."""
    net = HRNet(HRNetConfig(**TINY, fusion=fusion, upsample=upsample), outputs)
    maps = net(torch.randn(2, 3, 64, 72))
    assert len(maps) == len(net.channels) == len(net.strides) == outputs
    sum(y.square().mean() for y in maps).backward()
    for key, parameter in net.named_parameters():
        assert parameter.grad is not None, key
        assert torch.isfinite(parameter.grad).all(), key


@pytest.mark.parametrize("preset", some(PRESETS))
def test_pose_presets_leave_no_parameter_without_gradient(preset):
    with torch.device("meta"):
        net = network(preset, 1, HRNetV1, 17)
        run(net, torch.empty(2, 3, 64, 64)).sum().backward()
    assert [key for key, parameter in net.named_parameters() if parameter.grad is None] == []


@pytest.mark.parametrize("outputs", [1, 4])
def test_checkpointing_changes_nothing_but_memory(outputs):
    nets = [HRNet(HRNetConfig(**TINY, checkpointing=on), outputs) for on in (False, True)]
    nets[1].load_state_dict(nets[0].state_dict())
    image = torch.randn(2, 3, 64, 64)
    results = [net(image) for net in nets]
    for maps in results:
        sum((y * torch.linspace(-1, 1, y.shape[-1])).sum() for y in maps).backward()
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)
    for (key, a), b in zip(nets[0].named_parameters(), nets[1].parameters(), strict=True):
        assert torch.allclose(a.grad, b.grad, rtol=1e-5, atol=1e-6), key


def test_checkpointing_counts_batch_statistics_once():
    """The recomputation sees the same batch again; running means must not move twice."""
    nets = [HRNet(HRNetConfig(**TINY, checkpointing=on)) for on in (False, True)]
    nets[1].load_state_dict(nets[0].state_dict())
    image = torch.randn(2, 3, 64, 64)
    for net in nets:
        sum(y.mean() for y in net(image)).backward()
    for (key, a), b in zip(nets[0].named_buffers(), nets[1].buffers(), strict=True):
        assert torch.allclose(a, b), key


def test_checkpointing_is_quiet_without_gradients():
    net = HRNet(HRNetConfig(**TINY, checkpointing=True)).eval()
    with torch.no_grad():
        assert not net(torch.randn(1, 3, 32, 32))[0].requires_grad


@pytest.mark.parametrize(
    "block", [BasicBlock(4, 4), Bottleneck(4, 1), Bottleneck(3, 1)], ids=["basic", "bottle", "down"]
)
def test_sums_are_not_rectified_in_place(block):
    block = randomise(block).double().eval()
    x = torch.randn(1, block.conv1.in_channels, 2, 3, dtype=torch.float64, requires_grad=True)
    y = block(x)
    assert y._version == 0  # an in-place ReLU would have written into the sum
    if y.shape == x.shape:
        assert torch.autograd.gradcheck(lambda x: x + block(x), x)
        assert torch.autograd.gradcheck(lambda x: block(block(x)) * block(x), x)
    else:
        assert torch.autograd.gradcheck(block, x)


def test_maps_are_not_written_in_place():
    net = HRNet(HRNetConfig(**TINY))
    assert [y._version for y in net(torch.randn(2, 3, 64, 64))] == [0, 0, 0, 0]


@pytest.mark.parametrize("config", ["w18_small_v1", HRNetConfig(**TINY, upsample="bilinear", fusion="across"), TINY])
@pytest.mark.parametrize("outputs", [1, 4])
def test_checkpoint_rebuilds_the_network(config, outputs, tmp_path):
    net = randomise(HRNet(config, outputs, init="normal")).eval()
    trainer = L.Trainer(max_steps=0, logger=False, enable_checkpointing=False, accelerator="cpu")
    trainer.strategy.connect(net)
    trainer.save_checkpoint(tmp_path / "net.ckpt")
    again = HRNet.load_from_checkpoint(tmp_path / "net.ckpt", weights_only=True, map_location="cpu").eval()
    assert again.config == net.config
    assert again.channels == net.channels
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        for a, b in zip(net(image), again(image), strict=True):
            assert torch.equal(a, b)


def convolutions(module):
    return [m for m in module.modules() if isinstance(m, nn.Conv2d)]


@pytest.mark.parametrize("how", ["normal", "kaiming"])
def test_backbone_initialisation_is_official(how):
    torch.manual_seed(0)
    net = HRNet("w18_small_v1", init=how)
    for key, m in net.named_modules():
        if isinstance(m, nn.Conv2d):
            fan_out = m.out_channels * m.kernel_size[0] * m.kernel_size[1]
            std = 0.001 if how == "normal" else math.sqrt(2 / fan_out)
            count = m.weight.numel()
            assert m.weight.std().item() == pytest.approx(std, rel=5 / math.sqrt(2 * count)), key
            assert abs(m.weight.mean().item()) < 5 * std / math.sqrt(count), key
        elif isinstance(m, nn.BatchNorm2d):
            assert torch.all(m.weight == 1)
            assert torch.all(m.bias == 0)
            assert m.momentum == 0.1
            assert m.eps == 1e-5


def test_bn_momentum_reaches_every_layer():
    net = HRNet(HRNetConfig(**TINY, bn_momentum=0.01))
    assert {m.momentum for m in net.modules() if isinstance(m, nn.BatchNorm2d)} == {0.01}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"width": 0}, "at least 1"),
        ({"modules": (1, 4)}, "three numbers"),
        ({"stem": (4,)}, "stem two"),
        ({"fusion": "sometimes"}, "fusion must be one of"),
        ({"upsample": "bicubic"}, "upsample must be one of"),
    ],
)
def test_bad_configs_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        HRNetConfig(**fields)


@pytest.mark.parametrize("outputs", [0, 5])
def test_bad_outputs_are_refused(outputs):
    with pytest.raises(ValueError, match="outputs must be 1 to 4"):
        HRNet(HRNetConfig(**TINY), outputs)


def test_unknown_preset_names_the_known():
    with pytest.raises(ValueError, match=r"'w33'.*w32"):
        HRNet("w33")


def test_lists_make_the_same_config():
    assert HRNetConfig(modules=[1, 4, 3], stem=[4, 64]) == PRESETS["w32"]
    assert hash(HRNetConfig(modules=[1, 4, 3])) == hash(PRESETS["w32"])


def test_other_input_channels():
    assert len(HRNet(HRNetConfig(**TINY, in_channels=1))(torch.randn(2, 1, 64, 64))) == 4
