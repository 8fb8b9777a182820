"""Weights on disk → object that edits images.

    prompts  → T5, CLIP        → txt, vec    once for each prompt
    pictures → resize → VAE    → ctx         once for each picture and size
    noise    → Euler steps     → latents     several requests of one shape in a batch
    latents  → VAE             → pixels      one picture at a time

Each network is read when it is first needed and each program compiled for its shapes, so that
loading, compiling and computing are timed apart. A further turn of a request takes the final
latents of the turn before as its reference, without passing through pixels.
"""

import dataclasses
import importlib.metadata
import platform
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

import kontext_jax
from kontext_jax import conditioning, flow, images, latents
from kontext_jax.checkpoint import ModelBundle
from kontext_jax.compiling import Executables, Timings
from kontext_jax.models.clip import CLIPText
from kontext_jax.models.mmdit import Conditioning, MMDiT, make_velocity_fn, prepare_steps
from kontext_jax.models.t5 import T5Encoder
from kontext_jax.models.vae import VAE
from kontext_jax.models.vae_tiling import decode_tiled, encode_tiled, vae_peak_bytes
from kontext_jax.numerics import EXACT, Numerics
from kontext_jax.requests import PreparedRequest, request_to_dict
from kontext_jax.sampler import euler_sample, guided_velocity_fn, initial_noise
from kontext_jax.types import Params

METADATA_FORMAT = 1
TOKENS_PER_BATCH = 8192  # a batch is filled up to this: one edit of a megapixel, several small ones
MAX_BATCH = 8
TILE_PX = 512
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}

OnStep = Callable[[int, int], None]
"""`on_step(done, num_steps)`, called when a step's result exists."""


