"""Hands: fits drawings into one square, and computes two hands more from the drawn ones."""

import numpy as np
from PIL import Image, ImageFilter

MARGIN_PX = 4
PIXEL_ART_SIDE = 15
_PAPER = np.float32((252, 249, 240))
_INK = np.float32((45, 42, 60))


def fit(picture: Image.Image, side_px: int) -> np.ndarray:
    """A drawing cropped to what is visible, scaled and centred: uint8 [side, side, 4], RGBA."""
    box = picture.getchannel("A").point(lambda a: 255 if a > 8 else 0).getbbox()
    picture = picture.crop(box)
    scale = (side_px - 2 * MARGIN_PX) / max(picture.size)
    size = tuple(max(1, round(scale * s)) for s in picture.size)
    picture = picture.resize(size, Image.Resampling.LANCZOS)
    canvas = Image.new("RGBA", (side_px, side_px))
    canvas.paste(picture, ((side_px - size[0]) // 2, (side_px - size[1]) // 2))
    return _clear_hidden(np.asarray(canvas).copy())


def pixel_art(picture: Image.Image) -> np.ndarray:
    """A drawing in 15 × 15 squares of few colours: uint8 [side, side, 4]."""
    side_px = picture.width
    small = picture.resize((PIXEL_ART_SIDE, PIXEL_ART_SIDE), Image.Resampling.BOX)
    values = np.asarray(small).copy()
    values[..., :3] = np.rint(np.rint(values[..., :3] / 255.0 * 6) * (255 / 6))
    values[..., 3] = np.where(values[..., 3] > 110, 255, 0)
    grown = Image.fromarray(values).resize((side_px, side_px), Image.Resampling.NEAREST)
    return _clear_hidden(np.asarray(grown).copy())


def line_drawing(picture: Image.Image) -> np.ndarray:
    """A drawing in ink on white paper, lines where its colours change: uint8 [side, side, 4]."""
    alpha = picture.getchannel("A")
    behind = Image.new("RGBA", picture.size, (255, 255, 255, 255))
    behind.alpha_composite(picture)
    smooth = behind.convert("RGB").filter(ImageFilter.GaussianBlur(1.2))
    values = np.asarray(smooth, np.float32)
    slope = np.hypot(*np.gradient(values, axis=(0, 1))).max(axis=-1)
    shape = np.asarray(alpha, np.float32)
    inner = np.asarray(alpha.filter(ImageFilter.MinFilter(7)), np.float32) / 255
    rim = shape / 255 * (1 - inner)
    ink = np.clip(np.maximum((slope - 7) / 12, 1.2 * rim), 0, 1)[..., None]
    rgb = _PAPER + ink * (_INK - _PAPER)
    return _clear_hidden(np.rint(np.dstack([rgb, shape])).astype(np.uint8))


def _clear_hidden(values: np.ndarray) -> np.ndarray:
    values[values[..., 3] == 0] = 0
    return values


# hand → the hand that it is computed from, and how
DERIVED = {"pixel": ("flat", pixel_art), "ink": ("cartoon", line_drawing)}
