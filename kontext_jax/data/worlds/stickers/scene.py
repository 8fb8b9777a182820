"""What a picture of the sticker world shows, as data; `render.py` draws it.

Lengths are in pixels of a picture of 128 × 128, whatever the size that is drawn.
"""

import dataclasses
from typing import Literal

SIDE_PX = 128
SIZES = {"small": 32, "medium": 42, "big": 58, "huge": 80}  # longer side of an object
POSITIONS = (
    *("top left", "top", "top right"),
    *("left", "middle", "right"),
    *("bottom left", "bottom", "bottom right"),
)
CENTRES = tuple((24 + 40 * (cell % 3), 25 + 39 * (cell // 3)) for cell in range(9))


@dataclasses.dataclass(frozen=True)
class Sticker:
    """One drawn object.

    Attributes:
      name: preferred name in the catalogue.
      hand: who drew it, one of `drawings.HANDS`.
      cell: cell of the 3×3 grid in which its centre lies, counted row by row.
      size: one of SIZES.
      shift: pixels (right, down) from the cell's centre to the object's.
      angle: degrees, anticlockwise.
      flip: mirrored left to right.
      colour: colour that its main colour was changed to; "" if it was not.
    """

    name: str
    hand: str
    cell: int
    size: str = "medium"
    shift: tuple[int, int] = (0, 0)
    angle: int = 0
    flip: bool = False
    colour: str = ""

    @property
    def centre(self) -> tuple[int, int]:
        """Pixels from the left and from the top; the object lies within the picture."""
        half = SIZES[self.size] // 2 + 2
        x, y = (a + b for a, b in zip(CENTRES[self.cell], self.shift, strict=True))
        return min(max(x, half), SIDE_PX - half), min(max(y, half), SIDE_PX - half)


@dataclasses.dataclass(frozen=True)
class Sign:
    """A board with one word.

    Attributes:
      word: in capitals; "" leaves the board empty.
      font: one of `signs.FONTS`.
      board: one of `signs.BOARDS`.
      centre: pixels from the left and from the top.
      size: pixels of width and height.
    """

    word: str
    font: str
    board: str
    centre: tuple[int, int]
    size: tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Backdrop:
    """What lies behind everything.

    Attributes:
      kind: "plain", "gradient" and "pattern" are of `colours`; "place" and "photo" have a name.
      name: name of the place, the photograph, the pattern, or the gradient's direction.
      colours: one name for "plain", two for "gradient" and "pattern".
      seed: for "photo", which crop of it is shown.
    """

    kind: Literal["plain", "gradient", "pattern", "place", "photo"]
    name: str = ""
    colours: tuple[str, ...] = ()
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class Cue:
    """A mark drawn over the picture, around a thing or a place.

    Attributes:
      shape: "circle", "box" or "arrow".
      colour: one of `cues.COLOURS`.
      centre: pixels from the left and from the top.
      radii: pixels to the side and up.
    """

    shape: str
    colour: str
    centre: tuple[int, int]
    radii: tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Scene:
    """A picture: things from back to front before a backdrop, a look of the whole, marks on top."""

    things: tuple[Sticker | Sign, ...]
    backdrop: Backdrop
    look: str = "plain"
    cues: tuple[Cue, ...] = ()

    @property
    def stickers(self) -> tuple[Sticker, ...]:
        return tuple(thing for thing in self.things if isinstance(thing, Sticker))

    @property
    def sign(self) -> Sign | None:
        return next((thing for thing in self.things if isinstance(thing, Sign)), None)

    def replace(self, old: Sticker | Sign, *new: Sticker | Sign) -> "Scene":
        """The scene with one thing exchanged for others, or without it."""
        at = self.things.index(old)
        return dataclasses.replace(self, things=(*self.things[:at], *new, *self.things[at + 1 :]))
