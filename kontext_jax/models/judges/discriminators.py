"""Networks that tell real pictures from reconstructed ones: PatchGAN, one logit per patch.

    conv 4×4 stride 2, leaky ReLU 0.2            width features
    (layers − 1) × conv 4×4 stride 2, norm, …    doubling up to 8 × width
    conv 4×4 stride 1, norm, …                   once more
    conv 4×4 stride 1                            1 logit

as in pix2pix (arXiv:1611.07004), taming-transformers and latent diffusion, kernels from N(0, 0.02).
With 3 layers a logit sees 70×70 pixels.

`norm="group"` (groups of each sample) is the default, where the published one has batch norms:
these make a logit depend on the other pictures of its micro-batch, and, real and reconstructed
pictures being seen apart, let the discriminator tell them by their statistics alone. `norm="batch"`
is theirs still: statistics of the micro-batch on all devices. Their running averages are only read
by a network that has stopped training, which a discriminator never does, so none are kept.
"""

import dataclasses
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from flax import linen as nn

from kontext_jax.models.convolution import convolve
from kontext_jax.models.layers import add_bias
from kontext_jax.types import Array, Float, Image, typed

Norm = Literal["group", "batch", "none"]
SLOPE = 0.2
EPSILON = 1e-5
MAX_GROUPS = 32


@dataclasses.dataclass(frozen=True)
class DiscriminatorConfig:
    """A patch discriminator; see the head of this file.

    Attributes:
      width: features of the first convolution.
      num_layers: convolutions of stride 2; small pictures want fewer.
      norm: "group", "batch" or "none".
    """

    width: int = 64
    num_layers: int = 3
    norm: Norm = "group"

    def __post_init__(self):
        for name in ("width", "num_layers"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"discriminator.{name} is {getattr(self, name)}; it must be at least 1"
                )
        if self.norm not in get_args(Norm):
            raise ValueError(
                f"discriminator.norm is {self.norm!r}; choose {', '.join(get_args(Norm))}"
            )


class PatchDiscriminator(nn.Module):
    """Logits [B, h, w] of pictures in [-1, 1]; above 0 where they look real."""

    config: DiscriminatorConfig
    dtype: Any = jnp.float32

    @nn.compact
    @typed
    def __call__(self, image: Image) -> Float[Array, "B rows columns"]:
        """Raises ValueError where a picture is too small to have a patch."""
        config = self.config
        height, width = image.shape[1:3]
        if min(height, width) >> config.num_layers < 3:  # the last two convolutions take two cells
            raise ValueError(
                f"pictures of {width}×{height} pixels leave no patch to a discriminator of "
                f"{config.num_layers} layers; lower --config.discriminator.num_layers"
            )
        x = activate(self._conv(image.astype(self.dtype), 0, config.width, 2))
        for index in range(1, config.num_layers + 1):
            features = config.width * min(2**index, 8)
            stride = 2 if index < config.num_layers else 1
            x = self._conv(x, index, features, stride)
            if config.norm != "none":
                x = PatchNorm(config.norm, self.dtype, name=f"norm_{index}")(x)
            x = activate(x)
        logits = self._conv(x, config.num_layers + 1, 1, 1)
        return logits[..., 0].astype(jnp.float32)

    def _conv(self, x: jax.Array, index: int, features: int, stride: int) -> jax.Array:
        # A norm has a bias of its own.
        has_norm = 0 < index <= self.config.num_layers and self.config.norm != "none"
        return PatchConv(features, stride, not has_norm, name=f"conv_{index}")(x)


class PatchConv(nn.Module):
    """4×4 convolution of a picture with a border of one cell."""

    features: int
    stride: int
    use_bias: bool

    @nn.compact
    def __call__(
        self, x: Float[Array, "B height width inputs"]
    ) -> Float[Array, "B rows columns outputs"]:
        shape = (4, 4, x.shape[-1], self.features)
        kernel = self.param("kernel", nn.initializers.normal(0.02), shape)
        y = convolve(x, kernel, self.stride, ((1, 1), (1, 1)))
        if not self.use_bias:
            return y
        return add_bias(y, self.param("bias", nn.initializers.zeros, (self.features,)))


def activate(x: Float[Array, "..."]) -> Float[Array, "..."]:
    return nn.leaky_relu(x, SLOPE)


class PatchNorm(nn.Module):
    """Normalises by groups of channels of each sample, or by channels of a batch; float32."""

    norm: Norm
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "B height width C"]) -> Float[Array, "B height width C"]:
        channels = x.shape[-1]
        scale = self.param(
            "scale", lambda key, shape: 1 + 0.02 * jax.random.normal(key, shape), (channels,)
        )
        bias = self.param("bias", nn.initializers.zeros, (channels,))
        y = x.astype(jnp.float32)
        if self.norm == "batch":
            axes = (0, 1, 2)
        else:
            y = y.reshape(*x.shape[:3], num_groups(channels), -1)
            axes = (1, 2, 4)
        mean = jnp.mean(y, axis=axes, keepdims=True)
        variance = jnp.mean(jnp.square(y - mean), axis=axes, keepdims=True)
        y = ((y - mean) * jax.lax.rsqrt(variance + EPSILON)).reshape(x.shape)
        return (y * scale + bias).astype(self.dtype)


def num_groups(channels: int) -> int:
    """The most groups up to MAX_GROUPS with at least two channels each that divide them."""
    return max(
        g for g in range(1, MAX_GROUPS + 1) if channels % g == 0 and g <= max(1, channels // 2)
    )
