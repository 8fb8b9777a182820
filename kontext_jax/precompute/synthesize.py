"""A model's own results as training examples: `python -m kontext_jax.data.synthesize --out DIR`.

    python -m kontext_jax.data.synthesize --model W --cache edits-encoded --guidance 2.5 --out DIR
    python -m kontext_jax.data.synthesize --model W --prompts lines.txt --size 1024x1024 --out DIR
    python train.py --config configs/ladd.py --config.data.cache=DIR

Takes text and references of encoded examples, or prompts of a file, one a line, and writes what the
model makes of them in the format of `kontext_jax.data.encode`, for distillation: configs read it as
data.cache, or beside real examples as data.synthetic_cache. The model is a weight directory, a
training run (the average of its parameters) or published weights; one without an input for guidance
is guided by two passes. A run that was interrupted goes on by the same command, and one with a
larger --limit or --variants adds what is missing. All devices of a process share its batches, and
several machines the examples, when each is given its --process-index of --process-count and all the
same DIR.
"""

import argparse
import sys
import time
from pathlib import Path

import jax
import numpy as np

from kontext_jax.data.check import parse_arguments
from kontext_jax.data.encoded import folder as encoded_folder
from kontext_jax.data.encoded.batches import EncodedCache
from kontext_jax.data.encoded.records import ShardWriter, facts_hash, lock_part
from kontext_jax.data.index import hash_id
from kontext_jax.models.conditioning import ENCODER_KINDS
from kontext_jax.numerics import DIFFUSERS
from kontext_jax.pictures.latents import PIXELS_PER_TOKEN
from kontext_jax.precompute.encoding import FAILED, STOPPED, Networks, check_room
from kontext_jax.precompute.jobs import ImageProgress, read_stored
from kontext_jax.precompute.synthesis import (
    CachedGivens,
    Givens,
    PromptGivens,
    Recipe,
    Synthesis,
    choose,
)
from kontext_jax.runtime.placement import parse_mesh, sampling_mesh
from kontext_jax.sampling.stages import Stages
from kontext_jax.terminal import Parser, exit_status, size_text
from kontext_jax.types import DTYPES
from kontext_jax.weights.bundle import ModelBundle
from kontext_jax.weights.encoders import encoder_facts

DEFAULT_GUIDANCE = 2.5


PROG = "python -m kontext_jax.data.synthesize"


