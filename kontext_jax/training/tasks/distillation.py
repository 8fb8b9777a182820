"""Tasks whose transformer learns from another, frozen one.

The student starts from `config.weights`, with what the preset has and they have not: an input for
guidance, several velocities. The teacher is `config.teacher`, or the same weights; its parameters
are `frozen["teacher"]`, in the compute dtype.
"""

import dataclasses

from kontext_jax.batches import TokenBatch
from kontext_jax.flow.guidance import cfg
from kontext_jax.models.flops import mmdit_flops
from kontext_jax.models.presets import MMDiTConfig
from kontext_jax.objectives.guidance_distillation import (
    make_guidance_distillation,
    teacher_velocities,
)
from kontext_jax.objectives.policy_distillation import make_policy_distillation
from kontext_jax.objectives.state import make_train_state
from kontext_jax.training import config_tree
from kontext_jax.training.config import TrainConfig
from kontext_jax.training.optimizer import make_optimizer
from kontext_jax.training.tasks.base import Frozen, Task
from kontext_jax.training.tasks.student import predict_by, whole
from kontext_jax.training.tasks.transformer import (
    Network,
    open_network,
    step_options,
    transformer_task,
)
from kontext_jax.training.teacher import NO_GUIDANCE, Teacher
from kontext_jax.weights.bundle import OpenWeights
from kontext_jax.weights.card import defaults_of_run

# What a teacher and its student must share, since both are given the same tokens and positions.
SHARED_SIZES = (
    *("in_channels", "out_channels", "vec_in_dim", "context_in_dim"),
    *("axes_dim", "theta"),
)


def open_with_teacher(config: TrainConfig, open_weights: OpenWeights) -> tuple[Network, Teacher]:
    """Opens the weights of a student and of its teacher.

    Raises:
      ValueError: the two take other tokens, or a transformer is missing.
    """
    network = open_network(config, open_weights, grows=True)
    # Samples are drawn as the student's own defaults will say.
    own = defaults_of_run(config_tree.to_dict(config), {})
    preset = dataclasses.replace(network.preset, **own)
    bundle = open_weights(config.teacher) if config.teacher else network.bundle
    assert bundle is not None, "TrainConfig asks distillations for weights"
    model = network.model
    teacher = Teacher(bundle, model.dtype, model.attention_backend, config.remat)
    channels = preset.mmdit.out_channels // preset.num_velocities
    _check_sizes(teacher, dataclasses.replace(preset.mmdit, out_channels=channels))
    transformer, *others = network.sources
    sources = (transformer, f"teacher: {teacher.source}", *others)
    return network._replace(preset=preset, sources=sources), teacher


def frozen_teacher(teacher: Teacher) -> Frozen:
    """The teacher's weights as the step is given them: `frozen["teacher"]`."""
    return Frozen(
        shapes=lambda: {"teacher": teacher.shapes()},
        load=lambda place: {"teacher": teacher.load(place)},
    )


def guidance_distillation_task(config: TrainConfig, open_weights: OpenWeights) -> Task:
    """Guidance into the transformer's own input, by `objectives.guidance_distillation`."""
    network, teacher = open_with_teacher(config, open_weights)
    student = whole(network.model, network.start)
    optimizer = make_optimizer(config.optimizer, config.num_steps)

    def teach(frozen, x_t, t, batch: TokenBatch):
        return teacher.velocity(frozen["teacher"], x_t, t, batch)

    def step_flops(num_text: int, num_image: int) -> float:
        forward = mmdit_flops(network.preset.mmdit, num_text, num_image)
        return forward.training() + 2 * forward.forward  # two predictions of the teacher

    objective = make_guidance_distillation(
        predict_by(student),
        teach,
        student.init,
        optimizer,
        config.guidance_distillation,
        **step_options(config),
    )
    return transformer_task(
        config,
        network,
        student,
        objective,
        start=lambda params: make_train_state(params, optimizer, with_ema=config.ema_decay > 0),
        frozen=frozen_teacher(teacher),
        step_flops=step_flops,
    )


def policy_distillation_task(config: TrainConfig, open_weights: OpenWeights) -> Task:
    """Few steps, each along a policy, by `objectives.policy_distillation`."""
    network, teacher = open_with_teacher(config, open_weights)
    student = whole(network.model, network.start)
    optimizer = make_optimizer(config.optimizer, config.num_steps)
    guidance = config.policy_distillation.guidance
    is_told = teacher.config.guidance_embed
    num_passes = 1 if is_told or guidance == NO_GUIDANCE else 2

    def velocity(frozen, x_t, t, batch: TokenBatch):
        told = guidance if is_told else NO_GUIDANCE
        return teacher.velocity(frozen["teacher"], x_t, t, batch, told)

    def teach(frozen, x_t, t, batch: TokenBatch):
        if num_passes == 1:
            return velocity(frozen, x_t, t, batch)
        both = teacher_velocities(velocity, frozen, x_t, t, batch)
        return cfg(*both, x_t, t, guidance)

    def step_flops(num_text: int, num_image: int) -> float:
        forward = mmdit_flops(network.preset.mmdit, num_text, num_image)
        taught = mmdit_flops(teacher.config, num_text, num_image)
        passes = num_passes * config.policy_distillation.teacher_times
        return forward.training() + passes * taught.forward

    objective = make_policy_distillation(
        predict_by(student),
        teach,
        student.init,
        optimizer,
        config.policy_distillation,
        takes_guidance=network.preset.mmdit.guidance_embed,
        **step_options(config),
    )
    return transformer_task(
        config,
        network,
        student,
        objective,
        start=lambda params: make_train_state(params, optimizer, with_ema=config.ema_decay > 0),
        frozen=frozen_teacher(teacher),
        step_flops=step_flops,
    )


def _check_sizes(teacher: Teacher, student: MMDiTConfig) -> None:
    theirs, ours = map(dataclasses.asdict, (teacher.config, student))
    differing = [
        f"{name} {theirs[name]}, the student {ours[name]}"
        for name in SHARED_SIZES
        if theirs[name] != ours[name]
    ]
    if differing:
        raise ValueError(
            f"the teacher ({teacher.source}) takes other tokens than the student: "
            f"{'; '.join(differing)}; name another by teacher"
        )
