"""Training the autoencoder: what `training_tasks` asks of a task, for `objectives.autoencoder`."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from kontext_jax import latents
from kontext_jax.checkpoint import Place
from kontext_jax.data.batches import ImageBatch
from kontext_jax.models.presets import PRESETS
from kontext_jax.models.vae import VAE
from kontext_jax.objectives.autoencoder import PictureBatch, make_autoencoder
from kontext_jax.objectives.base import Objective
from kontext_jax.optimizer import make_optimizer, make_schedule
from kontext_jax.sharding import shard_batch
from kontext_jax.train_config import TrainConfig
from kontext_jax.train_state import TrainState, make_train_state
from kontext_jax.training_tasks import DTYPES, Devices, OpenWeights, Work
from kontext_jax.types import Params


class AutoencoderTask:
    """Trains the preset's autoencoder to reconstruct the targets of the data; references unused."""

    objective: Objective
    sources: list[str]

    def __init__(self, config: TrainConfig, open_weights: OpenWeights):
        self._config = config
        start = open_weights(config.weights) if config.weights else None
        self._start = start
        vae_config = PRESETS[config.preset].vae if start is None else start.components["vae"].config
        self.vae = vae = VAE(vae_config, DTYPES[config.dtype])
        self.sources = [f"autoencoder: {start.source if start else 'drawn afresh'}"]
        self._optimizer = make_optimizer(config.optimizer, config.num_steps)
        side = 2 * vae_config.downsampling

        def moments(params, image):
            return vae.apply({"params": params}, image, method="moments")

        def decode(params, z):
            latents_of_z = vae_config.latent_scale * (z - vae_config.latent_shift)
            return vae.apply({"params": params}, latents_of_z, method="decode")

        self.objective = make_autoencoder(
            moments,
            decode,
            lambda key: vae.init(key, jnp.zeros((1, side, side, 3)))["params"],
            self._optimizer,
            config.autoencoder,
            ema_decay=config.ema_decay,
            accumulate_steps=config.accumulate_steps,
            learning_rate=make_schedule(config.optimizer, config.num_steps),
        )

    def load_params(self, place: Place) -> Params | None:
        if self._start is None:
            return None
        return self._start.components["vae"].load(dtype=jnp.float32, device=place)

    def start(self, params: Params) -> TrainState:
        return make_train_state(params, self._optimizer, with_ema=self._config.ema_decay > 0)

    def frozen_shapes(self) -> Any:
        return {}

    def load_frozen(self, place: Place) -> Any:
        return {}

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

        args = params, given.image
        program = self._devices.programs.get(
            "sample", make, *args, out_shardings=lambda _: self._devices.everywhere
        )
        shown = program(*args)
        return [np.asarray(given.image, np.float32), np.asarray(shown, np.float32)]
