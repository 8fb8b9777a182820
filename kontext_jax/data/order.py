"""Which examples make the batch of a step: a pure function of the seed and the step.

The examples of one kind form an endless sequence, their order drawn anew every epoch; batch j of
the kind is positions j·B … (j+1)·B−1 of it. So nothing is dropped: what does not fill a batch at
the end of an epoch stands at the front of the kind's next one. An epoch of all kinds with
references, and one of all without, is the batches that are completed in it, shuffled; which of the
two a step takes is drawn from (seed, step). As any step can be asked for, resuming needs its number
alone, and processes agree without a word.
"""

import dataclasses
import functools
import hashlib
import itertools
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from kontext_jax.data.buckets import Kind

_BLOCK = 1 << 16  # steps whose draws are made together
_CACHES = (
    *("_lock", "_shuffled", "_epoch_batches", "_batches_before", "_block_draws"),
    *("_last_epoch", "_draws_before"),
)


@dataclasses.dataclass(frozen=True)
class PlannedBatch:
    """A global batch before anything is read."""

    step: int
    kind_index: int
    kind: Kind  # without references where they are dropped
    examples: np.ndarray  # int64 [B]
    epoch: int  # of the examples with references, or of those without
    references_dropped: bool


class Order:
    """The global batches of a run, in order.

    Args:
      kind_of: int [N], index into `kinds` of every example; -1 leaves it out.
      kinds: what the examples of a batch share.
      batch_size: examples of a global batch, B.
      seed: seed of every draw.
      fraction_with_references, reference_dropout: see `DataConfig`.
      repeats: float [N], how often an epoch shows each example; None for once.

    Raises:
      ValueError: no example for a group of kinds that steps are drawn from.
    """

    def __init__(
        self,
        kind_of: np.ndarray,
        kinds: Sequence[Kind],
        *,
        batch_size: int,
        seed: int,
        fraction_with_references: float = 1.0,
        reference_dropout: float = 0.0,
        repeats: np.ndarray | None = None,
    ):
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; expected at least 1")
        self.kinds = tuple(kinds)
        self.batch_size, self.seed = batch_size, seed
        self.fraction_with_references = fraction_with_references
        self.reference_dropout = reference_dropout
        kind_of = np.asarray(kind_of)
        order = np.argsort(kind_of, kind="stable")
        bounds = np.searchsorted(kind_of[order], np.arange(len(self.kinds) + 1))
        self._members = [order[a:b] for a, b in itertools.pairwise(bounds)]
        repeats = np.ones(len(kind_of)) if repeats is None else np.asarray(repeats, float)
        self._repeats = [repeats[members] for members in self._members]
        # Fractional repeats (0.5, 1.5): a random phase per example decides in which epochs the
        # extra copy comes.
        self._offsets = [
            _random_order(len(m), seed, "offset", str(kind)) / max(1, len(m))
            for m, kind in zip(self._members, self.kinds, strict=True)
        ]
        self._groups = [
            [k for k, kind in enumerate(self.kinds) if bool(kind.contexts) == with_references]
            for with_references in (False, True)
        ]
        for with_references, fraction, remedy in (
            (False, 1 - fraction_with_references, "1 (reference_dropout makes pairs do without)"),
            (True, fraction_with_references, "0"),
        ):
            if fraction and not any(len(self._members[k]) for k in self._groups[with_references]):
                raise ValueError(
                    f"there is no usable example {'with' if with_references else 'without'} "
                    f"references, but fraction_with_references {fraction_with_references:g} asks "
                    f"for some; set it to {remedy}, or add such examples"
                )
        self._start_caches()

    def _start_caches(self) -> None:
        self._lock = threading.RLock()
        # Kept in each object, and not copied with it.
        self._shuffled = functools.lru_cache(2 * len(self.kinds))(self._shuffle)
        self._epoch_batches = functools.lru_cache(4)(self._draw_epoch)
        self._batches_before = functools.lru_cache(64)(self._count_batches_before)
        self._block_draws = functools.lru_cache(4)(self._draw_block)
        self._last_epoch = {False: 0, True: 0}
        self._draws_before = [0]  # steps with references before block i

    def __getstate__(self) -> dict:
        state = self.__dict__.copy()
        for name in _CACHES:
            del state[name]
        return state

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._start_caches()

    def examples_per_epoch(self, kind_index: int) -> float:
        return float(self._repeats[kind_index].sum())

    def batch(self, step: int) -> PlannedBatch:
        """The global batch of a step, counted from 0."""
        with self._lock:
            with_references, ordinal = self._group_of(step)
            epoch, place = self._epoch_of(with_references, ordinal)
            k, j = self._epoch_batches(with_references, epoch)[place]
            examples = self._sequence(int(k), int(j) * self.batch_size, epoch)
        dropped = with_references and uniform(self.seed, "drop", step) < self.reference_dropout
        kind = self.kinds[k]
        if dropped:
            kind = Kind(kind.target)
        return PlannedBatch(step, int(k), kind, examples, epoch, dropped)

    def replacement(self, kind_index: int, example: int, attempt: int) -> int | None:
        """Who stands in for an example that cannot be read; None when all were tried."""
        members = self._members[kind_index]
        if attempt >= len(members):
            return None
        return int(members[(np.searchsorted(members, example) + attempt) % len(members)])

    # Draws of a step.

    def _group_of(self, step: int) -> tuple[bool, int]:
        """Whether a step takes references, and how many steps before it did the same."""
        block, place = divmod(step, _BLOCK)
        while len(self._draws_before) <= block:
            last = len(self._draws_before) - 1
            self._draws_before.append(self._draws_before[-1] + int(self._block_draws(last).sum()))
        draws = self._block_draws(block)
        with_references = bool(draws[place])
        before = self._draws_before[block] + int(draws[:place].sum())
        return with_references, before if with_references else step - before

    def _draw_block(self, block: int) -> np.ndarray:
        """Which steps of a block take references: bool [_BLOCK]."""
        uniform = (_raw(_BLOCK, self.seed, "references", block) >> np.uint64(11)) * 2.0**-53
        return uniform < self.fraction_with_references

    # Epochs.

    def _shown_before(self, k: int, epoch: int) -> np.ndarray:
        """How often each example of a kind was shown before an epoch began: int64 [members]."""
        return np.floor(epoch * self._repeats[k] + self._offsets[k]).astype(np.int64)

    def _length_before(self, k: int, epoch: int) -> int:
        return int(self._shown_before(k, epoch).sum())

    def _count_batches_before(self, with_references: bool, epoch: int) -> int:
        """Batches of a group that are completed before an epoch begins."""
        return sum(
            self._length_before(k, epoch) // self.batch_size for k in self._groups[with_references]
        )

    def _epoch_of(self, with_references: bool, ordinal: int) -> tuple[int, int]:
        """The epoch that completes the `ordinal`-th batch of a group, and its place there."""
        for epoch in (self._last_epoch[with_references], self._last_epoch[with_references] + 1):
            before = self._batches_before(with_references, epoch)
            if before <= ordinal < self._batches_before(with_references, epoch + 1):
                self._last_epoch[with_references] = epoch
                return epoch, ordinal - before
        high = 1
        while self._batches_before(with_references, high) <= ordinal:
            high *= 2
        low = high // 2  # batches before `low` ≤ ordinal < batches before `high`
        while high - low > 1:
            middle = (low + high) // 2
            if self._batches_before(with_references, middle) <= ordinal:
                low = middle
            else:
                high = middle
        self._last_epoch[with_references] = low
        return low, ordinal - self._batches_before(with_references, low)

    def _draw_epoch(self, with_references: bool, epoch: int) -> np.ndarray:
        """(kind, number of its batch) of every batch of an epoch, in order: int64 [batches, 2]."""
        rows = []
        for k in self._groups[with_references]:
            first = self._length_before(k, epoch) // self.batch_size
            last = self._length_before(k, epoch + 1) // self.batch_size
            rows.append(np.stack([np.full(last - first, k), np.arange(first, last)], axis=1))
        rows = np.concatenate(rows)
        return rows[_random_order(len(rows), self.seed, "batches", with_references, epoch)]

    def _shuffle(self, k: int, epoch: int) -> np.ndarray:
        """Examples of a kind in the order of an epoch."""
        counts = self._shown_before(k, epoch + 1) - self._shown_before(k, epoch)
        shown = np.repeat(self._members[k], counts)
        return shown[_random_order(len(shown), self.seed, "order", str(self.kinds[k]), epoch)]

    def _sequence(self, k: int, start: int, epoch: int) -> np.ndarray:
        """B examples of a kind's endless sequence from position `start`, complete in `epoch`."""
        while self._length_before(k, epoch) > start:
            epoch -= 1
        parts, missing = [], self.batch_size
        skip = start - self._length_before(k, epoch)
        while missing:
            part = self._shuffled(k, epoch)[skip : skip + missing]
            parts.append(part)
            missing -= len(part)
            skip, epoch = 0, epoch + 1
        return np.concatenate(parts)


