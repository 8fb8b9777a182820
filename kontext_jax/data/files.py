"""Files on disk or in a bucket: looked for in folders, and never left half written."""

import os
import threading
from collections.abc import Callable, Iterator
from typing import BinaryIO

from etils import epath


def walk_files(root: epath.Path) -> Iterator[epath.Path]:
    """All files below a folder."""
    for folder, _, names in root.walk():
        yield from (folder / name for name in names)


def write_beside(path: epath.Path, write: Callable[[BinaryIO], None]) -> None:
    """Writes a file beside its place and renames it; the last of several writers stays."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.parent / f".{path.name}.{os.getpid()}.{threading.get_ident()}.part"
    try:
        with part.open("wb") as file:
            write(file)
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
