"""Objective → the task that trains it."""

from collections.abc import Callable

from kontext_jax.training.config import TrainConfig
from kontext_jax.training.tasks.autoencoder import AutoencoderTask
from kontext_jax.training.tasks.base import OpenWeights, Task
from kontext_jax.training.tasks.distillation import GuidanceDistillationTask, PolicyDistillationTask
from kontext_jax.training.tasks.flow_matching import FlowMatchingTask
from kontext_jax.training.tasks.ladd import LADDTask

TASKS: dict[str, Callable[[TrainConfig, OpenWeights], Task]] = {
    "flow_matching": FlowMatchingTask,
    "guidance_distillation": GuidanceDistillationTask,
    "ladd": LADDTask,
    "policy_distillation": PolicyDistillationTask,
    "autoencoder": AutoencoderTask,
}


def make_task(config: TrainConfig, open_weights: OpenWeights) -> Task:
    """The task of a config; nothing is read but headers of weights."""
    return TASKS[config.objective](config, open_weights)
