"""A model's own results as encoded examples: the targets of given ones, made anew.

    x0 = sample(noise of (seed, id, variant), text, references)      guided as the model is

Text and references are copied, so that the records are read as those of `encoding`. Examples of the
same sizes are made in batches of one fixed size; what finished shards hold is not made again.
"""

import dataclasses
import hashlib
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import jax
import numpy as np

from kontext_jax.data.buckets import Kind
from kontext_jax.data.encoded.batches import EncodedCache
from kontext_jax.data.encoded.records import SampleEntry, ShardWriter, prompt_key
from kontext_jax.data.index import hash_id
from kontext_jax.flow.samplers import initial_noise
from kontext_jax.precompute.encoding import Networks
from kontext_jax.sampling.denoising import Denoising
from kontext_jax.sampling.stages import Stages

SHARD_S = 300.0  # a shard is closed when it is so old, since its examples took long to make

Text = tuple[np.ndarray, np.ndarray]
"""txt [T, D] and vec [D]."""


class Givens(Protocol):
    """What results are made from.

    Attributes:
      ids: names of the examples.
    """

    ids: Sequence[str]

    def kind(self, number: int) -> Kind: ...

    def prompt(self, number: int) -> str: ...

    def texts(self, numbers: Sequence[int]) -> list[Text]: ...

    def references(self, number: int) -> tuple[np.ndarray, ...]:
        """Latents [h, w, Z] of each."""

    def null_text(self) -> Text: ...


class CachedGivens:
    """Text and references of encoded examples."""

    def __init__(self, cache: EncodedCache):
        self._cache, self.ids = cache, cache.ids

    def kind(self, number: int) -> Kind:
        return self._cache.kinds[self._cache.kind_of[number]]

    def prompt(self, number: int) -> str:
        return self._cache.prompt(number)

    def texts(self, numbers: Sequence[int]) -> list[Text]:
        return [self._cache.text(number) for number in numbers]

    def references(self, number: int) -> tuple[np.ndarray, ...]:
        return self._cache.latents(number, 0)[1]

    def null_text(self) -> Text:
        return self._cache.null_text()


class PromptGivens:
    """Prompts alone, for pictures of one size."""

    def __init__(self, prompts: Sequence[str], size: tuple[int, int], networks: Networks):
        self._prompts = list(dict.fromkeys(prompts))
        self.ids = [f"prompt-{prompt_key(prompt)}" for prompt in self._prompts]
        self._kind, self._networks = Kind(size, ()), networks

    def kind(self, number: int) -> Kind:
        return self._kind

    def prompt(self, number: int) -> str:
        return self._prompts[number]

    def texts(self, numbers: Sequence[int]) -> list[Text]:
        txt, vec = self._networks.encode_prompts([self._prompts[n] for n in numbers])
        return list(zip(np.asarray(txt), np.asarray(vec), strict=True))[: len(numbers)]

    def references(self, number: int) -> tuple[np.ndarray, ...]:
        return ()

    def null_text(self) -> Text:
        return self._networks.null_text()


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How results are made.

    Attributes:
      guidance: told to a model that takes it; the scale of classifier-free guidance for another.
      num_steps: number of Euler's steps.
      seed: seed of the noise, with the example's id and the variant.
    """

    guidance: float
    num_steps: int
    seed: int

    def noise_seed(self, id_: str, variant: int) -> int:
        text = f"{self.seed}/{variant}/{id_}".encode()
        return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest())


def choose(ids: Sequence[str], limit: int | None, process_index: int, process_count: int):
    """Numbers of the examples that a process makes: its share of the first `limit` by hash.

    A larger limit adds to what a smaller one chose.
    """
    order = sorted(range(len(ids)), key=lambda n: hash_id(ids[n]))
    return order[:limit][process_index::process_count]


class Synthesis:
    """One process's work.

    Args:
      dtype: in which latents are stored.
      texts: keys of the prompts whose features are stored.
    """

    def __init__(
        self,
        stages: Stages,
        givens: Givens,
        recipe: Recipe,
        writer: ShardWriter,
        texts: frozenset[str],
        *,
        batch_size: int,
        dtype: np.dtype,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._stages, self._givens, self._recipe = stages, givens, recipe
        self._writer, self._texts = writer, set(texts)
        self._batch_size, self._dtype, self._clock = batch_size, dtype, clock

    def run(self, jobs: Sequence[tuple[int, int]], on_progress: Callable[[int], None]) -> None:
        """Makes and writes the results of (number, variant).

        Args:
          on_progress: is given the number that are written.

        Raises:
          FloatingPointError: a result is not finite.
        """
        written, opened = 0, self._clock()
        for rows in self._batches(jobs):
            self._make(rows)
            written += len(rows)
            if self._clock() - opened > SHARD_S:
                self._writer.finish_shard()
                opened = self._clock()
            on_progress(written)
        self._writer.finish_shard()

    def _batches(self, jobs: Sequence[tuple[int, int]]) -> Iterator[list[tuple[int, int]]]:
        def kind_of(job):
            return self._givens.kind(job[0])

        for _, group in itertools.groupby(sorted(jobs, key=kind_of), key=kind_of):
            rows = list(group)
            for start in range(0, len(rows), self._batch_size):
                yield rows[start : start + self._batch_size]

    def _make(self, rows: Sequence[tuple[int, int]]) -> None:
        givens, recipe = self._givens, self._recipe
        kind = givens.kind(rows[0][0])
        numbers = [number for number, _ in rows]
        texts = givens.texts(numbers)
        references = [givens.references(number) for number in numbers]
        made = self._sample(
            kind,
            [recipe.noise_seed(givens.ids[number], variant) for number, variant in rows],
            texts,
            references,
        )
        for (number, variant), x0, text, contexts in zip(
            rows, made, texts, references, strict=False
        ):
            prompt = givens.prompt(number)
            key = prompt_key(prompt)
            if key not in self._texts:
                self._writer.add_text(prompt, *text)
                self._texts.add(key)
            entry = SampleEntry(givens.ids[number], variant, kind, key)
            self._writer.add_sample(entry, x0.astype(self._dtype), contexts)

    def _sample(self, kind: Kind, seeds: list[int], texts: list[Text], references) -> np.ndarray:
        """Latents [batch_size, …]; the last example fills up the batch."""

        def batch(rows: Sequence[np.ndarray]) -> np.ndarray:
            return np.stack([*rows, *[rows[-1]] * (self._batch_size - len(rows))])

        preset, guidance = self._stages.preset, self._recipe.guidance
        columns, rows = (side // preset.vae.downsampling for side in kind.target)
        seeds = seeds + seeds[-1:] * (self._batch_size - len(seeds))
        txt, vec = (batch(rows) for rows in zip(*texts, strict=True))
        given: dict[str, Any] = {}
        scale = np.full(self._batch_size, guidance, np.float32)
        if preset.mmdit.guidance_embed:
            given["guidance"] = scale
        elif guidance != 1:
            null = self._givens.null_text()
            given["negative"] = tuple(np.stack([x] * self._batch_size) for x in null)
            given["true_cfg_scale"] = scale
        denoising = Denoising(
            initial_noise(seeds, rows, columns, preset.vae.z_channels),
            (txt, vec),
            self._recipe.num_steps,
            references=[
                jax.numpy.asarray(batch(column), np.float32)
                for column in zip(*references, strict=True)
            ],
            **given,
        )
        return np.asarray(self._stages.denoise(denoising), np.float32)
