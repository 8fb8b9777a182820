"""Edits an image, or makes one from text: `python sample.py --image cat.png --prompt "…"`."""

import argparse
import dataclasses
import math
import os
import sys
from pathlib import Path

from kontext_jax.terminal import Parser

DEMO_IMAGE = "example:cat"
DEMO_PROMPT = "put a red frame around the picture"
# What --model can name where there are no --weights, besides the models of the package.
SHIPPED, UNTRAINED = "tiny", "untrained"
OUTPUTS = Path("outputs")
PROGRAMS = "programs"  # folder of the cache for programs that are loaded without tracing
EPILOG = """examples:
  python sample.py                              edits a picture by the small model of the package;
                            kontext_jax/assets/models/tiny/README.md says what that one understands
  python sample.py --model tiny-fast            the same, distilled to a few steps
  python sample.py --weights FLUX.1-Kontext-dev --image cat.png --prompt "make the cat black"
  python sample.py --weights W --image a.png --prompt "add a hat" --then "make the hat blue"
  python sample.py --weights W --image me.png --image hat.png --prompt "the man wears the hat"
  python sample.py --weights W --image phone.jpg --prompt "at night" --restore-size -o night.png
  python sample.py --weights W --lora hats.safetensors --lora ink.safetensors:0.7 --image me.png …
  python sample.py --weights W --jobs jobs.jsonl -o results/
  python sample.py --weights W --mesh context=4 --image cat.png --prompt "make the cat black"
  python sample.py --weights W --from-metadata night.png -o again.png
  python sample.py --weights W --compile-only --references 1 2

A line of a jobs file is {"prompt": "…", "images": ["cat.png"], "seed": 7, "output": "x.png"}: the
options below by their long names (num_steps for --steps, true_cfg_scale for --true-cfg), images
relative to the jobs file.
"""
# Flag → field of SampleRequest, where they differ.
FIELD_OF_FLAG = {"image": "images", "steps": "num_steps", "true_cfg": "true_cfg_scale"}


