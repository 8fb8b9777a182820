"""A discriminator beside the autoencoder: both gradients from one forward pass, and their weight.

    L      = nll + d·g + kl                      for encoder and decoder
    g      = −mean D(x̂)                          "hinge", or mean softplus(−D(x̂)): "non_saturating"
    L_D    = ½·(mean relu(1 − D(x)) + mean relu(1 + D(sg x̂)))
             or ½·(mean softplus(−D(x)) + mean softplus(D(sg x̂)))
    d      = adversarial_weight · clip(‖∂nll/∂W‖ / (‖∂g/∂W‖ + 1e-4), 0, 1e4),   W the last kernel

of taming-transformers and latent diffusion (arXiv:2012.09841, 2112.10752). sg stops gradients, and
d is a number, not differentiated. Before `start_step` there is no g, no L_D, and D stays as drawn.

The chain rule is walked by hand at x̂, where the terms meet: ∂nll/∂x̂ and ∂g/∂x̂ are taken once, give
d through the last convolution alone, and go back through the autoencoder together. A step so costs
one pass through the autoencoder and two through the discriminator, and no gradient of L_D can reach
the autoencoder, nor one of g the discriminator.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from kontext_jax.objectives.base import Metrics, advance, mean_gradient, num_updates
from kontext_jax.objectives.state import TrainState, make_train_state
from kontext_jax.types import Array, Float, Image, Params, RandomKey

AdversarialLoss = Literal["hinge", "non_saturating"]
WEIGHT_EPSILON, MAX_WEIGHT = 1e-4, 1e4


class Adversary(NamedTuple):
    """A network that tells real from made examples, and what trains it."""

    logits: Callable[..., Any]  # here (params, image [B, h, w, 3]) → any shape
    init: Callable[[jax.Array], Params]  # key → float32 parameters
    optimizer: optax.GradientTransformation
    learning_rate: Callable[[jax.Array], jax.Array] | None = None  # for the log alone


class Reconstruction(NamedTuple):
    """One pass through the autoencoder, as the adversarial step needs it.

    Attributes:
      run: the autoencoder's params → ((x̂, kl), (features, metrics)); kl is a term of the loss, and
        features what the last convolution sees.
      output: (params of the last convolution, features) → x̂.
      last: the autoencoder's params → those of its last convolution, {"kernel", …}.
      nll: x̂ → (its term of the loss, metrics).
    """

    run: Callable[[Params], tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, Metrics]]]
    output: Callable[[Params, jax.Array], jax.Array]
    last: Callable[[Params], Params]
    nll: Callable[[jax.Array], tuple[jax.Array, Metrics]]


class Networks(NamedTuple):
    """Parameters of both networks, or their gradients."""

    generator: Params
    discriminator: Params


def generator_loss(logits: Float[Array, "..."], kind: AdversarialLoss) -> Float[Array, ""]:
    """g: low where the discriminator takes reconstructions for real."""
    return -jnp.mean(logits) if kind == "hinge" else jnp.mean(jax.nn.softplus(-logits))


def discriminator_loss(
    real: Float[Array, "..."], fake: Float[Array, "..."], kind: AdversarialLoss
) -> Float[Array, ""]:
    """L_D from the logits of pictures and of reconstructions."""
    penalty = (lambda x: jax.nn.relu(1 + x)) if kind == "hinge" else jax.nn.softplus
    return 0.5 * (jnp.mean(penalty(-real)) + jnp.mean(penalty(fake)))


def adaptive_weight(
    output: Callable[[Params, jax.Array], jax.Array],
    last: Params,
    features: Float[Array, "B h w channels"],
    d_nll: Image,
    d_g: Image,
) -> Float[Array, ""]:
    """clip(‖∂nll/∂W‖ / (‖∂g/∂W‖ + 1e-4), 0, 1e4) of gradients by x̂."""

    def image_of(kernel):
        return output(last | {"kernel": kernel}, features).astype(d_nll.dtype)

    def by_kernel(cotangent):
        _, pull = jax.vjp(image_of, last["kernel"])
        return jnp.linalg.norm(pull(cotangent)[0].ravel())

    return jnp.clip(by_kernel(d_nll) / (by_kernel(d_g) + WEIGHT_EPSILON), 0.0, MAX_WEIGHT)


def adversarial_terms(
    adversary: Adversary,
    kind: AdversarialLoss,
    params: Params,
    image: Image,
    decoded: Image,
    weigh: Callable[[jax.Array], jax.Array],
) -> tuple[Image, Params, Metrics]:
    """What the discriminator adds: d·∂g/∂x̂, the gradient of L_D by its own parameters, metrics.

    Args:
      params: the discriminator's parameters.
      weigh: ∂g/∂x̂ → d.
    """
    fake, pull_fake = jax.vjp(adversary.logits, params, decoded)
    real, pull_real = jax.vjp(lambda p: adversary.logits(p, image), params)
    g, by_fake = jax.value_and_grad(generator_loss)(fake, kind)
    _, d_g = pull_fake(by_fake)
    weight = weigh(d_g)
    loss, (by_real, by_fake) = jax.value_and_grad(discriminator_loss, (0, 1))(real, fake, kind)
    grads = jax.tree.map(jnp.add, pull_real(by_real)[0], pull_fake(by_fake)[0])
    metrics = {
        "adversarial": g,
        "adversarial_weight": weight,
        "discriminator/loss": loss,
        "discriminator/real": jnp.mean(real),
        "discriminator/fake": jnp.mean(fake),
    }
    return weight * d_g, grads, metrics


def make_adversarial_gradient(
    adversary: Adversary,
    kind: AdversarialLoss,
    weight: float,
    reconstruct: Callable[[Any, Any, jax.Array, jax.Array], Reconstruction],
):
    """The gradients of both networks: an `objectives.base.GradientFn` over `Networks`.

    Its `frozen` is (whether the discriminator has started, what `reconstruct` needs).

    Args:
      weight: constant factor of g, beside its adaptive one.
      reconstruct: (frozen, batch, step_key, sample_index) → how the batch goes through.
    """

    def gradient(params: Networks, frozen, batch, step_key, sample_index):
        is_started, frozen = frozen
        way = reconstruct(frozen, batch, step_key, sample_index)
        (decoded, kl), pull, aux = jax.vjp(way.run, params.generator, has_aux=True)
        features, metrics = aux
        (nll, nll_metrics), d_nll = jax.value_and_grad(way.nll, has_aux=True)(decoded)
        last = way.last(params.generator)

        def weigh(d_g):
            return weight * adaptive_weight(way.output, last, features, d_nll, d_g)

        # Selected rather than branched around: XLA's CPU backend runs convolutions in a branch
        # 17 times slower, and the discriminator is a hundredth of a full-size step.
        d_g, discriminator_grads, seen = jax.tree.map(
            lambda x: jnp.where(is_started, x, 0),
            adversarial_terms(adversary, kind, params.discriminator, batch.image, decoded, weigh),
        )
        # Metrics of a step without a discriminator count nothing rather than zero.
        count = is_started.astype(jnp.float32)
        seen = {f"{name}/sum": value for name, value in seen.items()}
        counts = {name.removesuffix("/sum") + "/count": count for name in seen}
        (grads,) = pull((d_nll + d_g, jnp.ones_like(kl)))
        metrics = metrics | nll_metrics | seen | counts
        return (nll + kl, metrics), Networks(grads, discriminator_grads)

    return gradient


def make_adversarial_step(
    gradient_fn,
    optimizer: optax.GradientTransformation,
    adversary: Adversary,
    start_step: int,
    *,
    ema_decay: float = 0.0,
    accumulate_steps: int = 1,
    learning_rate: Callable[[jax.Array], jax.Array] | None = None,
):
    """`make_gradient_step` for two networks; the discriminator's state is `state.extra`.

    Its steps are counted from `start_step` on, which schedules of its rate follow. A loss or
    gradient that is not finite, of either network, leaves both as they are.

    Metrics, beside those of `make_gradient_step`, of which `loss` is without g: `adversarial` (g),
    `adversarial_weight` (d), and under `discriminator/` its `loss`, mean logits `real` and `fake`,
    `grad_norm`, `update_norm`, `param_norm` and `learning_rate`.
    """

    def step(state: TrainState, frozen: Any, batch: Any, key: jax.Array):
        is_started = state.step >= start_step
        loss, metrics, grads = mean_gradient(
            gradient_fn,
            Networks(state.params, state.extra.params),
            (is_started, frozen),
            batch,
            jax.random.fold_in(key, state.step),
            accumulate_steps,
        )
        is_finite = jnp.isfinite(loss) & jnp.isfinite(optax.tree.norm(grads))
        new_state, norms = advance(
            state, grads.generator, is_finite, optimizer, ema_decay=ema_decay
        )
        other, other_norms = advance(
            state.extra, grads.discriminator, is_finite, adversary.optimizer
        )
        other = jax.tree.map(lambda new, old: jnp.where(is_started, new, old), other, state.extra)
        metrics = metrics | {"loss": loss} | norms
        for name in ("grad_norm", "update_norm", "param_norm"):
            metrics[f"discriminator/{name}/sum"] = is_started * other_norms[name]
            metrics[f"discriminator/{name}/count"] = is_started
        if learning_rate is not None:
            metrics["learning_rate"] = learning_rate(num_updates(state))
        if adversary.learning_rate is not None:
            rate = adversary.learning_rate(num_updates(state.extra))
            metrics["discriminator/learning_rate/sum"] = is_started * rate
            metrics["discriminator/learning_rate/count"] = is_started
        new_state = new_state.replace(extra=other)
        return new_state, {name: jnp.float32(value) for name, value in metrics.items()}

    return step


def start_adversary(adversary: Adversary, key: RandomKey) -> TrainState:
    """The discriminator's state before its first step."""
    return make_train_state(adversary.init(key), adversary.optimizer, with_ema=False)
