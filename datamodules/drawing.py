"""Pictures of labels and predictions."""

from collections.abc import Sequence

import cv2
import numpy as np

from datamodules.keypoints import Keypoints


def draw_keypoints(
    image: np.ndarray, keypoints: np.ndarray, shown: np.ndarray, facts: Keypoints, radius: int = 2
) -> np.ndarray:
    """A copy of `image` (RGB uint8 `[H, W, 3]`) with one skeleton: left limbs warm, right limbs cold, the rest white.

    Args:
        keypoints: `[K, 2]`, pixels of the image. shown: bool `[K]`, which of them to draw.
    """
    canvas = np.ascontiguousarray(image).copy()
    left = {pair[0] for pair in facts.flip_pairs}
    right = {pair[1] for pair in facts.flip_pairs}

    def colour(*joints: int) -> tuple[int, int, int]:
        if left.intersection(joints) and not right.intersection(joints):
            return (255, 140, 0)
        if right.intersection(joints) and not left.intersection(joints):
            return (0, 160, 255)
        return (255, 255, 255)

    # Sub-pixel drawing: cv2 takes coordinates in sixteenths.
    places = [tuple(round(float(v) * 16) for v in point) for point in np.nan_to_num(keypoints)]
    thickness = max(1, radius // 2)
    for a, b in facts.skeleton:
        if shown[a] and shown[b]:
            cv2.line(canvas, places[a], places[b], colour(a, b), thickness, cv2.LINE_AA, 4)
    for j, place in enumerate(places):
        if shown[j]:
            cv2.circle(canvas, place, radius * 16, colour(j), -1, cv2.LINE_AA, 4)
            cv2.circle(canvas, place, radius * 16, (0, 0, 0), 1, cv2.LINE_AA, 4)
    return canvas


def heatmap_overlay(image: np.ndarray, heatmap: np.ndarray) -> np.ndarray:
    """`image` (RGB uint8 `[H, W, 3]`) half covered by a `heatmap` (`[h, w]`, 0..1 shown from blue to red)."""
    values = (np.clip(heatmap, 0, 1) * 255).astype(np.uint8)
    values = cv2.resize(values, (image.shape[1], image.shape[0]), interpolation=cv2.INTER_LINEAR)
    colours = cv2.cvtColor(cv2.applyColorMap(values, cv2.COLORMAP_JET), cv2.COLOR_BGR2RGB)
    return cv2.addWeighted(image, 0.5, colours, 0.5, 0)


def write_text(image: np.ndarray, text: str, place: Sequence[float], size: float = 1.0) -> None:
    """White letters with a dark edge on `image`, their lower left corner at `place` (x, y)."""
    x, y = round(float(place[0])), round(float(place[1]))
    width = max(1, round(size))
    # Thicker letters would also be wider: the edge is the same letters, moved.
    edge = [(x + dx, y + dy, (0, 0, 0)) for dx in (-width, 0, width) for dy in (-width, 0, width)]
    for left, base, ink in [*edge, (x, y, (255, 255, 255))]:
        cv2.putText(image, text, (left, base), cv2.FONT_HERSHEY_SIMPLEX, 0.45 * size, ink, width, cv2.LINE_AA)


def grid(pictures: list[np.ndarray], columns: int = 2) -> np.ndarray:
    """Equal-sized pictures in rows; the last row is filled up with black."""
    blank = np.zeros_like(pictures[0])
    pictures = pictures + [blank] * (-len(pictures) % columns)
    rows = [np.concatenate(pictures[i : i + columns], axis=1) for i in range(0, len(pictures), columns)]
    return np.concatenate(rows)


def write_image(path: str, image: np.ndarray) -> None:
    """Write RGB uint8 `[H, W, 3]`; OpenCV's silent failures become an OSError."""
    if not cv2.imwrite(path, cv2.cvtColor(image, cv2.COLOR_RGB2BGR)):
        raise OSError(f"{path}: cannot write the picture")


def draw_boxes(
    image: np.ndarray,
    boxes: np.ndarray,
    colours: Sequence[Sequence[int]],
    texts: Sequence[str],
    masks: Sequence[np.ndarray] | None = None,
) -> np.ndarray:
    """A copy of `image` (RGB uint8 `[H, W, 3]`) with boxes `[N, 4]` (x0, y0, x1, y1 in pixels), a text over each, and
    masks `[H, W]` half covering it."""
    canvas = np.ascontiguousarray(image).copy()
    for mask, colour in zip(masks or (), colours, strict=False):
        inside = mask.astype(bool)
        canvas[inside] = canvas[inside] // 2 + np.array(colour, np.uint8) // 2
    size = max(1.0, max(image.shape[:2]) / 800)
    for box, colour, text in zip(boxes, colours, texts, strict=True):
        x0, y0, x1, y1 = (round(float(v)) for v in box)
        cv2.rectangle(canvas, (x0, y0), (x1 - 1, y1 - 1), [int(c) for c in colour], max(1, round(size)))
        write_text(canvas, text, (x0 + 2, y0 + 12 * size if y0 < 14 * size else y0 - 3), 0.8 * size)
    return canvas


def fitted(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """`image` made smaller where need be, and filled up with black to `size` (H, W)."""
    factor = min(1.0, size[0] / image.shape[0], size[1] / image.shape[1])
    small = cv2.resize(image, None, fx=factor, fy=factor, interpolation=cv2.INTER_AREA) if factor < 1 else image
    canvas = np.zeros((*size, 3), np.uint8)
    canvas[: small.shape[0], : small.shape[1]] = small[: size[0], : size[1]]
    return canvas


def draw_confusion(counts: np.ndarray, names: Sequence[str]) -> np.ndarray | None:
    """A confusion matrix, rows (labels) summing to one, RGB uint8; None for more classes than could be seen.

    Args:
        counts: `[C, C]`.
    """
    count = len(names)
    if count > 100:
        return None
    share = counts / counts.sum(1, keepdims=True).clip(min=1)
    cell = max(8, min(48, 800 // count))
    margin = 130
    heat = cv2.applyColorMap((share * 255).round().astype(np.uint8), cv2.COLORMAP_VIRIDIS)[..., ::-1]
    board = np.full((margin + cell * count, margin + cell * count, 3), 255, np.uint8)
    board[margin:, margin:] = heat.repeat(cell, 0).repeat(cell, 1)
    for i, name in enumerate(names):
        at = margin + i * cell + cell // 2 + 4
        if cell >= 12:
            cv2.putText(board, name[:16], (4, at), cv2.FONT_HERSHEY_SIMPLEX, 0.4, (0, 0, 0), 1, cv2.LINE_AA)
            label = np.full((cell, margin, 3), 255, np.uint8)
            place = (4, cell // 2 + 4)
            cv2.putText(label, name[:16], place, cv2.FONT_HERSHEY_SIMPLEX, 0.4, (0, 0, 0), 1, cv2.LINE_AA)
            board[:margin, margin + i * cell : margin + (i + 1) * cell] = np.rot90(label)
        if cell >= 32:
            ink = (0, 0, 0) if share[i, i] > 0.6 else (255, 255, 255)
            text = f"{100 * share[i, i]:.0f}"
            cv2.putText(board, text, (at - 12, at), cv2.FONT_HERSHEY_SIMPLEX, 0.4, ink, 1, cv2.LINE_AA)
    return board
