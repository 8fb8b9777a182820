"""`adapters.Adapter` → LoRA files in the published layouts.

python -m convert_weights lora FILE --layout peft|kohya|bfl --out X.safetensors
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from jaxtyping import Float

from convert_weights.compare import open_any
from convert_weights.layouts import TITLES
from convert_weights.lora import table
from convert_weights.lora.read import open_adapter, open_networks
from convert_weights.rules import WeightMismatchError
from kontext_jax.models.presets import PRESETS, Config
from kontext_jax.storage.safetensors_reader import TensorInfo, cast
from kontext_jax.storage.safetensors_writer import SafetensorsWriter
from kontext_jax.weights.adapters import Adapter
from kontext_jax.weights.run import Which, is_run, open_run

LAYOUTS = tuple(table.WRITTEN)


def lora_tensors(
    adapter: Adapter, layout: str, configs: Mapping[str, Config]
) -> tuple[dict[str, Float[np.ndarray, "..."]], dict[str, str]]:
    """The float32 tensors and the metadata of an adapter in a published layout.

    Neither BFL's files nor PEFT's have a place for alpha that all programs read, so there it is
    multiplied into b; kohya's have tensors for it.

    Raises:
      WeightMismatchError: the layout cannot say what the adapter does.
    """
    parts, naming = table.WRITTEN[layout], table.WRITTEN_NAMING[layout]
    tensors: dict[str, np.ndarray] = {}
    impossible = []
    for network in open_networks({k: configs[k] for k in adapter.networks}):
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
      path: name of the file; it appears when all of it has been written.
      layout: "peft", "kohya" or "bfl".
      configs: configs of the networks that it adapts.
      dtype: dtype of the tensors; None keeps the adapter's.

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


def base_configs(base: str) -> dict[str, Config]:
    """Configs by kind of a preset's name, or of the weights at a path."""
    if base in PRESETS:
        preset = PRESETS[base]
        return {kind: getattr(preset, kind) for kind in table.DOTTED_PREFIXES}
    components = open_any(base)
    try:
        return {kind: component.config for kind, component in components.items()}
    finally:
        for component in components.values():
            component.close()


def convert_lora(
    source: Path,
    out: Path,
    layout: str,
    base: str | None = None,
    dtype: np.dtype | None = None,
    which: Which | None = None,
    step: int | None = None,
) -> tuple[Adapter, int]:
    """Writes a LoRA file, or a run's adapters, to `out`; the adapter and how many values.

    Args:
      base: the model it is for: a preset's name, or a path to weights; None: the one that a run
        says, else of the published size.
      which, step: tree and step of a run, see `training_bundle.open_run`.
    """
    if base is None and is_run(source):
        base = open_run(source, which, step).settings["preset"]
    elif not is_run(source) and (which is not None or step is not None):
        raise ValueError(f"--which and --step are for training runs; {source} is none")
    configs = base_configs(base or "kontext-dev")
    adapter = open_adapter(source, configs, which, step)
    return adapter, write_lora(adapter, out, layout, configs, dtype)
