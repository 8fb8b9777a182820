"""Latent adversarial diffusion distillation: few sampling steps, judged in a teacher's features.

    x_t  = (1 − t)·x0 + t·noise          t of few student times, x0 made by the teacher itself
    x̂0   = x_t − t·v(x_t, t)             the student
    F(x) = features of the frozen teacher at (1 − s)·x + s·noise',   logit s ~ N(mean, sigma²)
    L_G  = −Σ_k mean D_k(F_k(x̂0))
    L_D  = Σ_k mean relu(1 − D_k(F_k(x0))) + mean relu(1 + D_k(F_k(sg x̂0)))
           + r1_weight · Σ_k mean over samples of ‖∂ΣD_k/∂F_k(x0)‖²

of arXiv:2403.12015; hinge and R1 at the heads' inputs as in its predecessor (arXiv:2311.17042). s
and noise' are drawn anew for x0 and x̂0. The examples are the teacher's results with guidance
(`python -m kontext_jax.data.synthesize`), so that prompts are followed without any other loss.

The chain rule is walked by hand: the gradient of L_G goes back through the heads, the frozen
teacher, whose weights are constants, and the student, and touches neither of the former; L_D sees
features as numbers. Both networks share one pass through student and teacher.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from kontext_jax.batches import TokenBatch
from kontext_jax.flow import path as flow
from kontext_jax.flow.names import check_timesteps
from kontext_jax.objectives.adversarial import (
    Adversary,
    Networks,
    generator_loss,
    make_adversarial_step,
    start_adversary,
)
from kontext_jax.objectives.base import (
    Metrics,
    Objective,
    advance,
    check_step_options,
    mean_gradient,
    num_samples,
    sample_keys,
    use_key,
)
from kontext_jax.objectives.draws import draw_noise, means_by_time
from kontext_jax.objectives.flow_matching import Predict
from kontext_jax.objectives.state import TrainState, make_train_state
from kontext_jax.types import Array, Bool, Float, Int, Params, RandomKey, Tokens

Features = Callable[[Any, jax.Array, jax.Array, TokenBatch], Sequence[jax.Array]]
"""`features(frozen, x_t [B, L, C], t [B], batch) -> [[B, …], …]` of the frozen teacher.

