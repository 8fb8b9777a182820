"""The command `kontext`, also `python -m kontext_jax`: its sub-commands and their exit codes."""

import os
import sys
from collections.abc import Callable, Mapping
from typing import NamedTuple

from kontext_jax.terminal import did_you_mean, exit_status

Run = Callable[[list[str], str], int]
"""(words after the command, the command as typed) → exit status; raises what is bad input."""


class Command(NamedTuple):
    """A sub-command: its line in the help, and what it runs."""

    says: str
    run: Run


# Each imports its body when it is called: help and wrong words must not wait for JAX.
def _edit(argv: list[str], prog: str) -> int:
    from kontext_jax.commands import edit

    return edit.main(argv, prog)


def _train(argv: list[str], prog: str) -> int:
    from kontext_jax.commands import train

    return train.main(argv, prog)


def _convert(argv: list[str], prog: str) -> int:
    from convert_weights.__main__ import make_parser, run

    return run(make_parser(prog).parse_args(argv))


def _check_data(argv: list[str], prog: str) -> int:
    from kontext_jax.data import check

    return check.main(argv, prog)


def _check_weights(argv: list[str], prog: str) -> int:
    from kontext_jax.commands import check

    return check.check_weights(argv, prog)


def _encode(argv: list[str], prog: str) -> int:
    from kontext_jax.precompute import encode

    return encode.main(argv, prog)


def _synthesize(argv: list[str], prog: str) -> int:
    from kontext_jax.precompute import synthesize

    return synthesize.main(argv, prog)


def _scenes(argv: list[str], prog: str) -> int:
    from kontext_jax.evaluation import edits

    return edits.main(argv, prog)


def _chains(argv: list[str], prog: str) -> int:
    from kontext_jax.evaluation import multi_turn

    return multi_turn.main(argv, prog)


def _reconstruction(argv: list[str], prog: str) -> int:
    from kontext_jax.evaluation import reconstruction

    return reconstruction.main(argv, prog)


def _distilled(argv: list[str], prog: str) -> int:
    from kontext_jax.evaluation import distilled

    return distilled.main(argv, prog)


def _plan(argv: list[str], prog: str) -> int:
    from kontext_jax.plan import __main__ as plan

    return plan.main(argv, prog)


CHECKS = {
    "data": Command("a data set, before any device time", _check_data),
    "weights": Command("what a file or folder of weights is", _check_weights),
}
EVALUATIONS = {
    "scenes": Command("edits of drawn scenes, graded", _scenes),
    "chains": Command("several edits in a row, and what is left of the picture", _chains),
    "reconstruction": Command("an autoencoder by the pictures that it gives back", _reconstruction),
    "distilled": Command("models sampled in different ways, side by side", _distilled),
}
COMMANDS = {
    "edit": Command("edits pictures, or makes them from text", _edit),
    "train": Command("trains a model by a config's recipe", _train),
    "convert": Command("moves weights between the published layouts and ours", _convert),
    "check": Command(
        "looks at data or weights before they are used",
        lambda argv, prog: dispatch(CHECKS, argv, prog),
    ),
    "encode": Command("encodes a data set once for all runs", _encode),
    "synthesize": Command("writes a model's own results as training examples", _synthesize),
    "evaluate": Command("measures a model", lambda argv, prog: dispatch(EVALUATIONS, argv, prog)),
    "plan": Command("memory and time on hardware that is not here", _plan),
}


def help_of(commands: Mapping[str, Command], prog: str) -> str:
    """One line for each command."""
    width = max(map(len, commands))
    lines = [f"usage: {prog} COMMAND …", ""]
    lines += [f"  {name:<{width}}  {command.says}" for name, command in commands.items()]
    return "\n".join([*lines, "", f"{prog} COMMAND --help says more about each"])


def dispatch(commands: Mapping[str, Command], argv: list[str], prog: str) -> int:
    """Runs the command that the first word names; without one shows which there are.

    Raises:
      ValueError: there is no such command.
    """
    if not argv or argv[0] in ("-h", "--help"):
        print(help_of(commands, prog))
        return 0
    name, *rest = argv
    if name not in commands:
        raise ValueError(
            f"{prog} has no command {name}{did_you_mean(name, tuple(commands))}; the commands are "
            f"{', '.join(commands)}"
        )
    return commands[name].run(rest, f"{prog} {name}")


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; the exit status: 0 done, 1 failed, 2 bad input, 130 interrupted."""
    # Set before JAX is imported: the C++ runtime otherwise greets every run with log lines.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    words = sys.argv[1:] if argv is None else argv
    if words and words[0] == "--version":
        from kontext_jax.runtime.versions import VERSION

        print(f"kontext_jax {VERSION}")
        return 0
    if not words:
        print("FLUX.1 Kontext in JAX: edits pictures, trains, and moves weights.\n")
    return exit_status(lambda: dispatch(COMMANDS, words, "kontext"))


if __name__ == "__main__":
    sys.exit(main())
