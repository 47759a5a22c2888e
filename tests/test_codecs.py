"""Heatmaps against plain loops written from the official and mmpose formulas; round trips; mirrors."""

import math

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hrnet import HRNet, HRNetConfig
from hrnet.codecs import Heatmap, gaussian_blur
from hrnet.heads import HRNetV1

SIZES = {2.0: [(256, 192), (128, 96), (130, 97), (253, 191)], 3.0: [(384, 288)]}


@pytest.fixture(autouse=True)
def one_thread():
    """These maps are small: threads that wait for each other on a busy machine cost ten times what they compute."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def official_target(keypoint, visible, shape, sigma, stride=4):
    """generate_target of JointsDataset.py for one joint: patch, clipping and the out-of-range rule."""
    (h, w), window = shape, int(sigma * 3)
    target = np.zeros(shape)
    mu = [int(c / stride + 0.5) for c in keypoint]
    left, top = mu[0] - window, mu[1] - window
    right, bottom = mu[0] + window + 1, mu[1] + window + 1
    if left >= w or top >= h or right < 0 or bottom < 0 or visible <= 0:
        return target, 0.0
    for y in range(2 * window + 1):
        for x in range(2 * window + 1):
            if 0 <= left + x < w and 0 <= top + y < h:
                target[top + y, left + x] = math.exp(-((x - window) ** 2 + (y - window) ** 2) / (2 * sigma**2))
    return target, 1.0


def official_decode(heatmap):
    """get_max_preds and the quarter offset of get_final_preds for one joint, in heatmap pixels."""
    h, w = heatmap.shape
    y, x = np.unravel_index(np.argmax(heatmap), heatmap.shape)
    score = heatmap[y, x]
    if score <= 0:
        return np.zeros(2), score
    place = np.array([x, y], dtype=float)
    if 1 < x < w - 1 and 1 < y < h - 1:
        slope = [heatmap[y, x + 1] - heatmap[y, x - 1], heatmap[y + 1, x] - heatmap[y - 1, x]]
        place += 0.25 * np.sign(slope)
    return place, score


def blurred(heatmap, kernel):
    """mmpose gaussian_blur: zero-padded, rescaled to keep its maximum."""
    border = (kernel - 1) // 2
    padded = cv2.GaussianBlur(np.pad(heatmap, border), (kernel, kernel), 0)[border:-border, border:-border]
    return padded * heatmap.max() / padded.max()


def dark_decode(heatmap, kernel):
    """mmpose refine_keypoints_dark for one joint."""
    h, w = heatmap.shape
    y, x = np.unravel_index(np.argmax(heatmap), heatmap.shape)
    place = np.array([x, y], dtype=float)
    f = np.log(np.maximum(blurred(heatmap, kernel), 1e-10))
    if not (1 < x < w - 2 and 1 < y < h - 2):
        return place
    dx, dy = 0.5 * (f[y, x + 1] - f[y, x - 1]), 0.5 * (f[y + 1, x] - f[y - 1, x])
    dxx = 0.25 * (f[y, x + 2] - 2 * f[y, x] + f[y, x - 2])
    dyy = 0.25 * (f[y + 2, x] - 2 * f[y, x] + f[y - 2, x])
    dxy = 0.25 * (f[y + 1, x + 1] - f[y - 1, x + 1] - f[y + 1, x - 1] + f[y - 1, x - 1])
    return place - np.linalg.solve(np.array([[dxx, dxy], [dxy, dyy]]), [dx, dy])


def udp_dark_decode(heatmap, kernel):
    """mmpose refine_keypoints_dark_udp for one joint."""
    y, x = np.unravel_index(np.argmax(heatmap), heatmap.shape)
    f = np.pad(np.log(np.clip(blurred(heatmap, kernel), 1e-3, 50)), 1, mode="edge")
    c, r = x + 1, y + 1
    dx, dy = 0.5 * (f[r, c + 1] - f[r, c - 1]), 0.5 * (f[r + 1, c] - f[r - 1, c])
    dxx, dyy = f[r, c + 1] - 2 * f[r, c] + f[r, c - 1], f[r + 1, c] - 2 * f[r, c] + f[r - 1, c]
    dxy = 0.5 * (
        f[r + 1, c + 1] - f[r, c + 1] - f[r + 1, c] + 2 * f[r, c] - f[r, c - 1] - f[r - 1, c] + f[r - 1, c - 1]
    )
    hessian = np.array([[dxx, dxy], [dxy, dyy]]) + np.finfo(np.float32).eps * np.eye(2)
    return np.array([x, y]) - np.linalg.solve(hessian, [dx, dy])


def gaussian(shape, centre, sigma, noise=0.0, seed=0):
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[: shape[0], : shape[1]].astype(float)
    value = np.exp(-((x - centre[0]) ** 2 + (y - centre[1]) ** 2) / (2 * sigma**2))
    return value * (1 + noise * rng.uniform(-1, 1, shape))


def tensor(array):
    return torch.tensor(np.asarray(array), dtype=torch.float32)


def round_trip(codec, keypoint, size):
    """Error in heatmap pixels, (x, y), of encoding and decoding one keypoint."""
    point = tensor(keypoint).reshape(1, 1, 2)
    target, weight = codec.encode(point, torch.ones(1, 1), size)
    assert weight.item() == 1
    found, score = codec.decode(target, size)
    assert 0.5 < score.item() <= 1
    return ((found - point).abs() / codec.scale(size, point))[0, 0]


# --- targets


@settings(max_examples=60, deadline=None)
@given(
    # Sixty-fourths of a pixel: exact in float32, where the official float64 and ours must round alike.
    points=st.lists(st.tuples(st.integers(-4000, 10000), st.integers(-4000, 10000)), min_size=1, max_size=5),
    visible=st.lists(st.sampled_from([0, 1, 2]), min_size=5, max_size=5),
    size=st.sampled_from([(128, 96), (64, 80), (65, 79)]),
    sigma=st.sampled_from([1.0, 2.0, 3.0]),
)
def test_targets_are_the_official_ones(points, visible, size, sigma):
    codec, keypoints = Heatmap(sigma), np.array(points) / 64
    visible = visible[: len(points)]
    target, weight = codec.encode(tensor(keypoints)[None], tensor(visible)[None], size)
    assert target.shape[-2:] == codec.shape(size) == (math.ceil(size[0] / 4), math.ceil(size[1] / 4))
    for k, (point, v) in enumerate(zip(keypoints, visible, strict=True)):
        expected, expected_weight = official_target(point, v, codec.shape(size), sigma)
        assert weight[0, k].item() == expected_weight
        np.testing.assert_allclose(target[0, k].numpy(), expected, atol=1e-6)


@pytest.mark.parametrize(
    ("x", "weight", "peak"),
    [
        (-2.5, 1, 0),  # -0.625 + 0.5 truncates to 0, not to -1
        (-5.5, 1, 0),  # -0.875 truncates to 0
        (-6.0, 1, -1),
        (-26.0, 1, -6),
        (-30.0, 1, -7),  # window ends at 0 and covers nothing: weight 1 all the same
        (-34.0, 0, -8),
        (93.0, 1, 23),
        (117.0, 1, 29),
        (117.75, 1, 29),
        (118.0, 0, 30),  # window starts at 24 = w
    ],
)
def test_borders_follow_the_official_rule(x, weight, peak):
    target, found = Heatmap().encode(tensor([[[x, 40]]]), torch.ones(1, 1), (128, 96))
    expected, expected_weight = official_target((x, 40), 1, (32, 24), 2)
    assert found.item() == expected_weight == weight
    np.testing.assert_allclose(target[0, 0].numpy(), expected, atol=1e-6)
    if 0 <= peak < 24:
        assert target[0, 0, 10, peak] == 1


def test_hidden_joints_have_no_target():
    target, weight = Heatmap().encode(tensor([[[40, 40], [40, 40]]]), tensor([[0, 1]]), (64, 64))
    assert weight.tolist() == [[0, 1]]
    assert target[0, 0].abs().max() == 0
    assert target[0, 1].max() == 1


@pytest.mark.parametrize("encoding", ["subpixel", "udp"])
def test_unbiased_targets_sit_on_the_true_place(encoding):
    codec, point, size = Heatmap(encoding=encoding), np.array([41.3, 57.9]), (128, 96)
    target, _ = codec.encode(tensor(point).reshape(1, 1, 2), torch.ones(1, 1), size)
    scale = np.array([95 / 23, 127 / 31]) if encoding == "udp" else np.array([4, 4])
    centre = point / scale
    expected = gaussian((32, 24), centre, 2)
    if encoding == "udp":
        y, x = np.mgrid[:32, :24]
        nearest = np.floor(centre + 0.5)
        expected *= (abs(x - nearest[0]) <= 6) & (abs(y - nearest[1]) <= 6)
    np.testing.assert_allclose(target[0, 0].numpy(), expected, atol=1e-5)


def test_targets_of_a_batch_are_those_of_its_members():
    points, visible = torch.rand(3, 5, 2) * 120 - 10, torch.randint(0, 3, (3, 5))
    codec = Heatmap()
    target, weight = codec.encode(points, visible, (96, 128))
    for b in range(3):
        alone, w = codec.encode(points[b : b + 1], visible[b : b + 1], (96, 128))
        assert torch.equal(target[b], alone[0])
        assert torch.equal(weight[b], w[0])


# --- decoding


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), h=st.integers(4, 12), w=st.integers(4, 12), low=st.sampled_from([-1.0, 0.0]))
def test_decoding_is_the_official_one(seed, h, w, low):
    heatmaps = np.random.default_rng(seed).uniform(low, 1, (2, 4, h, w)).astype(np.float32)
    heatmaps[0, 0] = -abs(heatmaps[0, 0])
    heatmaps[0, 1] = 0
    keypoints, score = Heatmap().decode(torch.from_numpy(heatmaps))
    for b in range(2):
        for k in range(4):
            place, expected = official_decode(heatmaps[b, k])
            assert score[b, k].item() == expected
            assert keypoints[b, k].tolist() == (4 * place).tolist()


@pytest.mark.parametrize(("x", "moved"), [(0, 0), (1, 0), (2, 0.25), (9, 0.25), (10, 0.25), (11, 0)], ids="x={}".format)
def test_quarter_offset_is_strict_at_the_border(x, moved):
    heatmap = torch.zeros(1, 1, 9, 12)
    heatmap[0, 0, 4, x] = 1
    if x < 11:
        heatmap[0, 0, 4, x + 1] = 0.5
    assert Heatmap().decode(heatmap)[0][0, 0].tolist() == [4 * (x + moved), 16]


def test_equal_neighbours_do_not_move_the_maximum():
    heatmap = torch.zeros(1, 1, 9, 9)
    heatmap[0, 0, 4, 4] = 1
    assert Heatmap().decode(heatmap)[0][0, 0].tolist() == [16, 16]


@pytest.mark.parametrize("encoding", ["quantised", "subpixel", "udp"])
@pytest.mark.parametrize("decoding", ["quarter", "dark"])
def test_maps_without_a_positive_value_give_zero(encoding, decoding):
    for heatmap in (torch.zeros(1, 2, 16, 12), -torch.rand(1, 2, 16, 12)):
        keypoints, score = Heatmap(encoding=encoding, decoding=decoding).decode(heatmap)
        assert keypoints.abs().max() == 0
        assert (score <= 0).all()


@pytest.mark.parametrize("kernel", [3, 7, 11, 17])
def test_blur_is_that_of_opencv(kernel):
    heatmaps = np.random.default_rng(0).uniform(0, 1, (2, 3, 20, 15))
    ours = gaussian_blur(tensor(heatmaps), kernel).numpy()
    for b in range(2):
        for k in range(3):
            np.testing.assert_allclose(ours[b, k], blurred(heatmaps[b, k], kernel), atol=1e-5)


@settings(max_examples=60, deadline=None)
@given(
    x=st.floats(1, 22), y=st.floats(1, 30), noise=st.sampled_from([0.0, 0.1]), seed=st.integers(0, 99),
    sigma=st.sampled_from([(2.0, 11), (3.0, 17)]),
)  # fmt: skip
def test_dark_is_that_of_mmpose(x, y, noise, seed, sigma):
    sigma, kernel = sigma
    heatmap = gaussian((32, 24), (x, y), sigma, noise, seed).astype(np.float32)
    codec = Heatmap(sigma, encoding="subpixel", decoding="dark")
    found = codec.decode(tensor(heatmap)[None, None])[0][0, 0] / 4
    np.testing.assert_allclose(found.numpy(), dark_decode(heatmap.astype(float), kernel), atol=5e-3)


@settings(max_examples=60, deadline=None)
@given(
    x=st.floats(4.6, 18.4), y=st.floats(4.6, 26.4), noise=st.sampled_from([0.0, 0.1]), seed=st.integers(0, 99)
)  # fmt: skip
def test_udp_dark_is_that_of_mmpose_in_the_interior(x, y, noise, seed):
    """Two sigma from a border; nearer, mmpose's own result is up to a pixel off and ours departs on purpose."""
    heatmap = gaussian((32, 24), (x, y), 2, noise, seed).astype(np.float32)
    row, column = np.unravel_index(np.argmax(heatmap), heatmap.shape)
    if not (4 <= column <= 19 and 4 <= row <= 27):
        return
    codec = Heatmap(encoding="udp", decoding="dark")
    found = codec.decode(tensor(heatmap)[None, None], (128, 96))[0][0, 0] / codec.scale((128, 96), torch.zeros(()))
    np.testing.assert_allclose(found.numpy(), udp_dark_decode(heatmap.astype(float), 11), atol=5e-3)