Differentiable by x_t; the text and the references in `batch` go with x_t.
"""

NUM_ACCURACY_BINS = 4


@dataclasses.dataclass(frozen=True)
class LADDConfig:
    """At which times the student learns, and what the discriminator is shown.

    Attributes:
      timesteps: times of the student's sampler, from 1 (noise) downwards.
      probabilities: probability of each of the timesteps. Most of the weight on 1 makes single
        steps good.
      warmup_probabilities: their probabilities in the first `warmup_steps`.
      warmup_steps: steps at the beginning with easier times.
      renoise_mean: mean of the logit of s, the time at which features are taken; higher values look
        at the whole picture, lower ones at its texture.
      renoise_sigma: standard deviation of that logit.
      renoise_range: (low, high) to which s is clipped.
      r1_weight: factor of the gradient penalty on real examples.
      negative_share: weight among the fakes of mismatched examples: real ones beside the text, or
        the references, of another example of the (micro-)batch. They keep results faithful to both.
        This share replaces part of the fake loss. If it were added on top, untrained heads would do
        best by calling everything fake, where the hinge has no gradient.
      on_policy: probability of x_t from the student's own Euler steps from noise, instead of a
        mixture of x0 and noise. Untried at size; 0: never.
      discriminator_steps: updates of the heads for each of the student; each draws its own noise.
      guidance: guidance input of networks that have it: that of the synthetic examples.
    """

    timesteps: tuple[float, ...] = (1.0, 0.75, 0.5, 0.25)
    probabilities: tuple[float, ...] = (0.7, 0.1, 0.1, 0.1)
    warmup_probabilities: tuple[float, ...] = (0.0, 0.0, 0.5, 0.5)
    warmup_steps: int = 500
    renoise_mean: float = 1.0
    renoise_sigma: float = 1.0
    renoise_range: tuple[float, float] = (0.02, 0.98)
    r1_weight: float = 1e-5
    negative_share: float = 0.0
    on_policy: float = 0.0
    discriminator_steps: int = 1
    guidance: float = 2.5

    def __post_init__(self):
        try:
            times = check_timesteps(self.timesteps)
        except ValueError as error:
            raise ValueError(f"ladd.timesteps: {error}") from error
        for name in ("probabilities", "warmup_probabilities"):
            given = tuple(getattr(self, name))
            if len(given) != len(times) or min(given) < 0 or abs(sum(given) - 1) > 1e-6:
                raise ValueError(
                    f"ladd.{name} is {given}; expected {len(times)} numbers that add up to 1, one "
                    "for each of ladd.timesteps"
                )
        low_high = tuple(self.renoise_range)
        if len(low_high) != 2 or not 0 < low_high[0] < low_high[1] < 1:
            raise ValueError(
                f"ladd.renoise_range is {low_high}; give (low, high) with 0 < low < high < 1"
            )
        for name, least in (
            ("warmup_steps", 0), ("r1_weight", 0), ("discriminator_steps", 1),
        ):  # fmt: skip
            if not getattr(self, name) >= least:
                raise ValueError(
                    f"ladd.{name} is {getattr(self, name)}; it must be at least {least}"
                )
        if not self.renoise_sigma > 0:
            raise ValueError(f"ladd.renoise_sigma is {self.renoise_sigma}; it must be positive")
        if not 0 <= self.negative_share < 1:
            raise ValueError(f"ladd.negative_share is {self.negative_share}; it must be in [0, 1)")
        if not 0 <= self.on_policy <= 1:
            raise ValueError(f"ladd.on_policy is {self.on_policy}; it must be in [0, 1]")


def hinge_loss(
    real: Sequence[Float[Array, "B ..."]], fake: Sequence[Float[Array, "B ..."]]
) -> Float[Array, ""]:
    """Σ_k mean relu(1 − real_k) + mean relu(1 + fake_k), of the logits of each head."""
    of_real = sum(jnp.mean(jax.nn.relu(1 - x)) for x in real)
    return jnp.asarray(of_real + sum(jnp.mean(jax.nn.relu(1 + x)) for x in fake))


def gradient_penalty(
    logits: Callable[[Sequence[jax.Array]], Sequence[jax.Array]],
    features: Sequence[Float[Array, "B ..."]],
) -> Float[Array, ""]:
    """R1 at the heads' inputs: Σ_k mean over samples of ‖∂ΣD_k/∂F_k‖².

    A head sees its own features alone, so that one gradient of the sum of all logits gives all.
    """
    grads = jax.grad(lambda f: sum(jnp.sum(x) for x in logits(f)))(tuple(features))
    return jnp.asarray(sum(jnp.sum(jnp.square(g.astype(jnp.float32))) / len(g) for g in grads))


def mismatched(batch: TokenBatch, is_text: Bool[Array, " B"]) -> TokenBatch:
    """Each example with the text of the one before where `is_text`, else its references."""

    def exchange(x, which):
        return jnp.where(which.reshape(-1, *(1,) * (x.ndim - 1)), jnp.roll(x, 1, axis=0), x)

    if batch.ctx is None:
        is_text = jnp.ones_like(is_text)
    return batch.replace(
        txt=exchange(batch.txt, is_text),
        vec=exchange(batch.vec, is_text),
        ctx=None if batch.ctx is None else exchange(batch.ctx, ~is_text),
    )


class LADD(NamedTuple):
    """The networks and settings that the functions of this objective share.

    Attributes:
      predict: the student's velocity of the target tokens.
      features: hidden states of the teacher, see `Features`.
      heads: the discriminator; its logits are (params, features, s [B], batch) → one array [B, …]
        for each of the features.
      config: the settings.
      takes_guidance: True if the student has an input for guidance.
      times: the student's times, falling from 1: `config.timesteps`.
    """

    predict: Predict
    features: Features
    heads: Adversary
    config: LADDConfig
    takes_guidance: bool
    times: Float[Array, " K"]


FeaturesOf = Callable[[Tokens], tuple[jax.Array, ...]]
"""x → the teacher's features of it."""


