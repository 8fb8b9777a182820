"""Looks of a whole picture: each a function of its pixels alone, uint8 [side, side, 3]."""

import functools

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

_LUMA = np.float32((0.299, 0.587, 0.114))


def _rounded(values: np.ndarray) -> np.ndarray:
    return np.rint(np.clip(values, 0, 255)).astype(np.uint8)


def _luma(pixels: np.ndarray) -> np.ndarray:
    return (pixels.astype(np.float32) @ _LUMA)[..., None]


def _grade(pixels: np.ndarray, tint: tuple[float, ...], colour: float, lift: float) -> np.ndarray:
    """Pixels with less colour, times a tint, plus a constant: float32."""
    gray = _luma(pixels)
    return (gray + colour * (pixels - gray)) * np.float32(tint) + lift


@functools.cache
def _slope(side: int) -> np.ndarray:
    """Float32 [side, 1, 1]: 1 at the top, 0 at the bottom."""
    return np.linspace(1, 0, side, dtype=np.float32)[:, None, None]


@functools.cache
def _specks(side: int, count: int, length: int, seed: int) -> np.ndarray:
    """Light of snowflakes, or of raindrops where length is above 0: float32 [side, side, 1]."""
    rng = np.random.default_rng(seed)
    picture = Image.new("L", (512, 512))
    draw = ImageDraw.Draw(picture)
    for _ in range(count):
        x, y, radius = rng.uniform(0, 512), rng.uniform(-30, 512), rng.uniform(4, 11)
        if length:
            draw.line((x, y, x - length / 3, y + length), fill=255, width=5)
        else:
            draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=255)
    smooth = picture.resize((side, side), Image.Resampling.BOX)
    return np.asarray(smooth, np.float32)[..., None] / 255


def _night(pixels: np.ndarray) -> np.ndarray:
    return _rounded(_grade(pixels, (0.36, 0.44, 0.78), 0.7, 4))


def _winter(pixels: np.ndarray) -> np.ndarray:
    cold = _grade(pixels, (0.86, 0.94, 1.04), 0.55, 22)
    snow = _specks(len(pixels), 70, 0, 3)
    return _rounded(cold + snow * (255 - cold))


def _rain(pixels: np.ndarray) -> np.ndarray:
    wet = _grade(pixels, (0.66, 0.72, 0.8), 0.6, 4)
    drops = 0.5 * _specks(len(pixels), 56, 46, 5)
    return _rounded(wet + drops * (np.float32((215, 228, 245)) - wet))


def _sunset(pixels: np.ndarray) -> np.ndarray:
    glow = np.float32((255, 120, 40)) * (1 - _slope(len(pixels)))
    glow = glow + np.float32((120, 50, 120)) * _slope(len(pixels))
    return _rounded(0.62 * _grade(pixels, (1.1, 0.86, 0.72), 1.0, 0) + 0.38 * glow)


def _fog(pixels: np.ndarray) -> np.ndarray:
    thick = 0.35 + 0.4 * _slope(len(pixels))
    return _rounded(pixels + thick * (np.float32((226, 230, 234)) - pixels))


def _sepia(pixels: np.ndarray) -> np.ndarray:
    return _rounded(_luma(pixels) * np.float32((1.08, 0.88, 0.64)) + np.float32((12, 6, 0)))


def _gray(pixels: np.ndarray) -> np.ndarray:
    return np.repeat(_rounded(_luma(pixels)), 3, axis=-1)


def _blur(pixels: np.ndarray) -> np.ndarray:
    radius = 3 * len(pixels) / 128
    return np.asarray(Image.fromarray(pixels).filter(ImageFilter.GaussianBlur(radius)))


def _pixelated(pixels: np.ndarray) -> np.ndarray:
    side = len(pixels)
    small = Image.fromarray(pixels).resize((side // 6, side // 6), Image.Resampling.BOX)
    return np.asarray(small.resize((side, side), Image.Resampling.NEAREST))


def _poster(pixels: np.ndarray) -> np.ndarray:
    return _rounded(np.rint(pixels / 255.0 * 3) * 85)


LOOKS = {
    "plain": lambda pixels: pixels,
    "night": _night,
    "winter": _winter,
    "rain": _rain,
    "sunset": _sunset,
    "fog": _fog,
    "sepia": _sepia,
    "gray": _gray,
    "negative": lambda pixels: 255 - pixels,
    "blur": _blur,
    "pixelated": _pixelated,
    "poster": _poster,
    "bright": lambda pixels: _rounded(255 * (pixels / np.float32(255)) ** np.float32(0.6)),
    "dark": lambda pixels: _rounded(255 * (pixels / np.float32(255)) ** np.float32(1.9)),
    "mirror": lambda pixels: pixels[:, ::-1],
    "upside down": lambda pixels: pixels[::-1],
}
# Looks that a picture may have before it is edited; turned ones would contradict the positions.
WEATHERS = ("night", "winter", "rain", "sunset", "sepia", "gray")
