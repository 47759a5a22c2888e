"""The network run fast gives what it gives anyway."""

import copy
import pickle
from dataclasses import replace

import pytest
import torch
from torch import nn

import hrnet.fast
from hrnet import PRESETS, HRNet, HRNetConfig
from hrnet.fast import Fast, folded
from hrnet.heads import OCR, Classification, HRNetV2
from tasks.pose import Pose

TINY = HRNetConfig(8, modules=(1, 2, 1), blocks=1, stem=(1, 8))


def network(head=None, config=TINY):
    torch.manual_seed(0)
    backbone = HRNet(config)
    net = backbone if head is None else nn.Sequential(backbone, head(backbone.channels, 5))
    for name, buffer in net.named_buffers():  # as if trained
        if name.endswith("running_mean"):
            buffer.normal_(std=0.1)
        elif name.endswith("running_var"):
            buffer.uniform_(0.5, 2)
    return net.eval()


def flat(output):
    parts = output if isinstance(output, list | tuple) else [output]
    return torch.cat([part.flatten() for part in parts])


def error(a, b):
    return float((flat(a) - flat(b)).abs().max() / flat(a).abs().max())


@pytest.mark.parametrize("head", [None, HRNetV2, Classification, OCR])
@pytest.mark.parametrize("size", [(2, 3, 75, 50), pytest.param((1, 3, 64, 96), marks=pytest.mark.slow)])
@pytest.mark.parametrize("upsample", ["nearest", "bilinear"])
@torch.no_grad()
def test_fast_is_the_same_function(head, size, upsample):
    net, x = network(head, replace(TINY, upsample=upsample)), torch.randn(size)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    fast = Fast(net)
    assert error(net(x), fast(x)) < 1e-5
    assert error(net(x), Fast(net, torch.bfloat16)(x)) < 0.1
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())  # a copy was folded


