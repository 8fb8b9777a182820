"""The 12B model on hardware that is not here: what was promised, and what the compilers say.

    pip install 'jax[tpu]'                                        # for v5p, v6e
    pip install --no-deps jax-cuda12-plugin==V jax-cuda12-pjrt==V nvidia-cudnn-cu12
                                                                  # for h100; V: version of jax
    python benchmarks/aot.py
    python benchmarks/aot.py --only v5p-forward h100-memory

Everything is compiled ahead of time by `kontext_jax.plan`, from shapes alone, bfloat16, one image a
chip; nothing is executed. A ratio is the compiler's cycles with attention at the chip's peak, over
the model's FLOPs at that peak; collectives and what is computed twice are not in it. Exit status: 1
if a bar is missed.
"""

import argparse
import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common
import rich.console

# Before anything that imports JAX: it keeps JAX on the CPU.
import kontext_jax.plan  # noqa: F401
from kontext_jax.plan import measure, programs, sampling
from kontext_jax.plan.commands import measure_sampling, measure_training
from kontext_jax.plan.report import GIB, Report, new_table, size_text, time_text
from kontext_jax.plan.targets import find_target
from kontext_jax.terminal import load_config
from kontext_jax.training import config as train_config

ROOT = Path(__file__).resolve().parents[1]
STEPS = 28


@dataclasses.dataclass(frozen=True)
class Found:
    """What a bar's programs came to: the figure that counts, and the rest for people."""

    value: float
    shown: str
    details: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Bar:
    """One promise: `find` must come to `limit` or less; None: there is no promise."""

    name: str
    what: str
    unit: str
    limit: float | None
    find: Callable[[measure.Cache], Found]


def denoiser(topology: str, references: int, cache: measure.Cache, **options: Any) -> list[Report]:
    """What a sampling run does: the modulation of all steps, and the steps."""
    request = sampling.Request(num_references=references, num_steps=STEPS, **options)
    found = measure_sampling(request, find_target(topology), cache, ("prepare", "run"))
    for _, report in found:
        if report.estimate is None:
            raise SystemExit(f"error: {report.planned.title}: {report.compiled.error}")
    return [report for _, report in found]


def forward(topology: str, references: int) -> Callable[[measure.Cache], Found]:
    """One step of a sampling run, its share of the modulation included: ratio to the limit."""

    def find(cache: measure.Cache) -> Found:
        prepare, run = denoiser(topology, references, cache)
        seconds = prepare.estimate.compute_s + run.estimate.compute_s
        ratio = seconds / run.limit_s
        shown = f"{ratio:.2f} ({time_text(seconds / STEPS)} a step)"
        return Found(ratio, shown, {"prepare": prepare.to_json(5), "run": run.to_json()})

    return find


def training(
    topology: str, config: str, settings: dict[str, str], value: Callable[[Report], float]
) -> Callable[[measure.Cache], Found]:
    """A config's step: one figure of its report."""

    def find(cache: measure.Cache) -> Found:
        parsed = train_config.parse(load_config(str(ROOT / config)), list(settings.items()))
        size, references = programs.default_inputs(parsed)
        report = measure_training(parsed, find_target(topology), size, references, cache)
        if report.estimate is None:
            return Found(float("inf"), f"does not fit: {report.compiled.error}", report.to_json())
        shown = (
            f"{report.ratio:.2f}, {report.ratio_with_collectives:.2f} with collectives; "
            f"{time_text(report.estimate.total_s)}, {size_text(report.peak_bytes)}"
        )
        return Found(value(report), shown, report.to_json())

    return find


def gpu_memory(cache: measure.Cache) -> Found:
    """What the denoiser holds beside all weights, inputs and results included, in GiB."""
    _, run = denoiser("h100", 1, cache)
    weights = sum(run.planned.held[name] for name in sampling.NETWORK_NAMES.values())
    beside = run.peak_bytes - weights
    return Found(beside / GIB, f"{size_text(beside)} beside {size_text(weights)}", run.to_json())


def gpu_copies(cache: measure.Cache) -> Found:
    """Memory that one step moves without computing, in GiB: reading and writing count once each.

    The weights copied out of their stacks would be 44 of them.
    """
    _, run = denoiser("h100", 1, cache)
    moved = run.estimate.seconds_by_category.get("data movement", 0.0) / STEPS
    size = moved * run.target.chip.hbm_bytes_per_s
    return Found(size / GIB, f"{size_text(size)}, {time_text(moved)} of a step", run.to_json())


