"""What training never shows, as pure functions of names.

Five sorts: objects altogether; pairs of an object and an instruction; pairs of a hand and an
instruction; words; photographs (those of `photos.PHOTOS` that are held out).
"""

import hashlib

from kontext_jax.data.worlds import photos
from kontext_jax.data.worlds.stickers.backdrops import PHOTO_NAMES
from kontext_jax.data.worlds.stickers.catalogue import OBJECTS
from kontext_jax.data.worlds.stickers.words import WORDS

NOVELTIES = ("object", "pair", "hand", "word", "photo")

HELD_OUT_OBJECTS = frozenset(
    (
        *("fox", "cow", "giraffe", "hedgehog", "penguin", "parrot", "dolphin", "crab", "bee"),
        *("palm", "tulip"),
        *("strawberry", "pineapple", "carrot", "burger", "donut", "lemon"),
        *("bus", "bicycle", "helicopter", "sailboat"),
        *("guitar", "key", "chair", "camera", "crown", "hat", "robot"),
        *("castle", "moon"),
    )
)
TRAINED_OBJECTS = tuple(kind for kind in OBJECTS if kind.name not in HELD_OUT_OBJECTS)
_ONE_IN = {"pair": 10, "hand": 8, "word": 7}


def _is_drawn(sort: str, *names: str) -> bool:
    """True for one in `_ONE_IN[sort]` of all names, evenly and forever the same ones."""
    digest = hashlib.sha256(" ".join(("stickers", sort, *names)).encode()).digest()
    return int.from_bytes(digest[:8]) % _ONE_IN[sort] == 0


def is_held_out_object(name: str) -> bool:
    return name in HELD_OUT_OBJECTS


def is_held_out_pair(name: str, instruction: str) -> bool:
    """Whether no instruction of this sort is ever about the object; one in ten."""
    return _is_drawn("pair", name, instruction)


def is_held_out_hand(hand: str, instruction: str) -> bool:
    """Whether no instruction of this sort is ever about something by this hand; one in eight."""
    return _is_drawn("hand", hand, instruction)


HELD_OUT_WORDS = frozenset(word for word in WORDS if _is_drawn("word", word))


def is_held_out_word(word: str) -> bool:
    return word in HELD_OUT_WORDS


def photo_names(held_out: bool) -> tuple[str, ...]:
    """Names of the photographs that are held out, or of those that are not."""
    of_split = photos.photos_of(photos.HELD_OUT if held_out else "train")
    return tuple(photo.name for photo in of_split if photo.name in PHOTO_NAMES)
