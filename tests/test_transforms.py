"""Geometry against the official three-point form, and found again in pictures."""

import math

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from datamodules.keypoints import Instance, KeypointDataset, Keypoints
from datamodules.transforms import (
    DataError,
    PoseAugmentation,
    apply,
    crop_matrix,
    crop_of_box,
    invert,
    mirror,
    read_image,
    read_reduced,
    reduced,
    rows_of,
    warp,
    warp_mirrored,
)

SIZE = (128, 96)
STILL = PoseAugmentation(scale=0, rotation=0, rotation_probability=0, flip=0, half_body=0)
NAMES = (
    "nose left_eye right_eye left_ear right_ear left_shoulder right_shoulder left_elbow right_elbow "
    "left_wrist right_wrist left_hip right_hip left_knee right_knee left_ankle right_ankle"
).split()
FACTS = Keypoints(NAMES, flip_pairs=[[i, i + 1] for i in range(1, 17, 2)])

coordinate = st.floats(-200, 1200)
length = st.floats(20, 900)
angle = st.floats(-180, 180)
sizes = st.sampled_from([(256, 192), (384, 288), (256, 256), (128, 96), (130, 97)])


def official_matrix(centre, extent, size, rotation):
    """get_affine_transform of the official transforms.py: three points and cv2."""

    def turned(point, radians):
        sin, cos = math.sin(radians), math.cos(radians)
        return [point[0] * cos - point[1] * sin, point[0] * sin + point[1] * cos]

    def third(a, b):
        direction = a - b
        return b + np.array([-direction[1], direction[0]], np.float32)

    width, height = size[1], size[0]
    source, target = np.zeros((3, 2), np.float32), np.zeros((3, 2), np.float32)
    source[0] = centre
    source[1] = centre + np.array(turned([0, extent[0] * -0.5], math.pi * rotation / 180))
    target[0] = [width * 0.5, height * 0.5]
    target[1] = np.array([width * 0.5, height * 0.5]) + np.array([0, width * -0.5], np.float32)
    source[2], target[2] = third(source[0], source[1]), third(target[0], target[1])
    return cv2.getAffineTransform(source, target)


def corners(centre, extent):
    return np.array([centre + np.array([sx, sy]) * extent / 2 for sx in (-1, 0, 1) for sy in (-1, 0, 1)])


@settings(max_examples=100, deadline=None)
@given(x=coordinate, y=coordinate, w=length, size=sizes, rotation=angle)
def test_crop_matrix_is_the_official_one(x, y, w, size, rotation):
    centre, extent = np.array([x, y]), np.array([w, w * size[0] / size[1]])
    points = corners(centre, extent)
    ours = apply(crop_matrix(centre, extent, size, rotation), points)
    theirs = apply(official_matrix(centre, extent, size, rotation), points)
    # The reference computes from float32 points: of coordinates near 1000 that leaves 6e-5, times the magnification.
    assert np.abs(ours - theirs).max() <= 1e-3 * max(1, size[1] / w)


@settings(max_examples=50, deadline=None)
@given(x=coordinate, y=coordinate, w=length, h=length, size=sizes, rotation=angle)
def test_udp_lays_the_outline_on_the_outermost_pixels(x, y, w, h, size, rotation):
    centre, extent = np.array([x, y]), np.array([w, h])
    last = np.array([size[1] - 1, size[0] - 1], dtype=float)
    straight = apply(crop_matrix(centre, extent, size, udp=True), corners(centre, extent))
    np.testing.assert_allclose(straight, corners(last / 2, last), atol=1e-6)
    turned = crop_matrix(centre, extent, size, rotation, udp=True)
    np.testing.assert_allclose(apply(turned, centre), last / 2, atol=1e-6)
    # The same sense of rotation as the official map: a turn about the centre before the unrotated crop.
    radians = math.radians(rotation)
    offset = np.array([0.3 * w, -0.2 * h])
    back = np.array([[math.cos(radians), math.sin(radians)], [-math.sin(radians), math.cos(radians)]])
    expected = apply(crop_matrix(centre, extent, size, udp=True), centre + back @ offset)
    np.testing.assert_allclose(apply(turned, centre + offset), expected, atol=1e-6)


