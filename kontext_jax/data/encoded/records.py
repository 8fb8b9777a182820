"""Encoded samples on disk: ArrayRecord shards that say themselves what they hold.

    DIR/manifest.json              what made the records, and the hash of it
    DIR/null_text.safetensors      features of the empty prompt
    DIR/part-P-N.array_record      samples and texts; the last record is the index
    DIR/done-P-of-COUNT.json       process P has encoded its whole share
    DIR/partial-P/                 what process P has not finished

A record is the bytes of a safetensors file, with a header as JSON in its metadata. The header
repeats the manifest's hash and the sample's id, so a record can never be taken for another one;
ArrayRecord checks the hash of its bytes. A shard gets its name when it is complete, index included.
Text features stand once for every prompt of a process, under the hash of the prompt.
"""

import contextlib
import dataclasses
import hashlib
import json
import math
import re
import shutil
import struct
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import safetensors.numpy

from kontext_jax.data.buckets import Kind
from kontext_jax.runtime.atomic import put
from kontext_jax.storage.safetensors_reader import tensors_of

if TYPE_CHECKING:
    from array_record.python.array_record_module import ArrayRecordWriter

SHARD_NAME = re.compile(r"part-(\d{5})-(\d{6})\.array_record")
HEADER = "header"  # name of the header among the metadata of a record
DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}

# One record for one chunk, so that each is read alone; features and latents do not compress.
WRITER_OPTIONS = "group_size:1,uncompressed"
READER_OPTIONS = "readahead_buffer_size:0,max_parallelism:0"


class CacheError(ValueError):
    """Encoded records that are damaged, incomplete or made in another way than expected."""


class UnwritableError(CacheError):
    """The disk does not take records any more."""


def prompt_key(prompt: str) -> str:
    """Under which the features of a prompt are stored."""
    return hashlib.sha256(prompt.encode()).hexdigest()[:32]


