"""The examples of a config: opened, indexed, sorted out, and given their sizes."""

import dataclasses
import hashlib
import os
from collections.abc import Callable

import numpy as np

from kontext_jax.data.buckets import Kind, aspect_mismatch, assign_kinds, bucket_sizes
from kontext_jax.data.config import DataConfig
from kontext_jax.data.filters import make_filter
from kontext_jax.data.index import FILTERED, Index, build_index, decode_example, hash_id
from kontext_jax.data.sources.examples import BadSample, ColumnNames, Example, Source
from kontext_jax.data.sources.open import open_sources

NO_TEXT = "no text"
NO_REFERENCE = "no reference"
MISMATCH = "mismatched aspect ratios"
HAS_REFERENCES = "left out: has references"
_DETAILS = {
    NO_TEXT: "its text is empty",
    NO_REFERENCE: "it has no reference, and fraction_with_references is 1",
    MISMATCH: "aspect ratios of target and reference differ by more than largest_aspect_mismatch",
    HAS_REFERENCES: "it has references, and fraction_with_references is 0",
}
_TOLD = 5  # samples of each reason


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Examples by number, and what is used of them.

    Attributes:
      starts: int [sources + 1], number of the first example of each source.
      reasons: why examples are not used.
      reason_of: int16 [N], index into `reasons`; -1 for what is used.
      kind_of: int [N], index into `kinds`; -1 for what is not used.
      repeats: float [N], how often an epoch shows each.
    """

    sources: tuple[Source, ...]
    starts: np.ndarray
    index: Index
    reasons: tuple[str, ...]
    reason_of: np.ndarray
    kinds: tuple[Kind, ...]
    kind_of: np.ndarray
    repeats: np.ndarray

    def __len__(self) -> int:
        return len(self.kind_of)

    def example(self, number: int) -> Example:
        """Raises BadSample where a record cannot be understood."""
        source = int(np.searchsorted(self.starts, number, side="right")) - 1
        return self.sources[source][number - int(self.starts[source])]

    def pictures(self, number: int, num_contexts: int) -> tuple[Example, list[np.ndarray]]:
        """An example, and the pixels of its target and its first references.

        Raises:
          BadSample: a picture that cannot be decoded, or not what the index tells of.
        """
        example = self.example(number)
        pictures = decode_example(example, num_contexts)
        sizes = np.array([(picture.shape[1], picture.shape[0]) for picture in pictures])
        indexed = self.index.sizes[number, : num_contexts + 1]
        if self.index.ids[number] != hash_id(example.id) or not np.array_equal(sizes, indexed):
            raise BadSample(
                "changed since it was indexed",
                f"sample {example.id}: its pictures are {sizes.tolist()} pixels, the index tells "
                f"of {indexed.tolist()}; delete the index",
            )
        return example, pictures

    def name(self, number: int) -> str:
        """The id of an example, or the place of one that has none."""
        try:
            return self.example(number).id
        except BadSample:
            source = int(np.searchsorted(self.starts, number, side="right")) - 1
            return f"{self.sources[source].name}/{number - int(self.starts[source])}"

    def not_used(self) -> dict[str, np.ndarray]:
        """Numbers of the examples that are not used, by reason."""
        return {
            reason: found
            for i, reason in enumerate(self.reasons)
            if len(found := np.flatnonzero(self.reason_of == i))
        }

    def message(self, number: int) -> str:
        """Why an example is not used, with its id."""
        if (message := self.index.messages.get(number)) is not None:
            return message
        reason = self.reasons[self.reason_of[number]]
        return f"sample {self.name(number)}: {_DETAILS.get(reason, reason)}"

    def fingerprint(self) -> str:
        """Changes when the examples, their kinds or their repeats do."""
        content = hashlib.blake2b(digest_size=16)
        for array in (self.index.ids, self.kind_of.astype(np.int32), self.repeats):
            content.update(np.ascontiguousarray(array).tobytes())
        content.update("\n".join(map(str, self.kinds)).encode())
        return content.hexdigest()


def is_bad(reason: str) -> bool:
    """Whether a reason is a defect of the sample, not a choice of the user's."""
    return reason != HAS_REFERENCES and not reason.startswith(FILTERED)


