"""Weights of one network on disk, in anybody's layout, read leaf by leaf in ours.

`ForeignComponent` translates while it reads; `OwnComponent` is our own directory behind the same
two methods, so that converting back, comparing and loading need not care which they hold.
"""

import functools
import json
import threading
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import ml_dtypes
import numpy as np
from jaxtyping import Shaped

from convert_weights.layouts import (
    QUANTISED_SUFFIXES,
    TITLES,
    checked_config,
    infer_config,
    read_foreign_config,
    split_components,
)
from convert_weights.rules import Move, Plan, WeightMismatchError, difference_lines, make_plan
from convert_weights.tables import TABLES
from kontext_jax.models.presets import Config
from kontext_jax.storage.safetensors_reader import (
    DTYPES,
    FLOAT_DTYPES,
    Scratch,
    TensorFileError,
    TensorInfo,
    TensorReader,
    cast,
    dtype_name,
    has_nonfinite,
    open_tensors,
)
from kontext_jax.weights import bundle as checkpoint

NUM_THREADS = 2
_FLOATS = frozenset(FLOAT_DTYPES.values())
_FP8 = frozenset({DTYPES["F8_E4M3"], DTYPES["F8_E5M2"]})
_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


class ThreadScratch(threading.local):
    """One `Scratch` for every thread that asks."""

    def __init__(self):
        self.buffer = Scratch()


class NonFiniteError(TensorFileError):
    """Weights hold NaN or infinity; `names` are the tensors."""

    def __init__(self, where: str, names: Iterable[str]):
        self.where, self.names = where, sorted(set(names))
        super().__init__(f"{where}: NaN or infinity in weights:\n  " + "\n  ".join(self.names))


def lossless_dtype(dtypes: Iterable[np.dtype]) -> np.dtype:
    """The narrowest of our dtypes that holds every value of all `dtypes`."""
    distinct = set(dtypes)
    if len(distinct) == 1:
        return distinct.pop()
    size = max(dtype.itemsize for dtype in distinct)
    widest = [dtype for dtype in distinct if dtype.itemsize == size]
    if len(widest) == 1:
        return widest[0]
    return DTYPES["F32"] if size == 2 else _BFLOAT16


