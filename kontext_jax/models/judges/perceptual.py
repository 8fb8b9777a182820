"""Distances between pictures in the features of a classifier: LPIPS, and its form without heads.

    f_l         feature map of layer l, each cell divided by its length over channels
    lpips       Σ_l mean over cells of Σ_c w_lc·(f_lc(a) − f_lc(b))²     LPIPS 0.1, arXiv:1801.03924
    unweighted  the same with all w_lc = 1

Pictures are NHWC in [-1, 1], as everywhere here; from [0, 1] both distances come out wrong without
an error. Layers are the last ReLU before each pooling: relu1_2 … relu5_3 of VGG16, relu1 … relu5 of
AlexNet. Convolutions compute in `dtype`, distances in float32. Weights: `perceptual_weights`.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
from flax import linen as nn

from kontext_jax.types import Array, Float, Image, typed

# LPIPS's scaling layer: ImageNet's means and deviations, for values in [-1, 1].
SHIFT = (-0.030, -0.088, -0.188)
SCALE = (0.458, 0.448, 0.450)
EPSILON = 1e-10  # beside the length of a cell's features


@dataclasses.dataclass(frozen=True)
class Conv:
    """A convolution with ReLU: how many features, and how it walks."""

    features: int
    kernel_size: int = 3
    stride: int = 1
    padding: int = 1


@dataclasses.dataclass(frozen=True)
class PerceptualConfig:
    """A classifier's convolutions, cut into stages at the layers that are compared.

    Attributes:
      stages: convolutions up to each such layer.
      pools: (window, stride) of the max pooling before each stage; None: there is none.
    """

    stages: tuple[tuple[Conv, ...], ...]
    pools: tuple[tuple[int, int] | None, ...]

    def __post_init__(self):
        if len(self.pools) != len(self.stages):
            raise ValueError(f"{len(self.stages)} stages, but {len(self.pools)} poolings")


VGG16 = PerceptualConfig(
    stages=(
        (Conv(64),) * 2,
        (Conv(128),) * 2,
        (Conv(256),) * 3,
        (Conv(512),) * 3,
        (Conv(512),) * 3,
    ),
    pools=(None, (2, 2), (2, 2), (2, 2), (2, 2)),
)
ALEXNET = PerceptualConfig(
    stages=(
        (Conv(64, kernel_size=11, stride=4, padding=2),),
        (Conv(192, kernel_size=5, padding=2),),
        (Conv(384),),
        (Conv(256),),
        (Conv(256),),
    ),
    pools=(None, (3, 2), (3, 2), None, None),
)
NETS = {"vgg16": VGG16, "alexnet": ALEXNET}


class Perceptual(nn.Module):
    """A classifier's convolutions, `conv_i/{kernel, bias}`, and heads, `head_l/kernel [C]`."""

    config: PerceptualConfig
    dtype: Any = jnp.float32

    def setup(self):
        convs = [conv for stage in self.config.stages for conv in stage]
        for index, conv in enumerate(convs):
            module = nn.Conv(
                conv.features,
                (conv.kernel_size,) * 2,
                strides=conv.stride,
                padding=conv.padding,
                dtype=self.dtype,
                kernel_init=nn.initializers.he_normal(),
            )
            setattr(self, f"conv_{index}", module)
        for level, stage in enumerate(self.config.stages):
            setattr(self, f"head_{level}", Head(stage[-1].features))

    @typed
    def features(self, image: Image) -> list[Float[Array, "B _ _ _"]]:
        """Feature maps [B, h_l, w_l, C_l] of the layers that are compared, not normalised.

        Raises:
          ValueError: the picture is so small that a layer has no cell.
        """
        x = (image.astype(jnp.float32) - jnp.array(SHIFT)) / jnp.array(SCALE)
        x, index = x.astype(self.dtype), 0
        found: list[Array] = []
        for stage, pool in zip(self.config.stages, self.config.pools, strict=True):
            if pool is not None:
                window, stride = pool
                x = nn.max_pool(x, (window, window), (stride, stride))
            for _ in stage:
                x = nn.relu(getattr(self, f"conv_{index}")(x))
                index += 1
            if not x.size:
                height, width = image.shape[1:3]
                raise ValueError(
                    f"pictures of {width}×{height} pixels are too small for this perceptual "
                    f"network: layer {len(found) + 1} of {len(self.config.stages)} has no cell"
                )
            found.append(x)
        return found

    @typed
    def __call__(self, a: Image, b: Image) -> tuple[Float[Array, " B"], Float[Array, " B"]]:
        """LPIPS and the unweighted distance, float32 [B] each; 0 for equal pictures."""
        lpips: Any = 0.0
        unweighted: Any = 0.0
        pairs = zip(self.features(a), self.features(b), strict=True)
        for level, (left, right) in enumerate(pairs):
            difference = jnp.square(unit_length(left) - unit_length(right))
            by_channel = jnp.mean(difference, axis=(1, 2))  # [B, C]
            lpips += getattr(self, f"head_{level}")(by_channel)
            unweighted += jnp.sum(by_channel, axis=-1)
        return lpips, unweighted


class Head(nn.Module):
    """Weights of the channels, none negative in the published heads."""

    channels: int

    @nn.compact
    def __call__(self, x: Float[Array, "B height width C"]) -> Float[Array, "B height width 1"]:
        kernel = self.param("kernel", nn.initializers.constant(1 / self.channels), (self.channels,))
        return x @ kernel.astype(jnp.float32)


def unit_length(features: Float[Array, "... C"]) -> Float[Array, "... C"]:
    """Cells divided by their length over channels, float32; cells that are 0 stay so.

    PyTorch's form has the same values, and a gradient of NaN where no channel is active.
    """
    features = features.astype(jnp.float32)
    square = jnp.sum(jnp.square(features), axis=-1, keepdims=True)
    is_active = square > 0
    length = jnp.sqrt(jnp.where(is_active, square, 1.0))
    return jnp.where(is_active, features / (length + EPSILON), 0.0)