def _raw(count: int, *words) -> np.ndarray:
    """Random uint64 [count] that depend on `words` alone.

    Raw output of the generator: NumPy promises that it stays the same in later versions, which it
    does not for permutations.
    """
    key = hashlib.blake2b(repr(words).encode(), digest_size=16).digest()
    return np.random.Philox(key=np.frombuffer(key, np.uint64)).random_raw(count)


def _random_order(count: int, *words) -> np.ndarray:
    return np.argsort(_raw(count, *words), kind="stable")


def uniform(*words) -> float:
    """A number in [0, 1)."""
    return int(_raw(1, *words)[0] >> np.uint64(11)) * 2.0**-53


def sample_places(seed: int, step: int, row: int) -> tuple[float, float, float]:
    """Three numbers in [0, 1) for one example of a global batch: its crop and its flip."""
    return tuple((_raw(3, seed, "place", step, row) >> np.uint64(11)) * 2.0**-53)


def resumed_step(state: Mapping[str, Any], facts: Mapping[str, Any], examples: str) -> int:
    """The step in a saved position, whose order must be that of `facts`.

    Args:
      examples: what is read, for the message.

    Raises:
      ValueError: the order is another, all differences listed, or there is no step.
    """
    differences = [
        f"{name} was {state.get(name)}, now {value}"
        for name, value in facts.items()
        if state.get(name) != value
    ]
    if differences or not isinstance(state.get("step"), int):
        raise ValueError(
            f"the order of {examples} is not that of the run to go on with: "
            f"{'; '.join(differences) or 'it has no step'}. Go back to what it was, or start a "
            "new run from the weights"
        )
    return state["step"]
