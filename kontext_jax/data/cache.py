"""Training batches from encoded samples on disk (`python -m kontext_jax.data.encode`).

The order, the kinds and the dropping of references are `plan`'s, with the samples of the folder as
examples, sorted by id: neither the shards nor who wrote them matter. A record is found by its
sample's id and says its id itself, so latents, references and text always belong together.
"""

import collections
import concurrent.futures
import hashlib
import json
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kontext_jax.data.batches import EncodedBatch
from kontext_jax.data.buckets import Kind
from kontext_jax.data.encoded_records import (
    FORMAT,
    MANIFEST,
    NULL_TEXT,
    CacheError,
    SampleEntry,
    Shard,
    facts_difference,
    facts_hash,
    shard_paths,
    write_beside,
)
from kontext_jax.data.plan import Plan, PlannedBatch, sample_places
from kontext_jax.tensor_files import SafetensorsFile, TensorFileError, TensorInfo
from kontext_jax.tensor_writing import SafetensorsWriter

DONE_NAME = re.compile(r"done-(\d{5})-of-(\d{5})\.json")
_MAX_OPEN_SHARDS = 256  # below the usual limits of open files


def local_folder(path: str | Path) -> Path:
    """The folder as a Path.

    Raises:
      CacheError: it is not on a disk of this machine, where ArrayRecord can read and write.
    """
    if "://" in str(path):
        raise CacheError(
            f"{path}: encoded samples are kept on a local or mounted disk; mount the bucket, or "
            "copy the folder"
        )
    return Path(path)


def read_manifest(directory: Path) -> dict[str, Any]:
    """What `manifest.json` says of a folder of encoded samples.

    Raises:
      CacheError: there is none, or it is damaged or of another format.
    """
    path = directory / MANIFEST
    if not path.is_file():
        raise CacheError(
            f"{directory} is no folder of encoded samples: no {MANIFEST} in it; make one by "
            "`python -m kontext_jax.data.encode --data … --weights … --out DIR`"
        )
    try:
        manifest = json.loads(path.read_text("utf-8"))
        version, facts, stored_hash = manifest["format"], manifest["facts"], manifest["hash"]
    except (ValueError, KeyError, TypeError) as error:
        raise CacheError(f"{path} is damaged: {error!r}") from None
    if version != FORMAT:
        raise CacheError(f"{path} is of format {version}; this version reads format {FORMAT}")
    if facts_hash(facts) != stored_hash:
        raise CacheError(
            f"{path}: its facts hash to {facts_hash(facts)[:12]}, it says {stored_hash[:12]}: the "
            "file was edited; restore it, or encode anew into another folder"
        )
    return manifest


class EncodedCache:
    """A folder of encoded samples, open for reading; safe in threads.

    Args:
      directory: the folder.
      expected: facts that must be among those of the folder, usually `encoder_facts` of the run's
        networks; None for whatever is there.

    Attributes:
      facts: what made the records.
      ids: of the samples, sorted.
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
        _check_complete(self.directory, sum(map(len, found.values())))
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


def check_facts(directory: Path, stored: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Refuses records that were not made as expected.

    Raises:
      CacheError: with one line for each fact that differs.
    """
    here = {section: stored.get(section, {}) for section in expected}
    if lines := facts_difference(here, expected):
        listed = "\n  ".join(lines)
        raise CacheError(
            f"{directory} holds samples that were encoded in another way:\n  {listed}\n"
            "use what they were made with, or encode anew into another folder"
        )


def read_null_text(directory: Path, made_by: str) -> tuple[np.ndarray, np.ndarray]:
    """Features of the empty prompt that belong to the records `made_by`."""
    path = directory / NULL_TEXT
    try:
        with SafetensorsFile(path) as file:
            if file.metadata.get("made_by") != made_by:
                raise CacheError(f"{path} belongs to another folder; restore its own")
            return file.read("txt"), file.read("vec")
    except (OSError, KeyError, TensorFileError) as error:
        raise CacheError(f"{path}: {error}") from None


