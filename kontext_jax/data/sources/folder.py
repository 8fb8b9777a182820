"""Pairs in a folder: pictures and a metadata file."""

import csv
import io
import json
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath

from kontext_jax.data.files import walk_files
from kontext_jax.data.sources.examples import (
    BadSample,
    ColumnNames,
    Example,
    Source,
    digest,
    find_columns,
    is_picture,
    make_example,
)


class FolderSource(Source):
    """Pictures listed in metadata.jsonl or metadata.csv, as in Hugging Face's imagefolder.

    The text is kept as it is and a line parsed when asked for: rows would take ten times the
    memory.
    """

    def __init__(self, metadata: epath.Path, columns: ColumnNames, name: str):
        self.name, self.files = name, [metadata]
        self._metadata, self._folder = str(metadata), str(metadata.parent)
        text = metadata.read_bytes().removeprefix(b"\xef\xbb\xbf")
        self._content = digest(text.hex())
        if metadata.name.endswith(".csv"):
            rows = csv.DictReader(io.StringIO(text.decode(), newline=""))
            text = b"\n".join(json.dumps(row).encode() for row in rows)
        self._text = text
        ends = np.flatnonzero(np.frombuffer(text + b"\n", np.uint8) == ord("\n"))
        starts = np.concatenate([[0], ends[:-1] + 1])
        filled = [i for i, (a, b) in enumerate(zip(starts, ends, strict=True)) if text[a:b].strip()]
        self._starts, self._ends, self._lines = starts[filled], ends[filled], np.array(filled) + 1
        names: dict[str, None] = {}
        problem = "it is empty"
        for i in range(len(self)):
            try:
                names |= dict.fromkeys(self._row(i))
            except BadSample as error:
                problem = str(error)
        if not names:
            raise ValueError(f"data source {metadata} has no sample: {problem}")
        self.columns = find_columns(names, columns, f"data source {metadata}")
        # One target may have been made from several pictures, or told of in several ways.
        targets = [self._target_name(i) for i in range(len(self))]
        self._number_ids = len(set(targets)) < len(targets)

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> Example:
        own_id = self._target_name(index)
        if self._number_ids or not own_id:
            own_id += f"#{self._lines[index]}"
        return make_example(
            self._row(index), self.columns, own_id=own_id, source=self.name, folder=self._folder
        )

    def _target_name(self, index: int) -> str:
        try:
            value = self._row(index).get(self.columns.target)
        except BadSample:
            value = None
        return value if isinstance(value, str) else ""

    def _row(self, index: int) -> Mapping[str, Any]:
        try:
            row = json.loads(self._text[self._starts[index] : self._ends[index]])
            if not isinstance(row, dict):
                raise ValueError(f"found {type(row).__name__}")
        except ValueError as error:
            place = f"{self._metadata}, line {self._lines[index]}"
            raise BadSample("malformed record", f"{place} is no JSON object: {error}") from None
        return row

    def identity(self) -> str:
        return digest(str(self.columns), self._content)

    def unlisted(self) -> list[str]:
        """Pictures in the folder that no sample names."""
        listed = set()
        for i in range(len(self)):
            try:
                example = self[i]
            except BadSample:
                continue
            listed |= {os.path.normpath(r.path) for r in (example.target, *example.contexts)}
        found = (p for p in walk_files(epath.Path(self._folder)) if is_picture(p.name))
        return sorted(
            os.path.relpath(path, self._folder)
            for path in map(os.path.normpath, found)
            if path not in listed
        )
