"""The project's configs as they are read, and their steps as shapes."""

from pathlib import Path

import jax
import jax.numpy as jnp

from kontext_jax.runtime.sharding import MeshConfig, make_mesh
from kontext_jax.terminal import load_config
from kontext_jax.training.config import TrainConfig, parse
from kontext_jax.training.tasks import base

CONFIGS = Path(__file__).parents[1] / "configs"


def read_config(name: str, settings=()) -> TrainConfig:
    return parse(load_config(str(CONFIGS / f"{name}.py")), settings)


def count(params) -> int:
    return sum(x.size for x in jax.tree.leaves(params))


def abstract_state(task):
    return base.abstract_state(task, make_mesh(MeshConfig(), jax.devices()[:1]))


def trace_step(task, size: tuple[int, int], num_references: int):
    """One step of two examples of (height, width), checked to keep the state's shapes.

    Returns:
      The state before it, and its metrics; all are shapes, nothing is computed.
    """
    state = abstract_state(task)
    after, found = jax.eval_shape(
        task.objective.step,
        state,
        task.frozen_shapes(),
        task.abstract_batch(2, size, num_references),
        jax.eval_shape(lambda: jax.random.key(0)),
    )
    assert jax.tree.map(jnp.shape, after) == jax.tree.map(jnp.shape, state)
    assert all(x.shape == () and x.dtype == jnp.float32 for x in found.values())
    return state, found
