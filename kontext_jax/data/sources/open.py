"""Data sets on disk: opens a folder or files as examples by number, whatever their format.

What opening reads is small: the metadata file of a folder, the footers of parquet files, the
headers of tars (once: they are kept beside the index), the index of ArrayRecord files.
"""

import os
from collections.abc import Sequence

from etils import epath

from kontext_jax.data.files import walk_files
from kontext_jax.data.sources.array_record import ArrayRecordSource
from kontext_jax.data.sources.crops import CropSource, is_photos
from kontext_jax.data.sources.drawn import DrawnSource, is_scenes
from kontext_jax.data.sources.examples import (
    ColumnNames,
    Source,
)
from kontext_jax.data.sources.folder import FolderSource
from kontext_jax.data.sources.parquet import ParquetSource
from kontext_jax.data.sources.stickers import StickerSource, is_stickers
from kontext_jax.data.sources.tars import TarSource

METADATA_FILES = ("metadata.jsonl", "metadata.csv")
_SUFFIXES = {
    ".parquet": ParquetSource,
    ".tar": TarSource,
    ".array_record": ArrayRecordSource,
    ".arrayrecord": ArrayRecordSource,
}


def open_sources(
    paths: Sequence[str],
    *,
    columns: ColumnNames | None = None,
    index_dir: str | os.PathLike | None = None,
) -> list[Source]:
    """Opens several sources, each under a name of its own; see `open_source`."""
    sources, names = [], set()
    for path in paths:
        name = base = source_name(path)
        number = 2
        while name in names:
            name, number = f"{base}.{number}", number + 1
        names.add(name)
        sources.append(open_source(path, columns=columns, name=name, index_dir=index_dir))
    if columns not in (None, ColumnNames()) and all(
        isinstance(source, ArrayRecordSource) for source in sources
    ):
        raise ValueError(
            f"data source {paths[0]} has no columns to choose from (data.target_column, "
            "context_columns, text_column, id_column): its records say themselves what is what"
        )
    return sources


def source_name(path: str) -> str:
    """What a source is called unless told: its folder, or its file without suffix."""
    if is_scenes(path) or is_photos(path) or is_stickers(path):
        return path.replace(":", "-")
    root = epath.Path(path)
    if root.name in METADATA_FILES or "*" in root.name:
        root = root.parent
    return root.name.removesuffix(root.suffix) if root.suffix in _SUFFIXES else root.name or "data"


def open_source(
    path: str,
    *,
    columns: ColumnNames | None = None,
    name: str = "",
    index_dir: str | os.PathLike | None = None,
) -> Source:
    """Opens a folder, a file, or files by a pattern such as DIR/train-*.parquet.

    A folder holds metadata.jsonl or metadata.csv beside its pictures, or files of one kind:
    .parquet, .tar (WebDataset) or .array_record.

    Args:
      columns: the columns that are named rather than found.
      name: comes before every id; `source_name` if empty.
      index_dir: folder in which the headers of tars are kept.

    Raises:
      FileNotFoundError: nothing there.
      ValueError: no such data in it, or columns that cannot be told.
    """
    if is_scenes(path):
        return DrawnSource(path, name or source_name(path))
    if is_photos(path):
        return CropSource(path, name or source_name(path))
    if is_stickers(path):
        return StickerSource(path, name or source_name(path))
    root, columns, name = epath.Path(path), columns or ColumnNames(), name or source_name(path)
    if "*" in root.name:
        files = sorted(root.parent.glob(root.name))
    elif not root.exists():
        raise FileNotFoundError(f"data source {path}: no such file or folder")
    elif root.is_dir():
        metadata = [root / file for file in METADATA_FILES if (root / file).exists()]
        if len(metadata) > 1:
            raise ValueError(
                f"data source {path} has {' and '.join(METADATA_FILES)}; name the file to use"
            )
        if metadata:
            return FolderSource(metadata[0], columns, name)
        files = sorted(file for file in walk_files(root) if file.suffix in _SUFFIXES)
    elif root.name.endswith((".jsonl", ".csv")):
        return FolderSource(root, columns, name)
    else:
        files = [root]
    kinds = {_SUFFIXES.get(file.suffix) for file in files}
    if len(kinds) != 1 or None in kinds:
        found = ", ".join(sorted({file.suffix or file.name for file in files})) or "no files"
        raise ValueError(
            f"data source {path} has {found}; expected metadata.jsonl or metadata.csv beside "
            f"pictures, or files of one kind: {', '.join(_SUFFIXES)}"
        )
    return kinds.pop()(files, columns, name, index_dir)
