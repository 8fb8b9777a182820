"""LoRA files in the published layouts → `adapters.Adapter`.

What a file holds is matched name by name (`tables/lora.py`): a tensor that is left over, a factor
without its partner, or a shape that does not fit the model is an error that lists them all.
"""

import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from convert_weights.io import lossless_dtype
from convert_weights.layouts import TITLES, read_json_object
from convert_weights.lora import table
from convert_weights.lora.layers import (
    PublishedLayer,
    PublishedLeaf,
    published_layers,
    replaceable_leaves,
)
from convert_weights.rules import WeightMismatchError, natural_key
from kontext_jax.models.presets import Config
from kontext_jax.storage.safetensors_reader import (
    FLOAT_DTYPES,
    SafetensorsFile,
    cast,
    dtype_name,
    has_nonfinite,
    open_tensors,
)
from kontext_jax.weights.adapters import Adapter, Changes, LowRank, Place
from kontext_jax.weights.run import Which, adapter_of_run, is_run, open_run

PEFT_METADATA = "lora_adapter_metadata"  # diffusers' key in a file's header
PEFT_FILE, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"  # PEFT's own folder
_FLOATS = frozenset(FLOAT_DTYPES.values())


@dataclasses.dataclass(frozen=True)
class Network:
    """A network's layers and replaceable leaves, by every name a file may give them."""

    kind: str
    layers: Mapping[str, PublishedLayer]
    leaves: Mapping[str, PublishedLeaf]
    _flat: Mapping[str, PublishedLayer] = dataclasses.field(init=False, repr=False, compare=False)

    def find_layer(self, name: str) -> PublishedLayer | None:
        """The layer that a tensor's name without its suffix means."""
        for prefix in sorted(table.DOTTED_PREFIXES[self.kind], key=len, reverse=True):
            if name.startswith(prefix) and (found := self.layers.get(name[len(prefix) :])):
                return found
        for prefix in table.FLAT_PREFIXES[self.kind]:
            if name.startswith(prefix) and (found := self._flat.get(name[len(prefix) :])):
                return found
        return None

    def find_leaf(self, name: str) -> PublishedLeaf | None:
        """The leaf that a tensor replaces."""
        name = name.removesuffix(table.SET_SUFFIX)
        for prefix in sorted(table.DOTTED_PREFIXES[self.kind], key=len, reverse=True):
            if name.startswith(prefix) and (found := self.leaves.get(name[len(prefix) :])):
                return found
        return None

    def __post_init__(self):
        flat = {name.replace(".", "_"): layer for name, layer in self.layers.items()}
        object.__setattr__(self, "_flat", flat)


def open_networks(configs: Mapping[str, Config]) -> list[Network]:
    """The networks of `configs` that LoRA files may adapt."""
    return [
        Network(kind, published_layers(kind, config), replaceable_leaves(kind, config))
        for kind, config in configs.items()
        if kind in table.DOTTED_PREFIXES
    ]


@dataclasses.dataclass
class _Found:
    """The tensors of one layer's adapter, by part, and the name without suffix they stand under."""

    stem: str
    names: dict[str, str]


def open_adapter(
    path: str | Path,
    configs: Mapping[str, Config],
    which: Which | None = None,
    step: int | None = None,
) -> Adapter:
    """The adapter in a LoRA file, or the one that a training run made.

    Args:
      path: the file, or the run's folder; it becomes the adapter's name.
      configs: configs of the model's networks, by kind; "mmdit" at least.
      which, step: tree and step of a run, see `training_bundle.open_run`.

    Raises:
      WeightMismatchError: `read_lora` raised it, or the run adapted another model.
      ValueError, OSError: the run cannot be read.
    """
    if not is_run(path):
        return read_lora(path, configs)
    adapter = dataclasses.replace(adapter_of_run(open_run(path, which, step)), name=str(path))
    expected = published_layers("mmdit", configs["mmdit"])
    slots = {(slot.path, layer.layer): slot for layer in expected.values() for slot in layer.slots}
    lines = []
    for place, change in adapter.networks["mmdit"].low_rank.items():
        name = place[0] if place[1] is None else f"{place[0]} [{place[1]}]"
        if place not in slots:
            lines.append(f"+ {name}")
        elif (change.a.shape[:-1], change.b.shape[1:]) != slots[place].our_shapes:
            lines.append(_wrong_shape(name, slots[place].our_shapes, change.b.shape))
    if lines:
        raise WeightMismatchError(
            f"{path}: its adapters are of another transformer (+ not in this one):\n  "
            + "\n  ".join(sorted(lines, key=natural_key))
        )
    return adapter


