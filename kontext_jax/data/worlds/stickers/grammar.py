"""Wordings of instructions: templates whose gaps are filled by the edit, or by a word at random.

A gap in capitals is one of VERBS, drawn; all others are given by the edit.
"""

from collections.abc import Mapping

from kontext_jax.data.worlds.stickers.layout import Draw

VERBS: Mapping[str, tuple[str, ...]] = {
    "REMOVE": ("remove", "delete", "erase", "take away", "get rid of", "drop"),
    "ADD": ("add", "put", "place", "draw", "insert"),
    "REPLACE": ("replace", "substitute"),
    "CHANGE": ("change", "turn", "transform"),
    "PAINT": ("make", "paint", "color", "turn"),
    "MOVE": ("move", "shift", "bring", "push", "take"),
    "SHOW": ("show", "draw", "paint", "make a picture of", "give me"),
    "WRITE": ("write", "put", "print"),
    "REDRAW": ("redraw", "draw", "render", "repaint", "show"),
    "PICTURE": ("picture", "image", "scene"),
    "BACKGROUND": ("background", "backdrop"),
    "STYLE": ("style", "look"),
    "MARKED": ("marked", "highlighted"),
    "POLITE": ("", "", "", "", "please ", "now ", "could you ", "I want you to "),
}

TEMPLATES: Mapping[str, tuple[str, ...]] = {
    "replace": (
        "{REPLACE} {it} with {new}",
        "{CHANGE} {it} into {new}",
        "there should be {new} in place of {it}",
        "{it} should become {new}",
        "instead of {it}, {ADD} {new}",
    ),
    "remove": (
        "{REMOVE} {it}",
        "{REMOVE} {it} from the {PICTURE}",
        "show the {PICTURE} without {it}",
        "make {it} disappear",
        "there should be no {noun} any more",
    ),
    "add": (
        "{ADD} {new} {at}",
        "{at}, {ADD} {new}",
        "there should also be {new} {at}",
        "the {PICTURE} needs {new} {at}",
    ),
    "recolor": (
        "{PAINT} {it} {color}",
        "change the color of {it} to {color}",
        "{it} should be {color}",
        "give {it} a {color} color",
    ),
    "enlarge": (
        "make {it} bigger",
        "make {it} larger",
        "enlarge {it}",
        "{it} should be bigger",
        "let {it} grow",
    ),
    "shrink": (
        "make {it} smaller",
        "shrink {it}",
        "{it} should be smaller",
        "reduce the size of {it}",
    ),
    "move": (
        "{MOVE} {it} to the {position}",
        "{it} should be {at}",
        "put {it} {at} instead",
        "{MOVE} {it} so that it is {at}",
    ),
    "exchange": (
        "let {it} and {other} change places",
        "exchange the places of {it} and {other}",
        "swap {it} and {other}",
        "put {it} in the place of {other}, and the other way around",
    ),
    "count": (
        "there are now {number} {nouns}",
        "there are now {number} of these {nouns}",
        "make it {number} {nouns}",
        "{ADD} more {nouns} until there are {number}",
        "{number} {nouns} in place of one",
    ),
    "look": ("{POLITE}{look}",),
    "backdrop": (
        "change the {BACKGROUND} to {behind}",
        "make the {BACKGROUND} {behind}",
        "{REPLACE} the {BACKGROUND} with {behind}",
        "{behind} should be behind everything",
    ),
    "photo": (
        "use the second {PICTURE} as the {BACKGROUND}",
        "put what is in the first {PICTURE} in front of the second one",
        "{REPLACE} the {BACKGROUND} with the second {PICTURE}",
        "the second {PICTURE} should be behind everything",
    ),
    "word": (
        'change the word on the sign to "{word}"',
        'the sign should say "{word}"',
        '{REPLACE} "{old}" with "{word}"',
        '{WRITE} "{word}" on the sign instead of "{old}"',
        'change the text from "{old}" to "{word}"',
    ),
    "spelling": (
        "fix the spelling on the sign",
        "correct the mistake on the sign",
        'the sign is misspelled, it should say "{word}"',
        'correct "{old}" to "{word}"',
        'fix the spelling of "{word}"',
    ),
    "write": (
        '{WRITE} "{word}" on the sign',
        '{WRITE} the word "{word}" on the empty sign',
        'the empty sign should say "{word}"',
    ),
    "redraw": (
        "{REDRAW} the {PICTURE} {hand}",
        "{REDRAW} everything {hand}",
        "the same {PICTURE} {hand}",
        "{CHANGE} the things in the {PICTURE}, {hand}",
    ),
    "redraw one": (
        "{REDRAW} {it} {hand}",
        "{it} {hand}, and the rest as it is",
        "show only {it} {hand}",
    ),
    "hand of": (
        "{REDRAW} the first {PICTURE} in the {STYLE} of the second",
        "use the {STYLE} of the second {PICTURE} for the first one",
        "{REDRAW} the first {PICTURE} as if it were drawn like the second one",
    ),
    "draw like": (
        "{SHOW} {new} in the {STYLE} of this {PICTURE}",
        "in the same {STYLE}, {SHOW} {new}",
        "using this {STYLE}, {SHOW} {new}",
        "{new} drawn like this",
    ),
    "elsewhere": (
        "{SHOW} {this} {where}",
        "{this} {where}",
        "put {this} {where}",
        "bring {this} to another place: {where}",
    ),
    "beside": (
        "{SHOW} {this} beside {new}{where}",
        "{this} next to {new}{where}",
        "{SHOW} {this} together with {new} on the right{where}",
        "{this} meets {new}{where}",
    ),
    "at a size": (
        "{SHOW} {this} {size} {where}",
        "{this}, but {size}, {where}",
        "{SHOW} {this} {where}, {size} this time",
    ),
    "together": (
        "{SHOW} {this} and {other} together {where}",
        "{this} of the first {PICTURE} and {other} of the second meet {where}",
        "{this} on the left and {other} on the right, {where}",
        "put both of them together {where}",
    ),
    "marked remove": (
        "{REMOVE} {meant}",
        "{REMOVE} {meant} from the {PICTURE}",
        "make {meant} disappear",
    ),
    "marked replace": (
        "{REPLACE} {meant} with {new}",
        "{CHANGE} {meant} into {new}",
        "{meant} should become {new}",
    ),
    "marked recolor": (
        "{PAINT} {meant} {color}",
        "change the color of {meant} to {color}",
        "{meant} should be {color}",
    ),
    "marked enlarge": (
        "make {meant} bigger",
        "enlarge {meant}",
        "{meant} should be larger",
    ),
    "marked add": (
        "{ADD} {new} {inside}",
        "there should be {new} {inside}",
        "{inside}, {ADD} {new}",
    ),
}

