"""Convolutions of float32 kernels in bfloat16: the same values, and gradients summed in float32."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from kontext_jax.models.convolution import convolve

CASES = {  # kernel's side, stride, padding of both axes: every one that the networks use
    "3x3": (3, 1, (1, 1)),
    "halving": (3, 2, (0, 1)),
    "1x1": (1, 1, (0, 0)),
    "doubling": (2, 1, (1, 1)),
    "patch": (4, 2, (1, 1)),
    "patch at the end": (4, 1, (1, 1)),
}


def test_gradients_of_float32_kernels_are_float32_sums():
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(3, 8, 10, 5)), jnp.bfloat16)

    def both(kernels, dys):
        """Gradients by x and kernels: mixed, and in float32 of the same rounded numbers."""
        results = {}
        for name, (_, stride, padding) in CASES.items():
            kernel, dy, sides = kernels[name], dys[name], (padding, padding)
            run = functools.partial(convolve, stride=stride, padding=sides)
            y, pull = jax.vjp(run, x, kernel)
            rounded = kernel.astype(jnp.bfloat16).astype(jnp.float32)
            wide = x.astype(jnp.float32)
            exact, exact_pull = jax.vjp(run, wide, rounded)
            results[name] = (y, *pull(dy)), (exact, *exact_pull(dy.astype(jnp.float32)))
        return results

    kernels, dys = {}, {}
    for name, (side, stride, padding) in CASES.items():
        kernels[name] = jnp.asarray(rng.normal(size=(side, side, 5, 4)), jnp.float32)
        shape = [(n + sum(padding) - side) // stride + 1 for n in x.shape[1:3]]
        dys[name] = jnp.asarray(rng.normal(size=(3, *shape, 4)), jnp.bfloat16)
    with jax.default_matmul_precision("highest"):
        results = jax.jit(both)(kernels, dys)
    for name, ((y, d_x, d_kernel), (exact, exact_d_x, exact_d_kernel)) in results.items():
        assert (y.dtype, d_kernel.dtype, d_x.dtype) == (jnp.bfloat16, jnp.float32, jnp.bfloat16)
        # Rounded to bfloat16 a sum would be off by up to 4e-3 of itself.
        np.testing.assert_allclose(d_kernel, exact_d_kernel, rtol=1e-5, atol=1e-4, err_msg=name)
        for found, wanted in ((y, exact), (d_x, exact_d_x)):
            np.testing.assert_allclose(
                np.float32(found), wanted, rtol=1e-2, atol=2e-2, err_msg=name
            )


def test_a_kernel_of_the_same_dtype_is_differentiated_as_ever():
    x = jnp.ones((1, 4, 4, 2))
    kernel = jnp.ones((3, 3, 2, 2))
    text = str(jax.make_jaxpr(lambda x, k: convolve(x, k, 1, ((1, 1), (1, 1))))(x, kernel))
    assert "custom_vjp" not in text
