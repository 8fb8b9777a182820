"""T5 v1.1 encoder: token ids → one feature vector per token.

    x = embedding[ids]
    each block:  x += o · attention(norm(x));  x += wo · (gelu(wi_0 · norm(x)) ⊙ (wi_1 · norm(x)))
    out = norm(x)                                  norm(x) = scale · x / rms(x)

Attention is not scaled by 1/√Dkv (the initialisation carries that factor) and has one learnt bias
per head and bucket of relative positions; all blocks share block 0's table (arXiv:1910.10683,
sec. 2.1; v1.1 adds the gated GELU). Matmuls run in `dtype`; the residual stream, the norms and the
softmax stay in float32, because the stream of T5-XXL reaches thousands.
"""

import math
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from kontext_jax.models.presets import T5Config
from kontext_jax.ops.attention import attention
from kontext_jax.runtime.sharding import constrain
from kontext_jax.types import Array, Bool, Float, Int, typed


def relative_position_bucket(
    relative_position: Int[np.ndarray, "..."], num_buckets: int, max_distance: int
) -> Int[np.ndarray, "..."]:
    """Bucket of each distance `key position − query position`: int32 in [0, num_buckets).

    Half of the buckets are for keys to the right of the query. Of each half, the first half holds
    one distance each, and the rest grow logarithmically up to `max_distance`; everything farther
    shares the last bucket.
    """
    half = num_buckets // 2
    max_exact = half // 2
    distance = np.abs(relative_position)
    # float32 and this order of operations: the floor below depends on the last bit.
    ratio = np.log(np.maximum(distance, 1).astype(np.float32) / np.float32(max_exact))
    ratio = ratio / np.float32(math.log(max_distance / max_exact))
    far = max_exact + (ratio * np.float32(half - max_exact)).astype(np.int32)
    bucket = np.where(distance < max_exact, distance, np.minimum(far, half - 1))
    return (bucket + np.where(relative_position > 0, half, 0)).astype(np.int32)


class T5Block(nn.Module):
    """Self-attention and gated MLP, each on the normalised residual stream."""

    config: T5Config
    dtype: Any

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        bias: Float[Array, "1 H T T"],
        mask: Bool[Array, "B 1 1 T"] | None,
    ) -> tuple[Float[Array, "B T D"], None]:
        """x float32 [B, T, D], bias [1, H, T, T], mask [B, 1, 1, T] or None → (x, None)."""
        c = self.config

        def project(name: str, shape: tuple[int, ...], spec: str, fan_in: int) -> nn.Einsum:
            return nn.Einsum(
                shape,
                spec,
                use_bias=False,
                dtype=self.dtype,
                preferred_element_type=jnp.float32,
                kernel_init=nn.initializers.normal(fan_in**-0.5),
                name=name,
            )

        def norm(name: str) -> nn.RMSNorm:
            return nn.RMSNorm(epsilon=c.layer_norm_epsilon, dtype=self.dtype, name=name)

        x = constrain(x, "batch", "tokens", "width")
        self.sow("intermediates", "block_input", x)
        heads = (c.d_model, c.num_heads, c.d_kv)
        y = norm("attn_norm")(x)
        q = project("q", heads, "btd,dhk->bhtk", c.d_model * c.d_kv)(y).astype(self.dtype)
        k = project("k", heads, "btd,dhk->bhtk", c.d_model)(y).astype(self.dtype)
        v = project("v", heads, "btd,dhk->bhtk", c.d_model)(y).astype(self.dtype)
        y = attention(q, k, v, backend="reference", bias=bias, mask=mask, scale=1.0)
        inner = c.num_heads * c.d_kv
        x = x + project("o", (c.num_heads, c.d_kv, c.d_model), "bhtk,hkd->btd", inner)(y)

        y = norm("mlp_norm")(x)
        gate = project("wi_0", (c.d_model, c.d_ff), "btd,df->btf", c.d_model)(y)
        linear = project("wi_1", (c.d_model, c.d_ff), "btd,df->btf", c.d_model)(y)
        y = (nn.gelu(gate, approximate=True) * linear).astype(self.dtype)
        x = x + project("wo", (c.d_ff, c.d_model), "btf,fd->btd", c.d_ff)(y)
        return constrain(x, "batch", "tokens", "width"), None


class T5Encoder(nn.Module):
    """The encoder of T5 v1.1.

    Args:
      config: sizes.
      dtype: compute dtype of the matmuls and dtype of the output; parameters may be stored in
        another.

    Raises:
      ValueError: if dtype is float16, whose range the activations of T5-XXL exceed.
    """

    config: T5Config
    dtype: Any = jnp.bfloat16

    def __post_init__(self):
        super().__post_init__()
        if jnp.dtype(self.dtype) == jnp.float16:
            raise ValueError(
                "T5 cannot compute in float16: activations of T5-XXL exceed its range (65504) and "
                "the text features become NaN; use bfloat16 or float32"
            )

    @nn.compact
    @typed
    def __call__(
        self, token_ids: Int[Array, "B T"], mask: Bool[Array, "B T"] | None = None
    ) -> Float[Array, "B T D"]:
        """Features of every token, padding included.

        Args:
          mask: True where attention may look. None lets every token see every other, padding too:
            so FLUX was trained.
        """
        c = self.config
        x = nn.Embed(
            c.vocab_size, c.d_model, embedding_init=nn.initializers.normal(1.0), name="shared"
        )(token_ids)
        x = x.astype(jnp.float32)

        positions = np.arange(token_ids.shape[1])
        buckets = relative_position_bucket(
            positions[None, :] - positions[:, None],  # [query, key]
            c.relative_attention_num_buckets,
            c.relative_attention_max_distance,
        )
        bias = nn.Embed(
            c.relative_attention_num_buckets,
            c.num_heads,
            embedding_init=nn.initializers.normal(c.d_model**-0.5),
            name="relative_attention_bias",
        )(buckets)
        bias = bias.astype(jnp.float32).transpose(2, 0, 1)[None]  # [1, H, T, T]

        blocks = nn.scan(
            T5Block,
            variable_axes={"params": 0, "intermediates": 0},
            split_rngs={"params": True},
            in_axes=(nn.broadcast, nn.broadcast),
            length=c.num_layers,
        )
        x, _ = blocks(c, self.dtype, name="blocks")(
            x, bias, None if mask is None else mask[:, None, None, :]
        )
        return nn.RMSNorm(epsilon=c.layer_norm_epsilon, dtype=self.dtype, name="final_norm")(x)
