"""What tasks that train the transformer share: its weights, the frozen encoders, what feeds it."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from kontext_jax.batches import EncodedBatch, TokenBatch
from kontext_jax.models.conditioning import ENCODER_KINDS, tokens_of
from kontext_jax.models.mmdit import MMDiT
from kontext_jax.models.presets import PRESETS, MMDiTConfig, Preset
from kontext_jax.numerics import DIFFUSERS
from kontext_jax.objectives.base import Objective, num_samples
from kontext_jax.objectives.state import TrainState
from kontext_jax.ops.attention import Backend, backend_for
from kontext_jax.training.config import TrainConfig
from kontext_jax.training.optimizer import make_schedule
from kontext_jax.training.tasks.base import Devices, Frozen, NullText, Task, Work, peak_of_mesh
from kontext_jax.training.tasks.feed import Samples, TokenFeed
from kontext_jax.training.tasks.student import Student
from kontext_jax.types import DTYPES, Params
from kontext_jax.weights.bundle import Component, ModelBundle, OpenWeights
from kontext_jax.weights.encoders import encoder_facts
from kontext_jax.weights.grown import grown
from kontext_jax.weights.untrained import UNTRAINED, untrained_bundle

StepFlops = Callable[[int, int], float]
"""(text tokens, image tokens) of an example → operations of a training step on it."""


class Network(NamedTuple):
    """The transformer to be trained and the frozen encoders in front of it, all still on disk.

    Attributes:
      preset: the config's preset with the configs of the weights at hand.
      model: the transformer, computing in the config's dtype.
      bundle: the weights to start from; None where they are drawn.
      start: the transformer of `bundle`, with what the preset adds to it.
      encoders: the text encoders and the autoencoder.
      sources: one line for the transformer and, where pictures are encoded, one for the encoders.
    """

    preset: Preset
    model: MMDiT
    bundle: ModelBundle | None
    start: Component | None
    encoders: ModelBundle
    sources: tuple[str, ...]


def open_network(config: TrainConfig, open_weights: OpenWeights, *, grows: bool = False) -> Network:
    """Opens the weights that the config names; only their headers are read.

    Args:
      grows: allow start weights of a smaller network: one without the guidance input, or with one
        velocity per token instead of several. The missing part is initialised so that the output
        does not change.

    Raises:
      ValueError: the weights are not of the preset, or there are no encoders.
    """
    bundle = open_weights(config.weights) if config.weights else None
    encoders = _open_encoders(config, bundle, open_weights)
    preset = _fitting_preset(config, bundle, encoders, grows)
    model = MMDiT(
        preset.mmdit,
        dtype=DTYPES[config.dtype],
        attention_backend=_named_backend(config),
        remat=config.remat,
    )
    start, origin = None, "drawn afresh"
    if bundle is not None:
        start, additions = grown(bundle.components["mmdit"], preset.mmdit)
        origin = "; ".join([bundle.source, *additions])
    sources = [f"transformer: {origin}"]
    if not config.data.cache:
        sources.append(f"encoders: {encoders.source}")
    return Network(preset, model, bundle, start, encoders, tuple(sources))


def step_options(config: TrainConfig) -> dict[str, Any]:
    """Arguments of the config that the steps of all objectives take."""
    return {
        "ema_decay": config.ema_decay,
        "accumulate_steps": config.accumulate_steps,
        "learning_rate": make_schedule(config.optimizer, config.num_steps),
    }


def transformer_task(
    config: TrainConfig,
    network: Network,
    student: Student,
    objective: Objective,
    *,
    start: Callable[[Params], TrainState],
    frozen: Frozen,
    step_flops: StepFlops,
) -> Task:
    """A task on tokens from the network's encoders.

    Args:
      start: parameters → the state before the first step.
      frozen: the weights that the objective's step takes beside the state.
      step_flops: see `StepFlops`.
    """

    def data_facts() -> dict[str, Any]:
        if not (config.data.cache or config.eval.cache):
            return {}
        return encoder_facts(network.encoders, network.preset.max_text_tokens)

    def make_feed(devices: Devices, null_text: NullText | None) -> TokenFeed:
        samples = None
        if config.eval.sample_every_steps:
            samples = Samples(
                student.velocity_fn,
                config.eval.sample_num_steps or network.preset.steps(DIFFUSERS),
                config.eval.sample_guidance,
                config.seed,
            )
        dtype = DTYPES[config.dtype]
        return TokenFeed(network.preset, network.encoders, dtype, devices, null_text, samples)

    def abstract_batch(size: int, picture: tuple[int, int], num_references: int) -> TokenBatch:
        return abstract_tokens(network.preset, DTYPES[config.dtype], size, picture, num_references)

    def work(batch: TokenBatch) -> Work:
        num_text, num_image = batch.txt.shape[1], batch.x0.shape[1]
        if batch.ctx is not None:
            num_image += batch.ctx.shape[1]
        images = num_samples(batch)
        flops = step_flops(num_text, num_image)
        return Work(images, images * (num_text + num_image), images * flops)

    return Task(
        objective=objective,
        sources=network.sources,
        load_params=student.load,
        start=start,
        frozen_shapes=frozen.shapes,
        load_frozen=frozen.load,
        data_facts=data_facts,
        make_feed=make_feed,
        abstract_batch=abstract_batch,
        peak_flops=peak_of_mesh,
        work=work,
    )


def abstract_tokens(
    preset: Preset,
    dtype: jax.typing.DTypeLike,
    batch_size: int,
    size: tuple[int, int],
    num_references: int,
) -> TokenBatch:
    """Shapes of a batch of tokens.

    Args:
      size: (width, height) in pixels of the target and of each reference.
    """
    shape = jax.ShapeDtypeStruct
    columns, rows = (side // preset.vae.downsampling for side in size)
    picture = shape((batch_size, rows, columns, preset.vae.z_channels), dtype)
    text = ((preset.max_text_tokens, preset.mmdit.context_in_dim), (preset.mmdit.vec_in_dim,))
    encoded = EncodedBatch(
        x0=picture,
        contexts=(picture,) * num_references,
        txt=shape((batch_size, *text[0]), dtype),
        vec=shape((batch_size, *text[1]), dtype),
    )
    null_txt, null_vec = (shape(dims, dtype) for dims in text)

    def tokens(encoded: EncodedBatch, null_txt: jax.Array, null_vec: jax.Array) -> TokenBatch:
        return tokens_of(encoded, null_txt, null_vec, preset.mmdit)

    return jax.eval_shape(tokens, encoded, null_txt, null_vec)


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
      ValueError: nothing names them, or something is missing there.
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
    missing = [kind for kind in ENCODER_KINDS if kind not in bundle.components]
    if missing:
        raise ValueError(
            f"{bundle.source} has no {', '.join(missing)}; set encoders to weights that have"
        )
    return bundle


def _fitting_preset(
    config: TrainConfig, start: ModelBundle | None, encoders: ModelBundle, grows: bool
) -> Preset:
    """The preset with the configs of the weights at hand.

    Raises:
      ValueError: the transformer of the weights is not the preset's.
    """
    preset = PRESETS[config.preset]
    if start is not None:
        found = start.components["mmdit"].config
        assert isinstance(found, MMDiTConfig)
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
    configs: dict[str, Any] = {kind: encoders.components[kind].config for kind in ENCODER_KINDS}
    return dataclasses.replace(preset, **configs)
