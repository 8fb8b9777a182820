"""Rotary positions over three axes (index, row, column), in half-split channel order.

    angle[s, p] = ids[s, axis(p)] · theta^(−2j/d)      j-th pair of an axis that owns d channels
    out[p]        = cos·x[p] − sin·x[p + Dh/2]         p = 0 … Dh/2 − 1
    out[p + Dh/2] = sin·x[p] + cos·x[p + Dh/2]

The published networks pair neighbouring channels (2p, 2p + 1); the converter moves them to
(p, p + Dh/2), which leaves dot products unchanged and lets the rotation read contiguous halves.
Positions are known before tracing, so tables are made by NumPy on the host.
"""

from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np


def rope_table(
    ids: np.ndarray,
    axes_dim: Sequence[int],
    theta: float,
    precision: Literal["float64", "float32"] = "float64",
    ids_dtype=None,
) -> np.ndarray:
    """Cosines and sines for positions [..., S, 3]: float32 [..., 2, S, Dh/2].

    Args:
      axes_dim: channels of a head that each axis owns; even, with sum Dh.
      precision: of frequencies and angles; diffusers computes them in float64, BFL in float32.
      ids_dtype: rounds the positions to this dtype first, as diffusers does (bfloat16 merges
        neighbours above 256); None leaves them.

    Raises:
      ValueError: if ids do not have one column per axis, an axis owns an odd number of channels, or
        the precision is unknown.
    """
    ids = np.asarray(ids)
    if ids.shape[-1] != len(axes_dim):
        raise ValueError(
            f"ids have {ids.shape[-1]} columns; axes_dim {axes_dim} needs one per axis"
        )
    if any(d % 2 for d in axes_dim):
        raise ValueError(f"axes_dim {axes_dim} must be even")
    if precision not in ("float64", "float32"):
        raise ValueError(f"unknown RoPE precision {precision!r}; choose float64 or float32")
    if ids_dtype is not None:
        ids = ids.astype(ids_dtype)
    ids = ids.astype(precision)
    angles = []
    for axis, dim in enumerate(axes_dim):
        exponent = np.arange(0, dim, 2, dtype=precision) / np.asarray(dim, precision)
        frequencies = 1 / np.asarray(theta, precision) ** exponent
        angles.append(ids[..., axis, None] * frequencies)
    angles = np.concatenate(angles, axis=-1)
    return np.stack([np.cos(angles), np.sin(angles)], axis=-3).astype(np.float32)


def apply_rope(x: jax.Array, table: jax.Array) -> jax.Array:
    """Rotates the channel pairs (p, p + Dh/2) of each head by its token's angles, in float32.

    Args:
      x: [B, H, S, Dh].
      table: [2, S, Dh/2] for the whole batch or [B, 2, S, Dh/2], from `rope_table`.

    Returns:
      [B, H, S, Dh] in the dtype of x.
    """
    cos, sin = table[..., None, 0, :, :], table[..., None, 1, :, :]  # [(B,) 1, S, Dh/2]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([cos * first - sin * second, sin * first + cos * second], axis=-1)
    return rotated.astype(x.dtype)