@dataclasses.dataclass(frozen=True)
class Result:
    """One picture of one turn."""

    request_index: int
    image_index: int  # of the request's num_images
    turn: int  # 0: the prompt; then the prompts of `then`
    pixels: np.ndarray  # uint8 [height, width, 3]
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
    """Networks of one bundle, ready to edit.

    Args:
      bundle: where the weights are.
      dtype: compute dtype of the text encoders and the transformer, "float32" or "bfloat16"; the
        autoencoder follows a request's numerics. None: float32 on CPU, bfloat16 elsewhere.
      tiling: whether the autoencoder works in tiles: "on", "off", or "auto" where a whole picture
        would need more memory than the device has.
      keep_text_encoders: False frees T5 and CLIP once all prompts are encoded, before the
        transformer is read.
      tell: called with lines for the user.
    """

    def __init__(
        self,
        bundle: ModelBundle,
        *,
        dtype: str | None = None,
        tiling: Literal["auto", "on", "off"] = "auto",
        keep_text_encoders: bool = True,
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
        self._keep_text_encoders = keep_text_encoders
        self._tell = tell
        self._executables = Executables(self.timings)
        self._params: dict[str, Params] = {}
        self._tokenizers: conditioning.Tokenizers | None = None

    # Editing

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
                for item in wanted:
                    try:
                        yield from self._edit_batch([item], [Place(1, 0)], texts, on_step)
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
            most = self._largest_batch(items[0].prepared)
            num_batches = -(-len(items) // most)
            size = -(-len(items) // num_batches)
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
        width_px, height_px = first.sizes.output
        noise_dtype = jnp.float32 if numerics.euler_dtype == "float32" else self._compute_dtype
        references = [
            jnp.concatenate([self._encode_reference(row.prepared, i) for row in rows])
            for i in range(len(first.pictures))
        ]
        for turn in range(1 + len(first.request.then)):
            noise = [
                initial_noise(
                    [_seed(row.prepared, row.image_index, turn)],
                    height_px // latents.VAE_FACTOR,
                    width_px // latents.VAE_FACTOR,
                    self.preset.vae.z_channels,
                    noise_dtype,
                )
                for row in rows
            ]
            text = [texts[_prompts(row.prepared)[turn], first.request.text_mask] for row in rows]
            negative = [
                texts[row.prepared.request.negative_prompt, first.request.text_mask]
                for row in rows
                if row.prepared.request.negative_prompt is not None
            ]
            final = self.denoise(
                jnp.concatenate(noise),
                *_stacked(text),
                num_steps=first.request.num_steps,
                guidance=_column(row.prepared.request.guidance for row in rows),
                references=references,
                negative=_stacked(negative) if negative else None,
                true_cfg_scale=_column(row.prepared.request.true_cfg_scale for row in rows),
                numerics=numerics,
                position_rule=first.request.position_rule,
                on_step=on_step,
            )
            for place in places:
                item = rows[place.row]
                image = self.decode(final[place.row : place.row + 1], numerics)
                pixels = latents.model_to_pixels(image[0], numerics.uint8_rule)
                if restore := item.prepared.sizes.restore:
                    pixels = images.resize(pixels, *restore.size, box=restore.box)
                metadata = self._metadata(item, turn, place)
                yield Result(item.request_index, item.image_index, turn, pixels, metadata)
            references = [final]

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
            "weights": self.bundle.identity,
            "dtype": self.dtype,
            "tiling": self._tiling,
            "device": jax.devices()[0].device_kind,
            "versions": versions(),
        }

    # Stages

    def _encode_texts(self, requests) -> dict[tuple[str, bool], tuple[jax.Array, jax.Array]]:
        """Features of every prompt, by (prompt, text_mask)."""
        wanted: dict[tuple[str, bool], None] = {}
        for prepared in requests:
            request = prepared.request
            prompts = [*_prompts(prepared)]
            if request.negative_prompt is not None:
                prompts.append(request.negative_prompt)
            wanted |= dict.fromkeys((prompt, request.text_mask) for prompt in prompts)
        features = {(prompt, mask): self.encode_text(prompt, mask) for prompt, mask in wanted}
        if not self._keep_text_encoders:
            self._params.pop("t5", None)
            self._params.pop("clip", None)
        return features

    def encode_text(self, prompt: str, mask: bool = False) -> tuple[jax.Array, jax.Array]:
        """T5 features [1, T, context_in_dim] and pooled CLIP features [1, vec_in_dim] of a prompt.

        Raises:
          FloatingPointError: the result is not finite.
        """
        t5_config = self.bundle.components["t5"].config
        clip_config = self.bundle.components["clip"].config
        with self.timings.measure("load"):
            if self._tokenizers is None:
                tokenizers = conditioning.Tokenizers(**self.bundle.tokenizer_dirs)
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

    def _encode_reference(self, prepared: PreparedRequest, index: int) -> jax.Array:
        fit = prepared.sizes.references[index]
        pixels = images.resize(prepared.pictures[index].pixels, *fit.size, box=fit.box)
        return self.encode_picture(pixels, prepared.numerics)

    def encode_picture(self, pixels: np.ndarray, numerics: Numerics = EXACT) -> jax.Array:
        """Latents [1, h/8, w/8, Z] of a picture uint8 [h, w, 3].

        Raises:
          FloatingPointError: the result is not finite.
        """
        image = latents.pixels_to_model(pixels)[None]
        vae, params = self._vae(numerics.vae_encode_dtype), self._load("vae")
        if tile_px := self._tile_px(vae, *image.shape[1:3]):
            with self._precise(), self.timings.measure("encode"):
                return self._finite(encode_tiled(vae, params, image, tile_px), "image latents")
        program = self._compile(("encode", vae), lambda: _method(vae, "encode"), params, image)
        with self.timings.measure("encode"):
            return self._finite(program(params, image), "image latents")

    def denoise(
        self,
        noise: jax.Array,
        txt: jax.Array,
        vec: jax.Array,
        *,
        num_steps: int,
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
          guidance: float32 [B]; None for a model that takes none.
          references: latents of each reference, [B, its h/8, its w/8, Z].
          negative: txt and vec to guide away from, with true_cfg_scale float32 [B].

        Raises:
          FloatingPointError: the result is not finite.
        """
        params = self._load("mmdit")
        model = MMDiT(self.bundle.components["mmdit"].config, dtype=self._compute_dtype)
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
        mu = flow.timestep_mu(x.shape[1]) if self.preset.shift_timesteps else None
        timesteps = flow.timestep_schedule(num_steps, mu)

        def make_prepare():
            def prepare(params, cond, negative, timesteps):
                steps = prepare_steps(model, params, cond, timesteps, numerics)
                if negative is None:
                    return steps
                cond = _with_text(cond, negative)
                return steps, prepare_steps(model, params, cond, timesteps, numerics)

            return prepare

        def make_run():
            def run(params, cond, negative, scale, x, timesteps, steps, start, stop):
                velocity_fn = make_velocity_fn(model, params, cond)
                if negative is not None:
                    other = make_velocity_fn(model, params, _with_text(cond, negative))
                    velocity_fn = guided_velocity_fn(velocity_fn, other, scale[:, None, None])
                return euler_sample(
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
        prepare = self._compile(("prepare", key), make_prepare, params, cond, negative, timesteps)
        with self.timings.measure("denoise"):
            steps = prepare(params, cond, negative, timesteps)
        given = (params, cond, negative, true_cfg_scale)
        bounds = np.int32(0), np.int32(num_steps)
        run = self._compile(("run", key), make_run, *given, x, timesteps, steps, *bounds)
        with self.timings.measure("denoise"):
            if on_step is None:
                x = run(*given, x, timesteps, steps, *bounds)
            else:
                for i in range(num_steps):
                    # One step is always under way while the one before it is waited for.
                    waited, x = x, run(*given, x, timesteps, steps, np.int32(i), np.int32(i + 1))
                    waited.block_until_ready()
                    if i:
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
        x = x.astype(jnp.float32 if numerics.unscale_dtype == "float32" else self._compute_dtype)
        if tile_px := self._tile_px(vae, *(side * vae.downsampling for side in x.shape[1:3])):
            with self._precise(), self.timings.measure("decode"):
                image = decode_tiled(vae, params, x, tile_px)
        else:
            program = self._compile(("decode", vae), lambda: _method(vae, "decode"), params, x)
            with self.timings.measure("decode"):
                image = np.asarray(program(params, x), np.float32)
        return self._finite(image, "decoded picture")

    # Helpers

    def _tile_px(self, vae: VAE, height_px: int, width_px: int) -> int | None:
        """Side of the autoencoder's tiles for a picture of this size; None for no tiles."""
        if self._tiling != "auto":
            return TILE_PX if self._tiling == "on" else None
        stats = jax.devices()[0].memory_stats()
        if not stats or "bytes_limit" not in stats:  # the CPU: tiles would lie in the same memory
            return None
        free = stats["bytes_limit"] - stats["bytes_in_use"]
        needed = vae_peak_bytes(vae.config, height_px, width_px, vae.dtype)
        return TILE_PX if needed > 0.9 * free else None

    def _load(self, kind: str) -> Params:
        """The weights of a network, read on first use."""
        if kind not in self._params:
            # The autoencoder is small and kept exact; each request's numerics cast it.
            dtype = jnp.float32 if kind == "vae" else self._compute_dtype
            with self.timings.measure("load"):
                params = self.bundle.components[kind].load(dtype=dtype)
                self._params[kind] = jax.block_until_ready(params)
        return self._params[kind]

    def _vae(self, dtype: Literal["float32", "compute"]) -> VAE:
        config = self.bundle.components["vae"].config
        return VAE(config, jnp.float32 if dtype == "float32" else self._compute_dtype)

    def _precise(self):
        """Products as precise as the dtype: left alone, accelerators round float32 inputs."""
        return jax.default_matmul_precision("highest" if self.dtype == "float32" else None)

    def _compile(self, key, make, *args):
        with self._precise():
            return self._executables.get(key, make, *args)

    def _finite(self, x, what: str):
        """`x`, once it is computed and found finite."""
        finite = np.isfinite(np.asarray(x, np.float32)).all()
        if not finite:
            raise FloatingPointError(
                f"the {what} hold NaN or infinity; the weights ({self.bundle.source}) or "
                f"--dtype {self.dtype} do not suit this request"
            )
        return x


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


def _with_text(cond: Conditioning, text: tuple[jax.Array, jax.Array]) -> Conditioning:
    txt, vec = text
    return cond.replace(txt=txt, vec=vec)


def _method(module, name: str):
    return lambda params, x: module.apply({"params": params}, x, method=name)


def versions() -> dict[str, str]:
    """Versions of everything that a picture's bits may depend on."""
    found = {"kontext_jax": kontext_jax.__version__, "python": platform.python_version()}
    return found | {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax")}
