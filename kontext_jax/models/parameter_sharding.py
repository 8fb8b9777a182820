"""Which axis of every parameter lies over which axis of a mesh.

`parameter_axes` names the axes of a parameter, `runtime.sharding.MESH_AXES` says over which axes of
the mesh a name is split. Three cases are left to decide here:

    small                 below `SMALL_PARAMETER` elements an axis that does not divide is copied
    large                 is split along its last divisible axis instead; without one: an error
    factor of an adapter  the kernel has one axis over fsdp, which only one of the two factors has;
                          the other is split along its own wide axis
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from kontext_jax.models.parameter_axes import adapter_axes, parameter_axes
from kontext_jax.runtime.sharding import mesh_axes, path_name, split_axis

SMALL_PARAMETER = 2**20  # elements

Place = Callable[[str, tuple[int, ...]], NamedSharding]
"""Path and shape of a parameter → where it lies."""


def parameter_spec(mesh: Mesh, path: str, shape: Sequence[int]) -> PartitionSpec:
    """Mesh axes of each axis of a parameter, or of anything that has its path and shape.

    Raises:
      ValueError: no rule names a large array's axes, or it cannot be split as its rule says.
    """
    axes = parameter_axes(path)
    is_adapter = axes is None
    if is_adapter:
        axes = adapter_axes(path)
    names = None if axes is None else axes.names
    is_small = math.prod(shape) < SMALL_PARAMETER
    if names is None or (names and len(names) != len(shape)):
        if is_small:
            return PartitionSpec()
        rule = "no rule" if names is None else f"the rule {names}"
        raise ValueError(
            f"{path} with shape {tuple(shape)} matches {rule} of PARAMETER_AXES in "
            "kontext_jax/models/parameter_axes.py; add one that names its axes, or COPIED to copy "
            "it everywhere"
        )
    spec = [split_axis(mesh, name, size) for name, size in zip(names, shape, strict=False)]
    if not is_small:
        _split_what_did_not_divide(mesh, spec, path, names, shape)
    if is_adapter and "embed" not in names and mesh.shape.get("fsdp", 1) > 1:
        unsplit = _unsplit_axes(spec, shape, mesh.shape["fsdp"])
        wide = [axis for axis in unsplit if names[axis] not in ("layers", "rank")]
        if wide:
            spec[wide[-1]] = ("fsdp",)
    return PartitionSpec(*(split or None for split in spec))


def _split_what_did_not_divide(
    mesh: Mesh,
    spec: list[tuple[str, ...]],
    path: str,
    names: Sequence[str],
    shape: Sequence[int],
) -> None:
    """Puts mesh axes that their own axis of the parameter does not take on another axis."""
    for name in names:
        wanted = mesh_axes(mesh, name)
        if not wanted or any(set(wanted) <= set(split) for split in spec):
            continue
        parts = math.prod(mesh.shape[axis] for axis in wanted)
        if not (others := _unsplit_axes(spec, shape, parts)):
            raise ValueError(
                f"{path} with shape {tuple(shape)} has no free axis that is divisible by "
                f"{' × '.join(wanted)} = {parts}; change --config.mesh.{wanted[-1]}"
            )
        spec[others[-1]] = wanted


def _unsplit_axes(spec: Sequence[tuple[str, ...]], shape: Sequence[int], parts: int) -> list[int]:
    """Axes that are not split yet and that `parts` divides."""
    return [i for i, size in enumerate(shape) if not spec[i] and size % parts == 0]


def place_on(mesh: Mesh) -> Place:
    """The place of each parameter on a mesh, for loading weights straight to it."""
    return lambda path, shape: NamedSharding(mesh, parameter_spec(mesh, path, shape))


def state_shardings(mesh: Mesh, abstract_state: Any) -> Any:
    """A NamedSharding for each leaf of a tree that contains trees of parameters.

    Args:
      abstract_state: anything with shapes: parameters of any network, or a training state, whose
        optimizer moments and EMA follow their parameter. Scalars and small unknowns are copied.

    Raises:
      ValueError: `parameter_spec` refuses one of the leaves.
    """
    place = place_on(mesh)
    return jax.tree.map_with_path(
        lambda path, leaf: place(path_name(path), leaf.shape), abstract_state
    )
