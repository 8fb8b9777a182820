"""Examples from WebDataset tars: members of one key are one sample.

    KEY.target.png  KEY.context.png  KEY.txt          target, reference, instruction
    KEY.jpg  KEY.txt                                   picture and caption
    KEY.context0.jpg  KEY.context1.jpg  KEY.json       references in order; fields of the JSON

A member's column is its suffix without the file type: `target`, `context0`; a bare picture is
`image`, a bare .txt `text`, and the fields of a bare .json are columns of their own. Headers are
read once, then every member is read at its place, so tars must not be compressed.
"""

import dataclasses
import functools
import json
import os
import tarfile
from collections.abc import Mapping, Sequence
from concurrent import futures
from typing import Any

import numpy as np
from etils import epath

from kontext_jax.data.sources.examples import (
    BadSample,
    ColumnNames,
    Example,
    ImageRef,
    Source,
    digest,
    file_identity,
    find_columns,
    is_picture,
    make_example,
    relative_names,
)
from kontext_jax.runtime.atomic import write_file

_COLUMNS_SEEN = 100  # samples of a tar whose members say which columns there are


@dataclasses.dataclass(frozen=True)
class _Members:
    """The files in a tar that belong to samples, in their order.

    Attributes:
      names: joined by newlines, which takes a tenth of the memory of a list.
      spans: int64 [members, 2], offset and size in bytes.
      samples: int64 [samples + 1], first member of each sample, and the end.
    """

    names: str
    spans: np.ndarray
    samples: np.ndarray


class TarSource(Source):
    """Samples of tars, which WebDataset calls shards."""

    def __init__(
        self,
        files: Sequence[epath.Path],
        columns: ColumnNames,
        name: str,
        index_dir: str | os.PathLike | None = None,
    ):
        self.name, self.files = name, files
        self._names = [name.removesuffix(".tar") for name in relative_names(files)]
        with futures.ThreadPoolExecutor(8) as pool:
            self._tars = list(pool.map(lambda path: _members(path, index_dir), files))
        self._starts = np.cumsum([0, *(len(tar.samples) - 1 for tar in self._tars)])
        found: dict[str, None] = {}
        for tar in range(len(files)):
            for place in range(min(_COLUMNS_SEEN, len(self._tars[tar].samples) - 1)):
                found |= dict.fromkeys(self._row(tar, place)[1])
        if not found:
            raise ValueError(f"data source {files[0]} has no files with a name like KEY.SUFFIX")
        self.columns = find_columns(found, columns, f"data source {files[0]}")

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: int) -> Example:
        tar = int(np.searchsorted(self._starts, index, side="right")) - 1
        key, row = self._row(tar, index - int(self._starts[tar]))
        return make_example(
            row,
            self.columns,
            own_id=f"{self._names[tar]}/{key}",
            source=self.name,
            folder=str(self.files[tar].parent),
        )

    def _row(self, tar: int, place: int) -> tuple[str, Mapping[str, Any]]:
        members, path = self._tars[tar], str(self.files[tar])
        first, last = members.samples[place : place + 2]
        names = _split(members.names)
        row: dict[str, Any] = {}
        key = ""
        for i in range(first, last):
            key, _, suffix = _split_name(names[i])
            offset, size = (int(x) for x in members.spans[i])
            ref = ImageRef(f"{path}/{names[i]}", path=path, offset=offset, size=size)
            field, _, kind = suffix.lower().rpartition(".")
            if is_picture(suffix):
                row[field or "image"] = ref
            elif kind == "json" and not field:
                row |= _parse(ref)
            elif kind == "txt":
                row[field or "text"] = ref.read().decode(errors="replace")
            elif not field:  # .instruction, .caption, .cls: text without a type
                row[kind] = ref.read().decode(errors="replace")
        return key, row


def _parse(ref: ImageRef) -> Mapping[str, Any]:
    try:
        fields = json.loads(ref.read())
        if not isinstance(fields, dict):
            raise ValueError(f"found {type(fields).__name__}")
    except ValueError as error:
        raise BadSample("malformed record", f"{ref.name} is no JSON object: {error}") from None
    return fields


def _split_name(name: str) -> tuple[str, str, str]:
    """`a/b.target.png` → (`a/b`, `.`, `target.png`)."""
    folder, slash, file = name.rpartition("/")
    key, dot, suffix = file.partition(".")
    return folder + slash + key, dot, suffix


@functools.lru_cache(maxsize=64)
def _split(names: str) -> list[str]:
    return names.split("\n")


def _members(path: epath.Path, index_dir: str | os.PathLike | None) -> _Members:
    """What is in a tar; from `index_dir` if its headers were read before."""
    kept = None
    if index_dir is not None:
        kept = epath.Path(index_dir) / f"tar-{digest(file_identity(path), str(path))}.npz"
        if kept.exists():
            with kept.open("rb") as file, np.load(file) as arrays:
                return _Members(str(arrays["names"]), arrays["spans"], arrays["samples"])
    names, spans, samples, previous = [], [], [], None
    try:
        with path.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            while (member := tar.next()) is not None:
                tar.members = []  # it keeps all of them otherwise
                key, dot, suffix = _split_name(member.name)
                if not member.isfile() or not dot or not suffix or "\n" in member.name:
                    continue
                if key != previous:
                    samples.append(len(names))
                    previous = key
                names.append(member.name)
                spans.append((member.offset_data, member.size))
    except (tarfile.TarError, OSError) as error:
        raise ValueError(
            f"data source {path} is no tar that can be read: {error}; compressed ones must be "
            "unpacked, since members are read at their places"
        ) from None
    members = _Members(
        "\n".join(names),
        np.array(spans, np.int64).reshape(-1, 2),
        np.array([*samples, len(names)], np.int64),
    )
    if kept is not None:
        kept.parent.mkdir(parents=True, exist_ok=True)
        write_file(kept, lambda file: np.savez(file, **dataclasses.asdict(members)))
    return members
