"""Our side of the reference cases: one driver per kind of call.

A driver takes a call and returns the outputs it computes by name, in the references' layout
(images and latents channels first). Weights go through `convert_weights` and are cast to float32.
"""

import dataclasses
import functools
import json
import math
import re
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from shared_cases import Call

from convert_weights import read_component
from kontext_jax.batches import Conditioning
from kontext_jax.flow import path as flow
from kontext_jax.flow.samplers import euler_sample, guided_velocity_fn
from kontext_jax.models.clip import CLIPText
from kontext_jax.models.mmdit import (
    DoubleBlock,
    MMDiT,
    SingleBlock,
    make_velocity_fn,
    prepare_steps,
)
from kontext_jax.models.presets import CLIPConfig, MMDiTConfig, T5Config, VAEConfig
from kontext_jax.models.t5 import T5Encoder
from kontext_jax.models.token_layout import TokenLayout
from kontext_jax.models.vae import VAE
from kontext_jax.numerics import EXACT, NUMERICS
from kontext_jax.ops.rope import full_width, rope_table
from kontext_jax.pictures import files as images
from kontext_jax.pictures import latents


def to_nhwc(x) -> jax.Array:
    return jnp.moveaxis(jnp.asarray(x), 1, -1)


def to_nchw(x) -> np.ndarray:
    return np.moveaxis(np.asarray(x), -1, 1)


def known_fields(config_class: type, values: dict):
    """A config made of those entries of `values` that are fields of it."""
    names = {field.name for field in dataclasses.fields(config_class)}
    return config_class(
        **{k: tuple(v) if isinstance(v, list) else v for k, v in values.items() if k in names}
    )


def vae_config(params: dict) -> VAEConfig:
    """BFL's `AutoEncoderParams` in our names."""
    renamed = params | {
        "out_channels": params["out_ch"],
        "latent_scale": params["scale_factor"],
        "latent_shift": params["shift_factor"],
    }
    return known_fields(VAEConfig, renamed)


def load(path, kind: str, config):
    """Parameters read through the converter, in float32.

    A folder must say itself what it holds; a lone file is read with the config of the case.
    """
    found, params = read_component(path, kind, None if path.is_dir() else config, dtype="float32")
    assert found == config, f"{path.name}: read {found}, the case says {config}"
    return jax.tree.map(jnp.asarray, params)


@functools.lru_cache(maxsize=2)
def load_mmdit(path, config: MMDiTConfig):
    return MMDiT(config, dtype=jnp.float32), load(path, "mmdit", config)


@functools.lru_cache(maxsize=2)
def load_vae(path, config: VAEConfig):
    return VAE(config, dtype=jnp.float32), load(path, "vae", config)


def pe_of(config: MMDiTConfig, txt_ids, *image_ids):
    ids = np.concatenate([txt_ids, *image_ids], axis=-2)
    return jnp.asarray(rope_table(ids, config.axes_dim, config.theta))


def flux_forward(call: Call) -> dict:
    x = call.inputs()
    config = known_fields(MMDiTConfig, call.spec["params"])
    model, params = load_mmdit(call.weights_path(), config)
    pe = pe_of(config, x["txt_ids"], x["img_ids"])
    arguments = (x["img"], x["txt"], x["y"], x["timesteps"], x.get("guidance"), pe)
    outputs = {"pred": jax.jit(model.apply)({"params": params}, *arguments)}
    if call.spec.get("intermediates"):
        outputs |= mmdit_stages(model, params, *arguments)
    return outputs


