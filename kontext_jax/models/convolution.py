"""2-D convolutions whose kernels may be stored in another dtype than they compute in."""

import functools

import jax
from jax import lax

from kontext_jax.types import Array, Float

Padding = tuple[tuple[int, int], tuple[int, int]]


def convolve(
    x: Float[Array, "B height width inputs"],
    kernel: Float[Array, "kh kw inputs outputs"],
    stride: int,
    padding: Padding,
) -> Float[Array, "B rows columns outputs"]:
    """x [B, h, w, in] through a kernel [kh, kw, in, out], in x's dtype.

    A kernel stored in another dtype is cast to that of x, and its gradient is not: float32 master
    weights get the float32 sums over cells, which then also travel between devices in float32.
    """
    if x.dtype == kernel.dtype:
        return _convolve(x, kernel, stride, padding)
    return _mixed(x, kernel, stride, padding)


def _convolve(x, kernel, stride, padding):
    return lax.conv_general_dilated(
        x,
        kernel,
        window_strides=(stride, stride),
        padding=padding,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _mixed(x, kernel, stride, padding):
    return _convolve(x, kernel.astype(x.dtype), stride, padding)


def _mixed_fwd(x, kernel, stride, padding):
    return _mixed(x, kernel, stride, padding), (x, kernel)


def _mixed_bwd(stride, padding, residuals, dy):
    x, kernel = residuals
    _, pull = jax.vjp(lambda x: _convolve(x, kernel.astype(x.dtype), stride, padding), x)
    # The gradient of the kernel is a convolution over the picture, whose sum is over the batch: x
    # with samples as channels, and dy, its cells `stride` apart, as a kernel.
    sides = tuple(
        (before, size + (dy_size - 1) * stride - x_size - before)
        for (before, _), size, dy_size, x_size in zip(
            padding, kernel.shape[:2], dy.shape[1:3], x.shape[1:3], strict=True
        )
    )

    def sum_over_cells(x, dy):
        return lax.conv_general_dilated(
            x,
            dy,
            window_strides=(1, 1),
            padding=sides,
            rhs_dilation=(stride, stride),
            dimension_numbers=("CHWN", "IHWO", "HWNC"),
            preferred_element_type=kernel.dtype,
        )

    def sum_after_casting(x, dy):  # XLA's CPU backend may lack such sums of bfloat16
        return sum_over_cells(x.astype(kernel.dtype), dy.astype(kernel.dtype))

    d_kernel = lax.platform_dependent(x, dy, cpu=sum_after_casting, default=sum_over_cells)
    return pull(dy)[0], d_kernel


_mixed.defvjp(_mixed_fwd, _mixed_bwd)
