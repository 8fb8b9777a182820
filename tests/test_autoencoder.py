"""The autoencoder's objective: sums over pictures, and learning."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kontext_jax.data.scenes import WORLDS, SceneSource, render
from kontext_jax.latents import pixels_to_model
from kontext_jax.models.presets import VAEConfig
from kontext_jax.models.vae import VAE
from kontext_jax.objectives.autoencoder import (
    AutoencoderConfig,
    PictureBatch,
    gaussian_kl,
    make_autoencoder,
    reconstruction_losses,
)
from kontext_jax.objectives.base import mean_metrics

CONFIG = VAEConfig(
    **{"ch": 16, "ch_mult": (1, 1), "num_res_blocks": 1, "norm_groups": 4, "patch": 4},
    latent_scale=1.0,
    latent_shift=0.0,
)


def pictures(count):
    source = SceneSource(WORLDS["easy-crowded"], count=count)
    return pixels_to_model(np.stack([render(source[i].target, 64) for i in range(count)]))


def toy(params, x):
    """Moments and decoder with known losses: mean = params, logvar = 0; the picture is z's sum."""
    return jnp.full((x.shape[0], 2, 2, 4), params), jnp.zeros((x.shape[0], 2, 2, 4))


def test_losses_are_sums_over_a_picture():
    image = jnp.zeros((3, 16, 16, 3))
    found = reconstruction_losses(
        toy, lambda params, z: jnp.full((3, 16, 16, 3), 0.5), 2.0, image, None
    )
    values, latents = 16 * 16 * 3, 2 * 2 * 4
    np.testing.assert_allclose(found["l1"], 0.5 * values)
    np.testing.assert_allclose(found["mse"], 0.25 * values)
    np.testing.assert_allclose(found["kl"], 0.5 * 4.0 * latents)
    with pytest.raises(ValueError, match=r"decode returned \(3, 8, 8, 3\)"):
        reconstruction_losses(toy, lambda params, z: jnp.zeros((3, 8, 8, 3)), 2.0, image, None)


def test_the_divergence_is_that_of_gaussians():
    # KL(N(m, s²) ‖ N(0, 1)) = (m² + s² − 1)/2 − log s
    mean, logvar = jnp.full((2, 1, 1, 1), 1.5), jnp.full((2, 1, 1, 1), 2 * np.log(0.3))
    expected = (1.5**2 + 0.09 - 1) / 2 - np.log(0.3)
    np.testing.assert_allclose(gaussian_kl(mean, logvar), expected, rtol=1e-6)
    assert gaussian_kl(jnp.zeros((1, 2, 2, 4)), jnp.zeros((1, 2, 2, 4)))[0] == 0


def test_noise_has_the_spread_of_the_posterior():
    def moments(params, x):
        return jnp.zeros((1, 4, 4, 4)), jnp.full((1, 4, 4, 4), 2 * np.log(0.1))

    def decode(params, z):
        return jnp.broadcast_to(z.reshape(1, 4, 16, 1), (1, 4, 16, 3))

    ones = reconstruction_losses(moments, decode, None, jnp.zeros((1, 4, 16, 3)), jnp.ones)
    np.testing.assert_allclose(ones["l1"], 0.1 * 4 * 16 * 3, rtol=1e-5)


@pytest.fixture(scope="module")
def learnt():
    """Metrics of some steps on eight pictures, and the evaluations before and after."""
    vae = VAE(CONFIG)
    objective = make_autoencoder(
        lambda p, x: vae.apply({"params": p}, x, method="moments"),
        lambda p, z: vae.apply({"params": p}, z, method="decode"),
        lambda key: vae.init(key, jnp.zeros((1, 16, 16, 3)))["params"],
        optax.adam(3e-3),
        AutoencoderConfig(l1_weight=0.1, mse_weight=1.0, kl_weight=1e-6),
        ema_decay=0.9,
        accumulate_steps=2,
    )
    batch, key = PictureBatch(pictures(8)), jax.random.key(1)
    state = jax.jit(objective.init)(jax.random.key(0))
    evaluate, step = jax.jit(objective.evaluate), jax.jit(objective.step)
    before = mean_metrics([evaluate(state.params, {}, batch, key)])
    rows = []
    for _ in range(40):
        state, metrics = step(state, {}, batch, key)
        rows.append(metrics)
    return rows, before, mean_metrics([evaluate(state.params, {}, batch, key)])


@pytest.mark.slow
def test_eight_pictures_are_learnt(learnt):
    rows, before, after = learnt
    print(f"loss {before['loss']:.0f} → {after['loss']:.0f}, PSNR {after['psnr']:.1f} dB")
    assert after["loss"] < 0.25 * before["loss"]
    assert rows[-1]["loss"] < 0.5 * rows[0]["loss"]
    assert all(np.isfinite(row["grad_norm"]) for row in rows)


@pytest.mark.slow
def test_the_logged_terms_make_up_the_loss(learnt):
    _, before, _ = learnt
    values, latents = 64 * 64 * 3, 8 * 8 * 16
    summed = 0.1 * before["l1"] * values + before["mse"] * values + 1e-6 * before["kl"] * latents
    assert before["loss"] == pytest.approx(summed, rel=1e-4)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"kl_weight": -1.0}, "autoencoder.kl_weight is -1.0"),
        ({"l1_weight": 0.0}, "nothing would be reconstructed"),
    ],
)
def test_weights_that_teach_nothing_are_refused(weights, message):
    with pytest.raises(ValueError, match=message):
        AutoencoderConfig(**weights)
