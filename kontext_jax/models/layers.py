"""Building blocks of the transformer, and where float32 is kept whatever the compute dtype.

The float32 islands are: layer and RMS norms, the rotation of q and k, softmax, the sinusoids of t
and guidance, and the accumulator of every matmul. Everything else runs in the module's `dtype`;
parameters may be stored in another and are cast where they are used.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint

from kontext_jax.runtime.sharding import constrain
from kontext_jax.types import Array, Float

NORM_EPS = 1e-6
TIME_FACTOR = 1000  # t and guidance are multiplied by this before their sinusoids
TIME_EMBED_DIM = 256


def linear_init(num_in_axes: int = 1):
    """Xavier-uniform over all input and all output axes of a kernel [*in, *out] (DiT's rule)."""

    def init(key, shape, dtype=jnp.float32):
        limit = math.sqrt(6 / (math.prod(shape[:num_in_axes]) + math.prod(shape[num_in_axes:])))
        return jax.random.uniform(key, shape, dtype, -limit, limit)

    return init


def _contract(x: jax.Array, kernel: jax.Array, num_axes: int, **kwargs) -> jax.Array:
    axes = tuple(range(x.ndim - num_axes, x.ndim)), tuple(range(num_axes))
    return lax.dot_general(x, kernel, (axes, ((), ())), **kwargs)


def matmul(
    x: Float[Array, "..."], kernel: Float[Array, "..."], num_axes: int = 1, out_dtype: Any = None
) -> Float[Array, "..."]:
    """Contracts the last `num_axes` axes of x with the first of the kernel, float32 accumulator.

    The product is rounded to x's dtype, or to `out_dtype`.

    A kernel stored in another dtype is cast to that of x, and its gradient is not: float32 master
    weights get the float32 sums over tokens, which then also travel between devices in float32.
    """
    out_dtype = x.dtype if out_dtype is None else jnp.dtype(out_dtype)
    if x.dtype == kernel.dtype:
        return _product(_contract, num_axes, out_dtype, x, kernel)
    return _mixed_matmul(x, kernel, num_axes, out_dtype)


def _product(contract, num_axes: int, out_dtype: Any, *factors: jax.Array) -> jax.Array:
    """`contract(*factors, num_axes)`, in `out_dtype`.

    TPU and GPU accumulate in float32 by themselves. XLA's CPU backend has a fast bfloat16 path only
    if the product also leaves in float32, so there it is asked for and rounded afterwards.
    """
    in_float32 = functools.partial(contract, num_axes=num_axes, preferred_element_type=jnp.float32)
    if out_dtype == jnp.float32:
        return in_float32(*factors)
    return lax.platform_dependent(
        *factors,
        cpu=lambda *f: in_float32(*f).astype(out_dtype),
        default=lambda *f: contract(*f, num_axes),
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _mixed_matmul(x, kernel, num_axes, out_dtype):
    return _product(_contract, num_axes, out_dtype, x, kernel.astype(x.dtype))


def _mixed_matmul_fwd(x, kernel, num_axes, out_dtype):
    return _mixed_matmul(x, kernel, num_axes, out_dtype), (x, kernel)


def _mixed_matmul_bwd(num_axes, out_dtype, residuals, dy):
    x, kernel = residuals
    dy = dy.astype(x.dtype)  # out_dtype is for the sums of the forward product
    num_rows = x.ndim - num_axes
    dx = _product(_contract_outputs, num_axes, x.dtype, dy, kernel.astype(x.dtype))
    rows = tuple(range(num_rows))

    def sum_over_rows(x, dy):
        axes = (rows, rows), ((), ())
        return lax.dot_general(x, dy, axes, preferred_element_type=kernel.dtype)

    def sum_after_casting(x, dy):  # XLA's CPU backend lacks such products of some bfloat16 batches
        return sum_over_rows(x.astype(kernel.dtype), dy.astype(kernel.dtype))

    return dx, lax.platform_dependent(x, dy, cpu=sum_after_casting, default=sum_over_rows)


_mixed_matmul.defvjp(_mixed_matmul_fwd, _mixed_matmul_bwd)


def _contract_outputs(dy: jax.Array, kernel: jax.Array, num_axes: int, **kwargs) -> jax.Array:
    """Contracts the last axes of dy with those of a kernel [*in, *out]."""
    num_out = kernel.ndim - num_axes
    axes = tuple(range(dy.ndim - num_out, dy.ndim)), tuple(range(num_axes, kernel.ndim))
    return lax.dot_general(dy, kernel, (axes, ((), ())), **kwargs)


def add_bias(x: Float[Array, "..."], bias: Float[Array, "..."]) -> Float[Array, "..."]:
    """x + bias in x's dtype; the gradient of the bias is summed in the bias's own."""
    return x + bias if x.dtype == bias.dtype else _mixed_add(x, bias)


@jax.custom_vjp
def _mixed_add(x, bias):
    return x + bias.astype(x.dtype)


def _mixed_add_bwd(bias, dy):
    return dy, jnp.sum(dy.astype(bias.dtype), axis=tuple(range(dy.ndim - bias.ndim)))


_mixed_add.defvjp(lambda x, bias: (_mixed_add(x, bias), bias), _mixed_add_bwd)


@jax.custom_vjp
def gated(gate: Float[Array, "B D"], y: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
    """gate [B, D] · y [B, S, D]; the gradient of the gate is summed over tokens in float32."""
    return gate[:, None] * y


def _gated_bwd(residuals, dy):
    gate, y = residuals
    d_gate = jnp.sum(dy.astype(jnp.float32) * y.astype(jnp.float32), axis=1)
    return d_gate.astype(gate.dtype), gate[:, None] * dy


gated.defvjp(lambda gate, y: (gated(gate, y), (gate, y)), _gated_bwd)


class Dense(nn.Module):
    """Linear map [..., *in] → [..., *out] with kernel [*in, *out].

    Attributes:
      features: output axes.
      num_in_axes: how many trailing axes of the input are contracted.
    """

    features: Sequence[int]
    num_in_axes: int = 1
    use_bias: bool = True
    dtype: Any = jnp.float32
    kernel_init: Any = None

    @nn.compact
    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        shape = (*x.shape[x.ndim - self.num_in_axes :], *self.features)
        init = self.kernel_init or linear_init(self.num_in_axes)
        kernel = self.param("kernel", init, shape)
        x = x.astype(self.dtype)
        if len(self.features) > 1:
            kernel = _as_stored(kernel)
        y = matmul(x, kernel, self.num_in_axes)
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, tuple(self.features))
            y = add_bias(y, bias)
        if self.has_variable("lora", "a"):
            y = y + low_rank_path(self, x, self.num_in_axes)
        return y


def _as_stored(kernel: jax.Array) -> jax.Array:
    """A kernel to heads, which on one TPU is not to be transposed in memory before its product.

    Left to choose, the compiler copies some of a stack's kernels twice for every layer. On a mesh
    it lays them out as they are gathered, and would gather heads that are split to pin them.
    """
    if jax.sharding.get_abstract_mesh().size > 1:
        return kernel
    layout = Layout(tuple(range(kernel.ndim)))
    return lax.platform_dependent(
        kernel,
        tpu=lambda kernel: with_layout_constraint(kernel, layout),
        default=lambda kernel: kernel,
    )


def low_rank_path(
    module: nn.Module, x: Float[Array, "..."], num_axes: int = 1
) -> Float[Array, "..."]:
    """x · a · b of the adapter that the collection "lora" holds for a module (`models/lora.py`)."""
    a: jax.Array = module.get_variable("lora", "a")
    b: jax.Array = module.get_variable("lora", "b")
    return matmul(matmul(x, a, num_axes), b)


class RMSFactors(nn.Module):
    """What an RMS norm x · gain · scale over the last axis multiplies by, in float32.

    gain [..., 1] = 1 / sqrt(mean(x²) + 1e-6), scale [Dh].
    """

    @nn.compact
    def __call__(
        self, x: Float[Array, "... Dh"]
    ) -> tuple[Float[Array, "... 1"], Float[Array, " Dh"]]:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        x = x.astype(jnp.float32)
        gain = lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + NORM_EPS)
        # On GPU the norm would become a kernel of its own and write its float32 result; kept apart,
        # the products join the rotation that follows.
        gain = lax.platform_dependent(
            gain, cuda=lax.optimization_barrier, default=lambda gain: gain
        )
        return gain, scale.astype(jnp.float32)


def modulated_norm(
    x: Float[Array, "B S D"], shift: Float[Array, "B D"], scale: Float[Array, "B D"]
) -> Float[Array, "B S D"]:
    """LayerNorm without affine (eps 1e-6, float32), then (1 + scale)·x + shift, in x's dtype.

    Args:
      x: [B, S, D].
      shift: [B, D].
      scale: [B, D].
    """
    x32 = x.astype(jnp.float32)
    centred = x32 - jnp.mean(x32, axis=-1, keepdims=True)
    normed = centred * lax.rsqrt(jnp.mean(centred**2, axis=-1, keepdims=True) + NORM_EPS)
    shift, scale = (m[:, None, :].astype(jnp.float32) for m in (shift, scale))
    return lax.optimization_barrier(((1 + scale) * normed + shift).astype(x.dtype))


def scale_time(
    t: Float[Array, "..."], rounding: Literal["none", "bfl", "diffusers"], dtype: Any
) -> Float[Array, "..."]:
    """1000·t as each implementation rounds it to the compute dtype; float32.

    "none" does not round. "bfl": r(r(t)·1000). "diffusers": r(r(r(1000·t)/1000)·1000), since its
    scheduler hands out 1000·t and its pipeline divides again.
    """
    t = t.astype(jnp.float32)
    if rounding == "none":
        return TIME_FACTOR * t

    def r(value):
        # A plain cast down and up may be removed by the compiler as excess precision.
        info = jnp.finfo(dtype)
        return lax.reduce_precision(value, exponent_bits=info.nexp, mantissa_bits=info.nmant)

    if rounding == "diffusers":
        t = r(t * TIME_FACTOR) / TIME_FACTOR
    elif rounding != "bfl":
        raise ValueError(f"unknown timestep_rounding {rounding!r}; choose none, bfl or diffusers")
    return r(r(t) * TIME_FACTOR)


def timestep_embedding(
    scaled_t: Float[Array, "*times"], dim: int = TIME_EMBED_DIM
) -> Float[Array, "*times dim"]:
    """Sinusoids of a time already multiplied by 1000, cosines first: [...] → float32 [..., dim]."""
    half = dim // 2
    frequencies = np.exp(-math.log(10_000) * np.arange(half) / half).astype(np.float32)
    args = scaled_t.astype(jnp.float32)[..., None] * frequencies
    return jnp.concatenate([jnp.cos(args), jnp.sin(args)], axis=-1)


class MLPEmbedder(nn.Module):
    """Linear, SiLU, linear: [..., in] → [..., D]; for t, guidance and pooled text."""

    hidden_size: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "... inputs"]) -> Float[Array, "... D"]:
        x = nn.silu(Dense((self.hidden_size,), dtype=self.dtype, name="in_layer")(x))
        return Dense((self.hidden_size,), dtype=self.dtype, name="out_layer")(x)


