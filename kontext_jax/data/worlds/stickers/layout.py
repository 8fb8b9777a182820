"""Draws scenes at random: what stands where, in front of what.

No two objects of a scene have one name, so that the name says which is meant; no object hides
another by more than a third.
"""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from kontext_jax.data.worlds.stickers.backdrops import DIRECTIONS, PATTERNS
from kontext_jax.data.worlds.stickers.colours import BACKDROP_COLOURS, can_become
from kontext_jax.data.worlds.stickers.drawings import HANDS, Drawings
from kontext_jax.data.worlds.stickers.looks import WEATHERS
from kontext_jax.data.worlds.stickers.places import PLACES
from kontext_jax.data.worlds.stickers.render import hue_and_share
from kontext_jax.data.worlds.stickers.scene import (
    SIDE_PX,
    SIZES,
    Backdrop,
    Scene,
    Sign,
    Sticker,
)
from kontext_jax.data.worlds.stickers.signs import BOARDS, FONTS

_SIZES_OF_COUNT = {
    1: ("medium", "big", "huge"),
    2: ("medium", "big"),
    3: ("small", "medium", "big"),
    4: ("small", "medium"),
}
MOST_HIDDEN = 0.34  # of an object's square by any other
_SIGN_ROWS = {0: 22, 1: 64, 2: 106}  # row of the grid → centre of a sign in it
NUM_PHOTO_CROPS = 4096  # of each photograph


class Pool(NamedTuple):
    """What scenes may be made of: names of objects, words, names of photographs."""

    names: tuple[str, ...]
    words: tuple[str, ...]
    photos: tuple[str, ...]


