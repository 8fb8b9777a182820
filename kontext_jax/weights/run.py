"""A training run's folder opened as weights: what it trained from a checkpoint, the rest as it was.

    bundle = training_bundle("runs/hats", open_weights=…)    # the average of the parameters
    bundle.components["mmdit"].load(dtype="bfloat16")

The settings saved with each step say which network was trained and where the others came from. Of
the checkpoint only the item asked for is read, and checked against the manifest before that.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from etils import epath
from jaxtyping import Shaped

from kontext_jax.models.presets import PRESETS, Config, Preset
from kontext_jax.storage import arrays, step_folders
from kontext_jax.storage.step_folders import ARRAYS, CHECKPOINTS, CONFIG, CheckpointError
from kontext_jax.trees import flatten, unflatten
from kontext_jax.weights.adapters import Adapter, adapter_from_tree, with_adapters
from kontext_jax.weights.bundle import (
    KINDS,
    NO_EDITS,
    Component,
    Edits,
    ModelBundle,
    OpenWeights,
    as_dtype,
    parameter_shapes,
    place_leaves,
    read_edited,
)
from kontext_jax.weights.card import CHECKS, defaults_of_run
from kontext_jax.weights.untrained import UNTRAINED, untrained_bundle

if TYPE_CHECKING:
    import jax

    from kontext_jax.types import Params

# Setting of a run → the networks that it takes from there, later ones in place of earlier ones.
USED = {"weights": KINDS, "encoders": ("vae", "t5", "clip"), "autoencoder_weights": ("vae",)}
BATCH_BYTES = 2**28  # leaves read at once; larger ones are read alone
ITEM_OF = {"ema": "ema_params", "params": "params"}
TITLES = {"ema_params": "average of the parameters", "params": "parameters"}
Which = Literal["ema", "params"]


def is_run(path: str | Path) -> bool:
    """Whether `path` is a training run's folder."""
    return (step_folders.absolute(path) / CHECKPOINTS).is_dir()


@dataclasses.dataclass(frozen=True)
class TrainedTree:
    """One item of one checkpoint of a run: what the run trained, still on disk.

    Attributes:
      run: its folder.
      step: step of the checkpoint.
      item: "ema_params" or "params".
      settings: the run's, as `train_config.to_json` wrote them.
      leaves: shape and dtype by path.
    """

    run: epath.Path
    step: int
    item: str
    settings: dict[str, Any]
    leaves: dict[str, jax.ShapeDtypeStruct]

    @property
    def folder(self) -> epath.Path:
        return self.run / CHECKPOINTS / str(self.step)

    @property
    def kind(self) -> str:
        """The network that was trained: "vae", or "mmdit" itself or by adapters."""
        return "vae" if self.settings["objective"] == "autoencoder" else "mmdit"

    @property
    def which(self) -> Which:
        """As `open_run` takes it."""
        return "ema" if self.item == ITEM_OF["ema"] else "params"

    @property
    def config(self) -> Config:
        """Of the network that was trained."""
        config = getattr(PRESETS[self.settings["preset"]], self.kind)
        if self.kind == "vae":
            config = config.with_channels(self.settings["autoencoder"].get("z_channels", 0))
        return config

    @property
    def is_lora(self) -> bool:
        """Whether the leaves are adapters."""
        return self.settings["train"] == "lora"

    @property
    def source(self) -> str:
        """For the user: what this is."""
        return f"{self.run}, {TITLES[self.item]} after step {self.step}"

    def identity(self) -> str:
        """Hash over the checksums of the item's files and the settings."""
        files = step_folders.read_manifest(self.folder)
        mine = {n: entry for n, entry in files.items() if n.startswith(f"{ARRAYS}/{self.item}/")}
        text = json.dumps([sorted(mine.items()), self.settings], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def check(self) -> None:
        """Raises CheckpointError if a file of the item is not what was written."""
        damage = step_folders.find_damage(self.folder, [self.item])
        if damage:
            finished, _ = step_folders.list_steps(self.run / CHECKPOINTS)
            others = ", ".join(str(step) for step in finished if step != self.step) or "none"
            raise CheckpointError(
                "\n  ".join([f"{self.folder} is damaged:", *damage])
                + f"\nname another step; finished are: {others}"
            )

    def read(self, dtype=None, sharding_of: Callable | None = None) -> Iterator[tuple[str, Any]]:
        """(path, array) of every leaf, sorted, a few in memory at once.

        Args:
          dtype: dtype of the arrays; None keeps the stored one.
          sharding_of: path and shape → sharding; None: the first device.
        """
        batch: dict[str, jax.ShapeDtypeStruct] = {}
        for path in sorted(self.leaves):
            leaf = self.leaves[path]
            batch[path] = _wanted(path, leaf, dtype or leaf.dtype, sharding_of)
            if sum(each.size * each.dtype.itemsize for each in batch.values()) >= BATCH_BYTES:
                yield from self._load(batch)
                batch = {}
        yield from self._load(batch)

    def read_leaf(self, path: str, dtype: np.dtype | None = None) -> Shaped[np.ndarray, "*shape"]:
        """One leaf on the host, free to be changed."""
        leaf = self.leaves[path]
        ((_, array),) = self._load({path: _wanted(path, leaf, dtype or leaf.dtype, None)})
        return np.array(array)

    def _load(self, batch: dict[str, jax.ShapeDtypeStruct]) -> Iterator[tuple[str, Any]]:
        loaded = arrays.load(self.folder / ARRAYS, {self.item: batch})[self.item]
        yield from ((path, loaded.pop(path)) for path in list(loaded))


def _wanted(path: str, leaf, dtype, sharding_of: Callable | None) -> jax.ShapeDtypeStruct:
    import jax

    sharding = sharding_of(path, leaf.shape) if sharding_of else None
    return jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=sharding)


