"""Tasks whose transformer learns from another, frozen one."""

import dataclasses
from typing import Any

from kontext_jax.batches import TokenBatch
from kontext_jax.flow.guidance import cfg
from kontext_jax.models.flops import mmdit_flops
from kontext_jax.models.presets import MMDiTConfig
from kontext_jax.objectives.guidance_distillation import (
    make_guidance_distillation,
    teacher_velocities,
)
from kontext_jax.objectives.policy_distillation import make_policy_distillation
from kontext_jax.training import config_tree
from kontext_jax.training.config import TrainConfig
from kontext_jax.training.tasks.base import OpenWeights, Work
from kontext_jax.training.tasks.transformer import TransformerTask
from kontext_jax.training.teacher import NO_GUIDANCE, Teacher
from kontext_jax.weights.bundle import ModelBundle, Place
from kontext_jax.weights.card import defaults_of_run

# What a teacher and its student must share, since both are given the same tokens and positions.
SHARED_SIZES = (
    *("in_channels", "out_channels", "vec_in_dim", "context_in_dim"),
    *("axes_dim", "theta"),
)


class DistillationTask(TransformerTask):
    """A student, and its teacher in `frozen["teacher"]`; a subclass sets `objective`.

    The student starts from `config.weights`, and with what the preset has and they have not: an
    input for guidance, several velocities. The teacher is `config.teacher`, or the same weights;
    its parameters are kept in the compute dtype.
    """

    def __init__(self, config: TrainConfig, open_weights: OpenWeights):
        super().__init__(config, open_weights, grows=True)
        # Samples are drawn as the student's own defaults will say.
        own = defaults_of_run(config_tree.to_dict(config), {})
        self._preset = dataclasses.replace(self._preset, **own)
        bundle: ModelBundle = open_weights(config.teacher) if config.teacher else self._start
        self._teacher = Teacher(bundle, self._dtype, self._backend, config.remat)
        channels = self._preset.mmdit.out_channels // self._preset.num_velocities
        _check_sizes(self._teacher, dataclasses.replace(self._preset.mmdit, out_channels=channels))
        self.sources.insert(1, f"teacher: {self._teacher.source}")

    def frozen_shapes(self) -> Any:
        return {"teacher": self._teacher.shapes()}

    def load_frozen(self, place: Place) -> Any:
        return {"teacher": self._teacher.load(place)}


class GuidanceDistillationTask(DistillationTask):
    """Guidance into the transformer's own input, by `objectives.guidance_distillation`."""

    def __init__(self, config: TrainConfig, open_weights: OpenWeights):
        super().__init__(config, open_weights)
        self.objective = make_guidance_distillation(
            self._predict,
            self._teach,
            self._init_trained,
            self._optimizer,
            config.guidance_distillation,
            **self._step_options(),
        )

    def _teach(self, frozen, x_t, t, batch: TokenBatch):
        return self._teacher.velocity(frozen["teacher"], x_t, t, batch)

    def work(self, batch: TokenBatch) -> Work:
        images, tokens, forward = self._forward(batch)
        flops = forward.training() + 2 * forward.forward  # two predictions of the teacher
        return Work(images, images * tokens, images * flops)


class PolicyDistillationTask(DistillationTask):
    """Few steps, each along a policy, by `objectives.policy_distillation`."""

    def __init__(self, config: TrainConfig, open_weights: OpenWeights):
        super().__init__(config, open_weights)
        self._guidance = config.policy_distillation.guidance
        self._is_told = self._teacher.config.guidance_embed
        self._num_passes = 1 if self._is_told or self._guidance == NO_GUIDANCE else 2
        self.objective = make_policy_distillation(
            self._predict,
            self._teach,
            self._init_trained,
            self._optimizer,
            config.policy_distillation,
            takes_guidance=self._preset.mmdit.guidance_embed,
            **self._step_options(),
        )

    def _teach(self, frozen, x_t, t, batch: TokenBatch):
        def velocity(frozen, x_t, t, batch):
            told = self._guidance if self._is_told else NO_GUIDANCE
            return self._teacher.velocity(frozen["teacher"], x_t, t, batch, told)

        if self._num_passes == 1:
            return velocity(frozen, x_t, t, batch)
        both = teacher_velocities(velocity, frozen, x_t, t, batch)
        return cfg(*both, x_t, t, self._guidance)

    def work(self, batch: TokenBatch) -> Work:
        images, tokens, forward = self._forward(batch)
        num_text = batch.txt.shape[1]
        taught = mmdit_flops(self._teacher.config, num_text, tokens - num_text)
        passes = self._num_passes * self._config.policy_distillation.teacher_times
        flops = forward.training() + passes * taught.forward
        return Work(images, images * tokens, images * flops)


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