def make_parser(prog: str = PROG) -> argparse.ArgumentParser:
    parser = Parser(
        underscores=True,
        prog=prog,
        description=__doc__.replace(PROG, prog),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--model", required=True, metavar="W", help="whose results to write")
    given = parser.add_mutually_exclusive_group(required=True)
    given.add_argument("--cache", metavar="DIR", help="encoded examples to take the place of")
    given.add_argument("--prompts", metavar="FILE", help="prompts, one a line, without references")
    parser.add_argument("--out", required=True, metavar="DIR", help="made if it is not there")
    parser.add_argument("--size", metavar="WxH", help="of pictures from --prompts, in pixels")
    parser.add_argument(
        "--guidance",
        type=float,
        default=DEFAULT_GUIDANCE,
        help=f"told to the model, or the scale of two passes (default {DEFAULT_GUIDANCE})",
    )
    parser.add_argument("--steps", type=int, help="Euler steps; default: the model's own")
    parser.add_argument("--seed", type=int, default=0, help="of the noise (default 0)")
    parser.add_argument("--variants", type=int, default=1, help="results of each example")
    parser.add_argument("--limit", type=int, help="examples to make, of all processes together")
    parser.add_argument("--batch-size", type=int, default=8, help="results made at once")
    parser.add_argument("--dtype", choices=tuple(DTYPES), help="in which to compute")
    parser.add_argument("--mesh", help="sizes such as tensor=4; default: all devices, over data")
    parser.add_argument("--process-index", type=int, default=0, help="this one, from 0")
    parser.add_argument("--process-count", type=int, default=1, help="that share the examples")
    parser.add_argument("--shard-kb", type=int, default=512_000, help="size of a file, in kB")
    parser.add_argument("-q", "--quiet", action="store_true", help="print nothing but errors")
    return parser


def main(arguments: list[str] | None = None, prog: str = PROG) -> int:
    """Makes what is missing in DIR; returns the status: 1 failed, 2 bad input."""
    args = parse_arguments(make_parser(prog), arguments)

    def run() -> int:
        _check(args)
        synthesize(args)
        return 0

    return exit_status(run, failed=FAILED, interrupted=STOPPED)


def _check(args: argparse.Namespace) -> None:
    encoded_folder.check_share(args.process_index, args.process_count)
    for name in ("steps", "variants", "limit", "batch_size"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            flag = "--" + name.replace("_", "-")
            raise ValueError(f"{flag} is {getattr(args, name)}; expected at least 1")
    if (args.size is None) != (args.prompts is None):
        raise ValueError("--size goes with --prompts: encoded examples have sizes of their own")


def synthesize(args: argparse.Namespace) -> None:
    """Does what the options say.

    Raises:
      ValueError, OSError: options, examples, weights or DIR do not fit each other.
      FloatingPointError: the model gave NaN or infinity.
    """
    from convert_weights.open import open_weights

    def tell(line: str) -> None:
        if not args.quiet:
            print(line, flush=True)

    out = encoded_folder.local_folder(args.out)
    bundle = open_weights(args.model, complete=False)
    if "mmdit" not in bundle.components:
        raise ValueError(f"{bundle.source} has no transformer")
    sizes = parse_mesh(args.mesh) if args.mesh else {"data": len(jax.local_devices())}
    mesh = sampling_mesh(sizes, jax.local_devices())
    stages = Stages(bundle, dtype=args.dtype, mesh=mesh, tell=tell)
    tell(f"model: {bundle.source}")
    if args.cache:
        givens, facts = _open_cache(args.cache, bundle)
    else:
        givens, facts = _open_prompts(args, stages, tell)
    num_steps = args.steps or bundle.preset.steps(DIFFUSERS)
    recipe = Recipe(args.guidance, num_steps, args.seed)
    facts = facts | {
        "results": {
            "model": bundle.identity,
            "guidance": args.guidance,
            "num_steps": num_steps,
            "seed": args.seed,
            "dtype": stages.dtype,
        }
    }
    made_by, share = facts_hash(facts), (args.process_index, args.process_count)
    if (out / encoded_folder.MANIFEST).exists():
        encoded_folder.check_facts(out, encoded_folder.read_manifest(out)["facts"], facts)
    out.mkdir(parents=True, exist_ok=True)
    with lock_part(out, args.process_index):
        encoded_folder.withdraw_done(out, *share)
        stored = read_stored(out, made_by)
        numbers = choose(givens.ids, args.limit, *share)
        wanted = [(n, variant) for n in numbers for variant in range(args.variants)]
        jobs = [(n, v) for n, v in wanted if (hash_id(givens.ids[n]), v) not in stored.text_of]
        num_done = len(wanted) - len(jobs)
        needed = _bytes_needed(bundle, givens, jobs, DTYPES[facts["dtype"]])
        free = check_room(out, needed, "the latents alone take")
        tell(
            f"to make: {len(jobs):,} results of {len(numbers):,} examples ({num_done:,} made "
            f"before), {num_steps} steps each, guidance {args.guidance:g}: latents "
            f"{size_text(needed)}; {size_text(free)} free"
        )
        notes = {"model": bundle.source, "made_with": {"jax": jax.__version__}}
        encoded_folder.start_folder(out, facts, notes, givens.null_text)
        writer = ShardWriter(out, args.process_index, made_by, args.shard_kb * 1000)
        work = Synthesis(
            stages,
            givens,
            recipe,
            writer,
            stored.texts,
            batch_size=args.batch_size,
            dtype=np.dtype(DTYPES[facts["dtype"]]),
        )
        start = time.monotonic()
        with ImageProgress(len(jobs), 1, verb="made", tell=tell, quiet=args.quiet) as progress:
            work.run(jobs, progress)
        seconds = time.monotonic() - start
        encoded_folder.write_done(out, *share, len(wanted))
    rate = f" ({len(jobs) / seconds:.3g} a second)" if jobs else ""
    tell(
        f"made {len(jobs):,} results in {seconds:.1f} s{rate}; {out} holds {len(wanted):,} of this "
        f"process; train with --config.data.cache={out}, or beside real ones with "
        f"--config.data.synthetic_cache={out}"
    )


def _open_cache(directory: str, bundle: ModelBundle) -> tuple[Givens, dict]:
    """The encoded examples, and the facts that their records keep."""
    cache = EncodedCache(directory)
    complete = set(ENCODER_KINDS) <= bundle.components.keys() and bundle.tokenizer_dirs
    if complete:  # a run may have trained on a cache alone
        expected = encoder_facts(bundle, cache.facts["max_text_tokens"])
        encoded_folder.check_facts(Path(directory), cache.facts, expected)
    return CachedGivens(cache), cache.facts


def _open_prompts(args: argparse.Namespace, stages: Stages, tell) -> tuple[Givens, dict]:
    bundle, unit = stages.bundle, PIXELS_PER_TOKEN
    facts = encoder_facts(bundle, bundle.preset.max_text_tokens)
    words = args.size.split("x")
    if len(words) != 2 or not all(w.isdecimal() and int(w) and int(w) % unit == 0 for w in words):
        raise ValueError(f"--size is {args.size}; expected WxH, both multiples of {unit}")
    lines = Path(args.prompts).read_text("utf-8").splitlines()
    if not (prompts := [line.strip() for line in lines if line.strip()]):
        raise ValueError(f"{args.prompts} holds no prompts; write one a line")
    networks = Networks(
        bundle, DTYPES[stages.dtype], args.batch_size, bundle.preset.max_text_tokens, tell
    )
    width, height = map(int, words)
    return PromptGivens(prompts, (width, height), networks), facts | {"dtype": stages.dtype}


def _bytes_needed(bundle: ModelBundle, givens: Givens, jobs, dtype) -> int:
    cell, depth = bundle.preset.vae.downsampling, bundle.preset.vae.z_channels
    cells = 0
    for number, _ in jobs:
        kind = givens.kind(number)
        cells += sum((w // cell) * (h // cell) for w, h in (kind.target, *kind.contexts))
    return cells * depth * np.dtype(dtype).itemsize


if __name__ == "__main__":
    sys.exit(main())
