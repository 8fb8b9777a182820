"""`kontext edit`: edits pictures, or makes them from text.

flags → weights → LoRAs → request → pipeline → files
"""

import dataclasses
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kontext_jax.commands.edit_flags import OUTPUTS, make_parser
from kontext_jax.commands.edit_weights import UNTRAINED, add_loras, choose_weights, model_named
from kontext_jax.terminal import Tell, exit_status

if TYPE_CHECKING:  # these take JAX or NumPy with them
    from kontext_jax.sampling.jobs import Job
    from kontext_jax.sampling.pipeline import Pipeline, Place
    from kontext_jax.sampling.recipes import Recipe
    from kontext_jax.sampling.requests import PreparedRequest
    from kontext_jax.weights.bundle import ModelBundle

DEMO_IMAGE = "example:cat"
DEMO_PROMPT = "put a red frame around the picture"
PROGRAMS = "programs"  # folder of the cache for programs that are loaded without tracing
PICTURES_AT_A_TIME = 64  # of a folder, in memory: 2.3 GB of photographs of 12 megapixels


Flags = dict[str, Any]
"""Values of the flags that were given, by name."""


def main(argv: list[str] | None = None, prog: str = "kontext edit") -> int:
    """Runs the command line; the exit status: 0, 1 if computing failed, 2 for bad input."""
    given = vars(make_parser(prog).parse_intermixed_args(argv))
    return exit_status(lambda: run(given))


def run(given: Mapping[str, Any]) -> int:
    """Does what the flags ask for.

    Raises:
      ValueError, OSError: bad input, found before anything is computed.
    """
    flags, fields = split_flags(given)
    check_flags(flags, fields)
    # Imported when the flags are known to be good: JAX takes a second or two.
    from kontext_jax.runtime.placement import parse_mesh
    from kontext_jax.sampling.jobs import read_jobs
    from kontext_jax.sampling.recipes import read_recipe

    def tell(line: str) -> None:
        if not flags.get("quiet"):
            print(line, flush=True)

    jobs = read_jobs(flags["jobs"]) if flags.get("jobs") else None
    recipe = read_recipe(Path(flags["from_metadata"])) if flags.get("from_metadata") else None
    bundle = choose_weights(flags, recipe)
    bundle, same_loras = add_loras(bundle, flags.get("lora"), recipe)
    mesh = dict(recipe.mesh) if recipe else {}
    if "mesh" in flags:
        mesh = parse_mesh(flags["mesh"])
    if flags.get("compile_only"):
        return warm(bundle, fields, flags, mesh, tell)
    if jobs is not None:
        wanted = of_jobs(jobs, flags)
    elif "pictures" in flags:
        wanted = of_pictures(flags, fields, bundle)
    else:
        wanted = of_request(flags, fields, bundle, recipe, mesh, same_loras)
    pipeline = make_pipeline(bundle, flags, recipe, mesh, tell)
    if recipe:
        tell_of_recipe(recipe, isinstance(wanted, OneRequest) and wanted.place, tell)
    status = write(pipeline, wanted, flags, tell)
    if "timings" in flags.get("show", ()):
        print(pipeline.timings.table())
    return status


def split_flags(given: Mapping[str, Any]) -> tuple[Flags, Flags]:
    """What was given as (other flags, fields of a request).

    One picture beside the prompt is the request's first image, as by --image; several, or a
    folder, become the flag "pictures".

    Raises:
      ValueError: the first word is a picture and no prompt.
    """
    from kontext_jax.sampling import requests

    field_of_flag = {flag: field for field, flag in requests.FLAGS.items()}
    flags = {field_of_flag.get(name, name): value for name, value in given.items()}
    words = [*([flags.pop("first")] if "first" in flags else []), *flags.pop("pictures", ())]
    if words and "prompt" not in flags:
        if Path(words[0]).exists() or words[0].startswith("example:"):
            raise ValueError(
                f"{words[0]} is a picture; the prompt comes before the pictures, or by --prompt"
            )
        flags["prompt"] = words.pop(0)
    fields = {name: flags.pop(name) for name in requests.FIELDS if name in flags}
    output = flags.get("output", "")
    to_folder = output.endswith(("/", os.sep)) or Path(output or "none.png").is_dir()
    if len(words) > 1 or (words and to_folder) or any(Path(word).is_dir() for word in words):
        flags["pictures"] = words
    elif words:
        fields["images"] = [*words, *fields.get("images", ())]
    return flags, fields


