"""Looks at a data set before any device time: `python -m kontext_jax.data.check PATH …`.

    python -m kontext_jax.data.check DIR --batch-size 64
    python -m kontext_jax.data.check DIR a.tar --fraction-with-references 0.8 --json

Options are the fields of DataConfig. Every picture is decoded (--quick reads headers alone).
Exits with 1 when a sample is bad or an id occurs twice, and lists them; with 2 when the data cannot
be opened at all.
"""

import argparse
import collections
import dataclasses
import json
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from kontext_jax.data.config import DataConfig
from kontext_jax.data.dataset import Dataset, is_bad, open_dataset
from kontext_jax.data.filters import FilterError
from kontext_jax.data.sources.folder import FolderSource
from kontext_jax.terminal import Parser, did_you_mean

PROG = "python -m kontext_jax.data.check"
ESSENTIAL = ("--batch-size", "--resolution", "--quick", "--all", "--json")
_TITLE = "target ← references"
_BAR = 24  # characters of the longest bar
_LISTED = 20  # samples of each reason


def main(arguments: list[str] | None = None, prog: str = PROG) -> int:
    """Prints what is found; returns the exit status."""
    args = parse_arguments(_parser(prog), arguments)
    fields = {field.name: getattr(args, field.name) for field in _options()}
    config = DataConfig(
        sources=tuple(args.sources), on_bad_sample="skip", verify=not args.quick, **fields
    )
    try:
        if args.batch_size < 1:
            raise ValueError(f"batch_size is {args.batch_size}; expected at least 1")
        dataset = open_dataset(config, tell=lambda line: None if args.json else _progress(line))
    except (ValueError, FileNotFoundError, FilterError) as error:
        print(f"{error}", file=sys.stderr)
        return 2
    report = make_report(dataset, args.batch_size)
    if args.json:
        print(json.dumps(report, indent=2, ensure_ascii=False))
    else:
        _print(report, args.all)
    return 0 if report["ok"] else 1


def _progress(line: str) -> None:
    if line.startswith("index: "):
        print(line, file=sys.stderr)


def _options() -> list[dataclasses.Field]:
    """The options of DataConfig that say something of data before training."""
    elsewhere = {"sources", "on_bad_sample", "verify", "cache", "workers", "prefetch"}
    elsewhere |= {"random_crop", "flip", "reference_dropout", "synthetic_cache", "synthetic_share"}
    return [field for field in dataclasses.fields(DataConfig) if field.name not in elsewhere]


def parse_arguments(
    parser: argparse.ArgumentParser, arguments: list[str] | None
) -> argparse.Namespace:
    """Parses; an unknown option ends the program with the nearest one's name."""
    args, unknown = parser.parse_known_args(arguments)
    if unknown:
        option = unknown[0].split("=")[0]
        meant = did_you_mean(option, [*parser._option_string_actions], "; did you mean {}?")
        parser.error(f"unknown option {option}{meant}")
    return args


def _parser(prog: str) -> Parser:
    parser = Parser(
        underscores=True,
        essentials=ESSENTIAL,
        prog=prog,
        description=__doc__.split(":")[0],
        allow_abbrev=False,
    )
    parser.add_argument("sources", nargs="+", metavar="PATH", help="folders or files of examples")
    parser.add_argument("--batch-size", type=int, default=1, help="examples of a global batch")
    parser.add_argument("--quick", action="store_true", help="read the headers of pictures alone")
    parser.add_argument("--all", action="store_true", help="list every bad sample")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    add_options(parser, [field.name for field in _options()])
    return parser


def add_options(parser: argparse.ArgumentParser, names: Sequence[str]) -> None:
    """Adds fields of DataConfig as options, with the help that they carry."""
    for name in names:
        field = DataConfig.__dataclass_fields__[name]
        default = field.default
        kind: dict[str, Any] = {"type": type(default), "default": default}
        if isinstance(default, bool):
            kind = {"action": "store_true"}
        elif isinstance(default, tuple):
            number = float if name == "weights" else str
            kind = {"type": number, "nargs": "*", "action": _Tuple, "default": ()}
        help_text = field.metadata["help"].replace("%", "%%")
        parser.add_argument(f"--{name.replace('_', '-')}", help=help_text, **kind)


