"""The programs of a training run: what the loop runs is by construction what `plan` compiles."""

from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from kontext_jax.runtime.programs import Program, precision_of
from kontext_jax.training.tasks.base import Task


def step_program(
    task: Task, state: Any, frozen: Any, batch: Any, key: Any, mesh: Mesh, dtype: str
) -> Program:
    """One step of `task.objective`: its new state takes the memory of the old one.

    Args:
      state: training state, as arrays or as shapes with shardings, like the three that follow.
      frozen: what `Task.load_frozen` gives.
      batch: what the task's feed gives.
      key: key of the run, on every device.
      dtype: compute dtype of the run, "float32" or "bfloat16".
    """
    shardings = jax.tree.map(lambda x: x.sharding, state)
    return Program(
        "step",
        lambda: task.objective.step,
        (state, frozen, batch, key),
        out_shardings=(shardings, _everywhere(mesh)),
        donate_argnums=0,
        precision=precision_of(dtype),
        mesh=mesh,
    )


def evaluate_program(
    task: Task, params: Any, frozen: Any, batch: Any, key: Any, mesh: Mesh, dtype: str
) -> Program:
    """Sums of the metrics of one held-out batch; takes what `step_program` takes."""
    return Program(
        "evaluate",
        lambda: task.objective.evaluate,
        (params, frozen, batch, key),
        out_shardings=_everywhere(mesh),
        precision=precision_of(dtype),
        mesh=mesh,
    )


def _everywhere(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())
