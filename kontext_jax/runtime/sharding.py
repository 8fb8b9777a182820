"""Meshes, and which axis of every array lies over which axis of the mesh.

    slices   TPU slices, or groups of hosts, joined by a slow network; parameters are copied
    data     groups of devices that hold all parameters between them; the batch is split
    fsdp     parameters, optimizer and EMA are split, gathered layer by layer; the batch is split
    context  the tokens of each example are split; parameters are copied
    tensor   heads and MLP channels are split; between products, tokens

Axes of arrays have logical names, and `MESH_AXES` says over which axes of the mesh each name is
split. Models name the axes of activations with `constrain`, which does nothing outside
`activation_rules`; the axes of parameters are named by their path (models/parameter_axes.py).
Attention needs whole tokens and has the heads split over `context` instead (`attention_specs`).
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Shaped

AXES = ("slices", "data", "fsdp", "context", "tensor")
BATCH_AXES = ("slices", "data", "fsdp")

# Logical axis → mesh axes it lies over. An axis of a mesh that lacks them is not split.
MESH_AXES: dict[str, tuple[str, ...]] = {
    # activations
    "batch": BATCH_AXES,
    "rows": ("slices", "data"),  # of a batch whose other axis is split over fsdp
    "tokens": ("context",),
    # Between products, whose channels are split: norms, gates and sums are then split as well.
    "stream": ("context", "tensor"),
    "width": (),
    "attended_heads": ("tensor", "context"),  # where tokens are whole
    # activations and parameters
    "heads": ("tensor",),
    "mlp": ("tensor",),
    "head_dim": (),
    # parameters
    "embed": ("fsdp",),
    "layers": (),
    "chunks": (),
    "modulated": ("tensor",),
    "features": (),
    "rank": (),
}

# Fields of a batch that every example shares: name → rank of the shared form.
SHARED_FIELDS = {"pe": 3, "null_txt": 2, "null_vec": 1}


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis of the mesh; -1, on one axis at most, takes what is left."""

    slices: int = 1
    data: int = 1
    fsdp: int = -1
    context: int = 1
    tensor: int = 1

    def __post_init__(self):
        sizes = dataclasses.asdict(self)
        if any(size != -1 and size < 1 for size in sizes.values()):
            raise ValueError(f"mesh sizes must be positive, or -1 for the rest; found {sizes}")
        if list(sizes.values()).count(-1) > 1:
            raise ValueError(f"only one mesh size may be -1, found {sizes}")


