"""How time and memory grow with the work, by the compiler's account: JSON, and curves as a picture.

    pip install 'jax[tpu]'
    python benchmarks/growth.py --json docs/growth.json --plot docs/growth.png
    python benchmarks/growth.py --only references --json docs/growth.json --plot docs/growth.png

Three series, the 12B model in bfloat16: one denoising step of an edit at 1024² with 0 to 4
references, and of an edit with one reference at 512² to 2048², on one v5p; and the training step of
`configs/kontext_joint.py` on 16 to 1024 v5p chips with constant work on each. A series that is not
asked for is kept as the file has it.
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common
import rich.console
from rich.progress import track

# Before anything that imports JAX: it keeps JAX on the CPU.
import kontext_jax.plan  # noqa: F401
from kontext_jax import charts
from kontext_jax.plan import chart, measure, programs, sampling
from kontext_jax.plan.commands import measure_sampling, measure_training
from kontext_jax.plan.report import GIB, Report
from kontext_jax.plan.targets import find_target
from kontext_jax.runtime.sharding import MeshConfig
from kontext_jax.terminal import load_config
from kontext_jax.training import config as train_config

ROOT = Path(__file__).resolve().parents[1]
STEPS = 28
REFERENCES = (0, 1, 2, 3, 4)
SIDES = (512, 768, 1024, 1536, 2048)
SLICES = {"v5p:2x2x4": 16, "v5p:4x4x4": 64, "v5p:4x8x8": 256, "v5p:8x8x16": 1024}


def point(label: str, report: Report, runs: int) -> dict[str, Any]:
    """What a curve shows of a program that does its work `runs` times."""
    if report.estimate is None:
        raise SystemExit(f"error: {report.planned.title}: {report.compiled.error}")
    limit = report.limit_s / runs
    return {
        "label": label,
        "time_s": report.estimate.total_s / runs,
        "limit_s": limit,
        "shares_s": {name: seconds / runs for name, seconds in report.shares().items()},
        "collectives": [
            {
                "kind": row.kind,
                "dtype": row.dtype,
                "link_bytes": row.link_bytes,
                "link_s": row.link_s,
                "exposed_s": row.exposed_s,
            }
            for row in report.estimate.collectives[:3]
        ],
        "peak_bytes": report.peak_bytes,
        "temporary_bytes": report.compiled.temporary_bytes,
        "chips": report.planned.mesh.size,
        "images_per_s": report.images_per_s,
    }


def denoising(label: str, cache: measure.Cache, **request: Any) -> dict[str, Any]:
    wanted = sampling.Request(num_steps=STEPS, **request)
    ((_, report),) = measure_sampling(wanted, find_target("v5p"), cache, ("run",))
    return point(label, report, STEPS)


def training(topology: str, chips: int, cache: measure.Cache) -> dict[str, Any]:
    """The step with one example on each chip.

    Parameters are split over half of the chips at most: over all of them, the compiler turns
    gathers into products on parts, which take half as long again (docs/performance.md, "How cost
    grows").
    """
    config = train_config.parse(
        load_config(str(ROOT / "configs/kontext_joint.py")),
        [("batch_size", str(chips)), ("accumulate_steps", "1")],
    )
    mesh = MeshConfig(data=-1, fsdp=min(config.mesh.fsdp, chips // 2))
    config = dataclasses.replace(config, mesh=mesh)
    size, references = programs.default_inputs(config)
    report = measure_training(config, find_target(topology), size, references, cache)
    return point(str(chips), report, 1)


SERIES: dict[str, list[Callable[[measure.Cache], dict[str, Any]]]] = {
    "references": [
        lambda cache, n=n: denoising(str(n), cache, num_references=n) for n in REFERENCES
    ],
    "sizes": [
        lambda cache, side=side: denoising(str(side), cache, size=(side, side)) for side in SIDES
    ],
    "chips": [
        lambda cache, name=name, chips=chips: training(name, chips, cache)
        for name, chips in SLICES.items()
    ],
}
TITLES = {
    "references": "denoising step on one v5p, by references at 1024²",
    "sizes": "denoising step on one v5p, by side with 1 reference",
    "chips": "training step by chips, each with the same work",
}


def draw(series: dict[str, list[dict[str, Any]]]) -> Any:
    """Time by kind of work, and memory, of every series."""
    panels = []
    for name, points in series.items():
        ticks = [point["label"] for point in points]
        kinds = ("matmul", "attention", "collectives")
        times: dict[str, list[float]] = {"all": [point["time_s"] for point in points]}
        times |= {k: [p["shares_s"].get(k, 0.0) for p in points] for k in kinds}
        times["limit: FLOPs at peak"] = [point["limit_s"] for point in points]
        shown = {k: [1e3 * t for t in ys] for k, ys in times.items() if any(ys)}
        panels.append(chart.Panel(f"ms of a {TITLES[name]}", ticks, shown))
        memory = {
            "peak": [point["peak_bytes"] / GIB for point in points],
            "temporaries": [point["temporary_bytes"] / GIB for point in points],
        }
        panels.append(chart.Panel("GiB of a chip", ticks, memory))
    return chart.curves("the 12B model, compiled ahead of time: how cost grows", panels)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=SERIES, help="series to compile; default: all")
    parser.add_argument("--plot", type=Path, metavar="FILE.png")
    parser.add_argument("--draw-only", action="store_true", help="compile nothing, draw the file")
    common.add_json_flag(parser)
    args = parser.parse_args()
    series: dict[str, Any] = {}
    if args.json and args.json.exists():
        series = json.loads(args.json.read_text())["series"]
    errors, cache = rich.console.Console(stderr=True), measure.default_cache()
    for name in () if args.draw_only else args.only or SERIES:
        series[name] = [
            make(cache) for make in track(SERIES[name], description=name, console=errors)
        ]
        for found in series[name]:
            print(
                f"{name} {found['label']}: {found['time_s'] * 1e3:,.1f} ms, "
                f"{found['time_s'] / found['limit_s']:.2f} × limit, "
                f"{found['peak_bytes'] / GIB:.1f} GiB"
            )
        report = common.report(
            "growth",
            args,
            [],
            timer="nothing is timed: the compiler's estimates for one run",
            compilers=measure.versions(),
            series=series,
        )
        common.write(report, args.json)
    if args.plot and series:
        charts.save(draw(series), args.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
