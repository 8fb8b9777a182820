"""Rotary positions: the rotation itself, and the precision of its tables."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from kontext_jax.ops import rope
from kontext_jax.ops.rope import full_width, rope_table, rotate, scaled

AXES = (4, 6, 6)
HEAD_DIM = sum(AXES)


def random_ids(*shape, seed=0, high=64):
    return np.random.default_rng(seed).integers(0, high, (*shape, 3)).astype(np.float32)


def random_heads(num_tokens, seed=0, batch=1):
    return jax.random.normal(jax.random.key(seed), (batch, 2, num_tokens, HEAD_DIM))


def apply_rope(x, table):
    return rotate(x, jnp.ones((1, 1, 1, 1)), full_width(table))


def test_rotation_is_multiplication_by_complex_phases():
    ids, x = random_ids(5), random_heads(5)
    rotated = apply_rope(x, rope_table(ids, AXES, 10_000))
    frequencies = np.concatenate([10_000.0 ** (-np.arange(0, d, 2) / d) for d in AXES])
    axis_of_pair = np.repeat(np.arange(3), [d // 2 for d in AXES])
    phases = np.exp(1j * ids[:, axis_of_pair].astype(np.float64) * frequencies)
    half = HEAD_DIM // 2
    expected = (np.asarray(x[..., :half]) + 1j * np.asarray(x[..., half:])) * phases
    np.testing.assert_allclose(rotated[..., :half], expected.real, atol=1e-6)
    np.testing.assert_allclose(rotated[..., half:], expected.imag, atol=1e-6)


def test_dot_products_depend_on_differences_of_positions_only():
    ids, shift = random_ids(6), np.array([1, 7, 30], np.float32)
    q, k = random_heads(6, seed=1), random_heads(6, seed=2)

    def scores(ids):
        table = rope_table(ids, AXES, 10_000)
        return jnp.einsum("bhqd,bhkd->bhqk", apply_rope(q, table), apply_rope(k, table))

    with jax.default_matmul_precision("highest"):
        np.testing.assert_allclose(scores(ids), scores(ids + shift), atol=1e-5)


def test_position_zero_leaves_text_alone():
    x = random_heads(3)
    np.testing.assert_array_equal(apply_rope(x, rope_table(np.zeros((3, 3)), AXES, 10_000)), x)


def test_a_table_per_image_equals_a_shared_one_where_positions_agree():
    ids = np.stack([random_ids(4, seed=1), random_ids(4, seed=2)])
    x = random_heads(4, batch=2)
    tables = rope_table(ids, AXES, 10_000)
    assert tables.shape == (2, 2, 4, HEAD_DIM // 2)
    together = apply_rope(x, tables)
    for i in range(2):
        np.testing.assert_array_equal(together[i : i + 1], apply_rope(x[i : i + 1], tables[i]))


def test_rotation_keeps_the_dtype_but_not_its_rounding_errors():
    x = random_heads(4).astype(jnp.bfloat16)
    table = rope_table(random_ids(4), AXES, 10_000)
    rotated = apply_rope(x, table)
    assert rotated.dtype == jnp.bfloat16
    exact = apply_rope(x.astype(jnp.float32), table)
    np.testing.assert_array_equal(rotated, exact.astype(jnp.bfloat16))


def test_float32_and_float64_angles_differ_by_rounding_only():
    ids = random_ids(64, high=128)
    low, high = (rope_table(ids, (16, 56, 56), 10_000, p) for p in ("float32", "float64"))
    assert low.dtype == high.dtype == np.float32
    difference = np.abs(low - high).max()
    assert 0 < difference < 1e-4  # an angle of 128 rad has ulp 7.6e-6


def test_positions_in_bfloat16_merge_neighbours_above_256():
    ids = np.array([[0, 255, 256], [0, 254, 257]], np.float32)
    rounded = rope_table(ids, AXES, 10_000, ids_dtype=ml_dtypes.bfloat16)
    exact = rope_table(ids, AXES, 10_000)
    columns = slice(5, 8)  # the pairs of the last axis
    assert (rounded[:, 0, columns] == rounded[:, 1, columns]).all()
    assert (exact[:, 0, columns] != exact[:, 1, columns]).any()
    np.testing.assert_array_equal(rounded[:, :, :5], exact[:, :, :5])


@pytest.mark.parametrize(
    ("ids", "axes", "precision", "message"),
    [
        (np.zeros((2, 2)), AXES, "float64", "one per axis"),
        (np.zeros((2, 3)), (3, 5, 8), "float64", "must be even"),
        (np.zeros((2, 3)), AXES, "bfloat16", "choose float64 or float32"),
    ],
)
def test_wrong_arguments_are_refused(ids, axes, precision, message):
    with pytest.raises(ValueError, match=message):
        rope_table(ids, axes, 10_000, precision)


def norm_then_rotate(x, scale, table):
    """Of `rotate`, step by step, for autodiff."""
    gain = jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6)
    first, second = jnp.split(x * gain * scale, 2, axis=-1)
    cos, sin = table[..., None, 0, :, :], table[..., None, 1, :, :]
    return jnp.concatenate([cos * first - sin * second, sin * first + cos * second], axis=-1)


@pytest.mark.parametrize("batched", [False, True])
def test_rotation_with_a_norm_has_the_gradients_of_its_steps(batched):
    ids = random_ids(2, 5) if batched else random_ids(5)
    table = jnp.asarray(rope_table(ids, AXES, 10_000))
    keys = jax.random.split(jax.random.key(4), 3)
    x, weights = (jax.random.normal(key, (2, 3, 5, HEAD_DIM)) for key in keys[:2])
    scale = jax.random.normal(keys[2], (HEAD_DIM,))

    def at_once(x, scale, table):
        gain = jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6)
        return rotate(x, gain, scaled(full_width(table), scale))

    def value_and_gradients(function):
        loss = lambda *a: jnp.sum(weights * function(*a))  # noqa: E731
        return function(x, scale, table), *jax.jit(jax.grad(loss, (0, 1, 2)))(x, scale, table)

    pairs = zip(value_and_gradients(at_once), value_and_gradients(norm_then_rotate), strict=True)
    for got, want in pairs:
        np.testing.assert_allclose(got, want, atol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_halves_are_exchanged_exactly_by_a_product_too(dtype):
    x = random_heads(7).astype(dtype)
    got = jax.jit(rope.exchange_by_product)(x)
    assert got.dtype == jnp.float32
    np.testing.assert_array_equal(got, np.roll(np.asarray(x, np.float32), HEAD_DIM // 2, axis=-1))
