"""What all benchmarks have in common: one form of JSON, whatever the device.

{"benchmark": "cpu_speed", "timer": what is inside the timer, "warm_up_runs": 2,
 "device": …, "host": …, "cores": …, "versions": {…}, "flags": {…},
 "results": [{"what", "unit", "min", "median", "max", "all"}, …]}
"""

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = ("jax", "jaxlib", "flax", "libtpu", "jax-cuda12-plugin", "jax-cuda13-plugin", "numpy")


def add_json_flag(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures here")


def measurement(what: str, unit: str, values: Sequence[float], **more: Any) -> dict[str, Any]:
    """One quantity that was measured once or several times."""
    return {
        "what": what,
        "unit": unit,
        "min": min(values),
        "median": statistics.median(values),
        "max": max(values),
        "all": list(values),
        **more,
    }


def line(row: dict[str, Any]) -> str:
    """A measurement for people."""
    low, middle, high = (f"{row[key]:.4g}" for key in ("min", "median", "max"))
    return f"{row['what']}: median {middle} {row['unit']} (min {low}, max {high})"


def time_runs(run: Callable[[], Any], warm_up_runs: int, num_runs: int) -> list[float]:
    """Wall seconds of each run after the first few; `run` returns when its result exists."""
    for _ in range(warm_up_runs):
        run()
    seconds = []
    for _ in range(num_runs):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return seconds


def cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [x for x in cpuinfo.read_text().splitlines() if x.startswith("model name")]
        if names:
            return names[0].split(":")[1].strip()
    return platform.processor() or platform.machine()


def device() -> str:
    """What computes: JAX's devices where JAX runs in this process, else the CPU."""
    jax = sys.modules.get("jax")
    if jax is None:
        return cpu_model()
    devices = jax.devices()
    name = cpu_model() if devices[0].platform == "cpu" else devices[0].device_kind
    return f"{len(devices)} × {name}" if len(devices) > 1 else name


def report(
    benchmark: str,
    args: argparse.Namespace,
    results: Sequence[dict[str, Any]],
    *,
    timer: str,
    warm_up_runs: int = 0,
    packages: Sequence[str] = (),
    **more: Any,
) -> dict[str, Any]:
    """The whole of a benchmark's figures.

    Args:
      timer: what is inside the timer, and what is not.
      packages: whose versions matter, beside `PACKAGES`.
    """
    versions = {"python": platform.python_version()}
    for name in (*PACKAGES, *packages):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    flags = {name: str(v) for name, v in vars(args).items() if name != "json" and v is not None}
    if xla := os.environ.get("XLA_FLAGS"):
        flags["XLA_FLAGS"] = xla
    return {
        "benchmark": benchmark,
        "timer": timer,
        "warm_up_runs": warm_up_runs,
        "device": device(),
        "host": cpu_model(),
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "versions": versions,
        "flags": flags,
        "results": list(results),
        **more,
    }


def write(found: dict[str, Any], path: Path | None) -> None:
    """Writes a report where --json says, or nowhere."""
    if path is not None:
        path.write_text(json.dumps(found, indent=1) + "\n")
