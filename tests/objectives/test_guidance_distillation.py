"""Guidance distillation: what a step draws, what it aims at, and what it measures."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from token_batches import make_batch

from kontext_jax.flow.guidance import cfg, make_apg, make_interval
from kontext_jax.objectives.base import mean_metrics
from kontext_jax.objectives.guidance_distillation import (
    GuidanceDistillationConfig,
    make_guidance_distillation,
    relative_error,
    teacher_velocities,
)

KEY = jax.random.key(5)
SAMPLES = 512


def teach(frozen, x_t, t, batch):
    """Linear in x_t, t, and means of text and references, with the teacher's weights."""
    shift = batch.txt.mean((1, 2)) + 2 * batch.vec.mean(1) + t
    shift = shift + (0 if batch.ctx is None else 3 * batch.ctx.mean((1, 2)))
    return frozen["teacher"]["scale"] * x_t + shift[:, None, None]


@functools.cache
def compiled(config=GuidanceDistillationConfig(), method="step"):  # noqa: B008
    """One step or evaluation, and a dict that fills with what the student is given in it.

    The student is the teacher's conditional velocity, plus 0.1 of what it is told beyond 1.
    """
    seen = {}

    def predict(params, frozen, x_t, t, batch, guidance):
        given = {"x_t": x_t, "t": t, "guidance": guidance}
        jax.debug.callback(lambda given: seen.update(given), given)
        velocity = teach({"teacher": params}, x_t, t, batch)
        return velocity + params["told"] * (guidance - 1)[:, None, None]

    objective = make_guidance_distillation(
        predict, teach, lambda key: {"scale": jnp.ones(()), "told": jnp.zeros(())},
        optax.sgd(0.1), config, ema_decay=0.9,
    )  # fmt: skip

    def run(batch, key, told):
        state = objective.init(key)
        state = state.replace(params=state.params | {"told": told})
        frozen = {"teacher": {"scale": jnp.ones(())}}
        if method == "evaluate":
            return objective.evaluate(state.params, frozen, batch, key), state
        state, metrics = objective.step(state, frozen, batch, key)
        return metrics, state

    return jax.jit(run), seen


@functools.cache
def large_batch():
    return make_batch(samples=SAMPLES)


def observe(batch=None, told=0.0, key=KEY, **options):
    """What the student is given, metrics as means, and the state afterwards."""
    run, seen = compiled(**options)
    seen.clear()
    metrics, state = run(large_batch() if batch is None else batch, key, jnp.float32(told))
    jax.effects_barrier()
    return jax.tree.map(np.asarray, dict(seen)), mean_metrics([metrics]), state


def both_by_hand(batch, seen):
    """The teacher's velocities, each from a batch of its own."""
    null = batch.replace(
        txt=jnp.broadcast_to(batch.null_txt, batch.txt.shape),
        vec=jnp.broadcast_to(batch.null_vec, batch.vec.shape),
    )
    frozen = {"teacher": {"scale": jnp.ones(())}}
    return [np.asarray(teach(frozen, seen["x_t"], seen["t"], b)) for b in (null, batch)]


def test_the_loss_is_the_distance_to_the_guided_teacher():
    batch = large_batch()
    seen, metrics, _ = observe(told=0.3)
    v_uncond, v_cond = both_by_hand(batch, seen)
    g = seen["guidance"][:, None, None]
    target = v_uncond + g * (v_cond - v_uncond)
    velocity = v_cond + 0.3 * (g - 1)
    assert metrics["loss"] == pytest.approx(np.mean((velocity - target) ** 2), rel=1e-4)
    norm = lambda x: np.sqrt(np.sum(x**2, axis=(1, 2)))  # noqa: E731
    expected = np.mean(norm(velocity - target) / norm(target))
    assert metrics["relative_error"] == pytest.approx(expected, rel=1e-4)
    no_op = np.mean(norm(v_cond - target) / norm(target))
    assert metrics["no_op_error"] == pytest.approx(no_op, rel=1e-4)


def test_a_student_that_starts_as_its_teacher_errs_as_the_conditional_velocity():
    _, metrics, _ = observe(method="evaluate")
    for g in (1, 1.7, 2.5, 3.3, 5):
        assert metrics[f"relative_error/g{g}"] == pytest.approx(
            metrics[f"no_op_error/g{g}"], abs=1e-6
        )
    assert metrics["no_op_error/g1"] < 1e-6 < 0.05 < metrics["no_op_error/g1.7"]
    assert metrics["no_op_error/g5"] > metrics["no_op_error/g2.5"]


def test_guidance_is_continuous_with_a_tenth_at_one():
    seen, _, _ = observe()
    g = seen["guidance"]
    is_one = g == 1
    assert abs(is_one.mean() - 0.1) < 0.04
    drawn = g[~is_one]
    assert len(np.unique(drawn)) == drawn.size
    assert drawn.min() < 1.2 and drawn.max() > 4.8 and abs(drawn.mean() - 3) < 0.2
    config = GuidanceDistillationConfig(guidance_range=(1.0, 30.0), guidance_spacing="log")
    logs = np.log(np.asarray(config.draw_guidance(KEY, jnp.arange(4096))))
    assert abs(logs[logs > 0].mean() - np.log(30) / 2) < 0.06


