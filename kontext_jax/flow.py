"""Rectified flow: the path, its velocity, and where on the path we train and sample.

    x_t = (1 − t)·x0 + t·noise            t = 1 is noise, t = 0 is data
    velocity = dx_t/dt = noise − x0       (Kontext, arXiv:2506.15742, eq. 3)
    shifted t = s·t / (1 + (s − 1)·t),    s = timestep_shift = e^mu
    mu(L) = 0.5 + (1.15 − 0.5)·(L − 256)/(4096 − 256)     L: *target* tokens, references not counted

A logit-normal t shifted by s is logit-normal with its mean moved by log s, so training and sampling
share one line for mu.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from kontext_jax.types import Array, Float, Tokens, typed


@typed
def interpolate(x0: Tokens, noise: Tokens, t: Float[Array, " B"]) -> Tokens:
    """Point x_t = (1 − t)·x0 + t·noise on the straight path from data to noise."""
    t = t[:, None, None]
    return (1 - t) * x0 + t * noise


@typed
def velocity_target(x0: Tokens, noise: Tokens) -> Tokens:
    """Velocity of the straight path from data to noise, noise − x0 (arXiv:2506.15742, eq. 3)."""
    return noise - x0


def timestep_mu(num_image_tokens: int, base_shift: float = 0.5, max_shift: float = 1.15) -> float:
    """Logarithm of the timestep shift for a number of target tokens.

    The line through (256, base_shift) and (4096, max_shift), not clamped outside, as in BFL's
    `get_schedule` and diffusers' `calculate_shift`.
    """
    slope = (max_shift - base_shift) / (4096 - 256)
    return base_shift + slope * (num_image_tokens - 256)


def shift_timesteps(t, timestep_shift):
    """Moves t in [0, 1] towards noise: s·t / (1 + (s − 1)·t); 0 and 1 stay exactly in place."""
    shifted = timestep_shift * t / (1 + (timestep_shift - 1) * t)
    xp = np if isinstance(t, np.ndarray | float) else jnp
    # In float32 the formula can return 1 + 1 ulp at t = 1.
    return xp.where(t >= 1, 1.0, xp.where(t <= 0, 0.0, shifted))


def timestep_schedule(num_steps: int, mu: float | None) -> np.ndarray:
    """Sampling times from 1 (noise) to 0 (data): float32 [num_steps + 1].

    Args:
      mu: logarithm of the timestep shift, usually `timestep_mu(target tokens)`; None for no shift
        (FLUX.1 schnell).

    Raises:
      ValueError: if num_steps < 1.
    """
    if num_steps < 1:
        raise ValueError(f"num_steps is {num_steps}; it must be at least 1")
    t = np.linspace(1.0, 0.0, num_steps + 1)
    if mu is not None:
        t = shift_timesteps(t, math.exp(mu))
    return t.astype(np.float32)


def sample_logit_normal(key: jax.Array, shape: tuple[int, ...], mu: float, sigma: float = 1.0):
    """Training times t = sigmoid(mu + sigma·n), n ~ N(0, 1): float32 in (0, 1)."""
    return jax.nn.sigmoid(mu + sigma * jax.random.normal(key, shape, jnp.float32))
