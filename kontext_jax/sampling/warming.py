"""Compiling what requests will need, with shapes in place of weights and without computing.

`Pipeline` goes through each request as ever, on a blank picture; every program is compiled, and
kept on disk if the pipeline keeps programs, but zeros are what comes out of it.
"""

import dataclasses
import functools
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kontext_jax.models.mmdit import unstacked
from kontext_jax.models.parameter_sharding import place_on
from kontext_jax.models.presets import Preset
from kontext_jax.models.tokenizing import TextIds
from kontext_jax.models.vae import VAE
from kontext_jax.numerics import NUMERICS
from kontext_jax.pictures import latents
from kontext_jax.pictures.files import Picture
from kontext_jax.pictures.sizes import Size, plan_sizes
from kontext_jax.runtime import sharding
from kontext_jax.runtime.program_files import KeptProgram
from kontext_jax.sampling.pipeline import Failure, Pipeline
from kontext_jax.sampling.requests import PreparedRequest, SampleRequest, prepare_pictures
from kontext_jax.weights.bundle import parameter_shapes

TILES_LATER = "the autoencoder's programs for tiles are compiled when they first run"


class BlankTokenizers:
    """In place of tokenizers: ids of the shapes that they make."""

    def __init__(self, preset: Preset):
        self._t5 = np.zeros((1, preset.max_text_tokens), np.int32)
        self._clip = np.zeros((1, preset.clip.max_position_embeddings), np.int32)

    def tokenize(self, prompts: list[str], max_text_tokens: int) -> tuple[TextIds, list[str]]:
        return TextIds(t5=self._t5, clip=self._clip, t5_mask=np.ones_like(self._t5, bool)), []


class WarmingPipeline(Pipeline):
    """Takes what `Pipeline` takes; compiles, and computes nothing."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._tokenizers = BlankTokenizers(self.preset)
        self.num_programs = 0

    def compile_for(self, prepared: PreparedRequest) -> int:
        """Compiles all programs of a request; how many there were besides those already made.

        Raises:
          Exception: whatever stopped it.
        """
        before = self.num_programs
        self._params.clear()  # which a fresh start lacks too; what is loaded decides on tiles
        for result in self.edit([prepared]):
            if isinstance(result, Failure):
                raise result.error
        return self.num_programs - before

    def _load(self, kind: str) -> Any:
        if kind not in self._params:
            shapes = parameter_shapes(kind, self.bundle.components[kind].config)
            if kind == "mmdit" and self._block_form == "list":
                shapes = jax.eval_shape(unstacked, shapes)
            dtype = jnp.float32 if kind == "vae" else self._compute_dtype
            mesh = self._placement.mesh
            place = None if mesh is None else place_on(mesh)

            def shape(path, x):
                where = place and place(sharding.path_name(path), x.shape)
                return jax.ShapeDtypeStruct(x.shape, dtype, sharding=where)

            self._params[kind] = jax.tree.map_with_path(shape, shapes)
        return self._params[kind]

    def _compile(self, key, make, *args, batch_axis: int | None = None, **options):
        known = len(self._executables)
        program = super()._compile(key, make, *args, batch_axis=batch_axis, **options)
        self.num_programs += len(self._executables) - known
        where = self._placement.split(batch_axis)
        if isinstance(program, KeptProgram):
            where = program.device

        def zeros(*args):
            return jax.tree.map(
                lambda x: jax.device_put(np.zeros(x.shape, x.dtype), where), program.out_info
            )

        return zeros

    def _encode_tiled(self, vae: VAE, image: jax.Array, tile_px: int) -> jax.Array:
        self._tell(f"{TILES_LATER}: encoding, tiles of {tile_px} pixels")
        batch, *sides, _ = image.shape
        height, width = (side // vae.downsampling for side in sides)
        return jnp.zeros((batch, height, width, vae.config.z_channels))

    def _decode_tiled(self, vae: VAE, x: jax.Array, tile_px: int) -> np.ndarray:
        self._tell(f"{TILES_LATER}: decoding, tiles of {tile_px} pixels")
        batch, *sides, _ = x.shape
        height, width = (side * vae.downsampling for side in sides)
        return np.zeros((batch, height, width, vae.config.out_channels), np.float32)

    def _bytes_in_use(self, stats: dict[str, int]) -> int:
        leaves = jax.tree.leaves(self._params)
        return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)

    def _finite(self, x, what: str):
        return x


def blank_requests(
    request: SampleRequest, preset: Preset, num_references: int
) -> Iterator[PreparedRequest]:
    """The request on blank pictures: for its own size, or for each of the 17 preferred sizes.

    Args:
      request: has no images.

    Raises:
      ValueError: see `requests.prepare_pictures`.
    """
    plan = functools.partial(
        plan_sizes,
        numerics=NUMERICS[request.numerics],
        preset_megapixels=preset.megapixels,
        megapixels=request.megapixels,
    )
    if request.size is not None:
        wanted = [(request, plan([], size=request.size).output)]
    else:
        wanted = [(request, size) for size in latents.PREFERRED_SIZES]
        if not num_references:
            outputs = (plan([size]).output for size in latents.PREFERRED_SIZES)
            wanted = [(_with_size(request, size), size) for size in outputs]
    for own, (width, height) in wanted:
        blank = Picture("blank", np.zeros((height, width, 3), np.uint8), "", ())
        own = dataclasses.replace(own, images=(blank.name,) * num_references)
        yield prepare_pictures(own, preset, (blank,) * num_references)


def _with_size(request: SampleRequest, size: Size) -> SampleRequest:
    return dataclasses.replace(request, size="{}x{}".format(*size), megapixels=None)


def warm(
    pipeline: WarmingPipeline,
    requests: Sequence[PreparedRequest],
    folder: Path,
    *,
    tell: Callable[[str], None],
    progress: bool = False,
) -> None:
    """Compiles for each request in turn, and says what was made, for how long, and how large it is.

    Args:
      folder: where the programs are kept.
      progress: show a line of what is under way on stderr.
    """
    start, before, total = time.perf_counter(), _bytes_in(folder), 0
    for i, prepared in enumerate(requests):
        name = "{}×{}".format(*prepared.sizes.output)
        if count := len(prepared.pictures):
            name += f" from {count} of " + "{}×{}".format(*prepared.sizes.references[0].size)
        if progress:
            bar = "━" * (24 * i // len(requests))
            sys.stderr.write(f"\r  {bar:<24} {i + 1}/{len(requests)}  {name:<40}")
        began = time.perf_counter()
        made = pipeline.compile_for(prepared)
        total += made
        if progress:
            sys.stderr.write(f"\r{'':<78}\r")
        tell(f"{name}: {made} programs, {time.perf_counter() - began:.1f} s")
    tell(
        f"{total} programs for {len(requests)} sizes in {time.perf_counter() - start:.1f} s; "
        f"{(_bytes_in(folder) - before) / 1e6:.1f} MB more in {folder}"
    )


def _bytes_in(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
