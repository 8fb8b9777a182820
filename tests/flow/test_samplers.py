"""Noise and the Euler solver, on velocities that have nothing to do with the network."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kontext_jax.flow.path import timestep_schedule
from kontext_jax.flow.samplers import (
    euler_sample,
    guided_velocity_fn,
    initial_noise,
    renoise_sample,
    seed_words,
)


def test_noise_of_an_image_does_not_depend_on_its_neighbours():
    batch = initial_noise([3, 2**40 + 1, 7], 6, 4, 16)
    assert batch.shape == (3, 6, 4, 16)
    for i, seed in enumerate([3, 2**40 + 1, 7]):
        np.testing.assert_array_equal(batch[i], initial_noise([seed], 6, 4, 16)[0])


def test_every_bit_of_a_seed_counts():
    seeds = [0, 1, 2**31, 2**32, 2**32 + 1, 2**63, 2**64 - 1]
    noise = np.asarray(initial_noise(seeds, 2, 2, 4)).reshape(len(seeds), -1)
    assert len(np.unique(noise, axis=0)) == len(seeds)


def test_noise_does_not_depend_on_the_generator_configured():
    expected = initial_noise([5], 2, 2, 4)
    with jax.default_prng_impl("rbg"):
        np.testing.assert_array_equal(initial_noise([5], 2, 2, 4), expected)


def test_noise_is_standard_normal_and_rounded_last():
    noise = np.asarray(initial_noise([0], 64, 64, 16))
    assert abs(noise.mean()) < 0.02
    assert abs(noise.std() - 1) < 0.02
    rounded = initial_noise([0], 64, 64, 16, jnp.bfloat16)
    np.testing.assert_array_equal(rounded, jnp.asarray(noise).astype(jnp.bfloat16))


@pytest.mark.parametrize(
    ("seeds", "message"), [([], "at least one seed"), ([-1], "seed -1"), ([2**64], "out of range")]
)
def test_seeds_out_of_range_are_refused(seeds, message):
    with pytest.raises(ValueError, match=message):
        initial_noise(seeds, 2, 2, 4)


def test_one_step_of_a_straight_path_is_exact():
    noise, x0 = jnp.full((2, 3, 4), 2.0), jnp.full((2, 3, 4), -1.0)
    timesteps = timestep_schedule(1, None)
    got = euler_sample(lambda x, t, _: noise - x0, noise, timesteps)
    np.testing.assert_array_equal(got, x0)


def test_the_velocity_sees_time_state_and_input_of_its_step():
    timesteps = np.array([1.0, 0.75, 0.25, 0.0], np.float32)
    inputs = {"a": np.array([10.0, 20.0, 30.0], np.float32)}
    x, expected = np.ones((2, 1, 1), np.float32), np.ones((2, 1, 1), np.float32)

    def velocity_fn(x, t, step_input):
        assert t.shape == (2,)
        return x + t[:, None, None] + step_input["a"]

    for i in range(3):
        velocity = expected + timesteps[i] + inputs["a"][i]
        expected = expected + (timesteps[i + 1] - timesteps[i]) * velocity
    np.testing.assert_allclose(
        euler_sample(velocity_fn, jnp.asarray(x), timesteps, inputs), expected, rtol=1e-6
    )


@pytest.mark.parametrize("euler_dtype", ["float32", "compute", "float32_then_compute"])
def test_parts_of_a_run_join_to_the_whole_with_one_executable(euler_dtype):
    timesteps = timestep_schedule(7, 0.5)
    x = jax.random.normal(jax.random.key(0), (2, 5, 4), jnp.bfloat16)
    if euler_dtype == "float32":
        x = x.astype(jnp.float32)

    @jax.jit
    def run(x, start, stop):
        velocity_fn = lambda x, t, _: jnp.sin(3 * x) + t[:, None, None]  # noqa: E731
        return euler_sample(
            velocity_fn, x, timesteps, start=start, stop=stop, euler_dtype=euler_dtype
        )

    whole = run(x, 0, 7)
    joined = run(run(run(x, 0, 2), 2, 3), 3, 7)
    np.testing.assert_array_equal(whole, joined)
    assert run._cache_size() == 1
    np.testing.assert_array_equal(run(x, 4, 4), x)


def as_bfloat16(x):
    return jnp.asarray(x, jnp.float32).astype(jnp.bfloat16)


def test_euler_arithmetic_of_each_reference_in_bfloat16():
    # As torch 2.13 computes it: x + (t1 - t0) * v with Python numbers (BFL), and diffusers'
    # scheduler, whose step is a tensor and therefore rounded too.
    timesteps = np.array([1.0, 0.9], np.float32)
    x = jax.random.normal(jax.random.key(0), (1, 64, 64), jnp.bfloat16)
    v = jax.random.normal(jax.random.key(1), (1, 64, 64), jnp.bfloat16)
    x32, v32 = x.astype(jnp.float32), v.astype(jnp.float32)
    interval = timesteps[1] - timesteps[0]

    def step(euler_dtype):
        run = jax.jit(
            lambda x, v: euler_sample(lambda *_: v, x, timesteps, euler_dtype=euler_dtype)
        )
        return run(x, v)

    exact, bfl, diffusers = map(step, ("float32", "compute", "float32_then_compute"))
    np.testing.assert_allclose(exact, x32 + interval * v32, atol=1e-6)
    assert exact.dtype == jnp.float32
    np.testing.assert_array_equal(bfl, x + as_bfloat16(interval * v32))
    rounded_interval = as_bfloat16(interval).astype(jnp.float32)
    update = as_bfloat16(rounded_interval * v32).astype(jnp.float32)
    np.testing.assert_array_equal(diffusers, as_bfloat16(x32 + update))
    assert (bfl != diffusers).any()
    assert (bfl != as_bfloat16(exact)).any()


def towards(clean):
    """The velocity of the straight path from `clean` to where one is."""
    return lambda x, t, _: (x - clean) / t[:, None, None]


def test_one_step_of_renoising_is_one_euler_step():
    timesteps, x = timestep_schedule(1, None), jax.random.normal(jax.random.key(0), (2, 5, 4))
    velocity_fn = lambda x, t, _: jnp.cos(3 * x)  # noqa: E731
    for dtype in (jnp.float32, jnp.bfloat16):
        euler_dtype = "float32" if dtype == jnp.float32 else "compute"
        args = velocity_fn, x.astype(dtype), timesteps
        np.testing.assert_array_equal(
            renoise_sample(*args, words=seed_words([1, 2]), euler_dtype=euler_dtype),
            euler_sample(*args, euler_dtype=euler_dtype),
        )


def test_each_step_returns_to_the_path_by_noise_of_the_seed_and_the_step():
    timesteps = np.array([1, 0.7, 0.4, 0], np.float32)
    seeds, shape = [5, 2**40 + 3], (64, 64)
    clean = jax.random.normal(jax.random.key(1), (2, *shape))
    first = initial_noise(seeds, *shape, 1)[..., 0]
    words = seed_words(seeds)

    @jax.jit
    def run(x, clean, words, stop):
        return renoise_sample(towards(clean), x, timesteps, words=words, stop=stop)

    noises = [first]
    for stop in (1, 2):
        state, t = run(first, clean, words, stop), timesteps[stop]
        noises.append((state - (1 - t) * clean) / t)
    flat = np.stack(noises).reshape(6, -1)
    correlations = np.corrcoef(flat) - np.eye(6)
    assert np.abs(correlations).max() < 0.06  # 4 / sqrt(4096)
    np.testing.assert_allclose(flat.std(1), 1, atol=0.05)
    np.testing.assert_allclose(run(first, clean, words, 3), clean, atol=1e-5)
    turned = run(first[::-1], clean[::-1], words[::-1], 2)[::-1]
    np.testing.assert_allclose(turned, run(first, clean, words, 2), atol=1e-6)


@pytest.mark.parametrize("euler_dtype", ["float32", "float32_then_compute"])
def test_parts_of_a_renoised_run_join_to_the_whole(euler_dtype):
    timesteps = timestep_schedule(4, None)
    x = jax.random.normal(jax.random.key(0), (2, 5, 4))
    x = x if euler_dtype == "float32" else x.astype(jnp.bfloat16)

    @jax.jit
    def run(x, start, stop):
        return renoise_sample(
            lambda x, t, _: jnp.sin(3 * x) + t[:, None, None],
            *(x, timesteps),
            words=seed_words([3, 4]),
            start=start,
            stop=stop,
            euler_dtype=euler_dtype,
        )

    np.testing.assert_array_equal(run(run(run(x, 0, 1), 1, 3), 3, 4), run(x, 0, 4))
    assert run._cache_size() == 1


def test_words_are_asked_for_every_row():
    x, timesteps = jnp.zeros((3, 1, 1)), timestep_schedule(2, None)
    with pytest.raises(ValueError, match=r"words are \[2, 2\]; expected \[3, 2\]"):
        renoise_sample(lambda x, t, _: x, x, timesteps, words=seed_words([1, 2]))


def test_in_float32_the_three_arithmetics_agree():
    timesteps, x = timestep_schedule(3, None), jax.random.normal(jax.random.key(0), (1, 4, 4))
    velocity_fn = lambda x, t, _: jnp.cos(x)  # noqa: E731
    results = [
        euler_sample(velocity_fn, x, timesteps, euler_dtype=d)
        for d in ("float32", "compute", "float32_then_compute")
    ]
    np.testing.assert_array_equal(results[0], results[1])
    np.testing.assert_array_equal(results[0], results[2])


def test_wrong_arguments_are_refused():
    x, timesteps = jnp.zeros((1, 1, 1)), timestep_schedule(4, None)
    with pytest.raises(ValueError, match="unknown euler_dtype 'bfloat16'"):
        euler_sample(lambda x, t, _: x, x, timesteps, euler_dtype="bfloat16")
    with pytest.raises(ValueError, match=r"step_inputs lead with \[5\]; 5 timesteps are 4 steps"):
        euler_sample(lambda x, t, s: x, x, timesteps, jnp.zeros(5))


def test_guidance_extrapolates_from_the_negative_prompt():
    positive = lambda x, t, s: x + s  # noqa: E731
    negative = lambda x, t, s: -x + s  # noqa: E731
    x, t = jnp.full((1, 2, 2), 3.0), jnp.ones((1,))
    inputs = (jnp.float32(10.0), jnp.float32(20.0))

    def guided(scale):
        return guided_velocity_fn(positive, negative, scale)(x, t, inputs)

    np.testing.assert_array_equal(guided(1.0), positive(x, t, inputs[0]))
    np.testing.assert_array_equal(guided(0.0), negative(x, t, inputs[1]))
    np.testing.assert_array_equal(guided(2.0), 17.0 + 2 * (13.0 - 17.0) + jnp.zeros_like(x))


def test_guidance_without_step_inputs_passes_none_to_both():
    seen = []
    record = lambda x, t, s: seen.append(s) or x  # noqa: E731
    guided_velocity_fn(record, record, 2.0)(jnp.zeros((1, 1, 1)), jnp.ones((1,)), None)
    assert seen == [None, None]
