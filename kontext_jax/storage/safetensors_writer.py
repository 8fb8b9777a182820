"""Safetensors files written streaming and atomically: declared first, filled in any order.

Nothing appears under its final name before every byte of it has been written.
"""

import collections
import dataclasses
import json
import os
import struct
import threading
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from kontext_jax.runtime.atomic import part_of, put, write_json
from kontext_jax.storage.safetensors_reader import DTYPE_NAMES, TensorInfo

FLUSH_BYTES = 2**20  # smaller slices are left to the kernel
SLICES_ON_THE_WAY = 2


class SafetensorsWriter:
    """Writes one safetensors file whose tensors are declared first and streamed in any order.

    The data goes to a file beside `path`, which takes its name when every byte has been written,
    and is removed when the `with` block ends in an error. Safe in threads.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        tensors: Mapping[str, TensorInfo],
        metadata: Mapping[str, str] | None = None,
    ):
        """Lays the file out; `tensors` gives dtype and shape by name (`start` is ignored)."""
        self.path = Path(path)
        self._part = part_of(self.path)
        header, offset, self.tensors = {}, 0, {}
        if metadata:
            header["__metadata__"] = dict(metadata)
        for name, info in tensors.items():
            header[name] = {
                "dtype": DTYPE_NAMES[info.dtype],
                "shape": list(info.shape),
                "data_offsets": [offset, offset + info.nbytes],
            }
            self.tensors[name] = dataclasses.replace(info, start=offset)
            offset += info.nbytes
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # data starts aligned
        self._data_start = 8 + len(text)
        self._lock = threading.Lock()
        self._on_the_way: collections.deque[tuple[int, int]] = collections.deque()
        self._missing = {name: info.nbytes for name, info in self.tensors.items()}
        self._fd: int | None = os.open(self._part, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
        try:
            os.truncate(self._fd, self._data_start + offset)
            self._pwrite(struct.pack("<Q", len(text)) + text, 0)
        except BaseException:
            self.abort()
            raise

    def _pwrite(self, data, offset: int) -> None:
        view = memoryview(data)
        while len(view):
            done = os.pwrite(self._fd, view, offset)
            view, offset = view[done:], offset + done

    def write(self, name: str, array: np.ndarray, layer: int | None = None) -> None:
        """Writes a whole tensor, or with `layer` the slice at that index of axis 0.

        Each byte must be written exactly once.
        """
        info = self.tensors[name]
        shape = info.shape if layer is None else info.shape[1:]
        if array.dtype != info.dtype or array.shape != shape:
            raise ValueError(
                f"{name}: got {array.dtype} {array.shape}, declared {info.dtype} {shape}"
            )
        array = np.ascontiguousarray(array)
        offset = self._data_start + info.start + (layer or 0) * array.nbytes
        # The kernel lets one thread write to a file at a time and has the others spin for it.
        with self._lock:
            self._pwrite(array.reshape(-1).view(np.uint8), offset)
            self._missing[name] -= array.nbytes
            self._leave_page_cache(offset, array.nbytes)

    def _leave_page_cache(self, offset: int, nbytes: int) -> None:
        """Lets the disk begin at once, and gives back the memory of what it has finished.

        Whoever writes tens of GB fills the machine's memory with pages that nobody reads again, and
        pays for each of them; a few that are used over and over cost less than half.
        """
        if nbytes < FLUSH_BYTES or not hasattr(os, "posix_fadvise"):
            return
        # Advice on bytes that are still on their way starts the writing; repeated, it drops them.
        self._on_the_way.append((offset, nbytes))
        os.posix_fadvise(self._fd, offset, nbytes, os.POSIX_FADV_DONTNEED)
        if len(self._on_the_way) > SLICES_ON_THE_WAY:
            os.posix_fadvise(self._fd, *self._on_the_way.popleft(), os.POSIX_FADV_DONTNEED)

    def finish(self) -> None:
        """Makes the file durable and gives it its name.

        Raises:
          RuntimeError: a tensor has not been written, or more than once.
        """
        wrong = sorted(name for name, count in self._missing.items() if count)
        if wrong:
            self.abort()
            raise RuntimeError(f"{self.path}: not written exactly once: {', '.join(wrong)}")
        os.close(self._fd)
        self._fd = None
        put(self._part, self.path, durable=True)

    def abort(self) -> None:
        """Closes and removes the unfinished file."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None
            self._part.unlink(missing_ok=True)

    def __enter__(self) -> "SafetensorsWriter":
        return self

    def __exit__(self, kind, *exception) -> None:
        if self._fd is None:
            return
        if kind is None:
            self.finish()
        else:
            self.abort()


def plan_shards(
    tensors: Mapping[str, TensorInfo], stem: str, max_shard_bytes: int
) -> dict[str, dict[str, TensorInfo]]:
    """Hugging Face's division into files: in order, a new one where the next would be too large."""
    groups: list[dict[str, TensorInfo]] = [{}]
    used = 0
    for name, info in tensors.items():
        if groups[-1] and used + info.nbytes > max_shard_bytes:
            groups.append({})
            used = 0
        groups[-1][name] = info
        used += info.nbytes
    if len(groups) == 1:
        return {f"{stem}.safetensors": groups[0]}
    return {
        f"{stem}-{i:05d}-of-{len(groups):05d}.safetensors": group
        for i, group in enumerate(groups, 1)
    }


class ShardedWriter:
    """As `SafetensorsWriter`, over as many files as `max_shard_bytes` asks for, with an index."""

    def __init__(
        self,
        folder: str | os.PathLike,
        stem: str,
        tensors: Mapping[str, TensorInfo],
        metadata: Mapping[str, str] | None = None,
        max_shard_bytes: int = 10_000_000_000,
    ):
        """Opens the shards `folder/stem[-i-of-n].safetensors`."""
        self.folder, self.stem = Path(folder), stem
        shards = plan_shards(tensors, stem, max_shard_bytes)
        self._writers: dict[str, SafetensorsWriter] = {}
        self._shard_of = {name: shard for shard, group in shards.items() for name in group}
        self._total = sum(info.nbytes for info in tensors.values())
        try:
            for shard, group in shards.items():
                self._writers[shard] = SafetensorsWriter(self.folder / shard, group, metadata)
        except BaseException:
            self.abort()
            raise

    def write(self, name: str, array: np.ndarray, layer: int | None = None) -> None:
        """As `SafetensorsWriter.write`."""
        self._writers[self._shard_of[name]].write(name, array, layer)

    def abort(self) -> None:
        """Removes the unfinished files."""
        for writer in self._writers.values():
            writer.abort()

    def __enter__(self) -> "ShardedWriter":
        return self

    def __exit__(self, kind, *exception) -> None:
        if kind is not None:
            self.abort()
            return
        try:
            for writer in self._writers.values():
                writer.finish()
        except BaseException:
            self.abort()
            raise
        if len(self._writers) > 1:
            index = {"metadata": {"total_size": self._total}, "weight_map": self._shard_of}
            write_json(self.folder / f"{self.stem}.safetensors.index.json", index)
