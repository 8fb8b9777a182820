"""Shared vocabulary: the legend of dimension letters, array aliases and the `typed` decorator.

Letters used in shape annotations:

    B       batch
    L       image tokens (target and references on one axis)
    T       text tokens
    S       all tokens of one sequence, text first: S = T + L
    C       channels of an image token, 64 = 16 latent channels × 2 × 2
    D       width of the transformer
    H, Dh   attention heads, channels of a head
    M       width of an MLP's hidden layer
    N       layers of a stack (scanned modules stack their parameters on axis 0)
    Z       latent channels of the autoencoder
    half    Dh / 2, the pairs of channels that a rotation turns
    pooled  width of the pooled text
    rank    inner width of an adapter
    height, width   pixels or latent cells, as the name in front says
    rows, columns   cells of a map that a network makes of another size
    inputs, outputs, features   channels before and after a layer, or of text

One letter may be another number in another function; within one it is the same throughout.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from beartype import beartype
from jaxtyping import Array, Bool, Float, Int, Key, Shaped, UInt, UInt8, jaxtyped

Params = dict[str, Any]
"""A plain nested dict of arrays; the leaves of what Flax calls the "params" collection."""

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
"""Dtypes in which networks compute, by the names that settings and flags have for them."""

RandomKey = Key[Array, ""]
"""One of JAX's typed keys, `jax.random.key(seed)`."""

AnyArray = TypeVar("AnyArray", jax.Array, np.ndarray)
"""An array of JAX or of NumPy; the result is of the same kind."""

Tokens = Float[Array, "B L C"]
Latents = Float[Array, "B latent_height latent_width Z"]
Image = Float[Array, "B height width 3"]
"""Pixels in [-1, 1]."""

VelocityFn = Callable[[jax.Array, jax.Array, Any], jax.Array]
"""`velocity_fn(x_t, t, step_input) -> velocity`: [B, L, C], [B], pytree or None → [B, L, C].

What a sampler or an objective knows of a network. `step_input` is whatever the maker of the
function prepared for this step (for the MMDiT: its modulation vectors), or None to have it computed
from `t`.
"""


def typed(function: Callable) -> Callable:
    """Checks the annotated shapes and dtypes of a public function while it is traced."""
    return jaxtyped(function, typechecker=beartype)


__all__ = [
    "DTYPES",
    "AnyArray",
    "Array",
    "Bool",
    "Float",
    "Image",
    "Int",
    "Key",
    "Latents",
    "Params",
    "RandomKey",
    "Shaped",
    "Tokens",
    "UInt",
    "UInt8",
    "VelocityFn",
    "typed",
]
