"""Safetensors files, read lazily and with suspicion.

A file is 8 bytes of header length (little-endian), a JSON header
`{name: {"dtype", "shape", "data_offsets"}}`, then the tensors' bytes without holes. Whoever made
the file may be wrong or hostile, so every claim of the header is checked against the file's size
before a byte of data is believed. Data is read with `pread` into buffers of ours: nothing is
mapped, so resident memory is what the caller holds and a file cut short under us is an error, not a
SIGBUS.
"""

import dataclasses
import json
import math
import os
import struct
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

MAX_HEADER_BYTES = 100_000_000  # as the reference implementation
MAX_RANK = 16

DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
FLOAT_DTYPES = {name: DTYPES[name] for name in ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")}

# Bits of the smallest value that is not finite: +inf, or NaN where a format has no inf.
_NONFINITE_BITS = {
    DTYPES["F64"]: 0x7FF0000000000000,
    DTYPES["F32"]: 0x7F800000,
    DTYPES["F16"]: 0x7C00,
    DTYPES["BF16"]: 0x7F80,
    DTYPES["F8_E5M2"]: 0x7C,
    DTYPES["F8_E4M3"]: 0x7F,
}


class TensorFileError(ValueError):
    """A tensor file is damaged, hostile or not what was asked for; the message says how."""


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies: `start` counts bytes from the beginning of the file."""

    dtype: np.dtype
    shape: tuple[int, ...]
    start: int = 0

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def dtype_name(dtype: np.dtype) -> str:
    """The name a person knows: `bfloat16`, `float32`, `float8_e4m3fn`."""
    return np.dtype(dtype).name


def has_nonfinite(array: np.ndarray) -> bool:
    """Whether any value is NaN or infinite; integers never are. No temporaries are made."""
    threshold = _NONFINITE_BITS.get(array.dtype)
    if threshold is None or array.size == 0:
        return False
    width = array.dtype.itemsize * 8
    unsigned = array.view(f"u{width // 8}")
    # A set sign bit makes the pattern negative as a signed integer and largest as an unsigned one.
    return int(unsigned.view(f"i{width // 8}").max()) >= threshold or int(
        unsigned.max()
    ) >= threshold | 1 << (width - 1)


def cast(
    array: np.ndarray, dtype: np.dtype | None, name: str, scale: float | None = None
) -> np.ndarray:
    """`array · scale` in `dtype` (None keeps the array's own), rounded once from float32.

    Raises:
      TensorFileError: a finite value does not fit into `dtype`.
    """
    dtype = array.dtype if dtype is None else np.dtype(dtype)
    if scale is None and dtype == array.dtype:
        return array
    if array.dtype.itemsize == 1:  # 256 values: a table is exact and far quicker than arithmetic
        values = np.arange(256, dtype=np.uint8).view(array.dtype).astype(np.float32)
        with np.errstate(over="ignore", invalid="ignore"):
            table = (values if scale is None else values * np.float32(scale)).astype(dtype)
        result = table.take(array.view(np.uint8))
    else:
        wide = array if scale is None else array.astype(np.float32) * np.float32(scale)
        with np.errstate(over="ignore"):
            result = wide.astype(dtype)
    if has_nonfinite(result) and not has_nonfinite(array):
        largest = np.abs(array.astype(np.float64)).max() * (1 if scale is None else scale)
        raise TensorFileError(
            f"{name}: values up to {largest:.4g} do not fit into {dtype_name(dtype)} "
            f"(largest {float(ml_dtypes.finfo(dtype).max):.4g}); keep {dtype_name(array.dtype)} or "
            "choose bfloat16 or float32"
        )
    return result


def _refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f"the name {key!r} appears twice")
        result[key] = value
    return result


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _checked_entry(name: str, entry: Any, data_bytes: int) -> TensorInfo:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{name!r} must hold dtype, shape and data_offsets, and holds {entry!r}")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ValueError(f"{name!r} has dtype {dtype!r}; known are {', '.join(DTYPES)}")
    if not isinstance(shape, list) or len(shape) > MAX_RANK or not all(map(_is_count, shape)):
        raise ValueError(f"{name!r} has an impossible shape {str(shape)[:80]}")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_count, offsets)):
        raise ValueError(f"{name!r} has impossible offsets {str(offsets)[:80]}")
    begin, end = offsets
    if not begin <= end <= data_bytes:
        raise ValueError(
            f"{name!r} claims bytes {begin}…{end} of {data_bytes}; the file is cut short or damaged"
        )
    info = TensorInfo(DTYPES[dtype], tuple(shape), begin)
    if info.nbytes != end - begin:
        raise ValueError(
            f"{name!r}, {dtype} {shape}, needs {info.nbytes} bytes and claims {end - begin}"
        )
    return info


def _checked_header(text: bytes, data_bytes: int) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=_refuse_duplicates)
    except RecursionError:
        raise ValueError("its header is nested too deeply") from None
    except UnicodeDecodeError:
        raise ValueError("its header is not UTF-8 text") from None
    if not isinstance(header, dict):
        raise ValueError("its header is not a JSON object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise ValueError("its __metadata__ must map strings to strings")
    tensors = {name: _checked_entry(name, entry, data_bytes) for name, entry in header.items()}
    end, previous = 0, None
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].nbytes)):
        if info.start != end:
            what = "overlaps" if info.start < end else "leaves a hole after"
            raise ValueError(f"{name!r} {what} {previous!r} (byte {info.start} instead of {end})")
        end, previous = info.start + info.nbytes, name
    if end != data_bytes:
        raise ValueError(f"{data_bytes - end} bytes after the last tensor belong to none")
    return tensors, metadata


def _read_header(
    read: Callable[[int, int], bytes], size: int
) -> tuple[int, dict[str, TensorInfo], dict[str, str]]:
    """Where the data starts, the tensors and the metadata of `size` bytes.

    Args:
      read: gives the bytes from a start on, so many of them.
    """
    if size < 8:
        raise ValueError(f"it has {size} bytes")
    (length,) = struct.unpack("<Q", read(0, 8))
    if length > MAX_HEADER_BYTES:
        raise ValueError(f"it claims a header of {length} bytes (at most {MAX_HEADER_BYTES})")
    if length > size - 8:
        raise ValueError(f"it claims a header of {length} bytes and has {size - 8} in all")
    tensors, metadata = _checked_header(read(8, length), size - 8 - length)
    return 8 + length, tensors, metadata


def tensors_of(contents: bytes) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """The tensors and the metadata of a safetensors file in memory; the arrays are views of it.

    Raises:
      TensorFileError: it is no sound safetensors file.
    """
    try:
        data_start, infos, metadata = _read_header(
            lambda start, count: contents[start : start + count], len(contents)
        )
        tensors = {}
        for name, info in infos.items():
            count = math.prod(info.shape)
            flat = np.frombuffer(contents, info.dtype, count, data_start + info.start)
            tensors[name] = flat.reshape(info.shape)
    except ValueError as error:
        raise TensorFileError(f"not the bytes of safetensors: {error}") from None
    return tensors, metadata


class SafetensorsFile:
    """One safetensors file, its header checked, its data read on demand; safe in threads.

    Attributes:
      path: the file.
      tensors: `TensorInfo` by name, in the header's order.
      metadata: the strings under `__metadata__`.
    """

    def __init__(self, path: str | os.PathLike):
        """Opens and checks `path`; raises `TensorFileError` for anything but a sound file."""
        self.path = Path(path)
        if not self.path.is_file():
            raise TensorFileError(f"{path}: no such file")
        self._fd = os.open(self.path, os.O_RDONLY)
        self._finalizer = weakref.finalize(self, os.close, self._fd)
        try:
            size = os.fstat(self._fd).st_size
            self._data_start, tensors, self.metadata = _read_header(
                lambda start, count: os.pread(self._fd, count, start), size
            )
        except ValueError as error:
            self.close()
            raise TensorFileError(f"{path}: not a sound safetensors file: {error}") from None
        except BaseException:
            self.close()
            raise
        self.tensors = {
            name: dataclasses.replace(info, start=info.start + self._data_start)
            for name, info in tensors.items()
        }

    def header_bytes(self) -> bytes:
        """The raw header, for fingerprints."""
        return os.pread(self._fd, self._data_start - 8, 8)

    def read_bytes(self, name: str, offset: int, count: int) -> bytes:
        """At most `count` bytes of the tensor `name`, from `offset` on."""
        info = self.tensors[name]
        return os.pread(self._fd, max(0, min(count, info.nbytes - offset)), info.start + offset)

    def read(
        self, name: str, rows: slice | None = None, scratch: "Scratch | None" = None
    ) -> np.ndarray:
        """The tensor `name`, or its `rows` on axis 0: only those bytes are read.

        Args:
          name: a key of `tensors`.
          rows: a slice of axis 0 with step 1.
          scratch: a reusable buffer to read into; the result is then valid until its next use.
        """
        info = self.tensors[name]
        shape, start = info.shape, info.start
        if rows is not None:
            first, last, _ = rows.indices(shape[0])
            shape = (last - first, *shape[1:])
            start += first * math.prod(shape[1:]) * info.dtype.itemsize
        count = math.prod(shape) * info.dtype.itemsize
        buffer = np.empty(count, np.uint8) if scratch is None else scratch.take(count)
        view, done = memoryview(buffer), 0
        while done < count:
            got = os.preadv(self._fd, [view[done:]], start + done)
            if got == 0:
                raise TensorFileError(f"{self.path}: cut short while {name!r} was being read")
            done += got
        return buffer.view(info.dtype).reshape(shape)

    def close(self) -> None:
        """Closes the file; further reads fail. Happens by itself when nobody holds it any more."""
        self._finalizer()
        self._fd = -1

    def __enter__(self) -> "SafetensorsFile":
        return self

    def __exit__(self, *exception) -> None:
        self.close()


class Scratch:
    """One growing buffer, reused: fresh pages cost more than the copy that fills them."""

    def __init__(self):
        self._buffer = np.empty(0, np.uint8)

    def take(self, nbytes: int) -> np.ndarray:
        """[nbytes] uint8, contents undefined; takes the place of what it gave before."""
        if self._buffer.nbytes < nbytes:
            self._buffer = np.empty(0, np.uint8)  # frees the old one first
            self._buffer = np.empty(nbytes, np.uint8)
        return self._buffer[:nbytes]

    def take_array(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """The same as an array."""
        return self.take(math.prod(shape) * dtype.itemsize).view(dtype).reshape(shape)


class ShardedTensors:
    """Several files that hold one set of tensors, as an `*.index.json` maps them."""

    def __init__(self, index_path: str | os.PathLike):
        """Opens every shard of `index_path` and checks that index and shards agree."""
        self.path = Path(index_path)
        weight_map = _read_weight_map(self.path)
        self.files: dict[str, SafetensorsFile] = {}
        try:
            for shard in sorted(set(weight_map.values())):
                self.files[shard] = SafetensorsFile(self.path.parent / shard)
            held = {(n, shard) for shard, file in self.files.items() for n in file.tensors}
            if held != set(weight_map.items()):
                lines = [f"  - {n} in {shard}" for n, shard in set(weight_map.items()) - held]
                lines += [f"  + {n} in {shard}" for n, shard in held - set(weight_map.items())]
                raise TensorFileError(
                    f"{self.path}: the index and its shards disagree (- missing, + not listed):\n"
                    + "\n".join(sorted(lines))
                )
        except BaseException:
            self.close()
            raise
        self._file_of = {name: self.files[shard] for name, shard in weight_map.items()}
        self.tensors = {name: file.tensors[name] for name, file in self._file_of.items()}
        self.metadata: dict[str, str] = {}
        for file in self.files.values():
            self.metadata |= file.metadata

    def read(self, name: str, rows: slice | None = None, scratch: Scratch | None = None):
        """As `SafetensorsFile.read`."""
        return self._file_of[name].read(name, rows, scratch)

    def read_bytes(self, name: str, offset: int, count: int) -> bytes:
        """As `SafetensorsFile.read_bytes`."""
        return self._file_of[name].read_bytes(name, offset, count)

    def header_bytes(self) -> bytes:
        """The raw headers of all shards, for fingerprints."""
        return b"".join(self.files[shard].header_bytes() for shard in sorted(self.files))

    def close(self) -> None:
        """Closes every shard."""
        for file in self.files.values():
            file.close()

    def __enter__(self) -> "ShardedTensors":
        return self

    def __exit__(self, *exception) -> None:
        self.close()


TensorReader = SafetensorsFile | ShardedTensors


def _read_weight_map(path: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(path.read_text("utf-8"))["weight_map"]
        if not isinstance(weight_map, dict) or not weight_map:
            raise ValueError("weight_map is empty")
        for shard in weight_map.values():
            if not isinstance(shard, str) or Path(shard).name != shard:
                raise ValueError(f"{shard!r} is not the name of a file beside the index")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise TensorFileError(f"{path}: not a sound index of shards: {error}") from None
    return weight_map


def open_tensors(path: str | os.PathLike) -> TensorReader:
    """The tensors under `path`: a .safetensors file, an index, or a folder that holds one set."""
    path = Path(path)
    if path.is_dir():
        indices, files = sorted(path.glob("*.safetensors.index.json")), find_safetensors(path)
        if len(indices) == 1:
            return ShardedTensors(indices[0])
        if len(files) != 1 or indices:
            found = ", ".join(p.name for p in indices or files) or "none"
            raise TensorFileError(
                f"{path}: expected one .safetensors file or one index, found {found}; "
                "name the file itself"
            )
        path = files[0]
    if path.name.endswith(".index.json"):
        return ShardedTensors(path)
    return SafetensorsFile(path)


def find_safetensors(folder: Path) -> list[Path]:
    """The safetensors files directly in `folder`, sorted."""
    return sorted(p for p in folder.iterdir() if p.suffix in (".safetensors", ".sft"))