def mesh_shape(config: MeshConfig, num_devices: int) -> tuple[int, ...]:
    """Sizes in the order of `AXES`, with -1 resolved.

    Raises:
      ValueError: if the sizes do not multiply to the number of devices.
    """
    sizes = dataclasses.astuple(config)
    known = math.prod(size for size in sizes if size != -1)
    if -1 in sizes and num_devices % known == 0:
        sizes = tuple(num_devices // known if size == -1 else size for size in sizes)
    if math.prod(sizes) != num_devices:
        asked = " × ".join(f"{k} {v}" for k, v in dataclasses.asdict(config).items())
        raise ValueError(
            f"the mesh {asked} does not fit {num_devices} devices; change --config.mesh so that "
            f"the product is {num_devices} (one size may be -1, for the rest)"
        )
    return sizes


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh over all devices, neighbours on the fast network along its later axes.

    Args:
      devices: devices of this run; None for `jax.devices()`. With `slices` > 1 on devices that do
        not know their slice (all but TPUs), consecutive devices make a slice.

    Raises:
      ValueError: if the sizes do not multiply to the number of devices, or `slices` is not the
        number of TPU slices.
    """
    devices = list(jax.devices() if devices is None else devices)
    shape = mesh_shape(config, len(devices))
    num_slices = shape[0]
    found = len({getattr(device, "slice_index", None) for device in devices})
    if found > 1 and found != num_slices:
        raise ValueError(
            f"the devices belong to {found} TPU slices, but mesh.slices is {num_slices}; set "
            f"--config.mesh.slices={found}"
        )
    if found > 1:
        grid = mesh_utils.create_hybrid_device_mesh(
            (1, *shape[1:]),
            (num_slices,) + (1,) * (len(shape) - 1),
            devices,
            allow_split_physical_axes=True,
        )
    elif num_slices > 1:
        grid = np.asarray(devices).reshape(shape)
    else:
        grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def activation_rules(mesh: Mesh):
    """Context in which programs are traced so that `constrain` and attention see the mesh."""
    return jax.set_mesh(mesh)


def traced_on(mesh: Mesh):
    """As `activation_rules`, for a part of a program that somebody else traces."""
    return jax.sharding.use_abstract_mesh(mesh.abstract_mesh)


def mesh_axes(mesh: Mesh, name: str) -> tuple[str, ...]:
    """Axes of the mesh over which a logical axis should be split; those of size 1 are left out."""
    return tuple(axis for axis in MESH_AXES[name] if mesh.shape.get(axis, 1) > 1)


def split_axis(mesh: Mesh, name: str | None, size: int) -> tuple[str, ...]:
    """Axes of the mesh that split a logical axis of `size`: the longest leading part that divides.

    Args:
      name: the logical axis; None is never split.
    """
    axes = mesh_axes(mesh, name) if name else ()
    while axes and size % math.prod(mesh.shape[a] for a in axes):
        axes = axes[:-1]
    return axes


def activation_spec(shape: Sequence[int], names: Sequence[str | None]) -> PartitionSpec | None:
    """Where an activation lies on the mesh that is active while tracing; None without a mesh.

    An axis that its part of the mesh does not divide is split less, or not at all: a single example
    of an initialisation goes through the same network.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return None
    if len(shape) != len(names):
        raise ValueError(f"{len(names)} logical axes {tuple(names)} for an array of shape {shape}")
    return PartitionSpec(
        *(split_axis(mesh, name, size) or None for name, size in zip(names, shape, strict=True))
    )


def constrain(x: Shaped[Array, "..."], *names: str | None) -> Shaped[Array, "..."]:
    """x, pinned to where its logical axes lie; x itself where no mesh is active."""
    spec = activation_spec(x.shape, names)
    return x if spec is None else jax.lax.with_sharding_constraint(x, spec)


def attention_specs(
    q_shape: Sequence[int], k_shape: Sequence[int]
) -> tuple[PartitionSpec, PartitionSpec] | None:
    """Where queries, and where keys and values [B, H, S, Dh] lie on the active mesh; None without.

    All-to-all: every device has some of the heads with all their tokens, if `tensor` × `context`
    divides the heads. If not, heads are split over `tensor` alone: every device has some of the
    queries, and all the keys. Attention then communicates nothing in either case.
    """
    mesh = jax.sharding.get_abstract_mesh()
    whole = ("batch", "attended_heads", None, "head_dim")
    if mesh.empty or attends_by_heads(q_shape[1]):
        spec = activation_spec(q_shape, whole)
        return None if spec is None else (spec, spec)
    queries = activation_spec(q_shape, ("batch", "heads", "tokens", "head_dim"))
    return queries, activation_spec(k_shape, ("batch", "heads", None, "head_dim"))


def attends_by_heads(num_heads: int) -> bool:
    """Whether attention splits its heads over the active mesh's `context`, not its queries."""
    mesh = jax.sharding.get_abstract_mesh()
    return split_axis(mesh, "attended_heads", num_heads) == mesh_axes(mesh, "attended_heads")


def num_parts(name: str) -> int:
    """Into how many parts the mesh that is active while tracing should split a logical axis."""
    mesh = jax.sharding.get_abstract_mesh()
    return math.prod(mesh.shape[axis] for axis in mesh_axes(mesh, name))


def path_name(path: Sequence[Any]) -> str:
    """A pytree path as "opt_state/0/mu/img_in/kernel"."""
    return "/".join(
        str(next(getattr(key, k) for k in ("key", "name", "idx") if hasattr(key, k)))
        for key in path
    )


def num_batch_shards(mesh: Mesh) -> int:
    """Parts into which a batch is split."""
    return math.prod(mesh.shape.get(axis, 1) for axis in BATCH_AXES)


def _is_shared(path: Sequence[Any], leaf: Any) -> bool:
    name = path_name(path[-1:])
    return leaf.ndim == 0 or SHARED_FIELDS.get(name) == leaf.ndim


def _batch_sharding(mesh: Mesh, is_shared: bool) -> NamedSharding:
    axes = tuple(axis for axis in BATCH_AXES if axis in mesh.shape)
    return NamedSharding(mesh, PartitionSpec() if is_shared else PartitionSpec(axes))


def batch_shardings(mesh: Mesh, abstract_batch: Any) -> Any:
    """Axis 0 of every leaf over slice, data and fsdp; what all examples share is copied.

    Tokens are whole here: the network itself splits them over `context`.

    Raises:
      ValueError: if the (global) batch is not divisible by the devices it is split over.
    """
    parts = num_batch_shards(mesh)

    def choose(path, leaf):
        is_shared = _is_shared(path, leaf)
        if not is_shared and leaf.shape[0] % parts:
            raise ValueError(
                f"{path_name(path)}: a global batch of {leaf.shape[0]} is not divisible by slice × "
                f"data × fsdp = {parts}; change --config.batch_size or --config.mesh"
            )
        return _batch_sharding(mesh, is_shared)

    return jax.tree.map_with_path(choose, abstract_batch)


def process_share(mesh: Mesh) -> tuple[int, int]:
    """(index, count): which of how many equal parts of a global batch this process must bring.

    Processes whose devices differ only along `context` and `tensor` bring the same part.

    Raises:
      ValueError: if this process's devices do not hold one whole part.
    """
    parts = num_batch_shards(mesh)
    where = _batch_sharding(mesh, False).devices_indices_map((parts,))
    process = jax.process_index()
    mine = sorted({i[0].start or 0 for d, i in where.items() if d.process_index == process})
    count = parts // len(mine) if mine else 0
    if not mine or parts % len(mine) or mine != list(range(mine[0], mine[0] + len(mine))):
        raise ValueError(
            f"process {process} holds the parts {mine} of a batch split in {parts}, which are not "
            "one contiguous share; change --config.mesh"
        )
    return mine[0] // len(mine), count


def shard_batch(mesh: Mesh, host_batch: Any) -> Any:
    """Global arrays on the devices, from this process's share of a batch (`process_share`).

    Shared fields must be the same on every process.

    Raises:
      ValueError: if the share is not divisible by the parts of the batch that this process holds.
    """
    _, num_shares = process_share(mesh)
    local_parts = num_batch_shards(mesh) // num_shares

    def put(path, leaf):
        leaf = np.asarray(leaf)
        is_shared = _is_shared(path, leaf)
        if not is_shared and leaf.shape[0] % local_parts:
            raise ValueError(
                f"{path_name(path)}: {leaf.shape[0]} examples of this process are not divisible by "
                f"its {local_parts} parts of the batch (slice × data × fsdp); change "
                "--config.batch_size or --config.mesh"
            )
        shape = leaf.shape if is_shared else (leaf.shape[0] * num_shares, *leaf.shape[1:])
        return jax.make_array_from_process_local_data(_batch_sharding(mesh, is_shared), leaf, shape)

    return jax.tree.map_with_path(put, host_batch)


def tree_bytes(tree: Any) -> int:
    """Bytes of one device's part of a tree of arrays or shapes with shardings."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree)
    )
