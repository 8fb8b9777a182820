"""What must be known of every sample before training: sizes, defects, the filter's decisions.

Made once and kept in chunks, so a build that was interrupted goes on, and the processes of a run
that share a disk share the work:

    DIR/SOURCE-HASH/00000.npz …      HASH: of the source's files and columns, the filter, and verify
"""

import dataclasses
import hashlib
import io
import json
import os
from collections.abc import Callable, Sequence
from concurrent import futures

import numpy as np
from etils import epath

from kontext_jax.data.filters import Filter
from kontext_jax.data.sources.examples import BadSample, Example, ImageRef, Source, digest
from kontext_jax.pictures.files import decode_picture, picture_size, quiet_pillow
from kontext_jax.pictures.sizes import Size
from kontext_jax.runtime.atomic import write_file
from kontext_jax.terminal import Progress

FILTERED = "filtered: "  # begins the reasons that are no defects
_VERSION = 2
_CHUNK = 4096  # samples


@dataclasses.dataclass(frozen=True)
class Index:
    """All samples of one source, or of several one after the other.

    Attributes:
      ids: uint64 [N], hashes of the ids.
      sizes: int32 [N, 1 + K, 2], width and height in pixels of the target and of up to K
        references; zeros where there is none.
      has_text: bool [N].
      reasons: why samples are not used, a few words that they share.
      reason_of: int16 [N], index into `reasons`; -1 where none is known.
      messages: by number of the sample, where there is more to say than the reason.
    """

    ids: np.ndarray
    sizes: np.ndarray
    has_text: np.ndarray
    reasons: tuple[str, ...]
    reason_of: np.ndarray
    messages: dict[int, str]

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def num_contexts(self) -> np.ndarray:
        return self.sizes[:, 1:].any(-1).sum(-1)


@dataclasses.dataclass(frozen=True)
class _Entry:
    id_hash: int
    sizes: tuple[Size, ...]
    has_text: bool
    reason: str = ""
    message: str = ""


