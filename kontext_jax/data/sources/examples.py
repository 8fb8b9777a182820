"""An example before anything is decoded, and how the columns of a data set become one.

Every kind of source gives rows: column → value. A picture is a path, its encoded bytes, or what
Hugging Face writes, `{"bytes": …, "path": …}`. Columns are found by the usual names unless they are
named; where several would do, that is an error.
"""

import dataclasses
import hashlib
import io
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, BinaryIO

from etils import epath

from kontext_jax.terminal import did_you_mean

PICTURE_TYPES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "avif", "jp2", "ppm")
# In order of preference: the lower rows only count where there is none of the upper.
TARGET_NAMES = (
    (
        *("target", "target_image", "target_img", "edited", "edited_image", "edited_img"),
        *("output", "output_image", "output_img"),
    ),
    ("image", "img", "file_name", "file"),
)
CONTEXT_NAMES = (  # or their plurals
    *("context", "context_image", "source", "source_image", "source_img"),
    *("input", "input_image", "input_img", "original", "original_image", "original_img"),
    *("reference", "reference_image", "conditioning_image", "control_image"),
)
TEXT_NAMES = ("instruction", "edit_instruction", "edit_prompt", "text", "caption", "prompt")
ID_NAMES = ("id", "sample_id", "__key__")


def is_picture(name: str) -> bool:
    """Whether a file's name ends like a picture's."""
    return name.lower().rpartition(".")[2] in PICTURE_TYPES


class BadSample(ValueError):
    """A sample that cannot be trained on.

    Attributes:
      reason: a few words that are the same for all samples with this defect.
    """

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason

    def __reduce__(self):
        return BadSample, (self.reason, str(self))  # comes from worker processes whole


@dataclasses.dataclass(frozen=True)
class ImageRef:
    """Where the encoded bytes of a picture are: in memory, a file, or a part of a file."""

    name: str  # for messages
    path: str = ""
    offset: int = 0
    size: int = -1  # bytes; -1 for the whole file
    data: bytes | None = None

    def open(self) -> BinaryIO:
        if self.data is not None:
            return io.BytesIO(self.data)
        file = epath.Path(self.path).open("rb")
        if self.size < 0:
            return file
        return io.BufferedReader(_Span(file, self.offset, self.size), 1 << 16)

    def read(self) -> bytes:
        with self.open() as file:
            return file.read()


class _Span(io.RawIOBase):
    """Part of an open file as a file of its own.

    The index reads the header of every picture and no more, so a member of a tar is not read whole.
    """

    def __init__(self, file: BinaryIO, offset: int, size: int):
        self._file, self._offset, self._size, self._at = file, offset, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        self._at = max(0, base + offset)
        return self._at

    def readinto(self, buffer) -> int:
        count = max(0, min(len(buffer), self._size - self._at))
        self._file.seek(self._offset + self._at)
        data = self._file.read(count)
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)

    def close(self) -> None:
        self._file.close()
        super().close()


@dataclasses.dataclass(frozen=True)
class Example:
    """A target, the references it is made from, and the words.

    Attributes:
      id: unique among all sources.
      contexts: references in order; () for text to image.
      text: instruction, or caption without references; may be empty.
      metadata: the other columns, as they are.
    """

    id: str
    target: ImageRef
    contexts: tuple[ImageRef, ...]
    text: str
    metadata: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class ColumnNames:
    """Which column is what; "" and () where not said."""

    target: str = ""
    contexts: tuple[str, ...] = ()
    text: str = ""
    id: str = ""

    def __str__(self) -> str:
        contexts = ", ".join(self.contexts) or "none"
        own_id = f"; id: {self.id}" if self.id else ""
        return f"target: {self.target}; references: {contexts}; text: {self.text}{own_id}"


def find_columns(names: Iterable[str], chosen: ColumnNames, where: str) -> ColumnNames:
    """The columns to use, of those there are.

    Raises:
      ValueError: a chosen column that does not exist, none of the usual names, or several.
    """
    names = tuple(dict.fromkeys(names))
    for option, column in (
        ("target_column", chosen.target),
        ("text_column", chosen.text),
        ("id_column", chosen.id),
        *(("context_columns", column) for column in chosen.contexts),
    ):
        if column and column not in names:
            meant = did_you_mean(column, names, "did you mean {}? ")
            raise ValueError(
                f"{where} has no column {column} (data.{option}); {meant}it has: {', '.join(names)}"
            )
    contexts = chosen.contexts or _find_contexts(
        [n for n in names if n not in (chosen.target, chosen.text, chosen.id)], where
    )
    rest = [n for n in names if n not in contexts]
    target = chosen.target
    for usual in TARGET_NAMES:
        target = target or _only(rest, usual, "target_column", where)
    if not target:
        raise ValueError(
            f"{where} has no column that is known to hold the target; name it by "
            f"data.target_column; it has: {', '.join(names)}"
        )
    rest = [n for n in rest if n != target]
    text = chosen.text or _only(rest, TEXT_NAMES, "text_column", where)
    if not text:
        raise ValueError(
            f"{where} has no column that is known to hold the text; name it by data.text_column; "
            f"it has: {', '.join(names)}"
        )
    own_id = chosen.id or next((n for n in rest if n.lower() in ID_NAMES), "")
    return ColumnNames(target, contexts, text, own_id)


