"""Examples in ArrayRecord: the format that is read fastest at random.

A record is four bytes, the length of its header (little-endian); the header, JSON; then the encoded
bytes of its pictures, target first:

    {"format": "kontext_jax/pair/1", "id": …, "text": …, "pictures": [bytes of each],
     "metadata": {…}}

`group_size:1` makes every record readable alone; pictures are compressed already. As with
WebDataset's shards, a data set is a folder of such files.
"""

import contextlib
import json
import os
import struct
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from etils import epath

from kontext_jax.data.sources.examples import (
    BadSample,
    ColumnNames,
    Example,
    ImageRef,
    Source,
)
from kontext_jax.runtime.atomic import replacing

FORMAT = "kontext_jax/pair/1"
_WRITE = "group_size:1,uncompressed"
_READ = "readahead_buffer_size:0,max_parallelism:0"
_COLUMNS = ColumnNames("target", ("contexts",), "text", "id")


def pack_pair(example: Example) -> bytes:
    """The record of an example; its pictures are read, but not decoded."""
    pictures = [ref.read() for ref in (example.target, *example.contexts)]
    header = {
        "format": FORMAT,
        "id": example.id,
        "text": example.text,
        "pictures": [len(picture) for picture in pictures],
        "metadata": dict(example.metadata),
    }
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    return b"".join([struct.pack("<I", len(text)), text, *pictures])


def unpack_pair(record: bytes, place: str) -> Example:
    """Inverse of `pack_pair`.

    Raises:
      BadSample: it is no such record.
    """
    try:
        (length,) = struct.unpack_from("<I", record)
        header: dict[str, Any] = json.loads(record[4 : 4 + length])
        if header["format"] != FORMAT:
            raise ValueError(f"its format is {header['format']!r}, expected {FORMAT!r}")
        own_id, offset, refs = str(header["id"]), 4 + length, []
        for i, size in enumerate(header["pictures"]):
            role = f"context{i - 1}" if i else "target"
            data = record[offset : offset + size]
            refs.append(ImageRef(f"{place} ({own_id}):{role}", data=data))
            offset += size
        if offset != len(record) or not refs:
            raise ValueError(f"{len(refs)} pictures in {len(record)} bytes, {offset} expected")
        text, metadata = str(header["text"]), dict(header.get("metadata", {}))
    except (struct.error, ValueError, KeyError, TypeError) as error:
        raise BadSample("malformed record", f"{place} is no example: {error!r}") from None
    return Example(own_id, refs[0], tuple(refs[1:]), text, metadata)


def write_array_record(examples: Iterable[Example], path: str | os.PathLike) -> int:
    """Writes examples to one file, beside its place and then renamed; returns how many."""
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
