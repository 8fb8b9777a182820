"""What there is to encode: samples that are missing, how to cut them, what room they need."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kontext_jax.data.buckets import Kind
from kontext_jax.data.dataset import Dataset
from kontext_jax.data.encoded.records import Shard, prompt_key, shard_paths
from kontext_jax.data.index import hash_id
from kontext_jax.data.order import sample_places
from kontext_jax.data.sources.examples import Source
from kontext_jax.data.transforms import fit_pictures, names_a_side
from kontext_jax.models.presets import Preset
from kontext_jax.terminal import Progress


@dataclasses.dataclass(frozen=True)
class Cutting:
    """How pictures are cut; the sizes are the data set's."""

    random_crop: bool = False
    flip: bool = False
    variants: int = 1

    def __post_init__(self):
        if self.variants < 1:
            raise ValueError(f"variants is {self.variants}; expected at least 1")
        if self.variants > 1 and not (self.random_crop or self.flip):
            raise ValueError(
                f"{self.variants} variants would all be the same; add --random-crop or --flip, or "
                "leave out --variants"
            )

    def facts(self, buckets: Sequence[tuple[int, int]]) -> dict[str, Any]:
        """What cut pictures depend on beside the files."""
        rule = "cover, cut, Pillow's Lanczos"
        return {**dataclasses.asdict(self), "buckets": list(map(list, buckets)), "resize": rule}

    def cut(
        self, pictures: Sequence[np.ndarray], kind: Kind, text: str, id_hash: int, variant: int
    ) -> list[np.ndarray]:
        """One variant of a sample's pictures: the same whenever it is asked for."""
        x, y, coin = sample_places(0, id_hash, variant)
        mirrored = self.flip and coin < 0.5 and not names_a_side(text)
        return fit_pictures(pictures, kind, (x, y) if self.random_crop else (0.5, 0.5), mirrored)


@dataclasses.dataclass(frozen=True)
class Stored:
    """What finished shards hold, of all processes.

    Attributes:
      text_of: (hash of a sample's id, variant) → key of its prompt.
      texts: keys of prompts whose features are there.
      sources: name → identities of the data at the times of encoding.
    """

    text_of: Mapping[tuple[int, int], str]
    texts: frozenset[str]
    sources: Mapping[str, set[str]]


def read_stored(directory: Path, made_by: str) -> Stored:
    """Looks into every finished shard.

    Raises:
      CacheError: one is damaged or made in another way.
    """
    text_of, texts, sources = {}, set(), {}
    for _, _, path in shard_paths(directory):
        shard = Shard(path, made_by)
        for entry in shard.samples.values():
            text_of[hash_id(entry.id), entry.variant] = entry.text
        texts |= set(shard.texts.values())
        for name, identity in shard.sources.items():
            sources.setdefault(name, set()).add(identity)
    return Stored(text_of, frozenset(texts), sources)


@dataclasses.dataclass(frozen=True)
class Job:
    """A sample of which something is missing: variants, or with none its text features alone."""

    number: int  # in the data set
    kind: Kind
    variants: tuple[int, ...]


def list_jobs(
    dataset: Dataset,
    stored: Stored,
    num_variants: int,
    process_index: int = 0,
    process_count: int = 1,
) -> tuple[list[Job], int]:
    """What a process still has to do, by sizes; and how many (sample, variant) it did before.

    Samples are shared by the hash of their id, whatever else is in the data.

    Raises:
      ValueError: two samples have the same id, or stored ones had another prompt.
    """
    numbers = np.flatnonzero(dataset.kind_of >= 0)
    _check_unique(dataset, numbers)
    changed = {
        source.name
        for source in dataset.sources
        if stored.sources.get(source.name, set()) - {source.identity()}
    }
    share = numbers[dataset.index.ids[numbers] % np.uint64(process_count) == process_index]
    share = share[np.argsort(dataset.kind_of[share], kind="stable")]
    jobs, num_done = [], 0
    for number in share.tolist():
        id_hash = int(dataset.index.ids[number])
        done = [v for v in range(num_variants) if (id_hash, v) in stored.text_of]
        num_done += len(done)
        missing = tuple(v for v in range(num_variants) if v not in done)
        if done and _source_of(dataset, number).name in changed:
            _check_prompt(dataset, number, stored.text_of[id_hash, done[0]])
        lacks_text = any(stored.text_of[id_hash, v] not in stored.texts for v in done)
        if missing or lacks_text:
            jobs.append(Job(number, dataset.kinds[dataset.kind_of[number]], missing))
    return jobs, num_done


def _source_of(dataset: Dataset, number: int) -> Source:
    return dataset.sources[int(np.searchsorted(dataset.starts, number, side="right")) - 1]


def _check_unique(dataset: Dataset, numbers: np.ndarray) -> None:
    ids, counts = np.unique(dataset.index.ids[numbers], return_counts=True)
    if (counts > 1).any():
        twice = numbers[dataset.index.ids[numbers] == ids[counts > 1][0]]
        raise ValueError(
            f"{int((counts - 1).sum())} samples have an id that another one has too, such as "
            f"{dataset.name(int(twice[0]))}; records are found by their id, so name a column of "
            "unique ones with --id-column (python -m kontext_jax.data.check lists all)"
        )


def _check_prompt(dataset: Dataset, number: int, key: str) -> None:
    example = dataset.example(number)
    if prompt_key(example.text) != key:
        raise ValueError(
            f"sample {example.id} had another text when it was encoded, now “{example.text[:80]}”: "
            "the data has changed; encode it into another folder"
        )


class ImageProgress(Progress):
    """How many examples are done, images a second and the time left; called with the number done.

    Args:
      total: number of examples, or of crops of them.
      images_per: pictures in one of them, on average.
      verb: what happened to those that are done.
      options: see `Progress`.
    """

    def __init__(self, total: int, images_per: float, *, verb: str = "encoded", **options):
        super().__init__(total, **options)
        self._images_per, self._verb = images_per, verb

    def __call__(self, done: int) -> None:
        def line() -> str:
            rate = done * self._images_per / self.seconds
            return (
                f"{self._verb} {done:,} of {self.total:,} · {rate:.3g} images/s · "
                f"{self.time_left(done)}"
            )

        self.update(done, line)


def bytes_needed(
    preset: Preset, itemsize: int, max_text_tokens: int, jobs: Sequence[Job]
) -> tuple[int, int]:
    """(bytes of the latents of `jobs`, bytes of the text features of one prompt)."""
    cell = preset.vae.downsampling
    values = sum(
        len(job.variants) * (width // cell) * (height // cell) * preset.vae.z_channels
        for job in jobs
        for width, height in (job.kind.target, *job.kind.contexts)
    )
    text = max_text_tokens * preset.t5.d_model + preset.clip.hidden_size
    return values * itemsize, text * itemsize