class ForeignComponent:
    """One network in a published layout.

    Attributes:
      kind, naming, config: what it is.
      plan: how its tensors and our leaves correspond.
      sources: `TensorInfo` by canonical name; dtype as stored.
      leaves: `TensorInfo` by our path; dtype as `read` gives it by default.
      scaled: whether 8-bit weights carry scales, and so are expanded to bfloat16 by default.
      ignored: names of tensors in the file that are no parameters.
    """

    def __init__(
        self,
        path: Path,
        reader: TensorReader,
        kind: str,
        naming: str,
        names: Mapping[str, str],
        foreign_config: Mapping | None,
        config: Config | None = None,
        axes_dim: tuple[int, ...] | None = None,
    ):
        """Matches the tensors `names` (canonical → in the file) of `reader` with our layout.

        Raises:
          WeightMismatchError: with every difference between what is there and what must be.
        """
        self.path, self.reader, self.kind, self.naming = path, reader, kind, naming
        self.where = str(path)
        self._scratch = ThreadScratch()
        table = TABLES[kind]
        self.ignored = [
            name
            for bare, name in names.items()
            if bare in table.BUFFERS or bare.startswith(table.OTHER_NETWORKS)
        ]
        names = {bare: name for bare, name in names.items() if name not in self.ignored}
        names = self._without_tied(names, table.TIED)
        self._scales, names = self._without_scales(names)
        self._names = names
        self.sources = {bare: reader.tensors[name] for bare, name in names.items()}
        shapes = {bare: info.shape for bare, info in self.sources.items()}
        self.config = config or infer_config(
            kind, naming, shapes, foreign_config, reader.metadata, self.where, axes_dim
        )
        self.plan: Plan = make_plan(table.rows(self.config), table.axis_sizes(self.config), naming)
        lines = difference_lines(self.plan.sources, shapes)
        lines += [
            f"dtype {bare} is {dtype_name(info.dtype)}, not a floating-point weight"
            for bare, info in sorted(self.sources.items())
            if info.dtype not in _FLOATS and bare in self.plan.sources
        ]
        if lines:
            raise WeightMismatchError(
                f"{self.where}: not the {TITLES[kind]} ({naming} naming) that its config "
                f"describes: {len(lines)} differences (- missing, + unexpected):\n  "
                + "\n  ".join(lines)
            )
        self._by_leaf = self.plan.moves_by_leaf()
        self.leaves = {
            leaf: TensorInfo(
                lossless_dtype(self._stored_dtype(move.source) for move in self._by_leaf[leaf]),
                shape,
            )
            for leaf, shape in self.plan.leaves.items()
        }

    @property
    def scaled(self) -> bool:
        return bool(self._scales)

    @property
    def num_parameters(self) -> int:
        return sum(int(np.prod(info.shape)) for info in self.sources.values())

    def _without_tied(self, names: dict[str, str], tied: Mapping[str, str]) -> dict[str, str]:
        for alias, name in tied.items():
            if alias not in names:
                continue
            in_file = names.pop(alias)
            if name not in names:
                names[name] = in_file
                continue
            mine, other = self.reader.read(names[name]), self.reader.read(in_file)
            if mine.dtype != other.dtype or mine.tobytes() != other.tobytes():
                raise WeightMismatchError(
                    f"{self.where}: {in_file} and {names[name]} must be the same tensor and differ"
                )
            self.ignored.append(in_file)
        return names

    def _without_scales(self, names: dict[str, str]) -> tuple[dict[str, float], dict[str, str]]:
        """Takes ComfyUI's companions of 8-bit weights out of `names`; scales by weight's name."""
        scales, left = {}, {}
        for bare, name in names.items():
            layer, _, suffix = bare.rpartition(".")
            if bare == "scaled_fp8" or f".{suffix}" in (".scale_input", ".input_scale"):
                self.ignored.append(name)  # a marker; scales of activations
            elif f".{suffix}" not in QUANTISED_SUFFIXES:
                left[bare] = name
            elif suffix == "comfy_quant":
                self._check_quantisation(name)
                self.ignored.append(name)
            else:
                scale = self.reader.read(name)
                weight = f"{layer}.weight"
                value = scale.astype(np.float32).reshape(-1)
                if weight not in names or self.reader.tensors[names[weight]].dtype not in _FP8:
                    raise WeightMismatchError(
                        f"{self.where}: {name} scales {weight}, which is not an 8-bit float tensor"
                    )
                if value.size != 1 or not np.isfinite(value[0]):
                    raise WeightMismatchError(
                        f"{self.where}: {name} has shape {list(scale.shape)}; only one finite "
                        "scale per tensor is supported"
                    )
                scales[weight] = float(value[0])
        return scales, left

    def _check_quantisation(self, name: str) -> None:
        try:
            layer_format = json.loads(self.reader.read(name).tobytes())["format"]
        except (ValueError, KeyError, TypeError):
            layer_format = "unreadable"
        if layer_format not in ("float8_e4m3fn", "float8_e5m2"):
            raise WeightMismatchError(
                f"{self.where}: {name} says the format {layer_format!r}; of ComfyUI's quantised "
                "files only float8_e4m3fn and float8_e5m2 are supported"
            )

    def _stored_dtype(self, source: str) -> np.dtype:
        return _BFLOAT16 if source in self._scales else self.sources[source].dtype

    def read_source(
        self, name: str, rows: slice | None = None, scratch: Scratch | None = None
    ) -> Shaped[np.ndarray, "..."]:
        """The published tensor `name`, or rows of it, as stored.

        Raises:
          NonFiniteError: it holds NaN or infinity.
        """
        array = self.reader.read(self._names[name], rows, scratch)
        if has_nonfinite(array):
            raise NonFiniteError(self.where, [name])
        return array

    def cast_source(
        self, name: str, source: Shaped[np.ndarray, "*shape"], dtype: np.dtype
    ) -> Shaped[np.ndarray, "*shape"]:
        """The published tensor `name`, or rows of it, in `dtype` and times its scale."""
        return cast(source, dtype, name, self._scales.get(name))

    def read_slice(
        self, path: str, layer: int | None, dtype: np.dtype | None = None
    ) -> Shaped[np.ndarray, "..."]:
        """The leaf `path`, or the slice of a stack at `layer`, in our layout."""
        move = self._by_leaf[path][layer or 0]
        out = np.empty(move.our_shape, dtype or self.leaves[path].dtype)
        self._fill(move, out)
        return out

    def _fill(self, move: Move, out: np.ndarray) -> None:
        rows = move.row_region()
        source = self.read_source(move.source, rows, self._scratch.buffer)
        source = self.cast_source(move.source, source, out.dtype)
        move.to_ours(source, out, has_region=rows is not None)

    def read_leaf(self, path: str, dtype: np.dtype | None = None) -> Shaped[np.ndarray, "..."]:
        """The whole leaf, stack included; its layers are read in `NUM_THREADS` threads."""
        info = self.leaves[path]
        out = np.empty(info.shape, dtype or info.dtype)
        moves = self._by_leaf[path]
        if moves and moves[0].layer is None:
            self._fill(moves[0], out)
            return out
        with ThreadPoolExecutor(NUM_THREADS) as pool:
            list(pool.map(lambda move: self._fill(move, out[move.layer]), moves))
        return out

    def close(self) -> None:
        """Closes the files behind it."""
        self.reader.close()