class Seen(NamedTuple):
    """What the heads are shown: features of one kind of example."""

    features: Sequence[Float[Array, "B ..."]]
    s: Float[Array, " B"]  # the time at which they were taken
    batch: TokenBatch  # with the text and the references that they are judged beside


def denoise(
    ladd: LADD,
    params: Params,
    frozen: Any,
    batch: TokenBatch,
    x_t: Tokens,
    t: Float[Array, " B"],
) -> tuple[Tokens, Tokens]:
    """The student's estimate x̂0 = x_t − t·v and its velocity v, float32."""
    guidance = jnp.full(t.shape, ladd.config.guidance, jnp.float32) if ladd.takes_guidance else None
    velocity = ladd.predict(params, frozen, x_t, t, batch, guidance).astype(jnp.float32)
    return x_t - t[:, None, None] * velocity, velocity


def rollout(
    ladd: LADD,
    params: Params,
    frozen: Any,
    batch: TokenBatch,
    noise: Tokens,
    index: Int[Array, " B"],
) -> Tokens:
    """The state at times[index] of the student's own Euler steps from noise; no gradient."""
    times = ladd.times

    def step(carry, i):
        x, found = carry
        t = jnp.full(index.shape, times[i])
        _, velocity = denoise(ladd, params, frozen, batch, x, t)
        x = x + (times[i + 1] - times[i]) * velocity
        return (x, jnp.where((index == i + 1)[:, None, None], x, found)), None

    (_, found), _ = lax.scan(step, (noise, noise), jnp.arange(len(times) - 1))
    return lax.stop_gradient(found)


def student_input(
    ladd: LADD,
    params: Params,
    frozen: Any,
    batch: TokenBatch,
    probabilities: Float[Array, " K"],
    key: RandomKey,
    sample_index: Int[Array, " B"],
) -> tuple[Tokens, Float[Array, " B"]]:
    """x_t and t that the student is given: x0 with noise, or its own states (`on_policy`).

    Args:
      params: the student's parameters, used by `on_policy` alone.
      probabilities: probability of each of the K student times.
      key: key of the step.
      sample_index: places in the global batch.
    """
    x0, times = batch.x0.astype(jnp.float32), ladd.times
    noise = draw_noise(key, sample_index, x0.shape[1:])
    index = jax.vmap(lambda k: jax.random.categorical(k, jnp.log(probabilities)))(
        sample_keys(key, "t", sample_index)
    )
    x_t = flow.interpolate(x0, noise, times[index])
    if ladd.config.on_policy:
        keys = sample_keys(key, "on_policy", sample_index)
        is_own = jax.vmap(jax.random.bernoulli, (0, None))(keys, ladd.config.on_policy)
        own = rollout(ladd, params, frozen, batch, noise, index)
        x_t = jnp.where(is_own[:, None, None], own, x_t)
    return x_t, times[index]


def teacher_features(
    ladd: LADD,
    frozen: Any,
    batch: TokenBatch,
    key: RandomKey,
    use: str,
    sample_index: Int[Array, " B"],
) -> tuple[FeaturesOf, Float[Array, " B"]]:
    """F as a function of x [B, L, C], at a time s drawn for each sample; and s.

    Args:
      key: key of the step.
      use: name of the draws of s and noise', such as "fake" (`objectives.base.use_key`).
      sample_index: places in the global batch.
    """
    config = ladd.config
    logit = draw_noise(key, sample_index, (), f"{use}_s")
    s = jax.nn.sigmoid(config.renoise_mean + config.renoise_sigma * logit)
    s = jnp.clip(s, *config.renoise_range)
    noise = draw_noise(key, sample_index, batch.x0.shape[1:], f"{use}_noise")

    def features_of(x: Tokens) -> tuple[jax.Array, ...]:
        return tuple(ladd.features(frozen, flow.interpolate(x, noise, s), s, batch))

    return features_of, s