@settings(max_examples=50, deadline=None)
@given(box=st.tuples(coordinate, coordinate, length, length), size=sizes, padding=st.sampled_from([1.0, 1.25, 1.5]))
def test_crop_of_box_grows_to_the_aspect(box, size, padding):
    """_box2cs of the official coco.py."""
    x, y, w, h = box
    aspect = size[1] / size[0]
    centre = [x + w * 0.5, y + h * 0.5]
    if w > aspect * h:
        h = w * 1.0 / aspect
    elif w < aspect * h:
        w = h * aspect
    ours = crop_of_box(np.array(box), size, padding)
    np.testing.assert_allclose(ours[0], centre)
    np.testing.assert_allclose(ours[1] / 200, np.array([w / 200, h / 200]) * padding)


@settings(max_examples=50, deadline=None)
@given(x=coordinate, y=coordinate, w=length, size=sizes, rotation=angle, udp=st.booleans(), width=st.integers(1, 2000))
def test_invert_and_mirror_undo_themselves(x, y, w, size, rotation, udp, width):
    matrix = crop_matrix(np.array([x, y]), np.array([w, w * 1.3]), size, rotation, udp)
    points = np.random.default_rng(0).uniform(-100, 1500, (3, 4, 2))
    np.testing.assert_allclose(apply(invert(matrix), apply(matrix, points)), points, atol=1e-6)
    np.testing.assert_allclose(mirror(mirror(matrix, width), width), matrix, atol=1e-8)
    reflected = points.copy()
    reflected[..., 0] = width - 1 - points[..., 0]
    np.testing.assert_allclose(apply(mirror(matrix, width), points), apply(matrix, reflected), atol=1e-6)


def spot(image):
    """Centre of mass of what is bright."""
    mass = image[..., 0].astype(float)
    y, x = np.mgrid[: mass.shape[0], : mass.shape[1]]
    return np.array([(mass * x).sum(), (mass * y).sum()]) / mass.sum()


@pytest.mark.parametrize("udp", [False, True])
@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("rotation", [0.0, 30.0, -75.0, 180.0])
@pytest.mark.parametrize("place", [(150, 90), (91, 120), (201, 160)])
def test_dots_are_found_where_apply_says(udp, flip, rotation, place):
    image = np.zeros((240, 320, 3), np.uint8)
    cv2.circle(image, place, 4, (255, 255, 255), -1)
    centre = np.array([150.0, 120.0])
    if flip:
        centre[0] = 320 - 1 - centre[0]
    matrix = crop_matrix(centre, np.array([210.0, 280.0]), (256, 192), rotation, udp)
    if flip:
        matrix = mirror(matrix, 320)
    expected = apply(matrix, np.array(place, dtype=float))
    assert (expected > 8).all()
    assert (expected < [184, 248]).all()
    assert np.abs(spot(warp(image, matrix, (256, 192))) - expected).max() < 0.2


def test_mirrored_crop_is_the_crop_of_the_mirrored_image():
    image = np.random.default_rng(0).integers(0, 255, (60, 80, 3), np.uint8)
    matrix = crop_matrix(np.array([33.0, 30.0]), np.array([48.0, 64.0]), SIZE, 20.0)
    ours, theirs = warp(image, mirror(matrix, 80), SIZE), warp(image[:, ::-1].copy(), matrix, SIZE)
    # OpenCV interpolates in 1/32 of a pixel, so the two may round apart.
    assert np.abs(ours.astype(int) - theirs).mean() < 2


