"""Where a sampling run computes: on the default device, or spread over a mesh.

    data      many pictures: each device makes some of a batch
    fsdp      as data, and the weights are split, gathered layer by layer
    context   one picture: its tokens are split, each device holds all weights
    tensor    one picture: heads and MLP channels are split, and with them the weights

The text encoders are split over fsdp and tensor; the autoencoder is copied to every device
(models/parameter_sharding.py).
"""

import contextlib
import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from kontext_jax.runtime import sharding
from kontext_jax.runtime.sharding import BATCH_AXES, MeshConfig

# Axis of a mesh as a user names it → its field of MeshConfig.
MESH_NAMES = ("slices", "data", "fsdp", "context", "tensor")


def parse_mesh(text: str) -> dict[str, int]:
    """Sizes by axis of "tensor=4" or "data=2,context=2", without axes of size 1.

    Raises:
      ValueError: it is not of that form, or names no axis of a mesh.
    """
    sizes: dict[str, int] = {}
    for part in text.split(","):
        name, _, size = part.strip().partition("=")
        if name not in MESH_NAMES or name in sizes or not size.isdecimal() or int(size) < 1:
            raise ValueError(
                f"--mesh {text}: found {part.strip()!r}; expected sizes such as tensor=4 or "
                f"data=2,context=2, of the axes {', '.join(MESH_NAMES)}"
            )
        sizes[name] = int(size)
    return {name: sizes[name] for name in MESH_NAMES if sizes.get(name, 1) > 1}


def sampling_mesh(sizes: Mapping[str, int], devices: Sequence[Any] | None = None) -> Mesh | None:
    """A mesh of the first devices, as many as it takes; None if that is one.

    Args:
      sizes: of `parse_mesh`.

    Raises:
      ValueError: there are too few devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    needed = math.prod(sizes.values())
    asked = format_mesh(sizes)
    if needed > len(devices):
        found = f"{len(devices)} {devices[0].platform}"
        hint = "give a smaller --mesh"
        if devices[0].platform == "cpu":
            flag = f"--xla_force_host_platform_device_count={needed}"
            hint += f", or try it out on one machine with XLA_FLAGS={flag}"
        raise ValueError(f"--mesh {asked} needs {needed} devices, found {found}; {hint}")
    if needed == 1:
        return None
    return sharding.make_mesh(MeshConfig(**{"fsdp": 1, **sizes}), devices[:needed])


def num_batch_parts(sizes: Mapping[str, int]) -> int:
    """Devices, or groups of them, that make different pictures of a batch."""
    return math.prod(sizes.get(name, 1) for name in ("slices", "data", "fsdp"))


def format_mesh(sizes: Mapping[str, int]) -> str:
    """Inverse of `parse_mesh`; data=1 for a single device."""
    return ",".join(f"{name}={size}" for name, size in sizes.items()) or "data=1"


@dataclasses.dataclass(frozen=True)
class Placement:
    """Shardings of batches and results on a mesh; without a mesh there are none."""

    mesh: Mesh | None = None

    @property
    def num_batch_parts(self) -> int:
        return num_batch_parts(self.sizes)

    @property
    def sizes(self) -> dict[str, int]:
        """Sizes of the mesh by axis, in the form of `parse_mesh`."""
        if self.mesh is None:
            return {}
        by_name = zip(MESH_NAMES, (self.mesh.shape[axis] for axis in sharding.AXES), strict=True)
        return {name: size for name, size in by_name if size > 1}

    def rules(self) -> contextlib.AbstractContextManager:
        """Context in which programs for this mesh are traced."""
        if self.mesh is None:
            return contextlib.nullcontext()
        return sharding.activation_rules(self.mesh)

    def split(self, axis: int | None = 0) -> NamedSharding | None:
        """Sharding that splits `axis` over the batch devices; None replicates."""
        if self.mesh is None:
            return None
        spec = () if axis is None else (None,) * axis + (BATCH_AXES,)
        return NamedSharding(self.mesh, PartitionSpec(*spec))

    def place(self, batch: Any) -> Any:
        """A pytree of arrays [B, …], and of what is shared, on its devices.

        Raises:
          ValueError: B is not divisible by the devices it is split over.
        """
        if self.mesh is None:
            return batch
        return jax.device_put(batch, sharding.batch_shardings(self.mesh, batch))
