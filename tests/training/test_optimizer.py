"""Optimizers: what they do to which parameters, their schedules, and options that do not apply."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from optax.contrib import scale_by_muon

from kontext_jax.models.mmdit import MMDiT, init_params
from kontext_jax.models.presets import MMDiTConfig
from kontext_jax.training.optimizer import OptimizerConfig, make_optimizer, make_schedule

STACKS = {  # of two layers, with two heads of four channels
    "double_blocks": {
        "img_attn": {
            "q": {"kernel": (2, 8, 2, 4), "bias": (2, 2, 4)},
            "proj": {"kernel": (2, 2, 4, 8)},
        },
        "txt_mlp": {"in_layer": {"kernel": (2, 8, 16)}},
    },
    "img_in": {"kernel": (8, 8)},
}


def draw_params(seed):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda shape: rng.standard_normal(shape, np.float32),
        STACKS,
        is_leaf=lambda node: isinstance(node, tuple),
    )


def flat(tree):
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def one_update(config, params, grads):
    """The first update of the parameters by path."""
    optimizer = make_optimizer(config, 10)
    updates = jax.jit(lambda p, g: optimizer.update(g, optimizer.init(p), p)[0])(params, grads)
    return flat(updates)


@jax.jit
def muon_by_hand(grad):
    """optax's update of one matrix [in, out], of the size of AdamW's."""
    muon = scale_by_muon()
    update, _ = muon.update(grad, muon.init(grad))
    return -0.2 * math.sqrt(max(grad.shape)) * update


def test_muon_takes_each_layer_of_a_stack_as_one_matrix():
    config = OptimizerConfig("muon", learning_rate=1.0, clip_norm=0.0)
    grads = draw_params(1)
    updates, grads = one_update(config, draw_params(0), grads), flat(grads)
    shapes = {
        "double_blocks/img_attn/q/kernel": (8, 8),
        "double_blocks/img_attn/proj/kernel": (8, 8),
        "double_blocks/txt_mlp/in_layer/kernel": (8, 16),
    }
    for path, shape in shapes.items():
        for grad, update in zip(grads[path], updates[path], strict=True):
            expected = muon_by_hand(grad.reshape(shape))
            np.testing.assert_allclose(update.reshape(shape), expected, atol=1e-4, err_msg=path)
    for path in updates.keys() - shapes.keys():  # AdamW's first update
        np.testing.assert_allclose(updates[path], -np.sign(grads[path]), atol=1e-4, err_msg=path)


def test_muon_is_for_the_hidden_matrices_of_the_transformer():
    config = MMDiTConfig(hidden_size=24, num_heads=2, depth=1, axes_dim=(4, 4, 4))
    params = jax.eval_shape(functools.partial(init_params, MMDiT(config)), jax.random.key(0))
    optimizer = make_optimizer(OptimizerConfig("muon", clip_norm=0.0), 10)
    state = jax.eval_shape(optimizer.init, params)
    moments = {
        name: {path.split("mu/")[1] for path in paths(state.inner_states[name]) if "/mu/" in path}
        for name in ("muon", "adamw")
    }
    assert moments["muon"] == {
        path
        for path in paths(params)
        if path.split("/")[0] in ("double_blocks", "single_blocks") and path.endswith("kernel")
    }
    assert moments["adamw"] == paths(params) - moments["muon"]


def paths(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves}


def test_muon_needs_hidden_matrices():
    optimizer = make_optimizer(OptimizerConfig("muon"), 10)
    with pytest.raises(ValueError, match="none of the trained parameters is a hidden matrix"):
        optimizer.init({"img_in": {"kernel": jnp.zeros((2, 2))}})


@pytest.mark.parametrize(
    ("name", "decay_on"), [("adamw", "all"), ("adamw", "matrices"), ("muon", "matrices")]
)
def test_weight_decay_reaches_what_it_says(name, decay_on):
    params = {
        "single_blocks": {
            "mlp_in": {"kernel": jnp.full((1, 4, 6), 2.0), "bias": jnp.full((1, 6), 2.0)},
            "query_norm": {"scale": jnp.full((1, 4), 2.0)},
        }
    }
    zeros = jax.tree.map(jnp.zeros_like, params)
    config = OptimizerConfig(name, learning_rate=0.1, weight_decay=0.5, decay_on=decay_on)
    updates = one_update(config, params, zeros)
    for path, update in updates.items():
        expected = -0.1 if decay_on == "all" or path.endswith("kernel") else 0.0
        np.testing.assert_allclose(update, expected, atol=1e-6, err_msg=path)


def test_gradients_are_clipped_by_their_global_norm():
    params = {"a": jnp.zeros(3), "b": jnp.zeros(1)}
    grads = {"a": jnp.full(3, 3.0), "b": jnp.full(1, 3.0)}  # norm 6
    base = OptimizerConfig(learning_rate=1.0, b1=0.0, b2=0.0, eps=1e3)  # an update near −g/1000
    clipped = one_update(dataclasses.replace(base, clip_norm=1.5), params, grads)
    np.testing.assert_allclose(clipped["a"], -0.75e-3, rtol=1e-3)
    for clip_norm in (0.0, 7.0):
        free = one_update(dataclasses.replace(base, clip_norm=clip_norm), params, grads)
        np.testing.assert_allclose(free["b"], -3e-3, rtol=4e-3)


@pytest.mark.parametrize(
    ("schedule", "middle", "last"), [("constant", 1, 1), ("linear", 0.6, 0.2), ("cosine", 0.6, 0.2)]
)
def test_schedules_warm_up_and_end_where_they_say(schedule, middle, last):
    options = {} if schedule == "constant" else {"end_fraction": 0.2}
    config = OptimizerConfig(learning_rate=2.0, schedule=schedule, warmup_steps=4, **options)
    rate = make_schedule(config, 24)
    np.testing.assert_allclose([rate(n) for n in range(5)], [0.5, 1, 1.5, 2, 2], rtol=1e-6)
    np.testing.assert_allclose([rate(14), rate(24), rate(99)], [2 * middle, 2 * last, 2 * last])
    falls = np.diff([float(rate(n)) for n in range(4, 25)])
    assert (falls <= 0).all()


def test_the_schedule_counts_updates():
    config = OptimizerConfig(learning_rate=1.0, warmup_steps=2, b1=0.0, b2=0.0, clip_norm=0.0)
    optimizer = make_optimizer(config, 10)
    params = {"w": jnp.zeros(1)}
    state, steps = optimizer.init(params), []
    for _ in range(3):
        updates, state = optimizer.update({"w": jnp.ones(1)}, state, params)
        steps.append(float(updates["w"][0]))
    assert steps == pytest.approx([-0.5, -1, -1], rel=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "adam"}, "optimizer.name is 'adam'; choose adamw, muon"),
        ({"schedule": "step"}, "optimizer.schedule is 'step'; choose constant, linear, cosine"),
        ({"learning_rate": -1.0}, "learning_rate is -1.0; it must be at least 0"),
        ({"b2": 1.0}, r"b2 is 1.0; it must be in \[0, 1\)"),
        ({"eps": 0.0}, "eps is 0.0; it must be positive"),
        ({"end_fraction": 0.1}, "end_fraction is 0.1, but schedule is constant"),
        ({"muon_steps": 3}, "muon_steps is 3, but the optimizer is adamw"),
        ({"decay_on": "matrices"}, "decay_on is 'matrices', but weight_decay is 0"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        OptimizerConfig(**options)


def test_a_warm_up_must_end():
    with pytest.raises(ValueError, match="warmup_steps is 10, but the run has 10 steps"):
        make_optimizer(OptimizerConfig(warmup_steps=10), 10)
