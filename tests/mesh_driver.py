r"""Trains and samples a tiny model on eight virtual devices under several meshes; prints JSON.

    XLA_FLAGS=--xla_force_host_platform_device_count=8 \
        python tests/mesh_driver.py [--train MESH …] [--sample MESH …] [--attention MESH …]

MESH is "none" or sizes by axis, such as "data=2,fsdp=4". Deviations are from the first mesh given,
those of attention from the reference.
"""

import argparse
import collections
import contextlib
import functools
import json
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from kontext_jax.batches import Conditioning, TokenBatch
from kontext_jax.flow.samplers import euler_sample
from kontext_jax.hlo.collectives import collectives
from kontext_jax.models import mmdit, token_layout
from kontext_jax.models.mmdit import MMDiT, init_params, make_velocity_fn
from kontext_jax.models.parameter_sharding import state_shardings
from kontext_jax.models.presets import MMDiTConfig
from kontext_jax.objectives.flow_matching import FlowMatchingConfig, make_flow_matching
from kontext_jax.objectives.state import make_train_state
from kontext_jax.ops.attention import attention
from kontext_jax.ops.rope import rope_table
from kontext_jax.pictures import latents
from kontext_jax.runtime import sharding
from kontext_jax.runtime.placement import Placement
from kontext_jax.runtime.sharding import (
    MeshConfig,
    activation_rules,
    batch_shardings,
    make_mesh,
    shard_batch,
)

CONFIG = MMDiTConfig(
    in_channels=8,
    out_channels=8,
    vec_in_dim=8,
    context_in_dim=16,
    hidden_size=32,
    num_heads=4,
    depth=1,
    depth_single_blocks=1,
    axes_dim=(2, 2, 4),
)
BATCH, NUM_TEXT, TARGET, REFERENCE = 8, 5, (3, 4), (2, 2)
NUM_STEPS = 3
MODEL = MMDiT(CONFIG, attention_backend="chunked", remat="save_attention", zero_init=False)
# eps well above the rounding of gradients, which Adam would else blow up to the size of a step.
OPTIMIZER = optax.adam(0.1, eps=1e-3)


def host_batch() -> TokenBatch:
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
    ids = [
        latents.text_ids(NUM_TEXT),
        latents.image_ids(*TARGET),
        latents.context_ids([REFERENCE]),
    ]
    return TokenBatch(
        x0=draw(BATCH, 12, CONFIG.in_channels),
        ctx=draw(BATCH, 4, CONFIG.in_channels),
        txt=draw(BATCH, NUM_TEXT, CONFIG.context_in_dim),
        vec=draw(BATCH, CONFIG.vec_in_dim),
        null_txt=draw(NUM_TEXT, CONFIG.context_in_dim),
        null_vec=draw(CONFIG.vec_in_dim),
        pe=rope_table(np.concatenate(ids), CONFIG.axes_dim, CONFIG.theta),
    )


def make_objective():
    def predict(params, frozen, x_t, t, batch, guidance):
        cond = Conditioning(batch.txt, batch.vec, guidance, batch.ctx, batch.pe)
        return make_velocity_fn(MODEL, params, cond)(x_t, t, None)

    return make_flow_matching(
        predict,
        functools.partial(init_params, MODEL),
        OPTIMIZER,
        FlowMatchingConfig(text_dropout=0.5),
        takes_guidance=True,
        ema_decay=0.9,
    )


def parse_mesh(text: str):
    if text == "none":
        return None
    sizes = {name: int(size) for name, size in (part.split("=") for part in text.split(","))}
    config = MeshConfig(**{"fsdp": 1, **sizes})
    return make_mesh(config, jax.devices()[: math.prod(sizes.values())])


def drawn_params():
    shapes = jax.eval_shape(functools.partial(init_params, MODEL), jax.random.key(0))
    rng = np.random.default_rng(2)
    return jax.tree.map(lambda x: 0.2 * rng.standard_normal(x.shape).astype(np.float32), shapes)


def run_step(objective, initial, text: str):
    """(loss, state after the step, the step's compiled program) under a mesh."""
    mesh, key = parse_mesh(text), jax.random.key(0)
    if mesh is None:
        compiled = jax.jit(objective.step).lower(initial, {}, host_batch(), key).compile()
        state, metrics = compiled(initial, {}, host_batch(), key)
        return float(metrics["loss"]), state, compiled
    shardings = state_shardings(mesh, initial)
    batch = shard_batch(mesh, host_batch())
    assert jax.tree.map(lambda x: x.sharding, batch) == batch_shardings(mesh, batch)
    with activation_rules(mesh):
        state = jax.device_put(initial, shardings)
        step = jax.jit(objective.step, out_shardings=(shardings, None))
        compiled = step.lower(state, {}, batch, key).compile()
        state, metrics = compiled(state, {}, batch, key)
    return float(metrics["loss"]), state, compiled


