"""What the command does once its flags are read: one step, one request, or a sweep."""

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import rich.console

from kontext_jax import charts
from kontext_jax.data.buckets import bucket_sizes
from kontext_jax.models.presets import PRESETS
from kontext_jax.plan import chart, measure, programs, sampling, sweep, targets
from kontext_jax.plan.report import (
    Report,
    make_report,
    new_table,
    print_report,
    size_text,
    time_text,
)
from kontext_jax.runtime.placement import mesh_config, parse_mesh
from kontext_jax.terminal import did_you_mean, load_config
from kontext_jax.training import config as train_config
from kontext_jax.training import config_tree
from kontext_jax.training.config import TrainConfig

SHORT_DTYPES = {"bfloat16": "bf16", "float32": "f32"}
NOT_PARAMETERS = 0.01  # share of the traffic below which a kind of collective is not of parameters


class Output:
    """Where the tables, the JSON and the pictures go.

    Raises:
      ValueError: a picture is asked for, and matplotlib is not installed.
    """

    def __init__(self, args: argparse.Namespace):
        self._json, self._plot = args.json, args.plot
        if self._plot:
            charts.check_installed()
        width = None if sys.stdout.isatty() else 120
        self.console = rich.console.Console(stderr=args.json == "-", width=width)
        self.errors = rich.console.Console(stderr=True)

    def finish(self, found: Any, reports: dict[str, Report]) -> None:
        """Writes `found` as JSON and draws the reports that are estimates."""
        if self._json == "-":
            print(json.dumps(found, indent=1))
        elif self._json:
            Path(self._json).write_text(json.dumps(found, indent=1) + "\n")
        drawn = {name: report for name, report in reports.items() if report.estimate}
        if self._plot and drawn:
            rows = [
                chart.Bar(
                    name,
                    report.shares(),
                    f"{time_text(report.estimate.total_s)}, {size_text(report.peak_bytes)}",
                )
                for name, report in drawn.items()
            ]
            first = next(iter(drawn.values()))
            title = f"time on {first.target.name}, estimated by its compiler"
            charts.save(chart.bars(title, rows), self._plot)


def parse_size(text: str) -> tuple[int, int]:
    """ "WxH" in pixels.

    Raises:
      ValueError: it is something else, or no multiple of 16 each way.
    """
    try:
        return bucket_sizes(0, (text,))[0]
    except ValueError as error:
        raise ValueError(str(error).replace("data.buckets has", "--size is")) from error


def _cache(args: argparse.Namespace) -> measure.Cache:
    return measure.Cache(None) if args.no_cache else measure.default_cache()


def _training_inputs(args, settings) -> tuple[TrainConfig, tuple[int, int], int]:
    config = train_config.parse(load_config(args.config), settings)
    size, num_references = programs.default_inputs(config)
    if args.size:
        size = parse_size(args.size)
    if args.references is not None:
        num_references = args.references
    return config, size, num_references


def measure_training(
    config: TrainConfig,
    target: targets.Target,
    size: tuple[int, int],
    num_references: int,
    cache: measure.Cache,
) -> Report:
    """The training step, compiled now or before.

    Raises:
      ValueError: the mesh or the batch does not divide among the devices.
    """
    planned = programs.training_step(config, target, size, num_references)
    question = ["step", config_tree.to_dict(config), size, num_references]
    return make_report(planned, target, measure.compile_program(planned, target, cache, question))


def plan_training(args: argparse.Namespace, settings: list[tuple[str, str]]) -> int:
    """The table of one step; 1 if it does not fit, or its collectives have other dtypes."""
    output = Output(args)
    config, size, num_references = _training_inputs(args, settings)
    target = targets.find_target(args.topology)
    with output.errors.status(f"compiling for {target.name} …"):
        report = measure_training(config, target, size, num_references, _cache(args))
    print_report(output.console, report, args.top)
    if args.text:
        Path(args.text).write_text(report.compiled.text)
    output.finish(report.to_json(), {Path(args.config).stem: report})
    failures = dtype_failures(report, config.dtype) if args.check_dtypes else []
    for failure in failures:
        print(f"error: {failure}", file=sys.stderr)
    return 0 if report.fits and not failures else 1


def dtype_failures(report: Report, dtype: str) -> list[str]:
    """What of the parameters and gradients travels in the wrong dtype."""
    if report.estimate is None:
        return ["there is no program to check"]
    rows = report.estimate.collectives
    total = sum(row.full_bytes for row in rows)
    right = {"all-gather": SHORT_DTYPES[dtype], "reduce-scatter": "f32", "all-reduce": "f32"}
    return [
        f"{size_text(row.full_bytes)} of {row.kind} in {row.dtype}, expected {right[row.kind]}"
        for row in rows
        if row.kind in right
        and row.dtype != right[row.kind]
        and row.full_bytes > NOT_PARAMETERS * total
    ]


