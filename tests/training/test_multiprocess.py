"""Two processes of two devices each: the same run as one process, and none outlives the other."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from kontext_jax.runtime import processes
from kontext_jax.training import metrics

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
MESH = ("--config.mesh.data", "2", "--config.mesh.fsdp", "2")
# A hundredth of configs/tiny.py: edits of 32-pixel scenes.
SETTINGS = (
    *("--config.batch_size", "4", "--config.optimizer.warmup_steps", "2"),
    *("--config.data.sources", "scenes:easy:train:32", "--config.data.buckets", "32x32"),
    *("--config.data.fraction_with_references", "1.0"),
    *("--config.eval.sources", "scenes:easy:seen:8", "--config.eval.num_batches", "1"),
    *("--config.eval.sample_rows", "4", "--config.log.tensorboard", "false"),
    *("--config.log.print_every_s", "0"),
)
REAL = (
    *("train.py", "--config.num_steps=6", "--config.eval.every_steps=3"),
    "--config.eval.sample_every_steps=6",
)
LIGHT = (
    *("tests/light_run.py", "--config.num_steps=40", "--config.eval.every_steps=20"),
    *("--config.checkpoint.every_steps=5", "--config.eval.sample_every_steps=0"),
)
KINDS = ("train", "eval", "eval_ema")
NOTICED_WITHIN_S = processes.HEARTBEAT_TIMEOUT_S + 60  # this machine may be busy


@pytest.fixture(scope="module")
def cache_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("compiled")


def start(what, run, cache_dir, num_devices, *flags) -> subprocess.Popen:
    script, *settings = what
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={num_devices}",
        "KONTEXT_JAX_CACHE": str(cache_dir / str(num_devices)),
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    }
    command = [sys.executable, script, "--config", "configs/tiny.py", "--workdir", str(run)]
    return subprocess.Popen(
        [*command, *SETTINGS, *settings, *flags],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def start_pair(what, run, cache_dir) -> list[subprocess.Popen]:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
    company = (*MESH, "--coordinator", f"127.0.0.1:{port}", "--num-processes", "2")
    return [
        start(what, run, cache_dir, 2, *company, "--process-id", str(index)) for index in range(2)
    ]


def finish(*processes: subprocess.Popen) -> list[str]:
    """What each printed, once all have ended well."""
    outputs = [process.communicate(timeout=600)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes), outputs
    return outputs


def losses(run) -> list[float]:
    return [line["loss"] for kind in KINDS for line in metrics.read(run / metrics.FILE, kind)]


def wait_for_step(run: Path, step: int, *pair: subprocess.Popen) -> None:
    """Returns when a step is finished; the checkpoint before it may still be on its way."""
    path = run / metrics.FILE
    while not (path.exists() and f'"step": {step}, "kind": "train"' in path.read_text()):
        for process in pair:
            assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)


@pytest.mark.parametrize("num_devices", [4, 1])
def test_two_processes_compute_what_one_does(num_devices, real_pair, tmp_path, cache_dir):
    finish(start(REAL, tmp_path, cache_dir, num_devices, *(MESH if num_devices == 4 else ())))
    ours, theirs = losses(real_pair), losses(tmp_path)
    assert len(ours) == 6 + 4
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)
    grids = [
        np.asarray(Image.open(run / "samples" / "6.png"), int) for run in (real_pair, tmp_path)
    ]
    assert abs(grids[0] - grids[1]).max() <= 1  # rounding to bytes
    print(f"largest relative difference {max(abs(np.divide(ours, theirs) - 1)):.1e}")


@pytest.fixture(scope="module")
def real_pair(tmp_path_factory, cache_dir):
    run = tmp_path_factory.mktemp("real")
    finish(*start_pair(REAL, run, cache_dir))
    return run


@pytest.fixture(scope="module")
def light_pair(tmp_path_factory, cache_dir):
    run = tmp_path_factory.mktemp("light")
    finish(*start_pair(LIGHT, run, cache_dir))
    return run


@pytest.mark.parametrize("victim", [1, 0])
def test_a_killed_process_ends_the_other_and_the_run_goes_on(
    victim, light_pair, tmp_path, cache_dir
):
    pair = start_pair(LIGHT, tmp_path, cache_dir)
    try:
        wait_for_step(tmp_path, 12, *pair)
        pair[victim].send_signal(signal.SIGKILL)
        start_s = time.monotonic()
        assert pair[1 - victim].wait(timeout=NOTICED_WITHIN_S) != 0
        print(f"process {1 - victim} ended after {time.monotonic() - start_s:.1f} s")
    finally:
        for process in pair:
            process.kill()
            process.communicate()
    outputs = finish(*start_pair(LIGHT, tmp_path, cache_dir))
    assert re.search(r"going on from step (5|10|15|20)", outputs[0])
    assert losses(tmp_path) == losses(light_pair)


def test_sigterm_to_one_stops_both_after_the_same_step(light_pair, tmp_path, cache_dir):
    pair = start_pair(LIGHT, tmp_path, cache_dir)
    wait_for_step(tmp_path, 12, *pair)
    pair[1].send_signal(signal.SIGTERM)
    outputs = finish(*pair)
    assert re.search(r"SIGTERM: stopped after step (1[2-9]|2\d), which is saved", outputs[0])
    finish(*start_pair(LIGHT, tmp_path, cache_dir))
    assert losses(tmp_path) == losses(light_pair)


def test_another_number_of_processes_goes_on(light_pair, tmp_path, cache_dir):
    pair = start_pair(LIGHT, tmp_path, cache_dir)
    wait_for_step(tmp_path, 12, *pair)
    pair[0].send_signal(signal.SIGTERM)
    finish(*pair)
    finish(start(LIGHT, tmp_path, cache_dir, 1))
    np.testing.assert_allclose(losses(tmp_path), losses(light_pair), rtol=1e-5)
