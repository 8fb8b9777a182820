"""Examples from parquet files, as Hugging Face keeps data sets of edits."""

import collections
import os
import threading
from collections.abc import Callable, Sequence
from concurrent import futures

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from etils import epath

from kontext_jax.data.sources.examples import (
    ColumnNames,
    Example,
    Source,
    find_columns,
    make_example,
    relative_names,
)

CACHE_BYTES = 2 << 30


class ParquetSource(Source):
    """Rows of parquet files; pictures are {"bytes", "path"}, bytes, or paths beside the file.

    Parquet gives no single rows: reading one reads its row group. The groups used last are kept,
    `CACHE_BYTES` of them, so a set larger than that is better rewritten by `write_array_record`.
    """

    def __init__(
        self,
        files: Sequence[epath.Path],
        columns: ColumnNames,
        name: str,
        index_dir: str | os.PathLike | None = None,
    ):
        del index_dir  # footers are quickly read
        self.name, self.files = name, files
        self._names = relative_names(files)
        groups, rows, schema = [], [], None
        for i, path in enumerate(files):
            try:
                with path.open("rb") as file, pq.ParquetFile(file) as parquet:
                    found, metadata = parquet.schema_arrow, parquet.metadata
            except (pa.ArrowInvalid, OSError) as error:
                raise ValueError(f"data source {path} is no parquet file: {error}") from None
            if schema is not None and found.names != schema.names:
                raise ValueError(
                    f"data source {path} has the columns {', '.join(found.names)}, {files[0]} has "
                    f"{', '.join(schema.names)}; name files of one kind"
                )
            schema, row = found, 0
            for g in range(metadata.num_row_groups):
                groups.append((i, g, row))
                row += metadata.row_group(g).num_rows
            rows.append(row)
        # File, row group in it, and its first row in the file.
        self._groups = np.array(groups, np.int64).reshape(-1, 3)
        self._num_rows = sum(rows)
        starts = np.cumsum([0, *rows])
        self._starts = starts[self._groups[:, 0]] + self._groups[:, 2]  # among all rows
        self.columns = find_columns(schema.names, columns, f"data source {files[0]}")
        used = {self.columns.target, self.columns.text, self.columns.id, *self.columns.contexts}
        self._read = [f.name for f in schema if f.name in used or _is_small(f.type)]
        self._cache = _Cache(CACHE_BYTES)

    def __len__(self) -> int:
        return self._num_rows

    def __getitem__(self, index: int) -> Example:
        group = int(np.searchsorted(self._starts, index, side="right")) - 1
        file, _, first_row = (int(x) for x in self._groups[group])
        row = index - int(self._starts[group])
        table = self._cache.get(group, lambda: self._load(group))
        return make_example(
            table.slice(row, 1).to_pylist()[0],
            self.columns,
            own_id=f"{self._names[file]}#{first_row + row}",
            source=self.name,
            folder=str(self.files[file].parent),
        )

    def _load(self, group: int) -> pa.Table:
        file, number, _ = (int(x) for x in self._groups[group])
        with self.files[file].open("rb") as opened, pq.ParquetFile(opened) as parquet:
            return parquet.read_row_group(number, columns=self._read)


def _is_small(kind: pa.DataType) -> bool:
    """Whether a column that is not used otherwise is worth reading as metadata."""
    tests = pa.types.is_string, pa.types.is_integer, pa.types.is_floating, pa.types.is_boolean
    return any(test(kind) for test in tests)


class _Cache:
    """Tables that were used last; each is loaded once, however many threads ask for it."""

    def __init__(self, max_bytes: int):
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        self._tables: collections.OrderedDict[int, futures.Future[pa.Table]] = (
            collections.OrderedDict()
        )

    def __reduce__(self):
        return _Cache, (self._max_bytes,)  # a worker process starts with its own, empty

    def get(self, key: int, load: Callable[[], pa.Table]) -> pa.Table:
        with self._lock:
            future = self._tables.get(key)
            ours = future is None
            if ours:
                future = self._tables[key] = futures.Future()
            self._tables.move_to_end(key)
        if ours:
            try:
                future.set_result(load())
            except BaseException as error:
                future.set_exception(error)
                with self._lock:
                    self._tables.pop(key, None)
            self._drop_oldest()
        return future.result()

    def _drop_oldest(self) -> None:
        with self._lock:
            loaded = [(k, f.result().nbytes) for k, f in self._tables.items() if f.done()]
            total = sum(size for _, size in loaded)
            for key, size in loaded[:-1]:
                if total <= self._max_bytes:
                    break
                del self._tables[key]
                total -= size
