"""Rectified flow on the transformer, or on adapters beside it: `objectives.flow_matching`."""

from kontext_jax.models.flops import mmdit_flops
from kontext_jax.objectives.flow_matching import make_flow_matching
from kontext_jax.objectives.state import make_train_state
from kontext_jax.training.config import TrainConfig
from kontext_jax.training.optimizer import make_optimizer
from kontext_jax.training.tasks.base import Task
from kontext_jax.training.tasks.student import Student, adapted, predict_by, whole
from kontext_jax.training.tasks.transformer import (
    Network,
    open_network,
    step_options,
    transformer_task,
)
from kontext_jax.weights.bundle import OpenWeights


def flow_matching_task(config: TrainConfig, open_weights: OpenWeights) -> Task:
    """Trains the transformer, or adapters beside it, on tokens from frozen encoders."""
    network = open_network(config, open_weights)
    if config.train == "lora":
        assert network.start is not None, "TrainConfig asks adapters for weights"
        student = adapted(network.model, network.start, config.lora)
    else:
        student = whole(network.model, network.start)
    return train_by_flow_matching(config, network, student)


def train_by_flow_matching(config: TrainConfig, network: Network, student: Student) -> Task:
    """The task of a student that is put together already."""
    optimizer = make_optimizer(config.optimizer, config.num_steps)
    objective = make_flow_matching(
        predict_by(student),
        student.init,
        optimizer,
        config.flow,
        takes_guidance=network.preset.mmdit.guidance_embed,
        **step_options(config),
    )
    return transformer_task(
        config,
        network,
        student,
        objective,
        start=lambda params: make_train_state(params, optimizer, with_ema=config.ema_decay > 0),
        frozen=student.frozen,
        step_flops=lambda num_text, num_image: student.training_flops(
            mmdit_flops(network.preset.mmdit, num_text, num_image)
        ),
    )
