"""Edits of the word on a sign; board and font stay."""

import dataclasses

from kontext_jax.data.worlds.stickers.draft import Draft
from kontext_jax.data.worlds.stickers.edits_local import Edit
from kontext_jax.data.worlds.stickers.grammar import write as write_text
from kontext_jax.data.worlds.stickers.layout import Draw, is_clear
from kontext_jax.data.worlds.stickers.scene import Scene
from kontext_jax.data.worlds.stickers.words import misspellings


def scene_with_sign(draw: Draw, before: str, after: str) -> Scene:
    """A scene of a sign and up to three objects; the board is wide enough for both words."""
    while True:
        row = int(draw.choose((0, 1, 2)))
        cells = [cell for cell in range(9) if cell // 3 != row]
        count = int(draw.rng.integers(0, 4))
        stickers = draw.stickers(count, cells) if count else ()
        sign = draw.sign(row, max(before, after, key=len))
        sign = dataclasses.replace(sign, word=before)
        scene = Scene((*stickers, sign), draw.backdrop())
        if is_clear(scene):
            return scene


def _draft(draw: Draw, what: str, before: str, after: str, words: tuple[str, ...]) -> Draft:
    scene = scene_with_sign(draw, before, after)
    sign = scene.sign
    target = scene.replace(sign, dataclasses.replace(sign, word=after))
    text = write_text(draw, what, {"old": before, "word": after})
    return Draft(what, (scene,), target, text, words=words)


def word(draw: Draw) -> Draft | None:
    before, after = draw.sample(draw.pool.words, 2)
    return _draft(draw, "word", before, after, (before, after))


def spelling(draw: Draw) -> Draft | None:
    after = draw.choose(draw.pool.words)
    wrong = misspellings(after)
    if len(after) < 4 or not wrong:
        return None
    return _draft(draw, "spelling", draw.choose(wrong), after, (after,))


def write(draw: Draw) -> Draft | None:
    after = draw.choose(draw.pool.words)
    return _draft(draw, "write", "", after, (after,))


TEXT: dict[str, Edit] = {"word": word, "spelling": spelling, "write": write}
