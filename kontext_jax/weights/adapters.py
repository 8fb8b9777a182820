"""LoRA adapters on their way into weights: what they change, in our layout, and the merging.

    kernel + scale · factor · a·b      for every adapted kernel [*in, *out]; factor = alpha / rank
    bias   + scale · bias              where a file's b has one (BFL's control LoRAs)
    norm scales                        replaced, whatever the scale (likewise)

Sampling merges: the sums are made leaf by leaf in float32 while the weights are read, and rounded
once, so that the network that runs is the one without adapters. Training keeps them apart
(`models/lora.py`). Files in the published layouts are read and written by `convert_weights`.
"""

import dataclasses
import functools
import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from kontext_jax.models.parameter_axes import kernel_axes
from kontext_jax.trees import flatten
from kontext_jax.weights.bundle import NO_EDITS, AppliedAdapter, Component, Edits, ModelBundle

BLOCK = 2**16  # elements of a kernel that are changed at once

Place = tuple[str, int | None]  # a module or leaf of ours, and the layer where it is stacked


@dataclasses.dataclass(frozen=True)
class LowRank:
    """The change of one kernel in one layer."""

    a: np.ndarray  # float32 [*in, rank]
    b: np.ndarray  # float32 [rank, *out]
    factor: float  # alpha / rank
    bias: np.ndarray | None = None  # float32 [*out]

    @property
    def rank(self) -> int:
        return self.a.shape[-1]

    def add_to(self, kernel: Float[np.ndarray, "..."], scale: float) -> None:
        """Adds scale · factor · a·b to a contiguous float32 kernel [*in, *out], in place.

        By blocks that stay in cache: one product of the kernel's size would cost several times as
        much in fresh memory.
        """
        num_in, num_out = math.prod(self.a.shape[:-1]), math.prod(self.b.shape[1:])
        a = self.a.reshape(num_in, self.rank)
        b = self.b.reshape(self.rank, num_out) * np.float32(scale * self.factor)
        rows = kernel.reshape(num_in, num_out)
        step = max(1, BLOCK // num_out)
        block = np.empty((min(step, num_in), num_out), np.float32)
        for start in range(0, num_in, step):
            part = rows[start : start + step]
            part += np.matmul(a[start : start + step], b, out=block[: len(part)])


@dataclasses.dataclass(frozen=True)
class Changes:
    """What an adapter does to one network."""

    low_rank: Mapping[Place, LowRank]  # by module
    replaced: Mapping[Place, np.ndarray] = dataclasses.field(default_factory=dict)  # by leaf


@dataclasses.dataclass(frozen=True)
class Adapter:
    """A LoRA: changes by network ("mmdit", "clip", "t5").

    Attributes:
      name: origin of the adapter, for the user and for a picture's metadata.
      sha256: hash of the file, or of the values.
      layout: layout of the file.
      dtype: dtype that the file stores; the values here are float32.
    """

    name: str
    sha256: str
    networks: Mapping[str, Changes]
    layout: str = "kontext_jax"
    dtype: np.dtype = dataclasses.field(default_factory=lambda: np.dtype(np.float32))

    def summary(self) -> str:
        """What it is, in one line."""
        parts = []
        for kind, changes in self.networks.items():
            ranks = sorted({change.rank for change in changes.low_rank.values()})
            parts.append(f"{len(changes.low_rank)} kernels of {kind}, rank {_listed(ranks)}")
            if changes.replaced:
                parts.append(f"{len(changes.replaced)} parameters replaced")
        return f"{self.name} ({self.layout}, {self.dtype.name}): {'; '.join(parts)}"


def adapter_from_tree(lora: Mapping[str, Any], alpha: float, name: str) -> Adapter:
    """The transformer's adapter of a training run, layer by layer.

    Args:
      lora: adapters in the tree of `models.lora.init_lora`, on host or device.
      alpha: alpha of its config.
      name: name of the run.
    """
    leaves = {path: np.asarray(leaf, np.float32) for path, leaf in flatten(lora)}
    digest = hashlib.sha256(f"alpha {alpha}".encode())
    low_rank: dict[Place, LowRank] = {}
    for path in sorted(leaves):
        digest.update(path.encode() + leaves[path].tobytes())
        module, _, factor_name = path.rpartition("/")
        if factor_name != "a":
            continue
        a, b = leaves[path], leaves[f"{module}/b"]
        factor = alpha / a.shape[-1]
        if kernel_axes(module).stack:
            for layer in range(len(a)):
                low_rank[module, layer] = LowRank(a[layer], b[layer], factor)
        else:
            low_rank[module, None] = LowRank(a, b, factor)
    return Adapter(name, digest.hexdigest(), {"mmdit": Changes(low_rank)})


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers)) if len(numbers) < 5 else f"{numbers[0]} to {numbers[-1]}"


