"""The stages of an edit, each a program compiled for its shapes: text, picture, denoise, decode.

Each network is read when it is first needed and each program compiled for its shapes, so that
loading, compiling and computing are timed apart.
"""

import os
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from kontext_jax.batches import Conditioning
from kontext_jax.flow import path as flow
from kontext_jax.flow.names import Sampler
from kontext_jax.flow.samplers import guided_velocity_fn, make_sampler, seed_words
from kontext_jax.models import conditioning
from kontext_jax.models.clip import CLIPText
from kontext_jax.models.mmdit import (
    MMDiT,
    ModulationVectors,
    block_form_for,
    make_velocity_fn,
    prepare_steps,
)
from kontext_jax.models.parameter_axes import BLOCK_STACKS
from kontext_jax.models.parameter_sharding import place_on
from kontext_jax.models.t5 import T5Encoder
from kontext_jax.models.tokenizing import Tokenizers
from kontext_jax.models.vae import VAE
from kontext_jax.models.vae_tiling import decode_tiled, encode_tiled, vae_peak_bytes
from kontext_jax.numerics import EXACT, Numerics
from kontext_jax.pictures import latents
from kontext_jax.runtime import compiler_options
from kontext_jax.runtime.chips import chip_of
from kontext_jax.runtime.placement import Placement, format_mesh
from kontext_jax.runtime.program_files import ExecutableFiles
from kontext_jax.runtime.programs import Executables, Program, Timings, precise, precision_of
from kontext_jax.types import Params
from kontext_jax.weights.bundle import Listed, ModelBundle

TILE_PX = 512
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}

OnStep = Callable[[int, int], None]
"""`on_step(done, num_steps)`, called as the run begins (done 0) and when a step's result exists."""


