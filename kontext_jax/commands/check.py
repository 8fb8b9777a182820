"""`kontext check weights`: what a file or folder of weights is, and whether it can be read."""

from kontext_jax.terminal import Parser


def make_parser(prog: str = "kontext check weights") -> Parser:
    """The command line's grammar and help."""
    parser = Parser(
        prog=prog,
        description="Says what files or folders of weights are: component, model, layout, dtypes, "
        "parameters. Exit status: 0 if all can be read, 2 if not.",
    )
    parser.add_argument(
        "paths", nargs="+", metavar="PATH", help="a file, a folder, a hub id or our directory"
    )
    parser.add_argument("--axes-dim", metavar="A,B,C", help="as for `kontext convert inspect`")
    return parser


def check_weights(argv: list[str], prog: str = "kontext check weights") -> int:
    """Describes each of the weights; 0 if all can be read.

    Raises:
      ValueError, OSError: the first that cannot.
    """
    args = make_parser(prog).parse_args(argv)
    from convert_weights.__main__ import make_parser as convert_parser
    from convert_weights.__main__ import run

    options = [] if args.axes_dim is None else ["--axes-dim", args.axes_dim]
    for path in args.paths:
        run(convert_parser(prog).parse_args(["inspect", path, *options]))
    return 0
