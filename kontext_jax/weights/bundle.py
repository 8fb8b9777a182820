"""Our own weight directory: one folder per network, `config.json` beside `params.safetensors`.

`ModelBundle` is what every loader returns, here and in `convert_weights`: for each network its
config and a function that reads its weights now, so that nothing is in memory before it is needed.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Shaped

from kontext_jax.models.presets import CONFIG_CLASSES, PRESETS, Config, Preset, config_from_json
from kontext_jax.runtime.atomic import write_folder, write_json
from kontext_jax.storage.safetensors_reader import (
    SafetensorsFile,
    TensorFileError,
    TensorInfo,
    TensorReader,
    cast,
    has_nonfinite,
)
from kontext_jax.storage.safetensors_writer import SafetensorsWriter
from kontext_jax.trees import flatten, unflatten
from kontext_jax.weights.card import check_defaults, sampling_rule

if TYPE_CHECKING:  # converting and inspecting weights must not wait for jax to be imported
    import jax

    from kontext_jax.types import Params

FORMAT = 1
MANIFEST = "kontext_jax.json"
KINDS = tuple(CONFIG_CLASSES)
TOKENIZERS = ("t5", "clip")
ASSETS = Path(__file__).parents[1] / "assets"
# Models inside the package, by the names that --model takes; "tiny" is what the commands use
# without weights, "tiny-fast" the same distilled to a few steps.
PACKAGED = {name: ASSETS / "models" / name for name in ("tiny", "tiny-fast")}

Place = Callable[[str, tuple[int, ...]], "jax.sharding.Sharding"]
"""Path and shape of a parameter → where it goes."""
Edits = Mapping[str, Callable[[np.ndarray], np.ndarray]]
NO_EDITS: Edits = {}

_SMALL_LEAF = 1 << 17  # values; the norms of T5-XXL, stacked, have 98,304


@dataclasses.dataclass
class Component:
    """One network on disk.

    Attributes:
      config: its sizes.
      load: `load(dtype=None, device=None, edits={}) -> params` reads the weights now, leaf by leaf,
        each straight to `device` (a device, a sharding, or what decides by leaf) and in `dtype`;
        None keeps the stored one. `edits` maps paths of leaves to functions that change their
        float32 values on the way.
      identity: hash of its weights, the same in every layout; None to have it made of what `load`
        reads. See `component_identity`.
    """

    config: Config
    load: Callable[..., Params]
    identity: Callable[[], str] | None = None


@dataclasses.dataclass
class ModelBundle:
    """A whole model, its weights still on disk.

    Attributes:
      preset: with the components' own configs, and the defaults of a request.
      components: by kind, "mmdit", "vae", "t5", "clip".
      tokenizer_dirs: folders of Hugging Face tokenizer files, "t5" and "clip".
      source: one line for the user: where the weights came from.
      identity: hash over the weights' headers, sizes and samples of their bytes.
      adapters: what `adapters.with_adapters` merges into the weights, in this order.
    """

    preset: Preset
    components: dict[str, Component]
    tokenizer_dirs: dict[str, Path]
    source: str
    identity: str
    adapters: tuple[AppliedAdapter, ...] = ()


OpenWeights = Callable[[str], ModelBundle]
"""Path → the weights there; `convert_weights.open` has the one that opens all layouts."""


def as_dtype(dtype) -> np.dtype | None:
    """A NumPy dtype from anything that names one, `"bfloat16"` included; None stays None."""
    return None if dtype is None else np.dtype(dtype)


@dataclasses.dataclass(frozen=True)
class Listed:
    """Pass this instead of a device to `place_leaves` to unstack blocks while loading.

    Attributes:
      stacks: first names of paths; leaf "stack/q" [N, …] becomes "stack/0/q", "stack/1/q", ….
      device: destination of the leaves; if it decides by leaf, it sees the paths and shapes of
        single layers.
    """

    stacks: tuple[str, ...]
    device: jax.Device | jax.sharding.Sharding | Place | None = None


def place_leaves(
    paths: Iterable[str],
    read: Callable[[str], np.ndarray],
    device: jax.Device | jax.sharding.Sharding | Place | Listed | None,
) -> Params:
    """The tree of `read(path)`, each leaf on its device before the next one is read.

    Where a sharding spans several processes, each reads the leaf and keeps its part.
    """
    import jax

    stacks: tuple[str, ...] = ()
    if isinstance(device, Listed):
        stacks, device = device.stacks, device.device
    placed = {}
    for path in paths:
        leaf = read(path)
        stack, _, rest = path.partition("/")
        parts = {path: leaf}
        if stack in stacks:
            parts = {f"{stack}/{i}/{rest}": layer for i, layer in enumerate(leaf)}
        for name, part in parts.items():
            where = device(name, part.shape) if callable(device) else device
            if isinstance(where, jax.sharding.Sharding) and not where.is_fully_addressable:
                placed[name] = jax.make_array_from_callback(part.shape, where, part.__getitem__)
            else:
                placed[name] = jax.device_put(part, where)
        jax.block_until_ready([placed[name] for name in parts])
    return unflatten(placed)


def read_edited(
    path: str,
    read: Callable[[str, np.dtype | None], np.ndarray],
    dtype: np.dtype | None,
    stored: np.dtype,
    edits: Edits,
) -> Shaped[np.ndarray, "*shape"]:
    """`read(path, dtype)`, changed in float32 by its entry of `edits` and then rounded once."""
    if path not in edits:
        return read(path, dtype)
    return cast(edits[path](read(path, np.dtype(np.float32))), dtype or stored, path)


def fingerprint(readers: Mapping[str, TensorReader]) -> str:
    """Identity of weights: their headers and, of every tensor, up to 64 bytes of its middle row.

    A header tells names, shapes and places; the samples tell apart two files of the same layout. It
    costs milliseconds however large the files are.
    """
    digest = hashlib.sha256()
    for kind in sorted(readers):
        reader = readers[kind]
        digest.update(kind.encode() + reader.header_bytes())
        for name, info in reader.tensors.items():
            if info.shape and info.nbytes:
                middle = info.shape[0] // 2
                digest.update(reader.read_bytes(name, middle * info.nbytes // info.shape[0], 64))
    return digest.hexdigest()


def weights_identity(
    shapes: Mapping[str, tuple[int, ...]], read: Callable[[str], np.ndarray]
) -> str:
    """Hash of all shapes and of the small leaves: biases, norms, the first convolutions.

    Training changes all of them, so they tell weights apart without reading gigabytes.

    Args:
      shapes: shapes of all leaves, by path.
      read: gives the float32 values of a leaf.
    """
    digest = hashlib.sha256()
    for path, shape in sorted(shapes.items()):
        digest.update(f"{path} {tuple(shape)}\n".encode())
        if math.prod(shape) <= _SMALL_LEAF:
            digest.update(np.ascontiguousarray(read(path), np.float32).tobytes())
    return digest.hexdigest()


def component_identity(component: Component) -> str:
    """`weights_identity` of a component, whatever it was opened from."""
    if component.identity is not None:
        return component.identity()
    leaves = dict(flatten(component.load(dtype=np.float32)))
    shapes = {path: leaf.shape for path, leaf in leaves.items()}
    return weights_identity(shapes, lambda path: np.asarray(leaves[path]))


def read_config(directory: str | Path, kind: str) -> Config:
    """The config of the component `kind` in our `directory`.

    Raises:
      TensorFileError: it is not there or damaged.
    """
    path = Path(directory) / kind / "config.json"
    try:
        stored = json.loads(path.read_text("utf-8"))
        if stored["kind"] != kind:
            raise ValueError(f"it describes a {stored['kind']}")
        return config_from_json(kind, stored["config"])
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        ArithmeticError,
        AttributeError,
        RecursionError,
    ) as error:
        raise TensorFileError(f"{path}: not the config of a {kind}: {error}") from None


def open_params(directory: str | Path, kind: str) -> SafetensorsFile:
    """The parameter file of the component `kind` in our `directory`, its header checked."""
    return SafetensorsFile(Path(directory) / kind / "params.safetensors")


def _read_leaf(file: SafetensorsFile, path: str, dtype: np.dtype | None) -> np.ndarray:
    array = file.read(path)
    if has_nonfinite(array):
        raise TensorFileError(f"{file.path}: NaN or infinity in weights: {path}")
    return cast(array, dtype, path)


def _own_component(directory: Path, kind: str) -> Component:
    def load(dtype=None, device=None, edits: Edits = NO_EDITS) -> Params:
        dtype = as_dtype(dtype)
        with open_params(directory, kind) as file:

            def read(path: str) -> np.ndarray:
                stored = file.tensors[path].dtype
                leaf = functools.partial(_read_leaf, file)
                return read_edited(path, leaf, dtype, stored, edits)

            return place_leaves(file.tensors, read, device)

    def identity() -> str:
        with open_params(directory, kind) as file:
            shapes = {path: info.shape for path, info in file.tensors.items()}
            read = functools.partial(_read_leaf, file, dtype=np.dtype(np.float32))
            return weights_identity(shapes, read)

    return Component(read_config(directory, kind), load, identity)


def read_manifest(directory: str | Path) -> dict[str, Any]:
    """What `kontext_jax.json` of our `directory` says.

    Raises:
      TensorFileError: there is none, or of another format.
    """
    path = Path(directory) / MANIFEST
    if not path.is_file():
        raise TensorFileError(
            f"{directory}: no {MANIFEST} in it, so it is not a converted weight directory; "
            "convert published weights with `python -m convert_weights to-jax`"
        )
    try:
        manifest = json.loads(path.read_text("utf-8"))
        version = manifest["format"]
        kinds = manifest["components"]
        manifest["preset"], manifest["source"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise TensorFileError(f"{path}: damaged: {error!r}") from None
    if version != FORMAT:
        raise TensorFileError(f"{path}: format {version}; this version reads format {FORMAT}")
    if not set(kinds) <= set(KINDS):
        raise TensorFileError(f"{path}: components {kinds}; known are {', '.join(KINDS)}")
    return manifest


def write_manifest(
    directory: Path,
    preset: str | None,
    components: Iterable[str],
    source: str,
    licence: str | None,
    shift_timesteps: bool | None = None,
    defaults: Mapping[str, Any] | None = None,
) -> None:
    """Writes `kontext_jax.json`, which makes `directory` a weight directory.

    Args:
      shift_timesteps: whether the model samples on the shifted grid; None leaves it to the preset.
      defaults: defaults of a request instead of the preset's, see `kontext_jax.weights.card`.

    Raises:
      ValueError: a default does not exist, or its value is none.
    """
    check_defaults(defaults or {})
    write_json(
        directory / MANIFEST,
        {
            "format": FORMAT,
            "preset": preset,
            "components": list(components),
            "source": source,
            "license": licence,
            "shift_timesteps": shift_timesteps,
            **({"defaults": dict(defaults)} if defaults else {}),
        },
    )


def open_bundle(
    path: str | Path, require: Iterable[str] = KINDS, require_tokenizers: bool = True
) -> ModelBundle:
    """Opens our own weight directory; the weights stay on disk until a component is loaded.

    Args:
      path: the directory.
      require: components that must be there.
      require_tokenizers: whether both tokenizers must be there.

    Raises:
      TensorFileError: it is none, damaged, or lacks something required (all of it named).
    """
    directory = Path(path)
    manifest = read_manifest(directory)
    kinds = manifest["components"]
    if manifest["preset"] is None:
        raise TensorFileError(
            f"{directory}: names no preset, since it was converted without a transformer; convert "
            "the whole model at once, or pass --preset when converting"
        )
    if manifest["preset"] not in PRESETS:
        raise TensorFileError(
            f"{directory}: preset {manifest['preset']!r}; known are {', '.join(PRESETS)}"
        )
    tokenizer_dirs = {
        name: folder for name in TOKENIZERS if (folder := directory / "tokenizers" / name).is_dir()
    }
    missing = [f"{kind}/" for kind in require if kind not in kinds]
    if require_tokenizers:
        missing += [f"tokenizers/{n}/" for n in TOKENIZERS if n not in tokenizer_dirs]
    if missing:
        raise TensorFileError(
            f"{directory}: incomplete, without {', '.join(missing)}; convert the whole model at "
            "once: `python -m convert_weights to-jax TRANSFORMER AE T5 CLIP --out DIR`"
        )
    components = {kind: _own_component(directory, kind) for kind in kinds}
    files = {}
    try:
        for kind in kinds:
            files[kind] = open_params(directory, kind)
        identity = fingerprint(files)
    finally:
        for file in files.values():
            file.close()
    try:
        rule = sampling_rule(manifest)
    except ValueError as error:
        raise TensorFileError(f"{directory / MANIFEST}: {error}") from None
    configs: dict[str, Any] = {kind: own.config for kind, own in components.items()}
    preset = dataclasses.replace(PRESETS[manifest["preset"]], **configs, **rule)
    return ModelBundle(preset, components, tokenizer_dirs, manifest["source"], identity)


def config_json(kind: str, config: Config) -> dict[str, Any]:
    """What a component's `config.json` holds."""
    return {"kind": kind, "config": dataclasses.asdict(config)}


