"""Articulated people for the drawn scenes: a 3D puppet, its poses, and how it is painted.

Left and right limbs differ by looks that a mirror turns into each other: the face or the
rucksack says which way a person is turned, and each limb is light along one edge only, on the
opposite edge for left and right limbs. A mirrored scene with swapped labels thus looks like any
other scene, as with photographs of people. A mark carried by left limbs only would not do: it
would make every correct flip augmentation teach wrong labels, and reward a flip without swap.

Coordinates are final-image pixels, (0, 0) being the centre of the top left pixel.
"""

import colorsys
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np

SCALE = 2  # supersampling of the canvas
BITS = 8  # fractional bits of cv2's fixed-point coordinates

HEAD = 0.095  # head radius; all lengths are in units of the body height
# (left, up, forward) of marks on the head, in head radii: nose, eyes, ears
FACE = np.array([[0, -0.12, 1.0], [0.42, 0.2, 0.85], [-0.42, 0.2, 0.85], [1.02, 0, 0], [-1.02, 0, 0]])
CIRCLE = np.stack([np.cos(np.arange(24) * np.pi / 12), np.sin(np.arange(24) * np.pi / 12)], 1)

# outlines of a bar's two ends, the whole or one lengthwise half, x along the bar
ENDS = {
    0: (np.roll(CIRCLE, 6, 0)[:13], np.roll(CIRCLE, -6, 0)[:13]),
    1: (CIRCLE[:7], CIRCLE[6:13]),
    -1: (CIRCLE[:7] * [1, -1], CIRCLE[6:13] * [1, -1]),
}
Colour = np.ndarray | tuple[float, float, float]


def colour(
    rng: np.random.Generator,
    saturation: tuple[float, float] = (0.35, 0.9),
    value: tuple[float, float] = (0.4, 0.95),
    hue: tuple[float, float] = (0.0, 1.0),
) -> np.ndarray:
    """Random RGB colour, float64 [3] in 0..255, from ranges of its HSV values in 0..1."""
    hsv = rng.uniform(*hue), rng.uniform(*saturation), rng.uniform(*value)
    return 255 * np.array(colorsys.hsv_to_rgb(*hsv))


class Canvas:
    """A supersampled picture and, for each of its pixels, the number of the part seen there.

    Args:
        image: uint8 RGB [SCALE * H, SCALE * W, 3], painted in place.

    `owner` is uint8 [SCALE * H, SCALE * W], 0 where only background is seen.
    """

    def __init__(self, image: np.ndarray) -> None:
        self.image = image
        self.owner = np.zeros(image.shape[:2], np.uint8)

    def polygon(self, points: np.ndarray, fill: Colour, owner: int | None = None) -> None:
        """Fill a convex polygon, points [N, 2] in final-image pixels, with an RGB colour."""
        # the centre of a final pixel lies halfway between SCALE canvas pixels, hence the shift
        fixed = np.rint((points * SCALE + (SCALE - 1) / 2) * (1 << BITS)).astype(np.int32)
        cv2.fillConvexPoly(self.image, fixed, np.asarray(fill).tolist(), shift=BITS)
        if owner is not None:
            cv2.fillConvexPoly(self.owner, fixed, owner, shift=BITS)

    def disc(self, centre: np.ndarray, radius: float, fill: Colour, owner: int | None = None) -> None:
        """Fill a circle; `radius` in pixels."""
        self.polygon(centre + radius * CIRCLE, fill, owner)

    def bar(
        self,
        a: np.ndarray,
        b: np.ndarray,
        ra: float,
        rb: float,
        fill: Colour,
        owner: int | None = None,
        side: int = 0,
    ) -> None:
        """Fill a tapered bar with round ends from `a` to `b`, or only one lengthwise half.

        `side` is 0 for the whole bar, 1 or -1 for the half that is clockwise or counter-clockwise
        of its direction as seen on the screen.
        """
        x, y = (b - a).tolist()
        length = max(math.hypot(x, y), 1e-6)
        axes = np.array([[x, y], [-y, x]]) / length
        end, start = ENDS[side]
        self.polygon(np.concatenate([b + rb * (end @ axes), a + ra * (start @ axes)]), fill, owner)


@dataclass
class Person:
    """A posed puppet.

    Attributes:
        joints: float64 [17, 3], COCO keypoints as x, y and depth (larger is farther), pixels.
        head: float64 [3], centre of the head.
        hands, toes: float64 [2, 3], left and right.
        panel, bag: float64 [2, 3], upper and lower end of the chest panel and the rucksack.
        face: float64 [3], centre of the face; facing: its depth direction, -1 is to the viewer.
        height: body height in pixels.
    """

    joints: np.ndarray
    head: np.ndarray
    hands: np.ndarray
    toes: np.ndarray
    panel: np.ndarray
    bag: np.ndarray
    face: np.ndarray
    facing: float
    height: float

    def points(self) -> np.ndarray:
        """All points of the outline's skeleton, float64 [N, 3]."""
        return np.concatenate([self.joints, self.head[None], self.hands, self.toes])

    def box(self) -> np.ndarray:
        """Approximate extent x0, y0, x1, y1 in pixels, the image border not considered."""
        xy = self.points()[:, :2]
        pad = 0.05 * self.height
        return np.concatenate([xy.min(0) - pad, xy.max(0) + pad])

    def move(self, shift: tuple[float, float]) -> None:
        """Move by (x, y) pixels, in place."""
        for part in (self.joints, self.head, self.hands, self.toes, self.panel, self.bag):
            part[..., :2] += shift
        self.face[:2] += shift


