"""A transformer made larger without changing what it gives."""

import dataclasses
import functools

import numpy as np

from kontext_jax.models.presets import MMDiTConfig
from kontext_jax.storage.safetensors_reader import cast
from kontext_jax.trees import flatten
from kontext_jax.types import Params
from kontext_jax.weights.bundle import (
    NO_EDITS,
    Component,
    Edits,
    as_dtype,
    parameter_shapes,
    place_leaves,
    read_edited,
)
from kontext_jax.weights.untrained import untrained_leaf


def grown(component: Component, config: MMDiTConfig) -> tuple[Component, list[str]]:
    """The transformer with what `config` has and it has not, and a line for each addition."""
    additions = []
    if config.guidance_embed and not _transformer(component).guidance_embed:
        component = with_guidance_input(component)
        additions.append("an input for guidance added, its output zero")
    count = config.out_channels // _transformer(component).out_channels
    if count > 1:
        component = with_velocities(component, count)
        additions.append(f"its last layer repeated for {count} velocities")
    return component, additions


def _transformer(component: Component) -> MMDiTConfig:
    assert isinstance(component.config, MMDiTConfig)
    return component.config


def with_guidance_input(component: Component) -> Component:
    """A transformer without an input for guidance, with one that changes nothing yet.

    The last layer of `guidance_in` is zero, so that the velocity is the same for every guidance;
    the layer before is drawn, or nothing could ever be learnt.

    Raises:
      ValueError: it has the input already.
    """
    own_config = _transformer(component)
    if own_config.guidance_embed:
        raise ValueError("this transformer takes guidance already; its input is not replaced")
    config = dataclasses.replace(own_config, guidance_embed=True)
    shapes = dict(flatten(parameter_shapes("mmdit", config)))
    own = [path for path in shapes if path.startswith("guidance_in/")]

    def load(dtype=None, device=None, edits: Edits = NO_EDITS) -> Params:
        params = component.load(dtype=dtype, device=device, edits=edits)
        stored = np.dtype(params["time_in"]["out_layer"]["kernel"].dtype)

        def draw(path: str, dtype: np.dtype | None) -> np.ndarray:
            if path.startswith("guidance_in/out_layer/"):
                return np.zeros(shapes[path].shape, dtype)
            return cast(untrained_leaf("mmdit", path, shapes), dtype, path)

        def read(path: str) -> np.ndarray:
            return read_edited(path, draw, as_dtype(dtype) or stored, stored, edits)

        return params | place_leaves(own, read, device)

    return Component(config, load)


def with_velocities(component: Component, count: int) -> Component:
    """A transformer that gives `count` velocities a token, all of them what it gave before."""
    config = _transformer(component)
    config = dataclasses.replace(config, out_channels=count * config.out_channels)

    def load(dtype=None, device=None, edits: Edits = NO_EDITS) -> Params:
        def repeated(edit, leaf: np.ndarray) -> np.ndarray:
            leaf = leaf if edit is None else edit(leaf)
            return np.tile(leaf, (1,) * (leaf.ndim - 1) + (count,))

        paths = ("final_layer/kernel", "final_layer/bias")
        further = {path: functools.partial(repeated, edits.get(path)) for path in paths}
        return component.load(dtype=dtype, device=device, edits={**edits, **further})

    return Component(config, load)
