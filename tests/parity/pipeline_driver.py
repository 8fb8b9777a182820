"""Whole edits through `kontext_jax.sampling.pipeline.Pipeline`, asked for as diffusers is asked."""

import dataclasses
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from shared_cases import Call
from shared_drivers import denoise_trajectory, pe_of, to_nchw, to_nhwc

from convert_weights import open_foreign_bundle
from kontext_jax.batches import Conditioning
from kontext_jax.flow import path as flow
from kontext_jax.models.mmdit import MMDiT
from kontext_jax.models.tokenizing import Tokenizers
from kontext_jax.numerics import DIFFUSERS, Numerics
from kontext_jax.pictures import files as images
from kontext_jax.pictures import latents
from kontext_jax.pictures.sizes import SizePlan, plan_sizes
from kontext_jax.sampling.denoising import Denoising
from kontext_jax.sampling.pipeline import Pipeline

DEFAULT_MAX_AREA = 1024**2
DEFAULT_TEXT_TOKENS = 512


def open_pipeline(
    folder: Path, max_text_tokens: int = DEFAULT_TEXT_TOKENS, dtype: str = "float32"
) -> Pipeline:
    """Our pipeline on a diffusers folder, for prompts of diffusers' `max_sequence_length`."""
    bundle = open_foreign_bundle(folder)
    preset = dataclasses.replace(bundle.preset, max_text_tokens=max_text_tokens)
    return Pipeline(dataclasses.replace(bundle, preset=preset), dtype=dtype)


def plan_like_diffusers(picture_size: tuple[int, int] | None, call: dict) -> SizePlan:
    """Sizes of target and reference that our rules give for a call of diffusers' pipeline."""
    max_area = call.get("max_area", DEFAULT_MAX_AREA)
    width, height = latents.size_of_area(call["width"], call["height"], max_area)
    return plan_sizes(
        [] if picture_size is None else [picture_size],
        numerics=DIFFUSERS,
        preset_megapixels=DEFAULT_MAX_AREA / 1e6,
        size=f"{width}x{height}",
        match_references=picture_size is not None and not call.get("_auto_resize", True),
    )


@dataclasses.dataclass
class Edit:
    """Everything on the way to a picture; arrays channels last, tokens [B, L, C]."""

    reference_pixels: np.ndarray | None  # uint8 [height, width, 3], resized
    reference: jnp.ndarray | None  # latents [B, h/8, w/8, Z]
    txt: jnp.ndarray
    vec: jnp.ndarray
    negative: tuple[jnp.ndarray, jnp.ndarray] | None
    final: jnp.ndarray  # latents
    decoded: np.ndarray

    @property
    def image(self) -> np.ndarray:
        """In [0, 1], as diffusers hands it out."""
        return np.clip(self.decoded / 2 + 0.5, 0, 1)

    @property
    def image_uint8(self) -> np.ndarray:
        return np.stack([latents.model_to_pixels(x, DIFFUSERS.uint8_rule) for x in self.decoded])


def encode_texts(pipeline: Pipeline, prompts: str | list[str]):
    """Features of one prompt or several, [B, T, …] and [B, …]."""
    encoded = [
        pipeline.stages.encode_text(p) for p in ([prompts] if isinstance(prompts, str) else prompts)
    ]
    return tuple(jnp.concatenate(features) for features in zip(*encoded, strict=True))


