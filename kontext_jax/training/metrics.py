"""What a training run tells while it goes: lines on disk, TensorBoard, speed and a progress line.

RUN/metrics.jsonl holds one JSON object a line, in order: {"step", "kind", name: number, …}. Lines
of kind "train" and "eval" depend on the run alone, so an interrupted run's are those of an unbroken
one; "speed" holds all that depends on the machine. Numbers that are no numbers are written as null.
"""

import contextlib
import json
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from etils import epath

from kontext_jax.runtime.atomic import write_text
from kontext_jax.terminal import Progress as TerminalProgress
from kontext_jax.terminal import duration

FILE = "metrics.jsonl"


class RunFiles:
    """A local folder for a run's small files, which is the run's own folder or copied there.

    A bucket (gs://…) knows no appending: there the files grow in a temporary folder, and `publish`
    copies those that changed.

    Args:
      run: the run's folder, local or not.
      copy: whether to work in a temporary folder; None for what the name says.
    """

    def __init__(self, run: str | os.PathLike, copy: bool | None = None):
        self._run = epath.Path(run)
        self._temporary = None
        self._published: dict[Path, tuple[int, int]] = {}
        if "://" in os.fspath(run) if copy is None else copy:
            self._temporary = tempfile.TemporaryDirectory(prefix="kontext_jax-run-")
            self.local = Path(self._temporary.name)
            if (self._run / FILE).exists():
                (self.local / FILE).write_bytes((self._run / FILE).read_bytes())
        else:
            self.local = Path(run)
            self.local.mkdir(parents=True, exist_ok=True)

    def publish(self) -> None:
        """Copies what is new to a run's folder that is not local."""
        if self._temporary is None:
            return
        for path in sorted(p for p in self.local.rglob("*") if p.is_file()):
            mark = (path.stat().st_size, path.stat().st_mtime_ns)
            if self._published.get(path) != mark:
                target = self._run / path.relative_to(self.local).as_posix()
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(path.read_bytes())
                self._published[path] = mark

    def close(self) -> None:
        self.publish()
        if self._temporary is not None:
            self._temporary.cleanup()


def cut_after(path: Path, step: int) -> int:
    """Drops the lines of `path` that lie beyond `step` or were cut short; how many they were.

    The run goes on from a checkpoint at `step`, and will write those lines again.
    """
    if not path.exists():
        return 0
    kept, dropped = [], 0
    for line in path.read_text("utf-8", errors="replace").splitlines():
        try:
            keep = json.loads(line)["step"] <= step
        except (ValueError, KeyError, TypeError):
            keep = False
        kept += [line] * keep
        dropped += not keep
    if dropped:
        write_text(path, "".join(line + "\n" for line in kept))
    return dropped


def read(path: str | os.PathLike, kind: str = "train") -> list[dict[str, Any]]:
    """The lines of one kind of a run's metrics.jsonl, in order."""
    lines = map(json.loads, Path(path).read_text("utf-8").splitlines())
    return [line for line in lines if line["kind"] == kind]


class MetricLog:
    """Writes metrics.jsonl and TensorBoard's event files into a folder.

    Args:
      folder: local.
      after_step: the step that the run goes on from; what was written beyond it is dropped.
      tensorboard: whether to write event files, into tensorboard/.
    """

    def __init__(self, folder: Path, after_step: int = 0, tensorboard: bool = True):
        cut_after(folder / FILE, after_step)
        self._file = (folder / FILE).open("a", encoding="utf-8")
        self._board = None
        if tensorboard:
            from tensorboardX import SummaryWriter  # takes a second

            self._board = SummaryWriter(
                str(folder / "tensorboard"), purge_step=after_step + 1, flush_secs=30
            )

    def write(self, kind: str, step: int, values: Mapping[str, float | int]) -> None:
        """Notes the values of one step; a line is on its way to the disk when this returns."""
        numbers = {name: _number(value) for name, value in values.items()}
        line = json.dumps({"step": step, "kind": kind, **numbers}, allow_nan=False)
        self._file.write(line + "\n")
        self._file.flush()
        if self._board is not None:
            for name, value in numbers.items():
                self._board.add_scalar(f"{kind}/{name}", math.nan if value is None else value, step)

    def picture(self, name: str, step: int, pixels: Any) -> None:
        """Shows a picture uint8 [height, width, 3] in TensorBoard."""
        if self._board is not None:
            self._board.add_image(name, pixels, step, dataformats="HWC")

    def flush(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())
        if self._board is not None:
            self._board.flush()

    def close(self) -> None:
        self.flush()
        self._file.close()
        if self._board is not None:
            self._board.close()


