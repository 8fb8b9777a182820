"""Few-step students by adversarial distillation: the task of `objectives.ladd`."""

import jax
import jax.numpy as jnp

from kontext_jax.batches import TokenBatch
from kontext_jax.models.flops import mmdit_flops
from kontext_jax.models.judges.feature_heads import FeatureHeads
from kontext_jax.models.judges.features import evenly_spaced, make_feature_fn
from kontext_jax.objectives.adversarial import Adversary
from kontext_jax.objectives.ladd import Features, LADDConfig, make_ladd, start_ladd
from kontext_jax.training.config import TrainConfig
from kontext_jax.training.optimizer import make_optimizer, make_schedule
from kontext_jax.training.tasks.base import Task
from kontext_jax.training.tasks.distillation import frozen_teacher, open_with_teacher
from kontext_jax.training.tasks.student import predict_by, whole
from kontext_jax.training.tasks.transformer import step_options, transformer_task
from kontext_jax.training.teacher import Teacher
from kontext_jax.types import DTYPES
from kontext_jax.weights.bundle import OpenWeights

NUM_HEADS = 8  # where no blocks are named


def ladd_task(config: TrainConfig, open_weights: OpenWeights) -> Task:
    """A student judged by heads on hidden states of its frozen teacher."""
    network, teacher = open_with_teacher(config, open_weights)
    student = whole(network.model, network.start)
    blocks = _blocks(config, teacher)
    takes_guidance = network.preset.mmdit.guidance_embed
    if not (takes_guidance or teacher.config.guidance_embed):
        _refuse_guidance(config)
    optimizer = make_optimizer(config.optimizer, config.num_steps)
    heads = make_heads(config, teacher, len(blocks))
    objective = make_ladd(
        predict_by(student),
        make_features(config, teacher, blocks),
        heads,
        student.init,
        optimizer,
        config.ladd,
        takes_guidance=takes_guidance,
        **step_options(config),
    )

    def step_flops(num_text: int, num_image: int) -> float:
        # The student trains; its teacher sees x̂0 and x0, and is differentiated by the former.
        forward = mmdit_flops(network.preset.mmdit, num_text, num_image)
        return forward.training() + 3 * forward.forward

    told = f"heads: after blocks {', '.join(map(str, blocks))}, drawn afresh"
    return transformer_task(
        config,
        network._replace(sources=(*network.sources, told)),
        student,
        objective,
        start=lambda params: start_ladd(
            params,
            optimizer,
            heads,
            jax.random.key(config.seed),
            with_ema=config.ema_decay > 0,
        ),
        frozen=frozen_teacher(teacher),
        step_flops=step_flops,
    )


def make_features(config: TrainConfig, teacher: Teacher, blocks: tuple[int, ...]) -> Features:
    """The teacher's hidden states after `blocks`, as `objectives.ladd` asks for them."""
    # A block needs little to be differentiated by its inputs alone, so little is kept.
    model = teacher.model.clone(remat="none" if config.remat == "none" else "full")

    def features(frozen, x_t: jax.Array, t: jax.Array, batch: TokenBatch):
        cond = teacher.condition(batch, config.ladd.guidance)
        return make_feature_fn(model, frozen["teacher"], cond, blocks)(x_t, t)

    return features


def make_heads(config: TrainConfig, teacher: Teacher, count: int) -> Adversary:
    """`count` heads on the teacher's hidden states, with their optimizer."""
    network = FeatureHeads(config.heads, DTYPES[config.dtype])
    num_updates = config.num_steps * config.ladd.discriminator_steps

    def init(key: jax.Array):
        token = jnp.zeros((1, 1, teacher.config.hidden_size))
        told = jnp.zeros(1), jnp.zeros((1, teacher.config.vec_in_dim))
        return network.init(key, (token,) * count, *told, (1, 1))["params"]

    def logits(params, features, t: jax.Array, batch: TokenBatch):
        return network.apply({"params": params}, features, t, batch.vec, batch.grid)

    return Adversary(
        logits=logits,
        init=init,
        optimizer=make_optimizer(config.discriminator_optimizer, num_updates),
        learning_rate=make_schedule(config.discriminator_optimizer, num_updates),
    )


def _blocks(config: TrainConfig, teacher: Teacher) -> tuple[int, ...]:
    """The teacher's blocks after which a head looks.

    Raises:
      ValueError: the teacher has no such block.
    """
    num_blocks = teacher.config.depth + teacher.config.depth_single_blocks
    blocks = config.heads.blocks or evenly_spaced(num_blocks, NUM_HEADS)
    if blocks[-1] >= num_blocks:
        raise ValueError(
            f"heads.blocks has {blocks[-1]}, but the teacher's blocks are 0 to {num_blocks - 1}"
        )
    return blocks


def _refuse_guidance(config: TrainConfig) -> None:
    """Raises ValueError if guidance was set where neither network takes it."""
    given, default = config.ladd.guidance, LADDConfig().guidance
    if given != default:
        raise ValueError(
            f"ladd.guidance is {given:g}, but neither the student nor its teacher takes guidance; "
            f"leave it at {default:g}"
        )
