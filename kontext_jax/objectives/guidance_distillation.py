"""Guidance distillation: one pass of a student for two of its teacher (arXiv:2210.03142).

    v_g   = guide(v_T(x_t, t, ∅, y), v_T(x_t, t, c, y), g)         `flow.guidance`
    loss  = mean over samples of mean((v_S(x_t, t, c, y, g) − sg v_g)²)

c is the text and y the references, which both of the teacher's predictions are given. g is
continuous, an input of the student; g = 1 is the teacher's conditional velocity. (Meng et al. write
w = g − 1.) A grid of values would not do: the sinusoids of 1000·g make g = 3.5 and 3.6 nearly as
different as any two, so that nothing is learnt between points.

The teacher's parameters are constants in `frozen`, and it sees both texts in one batch of twice the
size. Nothing is dropped, and nothing weighted. Targets and errors are float32.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import optax
from jax import lax

from kontext_jax.batches import TokenBatch
from kontext_jax.fields import option
from kontext_jax.flow import path as flow
from kontext_jax.flow.guidance import GuideFn, cfg, make_apg, make_interval
from kontext_jax.objectives.base import Objective, make_gradient_step, num_samples
from kontext_jax.objectives.draws import (
    TimesConfig,
    draw_even,
    draw_noise,
    even_times,
    mean_of,
    means_by_time,
)
from kontext_jax.objectives.flow_matching import Predict
from kontext_jax.objectives.state import make_train_state
from kontext_jax.types import Array, Float, Int, Params, RandomKey, Tokens

Guide = Literal["cfg", "interval", "apg"]

Teach = Callable[[Any, jax.Array, jax.Array, TokenBatch], jax.Array]
"""`teach(frozen, x_t, t, batch) -> velocity` of the teacher, of the target tokens alone [B, L, C].

