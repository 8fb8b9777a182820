"""bfloat16 compute with float32 weights: what is summed in float32 for the gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kontext_jax.models.layers import Dense, Modulation, gated

NUM_TOKENS = 2048
# Sums over tokens in float32 keep this; one rounding to bfloat16 has 2⁻⁹ = 2e-3.
FLOAT32_SUM = 1e-5


def draw(seed, *shape):
    """Positive on average, so that long sums do not cancel; exactly representable in bfloat16."""
    values = np.random.default_rng(seed).standard_normal(shape) + 1
    return jnp.asarray(values, jnp.bfloat16)


def relative_error(found, expected):
    assert found.dtype == jnp.float32
    return np.abs(np.asarray(found, np.float64) - expected).max() / np.abs(expected).max()


def gradients(apply, params, dy):
    """Of the sum of dy times the output, by every parameter."""
    loss = lambda params: jnp.vdot(apply(params).astype(jnp.float32), dy.astype(jnp.float32))  # noqa: E731
    return jax.jit(jax.grad(loss))(params)


@pytest.mark.parametrize("num_in_axes", [1, 2])
def test_weights_get_the_float32_sum_over_tokens(num_in_axes):
    x = draw(0, 2, NUM_TOKENS, *(4, 8)[:num_in_axes])
    dense = Dense((3, 5), num_in_axes, dtype=jnp.bfloat16)
    params = dense.init(jax.random.key(0), x)["params"]
    dy = draw(1, 2, NUM_TOKENS, 3, 5)
    found = gradients(lambda p: dense.apply({"params": p}, x), params, dy)
    x64, dy64 = np.asarray(x, np.float64), np.asarray(dy, np.float64)
    expected = np.einsum("bs...,bsop->...op", x64, dy64)
    assert relative_error(found["kernel"], expected) < FLOAT32_SUM
    assert relative_error(found["bias"], dy64.sum((0, 1))) < FLOAT32_SUM


def test_inputs_of_a_product_get_a_gradient_in_the_compute_dtype():
    x = draw(0, 2, 7, 8)
    params = Dense((5,)).init(jax.random.key(0), x)["params"]

    def loss(x, dtype):
        dense = Dense((5,), dtype=dtype)
        return jnp.sum(dense.apply({"params": params}, x).astype(jnp.float32) ** 2)

    low = jax.grad(loss)(x, jnp.bfloat16)
    assert low.dtype == jnp.bfloat16
    exact = np.asarray(jax.grad(loss)(x.astype(jnp.float32), jnp.float32))
    assert np.abs(low.astype(np.float32) - exact).max() < 0.03 * np.abs(exact).max()


def test_modulation_weights_get_the_float32_sum_over_the_batch():
    vec, dy = draw(0, 512, 8), draw(1, 512, 2, 3, 8)
    module = Modulation(2, 3, dtype=jnp.bfloat16, zero_init=False)
    params = module.init(jax.random.key(0), vec)["params"]
    found = gradients(lambda p: module.apply({"params": p}, vec), params, dy)
    rows = np.asarray(jax.nn.silu(vec), np.float64)  # rounded to bfloat16, as the product sees it
    dy64 = np.asarray(dy, np.float64)
    assert relative_error(found["kernel"], np.einsum("bd,bnco->ndco", rows, dy64)) < FLOAT32_SUM
    assert relative_error(found["bias"], dy64.sum(0)) < FLOAT32_SUM


def test_gates_are_summed_in_float32_and_rounded_once():
    gate, y, dy = draw(0, 2, 8), draw(1, 2, NUM_TOKENS, 8), draw(2, 2, NUM_TOKENS, 8)
    loss = lambda gate: jnp.vdot(gated(gate, y).astype(jnp.float32), dy.astype(jnp.float32))  # noqa: E731
    found = np.asarray(jax.grad(loss)(gate), np.float64)
    expected = np.sum(np.asarray(y, np.float64) * np.asarray(dy, np.float64), axis=1)
    assert (np.abs(found - expected) <= 2**-8 * np.abs(expected)).all()


def test_float32_gradients_are_those_of_a_plain_product():
    x, dy = draw(0, 2, 64, 8).astype(jnp.float32), draw(1, 2, 64, 5).astype(jnp.float32)
    dense = Dense((5,))
    params = dense.init(jax.random.key(0), x)["params"]
    found = gradients(lambda p: dense.apply({"params": p}, x), params, dy)
    plain = gradients(lambda p: x @ p["kernel"] + p["bias"], params, dy)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), found, plain)
