"""FLUX.1 Kontext in JAX and Flax.

    import kontext_jax as kj

    pipe = kj.load()
    out = pipe("tint the picture blue", "example:cat", seed=7)
    out.image, out.latents, out.metadata

Everything here is imported when it is first named; until then JAX is not.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kontext_jax import flow
    from kontext_jax.api import (
        Adapter,
        FlowMatching,
        LoraConfig,
        MMDiT,
        ModelBundle,
        Objective,
        Output,
        Parts,
        Pipe,
        Step,
        Student,
        TokenBatch,
        VelocityFn,
        adapter,
        euler_sample,
        flow_matching,
        load,
        open_weights,
        picture,
        predict,
        read_lora,
    )
    from kontext_jax.runtime.versions import VERSION as __version__

__all__ = [
    "Adapter",
    "FlowMatching",
    "LoraConfig",
    "MMDiT",
    "ModelBundle",
    "Objective",
    "Output",
    "Parts",
    "Pipe",
    "Step",
    "Student",
    "TokenBatch",
    "VelocityFn",
    "__version__",
    "adapter",
    "euler_sample",
    "flow",
    "flow_matching",
    "load",
    "open_weights",
    "picture",
    "predict",
    "read_lora",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return importlib.import_module("kontext_jax.runtime.versions").VERSION
    if name == "flow":
        return importlib.import_module("kontext_jax.flow")
    if name in __all__:
        return getattr(importlib.import_module("kontext_jax.api"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
