"""What can be said about training data: sources, sizes, the mix, bad samples."""

import dataclasses
import math
from typing import Any

from kontext_jax.fields import check_acting, option
from kontext_jax.pictures import latents

ON_BAD_SAMPLE = ("skip", "stop")


def _field(default: Any, help: str) -> Any:
    return dataclasses.field(default=default, metadata={"help": help})


def _of_pictures(default: Any, help: str) -> Any:
    """An option that acts on pictures and texts, not on examples that are encoded already."""
    return option(
        default,
        help=help,
        acts_with=("cache", ""),
        otherwise="data.cache {other} holds examples that are already cut and encoded, so {names} "
        "cannot apply; drop one or the other",
    )


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where examples come from and how they become batches; each field says itself what it is."""

    sources: tuple[str, ...] = _of_pictures(
        (),
        "folders or files, local or gs://. A folder with metadata.jsonl or metadata.csv beside its "
        "pictures, parquet files, WebDataset tars, or ArrayRecord files of `write_array_record`; "
        "or pictures without files, scenes:WORLD:SPLIT:COUNT (see kontext_jax.data.sources.drawn) "
        "and photos:WHAT:SPLIT:COUNT (see kontext_jax.data.sources.crops)",
    )
    weights: tuple[float, ...] = _of_pictures(
        (),
        "how often an epoch shows each example of each source, one number per source; () is once "
        "each. 2.0 shows all twice, 0.5 another half every epoch",
    )
    target_column: str = _of_pictures(
        "",
        'column (or member of a tar, without its file type) of the picture to be made; "" to find '
        "it among the usual names",
    )
    context_columns: tuple[str, ...] = _of_pictures(
        (),
        "columns of the references, in order; each may hold a list; () to find them",
    )
    text_column: str = _of_pictures(
        "",
        'column of the instruction or caption; "" to find it',
    )
    id_column: str = _of_pictures(
        "",
        'column of the ids; "" for the name of the file, or the place in it',
    )
    resolution: int = _of_pictures(
        1024,
        "side in pixels of the square whose area the 17 preferred sizes are scaled to",
    )
    buckets: tuple[str, ...] = _of_pictures(
        (),
        '"WxH" sizes in pixels, multiples of 16, instead of the preferred ones',
    )
    random_crop: bool = _of_pictures(
        False,
        "crop at a random place, the same for target and references, not in the middle",
    )
    flip: bool = _of_pictures(
        False,
        "mirror half of the examples, target and references alike, unless the text names a side",
    )
    fraction_with_references: float = _field(
        1.0,
        "part of the steps that take examples with references; the others take examples without",
    )
    reference_dropout: float = option(
        0.0,
        acts_with=("fraction_with_references",),
        otherwise="{name} {value:g} has nothing to act on, since data.fraction_with_references is "
        "0; drop one",
        help="part of the steps with references that go without them",
    )
    on_bad_sample: str = _of_pictures(
        "skip",
        '"skip" and count a sample that is unreadable, incomplete, has no text, or mismatched '
        'pictures, or "stop" at it',
    )
    largest_aspect_mismatch: float = _of_pictures(
        0.0,
        "largest ratio of the aspect ratios of target and reference, such as 1.1; 0 for any",
    )
    filter_function: str = _of_pictures(
        "",
        '"package.module:function" that decides on each sample; see `filters`',
    )
    filter_command: str = _of_pictures(
        "",
        "command that decides on each sample instead; see `filters`",
    )
    verify: bool = _of_pictures(
        False,
        "decode every picture while the index is made, not only its header",
    )
    index_dir: str = _of_pictures(
        "",
        'folder for the index; "" for the one of the run',
    )
    threads: int = _field(
        8,
        "threads that read and decode, in each process or worker",
    )
    workers: int = _of_pictures(
        0,
        "processes that read and decode beside the training process; 0 for threads alone",
    )
    prefetch: int = _field(
        4,
        "batches to have ready",
    )
    cache: str = _field(
        "",
        "folder of encoded examples (kontext_jax.data.encode) instead of sources",
    )
    synthetic_cache: str = _field(
        "",
        "beside `cache`, a folder of examples whose targets are a model's own results "
        "(kontext_jax.data.synthesize)",
    )
    synthetic_share: float = option(
        0.5,
        acts_with=("synthetic_cache",),
        otherwise="{name} is {value:g}, but there is no data.synthetic_cache",
        help="part of the steps that take examples from there; each step is of one folder",
    )

    def check(self) -> None:
        """Raises ValueError for values that are out of range or contradict each other."""
        _check_choice("on_bad_sample", self.on_bad_sample, ON_BAD_SAMPLE)
        check_acting(self, "data")
        self._check_sources()
        self._check_sizes()
        for name in ("fraction_with_references", "reference_dropout"):
            if not 0 <= (value := getattr(self, name)) <= 1:
                raise ValueError(f"data.{name} is {value:g}; expected a number from 0 to 1")
        mismatch = self.largest_aspect_mismatch
        if mismatch and not 1 <= mismatch < math.inf:
            raise ValueError(
                f"data.largest_aspect_mismatch is {mismatch:g}; expected a ratio of at least 1, "
                "such as 1.1, or 0 for any"
            )
        self._check_synthetic()
        if self.filter_function and self.filter_command:
            raise ValueError("data.filter_function and data.filter_command contradict; drop one")
        if self.filter_function and self.filter_function.count(":") != 1:
            raise ValueError(
                f"data.filter_function is {self.filter_function!r}; expected "
                "package.module:function"
            )
        for name, least in (("threads", 1), ("workers", 0), ("prefetch", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"data.{name} is {getattr(self, name)}; expected at least {least}")

    def _check_sources(self) -> None:
        if self.cache:  # it was cut and filtered when it was made; only the mix can be chosen
            return
        if not self.sources:
            raise ValueError("data.sources is empty; name a folder or a file of examples")
        if self.weights and len(self.weights) != len(self.sources):
            raise ValueError(
                f"data.weights has {len(self.weights)} numbers for {len(self.sources)} sources; "
                "give one each, or none"
            )
        for weight in self.weights:
            if not 0 < weight < math.inf:
                raise ValueError(f"data.weights has {weight:g}; expected numbers above 0")

    def _check_synthetic(self) -> None:
        if not self.synthetic_cache:
            return
        if not self.cache:
            raise ValueError(
                "data.synthetic_cache is mixed with data.cache, which is empty; encode the "
                "examples first, or set data.cache to train on synthetic ones alone"
            )
        if not 0 < self.synthetic_share < 1:
            raise ValueError(
                f"data.synthetic_share is {self.synthetic_share:g}; expected a number between "
                "0 and 1 (for synthetic examples alone, set data.cache)"
            )

    def _check_sizes(self) -> None:
        unit = latents.PIXELS_PER_TOKEN
        if self.resolution < unit or self.resolution % unit:
            nearest = max(unit, round(self.resolution / unit) * unit)
            raise ValueError(
                f"data.resolution is {self.resolution}; expected a multiple of {unit}, such as "
                f"{nearest}"
            )
        if self.buckets and self.resolution != DataConfig.resolution:
            raise ValueError(
                f"data.buckets {', '.join(self.buckets)} already say the sizes, so "
                f"data.resolution {self.resolution} contradicts them; drop one"
            )


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"data.{name} is {value!r}; expected one of {', '.join(choices)}")