class Modulation(nn.Module):
    """Shift, scale and gate vectors of all layers of a stack: [..., B, D] → [..., B, N, chunks, D].

    One kernel [N, D, chunks, D] serves the whole stack, outside its scan (`num_layers` None: one
    layer, without the axis N).

    On a mesh each device multiplies the rows of its neighbours along `fsdp` with its own part of
    the kernel, and the sums travel: gathering the kernels, a quarter of the network, would take
    gigabytes for a product with a handful of rows. (Asked for in float32, they are rounded to
    bfloat16 before they are added by the TPU's compiler, since what follows rounds them anyway.)
    """

    num_layers: int | None
    chunks: int
    dtype: Any = jnp.float32
    zero_init: bool = True

    @nn.compact
    def __call__(self, vec: Float[Array, "... D"]) -> Float[Array, "..."]:
        width = vec.shape[-1]
        stack = () if self.num_layers is None else (self.num_layers,)
        zeros = nn.initializers.zeros
        init = zeros if self.zero_init else nn.initializers.normal(width**-0.5)
        kernel = self.param("kernel", init, (*stack, width, self.chunks, width))
        bias = self.param("bias", zeros, (*stack, self.chunks, width))
        rows = nn.silu(vec).astype(self.dtype).reshape(-1, width)
        num_rows = rows.shape[0]
        if num_rows == 1:  # alone it would be multiplied on TPU's vector unit, three times slower
            rows = jnp.broadcast_to(rows, (2, width))
        rows = constrain(rows, "rows", "embed")
        multiply = functools.partial(matmul, out_dtype=jnp.float32)
        if self.num_layers is not None:
            # The layer is a batch axis of both factors. If the rows lacked it, XLA would first move
            # the contracted axis of the whole stack of kernels to the front: a copy of gigabytes.
            rows = jnp.broadcast_to(rows, (self.num_layers, *rows.shape))
            multiply = jax.vmap(multiply, out_axes=1)
        others = (None,) * (len(stack) + 2)
        out = constrain(multiply(rows, kernel), "rows", *others)
        if vec.ndim == 2:  # one time for each example: back to its device
            out = constrain(out, "batch", *others)
        out = add_bias(out.astype(self.dtype), bias)
        if self.has_variable("lora", "a"):
            out = out + self._low_rank_path(rows)
        return out[:num_rows].reshape(*vec.shape[:-1], *out.shape[1:])

    def _low_rank_path(self, rows: jax.Array) -> jax.Array:
        if self.num_layers is None:
            return low_rank_path(self, rows)
        a: jax.Array = self.get_variable("lora", "a")
        b: jax.Array = self.get_variable("lora", "b")
        return jax.vmap(matmul, out_axes=1)(jax.vmap(matmul)(rows, a), b)
