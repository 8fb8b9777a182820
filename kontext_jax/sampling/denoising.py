"""What one batch of pictures is denoised from: as its callers have it, and as programs take it."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import UInt

from kontext_jax.batches import Conditioning
from kontext_jax.flow import path as flow
from kontext_jax.flow.names import Sampler
from kontext_jax.flow.samplers import make_sampler, seed_words
from kontext_jax.models import conditioning
from kontext_jax.models.presets import MMDiTConfig, Preset
from kontext_jax.numerics import EXACT, Numerics
from kontext_jax.pictures import latents
from kontext_jax.types import Array, Float

Text = tuple[Float[Array, "B T D"], Float[Array, "B V"]]
"""Features of prompts: those of T5, with the width of the transformer's text, and CLIP's pooled."""


@dataclasses.dataclass(frozen=True, eq=False)
class Denoising:
    """A batch of pictures to sample, all of one size and sampled alike.

    Attributes:
      noise: [B, h/8, w/8, Z], at time 1.
      text: features of the prompts.
      num_steps: number of steps of the sampler.
      sampler: name of the sampler.
      timesteps: times at which the steps begin; None for the model's even or shifted grid.
      seeds: B seeds that drew the noise. "renoise" draws more noise by them; "euler" needs none.
      guidance: guidance input, float32 [B]; None for a model that takes none.
      references: latents of each reference, [B, its h/8, its w/8, Z].
      negative: features of the prompts to guide away from; None for no such guidance.
      true_cfg_scale: scale of that guidance, float32 [B].
      numerics: reference implementation whose roundings are followed.
      position_rule: rule for the positions of several references.

    Raises:
      ValueError: there is no such sampler, or it lacks seeds.
    """

    noise: Float[Array, "B latent_height latent_width Z"]
    text: Text
    num_steps: int
    _: dataclasses.KW_ONLY
    sampler: Sampler = "euler"
    timesteps: Sequence[float] | None = None
    seeds: Sequence[int] | None = None
    guidance: Float[np.ndarray, " B"] | None = None
    references: Sequence[Float[Array, "B _ _ Z"]] = ()
    negative: Text | None = None
    true_cfg_scale: Float[np.ndarray, " B"] | None = None
    numerics: Numerics = EXACT
    position_rule: latents.PositionRule = "index"

    def __post_init__(self):
        make_sampler(self.sampler, self.seed_words)

    @property
    def seed_words(self) -> UInt[np.ndarray, "B 2"] | None:
        """Seeds for a sampler that draws noise, as `flow.samplers.seed_words` gives them."""
        if self.sampler != "renoise" or self.seeds is None:
            return None
        return seed_words(self.seeds)


class DenoiseArrays(NamedTuple):
    """What the programs of denoising take besides weights.

    Attributes:
      cond: text, references, guidance and positions.
      negative: see `Denoising`, like `true_cfg_scale`.
      seed_words: see `Denoising.seed_words`.
      x: noise as tokens [B, L, C].
      timesteps: [N+1], falling from 1 to 0.
    """

    cond: Conditioning
    negative: Text | None
    true_cfg_scale: Any
    seed_words: Any
    x: Any
    timesteps: Any


def denoise_arrays(
    given: Denoising, preset: Preset, config: MMDiTConfig, dtype: jax.typing.DTypeLike
) -> DenoiseArrays:
    """The arrays of a batch, not yet on their devices.

    Args:
      preset: decides the grid of times.
      dtype: compute dtype of the transformer.

    Raises:
      ValueError: text, references or guidance do not fit the transformer.
    """
    txt, vec = given.text
    _, latent_height, latent_width, _ = given.noise.shape
    cond = conditioning.make_conditioning(
        config,
        txt,
        vec,
        latent_height=latent_height,
        latent_width=latent_width,
        references=given.references,
        guidance=given.guidance,
        position_rule=given.position_rule,
        numerics=given.numerics,
        dtype=dtype,
    )
    x = latents.pack(given.noise)
    times = flow.sampling_schedule(
        given.num_steps, x.shape[1], preset.shift_timesteps, given.timesteps
    )
    return DenoiseArrays(cond, given.negative, given.true_cfg_scale, given.seed_words, x, times)
