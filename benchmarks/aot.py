"""Compiles the full-size sampler for hardware that is not here, and prints what it needs.

    pip install 'jax[tpu]'                                        # for v5e, v5p, v6e
    pip install --no-deps jax-cuda12-plugin==V jax-cuda12-pjrt==V nvidia-cudnn-cu12
                                                                  # for h100; V: version of jax
    python benchmarks/aot.py --targets v5p h100

Networks are built abstractly (shapes only, no weights) and compiled ahead of time by the very
compilers that a TPU or GPU machine would use. Memory figures are the compiler's own
(`Compiled.memory_analysis()`): what a program holds in device memory at its peak, its weights
included. They say nothing of speed, nor of what the runtime itself keeps.
"""

import argparse
import dataclasses
import json
import os
import platform
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# The compilers look for a machine of theirs and complain at length that this is none.
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import jax
import jax.numpy as jnp
import numpy as np
import rich.console
import rich.table
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from kontext_jax import compiler_options, latents
from kontext_jax.checkpoint import parameter_shapes
from kontext_jax.flow import timestep_mu, timestep_schedule
from kontext_jax.models.clip import CLIPText
from kontext_jax.models.mmdit import Conditioning, MMDiT, make_velocity_fn, prepare_steps
from kontext_jax.models.presets import PRESETS, Preset
from kontext_jax.models.t5 import T5Encoder
from kontext_jax.models.vae import VAE
from kontext_jax.ops.rope import rope_table
from kontext_jax.sampler import euler_sample

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Target:
    """A device to compile for."""

    platform: str
    topology: str
    memory_gib: float
    attention_call: str  # the custom call of an attention kernel that holds no S×S scores
    config: str | None = None


TARGETS = {
    "v5e": Target("tpu", "v5e:2x2", 16, "tpu_custom_call"),
    "v5p": Target("tpu", "v5p:2x2x1", 95, "tpu_custom_call"),
    "v6e": Target("tpu", "v6e:2x2", 32, "tpu_custom_call"),
    "h100": Target("cuda", "1x1x1", 79, "__cudnn$fmhaSoftmax", "h100.txtpb"),
}


def target_device(target: Target) -> Any:
    """The first device of the target's topology, which only the compiler knows."""
    options = {}
    if target.config is not None:
        text = (Path(__file__).parent / target.config).read_text()
        options = {"target_config": text, "topology": target.topology}
    topology = topologies.get_topology_desc(target.topology, target.platform, **options)
    return topology.devices[0]


@dataclasses.dataclass(frozen=True)
class Program:
    """A stage of a sampling request: `run(params, *inputs)`, everything abstract."""

    run: Callable
    params: Any
    inputs: tuple
    precision: str | None = None  # of products, as the pipeline asks for


def abstract_params(kind: str, config: Any, dtype: Any) -> Any:
    """Shapes of a network's parameters, stored in `dtype`."""
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), parameter_shapes(kind, config)
    )


