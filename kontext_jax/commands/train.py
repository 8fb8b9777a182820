"""`kontext train`: trains a model by a config's recipe."""

import argparse
import sys
from pathlib import Path

from kontext_jax.terminal import SETTING, Parser, exit_status, load_config, split_settings

RUNS = Path("runs")
ESSENTIAL = ("--config", "--config.KEY", "--workdir", "--print-config", "--dry-run")
EPILOG = """examples:
  {prog} --config configs/tiny.py                      seconds, on any machine
  {prog} --config configs/tiny.py --print-config       every setting and its value
  {prog} --config configs/lora.py --dry-run            checks data, weights and memory
  {prog} --config configs/lora.py --workdir runs/hats --config.optimizer.learning_rate=1e-4

A run that was interrupted goes on by the same command. Several processes, of which each sees its
own devices, are started with --coordinator HOST:PORT --num-processes N --process-id I, or alike on
every machine under SLURM, Open MPI and on TPU pods with --coordinator auto.
"""


def make_parser(prog: str = "kontext train") -> Parser:
    """The command line's grammar and help."""
    parser = Parser(
        prog=prog,
        usage=f"{prog} --config FILE [options]",
        description="Trains FLUX.1 Kontext, or a part of it, by a config file's recipe.",
        epilog=EPILOG.format(prog=prog),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        prefixes=(SETTING,),
        essentials=ESSENTIAL,
    )
    parser.add_argument(
        "--config",
        required=True,
        metavar="FILE.py|NAME",
        help="a config file, or the name of one in configs/, such as tiny",
    )
    parser.add_argument(
        "--config.KEY", metavar="VALUE", dest="_", help="changes a setting; may be repeated"
    )
    parser.add_argument(
        "--workdir",
        metavar="RUN",
        help=f"the run's folder, local or gs://…; default {RUNS}/NAME of the config file",
    )
    parser.add_argument("--print-config", action="store_true", help="print all settings, and stop")
    parser.add_argument(
        "--dry-run", action="store_true", help="check everything that needs no compiling, and stop"
    )
    parser.add_argument(
        "--no-cache", action="store_true", help="don't keep compiled programs on disk"
    )
    parser.add_argument("-q", "--quiet", action="store_true", help="print nothing but errors")
    several = parser.add_argument_group("several processes")
    several.add_argument(
        "--coordinator", metavar="HOST:PORT|auto", help="where process 0 is; auto: ask the cluster"
    )
    several.add_argument("--num-processes", type=int, metavar="N")
    several.add_argument("--process-id", type=int, metavar="I", help="0 to N - 1")
    return parser


def open_weights(path: str):
    """The bundle of a weight directory, a run's folder, or weights as others publish them."""
    from convert_weights.open import open_weights

    return open_weights(path, complete=False)


def start_processes(args: argparse.Namespace) -> None:
    """Joins the other processes, if there are any; before JAX touches a device.

    Raises:
      ValueError: flags that do not go together, or no cluster to ask.
    """
    from kontext_jax.runtime import processes

    if args.coordinator is None and not (args.num_processes is None and args.process_id is None):
        raise ValueError("--num-processes and --process-id need --coordinator HOST:PORT")
    if args.coordinator is None:
        processes.join_detected()
    else:
        processes.join(args.coordinator, args.num_processes, args.process_id)


def main(argv: list[str] | None = None, prog: str = "kontext train") -> int:
    """Runs the command line; the exit status: 0, 1 if training failed, 2 for bad input."""

    def parse_and_run() -> int:
        words, settings = split_settings(sys.argv[1:] if argv is None else argv)
        return run(make_parser(prog).parse_args(words), settings)

    return exit_status(parse_and_run)


def run(args: argparse.Namespace, settings: list[tuple[str, str]]) -> int:
    """Does what the flags ask for."""
    # Imported when the flags are known to be good: JAX takes a second or two.
    from kontext_jax.training import config as train_config

    config = train_config.parse(load_config(args.config), settings)
    if args.print_config:
        print(train_config.to_json(config))
        return 0
    start_processes(args)

    import jax

    from kontext_jax.runtime import programs
    from kontext_jax.training import loop as train_loop

    def tell(line: str) -> None:
        if not args.quiet and jax.process_index() == 0:
            print(line, flush=True)

    if not args.no_cache:
        programs.keep_compiled_programs(programs.default_cache_dir())
    workdir = args.workdir or str(RUNS / Path(args.config).stem)
    if args.dry_run:
        train_loop.dry_run(config, workdir, open_weights=open_weights, tell=tell)
        return 0
    train_loop.train(config, workdir, open_weights=open_weights, tell=tell)
    return 0
