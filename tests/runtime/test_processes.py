"""How the processes of a run find each other, and stop in order."""

import os
import signal

import jax
import pytest

from kontext_jax.runtime import processes


@pytest.mark.parametrize(
    ("environment", "several"),
    [
        ({}, False),
        ({"SLURM_NTASKS": "1"}, False),
        ({"SLURM_NTASKS": "8"}, True),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, True),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, False),
        ({"TPU_WORKER_HOSTNAMES": "t1,t2,t3,t4"}, True),
        ({"MEGASCALE_NUM_SLICES": "2"}, True),
    ],
)
def test_launchers_are_noticed_by_their_variables(environment, several):
    assert processes.in_cluster(environment) == several


def test_a_part_of_a_pod_does_not_run_alone(monkeypatch):
    for name in (*processes.TASKS_VARIABLES, "TPU_WORKER_HOSTNAMES"):
        monkeypatch.delenv(name, raising=False)
    processes.join_detected()  # alone
    monkeypatch.setattr(jax, "process_count", lambda: 16)
    with pytest.raises(ValueError, match=r"belong to 16 processes.*--coordinator auto"):
        processes.join_detected()


def test_auto_takes_no_numbers():
    with pytest.raises(ValueError, match="auto asks the cluster for the number of processes"):
        processes.join("auto", 2, None)


def test_a_signal_asks_to_stop_once_and_then_acts_as_before():
    lines, received = [], []
    before = signal.signal(signal.SIGTERM, lambda *_: received.append("before"))
    try:
        with processes.StopRequest(lines.append) as stop:
            assert stop.after(1) is None
            os.kill(os.getpid(), signal.SIGTERM)
            assert stop.after(2) == "SIGTERM"
            assert "once more to stop at once" in lines[0]
            os.kill(os.getpid(), signal.SIGTERM)
            assert received == ["before"]
    finally:
        signal.signal(signal.SIGTERM, before)


def test_alone_everybody_has_said_what_one_says():
    assert processes.from_first("a") == "a"
    assert processes.from_all("b") == ["b"]
