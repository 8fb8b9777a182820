"""Makes `tests/goldens` from PyTorch and diffusers: small random models, and what they compute.

    pip install -r requirements/parity.txt
    python tools/make_goldens.py             # writes tests/goldens
    python tools/make_goldens.py --check     # makes them again and compares

Weights, and everything in bfloat16 arithmetic, come out identical on every machine (seeded draws on
the CPU, one thread); on one machine all files do, byte for byte. The float32 outputs of networks
may differ in the last bits from one processor to another, so `--check` allows networks.safetensors
1e-5, and nothing else any difference.

    model/                a diffusers folder without its tokenizers, weights in bfloat16
    bfl/                  the transformer and the autoencoder again, under BFL's names
    edit.json             the request of the edit
    networks.safetensors  inputs and outputs of each network, and of one whole edit
    numerics.safetensors  how each reference rounds: timesteps, Euler updates, positions, bytes
"""

import argparse
import json
import math
import re
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxKontextPipeline
from diffusers.image_processor import VaeImageProcessor
from diffusers.models.transformers.transformer_flux import FluxPosEmbed
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests" / "parity"))

from torch_models import PipelineSizes, make_pipeline, random_picture, run_pipeline  # noqa: E402

GOLDENS = ROOT / "tests" / "goldens"
TOKENIZERS = ROOT / "kontext_jax" / "assets" / "tokenizers"
Tensors = dict[str, torch.Tensor]


def bfl_transformer(weights: Tensors) -> Tensors:
    """A diffusers FLUX transformer under Black Forest Labs' names, fused as they fuse."""
    named: Tensors = {}

    def take(ours: str, *theirs: str, swap_halves: bool = False) -> None:
        for part in ("weight", "bias"):
            if f"{theirs[0]}.{part}" in weights:
                fused = torch.cat([weights.pop(f"{name}.{part}") for name in theirs])
                if swap_halves:  # diffusers stores (scale, shift), BFL (shift, scale)
                    fused = torch.cat(fused.chunk(2)[::-1])
                named[f"{ours}.{part}"] = fused

    def take_norms(ours: str, query: str, key: str) -> None:
        named[f"{ours}.query_norm.scale"] = weights.pop(f"{query}.weight")
        named[f"{ours}.key_norm.scale"] = weights.pop(f"{key}.weight")

    weights = dict(weights)
    take("img_in", "x_embedder")
    take("txt_in", "context_embedder")
    embedders = {"time_in": "timestep", "guidance_in": "guidance", "vector_in": "text"}
    for ours, kind in embedders.items():
        for layer, number in (("in_layer", 1), ("out_layer", 2)):
            take(f"{ours}.{layer}", f"time_text_embed.{kind}_embedder.linear_{number}")
    depths = {
        stack: 1 + max([int(m[1]) for k in weights if (m := re.match(rf"{stack}\.(\d+)\.", k))])
        for stack in ("transformer_blocks", "single_transformer_blocks")
    }
    for i in range(depths["transformer_blocks"]):
        a, b = f"double_blocks.{i}", f"transformer_blocks.{i}"
        for stream, suffix, qkv, out, norm in (
            ("img", "", ("to_q", "to_k", "to_v"), "to_out.0", ""),
            ("txt", "_context", ("add_q_proj", "add_k_proj", "add_v_proj"), "to_add_out", "added_"),
        ):
            take(f"{a}.{stream}_mod.lin", f"{b}.norm1{suffix}.linear")
            take(f"{a}.{stream}_attn.qkv", *(f"{b}.attn.{name}" for name in qkv))
            take(f"{a}.{stream}_attn.proj", f"{b}.attn.{out}")
            take_norms(
                f"{a}.{stream}_attn.norm", f"{b}.attn.norm_{norm}q", f"{b}.attn.norm_{norm}k"
            )
            take(f"{a}.{stream}_mlp.0", f"{b}.ff{suffix}.net.0.proj")
            take(f"{a}.{stream}_mlp.2", f"{b}.ff{suffix}.net.2")
    for i in range(depths["single_transformer_blocks"]):
        a, b = f"single_blocks.{i}", f"single_transformer_blocks.{i}"
        take(f"{a}.modulation.lin", f"{b}.norm.linear")
        take(
            f"{a}.linear1",
            *(f"{b}.{name}" for name in ("attn.to_q", "attn.to_k", "attn.to_v")),
            f"{b}.proj_mlp",
        )
        take(f"{a}.linear2", f"{b}.proj_out")
        take_norms(f"{a}.norm", f"{b}.attn.norm_q", f"{b}.attn.norm_k")
    take("final_layer.adaLN_modulation.1", "norm_out.linear", swap_halves=True)
    take("final_layer.linear", "proj_out")
    assert not weights, sorted(weights)
    return named


