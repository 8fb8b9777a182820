"""The autoencoder by reconstruction: pixels, features, a little KL divergence, a discriminator.

    z     = mean + exp(logvar/2)·ε,  ε ~ N(0, I)          of the encoder's Gaussian q(z | x)
    nll   = mean over pictures of  l1·Σ|x − x̂| + mse·Σ(x − x̂)² + perceptual·n·LPIPS(x, x̂)
    kl    = kl_weight · mean over pictures of ½·Σ(mean² + e^logvar − 1 − logvar)
    loss  = nll + kl [+ d·g, see `objectives.adversarial`]

Every Σ is a *sum* over a picture's n values or its latents, and LPIPS, one number a picture, counts
for each of its values, as in latent diffusion's loss (arXiv:2112.10752, `contperceptual.py`): its
weights, such as 1e-6 for the KL, mean something else where errors are averaged over pixels and
latents (there 1e-6 would be 8.3e-8). Its learnt log variance of the likelihood is left out: their
optimizer never gets it, so it stays 0.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import optax

from kontext_jax.fields import check_acting, option
from kontext_jax.objectives.adversarial import (
    AdversarialLoss,
    Adversary,
    Reconstruction,
    make_adversarial_gradient,
    make_adversarial_step,
    start_adversary,
)
from kontext_jax.objectives.base import (
    Metrics,
    Objective,
    check_step_options,
    make_gradient_step,
    num_samples,
    sample_keys,
)
from kontext_jax.objectives.state import TrainState, make_train_state
from kontext_jax.types import Array, Float, Image, Latents, Params, RandomKey


class Coder(NamedTuple):
    """An autoencoder as functions of its parameters."""

    moments: Callable[[Params, jax.Array], tuple[jax.Array, jax.Array]]
    # (params, image [B, h, w, 3]) → (mean, logvar), unscaled [B, h/8, w/8, Z]
    features: Callable[[Params, jax.Array], jax.Array]
    # (params, such z) → what the decoder's last convolution sees
    output: Callable[[Params, jax.Array], jax.Array]
    # (params of that convolution, {"kernel", …}, features) → image, about [-1, 1]
    last: Callable[[Params], Params]
    # params → those of that convolution


PerceptualNet = Literal["alexnet", "vgg16"]
Perceptual = Callable[[Any, jax.Array, jax.Array], jax.Array]
"""`perceptual(frozen, a, b) -> [B]`, the LPIPS of pictures in [-1, 1]."""


@flax.struct.dataclass
class PictureBatch:
    """Pictures alone, in [-1, 1]."""

    image: jax.Array  # [B, h, w, 3]


NO_WEIGHT = "{name} is {value!r}, but {setting} is 0; set that, or leave this at {default!r}"


@dataclasses.dataclass(frozen=True)
class AutoencoderConfig:
    """Weights of the loss, whose terms are sums over a picture.

    Attributes:
      z_channels: channels of the latents, which set their rate; 0: as many as the preset's.
      l1_weight: factor of absolute errors.
      mse_weight: factor of squared errors.
      kl_weight: factor of the divergence from the standard Gaussian. It keeps latents from growing,
        and trades sharpness for latents that bear some noise.
      perceptual_weight: factor of LPIPS, counted for every value of the picture; 0: no such term.
      perceptual_net: network of LPIPS. "alexnet" costs a twentieth of "vgg16", and leaves the
        latter to measure by. Fetched by `python -m kontext_jax.evaluation.fetch_perceptual`.
      adversarial_weight: constant factor of the discriminator's term, beside its adaptive one; 0:
        no discriminator.
      adversarial_start_step: steps of this run before the discriminator begins to learn and to
        count. (Where both networks' updates are counted, as in some versions of latent diffusion,
        these are twice as many.)
      adversarial_loss: "hinge", or "non_saturating".
    """

    z_channels: int = 0
    l1_weight: float = 1.0
    mse_weight: float = 0.0
    kl_weight: float = 1e-6
    perceptual_weight: float = 0.0
    perceptual_net: PerceptualNet = option(
        "alexnet", acts_with=("perceptual_weight",), otherwise=NO_WEIGHT
    )
    adversarial_weight: float = 0.0
    adversarial_start_step: int = option(
        50_000, acts_with=("adversarial_weight",), otherwise=NO_WEIGHT
    )
    adversarial_loss: AdversarialLoss = option(
        "hinge", acts_with=("adversarial_weight",), otherwise=NO_WEIGHT
    )

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if not isinstance(value, str) and not value >= 0:
                raise ValueError(f"autoencoder.{field.name} is {value}; it must be 0 or more")
        if not (self.l1_weight or self.mse_weight):
            raise ValueError(
                "autoencoder.l1_weight and mse_weight are both 0, so nothing would be "
                "reconstructed; set one above 0"
            )
        check_acting(self, "autoencoder")


def gaussian_kl(
    mean: Float[Array, "B *rest"], logvar: Float[Array, "B *rest"]
) -> Float[Array, " B"]:
    """Divergence of N(mean, e^logvar) from N(0, I), summed over all axes but the first: [B]."""
    terms = jnp.square(mean) + jnp.exp(logvar) - 1 - logvar
    return 0.5 * jnp.sum(terms, axis=range(1, terms.ndim))


def latent_metrics(mean: Latents) -> Metrics:
    """Moments of the posteriors' means [B, h, w, Z] by picture, [B] each.

    A Gaussian's kurtosis is 3; latents far above it have rare large values.
    """
    axes = (1, 2, 3)
    centre = jnp.mean(mean, axis=axes)
    deviation = mean - centre[:, None, None, None]
    variance = jnp.mean(jnp.square(deviation), axis=axes)
    fourth = jnp.mean(jnp.square(jnp.square(deviation)), axis=axes)
    return {
        "latent_mean": centre,
        "latent_square": jnp.mean(jnp.square(mean), axis=axes),
        "latent_kurtosis": fourth / jnp.maximum(jnp.square(variance), 1e-12),
    }


def code(
    coder: Coder,
    params: Params,
    image: Image,
    noise: Callable[[tuple[int, ...]], jax.Array] | None,
) -> tuple[Image, Float[Array, " B"], Float[Array, "B height width channels"], Metrics]:
    """Pictures through the autoencoder: (x̂, KL [B], features, metrics [B] each), float32.

    Args:
      noise: shape → standard normal numbers; None decodes the posterior's mean.

    Raises:
      ValueError: if x̂ has another shape than the picture.
    """
    mean, logvar = (m.astype(jnp.float32) for m in coder.moments(params, image))
    z = mean if noise is None else mean + jnp.exp(0.5 * logvar) * noise(mean.shape)
    features = coder.features(params, z)
    decoded = coder.output(coder.last(params), features).astype(jnp.float32)
    if decoded.shape != image.shape:
        raise ValueError(f"the decoder returned {decoded.shape} for pictures of {image.shape}")
    kl = gaussian_kl(mean, logvar)
    return decoded, kl, features, latent_metrics(mean) | {"kl": kl / mean[0].size}


def reconstruction_loss(
    config: AutoencoderConfig,
    image: Image,
    decoded: Image,
    perceptual: Callable[[jax.Array, jax.Array], jax.Array] | None,
) -> tuple[Float[Array, " B"], Metrics]:
    """The nll of each picture [B], and metrics [B] each.

    Args:
      perceptual: (a, b) → LPIPS [B]; None without that term.
    """
    values = image[0].size
    error = decoded - image.astype(jnp.float32)
    l1 = jnp.mean(jnp.abs(error), axis=(1, 2, 3))
    mse = jnp.mean(jnp.square(error), axis=(1, 2, 3))
    loss = values * (config.l1_weight * l1 + config.mse_weight * mse)
    metrics = {"l1": l1, "mse": mse, "psnr": 10 * jnp.log10(4 / jnp.maximum(mse, 1e-12))}
    if perceptual is not None:
        metrics["lpips"] = perceptual(image, decoded)
        loss += config.perceptual_weight * values * metrics["lpips"]
    return loss, metrics


def _averages(metrics: Metrics) -> Metrics:
    return {name: jnp.mean(value) for name, value in metrics.items()}


def make_autoencoder(
    coder: Coder,
    init_params: Callable[[jax.Array], Params],
    optimizer: optax.GradientTransformation,
    config: AutoencoderConfig,
    *,
    perceptual: Perceptual | None = None,
    adversary: Adversary | None = None,
    ema_decay: float = 0.0,
    accumulate_steps: int = 1,
    learning_rate: Callable[[jax.Array], jax.Array] | None = None,
) -> Objective:
    """Reconstruction as an `Objective` over `PictureBatch`es.

    Metrics, beside those of the step: `l1` and `mse`, means over a picture's values; `psnr` in dB,
    the mean over pictures (values from -1 to 1); `lpips`; `kl`, the mean over latents;
    `latent_mean`, `latent_square` and `latent_kurtosis` of the posteriors' means. With a
    discriminator those of `make_adversarial_step`.

    `evaluate` decodes the posterior's mean; its `loss` is nll + kl with the same weights.

    Args:
      init_params: key → fresh float32 parameters of encoder and decoder.
      perceptual: what config.perceptual_weight weighs.
      adversary: what config.adversarial_weight weighs.
      ema_decay: see `make_gradient_step`, like the rest.

    Raises:
      ValueError: a weight without its network, or the reverse.
    """
    check_step_options(ema_decay, accumulate_steps)
    for name, network in (("perceptual", perceptual), ("adversarial", adversary)):
        weight = getattr(config, f"{name}_weight")
        if bool(weight) != (network is not None):
            has = "a" if network is not None else "no"
            raise ValueError(f"{name}_weight is {weight:g}, but there is {has} network for it")

    def nll(frozen, image, decoded):
        measure = None if perceptual is None else lambda a, b: perceptual(frozen, a, b)
        return reconstruction_loss(config, image, decoded, measure)

    def posterior_noise(step_key, sample_index):
        keys = sample_keys(step_key, "posterior", sample_index)

        def noise(shape):
            return jax.vmap(lambda k: jax.random.normal(k, shape[1:], jnp.float32))(keys)

        return noise

    def reconstruct(frozen, batch: PictureBatch, step_key, sample_index) -> Reconstruction:
        def run(params):
            noise = posterior_noise(step_key, sample_index)
            decoded, kl, features, metrics = code(coder, params, batch.image, noise)
            return (decoded, config.kl_weight * jnp.mean(kl)), (features, _averages(metrics))

        def mean_nll(decoded):
            loss, metrics = nll(frozen, batch.image, decoded)
            return jnp.mean(loss), _averages(metrics)

        return Reconstruction(run, coder.output, coder.last, mean_nll)

    def loss_fn(params, frozen, batch: PictureBatch, step_key, sample_index):
        way = reconstruct(frozen, batch, step_key, sample_index)
        (decoded, kl), (_, metrics) = way.run(params)
        loss, nll_metrics = way.nll(decoded)
        return loss + kl, metrics | nll_metrics

    def evaluate(params, frozen, batch: PictureBatch, key):
        decoded, kl, _, metrics = code(coder, params, batch.image, None)
        loss, nll_metrics = nll(frozen, batch.image, decoded)
        metrics = metrics | nll_metrics | {"loss": loss + config.kl_weight * kl}
        count = jnp.float32(num_samples(batch))
        sums = {f"{name}/sum": jnp.sum(value) for name, value in metrics.items()}
        return sums | {f"{name}/count": count for name in metrics}

    options: dict[str, Any] = {"ema_decay": ema_decay, "accumulate_steps": accumulate_steps}
    if adversary is None:
        step = make_gradient_step(loss_fn, optimizer, learning_rate=learning_rate, **options)
    else:
        gradient_fn = make_adversarial_gradient(
            adversary, config.adversarial_loss, config.adversarial_weight, reconstruct
        )
        step = make_adversarial_step(
            gradient_fn,
            optimizer,
            adversary,
            config.adversarial_start_step,
            learning_rate=learning_rate,
            **options,
        )

    def init(key: jax.Array) -> TrainState:
        return start_autoencoder(
            init_params(key), optimizer, adversary, key, with_ema=ema_decay > 0
        )

    return Objective(init=init, step=step, evaluate=evaluate)


def start_autoencoder(
    params: Params,
    optimizer: optax.GradientTransformation,
    adversary: Adversary | None,
    key: RandomKey,
    *,
    with_ema: bool,
) -> TrainState:
    """The state before the first step; the discriminator is drawn by `key`."""
    extra = None if adversary is None else start_adversary(adversary, key)
    return make_train_state(params, optimizer, with_ema=with_ema, extra=extra)