The text in `batch` is what it is to be given, the empty prompt's or the sample's.
"""


@dataclasses.dataclass(frozen=True)
class GuidanceDistillationConfig(TimesConfig):
    """What is distilled, and at which times and guidance.

    Attributes, beside those of `TimesConfig`:
      uniform_times: part of the samples whose time is drawn evenly instead.
      guide: rule that guides the teacher: "cfg", "interval" or "apg" (`flow.guidance`).
      interval: (low, high) of t in which "interval" guides.
      apg_parallel: part along the clean estimate that "apg" keeps; 1 is all of it.
      apg_norm_limit: largest norm of the difference of a sample's two clean estimates, for "apg";
        0: no limit.
      guidance_range: (low, high) between which g is drawn.
      guidance_spacing: "even", or "log": evenly in log g, for ranges such as (1, 30).
      unguided_share: part of the samples with g = 1 exactly, which is learnt worst.
      eval_guidance: values of g for which the error is measured.
      num_loss_bins: equal parts of [0, 1] in which losses are logged by time.
    """

    SECTION: ClassVar[str] = "guidance_distillation"

    uniform_times: float = 0.1
    guide: Guide = "cfg"
    interval: tuple[float, float] = option((0.0, 1.0), acts_with=("guide", "interval"))
    apg_parallel: float = option(0.0, acts_with=("guide", "apg"))
    apg_norm_limit: float = option(0.0, acts_with=("guide", "apg"))
    guidance_range: tuple[float, float] = (1.0, 5.0)
    guidance_spacing: Literal["even", "log"] = "even"
    unguided_share: float = 0.1
    eval_guidance: tuple[float, ...] = (1.0, 1.7, 2.5, 3.3, 5.0)
    num_loss_bins: int = 8

    def __post_init__(self):
        super().__post_init__()
        self.check_choice("guide", Guide)
        self.check_choice("guidance_spacing", Literal["even", "log"])
        for field in ("uniform_times", "unguided_share"):
            if not 0 <= getattr(self, field) <= 1:
                raise ValueError(
                    f"{self.SECTION}.{field} is {getattr(self, field)}; it must be in [0, 1]"
                )
        self.check_range("guidance_range")
        self.check_range("interval")
        self.check_positive("num_loss_bins")
        if self.guidance_spacing == "log" and not self.guidance_range[0] > 0:
            raise ValueError(
                f"{self.SECTION}.guidance_range begins at {self.guidance_range[0]}, which has no "
                "logarithm; begin above 0"
            )
        if not self.eval_guidance:
            raise ValueError(f"{self.SECTION}.eval_guidance is empty; give at least one value")
        if self.apg_norm_limit < 0:
            raise ValueError(
                f"{self.SECTION}.apg_norm_limit is {self.apg_norm_limit}; it must be 0 or more"
            )

    def make_guide(self) -> GuideFn:
        """The guide function that the settings mean."""
        if self.guide == "interval":
            return make_interval(*self.interval)
        if self.guide == "apg":
            return make_apg(self.apg_parallel, self.apg_norm_limit)
        return cfg

    def draw_times(
        self, key: RandomKey, sample_index: Int[Array, " B"], num_image_tokens: int
    ) -> Float[Array, " B"]:
        t = super().draw_times(key, sample_index, num_image_tokens)
        is_even = draw_even(key, "uniform_times", sample_index) < self.uniform_times
        even = draw_even(key, "uniform_t", sample_index, flow.SMALLEST_TRAINING_TIME, 1.0)
        return jnp.where(is_even, even, t)

    def draw_guidance(self, key: RandomKey, sample_index: Int[Array, " B"]) -> Float[Array, " B"]:
        """g of each sample, float32."""
        low, high = self.guidance_range
        if self.guidance_spacing == "log":
            logs = jnp.log(jnp.float32(low)), jnp.log(jnp.float32(high))
            drawn = jnp.exp(draw_even(key, "guidance", sample_index, *logs))
        else:
            drawn = draw_even(key, "guidance", sample_index, low, high)
        is_unguided = draw_even(key, "unguided", sample_index) < self.unguided_share
        return jnp.where(is_unguided, 1.0, drawn)


def teacher_velocities(
    teach: Teach, frozen: Any, x_t: Tokens, t: Float[Array, " B"], batch: TokenBatch
) -> tuple[Tokens, Tokens]:
    """(v_uncond, v_cond) of the teacher from one batch of 2B, float32.

    A sample's two texts stand side by side, so that no device gives samples away.
    """

    def pair(null, given):
        null = jnp.broadcast_to(null.astype(given.dtype), given.shape)
        return jnp.stack([null, given], axis=1).reshape(-1, *given.shape[1:])

    def twice(x):
        return None if x is None else jnp.repeat(x, 2, axis=0)

    both = batch.replace(
        x0=twice(batch.x0),
        ctx=twice(batch.ctx),
        txt=pair(batch.null_txt, batch.txt),
        vec=pair(batch.null_vec, batch.vec),
    )
    v = teach(frozen, twice(x_t), twice(t), both).astype(jnp.float32)
    v = v.reshape(-1, 2, *x_t.shape[1:])
    return v[:, 0], v[:, 1]


def relative_error(v: Tokens, target: Tokens) -> Float[Array, " B"]:
    """‖v − target‖/‖target‖ of each sample."""
    norm = lambda x: jnp.sqrt(jnp.sum(x**2, axis=(1, 2)))  # noqa: E731
    return norm(v - target) / jnp.maximum(norm(target), 1e-12)


def make_guidance_distillation(
    predict: Predict,
    teach: Teach,
    init_params: Callable[[jax.Array], Params],
    optimizer: optax.GradientTransformation,
    config: GuidanceDistillationConfig,
    *,
    ema_decay: float = 0.0,
    accumulate_steps: int = 1,
    learning_rate: Callable[[jax.Array], jax.Array] | None = None,
) -> Objective:
    """Guidance distillation as an `Objective` over `TokenBatch`es.

    Metrics, beside those of `make_gradient_step`: `loss_t/I`, the loss for t in part I of [0, 1];
    `relative_error`, ‖v_S − v_g‖/‖v_g‖; and `no_op_error`, the same for the teacher's conditional
    velocity, which the student starts as. All are pairs (`objectives.base`).

    `evaluate` draws noise from key and sample index alone and spreads t evenly as flow matching
    does. For each G of `config.eval_guidance` it gives `relative_error/gG`, `no_op_error/gG`, and
    `relative_error/gG/t/I` by time; `loss` is the mean over all G.

    Args:
      predict: the student, which takes guidance.
      teach: the teacher, which is not differentiated.
      init_params: key → fresh float32 parameters, for shapes; the student starts from its teacher.
      ema_decay: see `make_gradient_step`, like the rest.
    """
    guide = config.make_guide()

    def errors_of(params, frozen, batch, x_t, t, v_uncond, v_cond, guidance):
        """Squared error, relative error, and that of the conditional velocity: [b] each."""
        target = lax.stop_gradient(guide(v_uncond, v_cond, x_t, t, guidance))
        v = predict(params, frozen, x_t, t, batch, guidance)
        if v.shape != target.shape:
            raise ValueError(
                f"predict returned {v.shape} for target tokens of {target.shape}; what it predicts "
                "for references must be cut off"
            )
        v = v.astype(jnp.float32)
        loss = jnp.mean((v - target) ** 2, axis=(1, 2))
        relative = relative_error(lax.stop_gradient(v), target)
        return loss, relative, relative_error(v_cond, target)

    def noised(frozen, batch, key, sample_index, t):
        """x_t, and what the teacher says of it without and with the text."""
        x0 = batch.x0.astype(jnp.float32)
        x_t = flow.interpolate(x0, draw_noise(key, sample_index, x0.shape[1:]), t)
        return x_t, *map(lax.stop_gradient, teacher_velocities(teach, frozen, x_t, t, batch))

    def loss_fn(params, frozen, batch, key, sample_index):
        t = config.draw_times(key, sample_index, batch.x0.shape[1])
        x_t, *v_teacher = noised(frozen, batch, key, sample_index, t)
        guidance = config.draw_guidance(key, sample_index)
        loss, relative, no_op = errors_of(params, frozen, batch, x_t, t, *v_teacher, guidance)
        metrics = means_by_time(t, {"loss_t": loss}, config.num_loss_bins)
        metrics |= mean_of("relative_error", relative) | mean_of("no_op_error", no_op)
        return jnp.mean(loss), metrics

    def evaluate(params, frozen, batch, key):
        sample_index = jnp.arange(num_samples(batch), dtype=jnp.int32)
        t = even_times(key, sample_index.size, config.num_loss_bins)
        x_t, *v_teacher = noised(frozen, batch, key, sample_index, t)

        def at(guidance):
            told = jnp.full(t.shape, guidance)
            return errors_of(params, frozen, batch, x_t, t, *v_teacher, told)

        grid = jnp.asarray(config.eval_guidance, jnp.float32)
        losses, relatives, no_ops = lax.map(at, grid)  # [G, b] each
        metrics = mean_of("loss", losses)
        for g, relative, no_op in zip(config.eval_guidance, relatives, no_ops, strict=True):
            name = f"relative_error/g{g:g}"
            metrics |= mean_of(name, relative) | mean_of(f"no_op_error/g{g:g}", no_op)
            metrics |= means_by_time(t, {f"{name}/t": relative}, config.num_loss_bins)
        return metrics

    return Objective(
        init=lambda key: make_train_state(init_params(key), optimizer, with_ema=ema_decay > 0),
        step=make_gradient_step(
            loss_fn,
            optimizer,
            ema_decay=ema_decay,
            accumulate_steps=accumulate_steps,
            learning_rate=learning_rate,
        ),
        evaluate=evaluate,
    )
