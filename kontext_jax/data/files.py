"""Files on disk or in a bucket, looked for in folders."""

from collections.abc import Iterator

from etils import epath


def walk_files(root: epath.Path) -> Iterator[epath.Path]:
    """All files below a folder."""
    for folder, _, names in root.walk():
        yield from (folder / name for name in names)