def open_run(
    run: str | Path,
    which: Which | None = None,
    step: int | None = None,
    tell: Callable[[str], None] = print,
) -> TrainedTree:
    """Finds what a run trained, in its newest checkpoint or the one of `step`.

    Args:
      run: its folder.
      which: "ema", the average of the parameters, or "params", they themselves; None: the average
        where the run keeps one.
      step: None: the newest whose files are there in full; others are told.

    Raises:
      CheckpointError: there is no such checkpoint.
      ValueError: it does not hold what is wanted.
    """
    home = step_folders.absolute(run)
    finished, _ = step_folders.list_steps(home / CHECKPOINTS)
    if step is not None and step not in finished:
        raise CheckpointError(
            f"{home} has no finished checkpoint of step {step}; there are: "
            f"{', '.join(map(str, finished)) or 'none'}"
        )
    reports = []
    for candidate in [step] if step is not None else finished[::-1]:
        folder = home / CHECKPOINTS / str(candidate)
        damage = step_folders.find_damage(folder, check_contents=False)
        if not damage:
            return _open_step(home, candidate, which)
        reports.append("\n    ".join([f"{folder} is damaged:", *damage]))
        tell(f"WARNING: {reports[-1]}")
    listed = "\n  ".join(reports) or "it holds no finished checkpoint"
    raise CheckpointError(f"{home}: no weights in it:\n  {listed}")


def _open_step(run: epath.Path, step: int, which: Which | None) -> TrainedTree:
    folder = run / CHECKPOINTS / str(step)
    settings = json.loads((folder / CONFIG).read_text())
    missing = sorted({"objective", "preset", "weights", "train"} - settings.keys())
    if missing:
        raise ValueError(f"{folder / CONFIG} lacks {', '.join(missing)}: not a run of train.py")
    stored = arrays.stored_leaves(folder / ARRAYS)
    item = ITEM_OF["params" if which is None and "ema_params" not in stored else which or "ema"]
    if item not in stored:
        raise ValueError(f"{run} keeps no average of the parameters; ask for the parameters")
    return TrainedTree(run, step, item, settings, stored[item])


@functools.cache
def _shapes(kind: str, config: Config) -> dict[str, jax.ShapeDtypeStruct]:
    return dict(flatten(parameter_shapes(kind, config)))


