"""The autoencoder: sizes, the affine map of its latents, its posterior, and its arithmetic."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kontext_jax.models import vae as vae_module
from kontext_jax.models.presets import VAEConfig
from kontext_jax.models.vae import VAE, Conv, Downsample, GroupNorm, Upsample, group_moments
from tests.vae_helpers import random_params

SMALL = VAEConfig(ch=32, ch_mult=(1, 2), num_res_blocks=1, z_channels=4)


@pytest.fixture(scope="module")
def small():
    vae = VAE(SMALL)
    return vae, {"params": random_params(vae)}


def image(height=16, width=24, batch=1, seed=2):
    return jax.random.uniform(jax.random.key(seed), (batch, height, width, 3), minval=-1.0)


@functools.partial(jax.jit, static_argnames=("vae", "method"))
def apply(vae, variables, x, method, **options):
    return vae.apply(variables, x, method=method, **options)


def count(tree):
    return sum(x.size for x in jax.tree.leaves(tree))


def test_published_size_has_the_published_number_of_parameters():
    vae = VAE(VAEConfig())
    shapes = jax.eval_shape(vae.init, jax.random.key(0), jnp.zeros((1, 16, 16, 3)))["params"]
    # As diffusers 0.42.1 counts AutoencoderKL of this size without quant convolutions.
    assert count(shapes["encoder"]) == 34_274_208
    assert count(shapes["decoder"]) == 49_545_475
    assert count(shapes) == 83_819_683


def test_parameter_names_and_layouts_are_those_of_the_contract():
    vae = VAE(VAEConfig())
    shapes = jax.eval_shape(vae.init, jax.random.key(0), jnp.zeros((1, 16, 16, 3)))["params"]
    shapes = jax.tree.map(lambda x: x.shape, shapes)
    encoder, decoder = shapes["encoder"], shapes["decoder"]
    assert encoder["conv_in"] == {"kernel": (3, 3, 3, 128), "bias": (128,)}
    assert encoder["conv_out"] == {"kernel": (3, 3, 512, 32), "bias": (32,)}
    assert encoder["down_1"]["block_0"] == {
        "norm1": {"scale": (128,), "bias": (128,)},
        "conv1": {"kernel": (3, 3, 128, 256), "bias": (256,)},
        "norm2": {"scale": (256,), "bias": (256,)},
        "conv2": {"kernel": (3, 3, 256, 256), "bias": (256,)},
        "nin_shortcut": {"kernel": (1, 1, 128, 256), "bias": (256,)},
    }
    assert set(encoder["down_0"]) == {"block_0", "block_1", "downsample"}
    assert set(encoder["down_3"]) == {"block_0", "block_1"}
    assert set(decoder["up_3"]) == {"block_0", "block_1", "block_2", "upsample"}
    assert set(decoder["up_0"]) == {"block_0", "block_1", "block_2"}
    dense = {"kernel": (512, 512), "bias": (512,)}
    assert decoder["mid"]["attn_1"] == {
        "norm": {"scale": (512,), "bias": (512,)},
        **{name: dense for name in ("q", "k", "v", "proj_out")},
    }


def test_latents_are_an_eighth_of_the_image_and_decode_to_its_size():
    vae = VAE(VAEConfig(ch=32, num_res_blocks=1))
    picture = jax.ShapeDtypeStruct((2, 48, 80, 3), jnp.float32)
    variables = jax.eval_shape(vae.init, jax.random.key(0), picture)
    latents = jax.eval_shape(lambda v, x: vae.apply(v, x, method="encode"), variables, picture)
    assert latents.shape == (2, 6, 10, 16)
    decoded = jax.eval_shape(lambda v, z: vae.apply(v, z, method="decode"), variables, latents)
    assert decoded.shape == picture.shape


def test_encode_scales_the_mean(small):
    vae, variables = small
    mean, _ = apply(vae, variables, image(), "moments")
    latents = apply(vae, variables, image(), "encode")
    np.testing.assert_allclose(latents, 0.3611 * (mean - 0.1159), rtol=1e-6, atol=1e-7)


def test_decode_undoes_the_scaling_of_encode(small):
    vae, variables = small
    z = jax.random.normal(jax.random.key(3), (1, 3, 5, 4))
    bound = vae.bind(variables)
    np.testing.assert_allclose(bound.from_latents(bound.to_latents(z, z)), z, atol=2e-6)


def test_a_key_samples_the_posterior_and_no_key_takes_its_mean(small):
    vae, variables = small
    mean = jnp.full((1, 64, 64, 4), 0.5)
    logvar = jnp.full_like(mean, 2 * np.log(0.25))
    bound = vae.bind(variables)
    z = bound.to_latents(mean, logvar, key=jax.random.key(4)) / 0.3611 + 0.1159
    assert abs(float(z.mean()) - 0.5) < 0.01
    assert abs(float(z.std()) - 0.25) < 0.01
    sampled = apply(vae, variables, image(), "encode", key=jax.random.key(5))
    again = apply(vae, variables, image(), "encode", key=jax.random.key(5))
    other = apply(vae, variables, image(), "encode", key=jax.random.key(6))
    np.testing.assert_array_equal(sampled, again)
    assert float(jnp.abs(sampled - other).max()) > 0.01


def test_log_variance_is_clamped(small):
    vae, variables = small
    extreme = jnp.concatenate([jnp.zeros((1, 2, 2, 4)), jnp.full((1, 2, 2, 4), 1e3)], axis=-1)
    mean, logvar = vae.bind(variables).split_moments(extreme)
    assert float(mean.max()) == 0.0
    np.testing.assert_array_equal(logvar, 20.0)
    np.testing.assert_array_equal(vae.bind(variables).split_moments(-extreme)[1], -30.0)


def test_images_of_a_batch_do_not_see_each_other(small):
    vae, variables = small
    images = [image(seed=7), image(seed=8)]
    both = apply(vae, variables, jnp.concatenate(images), "__call__")
    for i, one in enumerate(images):
        alone = apply(vae, variables, one, "__call__")
        np.testing.assert_allclose(both[i : i + 1], alone, atol=1e-5)


@pytest.mark.parametrize(("height", "width", "nearest"), [(17, 24, "24×16"), (16, 1, "2×16")])
def test_a_size_off_the_latent_grid_is_refused_with_the_nearest_one(small, height, width, nearest):
    vae, variables = small
    with pytest.raises(ValueError, match=f"{width}×{height} .*multiples of 2.* {nearest}"):
        vae.apply(variables, image(height, width), method="encode")


def test_downsampling_pads_right_and_below_only():
    module = Downsample(1, jnp.float32)
    x = jnp.ones((1, 4, 4, 1))
    variables = module.init(jax.random.key(0), x)
    variables = jax.tree.map(jnp.ones_like, variables)  # every tap 1, bias 1: counts the taps
    expected = np.array([[10.0, 7.0], [7.0, 5.0]])
    np.testing.assert_array_equal(module.apply(variables, x)[0, :, :, 0], expected)


def test_upsampling_repeats_cells_then_convolves():
    module, conv = Upsample(5, jnp.float32), Conv(5, jnp.float32)
    x = jax.random.normal(jax.random.key(0), (2, 3, 4, 6))
    variables = module.init(jax.random.key(1), x)
    with jax.default_matmul_precision("highest"):
        expected = conv.apply(
            {"params": variables["params"]["conv"]}, x.repeat(2, axis=1).repeat(2, axis=2)
        )
        np.testing.assert_allclose(module.apply(variables, x), expected, atol=2e-6)


def test_group_norm_keeps_its_accuracy_far_from_zero():
    x = 1000.0 + jax.random.normal(jax.random.key(0), (1, 16, 16, 8))
    mean, variance = group_moments(x, 2)
    exact = np.asarray(x, np.float64).reshape(256, 2, 4)
    np.testing.assert_allclose(mean[0], exact.mean((0, 2)), rtol=1e-6)
    np.testing.assert_allclose(variance[0], exact.var((0, 2)), rtol=1e-3)


def test_group_norm_in_bfloat16_rounds_only_its_input_and_output():
    x = jax.random.normal(jax.random.key(0), (1, 16, 16, 8), jnp.bfloat16)
    half, full = GroupNorm(2, jnp.bfloat16), GroupNorm(2, jnp.float32)
    variables = full.init(jax.random.key(1), x)
    y = half.apply(variables, x)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_array_equal(y, full.apply(variables, x).astype(jnp.bfloat16))


@pytest.mark.parametrize(("stored", "computed"), [("bfloat16", "float32"), ("float32", "bfloat16")])
def test_stored_and_compute_dtype_are_independent(small, stored, computed):
    _, variables = small
    rounded = jax.tree.map(lambda p: p.astype(jnp.bfloat16), variables)
    exact = jax.tree.map(lambda p: p.astype(jnp.float32), rounded)
    reference = apply(VAE(SMALL), exact, image(), "encode")
    vae = VAE(SMALL, dtype=jnp.dtype(computed))
    variables = jax.tree.map(lambda p: p.astype(stored), rounded)
    latents = apply(vae, variables, image(), "encode")
    decoded = apply(vae, variables, latents, "decode")
    assert latents.dtype == decoded.dtype == jnp.dtype(computed)
    error = float(jnp.abs(latents.astype(jnp.float32) - reference).max())
    if computed == "float32":
        assert error == 0.0  # bfloat16 parameters are cast up exactly
    else:
        assert 0.0 < error < 0.05 * float(jnp.abs(reference).max())


def test_the_middle_attends_over_all_positions(small, monkeypatch):
    seen = []
    attend = vae_module.attention

    def spy(q, k, v, **options):
        seen.append((q.shape, k.shape))
        return attend(q, k, v, **options)

    monkeypatch.setattr(vae_module, "attention", spy)
    vae, variables = small
    vae.apply(variables, image(16, 24), method="encode")
    assert seen == [((1, 1, 8 * 12, 64), (1, 1, 8 * 12, 64))]


def test_latents_are_unscaled_in_their_own_dtype_before_they_are_rounded():
    vae = VAE(VAEConfig(), jnp.bfloat16)
    latents = jnp.linspace(-1, 1, 512, dtype=jnp.float32).reshape(1, 4, 8, 16)
    once = vae.bind({}).from_latents(latents)
    twice = vae.bind({}).from_latents(latents.astype(jnp.bfloat16))
    exact = latents / 0.3611 + 0.1159
    assert once.dtype == twice.dtype == jnp.bfloat16
    np.testing.assert_array_equal(once, exact.astype(jnp.bfloat16))
    assert np.count_nonzero(np.asarray(once != twice)) > 50
