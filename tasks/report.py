"""A report as one HTML file that needs nothing else: its style, tables, and plots as inline SVG; no JavaScript."""

import base64
import html
import math
from collections.abc import Mapping, Sequence
from typing import Any

import cv2

from datamodules.transforms import Array

STYLE = """
:root { color-scheme: light dark; --ink: #1c2024; --soft: #5c656e; --line: #d5dade; --paper: #fff; --panel: #f4f6f7;
  --c0: #2a7f62; --c1: #d49a1e; --c2: #b5524a; --c3: #7a5ba8; --c4: #57616b; --c5: #2b74b8; --c6: #a0a8af; }
@media (prefers-color-scheme: dark) { :root { --ink: #e3e7ea; --soft: #9aa5ae; --line: #3a424a; --paper: #14181b;
  --panel: #1d2226; --c0: #53b08f; --c1: #e0b04a; --c2: #de7d74; --c3: #a68bd3; --c4: #8d99a4; --c5: #66a5e0;
  --c6: #59636b; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 70rem; padding: 1rem; background: var(--paper); color: var(--ink);
  font: 16px/1.45 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; margin: .2rem 0; } h2 { font-size: 1.2rem; margin: 2rem 0 .4rem; padding-top: .6rem;
  border-top: 1px solid var(--line); } h3 { font-size: 1rem; margin: 1.2rem 0 .3rem; }
p { margin: .4rem 0; max-width: 46rem; } .soft, figcaption, caption { color: var(--soft); font-size: .85rem; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-size: .85rem; }
th, td { padding: .2rem .6rem .2rem 0; text-align: left; border-bottom: 1px solid var(--line); vertical-align: middle;
  overflow-wrap: normal; } td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
td.bar { width: 45%; min-width: 7rem; } caption { text-align: left; padding-bottom: .3rem; }
.side { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 20rem), 1fr)); gap: 1rem; }
.side > * { min-width: 0; } figure { margin: 0; padding: .6rem; background: var(--panel); border-radius: .4rem; }
figure img { display: block; width: 100%; max-height: 26rem; object-fit: contain; }
svg { display: block; } svg.plot { width: 100%; max-width: 26rem; height: auto; }
svg text { fill: var(--soft); font-size: 11px; }
.key { display: inline-block; width: .8em; height: .8em; margin: 0 .3em 0 .8em; border-radius: .15em; }
.f0 { fill: var(--c0); } .f1 { fill: var(--c1); } .f2 { fill: var(--c2); } .f3 { fill: var(--c3); }
.f4 { fill: var(--c4); } .f5 { fill: var(--c5); } .f6 { fill: var(--c6); }
.grid { stroke: var(--line); } .line { fill: none; stroke-width: 1.6; }
"""


def page(title: str, parts: Sequence[str]) -> str:
    """The whole file. It may load nothing, which its policy says to the browser as well."""
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    head = (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}"><style>{STYLE}</style></head><body>'
    )
    return "\n".join([head, f"<h1>{html.escape(title)}</h1>", *parts, "</body></html>\n"])


def section(title: str, *parts: str) -> str:
    return "\n".join([f"<section><h2>{html.escape(title)}</h2>", *parts, "</section>"])


def paragraph(text: str, kind: str = "") -> str:
    return f'<p class="{kind}">{html.escape(text)}</p>'


def side_by_side(*parts: str) -> str:
    """Beside each other where there is room, below each other on a phone."""
    return '<div class="side">' + "\n".join(parts) + "</div>"


def number(value: Any) -> str:
    """As tables show it: counts whole, shares with four digits."""
    if isinstance(value, float):
        return "–" if not math.isfinite(value) else f"{value:.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def table(rows: Sequence[Mapping[str, Any]], caption: str = "") -> str:
    """Of rows with the same keys, which are its head; what is `Markup` goes in as it is."""
    if not rows:
        return paragraph("none", "soft")
    numeric = {k: all(isinstance(row[k], int | float) for row in rows) for k in rows[0]}
    kinds = {
        k: ' class="n"' if numeric[k] else ' class="bar"' if isinstance(rows[0][k], Markup) else "" for k in rows[0]
    }
    head = "".join(f"<th{kinds[k]}>{html.escape(str(k))}</th>" for k in rows[0])
    body = "".join("<tr>" + "".join(f"<td{kinds[k]}>{cell(v)}</td>" for k, v in row.items()) + "</tr>" for row in rows)
    title = f"<caption>{html.escape(caption)}</caption>" if caption else ""
    return f'<div class="scroll"><table>{title}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


