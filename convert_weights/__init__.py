"""Moves weights between the published PyTorch layouts and ours, bit for bit.

    python -m convert_weights to-jax | to-torch | check | inspect

From Python:

    config, params = read_component(path, "mmdit")            # one network, as NumPy arrays
    config, params = read_component(path, "mmdit", MMDiTConfig(...), dtype="float32")
    bundle = open_foreign_bundle("FLUX.1-Kontext-dev/")       # a whole model, translated on the way

`read_component(path, kind, config)` takes a safetensors file, a sharded folder with its index, or a
folder of diffusers or transformers; `kind` is "mmdit", "vae", "t5" or "clip" (None: the only one
there is); `config` is the dataclass of `kontext_jax.models.presets`, needed only where neither
shapes nor a config.json beside the weights tell it (heads that are not 128 wide, say).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from convert_weights.io import NonFiniteError, open_components
from convert_weights.rules import WeightMismatchError
from convert_weights.sources import open_foreign_bundle
from kontext_jax.models.presets import Config
from kontext_jax.storage.safetensors_reader import TensorFileError
from kontext_jax.trees import unflatten
from kontext_jax.weights.bundle import as_dtype

if TYPE_CHECKING:
    from kontext_jax.types import Params


def read_component(
    path: str | Path, kind: str | None = None, config: Config | None = None, dtype=None
) -> tuple[Config, Params]:
    """One network's config and parameters in our layout, from weights in a published one.

    Args:
      path: a safetensors file, an index, or a folder that holds one set of tensors.
      kind: "mmdit", "vae", "t5" or "clip"; None where the file holds only one.
      config: its config, where neither shapes nor a config.json tell it.
      dtype: dtype of the parameters; None keeps the stored one.

    Returns:
      (config, nested dict of NumPy arrays).

    Raises:
      TensorFileError: the file is damaged, or holds NaN.
      WeightMismatchError: the tensors are not those of the component; every difference is listed.
    """
    components = open_components(Path(path), kind, config)
    if len(components) != 1:
        raise WeightMismatchError(f"{path}: holds {', '.join(components)}; say which one to read")
    (component,) = components.values()
    try:
        dtype = as_dtype(dtype)
        leaves = {leaf: component.read_leaf(leaf, dtype) for leaf in component.leaves}
    finally:
        component.close()
    return component.config, unflatten(leaves)


__all__ = [
    "NonFiniteError",
    "TensorFileError",
    "WeightMismatchError",
    "open_foreign_bundle",
    "read_component",
]
