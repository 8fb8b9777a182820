"""A procedural world: pictures of simple objects, captions, and edits whose exact result is known.

One to three objects stand on a 3×3 grid. An edit is drawn as a change of the scene: its target is
rendered, not guessed; `kontext_jax.evaluation.scene_parser` reads a scene back from pixels.

Everything is a function of (world, split, seed, index). One in five combinations, decided by a hash
of their names, never occurs in training: pairs (shape, colour), and pairs (edit, position) where
the position is that of the object that is changed, added or removed, or where it is moved to. The
split "held_out" consists of edits that touch such a combination, "seen" of edits that do not.
"""

import dataclasses
import functools
import hashlib
import itertools
from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np

SHAPES = ("circle", "square", "triangle", "cross", "diamond", "ring")
# Grey levels (as in `gray`) of all colours and backgrounds differ by 7 or more, so that scenes
# without colour can still be read.
COLOURS = {
    "red": (215, 40, 40),
    "blue": (40, 70, 215),
    "green": (50, 185, 70),
    "yellow": (245, 220, 50),
    "purple": (165, 60, 200),
    "cyan": (60, 215, 225),
}
BACKGROUNDS = {
    "white": (238, 238, 238),
    "black": (24, 24, 24),
    "gray": (150, 150, 150),
    "pink": (255, 170, 190),
}
FILLS = ("flat", "gradient", "texture")
SIZES = {"big": 9.0, "small": 6.0}  # radii in pixels of a 64×64 picture
POSITIONS = (
    *("top left", "top", "top right"),
    *("left", "center", "right"),
    *("bottom left", "bottom", "bottom right"),
)
STYLE_OF_EDIT = {"invert": "inverted", "gray": "gray"}
OBJECT_EDITS = ("recolor", "remove", "add", "move", "resize", "swap")
PICTURE_EDITS = ("background", "invert", "gray", "keep")
CAPTION = "caption"  # text to image

Split = Literal["train", "seen", "held_out", "any"]


@dataclasses.dataclass(frozen=True, order=True)
class Thing:
    """One object; `position` counts the cells of the grid row by row."""

    position: int
    shape: str
    colour: str
    size: str

    @property
    def pair(self) -> tuple[str, str]:
        return self.shape, self.colour


@dataclasses.dataclass(frozen=True)
class Scene:
    """All there is to know of a picture; `things` are in the order of their positions."""

    things: tuple[Thing, ...]
    background: str
    fill: str = "flat"
    style: str = "plain"


@dataclasses.dataclass(frozen=True)
class World:
    """What scenes are made of.

    Attributes:
      kinds: what examples are: edits, or "caption" for text to image; each as often as the others.
    """

    size_px: int = 64
    shapes: tuple[str, ...] = SHAPES
    colours: tuple[str, ...] = tuple(COLOURS)
    backgrounds: tuple[str, ...] = tuple(BACKGROUNDS)
    fills: tuple[str, ...] = FILLS
    max_things: int = 3
    kinds: tuple[str, ...] = OBJECT_EDITS + PICTURE_EDITS

    def __post_init__(self):
        for field, known in (
            ("shapes", SHAPES),
            ("colours", tuple(COLOURS)),
            ("backgrounds", tuple(BACKGROUNDS)),
            ("fills", FILLS),
            ("kinds", (*OBJECT_EDITS, *PICTURE_EDITS, CAPTION)),
        ):
            if unknown := sorted(set(getattr(self, field)) - set(known)):
                raise ValueError(f"{field}: no {', '.join(unknown)}; there are {', '.join(known)}")
        if len(self.shapes) < 2 or len(self.colours) < 2 or len(self.backgrounds) < 2:
            raise ValueError("a world needs two shapes, two colours and two backgrounds at least")
        if not 1 <= self.max_things <= len(POSITIONS):
            raise ValueError(f"max_things is {self.max_things}; it must be from 1 to 9")
        if self.size_px % 16 or self.size_px < 32:
            raise ValueError(f"size_px is {self.size_px}; it must be a multiple of 16, 32 or more")

    @property
    def styles(self) -> tuple[str, ...]:
        """Styles that pictures of this world can have."""
        return "plain", *(style for kind, style in STYLE_OF_EDIT.items() if kind in self.kinds)

    @functools.cached_property
    def held_out_pairs(self) -> frozenset[tuple[str, str]]:
        """One in five pairs (shape, colour)."""
        return _lowest_fifth(itertools.product(self.shapes, self.colours))

    @functools.cached_property
    def held_out_positions(self) -> frozenset[tuple[str, int]]:
        """One in five positions for each kind of edit of an object."""
        cells = range(len(POSITIONS))
        fifths = (_lowest_fifth((kind, cell) for cell in cells) for kind in OBJECT_EDITS)
        return frozenset().union(*fifths)


