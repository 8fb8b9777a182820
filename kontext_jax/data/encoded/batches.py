"""Training batches from encoded samples on disk (`python -m kontext_jax.data.encode`).

The order, the kinds and the dropping of references are `order`'s, with the samples of the folder as
examples, sorted by id: neither the shards nor who wrote them matter. A record is found by its
sample's id and says its id itself, so latents, references and text always belong together.

The threads are our own, not grain's as for pictures. A record is nearly nothing but copying of
memory: with grain, whose order and resuming were the same in all tests, a second of CPU time gave
150 pairs of 1024² in place of 270, and a read of rows in place of batches gave 190.
"""

import collections
import concurrent.futures
import hashlib
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kontext_jax.batches import EncodedBatch
from kontext_jax.data.buckets import Kind
from kontext_jax.data.encoded.folder import (
    check_complete,
    check_facts,
    local_folder,
    read_manifest,
    read_null_text,
)
from kontext_jax.data.encoded.records import CacheError, SampleEntry, Shard, shard_paths
from kontext_jax.data.order import Order, PlannedBatch, resumed_step, sample_places

_MAX_OPEN_SHARDS = 256  # below the usual limits of open files


class EncodedCache:
    """A folder of encoded samples, open for reading; safe in threads.

    Args:
      directory: the folder.
      expected: facts that must be among those of the folder, usually `encoder_facts` of the run's
        networks; None for whatever is there.

    Attributes:
      facts: what made the records.
      ids: names of the samples, sorted.
      kinds: sizes that samples share; `kind_of` [N] says which is whose.

    Raises:
      CacheError: the folder is damaged, not complete, or was made in another way than expected.
    """

    def __init__(self, directory: str | Path, expected: Mapping[str, Any] | None = None):
        self.directory = local_folder(directory)
        manifest = read_manifest(self.directory)
        self.facts, self._made_by = manifest["facts"], manifest["hash"]
        if expected is not None:
            check_facts(self.directory, self.facts, expected)
        self._paths = [path for _, _, path in shard_paths(self.directory)]
        self._shards: collections.OrderedDict[int, Shard] = collections.OrderedDict()
        self._lock = threading.Lock()
        found: dict[str, dict[int, tuple[SampleEntry, int, int]]] = {}
        texts: dict[str, tuple[int, int]] = {}
        for number in range(len(self._paths)):
            shard = self._shard(number)
            for place, entry in shard.samples.items():
                found.setdefault(entry.id, {}).setdefault(entry.variant, (entry, number, place))
            for place, key in shard.texts.items():
                texts.setdefault(key, (number, place))
        check_complete(self.directory, sum(map(len, found.values())))
        if not found:
            raise CacheError(f"{self.directory} holds no samples; was everything filtered out?")
        self.ids = sorted(found)
        self._index(found, texts)

    def _index(self, found, texts: Mapping[str, tuple[int, int]]) -> None:
        first = [found[id_][min(found[id_])][0] for id_ in self.ids]
        for entry in first:
            if entry.text not in texts:
                raise CacheError(
                    f"{self.directory}: sample {entry.id} has no text features; run the same "
                    "`python -m kontext_jax.data.encode` again, which makes what is missing"
                )
        self.kinds: tuple[Kind, ...] = tuple(sorted({entry.kind for entry in first}))
        number_of = {kind: k for k, kind in enumerate(self.kinds)}
        self.kind_of = np.array([number_of[entry.kind] for entry in first])
        self._texts = np.array([texts[entry.text] for entry in first])  # [N, 2] shard, place
        self._samples = [  # variants of each: shard, place
            np.array([place for _, (_, *place) in sorted(found[id_].items())]) for id_ in self.ids
        ]
        digest = hashlib.blake2b(self._made_by.encode(), digest_size=16)
        for id_, entry, variants in zip(self.ids, first, self._samples, strict=True):
            digest.update(f"{id_}\0{entry.kind}\0{entry.text}\0{len(variants)}\n".encode())
        self.identity = digest.hexdigest()

    def __len__(self) -> int:
        return len(self.ids)

    def num_variants(self, sample: int) -> int:
        """Crops that are stored of the sample at this place of `ids`."""
        return len(self._samples[sample])

    def latents(self, sample: int, variant: int) -> tuple[np.ndarray, tuple[np.ndarray, ...]]:
        """x0 [h, w, Z] and references of the sample at this place of `ids`.

        Raises:
          CacheError: its record is damaged or belongs to another sample.
        """
        number, place = self._samples[sample][variant]
        shard = self._shard(int(number))
        found = shard.samples[int(place)].id
        if found != self.ids[sample]:  # the shard was replaced while it was open
            raise CacheError(f"{shard.path}: found sample {found}, expected {self.ids[sample]}")
        return shard.read_sample(int(place))

    def text(self, sample: int) -> tuple[np.ndarray, np.ndarray]:
        """txt [T, D] and vec [D] of the sample's prompt.

        Raises:
          CacheError: the record is damaged or belongs to another prompt.
        """
        number, place = self._texts[sample]
        return self._shard(int(number)).read_text(int(place))

    def prompt(self, sample: int) -> str:
        """The prompt itself, of the sample at this place of `ids`."""
        number, place = self._texts[sample]
        return self._shard(int(number)).read(int(place))[0]["prompt"]

    def null_text(self) -> tuple[np.ndarray, np.ndarray]:
        """txt [T, D] and vec [D] of the empty prompt."""
        return read_null_text(self.directory, self._made_by)

    def _shard(self, number: int) -> Shard:
        """An open shard; those used last stay open, and nobody loses one that is in use."""
        with self._lock:
            if number in self._shards:
                self._shards.move_to_end(number)
                return self._shards[number]
        shard = Shard(self._paths[number], self._made_by)
        with self._lock:
            self._shards[number] = shard
            if len(self._shards) > _MAX_OPEN_SHARDS:
                self._shards.popitem(last=False)
        return shard