def test_blur_kernel_can_be_chosen():
    heatmap = gaussian((32, 24), (10.3, 14.6), 3, 0.1).astype(np.float32)
    found = Heatmap(3.0, encoding="subpixel", decoding="dark", blur=11).decode(tensor(heatmap)[None, None])[0] / 4
    np.testing.assert_allclose(found[0, 0].numpy(), dark_decode(heatmap.astype(float), 11), atol=5e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_decoding_is_in_fp32(dtype):
    heatmaps = torch.rand(1, 3, 16, 12).to(dtype)
    codec = Heatmap(decoding="dark", encoding="udp")
    keypoints, score = codec.decode(heatmaps)
    assert keypoints.dtype == score.dtype == torch.float32
    assert torch.equal(keypoints, codec.decode(heatmaps.float())[0])


@pytest.mark.parametrize("decoding", ["quarter", "dark"])
@pytest.mark.parametrize("encoding", ["quantised", "udp"])
def test_decoding_survives_wild_maps(encoding, decoding):
    codec = Heatmap(encoding=encoding, decoding=decoding)
    wild = [
        torch.full((1, 1, 8, 8), 1e-20),
        torch.ones(1, 1, 8, 8),
        torch.rand(1, 1, 8, 8) * 1e6,
        torch.eye(8)[None, None],
    ]
    for heatmap in wild:
        keypoints, score = codec.decode(heatmap)
        assert torch.isfinite(keypoints).all()
        assert torch.isfinite(score).all()


# --- round trips


@settings(max_examples=80, deadline=None)
@given(
    case=st.sampled_from([
        # The quantised target stands on the nearest pixel: half a pixel is lost in it, whatever reads it.
        ("quantised", "quarter", 0.5),
        ("subpixel", "quarter", 0.25),
        ("udp", "quarter", 0.26),
        ("subpixel", "dark", 0.05),
    ]),
    sigma=st.sampled_from([2.0, 3.0]), which=st.integers(0, 3), x=st.floats(0, 1), y=st.floats(0, 1),
)  # fmt: skip
def test_round_trip_in_the_interior(case, sigma, which, x, y):
    encoding, decoding, limit = case
    size = SIZES[sigma][which % len(SIZES[sigma])]
    # Two heatmap pixels off each border the quarter offset acts; DARK wants its blur's half window as well.
    margin = 4 * (3 * sigma + 2 if decoding == "dark" else 2.6)
    point = [margin + x * (size[1] - 1 - 2 * margin), margin + y * (size[0] - 1 - 2 * margin)]
    assert round_trip(Heatmap(sigma, encoding=encoding, decoding=decoding), point, size).max() <= limit + 1e-4


@settings(max_examples=150, deadline=None)
@given(
    sigma=st.sampled_from([2.0, 3.0]),
    which=st.integers(0, 3),
    x=st.one_of(st.floats(0, 1), st.floats(0, 0.1), st.floats(0.9, 1)),
    y=st.one_of(st.floats(0, 1), st.floats(0, 0.1), st.floats(0.9, 1)),
)
def test_udp_and_dark_come_back_anywhere(sigma, which, x, y):
    size = SIZES[sigma][which % len(SIZES[sigma])]
    point = [x * (size[1] - 1), y * (size[0] - 1)]
    assert round_trip(Heatmap(sigma, encoding="udp", decoding="dark"), point, size).max() <= 0.05


@pytest.mark.parametrize(("sigma", "size"), [(s, size) for s, sizes in SIZES.items() for size in sizes])
def test_udp_and_dark_come_back_on_a_grid_of_all_places(sigma, size):
    h, w = size
    y, x = torch.meshgrid(torch.linspace(0, h - 1, 53), torch.linspace(0, w - 1, 47), indexing="ij")
    points = torch.stack([x, y], -1).reshape(1, -1, 2)
    codec, worst = Heatmap(sigma, encoding="udp", decoding="dark"), 0.0
    for part in points.split(800, dim=1):
        target, _ = codec.encode(part, torch.ones(part.shape[:2]), size)
        found, _ = codec.decode(target, size)
        worst = max(worst, ((found - part).abs() / codec.scale(size, part)).max().item())
    assert worst <= 0.05


# --- mirrors


@pytest.mark.parametrize("encoding", ["quantised", "subpixel"])
def test_merge_is_the_official_flip_test(encoding):
    rng = np.random.default_rng(0)
    straight, mirrored = rng.normal(size=(2, 2, 5, 6, 7))
    pairs = [(1, 2), (3, 4)]
    back = mirrored[..., ::-1].copy()
    for a, b in pairs:
        back[:, [a, b]] = back[:, [b, a]]
    shifted = back.copy()
    for column in range(1, 7):
        shifted[..., column] = back[..., column - 1]
    index = torch.tensor([0, 2, 1, 4, 3])
    merged = Heatmap(encoding=encoding).merge(tensor(straight), tensor(mirrored), index)
    np.testing.assert_allclose(merged.numpy(), (straight + shifted) / 2, atol=1e-6)
    unshifted = Heatmap(encoding="udp").merge(tensor(straight), tensor(mirrored), index)
    np.testing.assert_allclose(unshifted.numpy(), (straight + back) / 2, atol=1e-6)


@settings(max_examples=40, deadline=None)
@given(
    decoding=st.sampled_from(["quarter", "dark"]),
    size=st.sampled_from([(64, 48), (62, 45)]),
    points=st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=5, max_size=5),
)
def test_udp_targets_of_mirrored_points_are_mirrored_targets(decoding, size, points):
    codec, index = Heatmap(encoding="udp", decoding=decoding), torch.tensor([0, 2, 1, 4, 3])
    keypoints = tensor(points)[None] * tensor([size[1] - 1, size[0] - 1])
    mirrored = torch.stack([size[1] - 1 - keypoints[..., 0], keypoints[..., 1]], -1)[:, index]
    target, _ = codec.encode(keypoints, torch.ones(1, 5), size)
    other, _ = codec.encode(mirrored, torch.ones(1, 5), size)
    # A place exactly between two pixels rounds up in both images: the cut at 3 sigma then differs by one column.
    assert (target - other.flip(-1)[:, index]).abs().max() <= math.exp(-4.5) + 1e-3
    merged, _ = codec.decode(codec.merge(target, other, index), size)
    alone, _ = codec.decode(target, size)
    assert (merged - alone).abs().max() <= 4 * 0.5 + 1e-3 if decoding == "quarter" else 0.2


