"""Boards with words."""

import functools
import io

from PIL import Image, ImageDraw, ImageFont

from kontext_jax.data.worlds.stickers.drawings import Drawings
from kontext_jax.data.worlds.stickers.scene import SIDE_PX, Sign

FONTS = ("round", "slab", "script", "tall", "marker", "typewriter")
# name → board, rim, letters
BOARDS = {
    "white": ((250, 250, 246), (60, 60, 70), (30, 30, 40)),
    "blue": ((36, 92, 190), (250, 250, 250), (255, 255, 255)),
    "green": ((24, 128, 76), (250, 250, 250), (255, 255, 255)),
    "red": ((206, 38, 44), (255, 255, 255), (255, 255, 255)),
    "yellow": ((252, 208, 52), (40, 36, 30), (34, 30, 26)),
    "black": ((40, 46, 48), (150, 104, 62), (244, 244, 236)),
    "wooden": ((186, 130, 78), (112, 70, 38), (62, 34, 16)),
    "pink": ((250, 176, 200), (255, 255, 255), (130, 20, 80)),
}
_SCALE = 4  # letters are drawn this much larger, then reduced


@functools.lru_cache(256)
def _font(data: bytes | None, size_px: int) -> ImageFont.FreeTypeFont:
    if data is None:
        return ImageFont.load_default(size_px)
    return ImageFont.truetype(io.BytesIO(data), size_px, layout_engine=ImageFont.Layout.BASIC)


@functools.lru_cache(1024)
def _drawn(font: bytes | None, sign: Sign, side_px: int) -> Image.Image:
    scale = _SCALE * side_px / SIDE_PX
    width, height = (round(scale * length) for length in sign.size)
    board, rim, ink = BOARDS[sign.board]
    picture = Image.new("RGBA", (width, height))
    draw = ImageDraw.Draw(picture)
    shape = {"radius": 5 * scale, "fill": board, "outline": rim, "width": round(2 * scale)}
    draw.rounded_rectangle((0, 0, width - 1, height - 1), **shape)
    if sign.board == "wooden":
        for share in (0.36, 0.68):
            y = round(share * height)
            draw.line((3 * scale, y, width - 3 * scale, y), fill=(166, 112, 64), width=round(scale))
    if sign.word:
        _write(draw, font, sign.word, ink, (width, height), scale)
    return picture.resize((width // _SCALE, height // _SCALE), Image.Resampling.BOX)


def _write(draw, font: bytes | None, word: str, ink, size: tuple[int, int], scale: float) -> None:
    """Letters in the middle of a board, as high as it allows and as the word's length allows."""
    width, height = size[0] - 10 * scale, size[1] - 9 * scale
    size_px = 64
    left, top, right, bottom = _font(font, size_px).getbbox(word, anchor="ls")
    # Capitals have one height, so that another word of a similar length gets the same letters.
    tall = _font(font, size_px).getbbox("H", anchor="ls")
    fits = min(width / (right - left), height / (tall[3] - tall[1]), height / (bottom - top) * 1.08)
    face = _font(font, max(8, int(size_px * fits)))
    left, top, right, bottom = face.getbbox(word, anchor="ls")
    tall = face.getbbox("H", anchor="ls")
    x = (size[0] - (left + right)) / 2
    y = (size[1] - (tall[1] + tall[3])) / 2
    draw.text((x, y), word, font=face, fill=ink, anchor="ls")


def draw_sign(drawings: Drawings, sign: Sign, side_px: int) -> Image.Image:
    """The board alone, an RGBA picture; treat it as constant."""
    return _drawn(drawings.fonts.get(sign.font), sign, side_px)