class CachedBatches:
    """`Batches` of `EncodedBatch`es from a folder of encoded samples, read ahead by threads.

    Args:
      cache: the open folder.
      batch_size: examples of a global batch.
      seed: seed of the order, see `order`.
      fraction_with_references, reference_dropout: see `DataConfig`.
      process_index: which of `process_count` equal shares of a global batch to give.
      threads: number of threads that read records.
      prefetch: batches to have ready.

    Attributes:
      ids: sample ids of the batch given last, for whoever wants to look.

    Raises:
      ValueError: the batch cannot be shared equally, or the mix asks for what is not there.
    """

    def __init__(
        self,
        cache: EncodedCache,
        *,
        batch_size: int,
        seed: int,
        fraction_with_references: float = 1.0,
        reference_dropout: float = 0.0,
        process_index: int = 0,
        process_count: int = 1,
        threads: int = 8,
        prefetch: int = 4,
    ):
        if batch_size % process_count:
            raise ValueError(
                f"batch_size {batch_size} is not divisible by the {process_count} processes that "
                "share it"
            )
        self._cache = cache
        self._order = Order(
            cache.kind_of,
            cache.kinds,
            batch_size=batch_size,
            seed=seed,
            fraction_with_references=fraction_with_references,
            reference_dropout=reference_dropout,
        )
        self._facts = {
            "batch_size": batch_size,
            "seed": seed,
            "fraction_with_references": fraction_with_references,
            "reference_dropout": reference_dropout,
            "examples": cache.identity,
        }
        share = batch_size // process_count
        self._rows = range(process_index * share, (process_index + 1) * share)
        self._step, self._prefetch = 0, prefetch
        self._readers = concurrent.futures.ThreadPoolExecutor(threads, "cache-record")
        self._makers = concurrent.futures.ThreadPoolExecutor(1, "cache-batch")
        self._ready: collections.deque[concurrent.futures.Future] = collections.deque()
        self.counts: dict[str, int] = {}
        self.ids: tuple[str, ...] = ()

    def __iter__(self) -> "CachedBatches":
        return self

    def __next__(self) -> EncodedBatch:
        while len(self._ready) <= self._prefetch:
            step = self._step + len(self._ready)
            self._ready.append(self._makers.submit(self._make, step))
        self.ids, epoch, batch = self._ready.popleft().result()
        self._step += 1
        self.counts["epochs"] = max(epoch + 1, self.counts.get("epochs", 0))
        return batch

    def state(self) -> dict[str, Any]:
        return {"step": self._step, **self._facts}

    def restore(self, state: dict[str, Any]) -> None:
        step = resumed_step(state, self._facts, "these encoded samples")
        for future in self._ready:
            future.cancel()
        self._ready.clear()
        self._step = step

    def close(self) -> None:
        self._makers.shutdown(cancel_futures=True)
        self._readers.shutdown(cancel_futures=True)

    def _make(self, step: int) -> tuple[tuple[str, ...], int, EncodedBatch]:
        planned = self._order.batch(step)
        samples = planned.examples[self._rows.start : self._rows.stop]
        rows = list(self._readers.map(lambda row: self._read(planned, row), self._rows))
        ids = tuple(self._cache.ids[sample] for sample in samples)
        return ids, planned.epoch, _stack(rows)

    def _read(self, planned: PlannedBatch, row: int):
        sample = int(planned.examples[row])
        place, _, _ = sample_places(self._order.seed, planned.step, row)
        variant = int(place * self._cache.num_variants(sample))
        x0, contexts = self._cache.latents(sample, variant)
        txt, vec = self._cache.text(sample)
        return x0, () if planned.references_dropped else contexts, txt, vec


def _stack(rows: Sequence[tuple]) -> EncodedBatch:
    x0, contexts, txt, vec = zip(*rows, strict=True)
    return EncodedBatch(
        x0=np.stack(x0),
        contexts=tuple(np.stack(context) for context in zip(*contexts, strict=True)),
        txt=np.stack(txt),
        vec=np.stack(vec),
    )
