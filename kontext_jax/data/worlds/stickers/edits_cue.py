"""Edits of what a mark in the picture points at; the mark is gone afterwards.

At times a second mark in another colour points at something else, and the instruction names the
colour of the one that counts.
"""

import dataclasses

from kontext_jax.data.worlds.stickers.cues import COLOURS, SHAPES
from kontext_jax.data.worlds.stickers.draft import Draft
from kontext_jax.data.worlds.stickers.edits_local import Edit, with_other_object
from kontext_jax.data.worlds.stickers.grammar import write
from kontext_jax.data.worlds.stickers.layout import Draw, free_cells, is_clear
from kontext_jax.data.worlds.stickers.phrases import a
from kontext_jax.data.worlds.stickers.scene import SIDE_PX, SIZES, Cue, Scene, Sticker

_RADIUS_OF_CELL = 21
_LARGER = {"small": "medium", "medium": "big", "big": "huge"}


def _cue_on(draw: Draw, sticker: Sticker, shape: str, colour: str) -> Cue:
    radius = round(0.5 * SIZES[sticker.size]) + (0 if shape == "arrow" else 4)
    x, y = sticker.centre
    across = min(radius + int(draw.rng.integers(-1, 4)), x - 2, SIDE_PX - 2 - x)
    return Cue(shape, colour, (x, y), (across, min(radius, y - 2, SIDE_PX - 2 - y)))


def _meant(draw: Draw, cue: Cue, named: bool) -> str:
    """What a mark points at: "what is circled", "the thing in the red box"."""
    colour = f"{cue.colour} " if named or draw.chance(0.5) else ""
    article = "the " if colour or draw.chance(0.5) else "a "
    if cue.shape == "circle":
        options = (
            f"what is in {article}{colour}circle",
            f"the thing inside the {colour}circle",
            f"what is circled{' in ' + cue.colour if colour else ''}",
        )
    elif cue.shape == "box":
        options = (
            f"what is in the {colour}box",
            f"the thing inside the {colour}box",
            f"what the {colour}box marks",
        )
    else:
        options = (
            f"what the {colour}arrow points at",
            f"the thing that the {colour}arrow points to",
            f"what the {colour}arrow shows",
        )
    return draw.choose(options)


def _marked(draw: Draw, scene: Scene, sticker: Sticker) -> tuple[Scene, str]:
    """The scene with a mark on an object, and what it points at."""
    one, other = draw.sample(tuple(COLOURS), 2)
    cue = _cue_on(draw, sticker, draw.choose(SHAPES), one)
    cues = [cue]
    others = [s for s in scene.stickers if s != sticker]
    is_second = bool(others) and draw.chance(0.3)
    if is_second:
        cues.append(_cue_on(draw, draw.choose(others), cue.shape, other))
    return dataclasses.replace(scene, cues=tuple(cues)), _meant(draw, cue, is_second)


def _scene(draw: Draw, fewest: int = 2, most: int = 4) -> Scene:
    return dataclasses.replace(draw.scene(fewest, most, sign=0), look="plain")


def _draft(draw, what, scene, old, target, subjects, **given) -> Draft | None:
    if not is_clear(target):
        return None
    source, meant = _marked(draw, scene, old)
    text = write(draw, what, {"meant": meant, **given})
    return Draft(what, (source,), target, text, subjects, (old.hand,))


def remove(draw: Draw) -> Draft | None:
    scene = _scene(draw)
    old = draw.choose(scene.stickers)
    return _draft(draw, "marked remove", scene, old, scene.replace(old), (old.name,))


def replace(draw: Draw) -> Draft | None:
    scene = _scene(draw)
    old = draw.choose(scene.stickers)
    new = with_other_object(draw, scene, old)
    subjects, target = (old.name, new.name), scene.replace(old, new)
    return _draft(draw, "marked replace", scene, old, target, subjects, new=a(draw, new.name))


def recolor(draw: Draw) -> Draft | None:
    scene = _scene(draw)
    old = draw.choose(scene.stickers)
    if not (colours := draw.colours_of(old)):
        return None
    new = dataclasses.replace(old, colour=draw.choose(colours))
    target = scene.replace(old, new)
    return _draft(draw, "marked recolor", scene, old, target, (old.name,), color=new.colour)


def enlarge(draw: Draw) -> Draft | None:
    scene = _scene(draw)
    old = draw.choose(scene.stickers)
    if old.size not in _LARGER:
        return None
    new = dataclasses.replace(old, size=_LARGER[old.size])
    return _draft(draw, "marked enlarge", scene, old, scene.replace(old, new), (old.name,))


def add(draw: Draw) -> Draft | None:
    """The mark is around an empty place."""
    scene = _scene(draw, 1, 3)
    cell = draw.choose(free_cells(scene))
    name = draw.name(*(sticker.name for sticker in scene.stickers))
    new = Sticker(name, scene.stickers[0].hand, cell, "medium")
    target = dataclasses.replace(scene, things=(*scene.things, new))
    if not is_clear(target):
        return None
    shape, colour = draw.choose(SHAPES[:2]), draw.choose(tuple(COLOURS))
    radii = (_RADIUS_OF_CELL + int(draw.rng.integers(-2, 2)), _RADIUS_OF_CELL)
    source = dataclasses.replace(scene, cues=(Cue(shape, colour, new.centre, radii),))
    named = f"{colour} " if draw.chance(0.5) else ""
    inside = draw.choose((f"inside the {named}{shape}", f"where the {named}{shape} is"))
    text = write(draw, "marked add", {"new": a(draw, name), "inside": inside})
    return Draft("marked add", (source,), target, text, (name,), (new.hand,))


CUE: dict[str, Edit] = {
    "marked remove": remove,
    "marked replace": replace,
    "marked recolor": recolor,
    "marked enlarge": enlarge,
    "marked add": add,
}
