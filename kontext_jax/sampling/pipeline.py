"""Weights on disk → object that edits images.

    prompts  → T5, CLIP        → txt, vec    once for each prompt
    pictures → resize → VAE    → ctx         once for each picture and size
    noise    → sampler's steps → latents     several requests of one shape in a batch
    latents  → VAE             → pixels      one picture at a time

Requests of one shape share batches. A further turn of a request takes the final latents of the turn
before as its reference, without passing through pixels.
"""

import dataclasses
import os
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from kontext_jax.flow.samplers import initial_noise
from kontext_jax.models.presets import Preset
from kontext_jax.pictures import files as images
from kontext_jax.pictures import latents
from kontext_jax.runtime.placement import format_mesh
from kontext_jax.runtime.programs import Executables, Timings
from kontext_jax.runtime.versions import VERSION
from kontext_jax.runtime.versions import versions as versions_of
from kontext_jax.sampling.denoising import Denoising
from kontext_jax.sampling.requests import PreparedRequest, request_to_dict
from kontext_jax.sampling.stages import OnStep, Stages
from kontext_jax.sampling.tiling import Tiling
from kontext_jax.terminal import Tell
from kontext_jax.types import Array, Float, UInt8
from kontext_jax.weights.bundle import ModelBundle

METADATA_FORMAT = 1
TOKENS_PER_BATCH = 8192  # a batch is filled up to this: one edit of a megapixel, several small ones
MAX_BATCH = 8


@dataclasses.dataclass(frozen=True)
class Result:
    """One picture of one turn.

    Attributes:
      image_index: number of the picture among the request's `num_images`.
      turn: 0 for the prompt; then the prompts of `then`.
      pixels: picture, uint8.
      latents: picture before it was decoded, in the sampler's dtype: a further turn's reference.
      metadata: all that the picture depends on, for JSON.
    """

    request_index: int
    image_index: int
    turn: int
    pixels: UInt8[np.ndarray, "height width 3"]
    latents: Float[np.ndarray, "latent_height latent_width Z"]
    metadata: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Failure:
    """A request that could not be computed."""

    request_index: int
    error: Exception


@dataclasses.dataclass(frozen=True)
class Place:
    """Row of a batch: a picture is the same bit for bit only if it is made at the same place."""

    batch_size: int
    row: int


@dataclasses.dataclass(frozen=True)
class _Item:
    """One row of a batch."""

    request_index: int
    image_index: int
    prepared: PreparedRequest


