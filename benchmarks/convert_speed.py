"""Speed and peak memory of the weight converter on a full-width file of several GB.

    PYTHONPATH=. python benchmarks/convert_speed.py --folder /some/disk --rounds 5

Makes a BFL file of random bfloat16 weights (width 3072, 2 double and 8 single blocks: 3.75 GB),
then alternates `cp` and `to-jax` of it on the same disk. The source is in the page cache before
each measurement (it is read through first); both sides end with the copy durable (`cp` then fsync
of the copy; the converter does its own), and the wall time of a whole process is taken, imports
included. Fails if the converter's median takes more than twice cp's, or its peak resident memory
exceeds 1.5 × the largest stacked parameter + 1 GiB. Needs 3 × the file's size free; removes what
it made.
"""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import common

from convert_weights.compare import open_any

REPOSITORY = Path(__file__).resolve().parents[1]
GIB = 2**30


def run(command: list[str]) -> tuple[float, float, int]:
    """Wall seconds, CPU seconds and peak resident bytes of one process; raises if it fails."""
    start = time.perf_counter()
    process = subprocess.Popen(
        command, cwd=REPOSITORY, env={**os.environ, "PYTHONPATH": str(REPOSITORY)}
    )
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    elapsed = time.perf_counter() - start
    return elapsed, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024


def warm(path: Path) -> None:
    """Reads the file through, so that it is in the page cache as far as it fits."""
    with path.open("rb", buffering=0) as file:
        while file.read(2**24):
            pass


def touch_memory(path: Path, size: int) -> None:
    """Fills the page cache with `size` bytes and frees it.

    A virtual machine's host takes free memory back, and the first touch of a page it must give out
    again costs more than copying it; both sides begin without that cost.
    """
    block = bytes(2**24)
    with path.open("wb", buffering=0) as file:
        for _ in range(-(-size // len(block))):
            file.write(block)
    path.unlink()


def main() -> int:
    """Prints one line a measurement and the medians; 1 if a limit is exceeded."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, help="where to work (default: a temporary folder)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--depth", type=int, default=2, help="double blocks")
    parser.add_argument("--single", type=int, default=8, help="single blocks")
    common.add_json_flag(parser)
    args = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="convert_speed-", dir=args.folder))
    try:
        source = work / "flux1-dev-random.safetensors"
        maker = [sys.executable, "tools/make_random_flux.py", str(source)]
        run([*maker, "--depth", str(args.depth), "--single", str(args.single)])
        leaves = open_any(str(source))["mmdit"].leaves
        largest = max(info.nbytes for info in leaves.values())
        limit = 1.5 * largest + GIB
        size = source.stat().st_size
        print(f"{size / 1e9:.2f} GB, largest stacked parameter {largest / GIB:.2f} GiB", flush=True)
        copies, conversions, peaks, cpu = [], [], [], []
        for index in range(args.rounds):
            copy, out = work / "copy.safetensors", work / "converted"
            warm(source)
            touch_memory(work / "touched", size)
            copied = run(["cp", str(source), str(copy)])
            synced = run(["sync", str(copy)])
            copy.unlink()
            warm(source)
            touch_memory(work / "touched", size)
            converter = [sys.executable, "-m", "convert_weights", "to-jax", str(source)]
            converted = run([*converter, "--out", str(out)])
            shutil.rmtree(out)
            copies.append(copied[0] + synced[0])
            conversions.append(converted[0])
            cpu.append((copied[1] + synced[1], converted[1]))
            peaks.append(converted[2])
            print(
                f"round {index}: cp+fsync {copies[-1]:.2f} s (CPU {cpu[-1][0]:.2f} s), "
                f"to-jax {conversions[-1]:.2f} s (CPU {cpu[-1][1]:.2f} s), "
                f"peak {peaks[-1] / GIB:.2f} GiB",
                flush=True,
            )
        results = [
            common.measurement("cp + fsync, wall", "s", copies),
            common.measurement("to-jax, wall", "s", conversions),
            common.measurement("cp + fsync, CPU", "s", [pair[0] for pair in cpu]),
            common.measurement("to-jax, CPU", "s", [pair[1] for pair in cpu]),
            common.measurement("to-jax, peak memory", "GiB", [peak / GIB for peak in peaks]),
        ]
        for row in results:
            print(common.line(row))
        ratio = statistics.median(conversions) / statistics.median(copies)
        print(
            f"{1 / ratio:.2f} of cp's speed (at least 0.5); peak {max(peaks) / GIB:.2f} GiB (at "
            f"most {limit / GIB:.2f} GiB)"
        )
        timer = "a whole process, imports included, until its output is durable; input in memory"
        found = common.report("convert_speed", args, results, timer=timer, bytes=size)
        common.write(found, args.json)
        return int(ratio > 2 or max(peaks) > limit)
    finally:
        shutil.rmtree(work, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
