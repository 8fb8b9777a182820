"""From prompts and reference pictures to what the transformer takes.

    prompt ─ T5 tokenizer ─ [B, T] ids ─ T5 encoder ── txt [B, T, 4096]    T: 512 at most, padded
           └ CLIP tokenizer ─ [B, 77] ids ─ CLIP text ─ vec [B, 768]       pooled output alone
    reference latents ─ packed, one after another ────── ctx [B, Lc, C]    text only: None
    positions of text ‖ target ‖ references ──────────── pe

FLUX was trained with every T5 position attended, padding too: no mask unless asked for. Text
features leave in the encoders' compute dtype.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from kontext_jax import latents
from kontext_jax.models.clip import CLIPText
from kontext_jax.models.mmdit import Conditioning
from kontext_jax.models.presets import MMDiTConfig
from kontext_jax.models.t5 import T5Encoder
from kontext_jax.numerics import EXACT, Numerics
from kontext_jax.ops.rope import rope_table
from kontext_jax.tokenizing import TextIds
from kontext_jax.types import Array, Float, Params, Tokens, typed


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
    txt = t5.apply({"params": t5_params}, jnp.asarray(ids.t5), mask)
    _, vec = clip.apply({"params": clip_params}, jnp.asarray(ids.clip))
    return txt, vec


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
    txt: jax.Array,
    vec: jax.Array,
    *,
    latent_height: int,
    latent_width: int,
    references: Sequence[jax.Array] = (),
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
      latent_height: of the target, even; likewise `latent_width`.
      references: latents [1, h, w, Z], shared by the batch, or [B, h, w, Z]; any even sizes.
      guidance: the guidance input, one or [B]; None exactly for models that take none.
      numerics: precision of the rotary table.
      dtype: compute dtype of the transformer, to which some numerics round the positions.

    Raises:
      ValueError: if widths, batch sizes or guidance do not fit the transformer.
    """
    batch, num_text_tokens, txt_width = txt.shape
    if txt_width != config.context_in_dim or vec.shape != (batch, config.vec_in_dim):
        raise ValueError(
            f"text features {txt.shape} and {vec.shape} do not fit the transformer, which takes "
            f"[B, T, {config.context_in_dim}] and [B, {config.vec_in_dim}]"
        )
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

    def grid(height: int, width: int) -> tuple[int, int]:
        return height // latents.PATCH, width // latents.PATCH

    ids = np.concatenate(
        [
            latents.text_ids(num_text_tokens),
            latents.image_ids(*grid(latent_height, latent_width)),
            latents.context_ids([grid(*r.shape[1:3]) for r in references], position_rule),
        ]
    )
    pe = rope_table(
        ids,
        config.axes_dim,
        config.theta,
        numerics.rope_precision,
        ids_dtype=dtype if numerics.rope_ids_in_compute_dtype else None,
    )
    ctx = None
    if references:
        whole_batch = [jnp.broadcast_to(r, (batch, *r.shape[1:])) for r in references]
        ctx = reference_tokens(whole_batch)
    if guidance is not None:
        guidance = jnp.broadcast_to(jnp.asarray(guidance, jnp.float32), batch)
    return Conditioning(
        txt=txt,
        vec=vec,
        guidance=guidance,
        ctx=ctx,
        pe=jnp.asarray(pe),
    )
