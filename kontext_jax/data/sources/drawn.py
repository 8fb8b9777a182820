"""Drawn scenes as a data source: examples without files, "scenes:WORLD:SPLIT:COUNT".

For instance "scenes:easy:train:512": the first 512 examples of that world's training split, both
edits and captioned pictures.
"""

import dataclasses
from collections.abc import Sequence

from etils import epath

from kontext_jax.data.sources.crops import picture_in_memory
from kontext_jax.data.sources.examples import ColumnNames, Example, ImageRef, Source, digest
from kontext_jax.data.worlds.scenes import CAPTION, WORLDS, Scene, SceneSource, render

PREFIX = "scenes:"


def is_scenes(path: str) -> bool:
    return path.startswith(PREFIX)


class DrawnSource(Source):
    """Examples of a world, drawn when they are asked for.

    Raises:
      ValueError: the path names no world, split and number.
    """

    files: Sequence[epath.Path] = ()
    columns = ColumnNames(target="target", contexts=("source",), text="text", id="id")

    def __init__(self, path: str, name: str):
        parts = path.removeprefix(PREFIX).split(":")
        if len(parts) != 3 or parts[0] not in WORLDS or not parts[2].isdecimal():
            raise ValueError(
                f"data source {path}: expected scenes:WORLD:SPLIT:COUNT with WORLD one of "
                f"{', '.join(WORLDS)}, such as scenes:easy:train:512"
            )
        world = WORLDS[parts[0]]
        if CAPTION not in world.kinds:
            world = dataclasses.replace(world, kinds=(*world.kinds, CAPTION))
        self.name = name
        self._scenes = SceneSource(world, parts[1], count=int(parts[2]))

    def __len__(self) -> int:
        return len(self._scenes)

    def __getitem__(self, index: int) -> Example:
        example = self._scenes[index]
        full_id = f"{self.name}/{example.id}"
        before = () if example.source is None else (self._picture(example.source, full_id),)
        return Example(full_id, self._picture(example.target, full_id), before, example.text)

    def _picture(self, scene: Scene, name: str) -> ImageRef:
        return picture_in_memory(render(scene, self._scenes.world.size_px), name)

    def identity(self) -> str:
        scenes = self._scenes
        return digest(repr(scenes.world), scenes.split, str(scenes.seed), str(len(scenes)))
