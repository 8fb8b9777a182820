"""Pictures made anew from references: by another hand, or with the same character.

A character stands upright in the middle and is big unless the instruction says otherwise; it keeps
its hand, its colour and the side that it faces.
"""

import dataclasses

from kontext_jax.data.worlds.stickers.draft import Draft
from kontext_jax.data.worlds.stickers.edits_local import Edit
from kontext_jax.data.worlds.stickers.grammar import write
from kontext_jax.data.worlds.stickers.layout import Draw, is_clear
from kontext_jax.data.worlds.stickers.phrases import (
    AT,
    HAND_PHRASES,
    a,
    before,
    the,
    this,
)
from kontext_jax.data.worlds.stickers.scene import POSITIONS, Scene, Sticker


def _by_hand(scene: Scene, hand: str) -> Scene:
    """The scene drawn by one hand; upright and in the objects' own colours."""
    things = tuple(
        dataclasses.replace(thing, hand=hand, colour="", angle=0)
        if isinstance(thing, Sticker)
        else thing
        for thing in scene.things
    )
    return dataclasses.replace(scene, things=things)


def _plain_scene(draw: Draw, fewest: int = 1, most: int = 3, hand: str = "") -> Scene:
    """A scene by one hand, without changed colours, turned objects, sign and look."""
    scene = draw.scene(fewest, most, sign=0)
    return dataclasses.replace(_by_hand(scene, hand or draw.hand()), look="plain")


def _names(*scenes: Scene) -> tuple[str, ...]:
    return tuple(dict.fromkeys(s.name for scene in scenes for s in scene.stickers))


def redraw(draw: Draw) -> Draft | None:
    source = _plain_scene(draw)
    hand = draw.hand(source.stickers[0].hand)
    text = write(draw, "redraw", {"hand": draw.choose(HAND_PHRASES[hand])})
    return Draft("redraw", (source,), _by_hand(source, hand), text, _names(source), (hand,))


def redraw_one(draw: Draw) -> Draft | None:
    source = _plain_scene(draw, 2, 3)
    old = draw.choose(source.stickers)
    hand = draw.hand(old.hand)
    target = source.replace(old, dataclasses.replace(old, hand=hand))
    given = {"it": the(draw, old), "hand": draw.choose(HAND_PHRASES[hand])}
    text = write(draw, "redraw one", given)
    return Draft("redraw one", (source,), target, text, (old.name,), (hand,))


def hand_of(draw: Draw) -> Draft | None:
    source = _plain_scene(draw)
    hand = draw.hand(source.stickers[0].hand)
    shown = _plain_scene(draw, 1, 3, hand)
    if set(_names(source)) & set(_names(shown)):
        return None
    text = write(draw, "hand of", {})
    return Draft("hand of", (source, shown), _by_hand(source, hand), text, _names(source), (hand,))


def draw_like(draw: Draw) -> Draft | None:
    source = _plain_scene(draw, 1, 2)
    hand = source.stickers[0].hand
    name = draw.name(*_names(source))
    target = Scene((Sticker(name, hand, 4, "huge"),), source.backdrop)
    text = write(draw, "draw like", {"new": a(draw, name)})
    return Draft("draw like", (source,), target, text, (name,), (hand,))


STYLE: dict[str, Edit] = {
    "redraw": redraw,
    "redraw one": redraw_one,
    "hand of": hand_of,
    "draw like": draw_like,
}


def _character(draw: Draw, *others: str) -> Scene:
    """A picture of one object alone, large, at times in a colour that is not its own."""
    name, hand = draw.name(*others), draw.hand()
    sticker = Sticker(
        *(name, hand, 4, draw.choose(("big", "huge", "huge"))),
        shift=draw.shift(8),
        angle=draw.angle(hand),
        flip=draw.chance(0.5),
    )
    return Scene((draw.coloured(sticker, 0.5),), draw.backdrop())


def _upright(sticker: Sticker, cell: int, size: str) -> Sticker:
    return dataclasses.replace(sticker, cell=cell, size=size, shift=(0, 0), angle=0)


def elsewhere(draw: Draw) -> Draft | None:
    source = _character(draw)
    sticker, new = source.stickers[0], draw.backdrop("place", "place", "place", "plain")
    if new == source.backdrop:
        return None
    cell = 4 if draw.chance(0.5) else int(draw.rng.integers(9))
    where = before(new) if cell == 4 else f"{AT[POSITIONS[cell]]}, {before(new)}"
    target = Scene((_upright(sticker, cell, "big"),), new)
    text = write(draw, "elsewhere", {"this": this(draw, sticker), "where": where})
    return Draft("elsewhere", (source,), target, text, (sticker.name,), (sticker.hand,))


def beside(draw: Draw) -> Draft | None:
    source = _character(draw)
    sticker = source.stickers[0]
    other = Sticker(draw.name(sticker.name), sticker.hand, 5, "big")
    place, where = source.backdrop, ""
    if draw.chance(0.5):
        place = draw.backdrop("place")
        where = " " + before(place)
    target = Scene((_upright(sticker, 3, "big"), other), place)
    given = {"this": this(draw, sticker), "new": a(draw, other.name), "where": where}
    text = write(draw, "beside", given)
    return Draft("beside", (source,), target, text, (sticker.name, other.name), (sticker.hand,))


_SIZE_WORDS = {
    "small": ("small", "tiny", "very small"),
    "huge": ("huge", "very big", "very large"),
}


def at_a_size(draw: Draw) -> Draft | None:
    source = _character(draw)
    sticker, new = source.stickers[0], draw.backdrop("place")
    size = draw.choose(("small", "huge"))
    target = Scene((_upright(sticker, 4, size),), new)
    words = draw.choose(_SIZE_WORDS[size])
    given = {"this": this(draw, sticker), "size": words, "where": before(new)}
    if size == sticker.size or new == source.backdrop:
        return None
    text = write(draw, "at a size", given)
    return Draft("at a size", (source,), target, text, (sticker.name,), (sticker.hand,))


def together(draw: Draw) -> Draft | None:
    first = _character(draw)
    second = _character(draw, first.stickers[0].name)
    one, two = first.stickers[0], second.stickers[0]
    place = draw.backdrop("place", "place", "plain")
    target = Scene((_upright(one, 3, "big"), _upright(two, 5, "big")), place)
    given = {"this": the(draw, one), "other": the(draw, two), "where": before(place)}
    if not is_clear(target):
        return None
    text = write(draw, "together", given)
    hands = tuple(dict.fromkeys((one.hand, two.hand)))
    return Draft("together", (first, second), target, text, (one.name, two.name), hands)


CHARACTER: dict[str, Edit] = {
    "elsewhere": elsewhere,
    "beside": beside,
    "at a size": at_a_size,
    "together": together,
}
