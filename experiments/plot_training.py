"""Draws how a flow-matching run learnt: `python experiments/plot_training.py RUN --out FILE.png`.

Left, the loss over the steps, of training and of other examples; right, the loss by t at last. The
loss has a logarithmic axis.
Beside both, what the best predictor would reach on latents without any structure, Gaussian ones of
the same variance: what lies under that line was learnt from pictures, text and references.
"""

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from kontext_jax.flow.path import gaussian_loss_floor
from kontext_jax.training import metrics

WIDTH, HEIGHT, LEFT, BOTTOM, TOP = 560, 400, 60, 50, 40
LOSSES = (0.01, 3.0)  # drawn from and to
COLOURS = {
    "training": (150, 190, 235),
    "edits": (31, 90, 180),
    "text to image": (120, 70, 170),
    "other examples": (210, 80, 30),
    "Gaussian floor": (90, 90, 90),
}


class Chart:
    """Axes, the vertical one logarithmic, and lines on a part of a picture."""

    def __init__(self, draw: ImageDraw.ImageDraw, left: int, title: str, x_label: str, ranges):
        self._draw, self._left = draw, left
        (self._x0, self._x1), (self._y0, self._y1) = ranges
        self._font = ImageFont.load_default(14)
        self._names: list[str] = []
        plot = [left + LEFT, TOP, left + WIDTH - 20, HEIGHT - BOTTOM]
        self._box = plot
        draw.rectangle(plot, outline=(60, 60, 60))
        draw.text((plot[0], 12), title, fill="black", font=self._font)
        draw.text((plot[2] - 60, HEIGHT - 24), x_label, fill="black", font=self._font)
        for value in np.geomspace(self._y0, self._y1, 6):
            y = self._at(self._x0, value)[1]
            draw.line([plot[0], y, plot[2], y], fill=(225, 225, 225))
            draw.text((left + 14, y - 8), f"{value:.2f}", fill="black", font=self._font)
        for value in np.linspace(self._x0, self._x1, 5):
            x = self._at(value, self._y0)[0]
            text = f"{value:.2f}" if self._x1 <= 1 else f"{value:.0f}"
            draw.text((x - 12, plot[3] + 6), text, fill="black", font=self._font)

    def _at(self, x: float, y: float) -> tuple[float, float]:
        left, top, right, bottom = self._box
        along = (x - self._x0) / (self._x1 - self._x0)
        y = min(max(y, self._y0), self._y1)
        up = math.log(y / self._y0) / math.log(self._y1 / self._y0)
        return left + along * (right - left), bottom - up * (bottom - top)

    def line(self, name: str, xs: Sequence[float], ys: Sequence[float], dots: bool = False) -> None:
        """A line, and its name in the legend."""
        colour = COLOURS[name]
        points = [self._at(x, y) for x, y in zip(xs, ys, strict=True)]
        self._draw.line(points, fill=colour, width=2)
        if dots:
            for x, y in points:
                self._draw.ellipse([x - 3, y - 3, x + 3, y + 3], fill=colour)
        right, y = self._box[2] - 150, self._box[1] + 70 + 18 * len(self._names)
        self._draw.line([right, y + 8, right + 20, y + 8], fill=colour, width=3)
        self._draw.text((right + 26, y), name, fill="black", font=self._font)
        self._names.append(name)


def mean_floor(mu: float, sigma: float, variance: float) -> float:
    """Mean of the Gaussian floor over logit-normal times."""
    n = np.linspace(-6, 6, 4001)
    weight = np.exp(-0.5 * n**2)
    t = 1 / (1 + np.exp(-(mu + sigma * n)))
    floor = np.asarray(gaussian_loss_floor(t.astype(np.float32), variance))
    return float((weight * floor).sum() / weight.sum())


def smooth(values: np.ndarray, width: int) -> np.ndarray:
    """Running mean over up to `width` values, shorter at the beginning."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(0, ends - width)
    return (sums[ends] - sums[starts]) / (ends - starts)


def plot(run: Path, mu: float = 0.0, sigma: float = 1.0, variance: float = 1.0) -> np.ndarray:
    """The picture, uint8 RGB.

    Raises:
      ValueError: the run has logged no loss by time yet.
    """
    rows = metrics.read(run / "metrics.jsonl", "train")
    held_out = metrics.read(run / "metrics.jsonl", "eval_ema")
    bins = sorted(
        int(k.split("/")[1]) for k in (rows[-1] if rows else {}) if k.startswith("loss_t/")
    )
    if not bins:
        raise ValueError(f"{run} has logged no loss by time; train for more steps")
    image = Image.new("RGB", (2 * WIDTH, HEIGHT), "white")
    draw = ImageDraw.Draw(image)
    last_step = rows[-1]["step"]
    floor = mean_floor(mu, sigma, variance)
    chart = Chart(draw, 0, "loss", "steps", ((0, last_step), LOSSES))
    for name, key in (("edits", "loss_edit"), ("text to image", "loss_t2i")):
        points = [(r["step"], r[key]) for r in rows if key in r]
        if points:
            xs, ys = zip(*points, strict=True)
            chart.line(name, xs, smooth(np.array(ys), 10))
    if held_out:
        chart.line("other examples", *zip(*[(r["step"], r["loss"]) for r in held_out], strict=True))
    chart.line("Gaussian floor", (0, last_step), (floor, floor))

    centres = [(i + 0.5) / len(bins) for i in bins]
    times = np.linspace(0.01, 0.99, 99, dtype=np.float32)
    by_t = np.asarray(gaussian_loss_floor(times, variance))
    chart = Chart(draw, WIDTH, "loss by t, last tenth of the steps", "t", ((0, 1), LOSSES))
    recent = [r for r in rows if r["step"] > 0.9 * last_step]
    known = [[r[f"loss_t/{i}"] for r in recent if f"loss_t/{i}" in r] for i in bins]
    chart.line("training", centres, [float(np.mean(v)) for v in known], dots=True)
    if held_out:
        chart.line(
            "other examples", centres, [held_out[-1][f"loss_t/{i}"] for i in bins], dots=True
        )
    chart.line("Gaussian floor", times, by_t)
    return np.asarray(image)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(argv)
    Image.fromarray(plot(args.run)).save(args.out)


if __name__ == "__main__":
    main()
