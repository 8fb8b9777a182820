"""Trees of device arrays on disk, by Orbax (its v1 interface, which nothing else here touches).

A store is a folder that holds *items*, each the arrays of one tree under their paths ("a/b/0/c").
Items are read one by one, leaf by leaf where wanted, onto any devices: the shardings asked for
decide, not those that wrote. Every process of a run calls these functions alike.
"""

from __future__ import annotations

import functools
import logging
import warnings
from collections.abc import Mapping
from typing import Any, Protocol

import jax
import numpy as np
from etils import epath

from kontext_jax.trees import flatten, unflatten

READ_BYTES = 2**31  # of host memory, for arrays on their way to devices; more if one array needs it


class Saving(Protocol):
    """A save under way."""

    def result(self) -> None:
        """Returns when every process has written everything; raises what went wrong."""


@functools.cache
def _orbax():
    from orbax.checkpoint import v1  # imported late: it takes a second

    # Each of its threads logs the traceback of an error that it raises as well, a thousand lines
    # for a full disk; what `Saving.result` raises says it once.
    logging.getLogger("absl").addFilter(
        lambda record: "_SignalingThread.run() raised an exception" not in str(record.msg)
    )
    return v1


def _context(largest_bytes: int = 0):
    # Uncompressed: float32 states shrink by 8 %, and two cores then write at half the disk's speed.
    context = _orbax().Context()
    context.array.saving.use_compression = False
    context.memory.read_concurrent_bytes = max(READ_BYTES, 2 * largest_bytes + 1)
    context.pytree.loading.partial_load = True
    return context


def leaves_of(tree: Any) -> dict[str, Any]:
    """The leaves of any pytree by path; empty nodes vanish."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def save_async(folder: epath.Path, items: Mapping[str, Any]) -> Saving:
    """Begins to write `items`, trees of arrays by name, into the new folder `folder`.

    The arrays may be donated to a computation as soon as this returns: what is saved is their value
    now. An item without leaves is left out.
    """
    trees = {name: unflatten(leaves) for name, tree in items.items() if (leaves := leaves_of(tree))}
    with _context():
        return _orbax().save_checkpointables_async(folder, trees)


def stored_leaves(folder: epath.Path) -> dict[str, dict[str, jax.ShapeDtypeStruct]]:
    """Shape and dtype of every stored array, by item and path."""
    with _context():
        metadata = _orbax().checkpointables_metadata(folder).metadata
    return {
        item: {
            path: jax.ShapeDtypeStruct(info.shape, np.dtype(info.dtype))
            for path, info in flatten(tree)
        }
        for item, tree in metadata.items()
    }


def load(
    folder: epath.Path, wanted: Mapping[str, Mapping[str, jax.ShapeDtypeStruct]]
) -> dict[str, dict[str, jax.Array]]:
    """Reads the leaves `wanted`, by item and path, each in the dtype and sharding given with it.

    A leaf without a sharding goes to the first device.
    """
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])

    def with_sharding(leaf) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding or here)

    trees = {
        item: unflatten({path: with_sharding(leaf) for path, leaf in leaves.items()})
        for item, leaves in wanted.items()
        if leaves
    }
    largest = max((4 * leaf.size for each in wanted.values() for leaf in each.values()), default=0)
    with _context(largest), warnings.catch_warnings():
        # It looks for the writer's shardings even where ours are given.
        warnings.filterwarnings("ignore", message="Sharding info not provided")
        loaded = _orbax().load_checkpointables(folder, trees) if trees else {}
    return {item: dict(flatten(loaded[item])) if item in loaded else {} for item in wanted}
