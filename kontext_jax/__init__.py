"""FLUX.1 Kontext in JAX and Flax."""

from kontext_jax.runtime.versions import VERSION as __version__

__all__ = ["__version__"]
