"""What the commands of the top level have in common; imports nothing that takes time."""

import argparse
import contextlib
import difflib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

SETTING = "--config."  # begins the flags that change a setting of a config file


class Parser(argparse.ArgumentParser):
    """Reports a wrong flag in one line, with the nearest right one.

    Args:
      prefixes: beginnings of flags that the command reads itself, to be suggested as well.
      essentials: the options that `--help` shows, where `--help-all` shows all of them.
      underscores: whether `--a_b` is read as `--a-b`, for commands that once spelled it so.
    """

    def __init__(
        self,
        *args,
        prefixes: tuple[str, ...] = (),
        essentials: tuple[str, ...] = (),
        underscores: bool = False,
        **kwargs,
    ):
        super().__init__(*args, **kwargs)
        self._prefixes = prefixes
        self._essentials = essentials
        self._underscores = underscores
        if essentials:
            absent = {"default": argparse.SUPPRESS, "help": "show all options and exit"}
            self.add_argument("--help-all", action=_HelpAll, nargs=0, **absent)

    def format_help(self) -> str:
        return self._short_help() if self._essentials else self.format_help_all()

    def format_help_all(self) -> str:
        """The help with every option in it."""
        return super().format_help()

    def _short_help(self) -> str:
        """The help with the essential options alone."""
        shown = [self._option_string_actions[flag] for flag in self._essentials]
        positionals = self._get_positional_actions()
        formatter = self._get_formatter()
        formatter.add_usage(self.usage, [*positionals, *shown], ())
        formatter.add_text(self.description)
        formatter.start_section("options")
        formatter.add_arguments([*positionals, *shown])
        formatter.end_section()
        hidden = {id(a) for a in self._actions} - {id(a) for a in (*positionals, *shown)}
        formatter.add_text(f"--help-all shows {len(hidden) - 2} more options.")
        formatter.add_text(self.epilog)
        return formatter.format_help()

    def parse_known_args(self, args=None, namespace=None):
        words = list(sys.argv[1:] if args is None else args)
        if self._underscores:
            words = [self._dashed(word) for word in words]
        return super().parse_known_args(words, namespace)

    def _dashed(self, word: str) -> str:
        """`--batch_size=4` as `--batch-size=4`, if there is such an option."""
        name, equals, value = word.partition("=")
        dashed = name.replace("_", "-")
        known = name.startswith("--") and dashed in self._option_string_actions
        return dashed + equals + value if known else word

    def error(self, message):
        if message.startswith("unrecognized arguments:"):
            flags = [flag for action in self._actions for flag in action.option_strings]
            word = message.split()[2].split("=")[0]
            if near := difflib.get_close_matches(word, [*flags, *self._prefixes], n=1):
                message += f" (did you mean {near[0]}?)"
        self.exit(2, f"error: {message}; see --help\n")


class _HelpAll(argparse.Action):
    def __call__(self, parser, namespace, values, option_string=None):
        print(parser.format_help_all(), end="")
        parser.exit()


def exit_status(run: Callable[[], int]) -> int:
    """What `run` returns, or the code of its error, told in one line.

    The codes of all commands: 0 done, 1 computing failed, 2 bad input, 130 interrupted.
    """
    try:
        return run()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except FloatingPointError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def split_settings(argv: list[str]) -> tuple[list[str], list[tuple[str, str]]]:
    """Takes `--config.KEY=VALUE` and `--config.KEY VALUE` out of the command line.

    Raises:
      ValueError: a key without a value.
    """
    rest, settings, words = [], [], iter(argv)
    for word in words:
        if not word.startswith(SETTING) or word == SETTING:
            rest.append(word)
            continue
        key, equals, value = word.removeprefix(SETTING).partition("=")
        if not equals:
            value = next(words, None)
            if value is None or value.startswith("--"):
                raise ValueError(f"{word} has no value; write {word}=VALUE")
        settings.append((key, value))
    return rest, settings


def configs_folder() -> Path:
    """The config files that ship: `configs/` of a checkout, or its copy in the wheel."""
    package = Path(__file__).parent
    shipped = package / "configs"
    return shipped if shipped.is_dir() else package.parent / "configs"


