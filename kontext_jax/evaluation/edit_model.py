"""Pictures for an evaluation: whole lists of edits through the stages of a model."""

from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Array, Float, UInt8

from kontext_jax.flow.names import Sampler
from kontext_jax.flow.samplers import initial_noise
from kontext_jax.pictures.latents import model_to_pixels
from kontext_jax.pictures.sizes import Size
from kontext_jax.sampling.denoising import Denoising
from kontext_jax.sampling.stages import Stages

BATCH = 50


class Model:
    """Edits whole lists of pictures of one size by the stages of a model.

    Args:
      stages: stages of the model.
      num_steps: steps of the sampler.
      timesteps: start of each step, falling from 1; None for the model's even or shifted grid.
      guidance: what networks that take it are given; others ignore it.
    """

    def __init__(
        self,
        stages: Stages,
        num_steps: int,
        sampler: Sampler = "euler",
        timesteps: Sequence[float] | None = None,
        guidance: float = 1.0,
    ):
        self.stages, self.num_steps = stages, num_steps
        self.sampler, self.timesteps, self.guidance = sampler, timesteps, guidance
        self._texts: dict[str, tuple] = {}

    def _text(self, prompts: Sequence[str]) -> tuple:
        """txt, vec of some prompts, each encoded once."""
        for prompt in prompts:
            if prompt not in self._texts:
                self._texts[prompt] = self.stages.encode_text(prompt)
        txt, vec = zip(*(self._texts[prompt] for prompt in prompts), strict=True)
        return np.concatenate(txt), np.concatenate(vec)

    def encode(
        self, pictures: Sequence[UInt8[np.ndarray, "height width 3"]]
    ) -> Float[np.ndarray, "pictures latent_height latent_width Z"]:
        """Latents [N, h/8, w/8, Z] of pictures uint8 [h, w, 3]."""
        return np.concatenate([self.stages.encode_picture(picture) for picture in pictures])

    def decode(
        self, latents: Float[np.ndarray, "pictures latent_height latent_width Z"]
    ) -> list[UInt8[np.ndarray, "height width 3"]]:
        """Inverse of `encode`, as far as the autoencoder goes."""

        def run(part: Sequence[np.ndarray]) -> list[np.ndarray]:
            decoded = self.stages.decode(np.stack(part))
            return [model_to_pixels(picture, "round") for picture in decoded]

        return _in_batches(run, list(latents))

    def reconstruct(
        self, pictures: Sequence[UInt8[np.ndarray, "height width 3"]]
    ) -> list[UInt8[np.ndarray, "height width 3"]]:
        """Pictures through the autoencoder and back."""
        return self.decode(self.encode(pictures))

    def make(
        self,
        prompts: Sequence[str],
        sources: Sequence[UInt8[np.ndarray, "height width 3"]] | None,
        size: Size,
        cfg: float,
        seed: int,
    ) -> list[UInt8[np.ndarray, "height width 3"]]:
        """Pictures from prompts and, unless None, one reference each.

        Args:
          size: (width, height) of all pictures, in pixels.
          cfg: scale of guidance away from the empty prompt, with the reference; 1: none.
          seed: seed of the noise; picture i gets seed + i.
        """
        references = None if sources is None else self.encode(sources)
        return self.decode(self.draw(prompts, references, size, cfg, seed))

    def draw(
        self,
        prompts: Sequence[str],
        references: Float[np.ndarray, "pictures latent_height latent_width Z"] | None,
        size: Size,
        cfg: float,
        seed: int,
    ) -> Float[np.ndarray, "pictures latent_height latent_width Z"]:
        """As `make`, from latents [N, h/8, w/8, Z] of the references to those of the results."""
        preset = self.stages.preset
        columns, rows = (side // preset.vae.downsampling for side in size)

        def run(indices: Sequence[int]) -> list[np.ndarray]:
            seeds = [seed + i for i in indices]
            noise = initial_noise(seeds, rows, columns, preset.vae.z_channels)
            given = [] if references is None else [references[list(indices)]]
            return list(
                np.asarray(self._denoise([prompts[i] for i in indices], given, noise, seeds, cfg))
            )

        return np.stack(_in_batches(run, range(len(prompts))))

    def _denoise(
        self,
        prompts: Sequence[str],
        references: list[np.ndarray],
        noise: Float[Array, "B latent_height latent_width Z"],
        seeds: Sequence[int],
        cfg: float,
    ) -> Float[Array, "B latent_height latent_width Z"]:
        """Latents of pictures from prompts, encoded references, and noise drawn by the seeds."""
        count = len(prompts)
        negative = scale = None
        if cfg != 1:
            negative = self._text([""] * count)
            scale = np.full(count, cfg, np.float32)
        takes_guidance = self.stages.preset.mmdit.guidance_embed
        given = Denoising(
            noise,
            self._text(prompts),
            self.num_steps,
            sampler=self.sampler,
            timesteps=self.timesteps,
            seeds=seeds,
            guidance=np.full(count, self.guidance, np.float32) if takes_guidance else None,
            references=references,
            negative=negative,
            true_cfg_scale=scale,
        )
        return self.stages.denoise(given)


def _in_batches(run: Callable, items: Sequence) -> list[np.ndarray]:
    """Runs batches of one size, the last filled up with its first item: nothing recompiles."""
    results, size = [], min(BATCH, len(items))
    for start in range(0, len(items), size):
        part = list(items[start : start + size])
        results += run(part + part[:1] * (size - len(part)))[: len(part)]
    return results