@pytest.mark.parametrize(
    "config",
    [
        TINY,
        replace(TINY, fusion="across"),
        replace(TINY, fusion="final"),
        pytest.param(PRESETS["w18"], marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("outputs", [1, 2, 4])
@torch.no_grad()
def test_fast_for_every_way_to_exchange(config, outputs):
    torch.manual_seed(0)
    net, x = HRNet(config, outputs).eval(), torch.randn(2, 3, 64, 64)
    fast = Fast(net)
    expected = net(x)
    assert len(fast(x)) == outputs
    assert max(error(a, b) for a, b in zip(expected, fast(x))) < 1e-5
    assert max(error(a, b) for a, b in zip(net(x[:1]), fast(x[:1]))) < 1e-5  # packed for another size


@torch.no_grad()
def test_used_or_not_it_moves_and_is_kept():
    net, x = network(), torch.randn(1, 3, 64, 48)
    expected = net(x)
    for use in (lambda fast: None, lambda fast: fast(x)):
        fast = Fast(net)
        use(fast)
        assert error(expected, copy.deepcopy(fast)(x)) < 1e-5
        assert error(expected, pickle.loads(pickle.dumps(fast))(x)) < 1e-5
        assert error(expected, fast.to(torch.bfloat16)(x)) < 0.1
        assert error(expected, fast.double()(x)) < 0.1
        with pytest.raises(RuntimeError, match="make another"):
            fast.load_state_dict(fast.state_dict())


def test_a_head_learns_on_it():
    fast = Fast(network(OCR)).train()
    assert not any(module.training for module in fast.modules())
    backbone = Fast(network())
    head = nn.Conv2d(backbone.channels[0], 2, 1)
    head(backbone(torch.randn(1, 3, 64, 64))[0]).sum().backward()
    assert head.weight.grad.abs().sum() > 0


class Named(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone = network()

    def forward(self, image):
        maps = self.backbone(image)
        return {"maps": maps, "best": maps[0].argmax(1)}


@torch.no_grad()
def test_outputs_of_any_form():
    net, x = Named(), torch.randn(1, 3, 64, 64)
    output = Fast(net, torch.bfloat16)(x)
    assert error(net(x)["maps"], output["maps"]) < 0.1
    assert output["best"].dtype == torch.int64


@torch.no_grad()
def test_fast_without_onednn(monkeypatch):
    monkeypatch.setattr(hrnet.fast, "fusing", lambda x: False)
    net, x = network(), torch.randn(1, 3, 64, 48)
    assert error(net(x), Fast(net)(x)) < 1e-5
    assert error(net(x), Fast(net, torch.bfloat16)(x)) < 0.1


def test_no_batch_norm_is_left_in_the_backbone():
    kinds = [type(m) for m in folded(network()).modules()]
    assert nn.BatchNorm2d not in kinds
    assert kinds.count(nn.Conv2d) == sum(isinstance(m, nn.Conv2d) for m in network().modules())


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.slow
def test_compiled_is_the_same_function_for_so_many_sizes(backend, monkeypatch):
    compiled = torch.compile
    if backend != "inductor":  # traced, without a minute of C++
        monkeypatch.setattr(
            torch, "compile", lambda net, dynamic, options: compiled(net, dynamic=dynamic, backend=backend)
        )
    net = network(config=HRNetConfig(4, modules=(1, 1, 1), blocks=1, stem=(1, 4)))
    fast = Fast(net, compiled=True, sizes=1)
    with torch.inference_mode():
        for size in ((1, 3, 64, 64), (1, 3, 32, 64), (1, 3, 64, 64)):
            x = torch.randn(size)
            assert error(net(x), fast(x)) < 1e-5
    assert set(fast.prepared) == {(1, 3, 64, 64)}


def test_evaluates_to_the_same_numbers(cli, small, tmp_path):
    backbone = "--model.backbone={width: 8, modules: [1, 1, 1], blocks: 1, stem: [1, 16]}"
    cli(tmp_path, "fit", *small, backbone, "--trainer.max_epochs=1", task=Pose)
    slow = cli(tmp_path, "validate", *small, "--ckpt_path=last", task=Pose)
    fast = cli(tmp_path, "validate", *small, "--ckpt_path=last", "--fast=merged", task=Pose)
    assert fast.numbers == pytest.approx(slow.numbers, abs=1e-4)
    assert isinstance(fast.model.backbone, HRNet)  # put back


@pytest.mark.slow
def test_trains_to_the_same_weights_with_its_blocks_compiled():
    config = HRNetConfig(4, modules=(1, 1, 1), blocks=1, stem=(1, 4))
    plain, compiled = (network(config=config).double().train() for _ in range(2))
    hrnet.fast.compile_blocks(compiled, backend="aot_eager")  # traced, without a minute of C++
    hrnet.fast.parallel(compiled)  # nothing but on a GPU
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    for net in (plain, compiled):
        flat(net(x)).square().mean().backward()
    names = dict(plain.named_parameters()).keys()
    assert dict(compiled.named_parameters()).keys() == names
    for name, other in compiled.named_parameters():
        assert error(plain.get_parameter(name).grad, other.grad) < 1e-6


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@torch.no_grad()
def test_captured_on_a_gpu_and_side_by_side():
    net, x = network().cuda(), [torch.randn(2, 3, 64, 96, device="cuda") for _ in range(3)]
    with torch.backends.cudnn.flags(allow_tf32=False):
        fast, side = Fast(net), network().cuda()
        hrnet.fast.parallel(side)
        outputs = [fast(image) for image in x]
        for image, output in zip(x, outputs):  # the first ones were not overwritten
            assert error(net(image), output) < 1e-4
            assert error(net(image), side(image)) < 1e-4


@torch.no_grad()
def test_shared_batch_norm_is_merged_and_another_norm_refused():
    network = HRNet("w18_small_v1").eval()
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    image = torch.randn(1, 3, 64, 64)
    shared = torch.nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(network)).eval()
    for a, b in zip(Fast(shared)(image), network(image), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * float(b.abs().max()))
    network.bn1 = torch.nn.GroupNorm(4, 64)
    with pytest.raises(TypeError, match="GroupNorm behind a convolution"):
        Fast(network)


def test_no_gradient_is_promised():
    image = torch.randn(1, 3, 64, 64, requires_grad=True)
    assert not any(x.requires_grad for x in Fast(HRNet("w18_small_v1"))(image))
