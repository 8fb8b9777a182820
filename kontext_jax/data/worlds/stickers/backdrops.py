"""What lies behind the objects: plain colours, gradients, patterns, places, photographs."""

import functools

import numpy as np
from PIL import Image, ImageDraw

from kontext_jax.data.worlds import photos
from kontext_jax.data.worlds.stickers.colours import BACKDROP_COLOURS
from kontext_jax.data.worlds.stickers.places import place_picture
from kontext_jax.data.worlds.stickers.scene import Backdrop

DIRECTIONS = ("down", "right", "round")
PATTERNS = ("dots", "stripes", "checks", "waves")
# How photographs of `photos.PHOTOS` are spoken of; portraits and medical pictures are left out.
PHOTO_NAMES = {
    "coffee": "a cup of coffee",
    "hubble_deep_field": "galaxies",
    "brick": "bricks",
    "grass": "grass",
    "gravel": "gravel",
    "camera": "a photographer",
    "coins": "coins",
    "china": "a temple",
    "cat": "a real cat",
    "rocket": "a rocket launch",
    "flower": "a flower",
}
LEAST_CROP = 0.35  # of the photograph's shorter side


def draw_backdrop(backdrop: Backdrop, side_px: int) -> Image.Image:
    """The backdrop as an RGB picture of its own, free to be drawn upon."""
    if backdrop.kind == "photo":
        return Image.fromarray(_photo(backdrop.name, backdrop.seed, side_px))
    if backdrop.kind == "place":
        return place_picture(backdrop.name, side_px).copy()
    return _drawn(backdrop, side_px).copy()


@functools.lru_cache(512)
def _drawn(backdrop: Backdrop, side_px: int) -> Image.Image:
    first, *rest = (np.float32(BACKDROP_COLOURS[colour]) for colour in backdrop.colours)
    if backdrop.kind == "plain":
        return Image.new("RGB", (side_px, side_px), BACKDROP_COLOURS[backdrop.colours[0]])
    if backdrop.kind == "gradient":
        share = _ramp(backdrop.name, side_px)[..., None]
        return Image.fromarray(np.rint(first + share * (rest[0] - first)).astype(np.uint8))
    behind, before = (BACKDROP_COLOURS[colour] for colour in backdrop.colours)
    picture = Image.new("RGB", (4 * side_px, 4 * side_px), behind)
    _draw_pattern(ImageDraw.Draw(picture), backdrop.name, before, side_px // 32)
    return picture.resize((side_px, side_px), Image.Resampling.BOX)


def _ramp(direction: str, side_px: int) -> np.ndarray:
    y, x = np.mgrid[:side_px, :side_px].astype(np.float32) / (side_px - 1)
    if direction == "round":
        return np.clip(1.35 * np.hypot(x - 0.5, y - 0.5), 0, 1)
    return y if direction == "down" else x


def _draw_pattern(draw: ImageDraw.ImageDraw, name: str, colour, unit: int) -> None:
    """Draws on 128 units of height and width, each `unit` pixels."""
    if name == "dots":
        for row in range(8):
            for column in range(8):
                x, y = 16 * column + 8 * (row % 2), 16 * row + 8
                box = (x - 4, y - 4, x + 4, y + 4)
                draw.ellipse([unit * value for value in box], fill=colour)
    elif name == "stripes":
        for x in range(-128, 128, 24):
            corners = ((x, 0), (x + 12, 0), (x + 140, 128), (x + 128, 128))
            draw.polygon([(unit * a, unit * b) for a, b in corners], fill=colour)
    elif name == "checks":
        for row in range(8):
            for column in range(row % 2, 8, 2):
                box = (16 * column, 16 * row, 16 * column + 16, 16 * row + 16)
                draw.rectangle(
                    [unit * v for v in box[:2]] + [unit * v - 1 for v in box[2:]], colour
                )
    else:
        x = np.arange(0, 129)
        for row in range(0, 160, 20):
            y = row - 10 + 5 * np.sin(2 * np.pi * x / 32)
            line = [(unit * a, unit * b) for a, b in zip(x, y, strict=True)]
            draw.line(line, fill=colour, width=6 * unit)


@functools.cache
def _photo_of(name: str) -> photos.Photo:
    return next(photo for photo in photos.PHOTOS if photo.name == name)


@functools.lru_cache(64)
def _photo(name: str, seed: int, side_px: int) -> np.ndarray:
    """A crop, varied as training photographs are: uint8 [side, side, 3]."""
    photo = _photo_of(name)
    rng = np.random.default_rng([seed, 128])
    crop = photos.draw_crop(rng, photos.photo_pixels(photo), side_px, side_px, LEAST_CROP)
    return crop if photo.split == photos.HELD_OUT else photos.vary(rng, crop)