_EASY_KINDS = ("recolor", "remove", "add", "move", "swap", "background", "keep")
_EASY = World(
    shapes=SHAPES[:4],
    colours=tuple(COLOURS)[:4],
    fills=("flat",),
    max_things=2,
    kinds=_EASY_KINDS,
)
WORLDS = {
    "easy": _EASY,
    "full": World(),
    "easy-captions": dataclasses.replace(_EASY, kinds=(CAPTION,)),
    # Captioned pictures of up to nine objects, from which an autoencoder learns sooner.
    "easy-crowded": dataclasses.replace(_EASY, max_things=9, kinds=(CAPTION,)),
    "full-crowded": World(max_things=9, kinds=(CAPTION,)),
}


def _lowest_fifth(combinations) -> frozenset:
    def rank(combination) -> bytes:
        return hashlib.sha256(" ".join(map(str, combination)).encode()).digest()

    ranked = sorted(combinations, key=rank)
    return frozenset(ranked[: round(len(ranked) / 5)])


# Pictures


def _distance(shape: str, x: np.ndarray, y: np.ndarray, r: float) -> np.ndarray:
    """Signed distance in pixels to the outline of a shape of radius r, negative inside; y down."""
    ax, ay = np.abs(x), np.abs(y)
    if shape == "circle":
        return np.hypot(x, y) - r
    if shape == "square":
        return np.maximum(ax, ay) - 0.85 * r
    if shape == "triangle":
        return np.maximum(y - 0.7 * r, (1.7 * ax - 0.95 * (y + r)) / np.hypot(1.7, 0.95))
    if shape == "cross":
        bar = 0.34 * r
        return np.minimum(np.maximum(ax - r, ay - bar), np.maximum(ax - bar, ay - r))
    if shape == "diamond":
        return (ax + ay - r) / np.sqrt(2)
    return np.abs(np.hypot(x, y) - 0.7 * r) - 0.28 * r  # ring


def coverage(shape: str, size: str, position: int, size_px: int) -> np.ndarray:
    """How much of each pixel an object covers: float32 [size_px, size_px, 1] in [0, 1]."""
    return coverage_of(shape, size, position, size_px, size_px)


@functools.cache
def coverage_of(shape: str, size: str, position: int, width_px: int, height_px: int) -> np.ndarray:
    """As `coverage`, in a picture that need not be square: float32 [height, width, 1]."""
    row, column = divmod(position, 3)
    centre_x = (12 + 20 * column) * width_px / 64 - 0.5
    centre_y = (12 + 20 * row) * height_px / 64 - 0.5
    radius = SIZES[size] * min(width_px, height_px) / 64
    y, x = np.mgrid[:height_px, :width_px].astype(np.float32)
    distance = _distance(shape, x - centre_x, y - centre_y, radius)
    return np.clip(0.5 - distance, 0, 1).astype(np.float32)[..., None]


