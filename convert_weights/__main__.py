"""Command line: to-jax, to-torch, lora, mix, check, inspect."""

import argparse
import re
import sys
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import rich.table
from rich.console import Console

from convert_weights.compare import compare, describe
from convert_weights.layouts import TITLES
from convert_weights.lora.write import LAYOUTS as LORA_LAYOUTS
from convert_weights.lora.write import convert_lora
from convert_weights.mix import mix
from convert_weights.runs import run_to_jax, run_to_torch
from convert_weights.to_jax import Summary, to_jax
from convert_weights.to_torch import LAYOUTS, to_torch
from kontext_jax.models.presets import PRESETS
from kontext_jax.terminal import Progress, size_text
from kontext_jax.weights.bundle import as_dtype
from kontext_jax.weights.run import ITEM_OF, is_run

PROG = "python -m convert_weights"
DTYPES = ("float32", "bfloat16", "float16", "float8_e4m3fn", "float8_e5m2")
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_size(text: str) -> int:
    """`10GB`, `500MB` or a number of bytes, as Hugging Face counts them."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?I?B?)", text.strip().upper())
    if not match or match[2] not in _UNITS or float(match[1]) <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 10GB or 500MB")
    return int(float(match[1]) * _UNITS[match[2]])


def parse_axes(text: str) -> tuple[int, ...]:
    """`16,56,56`."""
    try:
        axes = tuple(int(part) for part in text.split(","))
    except ValueError:
        axes = ()
    if len(axes) != 3 or any(axis <= 0 or axis % 2 for axis in axes):
        raise argparse.ArgumentTypeError(f"{text!r} is not three even numbers such as 16,56,56")
    return axes


def make_parser(prog: str = PROG) -> argparse.ArgumentParser:
    """The command line's grammar and help."""
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Moves FLUX weights between the published PyTorch layouts and ours.",
    )
    run = argparse.ArgumentParser(add_help=False)
    group = run.add_argument_group("of a training run's folder in place of weights")
    group.add_argument(
        "--which",
        choices=tuple(ITEM_OF),
        help="the average of the parameters (default, where the run keeps one), or they themselves",
    )
    group.add_argument("--step", type=int, metavar="N", help="default: its newest checkpoint")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    axes: dict[str, Any] = {
        "type": parse_axes,
        "metavar": "A,B,C",
        "help": "rotary axes of a transformer whose heads are not 128 wide and that has no "
        "config.json beside it",
    }

    jax = commands.add_parser(
        "to-jax",
        parents=[run],
        help="published weights → our directory",
        description="Converts published weights into our weight directory.",
        epilog="examples:\n"
        f"  {prog} to-jax FLUX.1-Kontext-dev/ --out weights/kontext\n"
        f"  {prog} to-jax flux1-kontext-dev.safetensors ae.safetensors \\\n"
        "      text_encoder/ text_encoder_2/ tokenizer/ tokenizer_2/ --out weights/kontext\n"
        f"  {prog} to-jax black-forest-labs/FLUX.1-schnell "
        "--out weights/schnell\n"
        f"  {prog} to-jax runs/hats --out weights/hats",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    jax.add_argument(
        "sources",
        nargs="+",
        metavar="SRC",
        help="a diffusers folder, BFL's folder or files, transformers' folders of text encoders "
        "and tokenizers, ComfyUI's files, a hub id owner/name, or a training run's folder",
    )
    jax.add_argument("--out", required=True, type=Path, help="directory to make")
    jax.add_argument("--dtype", choices=DTYPES, help="store as this (default: as in the source)")
    jax.add_argument(
        "--preset",
        choices=list(PRESETS),
        help="which model it is; needed where neither names nor shapes tell (kontext-dev, flux-dev "
        "and krea-dev have the same shapes)",
    )
    jax.add_argument("--axes-dim", **axes)

    torch = commands.add_parser(
        "to-torch",
        parents=[run],
        help="our directory → BFL's or diffusers' files",
        description="Writes our weight directory in a published layout.",
    )
    torch.add_argument(
        "directory", type=Path, metavar="DIR", help="our weight directory, or a run's"
    )
    torch.add_argument("--out", required=True, type=Path, help="folder to make")
    torch.add_argument(
        "--layout",
        required=True,
        choices=LAYOUTS,
        help="bfl: flux1-*.safetensors, ae.safetensors and text encoder folders; "
        "diffusers: a folder for from_pretrained",
    )
    torch.add_argument("--dtype", choices=DTYPES, help="store as this (default: as in DIR)")
    torch.add_argument(
        "--max-shard-size",
        type=parse_size,
        default="10GB",
        metavar="SIZE",
        help="largest file of the diffusers layout and of text encoders (default 10GB)",
    )

    lora = commands.add_parser(
        "lora",
        parents=[run],
        help="a LoRA in one published layout → in another",
        description="Writes a LoRA file, or the adapters of a training run, in a published layout.",
        epilog="examples:\n"
        f"  {prog} lora ink.safetensors --layout kohya --out kohya.safetensors\n"
        f"  {prog} lora runs/hats --layout peft --out hats.safetensors",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    lora.add_argument("source", type=Path, metavar="SRC", help="a LoRA file or a training run")
    lora.add_argument("--out", required=True, type=Path, help="file to make")
    lora.add_argument(
        "--layout",
        required=True,
        choices=LORA_LAYOUTS,
        help="peft: for diffusers, ComfyUI; kohya: sd-scripts' names; bfl: as BFL's control LoRAs",
    )
    lora.add_argument("--dtype", choices=DTYPES, help="store as this (default: as in SRC)")
    lora.add_argument(
        "--base",
        metavar="MODEL",
        help="what the LoRA is for, where that is not of the published size: a preset "
        f"({', '.join(PRESETS)}) or its weights",
    )

    mixed = commands.add_parser(
        "mix",
        help="a point between two models of one size",
        description="Writes our weight directory with the transformer (1 − share)·A + share·B; all "
        "else, and how it is sampled, is B's. Both transformers are in memory.",
        epilog=f"example:\n  {prog} mix runs/teacher runs/student --share 0.75 --out weights/fast",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    mixed.add_argument("a", metavar="A", help="a run's folder, our directory or published weights")
    mixed.add_argument("b", metavar="B", help="another")
    mixed.add_argument("--share", type=float, required=True, help="of B, between 0 and 1")
    mixed.add_argument("--out", required=True, type=Path, help="directory to make")
    mixed.add_argument("--dtype", choices=DTYPES, help="store as this (default: as in B)")

    check = commands.add_parser(
        "check",
        help="are these the same weights?",
        description="Compares two sets of weights in any layouts; exit code 1 if they differ.",
    )
    check.add_argument("a", metavar="A", help="a file, folder or our directory")
    check.add_argument("b", metavar="B", help="another")
    check.add_argument("--axes-dim", **axes)

    inspect = commands.add_parser(
        "inspect",
        help="what is this file?",
        description="Says what a file or folder is: component, model, layout, dtypes, parameters.",
    )
    inspect.add_argument("path", metavar="PATH", help="a file, folder or our directory")
    inspect.add_argument("--axes-dim", **axes)
    return parser


@contextmanager
def _progress(title: str):
    """Gives `start(total)`, which begins a bar of bytes and gives what advances it."""
    with ExitStack() as open_bars:

        def start(total: int) -> Callable[[int], None]:
            bar = open_bars.enter_context(Progress(total, stderr=True))
            done, lock = 0, threading.Lock()  # several threads write

            def line() -> str:
                sizes = f"{size_text(done)} of {size_text(total)}"
                speed = size_text(done / max(bar.seconds, 1e-9))
                return f"{title}: {sizes} · {speed}/s · {bar.time_left(done)}"

            def advance(count: int) -> None:
                nonlocal done
                with lock:
                    done += count
                    bar.update(done, line)

            return advance

        yield start


def _summary(summary: Summary, out: Path, seconds: float) -> str:
    names = ", ".join(TITLES[kind] for kind in summary.components) or "tokenizers"
    line = (
        f"{out}: {names}; {summary.preset or 'no preset'}; "
        f"{summary.num_parameters:,} parameters in {', '.join(summary.dtypes) or 'no tensors'}; "
        f"{summary.num_bytes / 1e9:.2f} GB in {seconds:.1f} s"
    )
    return "; ".join([line, *summary.notes])


def _inspect(console: Console, args: argparse.Namespace) -> None:
    for title, rows in describe(args.path, args.axes_dim):
        table = rich.table.Table(title=title, title_justify="left", show_header=False, box=None)
        for label, value in rows:
            table.add_row(label, str(value))
        console.print(table)


def _check(args: argparse.Namespace) -> int:
    with _progress("compare") as start:
        differences, remarks = compare(args.a, args.b, args.axes_dim, start)
    for line in remarks:
        print(line)
    for line in differences:
        print(line)
    verdict = f"{len(differences)} differences" if differences else "the same weights"
    print(f"{args.a} and {args.b}: {verdict}")
    return 1 if differences else 0


def _lora(args: argparse.Namespace) -> None:
    adapter, num_values = convert_lora(
        args.source,
        args.out,
        args.layout,
        args.base,
        as_dtype(args.dtype),
        which=args.which,
        step=args.step,
    )
    print(f"{args.out}: {args.layout} layout, {num_values:,} values; from {adapter.summary()}")


def _convert(args: argparse.Namespace, start) -> Summary:
    """Whatever writes a whole folder of weights."""
    dtype = as_dtype(args.dtype)
    if args.command == "mix":
        return mix(args.a, args.b, args.share, args.out, dtype, start)
    runs = args.sources if args.command == "to-jax" else [str(args.directory)]
    if any(is_run(path) for path in runs):
        return _convert_run(args, runs, dtype, start)
    if args.which is not None or args.step is not None:
        raise ValueError(f"--which and --step are for training runs; {runs[0]} is none")
    if args.command == "to-jax":
        return to_jax(args.sources, args.out, dtype, args.preset, args.axes_dim, start)
    return to_torch(args.directory, args.out, args.layout, dtype, args.max_shard_size, start)


def _convert_run(args: argparse.Namespace, runs: list[str], dtype, start) -> Summary:
    if len(runs) != 1:
        raise ValueError("a training run is converted alone; name nothing beside it")
    chosen = {"which": args.which, "step": args.step, "start": start}
    if args.command == "to-jax":
        return run_to_jax(runs[0], args.out, dtype, **chosen)
    shard_bytes = args.max_shard_size
    return run_to_torch(runs[0], args.out, args.layout, dtype, shard_bytes, **chosen)


def run(args: argparse.Namespace) -> int:
    """Runs one command; 0 is success, 1 a difference.

    Raises:
      ValueError, OSError: weights that cannot be read, do not fit, or cannot be written.
    """
    begin = time.perf_counter()
    if args.command == "inspect":
        _inspect(Console(), args)
        return 0
    if args.command == "check":
        return _check(args)
    if args.command == "lora":
        _lora(args)
        return 0
    with _progress(args.command) as start:
        summary = _convert(args, start)
    print(_summary(summary, args.out, time.perf_counter() - begin))
    return 0


def main(argv: list[str] | None = None) -> int:
    """Runs one command; 0 is success, 1 a difference or an error, told on standard error."""
    args = make_parser().parse_args(argv)
    try:
        return run(args)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        print("interrupted; nothing was written", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
