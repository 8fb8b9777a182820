"""Figures by matplotlib, which the extra `plot` installs; nothing else here imports it."""

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import UInt8

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DPI = 100


def check_installed() -> None:
    """Call this before work whose results shall be drawn.

    Raises:
      ValueError: matplotlib is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("charts need matplotlib: pip install 'kontext-jax[plot]'")


def new_figure(width_px: int, height_px: int) -> "Figure":
    """An empty figure, which belongs to no window.

    Raises:
      ValueError: matplotlib is not installed.
    """
    check_installed()
    from matplotlib.figure import Figure

    return Figure((width_px / DPI, height_px / DPI), dpi=DPI, layout="constrained")


def to_pixels(figure: "Figure") -> UInt8[np.ndarray, "height width 3"]:
    """The figure as RGB."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def save(figure: "Figure", path: str | Path) -> None:
    """Writes the figure, in the format that the file's name says.

    Raises:
      OSError: the file cannot be written.
      ValueError: there is no such format.
    """
    figure.savefig(path, dpi=DPI)
