"""What a training run tells and writes down: settings, metrics, pictures, profiles."""

import math
from typing import Any

import jax
from etils import epath
from jax.sharding import Mesh

from kontext_jax.objectives.base import mean_metrics
from kontext_jax.pictures.files import write_png
from kontext_jax.runtime.atomic import write_text
from kontext_jax.runtime.sharding import tree_bytes
from kontext_jax.terminal import Tell
from kontext_jax.training import config as train_config
from kontext_jax.training.config import TrainConfig
from kontext_jax.training.metrics import MetricLog, Progress, RunFiles, Speed
from kontext_jax.training.tasks.base import Task, Work

STANDINGS = ("skipped_total", "skipped_in_a_row")  # metrics whose last value tells, not the mean
CONFIG_FILE, SAMPLES, PROFILE = "config.json", "samples", "profile"


def is_due(step: int, every_steps: int) -> bool:
    """Whether something is done after this step; never if `every_steps` is 0."""
    return every_steps > 0 and step % every_steps == 0


def describe(config: TrainConfig, task: Task, mesh: Mesh, abstract: Any) -> list[str]:
    """What a person wants to know before a run begins, a line each."""
    trained = sum(math.prod(x.shape) for x in jax.tree.leaves(abstract.params))
    frozen = sum(math.prod(x.shape) for x in jax.tree.leaves(task.frozen_shapes()))
    axes = " × ".join(f"{name} {size}" for name, size in mesh.shape.items() if size > 1)
    device = mesh.devices.flat[0].device_kind
    beside = f" beside {frozen:,} frozen" if frozen else ""
    return [
        *task.sources,
        f"{trained:,} trained parameters{beside}; {tree_bytes(abstract) / 2**30:.3g} GiB of state "
        "on each device",
        f"{mesh.size} device(s) {device}" + (f", {axes}" if axes else ""),
        f"{config.num_steps} steps of {config.batch_size} examples, {config.dtype}",
    ]


def compiled_line(name: Any, compiled: Any, seconds: float) -> str:
    """What is told of a program that was compiled: its name, the time, its memory."""
    kind = name if isinstance(name, str) else name[0]
    memory = compiled.memory_analysis()
    line = f"compiled {kind} in {seconds:.1f} s"
    if memory is None:
        return line
    peak = (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes
    )
    return f"{line}, {peak / 2**30:.3g} GiB on each device"


class Journal:
    """What a run writes down as it goes; on all processes, of which the first alone writes.

    Attributes:
      rows: metrics of the finished steps that are not written yet; saved with the state, so that a
        run that goes on writes the means that an unbroken one does.
      running: step, its metrics on the devices, and its `Work`; None once it is finished.
    """

    def __init__(
        self,
        config: TrainConfig,
        run: epath.Path,
        step: int,
        rows: list[dict[str, float]],
        speed: Speed,
        tell: Tell,
    ):
        self.rows = rows
        self.running: tuple[int, Any, Work] | None = None
        self._config, self._run, self._speed = config, run, speed
        self._figures: dict[str, float] = {}
        self._is_first = jax.process_index() == 0
        self.files, self._log = None, None
        if self._is_first:
            self.files = RunFiles(run)
            self._log = MetricLog(self.files.local, step, config.log.tensorboard)
        told = tell if self._is_first else None
        self._progress = Progress(config.num_steps, step, told, config.log.print_every_s)

    def write_config(self, config: TrainConfig) -> None:
        if self._is_first:
            text = train_config.to_json(config) + "\n"
            write_text(self._run / CONFIG_FILE, text, durable=True)

    def write(self, kind: str, step: int, values: dict[str, Any]) -> None:
        if self._log is not None:
            self._log.write(kind, step, values)

    def finish_running(self, counts: dict[str, int]) -> None:
        """Waits for the running step, if one is, and notes what it measured.

        Raises:
          FloatingPointError: it was the last of too many in a row without finite numbers.
        """
        if self.running is None:
            return
        (step, measured, work), self.running = self.running, None
        row = {name: float(value) for name, value in jax.device_get(measured).items()}
        self._speed.count(*work)
        self.rows.append(row)
        is_lost = row["skipped_in_a_row"] >= self._config.max_skipped_in_a_row
        if is_lost or is_due(step, self._config.log.every_steps) or step == self._config.num_steps:
            standings = {name: row[name] for name in STANDINGS}
            self.write("train", step, mean_metrics(self.rows) | standings)
            self.rows.clear()
            self._figures |= self._speed.figures()
            counted = {f"data/{name}": count for name, count in counts.items()}
            self.write("speed", step, self._figures | counted)
        self._progress.update(step, row["loss"], self._figures)
        if is_lost:
            raise FloatingPointError(
                f"the last {self._config.max_skipped_in_a_row} steps, up to {step}, gave no finite "
                "loss or gradient and changed nothing; checkpoints are as they were. Lower "
                "optimizer.learning_rate, lengthen optimizer.warmup_steps, or look at the data"
            )

    def show(self, step: int, picture: Any, examples: Any) -> None:
        """Writes a picture uint8 [height, width, 3] of some held-out examples."""
        if self.files is not None and self._log is not None:
            told = {"step": step, "prompts": list(getattr(examples, "prompts", ()))}
            write_png(self.files.local / SAMPLES / f"{step}.png", picture, told)
            self._log.picture("samples", step, picture)

    def publish(self) -> None:
        if self.files is not None and self._log is not None:
            self._log.flush()
            self.files.publish()

    def close(self) -> None:
        self._progress.close()
        if self.files is not None and self._log is not None:
            self._log.close()
            self.files.close()


class Profile:
    """Runs `jax.profiler` over the steps that the config names, on the first process."""

    def __init__(self, config: TrainConfig, journal: Journal):
        self._first_step = config.log.profile_from_step
        self._last_step = self._first_step + config.log.profile_num_steps - 1
        self._files, self._runs = journal.files, False

    def before(self, step: int) -> None:
        if self._files is not None and step == self._first_step:
            jax.profiler.start_trace(str(self._files.local / PROFILE))
            self._runs = True

    def ends_after(self, step: int) -> bool:
        return self._runs and step == self._last_step

    def close(self) -> None:
        if self._runs:
            jax.profiler.stop_trace()
            self._runs = False
