"""How near a reconstruction is to its picture: PSNR, SSIM and perceptual distances, by picture.

    psnr     10·log10(1 / mean (a − b)²)                    values in [0, 1]; inf for equal pictures
    ssim     mean over cells and channels of
             (2μaμb + c1)(2σab + c2) / ((μa² + μb² + c1)(σa² + σb² + c2)),  c1 = 0.01², c2 = 0.03²
    pdist_a  distance of VGG16's features without weights     (`models.perceptual`)
    pdist_b  LPIPS by VGG16

μ and σ are those under an 11×11 Gaussian window, σ 1.5, wherever it lies within the picture, as
scikit-image computes them with `gaussian_weights=True, use_sample_covariance=False`.

"PDist" of the Kontext paper is "the perceptual distance in VGG feature space" and no more is said.
pdist_a fits its sizes (FLUX's 0.332 at 31.1 dB), as do those published for Stable Diffusion's under
the name PSIM; pdist_b is what most people mean by LPIPS. Both are given, under their names.
"""

import jax
import jax.numpy as jnp
import numpy as np

from kontext_jax.models.judges.perceptual import Perceptual
from kontext_jax.types import Array, Float, Image, Params

METRICS = ("pdist_a", "pdist_b", "ssim", "psnr")
WINDOW_RADIUS, WINDOW_SIGMA = 5, 1.5
C1, C2 = 0.01**2, 0.03**2
CENTRE = 0.5  # taken off before squaring: float32 then holds variances to 3e-8


def psnr(
    a: Float[Array, "B height width C"], b: Float[Array, "B height width C"]
) -> Float[Array, " B"]:
    """In dB, [B], of pictures [B, h, w, C] with values in [0, 1]."""
    return -10 * jnp.log10(jnp.mean(jnp.square(a - b), axis=(1, 2, 3)))


def _window() -> np.ndarray:
    distances = np.arange(-WINDOW_RADIUS, WINDOW_RADIUS + 1)
    weights = np.exp(-0.5 * (distances / WINDOW_SIGMA) ** 2)
    return (weights / weights.sum()).astype(np.float32)


def _smooth(x: jax.Array) -> jax.Array:
    """[B, h, w, C] under the window, where it lies within: 10 cells less on both axes."""
    taps = _window()
    for axis in (1, 2):
        length = x.shape[axis] - 2 * WINDOW_RADIUS
        x = sum(
            tap * jax.lax.slice_in_dim(x, i, i + length, axis=axis) for i, tap in enumerate(taps)
        )
    return x


def ssim(
    a: Float[Array, "B height width C"], b: Float[Array, "B height width C"]
) -> Float[Array, " B"]:
    """[B], of pictures [B, h, w, C] with values in [0, 1].

    Raises:
      ValueError: pictures smaller than the window.
    """
    if min(a.shape[1:3]) <= 2 * WINDOW_RADIUS:
        raise ValueError(
            f"SSIM looks through 11×11 pixels; pictures of {a.shape[2]}×{a.shape[1]} are smaller"
        )
    a, b = a - CENTRE, b - CENTRE
    mean_a, mean_b = _smooth(a), _smooth(b)
    variance_a = _smooth(a * a) - mean_a * mean_a
    variance_b = _smooth(b * b) - mean_b * mean_b
    covariance = _smooth(a * b) - mean_a * mean_b
    mean_a, mean_b = mean_a + CENTRE, mean_b + CENTRE
    cells = ((2 * mean_a * mean_b + C1) * (2 * covariance + C2)) / (
        (mean_a**2 + mean_b**2 + C1) * (variance_a + variance_b + C2)
    )
    return jnp.mean(cells, axis=(1, 2, 3))


def measure(
    perceptual: Perceptual, perceptual_params: Params, picture: Image, result: Image
) -> dict[str, Float[Array, " B"]]:
    """`METRICS` of pictures in [-1, 1], float32 [B] each."""
    pdist_b, pdist_a = perceptual.apply({"params": perceptual_params}, picture, result)
    a, b = (x / 2 + 0.5 for x in (picture, result))
    return {"pdist_a": pdist_a, "pdist_b": pdist_b, "ssim": ssim(a, b), "psnr": psnr(a, b)}
