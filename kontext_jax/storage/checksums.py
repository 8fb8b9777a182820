"""What the files of a folder must be, written down when they are whole: sizes and CRC-32.

Storage loses the ends of files and flips bits, and array formats notice few of these: a flipped bit
of an array's data is read back as another number. CRC-32 finds it, at the speed of memory.
"""

import zlib
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor

from etils import epath

BLOCK_BYTES = 2**23
NUM_THREADS = 8
Records = dict[str, tuple[int, int | None]]
"""Path in the folder → size in bytes and CRC-32; None where only the size is known."""


def crc32(path: epath.Path) -> int:
    """CRC-32 of a file's bytes."""
    value = 0
    with path.open("rb") as file:
        while block := file.read(BLOCK_BYTES):
            value = zlib.crc32(block, value)
    return value


def list_files(folder: epath.Path) -> list[str]:
    """Paths of all files below `folder`, relative to it and sorted."""
    found, folders = [], [("", folder)]
    while folders:
        prefix, current = folders.pop()
        for path in current.iterdir():
            if path.is_dir():
                folders.append((f"{prefix}{path.name}/", path))
            else:
                found.append(prefix + path.name)
    return sorted(found)


def record(folder: epath.Path, names: Iterable[str], with_checksums: bool) -> Records:
    """Sizes and checksums of the files `names` of `folder`, read in several threads."""

    def one(name: str) -> tuple[int, int | None]:
        path = folder / name
        return path.stat().length, crc32(path) if with_checksums else None

    names = sorted(names)
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        return dict(zip(names, pool.map(one, names), strict=True))


def find_damage(folder: epath.Path, records: Mapping, check_contents: bool = True) -> list[str]:
    """One line for every file of `records` that is missing, of another size or of other contents.

    Args:
      check_contents: whether to read the files; sizes alone cost nothing.
    """

    def one(item: tuple[str, tuple[int, int | None]]) -> str | None:
        name, (size, checksum) = item
        path = folder / name
        try:
            found = path.stat().length
            if found != size:
                return f"{name}: {found} bytes, expected {size}"
            if check_contents and checksum is not None and (value := crc32(path)) != checksum:
                return f"{name}: CRC-32 {value:08x}, expected {checksum:08x}"
        except FileNotFoundError:
            return f"{name}: missing"
        except OSError as error:
            return f"{name}: unreadable: {error}"
        return None

    with ThreadPoolExecutor(NUM_THREADS) as pool:
        return [line for line in pool.map(one, sorted(records.items())) if line]
