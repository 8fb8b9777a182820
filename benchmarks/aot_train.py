"""Compiles a config's training step for a TPU slice that is not here, and prints what it needs.

    pip install 'jax[tpu]'
    python benchmarks/aot_train.py --config configs/kontext_joint.py --topology v5p:4x4x4

The step is the one that `train.py` runs on such a batch, on the config's mesh, compiled ahead of
time by the TPU's own compiler from shapes alone. Memory is the compiler's figure for one chip, and
the collectives are those of the compiled program with their dtypes: parameters must be gathered in
the compute dtype and gradients reduced in float32, or this fails. Nothing here is a measured time.
"""

import argparse
import dataclasses
import importlib.util
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# The compiler looks for a machine of its own and complains at length that this is none.
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import jax
import jax.numpy as jnp
import rich.console
import rich.table
from aot import GIB, versions
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec

from kontext_jax import compiler_options, conditioning, latents, sharding, train_config
from kontext_jax.checkpoint import parameter_shapes
from kontext_jax.chips import peak_flops
from kontext_jax.data.batches import EncodedBatch
from kontext_jax.flops import mmdit_flops
from kontext_jax.flow_matching_task import DTYPES, UNTRAINED
from kontext_jax.hlo_collectives import collectives
from kontext_jax.models.presets import Preset
from kontext_jax.ops.attention import backend_for
from kontext_jax.task_table import make_task
from kontext_jax.tokenizing import TextIds
from kontext_jax.train_config import TrainConfig
from kontext_jax.train_loop import abstract_state

ACTIVATIONS = 0.01  # share of the traffic below which a kind of collective is not of parameters


def load_config(path: Path, settings: list[tuple[str, str]]) -> TrainConfig:
    """The config of a file, changed as given, with nothing left to read from disk."""
    spec = importlib.util.spec_from_file_location("config", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = train_config.parse(module.get_config(), settings)
    if config.train != "full":
        raise SystemExit(f"{path} trains {config.train}; only full training is compiled here")
    backend = config.attention_backend
    if backend == "auto":
        backend = backend_for("tpu", config.model.mmdit.head_dim, DTYPES[config.dtype])
    return dataclasses.replace(config, weights="", encoders=UNTRAINED, attention_backend=backend)


def shapes_on(mesh: jax.sharding.Mesh, tree: Any, shardings: Any) -> Any:
    return jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tree, shardings
    )


def encoded_batch(
    preset: Preset, dtype: Any, batch_size: int, size: tuple[int, int], num_references: int
) -> EncodedBatch:
    """Shapes of an encoded batch whose references are as large as its targets."""
    columns, rows = (side // latents.VAE_FACTOR for side in size)
    shape = jax.ShapeDtypeStruct
    picture = shape((batch_size, rows, columns, preset.vae.z_channels), dtype)
    return EncodedBatch(
        x0=picture,
        contexts=(picture,) * num_references,
        txt=shape((batch_size, preset.max_text_tokens, preset.mmdit.context_in_dim), dtype),
        vec=shape((batch_size, preset.mmdit.vec_in_dim), dtype),
    )


def compile_and_measure(mesh, run, args, **jit_options) -> dict[str, Any]:
    """Bytes on one chip, collectives and seconds of compilation of a program."""
    start = time.perf_counter()
    with sharding.activation_rules(mesh):
        lowered = jax.jit(run, **jit_options).lower(*args)
        compiled = lowered.compile(compiler_options.options("tpu", "train"))
    seconds = time.perf_counter() - start
    memory, text = compiled.memory_analysis(), compiled.as_text()
    return {
        "argument_bytes": memory.argument_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "peak_bytes": memory.argument_size_in_bytes
        + memory.temp_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes,
        "compile_s": round(seconds, 1),
        "attention_calls": text.count('custom_call_target="tpu_custom_call'),
        "collectives": [
            {"kind": kind, "dtype": dtype, **dataclasses.asdict(traffic)}
            for (kind, dtype), traffic in collectives(text).items()
        ],
        "text": text,
    }


def compile_step(config: TrainConfig, mesh, size, num_references: int) -> dict[str, Any]:
    """The optimizer's step, and its model FLOPs on one chip."""
    task = make_task(config, open_weights=None)
    preset, dtype = config.model, DTYPES[config.dtype]
    encoded = encoded_batch(preset, dtype, config.batch_size, size, num_references)
    null = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), (encoded.txt, encoded.vec)
    )
    tokens = jax.eval_shape(
        lambda encoded, null: conditioning.tokens_of(encoded, *null, preset.mmdit), encoded, null
    )
    state = abstract_state(task, mesh)
    everywhere = NamedSharding(mesh, PartitionSpec())
    key = jax.eval_shape(lambda: jax.random.key(0))
    found = compile_and_measure(
        mesh,
        task.objective.step,
        (
            state,
            {},
            shapes_on(mesh, tokens, sharding.batch_shardings(mesh, tokens)),
            shapes_on(mesh, key, everywhere),
        ),
        donate_argnums=0,
        out_shardings=(jax.tree.map(lambda x: x.sharding, state), everywhere),
    )
    num_tokens = (tokens.pe.shape[-2] - preset.max_text_tokens, preset.max_text_tokens)
    flops = mmdit_flops(preset.mmdit, num_tokens[1], num_tokens[0]).training()
    found["flops_per_chip"] = flops * config.batch_size / mesh.size
    found["tokens"] = sum(num_tokens)
    return found