@settings(max_examples=60, deadline=None)
@given(x=st.floats(-60, 140), y=st.floats(-60, 120), w=st.floats(3, 300), rotation=angle, udp=st.booleans())
def test_mirrored_warp_is_the_warp_of_the_mirror_image_bit_for_bit(x, y, w, rotation, udp):
    image = np.random.default_rng(0).integers(0, 255, (60, 80, 3), np.uint8)
    matrix = crop_matrix(np.array([x, y]), np.array([w, w * 4 / 3]), SIZE, rotation, udp)
    assert np.array_equal(warp_mirrored(image, matrix, SIZE), warp(cv2.flip(image, 1), matrix, SIZE))


@settings(max_examples=60, deadline=None)
@given(x=st.floats(-60, 140), y=st.floats(-60, 120), w=st.floats(3, 300), rotation=angle, udp=st.booleans())
def test_rows_suffice(x, y, w, rotation, udp):
    image = np.random.default_rng(0).integers(1, 255, (60, 80, 3), np.uint8)
    matrix = crop_matrix(np.array([x, y]), np.array([w, w * 4 / 3]), SIZE, rotation, udp)
    rows = rows_of(matrix, SIZE)
    top = image[: max(1, rows)].copy()
    assert np.array_equal(warp(top, matrix, SIZE), warp(image, matrix, SIZE))
    assert np.array_equal(warp_mirrored(top, matrix, SIZE), warp_mirrored(image, matrix, SIZE))


