"""What a program needs, and how near it comes to what the hardware can do.

limit       model FLOPs of one chip at its bfloat16 peak; nothing that is computed twice counts
estimate    the compiler's cycles, attention's kernels at the peak, waiting for collectives
ratio       (cycles + attention) / limit; with collectives, also what is waited for
MFU         limit / estimate
"""

import dataclasses
import itertools
from typing import Any

import rich.box
import rich.columns
import rich.console
import rich.table

from kontext_jax.hlo import cost as hlo_cost
from kontext_jax.plan.measure import Compiled, versions
from kontext_jax.plan.programs import Planned
from kontext_jax.plan.targets import Target

GIB, MS = 2**30, 1e3
WAITING = "collectives"


@dataclasses.dataclass(frozen=True)
class Report:
    """A program on a target, compiled; times are of one run of it, memory of one chip.

    Attributes:
      estimate: None where the program did not compile.
      repeats: how often its loop of unknown length runs; sampling steps.
    """

    planned: Planned
    target: Target
    compiled: Compiled
    estimate: hlo_cost.Estimate | None
    repeats: int = 1

    @property
    def peak_bytes(self) -> float:
        """On one chip, with what lies there beside the program: other weights, unused arguments."""
        if self.estimate is None:
            return self.compiled.needed_bytes
        return sum(self.memory().values())

    @property
    def fits(self) -> bool:
        return self.estimate is not None and self.peak_bytes <= self.target.chip.hbm_bytes

    @property
    def limit_s(self) -> float | None:
        if self.planned.flops is None:
            return None
        return self.planned.flops / self.planned.mesh.size / self.target.chip.bf16_flops

    @property
    def ratio(self) -> float | None:
        return self.estimate and self.limit_s and self.estimate.compute_s / self.limit_s

    @property
    def ratio_with_collectives(self) -> float | None:
        return self.estimate and self.limit_s and self.estimate.total_s / self.limit_s

    @property
    def images_per_s(self) -> float | None:
        return self.estimate and self.planned.images / self.estimate.total_s

    def shares(self) -> dict[str, float]:
        """What → seconds of a run; they sum to `Estimate.total_s`."""
        if self.estimate is None:
            return {}
        found = dict(self.estimate.seconds_by_category)
        if self.estimate.exposed_s:
            found[WAITING] = self.estimate.exposed_s
        return dict(sorted(found.items(), key=lambda item: -item[1]))

    def memory(self) -> dict[str, float]:
        """What → bytes of one chip at the peak.

        Arguments that the program does not read are in memory all the same; those that it reads
        take what the compiler says, its padding included.
        """
        held, compiled = dict(self.planned.held), self.compiled
        arguments = sum(size for name, size in held.items() if name not in self.planned.beside)
        found = held | {"temporaries": compiled.temporary_bytes}
        results = compiled.output_bytes - compiled.alias_bytes
        padding = max(compiled.argument_bytes - arguments, 0)
        return found | {
            name: size for name, size in (("results", results), ("padding", padding)) if size > 0
        }

    def to_json(self, num_ops: int = 20) -> dict[str, Any]:
        """Everything, in JSON's types."""
        found = {
            "program": self.planned.title,
            "topology": self.target.name,
            "chip": self.target.chip.name,
            "chips": self.planned.mesh.size,
            "mesh": dict(self.planned.mesh.shape),
            "images": self.planned.images,
            "fits": self.fits,
            "peak_bytes": self.peak_bytes,
            "hbm_bytes": self.target.chip.hbm_bytes,
            "compile_s": round(self.compiled.seconds, 1),
            "from_cache": self.compiled.from_cache,
            "versions": versions(),
        }
        if self.estimate is None:
            return found | {"error": self.compiled.error}
        return found | {
            "memory_bytes": self.memory(),
            "model_flops": self.planned.flops,
            "limit_s": self.limit_s,
            "ratio": self.ratio,
            "ratio_with_collectives": self.ratio_with_collectives,
            "mfu": self.limit_s and self.limit_s / self.estimate.total_s,
            "images_per_s": self.images_per_s,
            "shares_s": self.shares(),
            "estimate": self.estimate.to_json(num_ops),
        }


def make_report(planned: Planned, target: Target, compiled: Compiled, repeats: int = 1) -> Report:
    found = None
    if not compiled.error:
        slice_size = target.slice_size if target.num_slices > 1 else 0
        found = hlo_cost.estimate(compiled.text, target.chip, repeats, slice_size)
    return Report(planned, target, compiled, found, repeats)


def mesh_text(shape: dict[str, int]) -> str:
    return " × ".join(f"{name} {size}" for name, size in shape.items() if size > 1) or "one device"


def print_report(console: rich.console.Console, report: Report, num_ops: int) -> None:
    planned, target = report.planned, report.target
    console.print(f"[bold]{planned.title}[/bold]")
    where = f"{planned.mesh.size} × {target.chip.name}" if planned.mesh.size > 1 else target.name
    source = "found on disk" if report.compiled.from_cache else "compiled"
    console.print(
        f"{where} ({target.name}), {mesh_text(dict(planned.mesh.shape))}; {source}, "
        f"{report.compiled.seconds:.0f} s"
    )
    if report.estimate is None:
        verdict = "does not fit" if report.compiled.needed_bytes else "cannot be compiled"
        console.print(f"[red]{verdict}[/red]: {report.compiled.error}", highlight=False)
        return
    console.print(
        rich.columns.Columns([_memory_table(report), _time_table(report)], padding=(0, 3))
    )
    for line in _verdicts(report):
        console.print(line, highlight=False)
    if report.estimate.collectives:
        console.print(_collectives_table(report))
    if num_ops:
        console.print(_ops_table(report, num_ops))
    for line in _remarks(report):
        console.print(line, highlight=False)