def check_flags(flags: Flags, fields: Flags) -> None:
    """Raises ValueError for flags that do not go together."""
    if flags.get("jobs") and flags.get("from_metadata"):
        raise ValueError("--jobs and --from-metadata cannot be used together")
    if flags.get("jobs") and fields:
        raise ValueError(f"with --jobs, {', '.join(sorted(fields))} belongs into the file's lines")
    for name in ("jobs", "from_metadata", "compile_only"):
        if "pictures" in flags and flags.get(name):
            flag = "--" + name.replace("_", "-")
            raise ValueError(f"{flag} takes no pictures beside it; drop {flags['pictures'][0]} …")
    check_compile_only(flags, fields)


@dataclasses.dataclass(frozen=True)
class OneRequest:
    """A request, and where its pictures go.

    Attributes:
      place: the place in its batch that an earlier picture had, to be made again; or None.
    """

    prepared: "PreparedRequest"
    base: Path
    place: "Place | None" = None


@dataclasses.dataclass(frozen=True)
class ManyRequests:
    """Requests that fail one by one, the folder of their images, and the one of their results.

    Attributes:
      noun: the word for them in the last line.
      at_a_time: largest number whose pictures are in memory together; None for all.
    """

    jobs: "Sequence[Job]"
    folder: Path
    output: Path
    noun: str
    at_a_time: int | None = None


def of_jobs(jobs: "Sequence[Job]", flags: Flags) -> ManyRequests:
    """The requests of --jobs.

    Raises:
      ValueError: the output is a file.
    """
    file = Path(flags["jobs"])
    output = Path(flags.get("output", OUTPUTS / file.stem))
    if output.exists() and not output.is_dir():
        raise ValueError(f"output {output} is a file; with --jobs, -o names a folder")
    return ManyRequests(jobs, file.parent, output, "jobs")


def of_pictures(flags: Flags, fields: Flags, bundle: "ModelBundle") -> ManyRequests:
    """A request for each picture beside the prompt.

    Raises:
      ValueError: bad options, a folder without pictures, or an output that is no folder.
    """
    from kontext_jax.sampling import requests
    from kontext_jax.sampling.jobs import Job
    from kontext_jax.sampling.output import picture_paths

    output = Path(flags.get("output", OUTPUTS))
    if output.suffix.lower() == ".png" or (output.exists() and not output.is_dir()):
        raise ValueError(
            f"output {output} is one file; with several pictures, -o names a folder (further "
            "references of one edit are given by --image)"
        )
    pictures = list(pictures_of(flags["pictures"]))
    others, taken, jobs = fields.get("images", ()), set(), []
    for number, picture in enumerate(pictures, start=1):
        request = requests.request_from_dict({**fields, "images": [picture, *others]})
        if number == 1:
            requests.complete(request, bundle.preset)  # one error for all, not one for each
        base = free_base(output, Path(picture.removeprefix("example:")).stem, request, taken)
        taken.update(picture_paths(base, request))
        jobs.append(Job(number, base.name, request, name=picture))
    return ManyRequests(jobs, Path(), output, "pictures", PICTURES_AT_A_TIME)


def pictures_of(words: Sequence[str]) -> Iterator[str]:
    """Pictures as named, and in place of a folder those in it, in order.

    Raises:
      ValueError: a folder holds none.
    """
    from kontext_jax.pictures.files import SUFFIXES

    for word in words:
        if not Path(word).is_dir():
            yield word
            continue
        found = sorted(p for p in Path(word).iterdir() if p.suffix.lower() in SUFFIXES)
        if not found:
            raise ValueError(f"folder {word} holds no pictures ({', '.join(SUFFIXES)})")
        yield from map(str, found)