def plan_sweep(args: argparse.Namespace, settings: list[tuple[str, str]]) -> int:
    """The table of many settings; 1 if none fits."""
    output = Output(args)
    config, size, num_references = _training_inputs(args, settings)
    meshes = [
        mesh_config(parse_mesh(text, "--meshes", "data=2,fsdp=32", may_fill=True))
        for text in args.meshes or ()
    ]
    target = targets.find_target(args.topology)
    remats = args.remats or sweep.DEFAULT_REMATS
    if unknown := [name for name in remats if name not in sweep.REMATS]:
        raise ValueError(
            f"--remats {unknown[0]}{did_you_mean(unknown[0], sweep.REMATS)}: there are "
            f"{', '.join(sweep.REMATS)}"
        )
    choices = sweep.choices(meshes or sweep.default_meshes(target), args.batches or [1], remats)
    cache = _cache(args)

    def measured(choice: sweep.Choice) -> Report:
        changed = choice.apply(config, len(target.devices))
        return measure_training(changed, target, size, num_references, cache)

    outcomes = []
    for outcome in sweep.sweep(choices, measured, output.errors):
        outcomes.append(outcome)
        if outcome.fits:
            seconds = time_text(outcome.report.estimate.total_s)
            output.errors.print(f"{outcome.choice}: {seconds}", highlight=False)
    best = sweep.ranked(outcomes)
    sweep.print_outcomes(output.console, outcomes)
    reports = {str(o.choice): o.report for o in best if o.fits}
    output.finish([outcome.to_json() for outcome in best], reports)
    return 0 if reports else 1


def _request(args: argparse.Namespace) -> sampling.Request:
    preset = args.sample
    if preset not in PRESETS:
        raise ValueError(
            f"there is no preset {preset!r}{did_you_mean(preset, tuple(PRESETS))}; there are "
            f"{', '.join(PRESETS)}"
        )
    given: dict[str, Any] = {"preset": preset}
    if args.size:
        given["size"] = parse_size(args.size)
    given["num_references"] = int(PRESETS[preset].takes_references)
    if args.references is not None:
        given["num_references"] = args.references
    for flag, name in (("steps", "num_steps"), ("batch", "batch_size")):
        if (value := getattr(args, flag)) is not None:
            if value < 1:
                raise ValueError(f"--{flag} is {value}; expected at least 1")
            given[name] = value
    given["sampler"] = args.sampler or PRESETS[preset].default_sampler
    if args.mesh:
        given["mesh"] = parse_mesh(args.mesh)
    return sampling.Request(**given)


def measure_sampling(
    request: sampling.Request,
    target: targets.Target,
    cache: measure.Cache,
    only: tuple[str, ...] = (),
) -> list[tuple[sampling.Stage, Report]]:
    """The programs of a request, compiled now or before; `only` those of these names.

    Raises:
      ValueError: see `sampling.sampling_stages`.
    """
    found = []
    for stage in sampling.sampling_stages(request, target):
        if only and stage.name not in only:
            continue
        question = ["sample", stage.name, dataclasses.asdict(request)]
        compiled = measure.compile_program(stage.planned, target, cache, question)
        found.append((stage, make_report(stage.planned, target, compiled, stage.repeats)))
    return found


def plan_sampling(args: argparse.Namespace) -> int:
    """The tables of a request's programs; 1 if one does not fit."""
    output = Output(args)
    request, target = _request(args), targets.find_target(args.topology)
    known = ("text", "encode", "prepare", "run", "decode")
    if unknown := [name for name in args.stages or () if name not in known]:
        raise ValueError(f"--stages {unknown[0]}: there are {', '.join(known)}")
    with output.errors.status(f"compiling for {target.name} …"):
        found = measure_sampling(request, target, _cache(args), tuple(args.stages or ()))
    _print_request(output.console, found)
    for stage, report in found:
        if stage.name == "run":
            print_report(output.console, report, args.top)
            if args.text:
                Path(args.text).write_text(report.compiled.text)
    output.finish(
        {stage.name: {"times": stage.times, **report.to_json()} for stage, report in found},
        {stage.name: report for stage, report in found},
    )
    return 0 if all(report.fits for _, report in found) else 1


def _print_request(
    console: rich.console.Console, found: list[tuple[sampling.Stage, Report]]
) -> None:
    first = found[0][1]
    table = new_table(
        f"a request on {first.target.name}", ("program",), ("times", "time", "peak memory")
    )
    total = 0.0
    for stage, report in found:
        if report.estimate is None:
            table.add_row(report.planned.title, str(stage.times), "", "does not fit")
            continue
        total += stage.times * report.estimate.total_s
        table.add_row(
            report.planned.title + (" (in tiles, if whole it does not fit)" * stage.in_tiles),
            str(stage.times),
            time_text(report.estimate.total_s),
            size_text(report.peak_bytes),
        )
    table.add_section()
    table.add_row("together", "", time_text(total), f"of {size_text(first.target.chip.hbm_bytes)}")
    console.print(table)