def _plain(name: str) -> str:
    """A column's name without what Hugging Face adds for a file: `target_file_name` → `target`."""
    return re.sub(r"_(file_names?|paths?)$", "", name.lower())


def _only(names: Sequence[str], usual: Sequence[str], option: str, where: str) -> str:
    found = [name for name in names if _plain(name) in usual]
    if len(found) > 1:
        raise ValueError(f"{where} has {' and '.join(found)}; say which by data.{option}")
    return found[0] if found else ""


def _find_contexts(names: Sequence[str], where: str) -> tuple[str, ...]:
    """Columns of references: one of the usual names, or one that is numbered, in order."""
    found: dict[str, list[tuple[int, str]]] = {}
    for name in names:
        match = re.fullmatch(r"(.*?)_?(\d{1,3})", _plain(name))
        base, number = (match[1], int(match[2])) if match else (_plain(name), -1)
        base = base.removesuffix("s")
        if base in CONTEXT_NAMES:
            found.setdefault(base, []).append((number, name))
    if len(found) > 1:
        columns = [name for numbered in found.values() for _, name in sorted(numbered)]
        raise ValueError(
            f"{where} has {' and '.join(columns)}; say which hold references, in order, by "
            "data.context_columns"
        )
    return tuple(name for numbered in found.values() for _, name in sorted(numbered))


def make_example(
    row: Mapping[str, Any], columns: ColumnNames, *, own_id: str, source: str, folder: str
) -> Example:
    """The example of one row.

    Args:
      own_id: the sample's id where no column holds one.
      source: name of the source, which comes before every id.
      folder: what the paths of pictures are relative to.

    Raises:
      BadSample: a value that is no picture or no text.
    """
    if columns.id:
        own_id = str(row.get(columns.id, own_id))
    full_id = f"{source}/{own_id}"

    def pictures(column: str) -> list[ImageRef]:
        value = row.get(column)
        values = value if isinstance(value, list | tuple) else [value]
        name = f"{full_id}:{column}"
        return [_picture(v, name, folder) for v in values if v is not None and v != ""]

    targets = pictures(columns.target)
    if len(targets) != 1:
        raise BadSample(
            "no target",
            f"sample {full_id}: column {columns.target} holds {len(targets)} pictures; expected 1",
        )
    text = row.get(columns.text)
    if isinstance(text, bytes):
        text = text.decode(errors="replace")
    if not isinstance(text, str | None):
        raise BadSample(
            "malformed record",
            f"sample {full_id}: column {columns.text} holds {type(text).__name__}; expected text",
        )
    used = {columns.target, columns.text, columns.id, *columns.contexts}
    return Example(
        id=full_id,
        target=targets[0],
        contexts=tuple(ref for column in columns.contexts for ref in pictures(column)),
        text=(text or "").strip(),
        metadata={name: value for name, value in row.items() if name not in used},
    )


def _picture(value: Any, name: str, folder: str) -> ImageRef:
    if isinstance(value, ImageRef):
        return value
    if isinstance(value, Mapping):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes):
        return ImageRef(name, data=value)
    if isinstance(value, str):
        path = str(epath.Path(folder) / value)
        return ImageRef(path, path=path)
    raise BadSample(
        "malformed record",
        f"{name} holds {type(value).__name__}; expected a path, bytes, or both under those names",
    )


class Source:
    """Examples by number, each read when it is asked for; from any thread or process.

    Attributes:
      name: short; comes before every id.
      columns: what is what.
      files: what is read.
    """

    name: str
    columns: ColumnNames
    files: Sequence[epath.Path]

    def __len__(self) -> int:
        raise NotImplementedError

    def __getitem__(self, index: int) -> Example:
        """Raises BadSample where a record cannot be understood."""
        raise NotImplementedError

    def identity(self) -> str:
        """Changes when the files do, by their names, sizes and times, or the columns."""
        return digest(str(self.columns), *map(file_identity, self.files))


def file_identity(path: epath.Path) -> str:
    stat = path.stat()
    return f"{path.name} {stat.length} {stat.mtime}"


def digest(*facts: str) -> str:
    return hashlib.blake2b("\n".join(facts).encode(), digest_size=16).hexdigest()


def relative_names(files: Sequence[epath.Path]) -> list[str]:
    """Names of files, with what of their folders tells them apart."""
    paths = [str(path) for path in files]
    common = os.path.commonpath([os.path.dirname(path) for path in paths])
    return [os.path.relpath(path, common) for path in paths]