def compile_encoders(config: TrainConfig, mesh, size, num_references: int) -> dict[str, Any]:
    """T5, CLIP and the autoencoder on one micro-batch, frozen and split over the mesh."""
    preset, dtype = config.model, DTYPES[config.dtype]
    encoders, shape = conditioning.make_encoders(preset, dtype), jax.ShapeDtypeStruct
    params = {
        kind: jax.tree.map(
            lambda x, stored=stored: shape(x.shape, stored),
            parameter_shapes(kind, getattr(preset, kind)),
        )
        for kind, stored in (("vae", jnp.float32), ("t5", dtype), ("clip", dtype))
    }
    batch = config.batch_size
    picture = shape((batch, size[1], size[0], 3), jnp.uint8)
    ids = TextIds(
        t5=shape((batch, preset.max_text_tokens), jnp.int32),
        clip=shape((batch, preset.clip.max_position_embeddings), jnp.int32),
        t5_mask=shape((batch, preset.max_text_tokens), jnp.bool_),
    )
    inputs = (picture, (picture,) * num_references, ids)

    def run(params, target, contexts, ids):
        return conditioning.encode_batch(encoders, params, target, contexts, ids)

    return compile_and_measure(
        mesh,
        run,
        (
            shapes_on(mesh, params, sharding.state_shardings(mesh, params)),
            *shapes_on(mesh, inputs, sharding.batch_shardings(mesh, inputs)),
        ),
    )


def dtype_failures(step: dict[str, Any], dtype: str) -> list[str]:
    """What of the parameters and gradients travels in the wrong dtype."""
    short = {"bfloat16": "bf16", "float32": "f32"}
    total = sum(row["full_bytes"] for row in step["collectives"])
    wanted = {"all-gather": short[dtype], "reduce-scatter": "f32", "all-reduce": "f32"}
    return [
        f"{row['full_bytes'] / GIB:.2f} GiB of {row['kind']} in {row['dtype']}, expected {right}"
        for row in step["collectives"]
        if (right := wanted.get(row["kind"])) and right != row["dtype"]
        and row["full_bytes"] > ACTIVATIONS * total
    ]  # fmt: skip


def print_tables(console, step: dict[str, Any], peak: float | None) -> None:
    table = rich.table.Table(title="collectives of one chip in one step")
    for column in ("kind", "dtype", "count", "arrays", "over the links"):
        table.add_column(column, justify="left" if column in ("kind", "dtype") else "right")
    for row in step["collectives"]:
        table.add_row(
            row["kind"],
            row["dtype"],
            str(row["count"]),
            *(f"{row[key] / GIB:.2f} GiB" for key in ("full_bytes", "link_bytes")),
        )
    console.print(table)
    line = f"model FLOPs of one chip: {step['flops_per_chip'] / 1e12:.1f} TFLOP"
    if peak:
        line += f", {step['flops_per_chip'] / peak * 1e3:.0f} ms at the peak of its bfloat16 units"
    console.print(line)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", type=Path, default=Path("configs/kontext_joint.py"))
    parser.add_argument("--topology", default="v5p:4x4x4")
    parser.add_argument("--size", default="1024x1024", help="WIDTHxHEIGHT (default 1024x1024)")
    parser.add_argument("--references", type=int, default=1, help="of the same size (default 1)")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of the config"
    )
    parser.add_argument("--programs", nargs="+", choices=("step", "encoders"), default=["step"])
    parser.add_argument("--limit-gib", type=float, default=40, help="fail above (default 40)")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--text", type=Path, help="also write the step's compiled program here")
    args = parser.parse_args()
    settings = [tuple(text.split("=", 1)) for text in args.set]
    config = load_config(args.config, settings)
    width, height = (int(side) for side in args.size.split("x"))
    devices = topologies.get_topology_desc(args.topology, "tpu").devices
    mesh = sharding.make_mesh(config.mesh, devices)
    axes = " × ".join(f"{axis} {size}" for axis, size in mesh.shape.items() if size > 1)
    makers = {"step": compile_step, "encoders": compile_encoders}
    found = {}
    for name in args.programs:
        print(f"compiling {name} for {args.topology} …", file=sys.stderr, flush=True)
        found[name] = makers[name](config, mesh, (width, height), args.references)
    console = rich.console.Console(width=120)
    table = rich.table.Table(
        title=f"{args.config.stem}: {width}×{height}, {args.references} reference(s), batch "
        f"{config.batch_size} in {config.accumulate_steps} part(s) on {mesh.size} "
        f"{devices[0].device_kind}; {axes}; remat {config.remat}"
    )
    for column in ("program", "arguments", "temporaries", "peak of one chip", "compile"):
        table.add_column(column, justify="left" if column == "program" else "right")
    for name, row in found.items():
        keys = ("argument_bytes", "temporary_bytes", "peak_bytes")
        table.add_row(name, *(f"{row[k] / GIB:.2f} GiB" for k in keys), f"{row['compile_s']:.0f} s")
    console.print(table)
    failures = [
        f"{name} needs {row['peak_bytes'] / GIB:.1f} GiB of a chip, more than {args.limit_gib:g}"
        for name, row in found.items()
        if row["peak_bytes"] > args.limit_gib * GIB
    ]
    if step := found.get("step"):
        print_tables(console, step, peak_flops(devices[0].device_kind))
        failures += dtype_failures(step, config.dtype)
        if config.attention_backend == "splash" and not step["attention_calls"]:
            failures.append("the step lacks its attention kernel")
    print("versions:", ", ".join(f"{k} {v}" for k, v in versions().items()))
    texts = {name: row.pop("text") for name, row in found.items()}
    if args.text and "step" in texts:
        args.text.write_text(texts["step"])
    if args.json:
        report = {"versions": versions(), "mesh": dict(mesh.shape), "programs": found}
        args.json.write_text(json.dumps(report, indent=1) + "\n")
    for failure in failures:
        print(f"error: {failure}", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
