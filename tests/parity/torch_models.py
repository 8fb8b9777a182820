"""Small random diffusers pipelines, and running them.

Weights are drawn so that every parameter matters: kernels with variance 1/fan-in, norms around 1,
biases and embeddings of visible size. All are exact in bfloat16, whatever they are stored in.
"""

import copy
import dataclasses
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxKontextPipeline,
    FluxTransformer2DModel,
)
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils import logging
from PIL import Image
from transformers import (
    AutoTokenizer,
    CLIPTextConfig,
    CLIPTextModel,
    T5Config,
    T5EncoderModel,
)

logging.set_verbosity_error()
logging.disable_progress_bar()

BLOCKS = 4  # resolutions of the autoencoder; Kontext's is 8 times smaller in latents


@dataclasses.dataclass(frozen=True)
class PipelineSizes:
    """What a drawn pipeline looks like; the rest follows."""

    num_heads: int = 2
    axes_dim: tuple[int, int, int] = (4, 6, 6)
    depth: int = 1
    depth_single: int = 2
    guidance_embeds: bool = True
    shifts_timesteps: bool = True  # like dev and Kontext; schnell's scheduler does not
    vae_channels: tuple[int, int, int, int] = (8, 8, 16, 16)
    vae_norm_groups: int = 4
    vae_layers: int = 1
    text_width: int = 32
    pooled_width: int = 32
    text_heads: int = 2
    text_layers: int = 2
    stored_dtype: str = "bfloat16"


def randomize(module: torch.nn.Module, generator: torch.Generator) -> None:
    """Fills a module's parameters with values that bfloat16 holds exactly."""
    with torch.no_grad():
        for name, parameter in sorted(module.named_parameters()):
            value = torch.randn(parameter.shape, generator=generator)
            if (
                "relative_attention_bias" in name
                or "embedding" in name
                or name.startswith("shared")
            ):
                value = 0.5 * value
            elif parameter.ndim >= 2:
                value = value / math.sqrt(parameter[0].numel())
            elif "norm" in name and name.endswith(("weight", "scale")):
                value = 1 + 0.1 * value
            else:
                value = 0.1 * value
            parameter.copy_(value.to(torch.bfloat16).to(parameter.dtype))


def make_pipeline(
    sizes: PipelineSizes, tokenizer_dirs: dict[str, Path], seed: int
) -> FluxKontextPipeline:
    """A whole pipeline with random weights.

    Args:
      tokenizer_dirs: folders of the "t5" and "clip" tokenizers.
    """
    tokenizers = {kind: AutoTokenizer.from_pretrained(d) for kind, d in tokenizer_dirs.items()}
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=64,
        num_layers=sizes.depth,
        num_single_layers=sizes.depth_single,
        attention_head_dim=sum(sizes.axes_dim),
        num_attention_heads=sizes.num_heads,
        joint_attention_dim=sizes.text_width,
        pooled_projection_dim=sizes.pooled_width,
        guidance_embeds=sizes.guidance_embeds,
        axes_dims_rope=sizes.axes_dim,
    )
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * BLOCKS,
        up_block_types=("UpDecoderBlock2D",) * BLOCKS,
        block_out_channels=sizes.vae_channels,
        layers_per_block=sizes.vae_layers,
        norm_num_groups=sizes.vae_norm_groups,
        latent_channels=16,
        scaling_factor=0.3611,
        shift_factor=0.1159,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    clip = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizers["clip"]),
            hidden_size=sizes.pooled_width,
            intermediate_size=2 * sizes.pooled_width,
            num_hidden_layers=sizes.text_layers,
            num_attention_heads=sizes.text_heads,
            bos_token_id=tokenizers["clip"].bos_token_id,
            eos_token_id=2,  # as in the published config: pooled at the highest id
        )
    )
    t5 = T5EncoderModel(
        T5Config(
            vocab_size=len(tokenizers["t5"]),
            d_model=sizes.text_width,
            d_kv=12,
            d_ff=2 * sizes.text_width,
            num_layers=sizes.text_layers,
            num_heads=sizes.text_heads,
            feed_forward_proj="gated-gelu",
        )
    )
    generator = torch.Generator().manual_seed(seed)
    for module in (transformer, vae, clip, t5):
        randomize(module, generator)
        if module is vae:  # most pixels inside [-1, 1]
            module.decoder.conv_out.weight.data *= 0.5
        module.to(getattr(torch, sizes.stored_dtype)).eval()
    return FluxKontextPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(
            shift=3.0 if sizes.shifts_timesteps else 1.0,
            use_dynamic_shifting=sizes.shifts_timesteps,
            base_shift=0.5,
            max_shift=1.15,
        ),
        vae=vae,
        text_encoder=clip,
        tokenizer=tokenizers["clip"],
        text_encoder_2=t5,
        tokenizer_2=tokenizers["t5"],
        transformer=transformer,
    )


def random_picture(seed: int, width_px: int, height_px: int) -> Image.Image:
    """A colourful picture with structure at several scales."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (4, 5, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((width_px, height_px), Image.Resampling.BICUBIC), np.int16)
    noise = rng.integers(-24, 25, smooth.shape)
    return Image.fromarray(np.clip(smooth + noise, 0, 255).astype(np.uint8))


def run_pipeline(
    pipeline: FluxKontextPipeline,
    noise: np.ndarray,
    on_step: Callable[[torch.Tensor], None] | None = None,
    **call,
) -> np.ndarray:
    """The pictures [B, height, width, 3] in [0, 1] made from latent noise [B, 16, h/8, w/8].

    Args:
      on_step: called with the tokens after each step.
      call: further arguments of the pipeline.
    """
    tensor = torch.from_numpy(noise)
    latents = pipeline._pack_latents(tensor, *noise.shape)

    def callback(_pipeline, _step, _t, tensors):
        if on_step is not None:
            on_step(tensors["latents"])
        return tensors

    pipeline.set_progress_bar_config(disable=True)
    with torch.no_grad():
        pictures = pipeline(
            latents=latents.to(pipeline.transformer.dtype),
            output_type="pt",
            callback_on_step_end=callback,
            **call,
        ).images
    return pictures.float().permute(0, 2, 3, 1).numpy()


class PictureWithoutPixels(Image.Image):
    """All that is needed to decide on sizes."""

    def __init__(self, size: tuple[int, int]):
        super().__init__()
        self._size = size


class SizesFound(Exception):
    """Thrown where diffusers has decided on all sizes, before it computes anything."""


def sizes_of_diffusers(
    pipeline: FluxKontextPipeline, picture_size: tuple[int, int], **call
) -> tuple[tuple[int, int], tuple[int, int]]:
    """(width, height) of the target and of the reference, by diffusers' own `__call__`."""
    found = []

    class Watcher(VaeImageProcessor):
        def resize(self, image, height, width):
            found.append((width, height))
            return image

        def preprocess(self, image, height, width):
            assert found == [(width, height)]
            return image

    def stop(image, batch_size, channels, height, width, *_):
        raise SizesFound(width, height)

    config = pipeline.transformer.config
    stub = copy.copy(pipeline)
    stub.image_processor, stub.prepare_latents = Watcher(vae_scale_factor=16), stop
    try:
        stub(
            image=PictureWithoutPixels(picture_size),
            prompt_embeds=torch.zeros(1, 1, config.joint_attention_dim),
            pooled_prompt_embeds=torch.zeros(1, config.pooled_projection_dim),
            **call,
        )
    except SizesFound as sizes:
        return sizes.args, found[0]
    raise AssertionError("the pipeline never prepared its latents")
