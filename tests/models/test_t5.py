"""T5 encoder: positions, masking, precision, size."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kontext_jax.models.presets import T5Config
from kontext_jax.models.t5 import T5Encoder, relative_position_bucket

CONFIG = T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)
IDS = jnp.asarray([[5, 9, 17, 33, 1, 0, 0, 0], [40, 3, 8, 12, 60, 21, 1, 0]], jnp.int32)


@functools.cache
def make_params():
    return T5Encoder(CONFIG, jnp.float32).init(jax.random.key(0), IDS)["params"]


@functools.cache
def _encoder(dtype):
    return jax.jit(T5Encoder(CONFIG, dtype).apply)


def encode(ids, mask=None, params=None, dtype=jnp.float32):
    with jax.default_matmul_precision("highest"):
        return np.asarray(_encoder(dtype)({"params": params or make_params()}, ids, mask))


def replace_leaf(params, path, change):
    """A copy of the tree with the array at `path` changed."""
    head, *rest = path
    new = change(params[head]) if not rest else replace_leaf(params[head], rest, change)
    return {**params, head: new}


def test_buckets_match_a_table_worked_out_by_hand():
    # Each way: one bucket for each of 0–7, then 8 + floor(8·log(d/8)/log(16)), at most 15.
    table = {0: 0, 1: 1, 7: 7, 8: 8, 11: 8, 12: 9, 15: 9, 16: 10, 22: 10, 23: 11, 31: 11, 32: 12}
    table |= {45: 12, 46: 13, 63: 13, 64: 14, 90: 14, 91: 15, 127: 15, 128: 15, 511: 15}
    distance = np.array(list(table))
    bucket = np.array(list(table.values()))
    np.testing.assert_array_equal(relative_position_bucket(-distance, 32, 128), bucket)
    right = np.where(distance > 0, bucket + 16, 0)
    np.testing.assert_array_equal(relative_position_bucket(distance, 32, 128), right)


@pytest.mark.parametrize("silenced", [0, 1])
def test_both_blocks_read_the_one_bias_table(silenced):
    # With one block's attention silenced, the table can act only through the other's.
    silence = functools.partial(replace_leaf, path=["blocks", "o", "kernel"])
    params = silence(make_params(), change=lambda o: o.at[silenced].set(0))
    flat = replace_leaf(params, ["relative_attention_bias", "embedding"], jnp.zeros_like)
    assert np.abs(encode(IDS, params=params) - encode(IDS, params=flat)).max() > 1e-3


def test_word_order_matters_only_through_the_bias():
    order = np.array([3, 1, 0, 2, 4, 7, 5, 6])
    with_bias = make_params()
    without = replace_leaf(with_bias, ["relative_attention_bias", "embedding"], jnp.zeros_like)
    moved = [
        encode(IDS[:, order], params=p) - encode(IDS, params=p)[:, order]
        for p in (without, with_bias)
    ]
    assert np.abs(moved[0]).max() < 1e-5
    assert np.abs(moved[1]).max() > 1e-2


def test_padding_is_seen_without_a_mask():
    short, long = encode(IDS[:1, :5]), encode(IDS[:1])
    assert np.abs(short - long[:, :5]).max() > 1e-2


def test_mask_hides_padding_and_changes_nothing_else():
    mask = jnp.asarray([[1] * 5 + [0] * 3, [1] * 7 + [0]], bool)
    masked = encode(IDS, mask)
    np.testing.assert_allclose(masked[:1, :5], encode(IDS[:1, :5]), atol=1e-5)
    np.testing.assert_allclose(masked[1:, :7], encode(IDS[1:, :7]), atol=1e-5)
    np.testing.assert_allclose(encode(IDS, jnp.ones_like(mask)), encode(IDS), atol=1e-6)


def test_untrained_weights_tell_prompts_apart():
    features = encode(IDS)
    other = encode(IDS.at[0, 2].set(18))
    assert np.abs(features[0] - other[0]).mean() > 1e-2
    np.testing.assert_array_equal(features[1], other[1])
    assert 0.5 < features.std() < 2


def test_bfloat16_stays_close_to_float32():
    full, half = encode(IDS), encode(IDS, dtype=jnp.bfloat16)
    assert half.dtype == jnp.bfloat16
    error = np.abs(full - half.astype(np.float32))
    # bfloat16 keeps 8 bits: 2⁻⁹ relative per rounding, a dozen roundings deep (found: 0.013).
    assert error.max() < 0.05 and error.mean() < 0.01


def test_stored_dtype_does_not_decide_the_compute_dtype():
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), make_params())
    upcast = jax.tree.map(lambda p: p.astype(jnp.float32), params)
    np.testing.assert_array_equal(encode(IDS, params=params), encode(IDS, params=upcast))


def test_float16_is_refused():
    with pytest.raises(ValueError, match=r"T5 cannot compute in float16.*use bfloat16 or float32"):
        T5Encoder(CONFIG, jnp.float16)


def test_t5_xxl_has_the_published_size():
    ids = jax.ShapeDtypeStruct((1, 512), jnp.int32)
    shapes = jax.eval_shape(T5Encoder(T5Config()).init, jax.random.key(0), ids)["params"]
    block = 4 * 4096 * 64 * 64 + 3 * 4096 * 10240 + 2 * 4096
    assert block * 24 + 32128 * 4096 + 32 * 64 + 4096 == 4_762_310_656
    assert sum(x.size for x in jax.tree.leaves(shapes)) == 4_762_310_656
