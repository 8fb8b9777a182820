"""The transformer: its parameters, what it depends on, and its ways of being run."""

import collections
import dataclasses
import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import print_saved_residuals

from kontext_jax.batches import Conditioning
from kontext_jax.flow.path import timestep_schedule
from kontext_jax.flow.samplers import euler_sample
from kontext_jax.models.layers import (
    Dense,
    RMSFactors,
    modulated_norm,
    scale_time,
    timestep_embedding,
)
from kontext_jax.models.mmdit import (
    REMAT_POLICIES,
    MMDiT,
    init_params,
    make_velocity_fn,
    prepare_steps,
)
from kontext_jax.models.presets import PRESETS, MMDiTConfig
from kontext_jax.numerics import BFL, DIFFUSERS, EXACT
from kontext_jax.ops.rope import rope_table
from kontext_jax.pictures import latents

SMALL = MMDiTConfig(
    in_channels=8,
    out_channels=8,
    vec_in_dim=6,
    context_in_dim=10,
    hidden_size=32,
    num_heads=2,
    depth=2,
    depth_single_blocks=3,
    axes_dim=(4, 6, 6),
)
WIDE = dataclasses.replace(SMALL, hidden_size=128, num_heads=1, axes_dim=(16, 56, 56))  # for splash
NUM_TEXT, TARGET, REFERENCE = 3, (2, 4), (2, 2)


@pytest.fixture(autouse=True)
def _full_precision():
    with jax.default_matmul_precision("highest"):
        yield


@functools.cache
def small_params(config=SMALL):
    """Weights without symmetries: biases and scales count, so that a mistake in one shows."""
    shapes = jax.eval_shape(functools.partial(init_params, MMDiT(config)), jax.random.key(0))
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        noise = rng.standard_normal(leaf.shape).astype(np.float32)
        if path[-1].key == "kernel":
            return jnp.asarray(0.2 * noise)
        return jnp.asarray(0.1 * noise + (path[-1].key == "scale"))

    return jax.tree.map_with_path(draw, shapes)


def conditioning(batch=2, references=(REFERENCE,), seed=0, guidance=2.5, config=SMALL):
    keys = jax.random.split(jax.random.key(seed), 3)
    num_ctx = sum(rows * columns for rows, columns in references)
    ids = [
        latents.text_ids(NUM_TEXT),
        latents.image_ids(*TARGET),
        latents.context_ids(references),
    ]
    return Conditioning(
        txt=jax.random.normal(keys[0], (batch, NUM_TEXT, SMALL.context_in_dim)),
        vec=jax.random.normal(keys[1], (batch, SMALL.vec_in_dim)),
        guidance=None if guidance is None else jnp.full((batch,), guidance),
        ctx=jax.random.normal(keys[2], (batch, num_ctx, SMALL.in_channels)) if num_ctx else None,
        pe=rope_table(np.concatenate(ids), config.axes_dim, config.theta),
    )


def target_tokens(batch=2, seed=7):
    return jax.random.normal(jax.random.key(seed), (batch, math.prod(TARGET), SMALL.in_channels))


@functools.partial(jax.jit, static_argnums=0)  # compiled once for all tests of a shape
def _velocity(model, params, cond, x, t):
    return make_velocity_fn(model, params, cond)(x, t, None)


def velocity(cond, x=None, t=None, model=None, params=None):
    x = target_tokens(cond.vec.shape[0]) if x is None else x
    t = jnp.full(x.shape[:1], 0.6) if t is None else t
    return _velocity(model or MMDiT(SMALL), params or small_params(), cond, x, t)


@pytest.mark.parametrize(
    ("name", "count"),
    [
        # The sums over the published checkpoints (BFL and diffusers alike).
        ("kontext-dev", 11_901_408_320),
        ("flux-dev", 11_901_408_320),
        ("krea-dev", 11_901_408_320),
        ("flux-schnell", 11_891_178_560),
    ],
)
def test_full_models_have_the_published_number_of_parameters(name, count):
    model = MMDiT(PRESETS[name].mmdit)
    shapes = jax.eval_shape(functools.partial(init_params, model), jax.random.key(0))
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes)) == count


