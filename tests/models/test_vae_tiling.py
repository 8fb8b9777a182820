"""Coding in tiles gives what coding the whole picture gives, and needs less of the device."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from skimage import data, transform

from kontext_jax.models import vae_tiling
from kontext_jax.models.presets import VAEConfig
from kontext_jax.models.vae import VAE
from kontext_jax.models.vae_tiling import decode_tiled, encode_tiled, vae_peak_bytes
from tests.vae_helpers import random_params

SMALL = VAEConfig(ch=8, ch_mult=(1, 2), num_res_blocks=1, z_channels=4, norm_groups=4)
EIGHTFOLD = VAEConfig(ch=8, ch_mult=(1, 1, 2, 2), num_res_blocks=1, z_channels=8, norm_groups=4)


@pytest.fixture(autouse=True)
def full_precision():
    with jax.default_matmul_precision("highest"):
        yield


@pytest.fixture(scope="module")
def small():
    vae = VAE(SMALL)
    return vae, random_params(vae)


def photograph(height, width):
    """A natural image [1, height, width, 3] in [-1, 1]."""
    picture = transform.resize(data.coffee(), (height, width), anti_aliasing=True)
    return (2 * picture - 1).astype(np.float32)[None]


@functools.partial(jax.jit, static_argnames=("vae", "method"))
def plain(vae, params, x, method, key=None):
    options = {} if key is None else {"key": key}
    return vae.apply({"params": params}, x, method=method, **options)


def levels(a, b):
    """Largest difference of two pictures in [-1, 1], in units of 1/255."""
    return float(np.abs(np.asarray(a, np.float32) - np.asarray(b, np.float32)).max()) * 127.5


# Sides that the tile divides, sides that it does not, and tiles of a single latent cell.
@pytest.mark.parametrize(("height", "width", "tile_px"), [(64, 96, 32), (38, 74, 16), (6, 8, 2)])
def test_tiles_give_the_result_of_the_whole(small, height, width, tile_px):
    vae, params = small
    picture = photograph(height, width)
    latents = plain(vae, params, picture, "encode")
    encoded = encode_tiled(vae, params, picture, tile_px)
    np.testing.assert_allclose(encoded, latents, atol=5e-6, rtol=0)
    decoded = plain(vae, params, latents, "decode")
    tiled = decode_tiled(vae, params, latents, tile_px)
    np.testing.assert_allclose(tiled, decoded, atol=2e-5, rtol=0)


def test_a_batch_keeps_its_pictures_apart(small):
    vae, params = small
    latents = np.random.default_rng(1).standard_normal((2, 8, 12, 4)).astype(np.float32)
    both = decode_tiled(vae, params, latents, 8)
    for i in range(2):
        alone = plain(vae, params, latents[i : i + 1], "decode")
        np.testing.assert_allclose(both[i : i + 1], alone, atol=2e-5, rtol=0)


def test_tiles_coded_one_by_one_would_show(small):
    vae, params = small
    latents = plain(vae, params, photograph(64, 96), "encode")
    decoded = plain(vae, params, latents, "decode")
    alone = plain(vae, params, latents[:, :, :16], "decode")
    assert levels(alone, decoded[:, :, :32]) > 1
    assert levels(decode_tiled(vae, params, latents, 32), decoded) < 0.01


@pytest.mark.slow
def test_a_large_photograph_has_no_seams(capsys):
    vae = VAE(EIGHTFOLD)
    params = random_params(vae)
    picture = photograph(1024, 1536)
    latents = plain(vae, params, picture, "encode")
    encoded = encode_tiled(vae, params, picture, 512)
    decoded = plain(vae, params, latents, "decode")
    difference = levels(decode_tiled(vae, params, latents, 512), decoded)
    with capsys.disabled():
        print(
            f"\n1024×1536 in 512-pixel tiles: image differs by {difference:.2e}/255, latents by "
            f"{float(np.abs(encoded - latents).max()):.1e}"
        )
    assert difference < 0.05
    np.testing.assert_allclose(encoded, latents, atol=2e-5)


def test_bfloat16_tiles_differ_by_rounding_only(small):
    exact_vae, params = small
    vae = VAE(SMALL, dtype=jnp.bfloat16)
    latents = plain(exact_vae, params, photograph(64, 96), "encode").astype(jnp.bfloat16)
    decoded = plain(vae, params, latents, "decode").astype(np.float32)
    tiled = decode_tiled(vae, params, latents, 32)
    assert tiled.dtype == jnp.bfloat16
    exact = plain(exact_vae, params, latents.astype(np.float32), "decode")
    assert np.abs(tiled - decoded).max() < 2 * np.abs(decoded - exact).max()


def test_a_key_samples_the_posterior(small):
    vae, params = small
    picture, key = photograph(64, 96), jax.random.key(3)
    tiled = encode_tiled(vae, params, picture, 32, key=key)
    np.testing.assert_allclose(tiled, plain(vae, params, picture, "encode", key), atol=5e-6)
    assert float(jnp.abs(tiled - encode_tiled(vae, params, picture, 32)).max()) > 0.01


def test_only_tiles_reach_the_device(small, monkeypatch):
    vae, params = small
    shapes = []
    apply = vae_tiling._apply

    def spy(module, method, groups, variables, args, given, counted):
        shapes.extend(x.shape for x in (args[:2] if method == "attend" else args))
        return apply(module, method, groups, variables, args, given, counted)

    monkeypatch.setattr(vae_tiling, "_apply", spy)
    encode_tiled(vae, params, photograph(64, 96), 32)
    decode_tiled(vae, params, np.zeros((1, 32, 48, 4), np.float32), 32)
    assert max(max(shape[1:3]) for shape in shapes) == 32 + 2  # the border of one convolution


def test_a_larger_picture_reuses_the_compiled_steps(small):
    vae, params = small
    decode_tiled(vae, params, np.zeros((1, 16, 32, 4), np.float32), 32)
    num_compiled = vae_tiling._apply._cache_size()
    decode_tiled(vae, params, np.zeros((1, 80, 64, 4), np.float32), 32)
    assert vae_tiling._apply._cache_size() == num_compiled + 1  # attention over more keys


@pytest.mark.parametrize("tile_px", [0, -2, 31])
def test_a_tile_off_the_latent_grid_is_refused(small, tile_px):
    vae, params = small
    with pytest.raises(ValueError, match=f"tile_px {tile_px} must be a positive multiple of 2"):
        decode_tiled(vae, params, np.zeros((1, 8, 8, 4), np.float32), tile_px)


def test_a_size_off_the_latent_grid_is_refused_with_the_nearest_one(small):
    vae, params = small
    with pytest.raises(ValueError, match=r"33×64 .*multiples of 2.* 32×64"):
        encode_tiled(vae, params, np.zeros((1, 64, 33, 3), np.float32), 32)


def test_statistics_merge_without_cancellation():
    rng = np.random.default_rng(0)
    parts = [1e4 + rng.standard_normal((1, n, 2)) for n in (3, 50, 7)]
    measured = [(np.float32(x.shape[1]), x.mean(1), x.var(1)) for x in parts]
    mean, variance = vae_tiling._merge(measured)
    whole = np.concatenate(parts, axis=1)
    np.testing.assert_allclose(mean, whole.mean(1), rtol=1e-6)
    np.testing.assert_allclose(variance, whole.var(1), rtol=1e-6)


def test_estimated_memory_is_that_of_the_compiled_decoder():
    vae = VAE(EIGHTFOLD)
    params = jax.eval_shape(vae.init, jax.random.key(0), jnp.zeros((1, 16, 16, 3)))
    latents = jax.ShapeDtypeStruct((1, 32, 48, 8), jnp.float32)
    compiled = jax.jit(lambda p, z: vae.apply(p, z, method="decode")).lower(params, latents)
    measured = compiled.compile().memory_analysis().temp_size_in_bytes
    assert measured == pytest.approx(vae_peak_bytes(EIGHTFOLD, 256, 384, jnp.float32), rel=0.25)


def test_estimated_memory_of_tiles_does_not_grow_with_the_picture_but_for_the_keys():
    config = VAEConfig()
    sizes = [vae_peak_bytes(config, n, n, jnp.float32, tile_px=512) for n in (1024, 2048)]
    assert sizes[1] - sizes[0] == 2 * 512 * 4 * (256**2 - 128**2)
    assert sizes[0] < vae_peak_bytes(config, 1024, 1024, jnp.float32)