def bfl_autoencoder(weights: Tensors) -> Tensors:
    """A diffusers autoencoder under Black Forest Labs' names."""
    num_levels = 1 + max(int(m[1]) for k in weights if (m := re.search(r"up_blocks\.(\d+)", k)))
    renamings = (
        (r"down_blocks\.(\d+)\.resnets\.", r"down.\1.block."),
        (r"down_blocks\.(\d+)\.downsamplers\.0\.", r"down.\1.downsample."),
        (r"up_blocks\.(\d+)\.resnets\.", lambda m: f"up.{num_levels - 1 - int(m[1])}.block."),
        (
            r"up_blocks\.(\d+)\.upsamplers\.0\.",
            lambda m: f"up.{num_levels - 1 - int(m[1])}.upsample.",
        ),
        (r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}"),
        (r"mid_block\.attentions\.0\.group_norm", "mid.attn_1.norm"),
        (r"mid_block\.attentions\.0\.to_([qkv])", r"mid.attn_1.\1"),
        (r"mid_block\.attentions\.0\.to_out\.0", "mid.attn_1.proj_out"),
        (r"conv_shortcut", "nin_shortcut"),
        (r"conv_norm_out", "norm_out"),
    )
    named = {}
    for name, value in weights.items():
        for pattern, replacement in renamings:
            name = re.sub(pattern, replacement, name)
        is_attention = re.search(r"attn_1\.(q|k|v|proj_out)\.weight", name)
        named[name] = value[:, :, None, None].contiguous() if is_attention else value
    assert len(named) == len(weights)
    return named


