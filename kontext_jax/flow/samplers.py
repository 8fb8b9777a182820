"""Noise, and samplers that follow velocity(x, t) from t = 1 (noise) to t = 0 (data).

    euler      x_{i+1} = x_i + (t_{i+1} − t_i) · velocity(x_i, t_i)         solves dx/dt = velocity
    renoise    x̂0 = x_i − t_i · velocity(x_i, t_i)
               x_{i+1} = (1 − t_{i+1}) · x̂0 + t_{i+1} · noise_i             noise_i new in each step
    policy     x_{i+1} where `kontext_jax.policy` leads from x_i by time t_{i+1}

Re-noising is multistep sampling of consistency models (arXiv:2303.01469, algorithm 1): networks
distilled to few steps are trained on noised clean pictures, and these are what it shows them. With
one step, the two are the same. A policy is what networks give that were distilled to several
velocities at once.

Works on any `velocity_fn` (see `kontext_jax.types.VelocityFn`) and knows no network.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from kontext_jax.flow import policy
from kontext_jax.flow.guidance import cfg
from kontext_jax.flow.names import SAMPLERS, Sampler
from kontext_jax.types import Array, Float, Int, Latents, Tokens, UInt, VelocityFn

EulerDtype = Literal["float32", "compute", "float32_then_compute"]


def seed_words(seeds: Sequence[int]) -> UInt[np.ndarray, "B 2"]:
    """Seeds as pairs of 32-bit words, high before low: uint32 [B, 2].

    Raises:
      ValueError: if there is no seed or one is not from 0 to 2^64 − 1.
    """
    seeds = [int(seed) for seed in seeds]
    if not seeds:
        raise ValueError("there are no seeds; expected at least one seed")
    for seed in seeds:
        if not 0 <= seed < 2**64:
            raise ValueError(f"seed {seed} is out of range; choose one from 0 to 2**64 - 1")
    return np.array([[seed >> 32, seed & 0xFFFFFFFF] for seed in seeds], np.uint32)


def _keys(words: np.ndarray | jax.Array) -> jax.Array:
    # The generator is named, so that no global setting of JAX changes the picture.
    return jax.random.wrap_key_data(words, impl="threefry2x32")  # type: ignore[arg-type]


def initial_noise(
    seeds: Sequence[int],
    latent_height: int,
    latent_width: int,
    channels: int = 16,
    dtype: Any = jnp.float32,
) -> Latents:
    """Standard normal latents, one seed per image: [B, latent_height, latent_width, channels].

    An image's noise depends on its own seed and size alone, not on the batch around it, and is
    drawn in float32 before it is rounded to `dtype`.

    Args:
      seeds: integers from 0 to 2^64 − 1.

    Raises:
      ValueError: if there is no seed or one is out of range.
    """
    shape = (latent_height, latent_width, channels)
    keys = _keys(seed_words(seeds))
    noise = jax.vmap(lambda key: jax.random.normal(key, shape, jnp.float32))(keys)
    return noise.astype(dtype)


def euler_sample(
    velocity_fn: VelocityFn,
    x: Float[Array, "B ..."],
    timesteps: Float[Array, " times"],
    step_inputs: Any = None,
    *,
    start: int | Int[Array, ""] = 0,
    stop: int | Int[Array, ""] | None = None,
    euler_dtype: EulerDtype = "float32",
) -> Float[Array, "B ..."]:
    """Solves from timesteps[start] to timesteps[stop].

    start and stop may be traced integers, so one executable serves the whole run or any part of it.
    Parts joined give the whole, bit for bit, if each gets what the one before returned.

    Args:
      x: [B, ...] state at timesteps[start]; its dtype is the compute dtype of `euler_dtype`.
      timesteps: float32 [N + 1], falling.
      step_inputs: pytree whose leaves lead with N; velocity_fn gets entry i at step i.
      stop: None for N.
      euler_dtype: "float32" keeps the state in float32 throughout (exact). "compute" rounds product
        and sum to x's dtype (BFL, whose step t_{i+1} − t_i is a Python number).
        "float32_then_compute" does the same with the step itself rounded first (diffusers: it adds
        in float32, but its step is a tensor, which PyTorch multiplies in the velocity's dtype).

    Returns:
      The state at timesteps[stop]: float32 if euler_dtype is "float32", otherwise in x's dtype.

    Raises:
      ValueError: for an unknown euler_dtype, or step_inputs of another length than N.
    """

    def step(x, velocity, t, t_next, i, moved):
        return moved(x, velocity, t_next - t)

    return _follow(velocity_fn, step, x, timesteps, step_inputs, start, stop, euler_dtype)


def renoise_sample(
    velocity_fn: VelocityFn,
    x: Float[Array, "B ..."],
    timesteps: Float[Array, " times"],
    step_inputs: Any = None,
    *,
    words: UInt[np.ndarray, "B 2"] | UInt[Array, "B 2"],
    start: int | Int[Array, ""] = 0,
    stop: int | Int[Array, ""] | None = None,
    euler_dtype: EulerDtype = "float32",
) -> Float[Array, "B ..."]:
    """As `euler_sample`, but each step goes to clean data and from there back to the next time.

    The noise of a step depends on the image's seed and the number of the step alone, so parts
    join to the whole bit for bit here too. x̂0 is computed in the arithmetic of `euler_dtype`, as
    the Euler step to t = 0; it is noised in float32 and then rounded to x's dtype, as in diffusers
    (`FlowMatchEulerDiscreteScheduler` with `stochastic_sampling`).

    Args:
      words: uint32 [B, 2], `seed_words` of the seeds that drew x.
      velocity_fn, x, timesteps, step_inputs, start, stop, euler_dtype: see `euler_sample`.

    Raises:
      ValueError: `euler_sample` would raise it, or B differs between words and x.
    """
    if words.shape != (x.shape[0], 2):
        raise ValueError(f"words are {list(words.shape)}; expected [{x.shape[0]}, 2], one a row")
    keys, shape = _keys(words), x.shape[1:]

    def step(x, velocity, t, t_next, i, moved):
        clean = moved(x, velocity, -t)
        noise = jax.vmap(
            lambda key: jax.random.normal(jax.random.fold_in(key, i), shape, jnp.float32)
        )(keys)
        return (1 - t_next) * clean + t_next * noise

    return _follow(velocity_fn, step, x, timesteps, step_inputs, start, stop, euler_dtype)


def policy_sample(
    velocity_fn: VelocityFn,
    x: Tokens,
    timesteps: Float[Array, " times"],
    step_inputs: Any = None,
    *,
    start: int | Int[Array, ""] = 0,
    stop: int | Int[Array, ""] | None = None,
    euler_dtype: EulerDtype = "float32",
) -> Tokens:
    """As `euler_sample`, for a network that gives N velocities a token, a policy for each step.

    A step is computed in float32 whatever `euler_dtype` is, which says what the state between steps
    is rounded to.

    Args:
      velocity_fn: gives [B, L, N·C] for x [B, L, C].
      x, timesteps, step_inputs, start, stop, euler_dtype: see `euler_sample`.

    Raises:
      ValueError: `euler_sample` would raise it, or the network's channels are no multiple of C.
    """

    def step(x, output, t, t_next, i, moved):
        now, then = (jnp.full(x.shape[:1], time) for time in (t, t_next))
        estimates = policy.clean_estimates(output, x, now)
        return policy.position_at(estimates, x, now, then, then)

    return _follow(velocity_fn, step, x, timesteps, step_inputs, start, stop, euler_dtype)


def make_sampler(
    name: Sampler, words: UInt[np.ndarray, "B 2"] | UInt[Array, "B 2"] | None = None
) -> Callable[..., jax.Array]:
    """The function of a sampler's name, called as `euler_sample`.

    Args:
      words: `seed_words` of the seeds that drew the noise, for "renoise".

    Raises:
      ValueError: there is no such sampler, or it lacks words.
    """
    if name not in SAMPLERS:
        raise ValueError(f"sampler is {name!r}; expected one of {', '.join(SAMPLERS)}")
    if name == "renoise":
        if words is None:
            raise ValueError("the renoise sampler draws noise in each step; give it the seeds")
        return functools.partial(renoise_sample, words=words)
    return policy_sample if name == "policy" else euler_sample


def _follow(
    velocity_fn: VelocityFn,
    step: Callable[..., jax.Array],
    x: jax.Array,
    timesteps: jax.Array,
    step_inputs: Any,
    start: int | jax.Array,
    stop: int | jax.Array | None,
    euler_dtype: EulerDtype,
) -> jax.Array:
    """Runs the steps from start to stop.

    Args:
      step: (x, velocity, t_i, t_{i+1}, i, moved) → float32 state at t_{i+1}, where `moved(x,
        velocity, interval)` is x + interval·velocity in the arithmetic of `euler_dtype`.
    """
    if euler_dtype not in ("float32", "compute", "float32_then_compute"):
        raise ValueError(
            f"unknown euler_dtype {euler_dtype!r}; choose float32, compute or float32_then_compute"
        )
    timesteps = jnp.asarray(timesteps, jnp.float32)
    num_steps = timesteps.shape[0] - 1
    step_inputs = jax.tree.map(jnp.asarray, step_inputs)
    lengths = {leaf.shape[0] for leaf in jax.tree.leaves(step_inputs)}
    if lengths - {num_steps}:
        raise ValueError(
            f"step_inputs lead with {sorted(lengths)}; {num_steps + 1} timesteps are "
            f"{num_steps} steps"
        )
    if euler_dtype == "float32":
        x = x.astype(jnp.float32)
    dtype = x.dtype

    def rounded(value):
        # A plain cast down and up may be removed by the compiler as excess precision.
        info = jnp.finfo(dtype)
        return lax.reduce_precision(value, info.nexp, info.nmant)

    def moved(x, velocity, interval):
        if euler_dtype == "float32_then_compute":
            interval = rounded(interval)
        update = interval * rounded(velocity.astype(jnp.float32))
        return x.astype(jnp.float32) + rounded(update)

    def body(i, x):
        step_input = jax.tree.map(lambda leaf: leaf[i], step_inputs)
        velocity = velocity_fn(x, jnp.full(x.shape[:1], timesteps[i]), step_input)
        return step(x, velocity, timesteps[i], timesteps[i + 1], i, moved).astype(dtype)

    return lax.fori_loop(start, num_steps if stop is None else stop, body, x)


def guided_velocity_fn(
    conditional: VelocityFn, unconditional: VelocityFn, scale: float | Float[Array, " B"]
) -> VelocityFn:
    """True classifier-free guidance by one scale or [B]: v_neg + scale·(v − v_neg), two passes.

    A step input of the result is the pair (of the conditional, of the unconditional), or None.
    """

    def velocity_fn(x, t, step_input):
        positive_input, negative_input = (None, None) if step_input is None else step_input
        positive = conditional(x, t, positive_input)
        negative = unconditional(x, t, negative_input)
        return cfg(negative, positive, x, t, scale).astype(positive.dtype)

    return velocity_fn
