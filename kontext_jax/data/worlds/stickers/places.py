"""Backdrops that are places, drawn once at four times the size: RGB pictures, always the same."""

import functools

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

_BIG = 512
Colour = tuple[int, int, int]


def _sky(top: Colour, bottom: Colour) -> Image.Image:
    t = np.linspace(0, 1, _BIG)[:, None, None]
    rows = np.asarray(top) + t * (np.asarray(bottom) - np.asarray(top))
    return Image.fromarray(np.repeat(rows, _BIG, axis=1).astype(np.uint8))


def _hill(draw: ImageDraw.ImageDraw, colour: Colour, y: int, height: int, waves: float, at: float):
    x = np.arange(0, _BIG + 8, 8)
    ys = y - height * np.sin(2 * np.pi * (waves * x / _BIG + at))
    draw.polygon([(0, _BIG), *zip(x, ys, strict=True), (_BIG, _BIG)], fill=colour)


def _cloud(draw: ImageDraw.ImageDraw, x: int, y: int, r: int, colour: Colour):
    for dx, dy, part in ((-1.2, 0.2, 0.7), (0, 0, 1.0), (1.2, 0.25, 0.75), (0.5, 0.4, 0.8)):
        cx, cy, s = x + dx * r, y + dy * r, part * r
        draw.ellipse((cx - s, cy - s, cx + s, cy + s), fill=colour)


def _dots(draw: ImageDraw.ImageDraw, seed: int, count: int, box, radii, colours):
    rng = np.random.default_rng(seed)
    left, top, right, bottom = box
    for _ in range(count):
        x, y, r = rng.uniform(left, right), rng.uniform(top, bottom), rng.uniform(*radii)
        draw.ellipse((x - r, y - r, x + r, y + r), fill=colours[rng.integers(len(colours))])


def _sea() -> Image.Image:
    picture = _sky((130, 205, 245), (226, 244, 252))
    draw = ImageDraw.Draw(picture)
    _cloud(draw, 110, 90, 34, (255, 255, 255))
    _cloud(draw, 400, 60, 26, (250, 253, 255))
    for row, shade in enumerate(((30, 120, 190), (36, 135, 204), (46, 152, 216), (62, 170, 226))):
        _hill(draw, shade, 236 + 72 * row, 9 + 2 * row, 4 + row % 2, 0.21 * row)
    return picture


def _beach() -> Image.Image:
    picture = _sky((120, 200, 250), (215, 240, 252))
    draw = ImageDraw.Draw(picture)
    draw.ellipse((380, 40, 460, 120), fill=(255, 236, 150))
    draw.rectangle((0, 210, _BIG, 330), fill=(64, 178, 214))
    _hill(draw, (150, 222, 230), 318, 10, 3, 0.1)
    _hill(draw, (245, 222, 168), 338, 12, 2, 0.3)
    _dots(draw, 1, 90, (0, 370, _BIG, _BIG), (2, 5), ((228, 200, 142), (255, 238, 196)))
    return picture


def _meadow() -> Image.Image:
    picture = _sky((140, 208, 250), (220, 242, 250))
    draw = ImageDraw.Draw(picture)
    _cloud(draw, 370, 90, 34, (255, 255, 255))
    _hill(draw, (150, 208, 120), 250, 26, 1.2, 0.1)
    _hill(draw, (112, 190, 90), 300, 30, 1, 0.6)
    _hill(draw, (92, 172, 76), 390, 16, 1.5, 0.2)
    flowers = ((255, 240, 120), (255, 255, 255), (250, 150, 180))
    _dots(draw, 2, 60, (0, 330, _BIG, _BIG), (4, 8), flowers)
    return picture


def _desert() -> Image.Image:
    picture = _sky((250, 214, 150), (254, 240, 206))
    draw = ImageDraw.Draw(picture)
    draw.ellipse((60, 50, 150, 140), fill=(255, 248, 220))
    _hill(draw, (232, 176, 104), 280, 44, 1.1, 0.4)
    _hill(draw, (220, 156, 84), 350, 36, 0.9, 0.0)
    _hill(draw, (204, 138, 70), 440, 22, 1.3, 0.5)
    return picture


def _snow() -> Image.Image:
    picture = _sky((176, 204, 232), (230, 238, 248))
    draw = ImageDraw.Draw(picture)
    for x, height in ((90, 210), (260, 260), (430, 190)):
        draw.polygon([(x - 150, 340), (x, 340 - height), (x + 150, 340)], fill=(140, 160, 190))
        cap = height // 3
        wide = 150 * cap // height
        top = 340 - height
        draw.polygon([(x - wide, top + cap), (x, top), (x + wide, top + cap)], fill=(250, 252, 255))
    _hill(draw, (236, 242, 250), 330, 18, 1.2, 0.2)
    _hill(draw, (250, 252, 255), 410, 16, 0.9, 0.7)
    return picture


def _space() -> Image.Image:
    picture = _sky((14, 14, 44), (46, 22, 84))
    draw = ImageDraw.Draw(picture)
    glow = Image.new("RGB", picture.size, (120, 60, 150))
    spot = Image.new("L", picture.size)
    ImageDraw.Draw(spot).ellipse((60, 160, 460, 340), fill=120)
    picture.paste(glow, mask=spot.filter(ImageFilter.GaussianBlur(50)))
    stars = ((255, 255, 255), (255, 240, 200), (190, 210, 255))
    _dots(draw, 3, 110, (0, 0, _BIG, _BIG), (2, 6), stars)
    return picture