def sampler_program(preset: Preset, size, num_references: int, num_steps: int) -> Program:
    """The whole denoising run: modulation of all steps, then the loop over steps."""
    config, dtype = preset.mmdit, jnp.bfloat16
    model = MMDiT(config, dtype=dtype)
    columns, rows = (side // latents.PIXELS_PER_TOKEN for side in size)
    num_tokens, num_text = rows * columns, preset.max_text_tokens
    ids = [latents.text_ids(num_text), latents.image_ids(rows, columns)]
    ids.append(latents.context_ids([(rows, columns)] * num_references))
    pe = rope_table(np.concatenate(ids), config.axes_dim, config.theta)
    shape = jax.ShapeDtypeStruct
    guidance = shape((1,), jnp.float32) if config.guidance_embed else None
    ctx = shape((1, num_references * num_tokens, config.in_channels), dtype)
    cond = Conditioning(
        txt=shape((1, num_text, config.context_in_dim), dtype),
        vec=shape((1, config.vec_in_dim), dtype),
        guidance=guidance,
        ctx=ctx if num_references else None,
        pe=shape(pe.shape, pe.dtype),
    )
    noise = shape((1, num_tokens, config.in_channels), jnp.float32)
    mu = timestep_mu(num_tokens) if preset.shift_timesteps else None
    timesteps = timestep_schedule(num_steps, mu)

    def run(params, cond, noise):
        steps = prepare_steps(model, params, cond, timesteps)
        return euler_sample(make_velocity_fn(model, params, cond), noise, timesteps, steps)

    return Program(run, abstract_params("mmdit", config, dtype), (cond, noise))


def text_program(preset: Preset) -> Program:
    """Both text encoders on one prompt."""
    dtype = jnp.bfloat16
    t5, clip = T5Encoder(preset.t5, dtype=dtype), CLIPText(preset.clip, dtype=dtype)
    t5_ids = jax.ShapeDtypeStruct((1, preset.max_text_tokens), jnp.int32)
    clip_ids = jax.ShapeDtypeStruct((1, preset.clip.max_position_embeddings), jnp.int32)

    def run(params, t5_ids, clip_ids):
        txt = t5.apply({"params": params["t5"]}, t5_ids)
        return txt, clip.apply({"params": params["clip"]}, clip_ids)[1]

    params = {kind: abstract_params(kind, getattr(preset, kind), dtype) for kind in ("t5", "clip")}
    return Program(run, params, (t5_ids, clip_ids))


def vae_program(preset: Preset, size, method: str) -> Program:
    """The autoencoder in float32, the default numerics: "encode" or "decode"."""
    vae = VAE(preset.vae, dtype=jnp.float32)
    width, height = size
    given = (1, height, width, 3)
    if method == "decode":
        factor = latents.VAE_FACTOR
        given = (1, height // factor, width // factor, preset.vae.z_channels)

    def run(params, x):
        return vae.apply({"params": params}, x, method=method)

    inputs = (jax.ShapeDtypeStruct(given, jnp.float32),)
    return Program(run, abstract_params("vae", preset.vae, jnp.float32), inputs, "highest")


def compile_for(target: Target, program: Program) -> dict[str, Any]:
    """Compiles a program for one device: seconds, and bytes of weights, temporaries and peak."""
    place = SingleDeviceSharding(target_device(target))
    params, inputs = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        (program.params, program.inputs),
    )
    start = time.perf_counter()
    with jax.default_matmul_precision(program.precision):
        lowered = jax.jit(program.run).lower(params, *inputs)
        compiled = lowered.compile(compiler_options.options(target.platform, "sample"))
    seconds = time.perf_counter() - start
    memory = compiled.memory_analysis()
    weights = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(params))
    peak = (
        memory.argument_size_in_bytes
        + memory.temp_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
    )
    return {
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
        "weights_bytes": weights,
        "temporary_bytes": memory.temp_size_in_bytes,
        "peak_bytes": peak,
        "compile_s": round(seconds, 1),
        "attention_calls": compiled.as_text().count(f'custom_call_target="{target.attention_call}'),
    }


def versions() -> dict[str, str]:
    """Of everything that decides the figures."""
    found = {"python": platform.python_version()}
    for name in ("jax", "jaxlib", "flax", "libtpu", "jax-cuda12-plugin", "nvidia-cudnn-cu12"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=["v5p", "h100"])
    parser.add_argument("--preset", choices=PRESETS, default="kontext-dev")
    parser.add_argument("--size", default="1024x1024", help="WIDTHxHEIGHT (default 1024x1024)")
    parser.add_argument("--references", type=int, default=1, help="of the same size (default 1)")
    parser.add_argument("--steps", type=int, default=28)
    parser.add_argument(
        "--stages",
        nargs="+",
        choices=("text", "encode", "denoise", "decode"),
        default=["text", "encode", "denoise", "decode"],
    )
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    args = parser.parse_args()
    preset = PRESETS[args.preset]
    width, height = (int(side) for side in args.size.split("x"))
    size = (width, height)
    stages = {
        "text": lambda: text_program(preset),
        "encode": lambda: vae_program(preset, size, "encode"),
        "denoise": lambda: sampler_program(preset, size, args.references, args.steps),
        "decode": lambda: vae_program(preset, size, "decode"),
    }
    if not args.references:
        del stages["encode"]
    table = rich.table.Table(
        title=f"{preset.name}, {width}×{height}, {args.references} references of that size, "
        f"{args.steps} steps, one device"
    )
    columns = ("device", "program", "parameters", "weights", "temporaries", "peak", "of", "compile")
    for column in columns:
        table.add_column(column, justify="left" if column in ("device", "program") else "right")
    rows, failures = [], []
    for name in args.targets:
        target = TARGETS[name]
        for stage in (stage for stage in stages if stage in args.stages):
            print(f"compiling {stage} for {name} …", file=sys.stderr, flush=True)
            row = {"device": name, "program": stage, **compile_for(target, stages[stage]())}
            rows.append(row)
            table.add_row(
                name,
                stage,
                f"{row['parameters'] / 1e6:,.0f} M",
                *(f"{row[k] / GIB:.2f} GiB" for k in ("weights_bytes", "temporary_bytes")),
                f"{row['peak_bytes'] / GIB:.2f} GiB",
                f"{target.memory_gib:g} GiB",
                f"{row['compile_s']:.0f} s",
            )
            if row["peak_bytes"] > target.memory_gib * GIB:
                failures.append(f"{stage} does not fit on {name}")
            if stage == "denoise" and not row["attention_calls"]:
                failures.append(f"{name}: the denoiser lacks its attention kernel")
    rich.console.Console(width=120).print(table)
    print("versions:", ", ".join(f"{k} {v}" for k, v in versions().items()))
    if args.json:
        args.json.write_text(json.dumps({"versions": versions(), "rows": rows}, indent=1) + "\n")
    for failure in failures:
        print(f"error: {failure}", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
