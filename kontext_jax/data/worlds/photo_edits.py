"""Edits of photographs with an exact result: of the whole picture, or of drawn objects in it.

The objects, their instructions and the combinations that training never sees are those of
`kontext_jax.data.scenes`, with a crop of a photograph in place of the background. Everything is a
function of (split, seed, index); "held_out" are crops of photographs that are never trained on.
"""

import dataclasses
import functools
from collections.abc import Callable

import numpy as np
from PIL import Image

from kontext_jax.data.worlds import photos
from kontext_jax.data.worlds.scenes import (
    COLOURS,
    OBJECT_EDITS,
    WORLDS,
    SceneExample,
    SceneSource,
    Thing,
    World,
    place_things,
    restyle,
)
from kontext_jax.pictures import latents

SPLITS = ("train", "held_out")
KEEP = "keep"
# Ratios of the crops, as preferred sizes, and how often each is drawn.
RATIOS = (((1, 1), 4), ((1248, 832), 2), ((832, 1248), 1), ((1328, 800), 1), ((800, 1328), 1))
FRAME_COLOURS = {"white": (238, 238, 238), "black": (24, 24, 24)}
OBJECT_WORLD = dataclasses.replace(
    WORLDS["easy"], kinds=tuple(k for k in WORLDS["easy"].kinds if k in OBJECT_EDITS)
)
LEAST_HELD_OUT_CROP = 0.6  # of the photograph, so that one can see what it shows


# Edits of a whole picture: uint8 [height, width, 3] → likewise


def _rounded(values: np.ndarray) -> np.ndarray:
    return np.rint(np.clip(values, 0, 255)).astype(np.uint8)


def _power(exponent: float, pixels: np.ndarray) -> np.ndarray:
    return _rounded(255 * (pixels.astype(np.float32) / 255) ** np.float32(exponent))


def _style(style: str, pixels: np.ndarray) -> np.ndarray:
    return _rounded(restyle(pixels.astype(np.float32), style))


def _tint(colour: str, pixels: np.ndarray) -> np.ndarray:
    """Black, the colour and white for dark, middle and light."""
    light = restyle(pixels.astype(np.float32), "gray")[..., :1] / 255
    middle = np.float32(COLOURS[colour])
    below, above = 2 * light * middle, middle + (2 * light - 1) * (255 - middle)
    return _rounded(np.where(light < 0.5, below, above))


def _blur(pixels: np.ndarray) -> np.ndarray:
    """Gaussian, of a thirtieth of the shorter side."""
    sigma = min(pixels.shape[:2]) / 30
    reach = int(np.ceil(3 * sigma))
    kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2)
    kernel /= kernel.sum()
    values = pixels.astype(np.float64)
    for axis in (0, 1):
        pad = [(reach, reach) if a == axis else (0, 0) for a in range(3)]
        windows = np.lib.stride_tricks.sliding_window_view(
            np.pad(values, pad, mode="symmetric"), len(kernel), axis=axis
        )
        values = windows @ kernel
    return _rounded(values)


