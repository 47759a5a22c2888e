"""Windows, scales and mirror images against a loop that does one pixel's worth of thinking at a time."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from hrnet.inference import Protocol, starts

CLASSES = 5


@pytest.fixture(scope="module")
def network():
    """Logits at a quarter of the size, which zeros at the border make depend on where a window ends."""
    torch.manual_seed(0)
    weight, bias = torch.randn(CLASSES, 3, 5, 5) / 4, torch.randn(CLASSES)
    return lambda x: F.conv2d(x.float(), weight, bias, stride=4, padding=2)


def make_image(height, width, batch=2, seed=0):
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(seed))


def resize(x, size, align_corners):
    return F.interpolate(x, size, mode="bilinear", align_corners=align_corners)


def places(length, window, stride):
    """Where windows begin, walked along."""
    window, found = min(window, length), [0]
    while found[-1] + window < length:
        found.append(min(found[-1] + max(1, int(window * stride)), length - window))
    return found, window


def slow(protocol, network, image, size, mirror=None):
    """The official protocol, window by window, with the mean of every pixel taken at the end."""
    p, total = protocol, 0
    for scale in p.scales:
        height, width = image.shape[-2:]
        longer = int(max(height, width) * scale + 0.5)
        target = [max(32, int(side * longer / max(height, width) + 0.5)) for side in (height, width)]
        picture = image if scale == 1 else resize(image, target, False)
        height, width = picture.shape[-2:]
        rows, h = places(height, (p.window or (height, width))[0], p.stride)
        columns, w = places(width, (p.window or (height, width))[1], p.stride)
        seen = [[[] for _ in range(width)] for _ in range(height)]
        for top in rows:
            for left in columns:
                part = picture[:, :, top : top + h, left : left + w]
                logits = resize(network(part), (h, w), p.align_corners)
                if p.flip:
                    other = resize(network(part.flip(3)), (h, w), p.align_corners).flip(3)
                    other = other if mirror is None else torch.stack([other[:, c] for c in mirror], 1)
                    logits = (logits + other) / 2
                scores = logits.exp() if p.average == "exp" else logits.exp() / logits.exp().sum(1, keepdim=True)
                for y in range(h):
                    for x in range(w):
                        seen[top + y][left + x].append(scores[:, :, y, x])
        mean = torch.stack([torch.stack([torch.stack(s).mean(0) for s in row], -1) for row in seen], -2)
        total = total + (mean if mean.shape[-2:] == tuple(size) else resize(mean, size, p.align_corners))
    return total


@settings(max_examples=25, deadline=None)
@given(
    size=st.tuples(st.integers(32, 44), st.integers(32, 44)),
    window=st.none() | st.tuples(st.integers(16, 48), st.integers(16, 48)),
    stride=st.sampled_from([0.4, 0.5, 2 / 3, 1.0]),
    scales=st.sampled_from([(1.0,), (0.75,), (1.25,), (0.5, 1.0, 1.3)]),
    flip=st.booleans(),
    mirror=st.sampled_from([None, [1, 0, 2, 4, 3]]),
    average=st.sampled_from(["exp", "softmax"]),
    align_corners=st.booleans(),
    out=st.none() | st.tuples(st.integers(20, 60), st.integers(20, 60)),
)
def test_equals_the_slow_loop(network, size, window, stride, scales, flip, mirror, average, align_corners, out):
    protocol = Protocol(window, stride, scales, flip, average, align_corners)
    image = make_image(*size, batch=1)
    index = None if mirror is None else torch.tensor(mirror)
    found = protocol(network, image, out or size, index)
    assert found.shape == (1, CLASSES, *(out or size))
    torch.testing.assert_close(found, slow(protocol, network, image, out or size, mirror), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("average", ["exp", "softmax"])
@pytest.mark.parametrize("window", [(40, 52), (41, 999), (1024, 2048)])
def test_window_over_the_whole_changes_no_bit(network, window, average, flip):
    image = make_image(40, 52)
    whole = Protocol(flip=flip, average=average)(network, image, (40, 52))
    assert torch.equal(Protocol(window, flip=flip, average=average)(network, image, (40, 52)), whole)


def test_windows_do_change_what_is_seen(network):
    image = make_image(40, 52)
    whole, parts = (Protocol(w)(network, image, (40, 52)) for w in (None, (40, 32)))
    assert not torch.allclose(whole, parts, rtol=0.01)


@given(st.integers(1, 300), st.integers(1, 300), st.floats(0.01, 1))
def test_windows_cover_the_axis_and_end_with_it(length, window, stride):
    window = min(window, length)
    found = starts(length, window, stride)
    steps = [b - a for a, b in zip(found, found[1:])]
    assert found[0] == 0
    assert found[-1] == length - window
    assert all(0 < step <= max(1, int(window * stride)) <= window for step in steps)
    assert steps[:-1] == [max(1, int(window * stride))] * (len(found) - 2)


@pytest.mark.parametrize(
    ("length", "window", "stride", "expected"),
    [
        (2048, 1024, 1, [0, 1024]),
        (2049, 1024, 1, [0, 1024, 1025]),
        (480, 480, 2 / 3, [0]),
        (900, 480, 2 / 3, [0, 320, 420]),
        (5, 3, 0.1, [0, 1, 2]),
    ],
)
def test_where_windows_begin(length, window, stride, expected):
    assert starts(length, window, stride) == expected


def test_windows_only_where_the_image_is_larger(network):
    sizes = []

    def spy(x):
        sizes.append(tuple(x.shape[-2:]))
        return network(x)

    Protocol((32, 64), stride=1, scales=(1, 2))(spy, make_image(48, 60), (48, 60))
    assert sizes[:2] == [(32, 60)] * 2
    assert sizes[2:] == [(32, 64)] * 6


@pytest.mark.parametrize("average", ["exp", "softmax"])
@pytest.mark.parametrize("mirror", [None, [1, 0, 2, 4, 3]])
@pytest.mark.parametrize("scales", [(1.0,), (0.75, 1.0, 1.5)])
def test_flip_average_mirrors_with_the_image(network, scales, mirror, average):
    protocol, image = Protocol(scales=scales, flip=True, average=average), make_image(40, 52)
    index = None if mirror is None else torch.tensor(mirror)
    here, there = (protocol(network, x, (40, 52), index) for x in (image, image.flip(-1)))
    mirrored = there.flip(-1) if mirror is None else there.flip(-1)[:, index]
    if scales == (1.0,) and (mirror is None or average == "exp"):  # else sums are rounded in another order
        assert torch.equal(mirrored, here)
    torch.testing.assert_close(mirrored, here, rtol=1e-4, atol=1e-5)
    plain = Protocol(scales=scales, average=average)(network, image, (40, 52))
    assert not torch.allclose(plain, here, rtol=0.01)


def test_softmax_is_exp_of_each_look_made_to_sum_to_one(network):
    image = make_image(40, 52)
    exp, softmax = (Protocol(average=a)(network, image, (40, 52)) for a in ("exp", "softmax"))
    torch.testing.assert_close(softmax, exp / exp.sum(1, keepdim=True))
    many = Protocol((32, 32), scales=(0.75, 1.0, 1.25), average="softmax")(network, image, (40, 52))
    torch.testing.assert_close(many.sum(1), torch.full((2, 40, 52), 3.0))


@pytest.mark.parametrize("align_corners", [False, True])
def test_one_look_is_the_logits_brought_to_size(network, align_corners):
    image = make_image(41, 53)
    logits = resize(network(image), (41, 53), align_corners)
    for average in ("exp", "softmax"):
        scores = Protocol(average=average, align_corners=align_corners)(network, image, (41, 53))
        assert torch.equal(scores.argmax(1), logits.argmax(1))
    torch.testing.assert_close(Protocol(align_corners=align_corners)(network, image, (41, 53)).log(), logits)
    other = resize(network(image), (41, 53), not align_corners)
    assert not torch.equal(other.argmax(1), logits.argmax(1))


def test_scores_at_another_size(network):
    image = make_image(40, 52)
    small = Protocol((32, 32))(network, image, (40, 52))
    assert torch.equal(Protocol((32, 32))(network, image, (75, 31)), resize(small, (75, 31), False))


def test_scores_are_fp32_and_finite(network):
    def loud(x):
        return (network(x) * 1000).to(torch.bfloat16)

    for average in ("exp", "softmax"):
        scores = Protocol(scales=(0.8, 1.0), flip=True, average=average)(loud, make_image(40, 52), (40, 52))
        assert scores.dtype == torch.float32
        assert scores.isfinite().all()


def test_bytes_are_taken_as_they_come(network):
    image = torch.randint(0, 256, (1, 3, 40, 52), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    protocol = Protocol((32, 40), scales=(0.8, 1.0), flip=True, average="softmax")
    assert torch.equal(protocol(network, image, (40, 52)), protocol(network, image.float(), (40, 52)))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"stride": 0}, "stride"),
        ({"stride": -0.5}, "stride"),
        ({"stride": 1.01}, "stride"),
        ({"scales": ()}, "scales"),
        ({"scales": (1.0, 0.0)}, "scales"),
        ({"scales": (-1.0,)}, "scales"),
        ({"average": "mean"}, "average"),
        ({"window": (0, 512)}, "window"),
    ],
)
def test_bad_arguments_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        Protocol(**given)
