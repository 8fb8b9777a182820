"""How things, places, hands and pictures are spoken of."""

from collections.abc import Mapping, Sequence

from kontext_jax.data.worlds.stickers import places
from kontext_jax.data.worlds.stickers.backdrops import PHOTO_NAMES
from kontext_jax.data.worlds.stickers.catalogue import by_name
from kontext_jax.data.worlds.stickers.layout import Draw
from kontext_jax.data.worlds.stickers.scene import POSITIONS, Backdrop, Scene, Sign, Sticker

AT = {
    "left": "on the left",
    "right": "on the right",
    "middle": "in the middle",
    **{name: f"at the {name}" for name in POSITIONS if name not in ("left", "right", "middle")},
}
HAND_ADJECTIVES: Mapping[str, str] = {
    "3d": "3D",
    "flat": "flat",
    "cartoon": "cartoon",
    "simple": "simple",
    "pixel": "pixel art",
    "ink": "ink",
}
HAND_PHRASES: Mapping[str, tuple[str, ...]] = {
    "3d": ("in 3D", "as a 3D rendering", "in the 3D style"),
    "flat": ("in the flat style", "as flat shapes", "with flat colors"),
    "cartoon": ("as a cartoon", "in the cartoon style", "like a cartoon"),
    "simple": ("as a simple icon", "in the simple style", "like a simple icon"),
    "pixel": ("as pixel art", "in the pixel art style", "like pixels in an old game"),
    "ink": ("as an ink drawing", "in ink on paper", "as a line drawing"),
}
NUMBERS = {2: "two", 3: "three", 4: "four"}


def article(words: str) -> str:
    """The words after "a" or "an"."""
    is_vowel = words[0] in "aeio" or (words[0] == "u" and not words.startswith(("uni", "ufo")))
    return f"{'an' if is_vowel else 'a'} {words}"


def a(draw: Draw, name: str, *adjectives: str) -> str:
    """An object that is not there yet: "a big dog", "some grapes"."""
    kind = by_name()[name]
    noun = " ".join([*(word for word in adjectives if word), _noun(draw, name)])
    return f"some {noun}" if kind.is_plural else article(noun)


def _noun(draw: Draw, name: str, probability: float = 0.3) -> str:
    kind = by_name()[name]
    return draw.choose(kind.names) if draw.chance(probability) else name


def the(draw: Draw, sticker: Sticker, scene: Scene | None = None) -> str:
    """An object that is there: "the cat", "the blue car on the left", "the 3D dog"."""
    words = ["the"]
    if sticker.colour and draw.chance(0.6):
        words.append(sticker.colour)
    elif draw.chance(0.08):
        words.append(HAND_ADJECTIVES[sticker.hand])
    words.append(_noun(draw, sticker.name))
    if scene is not None and draw.chance(0.15):
        words.append(AT[POSITIONS[sticker.cell]])
    return " ".join(words)


def this(draw: Draw, sticker: Sticker) -> str:
    """The object of a reference: "this cat", "the same car"."""
    is_many = by_name()[sticker.name].is_plural and sticker.name.endswith("s")
    first = draw.choose(("these" if is_many else "this", "the same"))
    return f"{first} {_noun(draw, sticker.name)}"


def plural(name: str) -> str:
    return by_name()[name].plural


def backdrop_noun(backdrop: Backdrop) -> str:
    """For instance "the sea", "white dots on blue", "a photograph of coins"."""
    if backdrop.kind == "place":
        return places.phrase(backdrop.name)[1]
    if backdrop.kind == "photo":
        return f"a photograph of {PHOTO_NAMES[backdrop.name]}"
    if backdrop.kind == "plain":
        return f"plain {backdrop.colours[0]}"
    first, second = backdrop.colours
    if backdrop.kind == "pattern":
        return f"{second} {backdrop.name} on {first}"
    ends = {
        "down": ("at the top", "at the bottom"),
        "right": ("on the left", "on the right"),
        "round": ("in the middle", "outside"),
    }[backdrop.name]
    return f"{first} {ends[0]} and {second} {ends[1]}"


def before(backdrop: Backdrop) -> str:
    """For instance "on the beach", "in front of white dots on blue"."""
    if backdrop.kind == "place":
        return " ".join(places.phrase(backdrop.name))
    if backdrop.kind == "gradient":
        return f"on a background {backdrop_noun(backdrop)}"
    return f"in front of {backdrop_noun(backdrop)}"


def enumerate_words(words: Sequence[str]) -> str:
    """For instance "a cat, a dog and a car"."""
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


_SIZE_WORDS = {"small": "small", "medium": "", "big": "big", "huge": "huge"}
_LOOK_PHRASES = {
    "plain": ("",),
    "night": ("at night", "in the dark of the night"),
    "winter": ("in winter", "while it snows"),
    "rain": ("in the rain", "while it rains"),
    "sunset": ("at sunset", "in the evening sun"),
    "sepia": ("in sepia", "as an old photograph"),
    "gray": ("in black and white", "without colors"),
}


def caption(draw: Draw, scene: Scene) -> str:
    """All that a picture shows: objects with size, colour, place and hand, sign, backdrop, look."""
    hands = {sticker.hand for sticker in scene.stickers}
    one_hand = len(hands) == 1
    stickers = list(scene.stickers)
    if draw.chance(0.3):
        stickers.sort(key=lambda sticker: sticker.cell)
    parts = []
    for sticker in stickers:
        hand = "" if one_hand else HAND_ADJECTIVES[sticker.hand]
        adjectives = (_SIZE_WORDS[sticker.size], sticker.colour, hand)
        words = a(draw, sticker.name, *adjectives)
        parts.append(f"{words} {AT[POSITIONS[sticker.cell]]}")
    if scene.sign is not None:
        parts.append(sign_phrase(scene.sign))
    things = enumerate_words(parts)
    look = draw.choose(_LOOK_PHRASES[scene.look])
    behind = before(scene.backdrop)
    hand = draw.choose(HAND_PHRASES[next(iter(hands))]) if one_hand else ""
    order = draw.choose(
        (
            (things, behind, look, hand),
            (hand, things, behind, look),
            (behind, things, look, hand),
            (things, hand, behind, look),
        )
    )
    text = ", ".join(part for part in order if part)
    opening = draw.choose(("", "", "a picture of ", "draw ")) if order[0] is things else ""
    return opening + text


def sign_phrase(sign: Sign) -> str:
    """For instance: a blue sign that says "OPEN"."""
    row = ("at the top", "in the middle", "at the bottom")[min(2, 3 * sign.centre[1] // 128)]
    if not sign.word:
        return f"an empty {sign.board} sign {row}"
    return f'{article(f"{sign.board} sign")} {row} that says "{sign.word}"'
