"""Objective → the task that trains it."""

from kontext_jax.training.config import TrainConfig
from kontext_jax.training.tasks.autoencoder import autoencoder_task
from kontext_jax.training.tasks.base import MakeTask, Task
from kontext_jax.training.tasks.distillation import (
    guidance_distillation_task,
    policy_distillation_task,
)
from kontext_jax.training.tasks.flow_matching import flow_matching_task
from kontext_jax.training.tasks.ladd import ladd_task
from kontext_jax.weights.bundle import OpenWeights

TASKS: dict[str, MakeTask] = {
    "flow_matching": flow_matching_task,
    "guidance_distillation": guidance_distillation_task,
    "ladd": ladd_task,
    "policy_distillation": policy_distillation_task,
    "autoencoder": autoencoder_task,
}


def make_task(config: TrainConfig, open_weights: OpenWeights) -> Task:
    """The task of a config; nothing is read but headers of weights."""
    return TASKS[config.objective](config, open_weights)
