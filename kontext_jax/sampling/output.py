"""A run of the command line: requests in, PNG files out, and one line for everything that happens.

Where files go: `out.png`; with several images `out-seed7.png, out-seed8.png`; further turns add
`-2, -3, …` to the name.
"""

import contextlib
from collections.abc import Sequence
from pathlib import Path

import jax

from kontext_jax.models.presets import Preset
from kontext_jax.pictures import files as images
from kontext_jax.sampling.pipeline import (
    Failure,
    Pipeline,
    Place,
)
from kontext_jax.sampling.requests import PreparedRequest, SampleRequest, find_image
from kontext_jax.terminal import StepLine, Tell


def free_output(folder: Path) -> Path:
    """The first of edit-001.png, edit-002.png, … that does not exist in `folder`."""
    number = 1
    while (path := folder / f"edit-{number:03}.png").exists():
        number += 1
    return path


def picture_path(base: Path, request: SampleRequest, image_index: int, turn: int) -> Path:
    """Where one picture of a request goes."""
    name = base.stem
    if request.num_images > 1:
        name += f"-seed{request.seed + image_index}"
    if turn:
        name += f"-{turn + 1}"
    return base.with_name(name + base.suffix)


def picture_paths(base: Path, request: SampleRequest) -> list[Path]:
    """Where all pictures of a request go."""
    turns = range(1 + len(request.then))
    return [
        picture_path(base, request, i, turn) for i in range(request.num_images) for turn in turns
    ]


def check_outputs(base: Path, request: SampleRequest, folder: Path | None = None) -> list[Path]:
    """The paths of all pictures, each found to be writable and to be no input.

    Args:
      folder: what names of images are relative to; None for the working directory.

    Raises:
      ValueError: one is not.
    """
    images.check_writable(base)
    paths = picture_paths(base, request)
    inputs = {find_image(name, folder).resolve() for name in request.images}
    for path in paths:
        images.check_writable(path)
        if path.resolve() in inputs:
            raise ValueError(f"output {path} is also an input image; choose another with -o")
    return paths


def make_pictures(
    pipeline: Pipeline,
    requests: Sequence[PreparedRequest],
    bases: Sequence[Path],
    *,
    tell: Tell,
    place: Place | None = None,
    last_turn_only: bool = False,
    progress: bool = False,
) -> dict[int, Exception]:
    """Writes every picture as soon as it is made; the errors of the requests that failed.

    Args:
      bases: path of each request's pictures, see `picture_path`.
      last_turn_only: write the last turn alone, to the base itself.
      progress: show a line of steps on stderr.
    """
    failures = {}
    with StepLine() if progress else contextlib.nullcontext() as on_step:
        for result in pipeline.edit(requests, place=place, on_step=on_step):
            index = result.request_index
            if isinstance(result, Failure):
                failures[index] = result.error
                continue
            request = requests[index].request
            path = picture_path(bases[index], request, result.image_index, result.turn)
            if last_turn_only:
                if result.turn < len(request.then):
                    continue
                path = bases[index]
            with pipeline.timings.measure("write"):
                images.write_png(path, result.pixels, result.metadata)
            height, width = result.pixels.shape[:2]
            tell(f"wrote {path} ({width}×{height}, seed {request.seed + result.image_index})")
    return failures


def one_line(error: BaseException) -> str:
    """What went wrong, in one line for the user."""
    text = str(error).strip() or type(error).__name__
    if "RESOURCE_EXHAUSTED" in text or isinstance(error, MemoryError):
        text = (
            f"the device has too little memory: {text.splitlines()[0]}; try a smaller --megapixels "
            "or --size, --tile on, or --dtype bfloat16"
        )
    return text


def cautions(request: SampleRequest, preset: Preset) -> list[str]:
    """What the user should know about a request that can be made but may disappoint."""
    if preset.name == "kontext-dev" and not request.images:
        return ["kontext-dev was trained on edits only; without an image its pictures suffer"]
    return []


def exit_status(error: Exception) -> int:
    """2 if the input was bad, 1 if computing failed; other errors are ours, and raised."""
    if isinstance(error, ValueError | OSError):
        return 2
    if isinstance(error, FloatingPointError | MemoryError | jax.errors.JaxRuntimeError):
        return 1
    raise error