def open_dataset(
    config: DataConfig,
    *,
    index_dir: str | os.PathLike | None = None,
    process_index: int = 0,
    process_count: int = 1,
    barrier: Callable[[], None] | None = None,
    tell: Callable[[str], None] = print,
) -> Dataset:
    """Opens the sources of a config and makes or reads their index.

    Args:
      index_dir: folder of the index unless `config.index_dir` says; None to keep none.
      process_index, process_count, barrier: see `build_index`.
      tell: is given a line on what was found, by process 0 alone.

    Raises:
      ValueError: sources or options that cannot be used.
      BadSample: a bad sample, where the config says to stop.
    """
    config.check()
    buckets = bucket_sizes(config.resolution, config.buckets)
    folder = config.index_dir or index_dir
    columns = ColumnNames(
        config.target_column, tuple(config.context_columns), config.text_column, config.id_column
    )
    filter = make_filter(config.filter_function, config.filter_command)
    try:
        sources = open_sources(config.sources, columns=columns, index_dir=folder)
        if not any(map(len, sources)):
            raise ValueError(f"data.sources {', '.join(config.sources)}: no sample in any")
        index = build_index(
            sources,
            index_dir=folder,
            filter=filter,
            verify=config.verify,
            threads=config.threads,
            process_index=process_index,
            process_count=process_count,
            barrier=barrier,
            tell=tell,
        )
    finally:
        if filter is not None:
            filter.close()
    starts = np.cumsum([0, *map(len, sources)])
    kind_of, kinds = assign_kinds(index.sizes, buckets)
    weights = config.weights or (1.0,) * len(sources)
    reasons, reason_of = _reasons(index, config)
    used, kind_of[reason_of >= 0] = reason_of < 0, -1
    still = np.unique(kind_of[used])  # kinds that have a usable example
    renumbered = np.full(len(kinds) + 1, -1)
    renumbered[still] = np.arange(len(still))
    dataset = Dataset(
        sources=tuple(sources),
        starts=starts,
        index=index,
        reasons=reasons,
        reason_of=reason_of,
        kinds=tuple(kinds[k] for k in still),
        kind_of=renumbered[kind_of],
        repeats=np.repeat(np.array(weights, float), np.diff(starts)),
    )
    _raise_or_tell(dataset, config, tell if process_index == 0 else lambda _: None)
    return dataset


def _reasons(index: Index, config: DataConfig) -> tuple[tuple[str, ...], np.ndarray]:
    """What the index knows, and after it what the options find wrong: reasons, whose is which."""
    reasons, reason_of = list(index.reasons), index.reason_of.copy()

    def add(which: np.ndarray, reason: str) -> None:
        reason_of[which & (reason_of < 0)] = len(reasons)
        reasons.append(reason)

    add(~index.has_text, NO_TEXT)
    contexts = index.num_contexts
    if config.fraction_with_references == 1:
        add(contexts == 0, NO_REFERENCE)
    if config.fraction_with_references == 0:
        add(contexts > 0, HAS_REFERENCES)
    if config.largest_aspect_mismatch:
        add(aspect_mismatch(index.sizes) > config.largest_aspect_mismatch, MISMATCH)
    return tuple(reasons), reason_of


def _raise_or_tell(dataset: Dataset, config: DataConfig, tell: Callable[[str], None]) -> None:
    not_used = dataset.not_used()
    bad = np.concatenate([[], *(found for reason, found in not_used.items() if is_bad(reason))])
    if len(bad) and config.on_bad_sample == "stop":
        first = int(bad.min())
        reason = dataset.reasons[dataset.reason_of[first]]
        raise BadSample(
            reason,
            f"{dataset.message(first)} ({reason}; the first of {len(bad)} bad samples). Mend the "
            "data (python -m kontext_jax.data.check lists them), or set data.on_bad_sample to "
            '"skip"',
        )
    for source in dataset.sources:
        tell(f"data: {source.name}: {len(source):,} samples; {source.columns}")
    for reason, found in not_used.items():
        tell(f"data: {len(found):,} samples not used: {reason}")
        for number in found[:_TOLD]:
            tell(f"  {dataset.message(int(number))}")
        if len(found) > _TOLD:
            tell(f"  and {len(found) - _TOLD:,} more; python -m kontext_jax.data.check lists all")
