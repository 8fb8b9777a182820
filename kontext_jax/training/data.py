"""Training and held-out batches of a run."""

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from kontext_jax.batches import Batches
from kontext_jax.data.config import DataConfig
from kontext_jax.data.encoded.batches import CachedBatches, EncodedCache
from kontext_jax.data.loader import make_loader
from kontext_jax.data.mixing import MixedBatches
from kontext_jax.runtime.processes import from_all
from kontext_jax.training.config import TrainConfig

EVAL_SEED = 0  # one order of the held-out examples for all runs, so that their losses compare


@dataclasses.dataclass(frozen=True)
class Reading:
    """How this process reads.

    Attributes:
      share: (index, count) of its part of a global batch, see `sharding.process_share`.
      index_dir: folder for the index of the sources.
      tell: called with lines for the user.
    """

    share: tuple[int, int]
    index_dir: epath.Path
    tell: Callable[[str], None]


class OpenData(NamedTuple):
    """Batches without end.

    Attributes:
      batches: batches of pictures, or of encoded examples.
      examples_per_epoch: number of examples, weights of sources included.
      null_text: txt [T, D] and vec [D] of the empty prompt; None where the examples are pictures.
    """

    batches: Batches
    examples_per_epoch: float
    null_text: tuple[np.ndarray, np.ndarray] | None


def _open(
    data: DataConfig,
    reading: Reading,
    batch_size: int,
    seed: int,
    facts: Callable[[], dict[str, Any]],
) -> OpenData:
    index, count = reading.share
    if data.cache:
        expected = facts()
        folders = [EncodedCache(data.cache, expected)]
        shares = [1.0]
        if data.synthetic_cache:
            folders.append(EncodedCache(data.synthetic_cache, expected))
            shares = [1 - data.synthetic_share, data.synthetic_share]
        streams = [
            CachedBatches(
                cache,
                batch_size=batch_size,
                seed=seed,
                fraction_with_references=data.fraction_with_references,
                reference_dropout=data.reference_dropout,
                process_index=index,
                process_count=count,
                threads=data.threads,
                prefetch=data.prefetch,
            )
            for cache in folders
        ]
        batches = streams[0] if len(streams) == 1 else MixedBatches(streams, shares, seed)
        return OpenData(batches, sum(map(len, folders)), folders[0].null_text())
    loader = make_loader(
        data,
        batch_size=batch_size,
        seed=seed,
        process_index=index,
        process_count=count,
        index_dir=reading.index_dir,
        barrier=lambda: from_all(""),
        tell=reading.tell,
    )
    order = loader.order
    per_epoch = sum(order.examples_per_epoch(k) for k in range(len(order.kinds)))
    return OpenData(loader, per_epoch, None)


@contextmanager
def open_data(
    config: TrainConfig, reading: Reading, facts: Callable[[], dict[str, Any]]
) -> Iterator[OpenData]:
    """The batches of the run's steps, until the context ends.

    Args:
      facts: () → the facts of the frozen networks that must have made the encoded examples.

    Raises:
      ValueError: there are none, they are damaged, or this mix of them cannot be.
    """
    data = _open(config.data, reading, config.batch_size, config.seed, facts)
    with closing(data.batches):
        yield data


def held_out_batches(
    config: TrainConfig, reading: Reading, facts: Callable[[], dict[str, Any]]
) -> list[Any]:
    """The examples for evaluation, in host memory; none if nothing asks for them.

    Raises:
      ValueError: see `open_data`.
    """
    if not (config.eval.every_steps or config.eval.sample_every_steps):
        return []
    batch_size = config.eval.batch_size or config.batch_size // config.accumulate_steps
    data = _open(config.eval_data, reading, batch_size, EVAL_SEED, facts)
    with closing(data.batches):
        return [next(data.batches) for _ in range(config.eval.num_batches)]