class Pipeline:
    """Edits pictures: weights of one bundle, and batches of requests through its stages.

    Args:
      bundle, dtype, tiling, mesh, programs_dir, tell, executables, compile_only: see `Stages`.
      keep_text_encoders: False frees T5 and CLIP once all prompts are encoded, before the
        transformer is read.

    Attributes:
      stages: the stages of an edit, for callers that go their own way through them.

    Raises:
      ValueError: there is no such dtype.
    """

    def __init__(
        self,
        bundle: ModelBundle,
        *,
        dtype: str | None = None,
        tiling: Tiling = "auto",
        mesh: Mesh | None = None,
        programs_dir: str | os.PathLike | None = None,
        keep_text_encoders: bool = True,
        tell: Tell = lambda line: None,
        executables: Executables | None = None,
        compile_only: bool = False,
    ):
        self.stages = Stages(
            bundle,
            dtype=dtype,
            tiling=tiling,
            mesh=mesh,
            programs_dir=programs_dir,
            tell=tell,
            executables=executables,
            compile_only=compile_only,
        )
        self._keep_text_encoders, self._tell = keep_text_encoders, tell

    @property
    def preset(self) -> Preset:
        return self.stages.preset

    @property
    def dtype(self) -> str:
        """Compute dtype of the text encoders and the transformer."""
        return self.stages.dtype

    @property
    def timings(self) -> Timings:
        return self.stages.timings

    def edit(
        self,
        requests: Sequence[PreparedRequest],
        *,
        place: Place | None = None,
        on_step: OnStep | None = None,
    ) -> Iterator[Result | Failure]:
        """Makes all pictures of all requests; requests of one shape share batches.

        Results come as they are made, not in the order of the requests. A request that fails does
        not stop the others.

        Args:
          place: make every picture at this place of its batch, the other rows being copies.
          on_step: called after every step of a batch.
        """
        texts = self._encode_texts(requests)
        for rows, places in self._batches(requests, place):
            yielded = False
            try:
                for result in self._edit_batch(rows, places, texts, on_step):
                    yielded = True
                    yield result
            except Exception as error:  # whoever takes the results decides what to do with it
                wanted = [rows[p.row] for p in places]
                if yielded or len(wanted) == 1:
                    for index in sorted({item.request_index for item in wanted}):
                        yield Failure(index, error)
                    continue
                # Memory may suffice for one row, and one bad row must not spoil the others.
                least = self.stages.placement.num_batch_parts
                for item in wanted:
                    try:
                        yield from self._edit_batch(
                            [item] * least, [Place(least, 0)], texts, on_step
                        )
                    except Exception as error:
                        yield Failure(item.request_index, error)

    def _batches(self, requests, place) -> Iterator[tuple[list[_Item], list[Place]]]:
        """Rows of each batch, and the places at which something is wanted."""
        groups: dict[Any, list[_Item]] = {}
        for index, prepared in enumerate(requests):
            for i in range(prepared.request.num_images):
                item = _Item(index, i, prepared)
                groups.setdefault(_batch_key(prepared), []).append(item)
        for items in groups.values():
            if place is not None:
                for item in items:
                    yield [item] * place.batch_size, [place]
                continue
            parts = self.stages.placement.num_batch_parts
            most = self._largest_batch(items[0].prepared) * parts
            num_batches = -(-len(items) // most)
            size = -(-len(items) // (num_batches * parts)) * parts
            if len(items) < parts:
                self._tell(
                    f"the mesh {format_mesh(self.stages.placement.sizes)} splits a batch in "
                    f"{parts}, of which {parts - len(items)} hold copies; context or tensor "
                    "spreads one picture over all devices"
                )
            for start in range(0, len(items), size):
                rows = items[start : start + size]
                wanted = [Place(size, row) for row in range(len(rows))]
                yield rows + [rows[-1]] * (size - len(rows)), wanted

    def _largest_batch(self, prepared: PreparedRequest) -> int:
        sizes = [prepared.sizes.output, *(fit.size for fit in prepared.sizes.references)]
        tokens = self.preset.max_text_tokens + sum(latents.num_tokens(*size) for size in sizes)
        return max(1, min(MAX_BATCH, TOKENS_PER_BATCH // tokens))

    def _edit_batch(self, rows, places, texts, on_step) -> Iterator[Result]:
        first = rows[0].prepared
        numerics = first.numerics
        references = self._encode_references(rows)
        for turn in range(1 + len(first.request.then)):
            given = self._denoising(rows, turn, texts, references)
            final = self.stages.denoise(given, on_step)
            for place, image in self._decode_places(final, places, numerics):
                item = rows[place.row]
                pixels = self.picture(item.prepared, image)
                metadata = self._metadata(item, turn, place)
                yield Result(
                    item.request_index,
                    item.image_index,
                    turn,
                    pixels,
                    np.asarray(final)[place.row],
                    metadata,
                )
            references = [final]

    def denoising(self, prepared: PreparedRequest) -> Denoising:
        """What the first turn of a request's first picture is sampled from, a batch of one."""
        rows = [_Item(0, 0, prepared)]
        return self._denoising(
            rows, 0, self._encode_texts([prepared]), self._encode_references(rows)
        )

    def picture(
        self,
        prepared: PreparedRequest,
        image: Float[np.ndarray, "height width 3"],
    ) -> UInt8[np.ndarray, "written_height written_width 3"]:
        """Pixels of a decoded picture, at the size that the request asks for."""
        pixels = latents.model_to_pixels(image, prepared.numerics.uint8_rule)
        if restore := prepared.sizes.restore:
            pixels = images.resize(pixels, *restore.size, box=restore.box)
        return pixels

    def _denoising(self, rows, turn, texts, references) -> Denoising:
        """What one turn of a batch is sampled from."""
        first = rows[0].prepared
        width_px, height_px = first.sizes.output
        in_float32 = first.numerics.euler_dtype == "float32"
        seeds = [_seed(row.prepared, row.image_index, turn) for row in rows]
        cell_px = self.preset.vae.downsampling
        noise = [
            initial_noise(
                [seed],
                height_px // cell_px,
                width_px // cell_px,
                self.preset.vae.z_channels,
                jnp.float32 if in_float32 else self.stages.compute_dtype,
            )
            for seed in seeds
        ]
        text = [texts[_prompts(row.prepared)[turn], first.request.text_mask] for row in rows]
        negative = [
            texts[row.prepared.request.negative_prompt, first.request.text_mask]
            for row in rows
            if row.prepared.request.negative_prompt is not None
        ]
        return Denoising(
            jnp.concatenate(noise),
            _stacked(text),
            first.request.num_steps,
            sampler=first.request.sampler,
            timesteps=first.request.timesteps,
            seeds=seeds,
            guidance=_column(row.prepared.request.guidance for row in rows),
            references=references,
            negative=_stacked(negative) if negative else None,
            true_cfg_scale=_column(row.prepared.request.true_cfg_scale for row in rows),
            numerics=first.numerics,
            position_rule=first.request.position_rule,
        )

    def _encode_references(self, rows) -> list[jax.Array]:
        """Latents of each reference, the rows' in a batch."""
        return [
            jnp.concatenate([self.encode_reference(row.prepared, i) for row in rows])
            for i in range(len(rows[0].prepared.pictures))
        ]

    def _decode_places(self, final, places, numerics) -> Iterator[tuple[Place, np.ndarray]]:
        """The wanted pictures, as many at a time as devices share a batch."""
        parts = self.stages.placement.num_batch_parts
        rows_of_part = final.shape[0] // parts
        for i in range(rows_of_part):
            wanted = [place for place in places if place.row % rows_of_part == i]
            if wanted:
                decoded = self.stages.decode(final[i::rows_of_part], numerics)
                yield from ((place, decoded[place.row // rows_of_part]) for place in wanted)

    def _metadata(self, item: _Item, turn: int, place: Place) -> dict[str, Any]:
        """All that this picture depends on. Its request makes this one picture, as last turn."""
        prepared = item.prepared
        request = dataclasses.replace(
            prepared.request,
            num_images=1,
            seed=prepared.request.seed + item.image_index,
            then=prepared.request.then[:turn],
        )
        return {
            "format": METADATA_FORMAT,
            "request": request_to_dict(request),
            "images": [
                {"name": p.name, "sha256": p.sha256, "size": [p.width_px, p.height_px]}
                for p in prepared.pictures
            ],
            "sizes": {
                "references": [list(fit.size) for fit in prepared.sizes.references],
                "output": list(prepared.sizes.output),
                "written": list(prepared.sizes.written),
            },
            "place": dataclasses.asdict(place),
            "model": self.preset.name,
            "weights": self.stages.bundle.identity,
            "loras": [dataclasses.asdict(lora) for lora in self.stages.bundle.adapters],
            "dtype": self.dtype,
            "tiling": self.stages.tiling,
            "mesh": self.stages.placement.sizes,
            "device": jax.devices()[0].device_kind,
            "versions": versions(),
        }

    def _encode_texts(self, requests) -> dict[tuple[str, bool], tuple[jax.Array, jax.Array]]:
        """Features of every prompt, by (prompt, text_mask)."""
        wanted: dict[tuple[str, bool], None] = {}
        for prepared in requests:
            request = prepared.request
            prompts = [*_prompts(prepared)]
            if request.negative_prompt is not None:
                prompts.append(request.negative_prompt)
            wanted |= dict.fromkeys((prompt, request.text_mask) for prompt in prompts)
        features = {
            (prompt, mask): self.stages.encode_text(prompt, mask) for prompt, mask in wanted
        }
        if not self._keep_text_encoders:
            self.stages.networks.drop("t5", "clip")
        return features

    def encode_reference(
        self, prepared: PreparedRequest, index: int
    ) -> Float[Array, "1 latent_height latent_width Z"]:
        """Latents of a request's reference, at the size that its plan gives it."""
        fit = prepared.sizes.references[index]
        pixels = images.resize(prepared.pictures[index].pixels, *fit.size, box=fit.box)
        return self.stages.encode_picture(pixels, prepared.numerics)


def _prompts(prepared: PreparedRequest) -> tuple[str, ...]:
    """One prompt a turn."""
    return prepared.request.prompt, *prepared.request.then


def _seed(prepared: PreparedRequest, image_index: int, turn: int) -> int:
    """Each turn draws noise of its own, from the upper half of the seed's 64 bits."""
    return prepared.request.seed + image_index + (turn << 32)


def _batch_key(prepared: PreparedRequest):
    """What requests must share to be rows of one batch."""
    request = prepared.request
    return (
        prepared.sizes.output,
        tuple(fit.size for fit in prepared.sizes.references),
        request.num_steps,
        request.sampler,
        request.timesteps,
        request.numerics,
        request.position_rule,
        request.text_mask,
        request.negative_prompt is not None,
        len(request.then),
    )


def _stacked(features: Sequence[tuple[jax.Array, jax.Array]]) -> tuple[jax.Array, jax.Array]:
    txt, vec = zip(*features, strict=True)
    return jnp.concatenate(txt), jnp.concatenate(vec)


def _column(values) -> np.ndarray | None:
    """Float32 [B], or None if the values are."""
    values = list(values)
    return None if None in values else np.array(values, np.float32)


def versions() -> dict[str, str]:
    """Versions of everything that a picture's bits may depend on."""
    return {"kontext_jax": VERSION} | versions_of(("jax", "jaxlib", "flax"))