def read_lora(path: str | Path, configs: Mapping[str, Config]) -> Adapter:
    """The adapter in a LoRA file.

    Args:
      path: a safetensors file, or a folder that holds one.
      configs: configs of the model's networks, by kind; "mmdit" at least.

    Raises:
      TensorFileError: the file is damaged, or holds NaN.
      WeightMismatchError: it is no LoRA of this model, or of a kind that is not supported.
    """
    with open_tensors(path) as file:
        if not isinstance(file, SafetensorsFile):
            raise WeightMismatchError(f"{path}: a LoRA in several files is not supported")
        _refuse_other_methods(file)
        networks = open_networks(configs)
        found, replaced, layouts = _match(file, networks)
        alphas = _Alphas(file)
        changes = {
            network.kind: Changes(
                _low_rank(file, network.kind, found[network.kind], alphas),
                {
                    (leaf.move.path, leaf.move.layer): leaf.move.to_ours(_read(file, tensor))
                    for tensor, leaf in replaced[network.kind].items()
                },
            )
            for network in networks
            if found[network.kind] or replaced[network.kind]
        }
        dtype = lossless_dtype(
            info.dtype for tensor, info in file.tensors.items() if not tensor.endswith(".alpha")
        )
        with open(file.path, "rb") as raw:
            digest = hashlib.file_digest(raw, "sha256").hexdigest()
    return Adapter(str(path), digest, changes, " and ".join(sorted(layouts)), dtype)


def _read(file: SafetensorsFile, name: str) -> np.ndarray:
    array = file.read(name)
    if has_nonfinite(array):
        raise WeightMismatchError(f"{file.path}: NaN or infinity in {name}")
    return cast(array, np.dtype(np.float32), name)


def _refuse_other_methods(file: SafetensorsFile) -> None:
    found: dict[str, list[str]] = {}
    for name in file.tensors:
        for part, method in table.REFUSED.items():
            if name.endswith(part) or (part in name and part not in table.REFUSED_AT_END):
                found.setdefault(method, []).append(name)
                break
    if found:
        methods = "; ".join(
            f"{method} ({len(names)} tensors, such as {min(names, key=natural_key)})"
            for method, names in sorted(found.items())
        )
        raise WeightMismatchError(
            f"{file.path}: not a plain LoRA, and not supported: {methods}; merge it into its base "
            "with the program that made it"
        )


def _split_name(name: str) -> tuple[str, str] | None:
    """(stem, part) of a tensor's name."""
    for suffix in sorted(table.SUFFIXES, key=len, reverse=True):
        if name.endswith(suffix):
            return name.removesuffix(suffix), table.SUFFIXES[suffix]
    return None


def _match(file: SafetensorsFile, networks: list[Network]):
    """Every tensor's place, or an error with every one that has none.

    Returns:
      by kind: published layer's name → (layer, its tensors); by kind: tensor → the leaf it
      replaces; and the layouts met.
    """
    found: dict[str, dict[str, tuple[PublishedLayer, _Found]]] = {n.kind: {} for n in networks}
    replaced: dict[str, dict[str, Any]] = {n.kind: {} for n in networks}
    lines: list[tuple[str, str]] = []
    layouts: set[str] = set()
    for name, info in file.tensors.items():
        if not _place(name, found, replaced, layouts, networks, lines):
            lines.append((name, f"+ {name} {list(info.shape)}"))
        elif info.dtype not in _FLOATS:
            lines.append((name, f"dtype {name} is {dtype_name(info.dtype)}, not floating-point"))
    for kind, layers in found.items():
        owners: dict[Place, str] = {}
        for published, tensors in layers.values():
            lines += _wrong_tensors(file, published, tensors)
            for slot in published.slots:
                place = slot.path, published.layer
                if place in owners:
                    lines.append((tensors.stem, f"twice {tensors.stem} and {owners[place]}"))
                owners[place] = tensors.stem
        for name, leaf in replaced[kind].items():
            if (shape := file.tensors[name].shape) != leaf.shape:
                lines.append((name, _wrong_shape(name, leaf.shape, shape)))
    if lines:
        if not any(found.values()):
            what = "not a LoRA of a FLUX model"
        else:
            what = f"does not fit this {TITLES['mmdit']}"
        told = [line for _, line in sorted(lines, key=lambda item: natural_key(item[0]))]
        raise WeightMismatchError(
            f"{file.path}: {what}: {len(told)} differences (- missing, + not the name of any "
            "adapter of this model):\n  " + "\n  ".join(told)
        )
    if not any(found.values()):
        raise WeightMismatchError(f"{file.path}: holds no adapters")
    return found, replaced, layouts


def _place(name, found, replaced, layouts, networks, lines) -> bool:
    """Notes where a tensor belongs; False if nowhere."""
    if parts := _split_name(name):
        stem, part = parts
        for network in networks:
            if (layer := network.find_layer(stem)) is None:
                continue
            _, tensors = found[network.kind].setdefault(layer.name, (layer, _Found(stem, {})))
            if part in tensors.names:
                lines.append((name, f"twice {name} and {tensors.names[part]}"))
            tensors.names[part] = name
            layouts.add(_layout_of(stem, layer))
            return True
        return False
    for network in networks:
        if (leaf := network.find_leaf(name)) is not None:
            replaced[network.kind][name] = leaf
            return True
    return False