def _forest() -> Image.Image:
    picture = _sky((176, 220, 190), (222, 240, 214))
    draw = ImageDraw.Draw(picture)
    for layer, shade in enumerate(((120, 176, 130), (78, 142, 94), (48, 110, 68))):
        for number in range(6):
            x = 40 + 96 * number + 42 * (layer % 2)
            base, height = 300 + 66 * layer, 200 + 24 * ((number * 3 + layer) % 3)
            draw.polygon([(x - 58, base), (x, base - height), (x + 58, base)], fill=shade)
        draw.rectangle((0, 299 + 66 * layer, _BIG, _BIG), fill=shade)
    _hill(draw, (70, 128, 62), 444, 10, 2, 0.2)
    return picture


def _city() -> Image.Image:
    picture = _sky((186, 210, 236), (240, 232, 224))
    draw = ImageDraw.Draw(picture)
    rng = np.random.default_rng(4)
    x = 0
    while x < _BIG:
        wide, high = int(rng.integers(56, 92)), int(rng.integers(130, 300))
        shade = tuple(int(v) for v in np.add((118, 130, 158), rng.integers(-24, 30)))
        draw.rectangle((x, 400 - high, x + wide, 400), fill=shade)
        for wx in range(x + 12, x + wide - 14, 22):
            for wy in range(416 - high, 380, 32):
                draw.rectangle((wx, wy, wx + 10, wy + 16), fill=(250, 232, 170))
        x += wide + 4
    draw.rectangle((0, 400, _BIG, _BIG), fill=(92, 96, 108))
    for x in range(20, _BIG, 110):
        draw.rectangle((x, 452, x + 60, 464), fill=(240, 240, 235))
    return picture


def _room() -> Image.Image:
    picture = Image.new("RGB", (_BIG, _BIG), (244, 226, 200))
    draw = ImageDraw.Draw(picture)
    for x in range(0, _BIG, 64):
        draw.rectangle((x, 0, x + 31, 360), fill=(238, 216, 186))
    draw.rectangle((0, 360, _BIG, _BIG), fill=(176, 124, 84))
    for y in range(392, _BIG, 40):
        draw.line((0, y, _BIG, y), fill=(150, 102, 66), width=4)
    draw.rectangle((0, 346, _BIG, 362), fill=(255, 250, 240))
    draw.rectangle((330, 60, 470, 230), fill=(255, 250, 240))
    draw.rectangle((344, 74, 456, 216), fill=(150, 208, 246))
    draw.line((400, 74, 400, 216), fill=(255, 250, 240), width=10)
    draw.line((344, 145, 456, 145), fill=(255, 250, 240), width=10)
    return picture


def _underwater() -> Image.Image:
    picture = _sky((92, 200, 226), (16, 72, 138))
    draw = ImageDraw.Draw(picture, "RGBA")
    for x in (40, 190, 340):
        draw.polygon(
            [(x, 0), (x + 60, 0), (x + 150, _BIG), (x + 10, _BIG)], fill=(255, 255, 255, 26)
        )
    _hill(draw, (196, 180, 130), 460, 10, 2, 0.1)
    for x in (50, 96, 410, 462):
        for y in range(300, 470, 8):
            s = x + 12 * np.sin(y / 18)
            draw.ellipse((s - 8, y - 8, s + 8, y + 8), fill=(40, 150, 96))
    _dots(draw, 6, 26, (0, 40, _BIG, 420), (4, 12), ((200, 240, 250, 150),))
    return picture


def _clouds() -> Image.Image:
    picture = _sky((84, 164, 236), (190, 226, 250))
    draw = ImageDraw.Draw(picture)
    for x, y, r in ((90, 100, 44), (380, 70, 36), (250, 250, 50), (70, 400, 46), (430, 380, 54)):
        _cloud(draw, x, y, r, (255, 255, 255))
    return picture


def _stage() -> Image.Image:
    picture = Image.new("RGB", (_BIG, _BIG), (150, 26, 42))
    draw = ImageDraw.Draw(picture, "RGBA")
    for x in range(0, _BIG, 48):
        draw.rectangle((x, 0, x + 22, 400), fill=(176, 36, 52))
    draw.rectangle((0, 400, _BIG, _BIG), fill=(120, 76, 44))
    draw.polygon([(200, 0), (312, 0), (440, 430), (72, 430)], fill=(255, 240, 190, 60))
    draw.ellipse((70, 396, 442, 476), fill=(255, 236, 180, 110))
    return picture


# name → how it is spoken of after a preposition, and how it is drawn
_PLACES = {
    "sea": ("at", "the sea", _sea),
    "beach": ("on", "the beach", _beach),
    "meadow": ("in", "the meadow", _meadow),
    "desert": ("in", "the desert", _desert),
    "snow": ("in", "the snow", _snow),
    "space": ("in", "space", _space),
    "forest": ("in", "the forest", _forest),
    "city": ("in", "the city", _city),
    "room": ("in", "the room", _room),
    "sea floor": ("on", "the sea floor", _underwater),
    "sky": ("in", "the sky", _clouds),
    "stage": ("on", "the stage", _stage),
}
PLACES = tuple(_PLACES)


def phrase(place: str) -> tuple[str, str]:
    """Preposition and noun, for instance ("on", "the beach")."""
    return _PLACES[place][:2]


@functools.cache
def place_picture(place: str, side_px: int) -> Image.Image:
    """The place as an RGB picture; treat it as constant."""
    return _PLACES[place][2]().resize((side_px, side_px), Image.Resampling.LANCZOS)
