"""A network drawn from its own modules: `python -m hrnet.drawing w32 w32.svg`.

What is drawn is read from an `HRNet` built without memory: its branches, the residual units in them, which branch each
exchange reads and which it writes. So any configuration can be drawn, and the drawing cannot differ from the code.
"""

import argparse
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, Literal

import torch

from hrnet.backbone import PRESETS, HRNet, HRNetConfig, resolve
from hrnet.blocks import Bottleneck, Module

COLOURS = ("#c0562f", "#c99a2e", "#4f8a5b", "#3f6fa5")
"""Of the strides 4, 8, 16 and 32."""
LEFT, TOP, ROW, BOX, GAP, SUM = 118, 62, 74, 46, 70, 58
"""Pixels: where the branches begin, their distance, a box of residual units, the room of an exchange, and of it up to
the sums it ends in."""


def drawing(config: HRNetConfig | str | Mapping[str, Any] = "w32", outputs: int = 4) -> str:
    """The SVG of a network: branches from left to right, finest at the top, and every exchange between them.

    Args:
        config, outputs: see `HRNet`.

    Returns:
        SVG. A residual branch is a `rect` of class "units"; an exchange is a `g` of class "exchange" with a `line` for
        every pair of a branch read and a branch written; a new branch is a `line` of class "begins".

    Raises:
        ValueError: see `HRNet`.
    """
    with torch.device("meta"):
        network = HRNet(config, outputs)
    config, parts, x = network.config, list[str](), LEFT
    count, planes = config.stem
    parts += [text(8, TOP + 4, "image"), line(48, TOP, x, TOP, 0, "stem"), text(52, TOP - 10, "2 convolutions", 9)]
    parts += units(x, 0, count, "bottleneck", planes * Bottleneck.expansion)
    parts.append(text(x, 18, "stage 1", 12))
    x += BOX
    for number, stage in enumerate((network.stage2, network.stage3, network.stage4), 2):
        branches = number
        parts += [line(x, level(i), x + GAP / 2, level(i), i, "branch") for i in range(branches - 1)]
        parts.append(line(x, level(branches - 2), x + GAP / 2, level(branches - 1), branches - 1, "begins"))
        x += GAP // 2
        parts.append(text(x, 18, f"stage {number}", 12))
        for module in stage:
            assert isinstance(module, Module)
            for i, branch in enumerate(module.branches):
                parts += units(x, i, len(branch), "basic", config.width * 2**i)  # type: ignore[arg-type]
            x += BOX
            written = len(module.fuse_layers)
            if written:
                parts.append('<g class="exchange">')
                for target in range(written):
                    parts += [line(x, level(s), x + SUM, level(target), s, "path") for s in range(branches)]
                parts += [summed(x + SUM, target) for target in range(written)]
                parts.append("</g>")
                parts += [line(x + SUM + 4, level(i), x + GAP, level(i), i, "branch") for i in range(written)]
            else:
                parts += [line(x, level(i), x + GAP, level(i), i, "branch") for i in range(branches)]
            x += GAP
    for i in range(len(network.channels)):
        parts.append(line(x, level(i), x + 26, level(i), i, "out"))
        parts.append(text(x + 32, level(i) + 4, f"{network.channels[i]} channels, 1/{network.strides[i]}"))
    width, height = x + 160, level(3) + 40
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
    style = 'font-family="sans-serif" fill="none">'
    return "\n".join([f"{head} {style}", f'<rect width="{width}" height="{height}" fill="#fff"/>', *parts, "</svg>\n"])


def level(branch: int) -> int:
    """Height of a branch."""
    return TOP + branch * ROW


def line(x0: float, y0: float, x1: float, y1: float, branch: int, kind: str) -> str:
    place = f'x1="{x0:g}" y1="{y0:g}" x2="{x1:g}" y2="{y1:g}"'
    dashes = ' stroke-dasharray="5 3"' if kind == "begins" else ""
    return f'<line class="{kind}" {place} stroke="{COLOURS[branch]}" stroke-width="1.6"{dashes}/>'


def units(x: float, branch: int, count: int, kind: str, channels: int) -> list[str]:
    """A box of residual units, their number in it and their channels below."""
    y, name = level(branch), f"{count} {kind} unit{'s' if count > 1 else ''}, {channels} channels"
    place = f'x="{x:g}" y="{y - 15:g}" width="{BOX}" height="30" rx="4"'
    box = f'<rect class="units" {place} fill="{COLOURS[branch]}"><title>{name}</title></rect>'
    return [
        box,
        text(x + BOX / 2, y + 4, f"{count}×", 11, "#fff", "middle"),
        text(x + BOX / 2, y + 27, str(channels), 9, "#666", "middle"),
    ]


def summed(x: float, branch: int) -> str:
    """The sum that an exchange ends in."""
    return f'<circle cx="{x:g}" cy="{level(branch)}" r="4" fill="#fff" stroke="{COLOURS[branch]}" stroke-width="1.6"/>'


def text(
    x: float, y: float, words: str, size: int = 11, colour: str = "#333", anchor: Literal["start", "middle"] = "start"
) -> str:
    place = f'x="{x:g}" y="{y:g}" font-size="{size}" fill="{colour}" text-anchor="{anchor}"'
    return f"<text {place}>{escape(words)}</text>"


def main(args: Sequence[str] | None = None) -> None:
    """Draw a network as SVG."""
    parser = argparse.ArgumentParser(prog="python -m hrnet.drawing", description=main.__doc__)
    parser.add_argument("network", choices=PRESETS)
    parser.add_argument("out", type=Path, help="the .svg to write")
    parser.add_argument("--fusion", choices=["within", "across", "final"], default="within", help="see HRNetConfig")
    parser.add_argument("--outputs", type=int, default=4, help="maps put out, finest first (default: %(default)s)")
    given = parser.parse_args(args)
    fields = {**vars(resolve(given.network)), "fusion": given.fusion}
    given.out.write_text(drawing(fields, given.outputs))


if __name__ == "__main__":
    main()
