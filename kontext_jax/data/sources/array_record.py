"""Examples in ArrayRecord: the format that is read fastest at random.

A record is the bytes of a safetensors file: the encoded bytes of its pictures as tensors of uint8,
`target`, `context0`, `context1`, …, and beside them as metadata

    {"format": "kontext_jax/pair/2", "id": …, "text": …, "metadata": JSON of the other columns}

Records of format 1 are read too: the length of a JSON header in four bytes, the header, which lists
the sizes of the pictures, then the pictures.

`group_size:1` makes every record readable alone; pictures are compressed already. As with
WebDataset's shards, a data set is a folder of such files.
"""

import contextlib
import json
import os
import struct
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import safetensors.numpy
from etils import epath

from kontext_jax.data.sources.examples import (
    BadSample,
    ColumnNames,
    Example,
    ImageRef,
    Source,
)
from kontext_jax.runtime.atomic import replacing
from kontext_jax.storage.safetensors_reader import tensors_of

FORMAT, OLD_FORMAT = "kontext_jax/pair/2", "kontext_jax/pair/1"
_WRITE = "group_size:1,uncompressed"
_READ = "readahead_buffer_size:0,max_parallelism:0"
_COLUMNS = ColumnNames("target", ("contexts",), "text", "id")


def pack_pair(example: Example) -> bytes:
    """The record of an example; its pictures are read, but not decoded."""
    refs = (example.target, *example.contexts)
    pictures = {_role(i): np.frombuffer(ref.read(), np.uint8) for i, ref in enumerate(refs)}
    other_columns = json.dumps(dict(example.metadata), ensure_ascii=False, separators=(",", ":"))
    header = {
        "format": FORMAT,
        "id": example.id,
        "text": example.text,
        "metadata": other_columns,
    }
    return safetensors.numpy.save(pictures, header)


def _role(number: int) -> str:
    """What a picture of an example is, the target first."""
    return f"context{number - 1}" if number else "target"


def unpack_pair(record: bytes, place: str) -> Example:
    """Inverse of `pack_pair`.

    Raises:
      BadSample: it is no such record.
    """
    try:
        unpack = _unpack_old if record[4:5] == b"{" else _unpack
        header, pictures = unpack(record)
        own_id, text, metadata = str(header["id"]), str(header["text"]), dict(header["metadata"])
    except (struct.error, ValueError, KeyError, TypeError, RecursionError) as error:
        raise BadSample("malformed record", f"{place} is no example: {error!r}") from None
    refs = [
        ImageRef(f"{place} ({own_id}):{_role(i)}", data=data) for i, data in enumerate(pictures)
    ]
    return Example(own_id, refs[0], tuple(refs[1:]), text, metadata)


def _unpack(record: bytes) -> tuple[dict[str, Any], list[bytes]]:
    tensors, header = tensors_of(record)
    _check_format(header, FORMAT)
    roles = [_role(i) for i in range(max(1, len(tensors)))]
    if tensors.keys() != set(roles):
        raise ValueError(f"it holds {sorted(tensors)}, expected {roles}")
    return {**header, "metadata": json.loads(header["metadata"])}, [
        tensors[role].tobytes() for role in roles
    ]


def _unpack_old(record: bytes) -> tuple[dict[str, Any], list[bytes]]:
    """A record of format 1."""
    (length,) = struct.unpack_from("<I", record)
    header: dict[str, Any] = json.loads(record[4 : 4 + length])
    _check_format(header, OLD_FORMAT)
    offset, pictures = 4 + length, []
    for size in header["pictures"]:
        if size < 0:
            raise ValueError(f"a picture of {size} bytes")
        pictures.append(record[offset : offset + size])
        offset += size
    if offset != len(record) or not pictures:
        raise ValueError(f"{len(pictures)} pictures in {len(record)} bytes, {offset} expected")
    return {"metadata": {}, **header}, pictures


def _check_format(header: Mapping[str, Any], expected: str) -> None:
    if header["format"] != expected:
        raise ValueError(f"its format is {header['format']!r}, expected {expected!r}")


def write_array_record(examples: Iterable[Example], path: str | os.PathLike) -> int:
    """Writes examples to one file, beside its place and then renamed; returns how many."""
    from array_record.python.array_record_module import ArrayRecordWriter

    count = 0
    with (
        replacing(path) as part,
        contextlib.closing(ArrayRecordWriter(os.fspath(part), _WRITE)) as writer,
    ):
        for example in examples:
            writer.write(pack_pair(example))
            count += 1
    return count


class ArrayRecordSource(Source):
    """Examples of files that `write_array_record` wrote, under the ids that they have there."""

    def __init__(
        self,
        files: Sequence[epath.Path],
        columns: ColumnNames,
        name: str,
        index_dir: str | os.PathLike | None = None,
    ):
        del columns, index_dir  # records say what is what, and the files have their own index
        self.name, self.files, self.columns = name, files, _COLUMNS
        self._open()
        self._starts = np.cumsum([0, *(reader.num_records() for reader in self._readers)])
        if not len(self):
            raise ValueError(f"data source {files[0]} has no records; it may have been cut short")

    def _open(self) -> None:
        from array_record.python.array_record_module import ArrayRecordReader

        self._readers = []
        for path in self.files:
            try:
                self._readers.append(ArrayRecordReader(os.fspath(path), _READ))
            except (RuntimeError, ValueError, OSError) as error:
                raise ValueError(
                    f"data source {path} is no ArrayRecord file on a local disk: {error}"
                ) from None

    def __getstate__(self) -> dict:
        return {name: value for name, value in self.__dict__.items() if name != "_readers"}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._open()

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: int) -> Example:
        file = int(np.searchsorted(self._starts, index, side="right")) - 1
        place = f"{self.files[file]}, record {index - int(self._starts[file])}"
        try:
            (record,) = self._readers[file].read([index - int(self._starts[file])])
        except (RuntimeError, ValueError) as error:
            raise BadSample("malformed record", f"{place} is damaged: {error}") from None
        return unpack_pair(record, place)
