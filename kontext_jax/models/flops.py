"""Floating-point operations of the transformer's own products.

    block      24·D² per token (q, k, v 6·D², out 2·D², MLP 4·D·M with M = 4·D)
               + 4·S·D per token for attention over S tokens
    forward    products + attention
    training   3 × forward: each product has two of its size in the backward pass
    adapters   2 × products + 3 × attention: the gradients of frozen kernels are not computed

A multiplication and an addition count as two. What a policy recomputes in the backward pass is not
counted, nor are norms, activations and the adapters' own products (under 1 %), so that the share of
the peak is of useful work ("model FLOPs utilisation", arXiv:2204.02311, app. B).
"""

from typing import NamedTuple

from kontext_jax.models.layers import TIME_EMBED_DIM
from kontext_jax.models.presets import MMDiTConfig


class Flops(NamedTuple):
    """FLOPs of one forward pass, for one example."""

    products: float
    attention: float

    @property
    def forward(self) -> float:
        return self.products + self.attention

    def training(self, *, trains_kernels: bool = True) -> float:
        """Of a forward and a backward pass; `trains_kernels` False: adapters beside frozen ones."""
        return (3 if trains_kernels else 2) * self.products + 3 * self.attention


def mmdit_flops(config: MMDiTConfig, num_text_tokens: int, num_image_tokens: int) -> Flops:
    """Of the transformer at one time.

    Args:
      num_image_tokens: target and references together.
    """
    width, tokens = config.hidden_size, num_text_tokens + num_image_tokens
    embedders = [TIME_EMBED_DIM, config.vec_in_dim] + [TIME_EMBED_DIM] * config.guidance_embed
    once = sum(size * width + width**2 for size in embedders)
    once += (12 * config.depth + 3 * config.depth_single_blocks + 2) * width**2  # modulation
    per_block = 4 * width**2 + 2 * width * config.mlp_dim
    num_blocks = config.depth + config.depth_single_blocks
    per_stream = (
        num_text_tokens * config.context_in_dim
        + num_image_tokens * (config.in_channels + config.out_channels)
    ) * width
    return Flops(
        products=2.0 * (once + per_stream + tokens * num_blocks * per_block),
        attention=4.0 * num_blocks * tokens**2 * width,
    )
