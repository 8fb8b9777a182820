"""A run of the command line: requests in, PNG files out, and one line for everything that happens.

Where files go: `out.png`; with several images `out-seed7.png, out-seed8.png`; further turns add
`-2, -3, …` to the name.
"""

import dataclasses
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from kontext_jax.models.presets import Preset
from kontext_jax.pictures import files as images
from kontext_jax.runtime.placement import format_mesh, num_batch_parts, parse_mesh
from kontext_jax.sampling.pipeline import (
    MAX_BATCH,
    METADATA_FORMAT,
    Failure,
    Pipeline,
    Place,
    versions,
)
from kontext_jax.sampling.requests import (
    Job,
    PreparedRequest,
    SampleRequest,
    find_image,
    prepare,
    request_from_dict,
)
from kontext_jax.weights.adapters import AppliedAdapter

Tell = Callable[[str], None]


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


class StepLine:
    """A line on a terminal that shows how far a batch is and what a step takes."""

    def __init__(self, stream=sys.stderr):
        self._stream = stream
        self._last = time.perf_counter()

    def __call__(self, done: int, num_steps: int) -> None:
        now = time.perf_counter()
        seconds, self._last = now - self._last, now
        text = f"  {'━' * (24 * done // num_steps):<24} step {done}/{num_steps}"
        if done:  # what came before the first step was compiling
            text += f"  {seconds:.2f} s a step, {(num_steps - done) * seconds:.0f} s left"
        self._stream.write(f"\r{text:<78}" if done < num_steps else f"\r{'':<78}\r")
        self._stream.flush()


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
      bases: where each request's pictures go, see `picture_path`.
      last_turn_only: write the last turn alone, to the base itself.
      progress: show a line of steps on stderr.
    """
    failures = {}
    for result in pipeline.edit(requests, place=place, on_step=StepLine() if progress else None):
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


def run_jobs(
    pipeline: Pipeline,
    jobs: Sequence[Job],
    folder: Path,
    output_folder: Path,
    *,
    tell: Tell,
    tell_error: Tell,
    progress: bool = False,
) -> int:
    """Makes the pictures of a jobs file; how many of its lines failed.

    Args:
      folder: what names of images are relative to.
    """
    outcomes: dict[int, str] = {}
    prepared, bases, lines = [], [], []
    taken: dict[Path, int] = {}
    for job in jobs:
        try:
            if job.error is not None:
                raise ValueError(job.error)
            base = output_folder / job.output
            paths = check_outputs(base, job.request, folder)
            if clash := next((path for path in paths if path in taken), None):
                raise ValueError(f"output {clash} is also written by line {taken[clash]}")
            request = prepare(job.request, pipeline.preset, folder)
        except (ValueError, OSError) as error:
            outcomes[job.line] = one_line(error)
            tell_error(f"line {job.line}: {outcomes[job.line]}")
            continue
        taken |= dict.fromkeys(paths, job.line)
        for line in (*request.lines(), request.sampling_line()):
            tell(f"line {job.line}: {line}")
        prepared.append(request)
        bases.append(base)
        lines.append(job.line)
    if prepared:
        failures = make_pictures(pipeline, prepared, bases, tell=tell, progress=progress)
        for index, error in failures.items():
            outcomes[lines[index]] = one_line(error)
            tell_error(f"line {lines[index]}: {outcomes[lines[index]]}")
    tell(f"{len(jobs) - len(outcomes)} of {len(jobs)} jobs done")
    return len(outcomes)


def one_line(error: BaseException) -> str:
    """What went wrong, in one line for the user."""
    text = str(error).strip() or type(error).__name__
    if "RESOURCE_EXHAUSTED" in text or isinstance(error, MemoryError):
        text = (
            f"the device has too little memory: {text.splitlines()[0]}; try a smaller --megapixels "
            "or --size, --tile on, or --dtype bfloat16"
        )
    return text


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a picture was made, from its metadata."""

    path: Path
    request: SampleRequest
    image_hashes: tuple[str, ...]
    place: Place
    model: str
    weights: str
    dtype: str
    tiling: str
    device: str
    versions: Mapping[str, str]
    mesh: Mapping[str, int]
    loras: tuple[AppliedAdapter, ...] = ()