def context_parallel(cache: measure.Cache) -> Found:
    """Time of a step on 4 chips over that on one."""
    _, one = denoiser("v5p:2x2x1", 1, cache)
    _, four = denoiser("v5p:2x2x1", 1, cache, mesh={"context": 4})
    share = four.estimate.total_s / one.estimate.total_s
    shown = (
        f"{share:.2f}: {time_text(one.estimate.total_s / STEPS)} → "
        f"{time_text(four.estimate.total_s / STEPS)} a step"
    )
    return Found(share, shown, {"one": one.to_json(5), "four": four.to_json()})


def ratio(report: Report) -> float:
    return report.ratio


def gib(report: Report) -> float:
    return report.peak_bytes / GIB


JOINT, T2I = "configs/kontext_joint.py", "configs/t2i_pretrain.py"
ONE_EACH = {"batch_size": "64", "accumulate_steps": "1"}  # one image a chip
BARS = (
    Bar("v5p-forward", "v5p forward, 4096 + 512 tokens", "× limit", 1.30, forward("v5p", 0)),
    Bar(
        "v5p-forward-kontext",
        "v5p forward, 4096 + 4096 + 512 tokens",
        "× limit",
        1.30,
        forward("v5p", 1),
    ),
    Bar("v6e-forward", "v6e forward, 4096 + 512 tokens", "× limit", 2.0, forward("v6e", 0)),
    Bar(
        "train-t2i",
        "v5p:4x4x4 training step, 4096 + 512 tokens",
        "× limit",
        1.75,
        training("v5p:4x4x4", T2I, ONE_EACH, ratio),
    ),
    Bar(
        "train-joint",
        "v5p:4x4x4 training step, 8192 + 512 tokens",
        "× limit",
        1.75,
        training("v5p:4x4x4", JOINT, ONE_EACH, ratio),
    ),
    Bar(
        "train-memory",
        "the same, memory of a chip",
        "GiB",
        85,
        training("v5p:4x4x4", JOINT, ONE_EACH, gib),
    ),
    Bar(
        "train-v6e",
        "v6e:8x8 training step, 8192 + 512 tokens, memory of a chip",
        "GiB",
        32,
        training("v6e:8x8", JOINT, ONE_EACH | {"remat": "save_qkv"}, gib),
    ),
    Bar("h100-memory", "H100 denoiser of an edit, beside its weights", "GiB", 0.5, gpu_memory),
    Bar("h100-copies", "H100 denoising step, moved without computing", "GiB", 4.0, gpu_copies),
    Bar("context", "v5p, one edit over 4 chips by context", "× one chip", None, context_parallel),
)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [bar.name for bar in BARS]
    parser.add_argument("--only", nargs="+", choices=names, metavar="BAR", help=", ".join(names))
    parser.add_argument("--no-cache", action="store_true", help="keep no compiled programs on disk")
    common.add_json_flag(parser)
    args = parser.parse_args()
    cache = measure.Cache(None) if args.no_cache else measure.default_cache()
    table = new_table("the 12B model, compiled ahead of time", ("what", "target", "found"), ("",))
    rows, missed = [], 0
    errors = rich.console.Console(stderr=True)
    for bar in BARS:
        if args.only and bar.name not in args.only:
            continue
        with errors.status(f"{bar.what} …"):
            found = bar.find(cache)
        is_missed = bar.limit is not None and found.value > bar.limit
        missed += is_missed
        target = f"≤ {bar.limit:g} {bar.unit}" if bar.limit is not None else ""
        verdict = "missed" if is_missed else "met" if target else ""
        table.add_row(bar.what, target, found.shown, verdict)
        row = common.measurement(bar.what, bar.unit, [found.value], limit=bar.limit)
        rows.append(row | {"bar": bar.name, "shown": found.shown, "details": found.details})
    rich.console.Console(width=150).print(table)
    report = common.report(
        "aot",
        args,
        rows,
        timer="nothing is timed: the compilers' estimates for one run",
        compilers=measure.versions(),
    )
    common.write(report, args.json)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
