"""The stages of an edit: text, picture, denoise, decode.

Each network is read when it is first needed and each program compiled for its shapes, so that
loading, compiling and computing are timed apart. What a stage compiles is in `programs`, which
weights it takes in `networks`, when pictures are cut in `tiling`; here they meet.
"""

import functools
import os
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from kontext_jax.flow.samplers import make_sampler
from kontext_jax.models.mmdit import ModulationVectors, block_form_for
from kontext_jax.models.presets import Preset
from kontext_jax.models.tokenizing import TextIds, Tokenizers
from kontext_jax.models.vae import VAE
from kontext_jax.models.vae_tiling import decode_tiled, encode_tiled
from kontext_jax.numerics import EXACT, Numerics
from kontext_jax.pictures import latents
from kontext_jax.runtime import compiler_options
from kontext_jax.runtime.chips import chip_of
from kontext_jax.runtime.placement import Placement, format_mesh
from kontext_jax.runtime.program_files import ExecutableFiles
from kontext_jax.runtime.programs import CompileOnly, Executables, Executor, Timings, precise
from kontext_jax.sampling.denoising import DenoiseArrays, Denoising, denoise_arrays
from kontext_jax.sampling.networks import LoadedNetworks, Networks, NetworkShapes
from kontext_jax.sampling.programs import StagePrograms
from kontext_jax.sampling.tiling import Tiling, tile_side
from kontext_jax.terminal import Tell
from kontext_jax.types import DTYPES, Array, Float, Params, Tokens, UInt8, VelocityFn
from kontext_jax.weights.bundle import ModelBundle

TILES_LATER = "the autoencoder's programs for tiles are compiled when they first run"

OnStep = Callable[[int, int], None]
"""`on_step(done, num_steps)`, called as the run begins (done 0) and when a step's result exists."""
Numbers = TypeVar("Numbers", jax.Array, np.ndarray)


class OpenDenoising(NamedTuple):
    """A sampling run with its parts in the open, as pure JAX.

    Attributes:
      noise: tokens [B, L, C] at time 1.
      timesteps: float32 [N + 1], falling from 1 to 0.
      velocity_fn: velocity of the tokens, guided if the request is. It is a pytree of weights and
        conditioning, and so may be an argument of a program.
      step_inputs: inputs of `velocity_fn` for all steps, computed in one product.
      sampler: (velocity_fn, x, timesteps, step_inputs) → the state at the last of the times.
    """

    noise: Tokens
    timesteps: Float[Array, " steps_and_1"]
    velocity_fn: VelocityFn
    step_inputs: Any
    sampler: Callable[..., Tokens]


