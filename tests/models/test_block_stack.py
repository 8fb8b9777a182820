"""A stack of blocks is the same network scanned and as a list."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kontext_jax.batches import Conditioning
from kontext_jax.models import lora
from kontext_jax.models.mmdit import MMDiT, init_params, make_velocity_fn, unstacked
from kontext_jax.models.parameter_axes import BLOCK_STACKS, COPIED, parameter_axes
from kontext_jax.models.presets import MMDiTConfig
from kontext_jax.ops.rope import rope_table
from kontext_jax.sampling import stages
from kontext_jax.sampling.denoising import Denoising
from kontext_jax.weights.bundle import Listed
from kontext_jax.weights.untrained import untrained_bundle

CONFIG = MMDiTConfig(
    in_channels=8,
    out_channels=8,
    hidden_size=32,
    num_heads=2,
    depth=1,
    depth_single_blocks=2,
    context_in_dim=12,
    vec_in_dim=6,
    axes_dim=(4, 6, 6),
)


@pytest.fixture(scope="module")
def setting():
    """The stacked model, its parameters, conditioning of 1 example and its target tokens."""
    model = MMDiT(CONFIG, zero_init=False)
    params = jax.jit(lambda key: init_params(model, key))(jax.random.key(0))
    random = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(random.standard_normal(shape), jnp.float32)  # noqa: E731
    pe = rope_table(random.integers(0, 9, (5 + 6, 3)), CONFIG.axes_dim, CONFIG.theta)
    cond = Conditioning(draw(1, 5, 12), draw(1, 6), jnp.ones(1), draw(1, 2, 8), pe)
    return model, params, cond, draw(1, 4, 8)


def velocity(model, params, cond, x, adapters=None):
    def run(params, adapters):
        return make_velocity_fn(model, params, cond, adapters)(x, jnp.full(1, 0.5), None)

    with jax.default_matmul_precision("highest"):
        return jax.jit(run)(params, adapters)


def test_a_list_of_blocks_computes_what_the_scan_does_with_adapters_too(setting):
    model, params, cond, x = setting
    listed = model.clone(block_form="list")
    adapters = lora.init_lora(lora.LoraConfig(rank=2), params, jax.random.key(1))
    adapters = jax.tree.map(lambda leaf: leaf + 0.1, adapters)
    want = velocity(model, params, cond, x, adapters)
    got = velocity(listed, unstacked(params), cond, x, unstacked(adapters))
    assert float(jnp.std(want)) > 0.01
    np.testing.assert_allclose(got, want, atol=1e-5)
    with pytest.raises(ValueError, match=r"adapters are stacked.*unstack them"):
        velocity(listed, unstacked(params), cond, x, adapters)


def test_unstacked_parameters_are_those_of_the_list(setting):
    model, params, _, _ = setting
    listed = model.clone(block_form="list")
    got = unstacked(params)
    wanted = jax.eval_shape(lambda key: init_params(listed, key), jax.random.key(0))
    assert jax.tree.map(jnp.shape, got) == jax.tree.map(jnp.shape, wanted)
    kernel = got["single_blocks"]["1"]["mlp_in"]["kernel"]
    np.testing.assert_array_equal(kernel, params["single_blocks"]["mlp_in"]["kernel"][1])


def test_weights_can_be_loaded_as_a_list_and_each_layer_is_asked_where_it_goes():
    component = untrained_bundle("tiny").components["mmdit"]
    asked = {}

    def place(path, shape):
        asked[path] = shape
        return jax.devices()[0]

    got = component.load(device=Listed(BLOCK_STACKS, place))
    want = unstacked(component.load())
    jax.tree.map(np.testing.assert_array_equal, got, want)
    assert asked["single_blocks/1/q/kernel"] == want["single_blocks"]["1"]["q"]["kernel"].shape
    assert asked["single_mod/kernel"] == want["single_mod"]["kernel"].shape


def test_a_layer_of_a_list_lies_like_a_layer_of_the_stack():
    for path in ("double_blocks/img_attn/q/kernel", "single_blocks/mlp_out/kernel"):
        stack, rest = path.split("/", 1)
        axes = parameter_axes(path)
        assert axes.stack == ("layers",)
        assert parameter_axes(f"{stack}/11/{rest}") == axes._replace(stack=())
    assert parameter_axes("single_blocks/3/query_norm/scale") == COPIED


def test_an_unknown_form_is_refused(setting):
    model, params, cond, x = setting
    with pytest.raises(ValueError, match="unknown form of a stack 'tree'; choose scan or list"):
        velocity(model.clone(block_form="tree"), params, cond, x)


@pytest.mark.slow
def test_the_stages_denoise_alike_in_both_forms(monkeypatch):
    noise = jax.random.normal(jax.random.key(2), (1, 4, 4, 16))
    bundle = untrained_bundle("tiny")
    config = bundle.preset.mmdit
    txt, vec = jnp.ones((1, 8, config.context_in_dim)), jnp.ones((1, config.vec_in_dim))

    def latents(form):
        monkeypatch.setattr(stages, "block_form_for", lambda platform: form)
        sampler = stages.Stages(bundle)
        given = Denoising(noise, (txt, vec), 2, guidance=np.ones(1, np.float32), references=[noise])
        return sampler.denoise(given), sampler.networks.get("mmdit")

    (want, scanned), (got, listed) = latents("scan"), latents("list")
    np.testing.assert_allclose(got, want, atol=1e-4)
    assert "0" in listed["single_blocks"] and "0" not in scanned["single_blocks"]
