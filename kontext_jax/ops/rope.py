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
from jax import lax

from kontext_jax.types import Array, Float

# cosines and signed sines of the angles, as `rotate` takes them
Rotation = tuple[Float[Array, "... S Dh"], Float[Array, "... S Dh"]]


def rope_table(
    ids: Float[np.ndarray, "... S 3"],
    axes_dim: Sequence[int],
    theta: float,
    precision: Literal["float64", "float32"] = "float64",
    ids_dtype=None,
) -> Float[np.ndarray, "... 2 S half"]:
    """Cosines and sines for positions [..., S, 3]: float32 [..., 2, S, Dh/2].

    Args:
      axes_dim: channels of a head that each axis owns; even, with sum Dh.
      precision: dtype of frequencies and angles; diffusers computes them in float64, BFL in
        float32.
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
    parts = []
    for axis, dim in enumerate(axes_dim):
        exponent = np.arange(0, dim, 2, dtype=precision) / np.asarray(dim, precision)
        frequencies = 1 / np.asarray(theta, precision) ** exponent
        parts.append(ids[..., axis, None] * frequencies)
    angles = np.concatenate(parts, axis=-1)
    return np.stack([np.cos(angles), np.sin(angles)], axis=-3).astype(np.float32)


def full_width(table: Float[Array, "... 2 S half"]) -> Rotation:
    """A table for `rotate`: [..., 2, S, Dh/2] of `rope_table` → two of [..., S, Dh].

    The cosines stand twice side by side, the sines with the sign of their half.
    """
    cos, sin = table[..., 0, :, :], table[..., 1, :, :]
    return jnp.concatenate([cos, cos], axis=-1), jnp.concatenate([-sin, sin], axis=-1)


def scaled(rotation: Rotation, scale: Float[Array, " Dh"]) -> Rotation:
    """The rotation of channels that were multiplied by scale [Dh] before."""
    cos, sin = rotation
    return cos * scale, sin * _exchanged(scale)


@jax.custom_vjp
def rotate(
    x: Float[Array, "B H S Dh"], gain: Float[Array, "#B #H #S 1"], rotation: Rotation
) -> Float[Array, "B H S Dh"]:
    """gain · (cos · x + sin · x with its halves exchanged), in float32 and rounded once.

    A norm before the rotation is in `gain` and in the `rotation` (`scaled`), so that what is
    exchanged is x itself.

    Args:
      x: [B, H, S, Dh].
      gain: float32 [B, H, S, 1], or broadcastable to it.
      rotation: two of [S, Dh] for the whole batch or of [B, S, Dh], from `full_width`.

    Returns:
      [B, H, S, Dh] in the dtype of x.
    """
    cos, sin = _for_heads(rotation)
    return (gain * (x.astype(jnp.float32) * cos + _exchange_halves(x) * sin)).astype(x.dtype)


def _rotate_fwd(x, gain, rotation):
    return rotate(x, gain, rotation), (x, gain, rotation)


def _rotate_bwd(residuals, dy):
    x, gain, rotation = residuals
    cos, sin = _for_heads(rotation)
    x32, dy32, exchanged = x.astype(jnp.float32), dy.astype(jnp.float32), _exchange_halves(x)
    # Exchanging is its own transpose. It is exact for dy as it comes, and would not be for sin·dy.
    dx = gain * (dy32 * cos + _exchange_halves(dy) * _exchanged(sin))
    d_gain = jnp.sum(dy32 * (x32 * cos + exchanged * sin), axis=-1, keepdims=True)
    d_cos, d_sin = (
        _sum_to(jnp.sum(gain * dy32 * factor, axis=1), rotation[0].shape)  # over heads
        for factor in (x32, exchanged)
    )
    return dx.astype(x.dtype), _sum_to(d_gain, gain.shape), (d_cos, d_sin)


rotate.defvjp(_rotate_fwd, _rotate_bwd)


def _for_heads(rotation: Rotation) -> Rotation:
    """[(B,) S, Dh] → [(B,) 1, S, Dh]."""
    cos, sin = rotation
    return cos[..., None, :, :], sin[..., None, :, :]


def _sum_to(x, shape):
    """x summed over the axes along which an array of this shape was broadcast."""
    x = jnp.sum(x, axis=tuple(range(x.ndim - len(shape))))
    return jnp.sum(x, axis=tuple(i for i, n in enumerate(shape) if n != x.shape[i]), keepdims=True)


def _exchanged(x):
    return jnp.roll(x, x.shape[-1] // 2, axis=-1)


def _exchange_halves(x: jax.Array) -> jax.Array:
    """float32 x with the halves of its last axis exchanged."""
    return lax.platform_dependent(
        x, tpu=exchange_by_product, default=lambda x: _exchanged(x).astype(jnp.float32)
    )


def exchange_by_product(x: Float[Array, "... Dh"]) -> Float[Array, "... Dh"]:
    """`x` with the halves of its last axis exchanged, by a permutation matrix: exact, in float32.

    For TPUs, whose vector unit is slow at moving the halves of its 128 lanes: slices and
    concatenation are passes of their own, and take four times as long as one pass with a product.
    """
    width = x.shape[-1]
    permutation = jnp.asarray(np.roll(np.eye(width), width // 2, axis=1), x.dtype)
    axes = ((x.ndim - 1,), (0,)), ((), ())
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return lax.dot_general(
        x, permutation, axes, precision=precision, preferred_element_type=jnp.float32
    )