class Markup(str):
    """HTML, not to be escaped."""


def cell(value: Any) -> str:
    return value if isinstance(value, Markup) else html.escape(number(value))


def bar(shares: Sequence[float], titles: Sequence[str] = ()) -> Markup:
    """One bar of parts, shares of the full width, in the colours 0, 1, ..."""
    parts, start = "", 0.0
    for i, share in enumerate(shares):
        title = f"<title>{html.escape(titles[i])}</title>" if titles else ""
        parts += (
            f'<rect class="f{i % 7}" x="{100 * start:.2f}%" width="{100 * share:.2f}%" height="12">{title}</rect>'
            if share > 0
            else ""
        )
        start += share
    return Markup(
        '<svg width="100%" height="12" role="img"><rect class="f6" width="100%" height="12" opacity=".25"/>'
        f"{parts}</svg>"
    )


def legend(names: Sequence[str]) -> str:
    """Of a bar's or a plot's colours."""
    keys = (
        f'<span class="key" style="background: var(--c{i % 7})"></span>{html.escape(n)}' for i, n in enumerate(names)
    )
    return f'<p class="soft">{"".join(keys)}</p>'


def plot(title: str, series: Mapping[str, Sequence[tuple[float, float]]], across: str, square: bool = False) -> str:
    """Lines of (x, y) points; `square` is of 0 to 1 both ways, with the diagonal."""
    series = {k: [p for p in points if all(map(math.isfinite, p))] for k, points in series.items()}
    points = [p for line in series.values() for p in line]
    if not points:
        return ""
    xs, ys = zip(*points, strict=True)
    x0, x1, y0, y1 = (0.0, 1.0, 0.0, 1.0) if square else (min(xs), max(xs), min(0, *ys, 0), max(ys))
    if x1 == x0:  # a run that was judged once: in the middle
        x0, x1 = x0 - 2, x1 + 2
    y1 = y1 if y1 > y0 else y0 + 1
    left, top, wide, high = 54, 8, 270, 260 if square else 170

    def place(x: float, y: float) -> tuple[float, float]:
        return left + wide * (x - x0) / (x1 - x0), top + high * (1 - (y - y0) / (y1 - y0))

    marks = ""
    for i in range(5):
        x, y = place(x0 + (x1 - x0) * i / 4, y0 + (y1 - y0) * i / 4)
        marks += f'<path class="grid" d="M{left} {y:.1f}H{left + wide}"/>'
        marks += f'<text x="{left - 5}" y="{y + 4:.1f}" text-anchor="end">{tick(y0 + (y1 - y0) * i / 4)}</text>'
        marks += f'<text x="{x:.1f}" y="{top + high + 14}" text-anchor="middle">{tick(x0 + (x1 - x0) * i / 4)}</text>'
    if square:
        a, b = place(0, 0), place(1, 1)
        marks += f'<path class="grid" stroke-dasharray="4" d="M{a[0]} {a[1]}L{b[0]} {b[1]}"/>'
    for i, line in enumerate(series.values()):
        colour = f"var(--c{i % 7})"
        if len(line) > 1:
            path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*p) for p in line))
            marks += f'<polyline class="line" style="stroke: {colour}" points="{path}"/>'
        if len(line) < 40:
            dots = (
                f'<circle class="f{i % 7}" cx="{x:.1f}" cy="{y:.1f}" r="2.5"/>' for x, y in (place(*p) for p in line)
            )
            marks += "".join(dots)
    marks += f'<text x="{left + wide}" y="{top + high + 28}" text-anchor="end">{html.escape(across)}</text>'
    drawn = f'<svg class="plot" viewBox="0 0 340 {top + high + 34}" role="img">{marks}</svg>'
    return f"<figure><h3>{html.escape(title)}</h3>{drawn}{legend(list(series))}</figure>"


