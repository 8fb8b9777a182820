"""Objective → the task that trains it."""

from collections.abc import Callable

from kontext_jax.autoencoder_task import AutoencoderTask
from kontext_jax.distillation_task import GuidanceDistillationTask, PolicyDistillationTask
from kontext_jax.flow_matching_task import FlowMatchingTask
from kontext_jax.ladd_task import LADDTask
from kontext_jax.train_config import TrainConfig
from kontext_jax.training_tasks import OpenWeights, Task

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
