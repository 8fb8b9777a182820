"""Random weights of a preset, the same on every machine."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

from kontext_jax.models.presets import PRESETS, Config
from kontext_jax.storage.safetensors_reader import (
    cast,
)
from kontext_jax.trees import flatten
from kontext_jax.weights.bundle import (
    ASSETS,
    KINDS,
    NO_EDITS,
    TOKENIZERS,
    Component,
    Edits,
    ModelBundle,
    as_dtype,
    parameter_shapes,
    place_leaves,
    read_edited,
)

if TYPE_CHECKING:
    from kontext_jax.types import Params

UNTRAINED = "untrained"  # in place of a path to weights


def untrained_bundle(preset_name: str) -> ModelBundle:
    """The preset with deterministic random weights: every part works, the pictures mean nothing.

    Parameters have the shapes of the models' own initialisation but are drawn by NumPy from their
    paths, so that nothing has to be compiled: variance 1 / fan-in where a bias tells the fan-out,
    1 / √(fan-in · fan-out) for kernels without one; norms are the identity, biases zero.

    Raises:
      ValueError: there is no such preset.
    """
    if preset_name not in PRESETS:
        raise ValueError(f"no preset {preset_name!r}; there are {', '.join(PRESETS)}")
    preset = PRESETS[preset_name]
    components = {kind: _untrained_component(kind, getattr(preset, kind)) for kind in KINDS}
    digest = hashlib.sha256(f"untrained {dataclasses.asdict(preset)}".encode()).hexdigest()
    tokenizer_dirs = {name: ASSETS / "tokenizers" / name for name in TOKENIZERS}
    source = f"{preset_name}, untrained: deterministic random weights, so pictures mean nothing"
    return ModelBundle(preset, components, tokenizer_dirs, source, digest)


def _untrained_component(kind: str, config: Config) -> Component:
    def load(dtype=None, device=None, edits: Edits = NO_EDITS) -> Params:
        shapes = dict(sorted(flatten(parameter_shapes(kind, config))))
        float32 = np.dtype(np.float32)

        def leaf(path: str, dtype: np.dtype | None) -> np.ndarray:
            return cast(untrained_leaf(kind, path, shapes), dtype, path)

        return place_leaves(
            shapes, lambda p: read_edited(p, leaf, as_dtype(dtype), float32, edits), device
        )

    return Component(config, load)


def untrained_leaf(kind: str, path: str, shapes: Mapping[str, Any]) -> Float[np.ndarray, "*shape"]:
    """The float32 values that `untrained_bundle` gives a parameter, drawn from its path.

    Args:
      shapes: shapes of the network's parameters by path; that of the bias tells a kernel's fan-in.
    """
    shape = shapes[path].shape
    parent, _, name = path.rpartition("/")
    if name == "scale":
        return np.ones(shape, np.float32)
    if name == "bias":
        return np.zeros(shape, np.float32)
    bias = shapes.get(f"{parent}/bias")
    if bias is not None:
        variance = math.prod(bias.shape) / math.prod(shape)
    else:
        variance = 1 / math.sqrt(math.prod(shape[1:] if len(shape) > 2 else shape))
    seed = int.from_bytes(hashlib.sha256(f"{kind}/{path}".encode()).digest()[:8])
    values = np.random.Generator(np.random.PCG64(seed)).standard_normal(shape, np.float32)
    return values * np.float32(math.sqrt(variance))