def tick(value: float) -> str:
    """A number beside an axis."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.2g}"


def reliability(title: str, numbers: Mapping[str, Any]) -> str:
    """A reliability diagram: share of right ones over score, and how many there are of each score."""
    if not numbers["count"]:
        return ""
    lines = list(zip(numbers["scores"], numbers["right"], strict=True))
    known = [(x, y) for x, y in lines if x is not None]
    drawn = plot(f"{title}: share that is right, over the score", {"measured": known}, "score", square=True)
    count, bins = numbers["count"], len(lines)
    rows = [
        {"score": f"{i / bins:.2f}–{(i + 1) / bins:.2f}", "share of all": bar([n / count]), "count": n}
        for i, n in enumerate(numbers["counts"])
        if n
    ]
    text = f"expected calibration error {numbers['ece']:.4f} of {count:,}"
    return side_by_side(drawn, f"<div><h3>{html.escape(text)}</h3>{table(rows)}</div>")


def matrix(confusion: Sequence[Sequence[int]], names: Sequence[str], most: int = 30) -> str:
    """A confusion matrix, rows (labels) as shares of their sum; of many classes those most confused."""
    sums = [max(1, sum(row)) for row in confusion]
    index = range(len(names))
    wrong = {i: sum(confusion[i][j] + confusion[j][i] for j in index if j != i) for i in index}
    shown = sorted(sorted(index, key=lambda i: -wrong[i])[:most])
    size, margin = max(10, min(28, 600 // len(shown))), 96
    marks = ""
    for row, i in enumerate(shown):
        at = margin + row * size
        name = html.escape(names[i][:14])
        marks += f'<text x="{margin - 4}" y="{at + size / 2 + 4:.0f}" text-anchor="end">{name}</text>'
        marks += f'<text transform="translate({at + size / 2 + 4:.0f} {margin - 4}) rotate(-90)">{name}</text>'
        for column, j in enumerate(shown):
            if share := confusion[i][j] / sums[i]:
                tip = html.escape(f"{names[i]} taken for {names[j]}: {confusion[i][j]:,} ({share:.1%})")
                marks += (
                    f'<rect class="f{0 if i == j else 2}" x="{margin + column * size}" y="{at}" width="{size - 1}" '
                    f'height="{size - 1}" opacity="{max(0.04, share**0.5):.2f}"><title>{tip}</title></rect>'
                )
    side = margin + size * len(shown) + 4
    part = "" if len(shown) == len(names) else f"; the {len(shown)} most confused of {len(names)} classes"
    drawn = f'<svg class="plot" viewBox="0 0 {side} {side}" style="max-width: {side}px" role="img">{marks}</svg>'
    caption = f"rows: labels; columns: found; the stronger, the more{part}"
    return f"<figure><h3>Confusion matrix</h3>{drawn}<figcaption>{caption}</figcaption></figure>"


def picture(image: bytes, lines: Sequence[str]) -> str:
    """A JPEG and lines below it."""
    code = base64.b64encode(image).decode()
    text = "<br>".join(html.escape(line) for line in lines)
    image_tag = f'<img alt="label beside prediction" src="data:image/jpeg;base64,{code}">'
    return f"<figure>{image_tag}<figcaption>{text}</figcaption></figure>"


def jpeg(image: Array, longest: int = 1000) -> bytes:
    """RGB uint8 `[H, W, 3]` as a JPEG, no side longer than `longest`."""
    factor = longest / max(image.shape[:2])
    if factor < 1:
        image = cv2.resize(image, None, fx=factor, fy=factor, interpolation=cv2.INTER_AREA)
    ok, code = cv2.imencode(".jpg", cv2.cvtColor(image, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, 85])
    if not ok:
        raise ValueError(f"not a picture: {image.shape} {image.dtype}")
    return code.tobytes()
