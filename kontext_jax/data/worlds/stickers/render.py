"""Draws scenes: a pure function of the scene and the file of drawings."""

import functools

import numpy as np
from PIL import Image, ImageFilter

from kontext_jax.data.worlds.stickers.backdrops import draw_backdrop
from kontext_jax.data.worlds.stickers.colours import main_hue, recolour
from kontext_jax.data.worlds.stickers.cues import draw_cue
from kontext_jax.data.worlds.stickers.drawings import SIDE_PX as DRAWN_PX
from kontext_jax.data.worlds.stickers.drawings import Drawings
from kontext_jax.data.worlds.stickers.hands import MARGIN_PX, PIXEL_ART_SIDE
from kontext_jax.data.worlds.stickers.looks import LOOKS
from kontext_jax.data.worlds.stickers.scene import SIDE_PX, SIZES, Scene, Sign, Sticker
from kontext_jax.data.worlds.stickers.signs import draw_sign

_SHADOW_SHIFT = (2, 4)  # pixels to the right and down
_SHADOW_BLUR = 2.4
_SHADOW_DARKNESS = 0.42
_PAD = 10  # pixels around a thing that its shadow and rim may reach


class Renderer:
    """Draws scenes of one size.

    Args:
      drawings: what objects look like.
      side_px: height and width of the pictures.
    """

    def __init__(self, drawings: Drawings, side_px: int = SIDE_PX):
        self.drawings, self.side_px = drawings, side_px
        self._scale = side_px / SIDE_PX
        self._layer = functools.lru_cache(2048)(self._draw_layer)

    def __call__(self, scene: Scene) -> np.ndarray:
        """The picture of a scene: uint8 [side, side, 3]."""
        picture = draw_backdrop(scene.backdrop, self.side_px).convert("RGBA")
        has_rim = scene.backdrop.kind == "photo"
        for thing in scene.things:
            left, top, layer = self._place(thing, has_rim)
            box = (max(0, -left), max(0, -top), *layer.size)
            if box[0] < box[2] and box[1] < box[3]:
                picture.alpha_composite(layer, (max(0, left), max(0, top)), box)
        pixels = LOOKS[scene.look](np.asarray(picture.convert("RGB")))
        if not scene.cues:
            return np.ascontiguousarray(pixels)
        marked = Image.fromarray(np.ascontiguousarray(pixels))
        for cue in scene.cues:
            draw_cue(marked, cue)
        return np.asarray(marked)

    def footprint(self, thing: Sticker | Sign) -> np.ndarray:
        """Where a thing or its shadow may be seen: bool [side, side]."""
        left, top, layer = self._place(thing, True)
        touched = Image.new("L", (self.side_px, self.side_px))
        touched.paste(layer.getchannel("A"), (left, top))
        return np.asarray(touched) > 0

    def visible(self, scene: Scene, thing: Sticker | Sign) -> float:
        """Share of a thing that nothing in front of it hides."""
        left, top, layer = self._place(thing, False)
        own = np.zeros((self.side_px, self.side_px), bool)
        canvas = Image.new("L", (self.side_px, self.side_px))
        canvas.paste(layer.getchannel("A"), (left, top))
        own |= np.asarray(canvas) > 200
        hidden = np.zeros_like(own)
        for other in scene.things[scene.things.index(thing) + 1 :]:
            left, top, layer = self._place(other, False)
            canvas = Image.new("L", (self.side_px, self.side_px))
            canvas.paste(layer.getchannel("A"), (left, top))
            hidden |= np.asarray(canvas) > 200
        return float((own & ~hidden).sum() / max(1, own.sum()))

    def _place(self, thing: Sticker | Sign, has_rim: bool) -> tuple[int, int, Image.Image]:
        """Left and top in pixels of a thing's layer, and the layer with shadow, RGBA."""
        if isinstance(thing, Sticker):
            layer = self._layer(
                thing.name, thing.hand, thing.size, thing.angle, thing.flip, thing.colour, has_rim
            )
        else:
            layer = _with_shadow(draw_sign(self.drawings, thing, self.side_px), self._scale, False)
        x, y = (round(self._scale * value) for value in thing.centre)
        return x - layer.width // 2, y - layer.height // 2, layer

    def _draw_layer(self, name, hand, size, angle, flip, colour, has_rim) -> Image.Image:
        drawing = Image.fromarray(np.asarray(self.drawings.of(name, hand)))
        # The drawing's margin is no part of the object's size.
        length = self._scale * SIZES[size] * DRAWN_PX / (DRAWN_PX - 2 * MARGIN_PX)
        side, method = max(4, round(length)), Image.Resampling.LANCZOS
        if hand == "pixel":  # all its squares have one size
            side = PIXEL_ART_SIDE * max(1, round(length / PIXEL_ART_SIDE))
            method = Image.Resampling.NEAREST
        drawing = drawing.resize((side, side), method)
        if colour:
            drawing = recolour(drawing, hue_and_share(self.drawings, name, hand)[0], colour)
        if flip:
            drawing = drawing.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if angle:
            drawing = drawing.rotate(angle, Image.Resampling.BICUBIC, expand=True)
        return _with_shadow(drawing, self._scale, has_rim)


_HUES: dict[tuple[int, str, str], tuple[float, float]] = {}


def hue_and_share(drawings: Drawings, name: str, hand: str) -> tuple[float, float]:
    """`colours.main_hue` of a drawing, computed once."""
    key = id(drawings.pixels), name, hand
    if key not in _HUES:
        _HUES[key] = main_hue(np.asarray(drawings.of(name, hand)))
    return _HUES[key]


def _with_shadow(drawing: Image.Image, scale: float, has_rim: bool) -> Image.Image:
    """A drawing on its shadow, and with a white rim as cut-out paper has."""
    pad = round(_PAD * scale)
    size = drawing.width + 2 * pad, drawing.height + 2 * pad
    shape = Image.new("L", size)
    shape.paste(drawing.getchannel("A"), (pad, pad))
    if has_rim:
        shape = shape.filter(ImageFilter.GaussianBlur(1.1 * scale)).point(
            lambda a: min(255, max(0, 8 * (a - 24)))
        )
    dark = Image.new("L", size)
    dark.paste(shape, tuple(round(scale * value) for value in _SHADOW_SHIFT))
    dark = dark.filter(ImageFilter.GaussianBlur(_SHADOW_BLUR * scale))
    layer = Image.new("RGBA", size, (20, 20, 40, 0))
    layer.putalpha(dark.point(lambda a: int(_SHADOW_DARKNESS * a)))
    if has_rim:
        white = Image.new("RGBA", size, (255, 255, 255, 0))
        white.putalpha(shape)
        layer.alpha_composite(white)
    layer.alpha_composite(drawing, (pad, pad))
    return layer


def change_mask(source: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Where an edit changes anything: bool [height, width]."""
    return (source != target).any(axis=-1)
