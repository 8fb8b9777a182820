"""A stack of blocks is the same network scanned and as a list."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kontext_jax.models import lora
from kontext_jax.models.mmdit import Conditioning, MMDiT, init_params, make_velocity_fn, unstacked
from kontext_jax.models.presets import MMDiTConfig
from kontext_jax.ops.rope import rope_table

CONFIG = MMDiTConfig(
    in_channels=8,
    out_channels=8,
    hidden_size=32,
    num_heads=2,
    depth=2,
    depth_single_blocks=3,
    context_in_dim=12,
    vec_in_dim=6,
    axes_dim=(4, 6, 6),
)


@pytest.fixture(scope="module")
def setting():
    """The stacked model, its parameters, conditioning of 1 example and its target tokens."""
    model = MMDiT(CONFIG, zero_init=False)
    params = jax.jit(lambda key: init_params(model, key))(jax.random.key(0))
    random = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(random.standard_normal(shape), jnp.float32)  # noqa: E731
    pe = rope_table(random.integers(0, 9, (5 + 6, 3)), CONFIG.axes_dim, CONFIG.theta)
    cond = Conditioning(draw(1, 5, 12), draw(1, 6), jnp.ones(1), draw(1, 2, 8), pe)
    return model, params, cond, draw(1, 4, 8)


def copied(params):
    return jax.tree.map(jnp.copy, params)


def velocity(model, params, cond, x, adapters=None):
    def run(params, adapters):
        return make_velocity_fn(model, params, cond, adapters)(x, jnp.full(1, 0.5), None)

    with jax.default_matmul_precision("highest"):
        return jax.jit(run)(params, adapters)


def test_a_list_of_blocks_computes_what_the_scan_does(setting):
    model, params, cond, x = setting
    listed = model.clone(block_form="list")
    want = velocity(model, params, cond, x)
    got = velocity(listed, unstacked(copied(params)), cond, x)
    assert float(jnp.std(want)) > 0.01
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_unstacked_parameters_are_those_of_the_list_and_use_up_the_stacks(setting):
    model, params, _, _ = setting
    given = copied(params)
    got = unstacked(given)
    wanted = jax.eval_shape(
        lambda key: init_params(model.clone(block_form="list"), key), jax.random.key(0)
    )
    assert jax.tree.map(jnp.shape, got) == jax.tree.map(jnp.shape, wanted)
    kernel = got["single_blocks"]["2"]["mlp_in"]["kernel"]
    np.testing.assert_array_equal(kernel, params["single_blocks"]["mlp_in"]["kernel"][2])
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(given["single_blocks"]))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(got))


def test_adapters_apply_to_a_list_once_unstacked_and_are_refused_before(setting):
    model, params, cond, x = setting
    listed = model.clone(block_form="list")
    adapters = lora.init_lora(lora.LoraConfig(rank=2), params, jax.random.key(1))
    adapters = jax.tree.map(lambda leaf: leaf + 0.1, adapters)
    want = velocity(model, params, cond, x, adapters)
    got = velocity(listed, unstacked(copied(params)), cond, x, unstacked(copied(adapters)))
    np.testing.assert_allclose(got, want, atol=1e-5)
    with pytest.raises(ValueError, match=r"adapters are stacked.*unstack them"):
        velocity(listed, unstacked(copied(params)), cond, x, adapters)


def test_an_unknown_form_is_refused(setting):
    model, params, cond, x = setting
    with pytest.raises(ValueError, match="unknown form of a stack 'tree'; choose scan or list"):
        velocity(model.clone(block_form="tree"), params, cond, x)
