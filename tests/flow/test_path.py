"""The path, its velocity, and the schedule."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kontext_jax.flow import path as flow


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


@settings(max_examples=50)
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


def test_shifting_by_alpha_moves_the_mean_of_logit_t_by_its_logarithm(comparisons):
    # Kontext, appendix A.2, with the alpha of SD3 for 256² → 1024².
    alpha, draws = 3.0, 400_000
    t = flow.sample_training_times(jax.random.key(0), (draws,), 0.0)
    logit = lambda t: np.log(t) - np.log1p(-t)  # noqa: E731
    shifted = logit(np.asarray(flow.shift_timesteps(t, alpha), np.float64))
    comparisons.notes.append(
        f"shifted by alpha: mean of logit t {shifted.mean():.4f}, log alpha {math.log(alpha):.4f}"
    )
    assert abs(shifted.mean() - math.log(alpha)) < 0.01
    assert abs(shifted.std() - 1) < 0.01


@pytest.mark.parametrize("distribution", ["logit_normal", "uniform", "mode"])
def test_training_times_are_shifted_alike(distribution):
    draw = lambda mu: flow.sample_training_times(  # noqa: E731
        jax.random.key(1), (1000,), mu, distribution=distribution
    )
    t = draw(1.15)
    assert t.dtype == jnp.float32
    np.testing.assert_allclose(t, flow.shift_timesteps(draw(0.0), math.exp(1.15)), atol=1e-5)
    assert (t >= 1e-5).all() and (t <= 1).all()


def test_training_times_never_reach_zero():
    far = flow.sample_training_times(jax.random.key(0), (8,), -100.0)
    np.testing.assert_array_equal(far, np.full(8, 1e-5, np.float32))


def test_mode_times_keep_the_ends_and_put_weight_into_the_middle():
    u = jnp.linspace(0, 1, 1001)
    t = flow.mode_times(u, 1.29)
    np.testing.assert_allclose(t[jnp.array([0, -1])], [1, 0], atol=1e-6)
    assert (np.diff(t) < 0).all()
    middle = (t > 0.375) & (t < 0.625)
    assert middle.mean() > 0.3  # evenly spread it would be 0.25


def test_mu_of_training_by_each_law():
    assert flow.training_mu("flux_linear", 1024) == flow.timestep_mu(1024)
    # alpha = sqrt(m/n): 4 from 256² to 1024² pixels.
    assert math.isclose(flow.training_mu("sqrt_ratio", 4096), math.log(4))
    assert flow.training_mu("sqrt_ratio", 64, base_tokens=64) == 0
    assert flow.training_mu("const", 4096, const_mu=0.3) == 0.3


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: flow.training_mu("cubic", 64), "timestep_mode is 'cubic'; choose flux_linear"),
        (lambda: flow.loss_weight("snr", jnp.ones(1)), "choose none, sigma_sqrt, cosmap"),
        (
            lambda: flow.sample_training_times(jax.random.key(0), (1,), 0.0, distribution="beta"),
            "'beta'; choose logit_normal, uniform, mode",
        ),
    ],
)
def test_unknown_laws_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_the_trainers_grid_counts_from_noise():
    index, t = flow.on_trainer_grid(jnp.array([0.0, 0.2504, 0.9999]))
    np.testing.assert_array_equal(index, [0, 250, 999])
    np.testing.assert_allclose(t, [1.0, 0.75, 0.001], atol=1e-7)


def test_weights_of_the_loss():
    t = jnp.array([0.5, 1.0])
    np.testing.assert_array_equal(flow.loss_weight("none", t), [1, 1])
    np.testing.assert_allclose(flow.loss_weight("sigma_sqrt", t), [4, 1])
    np.testing.assert_allclose(flow.loss_weight("cosmap", t), [4 / math.pi, 2 / math.pi], rtol=1e-6)


def test_the_gaussian_floor_is_one_at_both_ends_and_two_between():
    np.testing.assert_allclose(flow.gaussian_loss_floor(jnp.array([0.0, 0.5, 1.0])), [1, 2, 1])


@pytest.mark.parametrize("t", [0.1, 0.5, 0.9])
def test_the_best_prediction_of_gaussian_data_meets_the_floor(t):
    mean, variance = 0.4, 0.49
    key = jax.random.key(0)
    draws = jax.random.normal(key, (2, 1, 1, 400_000))
    x0, noise, times = mean + math.sqrt(variance) * draws[0], draws[1], jnp.array([t])
    x_t, total = flow.interpolate(x0, noise, times), (1 - t) ** 2 * variance + t**2
    best = (t - (1 - t) * variance) / total * (x_t - (1 - t) * mean) - mean
    loss = jnp.mean((best - flow.velocity_target(x0, noise)) ** 2)
    floor = flow.gaussian_loss_floor(times, variance)[0]
    assert abs(loss / floor - 1) < 0.01
    # No line through x_t does better.
    assert loss < jnp.mean((best + 0.1 * x_t - flow.velocity_target(x0, noise)) ** 2)
