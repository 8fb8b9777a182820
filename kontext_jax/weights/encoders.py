"""The frozen text encoders and the autoencoder of a bundle."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from kontext_jax.models.conditioning import ENCODER_KINDS
from kontext_jax.models.tokenizing import Tokenizers
from kontext_jax.types import Params
from kontext_jax.weights.bundle import ModelBundle, Place, component_identity


def load_encoder_params(
    bundle: ModelBundle,
    dtype: jax.typing.DTypeLike,
    device: jax.Device | jax.sharding.Sharding | Place | None = None,
) -> Params:
    """Reads what `encode_batch` takes: text encoders in `dtype`, the small autoencoder in float32.

    Args:
      device: destination of each leaf; the default device unless given.
    """
    stored = {"vae": jnp.float32, "t5": dtype, "clip": dtype}
    return {
        kind: bundle.components[kind].load(dtype=stored[kind], device=device)
        for kind in ENCODER_KINDS
    }


def encoder_facts(bundle: ModelBundle, max_text_tokens: int) -> dict[str, Any]:
    """What the results of `encode_batch` depend on beside its inputs and dtype, as JSON.

    Raises:
      ValueError: the bundle lacks an encoder or a tokenizer.
    """
    missing = [kind for kind in ENCODER_KINDS if kind not in bundle.components]
    missing += [f"{name} tokenizer" for name in ("t5", "clip") if name not in bundle.tokenizer_dirs]
    if missing:
        raise ValueError(f"{bundle.source} has no {', '.join(missing)}; name weights that have")
    facts: dict[str, Any] = {
        kind: {
            "config": dataclasses.asdict(bundle.components[kind].config),
            "weights": component_identity(bundle.components[kind]),
        }
        for kind in ENCODER_KINDS
    }
    tokenizers = Tokenizers(**bundle.tokenizer_dirs).fingerprints()
    return {**facts, "tokenizers": tokenizers, "max_text_tokens": max_text_tokens}
