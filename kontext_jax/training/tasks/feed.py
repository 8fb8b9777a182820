"""What feeds tasks of the transformer: frozen encoders in front, samples behind."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kontext_jax.batches import Conditioning, EncodedBatch, ImageBatch, TokenBatch
from kontext_jax.flow.path import sampling_schedule
from kontext_jax.flow.samplers import initial_noise, make_sampler, seed_words
from kontext_jax.models import conditioning
from kontext_jax.models.conditioning import encode_batch, tokens_of
from kontext_jax.models.presets import Preset
from kontext_jax.models.tokenizing import Tokenizers
from kontext_jax.objectives.base import num_samples
from kontext_jax.pictures import latents
from kontext_jax.runtime.sharding import batch_shardings, shard_batch
from kontext_jax.training.tasks.base import Devices, NullText, Pictures
from kontext_jax.types import Params, VelocityFn
from kontext_jax.weights.bundle import ModelBundle
from kontext_jax.weights.encoders import load_encoder_params


class Samples(NamedTuple):
    """How pictures are drawn from what is trained.

    Attributes:
      velocity_fn: (params, frozen, conditioning) → the network as a function of tokens and time.
      num_steps: sampling steps.
      guidance: guidance input, for a network that takes one.
      seed: seed of the first picture's noise; each next picture has the next number.
    """

    velocity_fn: Callable[[Params, Any, Conditioning], VelocityFn]
    num_steps: int
    guidance: float
    seed: int


class TokenFeed:
    """Encodes pictures and prompts by frozen networks, and samples from what is trained.

    Args:
      preset: sizes of the networks, and sampling defaults of the trained one.
      encoders: the frozen networks on disk; read here, as far as they are needed.
      dtype: compute dtype of the encoders.
      null_text: features of the empty prompt, where the examples come encoded; None to encode it.
      samples: None if `sample` is never called.
    """

    def __init__(
        self,
        preset: Preset,
        encoders: ModelBundle,
        dtype: jax.typing.DTypeLike,
        devices: Devices,
        null_text: NullText | None,
        samples: Samples | None,
    ):
        self._preset, self._devices, self._samples = preset, devices, samples
        self._networks = conditioning.make_encoders(preset, dtype)
        null: Any = null_text
        if null_text is None:
            self._tokenizers = Tokenizers(**encoders.tokenizer_dirs)
            self._tokenizers.check_fit(preset.t5, preset.clip)
            self._params = load_encoder_params(encoders, dtype, devices.place)
            null = conditioning.null_text(
                self._networks, self._params, self._tokenizers, preset.max_text_tokens
            )
        elif samples is not None:
            vae = encoders.components["vae"]
            self._params = {"vae": vae.load(dtype=jnp.float32, device=devices.place)}
        everywhere = devices.everywhere
        self._null = jax.jit(lambda x: x, out_shardings=everywhere)(null)

    def __call__(self, batch: ImageBatch | EncodedBatch) -> TokenBatch:
        return self._tokens(self._encode(batch))

    def _encode(self, batch: ImageBatch | EncodedBatch) -> EncodedBatch:
        """Jit 1: the frozen networks, on each device's share of the batch."""
        if isinstance(batch, EncodedBatch):
            return shard_batch(self._devices.mesh, batch)
        ids, _ = self._tokenizers.tokenize(batch.prompts, self._preset.max_text_tokens)
        given = shard_batch(self._devices.mesh, (batch.target, batch.contexts, ids))

        def make():
            return lambda params, target, contexts, ids: encode_batch(
                self._networks, params, target, contexts, ids
            )

        return self._run("encode", make, self._params, *given)

    def _tokens(self, encoded: EncodedBatch) -> TokenBatch:
        def make():
            return lambda encoded, null_txt, null_vec: tokens_of(
                encoded, null_txt, null_vec, self._preset.mmdit
            )

        return self._run("tokens", make, encoded, *self._null)

    def _run(self, name: Any, make: Callable[[], Callable], *args: Any) -> Any:
        """A program whose results are split as batches are."""

        def split(results):
            return batch_shardings(self._devices.mesh, results)

        return self._devices.run(name, make, *args, out_shardings=split)

    def sample(self, params: Params, frozen: Any, batch: Any) -> Pictures:
        """References as the autoencoder shows them, what the network makes, and the targets."""
        assert self._samples is not None, "the task makes no samples by its config"
        encoded = self._encode(batch)
        tokens = self._tokens(encoded)
        _, rows, columns, channels = encoded.x0.shape
        size = rows, columns
        preset, samples, count = self._preset, self._samples, num_samples(tokens)
        seeds = [samples.seed + i for i in range(count)]
        noise = latents.pack(initial_noise(seeds, rows, columns, channels))
        own = preset.timesteps_of(samples.num_steps)
        timesteps = sampling_schedule(
            samples.num_steps, noise.shape[1], preset.shift_timesteps, own
        )
        sampler = make_sampler(preset.default_sampler, seed_words(seeds))

        def make():
            def run(params, frozen, tokens, noise, timesteps):
                guidance = None
                if preset.mmdit.guidance_embed:
                    guidance = jnp.full(count, samples.guidance, jnp.float32)
                cond = conditioning.of_batch(tokens, guidance)
                velocity_fn = samples.velocity_fn(params, frozen, cond)
                return latents.unpack(sampler(velocity_fn, noise, timesteps), *size)

            return run

        args = (params, frozen, tokens, np.asarray(noise), timesteps)
        result = self._run(("sample", size), make, *args)
        shown = [*encoded.contexts[:1], result, encoded.x0]
        return [self._decode(column) for column in shown]

    def _decode(self, x: jax.Array) -> np.ndarray:
        def make():
            return lambda params, x: self._networks.vae.apply(
                {"params": params}, x.astype(jnp.float32), method="decode"
            ).astype(jnp.float32)

        where = self._devices.everywhere
        return np.asarray(
            self._devices.run("decode", make, self._params["vae"], x, out_shardings=where)
        )
