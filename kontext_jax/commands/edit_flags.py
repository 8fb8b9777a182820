"""Flags of `kontext edit`; imports nothing that takes time."""

import argparse
from pathlib import Path

from kontext_jax.terminal import Parser

OUTPUTS = Path("outputs")
ESSENTIAL = ("--seed", "--size", "--steps", "--weights", "--output")
EPILOG = """examples:
  {prog}                              edits a picture by the small model of the package;
                            kontext_jax/assets/models/tiny/README.md says what that one understands
  {prog} "make it night" cat.png
  {prog} "make it gray" *.jpg -o gray/
  {prog} --model tiny-fast            the same, distilled to a few steps
  {prog} --weights FLUX.1-Kontext-dev --image cat.png --prompt "make the cat black"
  {prog} --weights W --image a.png --prompt "add a hat" --then "make the hat blue"
  {prog} --weights W --image me.png --image hat.png --prompt "the man wears the hat"
  {prog} --weights W --image phone.jpg --prompt "at night" --restore-size -o night.png
  {prog} --weights W --lora hats.safetensors --lora ink.safetensors:0.7 --image me.png …
  {prog} --weights W --jobs jobs.jsonl -o results/
  {prog} --weights W --mesh context=4 --image cat.png --prompt "make the cat black"
  {prog} --weights W --from-metadata night.png -o again.png
  {prog} --weights W --compile-only --references 1 2

Several pictures, or a folder, are edited one by one; each --image is a further reference. Their
results never replace a file.

A line of a jobs file is {{"prompt": "…", "images": ["cat.png"], "seed": 7, "output": "x.png"}}: the
options by their long names (num_steps for --steps, true_cfg_scale for --true-cfg), images relative
to the jobs file.
"""


def make_parser(prog: str = "kontext edit") -> Parser:
    """The command line's grammar and help."""
    parser = Parser(
        prog=prog,
        usage=f"{prog} [PROMPT [PICTURE …]] [options]",
        description="Edits images by FLUX.1 Kontext, or makes them from text.",
        epilog=EPILOG.format(prog=prog),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,  # what was not given does not exist
        essentials=ESSENTIAL,
    )
    parser.add_argument("first", nargs="?", metavar="PROMPT", help="as --prompt")
    parser.add_argument(
        "pictures", nargs="*", metavar="PICTURE", help="to edit: files, or folders of them"
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
    how.add_argument("--steps", type=int, metavar="N", help="more are slower and finer")
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
