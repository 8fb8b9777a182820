"""Batches of pictures from disk: the order says which, grain reads and decodes them ahead.

The position in the data is the number of the next step and nothing else, since the order is a
function of it: grain's own state, which depends on the number of workers, is not kept. Each process
reads its rows of the global batch alone.
"""

import collections
import os
from collections.abc import Callable
from typing import Any

import grain
import numpy as np
from absl import flags

from kontext_jax.batches import ImageBatch
from kontext_jax.data.config import DataConfig
from kontext_jax.data.dataset import Dataset, is_bad, open_dataset
from kontext_jax.data.order import Order, PlannedBatch, resumed_step, sample_places
from kontext_jax.data.sources.examples import BadSample, Example
from kontext_jax.data.transforms import fit_pictures, names_a_side
from kontext_jax.pictures.files import quiet_pillow

_MANY = 1 << 40  # steps; more than any run takes


def make_loader(
    config: DataConfig,
    *,
    batch_size: int,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
    index_dir: str | os.PathLike | None = None,
    barrier: Callable[[], None] | None = None,
    tell: Callable[[str], None] = print,
) -> "Loader":
    """The training batches of a config.

    Args:
      batch_size: examples of a global batch.
      seed: seed of order, mix, crops and flips.
      process_index, process_count: this process among those that take different examples.
      index_dir: see `open_dataset`; usually a folder of the run.
      barrier: waits for all processes; with it they share the making of the index.
      tell: is given lines on what was found and skipped.

    Raises:
      ValueError: options that cannot be used, or a batch that processes cannot share.
      BadSample: a bad sample, where the config says to stop.
    """
    if batch_size % process_count:
        raise ValueError(
            f"batch_size {batch_size} is not divisible by the {process_count} processes that read "
            "data; change --config.batch_size"
        )
    if config.cache:
        raise ValueError(
            "data.cache holds encoded examples; they are read by kontext_jax.data.cache"
        )
    dataset = open_dataset(
        config,
        index_dir=index_dir,
        process_index=process_index,
        process_count=process_count,
        barrier=barrier,
        tell=tell,
    )
    order = Order(
        dataset.kind_of,
        dataset.kinds,
        batch_size=batch_size,
        seed=seed,
        fraction_with_references=config.fraction_with_references,
        reference_dropout=config.reference_dropout,
        repeats=dataset.repeats,
    )
    rows = batch_size // process_count
    reader = _Reader(
        dataset, order, config, range(process_index * rows, (process_index + 1) * rows)
    )
    return Loader(reader, config, tell)


class _Reader:
    """This process's rows of all batches, by number: rows of step 0, then of step 1, ….

    What grain calls a data source; workers get a copy.
    """

    def __init__(self, dataset: Dataset, order: Order, config: DataConfig, rows: range):
        self.dataset, self.order, self.config, self.rows = dataset, order, config, rows
        quiet_pillow()

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        quiet_pillow()  # in a worker

    def __len__(self) -> int:
        return _MANY * len(self.rows)

    def __getitem__(self, number: int) -> dict[str, Any]:
        step, place = divmod(number, len(self.rows))
        row = self.rows[place]
        batch = self.order.batch(step)
        example, pictures, notes = self._read(batch, row)
        x, y, coin = sample_places(self.order.seed, step, row)
        mirrored = self.config.flip and coin < 0.5
        if mirrored and names_a_side(example.text):
            mirrored = False
            notes.append(("not mirrored: the text may name a side", ""))
        crop = (x, y) if self.config.random_crop else (0.5, 0.5)
        return {
            "id": example.id,
            "pictures": tuple(fit_pictures(pictures, batch.kind, crop, mirrored)),
            "prompt": example.text,
            "epoch": batch.epoch,
            "notes": tuple(notes),  # (what happened, message or "")
        }

    def _read(
        self, batch: PlannedBatch, row: int
    ) -> tuple[Example, list[np.ndarray], list[tuple[str, str]]]:
        """The example of a row, or the one that stands in for it, and what had to be skipped."""
        planned = number = int(batch.examples[row])
        notes: list[tuple[str, str]] = []
        while True:
            try:
                return *self.dataset.pictures(number, len(batch.kind.contexts)), notes
            except BadSample as error:
                if self.config.on_bad_sample == "stop":
                    raise BadSample(
                        error.reason, f'{error}. Mend it, or set data.on_bad_sample to "skip"'
                    ) from None
                notes.append((f"skipped: {error.reason}", str(error)))
            number = self.order.replacement(batch.kind_index, planned, len(notes))
            if number is None:
                raise BadSample(
                    "unreadable kind",
                    f"none of the {len(notes)} samples of {batch.kind} can be read; {notes[0][1]}",
                )


