"""Trains a model: `python train.py --config configs/tiny.py`.

The same as `kontext train`; its body is kontext_jax/commands/train.py.
"""

import os
import sys

from kontext_jax.commands import train


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; the exit status: 0, 1 if training failed, 2 for bad input."""
    return train.main(argv, prog="python train.py")


if __name__ == "__main__":
    # Set before JAX is imported: the C++ runtime otherwise greets every run with log lines.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    sys.exit(main())