@dataclasses.dataclass
class Draw:
    """Draws the parts of one example.

    Attributes:
      rng: generator from which all chance comes.
      pool: what may be drawn.
      drawings: decides which colours an object can be given.
    """

    rng: np.random.Generator
    pool: Pool
    drawings: Drawings

    def chance(self, probability: float) -> bool:
        return self.rng.random() < probability

    def choose(self, options: Sequence) -> Any:
        return options[int(self.rng.integers(len(options)))]

    def sample(self, options: Sequence, count: int) -> list:
        """Different ones, in random order."""
        picked = self.rng.choice(len(options), count, replace=False)
        return [options[int(i)] for i in picked]

    def name(self, *others: str) -> str:
        """An object other than these."""
        while (name := self.choose(self.pool.names)) in others:
            pass
        return name

    def hand(self, *others: str) -> str:
        return self.choose([hand for hand in HANDS if hand not in others])

    def shift(self, most: int = 4) -> tuple[int, int]:
        x, y = self.rng.integers(-most, most + 1, 2)
        return int(x), int(y)

    def angle(self, hand: str) -> int:
        """Degrees; pixel art stands upright, since its squares do."""
        if hand == "pixel" or not self.chance(0.35):
            return 0
        return int(self.rng.integers(-25, 26))

    def colours_of(self, sticker: Sticker) -> tuple[str, ...]:
        """Other colours that an object can be given."""
        hue, share = hue_and_share(self.drawings, sticker.name, sticker.hand)
        return tuple(c for c in can_become(hue, share) if c != sticker.colour)

    def coloured(self, sticker: Sticker, probability: float = 0.25) -> Sticker:
        """The object in a colour that is not its own, at times, where it can have one."""
        if not self.chance(probability) or not (colours := self.colours_of(sticker)):
            return sticker
        return dataclasses.replace(sticker, colour=self.choose(colours))

    def stickers(
        self, count: int, cells: Sequence[int] = tuple(range(9)), hands: Sequence[str] = ()
    ) -> tuple[Sticker, ...]:
        """Objects of different names in different cells, mostly by one hand.

        Args:
          hands: one for each object; drawn if empty.
        """
        if not hands:
            one = self.hand()
            hands = [self.hand() for _ in range(count)] if self.chance(0.2) else [one] * count
        names: list[str] = []
        for _ in range(count):
            names.append(self.name(*names))
        sizes = [self.choose(_SIZES_OF_COUNT[count]) for _ in range(count)]
        if count == 1 and len(cells) == 9 and self.chance(0.5):
            cells = (4,)
        return tuple(
            self.coloured(
                Sticker(
                    *(name, hand, cell, size),
                    shift=self.shift(),
                    angle=self.angle(hand),
                    flip=self.chance(0.5),
                )
            )
            for name, hand, cell, size in zip(
                names, hands, self.sample(cells, count), sizes, strict=True
            )
        )

    def backdrop(self, *kinds: str) -> Backdrop:
        """Of one of the kinds; of any if none is named."""
        kind = self.choose(kinds or ("plain", "gradient", "pattern", "place", "place", "photo"))
        if kind == "place":
            return Backdrop(kind, self.choose(PLACES))
        if kind == "photo":
            crop = int(self.rng.integers(NUM_PHOTO_CROPS))
            return Backdrop(kind, self.choose(self.pool.photos), seed=crop)
        number = 1 if kind == "plain" else 2
        colours = tuple(self.sample(tuple(BACKDROP_COLOURS), number))
        name = {"gradient": DIRECTIONS, "pattern": PATTERNS}.get(kind, ("",))
        return Backdrop(kind, self.choose(name), colours)

    def sign(self, row: int, word: str | None = None) -> Sign:
        """A board in a row of the grid, wide enough for its word."""
        word = self.choose(self.pool.words) if word is None else word
        letters = max(4, len(word))
        width = min(116, 14 * letters + int(self.rng.integers(8, 20)))
        height = int(self.rng.integers(28, 36))
        reach = (SIDE_PX - width) // 2 - 3
        x = SIDE_PX // 2 + int(self.rng.integers(-reach, reach + 1))
        board = self.choose(tuple(BOARDS))
        return Sign(word, self.choose(FONTS), board, (x, _SIGN_ROWS[row]), (width, height))

    def scene(self, fewest: int = 1, most: int = 4, sign: float = 0.08) -> Scene:
        """A scene of `fewest` to `most` objects, with a sign at a probability."""
        while True:
            count = int(self.rng.integers(fewest, most + 1))
            things: tuple[Sticker | Sign, ...]
            if self.chance(sign):
                row = int(self.choose((0, 2)))
                cells = [cell for cell in range(9) if cell // 3 != row]
                things = (*self.stickers(min(count, 3), cells), self.sign(row))
            else:
                things = self.stickers(count)
            look = self.choose(WEATHERS) if self.chance(0.1) else "plain"
            scene = Scene(things, self.backdrop(), look)
            if is_clear(scene):
                return scene


def free_cells(scene: Scene) -> tuple[int, ...]:
    """Cells with no object's centre and no sign in them."""
    taken = {sticker.cell for sticker in scene.stickers}
    if scene.sign:
        row = min(2, 3 * scene.sign.centre[1] // SIDE_PX)
        taken |= {3 * row, 3 * row + 1, 3 * row + 2}
    return tuple(cell for cell in range(9) if cell not in taken)


def box(thing: Sticker | Sign) -> tuple[float, float, float, float]:
    """Left, top, right and bottom in pixels of the rectangle that a thing fills."""
    x, y = thing.centre
    width, height = (0.9 * SIZES[thing.size],) * 2 if isinstance(thing, Sticker) else thing.size
    return x - width / 2, y - height / 2, x + width / 2, y + height / 2


def is_clear(scene: Scene) -> bool:
    """Whether no thing hides another by more than MOST_HIDDEN of the smaller."""
    for a, b in itertools.combinations(map(box, scene.things), 2):
        width = min(a[2], b[2]) - max(a[0], b[0])
        height = min(a[3], b[3]) - max(a[1], b[1])
        smaller = min((c[2] - c[0]) * (c[3] - c[1]) for c in (a, b))
        if min(width, height) > 0 and width * height > MOST_HIDDEN * smaller:
            return False
    return True