def _number(value: Any) -> float | int | None:
    if isinstance(value, int):
        return value
    value = float(value)
    return value if math.isfinite(value) else None


class Speed:
    """How fast the run goes, over the steps since the figures were last asked for.

    Time under `measure` (compiling, evaluating, saving) counts towards nothing but its stage.
    """

    def __init__(
        self, peak_flops: float | None = None, clock: Callable[[], float] = time.monotonic
    ):
        self._clock = clock
        self._peak_flops = peak_flops
        self.seconds: dict[str, float] = {}
        self._restart()

    def _restart(self) -> None:
        self._since = self._clock()
        self._idle_s = self._waited_s = 0.0
        self._steps = self._images = self._tokens = 0
        self._flops: float | None = 0.0

    @contextlib.contextmanager
    def measure(self, stage: str) -> Iterator[None]:
        start, idle_before = self._clock(), self._idle_s
        try:
            yield
        finally:
            seconds = self._clock() - start
            self._idle_s = idle_before + seconds  # stages inside this one are in it
            self.seconds[stage] = self.seconds.get(stage, 0.0) + seconds

    @contextlib.contextmanager
    def wait_for_data(self) -> Iterator[None]:
        start = self._clock()
        try:
            yield
        finally:
            self._waited_s += self._clock() - start

    def count(self, images: int, tokens: int, flops: float | None) -> None:
        """One step was finished: its global numbers of images and tokens, and its operations."""
        self._steps += 1
        self._images += images
        self._tokens += tokens
        self._flops = None if None in (flops, self._flops) else self._flops + flops

    def figures(self) -> dict[str, float]:
        """step_time_s, images_per_s, tokens_per_s, data_wait (share of the time) and, where the
        devices' peak is known, mfu (share of it); nothing if no step was finished."""
        seconds = self._clock() - self._since - self._idle_s
        if not self._steps or seconds <= 0:
            return {}
        figures = {
            "step_time_s": seconds / self._steps,
            "images_per_s": self._images / seconds,
            "tokens_per_s": self._tokens / seconds,
            "data_wait": min(self._waited_s / seconds, 1.0),
        }
        if self._peak_flops and self._flops is not None:
            figures["mfu"] = self._flops / seconds / self._peak_flops
        self._restart()
        return figures


class Progress:
    """The line that says how far the run is: living on a terminal, else a line now and then.

    Args:
      tell: prints a line; None for silence.
      every_s: seconds between lines where there is no terminal.
    """

    def __init__(
        self,
        num_steps: int,
        start_step: int,
        tell: Callable[[str], None] | None,
        every_s: float = 10.0,
        terminal: bool | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._num_steps = num_steps
        self._progress = TerminalProgress(
            num_steps,
            tell,
            quiet=tell is None,
            terminal=terminal,
            every_s=every_s,
            keep=True,
            done=start_step,
            clock=clock,
        )

    def update(self, step: int, loss: float | None, figures: Mapping[str, float]) -> None:
        """Says that `step` is finished."""
        self._progress.update(
            step, lambda: self.line(step, loss, figures), is_last=step == self._num_steps
        )

    def line(self, step: int, loss: float | None, figures: Mapping[str, float]) -> str:
        parts = [f"step {step}/{self._num_steps}"]
        if loss is not None:
            parts.append(f"loss {loss:.4f}")
        if "images_per_s" in figures:
            rate = figures["images_per_s"]
            parts.append(f"{rate:,.0f} images/s" if rate >= 100 else f"{rate:.3g} images/s")
        if "tokens_per_s" in figures:
            parts.append(f"{figures['tokens_per_s']:,.0f} tokens/s")
        if "mfu" in figures:
            parts.append(f"MFU {figures['mfu']:.1%}")
        if figures.get("data_wait", 0) >= 0.01:
            parts.append(f"waits for data {figures['data_wait']:.0%}")
        if "step_time_s" in figures and step < self._num_steps:
            left_s = figures["step_time_s"] * (self._num_steps - step)
            parts.append(f"{duration(left_s)} left")
        return " · ".join(parts)

    def close(self) -> None:
        self._progress.close()
