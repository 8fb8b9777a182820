"""What the commands of the top level have in common; imports nothing that takes time."""

import argparse
import difflib


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
