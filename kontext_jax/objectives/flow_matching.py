"""Rectified flow: predict the velocity of target tokens from text and references (Kontext, eq. 3).

    x_t   = (1 − t)·x0 + t·noise           t as in `flow.path`, mu from the target tokens
    loss  = mean over samples of weight(t)·mean((velocity − (noise − x0))²)

The loss is over target tokens alone, in float32. Text is dropped for a whole sample, T5 and CLIP
features together; dropping the references is text to image, a batch without them.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import optax

from kontext_jax.batches import TokenBatch
from kontext_jax.fields import option
from kontext_jax.flow import path as flow
from kontext_jax.objectives.base import Objective, make_gradient_step, num_samples, sample_keys
from kontext_jax.objectives.draws import TimesConfig, draw_noise, even_times, means_by_time
from kontext_jax.objectives.state import make_train_state
from kontext_jax.types import Array, Float, Params, Tokens

Guidance = Literal["auto", "fixed", "range", "none"]

Predict = Callable[[Params, Any, jax.Array, jax.Array, TokenBatch, jax.Array | None], jax.Array]
"""`predict(params, frozen, x_t, t, batch, guidance) -> velocity`, of the target tokens alone.

x_t and velocity are [B, L, C], t is [B], and so is guidance, or None. The text in `batch` is what
remains after dropout.
"""


@dataclasses.dataclass(frozen=True)
class FlowMatchingConfig(TimesConfig):
    """Which times, texts and guidance a network is trained at.

    Attributes, beside those of `TimesConfig`:
      loss_weighting: factor of the loss by time: "none", since the density of t weights already, or
        "sigma_sqrt" and "cosmap" of diffusers' trainers.
      text_dropout: probability that a sample's text is replaced by the empty prompt's features.
      guidance: guidance input of a guidance-distilled network. "fixed": `guidance_value`. "range":
        drawn evenly from `guidance_range`. "none": the network has no such input. "auto": "fixed"
        where the network has the input, else "none".
      guidance_value: guidance input of "fixed". 1.0 by default, since the learnt velocity is the
        unguided one: another value would teach the network to take it for no guidance.
      guidance_range: (low, high) of "range".
      num_loss_bins: equal parts of [0, 1] in which the loss is logged by time.
      latent_variance: variance of a channel of the latents, for the Gaussian floor in the log.
    """

    SECTION: ClassVar[str] = "flow"

    loss_weighting: flow.LossWeighting = "none"
    text_dropout: float = 0.1
    guidance: Guidance = "auto"
    guidance_value: float = option(1.0, acts_with=("guidance", "auto", "fixed"))
    guidance_range: tuple[float, float] = option((1.0, 5.0), acts_with=("guidance", "range"))
    num_loss_bins: int = 8
    latent_variance: float = 1.0

    def __post_init__(self):
        super().__post_init__()
        self.check_choice("loss_weighting", flow.LossWeighting)
        self.check_choice("guidance", Guidance)
        if not 0 <= self.text_dropout <= 1:
            raise ValueError(f"flow.text_dropout is {self.text_dropout}; it must be in [0, 1]")
        self.check_positive("num_loss_bins", "latent_variance")
        self.check_range("guidance_range")


def velocity_loss(
    predict: Predict,
    params: Params,
    frozen: Any,
    batch: TokenBatch,
    noise: Tokens,
    t: Float[Array, " B"],
    guidance: Float[Array, " B"] | None,
) -> Float[Array, " B"]:
    """Mean squared error of the predicted velocity, for each sample, float32.

    Args:
      noise: float32.
      guidance: None for a network that takes none.

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
      ema_decay: see `make_gradient_step`, like the rest.

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

    def losses(params, frozen, batch, key, sample_index, t):
        """Unweighted loss of each sample [b], and its metrics."""
        noise = draw_noise(key, sample_index, batch.x0.shape[1:])
        guidance = draw_guidance(key, sample_index)
        loss = velocity_loss(predict, params, frozen, batch, noise, t, guidance)
        task = "t2i" if batch.ctx is None else "edit"
        metrics = {f"loss_{task}/sum": jnp.sum(loss), f"loss_{task}/count": jnp.float32(loss.size)}
        floor = flow.gaussian_loss_floor(t, config.latent_variance)
        by_time = {"loss_t": loss, "loss_t_over_floor": loss / floor}
        metrics |= means_by_time(t, by_time, config.num_loss_bins)
        return loss, metrics

    def loss_fn(params, frozen, batch, key, sample_index):
        batch, text_drop_rate = _drop_text(batch, key, sample_index, config.text_dropout)
        t = config.draw_times(key, sample_index, batch.x0.shape[1])
        loss, metrics = losses(params, frozen, batch, key, sample_index, t)
        weighted = jnp.mean(flow.loss_weight(config.loss_weighting, t) * loss)
        return weighted, metrics | {"text_drop_rate": text_drop_rate}

    def evaluate(params, frozen, batch, key):
        sample_index = jnp.arange(num_samples(batch), dtype=jnp.int32)
        t = even_times(key, sample_index.size, config.num_loss_bins)
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
