"""Reads a procedural scene back from pixels, by comparing with everything that it could be.

Exact on clean pictures of any world; `docs/learning.md` says how much noise it bears.
"""

import functools
import itertools

import numpy as np
from jaxtyping import UInt8

from kontext_jax.data.worlds.scenes import (
    COLOURS,
    POSITIONS,
    SHAPES,
    SIZES,
    Scene,
    Thing,
    World,
    backdrop,
    coverage,
    restyle,
)


@functools.cache
def _cell_slices(size_px: int) -> tuple[tuple[slice, slice], ...]:
    edges = [round((2 + 20 * i) * size_px / 64) for i in range(4)]
    spans = [slice(a, b) for a, b in itertools.pairwise(edges)]
    return tuple(itertools.product(spans, spans))


@functools.cache
def _gaps(size_px: int) -> np.ndarray:
    """Pixels that no object can cover: bool [height, width]."""
    covered = np.zeros((size_px, size_px), bool)
    for shape, position in itertools.product(SHAPES, range(len(POSITIONS))):
        covered |= coverage(shape, "big", position, size_px)[..., 0] > 0
    return ~covered


@functools.lru_cache(maxsize=512)
def _cell_templates(world: World, background: str, fill: str, style: str, cell: int):
    """What a cell can look like: what stands there, and float32 [K, pixels·3]."""
    behind = backdrop(background, fill, world.size_px)
    choices: list[tuple[str, str, str] | None] = [None]
    choices += itertools.product(world.shapes, world.colours, SIZES)
    looks = []
    for choice in choices:
        pixels = behind
        if choice is not None:
            covered = coverage(choice[0], choice[2], cell, world.size_px)
            pixels = behind + covered * (np.asarray(COLOURS[choice[1]], np.float32) - behind)
        looks.append(restyle(pixels, style)[_cell_slices(world.size_px)[cell]].ravel())
    return choices, np.stack(looks)


def parse(pixels: UInt8[np.ndarray, "size_px size_px 3"], world: World) -> Scene:
    """The scene of the world that a picture resembles most.

    For each style the background is what fits best where no object can be; then each cell of the
    grid is compared with everything that could stand in it. The style with the least squared
    difference wins; an empty scene, which may look alike in two, is plain.

    Args:
      pixels: uint8 [size_px, size_px, 3].

    Raises:
      ValueError: the picture has another size than the world's.
    """
    if pixels.shape != (world.size_px, world.size_px, 3):
        raise ValueError(
            f"a picture of shape {pixels.shape}; this world's are {world.size_px}×{world.size_px}"
        )
    seen = pixels.astype(np.float32)
    return min((_parse_style(seen, world, style) for style in world.styles), key=lambda p: p[1])[0]


def _parse_style(seen: np.ndarray, world: World, style: str) -> tuple[Scene, float]:
    """The most similar scene in a style, and the squared difference that remains."""
    gaps = _gaps(world.size_px)

    def misfit(choice: tuple[str, str]) -> float:
        expected = restyle(backdrop(*choice, world.size_px), style)
        return float(np.square(seen[gaps] - expected[gaps]).sum())

    background, fill = min(itertools.product(world.backgrounds, world.fills), key=misfit)
    remaining = misfit((background, fill))
    if style != "plain":
        remaining += seen.size  # one grey level everywhere
    things = []
    for cell, where in enumerate(_cell_slices(world.size_px)):
        choices, looks = _cell_templates(world, background, fill, style, cell)
        differences = np.square(looks - seen[where].ravel()).sum(axis=1)
        best = int(differences.argmin())
        remaining += float(differences[best])
        if choices[best] is not None:
            things.append(Thing(cell, *choices[best]))
    return Scene(tuple(things), background, fill, style), remaining
