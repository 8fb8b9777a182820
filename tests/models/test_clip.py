"""CLIP text encoder: causality, pooling, activations, size."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kontext_jax.models.clip import ACTIVATIONS, CLIPText, pooled_positions
from kontext_jax.models.presets import CLIPConfig

CONFIG = CLIPConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=12,
)
IDS = jnp.asarray([[62, 5, 9, 63, 63, 63, 63, 63], [62, 40, 3, 8, 12, 60, 21, 63]], jnp.int32)


@functools.cache
def make_params():
    return CLIPText(CONFIG, jnp.float32).init(jax.random.key(0), IDS)["params"]


@functools.cache
def _encoder(config, dtype):
    return jax.jit(CLIPText(config, dtype).apply)


def encode(ids, config=CONFIG, dtype=jnp.float32):
    with jax.default_matmul_precision("highest"):
        hidden, pooled = _encoder(config, dtype)({"params": make_params()}, ids)
    return np.asarray(hidden), np.asarray(pooled)


def test_a_token_sees_only_those_before_it():
    hidden, _ = encode(IDS)
    changed, _ = encode(IDS.at[1, 4].set(33))
    np.testing.assert_array_equal(hidden[1, :4], changed[1, :4])
    assert (np.abs(hidden[1, 4:] - changed[1, 4:]).max(axis=-1) > 1e-3).all()


def test_legacy_pooling_takes_the_highest_id():
    ids = jnp.asarray([[60, 2, 5, 63, 63], [60, 5, 2, 61, 2]], jnp.int32)
    np.testing.assert_array_equal(pooled_positions(ids, 2), [3, 3])


def test_modern_pooling_takes_the_first_end_of_text():
    ids = jnp.asarray([[60, 7, 5, 63, 7], [60, 5, 2, 61, 7], [60, 5, 2, 61, 3]], jnp.int32)
    np.testing.assert_array_equal(pooled_positions(ids, 7), [1, 4, 0])


@pytest.mark.parametrize("eos_token_id", [2, 63])
def test_pooled_is_the_row_of_the_end_of_text_token(eos_token_id):
    config = dataclasses.replace(CONFIG, eos_token_id=eos_token_id)
    hidden, pooled = encode(IDS, config)
    np.testing.assert_array_equal(pooled, [hidden[0, 3], hidden[1, 7]])


def test_padding_after_the_end_does_not_reach_pooled():
    _, pooled = encode(IDS[:1])
    _, shorter = encode(IDS[:1, :4])
    np.testing.assert_allclose(pooled, shorter, atol=1e-6)


def test_word_order_reaches_pooled():
    _, pooled = encode(IDS)
    _, swapped = encode(IDS[:, np.array([0, 2, 1, 3, 4, 5, 6, 7])])
    assert (np.abs(pooled - swapped).mean(axis=-1) > 1e-3).all()


def test_untrained_weights_tell_prompts_apart():
    hidden, pooled = encode(IDS)
    assert np.abs(pooled[0] - pooled[1]).mean() > 1e-1
    assert 0.5 < hidden.std() < 2


def test_activation_follows_the_config():
    quick, _ = encode(IDS)
    exact, _ = encode(IDS, dataclasses.replace(CONFIG, hidden_act="gelu"))
    assert np.abs(quick - exact).max() > 1e-4
    with pytest.raises(
        ValueError, match=r"'relu' is unknown; choose one of \['gelu', 'quick_gelu'\]"
    ):
        CLIPText(dataclasses.replace(CONFIG, hidden_act="relu"))


# 1/(1 + e^−1.702), and (1 + erf(1/√2))/2; the tanh form of the GELU is 0.841192 there.
@pytest.mark.parametrize(("name", "value"), [("quick_gelu", 0.845796), ("gelu", 0.841345)])
def test_activation_at_one(name, value):
    np.testing.assert_allclose(ACTIVATIONS[name](jnp.float32(1)), value, atol=1e-6)


def test_bfloat16_stays_close_to_float32():
    (full, _), (half, pooled) = encode(IDS), encode(IDS, dtype=jnp.bfloat16)
    assert half.dtype == pooled.dtype == jnp.bfloat16
    error = np.abs(full - half.astype(np.float32))
    assert error.max() < 0.05 and error.mean() < 0.01


def test_more_tokens_than_positions_are_refused():
    with pytest.raises(ValueError, match="CLIP has 12 positions, found 13 tokens; truncate"):
        encode(jnp.zeros((1, 13), jnp.int32))


def test_clip_l_has_the_published_size():
    ids = jax.ShapeDtypeStruct((1, 77), jnp.int32)
    shapes = jax.eval_shape(CLIPText(CLIPConfig()).init, jax.random.key(0), ids)["params"]
    block = 4 * (768 * 768 + 768) + (768 * 3072 + 3072) + (3072 * 768 + 768) + 4 * 768
    assert block * 12 + (49408 + 77) * 768 + 2 * 768 == 123_060_480
    assert sum(x.size for x in jax.tree.leaves(shapes)) == 123_060_480