def mmdit_stages(model: MMDiT, params, img, txt, vec, t, guidance, pe) -> dict:
    """What leaves each part of the network, the blocks applied one by one."""
    config, layer = model.config, lambda stack, i: jax.tree.map(lambda p: p[i], params[stack])
    apply = functools.partial(
        model.apply,
        capture_intermediates=lambda module, _: len(module.path) == 1,
        mutable=["intermediates"],
    )
    _, state = jax.jit(apply)({"params": params}, img, txt, vec, t, guidance, pe)
    captured = {k: v["__call__"][0] for k, v in state["intermediates"].items() if "__call__" in v}
    embeddings = ("time_in", "guidance_in", "vector_in")
    stages = {
        name: captured[name] for name in ("img_in", "txt_in", *embeddings) if name in captured
    }
    stages["vec"] = sum(stages[name] for name in embeddings if name in stages)
    cos, sin = np.moveaxis(pe, -3, 0)
    rotation = np.stack([cos, -sin, sin, cos], axis=-1)  # BFL keeps a 2×2 matrix of each pair
    stages["pe_embedder"] = rotation.reshape(*cos.shape, 2, 2)[:, None]

    modulation = jax.jit(functools.partial(model.apply, method="modulation"))
    mod = modulation({"params": params}, t, guidance, vec)
    shared = full_width(pe), TokenLayout(txt.shape[1], img.shape[1])
    carry = stages["img_in"], stages["txt_in"]
    double = jax.jit(DoubleBlock(config, model.dtype, "reference").apply)
    for i in range(config.depth):
        mods = mod.double_img[:, i], mod.double_txt[:, i]
        carry, _ = double({"params": layer("double_blocks", i)}, carry, *mods, *shared)
        stages[f"double_{i}.img"], stages[f"double_{i}.txt"] = carry
    stream = jnp.concatenate(carry[::-1], axis=1)
    single = jax.jit(SingleBlock(config, True, model.dtype, "reference").apply)
    for i in range(config.depth_single_blocks):
        stream, _ = single({"params": layer("single_blocks", i)}, stream, mod.single[:, i], *shared)
        stages[f"single_{i}"] = stream
    return stages


def apply_vae(call: Call, x: np.ndarray, method: str):
    """What a method of the autoencoder returns, and what leaves some of its modules."""
    model, params = load_vae(call.weights_path(), vae_config(call.spec["params"]))
    wanted = {re.sub(r"\.(\d)", r"_\1", name): name for name in call.spec.get("intermediates", {})}
    apply = functools.partial(
        model.apply,
        method=method,
        capture_intermediates=lambda module, called: (
            called == "__call__" and ".".join(module.path) in wanted
        ),
        mutable=["intermediates"],
    )
    returned, state = jax.jit(apply)({"params": params}, x)
    stages = {}
    for path, name in wanted.items():
        node = state["intermediates"]
        for part in path.split("."):
            node = node[part]
        stages[name] = to_nchw(node["__call__"][0])
    return returned, stages


def vae_encode(call: Call) -> dict:
    image = to_nhwc(call.inputs()["image"])
    (mean, logvar), stages = apply_vae(call, image, "moments")
    encoded, _ = apply_vae(call, image, "encode")
    return {
        "moments": to_nchw(jnp.concatenate([mean, logvar], axis=-1)),
        "mean": to_nchw(mean),
        "latents": to_nchw(encoded),
        **stages,
    }


def vae_decode(call: Call) -> dict:
    decoded, stages = apply_vae(call, to_nhwc(call.inputs()["z"]), "decode")
    return {"decoded": to_nchw(decoded), **stages}


def block_inputs(state: dict) -> dict:
    """What enters each block of a text encoder."""
    stacked = state["intermediates"]["blocks"]["block_input"][0]
    return {f"block_input_{i}": x for i, x in enumerate(stacked)}


def t5_encode(call: Call) -> dict:
    x = call.inputs()
    config = known_fields(T5Config, call.spec["config"])
    params = load(call.weights_path(), "t5", config)
    mask = x["attention_mask"].astype(bool) if "attention_mask" in x else None
    apply = functools.partial(T5Encoder(config, dtype=jnp.float32).apply, mutable=["intermediates"])
    hidden, state = jax.jit(apply)({"params": params}, x["input_ids"], mask)
    return {"last_hidden_state": hidden, **block_inputs(state)}


