"""Pictures of what a run has learnt: one example a row, reference | result | target."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from kontext_jax.batches import ImageBatch
from kontext_jax.pictures.latents import model_to_pixels
from kontext_jax.types import Float, UInt8

GAP_PX = 4
GAP_LEVEL = 128


def first_rows(batch: Any, count: int) -> Any:
    """The first `count` examples of a batch on the host."""
    if not isinstance(batch, ImageBatch):
        return jax.tree.map(lambda x: x[:count], batch)
    return dataclasses.replace(
        batch,
        ids=batch.ids[:count],
        target=batch.target[:count],
        contexts=tuple(context[:count] for context in batch.contexts),
        prompts=batch.prompts[:count],
    )


def make_grid(
    columns: Sequence[Float[np.ndarray, "B _ _ 3"]], num_rows: int
) -> UInt8[np.ndarray, "height width 3"]:
    """One picture of several columns of pictures.

    Args:
      columns: float32, about [-1, 1]; sizes may differ between columns.
      num_rows: number of the B to show at most.
    """
    cells = [model_to_pixels(column[:num_rows]) for column in columns]
    num_rows = len(cells[0])
    row_height = max(cell.shape[1] for cell in cells) + GAP_PX
    width = sum(cell.shape[2] + GAP_PX for cell in cells) - GAP_PX
    picture = np.full((num_rows * row_height - GAP_PX, width, 3), GAP_LEVEL, np.uint8)
    left = 0
    for cell in cells:
        _, height, cell_width, _ = cell.shape
        for row in range(num_rows):
            top = row * row_height
            picture[top : top + height, left : left + cell_width] = cell[row]
        left += cell_width + GAP_PX
    return picture
