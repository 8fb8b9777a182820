"""FLUX.1 Kontext in JAX and Flax."""

from typing import Any


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from kontext_jax.runtime.versions import VERSION

        return VERSION
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
