"""What the commands of the top level have in common; imports nothing that takes time."""

import argparse
import difflib
import math
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import rich.console

SETTING = "--config."  # begins the flags that change a setting of a config file
BAR_WIDTH = 24  # characters, where the text leaves so many
DRAW_EVERY_S = 0.1


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
            message += did_you_mean(word, [*flags, *self._prefixes])
        self.exit(2, f"error: {message}; see --help\n")


class _HelpAll(argparse.Action):
    def __call__(self, parser, namespace, values, option_string=None):
        print(parser.format_help_all(), end="")
        parser.exit()


def exit_status(
    run: Callable[[], int],
    *,
    failed: tuple[type[Exception], ...] = (FloatingPointError,),
    bad_input: tuple[type[Exception], ...] = (ValueError, OSError),
    interrupted: str = "interrupted",
) -> int:
    """What `run` returns, or the code of its error, told in one line.

    The codes of all commands: 0 done, 1 computing failed, 2 bad input, 130 interrupted.

    Args:
      failed: errors of computing; they come before `bad_input`, whose subclasses they may be.
      interrupted: line to tell after Ctrl-C.
    """
    try:
        return run()
    except KeyboardInterrupt:
        print(interrupted, file=sys.stderr)
        return 130
    except failed as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except bad_input as error:
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
    raise ValueError(f"there is no config file {path}{did_you_mean(path, choices)}")


def load_config(path: str):
    """What `get_config()` of a config file returns: a TrainConfig or a ConfigDict.

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


def nearest_words(
    word: Any, choices: Sequence[str], count: int = 1, least: float = 0.6
) -> list[str]:
    """Up to `count` of `choices` that `word` most likely means, the likeliest first.

    Compared by spelling, by spelling after the last dot, and by initials ("lr" for learning_rate).

    Args:
      least: likeness from 0 to 1 below which a choice is left out.
    """
    word = str(word)
    last = word.rpartition(".")[2]

    def likeness(choice: str) -> float:
        other = choice.rpartition(".")[2]
        initials = "".join(part[:1] for part in other.split("_"))
        by_last = 0.95 if last == initials else difflib.SequenceMatcher(None, last, other).ratio()
        whole = difflib.SequenceMatcher(None, word, choice).ratio()
        return by_last + 0.1 * whole if max(by_last, whole) >= least else 0.0

    found = sorted(((likeness(choice), choice) for choice in choices), reverse=True)
    return [choice for score, choice in found[:count] if score]


def did_you_mean(word: Any, choices: Sequence[str], form: str = " (did you mean {}?)") -> str:
    """`form` with the nearest of `choices`; "" where none is near."""
    return "".join(form.format(near) for near in nearest_words(word, choices))


def duration(seconds: float) -> str:
    """A span of time in its two largest units: "3 d 4 h", "12 min 30 s", "8 s"."""
    left = round(seconds)
    parts = []
    for name, size in (("d", 86400), ("h", 3600), ("min", 60), ("s", 1)):
        count, left = divmod(left, size)
        if count or (name == "s" and not parts):
            parts.append(f"{count} {name}")
    return " ".join(parts[:2])


Tell = Callable[[str], None]


def size_text(count: float) -> str:
    """Bytes for people: "4.2 MB"."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count < 999.5 or unit == "TB":
            break
        count /= 1000
    return f"{count:.3g} {unit}" if count < 999.5 else f"{count:,.0f} {unit}"


