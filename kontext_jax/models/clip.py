"""CLIP text encoder: token ids → features of every token, and one vector for the whole text.

    x = token_embedding[ids] + position_embedding
    each block:  x += out_proj · causal_attention(norm(x));  x += fc2 · act(fc1 · norm(x))
    last_hidden = norm(x);  pooled = last_hidden at the end-of-text token

(arXiv:2103.00020.) Matmuls run in `dtype`; the residual stream, the norms and the softmax stay in
float32.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from kontext_jax.models.presets import CLIPConfig
from kontext_jax.ops.attention import attention
from kontext_jax.types import Array, Bool, Float, Int, typed

LEGACY_EOS_TOKEN_ID = 2


@typed
def pooled_positions(token_ids: Int[Array, "B T"], eos_token_id: int) -> Int[Array, " B"]:
    """Position of each text's end-of-text token.

    Published configs with `eos_token_id` 2 carry a wrong id; for them it is the position of the
    highest id, which in CLIP's vocabulary is the end-of-text token. For any other config it is the
    first position of `eos_token_id`, or 0 without one, as in transformers.
    """
    if eos_token_id == LEGACY_EOS_TOKEN_ID:
        return token_ids.argmax(axis=-1)
    return (token_ids == eos_token_id).argmax(axis=-1)


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "quick_gelu": lambda x: x * nn.sigmoid(1.702 * x),  # OpenAI's approximation of the GELU
    "gelu": partial(nn.gelu, approximate=False),
}


class CLIPBlock(nn.Module):
    """Causal self-attention and MLP, each on the normalised residual stream."""

    config: CLIPConfig
    dtype: Any

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], mask: Bool[Array, "1 1 T T"]
    ) -> tuple[Float[Array, "B T D"], None]:
        """x float32 [B, T, D], mask bool [1, 1, T, T] → (x, None)."""
        c = self.config
        head_dim = c.hidden_size // c.num_attention_heads

        def project(name: str, shape: tuple[int, ...], spec: str, stddev: float) -> nn.Einsum:
            return nn.Einsum(
                shape,
                spec,
                dtype=self.dtype,
                preferred_element_type=jnp.float32,
                kernel_init=nn.initializers.normal(stddev),
                name=name,
            )

        def norm(name: str) -> nn.LayerNorm:
            return nn.LayerNorm(
                epsilon=c.layer_norm_eps, dtype=self.dtype, use_fast_variance=False, name=name
            )

        self.sow("intermediates", "block_input", x)
        heads = (c.hidden_size, c.num_attention_heads, head_dim)
        width, deep = c.hidden_size**-0.5, (2 * c.num_hidden_layers) ** -0.5
        y = norm("layer_norm1")(x)
        q = project("q_proj", heads, "btd,dhk->bhtk", width)(y).astype(self.dtype)
        k = project("k_proj", heads, "btd,dhk->bhtk", width)(y).astype(self.dtype)
        v = project("v_proj", heads, "btd,dhk->bhtk", width)(y).astype(self.dtype)
        y = attention(q, k, v, backend="reference", mask=mask)
        x = x + project("out_proj", (*heads[1:], heads[0]), "bhtk,hkd->btd", width * deep)(y)

        y = norm("layer_norm2")(x)
        y = project("fc1", (c.hidden_size, c.intermediate_size), "btd,df->btf", width)(y)
        y = ACTIVATIONS[c.hidden_act](y).astype(self.dtype)
        x = x + project("fc2", (c.intermediate_size, c.hidden_size), "btf,fd->btd", width * deep)(y)
        return x, None


class CLIPText(nn.Module):
    """The text half of CLIP, without the projection into the space shared with images.

    Args:
      config: sizes, activation and pooling rule.
      dtype: compute dtype of the matmuls and dtype of the output; parameters may be stored in
        another.

    Raises:
      ValueError: for an unknown activation.
    """

    config: CLIPConfig
    dtype: Any = jnp.bfloat16

    def __post_init__(self):
        super().__post_init__()
        if self.config.hidden_act not in ACTIVATIONS:
            raise ValueError(
                f"hidden_act {self.config.hidden_act!r} is unknown; choose one of "
                f"{sorted(ACTIVATIONS)}"
            )

    @nn.compact
    @typed
    def __call__(
        self, token_ids: Int[Array, "B T"]
    ) -> tuple[Float[Array, "B T D"], Float[Array, "B D"]]:
        """(last hidden state after the final norm, its row at the end-of-text token).

        Raises:
          ValueError: if there are more tokens than position embeddings.
        """
        c = self.config
        num_tokens = token_ids.shape[1]
        if num_tokens > c.max_position_embeddings:
            raise ValueError(
                f"CLIP has {c.max_position_embeddings} positions, found {num_tokens} tokens; "
                "truncate the token ids"
            )
        small = nn.initializers.normal(0.02)
        token_embedding = nn.Embed(
            c.vocab_size, c.hidden_size, embedding_init=small, name="token_embedding"
        )
        position_embedding = nn.Embed(
            c.max_position_embeddings,
            c.hidden_size,
            embedding_init=small,
            name="position_embedding",
        )
        x = token_embedding(token_ids).astype(jnp.float32)
        x = x + position_embedding(jnp.arange(num_tokens)).astype(jnp.float32)

        blocks = nn.scan(
            CLIPBlock,
            variable_axes={"params": 0, "intermediates": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,
            length=c.num_hidden_layers,
        )
        causal: Any = np.tri(num_tokens, dtype=bool)[None, None]  # [1, 1, query, key]
        x, _ = blocks(c, self.dtype, name="blocks")(x, causal)
        x = nn.LayerNorm(
            epsilon=c.layer_norm_eps,
            dtype=self.dtype,
            use_fast_variance=False,
            name="final_layer_norm",
        )(x)
        pooled = x[jnp.arange(x.shape[0]), pooled_positions(token_ids, c.eos_token_id)]
        return x, pooled
