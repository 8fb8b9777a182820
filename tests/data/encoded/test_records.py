"""Encoding a batch in front of the transformer, and what an objective takes of it."""

import dataclasses
import functools
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kontext_jax.batches import EncodedBatch
from kontext_jax.models.conditioning import (
    encode_batch,
    make_conditioning,
    make_encoders,
    null_text,
    tokens_of,
)
from kontext_jax.models.presets import PRESETS
from kontext_jax.models.tokenizing import Tokenizers
from kontext_jax.pictures import latents
from kontext_jax.weights.encoders import load_encoder_params
from kontext_jax.weights.untrained import untrained_bundle

ROOT = Path(__file__).parents[3]
TINY = PRESETS["tiny"]
PROMPTS = ["make the red circle blue", ""]
NUM_TEXT_TOKENS = 16


@pytest.fixture(scope="module")
def bundle():
    return untrained_bundle("tiny")


@pytest.fixture(scope="module")
def encoders(bundle):
    return make_encoders(bundle.preset, jnp.float32)


@pytest.fixture(scope="module")
def params(bundle):
    return load_encoder_params(bundle, jnp.float32)


@pytest.fixture(scope="module")
def tokenizers(bundle):
    return Tokenizers(**bundle.tokenizer_dirs)


def random_pictures():
    generator = np.random.default_rng(0)
    return [generator.integers(0, 256, (2, 32, width, 3), np.uint8) for width in (32, 48)]


@pytest.fixture(scope="module")
def pictures():
    return random_pictures()


@pytest.fixture(scope="module")
def encoded(encoders, params, tokenizers, pictures):
    ids, _ = tokenizers.tokenize(PROMPTS, NUM_TEXT_TOKENS)
    target, reference = pictures
    return jax.jit(encode_batch, static_argnums=0)(encoders, params, target, (reference,), ids)


def random_batch(references=((4, 6),), dtype=np.float32):
    generator = np.random.default_rng(1)

    def draw(*shape):
        return generator.standard_normal(shape).astype(dtype)

    return EncodedBatch(
        x0=draw(2, 4, 4, 16),
        contexts=tuple(draw(2, *size, 16) for size in references),
        txt=draw(2, 8, TINY.mmdit.context_in_dim),
        vec=draw(2, TINY.mmdit.vec_in_dim),
    )


def null_features():
    return np.zeros((8, TINY.mmdit.context_in_dim)), np.zeros(TINY.mmdit.vec_in_dim)


def test_a_batch_is_encoded_as_an_edit_encodes_its_pictures(encoders, params, pictures, encoded):
    assert encoded.x0.shape == (2, 4, 4, 16) and encoded.contexts[0].shape == (2, 4, 6, 16)
    image = jnp.asarray(latents.pixels_to_model(pictures[0][1:]))
    encode = jax.jit(functools.partial(encoders.vae.apply, method="encode"))
    with jax.default_matmul_precision("highest"):
        one = encode({"params": params["vae"]}, image)
    np.testing.assert_allclose(encoded.x0[1:], one, atol=2e-5)


def test_null_text_is_the_empty_prompt_with_all_its_padding(encoders, params, tokenizers, encoded):
    txt, vec = null_text(encoders, params, tokenizers, NUM_TEXT_TOKENS)
    assert txt.shape == (NUM_TEXT_TOKENS, TINY.t5.d_model)
    np.testing.assert_allclose(txt, encoded.txt[PROMPTS.index("")], atol=2e-5)
    np.testing.assert_allclose(vec, encoded.vec[PROMPTS.index("")], atol=2e-5)
    assert np.abs(txt - encoded.txt[0]).max() > 0.1


@pytest.mark.parametrize("references", [(), ((4, 6),), ((4, 4), (2, 6))])
def test_training_and_sampling_see_the_same_tokens_and_positions(references):
    batch = random_batch(references)
    tokens = tokens_of(batch, *null_features(), TINY.mmdit)
    cond = make_conditioning(
        TINY.mmdit,
        jnp.asarray(batch.txt),
        jnp.asarray(batch.vec),
        latent_height=4,
        latent_width=4,
        references=[jnp.asarray(context) for context in batch.contexts],
        guidance=1.0,
        dtype=jnp.float32,
    )
    np.testing.assert_array_equal(tokens.pe, cond.pe)
    np.testing.assert_array_equal(latents.unpack(tokens.x0, 4, 4), batch.x0)
    if references:
        np.testing.assert_array_equal(tokens.ctx, cond.ctx)
    else:
        assert tokens.ctx is None and cond.ctx is None


def test_latents_stored_in_bfloat16_become_float32_tokens():
    batch = random_batch(dtype=jnp.bfloat16)
    tokens = jax.jit(functools.partial(tokens_of, config=TINY.mmdit))(batch, *null_features())
    assert tokens.x0.dtype == tokens.ctx.dtype == jnp.float32
    np.testing.assert_array_equal(latents.unpack(tokens.x0, 4, 4), np.asarray(batch.x0, np.float32))


def test_text_of_another_model_is_refused():
    batch = random_batch()
    with pytest.raises(ValueError, match=r"\(2, 8, 64\).*which takes \[B, T, 32\]"):
        tokens_of(batch, *null_features(), dataclasses.replace(TINY.mmdit, context_in_dim=32))
    null_txt, _ = null_features()
    with pytest.raises(ValueError, match="do not fit the transformer"):
        tokens_of(batch, null_txt, np.zeros(3), TINY.mmdit)


SPLIT_PROGRAM = """
import functools
import jax, numpy as np
import test_records as t
from kontext_jax.runtime.sharding import MeshConfig, make_mesh, shard_batch

bundle = t.untrained_bundle("tiny")
encoders = t.make_encoders(bundle.preset, np.float32)
params = t.load_encoder_params(bundle, np.float32)
ids, _ = t.Tokenizers(**bundle.tokenizer_dirs).tokenize(t.PROMPTS, t.NUM_TEXT_TOKENS)
target, reference = t.random_pictures()
program = jax.jit(t.encode_batch, static_argnums=0)
whole = program(encoders, params, target, (reference,), ids)

mesh = make_mesh(MeshConfig())
args = shard_batch(mesh, (target, (reference,), ids))
split = program(encoders, params, *args)
assert not split.x0.is_fully_replicated and len(split.x0.addressable_shards) == 2
jax.tree.map(functools.partial(np.testing.assert_allclose, atol=2e-5), split, whole)
"""


@pytest.mark.slow
def test_a_batch_split_over_devices_is_encoded_alike():
    program = (
        "from kontext_jax.runtime.sharding import MeshConfig, make_mesh, shard_batch"
        + SPLIT_PROGRAM
    )
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
        "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "tests", Path(__file__).parent))),
    }
    run = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
