"""Marks around what is meant: drawn over the picture, and not part of it."""

from PIL import Image, ImageDraw

from kontext_jax.data.worlds.stickers.scene import SIDE_PX, Cue

SHAPES = ("circle", "box", "arrow")
COLOURS = {
    "red": (230, 20, 30),
    "blue": (20, 70, 240),
    "green": (0, 190, 60),
    "yellow": (255, 225, 0),
}
_WIDTH_PX = 2.6
_SCALE = 4


def draw_cue(picture: Image.Image, cue: Cue) -> None:
    """Draws a mark onto an RGB picture."""
    scale = _SCALE * picture.width / SIDE_PX
    mask = Image.new("L", (_SCALE * picture.width, _SCALE * picture.height))
    draw = ImageDraw.Draw(mask)
    (x, y), (across, up) = cue.centre, cue.radii
    width = round(_WIDTH_PX * scale)
    box = [scale * value for value in (x - across, y - up, x + across, y + up)]
    if cue.shape == "circle":
        draw.ellipse(box, outline=255, width=width)
    elif cue.shape == "box":
        draw.rectangle(box, outline=255, width=width)
    else:
        _draw_arrow(draw, cue, scale, width)
    mask = mask.resize(picture.size, Image.Resampling.BOX)
    picture.paste(COLOURS[cue.colour], mask=mask)


def _draw_arrow(draw: ImageDraw.ImageDraw, cue: Cue, scale: float, width: int) -> None:
    """An arrow from the side where there is more room; its tip is a third inside the thing."""
    (x, y), (across, _) = cue.centre, cue.radii
    side = 1 if x < SIDE_PX / 2 else -1
    tip, tail = x + side * 0.55 * across, x + side * (0.55 * across + 30)
    rise = -14 if y > SIDE_PX / 2 else 14
    draw.line([scale * tip, scale * y, scale * tail, scale * (y + rise)], fill=255, width=width)
    dx, dy = tail - tip, rise
    length = (dx * dx + dy * dy) ** 0.5
    dx, dy = 10 * dx / length, 10 * dy / length
    corners = (
        *((tip, y), (tip + dx - 0.6 * dy, y + dy + 0.6 * dx)),
        *((tip + dx + 0.6 * dy, y + dy - 0.6 * dx),),
    )
    draw.polygon([(scale * a, scale * b) for a, b in corners], fill=255)