def make_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="sample.py",
        description="Edits images by FLUX.1 Kontext, or makes them from text.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,  # what was not given does not exist
    )
    what = parser.add_argument_group("what to make")
    what.add_argument("--prompt", help="the edit, or the picture; nothing at all: a demonstration")
    what.add_argument("--image", action="append", metavar="FILE", help="to edit; may be repeated")
    what.add_argument(
        "--then", action="append", metavar="PROMPT", help="a further edit of the result; repeatable"
    )
    what.add_argument("--num-images", type=int, metavar="N", help="with seeds SEED, SEED+1, …")
    what.add_argument("--seed", type=int, help="default 0")
    what.add_argument("--negative-prompt", metavar="PROMPT", help="goes with --true-cfg")

    size = parser.add_argument_group("size (default: the preferred size nearest to the image's)")
    size.add_argument("--size", metavar="WxH|W:H|match", help="exact, a ratio, or the image's own")
    size.add_argument("--megapixels", type=float, metavar="X", help="area, keeping ratios")
    size.add_argument(
        "--restore-size",
        action="store_true",
        help="return the image's own size, any size, without stretching",
    )
    size.add_argument(
        "--reference-size", metavar="auto|match", help="match: references keep their own sizes"
    )

    how = parser.add_argument_group("sampling (default: what the model's own card says)")
    how.add_argument("--steps", type=int, metavar="N")
    how.add_argument(
        "--sampler",
        metavar="euler|renoise|policy",
        help="renoise: for models distilled to few steps, each step ends in new noise; policy: for "
        "those that give several velocities a step",
    )
    how.add_argument(
        "--timesteps",
        type=float,
        nargs="+",
        metavar="T",
        help="at which steps begin, falling from 1, instead of --steps and an even grid",
    )
    how.add_argument("--guidance", type=float, metavar="G", help="for models that take it")
    how.add_argument(
        "--true-cfg", type=float, metavar="S", help="classifier-free guidance, two passes a step"
    )
    how.add_argument(
        "--numerics", metavar="exact|bfl|diffusers", help="whose rules and roundings to follow"
    )
    how.add_argument(
        "--position-rule", metavar="index|bfl|width", help="where several references stand"
    )
    how.add_argument(
        "--text-mask",
        action="store_true",
        help="hide padding from T5 (models were trained without)",
    )

    model = parser.add_argument_group("model")
    model.add_argument(
        "--weights",
        metavar="PATH",
        help="converted directory, diffusers folder, BFL's file beside its parts, hub id, or the "
        "folder of a training run",
    )
    model.add_argument(
        "--checkpoint", type=int, metavar="STEP", help="of a training run (default: the newest)"
    )
    model.add_argument(
        "--raw-params",
        action="store_true",
        help="of a training run, the parameters themselves rather than their average",
    )
    model.add_argument(
        "--model",
        metavar="NAME",
        help="default: what the weights say; without weights tiny or tiny-fast, which ship with "
        "the package, or untrained, whose pictures mean nothing",
    )
    model.add_argument(
        "--lora",
        action="append",
        metavar="FILE[:SCALE]",
        help="LoRA in any published layout, or a run that trained one; scale 1 unless given; may "
        "be repeated",
    )
    model.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: by device")
    model.add_argument(
        "--tile",
        choices=("auto", "on", "off"),
        help="autoencoder in tiles, for large pictures in little memory (default auto)",
    )

    model.add_argument(
        "--mesh",
        metavar="AXIS=N,…",
        help="several devices: data=N for many pictures; context=N (tokens) or tensor=N (weights "
        "too) for one; fsdp=N as data, with split weights",
    )

    run = parser.add_argument_group("run")
    run.add_argument(
        "-o",
        "--output",
        metavar="FILE.png|DIR",
        help=f"default {OUTPUTS}/edit-001.png, -002, …; with --jobs a folder",
    )
    run.add_argument("--jobs", metavar="FILE", help="one request a line, as JSON")
    run.add_argument("--from-metadata", metavar="FILE.png", help="make this picture again")
    run.add_argument(
        "--compile-only",
        action="store_true",
        help="compile what requests with these options need, for all preferred sizes or --size, so "
        "that later runs do not; weights are not read",
    )
    run.add_argument(
        "--references",
        type=int,
        nargs="+",
        metavar="N",
        help="with --compile-only: how many images requests have (default 1, or 0 for models that "
        "take none)",
    )
    run.add_argument("--show", choices=("timings",), action="append", help="print at the end")
    run.add_argument("--no-cache", action="store_true", help="don't keep compiled programs on disk")
    run.add_argument("-q", "--quiet", action="store_true", help="print nothing but errors")
    return parser


def open_weights(
    weights: str | None,
    model: str | None,
    raw_params: bool = False,
    step: int | None = None,
    shapes_suffice: bool = False,
):
    """The bundle that --weights, --model, --raw-params and --checkpoint mean."""
    from kontext_jax.models.presets import PRESETS
    from kontext_jax.terminal import did_you_mean
    from kontext_jax.weights import bundle as checkpoint
    from kontext_jax.weights.untrained import untrained_bundle

    model_or_shipped = model or SHIPPED
    if weights is None and model_or_shipped in checkpoint.PACKAGED:
        return checkpoint.shipped_bundle(model_or_shipped)
    if weights is None and model == UNTRAINED:
        return untrained_bundle("tiny")
    names = tuple(PRESETS)
    if weights is None:
        names = tuple(dict.fromkeys((*checkpoint.PACKAGED, *PRESETS, UNTRAINED)))
    if model is not None and model not in names:
        raise ValueError(
            f"there is no model {model!r}{did_you_mean(model, names)}; models are "
            f"{', '.join(names)}"
        )
    if weights is None and shapes_suffice:
        return untrained_bundle(model)
    if weights is None:
        raise ValueError(
            f"{model} needs its weights; give --weights PATH, or use --model {SHIPPED} without any"
        )
    from convert_weights.open import open_weights as open_any

    return open_any(weights, model, which="params" if raw_params else None, step=step)


def model_of(recipe) -> str:
    """The model that a picture was made by, if it needed no --weights; else its preset."""
    from kontext_jax.weights import bundle as checkpoint

    for name, folder in checkpoint.PACKAGED.items():
        if folder.is_dir() and recipe.weights == checkpoint.shipped_bundle(name).identity:
            return name
    return UNTRAINED if recipe.model == "tiny" else recipe.model