def test_parameter_names_and_layouts_are_those_of_the_contract():
    shapes = jax.tree.map(lambda leaf: leaf.shape, small_params())
    dense = lambda *shape: {"kernel": shape, "bias": shape[1:]}  # noqa: E731
    stacked = lambda n, *shape: {"kernel": (n, *shape), "bias": (n, *shape[1:])}  # noqa: E731
    embedder = lambda size: {"in_layer": dense(size, 32), "out_layer": dense(32, 32)}  # noqa: E731
    qkv = lambda n: {  # noqa: E731
        **{name: stacked(n, 32, 2, 16) for name in "qkv"},
        **{f"{name}_norm": {"scale": (n, 16)} for name in ("query", "key")},
    }
    attn = {**qkv(2), "proj": {"kernel": (2, 2, 16, 32), "bias": (2, 32)}}
    mlp = {"in_layer": stacked(2, 32, 128), "out_layer": stacked(2, 128, 32)}
    assert shapes == {
        "img_in": dense(8, 32),
        "txt_in": dense(10, 32),
        "time_in": embedder(256),
        "guidance_in": embedder(256),
        "vector_in": embedder(6),
        "double_mod": {"img": stacked(2, 32, 6, 32), "txt": stacked(2, 32, 6, 32)},
        "single_mod": stacked(3, 32, 3, 32),
        "final_mod": dense(32, 2, 32),
        "double_blocks": {"img_attn": attn, "txt_attn": attn, "img_mlp": mlp, "txt_mlp": mlp},
        "single_blocks": {
            **qkv(3),
            "mlp_in": stacked(3, 32, 128),
            "attn_out": {"kernel": (3, 2, 16, 32)},
            "mlp_out": stacked(3, 128, 32),
        },
        "final_layer": dense(32, 8),
    }


def test_qkv_bias_is_of_the_double_blocks_alone():
    config = dataclasses.replace(SMALL, qkv_bias=False)
    params = small_params(config)
    assert "bias" not in params["double_blocks"]["img_attn"]["q"]
    assert "bias" in params["single_blocks"]["q"]


def test_training_starts_at_velocity_zero_and_untrained_weights_answer():
    models = [MMDiT(SMALL, zero_init=zero_init) for zero_init in (True, False)]
    zero, untrained = jax.jit(lambda key: [init_params(m, key) for m in models])(jax.random.key(0))
    cond = conditioning()
    assert not np.any(velocity(cond, params=zero))
    for name in ("double_mod", "single_mod", "final_mod"):  # every block is the identity
        assert not any(np.any(leaf) for leaf in jax.tree.leaves(zero[name]))
    out = velocity(cond, params=untrained)
    assert 0.1 < out.std() < 10
    other = velocity(dataclasses.replace(cond, txt=-cond.txt), params=untrained)
    assert np.abs(out - other).max() > 1e-3


@pytest.mark.parametrize("field", ["txt", "vec", "guidance", "ctx", "pe"])
def test_the_velocity_depends_on_every_input(field):
    cond = conditioning()
    changed = dataclasses.replace(cond, **{field: 1.5 * getattr(cond, field)})
    assert np.abs(velocity(cond) - velocity(changed)).max() > 1e-3


def test_images_of_a_batch_do_not_see_each_other():
    cond, x, t = conditioning(), target_tokens(), jnp.array([0.3, 0.8])
    change_second = lambda a: a.at[1].set(-a[1])  # noqa: E731
    fields = {f: change_second(getattr(cond, f)) for f in ("txt", "vec", "guidance", "ctx")}
    changed = velocity(dataclasses.replace(cond, **fields), change_second(x), t.at[1].set(0.1))
    first, second = np.asarray(velocity(cond, x, t)), slice(1, 2)
    np.testing.assert_allclose(changed[0], first[0], atol=1e-6)
    assert np.abs(changed[second] - first[second]).max() > 0.1


def test_the_order_of_tokens_is_in_their_positions_alone():
    cond, x = conditioning(references=()), target_tokens()
    order = np.random.default_rng(0).permutation(x.shape[1])
    pe = np.concatenate([cond.pe[:, :NUM_TEXT], cond.pe[:, NUM_TEXT:][:, order]], axis=1)
    permuted = velocity(dataclasses.replace(cond, pe=pe), x[:, order])
    np.testing.assert_allclose(permuted, velocity(cond, x)[:, order], atol=2e-5)


def test_references_may_swap_places_with_their_positions():
    cond = conditioning(references=[(1, 2), (1, 2)])
    start = NUM_TEXT + math.prod(TARGET)
    order = np.r_[2:4, 0:2]
    pe = np.concatenate([cond.pe[:, :start], cond.pe[:, start:][:, order]], axis=1)
    swapped = dataclasses.replace(cond, ctx=cond.ctx[:, order], pe=pe)
    np.testing.assert_allclose(velocity(swapped), velocity(cond), atol=2e-5)


def test_without_references_it_is_text_to_image():
    cond = conditioning(references=())
    x, t = target_tokens(), jnp.full((2,), 0.6)
    direct = jax.jit(MMDiT(SMALL).apply)(
        {"params": small_params()}, x, cond.txt, cond.vec, t, cond.guidance, cond.pe
    )
    np.testing.assert_allclose(velocity(cond, x, t), direct, atol=1e-5)
    assert velocity(conditioning(), x, t).shape == direct.shape


