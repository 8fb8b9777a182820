"""Counted operations against XLA's own count, and the peaks of devices."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from kontext_jax.models.flops import mmdit_flops
from kontext_jax.models.mmdit import MMDiT, init_params
from kontext_jax.models.presets import PRESETS, MMDiTConfig
from kontext_jax.runtime.chips import peak_flops

# One block of each kind, since XLA counts the body of a loop once; wide, so that products prevail.
WIDE = MMDiTConfig(
    vec_in_dim=64,
    context_in_dim=512,
    hidden_size=512,
    num_heads=4,
    depth=1,
    depth_single_blocks=1,
)
NUM_TEXT, NUM_IMAGE, BATCH = 64, 448, 2


def xla_flops(transform) -> float:
    """FLOPs per example of a transformed sum of the network's output, by XLA."""
    model = MMDiT(WIDE, attention_backend="reference")
    shape = jax.ShapeDtypeStruct
    inputs = (
        shape((BATCH, NUM_IMAGE, WIDE.in_channels), jnp.float32),
        shape((BATCH, NUM_TEXT, WIDE.context_in_dim), jnp.float32),
        shape((BATCH, WIDE.vec_in_dim), jnp.float32),
        shape((BATCH,), jnp.float32),
        shape((BATCH,), jnp.float32),
        shape((2, NUM_TEXT + NUM_IMAGE, WIDE.head_dim // 2), jnp.float32),
    )
    params = jax.eval_shape(lambda key: init_params(model, key), jax.random.key(0))

    def total(params, *inputs):
        return jnp.sum(model.apply({"params": params}, *inputs))

    return jax.jit(transform(total)).lower(params, *inputs).cost_analysis()["flops"] / BATCH


def test_forward_and_training_flops_are_those_that_xla_counts():
    flops = mmdit_flops(WIDE, NUM_TEXT, NUM_IMAGE)
    assert xla_flops(lambda f: f) == pytest.approx(flops.forward, rel=0.02)
    assert xla_flops(jax.grad) == pytest.approx(flops.training(), rel=0.02)


def test_frozen_kernels_need_no_gradient():
    def wrt_image(total):
        return jax.grad(total, argnums=1)

    flops = mmdit_flops(WIDE, NUM_TEXT, NUM_IMAGE).training(trains_kernels=False)
    assert xla_flops(wrt_image) == pytest.approx(flops, rel=0.02)


def test_a_kontext_edit_takes_165_teraflop():
    config = PRESETS["kontext-dev"].mmdit  # the figures of a direct sum over all kernels
    assert mmdit_flops(config, 512, 4096).forward == pytest.approx(74.4e12, rel=1e-3)
    assert mmdit_flops(config, 512, 8192).forward == pytest.approx(165.5e12, rel=1e-3)


def test_guidance_is_one_more_embedder():
    config = PRESETS["kontext-dev"].mmdit
    without = dataclasses.replace(config, guidance_embed=False)
    difference = mmdit_flops(config, 1, 1).products - mmdit_flops(without, 1, 1).products
    assert difference == 2 * (256 * 3072 + 3072**2)


@pytest.mark.parametrize(
    ("kind", "tera"),
    [
        ("TPU v4", 275),
        ("TPU v5 lite", 197),
        ("TPU v5", 459),
        ("TPU v5p", 459),
        ("TPU v6 lite", 918),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989),
        ("cpu", None),
    ],
)
def test_peaks_by_the_names_devices_give_themselves(kind, tera):
    assert peak_flops(kind) == (None if tera is None else tera * 1e12)
