"""Several processes as one run: how they find each other, stop together, and notice a death.

A process that dies takes part in no collective any more: the others' next one fails at once where
the network says so (a closed connection), and at the latest when the coordination service has
missed heartbeats for HEARTBEAT_TIMEOUT_S, upon which it ends every process. Nobody waits forever;
the run is started again and goes on from its last checkpoint.
"""

import os
import signal
import threading
from collections.abc import Callable, Mapping

import jax
import numpy as np
from jax.experimental import multihost_utils

HEARTBEAT_TIMEOUT_S = 30  # JAX's own is 100
JOIN_TIMEOUT_S = 300
SHUTDOWN_TIMEOUT_S = 60
TEXT_BYTES = 8192  # of what each process tells the others
TASKS_VARIABLES = ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE", "MEGASCALE_NUM_SLICES")


def join(coordinator: str, num_processes: int | None, process_id: int | None) -> None:
    """Joins the other processes of the run; before JAX touches a device.

    Args:
      coordinator: HOST:PORT of process 0, or "auto" for what the cluster says.

    Raises:
      ValueError: arguments that do not go together, or no cluster to ask.
    """
    if coordinator == "auto":
        if num_processes is not None or process_id is not None:
            raise ValueError("--coordinator auto asks the cluster for the number of processes too")
        arguments = {}
    else:
        host, _, port = coordinator.rpartition(":")
        if not host or not port.isdigit():
            raise ValueError(f"--coordinator is {coordinator!r}; expected HOST:PORT, or auto")
        if num_processes is None or process_id is None:
            raise ValueError("--coordinator HOST:PORT needs --num-processes and --process-id")
        if not 0 <= process_id < num_processes:
            raise ValueError(f"--process-id is {process_id}; expected 0 to {num_processes - 1}")
        arguments = {
            "coordinator_address": coordinator,
            "num_processes": num_processes,
            "process_id": process_id,
        }
    try:
        jax.distributed.initialize(
            **arguments,
            initialization_timeout=JOIN_TIMEOUT_S,
            heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT_S,
            shutdown_timeout_seconds=SHUTDOWN_TIMEOUT_S,
        )
    except (ValueError, RuntimeError) as error:
        raise ValueError(
            f"the processes of this run do not find each other by --coordinator {coordinator}: "
            f"{error}"
        ) from error


def in_cluster(environment: Mapping[str, str]) -> bool:
    """Whether a launcher started this process as one of several."""
    tasks = [environment.get(name, "1") for name in TASKS_VARIABLES]
    hosts = environment.get("TPU_WORKER_HOSTNAMES", "").split(",")
    return len(hosts) > 1 or any(n.isdigit() and int(n) > 1 for n in tasks)


def join_detected() -> None:
    """Joins the other processes where SLURM, Open MPI or a TPU pod has started several.

    Raises:
      ValueError: they do not find each other, or the devices are part of more than was noticed.
    """
    if in_cluster(os.environ):
        join("auto", None, None)
    elif (count := jax.process_count()) > 1:
        raise ValueError(
            f"the devices here belong to {count} processes, which nothing told this one to join; "
            "start all of them with --coordinator auto"
        )


def from_first(text: str) -> str:
    """`text` of process 0, on every process; for all to call, and each waits for it."""
    if jax.process_count() == 1:
        return text
    data = np.frombuffer(text.encode(), np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(data.size)))
    buffer = data if jax.process_index() == 0 else np.zeros(size, np.uint8)
    return bytes(np.asarray(multihost_utils.broadcast_one_to_all(buffer))).decode() if size else ""


def from_all(text: str) -> list[str]:
    """`text` of every process, in their order and cut to `TEXT_BYTES`; for all to call."""
    if jax.process_count() == 1:
        return [text]
    data = np.frombuffer(text.encode()[:TEXT_BYTES], np.uint8)
    padded = np.pad(data, (0, TEXT_BYTES - data.size))
    gathered = np.asarray(multihost_utils.process_allgather(padded))
    return [bytes(row).rstrip(b"\0").decode(errors="replace") for row in gathered]


class StopRequest:
    """Notices SIGTERM, or Ctrl-C, so that a run saves its state and ends in order.

    With several processes, SIGTERM to one of them makes all stop after the same step; the cluster
    announces preemption so.

    Args:
      tell: called with a line when a signal arrives.
    """

    def __init__(self, tell: Callable[[str], None]):
        self._tell = tell
        self._received: str | None = None
        self._before: dict[int, object] = {}

    def __enter__(self) -> "StopRequest":
        # Only the main thread may set handlers. With several processes SIGTERM is JAX's own: its
        # service agrees with the others upon a step.
        main_thread = threading.current_thread() is threading.main_thread()
        if main_thread and jax.process_count() == 1:
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame) -> None:
        self._received = signal.Signals(number).name
        self._tell(f"{self._received}: stopping after this step; once more to stop at once")
        signal.signal(number, self._before[number])  # the second one ends the process

    def after(self, step: int) -> str | None:
        """Why all processes stop after `step`; None to go on. To be asked at every step by all."""
        if jax.process_count() == 1:
            return self._received
        return "SIGTERM" if multihost_utils.reached_preemption_sync_point(step) else None
