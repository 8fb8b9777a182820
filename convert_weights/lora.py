"""LoRA files in the published layouts → `adapters.Adapter`, and back.

    python -m convert_weights lora FILE --layout peft|kohya|bfl --out X.safetensors

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
from convert_weights.lora_layers import (
    PublishedLayer,
    PublishedLeaf,
    published_layers,
    replaceable_leaves,
)
from convert_weights.rules import WeightMismatchError, natural_key
from convert_weights.tables import lora as table
from kontext_jax.adapters import Adapter, Changes, LowRank, Place
from kontext_jax.models.presets import Config
from kontext_jax.tensor_files import (
    FLOAT_DTYPES,
    SafetensorsFile,
    TensorInfo,
    cast,
    dtype_name,
    has_nonfinite,
    open_tensors,
)
from kontext_jax.tensor_writing import SafetensorsWriter

LAYOUTS = tuple(table.WRITTEN)
PEFT_METADATA = "lora_adapter_metadata"  # diffusers' key in a file's header
PEFT_FILE, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"  # PEFT's own folder
_FLOATS = frozenset(FLOAT_DTYPES.values())


@dataclasses.dataclass(frozen=True)
class _Network:
    """A network's layers and replaceable leaves, by every name a file may give them."""

    kind: str
    layers: Mapping[str, PublishedLayer]
    leaves: Mapping[str, PublishedLeaf]

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


def _networks(configs: Mapping[str, Config]) -> list[_Network]:
    return [
        _Network(kind, published_layers(kind, config), replaceable_leaves(kind, config))
        for kind, config in configs.items()
        if kind in table.DOTTED_PREFIXES
    ]


@dataclasses.dataclass
class _Found:
    """The tensors of one layer's adapter, by part, and the name without suffix they stand under."""

    stem: str
    names: dict[str, str]


def read_lora(path: str | Path, configs: Mapping[str, Config], name: str | None = None) -> Adapter:
    """The adapter in a LoRA file.

    Args:
      path: a safetensors file, or a folder that holds one.
      configs: of the model's networks, by kind; "mmdit" at least.
      name: for the user and for metadata; None: the path as given.

    Raises:
      TensorFileError: the file is damaged, or holds NaN.
      WeightMismatchError: it is no LoRA of this model, or of a kind that is not supported.
    """
    with open_tensors(path) as file:
        if not isinstance(file, SafetensorsFile):
            raise WeightMismatchError(f"{path}: a LoRA in several files is not supported")
        _refuse_other_methods(file)
        networks = _networks(configs)
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
    return Adapter(name or str(path), digest, changes, " and ".join(sorted(layouts)), dtype)


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


def _match(file: SafetensorsFile, networks: list[_Network]):
    """Every tensor's place, or an error with every one that has none.

    Returns:
      by kind: published layer's name → (layer, its tensors); by kind: tensor → the leaf it
      replaces; and the layouts met.
    """
    found: dict[str, dict[str, tuple[PublishedLayer, _Found]]] = {n.kind: {} for n in networks}
    replaced: dict[str, dict[str, Any]] = {n.kind: {} for n in networks}
    lines, layouts = [], set()
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
        lines = [line for _, line in sorted(lines, key=lambda item: natural_key(item[0]))]
        raise WeightMismatchError(
            f"{file.path}: {what}: {len(lines)} differences (- missing, + not the name of any "
            "adapter of this model):\n  " + "\n  ".join(lines)
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
    if "." not in stem:
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


def lora_tensors(
    adapter: Adapter, layout: str, configs: Mapping[str, Config]
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """The float32 tensors and the metadata of an adapter in a published layout.

    Neither BFL's files nor PEFT's have a place for alpha that all programs read, so there it is
    multiplied into b; kohya's have tensors for it.

    Raises:
      WeightMismatchError: the layout cannot say what the adapter does.
    """
    parts, naming = table.WRITTEN[layout], table.WRITTEN_NAMING[layout]
    tensors: dict[str, np.ndarray] = {}
    impossible = []
    for network in _networks({k: configs[k] for k in adapter.networks}):
        kind, changes = network.kind, adapter.networks[network.kind]
        if kind not in table.WRITTEN_PREFIX[layout]:
            impossible.append(f"adapters of the {TITLES[kind]}")
            continue
        prefix = table.WRITTEN_PREFIX[layout][kind]
        for layer in network.layers.values():
            if layer.naming not in (naming, "transformers"):
                continue
            of_layer = {p: c for (p, n), c in changes.low_rank.items() if n == layer.layer}
            if (joined := layer.join(of_layer)) is None:
                continue
            a, b, factor, bias = joined
            name = layer.name.replace(".", "_") if layout == "kohya" else layer.name
            stem = prefix + name
            if "alpha" in parts:
                tensors[stem + parts["alpha"]] = np.array(factor * len(a), np.float32)
            elif factor != 1:
                b = b * np.float32(factor)
            tensors[stem + parts["a"]], tensors[stem + parts["b"]] = a, b
            if bias is not None and "bias" not in parts:
                impossible.append(f"the bias of {layer.name}")
            elif bias is not None:
                tensors[stem + parts["bias"]] = bias
        if changes.replaced and "bias" not in parts:
            impossible.append("replaced norm scales")
        elif changes.replaced:
            tensors |= {
                prefix + leaf.name: leaf.to_theirs(changes.replaced[place])
                for leaf in network.leaves.values()
                if leaf.naming == naming
                and (place := (leaf.move.path, leaf.move.layer)) in changes.replaced
            }
    if impossible:
        raise WeightMismatchError(
            f"{adapter.name}: the layout {layout} cannot hold {', '.join(impossible)}"
        )
    return tensors, _metadata(layout, tensors)


def _metadata(layout: str, tensors: Mapping[str, np.ndarray]) -> dict[str, str]:
    metadata = {"format": "pt"}
    if layout == "kohya":
        alphas = {float(x) for name, x in tensors.items() if name.endswith(".alpha")}
        ranks = {len(x) for name, x in tensors.items() if name.endswith(".lora_down.weight")}
        metadata["ss_network_module"] = "networks.lora_flux"
        if len(alphas) == len(ranks) == 1:
            metadata |= {
                "ss_network_dim": str(ranks.pop()),
                "ss_network_alpha": str(alphas.pop()),
            }
    return metadata


def write_lora(
    adapter: Adapter,
    path: Path,
    layout: str,
    configs: Mapping[str, Config],
    dtype: np.dtype | None = None,
) -> int:
    """Writes an adapter as one file in a published layout; the number of its values.

    Args:
      path: of the file; it appears when all of it has been written.
      layout: "peft", "kohya" or "bfl".
      configs: of the networks it adapts.
      dtype: of the tensors; None keeps the adapter's.

    Raises:
      FileExistsError: there is something at `path`.
      WeightMismatchError: the layout cannot hold it.
    """
    if path.exists():
        raise FileExistsError(f"{path} already exists; name another file or remove it")
    tensors, metadata = lora_tensors(adapter, layout, configs)
    target = dtype or adapter.dtype
    cast_tensors = {
        name: x if name.endswith(".alpha") else cast(x, target, name) for name, x in tensors.items()
    }
    infos = {name: TensorInfo(x.dtype, x.shape) for name, x in cast_tensors.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    with SafetensorsWriter(path, infos, metadata) as writer:
        for name, x in cast_tensors.items():
            writer.write(name, x)
    return sum(x.size for x in tensors.values())
