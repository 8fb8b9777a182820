"""A training run's folder as a source: the network that it trained, in any layout."""

import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from convert_weights import notice
from convert_weights.layouts import TITLES
from convert_weights.open import open_weights
from convert_weights.to_jax import Advance, Summary, require_room
from convert_weights.to_torch import to_torch
from kontext_jax.models.presets import PRESETS, Config
from kontext_jax.runtime.atomic import write_folder, write_json
from kontext_jax.storage.safetensors_reader import TensorInfo, dtype_name
from kontext_jax.storage.safetensors_writer import SafetensorsWriter
from kontext_jax.trees import flatten
from kontext_jax.weights import bundle as checkpoint
from kontext_jax.weights.card import defaults_of_run
from kontext_jax.weights.run import TrainedTree, Which, open_run


def run_to_jax(
    run: str | Path,
    out: Path,
    dtype: np.dtype | None = None,
    which: Which | None = None,
    step: int | None = None,
    start: Callable[[int], Advance] = lambda total: lambda count: None,
) -> Summary:
    """Writes the network that a run trained to the weight directory `out`, leaf by leaf.

    Adapters are merged into the network they belong to, which is then in memory as a whole.

    Args:
      run: the run's folder.
      out: appears only when everything has been written.
      dtype: dtype of the parameters; None keeps the run's float32, or for adapters that of their
        base.
      which, step: tree and step of the run, see `training_bundle.open_run`.
      start: told the number of bytes, returns the progress callback.

    Raises:
      ValueError, OSError: and nothing is left on disk.
    """
    tree = open_run(run, which, step)
    preset = PRESETS[tree.settings["preset"]]
    defaults = defaults_of_run(tree.settings, {})  # what it began from need not be here any more
    shift = defaults.pop("shift_timesteps", None)
    config, leaves, infos = _trained_leaves(tree, dtype)
    written = sum(info.nbytes for info in infos.values())
    require_room(out, written)
    advance = start(written)
    derived = bool(tree.settings["weights"])  # what was drawn afresh is under nobody's licence
    licence = notice.licence_of(preset, tree.kind == "mmdit") if derived else None
    origin = f"{tree.source}; trained from {tree.settings['weights'] or 'scratch'}"
    what = "trained by kontext_jax"
    if dtype is not None:
        what += f", stored as {dtype_name(dtype)}"

    def fill(folder: Path) -> None:
        (folder / tree.kind).mkdir()
        write_json(folder / tree.kind / "config.json", checkpoint.config_json(tree.kind, config))
        with SafetensorsWriter(folder / tree.kind / "params.safetensors", infos) as writer:
            for path, leaf in leaves:
                writer.write(path, np.asarray(leaf))
                advance(infos[path].nbytes)
        (folder / "NOTICE").write_text(notice.notice_text(origin, what, licence), "utf-8")
        checkpoint.write_manifest(
            folder, preset.name, [tree.kind], origin, licence, shift, defaults
        )

    write_folder(out, fill)
    return Summary(
        components=[tree.kind],
        num_parameters=sum(int(np.prod(info.shape)) for info in infos.values()),
        num_bytes=written,
        preset=preset.name,
        dtypes=sorted({dtype_name(info.dtype) for info in infos.values()}),
        notes=[tree.source, f"the {TITLES[tree.kind]} alone, which is what was trained"],
    )


def _trained_leaves(
    tree: TrainedTree, dtype: np.dtype | None
) -> tuple[Config, Iterable[tuple[str, Any]], Mapping[str, TensorInfo]]:
    """Config of the network, its leaves as they come, and their dtypes and shapes by path."""
    if tree.is_lora:
        bundle = open_weights(tree.run, which=tree.which, step=tree.step, complete=False)
        component = bundle.components[tree.kind]
        leaves = dict(sorted(flatten(component.load(dtype=dtype))))
        infos = {path: TensorInfo(np.dtype(x.dtype), x.shape) for path, x in leaves.items()}
        return component.config, leaves.items(), infos
    tree.check()
    infos = {
        path: TensorInfo(dtype or np.dtype(leaf.dtype), tuple(leaf.shape))
        for path, leaf in sorted(tree.leaves.items())
    }
    return tree.config, tree.read(dtype), infos


def run_to_torch(
    run: str | Path,
    out: Path,
    layout: str,
    dtype: np.dtype | None = None,
    max_shard_bytes: int = 10_000_000_000,
    which: Which | None = None,
    step: int | None = None,
    start: Callable[[int], Advance] = lambda total: lambda count: None,
) -> Summary:
    """Writes the network that a run trained in a published layout, by way of our own.

    Args:
      run, which, step: the run and what is taken of it, see `run_to_jax`.
      out, layout, dtype, max_shard_bytes, start: the folder and its files, see `to_torch`.

    Raises:
      ValueError, OSError: and nothing is left on disk.
    """
    between = out.with_name(out.name + ".weights")
    try:
        notes = run_to_jax(run, between, dtype, which, step).notes
        summary = to_torch(between, out, layout, dtype, max_shard_bytes, start)
    finally:
        shutil.rmtree(between, ignore_errors=True)
    summary.notes[:0] = notes
    return summary
