"""The path, its velocity, and the schedule."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kontext_jax import flow


def random_tokens(seed):
    return jax.random.normal(jax.random.key(seed), (3, 4, 8))


def test_path_runs_from_data_to_noise():
    x0, noise = random_tokens(0), random_tokens(1)
    np.testing.assert_array_equal(flow.interpolate(x0, noise, jnp.zeros(3)), x0)
    np.testing.assert_array_equal(flow.interpolate(x0, noise, jnp.ones(3)), noise)


def test_velocity_is_the_derivative_of_the_path():
    x0, noise, t = random_tokens(0), random_tokens(1), jnp.array([0.1, 0.5, 0.9])
    _, derivative = jax.jvp(lambda t: flow.interpolate(x0, noise, t), (t,), (jnp.ones(3),))
    np.testing.assert_allclose(flow.velocity_target(x0, noise), derivative, atol=1e-6)


def test_mu_is_the_published_line():
    assert flow.timestep_mu(256) == 0.5
    assert math.isclose(flow.timestep_mu(4096), 1.15)
    assert math.isclose(flow.timestep_mu(4056), 1.14323, abs_tol=1e-5)  # 672×1568
    assert flow.timestep_mu(8192) > 1.8  # not clamped


@settings(deadline=None, max_examples=50)
@given(num_steps=st.integers(1, 60), mu=st.one_of(st.none(), st.floats(-1, 2)))
def test_schedules_fall_from_one_to_zero(num_steps, mu):
    timesteps = flow.timestep_schedule(num_steps, mu)
    assert timesteps.dtype == np.float32
    assert timesteps.shape == (num_steps + 1,)
    assert timesteps[0] == 1.0
    assert timesteps[-1] == 0.0
    assert (np.diff(timesteps) < 0).all()


def test_schedule_is_that_of_the_reference_data():
    # 4 steps, 24 target tokens: BFL's get_schedule.
    expected = [1.0, 0.8262588381767273, 0.6131871938705444, 0.34572523832321167, 0.0]
    got = flow.timestep_schedule(4, flow.timestep_mu(24))
    np.testing.assert_allclose(got, expected, atol=1e-6)


def test_unshifted_schedule_is_even():
    np.testing.assert_array_equal(flow.timestep_schedule(4, None), [1, 0.75, 0.5, 0.25, 0])


def test_shift_pins_both_ends_in_float32():
    ends = jnp.array([0.0, 1.0])
    for shift in (0.3, 1.7, 3.158, 7.0):
        np.testing.assert_array_equal(flow.shift_timesteps(ends, shift), ends)


def test_shifting_twice_multiplies_the_shifts():
    t = np.linspace(0, 1, 11)
    twice = flow.shift_timesteps(flow.shift_timesteps(t, 1.5), 2.0)
    np.testing.assert_allclose(twice, flow.shift_timesteps(t, 3.0), atol=1e-12)


def test_shifting_logit_normal_times_moves_their_mean():
    key, mu = jax.random.key(0), 1.15
    shifted = flow.shift_timesteps(flow.sample_logit_normal(key, (2000,), 0.0), math.exp(mu))
    np.testing.assert_allclose(shifted, flow.sample_logit_normal(key, (2000,), mu), atol=1e-5)


def test_logit_normal_times_have_the_median_of_mu():
    t = np.asarray(flow.sample_logit_normal(jax.random.key(0), (20_000,), 1.0))
    assert t.dtype == np.float32
    assert ((t > 0) & (t < 1)).all()
    assert abs(np.median(t) - 1 / (1 + math.exp(-1))) < 0.01


@pytest.mark.parametrize("num_steps", [0, -3])
def test_a_schedule_needs_a_step(num_steps):
    with pytest.raises(ValueError, match=f"num_steps is {num_steps}"):
        flow.timestep_schedule(num_steps, None)
