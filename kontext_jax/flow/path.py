"""Rectified flow: the path, its velocity, and where on the path we train and sample.

    x_t = (1 − t)·x0 + t·noise            t = 1 is noise, t = 0 is data
    velocity = dx_t/dt = noise − x0       (Kontext, arXiv:2506.15742, eq. 3)
    shifted t = s·t / (1 + (s − 1)·t),    s = timestep_shift = e^mu
    mu(L) = 0.5 + (1.15 − 0.5)·(L − 256)/(4096 − 256)     L: *target* tokens, references not counted

A logit-normal t shifted by s is logit-normal with its mean moved by log s, so training and sampling
share one line for mu.

How well a velocity can be predicted at all: if x0 ~ N(m, s²) without correlations, the expected
squared error of the best prediction is, for each dimension,

    s²/V,    V = (1 − t)²·s² + t²         1 at both ends and 2 at t = 1/2 where s = 1
"""

import math
from collections.abc import Sequence
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from kontext_jax.flow.names import check_timesteps
from kontext_jax.types import Array, Float, Int, RandomKey, Tokens, typed


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


def timestep_schedule(num_steps: int, mu: float | None) -> Float[np.ndarray, " times"]:
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


def sampling_schedule(
    num_steps: int,
    num_image_tokens: int,
    shifted: bool,
    timesteps: Sequence[float] | None = None,
) -> Float[np.ndarray, " times"]:
    """The times of a request: float32 [num_steps + 1], from 1 to 0.

    Args:
      num_image_tokens: number of tokens of the target, which the shift depends on.
      shifted: whether the model is sampled on the shifted grid.
      timesteps: start of each step, instead of an even or shifted grid.

    Raises:
      ValueError: num_steps < 1, or timesteps are of another number of steps.
    """
    if timesteps is None:
        return timestep_schedule(num_steps, timestep_mu(num_image_tokens) if shifted else None)
    if len(timesteps) != num_steps:
        raise ValueError(f"{len(timesteps)} timesteps for {num_steps} steps; expected one each")
    return np.array([*check_timesteps(timesteps), 0.0], np.float32)


def sample_logit_normal(
    key: RandomKey, shape: tuple[int, ...], mu: float, sigma: float = 1.0
) -> Float[Array, "..."]:
    """Training times t = sigmoid(mu + sigma·n), n ~ N(0, 1): float32 in (0, 1)."""
    return jax.nn.sigmoid(mu + sigma * jax.random.normal(key, shape, jnp.float32))


TimestepMode = Literal["flux_linear", "sqrt_ratio", "const"]
TimestepDistribution = Literal["logit_normal", "uniform", "mode"]
LossWeighting = Literal["none", "sigma_sqrt", "cosmap"]

SMALLEST_TRAINING_TIME = 1e-5


def training_mu(
    mode: TimestepMode, num_image_tokens: int, *, const_mu: float = 0.0, base_tokens: int = 256
) -> float:
    """Logarithm of the timestep shift in training, for a number of target tokens.

    "flux_linear": the line that sampling uses, `timestep_mu`. "sqrt_ratio": log sqrt(L/base),
    SD3's law (arXiv:2403.03206, section 5.3.2): a picture resampled from base_tokens, where there
    is no shift, stays as uncertain. "const": const_mu.

    Raises:
      ValueError: if the mode is none of these.
    """
    if mode == "flux_linear":
        return timestep_mu(num_image_tokens)
    if mode == "sqrt_ratio":
        return 0.5 * math.log(num_image_tokens / base_tokens)
    if mode == "const":
        return const_mu
    raise ValueError(f"timestep_mode is {mode!r}; choose {', '.join(get_args(TimestepMode))}")


def mode_times(u: Float[Array, "..."], scale: float) -> Float[Array, "..."]:
    """Times with extra weight in the middle, from uniform u: 1 − u − s·(cos²(π·u/2) − 1 + u).

    SD3's "mode" distribution (arXiv:2403.03206, section 3.1); s in [-1, 2/(π − 2)].
    """
    return 1 - u - scale * (jnp.cos(jnp.pi / 2 * u) ** 2 - 1 + u)


def sample_training_times(
    key: RandomKey,
    shape: tuple[int, ...],
    mu: float,
    *,
    distribution: TimestepDistribution = "logit_normal",
    sigma: float = 1.0,
    mode_scale: float = 1.29,
) -> Float[Array, "..."]:
    """Training times of a distribution, shifted by e^mu: float32 in [1e-5, 1].

    Args:
      sigma: standard deviation of logit t; "logit_normal" only.
      mode_scale: s of `mode_times`; "mode" only.

    Raises:
      ValueError: if the distribution is none of these.
    """
    if distribution == "logit_normal":
        t = sample_logit_normal(key, shape, mu, sigma)
    elif distribution in ("uniform", "mode"):
        t = jax.random.uniform(key, shape, jnp.float32)
        if distribution == "mode":
            t = mode_times(t, mode_scale)
        t = shift_timesteps(t, math.exp(mu))
    else:
        raise ValueError(
            f"timestep_distribution is {distribution!r}; choose "
            f"{', '.join(get_args(TimestepDistribution))}"
        )
    return jnp.clip(t, SMALLEST_TRAINING_TIME, 1.0)


def on_trainer_grid(
    u: Float[Array, "..."], num_timesteps: int = 1000
) -> tuple[Int[Array, "..."], Float[Array, "..."]]:
    """The times that diffusers' trainers use, from draws u in [0, 1) of their density.

    Their u runs against t: index floor(N·u) counts from noise, and t = (N − index)/N.

    Returns:
      Index into the scheduler's timesteps (int32), and t (float32).
    """
    index = jnp.floor(u * num_timesteps).astype(jnp.int32)
    return index, (num_timesteps - index).astype(jnp.float32) / num_timesteps


def loss_weight(weighting: LossWeighting, t: Float[Array, "..."]) -> Float[Array, "..."]:
    """Weight of a sample's squared velocity error at time t, by the names of diffusers' trainers.

    "none": 1. "sigma_sqrt": t^-2. "cosmap": 2/(π·(1 − 2t + 2t²)), SD3's (arXiv:2403.03206).

    Raises:
      ValueError: if the weighting is none of these.
    """
    if weighting == "none":
        return jnp.ones_like(t)
    if weighting == "sigma_sqrt":
        return t**-2
    if weighting == "cosmap":
        return 2 / (jnp.pi * (1 - 2 * t + 2 * t**2))
    raise ValueError(
        f"loss_weighting is {weighting!r}; choose {', '.join(get_args(LossWeighting))}"
    )


def gaussian_loss_floor(t: Float[Array, "..."], variance: float = 1.0) -> Float[Array, "..."]:
    """Least expected squared velocity error per dimension for uncorrelated Gaussian data.

    It is s²/((1 − t)²·s² + t²) with s² the `variance`, whatever the mean. Real latents are
    correlated, so a network goes below it: the ratio to it makes times comparable.
    """
    return variance / ((1 - t) ** 2 * variance + t**2)