def network_goldens(pipeline: FluxKontextPipeline) -> Tensors:
    """Inputs and outputs of each network in float32, and of one whole edit."""
    generator = torch.Generator().manual_seed(1)

    def draw(*shape):
        return torch.randn(shape, generator=generator)

    config = pipeline.transformer.config
    rows, columns, text_len, batch = 3, 4, 6, 2
    target, reference = (rows, columns), (2, 3)
    ids = [
        pipeline._prepare_latent_image_ids(1, *grid, "cpu", torch.float32)
        for grid in (target, reference)
    ]
    ids[1][:, 0] = 1
    g: Tensors = {
        "mmdit.img": draw(batch, sum(map(len, ids)), config.in_channels),
        "mmdit.img_ids": torch.cat(ids),
        "mmdit.txt": draw(batch, text_len, config.joint_attention_dim),
        "mmdit.txt_ids": torch.zeros(text_len, 3),
        "mmdit.vec": draw(batch, config.pooled_projection_dim),
        "mmdit.t": torch.tensor([0.8125, 0.0009765625]),
        "mmdit.guidance": torch.tensor([2.5, 0.00390625]),
    }
    g["mmdit.velocity"] = pipeline.transformer(
        hidden_states=g["mmdit.img"],
        encoder_hidden_states=g["mmdit.txt"],
        pooled_projections=g["mmdit.vec"],
        timestep=g["mmdit.t"],
        guidance=g["mmdit.guidance"],
        img_ids=g["mmdit.img_ids"],
        txt_ids=g["mmdit.txt_ids"],
        return_dict=False,
    )[0]

    vae = pipeline.vae
    g["vae.image"] = draw(1, 3, 32, 48).clamp(-1, 1)
    moments = vae.encode(g["vae.image"]).latent_dist
    g["vae.mean"], g["vae.logvar"] = moments.mean, moments.logvar
    g["vae.latents"] = (moments.mean - vae.config.shift_factor) * vae.config.scaling_factor
    z = g["vae.latents"] / vae.config.scaling_factor + vae.config.shift_factor
    g["vae.decoded"] = vae.decode(z, return_dict=False)[0]

    vocabulary = pipeline.text_encoder_2.config.vocab_size
    g["t5.token_ids"] = torch.randint(0, vocabulary, (2, 40), generator=generator)
    g["t5.hidden"] = pipeline.text_encoder_2(g["t5.token_ids"])[0]
    clip_ids = torch.randint(0, len(pipeline.tokenizer) - 1, (2, 77), generator=generator)
    clip_ids[0, 9:] = clip_ids[1, 76] = pipeline.tokenizer.eos_token_id
    g["clip.token_ids"] = clip_ids
    clip = pipeline.text_encoder(clip_ids)
    g["clip.hidden"], g["clip.pooled"] = clip.last_hidden_state, clip.pooler_output

    width, height = 64, 48
    picture = random_picture(2, 80, 64)
    g["edit.reference"] = torch.from_numpy(np.asarray(picture).copy())
    g["edit.noise"] = draw(1, 16, height // 8, width // 8)
    steps: list[torch.Tensor] = []
    image = run_pipeline(
        pipeline,
        g["edit.noise"].numpy(),
        on_step=steps.append,
        width=width,
        height=height,
        max_area=width * height,
        prompt=EDIT["prompt"],
        image=picture,
        num_inference_steps=EDIT["num_steps"],
        guidance_scale=EDIT["guidance"],
        max_sequence_length=EDIT["max_text_tokens"],
        _auto_resize=False,
    )
    g["edit.final_tokens"] = steps[-1]
    g["edit.image"] = torch.from_numpy(image)
    return g


EDIT = {
    "prompt": "Make the small red circle blue and keep the background",
    "num_steps": 3,
    "guidance": 2.5,
    "max_text_tokens": 32,
}


def numerics_goldens() -> Tensors:
    """What each reference makes of a number in bfloat16, and its schedule in float32."""
    g: Tensors = {}
    bf16 = torch.bfloat16
    for num_steps, num_tokens in ((4, 24), (28, 4096), (30, 4056)):
        name = f"schedule.{num_steps}_steps_{num_tokens}_tokens"
        mu = 0.5 + (1.15 - 0.5) * (num_tokens - 256) / (4096 - 256)
        scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
        scheduler.set_timesteps(sigmas=np.linspace(1, 1 / num_steps, num_steps), mu=mu)
        g[f"{name}.diffusers"] = scheduler.sigmas.clone()
        # diffusers: the pipeline casts 1000·sigma, divides, and the transformer multiplies again.
        g[f"{name}.diffusers_embedded"] = scheduler.timesteps.to(bf16) / 1000 * 1000
        # BFL: t itself is cast, then multiplied.
        t = torch.linspace(1, 0, num_steps + 1)
        t = math.exp(mu) / (math.exp(mu) + (1 / t - 1))
        g[f"{name}.bfl"] = t
        g[f"{name}.bfl_embedded"] = t[:-1].to(bf16) * 1000
    g["guidance"] = torch.tensor([1.0, 2.5, 3.5, 4.0, 3.3, 30.0])
    g["guidance.embedded"] = g["guidance"].to(bf16) * 1000

    generator = torch.Generator().manual_seed(3)
    img = torch.randn(1, 8, 64, generator=generator).to(bf16)
    velocity = torch.randn(1, 8, 64, generator=generator).to(bf16)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / 4, 4), mu=0.5)
    g |= {"euler.img": img, "euler.velocity": velocity, "euler.timesteps": scheduler.sigmas.clone()}
    diffusers = bfl = img
    t = scheduler.sigmas
    for i in range(4):
        bfl = bfl + (t[i + 1] - t[i]).item() * velocity  # the step is a Python number there
        diffusers = scheduler.step(velocity, scheduler.timesteps[i], diffusers, return_dict=False)[
            0
        ]
    g |= {"euler.diffusers": diffusers, "euler.bfl": bfl}

    axes_dim, theta = (4, 6, 6), 10_000
    positions = torch.tensor([0, 1, 2, 63, 127, 255, 256, 257, 301], dtype=torch.float32)
    ids = torch.stack([torch.ones_like(positions), positions, positions.flip(0)], dim=-1)
    g["rope.ids"] = ids
    for name, cast in (("float64", ids), ("float64_bf16_ids", ids.to(bf16))):
        cos, sin = FluxPosEmbed(theta, axes_dim)(cast)
        g[f"rope.{name}"] = torch.stack([cos[:, ::2], sin[:, ::2]])  # pairs carry it twice
    angles = []
    for axis, dim in enumerate(axes_dim):
        omega = 1.0 / theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
        angles.append(ids[:, axis, None] * omega)
    angles = torch.cat(angles, dim=-1)
    g["rope.float32"] = torch.stack([angles.cos(), angles.sin()])

    pixels = torch.linspace(-1.2, 1.2, 4 * 997).reshape(1, 1, 4, 997).expand(1, 3, 4, 997)
    to_bytes = VaeImageProcessor().postprocess(pixels, output_type="pil")[0]
    g["bytes.image"] = pixels[0, 0].contiguous()
    g["bytes.diffusers"] = torch.from_numpy(np.asarray(to_bytes)[..., 0].copy())
    g["bytes.bfl"] = (127.5 * (g["bytes.image"].clamp(-1, 1) + 1.0)).byte()
    return g


