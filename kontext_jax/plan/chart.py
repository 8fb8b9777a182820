"""Reports and growing figures as pictures."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from kontext_jax import charts

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = {
    "matmul": "#2b6cb0",
    "attention": "#7952b3",
    "elementwise": "#f0a04b",
    "reduction": "#5aa578",
    "data movement": "#c85050",
    "collectives": "#787878",
}
_OTHERS = ("#3c8ca0", "#aa783c", "#965a8c", "#6e823c", "#5a5aa0")


def _colour(name: str, index: int) -> str:
    return COLOURS.get(name, _OTHERS[index % len(_OTHERS)])


class Bar(NamedTuple):
    """A stacked bar: its parts in order, and what stands behind it."""

    label: str
    parts: Mapping[str, float]
    note: str = ""


def bars(title: str, rows: Sequence[Bar]) -> "Figure":
    """Stacked bars, one below the other, on one scale.

    Raises:
      ValueError: matplotlib is not installed.
    """
    figure = charts.new_figure(1140, 130 + 32 * len(rows))
    axes = figure.add_subplot()
    places, ends = np.arange(len(rows)), np.zeros(len(rows))
    names = list(dict.fromkeys(name for row in rows for name in row.parts))
    for index, name in enumerate(names):
        lengths = np.array([row.parts.get(name, 0) for row in rows])
        axes.barh(places, lengths, 0.7, ends, color=_colour(name, index), label=name)
        ends += lengths
    for place, end, row in zip(places, ends, rows, strict=True):
        axes.annotate(row.note, (end, place), (6, 0), textcoords="offset points", va="center")
    axes.set_yticks(places, [row.label for row in rows])
    axes.set_xlim(0, 1.3 * ends.max())
    axes.invert_yaxis()
    axes.xaxis.set_visible(False)
    axes.spines[:].set_visible(False)
    axes.tick_params(left=False)
    figure.suptitle(title)
    figure.legend(loc="outside lower center", ncols=max(len(names), 1), frameon=False)
    return figure


class Panel(NamedTuple):
    """Curves over the same places: name → one value for each of `ticks`."""

    title: str
    ticks: Sequence[str]
    curves: Mapping[str, Sequence[float]]


def curves(title: str, panels: Sequence[Panel], columns: int = 2) -> "Figure":
    """Panels side by side, each from zero up.

    Raises:
      ValueError: matplotlib is not installed.
    """
    rows = -(-len(panels) // columns)
    figure = charts.new_figure(470 * columns, 40 + 330 * rows)
    for number, panel in enumerate(panels, start=1):
        axes = figure.add_subplot(rows, columns, number)
        for index, (name, ys) in enumerate(panel.curves.items()):
            axes.plot(panel.ticks, ys, marker="o", color=_colour(name, index), label=name)
        axes.set_title(panel.title, fontsize="medium")
        axes.set_ylim(0)
        axes.grid(axis="y", color="#e4e4e4")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize="small")
    figure.suptitle(title)
    return figure