class Progress:
    """How far some work is: a bar on a terminal, elsewhere a line now and then.

    The bar stands below whatever else is printed meanwhile, and goes when the work ends.

    Args:
      total: what there is to do, in any unit.
      tell: prints a line where there is no terminal; None prints nothing there.
      quiet: whether to show nothing at all.
      stderr: whether the bar stands on standard error, rather than on standard output.
      console: rich's console for the bar, where the caller prints through one.
      terminal: whether to draw the bar; None does where the stream is a terminal.
      every_s: seconds between lines.
      keep: whether the bar stays to be seen when the work has ended.
      done: what was done before.
    """

    def __init__(
        self,
        total: float,
        tell: Tell | None = None,
        *,
        quiet: bool = False,
        stderr: bool = False,
        console: "rich.console.Console | None" = None,
        terminal: bool | None = None,
        every_s: float = 10.0,
        keep: bool = False,
        done: float = 0,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.total = total
        self._tell, self._clock, self._every_s = None if quiet else tell, clock, every_s
        self._start = self._shown = clock()
        self._bar = None
        if terminal is None:
            stream = sys.stderr if stderr else sys.stdout
            terminal = console.is_terminal if console is not None else stream.isatty()
        if terminal and not quiet:
            self._bar = _Bar(total, done, stderr, console, keep)
            self._every_s, self._shown = DRAW_EVERY_S, -math.inf

    @property
    def seconds(self) -> float:
        """Time since the work began."""
        return self._clock() - self._start

    def time_left(self, done: float) -> str:
        """How long the rest takes at the speed so far, such as "1 min 30 s left"."""
        if not done:
            return "? left"
        return f"{duration((self.total - done) * self.seconds / done)} left"

    def update(self, done: float, line: Callable[[], str], *, is_last: bool = False) -> None:
        """Shows that `done` of the total is done.

        Args:
          line: gives what to say of it, when it is shown.
          is_last: whether to show this line, however short ago the last one was.
        """
        show = self._tell if self._bar is None else lambda text: self._bar.draw(done, text)
        now = self._clock()
        if show is not None and (is_last or now - self._shown >= self._every_s):
            self._shown = now
            show(line())

    def close(self) -> None:
        """Ends the bar."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *exception) -> None:
        self.close()


class _Bar:
    """A bar and a line of text, drawn by rich."""

    def __init__(self, total, done, stderr, console, keep):
        import rich.console
        import rich.progress

        self._console = console or rich.console.Console(stderr=stderr)
        self._column = rich.progress.BarColumn(BAR_WIDTH)
        self._display = rich.progress.Progress(
            self._column,
            rich.progress.TextColumn("{task.description}", markup=False),
            console=self._console,
            transient=not keep,
            auto_refresh=False,
            # What is no terminal goes where it always goes.
            redirect_stdout=sys.stdout.isatty(),
            redirect_stderr=sys.stderr.isatty(),
        )
        self._task = self._display.add_task("", total=total, completed=done)
        self._display.start()

    def draw(self, done: float, text: str) -> None:
        room = self._console.width - len(text) - 1
        self._column.bar_width = max(1, min(BAR_WIDTH, room))  # the text is what people read
        self._display.update(self._task, completed=done, description=text, refresh=True)

    def close(self) -> None:
        self._display.stop()


class StepLine:
    """Shows on standard error how far the steps of a batch are; called by whoever takes them.

    Args:
      console: rich's console for the bar, in place of one on standard error.
    """

    def __init__(
        self,
        console: "rich.console.Console | None" = None,
        clock: Callable[[], float] = time.perf_counter,
    ):
        self._console, self._clock = console, clock
        self._progress: Progress | None = None
        self._last = clock()

    def __call__(self, done: int, num_steps: int) -> None:
        """Shows that `done` of the steps are done; 0 begins a batch, and all of them end it."""
        now = self._clock()
        seconds, self._last = now - self._last, now
        if done == 0 or self._progress is None:
            self.close()
            self._progress = Progress(
                num_steps, stderr=True, console=self._console, terminal=True, clock=self._clock
            )

        def line() -> str:
            text = f"step {done}/{num_steps}"
            if done:  # what came before the first step was compiling
                text += f"  {seconds:.2f} s a step, {(num_steps - done) * seconds:.0f} s left"
            return text

        self._progress.update(done, line, is_last=done == num_steps)
        if done == num_steps:
            self.close()

    def close(self) -> None:
        """Ends the bar of a batch that did not come to its end."""
        if self._progress is not None:
            self._progress.close()
            self._progress = None

    def __enter__(self) -> "StepLine":
        return self

    def __exit__(self, *exception) -> None:
        self.close()