class Stages:
    """Networks of one bundle, ready to run.

    Args:
      bundle: weights, still on disk.
      dtype: compute dtype of the text encoders and the transformer, "float32" or "bfloat16"; the
        autoencoder follows a request's numerics. None: float32 on CPU, bfloat16 elsewhere.
      tiling: whether the autoencoder works in tiles: "on", "off", or "auto" where a whole picture
        would need more memory than the device has.
      mesh: devices to spread every network and batch over, see `kontext_jax.runtime.placement`;
        None for the default device.
      programs_dir: folder that keeps programs of one device, to be loaded without tracing at the
        next start, see `kontext_jax.runtime.program_files`; None keeps none.
      tell: called with lines for the user.
      executables: programs that other stages compiled, to be shared; None for none. They decide
        where programs are kept, in place of `programs_dir`.
      compile_only: compile what requests need and compute nothing: weights are not read, prompts
        not tokenized, and every result is zeros.

    Attributes:
      preset: preset of the model.
      timings: seconds of "load", "compile", "encode", "denoise" and "decode" so far.
      networks: the weights.
      placement: the devices.
      executables: the compiled programs.

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
        tell: Tell = lambda line: None,
        executables: Executables | None = None,
        compile_only: bool = False,
    ):
        if dtype is None:
            dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
        if dtype not in DTYPES:
            raise ValueError(f"dtype is {dtype!r}; expected one of {', '.join(DTYPES)}")
        self.bundle = bundle
        self.preset: Preset = bundle.preset
        self.dtype, self.tiling = dtype, tiling
        self.timings = Timings()
        self.placement = Placement(mesh)
        self.compute_dtype = DTYPES[dtype]
        self._tell = tell
        block_form = block_form_for(jax.default_backend())
        configs = {kind: component.config for kind, component in bundle.components.items()}
        self._programs = StagePrograms(configs, self.compute_dtype, self.placement, block_form)
        if executables is None:
            executables = _make_executables(
                self.timings, programs_dir if mesh is None else None, tell
            )
        self.executables = executables
        weights = bundle, self.compute_dtype, mesh, block_form == "list"
        self.networks: Networks
        self._executor: Executor
        if compile_only:
            self.networks = NetworkShapes(*weights)
            self._executor = CompileOnly(executables)
        else:
            self.networks = LoadedNetworks(*weights, self.timings)
            self._executor = executables
        self._tokenizers: Tokenizers | None = None

    def encode_text(
        self, prompt: str, mask: bool = False
    ) -> tuple[Float[Array, "1 T D"], Float[Array, "1 V"]]:
        """T5 features [1, T, context_in_dim] and pooled CLIP features [1, vec_in_dim] of a prompt.

        Args:
          mask: hide padding from T5; models were trained without.

        Raises:
          FloatingPointError: the result is not finite.
        """
        ids = self._tokenize(prompt) if self._executor.computes else blank_ids(self.preset)
        args = self.networks.get("t5"), self.networks.get("clip"), ids
        program = self._executor.get(self._programs.text(*args, mask))
        with self.timings.measure("encode"):
            txt, vec = program(*args)
            return self._finite(txt, "text features"), self._finite(vec, "pooled text features")

    def encode_picture(
        self, pixels: UInt8[np.ndarray, "height width 3"], numerics: Numerics = EXACT
    ) -> Float[Array, "1 latent_height latent_width Z"]:
        """Latents [1, h/8, w/8, Z] of a picture uint8 [h, w, 3].

        Raises:
          FloatingPointError: the result is not finite.
        """
        image = latents.pixels_to_model(pixels)[None]
        vae, params = self._programs.vae(numerics.vae_encode_dtype), self.networks.get("vae")
        _, height, width, _ = image.shape
        if tile_px := self._tile_px(vae, height, width):
            columns, rows = width // vae.downsampling, height // vae.downsampling
            if not self._executor.computes:
                self._tell(f"{TILES_LATER}: encoding, tiles of {tile_px} pixels")
                return jnp.zeros((1, rows, columns, vae.config.z_channels))
            with self.timings.measure("encode"), precise(vae.dtype):
                return self._finite(encode_tiled(vae, params, image, tile_px), "image latents")
        program = self._executor.get(self._programs.encode(vae, params, image))
        with self.timings.measure("encode"):
            return self._finite(program(params, image), "image latents")

    def denoise(
        self, given: Denoising, on_step: OnStep | None = None
    ) -> Float[Array, "B latent_height latent_width Z"]:
        """Clean latents of a batch, of the noise's shape.

        Raises:
          FloatingPointError: the result is not finite.
          ValueError: B is not divisible by the parts into which the mesh splits a batch; or the
            network is not made for the sampler, the text, the references or the guidance.
        """
        _, latent_height, latent_width, _ = given.noise.shape
        params, arrays, steps = self._prepare(given)
        bounds = np.int32(0), np.int32(given.num_steps)
        run = self._executor.get(
            self._programs.run(params, arrays, steps, bounds, given.sampler, given.numerics)
        )
        with self.timings.measure("denoise"):
            if on_step is None:
                x = run(params, *arrays, steps, *bounds)
            else:
                x = self._step_by_step(run, params, arrays, steps, given.num_steps, on_step)
            x = self._finite(x, "denoised latents")
        return latents.unpack(x, latent_height, latent_width)

    def _prepare(self, given: Denoising) -> tuple[Params, DenoiseArrays, Any]:
        """What the program `run` takes: weights, arrays on their devices, inputs of all steps."""
        self._check_batch(given.noise.shape[0])
        self.preset.check_sampler(given.sampler)
        params = self.networks.get("mmdit")
        config = self._programs.mmdit.config
        arrays = denoise_arrays(given, self.preset, config, self.compute_dtype)
        placed = self.placement.place(arrays._replace(timesteps=None))
        arrays = placed._replace(timesteps=arrays.timesteps)
        prepare = self._executor.get(self._programs.prepare(params, arrays, given.numerics))
        with self.timings.measure("denoise"):
            return params, arrays, prepare(params, arrays.cond, arrays.negative, arrays.timesteps)

    def open_denoising(self, given: Denoising) -> OpenDenoising:
        """What `denoise` computes from, for a sampler outside.

        Raises:
          ValueError: see `denoise`.
        """
        params, arrays, steps = self._prepare(given)
        return OpenDenoising(
            noise=arrays.x,
            timesteps=jnp.asarray(arrays.timesteps),
            velocity_fn=jax.tree_util.Partial(
                *(self._programs.velocity, params),
                *(arrays.cond, arrays.negative, arrays.true_cfg_scale),
            ),
            step_inputs=steps,
            sampler=functools.partial(
                make_sampler(given.sampler, arrays.seed_words),
                euler_dtype=given.numerics.euler_dtype,
            ),
        )

    @staticmethod
    def _step_by_step(run, params, arrays, steps, num_steps: int, on_step: OnStep) -> jax.Array:
        """The tokens of a whole run, one step after another."""
        for i in range(num_steps):
            # One step is always under way while the one before it is waited for.
            waited, x = arrays.x, run(params, *arrays, steps, np.int32(i), np.int32(i + 1))
            waited.block_until_ready()
            on_step(i, num_steps)
            arrays = arrays._replace(x=x)
        arrays.x.block_until_ready()
        on_step(num_steps, num_steps)
        return arrays.x

    def decode(
        self, x: Float[Array, "B latent_height latent_width Z"], numerics: Numerics = EXACT
    ) -> Float[np.ndarray, "B height width 3"]:
        """Picture float32 [B, h, w, 3], about [-1, 1], of latents [B, h/8, w/8, Z].

        Raises:
          FloatingPointError: the result is not finite.
        """
        vae, params = self._programs.vae(numerics.vae_decode_dtype), self.networks.get("vae")
        batch_axis = None if x.shape[0] % self.placement.num_batch_parts else 0
        if (where := self.placement.split(batch_axis)) is not None:
            x = jax.device_put(x, where)
        x = x.astype(self._programs.unscale_dtype(numerics))
        batch_size, *sides, _ = x.shape
        height, width = (side * vae.downsampling for side in sides)
        if tile_px := self._tile_px(vae, height, width):
            if not self._executor.computes:
                self._tell(f"{TILES_LATER}: decoding, tiles of {tile_px} pixels")
                return np.zeros((batch_size, height, width, vae.config.out_channels), np.float32)
            with self.timings.measure("decode"), precise(vae.dtype):
                rows = [decode_tiled(vae, params, row[None], tile_px) for row in x]
                image = np.concatenate(rows)
        else:
            program = self._executor.get(self._programs.decode(vae, params, x, batch_axis))
            with self.timings.measure("decode"):
                image = np.asarray(program(params, x), np.float32)
        return self._finite(image, "decoded picture")

    def _tokenize(self, prompt: str) -> TextIds:
        with self.timings.measure("load"):
            if self._tokenizers is None:
                tokenizers = Tokenizers(**self.bundle.tokenizer_dirs)
                configs = (self.bundle.components[kind].config for kind in ("t5", "clip"))
                tokenizers.check_fit(*configs)
                self._tokenizers = tokenizers
        ids, notices = self._tokenizers.tokenize([prompt], self.preset.max_text_tokens)
        for notice in notices:
            self._tell(notice)
        return ids

    def _tile_px(self, vae: VAE, height_px: int, width_px: int) -> int | None:
        free = self.networks.free_bytes() if self.tiling == "auto" else None
        return tile_side(self.tiling, vae, height_px, width_px, free)

    def _check_batch(self, batch_size: int) -> None:
        parts = self.placement.num_batch_parts
        if batch_size % parts:
            raise ValueError(
                f"a batch of {batch_size} cannot be split in {parts} on the mesh "
                f"{format_mesh(self.placement.sizes)}; make the batch a multiple of slices × data "
                "× fsdp, or spread single pictures over context or tensor"
            )

    def _finite(self, x: Numbers, what: str) -> Numbers:
        """`x`, once it is computed and found finite."""
        finite = np.isfinite(np.asarray(x, np.float32)).all()
        if not finite:
            raise FloatingPointError(
                f"the {what} hold NaN or infinity; the weights ({self.bundle.source}) or "
                f"--dtype {self.dtype} do not suit this request"
            )
        return x


def blank_ids(preset: Preset) -> TextIds:
    """Token ids with the shapes of one prompt."""
    t5 = np.zeros((1, preset.max_text_tokens), np.int32)
    clip = np.zeros((1, preset.clip.max_position_embeddings), np.int32)
    return TextIds(t5=t5, clip=clip, t5_mask=np.ones_like(t5, bool))


def _make_executables(
    timings: Timings, programs_dir: str | os.PathLike | None, tell: Tell
) -> Executables:
    """Programs of sampling on the default device's platform."""
    files = None
    if programs_dir is not None:
        files = ExecutableFiles(programs_dir, (ModulationVectors,), tell)
    chip = chip_of(jax.devices()[0].device_kind)
    options = compiler_options.options(jax.default_backend(), "sample", chip and chip.name)
    return Executables(timings, compiler_options=options, files=files)
