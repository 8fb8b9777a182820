"""What an edit hands over: pictures as scenes, the instruction, and whom they are about."""

import dataclasses

from kontext_jax.data.worlds.stickers import hold_out
from kontext_jax.data.worlds.stickers.scene import Scene


@dataclasses.dataclass(frozen=True)
class Draft:
    """An example without a name.

    Attributes:
      instruction: which of `grammar.TEMPLATES` it is, or "caption".
      sources: reference pictures in order; none for a caption.
      target: the picture to be made.
      text: instruction or caption.
      subjects: names of the objects that the instruction is about.
      hands: hands of what the instruction is about.
      words: right spellings of the words on signs before and after.
    """

    instruction: str
    sources: tuple[Scene, ...]
    target: Scene
    text: str
    subjects: tuple[str, ...] = ()
    hands: tuple[str, ...] = ()
    words: tuple[str, ...] = ()

    @property
    def novelties(self) -> frozenset[str]:
        """Which of `hold_out.NOVELTIES` it shows, so that training must not."""
        scenes = (*self.sources, self.target)
        names = {sticker.name for scene in scenes for sticker in scene.stickers}
        signs = {scene.sign.word for scene in scenes if scene.sign}
        photos = {scene.backdrop.name for scene in scenes if scene.backdrop.kind == "photo"}
        what = self.instruction
        found = {
            "object": any(map(hold_out.is_held_out_object, names)),
            "pair": any(hold_out.is_held_out_pair(name, what) for name in self.subjects),
            "hand": any(hold_out.is_held_out_hand(hand, what) for hand in self.hands),
            "word": any(map(hold_out.is_held_out_word, signs | set(self.words))),
            "photo": not photos.isdisjoint(hold_out.photo_names(True)),
        }
        return frozenset(name for name, is_found in found.items() if is_found)