class Loader:
    """`Batches` of `ImageBatch`es; see `make_loader`.

    Attributes:
      counts: numbers of samples that are not used, by reason, and of what happened since the start
        of this process to the samples that it read.
      order: the global batches.
      dataset: the examples.
    """

    def __init__(self, reader: _Reader, config: DataConfig, tell: Callable[[str], None]):
        self.order, self.dataset = reader.order, reader.dataset
        self.counts = collections.Counter(
            {
                f"skipped: {reason}" if is_bad(reason) else reason: len(found)
                for reason, found in self.dataset.not_used().items()
            }
        )
        self._reader, self._config, self._tell = reader, config, tell
        self._step, self._rows = 0, None
        self._facts = {
            "batch_size": self.order.batch_size,
            "seed": self.order.seed,
            "fraction_with_references": self.order.fraction_with_references,
            "reference_dropout": self.order.reference_dropout,
            "random_crop": config.random_crop,
            "flip": config.flip,
            "examples": self.dataset.fingerprint(),
        }

    def __iter__(self) -> "Loader":
        return self

    def __next__(self) -> ImageBatch:
        if self._rows is None:
            self._rows = _start(self._reader, self._config, self._step)
        rows = [next(self._rows) for _ in self._reader.rows]
        self._step += 1
        for row in rows:
            for what, message in row["notes"]:
                self.counts[what] += 1
                if message:
                    self._tell(f"data: {what}: {message}")
        self.counts["epochs"] = max(self.counts["epochs"], rows[0]["epoch"] + 1)
        target, *contexts = (
            np.stack(pictures) for pictures in zip(*(row["pictures"] for row in rows), strict=True)
        )
        return ImageBatch(
            tuple(row["id"] for row in rows),
            target,
            tuple(contexts),
            tuple(row["prompt"] for row in rows),
        )

    def state(self) -> dict[str, Any]:
        return {"step": self._step, **self._facts}

    def restore(self, state: dict[str, Any]) -> None:
        step = resumed_step(state, self._facts, "this data")
        self.close()
        self._step = step

    def close(self) -> None:
        if self._rows is not None:
            self._rows.close()
            self._rows = None


def _start(reader: _Reader, config: DataConfig, step: int) -> grain.DatasetIterator:
    """Rows from those of `step` on, in order, whoever reads them."""
    first = step * len(reader.rows)
    ahead = max(config.prefetch * len(reader.rows), config.threads)
    rows = grain.MapDataset.source(reader)[first:]
    if not config.workers:
        threads = grain.ReadOptions(num_threads=config.threads, prefetch_buffer_size=ahead)
        return iter(rows.to_iter_dataset(threads))
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # grain's workers ask absl for flags that nobody may have read
    threads = grain.ReadOptions(num_threads=config.threads, prefetch_buffer_size=config.threads)
    processes = grain.MultiprocessingOptions(
        num_workers=config.workers, per_worker_buffer_size=-(-ahead // config.workers)
    )
    return iter(rows.to_iter_dataset(threads).mp_prefetch(processes))