def _axes(yaw: float) -> np.ndarray:
    """Rows: where the body's left, up and forward point in x, y, depth; yaw 0 faces us."""
    return np.array([[np.cos(yaw), 0, np.sin(yaw)], [0, -1, 0], [np.sin(yaw), 0, -np.cos(yaw)]])


def _bones(flex: np.ndarray, spread: np.ndarray) -> np.ndarray:
    """Directions [2, 3] of the left and right bone: degrees forward of, sideways from down."""
    flex, spread = np.radians(flex), np.radians(spread)
    side = np.sin(spread) * [1, -1]
    return np.stack([side, -np.cos(spread) * np.cos(flex), np.cos(spread) * np.sin(flex)], 1)


def pose(rng: np.random.Generator, height: float) -> Person:
    """A random `Person` of the given body height in pixels, hips at (0, 0)."""
    kind = rng.choice(["stand", "walk", "reach", "jump", "sit"], p=[0.3, 0.25, 0.2, 0.15, 0.1])
    arm, arm_out = rng.uniform(-15, 20, 2), rng.uniform(14, 42, 2)
    elbow, elbow_out = rng.uniform(0, 60, 2), rng.uniform(-30, 15, 2)
    leg, leg_out, knee = rng.uniform(-8, 8, 2), rng.uniform(2, 13, 2), rng.uniform(0, 15, 2)
    if kind == "walk":
        leg = rng.uniform(14, 38) * rng.permutation([1, -1])
        arm, knee = -0.9 * leg, np.where(leg > 0, rng.uniform(0, 20), rng.uniform(15, 50))
    elif kind == "reach":
        up = rng.random(2) < 0.7
        arm_out = np.where(up, rng.uniform(65, 165, 2), arm_out)
        elbow_out = np.where(up, rng.uniform(-40, 40, 2), elbow_out)
        elbow = np.where(up, rng.uniform(0, 30, 2), elbow)
    elif kind == "jump":
        leg_out, arm_out = rng.uniform(12, 36, 2), rng.uniform(45, 125, 2)
    elif kind == "sit":
        leg, leg_out, knee = (rng.uniform(a, b, 2) for a, b in ((55, 88), (5, 28), (50, 95)))
    yaw = rng.choice([0, np.pi, 1.2, -1.2], p=[0.6, 0.22, 0.09, 0.09])  # to us, away, aside
    yaw += rng.normal(0, 0.3)
    build = rng.uniform(0.9, 1.1)  # broad or slim
    shoulders = np.array([[0.125 * build, 0.33, 0], [-0.125 * build, 0.33, 0]])
    hips = np.array([[0.075 * build, 0, 0], [-0.075 * build, 0, 0]])
    elbows = shoulders + 0.165 * _bones(arm, arm_out)
    fore = _bones(arm + elbow, arm_out + elbow_out)
    wrists = elbows + 0.15 * fore
    knees = hips + 0.23 * _bones(leg, leg_out)
    shank = _bones(leg - knee, leg_out)
    ankles = knees + 0.22 * shank
    toes = ankles + 0.045 * shank + [0, 0, 0.05]
    head = np.array([[0, 0.45, 0.01]])
    tip = np.array([[0, 0.30, 0.055], [0, 0.08, 0.055]])
    axes, gaze = _axes(yaw), _axes(yaw + rng.normal(0, 0.25))
    lean = np.radians(rng.normal(0, 7))
    roll = np.array([[np.cos(lean), np.sin(lean), 0], [-np.sin(lean), np.cos(lean), 0], [0, 0, 1]])

    def place(points: np.ndarray, frame: np.ndarray = axes) -> np.ndarray:
        return height * points @ frame @ roll

    centre = place(head)
    limbs = np.stack([shoulders, elbows, wrists, hips, knees, ankles]).reshape(-1, 3)
    return Person(
        joints=np.concatenate([centre + place(HEAD * FACE, gaze), place(limbs)]),
        head=centre[0],
        hands=place(wrists + 0.03 * fore),
        toes=place(toes),
        panel=place(tip),
        bag=place(tip * [1, 1, -1.3]),
        face=centre[0] + place(HEAD * np.array([0, -0.12, 0.35]), gaze),
        facing=gaze[2, 2],
        height=height,
    )


