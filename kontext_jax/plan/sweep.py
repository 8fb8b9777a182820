"""Many settings of one config, compiled one after another and sorted by images a second.

A policy of rematerialization that keeps more than one that did not fit is not tried again on the
same mesh and batch. What was compiled is kept, so a sweep that was interrupted goes on.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import rich.console

from kontext_jax.plan.report import GIB, Report, new_table, size_text, time_text
from kontext_jax.plan.targets import Target
from kontext_jax.runtime import sharding
from kontext_jax.runtime.sharding import MeshConfig
from kontext_jax.terminal import Progress
from kontext_jax.training.config import TrainConfig

# From the least memory to the most.
REMATS = ("full", "save_attention", "save_outputs", "save_qkv", "save_products", "none")
DEFAULT_REMATS = ("full", "save_outputs", "save_qkv", "save_products")


@dataclasses.dataclass(frozen=True)
class Choice:
    """One setting of a sweep; `batch` examples of a chip at a time."""

    mesh: MeshConfig
    batch: int
    remat: str

    def __str__(self) -> str:
        sizes = dataclasses.asdict(self.mesh)
        mesh = " × ".join(f"{name} {size}" for name, size in sizes.items() if size > 1)
        return f"{mesh or 'one device'}, {self.batch} on a chip, {self.remat}"

    def apply(self, config: TrainConfig, num_devices: int) -> TrainConfig:
        """The config with this setting; what it accumulates over stays.

        Raises:
          ValueError: `TrainConfig` refuses the setting.
        """
        mesh = dict(zip(sharding.AXES, sharding.mesh_shape(self.mesh, num_devices), strict=True))
        parts = config.accumulate_steps
        for axis in sharding.BATCH_AXES:
            parts *= mesh[axis]
        return dataclasses.replace(
            config, mesh=self.mesh, remat=self.remat, batch_size=self.batch * parts
        )


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of a choice: a report, or why there is none."""

    choice: Choice
    report: Report | None = None
    reason: str = ""

    @property
    def fits(self) -> bool:
        return self.report is not None and self.report.fits

    def to_json(self) -> dict[str, Any]:
        found: dict[str, Any] = {
            "mesh": dataclasses.asdict(self.choice.mesh),
            "batch": self.choice.batch,
            "remat": self.choice.remat,
            "fits": self.fits,
        }
        if self.reason:
            found["reason"] = self.reason
        return found | ({"report": self.report.to_json(5)} if self.report else {})


def default_meshes(target: Target) -> list[MeshConfig]:
    """Parameters over 4 devices and more, doubling, up to all of a slice; data for the rest."""
    size, found, fsdp = target.slice_size, [], min(4, target.slice_size)
    while fsdp <= size:
        if size % fsdp == 0:
            found.append(MeshConfig(slices=target.num_slices, data=size // fsdp, fsdp=fsdp))
        fsdp *= 2
    return found


def choices(
    meshes: Sequence[MeshConfig], batches: Sequence[int], remats: Sequence[str]
) -> list[Choice]:
    """All combinations; for each mesh and batch the policy that keeps least comes first."""
    ordered = sorted(remats, key=REMATS.index)
    return [Choice(*choice) for choice in itertools.product(meshes, batches, ordered)]


def sweep(
    wanted: Sequence[Choice], measure: Callable[[Choice], Report], console: rich.console.Console
) -> Iterator[Outcome]:
    """Outcomes as they come, with a progress bar.

    Args:
      measure: raises ValueError where a choice makes no program.
    """
    full: dict[tuple[MeshConfig, int], str] = {}
    with Progress(len(wanted), console=console) as progress:
        for i, choice in enumerate(wanted):
            progress.update(i, lambda i=i, choice=choice: f"{i + 1}/{len(wanted)}  {choice}")
            key = choice.mesh, choice.batch
            if key in full:
                yield Outcome(choice, reason=f"not tried: {full[key]} keeps less and does not fit")
            else:
                try:
                    report = measure(choice)
                except ValueError as error:
                    yield Outcome(choice, reason=str(error))
                else:
                    if not report.fits:
                        full[key] = choice.remat
                    yield Outcome(choice, report, "" if report.fits else _why(report))


def _why(report: Report) -> str:
    if report.peak_bytes:
        return (
            f"needs {report.peak_bytes / GIB:.1f} GiB of {report.target.chip.hbm_bytes / GIB:.0f}"
        )
    return report.compiled.error


def ranked(outcomes: Sequence[Outcome]) -> list[Outcome]:
    """Those that fit, fastest first, then the others."""
    return sorted(
        outcomes, key=lambda o: (not o.fits, -(o.report.images_per_s or 0) if o.fits else 0)
    )


def print_outcomes(console: rich.console.Console, outcomes: Sequence[Outcome]) -> None:
    table = new_table(
        "settings by images a second",
        ("mesh", "remat"),
        ("on a chip", "images/s", "step", "waiting", "ratio", "MFU", "peak"),
    )
    left = []
    for outcome in ranked(outcomes):
        if not outcome.fits:
            left.append(f"  {outcome.choice}: {outcome.reason}")
            continue
        report, choice = outcome.report, outcome.choice
        has_limit = report.limit_s is not None
        table.add_row(
            str(choice).split(",")[0],
            choice.remat,
            str(choice.batch),
            f"{report.images_per_s:,.3g}",
            time_text(report.estimate.total_s),
            time_text(report.estimate.exposed_s),
            f"{report.ratio:.2f}" if has_limit else "",
            f"{1 / report.ratio_with_collectives:.0%}" if has_limit else "",
            size_text(report.peak_bytes),
        )
    console.print(table)
    if left:
        console.print("left out:")
        for line in left:
            console.print(line, highlight=False)
