"""Counts mypy's errors by room; a room's count may only fall.

    python tools/types_ratchet.py            # fails if a room has more errors than it is allowed
    python tools/types_ratchet.py --list     # the errors, too
    python tools/types_ratchet.py --write    # allows what is left, after errors were repaired

tools/types_ratchet.json has the counts that are allowed, by room of tools/rooms.py; a room that it
does not name is free of errors and stays so. `--write` never allows more than before. mypy and its
settings are those of pyproject.toml (extra `dev`).
"""

import argparse
import collections
import json
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from rooms import ROOT, room_of_file

ALLOWED = Path(__file__).with_suffix(".json")

# Rooms that have to be free of errors.
REQUIRED = ("__init__", "convert_weights", "flow", "models", "objectives")

ERROR = re.compile(r"(?P<path>[^:]+\.py):\d+: error: ")


def errors(output: str) -> dict[str, list[str]]:
    """Room → its errors, one line each, in mypy's output."""
    found = collections.defaultdict(list)
    for line in output.splitlines():
        if match := ERROR.match(line):
            found[room_of_file(Path(match["path"]))].append(line)
    return dict(found)


def risen(counts: Mapping[str, int], allowed: Mapping[str, int]) -> list[str]:
    """Rooms with more errors than they are allowed, a line each."""
    return [
        f"{room}: {count} errors of types, {allowed.get(room, 0)} allowed"
        for room, count in sorted(counts.items())
        if count > (0 if room in REQUIRED else allowed.get(room, 0))
    ]


def run_mypy(python: str) -> str:
    """mypy's output on both packages, whose requirements are those of an interpreter.

    Raises:
      RuntimeError: mypy did not get as far as counting.
    """
    command = [sys.executable, "-m", "mypy", "--python-executable", python, "--no-pretty"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode not in (0, 1):
        raise RuntimeError(f"mypy failed:\n{done.stdout}{done.stderr}")
    return done.stdout


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="allow no more than is left")
    parser.add_argument("--list", action="store_true", help="show the errors")
    parser.add_argument(
        "--python",
        default=sys.executable,
        help="interpreter that has the packages' requirements (default: this one)",
    )
    args = parser.parse_args(arguments)
    try:
        found = errors(run_mypy(args.python))
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 2
    counts = {room: len(lines) for room, lines in sorted(found.items())}
    allowed = json.loads(ALLOWED.read_text("utf-8"))
    more = risen(counts, allowed)
    for room in sorted(found) if args.list else [line.split(":")[0] for line in more]:
        print(*found[room], sep="\n")
    print(*more, sep="\n", end="\n" if more else "")
    print(f"{sum(counts.values())} errors of types, {sum(allowed.values())} allowed")
    if more:
        return 1
    if args.write:
        ALLOWED.write_text(json.dumps(counts, indent=2) + "\n", "utf-8")
    elif counts != allowed:
        print("some were repaired: run it with --write, and commit tools/types_ratchet.json")
    return 0


if __name__ == "__main__":
    sys.exit(main())
