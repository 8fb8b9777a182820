"""Colours by name, and how a drawing is given another main colour."""

import numpy as np
from PIL import Image

# name → hue in degrees, and what becomes of saturation and value
_HUES = {
    "red": (2, 1.0, 1.0),
    "orange": (30, 1.0, 1.1),
    "yellow": (52, 1.0, 1.25),
    "green": (128, 0.9, 0.9),
    "blue": (217, 1.0, 1.0),
    "purple": (276, 0.85, 0.95),
    "pink": (328, 0.6, 1.25),
}
OBJECT_COLOURS = tuple(_HUES)
HUE_OF = {name: hue for name, (hue, _, _) in _HUES.items()}
BACKDROP_COLOURS = {
    "white": (245, 245, 242),
    "gray": (176, 180, 188),
    "black": (42, 42, 50),
    "red": (222, 106, 104),
    "orange": (250, 190, 130),
    "yellow": (252, 231, 150),
    "green": (168, 216, 160),
    "blue": (150, 196, 240),
    "purple": (198, 172, 232),
    "pink": (250, 196, 212),
}
LEAST_HUE_SHARE = 0.55  # of an object's pixels that must be near its main hue to change its colour
_NEAR = 38  # degrees
_LEAST_SATURATION = 0.22


def hue_distance(a: np.ndarray | float, b: np.ndarray | float) -> np.ndarray | float:
    """Degrees between two hues, 0 to 180."""
    return np.abs((np.asarray(a) - b + 180) % 360 - 180)


def _to_hsv(rgb: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Hue in degrees, saturation and value in [0, 1] of uint8 [..., 3]."""
    rgb = rgb.astype(np.float32) / 255
    value, least = rgb.max(-1), rgb.min(-1)
    chroma = value - least
    safe = np.where(chroma > 0, chroma, 1)
    red, green, blue = np.moveaxis(rgb, -1, 0)
    hue = np.where(
        value == red,
        (green - blue) / safe % 6,
        np.where(value == green, (blue - red) / safe + 2, (red - green) / safe + 4),
    )
    return 60 * hue, chroma / np.where(value > 0, value, 1), value


def _to_rgb(hue: np.ndarray, saturation: np.ndarray, value: np.ndarray) -> np.ndarray:
    """Inverse of `_to_hsv`, as float32 [..., 3] in [0, 255]."""
    k = (np.float32((5, 3, 1)) + hue[..., None] / 60) % 6
    falls = np.clip(np.minimum(k, 4 - k), 0, 1)
    return 255 * value[..., None] * (1 - saturation[..., None] * falls)


def main_hue(rgba: np.ndarray) -> tuple[float, float]:
    """An object's main hue in degrees, and the share of its visible pixels that are near it."""
    visible = rgba[rgba[..., 3] > 128]
    hue, saturation, value = _to_hsv(visible[..., :3])
    colourful = (saturation > _LEAST_SATURATION) & (value > 0.2)
    if not colourful.any():
        return 0.0, 0.0
    counts = np.bincount((hue[colourful] // 6).astype(int) % 60, minlength=60)
    smooth = sum(np.roll(counts, by) for by in range(-4, 5))
    centre = 6.0 * int(smooth.argmax()) + 3
    off = (hue - centre + 180) % 360 - 180
    centre = (centre + float(off[colourful & (np.abs(off) < 27)].mean())) % 360
    near = colourful & (hue_distance(hue, centre) < _NEAR)
    return centre, float(near.mean())


def can_become(hue: float, share: float) -> tuple[str, ...]:
    """Colours that an object of this main hue can be given, so that one sees the difference."""
    if share < LEAST_HUE_SHARE:
        return ()
    return tuple(name for name, other in HUE_OF.items() if hue_distance(hue, other) > 45)


def recolour(drawing: Image.Image, hue: float, colour: str) -> Image.Image:
    """An RGBA drawing whose pixels near a hue in degrees have the colour instead."""
    values = np.asarray(drawing)
    old_hue, saturation, value = _to_hsv(values[..., :3])
    new_hue, more_saturation, more_value = _HUES[colour]
    off = (old_hue - hue + 180) % 360 - 180
    weight = np.clip((_NEAR + 14 - np.abs(off)) / 14, 0, 1)
    weight *= np.clip((saturation - 0.08) / 0.12, 0, 1)
    changed = _to_rgb(
        (new_hue + 0.25 * off) % 360,
        np.clip(saturation * more_saturation, 0, 1),
        np.clip(value * more_value, 0, 1),
    )
    rgb = values[..., :3] + weight[..., None] * (changed - values[..., :3])
    return Image.fromarray(np.dstack([np.rint(rgb).astype(np.uint8), values[..., 3]]))
