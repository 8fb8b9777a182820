"""Rectified flow: predict the velocity of target tokens from text and references (Kontext, eq. 3).

    x_t   = (1 − t)·x0 + t·noise           t as in `kontext_jax.flow`, mu from the target tokens
    loss  = mean over samples of weight(t)·mean((velocity − (noise − x0))²)

The loss is over target tokens alone, in float32. Text is dropped for a whole sample, T5 and CLIP
features together; dropping the references is text to image, a batch without them.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import optax

from kontext_jax import flow
from kontext_jax.objectives.base import (
    Metrics,
    Objective,
    TokenBatch,
    make_gradient_step,
    num_samples,
    sample_keys,
    use_key,
)
from kontext_jax.train_state import make_train_state
from kontext_jax.types import Params

Guidance = Literal["auto", "fixed", "range", "none"]

Predict = Callable[[Params, Any, jax.Array, jax.Array, TokenBatch, jax.Array | None], jax.Array]
"""`predict(params, frozen, x_t, t, batch, guidance) -> velocity`, of the target tokens alone.

x_t and velocity are [B, L, C], t is [B], and so is guidance, or None. The text in `batch` is what
remains after dropout.
"""


@dataclasses.dataclass(frozen=True)
class FlowMatchingConfig:
    """Which times, texts and guidance a network is trained at.

    Attributes:
      timestep_distribution: "logit_normal" (the paper's), "uniform" or SD3's "mode"; each is
        shifted by e^mu.
      timestep_mode: where mu comes from: "flux_linear" (the line of sampling, by target tokens),
        "sqrt_ratio" (SD3's law) or "const".
      timestep_mu: mu of "const".
      timestep_base_tokens: target tokens at which "sqrt_ratio" does not shift.
      timestep_sigma: standard deviation of logit t, of "logit_normal".
      timestep_mode_scale: s of "mode".
      timestep_grid: N puts times on the grid 1/N … 1 as diffusers' trainers do (1000 there); 0
        keeps them continuous.
      loss_weighting: "none", since the density of t weights already; "sigma_sqrt" and "cosmap" are
        those of diffusers' trainers.
      text_dropout: probability that a sample's text is replaced by the empty prompt's features.
      guidance: what a guidance-distilled network is told. "fixed": `guidance_value`. "range": drawn
        evenly from `guidance_range`. "none": the network has no such input. "auto": "fixed" where
        the network has the input, else "none".
      guidance_value: 1.0 by default, since the velocity that is learnt is the unguided one: another
        value would teach the network that it means no guidance.
      guidance_range: (low, high) of "range".
      num_loss_bins: equal parts of [0, 1] in which the loss is logged by time.
      latent_variance: variance of a channel of the latents, for the Gaussian floor in the log.
    """

    timestep_distribution: flow.TimestepDistribution = "logit_normal"
    timestep_mode: flow.TimestepMode = "flux_linear"
    timestep_mu: float = 0.0
    timestep_base_tokens: int = 256
    timestep_sigma: float = 1.0
    timestep_mode_scale: float = 1.29
    timestep_grid: int = 0
    loss_weighting: flow.LossWeighting = "none"
    text_dropout: float = 0.1
    guidance: Guidance = "auto"
    guidance_value: float = 1.0
    guidance_range: tuple[float, float] = (1.0, 5.0)
    num_loss_bins: int = 8
    latent_variance: float = 1.0

    def __post_init__(self):
        choices = {
            "timestep_distribution": flow.TimestepDistribution,
            "timestep_mode": flow.TimestepMode,
            "loss_weighting": flow.LossWeighting,
            "guidance": Guidance,
        }
        for field, literal in choices.items():
            value = getattr(self, field)
            if value not in get_args(literal):
                raise ValueError(
                    f"flow.{field} is {value!r}; choose {', '.join(get_args(literal))}"
                )
        if not 0 <= self.text_dropout <= 1:
            raise ValueError(f"flow.text_dropout is {self.text_dropout}; it must be in [0, 1]")
        for field in (
            "timestep_sigma", "timestep_base_tokens", "num_loss_bins", "latent_variance",
        ):  # fmt: skip
            if not getattr(self, field) > 0:
                raise ValueError(f"flow.{field} is {getattr(self, field)}; it must be positive")
        if self.timestep_grid < 0:
            raise ValueError(f"flow.timestep_grid is {self.timestep_grid}; it must be 0 or more")
        if not -1 <= self.timestep_mode_scale <= 1.75:  # 2/(π − 2)
            raise ValueError(
                f"flow.timestep_mode_scale is {self.timestep_mode_scale}; beyond [-1, 1.75] times "
                "would not stay in order"
            )
        low_high = tuple(self.guidance_range)
        if len(low_high) != 2 or not low_high[0] < low_high[1]:
            raise ValueError(f"flow.guidance_range is {low_high}; give (low, high), low < high")
        for field, selector, serves in (
            ("timestep_mu", "timestep_mode", ("const",)),
            ("timestep_base_tokens", "timestep_mode", ("sqrt_ratio",)),
            ("timestep_sigma", "timestep_distribution", ("logit_normal",)),
            ("timestep_mode_scale", "timestep_distribution", ("mode",)),
            ("guidance_value", "guidance", ("auto", "fixed")),
            ("guidance_range", "guidance", ("range",)),
        ):
            given, default = getattr(self, field), type(self).__dataclass_fields__[field].default
            if given != default and getattr(self, selector) not in serves:
                raise ValueError(
                    f"flow.{field} is {given}, but flow.{selector} is "
                    f"{getattr(self, selector)!r}; it applies to {' and '.join(serves)} only: "
                    f"leave it at {default}"
                )


def velocity_loss(
    predict: Predict,
    params: Params,
    frozen: Any,
    batch: TokenBatch,
    noise: jax.Array,
    t: jax.Array,
    guidance: jax.Array | None,
) -> jax.Array:
    """Mean squared error of the predicted velocity, for each sample: float32 [B].

    Args:
      noise: [B, L, C] float32.
      t: [B].
      guidance: [B], or None for a network that takes none.

    Raises:
      ValueError: if `predict` returns another shape than the target's.
    """
    x0 = batch.x0.astype(jnp.float32)
    velocity = predict(params, frozen, flow.interpolate(x0, noise, t), t, batch, guidance)
    if velocity.shape != x0.shape:
        raise ValueError(
            f"predict returned {velocity.shape} for target tokens of {x0.shape}; what it predicts "
            "for references must be cut off"
        )
    error = velocity.astype(jnp.float32) - flow.velocity_target(x0, noise)
    return jnp.mean(error**2, axis=(1, 2))


def make_flow_matching(
    predict: Predict,
    init_params: Callable[[jax.Array], Params],
    optimizer: optax.GradientTransformation,
    config: FlowMatchingConfig,
    *,
    takes_guidance: bool,
    ema_decay: float = 0.0,
    accumulate_steps: int = 1,
    learning_rate: Callable[[jax.Array], jax.Array] | None = None,
) -> Objective:
    """Rectified flow as an `Objective` over `TokenBatch`es.

    Metrics, beside those of `make_gradient_step`: `loss_t/I` and `loss_t_over_floor/I`, the
    unweighted loss and its ratio to the Gaussian floor for t in part I of [0, 1]; `loss_t2i` or
    `loss_edit`, by whether there are references; `text_drop_rate`. All but the last are pairs
    (`objectives.base`).

    `evaluate` draws noise from key and sample index alone, drops no text, and spreads t evenly: the
    middles (i + 1/2)/num_loss_bins in turn, beginning where the key says. Its `loss` is unweighted.

    Args:
      init_params: key → fresh float32 parameters.
      takes_guidance: whether the network has an input for guidance.
      ema_decay: see `make_gradient_step`, as for the rest.

    Raises:
      ValueError: if the config gives guidance to a network without the input, or keeps it from one
        with it.
    """
    has_guidance = _has_guidance(config, takes_guidance)

    def draw_guidance(key, sample_index):
        if not has_guidance:
            return None
        if config.guidance != "range":
            return jnp.full(sample_index.shape, config.guidance_value, jnp.float32)
        low, high = config.guidance_range
        keys = sample_keys(key, "guidance", sample_index)
        return jax.vmap(lambda k: jax.random.uniform(k, (), jnp.float32, low, high))(keys)

    def draw_times(key, sample_index, num_image_tokens):
        mu = flow.training_mu(
            config.timestep_mode,
            num_image_tokens,
            const_mu=config.timestep_mu,
            base_tokens=config.timestep_base_tokens,
        )
        t = jax.vmap(
            lambda k: flow.sample_training_times(
                k,
                (),
                mu,
                distribution=config.timestep_distribution,
                sigma=config.timestep_sigma,
                mode_scale=config.timestep_mode_scale,
            )
        )(sample_keys(key, "t", sample_index))
        return flow.on_trainer_grid(1 - t, config.timestep_grid)[1] if config.timestep_grid else t

    def losses(params, frozen, batch, key, sample_index, t):
        """Unweighted loss of each sample [b], and its metrics."""
        keys = sample_keys(key, "noise", sample_index)
        shape = batch.x0.shape[1:]
        noise = jax.vmap(lambda k: jax.random.normal(k, shape, jnp.float32))(keys)
        guidance = draw_guidance(key, sample_index)
        loss = velocity_loss(predict, params, frozen, batch, noise, t, guidance)
        task = "t2i" if batch.ctx is None else "edit"
        metrics = {f"loss_{task}/sum": jnp.sum(loss), f"loss_{task}/count": jnp.float32(loss.size)}
        floor = flow.gaussian_loss_floor(t, config.latent_variance)
        metrics |= _by_time(t, {"loss_t": loss, "loss_t_over_floor": loss / floor}, config)
        return loss, metrics

    def loss_fn(params, frozen, batch, key, sample_index):
        batch, text_drop_rate = _drop_text(batch, key, sample_index, config.text_dropout)
        t = draw_times(key, sample_index, batch.x0.shape[1])
        loss, metrics = losses(params, frozen, batch, key, sample_index, t)
        weighted = jnp.mean(flow.loss_weight(config.loss_weighting, t) * loss)
        return weighted, metrics | {"text_drop_rate": text_drop_rate}

    def evaluate(params, frozen, batch, key):
        sample_index = jnp.arange(num_samples(batch), dtype=jnp.int32)
        bins = config.num_loss_bins
        first = jax.random.randint(use_key(key, "t"), (), 0, bins)
        t = ((sample_index + first) % bins + 0.5) / bins
        loss, metrics = losses(params, frozen, batch, key, sample_index, t)
        return metrics | {"loss/sum": jnp.sum(loss), "loss/count": jnp.float32(loss.size)}

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


def _has_guidance(config: FlowMatchingConfig, takes_guidance: bool) -> bool:
    if takes_guidance:
        if config.guidance == "none":
            raise ValueError(
                "flow.guidance is 'none', but the network takes guidance as an input; choose fixed "
                "or range"
            )
        return True
    if config.guidance in ("fixed", "range") or config.guidance_value != 1.0:
        raise ValueError(
            f"flow.guidance is {config.guidance!r} and guidance_value {config.guidance_value}, but "
            "the network takes no guidance; leave both at their defaults"
        )
    return False


def _drop_text(
    batch: TokenBatch, key: jax.Array, sample_index: jax.Array, probability: float
) -> tuple[TokenBatch, jax.Array]:
    """The batch with the empty prompt in some samples, and their share."""
    if probability == 0:
        return batch, jnp.float32(0)
    keys = sample_keys(key, "text_dropout", sample_index)
    is_dropped = jax.vmap(jax.random.bernoulli, (0, None))(keys, probability)
    txt = jnp.where(is_dropped[:, None, None], batch.null_txt.astype(batch.txt.dtype), batch.txt)
    vec = jnp.where(is_dropped[:, None], batch.null_vec.astype(batch.vec.dtype), batch.vec)
    return batch.replace(txt=txt, vec=vec), jnp.mean(is_dropped.astype(jnp.float32))


def _by_time(t: jax.Array, values: dict[str, jax.Array], config: FlowMatchingConfig) -> Metrics:
    """Sums and counts of each value [b] over the samples whose t lies in each part of [0, 1]."""
    bins = config.num_loss_bins
    index = jnp.clip((t * bins).astype(jnp.int32), 0, bins - 1)
    is_in_bin = jax.nn.one_hot(index, bins)  # [b, bins]
    counts = jnp.sum(is_in_bin, axis=0)
    metrics = {}
    for name, value in values.items():
        sums = jnp.sum(is_in_bin * value[:, None], axis=0)
        for i in range(bins):
            metrics |= {f"{name}/{i}/sum": sums[i], f"{name}/{i}/count": counts[i]}
    return metrics