def _layout_of(stem: str, layer: PublishedLayer) -> str:
    if any(stem.startswith(prefixes) for prefixes in table.FLAT_PREFIXES.values()):
        return "kohya"
    return {"diffusers": "peft", "transformers": "peft"}.get(layer.naming, layer.naming)


def _wrong_shape(name: str, expected, found) -> str:
    return f"shape {name} expected {list(expected)}, found {list(found)}"


def _wrong_tensors(file: SafetensorsFile, layer: PublishedLayer, tensors: _Found):
    """What is missing of one layer's adapter, or has a shape that does not fit."""
    shapes = {part: file.tensors[name].shape for part, name in tensors.names.items()}
    missing = [part for part in ("a", "b") if part not in shapes]
    if missing:
        has = ", ".join(tensors.names.values())
        return [
            (tensors.stem, f"- {tensors.stem}: no factor {' or '.join(missing)} (there is {has})")
        ]
    num_out, num_in = layer.sizes
    rank = shapes["a"][0] if shapes["a"] else 0
    expected = {"a": (rank, num_in), "b": (num_out, rank), "bias": (num_out,)}
    lines = [
        (name, _wrong_shape(name, expected[part], shapes[part]))
        for part, name in tensors.names.items()
        if part != "alpha" and shapes[part] != expected[part]
    ]
    if "alpha" in shapes and math.prod(shapes["alpha"]) != 1:
        lines.append(
            (tensors.names["alpha"], _wrong_shape(tensors.names["alpha"], (), shapes["alpha"]))
        )
    if rank < 1:
        lines.append((tensors.stem, f"{tensors.stem}: rank {rank}"))
    if "bias" in shapes and not any(slot.has_bias for slot in layer.slots):
        name = tensors.names["bias"]
        lines.append((name, f"+ {name}: the model has no bias there"))
    return lines


class _Alphas:
    """alpha / rank of each adapter: from a tensor, from diffusers' or PEFT's config, or 1."""

    def __init__(self, file: SafetensorsFile):
        self.file = file
        self.config: dict[str, Any] = {}
        beside = file.path.parent / PEFT_CONFIG
        if PEFT_METADATA in file.metadata:
            try:
                self.config = dict(json.loads(file.metadata[PEFT_METADATA]))
            except (ValueError, TypeError, RecursionError) as error:
                raise WeightMismatchError(
                    f"{file.path}: {PEFT_METADATA} in its header is damaged: {error}"
                ) from None
        elif file.path.name == PEFT_FILE and beside.is_file():
            self.config = read_json_object(beside)
        if any(key.endswith("use_dora") and value for key, value in self.config.items()):
            raise WeightMismatchError(f"{file.path}: its config says DoRA, which is not supported")

    def factor(self, kind: str, layer: PublishedLayer, tensors: _Found, rank: int) -> float:
        """alpha / rank of one adapter; alpha / √rank where its config says rank-stabilised."""
        alpha = self._option(kind, "lora_alpha")
        if "alpha" in tensors.names:
            alpha = float(_read(self.file, tensors.names["alpha"]).reshape(()))
        elif alpha is None:
            return 1.0
        else:
            for pattern, own in (self._option(kind, "alpha_pattern") or {}).items():
                if self._means(pattern, layer.name):
                    alpha = own
                    break
            if isinstance(alpha, bool) or not isinstance(alpha, int | float):
                raise WeightMismatchError(f"{self.file.path}: its config has lora_alpha {alpha!r}")
        return alpha / (math.sqrt(rank) if self._option(kind, "use_rslora") else rank)

    def _option(self, kind: str, name: str) -> Any:
        # diffusers puts the network in front of every key, PEFT does not.
        return self.config.get(table.PEFT_CONFIG_PREFIX[kind] + name, self.config.get(name))

    def _means(self, pattern: str, module: str) -> bool:
        """PEFT's rule: the pattern is the end of the module's name, from a dot on."""
        try:
            return re.match(rf"(.*\.)?({pattern})$", module) is not None
        except re.error:
            raise WeightMismatchError(
                f"{self.file.path}: its config has the damaged pattern {pattern!r}"
            ) from None


def _low_rank(file: SafetensorsFile, kind: str, found, alphas: _Alphas) -> dict[Place, LowRank]:
    low_rank: dict[Place, LowRank] = {}
    for layer, tensors in found.values():
        values = {
            part: _read(file, name) for part, name in tensors.names.items() if part != "alpha"
        }
        factor = alphas.factor(kind, layer, tensors, len(values["a"]))
        split = layer.split(values["a"], values["b"], factor, values.get("bias"))
        low_rank |= {(path, layer.layer): change for path, change in split.items()}
    return low_rank
