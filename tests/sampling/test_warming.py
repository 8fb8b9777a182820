"""`sample.py --compile-only`: what it compiles for, and that nothing is left to compile."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import sample
from kontext_jax.models.presets import PRESETS
from kontext_jax.pictures import latents
from kontext_jax.sampling.requests import SampleRequest
from kontext_jax.sampling.warming import blank_requests

ROOT = Path(__file__).parents[2]
# Runs sample.py, then prints how often JAX's cache of programs was asked, and what was traced.
COUNTING = """
import collections, json, sys
import jax
from kontext_jax.runtime import programs
import sample
events, made = collections.Counter(), []
jax.monitoring.register_event_listener(lambda event, **_: events.update([event.split("/")[-1]]))
lower = programs.Program.lower
programs.Program.lower = lambda self, **options: made.append(1) or lower(self, **options)
status = sample.main(sys.argv[1:])
print(json.dumps({"status": status, "made": len(made), **events}))
"""


def sizes(preset="kontext-dev", num_references=1, **options):
    request = SampleRequest("a prompt", **options)
    found = list(blank_requests(request, PRESETS[preset], num_references))
    assert all(len(x.sizes.references) == len(x.pictures) == num_references for x in found)
    return [x.sizes.output for x in found], [[f.size for f in x.sizes.references] for x in found]


def test_without_a_size_all_preferred_sizes_are_compiled_for():
    outputs, references = sizes(num_references=2)
    assert outputs == list(latents.PREFERRED_SIZES) and len(outputs) == 17
    assert references == [[size, size] for size in outputs]
    assert sizes(num_references=0)[0] == outputs
    small = sizes("tiny", num_references=0)[0]
    assert small == sizes("tiny")[0] and max(map(max, small)) < 1024


def test_a_size_is_compiled_for_alone():
    assert sizes(size="512x768", num_references=0) == ([(512, 768)], [[]])
    assert sizes(size="1:1")[0] == [(1024, 1024)]
    assert sizes(megapixels=0.25, num_references=0)[0] == sizes(megapixels=0.25)[0]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--references", "1"], "--references goes with --compile-only"),
        (["--compile-only", "--no-cache"], "makes no pictures and keeps programs; drop --no-cache"),
        (["--compile-only", "--image", "example:cat"], "give --references N, not --image"),
        (["--compile-only", "--size", "match", "--references", "0"], "needs an image"),
        (["--compile-only", "--references", "-1"], "--references -1"),
    ],
)
def test_flags_that_say_nothing_are_refused(flags, message, capsys):
    assert sample.main(flags) == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_after_compile_only_a_run_compiles_and_traces_nothing(tmp_path):
    cache = tmp_path / "cache"
    environment = {
        **os.environ,
        "KONTEXT_JAX_CACHE": str(cache),
        "JAX_PLATFORMS": "cpu",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "PYTHONPATH": str(ROOT),
    }

    def run(*flags):
        done = subprocess.run(
            [sys.executable, "-c", COUNTING, *flags, "--steps", "2", "--size", "64x64"],
            **{"env": environment, "cwd": tmp_path, "capture_output": True, "text": True},
        )
        assert done.returncode == 0, done.stderr
        *lines, counts = done.stdout.splitlines()
        return lines, json.loads(counts)

    lines, counts = run("--compile-only")
    assert lines[1].startswith("64×64 from 1 of 64×64: 5 programs, ")
    assert lines[2].startswith("5 programs for 1 sizes in ") and str(cache) in lines[2]
    assert counts["made"] == 5
    edit = "--image", "example:shapes", "--prompt", "make the red circle yellow", "-o"
    lines, counts = run(*edit, "edit.png")
    assert (tmp_path / "edit.png").exists()
    assert (counts["status"], counts["made"]) == (0, 0)
    assert counts["cache_hits"] > 0 and "cache_misses" not in counts
    for path in (cache / "programs").iterdir():
        path.unlink()  # as if this package were another version
    for made in (5, 0):
        assert run(*edit, "again.png")[1]["made"] == made
    assert (tmp_path / "again.png").read_bytes() == (tmp_path / "edit.png").read_bytes()


@pytest.mark.slow
def test_tiles_are_left_to_the_first_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("KONTEXT_JAX_CACHE", str(tmp_path))
    flags = ["--compile-only", "--tile", "on", "--steps", "2", "--size", "64x64"]
    assert sample.main(flags) == 0
    told = capsys.readouterr()
    assert told.out.count("programs for tiles are compiled when they first run") == 2
    assert "64×64 from 1 of 64×64: 3 programs, " in told.out
