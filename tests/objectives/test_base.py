"""The gradient step that objectives share, on a loss that can be checked by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kontext_jax.batches import TokenBatch
from kontext_jax.objectives.base import (
    make_gradient_step,
    mean_metrics,
    micro_batch,
    num_samples,
    sample_keys,
    use_key,
)
from kontext_jax.objectives.state import make_train_state

KEY = jax.random.key(3)


def loss_fn(params, frozen, batch, key, sample_index):
    """Squares of a linear map of `x` to noise that each sample draws for itself."""
    keys = sample_keys(key, "noise", sample_index)
    noise = jax.vmap(lambda k: jax.random.normal(k, (3,)))(keys)
    loss = jnp.mean((batch["x"] @ params["w"] + params["b"] + frozen - noise) ** 2, axis=1)
    large = (loss > 1).astype(jnp.float32)
    return jnp.mean(loss), {
        "mean_x": jnp.mean(batch["x"]),
        "large/sum": jnp.sum(large * loss),
        "large/count": jnp.sum(large),
    }


def fresh_params():
    return {"w": jnp.ones((5, 3)) / 2, "b": jnp.zeros(3)}


def batch_of(samples=8, seed=0):
    return {"x": np.random.default_rng(seed).standard_normal((samples, 5), np.float32)}


@functools.cache
def compiled_step(accumulate_steps=1, ema_decay=0.9):
    optimizer = optax.adamw(1e-2)
    step = make_gradient_step(
        loss_fn,
        optimizer,
        ema_decay=ema_decay,
        accumulate_steps=accumulate_steps,
        learning_rate=lambda count: 0.1 * count,
    )
    init = functools.partial(make_train_state, optimizer=optimizer, with_ema=ema_decay > 0)
    return jax.jit(init), jax.jit(step, donate_argnums=0)


def run(batches, accumulate_steps=1, state=None, key=KEY):
    init, step = compiled_step(accumulate_steps)
    state = init(fresh_params()) if state is None else state
    rows = []
    for batch in batches:
        state, metrics = step(state, jnp.float32(0), batch, key)
        rows.append({name: float(value) for name, value in metrics.items()})
    return state, rows


def assert_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def assert_close(a, b):
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-6), a, b)


def spoilt_batch():
    batch = batch_of()
    batch["x"][2, 1] = np.nan
    return batch


def test_a_step_is_the_optimizers_on_the_mean_gradient():
    batch, params = batch_of(), fresh_params()
    state, (metrics,) = run([batch])

    @jax.jit
    def by_hand(step_key):
        grad = jax.value_and_grad(loss_fn, has_aux=True)
        (loss, _), grads = grad(params, 0.0, batch, step_key, jnp.arange(8))
        optimizer = optax.adamw(1e-2)
        updates, _ = optimizer.update(grads, optimizer.init(params), params)
        return loss, {
            "grad_norm": grads,
            "update_norm": updates,
            "param_norm": optax.apply_updates(params, updates),
        }

    loss, trees = by_hand(jax.random.fold_in(KEY, 0))
    assert_close(state.params, trees["param_norm"])
    for name, tree in trees.items():
        flat = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])
        assert metrics[name] == pytest.approx(np.linalg.norm(flat), rel=1e-5), name
    assert metrics["loss"] == pytest.approx(float(loss), rel=1e-6)
    assert metrics["skipped"] == metrics["skipped_in_a_row"] == 0


def test_metrics_are_float32_scalars():
    init, step = compiled_step()
    _, metrics = jax.eval_shape(step, jax.eval_shape(init, fresh_params()), 0.0, batch_of(), KEY)
    assert {(value.shape, str(value.dtype)) for value in metrics.values()} == {((), "float32")}


def test_micro_batches_add_up_to_the_batch():
    batches = [batch_of(seed=i) for i in range(3)]
    whole, whole_rows = run(batches)
    parts, parts_rows = run(batches, accumulate_steps=4)
    assert_close(parts, whole)
    for part, row in zip(parts_rows, whole_rows, strict=True):
        assert part == pytest.approx(row, rel=1e-5, abs=1e-6)
    assert 0 < whole_rows[0]["large/count"] < 8  # so that some parts count more than others


def test_micro_batches_take_every_nth_sample_and_share_what_is_shared():
    batch = TokenBatch(
        x0=np.arange(6.0)[:, None, None],
        ctx=None,
        txt=np.zeros((6, 1, 1)),
        vec=np.zeros((6, 1)),
        null_txt=np.zeros((1, 1)),
        null_vec=np.zeros(1),
        pe=np.zeros((2, 3, 1)),
    )
    assert num_samples(batch) == 6
    part = micro_batch(batch, 1, 3)
    np.testing.assert_array_equal(part.x0[:, 0, 0], [1, 4])
    assert num_samples(part) == 2
    for name in TokenBatch.SHARED:
        assert getattr(part, name) is getattr(batch, name)
    with pytest.raises(ValueError, match=r"different numbers of samples: .*vec.*: 5"):
        num_samples(batch.replace(vec=np.zeros((5, 1))))


def test_a_batch_must_divide_into_micro_batches():
    with pytest.raises(ValueError, match="8 samples does not divide into 3 micro-batches"):
        run([batch_of()], accumulate_steps=3)


def test_a_step_that_is_not_finite_changes_nothing_but_counts():
    before, _ = run([batch_of()])
    kept = jax.tree.map(np.asarray, before)  # its buffers are donated
    state, rows = run([spoilt_batch(), spoilt_batch(), batch_of()], state=before)
    assert [row["skipped"] for row in rows] == [1, 1, 0]
    assert [row["skipped_in_a_row"] for row in rows] == [1, 2, 0]
    assert rows[-1]["skipped_total"] == state.skipped == 2
    assert rows[0]["update_norm"] == 0 and np.isnan(rows[0]["loss"])
    assert rows[0]["param_norm"] == rows[1]["param_norm"] > 0
    assert state.step == 4
    # Updates made, not steps taken, drive the schedule.
    assert [row["learning_rate"] for row in rows] == pytest.approx([0.1, 0.1, 0.1])

    skipped, _ = run([spoilt_batch()], state=jax.tree.map(jnp.asarray, kept))
    for name in ("params", "opt_state", "ema_params"):
        assert_equal(getattr(skipped, name), getattr(kept, name))


def test_an_infinite_gradient_of_a_finite_loss_is_skipped():
    def loss_fn(params, frozen, batch, key, sample_index):
        return jnp.sum(jnp.sqrt(params["w"])), {}  # the slope at 0 has no bound

    optimizer = optax.sgd(0.1)
    state = make_train_state({"w": jnp.zeros(2)}, optimizer, with_ema=False)
    state, metrics = jax.jit(make_gradient_step(loss_fn, optimizer))(state, {}, batch_of(), KEY)
    assert metrics["loss"] == 0 and metrics["skipped"] == 1
    np.testing.assert_array_equal(state.params["w"], [0, 0])


def test_one_bad_micro_batch_spoils_its_step():
    before = compiled_step(4)[0](fresh_params())
    state, (row,) = run([spoilt_batch()], accumulate_steps=4, state=before)
    assert row["skipped"] == 1
    assert_equal(state.params, fresh_params())


def test_the_average_follows_its_documented_decay():
    state = compiled_step()[0](fresh_params())
    expected = jax.tree.map(np.asarray, fresh_params())
    for n in range(4):
        state, _ = run([batch_of(seed=n)], state=state)
        decay = min(0.9, (1 + n) / (10 + n))
        for name, params in state.params.items():
            expected[name] = decay * expected[name] + (1 - decay) * np.asarray(params)
    assert_close(state.ema_params, expected)
    assert {str(leaf.dtype) for leaf in state.ema_params.values()} == {"float32"}


def test_without_decay_there_is_no_average():
    init, step = compiled_step(ema_decay=0.0)
    state = jax.eval_shape(init, fresh_params())
    state, _ = jax.eval_shape(step, state, 0.0, batch_of(), KEY)
    assert state.ema_params is None
    with pytest.raises(ValueError, match=r"ema_decay is 0.9, but the state has no average"):
        jax.eval_shape(compiled_step()[1], state, 0.0, batch_of(), KEY)


def test_two_halves_of_a_run_equal_the_whole():
    batches = [batch_of(seed=i) for i in range(6)]
    whole, whole_rows = run(batches)
    half, first = run(batches[:3])
    stored = jax.tree.map(np.asarray, half)
    resumed, second = run(batches[3:], state=jax.tree.map(jnp.asarray, stored))
    assert first + second == whole_rows
    assert_equal(resumed, whole)


def test_every_step_and_key_draws_anew():
    def loss_of(state, key):  # of the same parameters
        return run([batch_of()], state=state, key=key)[1][0]["loss"]

    init, _ = compiled_step()
    later = init(fresh_params()).replace(step=jnp.int32(1))
    losses = [loss_of(None, KEY), loss_of(None, jax.random.key(4)), loss_of(later, KEY)]
    assert len(set(losses)) == 3


def test_uses_of_randomness_are_independent():
    words = {use: tuple(jax.random.key_data(use_key(KEY, use))) for use in ("noise", "t", "text")}
    assert len({tuple(int(w) for w in word) for word in words.values()}) == 3
    some, every = (
        jax.random.key_data(sample_keys(KEY, "noise", np.arange(first, 4))) for first in (2, 0)
    )
    np.testing.assert_array_equal(some, every[2:])  # by the place in the batch, not in the part
    assert len(np.unique(every, axis=0)) == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ema_decay": 1.0}, r"ema_decay is 1.0; it must be in \[0, 1\)"),
        ({"accumulate_steps": 0}, "accumulate_steps is 0; it must be at least 1"),
    ],
)
def test_options_of_the_step_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        make_gradient_step(loss_fn, optax.sgd(0.1), **options)


def test_master_parameters_must_be_float32():
    params = {"a": {"kernel": jnp.zeros(2, jnp.bfloat16)}, "b": jnp.zeros(1)}
    with pytest.raises(TypeError, match=r"must be float32.*cast a/kernel: bfloat16$"):
        make_train_state(params, optax.sgd(0.1), with_ema=False)


def test_means_over_steps_weigh_by_what_was_counted():
    rows = [
        {
            "loss": 1.0,
            "skipped": 0,
            "bin/sum": 6.0,
            "bin/count": 3,
            "none/sum": 0.0,
            "none/count": 0,
        },
        {"loss": 2.0, "skipped": 0, "bin/sum": 1.0, "bin/count": 1, "only": 5.0},
        {"loss": np.nan, "skipped": 1, "bin/sum": np.nan, "bin/count": 2},
    ]
    means = mean_metrics(rows)
    assert means == {"loss": 1.5, "skipped": pytest.approx(1 / 3), "bin": 7 / 4, "only": 5.0}
