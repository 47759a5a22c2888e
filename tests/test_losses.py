"""The joint and the pixel losses against the official formulas, written as loops."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from hrnet.losses import OHEM, CrossEntropy, JointsMSE


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


# Pixels


def make_pixels(seed=0, classes=4, ignored=0.3, size=(2, 5, 6), scale=2.0):
    rng = np.random.default_rng(seed)
    logits = torch.tensor(rng.normal(size=(size[0], classes, *size[1:])) * scale, dtype=torch.float32)
    label = rng.integers(0, classes, size)
    label[rng.random(size) < ignored] = 255
    return logits.requires_grad_(), torch.tensor(label, dtype=torch.uint8)


def weights(classes=4):
    return torch.tensor([0.5, 2.0, 1.0, 0.25, 3.0][:classes])


def pixels(logits, label, weight):
    """(probability of its own class, weighted error) of every labelled pixel, in plain Python."""
    found = []
    for vector, number in zip(logits.detach().permute(0, 2, 3, 1).flatten(0, 2).tolist(), label.flatten().tolist()):
        if number != 255:
            own = math.exp(vector[number]) / sum(math.exp(v) for v in vector)
            found.append((own, -math.log(own) * (1 if weight is None else weight[number].item())))
    return found


def hardest(logits, label, weight, threshold, keep):
    """OhemCrossEntropy: sorted by probability, those below the larger of the threshold and the keep-th are kept."""
    ranked = sorted(pixels(logits, label, weight))
    if not ranked:
        return 0.0, 0
    limit = max(ranked[min(keep, len(ranked) - 1)][0], threshold)
    kept = [error for own, error in ranked if own < limit]
    return sum(kept) / len(kept) if kept else 0.0, len(kept)


@pytest.mark.parametrize("weight", [None, weights()])
@pytest.mark.parametrize("ignored", [0.0, 0.3, 0.9])
def test_cross_entropy_equals_torchs(weight, ignored):
    logits, label = make_pixels(ignored=ignored)
    expected = F.cross_entropy(logits, label.long(), weight, ignore_index=255)
    found = CrossEntropy()(logits, label, weight)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(*(torch.autograd.grad(x, logits)[0] for x in (found, expected)))


def test_cross_entropy_is_the_weighted_mean():
    logits, label = make_pixels()
    each = pixels(logits, label, weights())
    total = sum(weights()[n].item() for n in label.flatten().tolist() if n != 255)
    assert CrossEntropy()(logits, label, weights()).item() == pytest.approx(sum(e for _, e in each) / total, rel=1e-5)


@pytest.mark.parametrize("loss", [CrossEntropy, OHEM])
def test_any_number_can_be_ignored(loss):
    logits, label = make_pixels()
    other = label.masked_fill(label == 255, 200)
    assert loss(ignore=200)(logits, other) == loss()(logits, label)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 1000),
    keep=st.integers(0, 80),
    threshold=st.sampled_from([0.0, 0.3, 0.7, 0.9, 1.0]),
    ignored=st.sampled_from([0.0, 0.3, 0.95, 1.0]),
    weighted=st.booleans(),
)
def test_ohem_equals_the_sorted_list(seed, keep, threshold, ignored, weighted):
    logits, label = make_pixels(seed, ignored=ignored)
    weight = weights() if weighted else None
    expected, _ = hardest(logits, label, weight, threshold, keep)
    found = OHEM(threshold, keep)(logits, label, weight)
    assert found.item() == pytest.approx(expected, rel=1e-5, abs=1e-6)
    found.backward()
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize(("threshold", "keep", "kept"), [(0.9, 131_072, 40), (0.0, 10, 10), (0.0, 39, 39)])
def test_ohem_learns_of_the_kept_alone(threshold, keep, kept):
    logits, label = make_pixels(ignored=0.0, size=(1, 5, 8))
    OHEM(threshold, keep)(logits, label).backward()
    learned = logits.grad.abs().sum(1).flatten() > 0
    least = sorted(own for own, _ in pixels(logits, label, None))
    if threshold:  # fewer pixels than `keep`: all but the easiest, and that too where it is hard enough
        kept = sum(own < max(least[-1], threshold) for own in least)
    assert learned.sum() == kept
    assert kept == hardest(logits, label, None, threshold, keep)[1]


def test_ohem_without_a_hard_pixel_is_zero():
    label = torch.zeros(1, 3, 3, dtype=torch.uint8)
    logits = torch.stack([torch.full((1, 3, 3), 20.0), torch.zeros(1, 3, 3)], 1).requires_grad_()
    loss = OHEM(keep=0)(logits, label)
    loss.backward()
    assert loss == 0
    assert not logits.grad.any()


@pytest.mark.parametrize("weight", [None, weights(), torch.zeros(4)])
@pytest.mark.parametrize("loss", [CrossEntropy(), OHEM(), OHEM(keep=3)])
def test_nothing_to_learn_costs_nothing(loss, weight):
    logits, label = make_pixels(ignored=1.0)
    found = loss(logits, label, weight)
    found.backward()
    assert found == 0
    assert torch.equal(logits.grad, torch.zeros_like(logits))


@pytest.mark.parametrize("weight", [None, weights(), torch.tensor([0.0, 0.0, 1.0, 0.0])])
@pytest.mark.parametrize("loss", [CrossEntropy(), OHEM(), OHEM(0.5, 3)])
@pytest.mark.parametrize("scale", [0.0, 1e-3, 1e4])
def test_never_nan(loss, weight, scale):
    logits, label = make_pixels(scale=scale)
    label[0] = 255
    found = loss(logits, label, weight)
    found.backward()
    assert found.isfinite()
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("loss", [CrossEntropy(), OHEM(0.7, 5)])
def test_bf16_logits_are_compared_in_fp32(loss):
    logits, label = make_pixels()
    half = logits.detach().to(torch.bfloat16).requires_grad_()
    found = loss(half, label, weights())
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, loss(half.detach().float(), label, weights()))
    found.backward()
    assert half.grad.dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(loss(half, label, weights()), found)


def test_ohem_that_keeps_all_is_the_plain_mean():
    logits, label = make_pixels(scale=0.1)
    torch.testing.assert_close(OHEM(1.0)(logits, label), CrossEntropy()(logits, label))
