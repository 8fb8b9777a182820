"""The autoencoder by reconstruction: absolute and squared error, and a little KL divergence.

    z     = mean + exp(logvar/2)·ε,  ε ~ N(0, I)          of the encoder's Gaussian q(z | x)
    loss  = mean over pictures of  l1·Σ|x − x̂| + mse·Σ(x − x̂)² + kl·KL
    KL    = ½·Σ(mean² + e^logvar − 1 − logvar)

Every Σ is a *sum* over a picture's values or its latents, as in latent diffusion's loss
(arXiv:2112.10752, `contperceptual.py`): its weights, such as 1e-6 for the KL, mean something else
where errors are averaged over pixels and latents.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from kontext_jax.objectives.base import (
    Metrics,
    Objective,
    make_gradient_step,
    num_samples,
    sample_keys,
)
from kontext_jax.train_state import make_train_state
from kontext_jax.types import Params

Moments = Callable[[Params, jax.Array], tuple[jax.Array, jax.Array]]
"""`moments(params, image [B, h, w, 3]) -> (mean, logvar)`, unscaled [B, h/8, w/8, Z]."""
Decode = Callable[[Params, jax.Array], jax.Array]
"""`decode(params, z) -> image` of such unscaled latents, about [-1, 1]."""


@flax.struct.dataclass
class PictureBatch:
    """Pictures alone, in [-1, 1]."""

    image: jax.Array  # [B, h, w, 3]


@dataclasses.dataclass(frozen=True)
class AutoencoderConfig:
    """Weights of the loss, whose terms are sums over a picture.

    Attributes:
      l1_weight: of absolute errors.
      mse_weight: of squared errors.
      kl_weight: of the divergence from the standard Gaussian. It keeps latents from growing, and
        trades sharpness for latents that bear some noise.
    """

    l1_weight: float = 1.0
    mse_weight: float = 0.0
    kl_weight: float = 1e-6

    def __post_init__(self):
        for field in dataclasses.fields(self):
            if not getattr(self, field.name) >= 0:
                raise ValueError(
                    f"autoencoder.{field.name} is {getattr(self, field.name)}; it must be 0 or more"
                )
        if not (self.l1_weight or self.mse_weight):
            raise ValueError(
                "autoencoder.l1_weight and mse_weight are both 0, so nothing would be "
                "reconstructed; set one above 0"
            )


def gaussian_kl(mean: jax.Array, logvar: jax.Array) -> jax.Array:
    """Divergence of N(mean, e^logvar) from N(0, I), summed over all axes but the first: [B]."""
    terms = jnp.square(mean) + jnp.exp(logvar) - 1 - logvar
    return 0.5 * jnp.sum(terms, axis=range(1, terms.ndim))


def reconstruction_losses(
    moments: Moments,
    decode: Decode,
    params: Params,
    image: jax.Array,
    noise: Callable[[tuple[int, ...]], jax.Array] | None,
) -> dict[str, jax.Array]:
    """Sums over each picture, float32 [B]: "l1", "mse" and "kl"; and "latents", the means.

    Args:
      noise: shape → standard normal numbers; None decodes the posterior's mean.

    Raises:
      ValueError: if `decode` returns another shape than the picture's.
    """
    mean, logvar = (m.astype(jnp.float32) for m in moments(params, image))
    z = mean if noise is None else mean + jnp.exp(0.5 * logvar) * noise(mean.shape)
    decoded = decode(params, z).astype(jnp.float32)
    if decoded.shape != image.shape:
        raise ValueError(f"decode returned {decoded.shape} for pictures of {image.shape}")
    error = decoded - image.astype(jnp.float32)
    return {
        "l1": jnp.sum(jnp.abs(error), axis=(1, 2, 3)),
        "mse": jnp.sum(jnp.square(error), axis=(1, 2, 3)),
        "kl": gaussian_kl(mean, logvar),
        "latents": mean,
    }


def make_autoencoder(
    moments: Moments,
    decode: Decode,
    init_params: Callable[[jax.Array], Params],
    optimizer: optax.GradientTransformation,
    config: AutoencoderConfig,
    *,
    ema_decay: float = 0.0,
    accumulate_steps: int = 1,
    learning_rate: Callable[[jax.Array], jax.Array] | None = None,
) -> Objective:
    """Reconstruction as an `Objective` over `PictureBatch`es.

    Metrics, beside those of `make_gradient_step`: `l1` and `mse`, means over a picture's values;
    `psnr` in dB, the mean over pictures (values from -1 to 1); `kl`, the mean over latents;
    `latent_mean` and `latent_square`, mean and mean square of the posteriors' means.

    `evaluate` decodes the posterior's mean; its `loss` has the same weights.

    Args:
      init_params: key → fresh float32 parameters of encoder and decoder.
      ema_decay: see `make_gradient_step`, as for the rest.
    """

    def losses(params, image, noise) -> tuple[jax.Array, Metrics]:
        sums = reconstruction_losses(moments, decode, params, image, noise)
        latents = sums.pop("latents")
        loss = (
            config.l1_weight * sums["l1"]
            + config.mse_weight * sums["mse"]
            + config.kl_weight * sums["kl"]
        )
        values, num_latents = image[0].size, latents[0].size
        mse = sums["mse"] / values
        metrics = {
            "l1": sums["l1"] / values,
            "mse": mse,
            "psnr": 10 * jnp.log10(4 / jnp.maximum(mse, 1e-12)),
            "kl": sums["kl"] / num_latents,
            "latent_mean": jnp.mean(latents, axis=(1, 2, 3)),
            "latent_square": jnp.mean(jnp.square(latents), axis=(1, 2, 3)),
        }
        return loss, metrics

    def loss_fn(params, frozen: Any, batch: PictureBatch, key, sample_index):
        keys = sample_keys(key, "posterior", sample_index)

        def noise(shape):
            return jax.vmap(lambda k: jax.random.normal(k, shape[1:], jnp.float32))(keys)

        loss, metrics = losses(params, batch.image, noise)
        return jnp.mean(loss), {name: jnp.mean(value) for name, value in metrics.items()}

    def evaluate(params, frozen: Any, batch: PictureBatch, key):
        loss, metrics = losses(params, batch.image, None)
        metrics = metrics | {"loss": loss}
        count = jnp.float32(num_samples(batch))
        sums = {f"{name}/sum": jnp.sum(value) for name, value in metrics.items()}
        return sums | {f"{name}/count": count for name in metrics}

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
