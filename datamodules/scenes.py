"""Drawn scenes with every kind of label: the default data, made without any download.

`draw` makes one scene from (seed, index) alone; `datamodules.rendered` stores many of them in COCO format.
Point coordinates are pixels, integers being pixel centres; boxes are x, y, width, height as
pycocotools counts them (the pixels of columns x .. x + width - 1).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import cv2
import numpy as np
from numpy.random import Generator
from numpy.typing import ArrayLike

from datamodules import figures
from datamodules.figures import SCALE, Canvas, Person, colour

VERSION = 2  # bump whenever the same (seed, index) gives another scene

KEYPOINTS = [
    "nose", "left_eye", "right_eye", "left_ear", "right_ear", "left_shoulder", "right_shoulder",
    "left_elbow", "right_elbow", "left_wrist", "right_wrist", "left_hip", "right_hip",
    "left_knee", "right_knee", "left_ankle", "right_ankle",
]  # fmt: skip
SKELETON = [
    [16, 14], [14, 12], [17, 15], [15, 13], [12, 13], [6, 12], [7, 13], [6, 7], [6, 8], [7, 9],
    [8, 10], [9, 11], [2, 3], [1, 2], [1, 3], [2, 4], [3, 5], [4, 6], [5, 7],
]  # fmt: skip
CLASSES = ["person", "ball", "box", "cone", "star", "car"]  # category id = position + 1
STUFF = ["sky", "wall", "floor", "building", "road", "grass", "water", "sand"]
SEMANTIC = STUFF + CLASSES
SCENE_CLASSES = ["indoor", "street", "field", "beach"]
LAYERS = {  # from top to bottom: what is seen, its mean RGB
    "indoor": [("wall", (205, 190, 160)), ("floor", (140, 95, 60))],
    "street": [("sky", (150, 190, 225)), ("building", (150, 120, 110)), ("road", (95, 95, 100))],
    "field": [("sky", (130, 180, 230)), ("grass", (85, 140, 60))],
    "beach": [("sky", (160, 205, 240)), ("water", (50, 125, 165)), ("sand", (220, 195, 145))],
}
COLOURS = {  # ranges of saturation, value and hue: things have a usual colour, though clutter may have it too
    "ball": ((0.6, 1.0), (0.5, 0.95), (0.93, 1.01)),
    "box": ((0.4, 0.65), (0.4, 0.7), (0.05, 0.1)),
    "cone": ((0.85, 1.0), (0.85, 1.0), (0.04, 0.09)),
    "star": ((0.65, 1.0), (0.8, 1.0), (0.13, 0.18)),
}
SQUARE = np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]])
Thing = tuple[Person | int, Callable]  # posed person or category id; call with canvas, owner
MIN_KEYPOINTS = 6  # visible ones of a labelled person
MIN_AREA = 0.0015  # visible part of a labelled instance, as share of the picture


@dataclass
class Instance:
    """One labelled thing.

    Attributes:
        category: 1 .. len(CLASSES).
        mask: bool [H, W], its visible part; masks of a scene are disjoint.
        box: x, y, width, height of the mask, int.
        keypoints: float64 [17, 3] for people, else None: x, y in pixels and 2 = visible,
            1 = hidden by something, 0 = outside the picture (x = y = 0).
    """

    category: int
    mask: np.ndarray
    box: tuple[int, int, int, int]
    keypoints: np.ndarray | None = None


@dataclass
class Scene:
    """One drawn picture with all its labels.

    Attributes:
        image: uint8 RGB [H, W, 3].
        instances: far ones first.
        semantic: uint8 [H, W], indices into SEMANTIC; there is no void.
        label: index into SCENE_CLASSES.
    """

    image: np.ndarray
    instances: list[Instance]
    semantic: np.ndarray
    label: int


def draw(seed: int, index: int, size: tuple[int, int] = (240, 320)) -> Scene:
    """Draw scene `index` of the endless sequence `seed`; equal arguments give equal scenes.

    Args:
        seed: non-negative.
        index: non-negative.
        size: height and width in pixels, at least 120 each.

    Raises:
        ValueError: a negative seed or index, or a size that is too small.
    """
    if min(seed, index) < 0 or min(size) < 120:
        raise ValueError(f"cannot draw seed {seed}, index {index}, size {size}")
    rng = np.random.default_rng((seed, index))
    label = int(rng.integers(len(SCENE_CLASSES)))
    background, stuff, horizon = _background(rng, SCENE_CLASSES[label], size)
    light = _light(rng, size)
    things = _arrange(rng, size, horizon)
    while True:
        canvas = Canvas(background.copy())
        for number, (_, paint) in enumerate(things):
            # each thing paints from its own random state, so leaving one out changes no other
            paint(canvas, owner=1 + number * 18)
        labels = _label(canvas.owner, things)
        instances = [instance for instance in labels if instance]
        if len(instances) == len(things):
            break
        things = [thing for thing, instance in zip(things, labels, strict=True) if instance]
    semantic = stuff.copy()
    for instance in instances:
        semantic[instance.mask] = len(STUFF) + instance.category - 1
    image = cv2.resize(canvas.image, size[::-1], interpolation=cv2.INTER_AREA)
    return Scene(light(image), instances, semantic, label)


def _label(owner: np.ndarray, things: list[Thing]) -> list[Instance | None]:
    """Instances of the painted things, None for those that show too little."""
    # of the SCALE x SCALE = 4 owners of a pixel the most frequent wins, on ties the nearer one
    number = cv2.LUT(owner, ((np.arange(256) + 17) // 18).astype(np.uint8))
    a, b, c, d = (number[i::2, j::2] for i in (0, 1) for j in (0, 1))
    a, b, c, d = np.minimum(a, b), np.maximum(a, b), np.minimum(c, d), np.maximum(c, d)
    a, c, b, d = np.minimum(a, c), np.maximum(a, c), np.minimum(b, d), np.maximum(b, d)
    b, c = np.minimum(b, c), np.maximum(b, c)
    number = np.where(c == d, d, np.where(b == c, b, np.where(a == b, a, d)))
    height, width = number.shape
    instances: list[Instance | None] = []
    for n, (thing, _) in enumerate(things):
        mask = number == n + 1
        good = np.count_nonzero(mask) >= MIN_AREA * mask.size
        x, y, w, h = cv2.boundingRect(mask.view(np.uint8))
        if isinstance(thing, Person):
            xy = thing.joints[:, :2]
            inside = np.all((xy >= 0) & (xy <= (width - 1, height - 1)), axis=1)
            at = np.rint(xy * SCALE + 0.5).astype(int) * inside[:, None]
            seen = inside & (owner[at[:, 1], at[:, 0]] == 2 + n * 18 + np.arange(17))
            keypoints = np.column_stack([xy * inside[:, None], inside * 1.0 + seen])
            good &= np.count_nonzero(seen) >= MIN_KEYPOINTS
            instance = Instance(1, mask, (x, y, w, h), keypoints)
        else:
            instance = Instance(thing, mask, (x, y, w, h))
        instances.append(instance if good else None)
    return instances


def _light(rng: Generator, size: tuple[int, int]) -> Callable[[np.ndarray], np.ndarray]:
    """A random change of light, blur and noise, to be called with the finished picture."""
    down, right = (rng.uniform(-0.2, 0.2) * np.linspace(-1, 1, n) for n in size)
    ramp = np.add.outer(down + rng.uniform(0.75, 1.15), right).astype(np.float32)
    gain = cv2.merge([ramp * cast for cast in rng.uniform(0.9, 1.1, 3).astype(np.float32)])
    sigma, grain = rng.uniform(0.1, 0.6), rng.uniform(1, 7)
    noise = cv2.merge([rng.standard_normal(size, np.float32) * np.float32(grain)] * 3)

    def light(image: np.ndarray) -> np.ndarray:
        image = cv2.GaussianBlur(image, (3, 3), sigma)
        bright = cv2.multiply(image, gain, dtype=cv2.CV_32F)
        return cv2.add(bright, noise, dtype=cv2.CV_8U)  # rounds and saturates

    return light


def _background(rng: Generator, setting: str, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray, float]:
    """(canvas picture, semantic map uint8 [H, W], y of the horizon in pixels)."""
    height, width = size
    xs = np.linspace(-1, 1, width)
    layer = np.zeros(size, np.uint8)
    layers = LAYERS[setting]
    horizon = rng.uniform(0.4, 0.6) * height
    tops = [horizon] if len(layers) == 2 else [horizon * rng.uniform(0.35, 0.75), horizon]
    for top in tops:
        edge = top + height * (rng.normal(0, 0.02) * xs)
        if layers[1][0] == "building":
            edge += 12 * rng.standard_normal(9).repeat(-(-width // 9))[:width] * (top < horizon)
        layer += np.arange(height)[:, None] >= edge
    tones = np.array([np.clip(rgb + rng.normal(0, 14, 3), 30, 240) for _, rgb in layers], np.float32)
    texture = np.zeros(size, np.float32)
    for cell in (48, 20, 8, 3):  # octaves of noise
        grid = rng.standard_normal((height // cell + 2, width // cell + 2), np.float32)
        amount = np.float32(rng.uniform(3, 11))
        texture += cv2.resize(grid, size[::-1], interpolation=cv2.INTER_LINEAR) * amount
    top, bottom = rng.uniform(-20, 20, 2)
    texture += np.linspace(top, bottom, height, dtype=np.float32)[:, None]
    image = cv2.add(tones[layer], cv2.merge([texture] * 3), dtype=cv2.CV_8U)
    canvas = Canvas(cv2.resize(image, None, fx=SCALE, fy=SCALE))
    strokes, length, tilt = {
        "indoor": (30, 40, 0.02), "street": (25, 22, 0.02), "field": (90, 6, 1.4),
        "beach": (50, 12, 0.15),
    }[setting]  # fmt: skip
    for _ in range(strokes):  # boards, lane marks, blades of grass, ripples
        at = rng.uniform((0, tops[0]), (width, height))
        angle = tilt * rng.choice([-1, 1]) + rng.normal(0, 0.05)
        along = rng.uniform(0.4, 1) * length * np.array([np.cos(angle), np.sin(angle)])
        tone = tones[-1 if at[1] > horizon else -2] + rng.normal(0, 30)
        start, end = np.rint([(at - along) * SCALE, (at + along) * SCALE]).astype(int).tolist()
        cv2.line(canvas.image, start, end, tone.tolist(), SCALE)
    _clutter(rng, canvas, setting, size, horizon)
    kinds = np.array([STUFF.index(name) for name, _ in layers], np.uint8)
    return canvas.image, kinds[layer], horizon


def _clutter(rng: Generator, canvas: Canvas, setting: str, size: tuple[int, int], horizon: float) -> None:
    """Windows or pictures, patches, and bars that resemble limbs but have no joints."""
    height, width = size
    if setting in ("indoor", "street"):
        tone = colour(rng, (0.1, 0.5), (0.3, 1))
        for x in np.arange(rng.uniform(5, 30), width, rng.uniform(28, 60)):
            at, half = np.array([x, horizon * rng.uniform(0.6, 0.8)]), rng.uniform(5, 13, 2)
            canvas.polygon(at + (half + 1.5) * SQUARE, 0.4 * tone)
            canvas.polygon(at + half * SQUARE, tone)
    for _ in range(rng.integers(5, 14)):
        at, radii = rng.uniform((0, 0.2 * height), (width, height)), rng.uniform(3, 18, 2)
        corners = figures.CIRCLE[:: rng.choice([1, 4, 6, 8])] @ _turn(rng.uniform(0, 6.3))
        canvas.polygon(at + corners * radii, colour(rng, (0.1, 0.7), (0.2, 0.9)))
    for _ in range(rng.integers(4, 11)):
        at, angle = rng.uniform((0, 0.2 * height), (width, height)), rng.uniform(0, 6.3)
        along = rng.uniform(8, 26) * np.array([np.cos(angle), np.sin(angle)])
        thick, tone = rng.uniform(2.5, 7, 2), colour(rng)
        canvas.bar(at - along, at + along, thick[0] + 1, thick[1] + 1, 0.15 * tone)
        canvas.bar(at - along, at + along, thick[0], thick[1], tone)
        side = int(rng.choice([-1, 1]))
        if rng.random() < 0.4:
            canvas.bar(at - along, at + along, thick[0], thick[1], 0.6 * tone, side=side)


def _turn(angle: float) -> np.ndarray:
    """Rotation matrix [2, 2] for row vectors, clockwise on the screen; angle in radians."""
    return np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])


def _arrange(rng: Generator, size: tuple[int, int], horizon: float) -> list[Thing]:
    """Things to paint, far ones first: pairs of (`Person` or category id, paint function)."""
    height, width = size
    things: list[tuple[float, Person | int, Callable]] = []  # depth first
    boxes: list[np.ndarray] = []
    for k in range(rng.choice([1, 2, 3, 4], p=[0.2, 0.35, 0.3, 0.15])):
        tall = height * rng.uniform(0.3, 0.78)
        person = figures.pose(rng, tall)
        cut = k > 0 and rng.random() < 0.25
        for _ in range(12):  # look for a place where few others are
            bottom, x = rng.uniform(max(tall, horizon + 8), 0.98 * height), rng.uniform(0, width)
            if cut and rng.random() < 0.4:
                bottom = height + tall * rng.uniform(0.05, 0.35)
            x0, y0, x1, y1 = person.box()
            if not cut:
                x = rng.uniform(min(-x0, width / 2), max(width - x1, width / 2))
            elif bottom < height:
                x = rng.choice([0, width]) + tall * rng.uniform(-0.12, 0.12)
            box = np.array([x0 + x, bottom - (y1 - y0), x1 + x, bottom])
            if max((_overlap(box, other) for other in boxes), default=0) < 0.2:
                person.move((x, bottom - y1))
                boxes.append(box)
                looks = int(rng.integers(1 << 62))
                things.append((bottom, person, partial(_paint_person, person, looks)))
                break
    for _ in range(rng.integers(2, 6)):
        category = int(rng.integers(2, len(CLASSES) + 1))
        at = rng.uniform((0, horizon - 10), (width, 0.97 * height))
        radius = rng.uniform(0.06, 0.12) * height * (0.5 + 0.5 * at[1] / height)
        function = partial(_paint_object, category, at, radius, int(rng.integers(1 << 62)))
        things.append((at[1] + radius, category, function))
    return [thing[1:] for thing in sorted(things, key=lambda thing: thing[0])]


def _overlap(a: np.ndarray, b: np.ndarray) -> float:
    """Intersection over union of two boxes x0, y0, x1, y1."""
    sides = np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2])
    inner = sides.clip(0).prod()
    return inner / ((a[2:] - a[:2]).prod() + (b[2:] - b[:2]).prod() - inner)


def _paint_person(person: Person, looks: int, canvas: Canvas, owner: int) -> None:
    figures.paint(canvas, person, np.random.default_rng(looks), owner)


def _paint_object(category: int, at: np.ndarray, radius: float, looks: int, canvas: Canvas, owner: int) -> None:
    rng = np.random.default_rng(looks)
    name = CLASSES[category - 1]
    body, trim = colour(rng, *COLOURS.get(name, ())), colour(rng, (0, 0.9), (0.2, 1))
    turn = _turn(rng.normal(0, 0.15))

    def shape(points: ArrayLike, fill: figures.Colour) -> None:
        canvas.polygon(at + radius * np.asarray(points) @ turn, fill, owner)

    if name == "ball":
        shape(figures.CIRCLE, 0.2 * body)
        shape(0.9 * figures.CIRCLE, body)
        for angle in np.arange(3) * 2.1 + rng.uniform(0, 2):
            shape(0.22 * figures.CIRCLE + 0.5 * np.array([np.cos(angle), np.sin(angle)]), trim)
    elif name == "box":
        shape(SQUARE, 0.3 * body)
        shape(0.88 * SQUARE, body)
        shape(SQUARE * [0.16, 0.88], trim)
        shape(SQUARE * [0.88, 0.16], trim)
    elif name == "cone":
        shape([[-0.12, -1.3], [0.12, -1.3], [0.75, 0.8], [-0.75, 0.8]], body)
        shape([[-0.32, -0.6], [0.32, -0.6], [0.52, 0.05], [-0.52, 0.05]], trim)
        shape(SQUARE * [1, 0.13] + [0, 0.87], 0.6 * body)
    elif name == "star":
        tips = np.array([_turn(-k * np.pi / 5)[0] * (1.2 if k % 2 else 0.5) for k in range(10)])
        for k in range(1, 10, 2):
            kite = np.array([[0, 0], tips[k - 1], tips[k], tips[(k + 1) % 10]])
            shape(kite, body)
            shape(0.6 * kite, 0.5 * body + 0.5 * trim)
    else:
        side = rng.choice([-1, 1])
        shape([[-0.9 * side, -0.3], [-0.6 * side, -0.9], [0.4 * side, -0.9], [0.8 * side, -0.2]], body)
        shape(
            [[-0.6 * side, -0.3], [-0.5 * side, -0.75], [0.3 * side, -0.75], [0.5 * side, -0.3]],
            trim,
        )
        shape(SQUARE * [1.6, 0.35] + [0, 0.05], 0.85 * body)
        for x in (-0.9, 0.9):
            shape(0.38 * figures.CIRCLE + [x, 0.45], (25, 25, 28))
            shape(0.17 * figures.CIRCLE + [x, 0.45], (190, 190, 190))
