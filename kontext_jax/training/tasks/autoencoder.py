"""Training the autoencoder: the task of `objectives.autoencoder`."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kontext_jax.batches import ImageBatch
from kontext_jax.models.judges.discriminators import PatchDiscriminator
from kontext_jax.models.judges.perceptual import NETS, Perceptual
from kontext_jax.models.presets import PRESETS, VAEConfig
from kontext_jax.models.vae import VAE
from kontext_jax.objectives.adversarial import Adversary
from kontext_jax.objectives.autoencoder import (
    Coder,
    PerceptualNet,
    PictureBatch,
    make_autoencoder,
    start_autoencoder,
)
from kontext_jax.objectives.autoencoder import Perceptual as PerceptualLoss
from kontext_jax.objectives.base import use_key
from kontext_jax.objectives.state import TrainState
from kontext_jax.pictures import latents
from kontext_jax.runtime.sharding import shard_batch
from kontext_jax.training.config import TrainConfig
from kontext_jax.training.optimizer import make_optimizer, make_schedule
from kontext_jax.training.tasks.base import NOTHING_FROZEN, Devices, Frozen, Pictures, Task, Work
from kontext_jax.types import DTYPES, Params
from kontext_jax.weights.bundle import Component, OpenWeights, Place
from kontext_jax.weights.perceptual import load_perceptual, perceptual_dir, perceptual_shapes


def coder_of(vae: VAE) -> Coder:
    """The autoencoder as functions, with latents as its posterior has them."""

    def moments(params, image):
        return vae.apply({"params": params}, image, method="moments")

    def features(params, z):
        latents_of_z = vae.config.latent_scale * (z - vae.config.latent_shift)
        return vae.apply({"params": params}, latents_of_z, method="decode_features")

    def output(last, features):
        params = {"decoder": {"conv_out": last}}
        return vae.apply({"params": params}, features, method="decode_output")

    return Coder(moments, features, output, lambda params: params["decoder"]["conv_out"])


def make_adversary(config: TrainConfig) -> Adversary:
    """The discriminator of a run, with its optimizer."""
    network = PatchDiscriminator(config.discriminator, DTYPES[config.dtype])
    side = 2 ** (config.discriminator.num_layers + 2)  # leaves it a patch
    steps = config.num_steps - config.autoencoder.adversarial_start_step
    return Adversary(
        logits=lambda params, image: network.apply({"params": params}, image),
        init=lambda key: network.init(key, jnp.zeros((1, side, side, 3)))["params"],
        optimizer=make_optimizer(config.discriminator_optimizer, steps),
        learning_rate=make_schedule(config.discriminator_optimizer, steps),
    )


def autoencoder_task(config: TrainConfig, open_weights: OpenWeights) -> Task:
    """Trains the preset's autoencoder to reconstruct the targets of the data; references unused."""
    bundle = open_weights(config.weights) if config.weights else None
    start = None if bundle is None else bundle.components["vae"]
    dtype = DTYPES[config.dtype]
    vae = VAE(_sizes(config, start), dtype, remat=config.remat == "full")
    sources = [f"autoencoder: {bundle.source if bundle else 'drawn afresh'}"]
    optimizer = make_optimizer(config.optimizer, config.num_steps)
    adversary = make_adversary(config) if config.autoencoder.adversarial_weight else None
    perceptual, frozen = None, NOTHING_FROZEN
    if config.autoencoder.perceptual_weight:
        perceptual, frozen = judged_by(config.autoencoder.perceptual_net, dtype)
        sources.append(
            f"perceptual network: {config.autoencoder.perceptual_net}, {perceptual_dir()}"
        )
    side = 2 * vae.config.downsampling
    objective = make_autoencoder(
        coder_of(vae),
        lambda key: vae.init(key, jnp.zeros((1, side, side, 3)))["params"],
        optimizer,
        config.autoencoder,
        perceptual=perceptual,
        adversary=adversary,
        ema_decay=config.ema_decay,
        accumulate_steps=config.accumulate_steps,
        learning_rate=make_schedule(config.optimizer, config.num_steps),
    )

    def load_params(place: Place) -> Params | None:
        return None if start is None else start.load(dtype=jnp.float32, device=place)

    def start_state(params: Params) -> TrainState:
        return start_autoencoder(
            params,
            optimizer,
            adversary,
            use_key(jax.random.key(config.seed), "discriminator"),
            with_ema=config.ema_decay > 0,
        )

    return Task(
        objective=objective,
        sources=tuple(sources),
        load_params=load_params,
        start=start_state,
        frozen_shapes=frozen.shapes,
        load_frozen=frozen.load,
        data_facts=dict,
        make_feed=lambda devices, null_text: PictureFeed(vae, devices),
        abstract_batch=abstract_pictures,
        peak_flops=lambda mesh: None,
        work=work_on_pictures,
    )


def judged_by(name: PerceptualNet, dtype: jax.typing.DTypeLike) -> tuple[PerceptualLoss, Frozen]:
    """LPIPS by a frozen network, and that network's weights, `frozen["perceptual"]`."""
    network = Perceptual(NETS[name], dtype)

    def perceptual(frozen, a, b):
        return network.apply({"params": frozen["perceptual"]}, a, b)[0]

    return perceptual, Frozen(
        shapes=lambda: {"perceptual": perceptual_shapes(NETS[name])},
        load=lambda place: {"perceptual": load_perceptual(name, place)},
    )


def abstract_pictures(batch_size: int, size: tuple[int, int], num_references: int) -> PictureBatch:
    """Shapes of a batch of pictures of (width, height); references are not used."""
    width, height = size
    return PictureBatch(jax.ShapeDtypeStruct((batch_size, height, width, 3), jnp.float32))


def work_on_pictures(batch: PictureBatch) -> Work:
    """What a step on such a batch does; its operations are not counted."""
    count, height, width, _ = batch.image.shape
    return Work(count, count * latents.num_tokens(width, height), None)


def _sizes(config: TrainConfig, start: Component | None) -> VAEConfig:
    """Sizes of the autoencoder.

    Raises:
      ValueError: the config asks for other latents than the weights have.
    """
    given = PRESETS[config.preset].vae if start is None else start.config
    assert isinstance(given, VAEConfig)
    wanted = given.with_channels(config.autoencoder.z_channels)
    if start is not None and wanted != given:
        raise ValueError(
            f"autoencoder.z_channels is {wanted.z_channels}, but {config.weights} has "
            f"{given.z_channels}; leave it at 0, or begin without weights"
        )
    return wanted


class PictureFeed:
    """Puts pictures on the devices, and shows what becomes of them."""

    def __init__(self, vae: VAE, devices: Devices):
        self._vae, self._devices = vae, devices

    def __call__(self, batch: ImageBatch) -> PictureBatch:
        image = latents.pixels_to_model(batch.target)
        return shard_batch(self._devices.mesh, PictureBatch(image))

    def sample(self, params: Params, frozen: Any, batch: ImageBatch) -> Pictures:
        """Pictures, and their reconstructions through the posterior's mean."""
        given = self(batch)

        def make():
            return lambda params, image: self._vae.apply({"params": params}, image)

        shown = self._devices.run(
            "sample", make, params, given.image, out_shardings=self._devices.everywhere
        )
        return [np.asarray(given.image, np.float32), np.asarray(shown, np.float32)]
