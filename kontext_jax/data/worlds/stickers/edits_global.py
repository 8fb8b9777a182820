"""Edits of a whole picture: its look, or what lies behind everything."""

import dataclasses

from kontext_jax.data.worlds.stickers.draft import Draft
from kontext_jax.data.worlds.stickers.edits_local import Edit
from kontext_jax.data.worlds.stickers.grammar import LOOK_WORDINGS, write
from kontext_jax.data.worlds.stickers.layout import Draw
from kontext_jax.data.worlds.stickers.phrases import backdrop_noun
from kontext_jax.data.worlds.stickers.scene import Scene


def _hands(scene: Scene) -> tuple[str, ...]:
    return tuple(sorted({sticker.hand for sticker in scene.stickers}))


def look(draw: Draw) -> Draft | None:
    scene = draw.scene(sign=0.12)
    name = draw.choose(tuple(LOOK_WORDINGS))
    if scene.look != "plain":
        return None
    target = dataclasses.replace(scene, look=name)
    text = write(draw, "look", {"look": draw.choose(LOOK_WORDINGS[name])})
    return Draft("look", (scene,), target, text, hands=_hands(scene))


def backdrop(draw: Draw) -> Draft | None:
    scene = draw.scene(sign=0.12)
    new = draw.backdrop("place", "place", "place", "plain", "pattern", "gradient")
    if new == scene.backdrop or scene.look != "plain":
        return None
    target = dataclasses.replace(scene, backdrop=new)
    text = write(draw, "backdrop", {"behind": backdrop_noun(new)})
    return Draft("backdrop", (scene,), target, text, hands=_hands(scene))


def photo(draw: Draw) -> Draft | None:
    """The backdrop is given by a second picture, a photograph with nothing on it."""
    scene, new = draw.scene(sign=0.12), draw.backdrop("photo")
    if scene.backdrop.kind == "photo" or scene.look != "plain":
        return None
    target = dataclasses.replace(scene, backdrop=new)
    text = write(draw, "photo", {})
    return Draft("photo", (scene, Scene((), new)), target, text, hands=_hands(scene))


GLOBAL: dict[str, Edit] = {"look": look, "backdrop": backdrop, "photo": photo}