def deviation(ours, theirs) -> float:
    """Largest difference of two trees of arrays, over the largest value of its array."""
    ours, theirs = (jax.tree.leaves(jax.tree.map(np.asarray, tree)) for tree in (ours, theirs))
    return max(
        float(np.abs(a - b).max() / max(np.abs(b).max(), 1e-6))
        for a, b in zip(ours, theirs, strict=True)
    )


@contextlib.contextmanager
def watched_activations():
    """Collects where activations lie: (logical axes, shape) → shapes of one device's part."""
    found = collections.defaultdict(set)

    def watch(x, *names):
        y = sharding.constrain(x, *names)

        def record(place):
            found[*names, x.shape].add(place.shard_shape(x.shape))

        jax.debug.inspect_array_sharding(y, callback=record)
        return y

    rooms = mmdit, token_layout
    for room in rooms:
        room.constrain = watch
    try:
        yield found
    finally:
        for room in rooms:
            room.constrain = sharding.constrain


def run_samples(text: str):
    """(samples, where activations lie, kinds of collectives) under a mesh."""
    placement = Placement(parse_mesh(text))
    batch, params = host_batch(), drawn_params()
    guidance = np.ones(BATCH, np.float32)
    cond = Conditioning(batch.txt, batch.vec, guidance, batch.ctx, batch.pe)
    cond, noise = placement.place((cond, batch.x0))
    if placement.mesh is not None:
        params = jax.device_put(params, state_shardings(placement.mesh, params))

    def run(params, cond, noise):
        velocity_fn = make_velocity_fn(MODEL, params, cond)
        return euler_sample(velocity_fn, noise, np.linspace(1, 0, NUM_STEPS + 1))

    with placement.rules(), watched_activations() as activations:
        compiled = (
            jax.jit(run, out_shardings=placement.split()).lower(params, cond, noise).compile()
        )
    kinds = {kind for kind, _ in collectives(compiled.as_text())}
    return np.asarray(compiled(params, cond, noise)), activations, kinds


def attention_on_a_mesh(text: str) -> dict[str, Any]:
    """Gradients of attention on a mesh against those without, and where they lie."""
    rng = np.random.default_rng(1)
    qkv = [rng.standard_normal((2, 2, 132, 128)).astype(np.float32) for _ in range(3)]

    def loss(backend, q, k, v):
        return jnp.sum(jnp.sin(attention(q, k, v, backend=backend)))

    def gradient(backend):
        return jax.jit(jax.grad(functools.partial(loss, backend), argnums=(0, 1, 2)))

    expected = gradient("reference")(*qkv)
    found = {}
    with activation_rules(parse_mesh(text)):
        for backend in ("chunked", "splash"):
            result = gradient(backend)(*qkv)
            found[backend] = {
                "deviation": deviation(result, expected),
                "shard": result[0].sharding.shard_shape(result[0].shape),
            }
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    for what in ("train", "sample", "attention"):
        parser.add_argument(f"--{what}", nargs="*", default=[], metavar="MESH")
    args = parser.parse_args()
    results = {"train": {}, "sample": {}, "attention": {}}
    objective = make_objective()
    initial = make_train_state(drawn_params(), OPTIMIZER, with_ema=True)
    first_moments = lambda s: s.opt_state[0].mu  # noqa: E731
    kernel = lambda tree: tree["single_blocks"]["mlp_in"]["kernel"]  # noqa: E731
    with jax.default_matmul_precision("highest"):
        for text in args.train:
            loss, state, program = run_step(objective, initial, text)
            if not results["train"]:
                expected = state
            trees = (state.params, first_moments(state), state.ema_params)
            results["train"][text] = {
                "loss": loss,
                "gradient_deviation": deviation(first_moments(state), first_moments(expected)),
                "params_deviation": deviation(
                    (state.params, state.ema_params), (expected.params, expected.ema_params)
                ),
                "kernel_shards": [
                    list(kernel(t).sharding.shard_shape(kernel(t).shape)) for t in trees
                ],
                "collectives": sorted({kind for kind, _ in collectives(program.as_text())}),
            }
        for text in args.sample:
            samples, activations, kinds = run_samples(text)
            if not results["sample"]:
                expected = samples
            results["sample"][text] = {
                "deviation": deviation(samples, expected),
                "activations": [
                    [*names, shape, part]
                    for (*names, shape), parts in activations.items()
                    for part in parts
                ],
                "collectives": sorted(kinds),
            }
        for text in args.attention:
            results["attention"][text] = attention_on_a_mesh(text)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