def free_base(folder: Path, stem: str, request, taken: set[Path]) -> Path:
    """The first of STEM.png, STEM-2.png, … in `folder` that replaces no file and nothing taken."""
    from kontext_jax.sampling.output import picture_paths

    base, number = folder / f"{stem}.png", 1
    while any(path in taken or path.exists() for path in picture_paths(base, request)):
        number += 1
        base = folder / f"{stem}-{number}.png"
    return base


def of_request(
    flags: Flags,
    fields: Flags,
    bundle: "ModelBundle",
    recipe: "Recipe | None",
    mesh: Mapping[str, int],
    same_loras: bool,
) -> OneRequest:
    """The request of the flags, that of a picture's metadata, or the demonstration.

    Args:
      same_loras: whether the LoRAs are those of the picture.

    Raises:
      ValueError, OSError: bad options or pictures, or an output that cannot be written.
    """
    from kontext_jax.sampling import output as outputs
    from kontext_jax.sampling import requests
    from kontext_jax.sampling.recipes import prepare_again

    place = None
    if recipe:
        prepared, same = prepare_again(recipe, bundle.preset, fields)
        then = (recipe.dtype, recipe.tiling, recipe.mesh)
        if same and same_loras and (*dtype_and_tiling(flags, recipe), mesh) == then:
            place = recipe.place
    else:
        if "prompt" not in fields and "images" not in fields:
            fields = {**fields, "prompt": DEMO_PROMPT}
            if bundle.preset.takes_references:
                fields["images"] = [DEMO_IMAGE]
        prepared = requests.prepare(requests.request_from_dict(fields), bundle.preset)
    base = Path(flags["output"]) if "output" in flags else outputs.free_output(OUTPUTS)
    outputs.check_outputs(base, prepared.request)
    return OneRequest(prepared, base, place)


def dtype_and_tiling(flags: Flags, recipe: "Recipe | None") -> tuple[str | None, str]:
    """Those of the flags, or else those that a picture was made with."""
    dtype = flags.get("dtype") or (recipe.dtype if recipe else None)
    return dtype, flags.get("tile", recipe.tiling if recipe else "auto")


def make_pipeline(
    bundle: "ModelBundle",
    flags: Flags,
    recipe: "Recipe | None",
    mesh_sizes: Mapping[str, int],
    tell: Tell,
) -> "Pipeline":
    """The pipeline, after which lines say what it is.

    Raises:
      ValueError: there are not as many devices as the mesh has.
    """
    from kontext_jax.runtime import programs
    from kontext_jax.runtime.placement import format_mesh, sampling_mesh
    from kontext_jax.sampling.pipeline import Pipeline

    mesh = sampling_mesh(mesh_sizes)
    kept = None
    if not flags.get("no_cache"):
        kept = programs.keep_compiled_programs(programs.default_cache_dir())
    dtype, tiling = dtype_and_tiling(flags, recipe)
    pipeline = Pipeline(
        bundle,
        dtype=dtype,
        tiling=tiling,
        mesh=mesh,
        keep_text_encoders=False,
        programs_dir=kept and kept / PROGRAMS,
        tell=lambda line: tell(f"note: {line}"),
    )
    name, source = bundle.preset.name, bundle.source
    tell(f"model: {source}" if name in source else f"model: {name}, {source}")
    for lora in bundle.adapters:
        tell(f"LoRA: {lora.name}, scale {lora.scale:g}")
    if mesh is not None:
        tell(f"mesh: {format_mesh(mesh_sizes)} of {mesh.size} devices")
    if model_named(flags, recipe) == UNTRAINED:
        tell("note: untrained: the picture shows that every part runs, it is no edit")
    if kept is not None:
        tell(f"compiled programs are kept in {kept} (--no-cache: they are not)")
    return pipeline


