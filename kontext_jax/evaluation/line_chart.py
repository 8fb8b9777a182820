"""Curves with their 95 % intervals, drawn without a plotting library."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont

COLOURS = (
    *((31, 90, 180), (210, 80, 30), (120, 70, 170), (30, 140, 70)),
    *((190, 30, 90), (90, 90, 90), (160, 120, 20), (0, 150, 160)),
    *((240, 150, 190), (110, 60, 20), (130, 190, 60), (150, 170, 230)),
)
GRID = (225, 225, 225)


class Point(NamedTuple):
    """A value with its interval; low and high may be the value itself."""

    x: float
    value: float
    low: float
    high: float


def line_chart(
    curves: Mapping[str, Sequence[Point]],
    x_label: str,
    unit: str,
    y_range: tuple[float, float] = (0, 100),
    title: str = "",
    size: tuple[int, int] = (720, 420),
) -> UInt8[np.ndarray, "height width 3"]:
    """The curves over the places of their points, with a legend: uint8 RGB [height, width, 3].

    Args:
      unit: unit of the values, after the numbers of the axis.
      y_range: lowest and highest value; what lies outside is drawn at the edge.
      size: (width, height) of the chart without the legend, which is below it.
    """
    font = ImageFont.load_default(13)
    width, height = size[0], size[1] + 18 * len(curves)
    left, top, bottom = 64, 34 if title else 20, 44 + 18 * len(curves)
    chart = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(chart)
    ticks = sorted({point.x for points in curves.values() for point in points})
    first, last = ticks[0], ticks[-1] if ticks[-1] > ticks[0] else ticks[0] + 1
    lowest, highest = y_range

    def at(x: float, value: float) -> tuple[float, float]:
        along = (x - first) / (last - first)
        up = (min(max(value, lowest), highest) - lowest) / (highest - lowest)
        return left + along * (width - left - 24), height - bottom - up * (height - top - bottom)

    draw.text((left, 10), title, fill="black", font=font)
    for i in range(6):
        value = lowest + (highest - lowest) * i / 5
        draw.line([at(first, value), at(last, value)], fill=GRID)
        draw.text((6, at(first, value)[1] - 8), f"{value:g} {unit}", fill="black", font=font)
    for x in ticks[:: math.ceil(len(ticks) / 12)]:
        text = f"{x:g}"
        half = draw.textlength(text, font=font) / 2
        draw.text((at(x, lowest)[0] - half, height - bottom + 5), text, fill="black", font=font)
    half = draw.textlength(x_label, font=font) / 2
    draw.text(((left + width) / 2 - half, height - bottom + 22), x_label, fill="black", font=font)
    for i, (name, points) in enumerate(curves.items()):
        colour = COLOURS[i % len(COLOURS)]
        draw.line([at(p.x, p.value) for p in points], fill=colour, width=2)
        for p in points:
            x, y = at(p.x, p.value)
            draw.line([x, at(p.x, p.low)[1], x, at(p.x, p.high)[1]], fill=colour)
            draw.ellipse([x - 3, y - 3, x + 3, y + 3], fill=colour)
        y = height - 18 * (len(curves) - i) + 6
        draw.line([left, y, left + 20, y], fill=colour, width=3)
        draw.text((left + 26, y - 8), name, fill="black", font=font)
    return np.asarray(chart)