def show_examples(
    ladd: LADD, frozen: Any, batch: TokenBatch, key: RandomKey, sample_index: Int[Array, " B"]
) -> tuple[Seen, Seen | None]:
    """The examples as the heads see them: as they are; and, with `negative_share`, mismatched.

    Raises:
      ValueError: mismatched ones are wanted of a batch with one example.
    """
    x0 = batch.x0.astype(jnp.float32)
    features_of, s = teacher_features(ladd, frozen, batch, key, "real", sample_index)
    real = Seen(features_of(x0), s, batch)
    if not ladd.config.negative_share:
        return real, None
    if num_samples(batch) < 2:
        raise ValueError(
            "ladd.negative_share needs the text of another example, but a micro-batch has "
            "one; raise batch_size or lower accumulate_steps"
        )
    keys = sample_keys(key, "negative", sample_index)
    other = mismatched(batch, jax.vmap(jax.random.bernoulli)(keys))
    features_of, s = teacher_features(ladd, frozen, other, key, "negative", sample_index)
    return real, Seen(features_of(x0), s, other)


def heads_loss(
    params: Params, ladd: LADD, real: Seen, fake: Seen, negative: Seen | None
) -> tuple[Float[Array, ""], Metrics]:
    """L_D by the parameters of the heads, and metrics; the features are numbers.

    Args:
      params: the heads' parameters.
      real: examples as they are.
      fake: the student's x̂0.
      negative: mismatched examples; None without `negative_share`.
    """
    config, heads = ladd.config, ladd.heads
    of_real = heads.logits(params, *real)
    of_fake = heads.logits(params, *fake)
    loss = hinge_loss(of_real, of_fake)
    metrics = _judgement(of_real, of_fake, real.s, fake.s) | {"discriminator/loss": loss}
    if negative is not None:
        of_other = heads.logits(params, *negative)
        negative_loss = hinge_loss((), of_other)
        metrics["discriminator/negative_loss"] = negative_loss
        loss += config.negative_share * (negative_loss - hinge_loss((), of_fake))
    if config.r1_weight:
        penalty = gradient_penalty(
            lambda f: heads.logits(params, f, real.s, real.batch), real.features
        )
        metrics["discriminator/r1"] = penalty
        loss += config.r1_weight * penalty
    return loss, metrics


def heads_gradient(
    ladd: LADD,
    params: Params,
    frozen: Any,
    batch: TokenBatch,
    key: RandomKey,
    sample_index: Int[Array, " B"],
) -> tuple[tuple[Float[Array, ""], Metrics], Params]:
    """L_D and its gradient by the heads alone: a `GradientFn` once `ladd` is given.

    Args:
      params: the heads' parameters.
      frozen: (probabilities of the student times, the student's parameters, the teacher's).
    """
    probabilities, student, frozen = frozen
    x_t, t = student_input(ladd, student, frozen, batch, probabilities, key, sample_index)
    x0_hat, _ = denoise(ladd, student, frozen, batch, x_t, t)
    features_of, s = teacher_features(ladd, frozen, batch, key, "fake", sample_index)
    fake = Seen(features_of(x0_hat), s, batch)
    real, negative = show_examples(ladd, frozen, batch, key, sample_index)
    return jax.value_and_grad(heads_loss, has_aux=True)(params, ladd, real, fake, negative)


