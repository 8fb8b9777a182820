"""Published weights → our weight directory, streaming: one source tensor in memory per thread."""

import dataclasses
import shutil
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import numpy as np

from convert_weights import notice
from convert_weights.io import (
    NUM_THREADS,
    ForeignComponent,
    NonFiniteError,
    ThreadScratch,
    open_components,
)
from convert_weights.layouts import TITLES
from convert_weights.rules import WeightMismatchError
from convert_weights.sources import (
    ModelSource,
    find_model,
    find_tokenizers,
    naming_hints,
    resolve,
    tokenizer_kind,
)
from kontext_jax.runtime.atomic import write_folder, write_json
from kontext_jax.storage.safetensors_reader import (
    TensorFileError,
    TensorInfo,
    dtype_name,
    find_safetensors,
)
from kontext_jax.storage.safetensors_writer import SafetensorsWriter
from kontext_jax.weights import bundle as checkpoint
from kontext_jax.weights.bundle import KINDS

Advance = Callable[[int], None]
"""Told how many bytes of the source have been dealt with since the last call."""


@dataclasses.dataclass
class Summary:
    """What a conversion did, for one printed line."""

    components: list[str]
    num_parameters: int
    num_bytes: int
    preset: str | None
    dtypes: list[str]
    notes: list[str]


def run_jobs(function: Callable, jobs: Iterable) -> None:
    """Calls `function` on every job in `NUM_THREADS` threads; the first error stops the rest."""
    pool = ThreadPoolExecutor(NUM_THREADS)
    try:
        for future in as_completed([pool.submit(function, job) for job in jobs]):
            future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def gather(paths: Sequence[str], axes_dim: tuple[int, ...] | None = None) -> ModelSource:
    """Opens everything that `paths` name, each of which may be a part or a whole model.

    Raises:
      WeightMismatchError: a path holds nothing we know, or two hold the same part.
    """
    together = ModelSource({}, {}, [], " + ".join(str(path) for path in paths))
    origin: dict[str, str] = {}
    try:
        for given in paths:
            source = _open_one(given, axes_dim)
            for kind, component in source.components.items():
                if kind in origin:
                    component.close()
                    raise WeightMismatchError(
                        f"{origin[kind]} and {given} both hold a {TITLES[kind]}; name only one"
                    )
                origin[kind] = str(given)
                together.components[kind] = component
            together.tokenizer_dirs |= source.tokenizer_dirs
            together.hints += source.hints
            together.sampling |= source.sampling
    except BaseException:
        together.close()
        raise
    return together


def _open_one(given: str, axes_dim: tuple[int, ...] | None) -> ModelSource:
    path = resolve(given)
    if path.is_file():
        components = open_components(path, axes_dim=axes_dim)
        return ModelSource(components, {}, naming_hints(path, components), str(path))
    if not (path / "model_index.json").is_file():
        has_weights = any(path.glob("*.safetensors.index.json")) or len(find_safetensors(path)) == 1
        tokenizer = tokenizer_kind(path)
        if has_weights or tokenizer:
            components = open_components(path, axes_dim=axes_dim) if has_weights else {}
            tokenizers = find_tokenizers(path) if components.keys() & {"mmdit", "vae"} else {}
            if tokenizer:
                tokenizers[tokenizer] = path
            return ModelSource(components, tokenizers, naming_hints(path, components), str(path))
    source = find_model(given, complete=False, axes_dim=axes_dim)
    if not source.components and not source.tokenizer_dirs:
        raise WeightMismatchError(
            f"{path}: no weights and no tokenizer found in it; expected a diffusers folder, BFL's "
            "files, a transformers folder or a .safetensors file"
        )
    return source


def to_jax(
    paths: Sequence[str],
    out: Path,
    dtype: np.dtype | None = None,
    preset: str | None = None,
    axes_dim: tuple[int, ...] | None = None,
    start: Callable[[int], Advance] = lambda total: lambda count: None,
) -> Summary:
    """Converts the weights at `paths` into the directory `out`, which must not exist yet.

    Args:
      paths: files, folders or hub ids; together a model or parts of one.
      out: appears only when everything has been written.
      dtype: dtype of the parameters; None keeps the source's.
      preset: which model it is, where names do not tell.
      axes_dim: rotary axes, where heads are not 128 wide and there is no config.json.
      start: told the number of source bytes, returns the progress callback.

    Raises:
      TensorFileError, WeightMismatchError, FileExistsError: and nothing is left on disk.
    """
    source = gather(paths, axes_dim)
    try:
        chosen = source.preset(preset)
        total = sum(info.nbytes for c in source.components.values() for info in c.sources.values())
        targets = {kind: target_infos(c, dtype) for kind, c in source.components.items()}
        written = sum(info.nbytes for leaves in targets.values() for info in leaves.values())
        require_room(out, written)
        advance = start(total)
        licence = notice.licence_of(chosen, "mmdit" in source.components)
        notes = _notes(source, dtype)
        write_folder(
            out,
            lambda folder: _fill(folder, source, targets, chosen, licence, notes, advance),
        )
    finally:
        source.close()
    return Summary(
        components=[kind for kind in KINDS if kind in source.components],
        num_parameters=sum(c.num_parameters for c in source.components.values()),
        num_bytes=written,
        preset=chosen.name if chosen else None,
        dtypes=sorted(
            {dtype_name(i.dtype) for leaves in targets.values() for i in leaves.values()}
        ),
        notes=notes,
    )