def parse_lora(text: str) -> tuple[str, float]:
    """Path and scale of `FILE[:SCALE]`.

    Raises:
      ValueError: there is no such file, or the scale is no finite number.
    """
    path, scale = text, 1.0
    if not Path(text).exists() and ":" in text:
        path, _, number = text.rpartition(":")
        try:
            scale = float(number)
        except ValueError:
            scale = math.nan
        if not math.isfinite(scale):
            raise ValueError(f"--lora {text}: the scale is {number!r}; expected one such as 0.7")
    if not Path(path).exists():
        raise ValueError(f"--lora {text}: there is no file {path}")
    return path, scale


def add_loras(bundle, given: list[str] | None, recipe):
    """The bundle with the LoRAs of --lora, or else those that a picture was made with.

    Returns:
      (bundle, whether they are those of the picture).
    """
    from convert_weights.lora.read import open_adapter
    from kontext_jax.sampling.recipes import (
        check_loras,
        find_loras,
        same_loras,
    )
    from kontext_jax.weights import adapters

    if given is not None:
        wanted = [parse_lora(text) for text in given]
    else:
        wanted = find_loras(recipe) if recipe else []
    configs = {kind: component.config for kind, component in bundle.components.items()}
    loras = [(open_adapter(path, configs), scale) for path, scale in wanted]
    bundle = adapters.with_adapters(bundle, loras)
    if recipe is None:
        return bundle, True
    if given is None:
        check_loras(recipe, bundle.adapters)
    if not same_loras(recipe.loras, bundle.adapters):
        return bundle, False
    # The names in the metadata stay as they were, wherever the files lie now.
    return dataclasses.replace(bundle, adapters=recipe.loras), True


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; the exit status: 0, 1 if computing failed, 2 for bad input."""
    given = vars(make_parser().parse_args(argv))
    try:
        return run(given)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def check_compile_only(flags: dict, fields: dict) -> None:
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


def warm(bundle, fields: dict, flags: dict, mesh, tell) -> int:
    """--compile-only."""
    from kontext_jax.runtime import programs
    from kontext_jax.sampling import requests, warming

    request = requests.request_from_dict({"prompt": DEMO_PROMPT, **fields})
    counts = flags.get("references", [1 if bundle.preset.takes_references else 0])
    if min(counts) < 0:
        raise ValueError(f"--references {min(counts)}: expected 0 or more")
    wanted = [x for n in counts for x in warming.blank_requests(request, bundle.preset, n)]
    kept = programs.keep_compiled_programs(programs.default_cache_dir())
    pipeline = warming.WarmingPipeline(
        bundle,
        dtype=flags.get("dtype"),
        tiling=flags.get("tile", "auto"),
        mesh=mesh,
        keep_text_encoders=False,
        programs_dir=kept / PROGRAMS,
        tell=lambda line: tell(f"note: {line}"),
    )
    tell(f"compiling for {bundle.preset.name} in {pipeline.dtype}")
    progress = sys.stderr.isatty() and not flags.get("quiet", False)
    warming.warm(pipeline, wanted, kept, tell=tell, progress=progress)
    return 0


def run(given: dict) -> int:
    """Runs what the flags ask for."""
    # Imported when the flags are known to be good: JAX takes a second or two.
    from kontext_jax.sampling import requests
    from kontext_jax.sampling.jobs import read_jobs

    flags = {FIELD_OF_FLAG.get(name, name): value for name, value in given.items()}
    fields = {name: flags.pop(name) for name in requests.FIELDS if name in flags}
    quiet, jobs, recipe_path = (flags.get(name) for name in ("quiet", "jobs", "from_metadata"))
    if jobs and recipe_path:
        raise ValueError("--jobs and --from-metadata cannot be used together")
    if jobs and fields:
        raise ValueError(f"with --jobs, {', '.join(sorted(fields))} belongs into the file's lines")

    compile_only = flags.get("compile_only", False)
    check_compile_only(flags, fields)

    from kontext_jax.runtime import programs
    from kontext_jax.runtime.placement import format_mesh, parse_mesh, sampling_mesh
    from kontext_jax.sampling import output as runs
    from kontext_jax.sampling.jobs import run_jobs
    from kontext_jax.sampling.pipeline import Pipeline
    from kontext_jax.sampling.recipes import (
        differences_here,
        prepare_again,
        read_recipe,
    )

    def tell(line: str) -> None:
        if not quiet:
            print(line, flush=True)

    def tell_error(line: str) -> None:
        print(f"error: {line}", file=sys.stderr, flush=True)

    job_list = read_jobs(jobs) if jobs else None
    recipe = read_recipe(Path(recipe_path)) if recipe_path else None
    model = flags.get("model")
    if recipe and not flags.get("weights"):
        model = model or model_of(recipe)
    bundle = open_weights(
        *(flags.get("weights"), model, flags.get("raw_params", False), flags.get("checkpoint")),
        shapes_suffice=compile_only,
    )
    if recipe and bundle.identity != recipe.weights:
        raise ValueError(
            f"{recipe_path} was made with {recipe.model} weights {recipe.weights[:12]}…, found "
            f"{bundle.preset.name} {bundle.identity[:12]}…; give the same with --weights"
        )
    bundle, as_then = add_loras(bundle, flags.get("lora"), recipe)
    dtype, tiling = flags.get("dtype"), flags.get("tile", "auto")
    mesh_sizes = recipe.mesh if recipe else {}
    if "mesh" in flags:
        mesh_sizes = parse_mesh(flags["mesh"])
    mesh = sampling_mesh(mesh_sizes)
    if compile_only:
        return warm(bundle, fields, flags, mesh, tell)
    prepared = base = place = None
    if recipe:
        prepared, same = prepare_again(recipe, bundle.preset, fields)
        dtype, tiling = dtype or recipe.dtype, flags.get("tile", recipe.tiling)
        same = same and as_then and (dtype, tiling) == (recipe.dtype, recipe.tiling)
        same = same and mesh_sizes == recipe.mesh
        place = recipe.place if same else None
    elif not jobs:
        if "prompt" not in fields and "images" not in fields:
            fields["prompt"] = DEMO_PROMPT
            if bundle.preset.takes_references:
                fields["images"] = [DEMO_IMAGE]
        request = requests.request_from_dict(fields)
        prepared = requests.prepare(request, bundle.preset)
    if jobs:
        output = Path(flags.get("output", OUTPUTS / Path(jobs).stem))
        if output.exists() and not output.is_dir():
            raise ValueError(f"output {output} is a file; with --jobs, -o names a folder")
    else:
        base = Path(flags["output"]) if "output" in flags else runs.free_output(OUTPUTS)
        runs.check_outputs(base, prepared.request)

    kept = None
    if not flags.get("no_cache"):
        kept = programs.keep_compiled_programs(programs.default_cache_dir())
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
    if model == UNTRAINED:
        tell("note: untrained: the picture shows that every part runs, it is no edit")
    if kept is not None:
        tell(f"compiled programs are kept in {kept} (--no-cache: they are not)")
    if recipe and place:
        tell(f"making {recipe_path} again")
        for difference in differences_here(recipe):
            tell(f"note: the last bits may differ: {difference}")
    elif recipe:
        tell(f"a new request after {recipe_path}, with changed options")

    progress = sys.stderr.isatty() and not quiet
    status = 0
    if jobs:
        failed = run_jobs(
            pipeline,
            job_list,
            Path(jobs).parent,
            output,
            tell=tell,
            tell_error=tell_error,
            progress=progress,
        )
        status = 1 if failed else 0
    else:
        for line in (*prepared.lines(), prepared.sampling_line()):
            tell(line)
        for note in runs.cautions(prepared.request, bundle.preset):
            tell(f"note: {note}")
        failures = runs.make_pictures(
            pipeline,
            [prepared],
            [base],
            tell=tell,
            place=place,
            last_turn_only=place is not None,
            progress=progress,
        )
        for error in failures.values():
            status = runs.exit_status(error)
            tell_error(runs.one_line(error))
    if "timings" in flags.get("show", ()):
        print(pipeline.timings.table())
    return status


if __name__ == "__main__":
    # Set before JAX is imported: the C++ runtime otherwise greets every run with log lines.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    sys.exit(main())