def both_gradients(
    ladd: LADD,
    params: Networks,
    frozen: Any,
    batch: TokenBatch,
    key: RandomKey,
    sample_index: Int[Array, " B"],
) -> tuple[tuple[Float[Array, ""], Metrics], Networks]:
    """L_G by the student and L_D by the heads: a `GradientFn` once `ladd` is given.

    Args:
      frozen: (whether the heads have started, (probabilities of the student times, the teacher's
        parameters)).
    """
    _, (probabilities, frozen) = frozen
    x_t, t = student_input(ladd, params.generator, frozen, batch, probabilities, key, sample_index)

    def student(p):
        return denoise(ladd, p, frozen, batch, x_t, t)[0]

    x0_hat, pull_student = jax.vjp(student, params.generator)
    features_of, s = teacher_features(ladd, frozen, batch, key, "fake", sample_index)
    features, pull_teacher = jax.vjp(features_of, x0_hat)

    def fooled(features):
        logits = ladd.heads.logits(params.discriminator, features, s, batch)
        return sum(generator_loss(x, "hinge") for x in logits)

    loss, by_features = jax.value_and_grad(fooled)(features)
    (by_x0,) = pull_teacher(by_features)
    (grads,) = pull_student(by_x0)
    real, negative = show_examples(ladd, frozen, batch, key, sample_index)
    (_, metrics), heads_grads = jax.value_and_grad(heads_loss, has_aux=True)(
        params.discriminator, ladd, real, Seen(features, s, batch), negative
    )
    metrics |= {
        "x0_grad": jnp.linalg.norm(by_x0.ravel()),
        "x0_std": jnp.std(x0_hat) / jnp.std(batch.x0.astype(jnp.float32)),
    }
    return (loss, metrics), Networks(grads, heads_grads)


def make_ladd_step(
    ladd: LADD,
    optimizer: optax.GradientTransformation,
    *,
    ema_decay: float,
    accumulate_steps: int,
    learning_rate: Callable[[jax.Array], jax.Array] | None,
) -> Callable[[TrainState, Any, TokenBatch, jax.Array], tuple[TrainState, Metrics]]:
    """One step: `discriminator_steps` − 1 updates of the heads alone, then one of both networks."""
    config, heads = ladd.config, ladd.heads
    joint_step = make_adversarial_step(
        functools.partial(both_gradients, ladd),
        optimizer,
        heads,
        0,
        ema_decay=ema_decay,
        accumulate_steps=accumulate_steps,
        learning_rate=learning_rate,
    )

    def step(state: TrainState, frozen, batch: TokenBatch, key):
        is_warm = state.step < config.warmup_steps
        given = jnp.asarray([config.warmup_probabilities, config.probabilities], jnp.float32)
        probabilities = jnp.where(is_warm, given[0], given[1])
        step_key = use_key(jax.random.fold_in(key, state.step), "heads alone")

        def update_heads(heads_state, i):
            loss, _, grads = mean_gradient(
                functools.partial(heads_gradient, ladd),
                heads_state.params,
                (probabilities, state.params, frozen),
                batch,
                jax.random.fold_in(step_key, i),
                accumulate_steps,
            )
            is_finite = jnp.isfinite(loss) & jnp.isfinite(optax.tree.norm(grads))
            return advance(heads_state, grads, is_finite, heads.optimizer)[0], None

        if config.discriminator_steps > 1:
            extra, _ = lax.scan(
                update_heads, state.extra, jnp.arange(config.discriminator_steps - 1)
            )
            state = state.replace(extra=extra)
        return joint_step(state, (probabilities, frozen), batch, key)

    return step


def evaluate_ladd(
    ladd: LADD, params: Params, frozen: Any, batch: TokenBatch, key: RandomKey
) -> Metrics:
    """Feature distance and spread of x̂0 beside x0, for each student time; see `make_ladd`."""
    x0, times = batch.x0.astype(jnp.float32), ladd.times
    sample_index = jnp.arange(num_samples(batch), dtype=jnp.int32)
    noise = draw_noise(key, sample_index, x0.shape[1:])
    other_noise = draw_noise(key, sample_index, x0.shape[1:], "fake_noise")
    s = jnp.full(len(x0), jax.nn.sigmoid(ladd.config.renoise_mean))

    def features_of(x):
        return ladd.features(frozen, flow.interpolate(x, other_noise, s), s, batch)

    real = features_of(x0)

    def compare(t):
        t = jnp.full(len(x0), t)
        x0_hat, _ = denoise(ladd, params, frozen, batch, flow.interpolate(x0, noise, t), t)
        return _feature_distance(features_of(x0_hat), real), jnp.std(x0_hat) / jnp.std(x0)

    distances, stds = lax.map(compare, times)
    metrics = {"loss": jnp.mean(distances)}
    for i in range(len(times)):
        metrics |= {f"feature_distance/{i}": distances[i], f"x0_std/{i}": stds[i]}
    return metrics


