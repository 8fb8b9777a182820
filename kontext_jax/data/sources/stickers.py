"""The sticker world as a data source: examples without files, "stickers:WORLD:SPLIT:COUNT".

For instance "stickers:edits:train:512": the first 512 edits of the training split. WORLD is one of
`stickers.examples.WORLDS`: "edits", one kind of them ("local", "cue"), "captions", or "pictures"
for an autoencoder. "edits-256" draws the same at 256 × 256 in place of 128 × 128.
"""

import re
from collections.abc import Sequence

from etils import epath

from kontext_jax.data.sources.crops import picture_in_memory
from kontext_jax.data.sources.examples import ColumnNames, Example, ImageRef, Source, digest
from kontext_jax.data.worlds import photos
from kontext_jax.data.worlds.stickers.drawings import open_drawings
from kontext_jax.data.worlds.stickers.examples import WORLDS, StickerExamples
from kontext_jax.data.worlds.stickers.render import Renderer
from kontext_jax.data.worlds.stickers.scene import Scene

PREFIX = "stickers:"
_PATH = re.compile(rf"{PREFIX}({'|'.join(WORLDS)})(?:-(128|256))?:(train|seen|held_out|any):(\d+)")


def is_stickers(path: str) -> bool:
    return path.startswith(PREFIX)


class StickerSource(Source):
    """Examples of the sticker world, drawn when they are asked for.

    Raises:
      ValueError: the path names no world, split and number.
      FileNotFoundError: the drawings were never fetched.
    """

    files: Sequence[epath.Path] = ()
    columns = ColumnNames(target="target", contexts=("first", "second"), text="text", id="id")

    def __init__(self, path: str, name: str):
        match = _PATH.fullmatch(path)
        if match is None:
            raise ValueError(
                f"data source {path}: expected stickers:WORLD:SPLIT:COUNT with WORLD one of "
                f"{', '.join(WORLDS)} and SPLIT train, seen, held_out or any, such as "
                "stickers:edits:train:512"
            )
        world, side_px, split, count = match.groups()
        self.name = name
        drawings = open_drawings()
        self._examples = StickerExamples(WORLDS[world], drawings, split, count=int(count))
        self._render = Renderer(drawings, int(side_px or 128))

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> Example:
        example = self._examples[index]
        draft, full_id = example.draft, f"{self.name}/{example.id}"
        before = tuple(self._picture(scene, full_id) for scene in draft.sources)
        return Example(full_id, self._picture(draft.target, full_id), before, draft.text)

    def _picture(self, scene: Scene, name: str) -> ImageRef:
        return picture_in_memory(self._render(scene), name)

    def identity(self) -> str:
        """Changes with what is asked for, the drawings and the photographs."""
        examples = self._examples
        facts = (examples.world, examples.split, examples.seed, len(examples), self._render.side_px)
        pictures = examples.drawings.identity(), photos.photos_identity(photos.PHOTOS)
        return digest(*pictures, *map(repr, facts))