@pytest.mark.parametrize("numerics", [EXACT, BFL, DIFFUSERS])
def test_preparing_all_steps_equals_computing_each(numerics):
    model, cond = MMDiT(SMALL), conditioning()
    timesteps = timestep_schedule(4, 0.7)
    steps = prepare_steps(model, small_params(), cond, timesteps, numerics)
    for i, t in enumerate(timesteps[:-1]):
        alone = model.apply(
            {"params": small_params()},
            jnp.full((2,), t),
            cond.guidance,
            cond.vec,
            method="modulation",
        )
        # In float32 the references' roundings of t are of the last bits: 1e-4 of the sinusoid.
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a[i], b, atol=2e-3),  # noqa: B023
            steps,
            alone,
        )


def test_a_prepared_run_equals_single_steps():
    model, cond, x = MMDiT(SMALL), conditioning(), target_tokens()
    timesteps = timestep_schedule(3, 0.7)

    @jax.jit
    def run(params, cond, x):
        steps = prepare_steps(model, params, cond, timesteps)
        return euler_sample(make_velocity_fn(model, params, cond), x, timesteps, steps)

    whole = run(small_params(), cond, x)
    for t, t_next in itertools.pairwise(timesteps):
        x = x + (t_next - t) * velocity(cond, x, jnp.full((2,), t))
    np.testing.assert_allclose(whole, x, atol=2e-5)


def test_attention_backends_agree():
    cond = conditioning(config=WIDE)
    reference, chunked, splash = (
        velocity(cond, model=MMDiT(WIDE, attention_backend=backend), params=small_params(WIDE))
        for backend in ("reference", "chunked", "splash")
    )
    scale = np.abs(reference).max()
    np.testing.assert_allclose(chunked, reference, atol=1e-5 * scale)
    np.testing.assert_allclose(splash, reference, atol=1e-5 * scale)


def loss_fn(remat, config=SMALL, backend="reference"):
    model = MMDiT(config, attention_backend=backend, remat=remat)
    cond, x, t = conditioning(config=config), target_tokens(), jnp.array([0.3, 0.8])
    return lambda p: jnp.mean(make_velocity_fn(model, p, cond)(x, t, None) ** 2)


def count_operations(jaxpr, primitive):
    """How often a primitive stands in a jaxpr and those inside it."""
    count = 0
    for eqn in jaxpr.eqns:
        count += eqn.primitive.name == primitive
        for inner in jax.tree.leaves(eqn.params, is_leaf=lambda p: hasattr(p, "eqns")):
            if hasattr(inner, "eqns"):
                count += count_operations(inner, primitive)
    return count


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["full", "save_products"])
def test_remat_changes_no_gradient(remat):
    recomputed, kept = (jax.jit(jax.grad(loss_fn(r)))(small_params()) for r in (remat, "none"))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-4), recomputed, kept
    )
    for path, gradient in jax.tree.leaves_with_path(kept):  # every parameter takes part
        assert np.abs(gradient).max() > 0, jax.tree_util.keystr(path)


@pytest.mark.slow
def test_each_policy_recomputes_fewer_products():
    products = {
        remat: count_operations(
            jax.make_jaxpr(jax.grad(loss_fn(remat)))(small_params()).jaxpr, "dot_general"
        )
        for remat in REMAT_POLICIES
    }
    print(products)
    none = products.pop("none")
    counts = list(products.values())  # from "full" to "save_products"
    assert counts == sorted(set(counts), reverse=True)
    # In both kinds of block the scores of the reference attention and the rotations of q and k.
    assert counts[-1] == none + 6


def test_attention_is_saved_with_its_log_sum_exp(capsys):
    def saved(remat):
        print_saved_residuals(loss_fn(remat, WIDE, "splash"), small_params(WIDE))
        return capsys.readouterr().out.splitlines()

    extra = collections.Counter(saved("save_attention")) - collections.Counter(saved("full"))
    # [N, B, H, padded S, Dh] and [N, B, H, padded S] of double and of single blocks.
    shapes = ["f32[2,2,1,128,128]", "f32[2,2,1,128]", "f32[3,2,1,128,128]", "f32[3,2,1,128]"]
    assert sorted(line.split()[0] for line in extra.elements()) == sorted(shapes)


def test_an_unknown_policy_is_refused():
    with pytest.raises(
        ValueError, match=r"unknown remat policy 'all'; choose one of .'none', 'full"
    ):
        velocity(conditioning(), model=MMDiT(SMALL, remat="all"))


def test_bfloat16_stays_near_float32():
    cond = conditioning()
    low = velocity(cond, model=MMDiT(SMALL, dtype=jnp.bfloat16))
    assert low.dtype == jnp.bfloat16
    exact = velocity(cond)
    assert np.abs(low.astype(jnp.float32) - exact).mean() < 0.03 * exact.std()