class _Tuple(argparse.Action):
    def __call__(self, parser, namespace, values, option_string=None):
        setattr(namespace, self.dest, tuple(values))


def make_report(dataset: Dataset, batch_size: int) -> dict[str, Any]:
    """What there is, what is wrong with it, and how it falls into batches, as JSON."""
    messages = {
        reason: [dataset.message(int(number)) for number in found]
        for reason, found in dataset.not_used().items()
    }
    bad = {reason: messages[reason] for reason in messages if is_bad(reason)}
    left_out = {reason: messages[reason] for reason in messages if not is_bad(reason)}
    duplicates = _duplicates(dataset)
    kinds, steps = [], 0.0
    per_kind = np.bincount(dataset.kind_of[dataset.kind_of >= 0], minlength=len(dataset.kinds))
    for k, kind in enumerate(dataset.kinds):
        shown = float(dataset.repeats[dataset.kind_of == k].sum())
        steps += shown / batch_size
        kinds.append(
            {
                "kind": str(kind),
                "examples": int(per_kind[k]),
                "batches_per_epoch": round(shown / batch_size, 3),
                "epochs_per_batch": max(1, round(batch_size / shown, 1)),
            }
        )
    return {
        "ok": not bad and not duplicates and bool(kinds),
        "sources": [
            {"name": source.name, "samples": len(source), "columns": str(source.columns)}
            for source in dataset.sources
        ],
        "samples": len(dataset),
        "used": int(per_kind.sum()),
        "bad": bad,
        "not_used": left_out,
        "duplicate_ids": duplicates,
        "unlisted_files": [
            name
            for source in dataset.sources
            if isinstance(source, FolderSource)
            for name in source.unlisted()
        ],
        "kinds": kinds,
        "batch_size": batch_size,
        "steps_per_epoch": round(steps, 3),
    }


def _duplicates(dataset: Dataset) -> dict[str, int]:
    """Ids that occur more than once, and how often."""
    _, inverse, counts = np.unique(dataset.index.ids, return_inverse=True, return_counts=True)
    repeated = np.flatnonzero(counts[inverse] > 1)
    return dict(collections.Counter(dataset.name(int(number)) for number in repeated))


def _print(report: dict[str, Any], list_all: bool) -> None:
    for source in report["sources"]:
        print(f"{source['name']}: {source['samples']:,} samples; {source['columns']}")
    for title, found in (("bad", report["bad"]), ("not used", report["not_used"])):
        for reason, messages in found.items():
            print(f"\n{title}: {reason}: {len(messages):,}")
            shown = messages if list_all else messages[:_LISTED]
            for message in shown:
                print(f"  {message}")
            if len(messages) > len(shown):
                print(f"  and {len(messages) - len(shown):,} more; --all lists them")
    if report["duplicate_ids"]:
        print("\nids that occur more than once:")
        for name, count in report["duplicate_ids"].items():
            print(f"  {name}: {count} times")
    if unlisted := report["unlisted_files"]:
        shown = unlisted if list_all else unlisted[:_LISTED]
        print(f"\npictures that no sample names: {len(unlisted):,}")
        print("  " + ", ".join(shown) + " …" * (len(unlisted) > len(shown)))
    if report["kinds"]:
        largest = max(kind["examples"] for kind in report["kinds"])
        width = max(len(_TITLE), *(len(kind["kind"]) for kind in report["kinds"]))
        print(f"\n{_TITLE:<{width}}  samples  batches")
        for kind in report["kinds"]:
            bar = "█" * max(1, round(_BAR * kind["examples"] / largest))
            rare = kind["epochs_per_batch"] > 1
            note = f" fills a batch in {kind['epochs_per_batch']:g} epochs" if rare else ""
            counts = f"{kind['examples']:>7,}  {kind['batches_per_epoch']:>7.1f}"
            print(f"{kind['kind']:<{width}}  {counts}  {bar}{note}")
    print(
        f"\n{report['used']:,} of {report['samples']:,} samples are used; an epoch has "
        f"{report['steps_per_epoch']:g} steps at batch size {report['batch_size']}"
    )
    print("everything is in order" if report["ok"] else "not in order, see above")


if __name__ == "__main__":
    sys.exit(main())