def make_ladd(
    predict: Predict,
    features: Features,
    heads: Adversary,
    init_params: Callable[[jax.Array], Params],
    optimizer: optax.GradientTransformation,
    config: LADDConfig,
    *,
    takes_guidance: bool,
    ema_decay: float = 0.0,
    accumulate_steps: int = 1,
    learning_rate: Callable[[jax.Array], jax.Array] | None = None,
) -> Objective:
    """LADD as an `Objective` over `TokenBatch`es; the heads' state is `state.extra`.

    Metrics, beside those of `make_adversarial_step` (`loss` is L_G): `discriminator/loss`, without
    the penalty; `discriminator/r1`; mean logits `discriminator/real/K` and `fake/K` of head K;
    `discriminator/active`, the share of hinges that are not zero; `discriminator/accuracy/I` for
    s in part I of [0, 1]; `x0_grad`, the norm of ∂L_G/∂x̂0; `x0_std`, the deviation of x̂0 over that
    of x0. None of these tells whether modes are lost: only samples do.

    `evaluate` compares x̂0 with x0 for each student time I, with noise from key and sample index
    alone: `feature_distance/I`, the mean squared difference of features at the median s and with
    the same noise', and `x0_std/I`. Its `loss` is their mean feature distance.

    Args:
      predict: see `LADD`, like `features`, `heads`, `config` and `takes_guidance`.
      init_params: key → fresh float32 parameters of the student.
      optimizer: the student's optimizer; the heads have their own.
      ema_decay: see `make_gradient_step`, like the rest.

    Raises:
      ValueError: when traced, if the batch has one example while negatives need another.
    """
    check_step_options(ema_decay, accumulate_steps)
    times = jnp.asarray(config.timesteps, jnp.float32)
    ladd = LADD(predict, features, heads, config, takes_guidance, times)

    def init(key: jax.Array) -> TrainState:
        return start_ladd(init_params(key), optimizer, heads, key, with_ema=ema_decay > 0)

    step = make_ladd_step(
        ladd,
        optimizer,
        ema_decay=ema_decay,
        accumulate_steps=accumulate_steps,
        learning_rate=learning_rate,
    )
    return Objective(init, step, functools.partial(evaluate_ladd, ladd))


def start_ladd(
    params: Params,
    optimizer: optax.GradientTransformation,
    heads: Adversary,
    key: RandomKey,
    *,
    with_ema: bool,
) -> TrainState:
    """The state before the first step; the heads are drawn by `key`."""
    extra = start_adversary(heads, use_key(key, "heads"))
    return make_train_state(params, optimizer, with_ema=with_ema, extra=extra)


def _judgement(real, fake, real_s, fake_s) -> Metrics:
    """What the heads say, by head and by s."""
    metrics: Metrics = {}
    for k, (r, f) in enumerate(zip(real, fake, strict=True)):
        metrics |= {
            f"discriminator/real/{k}": jnp.mean(r),
            f"discriminator/fake/{k}": jnp.mean(f),
        }
    active = [jnp.mean(r < 1) + jnp.mean(f > -1) for r, f in zip(real, fake, strict=True)]
    metrics["discriminator/active"] = jnp.asarray(sum(active) / (2 * len(active)))
    is_right = [_shares([r > 0 for r in real]), _shares([f < 0 for f in fake])]  # [B] each
    s, right = jnp.concatenate([real_s, fake_s]), jnp.concatenate(is_right)
    return metrics | means_by_time(s, {"discriminator/accuracy": right}, NUM_ACCURACY_BINS)


def _shares(maps: Sequence[jax.Array]) -> jax.Array:
    """Share of true values for each sample, over all maps: [B]."""
    return jnp.asarray(sum(jnp.mean(x.reshape(len(x), -1), axis=1) for x in maps) / len(maps))


def _feature_distance(a: Sequence[jax.Array], b: Sequence[jax.Array]) -> jax.Array:
    squares = [jnp.mean(jnp.square((x - y).astype(jnp.float32))) for x, y in zip(a, b, strict=True)]
    return jnp.asarray(sum(squares) / len(squares))
