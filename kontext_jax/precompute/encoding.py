"""Encodes the samples of a data set into records on disk, each process its share.

Samples of the same sizes are read ahead by threads, encoded in batches of one fixed size (the last
one of a size is filled up) and written while the next batch computes. What finished shards hold is
not made again, so a run that was killed goes on where its last shard ended.
"""

import collections
import dataclasses
import functools
import itertools
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent import futures
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from kontext_jax.data.buckets import Kind
from kontext_jax.data.dataset import Dataset
from kontext_jax.data.encoded.records import SampleEntry, ShardWriter, UnwritableError, prompt_key
from kontext_jax.data.sources.examples import BadSample
from kontext_jax.models.conditioning import Encoders, encode_pictures, encode_prompts, make_encoders
from kontext_jax.models.tokenizing import Tokenizers
from kontext_jax.precompute.jobs import Cutting, Job
from kontext_jax.terminal import Tell, size_text
from kontext_jax.weights.bundle import ModelBundle
from kontext_jax.weights.encoders import load_encoder_params

# How the commands that write encoded examples end, see `terminal.exit_status`.
FAILED = (UnwritableError, FloatingPointError)
STOPPED = "stopped; the same command goes on after the last whole file"
_TOLD = 5  # bad samples of each reason


class Networks:
    """The frozen encoders on this process's devices, for batches of one fixed size.

    Args:
      bundle: the weights.
      dtype: dtype in which they compute, and of their results.
      batch_size: split over the devices.
      max_text_tokens: longest text of T5 in tokens.
      tell: is given a line for each prompt that T5 sees only the beginning of.

    Raises:
      ValueError: the devices cannot share the batch, or tokenizers and encoders do not fit.
    """

    def __init__(
        self,
        bundle: ModelBundle,
        dtype: jax.typing.DTypeLike,
        batch_size: int,
        max_text_tokens: int,
        tell: Tell,
    ):
        devices = jax.local_devices()
        if batch_size < 1 or batch_size % len(devices):
            raise ValueError(
                f"batch_size {batch_size} is not divisible by the {len(devices)} devices of this "
                f"process; the nearest that is: {max(1, round(batch_size / len(devices)))}"
                f"×{len(devices)}"
            )
        mesh = Mesh(np.array(devices), ("data",))
        self._split = NamedSharding(mesh, PartitionSpec("data"))
        self.batch_size, self.max_text_tokens, self._tell = batch_size, max_text_tokens, tell
        self.tokenizers = Tokenizers(**bundle.tokenizer_dirs)
        self.tokenizers.check_fit(bundle.preset.t5, bundle.preset.clip)
        self.encoders: Encoders = make_encoders(bundle.preset, dtype)
        self.params = load_encoder_params(bundle, dtype, NamedSharding(mesh, PartitionSpec()))

    def encode_pictures(self, pictures: Sequence[np.ndarray]) -> jax.Array:
        """Latents [batch_size, …] of up to batch_size pictures of one size; under way."""
        pixels = jax.device_put(np.stack(_filled(pictures, self.batch_size)), self._split)
        return _encode_pictures(self.encoders, self.params, pixels)

    def encode_prompts(self, prompts: Sequence[str]) -> tuple[jax.Array, jax.Array]:
        """txt and vec [batch_size, …] of up to batch_size prompts; under way."""
        ids, notices = self.tokenizers.tokenize(prompts, self.max_text_tokens)
        for notice in notices:
            self._tell(notice)
        ids = jax.tree.map(lambda rows: np.stack(_filled(rows, self.batch_size)), ids)
        return _encode_prompts(self.encoders, self.params, jax.device_put(ids, self._split))

    def null_text(self) -> tuple[np.ndarray, np.ndarray]:
        """txt [T, D] and vec [D] of the empty prompt."""
        txt, vec = self.encode_prompts([""])
        return np.asarray(txt[0]), np.asarray(vec[0])


_encode_pictures = jax.jit(encode_pictures, static_argnums=0)
_encode_prompts = jax.jit(encode_prompts, static_argnums=0)


def _filled(rows: Sequence[np.ndarray], count: int) -> list[np.ndarray]:
    """`rows`, the last one repeated up to `count`."""
    return [*rows, *[rows[-1]] * (count - len(rows))]


@dataclasses.dataclass(frozen=True)
class _Sample:
    """A sample as it was read: its cut pictures by variant."""

    id: str
    kind: Kind
    text: str
    pictures: Mapping[int, Sequence[np.ndarray]]


