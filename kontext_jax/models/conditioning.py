"""From prompts and reference pictures to what the transformer takes.

    prompt ─ T5 tokenizer ─ [B, T] ids ─ T5 encoder ── txt [B, T, 4096]    T: 512 at most, padded
           └ CLIP tokenizer ─ [B, 77] ids ─ CLIP text ─ vec [B, 768]       pooled output alone
    reference latents ─ packed, one after another ────── ctx [B, Lc, C]    text only: None
    positions of text ‖ target ‖ references ──────────── pe

FLUX was trained with every T5 position attended, padding too: no mask unless asked for. Text
features leave in the encoders' compute dtype.

Training encodes whole batches with `encode_batch`, or reads what it made from disk; `tokens_of`
makes of either what an objective takes.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kontext_jax.batches import Conditioning, EncodedBatch, TokenBatch
from kontext_jax.models.clip import CLIPText
from kontext_jax.models.presets import MMDiTConfig, Preset
from kontext_jax.models.t5 import T5Encoder
from kontext_jax.models.tokenizing import TextIds, Tokenizers
from kontext_jax.models.vae import VAE
from kontext_jax.numerics import EXACT, Numerics
from kontext_jax.ops.rope import rope_table
from kontext_jax.pictures import latents
from kontext_jax.runtime.programs import precise
from kontext_jax.types import Array, Float, Latents, Params, Tokens, UInt8, typed


def encode_text(
    t5: T5Encoder,
    clip: CLIPText,
    t5_params: Params,
    clip_params: Params,
    ids: TextIds,
    use_mask: bool = False,
) -> tuple[Float[Array, "B T Dt"], Float[Array, "B Dc"]]:
    """Text features (txt, vec) in the compute dtypes of the encoders; a pure function.

    Args:
      use_mask: hide padding from T5's attention. FLUX was trained without.
    """
    mask = jnp.asarray(ids.t5_mask) if use_mask else None
    txt: Any = t5.apply({"params": t5_params}, jnp.asarray(ids.t5), mask)
    features: Any = clip.apply({"params": clip_params}, jnp.asarray(ids.clip))
    return txt, features[1]


@typed
def reference_tokens(references: Sequence[Float[Array, "B _ _ Z"]]) -> Tokens:
    """Packs references of any sizes, one after another: [B, h, w, Z] each → [B, Lc, C].

    Raises:
      ValueError: if there are none, or one has an odd side.
    """
    if not references:
        raise ValueError("no references to pack; for text alone, ctx is None")
    return jnp.concatenate([latents.pack(reference) for reference in references], axis=1)


def make_conditioning(
    config: MMDiTConfig,
    txt: Float[Array, "B T features"],
    vec: Float[Array, "B pooled"],
    *,
    latent_height: int,
    latent_width: int,
    references: Sequence[Float[Array, "#B h w Z"]] = (),
    guidance: float | Sequence[float] | None = None,
    position_rule: latents.PositionRule = "index",
    numerics: Numerics = EXACT,
    dtype: jax.typing.DTypeLike,
) -> Conditioning:
    """What the transformer takes besides noise and time.

    Without references the context is left out altogether: nothing takes its place.

    Args:
      txt: [B, T, context_in_dim].
      vec: [B, vec_in_dim].
      latent_height: rows of the target's latents, even; `latent_width` is its columns, even too.
      references: latents [1, h, w, Z], shared by the batch, or [B, h, w, Z]; any even sizes.
      guidance: the guidance input, one or [B]; None exactly for models that take none.
      numerics: precision of the rotary table.
      dtype: compute dtype of the transformer, to which some numerics round the positions.

    Raises:
      ValueError: if widths, batch sizes or guidance do not fit the transformer.
    """
    _check_text(config, txt, vec)
    batch, num_text_tokens, _ = txt.shape
    if config.guidance_embed != (guidance is not None):
        raise ValueError(
            "this model takes a guidance value, found none"
            if config.guidance_embed
            else f"this model takes no guidance, found {guidance}; leave it out"
        )
    for reference in references:
        if reference.shape[0] not in (1, batch):
            raise ValueError(
                f"a reference has batch size {reference.shape[0]}, the prompts {batch}; "
                "give one reference for all or one for each"
            )

    pe = position_table(
        config,
        num_text_tokens,
        (latent_height, latent_width),
        tuple(reference.shape[1:3] for reference in references),
        position_rule,
        numerics,
        dtype,  # type: ignore[arg-type]  # JAX's own dtypes can all be hashed
    )
    ctx = None
    if references:
        whole_batch = [jnp.broadcast_to(r, (batch, *r.shape[1:])) for r in references]
        ctx = reference_tokens(whole_batch)
    told = None
    if guidance is not None:
        told = jnp.broadcast_to(jnp.asarray(guidance, jnp.float32), batch)
    return Conditioning(
        txt=txt,
        vec=vec,
        guidance=told,
        ctx=ctx,
        pe=jnp.asarray(pe),
    )


def of_batch(batch: TokenBatch, guidance: Float[Array, " B"] | None) -> Conditioning:
    """What a training batch's examples are made from; guidance [B], or None as for the model."""
    return Conditioning(batch.txt, batch.vec, guidance, batch.ctx, batch.pe)


def _check_text(
    config: MMDiTConfig, txt: jax.Array | np.ndarray, vec: jax.Array | np.ndarray
) -> None:
    batch, _, txt_width = txt.shape
    if txt_width != config.context_in_dim or vec.shape != (batch, config.vec_in_dim):
        raise ValueError(
            f"text features {txt.shape} and {vec.shape} do not fit the transformer, which takes "
            f"[B, T, {config.context_in_dim}] and [B, {config.vec_in_dim}]"
        )