def facts_hash(facts: Mapping[str, Any]) -> str:
    """Hash of what made the records."""
    text = json.dumps(facts, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def facts_difference(stored: Mapping[str, Any], expected: Mapping[str, Any]) -> list[str]:
    """One line for every fact that is not the same: `vae/weights: stored …, now …`."""
    ours, theirs = dict(_flat(stored)), dict(_flat(expected))
    lines = []
    for name in sorted(ours.keys() | theirs.keys()):
        if (a := ours.get(name, "nothing")) != (b := theirs.get(name, "nothing")):
            lines.append(f"{name}: stored {_short(a)}, now {_short(b)}")
    return lines


def _flat(facts: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(facts, Mapping):
        for key, value in facts.items():
            yield from _flat(value, f"{path}/{key}" if path else key)
    else:
        yield path, json.loads(json.dumps(facts))  # tuples as the lists that a file gives back


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "…"


def pack_record(header: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> bytes:
    """One record of `header` and `arrays` (float32 or bfloat16)."""
    whole = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    return safetensors.numpy.save(whole, {HEADER: json.dumps(header, separators=(",", ":"))})


def unpack_record(record: bytes) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Inverse of `pack_record`; the arrays are views of `record`.

    Raises:
      CacheError: it is no such record.
    """
    try:
        if record[4:5] == b"{":  # in safetensors a byte of the header's length, which is short
            return _unpack_old(record)
        arrays, metadata = tensors_of(record)
        header = json.loads(metadata[HEADER])
        if not isinstance(header, dict):
            raise ValueError(f"its header is {type(header).__name__}")
        return header, arrays
    except (struct.error, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CacheError(f"not a record of encoded samples: {error}") from None


def _unpack_old(record: bytes) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """A record of format 1: the header's length in four bytes, the header as JSON, the arrays."""
    (length,) = struct.unpack_from("<I", record)
    header = json.loads(record[4 : 4 + length])
    arrays, offset = {}, 4 + length
    for name, (dtype, shape) in header.pop("arrays").items():
        count = math.prod(shape)
        if not 0 <= count <= len(record):
            raise ValueError(f"{name} has an impossible shape {shape}")
        arrays[name] = np.frombuffer(record, DTYPES[dtype], count, offset).reshape(shape)
        offset += arrays[name].nbytes
    if offset != len(record):
        raise ValueError(f"{len(record)} bytes, its header tells of {offset}")
    return header, arrays


@dataclasses.dataclass(frozen=True)
class SampleEntry:
    """What one must know of an encoded sample before reading it.

    Attributes:
      id: name of the sample in the data.
      variant: which of its crops.
      kind: sizes of its target and references in pixels.
      text: key of its prompt's features.
    """

    id: str
    variant: int
    kind: Kind
    text: str

    def as_json(self) -> list:
        sizes = [list(size) for size in (self.kind.target, *self.kind.contexts)]
        return [self.id, self.variant, sizes, self.text]

    @staticmethod
    def from_json(row: list) -> "SampleEntry":
        id_, variant, sizes, text = row
        target, *contexts = map(tuple, sizes)
        return SampleEntry(id_, variant, Kind(target, tuple(contexts)), text)


class ShardWriter:
    """Writes the records of one process; a shard is closed when it is large enough.

    Only what is in a closed shard exists for anyone else: a process that is killed leaves behind
    its folder `partial-P`, which the next one clears.
    """

    def __init__(
        self,
        directory: Path,
        process: int,
        made_by: str,
        max_shard_bytes: int,
        sources: Mapping[str, str] | None = None,
    ):
        """Writes into the folder `partial-P` that `lock_part` holds.

        Args:
          made_by: hash of the folder's facts.
          max_shard_bytes: size at which a shard is closed.
          sources: what to remember of the data: name → identity.
        """
        self._directory, self._process = directory, process
        self._partial = directory / f"partial-{process:05d}"
        self._made_by, self._max_bytes, self._sources = made_by, max_shard_bytes, sources or {}
        numbers = [number for p, number, _ in shard_paths(directory) if p == process]
        self._number = max(numbers, default=-1) + 1
        self._writer: ArrayRecordWriter | None = None

    @property
    def _unfinished(self) -> Path:
        return self._partial / f"part-{self._process:05d}-{self._number:06d}.array_record"

    def add_text(self, prompt: str, txt: np.ndarray, vec: np.ndarray) -> None:
        """Adds the features txt [T, D] and vec [D] of a prompt."""
        key = prompt_key(prompt)
        self._add({"text": key, "prompt": prompt}, {"txt": txt, "vec": vec})
        self._texts[self._count - 1] = key

    def add_sample(
        self, entry: SampleEntry, x0: np.ndarray, contexts: tuple[np.ndarray, ...]
    ) -> None:
        """Adds the latents of a sample whose prompt has been added before, here or earlier."""
        arrays = {"x0": x0, **{f"context_{i}": context for i, context in enumerate(contexts)}}
        self._add({"sample": entry.as_json()}, arrays)
        self._samples[self._count - 1] = entry
        if self._bytes >= self._max_bytes:
            self.finish_shard()

    def _add(self, header: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> None:
        if self._writer is None:
            from array_record.python.array_record_module import ArrayRecordWriter

            self._writer = ArrayRecordWriter(str(self._unfinished), WRITER_OPTIONS)
            self._samples: dict[int, SampleEntry] = {}
            self._texts: dict[int, str] = {}
            self._count = self._bytes = 0
        record = pack_record({"made_by": self._made_by, **header}, arrays)
        self._writer.write(record)
        if not self._writer.ok():
            raise self._unwritable("the disk refuses")
        self._count += 1
        self._bytes += len(record)

    def finish_shard(self) -> None:
        """Closes the shard with its index and gives it its name; does nothing without records."""
        if self._writer is None:
            return
        samples = [[place, *entry.as_json()] for place, entry in self._samples.items()]
        index = {"samples": samples, "texts": list(self._texts.items()), "sources": self._sources}
        self._writer.write(pack_record({"made_by": self._made_by, **index}, {}))
        try:
            self._writer.close()
        except RuntimeError as error:
            raise self._unwritable(error) from None
        self._writer = None
        put(self._unfinished, self._directory / self._unfinished.name, durable=True)
        self._number += 1

    def _unwritable(self, why: object) -> UnwritableError:
        free = shutil.disk_usage(self._directory).free
        return UnwritableError(
            f"{self._unfinished} cannot be written: {why} ({free / 1e9:.3g} GB are free); make "
            "room and run the same again: what finished shards hold is kept"
        )


@contextlib.contextmanager
def lock_part(directory: Path, process: int) -> Iterator[None]:
    """Holds process `process`'s share of `directory`, its folder `partial-P` emptied.

    Raises:
      CacheError: somebody else holds it.
    """
    partial = directory / f"partial-{process:05d}"
    partial.mkdir(parents=True, exist_ok=True)
    with (partial / "lock").open("w") as lock:
        try:
            _lock(lock)
        except (BlockingIOError, PermissionError):
            raise CacheError(
                f"{directory}: another program is writing the share of process {process}; wait for "
                "it, or give each its own --process-index"
            ) from None
        for path in partial.iterdir():
            if path.name != "lock":
                path.unlink()
        yield
        shutil.rmtree(partial, ignore_errors=True)


def _lock(file: IO) -> None:
    """Locks an open file until it is closed.

    Raises:
      BlockingIOError: another process holds the lock; on Windows PermissionError.
    """
    if sys.platform == "win32":
        import msvcrt

        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    else:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def shard_paths(directory: Path) -> list[tuple[int, int, Path]]:
    """(process, number, path) of every finished shard, in order."""
    found = []
    for path in directory.iterdir():
        if match := SHARD_NAME.fullmatch(path.name):
            found.append((int(match[1]), int(match[2]), path))
    return sorted(found)


class Shard:
    """A finished shard, open for reading; safe in threads.

    Raises:
      CacheError: it is damaged, or was not made by `made_by`.
    """

    def __init__(self, path: Path, made_by: str):
        from array_record.python.array_record_module import ArrayRecordReader

        self.path, self._made_by = path, made_by
        try:
            self._reader = ArrayRecordReader(str(path), READER_OPTIONS)
            count = self._reader.num_records()
        except (RuntimeError, ValueError, OSError) as error:
            raise self._damaged(error) from None
        if not count:
            raise self._damaged("no records can be found in it; it may have been cut short")
        index, _ = self.read(count - 1)
        try:
            self.samples = {n: SampleEntry.from_json(row) for n, *row in index["samples"]}
            self.texts = dict(index["texts"])
            self.sources: dict[str, str] = dict(index["sources"])
        except (KeyError, TypeError, ValueError) as error:
            raise self._damaged(f"its last record is no index ({error!r})") from None

    def read(self, place: int) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """Header and arrays of the record at `place`.

        Raises:
          CacheError: it is damaged, or was not made by what the manifest tells.
        """
        try:
            (record,) = self._reader.read([place])
            header, arrays = unpack_record(record)
        except (RuntimeError, ValueError) as error:
            raise self._damaged(error) from None
        if header.get("made_by") != self._made_by:
            raise CacheError(
                f"{self.path}: record {place} was made by {_short(str(header.get('made_by')))}, "
                f"its folder by {self._made_by}: the file belongs to another folder"
            )
        return header, arrays

    def read_sample(self, place: int) -> tuple[np.ndarray, tuple[np.ndarray, ...]]:
        """x0 [h, w, Z] and the contexts of the sample at `place`, its id checked."""
        header, arrays = self.read(place)
        entry = self.samples[place].as_json()
        if entry != header.get("sample"):
            raise self._damaged(f"record {place} holds {header}, its index tells of {entry}")
        contexts = tuple(arrays[f"context_{i}"] for i in range(len(arrays) - 1))
        return arrays["x0"], contexts

    def read_text(self, place: int) -> tuple[np.ndarray, np.ndarray]:
        """txt [T, D] and vec [D] of the prompt at `place`, its key checked."""
        header, arrays = self.read(place)
        if header.get("text") != self.texts[place]:
            raise self._damaged(f"record {place} holds the text {header.get('text')}")
        return arrays["txt"], arrays["vec"]

    def close(self) -> None:
        self._reader.close()

    def _damaged(self, why: object) -> CacheError:
        return CacheError(
            f"{self.path}: damaged: {why}; remove this file and run the same "
            "`python -m kontext_jax.data.encode` again, which makes what is missing"
        )