def save_component(directory: str | Path, kind: str, config: Config, params: Params) -> None:
    """Writes `directory/kind/{config.json, params.safetensors}`, beside and then renamed.

    Args:
      directory: a weight directory or one to be.
      kind: "mmdit", "vae", "t5" or "clip".
      config: config of the network.
      params: nested dict of arrays, on host or device; each leaf is fetched when its turn comes.

    Raises:
      FileExistsError: `directory/kind` already holds something.
    """
    leaves = dict(sorted(flatten(params)))
    infos = {path: TensorInfo(np.dtype(x.dtype), tuple(x.shape)) for path, x in leaves.items()}

    def fill(folder: Path) -> None:
        write_json(folder / "config.json", config_json(kind, config))
        with SafetensorsWriter(folder / "params.safetensors", infos) as writer:
            for path, leaf in leaves.items():
                writer.write(path, np.asarray(leaf))

    Path(directory).mkdir(parents=True, exist_ok=True)
    write_folder(Path(directory) / kind, fill)


def shipped_bundle(name: str = "tiny") -> ModelBundle:
    """A small trained model inside the package; its README.md says what it can do.

    Raises:
      FileNotFoundError: this copy of the package has no such model.
    """
    folder = PACKAGED[name]
    if not folder.is_dir():
        there = ", ".join(other for other, path in PACKAGED.items() if path.is_dir())
        raise FileNotFoundError(
            f"this copy of kontext_jax has no model {name} (no folder {folder}); it has {there}. "
            "tools/pack_tiny.py puts a trained model there"
        )
    return open_bundle(folder)


def parameter_shapes(kind: str, config: Config) -> Params:
    """`jax.ShapeDtypeStruct`s of a component's parameters, by abstract evaluation of its init."""
    import jax
    import jax.numpy as jnp

    from kontext_jax.models import clip, mmdit, t5, vae

    tokens = jnp.zeros((1, 8), jnp.int32)
    sizes: Any = config  # of the class that belongs to the kind

    def init(key: jax.Array) -> Params:
        if kind == "mmdit":
            return mmdit.init_params(mmdit.MMDiT(sizes), key)
        if kind == "vae":
            side = 2 * sizes.downsampling
            return vae.VAE(sizes).init(key, jnp.zeros((1, side, side, 3)))["params"]
        model = t5.T5Encoder(sizes) if kind == "t5" else clip.CLIPText(sizes)
        return model.init(key, tokens)["params"]

    return jax.eval_shape(init, jax.random.key(0))


@dataclasses.dataclass(frozen=True)
class AppliedAdapter:
    """An adapter that a model's weights are merged with, as a picture's metadata names it."""

    name: str
    sha256: str
    scale: float