class Encoding:
    """One process's work; `run` does it, and `counts` tells of what was skipped."""

    def __init__(
        self,
        dataset: Dataset,
        cutting: Cutting,
        networks: Networks,
        writer: ShardWriter,
        texts: frozenset[str],
        *,
        stop_at_bad: bool,
        threads: int,
        tell: Tell,
    ):
        self._dataset, self._cutting, self._networks = dataset, cutting, networks
        self._writer, self._texts = writer, set(texts)
        self._stop_at_bad, self._threads, self._tell = stop_at_bad, threads, tell
        self.counts: collections.Counter[str] = collections.Counter()
        self.num_written = 0

    def run(self, jobs: Sequence[Job], on_progress: Callable[[int], None]) -> None:
        """Encodes and writes everything that `jobs` ask for.

        Args:
          on_progress: is given the number of (sample, variant) that are dealt with.

        Raises:
          BadSample: a sample that cannot be read, where that is to stop everything.
          FloatingPointError: what the encoders gave is not finite.
        """
        pending: Callable[[], None] | None = None
        dealt_with = 0
        with futures.ThreadPoolExecutor(self._threads, "encode-read") as pool:
            for rows in self._batches(pool, jobs):
                write_next = self._start(rows)
                if pending is not None:
                    pending()
                pending = write_next
                dealt_with += len(rows)
                on_progress(dealt_with + sum(self.counts.values()))
        if pending is not None:
            pending()
        self._writer.finish_shard()

    def _batches(
        self, pool: futures.Executor, jobs: Sequence[Job]
    ) -> Iterator[list[tuple[_Sample, int | None]]]:
        """Up to batch_size (sample, variant) of one kind; variant None: the text alone."""
        for _, group in itertools.groupby(jobs, key=lambda job: job.kind):
            rows: list[tuple[_Sample, int | None]] = []
            for sample in self._read_ahead(pool, list(group)):
                rows += [(sample, variant) for variant in sample.pictures or (None,)]
                while len(rows) >= self._networks.batch_size:
                    yield rows[: self._networks.batch_size]
                    rows = rows[self._networks.batch_size :]
            if rows:
                yield rows

    def _read_ahead(self, pool: futures.Executor, jobs: Sequence[Job]) -> Iterator[_Sample]:
        ahead = 2 * self._networks.batch_size + self._threads
        reading: collections.deque[tuple[Job, futures.Future]] = collections.deque()
        for job in itertools.chain(jobs, [None] * ahead):
            if job is not None:
                reading.append((job, pool.submit(self._read, job)))
            if reading and (job is None or len(reading) > ahead):
                read_job, future = reading.popleft()
                try:
                    yield future.result()
                except BadSample as error:
                    self._skip(error, max(1, len(read_job.variants)))

    def _read(self, job: Job) -> _Sample:
        dataset = self._dataset
        if not job.variants:
            example = dataset.example(job.number)
            return _Sample(example.id, job.kind, example.text, {})
        example, pictures = dataset.pictures(job.number, len(job.kind.contexts))
        id_hash = int(dataset.index.ids[job.number])
        cut = functools.partial(self._cutting.cut, pictures, job.kind, example.text, id_hash)
        return _Sample(example.id, job.kind, example.text, {v: cut(v) for v in job.variants})

    def _skip(self, error: BadSample, num_variants: int) -> None:
        if self._stop_at_bad:
            raise BadSample(
                error.reason, f"{error}. Mend it, or let it be skipped (--on-bad-sample skip)"
            )
        self.counts[error.reason] += num_variants
        if self.counts[error.reason] <= _TOLD * num_variants:
            self._tell(f"skipped: {error.reason}: {error}")

    def _start(self, rows: Sequence[tuple[_Sample, int | None]]) -> Callable[[], None]:
        """Begins to compute a batch; returns what waits for it and writes it."""
        prompts = [
            prompt
            for prompt in dict.fromkeys(sample.text for sample, _ in rows)
            if prompt_key(prompt) not in self._texts
        ]
        self._texts |= set(map(prompt_key, prompts))
        text = self._networks.encode_prompts(prompts) if prompts else None
        pictured = [(sample, variant) for sample, variant in rows if variant is not None]
        kind = rows[0][0].kind
        columns = (
            [
                self._networks.encode_pictures([s.pictures[v][i] for s, v in pictured])
                for i in range(1 + len(kind.contexts))
            ]
            if pictured
            else []
        )

        def write() -> None:
            names = [sample.id for sample, _ in rows]
            if text is not None:
                txt, vec = (_finite(array, names) for array in text)
                for i, prompt in enumerate(prompts):
                    self._writer.add_text(prompt, txt[i], vec[i])
            latents = [_finite(column, names) for column in columns]
            for i, (sample, variant) in enumerate(pictured):
                entry = SampleEntry(sample.id, variant, sample.kind, prompt_key(sample.text))
                x0, *contexts = (column[i] for column in latents)
                self._writer.add_sample(entry, x0, tuple(contexts))
            self.num_written += len(pictured)

        return write


def _finite(x: jax.Array, names: Sequence[str]) -> np.ndarray:
    array = np.asarray(x)
    if not np.isfinite(array.astype(np.float32)).all():
        raise FloatingPointError(
            "the encoders gave NaN or infinity for one of these samples, so nothing of them was "
            f"written: {', '.join(names)}. Weights or --dtype do not suit them"
        )
    return array


def check_room(directory: Path, needed: int, what: str) -> int:
    """Free bytes of the disk; raises UnwritableError if they are fewer than `needed`."""
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise UnwritableError(
            f"{directory} has {size_text(free)} free, but {what} {size_text(needed)}; make room or "
            "name another --out. What finished shards hold is kept"
        )
    return free