@pytest.mark.parametrize("factor", [2, 4, 8])
@pytest.mark.parametrize("size", [(480, 640), (483, 637)])
def test_reduced_pictures_show_things_at_the_same_place(factor, size, tmp_path):
    """Dots found in the crop of the reduced picture lie where those of the whole do, within a tenth of its pixel."""
    centre, extent = np.array([330.0, 250.0]), np.array([300.0, 400.0])
    matrix = crop_matrix(centre, extent, SIZE, 25.0)
    for place in [(300.0, 200.0), (401.5, 307.0), (260.0, 350.0)]:
        y, x = np.mgrid[: size[0], : size[1]]
        dot = 255 * np.exp(-((x - place[0]) ** 2 + (y - place[1]) ** 2) / (2 * 8.0**2))
        cv2.imwrite(str(tmp_path / "a.jpg"), dot.astype(np.uint8).repeat(3).reshape(*size, 3))
        image, found, width = read_reduced(tmp_path / "a.jpg", factor)
        assert (found, width, image.shape) == (factor, size[1], (-(-size[0] // factor), -(-size[1] // factor), 3))
        for m in (matrix, mirror(matrix, size[1])):
            expected = apply(m, np.array(place))
            if (expected > 12).all() and (expected < [SIZE[1] - 12, SIZE[0] - 12]).all():
                assert np.abs(spot(warp(image, reduced(m, factor), SIZE)) - expected).max() < 0.1


def test_only_jpegs_are_reduced(tmp_path):
    cv2.imwrite(str(tmp_path / "a.png"), np.full((64, 80, 3), 9, np.uint8))
    image, factor, width = read_reduced(tmp_path / "a.png", 2)
    assert (image.shape, factor, width) == ((64, 80, 3), 1, 80)


def test_outside_the_image_is_black():
    crop = warp(
        np.full((20, 20, 3), 200, np.uint8), crop_matrix(np.zeros(2), np.array([40.0, 40.0]), (40, 40)), (40, 40)
    )
    assert crop[:19].max() == 0
    assert crop[:, :19].max() == 0
    assert (crop[21:39, 21:39] == 200).all()


# --- the data set

COLOURS = np.array([[(40 + 50 * (i % 5)), 60 + 60 * (i // 5 % 4), 250 - 14 * i] for i in range(17)])


def picture(path, width=320, height=240, visible=None):
    """A person whose 17 joints are squares, each of its own colour."""
    rng = np.random.default_rng(1)
    places = [(x, y) for x in range(100, 221, 24) for y in range(60, 190, 24)]
    keypoints = np.array([places[i] for i in rng.permutation(len(places))[:17]], dtype=np.float64)
    image = np.zeros((height, width, 3), np.uint8)
    for (x, y), colour in zip(keypoints.astype(int), COLOURS, strict=True):
        image[y - 6 : y + 7, x - 6 : x + 7] = colour
    cv2.imwrite(str(path), image[..., ::-1])
    visible = np.full(17, 2.0) if visible is None else np.array(visible, dtype=float)
    return Instance(str(path), 1, np.array([90.0, 50.0, 140.0, 150.0]), keypoints, visible)


def colour_at(sample, k):
    x, y = np.round(sample["keypoints"][k]).astype(int)
    return sample["image"][:, y, x].astype(int)


@pytest.mark.parametrize("flip", [0.0, 1.0])
@pytest.mark.parametrize("rotation", [0.0, 40.0])
@pytest.mark.parametrize("udp", [False, True])
def test_joints_lie_on_their_colours(flip, rotation, udp, tmp_path):
    instance = picture(tmp_path / "a.png")
    augmentation = PoseAugmentation(
        scale=0.2, rotation=rotation, rotation_probability=1, flip=flip, half_body=0, half_body_keypoints=8
    )
    data = KeypointDataset([instance], FACTS, (256, 192), augmentation, udp=udp)
    checked = 0
    for seed in range(12):
        torch.manual_seed(seed)
        sample = data[0]
        for k in range(17):
            x, y = sample["keypoints"][k]
            if 2 <= x <= 189 and 2 <= y <= 253:
                source = FACTS.flip_index[k] if flip else k
                assert np.abs(colour_at(sample, k) - COLOURS[source]).max() <= 2
                checked += 1
        original = instance.keypoints[FACTS.flip_index] if flip else instance.keypoints
        back = apply(sample["to_image"].astype(float), sample["keypoints"].astype(float))
        np.testing.assert_allclose(back, original, atol=1e-3)
    assert checked > 100


def test_flip_swaps_left_and_right_and_their_visibility(tmp_path):
    instance = picture(tmp_path / "a.png", visible=[2, 0] + [2, 1] * 7 + [2])
    straight = KeypointDataset([instance], FACTS, (256, 192), STILL)[0]
    flipped = KeypointDataset(
        [instance], FACTS, (256, 192), PoseAugmentation(scale=0, rotation_probability=0, flip=1, half_body=0)
    )[0]
    index = FACTS.flip_index
    assert flipped["visible"].tolist() == straight["visible"][index].tolist()
    assert flipped["visible"].tolist() == [1, 1, 0] + [1] * 14
    # The crop keeps its centre: W / 2 in the official map, so x mirrors about W / 2, not about (W - 1) / 2.
    seen = flipped["visible"] > 0
    np.testing.assert_allclose(flipped["keypoints"][seen, 0], 192 - straight["keypoints"][index][seen, 0], atol=1e-3)
    np.testing.assert_allclose(flipped["keypoints"][seen, 1], straight["keypoints"][index][seen, 1], atol=1e-3)


def test_udp_flip_mirrors_the_crop_exactly(tmp_path):
    instance = picture(tmp_path / "a.png")
    straight, flipped = (
        KeypointDataset([instance], FACTS, (256, 192), PoseAugmentation(0, 0, 0, flip, 0), udp=True)[0]
        for flip in (0, 1)
    )
    index = FACTS.flip_index
    np.testing.assert_allclose(flipped["keypoints"][:, 0], 191 - straight["keypoints"][index, 0], atol=1e-3)
    difference = np.abs(flipped["image"].astype(int) - straight["image"][:, :, ::-1])
    assert difference.mean() < 1


@pytest.mark.parametrize(("hidden", "expected"), [("supervise", [0, 1, 1]), ("ignore", [0, 0, 1])])
def test_hidden_joints_follow_the_policy(hidden, expected, tmp_path):
    instance = picture(tmp_path / "a.png", visible=[0, 1, 2] + [2] * 14)
    sample = KeypointDataset([instance], FACTS, SIZE, hidden=hidden)[0]
    assert sample["visible"][:3].tolist() == expected
    assert sample["keypoints"][0].tolist() == [0, 0]  # never labelled: not moved


def test_sample_is_what_the_batch_promises(tmp_path):
    instance = picture(tmp_path / "a.png")
    sample = KeypointDataset([instance, instance], FACTS, SIZE)[1]
    assert sample["image"].shape == (3, *SIZE)
    assert sample["image"].dtype == np.uint8
    assert sample["image"].flags.c_contiguous
    assert sample["keypoints"].shape == (17, 2)
    assert sample["to_image"].shape == (2, 3)
    assert sample["id"] == 1
    assert {sample[k].dtype for k in ("keypoints", "visible", "to_image")} == {np.dtype(np.float32)}


def test_samples_repeat_with_the_seed_and_differ_without(tmp_path):
    data = KeypointDataset([picture(tmp_path / "a.png")], FACTS, SIZE, PoseAugmentation())
    torch.manual_seed(3)
    first, second = data[0], data[0]
    torch.manual_seed(3)
    again = data[0]
    assert np.array_equal(first["image"], again["image"])
    assert not np.array_equal(first["to_image"], second["to_image"])


def test_evaluation_is_the_plain_crop(tmp_path):
    instance = picture(tmp_path / "a.png")
    sample = KeypointDataset([instance], FACTS, SIZE)[0]
    matrix = official_matrix(*crop_of_box(instance.box, SIZE), SIZE, 0)
    np.testing.assert_allclose(sample["keypoints"], apply(matrix, instance.keypoints), atol=1e-3)


class Drawn(PoseAugmentation):
    """Draws what it was told."""

    def half(self, *_):
        return np.array([150.3, 121.7]), np.array([210.0, 280.0])

    def angle(self, _):
        return self.rotation


def photograph(path, size=(240, 320)):
    """A JPEG of smooth noise, with a person in it."""
    noise = np.random.default_rng(0).integers(0, 255, (24, 32, 3), np.uint8)
    cv2.imwrite(str(path), cv2.resize(noise, size[::-1], interpolation=cv2.INTER_CUBIC))
    return Instance(str(path), 1, np.array([90.0, 50.0, 140.0, 150.0]), np.full((17, 2), 120.0), np.full(17, 2.0))


@pytest.mark.parametrize("flip", [0.0, 1.0])
@pytest.mark.parametrize("rotation", [0.0, 33.0, -71.0])
@pytest.mark.parametrize("scale", [0.5, 1.0, 1.31])
def test_crops_are_the_official_ones_bit_for_bit(flip, rotation, scale, tmp_path):
    instance = photograph(tmp_path / "a.jpg")
    augmentation = Drawn(scale=0, rotation=rotation, flip=flip)
    object.__setattr__(augmentation, "factor", lambda _: scale)
    sample = KeypointDataset([instance], FACTS, (256, 192), augmentation)[0]
    image = cv2.cvtColor(cv2.imread(instance.path, cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)
    centre, extent = augmentation.half()
    if flip:
        image, centre[0] = image[:, ::-1, :].copy(), image.shape[1] - centre[0] - 1
    matrix = official_matrix(centre, extent * scale, (256, 192), rotation)
    expected = cv2.warpAffine(image, matrix, (192, 256), flags=cv2.INTER_LINEAR)
    assert np.array_equal(sample["image"], expected.transpose(2, 0, 1))


def test_reduced_pictures_leave_labels_alone(tmp_path):
    instance = photograph(tmp_path / "a.jpg", (480, 640))
    instance.box *= 2
    for seed in range(8):
        samples = []
        for small in (False, True):
            torch.manual_seed(seed)
            samples.append(
                KeypointDataset([instance], FACTS, (64, 48), PoseAugmentation(half_body=0), reduced=small)[0]
            )
        assert all(np.array_equal(samples[0][key], samples[1][key]) for key in ("keypoints", "visible", "to_image"))
        apart = np.abs(samples[0]["image"].astype(int) - samples[1]["image"])
        assert 0 < apart.mean() < 12


def test_evaluation_decodes_a_picture_once(tmp_path):
    people = [photograph(tmp_path / "a.jpg"), photograph(tmp_path / "a.jpg"), photograph(tmp_path / "b.jpg")]
    seen = []
    data = KeypointDataset(people, FACTS, SIZE, read=lambda path: seen.append(path) or read_image(path))
    first, again, _ = (data[i] for i in range(3))
    assert np.array_equal(first["image"], again["image"])
    assert seen == [people[0].path, people[2].path]


# --- augmentation


def test_factors_and_angles_have_the_official_law():
    rng, recipe = np.random.default_rng(0), PoseAugmentation()
    factors = np.array([recipe.factor(rng) for _ in range(6000)])
    angles = np.array([recipe.angle(rng) for _ in range(6000)])
    assert factors.min() == 0.65
    assert factors.max() == 1.35
    assert (factors == 1.35).mean() == pytest.approx(0.1587, abs=0.02)  # clipped at one standard deviation
    assert (factors == 0.65).mean() == pytest.approx(0.1587, abs=0.02)
    assert factors.mean() == pytest.approx(1, abs=0.02)
    assert (angles != 0).mean() == pytest.approx(0.6, abs=0.025)
    assert angles.min() == -90
    assert angles.max() == 90
    turned = angles[angles != 0]
    assert (np.abs(turned) < 45).mean() == pytest.approx(0.6827, abs=0.03)
    assert (turned == 90).mean() == pytest.approx(0.0228, abs=0.01)
    assert turned.mean() == pytest.approx(0, abs=3)


def test_flip_happens_as_often_as_it_says(tmp_path):
    instance = picture(tmp_path / "a.png")
    data = KeypointDataset([instance], FACTS, (32, 32), PoseAugmentation(0, 0, 0, 0.5, 0))
    torch.manual_seed(0)
    flips = np.mean([np.linalg.det(data[0]["to_image"][:, :2]) < 0 for _ in range(800)])
    assert flips == pytest.approx(0.5, abs=0.06)


def body(visible_upper=11, visible_lower=6):
    rng = np.random.default_rng(0)
    keypoints = rng.uniform(0, 100, (17, 2)) + np.where(np.array(FACTS.upper), 0, 500)[:, None]
    visible = np.zeros(17)
    visible[:visible_upper] = 1
    visible[11 : 11 + visible_lower] = 2
    return keypoints, visible, np.array(FACTS.upper)


def test_upper_body_is_the_official_eleven():
    assert np.flatnonzero(FACTS.upper).tolist() == list(range(11))


def test_half_body_prefers_the_upper_as_officially():
    keypoints, visible, upper = body()
    rng, recipe = np.random.default_rng(0), PoseAugmentation(half_body=1.0)
    halves = [recipe.half(keypoints, visible, upper, SIZE, rng) for _ in range(3000)]
    assert all(half is not None for half in halves)
    assert np.mean([half[0][0] < 250 for half in halves]) == pytest.approx(0.6915, abs=0.03)


def test_half_body_probability():
    rng, recipe = np.random.default_rng(0), PoseAugmentation()
    halves = [recipe.half(*body(), SIZE, rng) for _ in range(3000)]
    assert np.mean([half is not None for half in halves]) == pytest.approx(0.3, abs=0.03)


@pytest.mark.parametrize(("upper", "lower"), [(11, 0), (9, 2)])
def test_half_body_falls_back_to_the_upper(upper, lower):
    keypoints, visible, is_upper = body(upper, lower)
    rng, recipe = np.random.default_rng(0), PoseAugmentation(half_body=1.0)
    for _ in range(50):
        centre, extent = recipe.half(keypoints, visible, is_upper, SIZE, rng)
        chosen = keypoints[(visible > 0) & is_upper]
        np.testing.assert_allclose(centre, chosen.mean(0))
        w, h = chosen.max(0) - chosen.min(0)
        w, h = max(w, h * 0.75), max(h, w / 0.75)
        np.testing.assert_allclose(extent, [1.5 * w, 1.5 * h])


def test_half_body_takes_the_lower_where_the_upper_is_scarce():
    names = [f"ankle_{i}" for i in range(10)] + ["nose", "eye"]
    upper = np.array(Keypoints(names).upper)
    keypoints = np.random.default_rng(0).uniform(0, 100, (12, 2))
    rng, recipe = np.random.default_rng(0), PoseAugmentation(half_body=1.0)
    for _ in range(30):
        centre, _ = recipe.half(keypoints, np.ones(12), upper, SIZE, rng)
        np.testing.assert_allclose(centre, keypoints[:10].mean(0))


def test_half_body_needs_more_than_eight_joints():
    rng, recipe = np.random.default_rng(0), PoseAugmentation(half_body=1.0)
    assert all(recipe.half(*body(5, 3), SIZE, rng) is None for _ in range(50))
    assert recipe.half(*body(6, 3), SIZE, rng) is not None


# --- reading


def encoded(suffix, height=40, width=60):
    image = np.random.default_rng(0).integers(0, 255, (height, width, 3), np.uint8)
    return image, cv2.imencode(suffix, image[..., ::-1])[1].tobytes()


@pytest.mark.parametrize("suffix", [".png", ".bmp", ".tiff", ".ppm"])
def test_images_come_as_rgb(suffix, tmp_path):
    image, data = encoded(suffix)
    path = tmp_path / f"a{suffix}"
    path.write_bytes(data)
    assert np.array_equal(read_image(path), image)
    assert np.array_equal(read_image(str(path), 7), image[:7])


def test_grey_and_transparent_images_become_rgb(tmp_path):
    cv2.imwrite(str(tmp_path / "grey.png"), np.full((5, 6), 77, np.uint8))
    cv2.imwrite(str(tmp_path / "alpha.png"), np.full((5, 6, 4), 77, np.uint8))
    for name in ("grey", "alpha"):
        image = read_image(tmp_path / f"{name}.png")
        assert image.shape == (5, 6, 3)
        assert (image == 77).all()


def test_orientation_tags_are_ignored(tmp_path):
    from PIL import Image

    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees
    Image.fromarray(np.zeros((20, 30, 3), np.uint8)).save(tmp_path / "a.jpg", exif=exif)
    assert read_image(tmp_path / "a.jpg").shape == (20, 30, 3)


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".bmp", ".webp"])
@pytest.mark.parametrize("fault", ["missing", "empty", "folder", "text", "truncated", "header only"])
def test_broken_images_are_named(suffix, fault, tmp_path):
    path = tmp_path / f"holiday{suffix}"
    _, data = encoded(suffix)
    if fault == "folder":
        path.mkdir()
    elif fault != "missing":
        path.write_bytes(
            {
                "empty": b"",
                "text": b"not an image\n" * 9,
                "truncated": data[: len(data) // 2],
                "header only": data[:20],
            }[fault]
        )
    with pytest.raises(DataError) as error:
        read_image(path)
    assert str(path) in str(error.value)
    assert len(str(error.value).splitlines()) == 1
    assert error.value.__cause__ is None
    assert error.value.__suppress_context__ or error.value.__context__ is None


@pytest.mark.parametrize("suffix", [".jpg", ".png"])
@pytest.mark.parametrize("cut", [1, 2, 5, 13, 100])
def test_files_short_of_a_few_bytes_are_whole_or_refused(suffix, cut, tmp_path):
    """Either the picture is complete, or it is an error; never a picture filled up in grey."""
    path = tmp_path / f"a{suffix}"
    _, data = encoded(suffix, 100, 100)
    path.write_bytes(data)
    whole = read_image(path)
    path.write_bytes(data[:-cut])
    try:
        image = read_image(path)
    except DataError:
        return
    assert np.array_equal(image, whole)


def test_trailing_bytes_do_no_harm(tmp_path):
    _, data = encoded(".jpg")
    (tmp_path / "a.jpg").write_bytes(data)
    (tmp_path / "b.jpg").write_bytes(data + b"\0" * 5000)
    assert np.array_equal(read_image(tmp_path / "a.jpg"), read_image(tmp_path / "b.jpg"))
