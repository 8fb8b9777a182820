"""FLUX.1 Kontext in JAX and Flax."""

__version__ = "0.1.0"
