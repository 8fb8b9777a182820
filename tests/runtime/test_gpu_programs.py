"""The sampler compiled for an H100 that is not here: no weights are copied, and memory is small."""

import dataclasses
import importlib.util
import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import SingleDeviceSharding

from kontext_jax.models.mmdit import MMDiT, init_params
from kontext_jax.models.presets import PRESETS
from kontext_jax.ops.attention import attention, keeps_attention
from kontext_jax.plan.targets import find_target
from kontext_jax.runtime import compiler_options

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not importlib.util.find_spec("jax_cuda12_plugin"), reason="JAX's CUDA plug-in is missing"
    ),
]
MIB = 2**20
NUM_TEXT, NUM_IMAGE = 512, 8192  # a target of 1024² and a reference of that size
# Results that are no work: names for what exists already.
FREE = ("parameter", "get-tuple-element", "bitcast", "tuple", "while")


def forward(block_form, attention_backend="auto"):
    """One pass of a transformer of full width with two blocks of each kind, compiled."""
    config = dataclasses.replace(PRESETS["kontext-dev"].mmdit, depth=2, depth_single_blocks=2)
    model = MMDiT(config, jnp.bfloat16, attention_backend=attention_backend, block_form=block_form)
    place = SingleDeviceSharding(find_target("h100").devices[0])

    def shape(*dims, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(dims, dtype, sharding=place)

    params = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
    params = jax.tree.map(lambda x: shape(*x.shape), params)
    arguments = (
        *(shape(1, NUM_IMAGE, 64), shape(1, NUM_TEXT, 4096), shape(1, 768)),
        *(shape(1, dtype=jnp.float32), shape(1, dtype=jnp.float32)),
        shape(2, NUM_TEXT + NUM_IMAGE, 64, dtype=jnp.float32),
    )
    run = jax.jit(lambda params, *args: model.apply({"params": params}, *args))
    return run.lower(params, *arguments).compile(
        compiler_options=compiler_options.options("cuda", "sample")
    )


def copied_weights(text):
    """MiB of kernels that the program writes in one pass of each of its loops' bodies."""
    total = 0
    inside_fusion = False
    for line in text.splitlines():
        if head := re.match(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$", line):
            inside_fusion = "fused" in head[1] or "computation" in head[1]
        found = re.match(r"^\s+(?:ROOT )?%?[\w.\-]+ = bf16\[([\d,]+)\]\S* ([\w\-]+)\(", line)
        if not found or inside_fusion or found[2] in FREE:
            continue
        dims = [int(d) for d in found[1].split(",") if d != "1"]
        count = 2 * jnp.prod(jnp.array(dims)).item() / MIB
        is_kernel = NUM_TEXT not in dims and not {NUM_IMAGE, NUM_IMAGE + NUM_TEXT} & set(dims)
        total += count if is_kernel and count > 10 else 0
    return total


def test_a_list_of_blocks_copies_no_weights_and_needs_less_memory():
    listed, scanned = forward("list"), forward("scan")
    stream = 4 * 18 + 2 * 72  # MiB of its kernels
    assert copied_weights(scanned.as_text()) == 2 * stream + stream  # a block of each kind
    assert copied_weights(listed.as_text()) == 0
    assert listed.memory_analysis().temp_size_in_bytes < 400 * MIB
    assert listed.as_text().count('custom_call_target="__cudnn$fmhaSoftmax"') == 4


def test_the_backward_pass_does_not_run_attention_forward_again():
    def loss(q):
        attend = jax.checkpoint(
            lambda q: attention(2 * q, q, q, backend="cudnn"), policy=keeps_attention
        )
        return jnp.sum(attend(q))

    q = jax.ShapeDtypeStruct(
        (1, 1, 128, 64), jnp.bfloat16, sharding=SingleDeviceSharding(find_target("h100").devices[0])
    )
    text = jax.jit(jax.grad(loss)).lower(q).as_text()
    assert text.count("@__cudnn$fmhaSoftmaxBackward(") == 1
    assert text.count("@__cudnn$fmhaSoftmax(") == 1