def test_guidance_is_refused_or_demanded():
    with pytest.raises(ValueError, match="trained with guidance as an input"):
        velocity(conditioning(guidance=None))
    config = dataclasses.replace(SMALL, guidance_embed=False)
    model, params = MMDiT(config), small_params(config)
    assert "guidance_in" not in params
    with pytest.raises(ValueError, match="takes no guidance"):
        velocity(conditioning(), model=model, params=params)
    x, t = target_tokens(), jnp.ones(2)
    velocity_fn = make_velocity_fn(model, params, conditioning(guidance=None))
    assert jax.eval_shape(velocity_fn, x, t, None).shape == x.shape


def test_positions_must_fit_the_tokens():
    cond = conditioning()
    cond = dataclasses.replace(cond, pe=cond.pe[:, :-1])
    with pytest.raises(ValueError, match="pe has 14 positions, but there are 3 text and 12 image"):
        velocity(cond)


# Layers


def test_timestep_embedding_is_cosines_then_sines():
    args = np.float64(700.0) * 10_000.0 ** (-np.arange(128) / 128)
    embedded = timestep_embedding(jnp.float32(700.0))
    assert embedded.dtype == jnp.float32
    # One unit in the last place of a frequency near 1 moves its sinusoid by 4e-5.
    np.testing.assert_allclose(embedded[:128], np.cos(args), atol=1e-4)
    np.testing.assert_allclose(embedded[128:], np.sin(args), atol=1e-4)


def test_time_is_rounded_as_each_reference_rounds_it():
    # What torch 2.13 gives for bfloat16 tensors: (t.bfloat16() * 1000) and
    # ((1000 * t).bfloat16() / 1000).bfloat16() * 1000.
    t = jnp.array([1.0, 0.9, 0.7371, 0.3457], jnp.float32)
    scaled = {
        rounding: np.asarray(jax.jit(lambda t, r=rounding: scale_time(t, r, jnp.bfloat16))(t))
        for rounding in ("none", "bfl", "diffusers")
    }
    np.testing.assert_allclose(scaled["none"], [1000, 900, 737.1, 345.7], rtol=1e-6)
    np.testing.assert_array_equal(scaled["bfl"], [1000, 900, 740, 346])
    np.testing.assert_array_equal(scaled["diffusers"], [1000, 900, 736, 346])
    assert scale_time(jnp.float32(2.5), "bfl", jnp.bfloat16) == 2496  # guidance, in both
    with pytest.raises(ValueError, match="choose none, bfl or diffusers"):
        scale_time(t, "fp32", jnp.bfloat16)


def test_norms_are_computed_in_float32():
    # At an offset of 300 bfloat16 keeps no part of the spread: statistics must not be rounded.
    x = (300 + jax.random.normal(jax.random.key(0), (1, 4, 32))).astype(jnp.bfloat16)
    zeros = jnp.zeros((1, 32), jnp.bfloat16)
    x64 = np.asarray(x, np.float64)
    centred = x64 - x64.mean(-1, keepdims=True)
    expected = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6)
    normed = modulated_norm(x, zeros, zeros)
    assert normed.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(normed, np.float64), expected, atol=0.02)

    gain, scale = RMSFactors().apply({"params": {"scale": jnp.ones(32)}}, x)
    assert gain.dtype == scale.dtype == jnp.float32
    expected = 1 / np.sqrt((x64**2).mean(-1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(gain, expected, rtol=1e-6)


def test_rms_norm_epsilon_is_that_of_the_references():
    x = jnp.full((1, 4), 1e-3)
    gain, _ = RMSFactors().apply({"params": {"scale": jnp.ones(4)}}, x)
    np.testing.assert_allclose(gain, 1 / math.sqrt(1e-6 + 1e-6), rtol=1e-5)


def test_dense_accumulates_in_float32():
    # 4096 ones: a bfloat16 accumulator stops at 256.
    layer = Dense((2,), dtype=jnp.bfloat16, use_bias=False)
    params = {"params": {"kernel": jnp.ones((4096, 2))}}
    out = jax.jit(layer.apply)(params, jnp.ones((3, 4096), jnp.bfloat16))
    assert out.dtype == jnp.bfloat16
    np.testing.assert_array_equal(out, 4096)


def test_dense_contracts_several_axes():
    layer = Dense((5,), 2)
    x = jax.random.normal(jax.random.key(0), (2, 3, 4, 6))
    params = layer.init(jax.random.key(1), x)
    kernel = params["params"]["kernel"]
    assert kernel.shape == (4, 6, 5)
    np.testing.assert_allclose(
        layer.apply(params, x), jnp.einsum("bshd,hde->bse", x, kernel), atol=1e-6
    )