def _pixelate(pixels: np.ndarray) -> np.ndarray:
    """Squares of an eighth of a square picture's side."""
    height, width = pixels.shape[:2]
    side = 8 * max(1, round((height * width) ** 0.5 / 64))
    picture = Image.fromarray(pixels).resize(
        (max(1, width // side), max(1, height // side)), Image.Resampling.BOX
    )
    return np.asarray(picture.resize((width, height), Image.Resampling.NEAREST))


def _frame(colour: str, pixels: np.ndarray) -> np.ndarray:
    height, width = pixels.shape[:2]
    border = max(1, round(5 * (height * width) ** 0.5 / 64))
    framed = np.empty_like(pixels)
    framed[:] = FRAME_COLOURS.get(colour) or COLOURS[colour]
    framed[border:-border, border:-border] = pixels[border:-border, border:-border]
    return framed


PictureEdit = Callable[[np.ndarray], np.ndarray]
# kind → instruction → edit
PICTURE_EDITS: dict[str, dict[str, PictureEdit]] = {
    KEEP: {"keep the picture": lambda pixels: pixels},
    "gray": {"make the picture gray": functools.partial(_style, "gray")},
    "invert": {"invert the picture": functools.partial(_style, "inverted")},
    "brighter": {"make the picture brighter": functools.partial(_power, 0.55)},
    "darker": {"make the picture darker": functools.partial(_power, 1.9)},
    "tint": {f"tint the picture {c}": functools.partial(_tint, c) for c in OBJECT_WORLD.colours},
    "blur": {"blur the picture": _blur},
    "pixelate": {"pixelate the picture": _pixelate},
    "mirror": {"mirror the picture": lambda pixels: pixels[:, ::-1]},
    "flip": {"turn the picture upside down": lambda pixels: pixels[::-1]},
    "frame": {
        f"put a {colour} frame around the picture": functools.partial(_frame, colour)
        for colour in (*OBJECT_WORLD.colours, *FRAME_COLOURS)
    },
}
KINDS = (*PICTURE_EDITS, *OBJECT_WORLD.kinds)


@dataclasses.dataclass(frozen=True)
class PhotoExample:
    """An edit of a crop.

    Attributes:
      id: says how to draw it again.
      photo: name of the photograph.
      crop: uint8 [height, width, 3], without drawn objects.
      scene: the edit of objects that stand in it; None for an edit of the whole picture.
    """

    id: str
    photo: str
    kind: str
    text: str
    crop: np.ndarray
    scene: SceneExample | None = None

    @property
    def source(self) -> np.ndarray:
        return with_things(self.crop, self.scene.source.things) if self.scene else self.crop

    @property
    def target(self) -> np.ndarray:
        if self.scene:
            return with_things(self.crop, self.scene.target.things)
        return PICTURE_EDITS[self.kind][self.text](self.crop)


def with_things(crop: np.ndarray, things: tuple[Thing, ...]) -> np.ndarray:
    """Drawn objects in front of a crop."""
    return _rounded(place_things(things, crop.astype(np.float32)))


@functools.cache
def crop_sizes(side_px: int) -> tuple[tuple[int, int], ...]:
    """Sizes (width, height) to draw from, each as often as it is drawn: about `side_px`² pixels."""
    sizes = [(latents.size_of_area(*ratio, side_px**2), count) for ratio, count in RATIOS]
    return tuple(size for size, count in sizes for _ in range(count))


class PhotoSource:
    """Edits of crops by index, drawn when asked for; each kind as often as the others.

    Args:
      split: "train", or "held_out" for photographs that are never trained on; their crops show
        most of them, and are not varied.
      side_px: pictures have about `side_px`² pixels.
      square: square crops only.

    Raises:
      FileNotFoundError: a photograph is not installed.
    """

    def __init__(
        self,
        split: str = "train",
        seed: int = 0,
        count: int = 100_000,
        side_px: int = 64,
        square: bool = False,
    ):
        if split not in SPLITS:
            raise ValueError(f"split is {split!r}; expected one of {', '.join(SPLITS)}")
        self.split, self.seed, self.count, self.side_px = split, seed, count, side_px
        self.photos = photos.photos_of(split)
        self._pixels = [photos.photo_pixels(photo) for photo in self.photos]
        self._sizes = ((side_px, side_px),) if square else crop_sizes(side_px)
        self._scenes = {
            kind: SceneSource(
                dataclasses.replace(OBJECT_WORLD, kinds=(kind,)),
                "train" if split == "train" else "seen",
                seed=seed,
                count=count,
            )
            for kind in OBJECT_WORLD.kinds
        }

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> PhotoExample:
        if not 0 <= index < self.count:
            raise IndexError(f"index {index} of {self.count} photographs")
        rng = np.random.default_rng([self.seed, SPLITS.index(self.split), index])
        kind = _choose(rng, KINDS)
        number = int(rng.integers(len(self.photos)))
        width, height = _choose(rng, self._sizes)
        pixels = self._pixels[number]
        if self.split == "train":
            crop = photos.vary(rng, photos.draw_crop(rng, pixels, width, height))
        else:
            crop = photos.draw_crop(rng, pixels, width, height, LEAST_HELD_OUT_CROP)
        name, photo = f"{self.split}-{self.seed}-{index}", self.photos[number].name
        if kind in PICTURE_EDITS:
            text = _choose(rng, tuple(PICTURE_EDITS[kind]))
            return PhotoExample(name, photo, kind, text, crop)
        scene = self._scenes[kind][index]
        return PhotoExample(name, photo, kind, scene.text, crop, scene)


def alternatives(example: PhotoExample, world: World = OBJECT_WORLD) -> list[np.ndarray]:
    """What other instructions would have made of an example's source; its target is not among them.

    For an edit of the whole picture, what all others of these make; for one of an object, what any
    other change of one object makes.
    """
    if example.scene is None:
        made = [edit for edits in PICTURE_EDITS.values() for edit in edits.values()]
        pictures = [edit(example.crop) for edit in made]
    else:
        before = example.scene.source.things
        pictures = [with_things(example.crop, things) for things in _changes(before, world)]
    target = example.target
    return [picture for picture in pictures if not np.array_equal(picture, target)]


def _changes(things: tuple[Thing, ...], world: World) -> list[tuple[Thing, ...]]:
    """The objects as they are, and after every change of one of them, or with one more."""
    free = sorted(set(range(9)) - {t.position for t in things})
    found = [things]
    for old in things:
        rest = tuple(t for t in things if t != old)
        changed = [dataclasses.replace(old, position=cell) for cell in free]
        changed += [dataclasses.replace(old, colour=c) for c in world.colours if c != old.colour]
        changed += [dataclasses.replace(old, shape=s) for s in world.shapes if s != old.shape]
        found += [rest, *(tuple(sorted((*rest, new))) for new in changed)]
    if len(things) < world.max_things:
        for cell in free:
            more = [
                Thing(cell, shape, colour, size)
                for shape in world.shapes
                for colour in world.colours
                for size in ("big", "small")
            ]
            found += [tuple(sorted((*things, new))) for new in more]
    return found


def _choose(rng: np.random.Generator, options):
    return options[int(rng.integers(len(options)))]