def clip_text_encode(call: Call) -> dict:
    config = known_fields(CLIPConfig, call.spec["config"])
    params = load(call.weights_path(), "clip", config)
    apply = functools.partial(CLIPText(config, dtype=jnp.float32).apply, mutable=["intermediates"])
    (hidden, pooled), state = jax.jit(apply)({"params": params}, call.inputs()["input_ids"])
    return {"last_hidden_state": hidden, "pooler_output": pooled, **block_inputs(state)}


def kontext_tokens(call: Call) -> dict:
    x, batch = call.inputs(), call.spec["batch"]
    noise, reference = to_nhwc(x["noise"]), to_nhwc(x["cond_latents"])
    grid = [side // latents.PATCH for side in noise.shape[1:3]]
    reference_grid = tuple(side // latents.PATCH for side in reference.shape[1:3])

    def repeated(array):
        return np.broadcast_to(array, (batch, *array.shape[-2:]))

    return {
        "img": repeated(latents.pack(noise)),
        "img_ids": repeated(latents.image_ids(*grid)),
        "txt_ids": repeated(latents.text_ids(call.spec["text_len"])),
        "img_cond_seq": repeated(latents.pack(reference)),
        "img_cond_seq_ids": repeated(latents.context_ids([reference_grid])),
    }


def schedule_of(call: Call, num_image_tokens: int) -> np.ndarray:
    mu = flow.timestep_mu(num_image_tokens) if call.spec["shift"] else None
    return flow.timestep_schedule(call.spec["num_steps"], mu)


def denoise_trajectory(
    model: MMDiT,
    params,
    cond: Conditioning,
    img,
    timesteps,
    negative: Conditioning | None = None,
    true_cfg_scale: float = 1.0,
):
    """Tokens before each step and after the last, and the velocities of each step.

    Returns:
      trajectory [N + 1, B, L, C], velocities [N, B, L, C] of cond, and of negative if there is one.
    """
    conds = [cond] if negative is None else [cond, negative]
    fns = [make_velocity_fn(model, params, c) for c in conds]
    inputs = [prepare_steps(model, params, c, timesteps, EXACT) for c in conds]
    velocity_fn, step_inputs = fns[0], inputs[0]
    if negative is not None:
        velocity_fn, step_inputs = guided_velocity_fn(*fns, true_cfg_scale), tuple(inputs)

    @jax.jit
    def step(x, i):
        t = jnp.full(x.shape[0], jnp.asarray(timesteps)[i])
        at_step = [jax.tree.map(lambda leaf: leaf[i], steps) for steps in inputs]
        velocities = [fn(x, t, entry) for fn, entry in zip(fns, at_step, strict=True)]
        return euler_sample(velocity_fn, x, timesteps, step_inputs, start=i, stop=i + 1), velocities

    trajectory, velocities = [jnp.asarray(img)], []
    for i in range(len(timesteps) - 1):
        x, step_velocities = step(trajectory[-1], i)
        trajectory.append(x)
        velocities.append(step_velocities)
    stacked = [np.stack(v) for v in zip(*velocities, strict=True)]
    return np.stack(trajectory), stacked[0], stacked[1] if negative is not None else None


def kontext_denoise(call: Call) -> dict:
    x = call.inputs()
    config = known_fields(MMDiTConfig, call.spec["params"])
    model, params = load_mmdit(call.weights_path(), config)
    cond = Conditioning(
        txt=x["txt"],
        vec=x["vec"],
        guidance=np.full(len(x["txt"]), call.spec["guidance"], np.float32),
        ctx=x["img_cond_seq"],
        pe=pe_of(config, x["txt_ids"], x["img_ids"], x["img_cond_seq_ids"]),
    )
    timesteps = schedule_of(call, x["img"].shape[1])
    trajectory, velocities, _ = denoise_trajectory(model, params, cond, x["img"], timesteps)

    @jax.jit
    def whole_run(img):  # one loop over all steps, modulation computed inside it
        return euler_sample(make_velocity_fn(model, params, cond), img, timesteps)

    return {
        "timesteps": timesteps,
        "velocities": velocities,
        "trajectory": trajectory,
        "final_tokens": whole_run(x["img"]),
    }


def check_reference_picture(call: Call, cond_image) -> None:
    """The reference is read, sized and resized as the case says, pixel for pixel."""
    picture = images.load_picture(call.folder / "input.png")
    assert [picture.width_px, picture.height_px] == call.config["image_size"]
    size = latents.preferred_size(
        picture.width_px, picture.height_px, call.config["preferred_resolutions_used"]
    )
    assert list(size) == call.config["context_size"]
    resized = latents.pixels_to_model(images.resize(picture.pixels, *size))
    np.testing.assert_array_equal(to_nchw(resized[None]), cond_image)


def kontext_generate(call: Call) -> dict:
    x = call.inputs()
    check_reference_picture(call, x["cond_image"])
    config = known_fields(MMDiTConfig, call.spec["params"])
    model, params = load_mmdit(call.weights_path(), config)
    vae, vae_params = load_vae(
        call.weights_path("vae_weights"), vae_config(call.spec["vae_params"])
    )
    batch, text_len = x["txt"].shape[:2]
    encode, decode = (
        jax.jit(functools.partial(vae.apply, {"params": vae_params}, method=method))
        for method in ("encode", "decode")
    )
    reference = encode(to_nhwc(x["cond_image"]))
    width, height = (side // latents.PIXELS_PER_TOKEN for side in call.spec["target_size"])
    reference_grid = tuple(side // latents.PATCH for side in reference.shape[1:3])
    ctx = latents.pack(reference)
    cond = Conditioning(
        txt=x["txt"],
        vec=x["vec"],
        guidance=np.full(batch, call.spec["guidance"], np.float32),
        ctx=jnp.broadcast_to(ctx, (batch, *ctx.shape[1:])),
        pe=pe_of(
            config,
            latents.text_ids(text_len),
            latents.image_ids(height, width),
            latents.context_ids([reference_grid]),
        ),
    )
    timesteps = schedule_of(call, height * width)
    steps = prepare_steps(model, params, cond, jnp.asarray(timesteps), EXACT)
    img = latents.pack(to_nhwc(x["noise"]))
    img = jnp.broadcast_to(img, (batch, *img.shape[1:]))
    tokens = jax.jit(
        lambda img: euler_sample(make_velocity_fn(model, params, cond), img, timesteps, steps)
    )(img)
    final = latents.unpack(tokens, height * latents.PATCH, width * latents.PATCH)
    return {
        "cond_latents": to_nchw(reference),
        "final_latents": to_nchw(final),
        "decoded": to_nchw(decode(final)),
    }


def flow_interpolate(call: Call) -> dict:
    x = call.inputs()
    return {
        "x_t": flow.interpolate(x["x0"], x["noise"], x["t"]),
        "velocity": flow.velocity_target(x["x0"], x["noise"]),
    }


def flow_loss(call: Call) -> dict:
    x, outputs = call.inputs(), {}
    squared = (x["pred"] - flow.velocity_target(x["x0"], x["noise"])) ** 2
    per_sample = jnp.mean(squared.reshape(len(squared), -1), axis=1)
    for weighting in get_args(flow.LossWeighting):
        weight = flow.loss_weight(weighting, x["t"])
        outputs[f"weight_{weighting}"] = weight
        outputs[f"loss_{weighting}"] = jnp.mean(weight * per_sample)
    return outputs


def timestep_distribution(call: Call) -> dict:
    x, outputs = call.inputs(), {}

    def times(draws, mu, **options):
        """`flow.sample_training_times` where the draws are those of the case."""
        with pytest.MonkeyPatch.context() as patch:
            for name in ("normal", "uniform"):
                patch.setattr(jax.random, name, lambda key, shape, dtype: x[draws].astype(dtype))
            return flow.sample_training_times(jax.random.key(0), x[draws].shape, mu, **options)

    for row in call.config[call.spec["distributions"]]:
        draws = row["from"]
        if "mode_scale" in row:
            t = times(draws, 0.0, distribution="mode", mode_scale=row["mode_scale"])
        elif "alpha" not in row:
            t = times(draws, row["mean"], sigma=row["std"])
        else:
            distribution = {"normal": "logit_normal", "uniform": "uniform"}[draws]
            t = times(draws, math.log(row["alpha"]), distribution=distribution)
            shifted = flow.shift_timesteps(
                times(draws, 0.0, distribution=distribution), row["alpha"]
            )
            np.testing.assert_allclose(t, shifted, atol=2e-6)
        outputs[row["output"]] = t
    return outputs


def diffusers_trainer_timesteps(call: Call) -> dict:
    indices, t = flow.on_trainer_grid(call.inputs()["uniform"])
    return {"indices": indices, "timesteps": 1000 * t, "sigmas": t}


def schedule(call: Call) -> dict:
    rows = json.loads((call.folder / call.spec["rows_file"]).read_text())
    assert rows
    for row in rows:
        mu = flow.timestep_mu(row["image_seq_len"], row["base_shift"], row["max_shift"])
        if row["shift"]:
            assert math.isclose(mu, row["mu"], rel_tol=1e-12)
        ours = flow.timestep_schedule(row["num_steps"], mu if row["shift"] else None)
        for key in ("bfl_timesteps", "diffusers_sigmas"):
            np.testing.assert_allclose(ours, row[key], rtol=0, atol=call.spec["atol"], err_msg=key)
        np.testing.assert_allclose(
            ours[:-1] * 1000, row["diffusers_timesteps"], rtol=0, atol=1000 * call.spec["atol"]
        )
    return {}


def kontext_resolution(call: Call) -> dict:
    floors = NUMERICS[call.spec["rule"]].bucket_ratio_floors_to_16
    expected_key = {"bfl": "bfl", "diffusers": "diffusers_auto_resize"}[call.spec["rule"]]
    rows = call.config[call.spec["rows"]]
    assert rows
    for row in rows:
        if row[expected_key] is None:  # diffusers fails on images with a side under 16 pixels
            with pytest.raises(ValueError, match="16 pixels"):
                latents.preferred_size(*row["input"], floor_first=floors)
            continue
        size = latents.preferred_size(*row["input"], floor_first=floors)
        assert list(size) == row[expected_key], row["input"]
        own = [latents.floor_to_token(side) for side in row["input"]]
        assert own == row["diffusers_no_auto_resize"]
    return {}


def target_resolution(call: Call) -> dict:
    rows = call.config[call.spec["rows"]]
    assert rows
    for row in rows:
        size = latents.size_of_area(row["width"], row["height"], row["max_area"])
        assert list(size) == row["diffusers_target"], row
    return {}


def aspect_ratio_resolution(call: Call) -> dict:
    rows = call.config[call.spec["rows"]]
    assert rows
    for row in rows:
        width, height = map(float, row["aspect_ratio"].split(":"))
        size = latents.size_of_area(width, height, 1024**2)
        assert list(size) == row["bfl_width_height"], row
    return {}


NETWORK_DRIVERS = {
    driver.__name__: driver
    for driver in (
        aspect_ratio_resolution,
        clip_text_encode,
        diffusers_trainer_timesteps,
        flow_interpolate,
        flow_loss,
        flux_forward,
        kontext_denoise,
        kontext_generate,
        kontext_resolution,
        kontext_tokens,
        schedule,
        t5_encode,
        target_resolution,
        timestep_distribution,
        vae_decode,
        vae_encode,
    )
}
