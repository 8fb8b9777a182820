"""Weights of a bundle's networks: read when they are first needed, or as shapes alone."""

import math
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from kontext_jax.models.mmdit import unstacked
from kontext_jax.models.parameter_axes import BLOCK_STACKS
from kontext_jax.models.parameter_sharding import place_on
from kontext_jax.runtime.programs import Clock
from kontext_jax.runtime.sharding import path_name
from kontext_jax.types import Params
from kontext_jax.weights.bundle import Listed, ModelBundle, parameter_shapes


class Networks(Protocol):
    """The networks of one bundle on one device or mesh."""

    def get(self, kind: str) -> Params:
        """Parameters of a network, as arrays or as shapes with shardings."""

    def drop(self, *kinds: str) -> None:
        """Forgets networks; without names, all."""

    def free_bytes(self) -> float | None:
        """Memory of the device that is left; None where it is not limited, as on CPUs."""


class _Kept:
    """Parameters by network, made at the first call."""

    def __init__(self, bundle: ModelBundle, dtype: Any, mesh: Mesh | None, listed: bool):
        self._bundle, self._dtype, self._listed = bundle, dtype, listed
        self._place = None if mesh is None else place_on(mesh)
        self._params: dict[str, Params] = {}

    def drop(self, *kinds: str) -> None:
        for kind in kinds or tuple(self._params):
            self._params.pop(kind, None)

    def _dtype_of(self, kind: str) -> Any:
        # The autoencoder is small and kept exact; each request's numerics cast it.
        return jnp.float32 if kind == "vae" else self._dtype

    def _is_listed(self, kind: str) -> bool:
        return self._listed and kind == "mmdit"


class LoadedNetworks(_Kept):
    """Networks whose weights are read.

    Args:
      bundle: weights, still on disk.
      dtype: dtype of the weights; those of the autoencoder are float32.
      mesh: devices over which weights are split; None for the default device.
      listed: whether each block of the transformer is a subtree of its own, see
        `models.block_stack`.
      timings: measures the stage "load".
    """

    def __init__(
        self, bundle: ModelBundle, dtype: Any, mesh: Mesh | None, listed: bool, timings: Clock
    ):
        super().__init__(bundle, dtype, mesh, listed)
        self._timings = timings

    def get(self, kind: str) -> Params:
        if kind not in self._params:
            device = Listed(BLOCK_STACKS, self._place) if self._is_listed(kind) else self._place
            with self._timings.measure("load"):
                params = self._bundle.components[kind].load(
                    dtype=self._dtype_of(kind), device=device
                )
                self._params[kind] = jax.block_until_ready(params)
        return self._params[kind]

    def free_bytes(self) -> float | None:
        limit, in_use = _device_memory()
        return limit and limit - in_use


class NetworkShapes(_Kept):
    """Networks of which only the shapes are known; takes what `LoadedNetworks` takes, no clock."""

    def get(self, kind: str) -> Params:
        if kind not in self._params:
            shapes = parameter_shapes(kind, self._bundle.components[kind].config)
            if self._is_listed(kind):
                shapes = jax.eval_shape(unstacked, shapes)

            def shape(path: Any, x: Any) -> jax.ShapeDtypeStruct:
                where = self._place and self._place(path_name(path), x.shape)
                return jax.ShapeDtypeStruct(x.shape, self._dtype_of(kind), sharding=where)

            self._params[kind] = jax.tree.map_with_path(shape, shapes)
        return self._params[kind]

    def free_bytes(self) -> float | None:
        limit, _ = _device_memory()
        leaves = jax.tree.leaves(self._params)
        return limit and limit - sum(math.prod(x.shape) * x.dtype.itemsize for x in leaves)


def _device_memory() -> tuple[float | None, float]:
    """Bytes of the default device, None if it has no memory of its own, and bytes in use."""
    stats = jax.devices()[0].memory_stats()
    if not stats or "bytes_limit" not in stats:
        return None, 0
    return stats["bytes_limit"], stats["bytes_in_use"]