def paint(canvas: Canvas, person: Person, rng: np.random.Generator, owner: int) -> None:
    """Paint a person in random clothes.

    Canvas pixels of keypoint k get the owner number `owner + 1 + k`, all others `owner`.
    """
    xy, depth, unit = person.joints[:, :2], person.joints[:, 2] / person.height, person.height
    skin = np.array([236, 188, 150]) * rng.uniform(0.45, 1.05)
    hair = colour(rng, (0.2, 0.7), (0.08, 0.6), (0, 0.12))
    shirt, trousers, bag = colour(rng), colour(rng), colour(rng)
    ink = np.full(3, rng.uniform(10, 40))
    panel = 255 - 0.25 * shirt
    sleeves = [shirt, shirt if rng.random() < 0.6 else skin]
    edge = max(0.008 * unit, 0.5)
    parts: list[tuple[float, Callable, tuple]] = []  # (depth, function, arguments): painted from far to near

    def limb(a: np.ndarray, b: np.ndarray, ra: float, rb: float, fill: np.ndarray, side: int) -> None:
        ends = a, b, ra * unit, rb * unit
        canvas.bar(a, b, ra * unit + edge, rb * unit + edge, ink, owner)
        canvas.bar(*ends, 0.45 * fill)
        canvas.bar(*ends, 0.5 * fill + 0.5 * 255, side=side)

    def add(z: float, function: Callable, *args: Any) -> None:
        parts.append((z, function, args))

    def mark(k: int) -> None:
        canvas.disc(xy[k], max(0.026 * unit, 2.0), ink, owner + 1 + k)
        canvas.disc(xy[k], max(0.014 * unit, 1.1), (250, 250, 235))

    def blob(centre: np.ndarray, radius: float, fill: Colour, number: int = owner) -> None:
        canvas.disc(centre, radius * unit + edge, ink, number)
        canvas.disc(centre, radius * unit, fill)

    def torso() -> None:
        radii = np.repeat([0.05, 0.06], 2)[:, None, None] * unit
        rings = (xy[[5, 6, 11, 12], None] + radii * CIRCLE).reshape(-1, 2)
        for grow, fill, number in ((edge, ink, owner), (0, shirt, None)):
            hull = cv2.convexHull(rings.astype(np.float32))[:, 0]
            middle = hull.mean(0)
            reach = np.linalg.norm(hull - middle, axis=1, keepdims=True)
            canvas.polygon(middle + (hull - middle) * (1 + grow / reach), fill, number)

    def strap(ends: np.ndarray, radius: float, fill: Colour) -> None:
        a, b = ends[:, :2]
        canvas.bar(a, b, radius * unit + edge, radius * unit + edge, ink, owner)
        canvas.bar(a, b, radius * unit, radius * unit, fill)

    def face() -> None:
        blob(person.head[:2], HEAD, hair)
        if person.facing < 0.25:
            canvas.disc(person.face[:2], 0.8 * HEAD * unit, skin)

    for side, i in ((1, 0), (-1, 1)):
        shoulder, elbow, wrist, hip, knee, ankle = range(5 + i, 17, 2)
        upper, lower = depth[[shoulder, elbow]].mean() - 0.03, depth[[elbow, wrist]].mean() - 0.03
        add(upper, limb, xy[shoulder], xy[elbow], 0.044, 0.038, sleeves[0], side)
        add(lower, limb, xy[elbow], xy[wrist], 0.038, 0.03, sleeves[1], side)
        add(lower - 1e-3, blob, person.hands[i, :2], 0.03, skin)
        add(min(upper, lower) - 2e-3, mark, elbow)
        add(lower - 2e-3, mark, wrist)
        add(min(depth[shoulder] - 0.06, upper - 2e-3), mark, shoulder)
        thigh, shank = depth[[hip, knee]].mean() + 0.03, depth[[knee, ankle]].mean() + 0.031
        add(thigh, limb, xy[hip], xy[knee], 0.062, 0.05, trousers, side)
        add(shank, limb, xy[knee], xy[ankle], 0.05, 0.036, trousers, side)
        add(shank + 1e-3, limb, xy[ankle], person.toes[i, :2], 0.036, 0.036, bag, side)
        add(min(thigh, shank) - 2e-3, mark, knee)
        add(shank - 2e-3, mark, ankle)
        add(min(depth[hip] - 0.06, thigh - 2e-3), mark, hip)
    add(0.0, torso)
    add(-1e-3 if person.panel[0, 2] < 0 else 1e-3, strap, person.panel, 0.022, panel)
    add(-2e-3 if person.bag[0, 2] < 0 else 2e-3, strap, person.bag, 0.06, bag)
    skull = person.head[2] / unit - 0.02
    add(skull, face)
    for k in (3, 4):  # ears
        behind = depth[k] - person.head[2] / unit > 0.4 * HEAD
        add(skull + (1e-3 if behind else -1e-3), blob, xy[k], 0.022, skin, owner + 1 + k)
    red = np.array([225, 60, 50])
    for k, radius, fill in ((1, 0.016, ink), (2, 0.016, ink), (0, 0.018, red)):  # eyes, nose
        if depth[k] - person.head[2] / unit < -0.1 * HEAD:
            add(skull - 2e-3, canvas.disc, xy[k], max(radius * unit, 1), fill, owner + 1 + k)
    for _, function, args in sorted(parts, key=lambda part: -part[0]):
        function(*args)
