"""Training the autoencoder: what `training_tasks` asks of a task, for `objectives.autoencoder`."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from kontext_jax.batches import ImageBatch
from kontext_jax.models.judges.discriminators import PatchDiscriminator
from kontext_jax.models.judges.perceptual import NETS, Perceptual
from kontext_jax.models.presets import PRESETS
from kontext_jax.models.vae import VAE
from kontext_jax.objectives.adversarial import Adversary
from kontext_jax.objectives.autoencoder import (
    Coder,
    PictureBatch,
    make_autoencoder,
    start_autoencoder,
)
from kontext_jax.objectives.base import Objective, use_key
from kontext_jax.objectives.state import TrainState
from kontext_jax.pictures import latents
from kontext_jax.runtime.sharding import shard_batch
from kontext_jax.training.config import TrainConfig
from kontext_jax.training.optimizer import make_optimizer, make_schedule
from kontext_jax.training.tasks.base import DTYPES, Devices, OpenWeights, Work
from kontext_jax.types import Params
from kontext_jax.weights.bundle import Place
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


class AutoencoderTask:
    """Trains the preset's autoencoder to reconstruct the targets of the data; references unused."""

    objective: Objective
    sources: list[str]

    def __init__(self, config: TrainConfig, open_weights: OpenWeights):
        self._config = config
        start = open_weights(config.weights) if config.weights else None
        self._start = start
        given = PRESETS[config.preset].vae if start is None else start.components["vae"].config
        vae_config = given.with_channels(config.autoencoder.z_channels)
        if start is not None and vae_config != given:
            raise ValueError(
                f"autoencoder.z_channels is {vae_config.z_channels}, but {config.weights} has "
                f"{given.z_channels}; leave it at 0, or begin without weights"
            )
        dtype = DTYPES[config.dtype]
        self.vae = VAE(vae_config, dtype, remat=config.remat == "full")
        self.sources = [f"autoencoder: {start.source if start else 'drawn afresh'}"]
        self._optimizer = make_optimizer(config.optimizer, config.num_steps)
        self._adversary = make_adversary(config) if config.autoencoder.adversarial_weight else None
        self._net, perceptual = None, None
        if config.autoencoder.perceptual_weight:
            self._net = config.autoencoder.perceptual_net
            network = Perceptual(NETS[self._net], dtype)
            self.sources.append(f"perceptual network: {self._net}, {perceptual_dir()}")

            def perceptual(frozen, a, b):
                return network.apply({"params": frozen["perceptual"]}, a, b)[0]

        side = 2 * vae_config.downsampling
        self.objective = make_autoencoder(
            coder_of(self.vae),
            lambda key: self.vae.init(key, jnp.zeros((1, side, side, 3)))["params"],
            self._optimizer,
            config.autoencoder,
            perceptual=perceptual,
            adversary=self._adversary,
            ema_decay=config.ema_decay,
            accumulate_steps=config.accumulate_steps,
            learning_rate=make_schedule(config.optimizer, config.num_steps),
        )

    def load_params(self, place: Place) -> Params | None:
        if self._start is None:
            return None
        return self._start.components["vae"].load(dtype=jnp.float32, device=place)

    def start(self, params: Params) -> TrainState:
        return start_autoencoder(
            params,
            self._optimizer,
            self._adversary,
            use_key(jax.random.key(self._config.seed), "discriminator"),
            with_ema=self._config.ema_decay > 0,
        )

    def frozen_shapes(self) -> Any:
        return {} if self._net is None else {"perceptual": perceptual_shapes(NETS[self._net])}

    def load_frozen(self, place: Place) -> Any:
        return {} if self._net is None else {"perceptual": load_perceptual(self._net, place)}

    def data_facts(self) -> dict[str, Any]:
        return {}

    def make_feed(self, devices: Devices, null_text) -> "PictureFeed":
        return PictureFeed(self.vae, devices)

    def abstract_batch(
        self, batch_size: int, size: tuple[int, int], num_references: int
    ) -> PictureBatch:
        width, height = size
        return PictureBatch(jax.ShapeDtypeStruct((batch_size, height, width, 3), jnp.float32))

    def peak_flops(self, mesh: Mesh) -> float | None:
        return None

    def work(self, batch: PictureBatch) -> Work:
        count, height, width, _ = batch.image.shape
        return Work(count, count * latents.num_tokens(width, height), None)


class PictureFeed:
    """Puts pictures on the devices, and shows what becomes of them."""

    def __init__(self, vae: VAE, devices: Devices):
        self._vae, self._devices = vae, devices

    def __call__(self, batch: ImageBatch) -> PictureBatch:
        image = latents.pixels_to_model(batch.target)
        return shard_batch(self._devices.mesh, PictureBatch(image))

    def sample(self, params: Params, frozen: Any, batch: ImageBatch) -> list[np.ndarray]:
        """Pictures, and their reconstructions through the posterior's mean."""
        given = self(batch)

        def make():
            return lambda params, image: self._vae.apply({"params": params}, image)

        shown = self._devices.run(
            "sample", make, params, given.image, out_shardings=self._devices.everywhere
        )
        return [np.asarray(given.image, np.float32), np.asarray(shown, np.float32)]