def target_infos(component: ForeignComponent, dtype: np.dtype | None) -> dict[str, TensorInfo]:
    """Our leaves, sorted by path, in `dtype` or the one they keep."""
    return {
        path: TensorInfo(dtype or info.dtype, info.shape)
        for path, info in sorted(component.leaves.items())
    }


def require_room(out: Path, nbytes: int) -> None:
    """Raises `TensorFileError` if the disk of `out` has no room for `nbytes`."""
    folder = out.absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < nbytes:
        raise TensorFileError(
            f"{out}: needs {nbytes / 1e9:.1f} GB and the disk has {free / 1e9:.1f} GB free; free "
            "some, or name a folder on another disk"
        )


def _notes(source: ModelSource, dtype: np.dtype | None) -> list[str]:
    notes = []
    for kind, component in source.components.items():
        stored = {info.dtype for info in component.sources.values()}
        if component.scaled:
            target = dtype_name(dtype) if dtype else "bfloat16"
            notes.append(f"{TITLES[kind]}: 8-bit weights times their scales, as {target}")
        elif dtype is not None and stored != {dtype}:
            names = ", ".join(sorted(map(dtype_name, stored)))
            notes.append(f"{TITLES[kind]}: {names} stored as {dtype_name(dtype)}")
        if component.ignored:
            notes.append(f"{TITLES[kind]}: {len(component.ignored)} tensors that are no parameters")
    return notes


def _fill(
    folder: Path,
    source: ModelSource,
    targets: dict[str, dict[str, TensorInfo]],
    preset,
    licence: str | None,
    notes: list[str],
    advance: Advance,
) -> None:
    broken: list[NonFiniteError] = []
    for kind, component in source.components.items():
        (folder / kind).mkdir()
        write_json(folder / kind / "config.json", checkpoint.config_json(kind, component.config))
        with SafetensorsWriter(folder / kind / "params.safetensors", targets[kind]) as writer:
            try:
                _stream(component, writer, advance)
            except NonFiniteError as error:
                broken.append(error)
                writer.abort()
    if broken:
        raise (
            broken[0]
            if len(broken) == 1
            else NonFiniteError(
                source.where, [f"{e.where}: {name}" for e in broken for name in e.names]
            )
        )
    for kind, tokenizer in source.tokenizer_dirs.items():
        copy_tokenizer(tokenizer, folder / "tokenizers" / kind)
    where = f"{source.where} (as {preset.name})" if preset else source.where
    what = "converted to the parameter layout of kontext_jax"
    (folder / "NOTICE").write_text(
        notice.notice_text(where, "; ".join([what, *notes]), licence), "utf-8"
    )
    kinds = [kind for kind in KINDS if kind in source.components]
    checkpoint.write_manifest(
        folder,
        preset.name if preset else None,
        kinds,
        where,
        licence,
        preset.shift_timesteps if preset else None,
        {name: value for name, value in source.sampling.items() if name != "shift_timesteps"},
    )


def _stream(component: ForeignComponent, writer: SafetensorsWriter, advance: Advance) -> None:
    """Reads every source tensor once and writes the slices it becomes."""
    reading, writing, broken = ThreadScratch(), ThreadScratch(), []
    by_source = component.plan.moves_by_source()

    def convert(name: str) -> None:
        try:
            tensor = component.read_source(name, scratch=reading.buffer)
        except NonFiniteError as error:
            broken.extend(error.names)
            return
        casts: dict[np.dtype, np.ndarray] = {}
        for move in by_source[name]:
            dtype = writer.tensors[move.path].dtype
            if dtype not in casts:
                casts[dtype] = component.cast_source(name, tensor, dtype)
            out = writing.buffer.take_array(move.our_shape, dtype)
            writer.write(move.path, move.to_ours(casts[dtype], out), move.layer)
        advance(component.sources[name].nbytes)

    run_jobs(convert, sorted(by_source, key=lambda name: component.sources[name].start))
    if broken:
        raise NonFiniteError(component.where, broken)


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copies a tokenizer's files, and nothing else that lies beside them."""
    target.mkdir(parents=True)
    for path in sorted(source.iterdir()):
        is_text = path.suffix in (".json", ".txt", ".model")
        if path.is_file() and is_text and not path.name.endswith((".index.json", "config.json")):
            shutil.copyfile(path, target / path.name)
    if (source / "tokenizer_config.json").is_file():
        shutil.copyfile(source / "tokenizer_config.json", target / "tokenizer_config.json")
