"""Policies: what a network that is asked once prescribes for a whole stretch of time (π-Flow).

    x̂0_i   = x_r − r·u_i                   N clean estimates, of N velocities that the network gives
    x̂0(τ)  between them on a straight line, estimate i being that at r + (end − r)·i/(N − 1)
    dx/dτ  = (x − x̂0(τ))/τ                 followed from τ = r down to end

The "DX" policy of arXiv:2510.14974, where the path is integrated in 128 small steps. It need not
be: d(x/τ) = −x̂0(τ)/τ² dτ, so that

    x(τ) = (τ/r)·x_r + Σ_i w_i(τ)·x̂0_i,    w_i(τ) = τ·∫ over [τ, r] of h_i(s)/s² ds

with the hat functions h_i of linear interpolation, whose integrals are logarithms. All w are at
least 0, and add up to 1 − τ/r. N = 1 is a step of Euler's; at τ = 0 x is the last estimate.
"""

import jax
import jax.numpy as jnp

from kontext_jax.types import Array, Float, Tokens

SMALLEST = 1e-12  # a time in place of 0, at which w is its limit to float32 rounding


def clean_estimates(
    output: Float[Array, "B L velocities"], x: Tokens, t: Float[Array, " B"]
) -> Float[Array, "B N L C"]:
    """x̂0 of each of N grid times, float32 [B, N, L, C].

    Args:
      output: the network's result at (x, t), [B, L, N·C]: N velocities of each token, one after
        another.
      x: [B, L, C].
      t: [B].

    Raises:
      ValueError: the output's channels are no multiple of C.
    """
    batch, length, channels = x.shape
    count, rest = divmod(output.shape[-1], channels)
    if output.shape[:-1] != (batch, length) or rest or not count:
        raise ValueError(
            f"the network gave {list(output.shape)} for tokens {list(x.shape)}; expected a "
            f"multiple of {channels} channels for each of them, one velocity after another"
        )
    velocities = output.astype(jnp.float32).reshape(batch, length, count, channels)
    x = x.astype(jnp.float32)[:, None]
    return x - t[:, None, None, None] * jnp.moveaxis(velocities, 2, 1)


def estimate_at(
    estimates: Float[Array, "B N L C"],
    t: Float[Array, " B"],
    end: Float[Array, " B"],
    tau: Float[Array, " B"],
) -> Tokens:
    """x̂0(τ) [B, L, C] of estimates [B, N, L, C] made at t [B] for times down to end [B]."""
    count = estimates.shape[1]
    place = (t - tau) / (t - end) * (count - 1)
    hats = jax.nn.relu(1 - jnp.abs(place[:, None] - jnp.arange(count)))
    return jnp.einsum("bn,bnlc->blc", hats, estimates)


def position_at(
    estimates: Float[Array, "B N L C"],
    x: Tokens,
    t: Float[Array, " B"],
    end: Float[Array, " B"],
    tau: Float[Array, " B"],
) -> Tokens:
    """Where the policy leads from x at t to at τ, exactly: float32 [B, L, C].

    Args:
      estimates: [B, N, L, C], made at (x, t).
      x: [B, L, C].
      t, end, tau: [B], t ≥ τ ≥ end and t > 0.
    """
    tau = jnp.maximum(tau, SMALLEST)
    weights = _weights(estimates.shape[1], t, end, tau)
    kept = (tau / t)[:, None, None] * x.astype(jnp.float32)
    return kept + jnp.einsum("bn,bnlc->blc", weights, estimates)


def _weights(count: int, t: jax.Array, end: jax.Array, tau: jax.Array) -> jax.Array:
    """w [B, N] of this module's head."""
    if count == 1:
        return (1 - tau / t)[:, None]
    t, end, tau = t[:, None], end[:, None], tau[:, None]
    grid = t + (end - t) * jnp.arange(count) / (count - 1)
    grid = jnp.maximum(grid, SMALLEST / 2)
    upper, lower = grid[:, :-1], grid[:, 1:]
    # Of each piece between two grid times, the part above τ.
    start = jnp.clip(tau, lower, upper)
    part = (upper - start) / start
    logarithm = jnp.log1p(part)  # of upper/start
    to_upper = tau * (logarithm - lower / upper * part) / (upper - lower)
    to_lower = tau * (part - logarithm) / (upper - lower)
    to_upper, to_lower = (jnp.where(start < upper, w, 0) for w in (to_upper, to_lower))
    none = jnp.zeros_like(tau)
    return jnp.concatenate([to_upper, none], axis=1) + jnp.concatenate([none, to_lower], axis=1)
