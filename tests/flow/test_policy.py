"""Policies: their paths against brute force, their sampler, and the objective that makes them."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy2d

from kontext_jax.flow import policy
from kontext_jax.flow.samplers import euler_sample, make_sampler, policy_sample
from kontext_jax.models.presets import PRESETS
from kontext_jax.objectives.policy_distillation import (
    PolicyDistillationConfig,
    make_policy_distillation,
)
from kontext_jax.objectives.state import make_train_state
from kontext_jax.training.optimizer import OptimizerConfig, make_optimizer
from kontext_jax.trees import flatten
from kontext_jax.weights.grown import with_velocities
from kontext_jax.weights.untrained import untrained_bundle


def small_steps(estimates, x, t, end, tau, num_steps=16_000):
    """The path by many steps of the same clean estimate each, in float64."""
    numbers = np.arange(estimates.shape[1])
    times = np.geomspace(t, np.maximum(tau, 1e-12), num_steps + 1)
    for now, then in itertools.pairwise(times):
        place = (t - np.sqrt(now * then)) / (t - end) * numbers[-1]
        hats = np.maximum(0, 1 - np.abs(place[:, None] - numbers))
        clean = np.einsum("bn,bnlc->blc", hats, estimates)
        x = clean + (then / now)[:, None, None] * (x - clean)
    return x


@pytest.mark.parametrize("part", [1.0, 0.3, 0.0])
@pytest.mark.parametrize("count", [2, 8])
def test_the_path_is_that_of_many_small_steps(part, count):
    rng = np.random.default_rng(0)
    estimates, x = rng.normal(size=(4, count, 3, 2)), rng.normal(size=(4, 3, 2))
    t, end = np.array([1.0, 0.5, 0.25, 1.0]), np.array([0.75, 0.25, 0.0, 0.0])
    tau = end + part * (t - end)
    given = (jnp.asarray(a, jnp.float32) for a in (estimates, x, t, end, tau))
    found = policy.position_at(*given)
    np.testing.assert_allclose(found, small_steps(estimates, x, t, end, tau), atol=3e-6)


def test_a_policy_ends_at_its_last_estimate_and_is_a_line_between_its_estimates():
    estimates = jnp.arange(3.0).reshape(1, 3, 1, 1)
    t, end = jnp.ones(1), jnp.zeros(1)
    x = jnp.full((1, 1, 1), 7.0)
    np.testing.assert_allclose(policy.position_at(estimates, x, t, end, end), 2, atol=1e-6)
    np.testing.assert_array_equal(policy.position_at(estimates, x, t, end, t), x)
    halfway = policy.estimate_at(estimates, t, end, jnp.array([0.25]))
    np.testing.assert_allclose(halfway, 1.5)


def repeated(velocity_fn, count):
    return lambda *given: jnp.tile(velocity_fn(*given), (1, 1, count))


def test_equal_velocities_make_a_step_of_eulers():
    """Which is how students start; and parts of a run join to the whole."""

    def velocity_fn(x, t, _):
        return jnp.sin(3 * x) + t[:, None, None]

    x = jax.random.normal(jax.random.key(0), (2, 5, 4))
    times = jnp.array([1.0, 0.6, 0.3, 0.0])
    wanted = euler_sample(velocity_fn, x, times)
    sample = jax.jit(functools.partial(policy_sample, repeated(velocity_fn, 3)))
    whole = sample(x, times)
    np.testing.assert_allclose(whole, wanted, atol=3e-6)
    parts = sample(sample(x, times, start=0, stop=2), times, start=2, stop=3)
    np.testing.assert_array_equal(parts, whole)


def test_samplers_and_networks_must_fit():
    with pytest.raises(ValueError, match="expected one of euler, renoise, policy"):
        make_sampler("heun")
    with pytest.raises(ValueError, match="give it the seeds"):
        make_sampler("renoise")
    with pytest.raises(ValueError, match="gives one velocity a step; choose euler or renoise"):
        PRESETS["tiny-kontext"].check_sampler("policy")
    with pytest.raises(ValueError, match="gives 10 velocities a step; choose policy"):
        PRESETS["tiny-kontext-policy"].check_sampler("euler")
    with pytest.raises(ValueError, match=r"multiple of 4 channels"):
        policy.clean_estimates(jnp.zeros((1, 2, 6)), jnp.zeros((1, 2, 4)), jnp.ones(1))


def test_a_transformer_gives_its_velocity_several_times_edits_included():
    component = untrained_bundle("tiny-scenes").components["mmdit"]
    grown = with_velocities(component, 3)
    edits = {"final_layer/kernel": lambda leaf: leaf + 1}
    before, after = (dict(flatten(c.load(edits=edits))) for c in (component, grown))
    assert grown.config.out_channels == 3 * component.config.out_channels
    for path in before:
        wanted = np.asarray(before[path])
        if path.startswith("final_layer/"):
            wanted = np.concatenate([wanted] * 3, axis=-1)
        np.testing.assert_array_equal(after[path], wanted)


# The objective


OPTIMIZER = make_optimizer(OptimizerConfig(learning_rate=1e-3, warmup_steps=0), 10)


def objective():
    return make_policy_distillation(
        toy2d.predict,
        toy2d.teach,
        functools.partial(toy2d.init_params, guided=True),
        OPTIMIZER,
        PolicyDistillationConfig(),
        takes_guidance=True,
    )


def networks():
    """Parameters of a student that gives three velocities, and of its teacher, in `frozen`."""
    params = toy2d.init_params(jax.random.key(1), guided=True)
    last = jax.random.normal(jax.random.key(2), params["final_layer"]["kernel"].shape)
    params["final_layer"] = {"kernel": last, "bias": jnp.zeros(2)}
    student = params | {"final_layer": {"kernel": jnp.tile(last, (1, 3)), "bias": jnp.zeros(6)}}
    return student, {"teacher": params}


def test_steps_move_the_student_towards_its_teacher():
    student, frozen = networks()
    task = objective()
    batch = toy2d.real_batch(None, jax.random.key(3), 64)
    state = make_train_state(student, OPTIMIZER, with_ema=False)
    losses = []
    step = jax.jit(task.step)
    for _ in range(8):
        state, found = step(state, frozen, batch, jax.random.key(4))
        losses.append(found["loss"])
    assert losses[-1] < 0.9 * losses[0]
    assert {"relative_error/0/sum", "relative_error/3/count"} <= found.keys()
    counts = [float(found[f"relative_error/{i}/count"]) for i in range(4)]
    assert sum(counts) == 2 * 64 and min(counts) > 0


def test_evaluation_of_a_student_that_is_its_teacher():
    """Its first velocities are the teacher's, so no better than none at all, at every time."""
    student, frozen = networks()
    found = objective().evaluate(
        student, frozen, toy2d.real_batch(None, jax.random.key(3), 32), jax.random.key(5)
    )
    for i in range(4):
        pairs = [float(found[f"{name}/{i}/sum"]) for name in ("relative_error", "no_op_error")]
        assert pairs[0] > 0
        np.testing.assert_allclose(pairs[0], pairs[1], rtol=1e-4)
    assert found["loss/count"] == 4 * 4 * 32


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"timesteps": (0.9, 0.5)}, r"policy_distillation.timesteps: the timesteps are 0.9, 0.5"),
        ({"teacher_times": 0}, "must be at least 1"),
        ({"smallest_time": 0.25}, r"below the last of the timesteps, 0.25"),
        ({"smallest_time": 0.0}, "must be above 0"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        PolicyDistillationConfig(**settings)