LOOK_WORDINGS: Mapping[str, tuple[str, ...]] = {
    "night": ("make it night", "turn day into night", "let the night fall"),
    "winter": ("make it winter", "let it snow", "add falling snow"),
    "rain": ("make it rain", "let it rain", "add rain"),
    "sunset": ("make it sunset", "use the warm light of a sunset", "let the sun go down"),
    "fog": ("add fog", "make it foggy", "put everything in the mist"),
    "sepia": ("make it sepia", "make it look like an old brown photograph", "apply a sepia tone"),
    "gray": ("make it black and white", "take all colors away", "make everything gray"),
    "negative": ("make it a negative", "invert the colors", "turn all colors into their opposites"),
    "blur": ("blur it", "make everything blurry", "make it out of focus"),
    "pixelated": ("pixelate it", "make the pixels large", "show it as a mosaic"),
    "poster": ("use only a few colors", "make it a poster", "posterize it"),
    "bright": ("make it brighter", "add more light", "lighten everything"),
    "dark": ("make it darker", "use less light", "darken everything"),
    "mirror": ("mirror it", "flip it from left to right", "show it as in a mirror"),
    "upside down": ("turn it upside down", "flip it from top to bottom", "stand it on its head"),
}


class _Gaps(dict):
    """Gaps of a template: what an edit gave, and verbs drawn when asked for."""

    def __init__(self, draw: Draw, given: Mapping[str, str]):
        super().__init__(given)
        self._draw = draw

    def __missing__(self, gap: str) -> str:
        return self._draw.choose(VERBS[gap])


def write(draw: Draw, instruction: str, given: Mapping[str, str]) -> str:
    """A wording of an instruction, drawn at random.

    Args:
      given: what stands in the gaps that are not in capitals.

    Raises:
      KeyError: a gap is neither given nor one of VERBS.
    """
    template = draw.choose(TEMPLATES[instruction])
    if not template.startswith("{POLITE}") and template.startswith(tuple(_OPENINGS)):
        template = "{POLITE}" + template
    return template.format_map(_Gaps(draw, given))


# Templates that start with a verb may be preceded by a polite word.
_OPENINGS = (
    *("{REPLACE}", "{CHANGE}", "{REMOVE}", "{ADD}", "{PAINT}", "{MOVE}", "{SHOW}", "{WRITE}"),
    *(
        "{REDRAW}",
        "make ",
        "put ",
        "change ",
        "fix ",
        "enlarge ",
        "shrink ",
        "use ",
        "swap ",
        "let ",
    ),
)


def vocabulary() -> frozenset[str]:
    """Words of all templates, verbs and looks; nouns, places and colours come on top."""
    texts = [text for texts in TEMPLATES.values() for text in texts]
    texts += [text for texts in (*VERBS.values(), *LOOK_WORDINGS.values()) for text in texts]
    words = " ".join(texts).replace(",", " ").replace(":", " ").replace('"', " ").split()
    return frozenset(word for word in words if "{" not in word)