def read_recipe(path: Path) -> Recipe:
    """Reads how a picture was made.

    Raises:
      FileNotFoundError, ValueError: see `images.read_metadata`; or its metadata is damaged or of
        another format.
    """
    metadata = images.read_metadata(path)
    if metadata.get("format") != METADATA_FORMAT:
        raise ValueError(
            f"image {path} has metadata of format {metadata.get('format')!r}; this version reads "
            f"format {METADATA_FORMAT}"
        )
    try:
        request = request_from_dict(metadata["request"])
        place = Place(int(metadata["place"]["batch_size"]), int(metadata["place"]["row"]))
        mesh = parse_mesh(format_mesh(metadata.get("mesh", {})))
        if not 0 <= place.row < place.batch_size <= MAX_BATCH * num_batch_parts(mesh):
            raise ValueError(f"place {place} is impossible")
        texts = {
            name: str(metadata[name]) for name in ("model", "weights", "dtype", "tiling", "device")
        }
        hashes = tuple(str(image["sha256"]) for image in metadata["images"])
        if len(hashes) != len(request.images):
            raise ValueError(f"{len(request.images)} images with {len(hashes)} hashes")
        loras = tuple(
            AppliedAdapter(str(lora["name"]), str(lora["sha256"]), float(lora["scale"]))
            for lora in metadata.get("loras", ())
        )
        return Recipe(
            *(path, request, hashes, place),
            versions=dict(metadata["versions"]),
            mesh=mesh,
            loras=loras,
            **texts,
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"image {path}: its kontext_jax metadata is damaged: {error}") from error


def prepare_again(
    recipe: Recipe, preset: Preset, overrides: Mapping[str, Any]
) -> tuple[PreparedRequest, bool]:
    """The request of a recipe, and whether it is still the same after the overrides.

    An override of `images` by files of the same contents says where they lie now and changes
    nothing.

    Raises:
      FileNotFoundError, ValueError: an image is missing or not the one that was used.
    """
    if "num_steps" in overrides:  # instead of the times of as many steps as there were
        overrides = {"timesteps": None, **overrides}
    elif "timesteps" in overrides:
        overrides = {"num_steps": None, **overrides}
    request = dataclasses.replace(recipe.request, **overrides)
    try:
        prepared = prepare(request, preset)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{error}; {recipe.path} was made from it, say with --image where it is now"
        ) from error
    found = tuple(picture.sha256 for picture in prepared.pictures)
    if found == recipe.image_hashes:
        # The names in the metadata stay as they were.
        moved = [
            dataclasses.replace(picture, name=name)
            for picture, name in zip(prepared.pictures, recipe.request.images, strict=True)
        ]
        request = dataclasses.replace(prepared.request, images=recipe.request.images)
        prepared = dataclasses.replace(prepared, request=request, pictures=tuple(moved))
    elif "images" not in overrides:
        pairs = zip(request.images, found, recipe.image_hashes, strict=True)
        name, now, before = next(pair for pair in pairs if pair[1] != pair[2])
        raise ValueError(
            f"image {name} is not the picture that {recipe.path} was made from: its SHA-256 is "
            f"{now[:12]}…, expected {before[:12]}…; give the right one with --image"
        )
    return prepared, prepared.request == recipe.request


def find_loras(recipe: Recipe) -> list[tuple[str, float]]:
    """Path and scale of every LoRA that a picture was made with, from where they were.

    Raises:
      FileNotFoundError: some are no longer there; all of them are named.
    """
    missing = [lora for lora in recipe.loras if not Path(lora.name).exists()]
    if missing:
        lines = [f"{x.name} (SHA-256 {x.sha256[:12]}…, scale {x.scale})" for x in missing]
        flags = " ".join(f"--lora {x.name}:{x.scale}" for x in recipe.loras)
        raise FileNotFoundError(
            f"{recipe.path} was made with LoRAs that are not where they were: {', '.join(lines)}; "
            f"give all of them where they are now, in this order: {flags}"
        )
    return [(lora.name, lora.scale) for lora in recipe.loras]


def same_loras(these: Sequence[AppliedAdapter], those: Sequence[AppliedAdapter]) -> bool:
    """Whether they are the same contents at the same scales, wherever they lie."""
    return [(x.sha256, x.scale) for x in these] == [(x.sha256, x.scale) for x in those]


def check_loras(recipe: Recipe, found: Sequence[AppliedAdapter]) -> None:
    """Raises `ValueError` if a LoRA is another one than the picture was made with."""
    for then, now in zip(recipe.loras, found, strict=True):
        if then.sha256 != now.sha256:
            raise ValueError(
                f"LoRA {now.name} is not the one that {recipe.path} was made with: its SHA-256 is "
                f"{now.sha256[:12]}…, expected {then.sha256[:12]}…; give the right ones with --lora"
            )


def differences_here(recipe: Recipe) -> list[str]:
    """What may change the last bits: another device or other versions than the picture's."""
    here = {"device": jax.devices()[0].device_kind, **versions()}
    there = {"device": recipe.device, **recipe.versions}
    return [
        f"{name} {there.get(name)} then, {here.get(name)} now"
        for name in sorted(here.keys() | there.keys())
        if here.get(name) != there.get(name)
    ]


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
