"""Reports and growing figures as pictures, drawn by Pillow."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont

COLOURS = {
    "matmul": (43, 108, 176),
    "attention": (121, 82, 179),
    "elementwise": (240, 160, 75),
    "reduction": (90, 165, 120),
    "data movement": (200, 80, 80),
    "collectives": (120, 120, 120),
}
_OTHERS = ((60, 140, 160), (170, 120, 60), (150, 90, 140), (110, 130, 60), (90, 90, 160))
_PLAIN = str.maketrans({"×": "x", "²": "^2", "≤": "<="})  # what Pillow's font lacks
_GRID, _INK = (228, 228, 228), (40, 40, 40)


def _colour(name: str, index: int) -> tuple[int, int, int]:
    return COLOURS.get(name, _OTHERS[index % len(_OTHERS)])


def _round_up(value: float) -> float:
    """The next of 1, 1.5, 2, 3, 5, 8 × a power of ten."""
    power = 10.0 ** (len(f"{int(value)}") - 1) if value >= 1 else 1e-3
    while power * 10 < value:
        power *= 10
    return next(power * step for step in (1, 1.5, 2, 3, 5, 8, 10) if power * step >= value)


class Bar(NamedTuple):
    """A stacked bar: its parts in order, and what stands behind it."""

    label: str
    parts: Mapping[str, float]
    note: str = ""


def bars(title: str, rows: Sequence[Bar]) -> Image.Image:
    """Stacked bars, one below the other, on one scale."""
    label_width, width, row_height, top = 330, 620, 30, 84
    font, small = ImageFont.load_default(15), ImageFont.load_default(13)
    image = Image.new(
        "RGB", (label_width + width + 190, top + row_height * len(rows) + 16), "white"
    )
    draw = ImageDraw.Draw(image)
    draw.text((16, 12), title.translate(_PLAIN), fill=_INK, font=font)
    names = list(dict.fromkeys(name for row in rows for name in row.parts))
    x = 16
    for index, name in enumerate(names):
        draw.rectangle([x, 46, x + 12, 58], fill=_colour(name, index))
        draw.text((x + 18, 44), name, fill=_INK, font=small)
        x += 34 + int(draw.textlength(name, font=small))
    longest = max(sum(row.parts.values()) for row in rows)
    for number, row in enumerate(rows):
        y, x = top + number * row_height, float(label_width)
        draw.text((16, y + 3), row.label[:46].translate(_PLAIN), fill=_INK, font=small)
        for index, name in enumerate(names):
            length = width * row.parts.get(name, 0) / longest
            draw.rectangle([x, y, x + length, y + row_height - 10], fill=_colour(name, index))
            x += length
        draw.text((x + 8, y + 3), row.note, fill=_INK, font=small)
    return image


class Panel(NamedTuple):
    """Curves over the same places: name → one value for each of `ticks`."""

    title: str
    ticks: Sequence[str]
    curves: Mapping[str, Sequence[float]]


def curves(title: str, panels: Sequence[Panel], columns: int = 2) -> Image.Image:
    """Panels side by side, each from zero up."""
    width, height = 470, 330
    rows = -(-len(panels) // columns)
    image = Image.new("RGB", (columns * width, 40 + rows * height), "white")
    draw = ImageDraw.Draw(image)
    draw.text((16, 10), title.translate(_PLAIN), fill=_INK, font=ImageFont.load_default(16))
    for index, panel in enumerate(panels):
        _panel(draw, index % columns * width, 40 + index // columns * height, width, height, panel)
    return image


def _panel(draw, left: int, top: int, width: int, height: int, panel: Panel) -> None:
    font, small = ImageFont.load_default(14), ImageFont.load_default(12)
    x0, x1, y0, y1 = left + 62, left + width - 18, top + height - 46, top + 58
    highest = _round_up(max(max(ys) for ys in panel.curves.values()))
    draw.text((x0, top + 8), panel.title.translate(_PLAIN), fill=_INK, font=font)
    for step in range(6):
        y = y0 - (y0 - y1) * step / 5
        draw.line([x0, y, x1, y], fill=_GRID)
        draw.text((left + 8, y - 7), f"{highest * step / 5:,.4g}", fill=_INK, font=small)
    places = [x0 + (x1 - x0) * (i + 0.5) / len(panel.ticks) for i in range(len(panel.ticks))]
    for x, tick in zip(places, panel.ticks, strict=True):
        half = draw.textlength(tick, font=small) / 2
        draw.text((x - half, y0 + 6), tick, fill=_INK, font=small)
    x_name = x0
    for index, (name, ys) in enumerate(panel.curves.items()):
        colour = _colour(name, index)
        points = [(x, y0 - (y0 - y1) * y / highest) for x, y in zip(places, ys, strict=True)]
        draw.line(points, fill=colour, width=3)
        for x, y in points:
            draw.ellipse([x - 4, y - 4, x + 4, y + 4], fill=colour)
        draw.line([x_name, top + 40, x_name + 14, top + 40], fill=colour, width=3)
        draw.text((x_name + 18, top + 32), name, fill=_INK, font=small)
        x_name += 30 + draw.textlength(name, font=small)