@pytest.mark.parametrize("decoding", ["quarter", "dark"])
@pytest.mark.parametrize("size", [(64, 64), (96, 72), (65, 91)])
@pytest.mark.parametrize("seed", range(3))
def test_flipping_the_image_flips_untrained_predictions(decoding, size, seed):
    """With the unbiased encoding and the flip test, whatever the network computes. (Of DARK's Taylor step only those
    are compared that stay within two heatmap pixels: on noise the Hessian may be singular, and rounding decides.)"""
    torch.manual_seed(seed)
    backbone = HRNet(HRNetConfig(8, modules=(1, 1, 1), blocks=1, stem=(1, 8)), 1).eval()
    head = HRNetV1(backbone.channels, 17).eval()
    torch.nn.init.normal_(head.final_layer.weight, std=0.5)
    index = list(range(17))
    for a in range(1, 17, 2):
        index[a], index[a + 1] = a + 1, a
    index = torch.tensor(index)
    codec = Heatmap(encoding="udp", decoding=decoding)

    def predict(image):
        with torch.no_grad():
            merged = codec.merge(*(head(backbone(x)) for x in (image, image.flip(-1))), index)
        keypoints, score = codec.decode(merged, size)
        w = merged.shape[-1]
        peak = merged.flatten(2).argmax(-1)
        step = keypoints / codec.scale(size, keypoints) - torch.stack([peak % w, peak // w], -1)
        return keypoints, (score > 0) & (step.abs() <= 2).all(-1)

    image = torch.randn(4, 3, *size)
    keypoints, sound = predict(image)
    other, other_sound = predict(image.flip(-1))
    other[..., 0] = size[1] - 1 - other[..., 0]
    sound &= other_sound[:, index]
    assert sound.float().mean() > 0.5
    assert (keypoints - other[:, index])[sound].abs().max() <= 1e-3


def test_mirror_of_the_peak_at_each_column_decodes_to_the_mirror():
    """The official quarter rule treats column 1 and column w - 2 differently; UDP must not."""
    codec, w, h = Heatmap(encoding="udp"), 12, 9
    maps = torch.zeros(1, w, h, w)
    for x in range(w):
        maps[0, x, 4, x] = 1
        maps[0, x, 4, max(x - 1, 0)] += 0.5
    found, mirrored = codec.decode(maps, (36, 48))[0], codec.decode(maps.flip(-1), (36, 48))[0]
    assert torch.allclose(found[0, :, 0], 47 - mirrored[0, :, 0], atol=1e-3)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sigma": 0.0}, "positive"),
        ({"stride": 0}, "positive"),
        ({"encoding": "megvii"}, "encoding must be .*, got 'megvii'"),
        ({"decoding": "softargmax"}, "decoding must be .*, got 'softargmax'"),
        ({"blur": 10}, "odd kernel size"),
    ],
)
def test_bad_settings_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Heatmap(**fields)
