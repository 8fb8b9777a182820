"""Rewrites a data set as ArrayRecord, which is read fastest at random.

    python -m kontext_jax.data.pack PATH … --out DIR

Pictures stay encoded as they are. Samples that cannot be read are left out and named. Parquet sets
that do not fit into memory want this: a row of theirs cannot be read alone.
"""

import os
import sys
from collections.abc import Iterator

from kontext_jax.data.check import parse_arguments
from kontext_jax.data.sources.array_record import write_array_record
from kontext_jax.data.sources.examples import BadSample, ColumnNames, Example, Source
from kontext_jax.data.sources.open import open_sources
from kontext_jax.terminal import Parser


def main(arguments: list[str] | None = None) -> int:
    """Writes the files; returns the exit status."""
    parser = Parser(
        prog="python -m kontext_jax.data.pack",
        description=__doc__.split("\n")[0],
        allow_abbrev=False,
        underscores=True,
    )
    parser.add_argument("sources", nargs="+", metavar="PATH", help="folders or files of examples")
    parser.add_argument(
        "--out", required=True, help="folder for the files; made if it is not there"
    )
    parser.add_argument("--per-file", type=int, default=4096, help="samples of a file")
    parser.add_argument("--target-column", default="")
    parser.add_argument("--context-columns", nargs="*", default=())
    parser.add_argument("--text-column", default="")
    parser.add_argument("--id-column", default="")
    args = parse_arguments(parser, arguments)
    columns = ColumnNames(
        args.target_column, tuple(args.context_columns), args.text_column, args.id_column
    )
    try:
        if args.per_file < 1:
            raise ValueError(f"per_file is {args.per_file}; expected at least 1")
        sources = open_sources(args.sources, columns=columns)
        os.makedirs(args.out, exist_ok=True)
        if existing := sorted(n for n in os.listdir(args.out) if n.endswith(".array_record")):
            raise ValueError(f"{args.out} already has {existing[0]}; give an empty folder")
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    bad: list[str] = []
    total = sum(map(len, sources))
    num_files = -(-total // args.per_file)
    written = 0
    for i in range(num_files):
        path = os.path.join(args.out, f"pairs-{i:05d}-of-{num_files:05d}.array_record")
        numbers = range(i * args.per_file, min((i + 1) * args.per_file, total))
        written += write_array_record(_examples(sources, numbers, bad), path)
        print(f"{path}: {written:,} of {total:,} samples", file=sys.stderr)
    for message in bad:
        print(f"left out: {message}", file=sys.stderr)
    return 1 if bad else 0


def _examples(sources: list[Source], numbers: range, bad: list[str]) -> Iterator[Example]:
    """Those of the examples with these numbers that can be read; the others go to `bad`."""
    start = 0
    for source in sources:
        for number in range(max(numbers.start, start), min(numbers.stop, start + len(source))):
            try:
                example = source[number - start]
                for ref in (example.target, *example.contexts):
                    ref.open().close()
                yield example
            except (BadSample, OSError) as error:
                bad.append(str(error))
        start += len(source)


if __name__ == "__main__":
    sys.exit(main())
