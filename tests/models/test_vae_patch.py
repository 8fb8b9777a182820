"""Pictures folded before the autoencoder's first step, and unfolded after its last."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from convert_weights.tables import vae as vae_table
from kontext_jax.models.presets import VAEConfig
from kontext_jax.models.vae import VAE, fold_patches, unfold_patches
from kontext_jax.models.vae_tiling import decode_tiled, encode_tiled, vae_peak_bytes
from tests.vae_helpers import random_params

FOLDED = VAEConfig(ch=8, ch_mult=(1, 1), num_res_blocks=1, z_channels=4, norm_groups=4, patch=4)


@pytest.fixture(scope="module")
def folded():
    vae = VAE(FOLDED)
    return vae, random_params(vae)


@functools.partial(jax.jit, static_argnames=("vae", "method"))
def plain(vae, params, x, method):
    return vae.apply({"params": params}, x, method=method)


def image(height, width):
    return np.random.default_rng(0).uniform(-1, 1, (1, height, width, 3)).astype(np.float32)


def test_unfolding_undoes_folding():
    picture = image(24, 32)
    for patch in (2, 4):
        cells = fold_patches(picture, patch)
        assert cells.shape == (1, 24 // patch, 32 // patch, 3 * patch**2)
        # One cell holds the pixels of one square.
        square = picture[0, :patch, patch : 2 * patch]
        np.testing.assert_array_equal(cells[0, 0, 1], square.ravel())
        np.testing.assert_array_equal(unfold_patches(cells, patch), picture)


def test_patches_of_one_pixel_change_nothing():
    picture = jnp.asarray(image(16, 16))
    assert fold_patches(picture, 1) is picture and unfold_patches(picture, 1) is picture
    assert VAEConfig().patch == 1 and VAEConfig().downsampling == 8


def test_the_patch_counts_towards_the_latent_cell(folded):
    vae, params = folded
    assert vae.downsampling == 8
    latents = plain(vae, params, image(16, 24), "encode")
    assert latents.shape == (1, 2, 3, 4)
    assert plain(vae, params, latents, "decode").shape == (1, 16, 24, 3)
    with pytest.raises(ValueError, match="multiples of 8"):
        plain(vae, params, image(16, 20), "encode")


def test_tiles_are_exact_with_patches_too(folded):
    vae, params = folded
    picture = image(32, 48)
    with jax.default_matmul_precision("highest"):
        latents = plain(vae, params, picture, "encode")
        np.testing.assert_allclose(encode_tiled(vae, params, picture, 16), latents, atol=2e-5)
        np.testing.assert_allclose(
            decode_tiled(vae, params, latents, 16), plain(vae, params, latents, "decode"), atol=2e-5
        )


def test_patches_spare_the_memory_of_full_resolution():
    whole = VAEConfig(ch=8, ch_mult=(1, 1, 1, 1), num_res_blocks=1, norm_groups=4)
    assert vae_peak_bytes(FOLDED, 256, 256, jnp.float32) * 8 < vae_peak_bytes(
        whole, 256, 256, jnp.float32
    )


def test_patches_have_no_published_layout():
    with pytest.raises(ValueError, match="folds patches of 4×4 pixels"):
        vae_table.rows(FOLDED)
