"""Edits of single objects: each draws a scene, changes one thing in it, and says so.

An edit is a function of a `Draw`; it gives None where what was drawn does not allow it. Where an
instruction leaves something open, the rule is fixed: new objects are of medium size, upright, in
the middle of their cell, by the hand of the scene; copies take the nearest free cells.
"""

import dataclasses
from collections.abc import Callable

from kontext_jax.data.worlds.stickers.draft import Draft
from kontext_jax.data.worlds.stickers.grammar import write
from kontext_jax.data.worlds.stickers.layout import Draw, free_cells, is_clear
from kontext_jax.data.worlds.stickers.phrases import AT, NUMBERS, a, plural, the
from kontext_jax.data.worlds.stickers.scene import CENTRES, POSITIONS, Scene, Sticker

Edit = Callable[[Draw], Draft | None]


def _draft(
    draw: Draw, what: str, source: Scene, target: Scene, about: tuple[Sticker, ...], **given: str
) -> Draft | None:
    if not is_clear(target):
        return None
    names = tuple(dict.fromkeys(sticker.name for sticker in about))
    hands = tuple(dict.fromkeys(sticker.hand for sticker in about))
    return Draft(what, (source,), target, write(draw, what, given), names, hands)


def with_other_object(draw: Draw, scene: Scene, old: Sticker) -> Sticker:
    """An object of another name in the place, size and hand of a given one, in its own colour."""
    name = draw.name(*(sticker.name for sticker in scene.stickers))
    return dataclasses.replace(old, name=name, colour="")


def replace(draw: Draw) -> Draft | None:
    scene = draw.scene()
    old = draw.choose(scene.stickers)
    new = with_other_object(draw, scene, old)
    new_words = a(draw, new.name)
    target = scene.replace(old, new)
    return _draft(
        draw, "replace", scene, target, (old, new), it=the(draw, old, scene), new=new_words
    )


def remove(draw: Draw) -> Draft | None:
    scene = draw.scene()
    old = draw.choose(scene.stickers)
    given = {"it": the(draw, old, scene), "noun": old.name}
    return _draft(draw, "remove", scene, scene.replace(old), (old,), **given)


def add(draw: Draw) -> Draft | None:
    scene = draw.scene(1, 3)
    cells = free_cells(scene)
    name = draw.name(*(sticker.name for sticker in scene.stickers))
    size = draw.choose(("small", "medium", "medium", "big"))
    other = draw.choose(scene.stickers)
    beside = {other.cell - 1: "left", other.cell + 1: "right"}
    beside = {c: side for c, side in beside.items() if c in cells and c // 3 == other.cell // 3}
    if beside and draw.chance(0.4):
        cell = draw.choose(tuple(beside))
        at = f"to the {beside[cell]} of {the(draw, other)}"
    else:
        cell = draw.choose(cells)
        at = AT[POSITIONS[cell]]
    new = draw.coloured(Sticker(name, scene.stickers[0].hand, cell, size))
    words = a(draw, name, "" if size == "medium" else size, new.colour)
    target = dataclasses.replace(scene, things=(*scene.things, new))
    return _draft(draw, "add", scene, target, (new,), new=words, at=at)


def recolor(draw: Draw) -> Draft | None:
    scene = draw.scene()
    old = draw.choose(scene.stickers)
    if not (colours := draw.colours_of(old)):
        return None
    new = dataclasses.replace(old, colour=draw.choose(colours))
    given = {"it": the(draw, old, scene), "color": new.colour}
    return _draft(draw, "recolor", scene, scene.replace(old, new), (old,), **given)


_LARGER = {"small": "medium", "medium": "big", "big": "huge"}
_SMALLER = {larger: size for size, larger in _LARGER.items()}


def _resize(draw: Draw, what: str, steps: dict[str, str]) -> Draft | None:
    scene = draw.scene()
    old = draw.choose(scene.stickers)
    if old.size not in steps:
        return None
    new = dataclasses.replace(old, size=steps[old.size])
    it = the(draw, old, scene)
    return _draft(draw, what, scene, scene.replace(old, new), (old,), it=it)


def enlarge(draw: Draw) -> Draft | None:
    return _resize(draw, "enlarge", _LARGER)


def shrink(draw: Draw) -> Draft | None:
    return _resize(draw, "shrink", _SMALLER)


def move(draw: Draw) -> Draft | None:
    scene = draw.scene(1, 3)
    old = draw.choose(scene.stickers)
    cell = draw.choose(free_cells(scene))
    new = dataclasses.replace(old, cell=cell, shift=(0, 0))
    position = POSITIONS[cell]
    given = {"it": the(draw, old), "position": position, "at": AT[position]}
    return _draft(draw, "move", scene, scene.replace(old, new), (old,), **given)


def exchange(draw: Draw) -> Draft | None:
    scene = draw.scene(2, 4)
    one, other = draw.sample(scene.stickers, 2)
    places = {s: {"cell": s.cell, "shift": s.shift} for s in (one, other)}
    moved = {
        one: dataclasses.replace(one, **places[other]),
        other: dataclasses.replace(other, **places[one]),
    }
    things = tuple(moved.get(thing, thing) for thing in scene.things)
    target = dataclasses.replace(scene, things=things)
    given = {"it": the(draw, one), "other": the(draw, other)}
    return _draft(draw, "exchange", scene, target, (one, other), **given)


def count(draw: Draw) -> Draft | None:
    scene = draw.scene(1, 2)
    old = draw.choose(scene.stickers)
    if old.size == "huge":
        return None
    number = int(draw.rng.integers(2, 5))
    x, y = CENTRES[old.cell]

    def distance(cell: int) -> tuple[float, int]:
        return (CENTRES[cell][0] - x) ** 2 + 1.5 * (CENTRES[cell][1] - y) ** 2, cell

    cells = sorted(free_cells(scene), key=distance)[: number - 1]
    copies = tuple(dataclasses.replace(old, cell=cell) for cell in cells)
    target = scene.replace(old, old, *copies)
    given = {"number": NUMBERS[number], "nouns": plural(old.name)}
    return _draft(draw, "count", scene, target, (old,), **given)


LOCAL: dict[str, Edit] = {
    "replace": replace,
    "remove": remove,
    "add": add,
    "recolor": recolor,
    "enlarge": enlarge,
    "shrink": shrink,
    "move": move,
    "exchange": exchange,
    "count": count,
}
