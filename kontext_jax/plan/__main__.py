"""The command `python -m kontext_jax.plan`."""

import argparse
import sys

from kontext_jax.flow.names import SAMPLERS
from kontext_jax.terminal import SETTING, Parser, split_settings

STAGES = ("text", "encode", "prepare", "run", "decode")
PROG = "python -m kontext_jax.plan"
ESSENTIAL = ("--config", "--sample", "--topology", "--size", "--sweep")
EPILOG = """examples:
  {prog} --config configs/kontext_joint.py --topology v5p:4x4x4
  {prog} --config configs/lora.py --topology h100 --config.batch_size=1
  {prog} --config configs/kontext_joint.py --topology v5p:4x4x4 --sweep
  {prog} --sample --topology v5p --size 1024x1024 --references 2

Nothing is executed: the figures are the compiler's for hardware that need not be here. docs/plan.md
says what they mean. Exit status: 0 if it fits, 1 if not, 2 for bad input.
"""


def make_parser(prog: str = PROG) -> Parser:
    """The command line's grammar and help."""
    parser = Parser(
        prog=prog,
        usage=f"{prog} --config FILE|--sample --topology NAME [options]",
        description="Memory and time of training or sampling on hardware that is not here.",
        epilog=EPILOG.format(prog=prog),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        prefixes=(SETTING,),
        essentials=ESSENTIAL,
    )
    what = parser.add_argument_group("what to plan for")
    what.add_argument("--config", metavar="FILE.py|NAME", help="a training config, see configs/")
    what.add_argument(
        "--config.KEY", metavar="VALUE", dest="_", help="changes a setting; may be repeated"
    )
    what.add_argument(
        "--sample",
        nargs="?",
        const="kontext-dev",
        metavar="PRESET",
        help="sampling instead of training; default kontext-dev",
    )
    what.add_argument(
        "--topology",
        required=True,
        metavar="NAME",
        help="v5p (one chip), v5p:4x4x4, v5e:16x16, v6e:8x8, v5p:4x4x4*2 (slices), h100, h100x8, …",
    )
    what.add_argument(
        "--size", metavar="WxH", help="of targets and references; default: the config's largest"
    )
    what.add_argument("--references", type=int, metavar="N", help="default: 1 where it takes any")
    sample = parser.add_argument_group("with --sample")
    sample.add_argument("--steps", type=int, metavar="N", help="default 28")
    sample.add_argument("--sampler", choices=SAMPLERS, help="default euler")
    sample.add_argument("--batch", type=int, metavar="N", help="pictures at a time, default 1")
    sample.add_argument("--mesh", metavar="AXIS=N,…", help="as for sample.py; default one device")
    sample.add_argument("--stages", nargs="+", metavar="NAME", help=f"of {', '.join(STAGES)}")
    sweep = parser.add_argument_group("many settings of a config")
    sweep.add_argument("--sweep", action="store_true", help="try meshes, batches and policies")
    sweep.add_argument("--meshes", nargs="+", metavar="AXIS=N,…", help="default: fsdp from 4 up")
    sweep.add_argument("--batches", nargs="+", type=int, metavar="N", help="of a chip at a time")
    sweep.add_argument("--remats", nargs="+", metavar="NAME", help="what the backward pass keeps")
    output = parser.add_argument_group("output")
    output.add_argument("--top", type=int, default=8, metavar="N", help="operations to list")
    output.add_argument("--json", metavar="FILE", help="write everything here; - for the terminal")
    output.add_argument("--plot", metavar="FILE.png", help="draw time and memory")
    output.add_argument("--text", metavar="FILE", help="write the compiled program here")
    output.add_argument(
        "--check-dtypes",
        action="store_true",
        help="fail unless parameters travel in the compute dtype and gradients in float32",
    )
    output.add_argument("--no-cache", action="store_true", help="keep no compiled programs on disk")
    return parser


def check_flags(args: argparse.Namespace, settings: list[tuple[str, str]]) -> None:
    """Raises ValueError for flags that do not go together."""
    if bool(args.sample) == bool(args.config):
        raise ValueError("give either --config FILE.py, to train, or --sample")
    if args.sample:
        for name in ("sweep", "meshes", "batches", "remats", "check_dtypes"):
            if getattr(args, name):
                raise ValueError(f"--{name.replace('_', '-')} goes with --config, not --sample")
        if settings:
            raise ValueError(f"{SETTING}{settings[0][0]} goes with --config, not --sample")
        return
    for name in ("steps", "sampler", "batch", "mesh", "stages"):
        if getattr(args, name) is not None:
            raise ValueError(f"--{name} goes with --sample; a config has settings, {SETTING}KEY=…")
    for name in ("meshes", "batches", "remats"):
        if getattr(args, name) and not args.sweep:
            raise ValueError(f"--{name} goes with --sweep")
    if args.sweep and (args.text or args.check_dtypes):
        raise ValueError("--text and --check-dtypes are for one program, not for --sweep")


def main(argv: list[str] | None = None, prog: str = PROG) -> int:
    """Runs the command line; the exit status."""
    try:
        words, settings = split_settings(sys.argv[1:] if argv is None else argv)
        args = make_parser(prog).parse_args(words)
        check_flags(args, settings)
        return run(args, settings)
    except KeyboardInterrupt:
        print("interrupted; what was compiled is kept", file=sys.stderr)
        return 130
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def run(args: argparse.Namespace, settings: list[tuple[str, str]]) -> int:
    """Does what the flags ask for."""
    # Imported when the flags are known to be good: JAX takes a second or two.
    from kontext_jax.plan import commands

    if args.sample:
        return commands.plan_sampling(args)
    if args.sweep:
        return commands.plan_sweep(args, settings)
    return commands.plan_training(args, settings)


if __name__ == "__main__":
    sys.exit(main())
