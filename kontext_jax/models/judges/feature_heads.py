"""Heads that tell real latents from made ones by a frozen teacher's hidden states (LADD).

    [B, L, D] → linear → [B, rows, columns, W], times 1 + scale, plus shift: of (t, pooled text)
    num_layers × conv 3×3, group norm, leaky ReLU
    conv 1×1                                                 → logits [B, rows, columns]

One head for each of the chosen blocks; each judges every place of the picture (arXiv:2403.12015).
Convolutions over the grid of tokens take pictures of any aspect ratio.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from kontext_jax.models.convolution import convolve
from kontext_jax.models.judges.discriminators import PatchNorm, activate
from kontext_jax.models.layers import (
    TIME_FACTOR,
    Dense,
    MLPEmbedder,
    linear_init,
    timestep_embedding,
)
from kontext_jax.runtime.sharding import constrain
from kontext_jax.types import Array, Float


@dataclasses.dataclass(frozen=True)
class FeatureHeadsConfig:
    """What the discriminator of LADD sees, and how large it is.

    Attributes:
      blocks: the teacher's blocks after which a head looks, ascending from 0 over double and then
        single ones; () for eight, evenly spaced with the last block among them.
      width: features of a head.
      num_layers: 3×3 convolutions of a head.
    """

    blocks: tuple[int, ...] = ()
    width: int = 256
    num_layers: int = 2

    def __post_init__(self):
        if list(self.blocks) != sorted(set(self.blocks)) or min(self.blocks, default=0) < 0:
            raise ValueError(
                f"heads.blocks is {tuple(self.blocks)}; expected ascending numbers from 0"
            )
        for name, least in (("width", 1), ("num_layers", 0)):
            if getattr(self, name) < least:
                raise ValueError(
                    f"heads.{name} is {getattr(self, name)}; it must be at least {least}"
                )


class FeatureHeads(nn.Module):
    """All heads: hidden states → logits, float32."""

    config: FeatureHeadsConfig
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self,
        features: Sequence[Float[Array, "B L D"]],
        t: Float[Array, " B"],
        vec: Float[Array, "B pooled"],
        grid: tuple[int, int],
    ) -> tuple[Float[Array, "B rows columns"], ...]:
        """One map [B, rows, columns] for each of the features.

        Args:
          features: [B, L, D] each, of target tokens row by row.
          t: [B], of the noise in them.
          vec: [B, vec_in_dim] pooled text.
          grid: (rows, columns) of the tokens.
        """
        told = jnp.concatenate(
            [timestep_embedding(TIME_FACTOR * t), vec.astype(jnp.float32)], axis=-1
        )
        return tuple(
            _Head(self.config, self.dtype, name=f"head_{i}")(x, told, grid)
            for i, x in enumerate(features)
        )


class _Head(nn.Module):
    config: FeatureHeadsConfig
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, told: jax.Array, grid: tuple[int, int]) -> jax.Array:
        width, (rows, columns) = self.config.width, grid
        if x.shape[1] != rows * columns:
            raise ValueError(f"{x.shape[1]} tokens are no grid of {rows}×{columns}")
        x = Dense((width,), dtype=self.dtype, name="project")(x)
        film = MLPEmbedder(2 * width, self.dtype, name="film")(told)
        scale, shift = jnp.split(film[:, None], 2, axis=-1)
        x = ((1 + scale) * x + shift).reshape(len(x), rows, columns, width)  # [B, rows, columns, W]
        x = constrain(x, "batch", None, None, "width")
        for i in range(self.config.num_layers):
            x = _Conv3x3(width, name=f"conv_{i}")(x)
            x = activate(PatchNorm("group", self.dtype, name=f"norm_{i}")(x))
        return Dense((1,), dtype=self.dtype, name="out")(x)[..., 0].astype(jnp.float32)


class _Conv3x3(nn.Module):
    """3×3 convolution with a border of zeros; the norm after it has the bias."""

    features: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = (3, 3, x.shape[-1], self.features)
        kernel = self.param("kernel", linear_init(3), shape)
        return convolve(x, kernel, 1, ((1, 1), (1, 1)))
