"""Rectified flow: the path from data to noise, samplers along it, guidance.

A module is imported when it is first named, so that `names` comes without JAX.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kontext_jax.flow import guidance, names, path, policy, samplers

__all__ = ["guidance", "names", "path", "policy", "samplers"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
