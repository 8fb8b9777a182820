"""Edits an image, or makes one from text: `python sample.py --image cat.png --prompt "…"`.

The same as `kontext edit`; its body is kontext_jax/commands/edit.py.
"""

import os
import sys

from kontext_jax.commands import edit


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; the exit status: 0, 1 if computing failed, 2 for bad input."""
    return edit.main(argv, prog="python sample.py")


if __name__ == "__main__":
    # Set before JAX is imported: the C++ runtime otherwise greets every run with log lines.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    sys.exit(main())
