"""Times edits, and starts, of the sampler on whatever device JAX finds.

    python benchmarks/sample_speed.py [--json FILE]
    python benchmarks/sample_speed.py --preset kontext-dev --weights W --size 1024x1024 --steps 28
    python benchmarks/sample_speed.py --starts --layers 8 16 --heads 8

An edit goes from a prompt and blank pictures in host memory to pixels in host memory. Weights are
random unless `--weights` names some: they cost the same. Loading, compiling and warm-up runs are
outside the timer.

`--starts` times instead what a new process spends on its programs: made from nothing; traced,
lowered and found in JAX's cache on disk; and loaded from `kontext_jax.executable_files`. Weights
are shapes, nothing is computed, and JAX's caches in memory are emptied before each.
"""

import argparse
import dataclasses
import tempfile
from pathlib import Path

import common
import jax

from kontext_jax.models.presets import PRESETS
from kontext_jax.runtime import programs as compiling
from kontext_jax.sampling.pipeline import Failure, Pipeline
from kontext_jax.sampling.requests import PreparedRequest, SampleRequest
from kontext_jax.sampling.warming import blank_requests, compile_for
from kontext_jax.weights import bundle as checkpoint
from kontext_jax.weights.untrained import untrained_bundle

EDIT_TIMER = "an edit from prompt and pictures to pixels, host to host; not loading or compiling"
START_TIMER = "making all programs of an edit in a process that has none in memory"


def open_bundle(args: argparse.Namespace) -> checkpoint.ModelBundle:
    """The model, its transformer with other sizes if --layers or --heads ask for that."""
    if args.weights:
        from convert_weights.open import open_weights

        return open_weights(args.weights, args.preset)
    bundle = untrained_bundle(args.preset or "tiny")
    mmdit = bundle.components["mmdit"]
    config = mmdit.config
    if args.heads:
        width = args.heads * config.head_dim
        config = dataclasses.replace(config, num_heads=args.heads, hidden_size=width)
    if args.layers:
        double, single = args.layers
        config = dataclasses.replace(config, depth=double, depth_single_blocks=single)
    changed = dataclasses.replace(mmdit, config=config)
    return dataclasses.replace(
        bundle,
        preset=dataclasses.replace(bundle.preset, mmdit=config),
        components=bundle.components | {"mmdit": changed},
    )


def make_request(args: argparse.Namespace, preset) -> PreparedRequest:
    request = SampleRequest(
        "a benchmark", size=args.size, num_steps=args.steps, num_images=args.batch
    )
    if args.size is None:
        side = int((preset.megapixels * 1e6) ** 0.5) // 16 * 16
        request = dataclasses.replace(request, size=f"{side}x{side}")
    num_references = args.references if preset.takes_references else 0
    return next(blank_requests(request, preset, num_references))


def time_edits(args: argparse.Namespace, bundle, prepared: PreparedRequest) -> list[dict]:
    """Whole edits, their stages, and a step."""
    pipeline = Pipeline(bundle, dtype=args.dtype)
    stages: dict[str, list[float]] = {"encode": [], "denoise": [], "decode": []}

    def edit():
        before = dict(pipeline.timings.seconds)
        for result in pipeline.edit([prepared]):
            if isinstance(result, Failure):
                raise result.error
        for name, seconds in stages.items():
            seconds.append(pipeline.timings.seconds[name] - before.get(name, 0))

    whole = common.time_runs(edit, args.warm_up, args.runs)
    stages = {name: seconds[args.warm_up :] for name, seconds in stages.items()}
    steps = [seconds / prepared.request.num_steps for seconds in stages["denoise"]]
    rows = [("an edit", whole), *stages.items(), ("a step", steps)]
    return [common.measurement(what, "s", seconds) for what, seconds in rows]


def time_starts(args: argparse.Namespace, bundle, prepared: PreparedRequest) -> list[dict]:
    """Seconds for all programs: from nothing, from JAX's cache, from files of our own."""
    with tempfile.TemporaryDirectory() as folder:
        compiling.keep_compiled_programs(Path(folder) / "jax")

        def seconds(programs_dir: Path | None) -> float:
            jax.clear_caches()
            pipeline = Pipeline(
                bundle, dtype=args.dtype, programs_dir=programs_dir, compile_only=True
            )
            compile_for(pipeline, prepared)
            return pipeline.timings.seconds["compile"]

        programs = Path(folder) / "programs"
        found = {"from nothing": [seconds(programs)]}
        seconds(None)  # programs that drop unused arguments are others for JAX's cache
        pairs = [(seconds(None), seconds(programs)) for _ in range(args.runs)]
        found["JAX's cache"], found["program files"] = map(list, zip(*pairs, strict=True))
    ratios = [a / b for a, b in zip(found["JAX's cache"], found["program files"], strict=True)]
    rows = [common.measurement(what, "s", seconds) for what, seconds in found.items()]
    return [*rows, common.measurement("JAX's cache / program files", "×", ratios)]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", choices=PRESETS, help="default tiny, or what the weights say")
    parser.add_argument("--weights", metavar="PATH", help="as sample.py takes them")
    parser.add_argument("--size", metavar="WxH", help="default: a square of the preset's area")
    parser.add_argument("--references", type=int, default=1)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--batch", type=int, default=1, help="pictures of an edit")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"))
    parser.add_argument("--layers", type=int, nargs=2, metavar="N", help="double and single blocks")
    parser.add_argument("--heads", type=int, metavar="N")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--warm-up", type=int, default=2)
    parser.add_argument("--starts", action="store_true")
    common.add_json_flag(parser)
    args = parser.parse_args()
    bundle = open_bundle(args)
    prepared = make_request(args, bundle.preset)
    rows = (time_starts if args.starts else time_edits)(args, bundle, prepared)
    found = common.report(
        "sample_speed",
        args,
        rows,
        timer=START_TIMER if args.starts else EDIT_TIMER,
        warm_up_runs=0 if args.starts else args.warm_up,
        model=bundle.source,
        size="{}x{}".format(*prepared.sizes.output),
        num_steps=prepared.request.num_steps,
    )
    print(f"{found['device']}: {bundle.preset.name}, {found['size']}, {found['num_steps']} steps")
    for row in rows:
        print(" ", common.line(row))
    common.write(found, args.json)


if __name__ == "__main__":
    main()
