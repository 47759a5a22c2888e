"""The joint losses against the official formulas, written as loops."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hrnet.losses import JointsMSE


def make(batch, joints, height=5, width=4, seed=0, binary=True):
    rng = np.random.default_rng(seed)
    output, target = rng.normal(size=(2, batch, joints, height, width))
    weight = rng.integers(0, 2, (batch, joints)).astype(float) if binary else rng.uniform(0, 1.5, (batch, joints))
    return output, target, weight


def official(output, target, weight):
    """JointsMSELoss: the mean over joints of half the mean squared weighted difference."""
    batch, joints = weight.shape
    loss = 0.0
    for k in range(joints):
        squares = []
        for b in range(batch):
            squares += [
                (weight[b, k] * p - weight[b, k] * t) ** 2 for p, t in zip(*both(output, target, b, k), strict=True)
            ]
        loss += 0.5 * sum(squares) / len(squares)
    return loss / joints


def official_ohkm(output, target, weight, topk):
    """JointsOHKMMSELoss: of each sample the topk worst joints, halved."""
    batch, joints = weight.shape
    total = 0.0
    for b in range(batch):
        each = []
        for k in range(joints):
            pairs = list(zip(*both(output, target, b, k), strict=True))
            each.append(0.5 * sum((weight[b, k] * (p - t)) ** 2 for p, t in pairs) / len(pairs))
        total += sum(sorted(each, reverse=True)[:topk]) / topk
    return total / batch


def both(output, target, b, k):
    return output[b, k].ravel(), target[b, k].ravel()


def tensors(*arrays):
    return [torch.tensor(a, dtype=torch.float32) for a in arrays]


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 4), st.integers(1, 6), st.integers(0, 1000), st.booleans())
def test_mse_equals_the_official_loop(batch, joints, seed, binary):
    arrays = make(batch, joints, seed=seed, binary=binary)
    assert JointsMSE()(*tensors(*arrays)).item() == pytest.approx(official(*arrays), rel=1e-5, abs=1e-9)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 4), st.integers(1, 6), st.integers(0, 1000), st.data())
def test_ohkm_equals_the_official_loop(batch, joints, seed, data):
    topk = data.draw(st.integers(1, joints))
    arrays = make(batch, joints, seed=seed)
    expected = official_ohkm(*arrays, topk)
    assert JointsMSE(topk)(*tensors(*arrays)).item() == pytest.approx(expected, rel=1e-5, abs=1e-9)


def test_ohkm_of_all_joints_is_the_mean():
    arrays = tensors(*make(3, 6))
    assert JointsMSE(6)(*arrays).item() == pytest.approx(JointsMSE()(*arrays).item(), rel=1e-6)


@pytest.mark.parametrize("topk", [None, 2])
def test_gradient_is_that_of_finite_differences(topk):
    output, target, weight = tensors(*make(2, 3))
    weight[:] = torch.tensor([0.5, 1.0, 2.0])  # far apart, so that a small step leaves the hardest joints the same
    output.requires_grad_()
    loss = JointsMSE(topk)
    loss(output, target, weight).backward()
    direction = torch.randn(output.shape, generator=torch.Generator().manual_seed(0))
    step = 1e-2  # the loss is quadratic: central differences are exact but for rounding
    with torch.no_grad():
        ahead = loss(output + step * direction, target, weight).double()
        behind = loss(output - step * direction, target, weight).double()
    assert ((ahead - behind) / (2 * step)).item() == pytest.approx((output.grad * direction).sum().item(), rel=1e-3)


def test_mse_gradient_in_closed_form():
    output, target, weight = tensors(*make(2, 3, seed=5, binary=False))
    output.requires_grad_()
    JointsMSE()(output, target, weight).backward()
    expected = weight[..., None, None] ** 2 * (output.detach() - target) / output.numel()
    assert torch.allclose(output.grad, expected, atol=1e-7)


def test_unseen_joints_cost_nothing():
    output, target, weight = tensors(*make(2, 3))
    weight[:] = 0
    output.requires_grad_()
    loss = JointsMSE()(output, target, weight)
    loss.backward()
    assert loss.item() == 0
    assert torch.all(output.grad == 0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("topk", [None, 2])
def test_half_precision_outputs_are_compared_in_fp32(dtype, topk):
    output, target, weight = tensors(*make(2, 3, height=32, width=32))
    half = output.to(dtype).requires_grad_()
    loss = JointsMSE(topk)(half, target, weight)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(JointsMSE(topk)(half.detach().float(), target, weight).item(), rel=1e-7)
    loss.backward()
    assert half.grad.dtype == dtype


def test_topk_over_the_joints_is_refused():
    with pytest.raises(ValueError, match=r"topk=8, but there are only 3 keypoints"):
        JointsMSE(8)(*tensors(*make(1, 3)))
