"""Versions of this package and of those beneath it, and a hash of this package's sources."""

import functools
import hashlib
import importlib.metadata
import platform
from collections.abc import Iterable
from pathlib import Path

VERSION = "0.2.0"


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Versions of Python and of those packages that are installed, by name."""
    found = {name: version for name in packages if (version := _version(name)) is not None}
    return {"python": platform.python_version()} | found


@functools.cache  # a package's metadata takes a millisecond to read, and every result needs some
def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


@functools.cache
def source_hash() -> str:
    """SHA-256 over the names and contents of this package's Python files."""
    root, digest = Path(__file__).parents[1], hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(f"{path.relative_to(root)}\n".encode() + path.read_bytes())
    return digest.hexdigest()
