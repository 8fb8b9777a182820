"""Compiling what requests will need, with shapes in place of weights and without computing.

A `Pipeline` that compiles only goes through each request as ever, on a blank picture. Every program
is compiled, and kept on disk if the pipeline keeps programs; its results are zeros.
"""

import dataclasses
import functools
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from kontext_jax.models.presets import Preset
from kontext_jax.numerics import NUMERICS
from kontext_jax.pictures import latents
from kontext_jax.pictures.files import Picture
from kontext_jax.pictures.sizes import Size, plan_sizes
from kontext_jax.sampling.pipeline import Failure, Pipeline
from kontext_jax.sampling.requests import PreparedRequest, SampleRequest, prepare_pictures
from kontext_jax.terminal import Progress, Tell


def compile_for(pipeline: Pipeline, prepared: PreparedRequest) -> int:
    """Compiles all programs of a request; how many there were besides those already made.

    Args:
      pipeline: was made with `compile_only=True`.

    Raises:
      Exception: whatever stopped it.
    """
    before = len(pipeline.stages.executables)
    pipeline.stages.networks.drop()  # a fresh start lacks them too; what is loaded decides on tiles
    for result in pipeline.edit([prepared]):
        if isinstance(result, Failure):
            raise result.error
    return len(pipeline.stages.executables) - before


def blank_requests(
    request: SampleRequest, preset: Preset, num_references: int
) -> Iterator[PreparedRequest]:
    """The request on blank pictures: for its own size, or for each of the 17 preferred sizes.

    Args:
      request: has no images.

    Raises:
      ValueError: see `requests.prepare_pictures`.
    """
    plan = functools.partial(
        plan_sizes,
        numerics=NUMERICS[request.numerics],
        preset_megapixels=preset.megapixels,
        megapixels=request.megapixels,
    )
    if request.size is not None:
        wanted = [(request, plan([], size=request.size).output)]
    else:
        wanted = [(request, size) for size in latents.PREFERRED_SIZES]
        if not num_references:
            outputs = (plan([size]).output for size in latents.PREFERRED_SIZES)
            wanted = [(_with_size(request, size), size) for size in outputs]
    for own, (width, height) in wanted:
        blank = Picture("blank", np.zeros((height, width, 3), np.uint8), "", ())
        own = dataclasses.replace(own, images=(blank.name,) * num_references)
        yield prepare_pictures(own, preset, (blank,) * num_references)


def _with_size(request: SampleRequest, size: Size) -> SampleRequest:
    return dataclasses.replace(request, size="{}x{}".format(*size), megapixels=None)


def warm(
    pipeline: Pipeline,
    requests: Sequence[PreparedRequest],
    folder: Path,
    *,
    tell: Tell,
    progress: bool = False,
) -> None:
    """Compiles for each request in turn, and says what was made, for how long, and how large it is.

    Args:
      pipeline: was made with `compile_only=True`.
      folder: folder that keeps the programs.
      progress: show a line of what is under way on stderr.
    """
    start, before, total = time.perf_counter(), _bytes_in(folder), 0
    with Progress(len(requests), quiet=not progress, stderr=True) as bar:
        for i, prepared in enumerate(requests):
            name = "{}×{}".format(*prepared.sizes.output)
            if count := len(prepared.pictures):
                name += f" from {count} of " + "{}×{}".format(*prepared.sizes.references[0].size)
            bar.update(i, lambda i=i, name=name: f"{i + 1}/{len(requests)}  {name}")
            began = time.perf_counter()
            made = compile_for(pipeline, prepared)
            total += made
            tell(f"{name}: {made} programs, {time.perf_counter() - began:.1f} s")
    tell(
        f"{total} programs for {len(requests)} sizes in {time.perf_counter() - start:.1f} s; "
        f"{(_bytes_in(folder) - before) / 1e6:.1f} MB more in {folder}"
    )


def _bytes_in(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
