"""Examples of the sticker world by index, drawn when asked for.

An example is a function of (world, split, seed, index) and of the file of drawings. Splits: "train"
and "seen" show nothing that `hold_out` keeps back, and differ in what is drawn; every example of
"held_out" shows exactly one sort of it in what its instruction is about; "any" is for autoencoders.
"""

import dataclasses
import functools
import itertools
from typing import Literal, get_args

import numpy as np

from kontext_jax.data.worlds.stickers import hold_out
from kontext_jax.data.worlds.stickers.catalogue import OBJECTS
from kontext_jax.data.worlds.stickers.draft import Draft
from kontext_jax.data.worlds.stickers.drawings import Drawings
from kontext_jax.data.worlds.stickers.edits_cue import CUE
from kontext_jax.data.worlds.stickers.edits_global import GLOBAL
from kontext_jax.data.worlds.stickers.edits_local import LOCAL, Edit
from kontext_jax.data.worlds.stickers.edits_reference import CHARACTER, STYLE
from kontext_jax.data.worlds.stickers.edits_text import TEXT
from kontext_jax.data.worlds.stickers.layout import Draw, Pool
from kontext_jax.data.worlds.stickers.phrases import caption
from kontext_jax.data.worlds.stickers.words import WORDS

Split = Literal["train", "seen", "held_out", "any"]
CAPTION, PICTURE = "caption", "picture"
_MOST_ATTEMPTS = 50  # with one instruction: some have no held-out hand, for instance
# What the "held_out" examples of a kind may show that training does not.
NOVELTIES: dict[str, tuple[str, ...]] = {
    "local": ("object", "pair", "hand"),
    "global": ("object", "hand", "photo"),
    "text": ("word",),
    "style": ("object", "pair", "hand"),
    "character": ("object", "pair", "hand"),
    "cue": ("object", "pair", "hand"),
    CAPTION: ("object", "photo"),
    PICTURE: ("object", "word", "photo"),
}


def draw_caption(draw: Draw) -> Draft | None:
    """A picture and a full description of it."""
    scene = draw.scene(sign=0.2)
    return Draft(CAPTION, (), scene, caption(draw, scene))


def draw_picture(draw: Draw) -> Draft | None:
    """Any picture that edits start from or end with, marks included, for autoencoders."""
    draft = draw.choose(tuple(KINDS[draw.choose(EDIT_KINDS)].values()))(draw)
    if draft is None:
        return None
    return Draft(PICTURE, (), draw.choose((*draft.sources, draft.target)), "a picture")


KINDS: dict[str, dict[str, Edit]] = {
    "local": LOCAL,
    "global": GLOBAL,
    "text": TEXT,
    "style": STYLE,
    "character": CHARACTER,
    "cue": CUE,
    CAPTION: {CAPTION: draw_caption},
    PICTURE: {PICTURE: draw_picture},
}
EDIT_KINDS = tuple(kind for kind in KINDS if kind not in (CAPTION, PICTURE))


@dataclasses.dataclass(frozen=True)
class World:
    """Which kinds of examples there are, each as often as it is named."""

    kinds: tuple[str, ...] = EDIT_KINDS

    def __post_init__(self):
        if unknown := sorted(set(self.kinds) - KINDS.keys()):
            raise ValueError(f"kinds: no {', '.join(unknown)}; there are {', '.join(KINDS)}")


WORLDS = {
    "edits": World(),
    "captions": World((CAPTION,)),
    "pictures": World((PICTURE,)),
    **{kind: World((kind,)) for kind in EDIT_KINDS},
}


@dataclasses.dataclass(frozen=True)
class StickerExample:
    """An edit or a captioned picture.

    Attributes:
      id: says how to draw it again.
      kind: one of KINDS.
      draft: scenes, text and whom the instruction is about.
    """

    id: str
    kind: str
    draft: Draft


class StickerExamples:
    """Examples by index.

    Args:
      drawings: what objects look like; decides which colours they can be given.
      count: how many examples there are.

    Raises:
      ValueError: there is no such split.
    """

    def __init__(
        self,
        world: World,
        drawings: Drawings,
        split: Split = "train",
        seed: int = 0,
        count: int = 1_000_000,
    ):
        if split not in (splits := get_args(Split)):
            raise ValueError(f"split is {split!r}; expected one of {', '.join(splits)}")
        self.world, self.drawings, self.split = world, drawings, split
        self.seed, self.count = seed, count
        self._split_index = splits.index(split)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> StickerExample:
        if not 0 <= index < self.count:
            raise IndexError(f"index {index} of {self.count} examples")
        rng = np.random.default_rng([self.seed, self._split_index, index])
        kind = self.world.kinds[int(rng.integers(len(self.world.kinds)))]
        edits = tuple(KINDS[kind].values())
        novelty = ""
        if self.split == "held_out":
            novelty = NOVELTIES[kind][int(rng.integers(len(NOVELTIES[kind])))]
        draw = Draw(rng, _pool(novelty if self.split != "any" else "any"), self.drawings)
        for attempt in itertools.count():
            if attempt % _MOST_ATTEMPTS == 0:
                edit = edits[int(rng.integers(len(edits)))]
            draft = edit(draw)
            if draft is not None and self._belongs(draft, novelty):
                return StickerExample(f"{self.split}-{self.seed}-{index}", kind, draft)

    def _belongs(self, draft: Draft, novelty: str) -> bool:
        if self.split == "any":
            return True
        if draft.novelties != ({novelty} if novelty else set()):
            return False
        if novelty == "word" and draft.words:
            return hold_out.is_held_out_word(draft.words[-1])
        if novelty != "object" or not draft.subjects:
            return True
        return any(map(hold_out.is_held_out_object, draft.subjects))


@functools.cache
def _pool(novelty: str) -> Pool:
    """What may be drawn: trained things, or for a novelty as many held-out ones besides."""
    trained = tuple(kind.name for kind in hold_out.TRAINED_OBJECTS)
    words = tuple(word for word in WORDS if not hold_out.is_held_out_word(word))
    photos = hold_out.photo_names(False)
    if novelty == "any":
        everything = tuple(kind.name for kind in OBJECTS)
        return Pool(everything, WORDS, (*photos, *hold_out.photo_names(True)))
    if novelty == "object":
        held_out = tuple(sorted(hold_out.HELD_OUT_OBJECTS))
        trained = (*trained, *held_out * (len(trained) // len(held_out)))
    if novelty == "word":
        held_out_words = tuple(sorted(hold_out.HELD_OUT_WORDS))
        words = (*words, *held_out_words * (len(words) // len(held_out_words)))
    if novelty == "photo":
        photos = hold_out.photo_names(True)
    return Pool(trained, words, photos)
