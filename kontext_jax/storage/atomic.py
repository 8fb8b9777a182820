"""Files and folders that appear under their names only when they are whole."""

import json
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from etils import epath


def write_json(path: Path, value: Any) -> None:
    """Writes `value` beside `path`, then renames."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(value, indent=2) + "\n", "utf-8")
    partial.replace(path)


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


def is_local(path: epath.PathLike) -> bool:
    """Whether a path is of this machine's file system, not gs://…"""
    return "://" not in os.fspath(path)


def write_text(path: epath.Path, text: str) -> None:
    """Writes a small file that is whole and durable once it has its name."""
    if not is_local(path):
        path.write_text(text)
        return
    partial = f"{os.fspath(path)}.partial"
    with open(partial, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


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