def find_config(path: str) -> Path:
    """The config file at a path, or the one of a name such as "tiny" that ships.

    Raises:
      ValueError: there is none.
    """
    file, shipped = Path(path), configs_folder()
    if file.is_file():
        return file
    named = shipped / f"{path}.py"
    if file.name == path and not file.suffix and named.is_file():
        return named
    folder = file.parent if file.parent.is_dir() else Path("configs")
    choices = sorted(str(p) for p in folder.glob("*.py"))
    if file.name == path:
        choices += sorted(p.stem for p in shipped.glob("*.py"))
    near = difflib.get_close_matches(path, choices, n=1)
    hint = f" (did you mean {near[0]}?)" if near else ""
    raise ValueError(f"there is no config file {path}{hint}")


def load_config(path: str):
    """The ConfigDict that `get_config()` of a config file returns.

    Args:
      path: a file, or the name of a config that ships, such as "tiny".
    """
    import importlib.util

    file = find_config(path)
    spec = importlib.util.spec_from_file_location(f"config_{file.stem}", file)
    if spec is None:
        raise ValueError(f"{path} is no Python file; see configs/")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise ValueError(f"{path} has no function get_config(); see configs/tiny.py")
    return module.get_config()


def did_you_mean(word: Any, choices: Sequence[str]) -> str:
    """ ", did you mean …?" for the nearest of `choices`, or nothing."""
    near = difflib.get_close_matches(str(word), choices, n=1, cutoff=0.5)
    return f" (did you mean {near[0]}?)" if near else ""


def duration(seconds: float) -> str:
    """A span of time in its two largest units: "3 d 4 h", "12 min 30 s", "8 s"."""
    left = round(seconds)
    parts = []
    for name, size in (("d", 86400), ("h", 3600), ("min", 60), ("s", 1)):
        count, left = divmod(left, size)
        if count or (name == "s" and not parts):
            parts.append(f"{count} {name}")
    return " ".join(parts[:2])


class StepLine:
    """A line on a terminal that shows how far a batch is and what a step takes."""

    def __init__(self, stream=sys.stderr):
        self._stream = stream
        self._last = time.perf_counter()

    def __call__(self, done: int, num_steps: int) -> None:
        now = time.perf_counter()
        seconds, self._last = now - self._last, now
        text = f"  {'━' * (24 * done // num_steps):<24} step {done}/{num_steps}"
        if done:  # what came before the first step was compiling
            text += f"  {seconds:.2f} s a step, {(num_steps - done) * seconds:.0f} s left"
        self._stream.write(f"\r{text:<78}" if done < num_steps else f"\r{'':<78}\r")
        self._stream.flush()


Tell = Callable[[str], None]


def size_text(count: float) -> str:
    """Bytes for people: "4.2 MB"."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count < 999.5 or unit == "TB":
            break
        count /= 1000
    return f"{count:.3g} {unit}" if count < 999.5 else f"{count:,.0f} {unit}"


TERMINAL_EVERY_S, LINES_EVERY_S = 0.5, 10.0


@contextlib.contextmanager
def progress_line(
    total: int, images_per: float, tell: Tell, *, quiet: bool, verb: str = "encoded"
) -> Iterator["ProgressLine"]:
    """A `ProgressLine` of a command: drawn over itself on a terminal, else told now and then."""
    if quiet or not sys.stdout.isatty():
        yield ProgressLine(total, images_per, tell, LINES_EVERY_S, verb=verb)
        return

    def draw(line: str) -> None:
        print(f"\r{line:<78}", end="", flush=True)

    yield ProgressLine(total, images_per, draw, TERMINAL_EVERY_S, verb=verb)
    draw("")
    print("\r", end="")


class ProgressLine:
    """How far the work is: images a second and what is left of the time.

    Args:
      total: (sample, variant) of this run.
      images_per: pictures in one of them, on average.
      show: is given the line.
      every_s: seconds between lines.
      verb: what happened to what is done.
    """

    def __init__(
        self,
        total: int,
        images_per: float,
        show: Tell,
        every_s: float,
        clock: Callable[[], float] = time.monotonic,
        verb: str = "encoded",
    ):
        self._total, self._images_per, self._show = total, images_per, show
        self._verb = verb
        self._every_s, self._clock = every_s, clock
        self._start = self._last = clock()

    def __call__(self, done: int) -> None:
        now = self._clock()
        if now - self._last < self._every_s:
            return
        self._last = now
        rate = done / (now - self._start)
        left = duration((self._total - done) / rate) if rate else "?"
        self._show(
            f"{self._verb} {done:,} of {self._total:,} · {rate * self._images_per:.3g} images/s · "
            f"{left} left"
        )
