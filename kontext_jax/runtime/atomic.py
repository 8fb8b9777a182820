"""Files and folders that appear under their names only when they are whole.

Everything is written beside its place and renamed, so that whoever reads a name, or is killed while
writing it, finds the old contents or the new ones. A file is written as `NAME.xxxxxxxx.part`,
under another name by each writer: of several writers the last one stays. What a killed process left
is removed by a later writer of the same file, when it is a day old. A folder is written as
`NAME.partial`, which the next writer of that folder removes. Both names begin with NAME, so that
whoever leaves out a file by the beginning of its name leaves out its unfinished ones.

An object of a bucket (gs://…) appears when it has been sent in full, so nothing is renamed there.
"""

import contextlib
import io
import json
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

if TYPE_CHECKING:
    from etils import epath

LEFTOVER_S = 86_400  # age in seconds at which nobody writes an unfinished file any more


def is_local(path: "epath.PathLike") -> bool:
    """Whether a path is of this machine's file system, not gs://…"""
    return "://" not in os.fspath(path)


def part_of(path: "epath.PathLike") -> Path:
    """A new name beside `path`, under which to write the local file until it is whole.

    Removes what killed processes left of the same file.
    """
    path = Path(path)
    old = re.compile(rf"{re.escape(path.name)}\.[0-9a-f]{{8}}\.part")
    with contextlib.suppress(OSError), os.scandir(path.parent) as entries:
        for entry in entries:
            if old.fullmatch(entry.name) and time.time() - entry.stat().st_mtime > LEFTOVER_S:
                os.unlink(entry.path)
    return path.with_name(f"{path.name}.{secrets.token_hex(4)}.part")


def put(part: "epath.PathLike", path: "epath.PathLike", *, durable: bool = False) -> None:
    """Gives a finished local file its name.

    Args:
      durable: whether the file outlasts a power failure from when this returns.
    """
    if durable:
        _sync(part, os.O_RDWR)
    os.replace(part, path)
    if durable and os.name != "nt":  # where a folder cannot be opened
        _sync(Path(path).parent, os.O_RDONLY)


def _sync(path: "epath.PathLike", flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def replacing(path: "epath.PathLike", *, durable: bool = False) -> Iterator[Path]:
    """Lets the block write a local file under the name it is given; then the file becomes `path`.

    An error in the block removes the unfinished file and leaves `path` as it was.
    """
    part = part_of(path)
    try:
        yield part
        put(part, path, durable=durable)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def write_file(
    path: "epath.PathLike", write: Callable[[BinaryIO], Any], *, durable: bool = False
) -> None:
    """Writes a file of this machine or of a bucket: `write` is given it, open for bytes."""
    if is_local(path):
        with replacing(path, durable=durable) as part, part.open("wb") as file:
            write(file)
        return
    from etils import epath  # takes time

    whole = io.BytesIO()  # an object that is closed by an error would appear as it is
    write(whole)
    epath.Path(path).write_bytes(whole.getvalue())


def write_bytes(path: "epath.PathLike", contents: bytes, *, durable: bool = False) -> None:
    """Writes a file of this machine or of a bucket."""
    write_file(path, lambda file: file.write(contents), durable=durable)


def write_text(path: "epath.PathLike", text: str, *, durable: bool = False) -> None:
    """Writes a file of this machine or of a bucket, in UTF-8."""
    write_bytes(path, text.encode(), durable=durable)


def write_json(path: "epath.PathLike", value: Any) -> None:
    """Writes a value as indented JSON."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_folder(folder: str | os.PathLike, fill: Callable[[Path], None]) -> None:
    """Lets `fill` write into a folder beside `folder`, which takes its name when all is done.

    Raises:
      FileExistsError: `folder` already holds something.
    """
    folder = Path(folder)
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise FileExistsError(f"{folder} already exists; name another folder or remove it")
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        fill(partial)
        partial.replace(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