@functools.cache
def backdrop(background: str, fill: str, size_px: int) -> np.ndarray:
    """Float32 [height, width, 3] in [0, 255]."""
    y, x = np.mgrid[:size_px, :size_px].astype(np.float32) / size_px
    if fill == "gradient":
        light = 20 * (2 * y - 1)
    elif fill == "texture":
        light = 14 * np.sin(2 * np.pi * 8 * (x + y))
    else:
        light = np.zeros_like(x)
    return np.clip(np.float32(BACKGROUNDS[background]) + light[..., None], 0, 255)


def restyle(pixels: np.ndarray, style: str) -> np.ndarray:
    """Float pixels in a style; inverting twice is the identity."""
    if style == "inverted":
        return 255 - pixels
    if style == "gray":
        luma = pixels @ np.float32((0.299, 0.587, 0.114))
        return np.repeat(luma[..., None], 3, axis=-1)
    return pixels


def render(scene: Scene, size_px: int = 64) -> np.ndarray:
    """The picture of a scene, anti-aliased: uint8 [size_px, size_px, 3]."""
    pixels = place_things(scene.things, backdrop(scene.background, scene.fill, size_px))
    return np.rint(restyle(pixels, scene.style)).astype(np.uint8)


def place_things(things: Sequence[Thing], behind: np.ndarray) -> np.ndarray:
    """Objects in front of any picture, float32 [height, width, 3] in [0, 255]; likewise back."""
    height, width = behind.shape[:2]
    for thing in things:
        covered = coverage_of(thing.shape, thing.size, thing.position, width, height)
        behind = behind + covered * (np.float32(COLOURS[thing.colour]) - behind)
    return behind