def new_table(title: str, left: tuple[str, ...], right: tuple[str, ...]) -> rich.table.Table:
    table = rich.table.Table(title=title, title_justify="left", box=rich.box.SIMPLE_HEAD)
    for name in left:
        table.add_column(name, no_wrap=True)
    for name in right:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def size_text(size: float) -> str:
    """Bytes for people."""
    return f"{size / GIB:,.2f} GiB" if abs(size) >= GIB / 10 else f"{size / 2**20:,.2f} MiB"


def time_text(seconds: float) -> str:
    """Seconds for people."""
    return f"{seconds:,.2f} s" if seconds >= 10 else f"{seconds * MS:,.4g} ms"


def _memory_table(report: Report) -> rich.table.Table:
    table = new_table("memory of one chip", ("what",), ("size",))
    for name, size in report.memory().items():
        table.add_row(name, size_text(size))
    table.add_section()
    table.add_row("peak", size_text(report.peak_bytes))
    table.add_row("a chip has", size_text(report.target.chip.hbm_bytes))
    return table


def _time_table(report: Report) -> rich.table.Table:
    kind = "roofline of each kernel" if report.estimate.analytic else "estimated"
    table = new_table(f"time of one run, {kind}", ("what",), ("time", "share"))
    total = report.estimate.total_s
    for name, seconds in report.shares().items():
        note = {"attention": " (at peak)", WAITING: " (waited for)"}.get(name, "")
        table.add_row(name + note, time_text(seconds), f"{seconds / total:.1%}")
    table.add_section()
    table.add_row("together", time_text(total), "")
    if report.limit_s:
        table.add_row("limit: model FLOPs at peak", time_text(report.limit_s), "")
    return table


def _verdicts(report: Report) -> list[str]:
    estimate, chip = report.estimate, report.target.chip
    fits = "[green]fits[/green]" if report.fits else "[red]does not fit[/red]"
    lines = [f"{fits}: {size_text(report.peak_bytes)} of {size_text(chip.hbm_bytes)}"]
    if report.limit_s:
        flops = report.planned.flops / report.planned.mesh.size
        lines.append(
            f"{flops / 1e12:,.4g} TFLOP on each chip; {report.ratio:.2f} × the limit, "
            f"{report.ratio_with_collectives:.2f} × with what is waited for; MFU "
            f"{report.limit_s / estimate.total_s:.0%}"
        )
    each = f", {time_text(estimate.total_s / report.repeats)} a step" if report.repeats > 1 else ""
    rate = f"{report.images_per_s:{',.0f' if report.images_per_s >= 100 else '.3g'}}"
    lines.append(f"{rate} images a second on all chips{each}")
    return lines


def _collectives_table(report: Report) -> rich.table.Table:
    table = new_table(
        "collectives of one chip in one run",
        ("kind", "dtype"),
        ("count", "beside work", "arrays", "over the links", "time of links", "waited for"),
    )
    for row in report.estimate.collectives:
        table.add_row(
            row.kind,
            row.dtype,
            f"{row.count:,}",
            f"{row.count_async:,}",
            *(size_text(size) for size in (row.full_bytes, row.link_bytes)),
            *(time_text(seconds) for seconds in (row.link_s, row.exposed_s)),
        )
    return table


def _ops_table(report: Report, num_ops: int) -> rich.table.Table:
    table = new_table("costliest operations", ("what", "makes", "for"), ("times", "time"))
    for op in report.estimate.ops[:num_ops]:
        makes, source = _cut(op.shape, 34), _cut(_short_source(op.source), 40)
        table.add_row(op.category, makes, source, str(op.count), time_text(op.seconds))
    return table


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[: length - 1]}…"


_EVERYWHERE = (
    "while", "body", "closed_call", "cond", "branch_0_fun", "checkpoint", "shard_map",
    "pallas_call",
)  # fmt: skip


def _short_source(source: str) -> str:
    """The end of an operation's path, without what every path has."""
    parts = [part for part, _ in itertools.groupby(source.split("/")) if part not in _EVERYWHERE]
    backward = "∇ " if any("transpose(" in part for part in parts) else ""
    again = "again " if "rematted_computation" in parts else ""
    parts = [part for part in parts if "(" not in part and part != "rematted_computation"]
    return backward + again + "/".join(parts[-3:])


def _remarks(report: Report) -> list[str]:
    lines = []
    if report.limit_s is None:
        lines.append("this model's FLOPs are not counted, so there is no limit to compare with")
    uncounted = sum(row.bytes for row in report.estimate.uncounted)
    if uncounted > GIB:
        kinds = ", ".join(row.kind for row in report.estimate.uncounted[:3])
        lines.append(f"without an estimate: {uncounted / GIB:,.1f} GiB of {kinds}")
    assumed = [loop for loop in report.estimate.loops if not loop.exact]
    for loop in assumed:
        lines.append(f"loop {loop.name} was counted {loop.times} times, as asked")
    if report.estimate.analytic:
        lines.append(
            "this compiler estimates no time: each kernel counts at its roofline, a lower bound"
        )
    return lines
