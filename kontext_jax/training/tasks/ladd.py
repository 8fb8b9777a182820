"""Few-step students by adversarial distillation: the task of `objectives.ladd`."""

import jax
import jax.numpy as jnp

from kontext_jax.batches import TokenBatch
from kontext_jax.models.judges.feature_heads import FeatureHeads
from kontext_jax.models.judges.features import evenly_spaced, make_feature_fn
from kontext_jax.objectives.adversarial import Adversary
from kontext_jax.objectives.ladd import LADDConfig, make_ladd, start_ladd
from kontext_jax.objectives.state import TrainState
from kontext_jax.training.config import TrainConfig
from kontext_jax.training.optimizer import make_optimizer, make_schedule
from kontext_jax.training.tasks.base import OpenWeights, Work
from kontext_jax.training.tasks.distillation import DistillationTask
from kontext_jax.types import Params

NUM_HEADS = 8  # where no blocks are named


class LADDTask(DistillationTask):
    """A student judged by heads on hidden states of its frozen teacher."""

    def __init__(self, config: TrainConfig, open_weights: OpenWeights):
        super().__init__(config, open_weights)
        theirs = self._teacher.config
        num_blocks = theirs.depth + theirs.depth_single_blocks
        self._blocks = config.heads.blocks or evenly_spaced(num_blocks, NUM_HEADS)
        if self._blocks[-1] >= num_blocks:
            raise ValueError(
                f"heads.blocks has {self._blocks[-1]}, but the teacher's blocks are 0 to "
                f"{num_blocks - 1}"
            )
        takes_guidance = self._preset.mmdit.guidance_embed
        if not (takes_guidance or theirs.guidance_embed):
            _refuse_guidance(config)
        # By its inputs alone a block needs little to be differentiated, so little is kept.
        remat = "none" if config.remat == "none" else "full"
        self._judged = self._teacher.model.clone(remat=remat)
        self._network = FeatureHeads(config.heads, self._dtype)
        self._heads = self._make_heads()
        self.sources.append(
            f"heads: after blocks {', '.join(map(str, self._blocks))}, drawn afresh"
        )
        self.objective = make_ladd(
            self._predict,
            self._features,
            self._heads,
            self._init_trained,
            self._optimizer,
            config.ladd,
            takes_guidance=takes_guidance,
            **self._step_options(),
        )

    def _make_heads(self) -> Adversary:
        config = self._config
        num_updates = config.num_steps * config.ladd.discriminator_steps
        return Adversary(
            logits=self._logits,
            init=self._init_heads,
            optimizer=make_optimizer(config.discriminator_optimizer, num_updates),
            learning_rate=make_schedule(config.discriminator_optimizer, num_updates),
        )

    def _init_heads(self, key: jax.Array) -> Params:
        token = jnp.zeros((1, 1, self._teacher.config.hidden_size))
        told = jnp.zeros(1), jnp.zeros((1, self._teacher.config.vec_in_dim))
        features = (token,) * len(self._blocks)
        return self._network.init(key, features, *told, (1, 1))["params"]

    def _logits(self, params: Params, features, t: jax.Array, batch: TokenBatch):
        return self._network.apply({"params": params}, features, t, batch.vec, batch.grid)

    def _features(self, frozen, x_t: jax.Array, t: jax.Array, batch: TokenBatch):
        cond = self._teacher.condition(batch, self._config.ladd.guidance)
        feature_fn = make_feature_fn(self._judged, frozen["teacher"], cond, self._blocks)
        return feature_fn(x_t, t)

    def start(self, params: Params) -> TrainState:
        return start_ladd(
            params,
            self._optimizer,
            self._heads,
            jax.random.key(self._config.seed),
            with_ema=self._config.ema_decay > 0,
        )

    def work(self, batch: TokenBatch) -> Work:
        images, tokens, forward = self._forward(batch)
        # The student trains; its teacher sees x̂0 and x0, and is differentiated by the former.
        flops = forward.training() + 3 * forward.forward
        return Work(images, images * tokens, images * flops)


def _refuse_guidance(config: TrainConfig) -> None:
    """Raises ValueError if guidance was set where neither network takes it."""
    given, default = config.ladd.guidance, LADDConfig().guidance
    if given != default:
        raise ValueError(
            f"ladd.guidance is {given:g}, but neither the student nor its teacher takes guidance; "
            f"leave it at {default:g}"
        )