def test_a_tenth_of_the_times_is_even_and_the_rest_that_of_training():
    config = GuidanceDistillationConfig(timestep_mode="const", timestep_mu=2.0)
    index = jnp.arange(20_000)
    t = np.asarray(config.draw_times(KEY, index, 256))
    shifted = GuidanceDistillationConfig(
        timestep_mode="const", timestep_mu=2.0, uniform_times=0.0
    ).draw_times(KEY, index, 256)
    is_same = t == np.asarray(shifted)
    assert abs(is_same.mean() - 0.9) < 0.01
    assert abs(t[~is_same].mean() - 0.5) < 0.03
    logit = np.log(t[is_same] / (1 - t[is_same]))
    assert abs(logit.mean() - 2.0) < 0.05


def test_one_batch_of_two_texts_is_two_batches_and_nothing_crosses_samples():
    batch = make_batch(samples=6)
    seen = {"x_t": batch.x0, "t": np.linspace(0.1, 0.9, 6, dtype=np.float32)}
    for given in (batch, batch.replace(ctx=None)):
        sizes = []

        def counted(frozen, x_t, t, both, sizes=sizes):
            sizes.append((len(x_t), len(t), len(both.x0), len(both.txt)))
            return teach(frozen, x_t, t, both)

        frozen = {"teacher": {"scale": jnp.ones(())}}
        found = teacher_velocities(counted, frozen, seen["x_t"], seen["t"], given)
        assert sizes == [(12, 12, 12, 12)]
        for a, b in zip(found, both_by_hand(given, seen), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)


def test_the_step_changes_the_student_and_its_average():
    _, _, state = observe()
    assert float(state.params["told"]) != 0 and float(state.ema_params["told"]) != 0


def test_the_guide_is_the_configs():
    rng = np.random.default_rng(1)
    given = *rng.standard_normal((3, 2, 3, 4), np.float32), np.array([0.3, 0.8], np.float32)
    for config, guide in (
        (GuidanceDistillationConfig(), cfg),
        (GuidanceDistillationConfig(guide="interval", interval=(0.5, 1.0)), make_interval(0.5, 1)),
        (GuidanceDistillationConfig(guide="apg", apg_norm_limit=0.5), make_apg(0.0, 0.5)),
    ):
        np.testing.assert_array_equal(config.make_guide()(*given, 3.0), guide(*given, 3.0))


def test_evaluation_measures_each_guidance_at_all_times():
    seen, metrics, _ = observe(method="evaluate", told=0.2)
    t = np.asarray(seen["t"])
    assert sorted(np.unique(t)) == [(i + 0.5) / 8 for i in range(8)]
    for g in (1, 1.7, 2.5, 3.3, 5):
        cells = [metrics[f"relative_error/g{g}/t/{i}"] for i in range(8)]
        assert np.mean(cells) == pytest.approx(metrics[f"relative_error/g{g}"], rel=1e-4)
    again = observe(method="evaluate", told=0.2)[1]
    assert metrics == again


def test_relative_error_is_of_each_sample():
    target = np.array([[[3.0, 4.0]], [[0.0, 2.0]]])
    np.testing.assert_allclose(relative_error(target * 1.1, target), [0.1, 0.1], rtol=1e-5)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"guide": "cgf"}, "guidance_distillation.guide is 'cgf'; choose cfg, interval, apg"),
        ({"guidance_range": (5.0, 1.0)}, r"guidance_range is \(5.0, 1.0\); give \(low, high\)"),
        ({"unguided_share": 1.5}, "unguided_share is 1.5; it must be in"),
        ({"apg_parallel": 0.5}, "apg_parallel is 0.5, but guidance_distillation.guide is 'cfg'"),
        ({"interval": (0.2, 0.8)}, "it applies to interval only"),
        ({"eval_guidance": ()}, "eval_guidance is empty"),
        ({"guidance_spacing": "log", "guidance_range": (0.0, 5.0)}, "begins at 0.0"),
        ({"timestep_mode": "lin"}, "guidance_distillation.timestep_mode is 'lin'"),
        ({"apg_norm_limit": -1.0, "guide": "apg"}, "apg_norm_limit is -1.0"),
    ],
)
def test_settings_that_mean_nothing_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        GuidanceDistillationConfig(**fields)


def test_a_prediction_for_references_is_refused():
    objective = make_guidance_distillation(
        lambda params, frozen, x_t, t, batch, g: jnp.concatenate([x_t, batch.ctx], axis=1),
        teach, lambda key: {"scale": jnp.ones(())}, optax.sgd(0.1), GuidanceDistillationConfig(),
    )  # fmt: skip
    frozen = {"teacher": {"scale": jnp.ones(())}}
    with pytest.raises(ValueError, match="must be cut off"):
        jax.eval_shape(objective.evaluate, {}, frozen, make_batch(), KEY)