@functools.lru_cache(maxsize=64)  # more than the shapes of one run: 17 sizes, with or without
def position_table(
    config: MMDiTConfig,
    num_text_tokens: int,
    target: tuple[int, int],
    references: tuple[tuple[int, int], ...] = (),
    position_rule: latents.PositionRule = "index",
    numerics: Numerics = EXACT,
    dtype: jax.typing.DTypeLike = np.float32,
) -> Float[np.ndarray, "2 S half"]:
    """Rotary table of text ‖ target ‖ references, float32 [2, S, Dh/2]; the same array each time.

    Args:
      target: (height, width) in latent cells, even; likewise each of `references`.
      numerics: precision of the table.
      dtype: compute dtype of the transformer, to which some numerics round the positions.
    """

    def grid(size: tuple[int, int]) -> tuple[int, int]:
        return size[0] // latents.PATCH, size[1] // latents.PATCH

    ids = np.concatenate(
        [
            latents.text_ids(num_text_tokens),
            latents.image_ids(*grid(target)),
            latents.context_ids([grid(size) for size in references], position_rule),
        ]
    )
    table = rope_table(
        ids,
        config.axes_dim,
        config.theta,
        numerics.rope_precision,
        ids_dtype=dtype if numerics.rope_ids_in_compute_dtype else None,
    )
    table.flags.writeable = False  # it is shared
    return table


@dataclasses.dataclass(frozen=True)
class Encoders:
    """The networks that training keeps frozen in front of the transformer; hashable."""

    vae: VAE
    t5: T5Encoder
    clip: CLIPText

    def precision(self):
        """Context for tracing: see `runtime.programs.precise`."""
        return precise(self.t5.dtype)


ENCODER_KINDS = ("vae", "t5", "clip")


def make_encoders(preset: Preset, dtype: jax.typing.DTypeLike) -> Encoders:
    """The preset's encoders, all of which compute in `dtype`."""
    return Encoders(
        vae=VAE(preset.vae, dtype),
        t5=T5Encoder(preset.t5, dtype),
        clip=CLIPText(preset.clip, dtype),
    )


def encode_pictures(encoders: Encoders, params: Params, pixels: UInt8[Array, "B _ _ 3"]) -> Latents:
    """Latents of pictures whose sides are multiples of 16: the posterior's mean, scaled; pure."""
    with encoders.precision():
        image = latents.pixels_to_model(pixels)
        encoded: Any = encoders.vae.apply({"params": params["vae"]}, image, method="encode")
        return encoded


def encode_prompts(
    encoders: Encoders, params: Params, ids: TextIds
) -> tuple[Float[Array, "B T Dt"], Float[Array, "B Dc"]]:
    """`encode_text` by the frozen encoders; pure."""
    with encoders.precision():
        return encode_text(encoders.t5, encoders.clip, params["t5"], params["clip"], ids)


def encode_batch(
    encoders: Encoders,
    params: Params,
    target: UInt8[Array, "B _ _ 3"],
    contexts: Sequence[UInt8[Array, "B _ _ 3"]],
    ids: TextIds,
) -> EncodedBatch:
    """Latents and text features of a batch; a pure function, to be jitted.

    Under a mesh the batch may be split in any way: nothing here looks across examples.

    Args:
      params: parameters of the "vae", "t5" and "clip".
      target: pictures whose sides are multiples of 16 pixels.
      contexts: references of any such sizes; none for text to image.
    """
    txt, vec = encode_prompts(encoders, params, ids)
    return EncodedBatch(
        x0=encode_pictures(encoders, params, target),
        contexts=tuple(encode_pictures(encoders, params, pixels) for pixels in contexts),
        txt=txt,
        vec=vec,
    )


def null_text(
    encoders: Encoders, params: Params, tokenizers: Tokenizers, max_text_tokens: int
) -> tuple[Float[Array, "T features"], Float[Array, " pooled"]]:
    """Features of the empty prompt, txt [T, context_in_dim] and vec [vec_in_dim]."""
    ids, _ = tokenizers.tokenize([""], max_text_tokens)
    txt, vec = jax.jit(encode_prompts, static_argnums=0)(encoders, params, ids)
    return txt[0], vec[0]


def tokens_of(
    encoded: EncodedBatch,
    null_txt: Float[Array, "T features"],
    null_vec: Float[Array, " pooled"],
    config: MMDiTConfig,
    position_rule: latents.PositionRule = "index",
) -> TokenBatch:
    """What an objective takes of an encoded batch; pure, and cheap enough to jit with the encoder.

    Without references the context is left out altogether, as in `make_conditioning`.

    Args:
      encoded: a batch whose latents have even sides.
      null_txt, null_vec: features of the empty prompt, from `null_text`.

    Raises:
      ValueError: the text features do not fit the transformer.
    """
    _check_text(config, encoded.txt, encoded.vec)
    _check_text(config, null_txt[None], null_vec[None])
    references = [jnp.asarray(context, jnp.float32) for context in encoded.contexts]
    rows, columns = encoded.x0.shape[1:3]
    pe = position_table(
        config,
        encoded.txt.shape[1],
        (rows, columns),
        tuple(tuple(reference.shape[1:3]) for reference in references),
        position_rule,
    )
    return TokenBatch(
        x0=latents.pack(jnp.asarray(encoded.x0, jnp.float32)),
        ctx=reference_tokens(references) if references else None,
        txt=jnp.asarray(encoded.txt),
        vec=jnp.asarray(encoded.vec),
        null_txt=jnp.asarray(null_txt),
        null_vec=jnp.asarray(null_vec),
        pe=jnp.asarray(pe),
        grid=(rows // latents.PATCH, columns // latents.PATCH),
    )
