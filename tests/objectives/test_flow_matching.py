"""Flow matching: what a step draws and measures, and that it learns what can be learnt."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from token_batches import CHANNELS, NUM_TEXT, TARGET, make_batch

from kontext_jax.batches import Conditioning
from kontext_jax.flow import path as flow
from kontext_jax.flow.samplers import euler_sample
from kontext_jax.models.mmdit import MMDiT, init_params, make_velocity_fn
from kontext_jax.models.presets import MMDiTConfig
from kontext_jax.objectives.base import mean_metrics
from kontext_jax.objectives.flow_matching import (
    FlowMatchingConfig,
    make_flow_matching,
    velocity_loss,
)
from kontext_jax.training.optimizer import OptimizerConfig, make_optimizer, make_schedule

KEY = jax.random.key(7)


@pytest.fixture(autouse=True)
def _full_precision():
    with jax.default_matmul_precision("highest"):
        yield


@functools.cache
def compiled(config=FlowMatchingConfig(), takes_guidance=False, method="step"):  # noqa: B008
    """One step or evaluation, and a dict that fills with what the network is given in it.

    The network scales x_t by a parameter, which is 1.
    """
    seen = {}

    def predict(params, frozen, x_t, t, batch, guidance):
        given = {"x_t": x_t, "t": t, "txt": batch.txt, "vec": batch.vec, "guidance": guidance}
        jax.debug.callback(lambda given: seen.update(given), given)
        return params["scale"] * x_t

    objective = make_flow_matching(
        predict,
        lambda key: {"scale": jnp.ones(())},
        optax.sgd(0.0),
        config,
        takes_guidance=takes_guidance,
    )

    def run(batch, key):
        state = objective.init(key)
        if method == "evaluate":
            return objective.evaluate(state.params, {}, batch, key)
        return objective.step(state, {}, batch, key)[1]

    return jax.jit(run), seen


def observe(batch, key=KEY, **options):
    """What the network is given in one step or evaluation, and the metrics."""
    run, seen = compiled(**options)
    seen.clear()
    metrics = {name: float(value) for name, value in run(batch, key).items()}
    jax.effects_barrier()
    return {k: v if v is None else np.asarray(v) for k, v in seen.items()}, metrics


def noise_of(batch, seen):
    t = seen["t"][:, None, None]
    return (seen["x_t"] - (1 - t) * batch.x0) / t


def test_the_loss_is_that_of_the_paper():
    batch = make_batch(samples=64)
    seen, metrics = observe(batch)
    noise = noise_of(batch, seen)
    assert abs(noise.mean()) < 0.1 and abs(noise.std() - 1) < 0.05
    expected = np.mean((seen["x_t"] - (noise - batch.x0)) ** 2)
    assert metrics["loss"] == pytest.approx(expected, rel=1e-3)
    assert metrics["loss_edit/sum"] / metrics["loss_edit/count"] == pytest.approx(
        expected, rel=1e-3
    )


def test_losses_by_time_are_those_of_their_samples():
    batch = make_batch(samples=64)
    seen, metrics = observe(batch)
    loss = np.mean((seen["x_t"] - (noise_of(batch, seen) - batch.x0)) ** 2, axis=(1, 2))
    ratio = loss / np.asarray(flow.gaussian_loss_floor(seen["t"]))
    means, parts = mean_metrics([metrics]), np.floor(8 * seen["t"])
    assert {name for name in means if name.startswith("loss_t/")} == {
        f"loss_t/{int(part)}" for part in parts
    }  # parts without a sample are left out
    assert sum(metrics[f"loss_t/{i}/count"] for i in range(8)) == 64
    for part in np.unique(parts).astype(int):
        chosen = parts == part
        assert means[f"loss_t/{part}"] == pytest.approx(loss[chosen].mean(), rel=1e-3)
        assert means[f"loss_t_over_floor/{part}"] == pytest.approx(ratio[chosen].mean(), rel=1e-3)


def test_times_follow_the_target_alone_and_every_sample_draws_its_own():
    batch = make_batch(samples=64)
    seen, _ = observe(batch)
    without, metrics = observe(make_batch(samples=64, references=()))
    np.testing.assert_array_equal(seen["t"], without["t"])
    np.testing.assert_array_equal(seen["x_t"], without["x_t"])
    assert len(np.unique(seen["t"])) == 64
    assert "loss_t2i/sum" in metrics and "loss_edit/sum" not in metrics
    logit = np.log(seen["t"] / (1 - seen["t"]))
    assert abs(logit.mean() - flow.timestep_mu(math.prod(TARGET))) < 0.4


def test_weights_of_the_loss_leave_the_log_as_it_is():
    batch = make_batch(samples=64)
    plain = observe(batch)[1]
    seen, weighted = observe(batch, config=FlowMatchingConfig(loss_weighting="cosmap"))
    loss = np.mean((seen["x_t"] - (noise_of(batch, seen) - batch.x0)) ** 2, axis=(1, 2))
    expected = np.mean(np.asarray(flow.loss_weight("cosmap", seen["t"])) * loss)
    assert weighted["loss"] == pytest.approx(expected, rel=1e-3)
    assert weighted["loss_edit/sum"] == pytest.approx(plain["loss_edit/sum"], rel=1e-5)


def test_text_is_dropped_for_whole_samples_and_guidance_drawn_for_each():
    batch = make_batch(samples=64)
    config = FlowMatchingConfig(
        text_dropout=0.3, timestep_grid=1000, guidance="range", guidance_range=(2.0, 4.0)
    )
    seen, metrics = observe(batch, config=config, takes_guidance=True)
    txt_dropped = (seen["txt"] == batch.null_txt).all((1, 2))
    vec_dropped = (seen["vec"] == batch.null_vec).all(1)
    np.testing.assert_array_equal(txt_dropped, vec_dropped)
    np.testing.assert_array_equal(seen["txt"][~txt_dropped], batch.txt[~txt_dropped])
    assert 0.1 < txt_dropped.mean() == metrics["text_drop_rate"] < 0.5
    assert len(np.unique(seen["guidance"])) == 64
    assert (seen["guidance"] >= 2).all() and (seen["guidance"] <= 4).all()
    # On the trainers' grid of a thousand times.
    np.testing.assert_allclose(1000 * seen["t"], np.round(1000 * seen["t"]), atol=1e-3)
    # What one use of randomness draws does not depend on the others.
    plain, _ = observe(batch)
    np.testing.assert_allclose(seen["t"], plain["t"], atol=1e-3)
    assert plain["guidance"] is None


@pytest.mark.parametrize(
    ("options", "takes_guidance", "message"),
    [
        ({"guidance": "none"}, True, "the network takes guidance as an input; choose fixed"),
        ({"guidance": "fixed"}, False, "the network takes no guidance"),
        ({"guidance": "range"}, False, "the network takes no guidance"),
        ({"guidance_value": 3.5}, False, "'auto' and guidance_value 3.5, but the network takes no"),
    ],
)
def test_guidance_must_fit_the_network(options, takes_guidance, message):
    with pytest.raises(ValueError, match=message):
        make_flow_matching(
            None, None, None, FlowMatchingConfig(**options), takes_guidance=takes_guidance
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"timestep_mode": "cubic"}, "flow.timestep_mode is 'cubic'; choose flux_linear"),
        ({"guidance": 1.0}, "flow.guidance is 1.0; choose auto, fixed, range, none"),
        ({"text_dropout": 1.5}, r"text_dropout is 1.5; it must be in \[0, 1\]"),
        ({"timestep_sigma": 0.0}, "timestep_sigma is 0.0; it must be positive"),
        ({"timestep_grid": -1}, "timestep_grid is -1; it must be 0 or more"),
        (
            {"timestep_distribution": "mode", "timestep_mode_scale": 2.0},
            r"timestep_mode_scale is 2.0; beyond \[-1, 1.75\]",
        ),
        ({"guidance": "range", "guidance_range": (4.0, 2.0)}, r"give \(low, high\), low < high"),
        # Options that do not apply.
        ({"timestep_mu": 0.5}, "timestep_mu is 0.5, but flow.timestep_mode is 'flux_linear'"),
        (
            {"timestep_mode_scale": 1.0},
            "timestep_distribution is 'logit_normal'; it applies to mode",
        ),
        ({"timestep_base_tokens": 64}, "applies to sqrt_ratio only: leave it at 256"),
        (
            {"timestep_distribution": "uniform", "timestep_sigma": 0.5},
            "timestep_sigma is 0.5, but flow.timestep_distribution is 'uniform'",
        ),
        ({"guidance_range": (1.0, 3.0)}, "flow.guidance is 'auto'; it applies to range only"),
        (
            {"guidance": "range", "guidance_value": 2.0},
            "it applies to auto and fixed only: leave it at 1.0",
        ),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        FlowMatchingConfig(**options)


def test_evaluation_is_fixed_and_spreads_times_evenly():
    batch, options = make_batch(samples=24), {"method": "evaluate", "takes_guidance": True}
    seen, metrics = observe(batch, **options)
    again, same = observe(batch, **options)
    assert metrics == same
    np.testing.assert_array_equal(seen["x_t"], again["x_t"])
    np.testing.assert_allclose(np.sort(seen["t"]), np.repeat((np.arange(8) + 0.5) / 8, 3))
    np.testing.assert_array_equal(seen["txt"], batch.txt)  # nothing is dropped
    np.testing.assert_array_equal(seen["guidance"], np.ones(24))  # the velocity learnt is unguided
    assert all(metrics[f"loss_t/{i}/count"] == 3 for i in range(8))
    starts = {float(observe(batch, jax.random.key(i), **options)[0]["t"][0]) for i in range(6)}
    assert len(starts) > 1  # so that small batches together see all times


def test_references_must_be_cut_off_the_prediction():
    def predict(params, frozen, x_t, t, batch, guidance):
        return jnp.concatenate([x_t, batch.ctx], axis=1)

    batch = make_batch()
    loss = functools.partial(velocity_loss, predict, {}, {})
    with pytest.raises(ValueError, match=r"\(6, 8, 4\) for target tokens of \(6, 4, 4\)"):
        jax.eval_shape(loss, batch, batch.x0, jnp.ones(6), None)


NETWORK = MMDiTConfig(
    in_channels=CHANNELS,
    out_channels=CHANNELS,
    vec_in_dim=5,
    context_in_dim=6,
    hidden_size=64,
    num_heads=2,
    depth=1,
    depth_single_blocks=1,
    axes_dim=(4, 14, 14),
    guidance_embed=False,
)


def network(params, frozen, x_t, t, batch, guidance):
    cond = Conditioning(batch.txt, batch.vec, guidance, batch.ctx, batch.pe)
    return make_velocity_fn(MMDiT(NETWORK), params, cond)(x_t, t, None)


@functools.cache
def untrained():
    shapes = jax.eval_shape(functools.partial(init_params, MMDiT(NETWORK)), jax.random.key(0))
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: 0.2 * rng.standard_normal(leaf.shape, np.float32), shapes)


@jax.jit
def velocity_of(params, batch, t):
    return network(params, {}, batch.x0, jnp.full(batch.x0.shape[:1], t), batch, None)


network_batch = functools.partial(make_batch, samples=2, axes_dim=NETWORK.axes_dim)


def test_leaving_out_the_references_is_text_to_image_bit_for_bit():
    batch = network_batch(references=())

    @jax.jit
    def text_to_image(params, batch, t):
        t = jnp.full(batch.x0.shape[:1], t)
        variables = {"params": params}
        return MMDiT(NETWORK).apply(variables, batch.x0, batch.txt, batch.vec, t, None, batch.pe)

    arguments = untrained(), batch, 0.6
    np.testing.assert_array_equal(velocity_of(*arguments), text_to_image(*arguments))


def test_tokens_of_a_reference_are_a_set_with_positions():
    batch = network_batch()
    start, order = NUM_TEXT + math.prod(TARGET), np.array([2, 0, 3, 1])
    ctx = batch.ctx[:, order]
    pe = np.concatenate([batch.pe[:, :start], batch.pe[:, start:][:, order]], axis=1)
    expected = velocity_of(untrained(), batch, 0.6)
    moved = velocity_of(untrained(), batch.replace(ctx=ctx, pe=pe), 0.6)
    np.testing.assert_allclose(moved, expected, rtol=0, atol=1e-5)
    scrambled = velocity_of(untrained(), batch.replace(ctx=ctx), 0.6)
    assert np.abs(scrambled - expected).max() > 1e-3


@pytest.mark.slow
def test_sampling_leaves_the_references_as_they_are():
    batch, timesteps = network_batch(), flow.timestep_schedule(3, 0.5)
    x = batch.x0
    for t, following in itertools.pairwise(timesteps):
        # The sequence put together anew from the references as they were.
        x = x + (following - t) * np.asarray(velocity_of(untrained(), batch.replace(x0=x), t))
    cond = Conditioning(batch.txt, batch.vec, None, batch.ctx, batch.pe)
    velocity_fn = make_velocity_fn(MMDiT(NETWORK), untrained(), cond)
    sampled = jax.jit(lambda x: euler_sample(velocity_fn, x, timesteps))(batch.x0)
    np.testing.assert_allclose(sampled, x, atol=1e-5)


def train(batches, config, options, num_steps):
    """An objective after `num_steps` steps of the network, and its parameters."""
    objective = make_flow_matching(
        network,
        functools.partial(init_params, MMDiT(NETWORK)),
        make_optimizer(options, num_steps),
        config,
        takes_guidance=False,
        ema_decay=0.98,
        learning_rate=make_schedule(options, num_steps),
    )
    state = jax.jit(objective.init)(jax.random.key(0))
    step = jax.jit(objective.step, donate_argnums=0)
    for _ in range(num_steps):
        state, _ = step(state, {}, next(batches), KEY)
    return objective, state.ema_params


def figures_of(objective, params, batch):
    metrics = jax.jit(objective.evaluate)(params, {}, batch, jax.random.key(1))
    return mean_metrics([metrics])


@pytest.mark.slow
@pytest.mark.parametrize(("name", "rate", "num_steps"), [("adamw", 2e-3, 600), ("muon", 2e-2, 250)])
def test_gaussian_data_is_learnt_to_its_floor(name, rate, num_steps, comparisons):
    """The excess of every part of t over the Bayes loss s²/V is at most 3 %."""
    mean, deviation = np.linspace(-1, 1, CHANNELS, dtype=np.float32), 0.7

    def draw(rng, samples):
        batch = network_batch(samples=2, references=())
        x0 = mean + deviation * rng.standard_normal((samples, 4, CHANNELS), np.float32)
        txt, vec = (np.zeros((samples, *x.shape[1:]), np.float32) for x in (batch.txt, batch.vec))
        return batch.replace(x0=x0, txt=txt, vec=vec)

    def best(params, frozen, x_t, t, batch, guidance):
        t, variance = t[:, None, None], deviation**2
        total = (1 - t) ** 2 * variance + t**2
        return (t - (1 - t) * variance) / total * (x_t - (1 - t) * mean) - mean

    config = FlowMatchingConfig(
        timestep_distribution="uniform",
        timestep_mode="const",
        text_dropout=0.0,
        latent_variance=deviation**2,
    )
    options = OptimizerConfig(name, learning_rate=rate, schedule="cosine", warmup_steps=50)
    rng = np.random.default_rng(0)
    objective, params = train(iter(lambda: draw(rng, 64), None), config, options, num_steps)

    held_out = draw(np.random.default_rng(1), 8192)
    ours = figures_of(objective, params, held_out)
    bayes = make_flow_matching(best, None, optax.sgd(0.0), config, takes_guidance=False)
    floor = figures_of(bayes, {}, held_out)  # on the same noise and times
    excess = [
        100 * (ours[f"loss_t_over_floor/{i}"] - floor[f"loss_t_over_floor/{i}"]) for i in range(8)
    ]
    comparisons.notes.append(
        f"{name}, {num_steps} steps on Gaussian data: excess over Bayes in 8 parts of t, %: "
        + " ".join(f"{e:.2f}" for e in excess)
    )
    for i in range(8):
        assert abs(floor[f"loss_t_over_floor/{i}"] - 1) < 0.05  # 1024 samples of 16 values
    assert max(excess) <= 3


@pytest.mark.slow
def test_one_pair_is_learnt_by_heart(comparisons):
    """The loss falls below 0.02 for t > 0.2."""
    one = network_batch(samples=1)

    def repeated(count):
        take = lambda path, x: x if path[0].name in one.SHARED else np.repeat(x, count, axis=0)  # noqa: E731
        return jax.tree_util.tree_map_with_path(take, one)

    config = FlowMatchingConfig(timestep_mode="const", text_dropout=0.0)
    options = OptimizerConfig("muon", learning_rate=2e-2, schedule="cosine", warmup_steps=50)
    batch = repeated(32)
    objective, params = train(iter(lambda: batch, None), config, options, 300)
    figures = figures_of(objective, params, repeated(1024))
    losses = [figures[f"loss_t/{i}"] for i in range(8)]
    comparisons.notes.append(
        "one pair by heart: loss in 8 parts of t: " + " ".join(f"{loss:.4f}" for loss in losses)
    )
    assert max(losses[2:]) < 0.02
    assert losses[1] < 0.02  # the part (1/8, 1/4), with the times from 0.2
