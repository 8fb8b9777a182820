"""What tasks that train the transformer share: its weights, the frozen encoders, what feeds it."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from kontext_jax.batches import Conditioning, EncodedBatch, TokenBatch
from kontext_jax.models import conditioning
from kontext_jax.models.conditioning import tokens_of
from kontext_jax.models.flops import Flops, mmdit_flops
from kontext_jax.models.mmdit import MMDiT, init_params, make_velocity_fn
from kontext_jax.models.presets import PRESETS, Preset
from kontext_jax.objectives.base import Objective, num_samples
from kontext_jax.objectives.state import TrainState, make_train_state
from kontext_jax.ops.attention import Backend, backend_for
from kontext_jax.runtime.chips import peak_flops
from kontext_jax.training.config import TrainConfig
from kontext_jax.training.optimizer import make_optimizer, make_schedule
from kontext_jax.training.tasks.base import DTYPES, Devices, OpenWeights, Work
from kontext_jax.training.tasks.feed import TokenFeed
from kontext_jax.types import Params, VelocityFn
from kontext_jax.weights.bundle import Component, ModelBundle, Place
from kontext_jax.weights.encoders import encoder_facts
from kontext_jax.weights.grown import with_guidance_input, with_velocities
from kontext_jax.weights.untrained import untrained_bundle

UNTRAINED = "untrained"  # in place of a path to the encoders


class TransformerTask:
    """Trains the transformer on tokens from frozen encoders; a subclass sets `objective`.

    Args:
      grows: whether the network may start from one that it is more than: that takes no guidance,
        or gives one velocity a token and not several. What is added at first changes nothing.
    """

    objective: Objective
    sources: list[str]

    def __init__(self, config: TrainConfig, open_weights: OpenWeights, *, grows: bool = False):
        self._config = config
        start = open_weights(config.weights) if config.weights else None
        self._start = start
        self._encoders = _open_encoders(config, start, open_weights)
        self._preset = _fitting_preset(config, start, self._encoders, grows)
        self._dtype = DTYPES[config.dtype]
        self._backend = _named_backend(config)
        self._model = MMDiT(
            self._preset.mmdit,
            dtype=self._dtype,
            attention_backend=self._backend,
            remat=config.remat,
        )
        origin = start.source if start else "drawn afresh"
        self._adds_guidance, self._times_velocities = False, 1
        if start is not None:
            ours, theirs = self._preset.mmdit, _transformer(start).config
            self._adds_guidance = ours.guidance_embed and not theirs.guidance_embed
            self._times_velocities = ours.out_channels // theirs.out_channels
        if self._adds_guidance:
            origin += "; an input for guidance added, its output zero"
        if self._times_velocities > 1:
            origin += f"; its last layer repeated for {self._times_velocities} velocities"
        self.sources = [f"transformer: {origin}"]
        if not config.data.cache:
            self.sources.append(f"encoders: {self._encoders.source}")
        self._optimizer = make_optimizer(config.optimizer, config.num_steps)

    def _step_options(self) -> dict[str, Any]:
        """What every objective's step takes of the config."""
        return {
            "ema_decay": self._config.ema_decay,
            "accumulate_steps": self._config.accumulate_steps,
            "learning_rate": make_schedule(self._config.optimizer, self._config.num_steps),
        }

    def _init_trained(self, key: jax.Array) -> Params:
        return init_params(self._model, key)

    def _velocity_fn(self, params: Params, frozen: Any, cond: Conditioning) -> VelocityFn:
        return make_velocity_fn(self._model, params, cond)

    def _predict(self, params, frozen, x_t, t, batch: TokenBatch, guidance) -> jax.Array:
        """`objectives.flow_matching.Predict` of what is trained."""
        cond = conditioning.of_batch(batch, guidance)
        return self._velocity_fn(params, frozen, cond)(x_t, t, None)

    def load_params(self, place: Place) -> Params | None:
        if self._start is None:
            return None
        mmdit = _transformer(self._start)
        if self._adds_guidance:
            mmdit = with_guidance_input(mmdit)
        if self._times_velocities > 1:
            mmdit = with_velocities(mmdit, self._times_velocities)
        return mmdit.load(dtype=jnp.float32, device=place)

    def start(self, params: Params) -> TrainState:
        return make_train_state(params, self._optimizer, with_ema=self._config.ema_decay > 0)

    def frozen_shapes(self) -> Any:
        return {}

    def load_frozen(self, place: Place) -> Any:
        return {}

    def data_facts(self) -> dict[str, Any]:
        if not (self._config.data.cache or self._config.eval.cache):
            return {}
        return encoder_facts(self._encoders, self._preset.max_text_tokens)

    def make_feed(self, devices: Devices, null_text) -> "TokenFeed":
        return TokenFeed(self, devices, null_text)

    def abstract_batch(
        self, batch_size: int, size: tuple[int, int], num_references: int
    ) -> TokenBatch:
        preset, shape = self._preset, jax.ShapeDtypeStruct
        columns, rows = (side // preset.vae.downsampling for side in size)
        picture = shape((batch_size, rows, columns, preset.vae.z_channels), self._dtype)
        text = ((preset.max_text_tokens, preset.mmdit.context_in_dim), (preset.mmdit.vec_in_dim,))
        encoded = EncodedBatch(
            x0=picture,
            contexts=(picture,) * num_references,
            txt=shape((batch_size, *text[0]), self._dtype),
            vec=shape((batch_size, *text[1]), self._dtype),
        )
        null = [shape(dims, self._dtype) for dims in text]
        return jax.eval_shape(
            lambda encoded, null: tokens_of(encoded, *null, preset.mmdit), encoded, null
        )

    def peak_flops(self, mesh: Mesh) -> float | None:
        peak = peak_flops(mesh.devices.flat[0].device_kind)
        return None if peak is None else peak * mesh.size

    def work(self, batch: TokenBatch) -> Work:
        images, tokens, forward = self._forward(batch)
        return Work(images, images * tokens, images * forward.training())

    def _forward(self, batch: TokenBatch) -> tuple[int, int, Flops]:
        """Examples of a batch, and tokens and operations of one of them."""
        num_text, num_image = batch.txt.shape[1], batch.x0.shape[1]
        if batch.ctx is not None:
            num_image += batch.ctx.shape[1]
        flops = mmdit_flops(self._preset.mmdit, num_text, num_image)
        return num_samples(batch), num_text + num_image, flops


def _named_backend(config: TrainConfig) -> Backend:
    """The backend that "auto" means here: else every platform's would be differentiated."""
    if config.attention_backend != "auto":
        return config.attention_backend
    platform = jax.default_backend()
    return backend_for(platform, config.model.mmdit.head_dim, DTYPES[config.dtype])


def _open_encoders(
    config: TrainConfig, start: ModelBundle | None, open_weights: OpenWeights
) -> ModelBundle:
    """Where the frozen text encoders and the autoencoder come from.

    Raises:
      ValueError: nowhere, or something is missing there.
    """
    if config.encoders == UNTRAINED:
        bundle = untrained_bundle(config.preset)
    elif config.encoders:
        bundle = open_weights(config.encoders)
    elif start is not None:
        bundle = start
    else:
        raise ValueError(
            "there are no text encoders and no autoencoder, since weights is empty; set encoders "
            f"to a weight directory, or to {UNTRAINED!r} to try things out"
        )
    if config.autoencoder_weights:
        other = open_weights(config.autoencoder_weights)
        bundle = dataclasses.replace(
            bundle,
            components=bundle.components | {"vae": other.components["vae"]},
            source=f"{bundle.source}; autoencoder: {other.source}",
        )
    missing = [k for k in conditioning.ENCODER_KINDS if k not in bundle.components]
    if missing:
        raise ValueError(
            f"{bundle.source} has no {', '.join(missing)}; set encoders to weights that have"
        )
    return bundle


def _transformer(bundle: ModelBundle) -> Component:
    return bundle.components["mmdit"]


def _fitting_preset(
    config: TrainConfig, start: ModelBundle | None, encoders: ModelBundle, grows: bool
) -> Preset:
    """The preset with the configs of the weights at hand.

    Raises:
      ValueError: the transformer of the weights is not the preset's.
    """
    preset = PRESETS[config.preset]
    if start is not None:
        found = _transformer(start).config
        may_differ = set()
        if grows and not found.guidance_embed:
            may_differ.add("guidance_embed")
        if grows and preset.mmdit.out_channels % found.out_channels == 0:
            may_differ.add("out_channels")
        differing = [
            f"{f.name} {getattr(found, f.name)}, expected {getattr(preset.mmdit, f.name)}"
            for f in dataclasses.fields(found)
            if getattr(found, f.name) != getattr(preset.mmdit, f.name) and f.name not in may_differ
        ]
        if differing:
            raise ValueError(
                f"{config.weights} is no {config.preset}: {'; '.join(differing)}; set preset to "
                f"another of {', '.join(PRESETS)}"
            )
    configs = {kind: encoders.components[kind].config for kind in conditioning.ENCODER_KINDS}
    return dataclasses.replace(preset, **configs)