def tell_of_recipe(recipe: "Recipe", again: Any, tell: Tell) -> None:
    """Whether a picture is made again, and what may differ; or that it is a new request."""
    from kontext_jax.sampling.recipes import differences_here

    if not again:
        tell(f"a new request after {recipe.path}, with changed options")
        return
    tell(f"making {recipe.path} again")
    for difference in differences_here(recipe):
        tell(f"note: the last bits may differ: {difference}")


def write(pipeline: "Pipeline", wanted: OneRequest | ManyRequests, flags: Flags, tell: Tell) -> int:
    """Makes and writes the pictures; the exit status."""
    from kontext_jax.sampling import output as outputs
    from kontext_jax.sampling.jobs import run_jobs

    def tell_error(line: str) -> None:
        print(f"error: {line}", file=sys.stderr, flush=True)

    progress = sys.stderr.isatty() and not flags.get("quiet")
    if isinstance(wanted, ManyRequests):
        failed, count = 0, len(wanted.jobs)
        size = wanted.at_a_time or count
        for start in range(0, count, size):
            failed += run_jobs(
                *(pipeline, wanted.jobs[start : start + size], wanted.folder, wanted.output),
                tell=tell,
                tell_error=tell_error,
                progress=progress,
            )
        tell(f"{count - failed} of {count} {wanted.noun} done")
        return 1 if failed else 0
    prepared, status = wanted.prepared, 0
    for line in (*prepared.lines(), prepared.sampling_line()):
        tell(line)
    for note in outputs.cautions(prepared.request, pipeline.preset):
        tell(f"note: {note}")
    failures = outputs.make_pictures(
        pipeline,
        [prepared],
        [wanted.base],
        tell=tell,
        place=wanted.place,
        last_turn_only=wanted.place is not None,
        progress=progress,
    )
    for error in failures.values():
        status = outputs.exit_status(error)
        tell_error(outputs.one_line(error))
    return status


def check_compile_only(flags: Flags, fields: Flags) -> None:
    """Raises ValueError for flags that say nothing together with --compile-only, or without it."""
    if not flags.get("compile_only"):
        if "references" in flags:
            raise ValueError(
                "--references goes with --compile-only; to edit a picture give --image"
            )
        return
    for name in ("jobs", "from_metadata", "no_cache", "output"):
        if name in flags:
            flag = "--" + name.replace("_", "-")
            raise ValueError(f"--compile-only makes no pictures and keeps programs; drop {flag}")
    if "images" in fields:
        raise ValueError("--compile-only works on blank pictures; give --references N, not --image")


def warm(
    bundle: "ModelBundle", fields: Flags, flags: Flags, mesh: Mapping[str, int], tell: Tell
) -> int:
    """Compiles what requests with these options need, and makes no picture (--compile-only)."""
    from kontext_jax.runtime import programs
    from kontext_jax.runtime.placement import sampling_mesh
    from kontext_jax.sampling import requests, warming
    from kontext_jax.sampling.pipeline import Pipeline

    request = requests.request_from_dict({"prompt": DEMO_PROMPT, **fields})
    counts = flags.get("references", [1 if bundle.preset.takes_references else 0])
    if min(counts) < 0:
        raise ValueError(f"--references {min(counts)}: expected 0 or more")
    wanted = [x for n in counts for x in warming.blank_requests(request, bundle.preset, n)]
    kept = programs.keep_compiled_programs(programs.default_cache_dir())
    pipeline = Pipeline(
        bundle,
        compile_only=True,
        dtype=flags.get("dtype"),
        tiling=flags.get("tile", "auto"),
        mesh=sampling_mesh(mesh),
        keep_text_encoders=False,
        programs_dir=kept / PROGRAMS,
        tell=lambda line: tell(f"note: {line}"),
    )
    tell(f"compiling for {bundle.preset.name} in {pipeline.dtype}")
    progress = sys.stderr.isatty() and not flags.get("quiet", False)
    warming.warm(pipeline, wanted, kept, tell=tell, progress=progress)
    return 0