def start_folder(
    directory: Path,
    partial: Path,
    facts: Mapping[str, Any],
    notes: Mapping[str, Any],
    make_null_text: Callable[[], tuple[np.ndarray, np.ndarray]],
) -> str:
    """Makes a folder of encoded samples of `directory`, or finds that it is one of the same facts.

    Args:
      partial: folder in which this process writes what is not finished.
      facts: what makes the records.
      notes: what else to tell people in the manifest.
      make_null_text: gives txt [T, D] and vec [D] of the empty prompt.

    Returns:
      The hash of the facts, for the records.

    Raises:
      CacheError: the folder was made in another way.
    """
    made_by = facts_hash(facts)
    if (directory / MANIFEST).exists():
        check_facts(directory, read_manifest(directory)["facts"], facts)
        read_null_text(directory, made_by)
        return made_by
    arrays = dict(zip(("txt", "vec"), map(np.asarray, make_null_text()), strict=True))
    infos = {name: TensorInfo(array.dtype, array.shape) for name, array in arrays.items()}
    with SafetensorsWriter(partial / NULL_TEXT, infos, {"made_by": made_by}) as writer:
        for name, array in arrays.items():
            writer.write(name, array)
    (partial / NULL_TEXT).replace(directory / NULL_TEXT)
    manifest = {"format": FORMAT, "hash": made_by, "facts": facts, **notes}
    write_beside(directory / MANIFEST, partial, json.dumps(manifest, indent=2).encode() + b"\n")
    return made_by


def write_done(
    directory: Path, partial: Path, process: int, process_count: int, num_records: int
) -> None:
    """Says that a process has encoded its whole share, of so many samples and variants."""
    path = directory / f"done-{process:05d}-of-{process_count:05d}.json"
    write_beside(path, partial, json.dumps({"records": num_records}).encode())


def withdraw_done(directory: Path, process: int, process_count: int) -> None:
    """Takes back that a process is done, and what runs of other numbers of processes said."""
    for path in directory.iterdir():
        match = DONE_NAME.fullmatch(path.name)
        if match and (int(match[2]) != process_count or int(match[1]) == process):
            path.unlink(missing_ok=True)


def _check_complete(directory: Path, num_records: int) -> None:
    """Raises CacheError unless all processes of some run are done, and their records still here."""
    finished: dict[int, dict[int, int]] = {}
    for path in directory.iterdir():
        if match := DONE_NAME.fullmatch(path.name):
            records = json.loads(path.read_text("utf-8"))["records"]
            finished.setdefault(int(match[2]), {})[int(match[1])] = records
    again = "run the same `python -m kontext_jax.data.encode` again, which makes what is missing"
    for count, records in finished.items():
        if len(records) == count:
            if num_records < sum(records.values()):
                raise CacheError(
                    f"{directory} has {num_records} of {sum(records.values())} encoded samples; "
                    f"{again}"
                )
            return
    missing = "; ".join(
        f"of {count} processes, {', '.join(map(str, sorted(set(range(count)) - done.keys())))} is "
        "not done"
        for count, done in finished.items()
    )
    raise CacheError(f"{directory} is not complete{f' ({missing})' if missing else ''}; {again}")


class CachedBatches:
    """`Batches` of `EncodedBatch`es from a folder of encoded samples, read ahead by threads.

    Args:
      cache: the open folder.
      batch_size: examples of a global batch.
      seed: of the order, see `plan`.
      fraction_with_references, reference_dropout: see `DataConfig`.
      process_index: which of `process_count` equal shares of a global batch to give.
      threads: that read records.
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
        self._plan = Plan(
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
        differences = [
            f"{name} was {state.get(name)}, now {value}"
            for name, value in self._facts.items()
            if state.get(name) != value
        ]
        if differences or not isinstance(state.get("step"), int):
            raise ValueError(
                "the order of these encoded samples is not that of the run to go on with: "
                f"{'; '.join(differences) or 'it has no step'}. Go back to what it was, or start a "
                "new run from the weights"
            )
        for future in self._ready:
            future.cancel()
        self._ready.clear()
        self._step = state["step"]

    def close(self) -> None:
        self._makers.shutdown(cancel_futures=True)
        self._readers.shutdown(cancel_futures=True)

    def _make(self, step: int) -> tuple[tuple[str, ...], int, EncodedBatch]:
        planned = self._plan.batch(step)
        samples = planned.examples[self._rows.start : self._rows.stop]
        rows = list(self._readers.map(lambda row: self._read(planned, row), self._rows))
        ids = tuple(self._cache.ids[sample] for sample in samples)
        return ids, planned.epoch, _stack(rows)

    def _read(self, planned: PlannedBatch, row: int):
        sample = int(planned.examples[row])
        place, _, _ = sample_places(self._plan.seed, planned.step, row)
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
