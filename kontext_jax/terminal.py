"""What the commands of the top level have in common; imports nothing that takes time."""

import argparse
import difflib
from pathlib import Path

SETTING = "--config."  # begins the flags that change a setting of a config file


class Parser(argparse.ArgumentParser):
    """Reports a wrong flag in one line, with the nearest right one.

    Args:
      prefixes: beginnings of flags that the command reads itself, to be suggested as well.
    """

    def __init__(self, *args, prefixes: tuple[str, ...] = (), **kwargs):
        super().__init__(*args, **kwargs)
        self._prefixes = prefixes

    def error(self, message):
        if message.startswith("unrecognized arguments:"):
            flags = [flag for action in self._actions for flag in action.option_strings]
            word = message.split()[2].split("=")[0]
            if near := difflib.get_close_matches(word, [*flags, *self._prefixes], n=1):
                message += f" (did you mean {near[0]}?)"
        self.exit(2, f"error: {message}; see --help\n")


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


def load_config(path: str):
    """The ConfigDict that `get_config()` of a config file returns."""
    import importlib.util

    file = Path(path)
    if not file.is_file():
        folder = file.parent if file.parent.is_dir() else Path("configs")
        choices = sorted(str(p) for p in folder.glob("*.py"))
        near = difflib.get_close_matches(path, choices, n=1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise ValueError(f"there is no config file {path}{hint}")
    spec = importlib.util.spec_from_file_location(f"config_{file.stem}", file)
    if spec is None:
        raise ValueError(f"{path} is no Python file; see configs/")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise ValueError(f"{path} has no function get_config(); see configs/tiny.py")
    return module.get_config()
