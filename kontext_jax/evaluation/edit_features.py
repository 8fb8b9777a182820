"""Edits compared in features of VGG16: what lies outside an edit, and a whole set of results.

lpips   of the source, and of the source with everything outside the edit taken from the result
mmd     unbiased squared maximum mean discrepancy between results and targets, of each layer's
        mean features, with the kernel (x·y/d + 1)³ (that of the kernel Inception distance,
        arXiv:1801.01401); 0 is what the targets have with other pictures of their kind
"""

import hashlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from kontext_jax.models.judges.perceptual import VGG16, Perceptual
from kontext_jax.pictures.latents import pixels_to_model
from kontext_jax.types import Bool, Float, Params, UInt8

BATCH = 50


class Features:
    """Distances by VGG16 with LPIPS's heads.

    Args:
      params: result of `weights.perceptual.load_perceptual`.
    """

    def __init__(self, params: Params):
        network = Perceptual(VGG16)

        def means(image):
            found = network.apply({"params": params}, image, method="features")
            return jnp.concatenate([jnp.mean(f, axis=(1, 2)) for f in found], axis=-1)

        self._lpips = jax.jit(lambda a, b: network.apply({"params": params}, a, b)[0])
        self._means = jax.jit(means)
        self._known: dict[str, np.ndarray] = {}  # targets and a teacher's results come again

    def lpips_outside(
        self,
        sources: Sequence[UInt8[np.ndarray, "height width 3"]],
        results: Sequence[UInt8[np.ndarray, "height width 3"]],
        changed: Sequence[Bool[np.ndarray, "height width"]],
    ) -> list[float]:
        """LPIPS of each pair outside of what the edit changes.

        Args:
          changed: bool [height, width] of each.
        """
        shown = [
            np.where(mask[..., None], source, result)
            for source, result, mask in zip(sources, results, changed, strict=True)
        ]
        return [float(x) for x in _in_batches(self._lpips, sources, shown)]

    def mmd(
        self,
        results: Sequence[UInt8[np.ndarray, "height width 3"]],
        targets: Sequence[UInt8[np.ndarray, "height width 3"]],
    ) -> float:
        """Discrepancy of two sets of pictures of one size."""
        return polynomial_mmd(self._means_of(results), self._means_of(targets))

    def _means_of(self, pictures: Sequence[np.ndarray]) -> np.ndarray:
        digest = hashlib.sha256(np.stack(pictures).tobytes()).hexdigest()
        if digest not in self._known:
            self._known[digest] = np.asarray(_in_batches(self._means, pictures), np.float64)
        return self._known[digest]


def polynomial_mmd(x: Float[np.ndarray, "n features"], y: Float[np.ndarray, "m features"]) -> float:
    """Unbiased squared MMD of samples [n, d] and [m, d]; near 0 for samples of one distribution.

    Raises:
      ValueError: fewer than two samples.
    """
    if min(len(x), len(y)) < 2:
        raise ValueError(f"{len(x)} and {len(y)} samples; a discrepancy needs two of each")

    def kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return (a @ b.T / a.shape[1] + 1) ** 3

    def within(a: np.ndarray) -> float:
        k, n = kernel(a, a), len(a)
        return float((k.sum() - np.trace(k)) / (n * (n - 1)))

    return within(x) + within(y) - 2 * float(kernel(x, y).mean())


def _in_batches(function, *pictures: Sequence[np.ndarray]) -> np.ndarray:
    """Runs batches of one size, the last filled up with its first pictures."""
    found = []
    for start in range(0, len(pictures[0]), BATCH):
        parts = [np.stack(p[start : start + BATCH]) for p in pictures]
        count = len(parts[0])
        filled = [np.concatenate([p, np.repeat(p[:1], BATCH - count, axis=0)]) for p in parts]
        found.append(np.asarray(function(*map(pixels_to_model, filled)))[:count])
    return np.concatenate(found)