def build_index(
    sources: Sequence[Source],
    *,
    index_dir: str | os.PathLike | None = None,
    filter: Filter | None = None,
    verify: bool = False,
    threads: int = 8,
    process_index: int = 0,
    process_count: int = 1,
    barrier: Callable[[], None] | None = None,
    tell: Callable[[str], None] = print,
) -> Index:
    """Reads the index of `sources`, and makes what of it is missing.

    Args:
      index_dir: folder of the index; None to keep nothing.
      filter, verify: see `DataConfig`.
      threads: number of threads that read at once.
      process_index, process_count, barrier: with a barrier, every process makes its share of what
        is missing and waits for the others before it reads theirs.

    Raises:
      FilterError: the filter failed.
    """
    facts = [str(_VERSION), filter.identity() if filter else "", str(verify)]
    folders = [
        epath.Path(index_dir) / f"{source.name}-{digest(*facts, source.identity())}"
        if index_dir is not None
        else None
        for source in sources
    ]
    quiet_pillow()
    total = sum(len(source) for source in sources)
    progress = _Progress(total, tell if process_index == 0 else lambda _: None)
    with futures.ThreadPoolExecutor(threads) as pool:

        def chunk(source: Source, folder: epath.Path | None, number: int) -> Index:
            rows = range(number * _CHUNK, min((number + 1) * _CHUNK, len(source)))
            if folder is None:
                return _scan(source, rows, filter, verify, pool, progress)
            path = folder / f"{number:05d}.npz"
            if not path.exists():
                made = _scan(source, rows, filter, verify, pool, progress)
                folder.mkdir(parents=True, exist_ok=True)
                write_file(path, lambda file: _save(made, file))
            return _load(path)

        everything = [
            (source, folder, number)
            for source, folder in zip(sources, folders, strict=True)
            for number in range(-(-len(source) // _CHUNK))
        ]
        if barrier is not None:
            if index_dir is not None:
                for i, arguments in enumerate(everything):
                    if i % process_count == process_index:
                        chunk(*arguments)
            barrier()
        return _concatenate([chunk(*arguments) for arguments in everything])


class _Progress(Progress):
    """Tells now and then how many samples were read."""

    def __init__(self, total: int, tell: Callable[[str], None]):
        super().__init__(total, tell, terminal=False)
        self._done = 0

    def advance(self) -> None:
        self._done += 1
        self.update(
            self._done,
            lambda: (
                f"index: {self._done:,} samples read of {self.total:,}, "
                f"{self._done / self.seconds:.0f} a second"
            ),
        )


def _scan(
    source: Source,
    rows: range,
    filter: Filter | None,
    verify: bool,
    pool: futures.Executor,
    progress: _Progress,
) -> Index:
    entries = []
    for entry in pool.map(lambda i: _examine(source, i, filter, verify), rows):
        entries.append(entry)
        progress.advance()
    width = max((len(entry.sizes) for entry in entries), default=1)
    sizes = np.zeros((len(entries), max(1, width), 2), np.int32)
    for i, entry in enumerate(entries):
        sizes[i, : len(entry.sizes)] = np.array(entry.sizes).reshape(-1, 2)
    reasons = tuple(dict.fromkeys(entry.reason for entry in entries if entry.reason))
    numbers = {reason: i for i, reason in enumerate(reasons)} | {"": -1}
    return Index(
        ids=np.array([entry.id_hash for entry in entries], np.uint64),
        sizes=sizes,
        has_text=np.array([entry.has_text for entry in entries], bool),
        reasons=reasons,
        reason_of=np.array([numbers[entry.reason] for entry in entries], np.int16),
        messages={i: entry.message for i, entry in enumerate(entries) if entry.message},
    )


def _examine(source: Source, index: int, filter: Filter | None, verify: bool) -> _Entry:
    try:
        example = source[index]
    except BadSample as error:
        own_id = f"{source.name}/{index}"
        return _Entry(hash_id(own_id), (), True, error.reason, str(error))
    refs = (example.target, *example.contexts)
    reason = message = ""
    try:
        if filter is None and not verify:
            sizes = tuple(_guarded(example, ref, _header) for ref in refs)
        else:
            files = [_guarded(example, ref, ImageRef.read) for ref in refs]
            pixels = [
                _guarded(example, dataclasses.replace(ref, data=data), decode_ref)
                for ref, data in zip(refs, files, strict=True)
            ]
            sizes = tuple((p.shape[1], p.shape[0]) for p in pixels)
            if filter is not None and (dropped := filter(example, files, pixels)) is not None:
                reason = FILTERED + dropped
    except BadSample as error:
        sizes, reason, message = (), error.reason, str(error)
    return _Entry(hash_id(example.id), sizes, bool(example.text), reason, message)


def _header(ref: ImageRef) -> Size:
    with ref.open() as file:
        return picture_size(file, ref.name)


def decode_ref(ref: ImageRef) -> np.ndarray:
    """Pixels uint8 [height, width, 3], upright.

    Raises:
      FileNotFoundError: no such file.
      ValueError: no picture that can be read.
    """
    return decode_picture(io.BytesIO(ref.read()), ref.name)[0]


def _guarded(example: Example, ref: ImageRef, read: Callable):
    """`read(ref)`, with what is wrong with the picture as BadSample."""
    try:
        return read(ref)
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        role = "target" if ref.name == example.target.name else "reference"
        raise BadSample(
            f"missing {role}", f"sample {example.id}: {role} {ref.name}: no such file"
        ) from None
    except (ValueError, PermissionError) as error:
        raise BadSample("unreadable picture", f"sample {example.id}: {error}") from None


def decode_example(example: Example, num_contexts: int) -> list[np.ndarray]:
    """Pixels of the target and of the first references.

    Raises:
      BadSample: a picture that is missing or cannot be decoded.
    """
    refs = (example.target, *example.contexts[:num_contexts])
    return [_guarded(example, ref, decode_ref) for ref in refs]


def hash_id(text: str) -> int:
    """What stands for an id in the index."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def _save(index: Index, file) -> None:
    words = {"reasons": index.reasons, "messages": list(index.messages.items())}
    np.savez(
        file,
        ids=index.ids,
        sizes=index.sizes,
        has_text=index.has_text,
        reason_of=index.reason_of,
        words=np.array(json.dumps(words)),
    )


def _load(path: epath.Path) -> Index:
    try:
        with path.open("rb") as file, np.load(file) as arrays:
            words = json.loads(str(arrays["words"]))
            return Index(
                arrays["ids"],
                arrays["sizes"],
                arrays["has_text"],
                tuple(words["reasons"]),
                arrays["reason_of"],
                {int(i): message for i, message in words["messages"]},
            )
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"index {path} is damaged ({error}); delete it") from error


def _concatenate(parts: Sequence[Index]) -> Index:
    width = max((part.sizes.shape[1] for part in parts), default=1)
    starts = np.cumsum([0, *(len(part) for part in parts)])
    reasons = tuple(dict.fromkeys(reason for part in parts for reason in part.reasons))
    return Index(
        ids=np.concatenate([part.ids for part in parts]),
        sizes=np.concatenate(
            [
                np.pad(part.sizes, ((0, 0), (0, width - part.sizes.shape[1]), (0, 0)))
                for part in parts
            ]
        ),
        has_text=np.concatenate([part.has_text for part in parts]),
        reasons=reasons,
        reason_of=np.concatenate(
            [
                np.array([*map(reasons.index, part.reasons), -1], np.int16)[part.reason_of]
                for part in parts
            ]
        ),
        messages={
            int(start) + i: message
            for start, part in zip(starts, parts, strict=False)
            for i, message in part.messages.items()
        },
    )