LeafEdit = Callable[[np.ndarray], np.ndarray]


def leaf_edits(changes: Sequence[tuple[Changes, float]]) -> dict[str, LeafEdit]:
    """What merging does to each leaf: functions of its float32 values, which they may overwrite.

    Args:
      changes: changes of one network, each with its scale; they are added in this order.

    Raises:
      ValueError: two of them replace the same parameter.
    """
    steps: dict[str, list[tuple[int | None, Callable[[np.ndarray], None]]]] = {}
    replaced: set[Place] = set()
    for change, scale in changes:
        for (module, layer), low_rank in change.low_rank.items():
            add = functools.partial(_add_product, low_rank, scale)
            steps.setdefault(f"{module}/kernel", []).append((layer, add))
            if low_rank.bias is not None:
                add = functools.partial(_add, low_rank.bias * np.float32(scale))
                steps.setdefault(f"{module}/bias", []).append((layer, add))
        if both := replaced & change.replaced.keys():
            path = min(both)[0]
            raise ValueError(
                f"two of the LoRAs replace {path}, as control LoRAs do; apply one of them alone"
            )
        replaced |= change.replaced.keys()
        for (path, layer), value in change.replaced.items():
            put = functools.partial(_put, value)
            steps.setdefault(path, []).append((layer, put))
    return {path: functools.partial(_apply, todo) for path, todo in steps.items()}


def _apply(steps, leaf: np.ndarray) -> np.ndarray:
    for layer, step in steps:
        step(leaf if layer is None else leaf[layer])
    return leaf


def _add_product(low_rank: LowRank, scale: float, kernel: np.ndarray) -> None:
    low_rank.add_to(kernel, scale)


def _add(value: np.ndarray, leaf: np.ndarray) -> None:
    leaf += value


def _put(value: np.ndarray, leaf: np.ndarray) -> None:
    leaf[...] = value


def with_adapters(bundle: ModelBundle, adapters: Sequence[tuple[Adapter, float]]) -> ModelBundle:
    """The model with adapters merged into its weights as they are loaded.

    Args:
      adapters: with their scales; 1 is the strength they were trained at.

    Raises:
      ValueError: two of them exclude each other.
    """
    components = dict(bundle.components)
    for kind in components:
        changes = [(a.networks[kind], scale) for a, scale in adapters if kind in a.networks]
        if changes:
            components[kind] = _edited(components[kind], leaf_edits(changes))
    applied = tuple(AppliedAdapter(a.name, a.sha256, float(scale)) for a, scale in adapters)
    return dataclasses.replace(bundle, components=components, adapters=(*bundle.adapters, *applied))


def _edited(component: Component, own: Edits) -> Component:
    """The component whose weights pass through `own` edits before any others."""

    def load(dtype=None, device=None, edits: Edits = NO_EDITS) -> Any:
        later = {path: _in_turn(own[path], edit) for path, edit in edits.items() if path in own}
        return component.load(dtype, device, edits={**own, **edits, **later})

    return dataclasses.replace(component, load=load)


def _in_turn(first: LeafEdit, second: LeafEdit) -> LeafEdit:
    return lambda leaf: second(first(leaf))