def change_mask(source: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Where an edit changes anything: bool [height, width]."""
    return (source != target).any(axis=-1)


# Examples


@dataclasses.dataclass(frozen=True)
class SceneExample:
    """An edit, or with no source a captioned picture.

    Attributes:
      id: says how to draw it again.
      kind: kind of edit, or "caption".
      text: the instruction or caption.
      position: the cell that an edit of an object is about, where it is moved to; None otherwise.
      pairs: (shape, colour) of the objects that it is about, before and after.
    """

    id: str
    kind: str
    source: Scene | None
    target: Scene
    text: str
    position: int | None
    pairs: frozenset[tuple[str, str]]


def caption(scene: Scene) -> str:
    """For instance "big red circle top left, small blue ring center, pink background"."""
    things = [f"{t.size} {t.colour} {t.shape} {POSITIONS[t.position]}" for t in scene.things]
    return ", ".join([*things, f"{scene.background} background"])


class SceneSource:
    """Examples of a world by index, drawn when asked for.

    Args:
      split: "train" and "seen" have no held-out combination anywhere, and differ in what is drawn;
        every example of "held_out" is about one. "any" is for autoencoders, which must be able to
        show every scene; no edit of it is learnt.
      count: how many there are.
    """

    def __init__(self, world: World, split: Split = "train", seed: int = 0, count: int = 100_000):
        if split not in (splits := get_args(Split)):
            raise ValueError(f"split is {split!r}; expected one of {', '.join(splits)}")
        self.world, self.split, self.seed, self.count = world, split, seed, count
        self._split_index = splits.index(split)
        pairs = sorted(itertools.product(world.shapes, world.colours))
        if split in ("train", "seen"):
            pairs = [pair for pair in pairs if pair not in world.held_out_pairs]
        self._pairs = pairs

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> SceneExample:
        if not 0 <= index < self.count:
            raise IndexError(f"index {index} of {self.count} scenes")
        rng = np.random.default_rng([self.seed, self._split_index, index])
        kind = _choose(rng, self.world.kinds)
        while True:
            example = self._draw(rng, kind, f"{self.split}-{self.seed}-{index}")
            if example is not None and self._belongs(example):
                return example

    def _belongs(self, example: SceneExample) -> bool:
        return self.split == "any" or self.is_held_out(example) == (self.split == "held_out")

    def is_held_out(self, example: SceneExample) -> bool:
        """Whether the example is about a combination that training never shows."""
        return bool(
            example.pairs & self.world.held_out_pairs
            or (example.kind, example.position) in self.world.held_out_positions
        )

    def _draw(self, rng: np.random.Generator, kind: str, name: str) -> SceneExample | None:
        """An example of a kind, or None if the scene that was drawn does not allow it."""
        scene = self._draw_scene(rng)
        if kind == CAPTION:
            pairs = frozenset(t.pair for t in scene.things)
            return SceneExample(name, kind, None, scene, caption(scene), None, pairs)
        if kind in PICTURE_EDITS:
            target, text = self._edit_picture(rng, kind, scene)
            pairs = frozenset(t.pair for t in scene.things)
            return SceneExample(name, kind, scene, target, text, None, pairs)
        return self.edit_object(rng, kind, scene, name)

    def _draw_scene(self, rng: np.random.Generator) -> Scene:
        world = self.world
        number = int(rng.integers(1, world.max_things + 1))
        cells = sorted(rng.choice(len(POSITIONS), number, replace=False).tolist())
        # No two objects alike, so that colour and shape say which one is meant.
        pairs = rng.choice(len(self._pairs), number, replace=False).tolist()
        things = [
            Thing(cell, *self._pairs[pair], _choose(rng, tuple(SIZES)))
            for cell, pair in zip(cells, pairs, strict=True)
        ]
        return Scene(tuple(things), _choose(rng, world.backgrounds), _choose(rng, world.fills))

    def _edit_picture(self, rng, kind: str, scene: Scene) -> tuple[Scene, str]:
        if kind == "background":
            others = [name for name in self.world.backgrounds if name != scene.background]
            name = _choose(rng, others)
            return dataclasses.replace(scene, background=name), f"make the background {name}"
        if kind == "keep":
            return scene, "keep the picture"
        text = "invert the picture" if kind == "invert" else "make the picture gray"
        return dataclasses.replace(scene, style=STYLE_OF_EDIT[kind]), text

    def edit_object(
        self, rng: np.random.Generator, kind: str, scene: Scene, name: str
    ) -> SceneExample | None:
        """An edit of one of OBJECT_EDITS of a scene, or None if what was drawn is impossible."""
        things = scene.things
        taken = {t.pair for t in things}
        free_pairs = [pair for pair in self._pairs if pair not in taken]
        free_cells = sorted(set(range(len(POSITIONS))) - {t.position for t in things})
        old = _choose(rng, things)
        before = f"the {old.colour} {old.shape}"
        if kind == "add":
            if len(things) == self.world.max_things:
                return None
            pair = _choose(rng, free_pairs)
            old, new = None, Thing(_choose(rng, free_cells), *pair, _choose(rng, tuple(SIZES)))
            text = f"add a {new.size} {new.colour} {new.shape} at the {POSITIONS[new.position]}"
        elif kind == "remove":
            new, text = None, f"remove {before}"
        elif kind == "move":
            new = dataclasses.replace(old, position=_choose(rng, free_cells))
            text = f"move {before} to the {POSITIONS[new.position]}"
        elif kind == "resize":
            new = dataclasses.replace(old, size="small" if old.size == "big" else "big")
            text = f"make {before} {'bigger' if new.size == 'big' else 'smaller'}"
        else:
            same = 0 if kind == "recolor" else 1  # what of (shape, colour) stays
            pairs = [pair for pair in free_pairs if pair[same] == old.pair[same]]
            if not pairs:
                return None
            shape, colour = _choose(rng, pairs)
            new = dataclasses.replace(old, shape=shape, colour=colour)
            text = (
                f"make {before} {colour}" if kind == "recolor" else f"turn {before} into a {shape}"
            )
        rest = tuple(t for t in things if t != old)
        target = dataclasses.replace(
            scene, things=tuple(sorted((*rest, new) if new is not None else rest))
        )
        about = [t for t in (old, new) if t is not None]
        pairs = frozenset(t.pair for t in about)
        return SceneExample(name, kind, scene, target, text, about[-1].position, pairs)


def _choose(rng: np.random.Generator, options: Sequence):
    return options[int(rng.integers(len(options)))]
