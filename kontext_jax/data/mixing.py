"""Batches of several streams in one: each step is taken from one of them, drawn by its share.

Which stream a step takes is a function of (seed, step), so that all processes agree and a run goes
on as it would have.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from kontext_jax.batches import Batches
from kontext_jax.data.order import resumed_step, uniform


class MixedBatches:
    """`Batches` of several streams.

    Args:
      parts: the streams; all are told to go on, and end, together.
      shares: each stream's share of the steps; they sum to 1.
      seed: seed of the draws.
    """

    def __init__(self, parts: Sequence[Batches], shares: Sequence[float], seed: int):
        if len(parts) != len(shares) or abs(sum(shares) - 1) > 1e-6 or min(shares) < 0:
            raise ValueError(f"shares {tuple(shares)} of {len(parts)} streams do not sum to 1")
        self._parts, self._bounds = tuple(parts), np.cumsum(shares)[:-1]
        self._seed, self._step = seed, 0
        self._facts = {"seed": seed, "shares": list(shares)}

    @property
    def counts(self) -> dict[str, int]:
        """Sums over the streams; of "epochs" the most."""
        counts: dict[str, int] = {}
        for part in self._parts:
            for name, count in part.counts.items():
                before = counts.get(name, 0)
                counts[name] = max(before, count) if name == "epochs" else before + count
        return counts

    def part_of(self, step: int) -> int:
        """Which stream step `step`, from 0, takes."""
        return int(np.searchsorted(self._bounds, uniform(self._seed, "part", step), side="right"))

    def __iter__(self) -> "MixedBatches":
        return self

    def __next__(self) -> Any:
        batch = next(self._parts[self.part_of(self._step)])
        self._step += 1
        return batch

    def state(self) -> dict[str, Any]:
        return {
            "step": self._step,
            **self._facts,
            "parts": [part.state() for part in self._parts],
        }

    def restore(self, state: dict[str, Any]) -> None:
        step = resumed_step(state, self._facts, "these mixed examples")
        for part, position in zip(self._parts, state["parts"], strict=True):
            part.restore(position)
        self._step = step

    def close(self) -> None:
        for part in self._parts:
            part.close()
