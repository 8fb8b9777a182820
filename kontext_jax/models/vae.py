"""FLUX's convolutional autoencoder: pictures to latents at an eighth of their size, and back.

    z       = mean [+ exp(logvar / 2)·ε]         of the encoder's Gaussian q(z | image)
    latents = latent_scale · (z − latent_shift)
    image   ≈ decoder(latents / latent_scale + latent_shift)

Everything is NHWC, and parameter names are BFL's (flux `modules/autoencoder.py`) with
"down.0.block.1" written `down_0/block_1`. Encoder and decoder are each a sequence of steps that
pass one feature map on. A step can run on the whole map, or on a tile of it: then its input brings
the neighbouring cells that its convolutions reach (`inside` [height, width] is true for those in
the picture; the others stand for zero padding), and the group norms receive the statistics of the
whole map as `moments`. `vae_tiling` walks the same steps in that way.

Group norms and the swish behind them are computed in float32 whatever the compute dtype.

With `patch` above 1 the picture is folded before the first step and unfolded after the last, which
spares small networks the feature maps at full resolution, where CPUs are slowest.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from kontext_jax.models.convolution import convolve
from kontext_jax.models.layers import Dense, add_bias
from kontext_jax.models.presets import VAEConfig
from kontext_jax.ops.attention import attention
from kontext_jax.types import AnyArray, Array, Bool, Float, Image, Latents, RandomKey, typed

NORM_EPSILON = 1e-6
LOGVAR_RANGE = (-30.0, 20.0)  # diffusers' clamp; BFL has none. The mean path does not see it.

Dtype = Any
Moments = tuple[Float[Array, "B groups"], Float[Array, "B groups"]]
"""Mean and variance [B, groups] of a feature map, float32."""


def group_moments(
    x: Float[Array, "B height width C"],
    groups: int,
    weight: Float[Array, "height width"] | None = None,
) -> Moments:
    """Mean and variance of each group of channels over the map, in two passes over float32.

    Args:
        x: [B, height, width, C].
        groups: How many runs of C / groups neighbouring channels share their statistics.
        weight: [height, width], 1 where a cell counts and 0 where it does not.

    Returns:
        Two float32 arrays [B, groups].
    """
    x = x.astype(jnp.float32)
    batch, height, width, channels = x.shape
    num_cells: int | Array
    if weight is None:
        num_cells, weigh = height * width, lambda y: y
    else:
        num_cells, weigh = jnp.sum(weight), lambda y: y * weight[..., None]

    def mean(y):  # over cells first: channels stay the vector axis
        per_channel = jnp.sum(weigh(y), axis=(1, 2)) / num_cells
        return jnp.mean(per_channel.reshape(batch, groups, channels // groups), axis=-1)

    center = mean(x)
    deviation = x - _per_channel(center, channels)
    return center, mean(jnp.square(deviation))


def _per_channel(statistic: Array, channels: int) -> Array:
    """[B, groups] → [B, 1, 1, C]."""
    return jnp.repeat(statistic, channels // statistic.shape[-1], axis=-1)[:, None, None, :]


class GroupNorm(nn.Module):
    """Group norm over the whole map, then swish unless told otherwise."""

    groups: int
    dtype: Dtype
    swish: bool = True

    @nn.compact
    def __call__(
        self, x: Float[Array, "B height width C"], moments: Moments | None = None
    ) -> Float[Array, "B height width C"]:
        channels = x.shape[-1]
        scale = self.param("scale", nn.initializers.ones, (channels,))
        bias = self.param("bias", nn.initializers.zeros, (channels,))
        mean, variance = group_moments(x, self.groups) if moments is None else moments
        gain = _per_channel(jax.lax.rsqrt(variance + NORM_EPSILON), channels)
        y = (x.astype(jnp.float32) - _per_channel(mean, channels)) * (
            gain * scale.astype(jnp.float32)
        ) + bias.astype(jnp.float32)
        return (nn.swish(y) if self.swish else y).astype(self.dtype)


class Conv(nn.Module):
    """Convolution; pads the input with zeros unless that brings its border, told by `inside`."""

    features: int
    dtype: Dtype
    kernel_size: int = 3
    stride: int = 1
    padding: tuple[int, int] = (1, 1)  # cells before and after, on both axes

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B height width inputs"],
        inside: Bool[Array, "height width"] | None = None,
    ) -> Float[Array, "B rows columns outputs"]:
        kernel, bias = _conv_params(self, self.kernel_size, x.shape[-1], self.features)
        y = _convolve(x, kernel, self.stride, self.padding, inside, self.dtype)
        return add_bias(y, bias)


class DoublingConv(nn.Module):
    """3×3 convolution of the input with every cell repeated 2×2 times, which is never formed.

    Wherever the kernel lies on the repeated map, it sees only 2×2 different cells of the input. So
    each of the four places within a repeated cell has a 2×2 kernel of its own, of summed weights:
    four ninths of the multiplications.
    """

    features: int
    dtype: Dtype

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B height width inputs"],
        inside: Bool[Array, "height width"] | None = None,
    ) -> Float[Array, "B rows columns outputs"]:
        kernel, bias = _conv_params(self, 3, x.shape[-1], self.features)
        # Index letters: y, x the kernel's rows and columns, t, u those of the small kernels, p, q
        # the place within the repeated cell.
        kernel = jnp.einsum(
            "pty,qux,yxio->tuipqo",
            TAPS,
            TAPS,
            kernel.astype(jnp.float32),
            precision=jax.lax.Precision.HIGHEST,
        )
        kernel = kernel.reshape(2, 2, x.shape[-1], 4 * self.features)
        y = _convolve(x, kernel, 1, (1, 1), inside, self.dtype)
        batch, height, width, _ = y.shape
        y = y.reshape(batch, height, width, 2, 2, self.features)
        # A place's kernel covers the cell and its neighbour on that side: place 1 starts one later.
        rows = [
            jnp.stack([y[:, p : height - 1 + p, q : width - 1 + q, p, q] for q in (0, 1)], axis=3)
            for p in (0, 1)
        ]
        y = jnp.stack(rows, axis=2)  # [B, h, 2, w, 2, C]
        return add_bias(y.reshape(batch, 2 * height - 2, 2 * width - 2, -1), bias)


TAPS = np.array([[[1, 0, 0], [0, 1, 1]], [[1, 1, 0], [0, 0, 1]]], np.float32)
"""[place, tap, row]: which rows of a 3-tap kernel fall on which of two cells."""


def _conv_params(module, kernel_size, in_channels, features) -> tuple[Array, Array]:
    shape = (kernel_size, kernel_size, in_channels, features)
    kernel = module.param("kernel", nn.initializers.lecun_normal(), shape)
    return kernel, module.param("bias", nn.initializers.zeros, (features,))


def _convolve(x, kernel, stride, padding, inside, dtype) -> Array:
    if inside is not None:
        x, padding = jnp.where(inside[..., None], x, 0), (0, 0)
    return convolve(x.astype(dtype), kernel, stride, (padding, padding))


class ResnetBlock(nn.Module):
    """x + conv(act(norm(conv(act(norm(x)))))), the two halves split where statistics are needed."""

    in_channels: int
    out_channels: int
    groups: int
    dtype: Dtype

    def setup(self):
        self.norm1 = GroupNorm(self.groups, self.dtype)
        self.conv1 = Conv(self.out_channels, self.dtype)
        self.norm2 = GroupNorm(self.groups, self.dtype)
        self.conv2 = Conv(self.out_channels, self.dtype)
        if self.in_channels != self.out_channels:
            self.nin_shortcut = Conv(self.out_channels, self.dtype, kernel_size=1, padding=(0, 0))

    def __call__(
        self, x: Float[Array, "B height width inputs"]
    ) -> Float[Array, "B height width outputs"]:
        return self.second_half(self.first_half(x), x)

    def first_half(
        self,
        x: Float[Array, "B height width inputs"],
        moments: Moments | None = None,
        inside: Bool[Array, "height width"] | None = None,
    ) -> Float[Array, "B rows columns outputs"]:
        return self.conv1(self.norm1(x, moments), inside)

    def second_half(
        self,
        h: Float[Array, "B rows columns outputs"],
        x: Float[Array, "B height width inputs"],
        moments: Moments | None = None,
        inside: Bool[Array, "rows columns"] | None = None,
    ) -> Float[Array, "B height width outputs"]:
        """`h` comes with a border when `inside` is given, `x` never does."""
        shortcut = x if self.in_channels == self.out_channels else self.nin_shortcut(x)
        return shortcut + self.conv2(self.norm2(h, moments), inside)


class AttentionBlock(nn.Module):
    """x + attention over all positions of the map, in one head as wide as the channels."""

    channels: int
    groups: int
    dtype: Dtype

    def setup(self):
        self.norm = GroupNorm(self.groups, self.dtype, swish=False)
        self.q = self._dense()
        self.k = self._dense()
        self.v = self._dense()
        self.proj_out = self._dense()

    def _dense(self) -> Dense:
        return Dense((self.channels,), dtype=self.dtype, kernel_init=nn.initializers.lecun_normal())

    def __call__(self, x: Float[Array, "B height width C"]) -> Float[Array, "B height width C"]:
        q, k, v = self.qkv(x)
        return self.attend(q, x, k, v)

    def qkv(
        self, x: Float[Array, "B height width C"], moments: Moments | None = None
    ) -> tuple[
        Float[Array, "B height width C"],
        Float[Array, "B height width C"],
        Float[Array, "B height width C"],
    ]:
        y = self.norm(x, moments)
        return self.q(y), self.k(y), self.v(y)

    def attend(
        self,
        q: Float[Array, "B rows columns C"],
        x: Float[Array, "B rows columns C"],
        k: Float[Array, "B height width C"],
        v: Float[Array, "B height width C"],
    ) -> Float[Array, "B rows columns C"]:
        """`q` and `x` may be a tile of the map that `k` and `v` cover."""
        # One head of C channels is too wide for the kernels of either accelerator.
        q, k, v = (y.reshape(y.shape[0], 1, -1, self.channels) for y in (q, k, v))  # [B, 1, S, C]
        return x + self.proj_out(attention(q, k, v, backend="chunked").reshape(x.shape))


class Mid(nn.Module):
    """The blocks at the lowest resolution."""

    channels: int
    groups: int
    dtype: Dtype

    def setup(self):
        self.block_1 = ResnetBlock(self.channels, self.channels, self.groups, self.dtype)
        self.attn_1 = AttentionBlock(self.channels, self.groups, self.dtype)
        self.block_2 = ResnetBlock(self.channels, self.channels, self.groups, self.dtype)

    def steps(self) -> tuple[nn.Module, ...]:
        return self.block_1, self.attn_1, self.block_2


class Downsample(nn.Module):
    """Halves the resolution; the picture is padded on its right and lower side only."""

    channels: int
    dtype: Dtype

    def setup(self):
        self.conv = Conv(self.channels, self.dtype, stride=2, padding=(0, 1))

    def __call__(
        self, x: Float[Array, "B height width C"], inside: Bool[Array, "height width"] | None = None
    ) -> Float[Array, "B rows columns C"]:
        return self.conv(x, inside)


class Upsample(nn.Module):
    """Doubles the resolution: every cell becomes 2×2 of itself, then a convolution."""

    channels: int
    dtype: Dtype

    def setup(self):
        self.conv = DoublingConv(self.channels, self.dtype)

    def __call__(
        self, x: Float[Array, "B height width C"], inside: Bool[Array, "height width"] | None = None
    ) -> Float[Array, "B rows columns C"]:
        return self.conv(x, inside)


class Level(nn.Module):
    """The blocks of one resolution, then the change to the next."""

    in_channels: int
    out_channels: int
    num_blocks: int
    resample: str | None  # "downsample", "upsample" or None
    groups: int
    dtype: Dtype

    def setup(self):
        for j in range(self.num_blocks):
            in_channels = self.out_channels if j else self.in_channels
            block = ResnetBlock(in_channels, self.out_channels, self.groups, self.dtype)
            setattr(self, f"block_{j}", block)
        if self.resample == "downsample":
            self.downsample = Downsample(self.out_channels, self.dtype)
        elif self.resample == "upsample":
            self.upsample = Upsample(self.out_channels, self.dtype)

    def steps(self) -> tuple[nn.Module, ...]:
        blocks = tuple(getattr(self, f"block_{j}") for j in range(self.num_blocks))
        return blocks + ((getattr(self, self.resample),) if self.resample else ())


def fold_patches(
    image: Float[AnyArray, "B height width C"], patch: int
) -> Float[AnyArray, "B rows columns folded"]:
    """[B, patch·h, patch·w, C] → [B, h, w, patch·patch·C]; NumPy stays NumPy."""
    if patch == 1:
        return image
    batch, height, width, channels = image.shape
    x = image.reshape(batch, height // patch, patch, width // patch, patch, channels)
    return x.swapaxes(2, 3).reshape(batch, height // patch, width // patch, -1)


def unfold_patches(
    x: Float[AnyArray, "B rows columns folded"], patch: int
) -> Float[AnyArray, "B height width C"]:
    """Inverse of `fold_patches`."""
    if patch == 1:
        return x
    batch, height, width, channels = x.shape
    x = x.reshape(batch, height, width, patch, patch, channels // patch**2)
    return x.swapaxes(2, 3).reshape(batch, height * patch, width * patch, -1)


def run_steps(
    steps: Sequence[nn.Module], x: Float[Array, "B height width inputs"], remat: bool
) -> Float[Array, "B rows columns outputs"]:
    """`steps` one after the other; with `remat` the backward pass keeps their inputs alone."""
    for step in steps:
        x = _run_again(step, x) if remat else step(x)
    return x


_run_again = nn.remat(lambda step, x: step(x))


class Encoder(nn.Module):
    """Folded image [B, h, w, 3·patch²] → moments of the posterior, [B, …, 2Z]."""

    config: VAEConfig
    dtype: Dtype
    remat: bool = False

    def setup(self):
        c = self.config
        widths = [c.ch * mult for mult in c.ch_mult]
        last = len(widths) - 1
        self.conv_in = Conv(c.ch, self.dtype)
        for i, width in enumerate(widths):
            resample = "downsample" if i < last else None
            in_channels = widths[i - 1] if i else c.ch
            level = Level(in_channels, width, c.num_res_blocks, resample, c.norm_groups, self.dtype)
            setattr(self, f"down_{i}", level)
        self.mid = Mid(widths[-1], c.norm_groups, self.dtype)
        self.norm_out = GroupNorm(c.norm_groups, self.dtype)
        self.conv_out = Conv(2 * c.z_channels, self.dtype)

    def steps(self) -> tuple[nn.Module, ...]:
        """What is applied to the image, in this order."""
        levels = [getattr(self, f"down_{i}") for i in range(len(self.config.ch_mult))]
        blocks = [step for level in (*levels, self.mid) for step in level.steps()]
        return (self.conv_in, *blocks, self.norm_out, self.conv_out)

    def __call__(
        self, x: Float[Array, "B height width inputs"]
    ) -> Float[Array, "B latent_height latent_width moments"]:
        return run_steps(self.steps(), x, self.remat)


class Decoder(nn.Module):
    """Unscaled latents [B, h/8, w/8, Z] → folded image [B, h/patch, w/patch, 3·patch²]."""

    config: VAEConfig
    dtype: Dtype
    remat: bool = False

    def setup(self):
        c = self.config
        widths = [c.ch * mult for mult in c.ch_mult]
        last = len(widths) - 1
        self.conv_in = Conv(widths[-1], self.dtype)
        self.mid = Mid(widths[-1], c.norm_groups, self.dtype)
        for i, width in enumerate(widths):
            resample = "upsample" if i else None
            in_channels = widths[min(i + 1, last)]
            level = Level(
                in_channels, width, c.num_res_blocks + 1, resample, c.norm_groups, self.dtype
            )
            setattr(self, f"up_{i}", level)
        self.norm_out = GroupNorm(c.norm_groups, self.dtype)
        self.conv_out = Conv(c.out_channels * c.patch**2, self.dtype)

    def steps(self) -> tuple[nn.Module, ...]:
        """What is applied to the latents, in this order."""
        levels = [getattr(self, f"up_{i}") for i in reversed(range(len(self.config.ch_mult)))]
        blocks = [step for level in (self.mid, *levels) for step in level.steps()]
        return (self.conv_in, *blocks, self.norm_out, self.conv_out)

    def __call__(self, x: Latents) -> Float[Array, "B height width outputs"]:
        return self.conv_out(self.features(x))

    def features(self, x: Latents) -> Float[Array, "B rows columns C"]:
        """What the last convolution sees."""
        return run_steps(self.steps()[:-1], x, self.remat)


class VAE(nn.Module):
    """The autoencoder, with the affine map between its posterior and a transformer's latents.

    Attributes:
        remat: The backward pass keeps the inputs of steps and computes the rest again.
    """

    config: VAEConfig
    dtype: Dtype = jnp.float32
    remat: bool = False

    def setup(self):
        self.encoder = Encoder(self.config, self.dtype, self.remat)
        self.decoder = Decoder(self.config, self.dtype, self.remat)

    @property
    def downsampling(self) -> int:
        """Pixels along one side of a latent cell."""
        return self.config.downsampling

    def __call__(self, image: Image) -> Float[Array, "B height width channels"]:
        """The reconstruction of an image through its mean latents; touches every parameter."""
        return self.decode(self.encode(image))

    @typed
    def moments(self, image: Image) -> tuple[Latents, Latents]:
        """Mean and log variance of the posterior, unscaled.

        Raises:
            ValueError: The sides of the image are not multiples of `downsampling`.
        """
        self.check_image(image.shape)
        return self.split_moments(self.encoder(fold_patches(image, self.config.patch)))

    @typed
    def encode(self, image: Image, *, key: RandomKey | None = None) -> Latents:
        """Latents of an image in [-1, 1]: the posterior's mean, or with a key a sample of it."""
        mean, logvar = self.moments(image)
        return self.to_latents(mean, logvar, key)

    @typed
    def decode(self, latents: Latents) -> Float[Array, "B height width channels"]:
        """The image of some latents, about [-1, 1] and not clipped.

        Latents are unscaled in the dtype in which they come, then rounded to the compute dtype.
        """
        return unfold_patches(self.decoder(self.from_latents(latents)), self.config.patch)

    def decode_features(self, latents: Latents) -> Float[Array, "B rows columns C"]:
        """What the decoder's last convolution sees; `decode_output` is that convolution."""
        return self.decoder.features(self.from_latents(latents))

    def decode_output(
        self, features: Float[Array, "B rows columns C"]
    ) -> Float[Array, "B height width channels"]:
        """The image of `decode_features`; touches `decoder/conv_out` alone."""
        return unfold_patches(self.decoder.conv_out(features), self.config.patch)

    def check_image(self, shape: tuple[int, ...]) -> None:
        """Refuses an image [B, height, width, 3] that the latent grid does not divide."""
        cell = self.downsampling
        height, width = shape[1:3]
        if height % cell or width % cell or not height or not width:
            nearest = [max(cell, round(side / cell) * cell) for side in (width, height)]
            raise ValueError(
                f"the autoencoder cannot take an image of {width}×{height} pixels: both sides must "
                f"be multiples of {cell}; the nearest such size is {nearest[0]}×{nearest[1]}"
            )

    def split_moments(
        self, moments: Float[Array, "B latent_height latent_width moments"]
    ) -> tuple[Latents, Latents]:
        """The encoder's output as mean and log variance."""
        mean, logvar = jnp.split(moments, 2, axis=-1)
        return mean, jnp.clip(logvar, *LOGVAR_RANGE)

    def to_latents(self, mean: Latents, logvar: Latents, key: RandomKey | None = None) -> Latents:
        z = mean
        if key is not None:
            z = mean + jnp.exp(0.5 * logvar) * jax.random.normal(key, mean.shape, mean.dtype)
        return self.config.latent_scale * (z - self.config.latent_shift)

    def from_latents(self, latents: Latents) -> Latents:
        z = latents / self.config.latent_scale + self.config.latent_shift
        return z.astype(self.dtype)