def _trained_component(tree: TrainedTree) -> Component:
    """The trained network itself.

    Raises:
      ValueError: the checkpoint's arrays are not those of such a network.
    """
    expected = _shapes(tree.kind, tree.config)
    lines = [f"- {path}" for path in sorted(expected.keys() - tree.leaves.keys())]
    lines += [f"+ {path}" for path in sorted(tree.leaves.keys() - expected.keys())]
    lines += [
        f"shape {path}: {list(tree.leaves[path].shape)}, expected {list(expected[path].shape)}"
        for path in sorted(expected.keys() & tree.leaves.keys())
        if tuple(tree.leaves[path].shape) != tuple(expected[path].shape)
    ]
    if lines:
        raise ValueError(
            f"{tree.folder}: not the {tree.kind} of {tree.settings['preset']} (- missing, "
            "+ unexpected):\n  " + "\n  ".join(lines)
        )

    def load(dtype=None, device=None, edits: Edits = NO_EDITS) -> Params:
        tree.check()
        dtype = as_dtype(dtype)
        if not edits:
            return unflatten(dict(tree.read(dtype, _sharding_rule(device))))

        def read(path: str) -> np.ndarray:
            leaf = tree.leaves[path]
            return read_edited(path, tree.read_leaf, dtype, leaf.dtype, edits)

        return place_leaves(tree.leaves, read, device)

    return Component(tree.config, load)


def _sharding_rule(device) -> Callable | None:
    """What `load` takes for `device`, as a function of path and shape."""
    import jax

    if device is None or callable(device):
        return device
    if isinstance(device, jax.Device):
        device = jax.sharding.SingleDeviceSharding(device)
    return lambda path, shape: device


def adapter_of_run(tree: TrainedTree) -> Adapter:
    """What a LoRA run trained.

    Raises:
      ValueError: it trained whole networks.
      CheckpointError: files are damaged.
    """
    if not tree.is_lora:
        raise ValueError(f"{tree.run} trained a whole network, so there are no adapters in it")
    tree.check()
    return adapter_from_tree(
        unflatten(dict(tree.read())), tree.settings["lora"]["alpha"], tree.source
    )


def training_bundle(
    run: str | Path,
    which: Which | None = None,
    step: int | None = None,
    *,
    open_weights: OpenWeights,
    tell: Callable[[str], None] = print,
) -> ModelBundle:
    """A run's folder as a model: what it trained, and the other networks that it used.

    A run of adapters gives the network it began from with these merged in. An autoencoder's run
    that began from nothing gives the autoencoder alone.

    Args:
      run, which, step, tell: the run and what is taken of it, see `open_run`.
      open_weights: opens the weights that the run began from, and its encoders.

    Raises:
      ValueError, OSError: the run, or what it began from, cannot be opened.
    """
    tree = open_run(run, which, step, tell)
    preset = PRESETS[tree.settings["preset"]]
    components: dict[str, Component] = {}
    tokenizer_dirs: dict[str, Path] = {}
    base: dict[str, Any] = {}
    for setting, bundle in _began_from(tree, open_weights):
        components |= bundle.components
        tokenizer_dirs |= bundle.tokenizer_dirs
        if setting == "weights":
            base = own_defaults(bundle.preset)
    if not tree.is_lora:
        components[tree.kind] = _trained_component(tree)
    configs: dict[str, Any] = {kind: own.config for kind, own in components.items()}
    preset = dataclasses.replace(preset, **configs, **defaults_of_run(tree.settings, base))
    source = f"{tree.source} ({preset.name})"
    bundle = ModelBundle(preset, components, tokenizer_dirs, source, tree.identity())
    if not tree.is_lora:
        return bundle
    # The identity says which adapters these are; they are not listed beside it.
    return dataclasses.replace(with_adapters(bundle, [(adapter_of_run(tree), 1.0)]), adapters=())


def own_defaults(preset: Preset) -> dict[str, Any]:
    """Sampling defaults in which the model differs from its preset."""
    plain = PRESETS[preset.name]
    fields = ("shift_timesteps", *CHECKS)
    return {f: getattr(preset, f) for f in fields if getattr(preset, f) != getattr(plain, f)}


def _began_from(tree: TrainedTree, open_weights: OpenWeights) -> Iterator[tuple[str, ModelBundle]]:
    """Settings of a run that name networks, and these, as `USED` has it."""
    for setting, kinds in USED.items():
        path = tree.settings.get(setting)
        if not path:
            continue
        if path == UNTRAINED and setting == "encoders":
            bundle = untrained_bundle(tree.settings["preset"])
        else:
            try:
                bundle = open_weights(path)
            except (ValueError, OSError) as error:
                raise ValueError(
                    f"{tree.run} used {path} ({setting}), which cannot be opened: {error}"
                ) from error
        used = {kind: bundle.components[kind] for kind in kinds if kind in bundle.components}
        tokenizers = bundle.tokenizer_dirs if "t5" in kinds else {}
        yield setting, dataclasses.replace(bundle, components=used, tokenizer_dirs=tokenizers)
