"""Guidance: the velocity that two predictions, with and without the prompt, are combined to.

    cfg        v = v_uncond + g·(v_cond − v_uncond)                          arXiv:2207.12598
    interval   cfg where low ≤ t ≤ high, elsewhere v_cond                    arXiv:2404.07724
    apg        d = s·(v_cond − v_uncond) = d_along + d_across
               v = v_cond + (g − 1)·(d_across + parallel·d_along)            arXiv:2410.02416

g = 1 is the conditional velocity in each of them, and 0 the unconditional one in the first: what
others write w = g − 1. "along" is the direction of the clean estimate x̂0 = x_t − t·v_cond of one
sample, whose parallel part brings saturated colours; s = min(1, norm_limit/‖t·(v_cond − v_uncond)‖)
bounds the difference of the two estimates. APG is stated for x̂0: v is linear in it, so the same
holds for velocities. Its momentum over sampling steps is left out, since a velocity that a network
is to learn must be a function of x_t and t.

All of it is float32: g multiplies what rounding leaves of the difference.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from kontext_jax.types import Array, Float

GuideFn = Callable[
    [jax.Array, jax.Array, jax.Array, jax.Array, jax.Array | float],
    jax.Array,
]
"""`guide(v_uncond, v_cond, x_t, t, guidance) -> velocity`, float32.

v_uncond, v_cond and x_t are [B, L, C], of the target tokens; t is [B]; guidance is [B] or one
number.
"""


def cfg(
    v_uncond: Float[Array, "B L C"],
    v_cond: Float[Array, "B L C"],
    x_t: Float[Array, "B L C"] | None,
    t: Float[Array, " B"] | None,
    guidance: Float[Array, " B"] | float,
) -> Float[Array, "B L C"]:
    """Classifier-free guidance; a `GuideFn` that needs neither x_t nor t."""
    del x_t, t
    low, high = v_uncond.astype(jnp.float32), v_cond.astype(jnp.float32)
    return low + _per_sample(guidance, low) * (high - low)


def make_interval(low: float, high: float) -> GuideFn:
    """Classifier-free guidance for t in [low, high] alone."""

    def interval(v_uncond, v_cond, x_t, t, guidance):
        guided = cfg(v_uncond, v_cond, x_t, t, guidance)
        is_guided = _per_sample((t >= low) & (t <= high), guided)
        return jnp.where(is_guided, guided, v_cond.astype(jnp.float32))

    return interval


def make_apg(parallel: float = 0.0, norm_limit: float = 0.0) -> GuideFn:
    """Adaptive projected guidance.

    Args:
      parallel: share of the difference along the clean estimate that is kept; 1: all of it.
      norm_limit: largest norm of the difference of two clean estimates, over all tokens of a
        sample; 0: none.
    """

    def apg(v_uncond, v_cond, x_t, t, guidance):
        axes = tuple(range(1, v_cond.ndim))
        v_cond = v_cond.astype(jnp.float32)
        difference = v_cond - v_uncond.astype(jnp.float32)
        times = _per_sample(t.astype(jnp.float32), difference)
        if norm_limit:
            norm = jnp.sqrt(jnp.sum((times * difference) ** 2, axis=axes, keepdims=True))
            difference *= jnp.minimum(1.0, norm_limit / jnp.maximum(norm, 1e-12))
        clean = x_t.astype(jnp.float32) - times * v_cond
        power = jnp.sum(clean**2, axis=axes, keepdims=True)
        share = jnp.sum(difference * clean, axis=axes, keepdims=True) / jnp.maximum(power, 1e-12)
        along = share * clean
        change = difference - along + parallel * along
        return v_cond + (_per_sample(guidance, change) - 1) * change

    return apg


def _per_sample(values, like: jax.Array) -> jax.Array:
    """[B] values against [B, …]; a single one as it is."""
    values = jnp.asarray(values)
    return values.reshape(-1, *(1,) * (like.ndim - 1)) if values.ndim else values