def write_goldens(folder: Path) -> None:
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    tokenizer_dirs = {kind: TOKENIZERS / kind for kind in ("t5", "clip")}
    pipeline = make_pipeline(PipelineSizes(), tokenizer_dirs, seed=0)
    for name in ("transformer", "vae", "text_encoder", "text_encoder_2", "scheduler"):
        getattr(pipeline, name).save_pretrained(folder / "model" / name)
    pipeline.save_config(folder / "model")
    (folder / "bfl").mkdir(parents=True, exist_ok=True)
    for name, rename, module in (
        ("flux1-tiny", bfl_transformer, pipeline.transformer),
        ("ae", bfl_autoencoder, pipeline.vae),
    ):
        renamed = rename(dict(module.state_dict()))
        save_file(renamed, folder / "bfl" / f"{name}.safetensors")
    pipeline.to(torch.float32)
    with torch.no_grad():
        networks = network_goldens(pipeline)
    (folder / "edit.json").write_text(json.dumps(EDIT, indent=1) + "\n")
    for name, tensors in (("networks", networks), ("numerics", numerics_goldens())):
        contiguous = {key: value.contiguous() for key, value in tensors.items()}
        save_file(contiguous, folder / f"{name}.safetensors")


def differences(made: Path, committed: Path) -> list[str]:
    """What is not reproduced, a line each."""
    found = []
    files = {p.relative_to(made) for p in made.rglob("*") if p.is_file()}
    files |= {p.relative_to(committed) for p in committed.rglob("*") if p.is_file()}
    for file in sorted(files):
        if not (made / file).is_file() or not (committed / file).is_file():
            found.append(f"{file}: only in one of the two")
        elif file.suffix != ".safetensors":
            if (made / file).read_bytes() != (committed / file).read_bytes():
                found.append(f"{file}: differs")
        else:
            a, b = load_file(made / file), load_file(committed / file)
            found += [
                f"{file}: {name} only in one of the two" for name in sorted(a.keys() ^ b.keys())
            ]
            for name in sorted(a.keys() & b.keys()):
                if a[name].shape != b[name].shape or a[name].dtype != b[name].dtype:
                    found.append(f"{file}: {name} has another shape or dtype")
                    continue
                atol = 1e-5 if file.name == "networks.safetensors" else 0.0
                if not torch.allclose(a[name].double(), b[name].double(), rtol=0, atol=atol):
                    found.append(f"{file}: {name} differs")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--check", action="store_true", help="compare, write nothing")
    if not parser.parse_args().check:
        write_goldens(GOLDENS)
        return
    with tempfile.TemporaryDirectory() as folder:
        write_goldens(Path(folder))
        found = differences(Path(folder), GOLDENS)
    print("\n".join(found) or "tests/goldens is reproduced")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