def edit(
    pipeline: Pipeline,
    noise: np.ndarray,
    call: dict,
    picture: np.ndarray | None = None,
    features: tuple[np.ndarray, np.ndarray] | None = None,
    negative: tuple[np.ndarray, np.ndarray] | None = None,
    numerics: Numerics = DIFFUSERS,
) -> Edit:
    """Makes the pictures of one call.

    Args:
      noise: [B, Z, h/8, w/8].
      call: arguments of diffusers' pipeline.
      picture: reference, uint8 [height, width, 3].
      features: text features and pooled ones, [B, T, …] and [B, …]; None: of call["prompt"].
      negative: likewise, of the negative prompt.
      numerics: of denoising.
    """
    batch = len(noise)
    sizes = plan_like_diffusers(None if picture is None else picture.shape[1::-1], call)
    expected_noise = tuple(side // 8 for side in sizes.output[::-1])
    assert noise.shape[2:] == expected_noise, f"sizes: ours {sizes.output}, noise {noise.shape}"
    if features is None:
        features = encode_texts(pipeline, call["prompt"])
    if negative is None and call.get("negative_prompt") is not None:
        negative = encode_texts(pipeline, call["negative_prompt"])
    pixels = reference = None
    if picture is not None:
        fit = sizes.references[0]
        pixels = images.resize(picture, *fit.size, box=fit.box)
        reference = pipeline.stages.encode_picture(pixels, DIFFUSERS)
        reference = jnp.broadcast_to(reference, (batch, *reference.shape[1:]))
    takes_guidance = pipeline.preset.mmdit.guidance_embed
    guided = negative is not None and call.get("true_cfg_scale", 1) > 1
    txt, vec = map(jnp.asarray, features)
    negative = tuple(map(jnp.asarray, negative)) if guided else None
    given = Denoising(
        to_nhwc(noise).astype(pipeline.dtype),
        (txt, vec),
        call["num_inference_steps"],
        guidance=np.full(batch, call["guidance_scale"], np.float32) if takes_guidance else None,
        references=[] if reference is None else [reference],
        negative=negative,
        true_cfg_scale=np.full(batch, call["true_cfg_scale"], np.float32) if guided else None,
        numerics=numerics,
    )
    final = pipeline.stages.denoise(given)
    decoded = np.concatenate(
        [pipeline.stages.decode(final[i : i + 1], DIFFUSERS) for i in range(batch)]
    ).astype(np.float32)
    return Edit(pixels, reference, txt, vec, negative, final, decoded)


def pipeline(call: Call) -> dict:
    """Driver of the reference cases that are whole pipelines."""
    x, arguments = call.inputs(), call.spec["call"]
    ours = open_pipeline(
        (call.folder / call.spec["model"]).resolve(),
        arguments.get("max_sequence_length", DEFAULT_TEXT_TOKENS),
    )
    picture = None
    if call.spec["image"] is not None:
        picture = images.load_picture(call.folder / call.spec["image"]).pixels
        sizes = plan_like_diffusers(picture.shape[1::-1], arguments)
        assert list(sizes.references[0].size) == call.spec["context_size"]
    sizes = plan_like_diffusers(None if picture is None else picture.shape[1::-1], arguments)
    assert list(sizes.output) == call.spec["target_size"]

    if (expected_ids := call.spec.get("tokenizer_ids")) is not None:
        tokenizers = Tokenizers(**ours.stages.bundle.tokenizer_dirs)
        ids, _ = tokenizers.tokenize([arguments["prompt"]], arguments["max_sequence_length"])
        assert ids.t5.tolist() == expected_ids["t5_input_ids"]
        assert ids.clip.tolist() == expected_ids["clip_input_ids"]

    def given(prefix: str):
        names = [f"{prefix}{name}" for name in ("prompt_embeds", "pooled_prompt_embeds")]
        return tuple(x[name] for name in names) if names[0] in x else None

    made = edit(ours, x["noise"], arguments, picture, given(""), given("negative_"))
    outputs = {
        "image": made.image,
        "image_uint8": made.image_uint8,
        "decoded": to_nchw(made.decoded),
        "prompt_embeds": made.txt,
        "pooled_prompt_embeds": made.vec,
    }
    outputs |= steps_of(ours, made, x["noise"], arguments)
    if made.reference is not None:
        outputs["context_tokens"] = latents.pack(made.reference)
        outputs["cond_image_uint8"] = made.reference_pixels
    final_tokens = np.asarray(latents.pack(made.final))
    np.testing.assert_allclose(outputs["trajectory"][-1], final_tokens, rtol=0, atol=1e-4)
    return outputs


def steps_of(ours: Pipeline, made: Edit, noise: np.ndarray, arguments: dict) -> dict:
    """What the pipeline keeps to itself: every step, from the same networks and features."""
    model = MMDiT(ours.preset.mmdit, dtype=jnp.float32)
    params = ours.stages.bundle.components["mmdit"].load(dtype=jnp.float32)
    img = latents.pack(to_nhwc(noise))
    batch, num_tokens = img.shape[:2]
    grid = [side // latents.PATCH for side in noise.shape[2:]]
    grids = []
    if made.reference is not None:
        grids = [tuple(side // latents.PATCH for side in made.reference.shape[1:3])]
    txt_ids = latents.text_ids(made.txt.shape[1])
    img_ids = np.concatenate([latents.image_ids(*grid), latents.context_ids(grids)])
    guidance = np.full(batch, arguments["guidance_scale"], np.float32)
    timesteps = flow.timestep_schedule(
        arguments["num_inference_steps"], flow.timestep_mu(num_tokens)
    )
    cond = Conditioning(
        txt=made.txt,
        vec=made.vec,
        guidance=guidance if ours.preset.mmdit.guidance_embed else None,
        ctx=None if made.reference is None else latents.pack(made.reference),
        pe=pe_of(ours.preset.mmdit, txt_ids, img_ids),
    )
    negative = None
    if made.negative is not None:
        negative = cond.replace(txt=made.negative[0], vec=made.negative[1])
    trajectory, velocities, negative_velocities = denoise_trajectory(
        *(model, params, cond, img, timesteps),
        negative=negative,
        true_cfg_scale=arguments.get("true_cfg_scale", 1.0),
    )
    return {
        "trajectory": trajectory,
        "velocities": velocities,
        "negative_velocities": negative_velocities,
        "sigmas": timesteps,
        "timesteps": timesteps[:-1] * 1000,
        "img_ids": img_ids,
        "txt_ids": txt_ids,
        "guidance": guidance,
    }