class Stages:
    """Networks of one bundle, ready to run.

    Args:
      bundle: where the weights are.
      dtype: compute dtype of the text encoders and the transformer, "float32" or "bfloat16"; the
        autoencoder follows a request's numerics. None: float32 on CPU, bfloat16 elsewhere.
      tiling: whether the autoencoder works in tiles: "on", "off", or "auto" where a whole picture
        would need more memory than the device has.
      mesh: devices to spread every network and batch over, see `kontext_jax.placement`; None for
        the default device.
      programs_dir: where programs of one device are kept, to be loaded without tracing at the
        next start, see `kontext_jax.executable_files`; None for nowhere.
      tell: called with lines for the user.
    """

    def __init__(
        self,
        bundle: ModelBundle,
        *,
        dtype: str | None = None,
        tiling: Literal["auto", "on", "off"] = "auto",
        mesh: Mesh | None = None,
        programs_dir: str | os.PathLike | None = None,
        tell: Callable[[str], None] = lambda line: None,
    ):
        if dtype is None:
            dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
        if dtype not in DTYPES:
            raise ValueError(f"dtype is {dtype!r}; expected one of {', '.join(DTYPES)}")
        self.bundle = bundle
        self.preset = bundle.preset
        self.dtype = dtype
        self.timings = Timings()
        self._compute_dtype = DTYPES[dtype]
        self._tiling = tiling
        self._placement = Placement(mesh)
        self._block_form = block_form_for(jax.default_backend())
        self._tell = tell
        chip = chip_of(jax.devices()[0].device_kind)
        files = None
        if programs_dir is not None and mesh is None:
            files = ExecutableFiles(programs_dir, (ModulationVectors,), tell)
        self._executables = Executables(
            self.timings,
            files=files,
            compiler_options=compiler_options.options(
                jax.default_backend(), "sample", chip and chip.name
            ),
        )
        self._params: dict[str, Params] = {}
        self._tokenizers: Tokenizers | None = None

    def encode_text(self, prompt: str, mask: bool = False) -> tuple[jax.Array, jax.Array]:
        """T5 features [1, T, context_in_dim] and pooled CLIP features [1, vec_in_dim] of a prompt.

        Raises:
          FloatingPointError: the result is not finite.
        """
        t5_config = self.bundle.components["t5"].config
        clip_config = self.bundle.components["clip"].config
        with self.timings.measure("load"):
            if self._tokenizers is None:
                tokenizers = Tokenizers(**self.bundle.tokenizer_dirs)
                tokenizers.check_fit(t5_config, clip_config)
                self._tokenizers = tokenizers
        ids, notices = self._tokenizers.tokenize([prompt], self.preset.max_text_tokens)
        for notice in notices:
            self._tell(notice)
        t5 = T5Encoder(t5_config, self._compute_dtype)
        clip = CLIPText(clip_config, self._compute_dtype)
        args = self._load("t5"), self._load("clip"), ids

        def make():
            return lambda t5_params, clip_params, ids: conditioning.encode_text(
                t5, clip, t5_params, clip_params, ids, use_mask=mask
            )

        program = self._compile(("text", t5, clip, mask), make, *args)
        with self.timings.measure("encode"):
            txt, vec = program(*args)
            return self._finite(txt, "text features"), self._finite(vec, "pooled text features")

    def encode_picture(self, pixels: np.ndarray, numerics: Numerics = EXACT) -> jax.Array:
        """Latents [1, h/8, w/8, Z] of a picture uint8 [h, w, 3].

        Raises:
          FloatingPointError: the result is not finite.
        """
        image = latents.pixels_to_model(pixels)[None]
        vae, params = self._vae(numerics.vae_encode_dtype), self._load("vae")
        if tile_px := self._tile_px(vae, *image.shape[1:3]):
            with self.timings.measure("encode"):
                return self._finite(self._encode_tiled(vae, image, tile_px), "image latents")
        program = self._compile(
            ("encode", vae), lambda: _method(vae, "encode"), params, image, dtype=vae.dtype
        )
        with self.timings.measure("encode"):
            return self._finite(program(params, image), "image latents")

    def denoise(
        self,
        noise: jax.Array,
        txt: jax.Array,
        vec: jax.Array,
        *,
        num_steps: int,
        sampler: Sampler = "euler",
        timesteps: Sequence[float] | None = None,
        seeds: Sequence[int] | None = None,
        guidance: np.ndarray | None = None,
        references: Sequence[jax.Array] = (),
        negative: tuple[jax.Array, jax.Array] | None = None,
        true_cfg_scale: np.ndarray | None = None,
        numerics: Numerics = EXACT,
        position_rule: latents.PositionRule = "index",
        on_step: OnStep | None = None,
    ) -> jax.Array:
        """Clean latents from noise [B, h/8, w/8, Z].

        Args:
          txt, vec: features of the prompts, [B, T, context_in_dim] and [B, vec_in_dim].
          timesteps: where each step begins; None for the model's even or shifted grid.
          seeds: that drew the noise, for "renoise", which draws more by them; "euler" needs none.
          guidance: float32 [B]; None for a model that takes none.
          references: latents of each reference, [B, its h/8, its w/8, Z].
          negative: txt and vec to guide away from, with true_cfg_scale float32 [B].

        Raises:
          FloatingPointError: the result is not finite.
          ValueError: B is not divisible by the parts into which the mesh splits a batch; or there
            is no such sampler, it lacks seeds, or the network is not made for it.
        """
        self._check_batch(noise.shape[0])
        words = seed_words(seeds) if sampler == "renoise" and seeds is not None else None
        make_sampler(sampler, words)  # refuses what cannot be
        self.preset.check_sampler(sampler)
        params = self._load("mmdit")
        config = self.bundle.components["mmdit"].config
        model = MMDiT(config, dtype=self._compute_dtype, block_form=self._block_form)
        _, latent_height, latent_width, _ = noise.shape
        cond = conditioning.make_conditioning(
            model.config,
            txt,
            vec,
            latent_height=latent_height,
            latent_width=latent_width,
            references=references,
            guidance=guidance,
            position_rule=position_rule,
            numerics=numerics,
            dtype=self._compute_dtype,
        )
        x = latents.pack(noise)
        times = flow.sampling_schedule(
            num_steps, x.shape[1], self.preset.shift_timesteps, timesteps
        )
        cond, negative, true_cfg_scale, x, words = self._placement.place(
            (cond, negative, true_cfg_scale, x, words)
        )

        def make_prepare():
            def prepare(params, cond, negative, timesteps):
                steps = prepare_steps(model, params, cond, timesteps, numerics)
                if negative is None:
                    return steps
                cond = _with_text(cond, negative)
                return steps, prepare_steps(model, params, cond, timesteps, numerics)

            return prepare

        def make_run():
            def run(params, cond, negative, scale, words, x, timesteps, steps, start, stop):
                velocity_fn = make_velocity_fn(model, params, cond)
                if negative is not None:
                    other = make_velocity_fn(model, params, _with_text(cond, negative))
                    velocity_fn = guided_velocity_fn(velocity_fn, other, scale)
                return make_sampler(sampler, words)(
                    velocity_fn,
                    x,
                    timesteps,
                    steps,
                    start=start,
                    stop=stop,
                    euler_dtype=numerics.euler_dtype,
                )

            return run

        key = (model, numerics)
        prepare = self._compile(
            *(("prepare", key), make_prepare, params, cond, negative, times), batch_axis=1
        )
        with self.timings.measure("denoise"):
            steps = prepare(params, cond, negative, times)
        given = (params, cond, negative, true_cfg_scale, words)
        bounds = np.int32(0), np.int32(num_steps)
        run = self._compile(
            *(("run", (*key, sampler)), make_run, *given, x, times, steps, *bounds), batch_axis=0
        )
        with self.timings.measure("denoise"):
            if on_step is None:
                x = run(*given, x, times, steps, *bounds)
            else:
                for i in range(num_steps):
                    # One step is always under way while the one before it is waited for.
                    waited, x = x, run(*given, x, times, steps, np.int32(i), np.int32(i + 1))
                    waited.block_until_ready()
                    on_step(i, num_steps)
                x.block_until_ready()
                on_step(num_steps, num_steps)
            x = self._finite(x, "denoised latents")
        return latents.unpack(x, latent_height, latent_width)

    def decode(self, x: jax.Array, numerics: Numerics = EXACT) -> np.ndarray:
        """Picture float32 [B, h, w, 3], about [-1, 1], of latents [B, h/8, w/8, Z].

        Raises:
          FloatingPointError: the result is not finite.
        """
        vae, params = self._vae(numerics.vae_decode_dtype), self._load("vae")
        batch_axis = None if x.shape[0] % self._placement.num_batch_parts else 0
        if (where := self._placement.split(batch_axis)) is not None:
            x = jax.device_put(x, where)
        x = x.astype(jnp.float32 if numerics.unscale_dtype == "float32" else self._compute_dtype)
        if tile_px := self._tile_px(vae, *(side * vae.downsampling for side in x.shape[1:3])):
            with self.timings.measure("decode"):
                image = self._decode_tiled(vae, x, tile_px)
        else:
            program = self._compile(
                *(("decode", vae, batch_axis), lambda: _method(vae, "decode"), params, x),
                dtype=vae.dtype,
                batch_axis=batch_axis,
            )
            with self.timings.measure("decode"):
                image = np.asarray(program(params, x), np.float32)
        return self._finite(image, "decoded picture")

    def _encode_tiled(self, vae: VAE, image: jax.Array, tile_px: int) -> jax.Array:
        with precise(vae.dtype):
            return encode_tiled(vae, self._load("vae"), image, tile_px)

    def _decode_tiled(self, vae: VAE, x: jax.Array, tile_px: int) -> np.ndarray:
        with precise(vae.dtype):
            params = self._load("vae")
            return np.concatenate([decode_tiled(vae, params, row[None], tile_px) for row in x])

    def _tile_px(self, vae: VAE, height_px: int, width_px: int) -> int | None:
        """Side of the autoencoder's tiles for a picture of this size; None for no tiles."""
        if self._tiling != "auto":
            return TILE_PX if self._tiling == "on" else None
        stats = jax.devices()[0].memory_stats()
        if not stats or "bytes_limit" not in stats:  # the CPU: tiles would lie in the same memory
            return None
        free = stats["bytes_limit"] - self._bytes_in_use(stats)
        needed = vae_peak_bytes(vae.config, height_px, width_px, vae.dtype)
        return TILE_PX if needed > 0.9 * free else None

    def _bytes_in_use(self, stats: dict[str, int]) -> int:
        return stats["bytes_in_use"]

    def _load(self, kind: str) -> Params:
        """The weights of a network, read on first use."""
        if kind not in self._params:
            # The autoencoder is small and kept exact; each request's numerics cast it.
            dtype = jnp.float32 if kind == "vae" else self._compute_dtype
            mesh = self._placement.mesh
            device = None if mesh is None else place_on(mesh)
            if kind == "mmdit" and self._block_form == "list":
                device = Listed(BLOCK_STACKS, device)
            with self.timings.measure("load"):
                params = self.bundle.components[kind].load(dtype=dtype, device=device)
                self._params[kind] = jax.block_until_ready(params)
        return self._params[kind]

    def _vae(self, dtype: Literal["float32", "compute"]) -> VAE:
        config = self.bundle.components["vae"].config
        return VAE(config, jnp.float32 if dtype == "float32" else self._compute_dtype)

    def _compile(self, key, make, *args, dtype: Any = None, batch_axis: int | None = None):
        """The program of `make()`, whose products are as precise as `dtype` (None: the run's).

        Args:
          batch_axis: of its results; None for results that every device gets.
        """
        where = self._placement.split(batch_axis)
        precision = precision_of(self._compute_dtype if dtype is None else dtype)
        return self._executables.get(
            Program(key, make, args, where, precision=precision, mesh=self._placement.mesh)
        )

    def _check_batch(self, batch_size: int) -> None:
        parts = self._placement.num_batch_parts
        if batch_size % parts:
            raise ValueError(
                f"a batch of {batch_size} cannot be split in {parts} on the mesh "
                f"{format_mesh(self._placement.sizes)}; make the batch a multiple of slices × data "
                "× fsdp, or spread single pictures over context or tensor"
            )

    def _finite(self, x, what: str):
        """`x`, once it is computed and found finite."""
        finite = np.isfinite(np.asarray(x, np.float32)).all()
        if not finite:
            raise FloatingPointError(
                f"the {what} hold NaN or infinity; the weights ({self.bundle.source}) or "
                f"--dtype {self.dtype} do not suit this request"
            )
        return x


def _with_text(cond: Conditioning, text: tuple[jax.Array, jax.Array]) -> Conditioning:
    txt, vec = text
    return cond.replace(txt=txt, vec=vec)


def _method(module, name: str):
    return lambda params, x: module.apply({"params": params}, x, method=name)