class OwnComponent:
    """One network of our own weight directory, with the reading side of `ForeignComponent`."""

    naming = "kontext_jax"
    scaled = False

    def __init__(self, directory: Path, kind: str):
        """Opens `directory/kind`; raises `WeightMismatchError` if leaves are missing or wrong."""
        self.path, self.kind = directory / kind, kind
        self._scratch = ThreadScratch()
        self.config = checked_config(kind, checkpoint.read_config(directory, kind), str(self.path))
        self.reader = checkpoint.open_params(directory, kind)
        self.leaves = self.reader.tensors
        self.stays = self._why_it_stays()
        lines = [] if self.stays else self._differences()
        if lines:
            self.reader.close()
            raise WeightMismatchError(
                f"{self.path}: not the {TITLES[kind]} that its config describes "
                "(- missing, + unexpected):\n  " + "\n  ".join(lines)
            )
        self.sources = self.leaves

    def _why_it_stays(self) -> str:
        """Why no published layout can hold the network; "" if one can."""
        try:
            TABLES[self.kind].rows(self.config)
        except ValueError as error:
            return str(error)
        return ""

    def _differences(self) -> list[str]:
        """Lines for the leaves that the config asks for and the file lacks, or the reverse."""
        found = {name: info.shape for name, info in self.leaves.items()}
        return difference_lines(self.plan.leaves, found)

    @functools.cached_property
    def plan(self) -> Plan:
        """Every move between our layout and the first published naming.

        Raises:
          ValueError: no published layout can hold the network.
        """
        table = TABLES[self.kind]
        return make_plan(table.rows(self.config), table.axis_sizes(self.config), table.NAMINGS[0])

    @property
    def num_parameters(self) -> int:
        return sum(int(np.prod(info.shape)) for info in self.leaves.values())

    def read_slice(
        self, path: str, layer: int | None, dtype: np.dtype | None = None
    ) -> Shaped[np.ndarray, "..."]:
        """The leaf `path`, or the slice of a stack at `layer`; valid until this thread's next."""
        rows = None if layer is None else slice(layer, layer + 1)
        array = self.reader.read(path, rows, self._scratch.buffer)
        if layer is not None:
            array = array[0]
        if has_nonfinite(array):
            raise NonFiniteError(str(self.path), [path])
        return cast(array, dtype, path)

    def close(self) -> None:
        """Closes the file behind it."""
        self.reader.close()


AnyComponent = ForeignComponent | OwnComponent


def open_components(
    path: Path,
    kind: str | None = None,
    config: Config | None = None,
    axes_dim: tuple[int, ...] | None = None,
) -> dict[str, ForeignComponent]:
    """The components in one set of tensors: a file, an index, or a folder that holds one set.

    Args:
      path: the file or folder; a `config.json` beside it is read.
      kind: accept only this component.
      config: its config, where neither shapes nor a `config.json` tell it.
      axes_dim: rotary axes, as `layouts.infer_config`.

    Raises:
      TensorFileError, WeightMismatchError: it cannot be read, or is something else.
    """
    reader = open_tensors(path)
    try:
        groups = split_components(list(reader.tensors), str(path))
        if kind is not None and kind not in groups:
            found = " and ".join(TITLES[k] for k in groups)
            raise WeightMismatchError(f"{path}: holds a {found}, not a {TITLES[kind]}")
        chosen = [k for k in groups if kind in (None, k)]
        if config is not None and len(chosen) != 1:
            raise ValueError(f"{path}: holds {chosen}; say which one the config is for")
        folder = path if path.is_dir() else path.parent
        components = {}
        for each in chosen:
            foreign = None
            if len(groups) == 1 and config is None:
                foreign = read_foreign_config(folder / "config.json", each)
            components[each] = ForeignComponent(
                path,
                reader,
                each,
                groups[each].naming,
                groups[each].names,
                foreign,
                config,
                axes_dim,
            )
        return components
    except BaseException:
        reader.close()
        raise


def iterate_slices(component: AnyComponent) -> Iterator[tuple[str, int | None]]:
    """Every (leaf, layer) of a component; a leaf that is no stack has the layer None."""
    for move in component.plan.moves:
        yield move.path, move.layer
