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
from kontext_jax.runtime.sharding import AXES, BATCH_AXES, MeshConfig


def parse_mesh(
    text: str,
    flag: str = "--mesh",
    examples: str = "tensor=4 or data=2,context=2",
    *,
    may_fill: bool = False,
) -> dict[str, int]:
    """Sizes by axis of "tensor=4" or "data=2,context=2", without axes of size 1.

    Args:
      flag: name of the flag, for messages, like `examples`.
      may_fill: whether a size may be −1, for all devices that the other axes leave.

    Raises:
      ValueError: it is not of that form, or names no axis of a mesh.
    """
    sizes: dict[str, int] = {}
    for part in text.split(","):
        name, _, number = part.strip().partition("=")
        fits = (number.isdecimal() and int(number) >= 1) or (may_fill and number == "-1")
        if name not in AXES or name in sizes or not fits:
            raise ValueError(
                f"{flag} {text}: found {part.strip()!r}; expected sizes such as {examples}, of the "
                f"axes {', '.join(AXES)}"
            )
        sizes[name] = int(number)
    return {name: sizes[name] for name in AXES if sizes.get(name, 1) != 1}


def mesh_config(sizes: Mapping[str, int]) -> MeshConfig:
    """The mesh with these sizes and 1 elsewhere.

    Args:
      sizes: sizes by axis, see `parse_mesh`.
    """
    return MeshConfig(**{"fsdp": 1, **sizes})


def sampling_mesh(sizes: Mapping[str, int], devices: Sequence[Any] | None = None) -> Mesh | None:
    """A mesh of the first devices, as many as it takes; None if that is one.

    Args:
      sizes: sizes by axis, see `parse_mesh`.

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
    return sharding.make_mesh(mesh_config(sizes), devices[:needed])


def num_batch_parts(sizes: Mapping[str, int]) -> int:
    """Devices, or groups of them, that make different pictures of a batch."""
    return math.prod(sizes.get(name, 1) for name in BATCH_AXES)


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
        return {name: size for name, size in self.mesh.shape.items() if size > 1}

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
