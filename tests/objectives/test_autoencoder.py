"""The autoencoder's objective: sums over pictures, and learning."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from PIL import Image
from skimage import data

from kontext_jax.models.presets import VAEConfig
from kontext_jax.models.vae import VAE
from kontext_jax.objectives.autoencoder import (
    AutoencoderConfig,
    Coder,
    PictureBatch,
    code,
    gaussian_kl,
    latent_metrics,
    make_autoencoder,
    reconstruction_loss,
)
from kontext_jax.objectives.base import mean_metrics
from kontext_jax.pictures.latents import pixels_to_model
from kontext_jax.training.tasks.autoencoder import coder_of

WIDE = VAEConfig(
    **{"ch": 128, "ch_mult": (1,), "num_res_blocks": 1, "norm_groups": 8, "patch": 8},
    latent_scale=1.0,
    latent_shift=0.0,
)
NUM_STEPS = 250


def photographs():
    """Eight crops of 64² from four photographs, [-1, 1]."""
    crops = []
    for photo in (data.astronaut(), data.coffee(), data.chelsea(), data.rocket()):
        small = np.asarray(Image.fromarray(photo).resize((128, 128), Image.Resampling.BICUBIC))
        crops += [small[:64, :64], small[32:96, 32:96]]
    return pixels_to_model(np.stack(crops))


IMAGE = (3, 16, 16, 3)


def toy_coder(decoded=0.5, shape=IMAGE):
    """A coder with known losses: mean = params, logvar = 0; every picture decodes to a constant."""
    return Coder(
        moments=lambda params, x: (jnp.full((3, 2, 2, 4), params), jnp.zeros((3, 2, 2, 4))),
        features=lambda params, z: z,
        output=lambda last, features: jnp.full(shape, decoded),
        last=lambda params: {},
    )


def test_losses_are_sums_over_a_picture():
    decoded, kl, _, _ = code(toy_coder(), 2.0, jnp.zeros(IMAGE), None)
    config = AutoencoderConfig(l1_weight=3.0, mse_weight=5.0, perceptual_weight=7.0)
    loss, metrics = reconstruction_loss(
        config, jnp.zeros(IMAGE), decoded, lambda a, b: jnp.full(3, 0.125)
    )
    values, latents = 16 * 16 * 3, 2 * 2 * 4
    np.testing.assert_allclose(loss, values * (3 * 0.5 + 5 * 0.25 + 7 * 0.125))
    np.testing.assert_allclose(metrics["lpips"], 0.125)
    np.testing.assert_allclose(kl, 0.5 * 4.0 * latents)
    with pytest.raises(ValueError, match=r"the decoder returned \(3, 8, 8, 3\)"):
        code(toy_coder(shape=(3, 8, 8, 3)), 2.0, jnp.zeros(IMAGE), None)


def test_the_divergence_is_that_of_gaussians():
    # KL(N(m, s²) ‖ N(0, 1)) = (m² + s² − 1)/2 − log s
    mean, logvar = jnp.full((2, 1, 1, 1), 1.5), jnp.full((2, 1, 1, 1), 2 * np.log(0.3))
    expected = (1.5**2 + 0.09 - 1) / 2 - np.log(0.3)
    np.testing.assert_allclose(gaussian_kl(mean, logvar), expected, rtol=1e-6)
    assert gaussian_kl(jnp.zeros((1, 2, 2, 4)), jnp.zeros((1, 2, 2, 4)))[0] == 0


def test_noise_has_the_spread_of_the_posterior():
    coder = toy_coder()._replace(
        moments=lambda params, x: (jnp.zeros((3, 2, 2, 4)), jnp.full((3, 2, 2, 4), 2 * np.log(0.1)))
    )
    _, _, z, _ = code(coder, None, jnp.zeros(IMAGE), jnp.ones)
    np.testing.assert_allclose(z, 0.1, rtol=1e-5)


def test_latents_are_described_by_their_moments():
    x = np.random.default_rng(0).laplace(0.5, 1.0, size=(2, 64, 64, 16))  # kurtosis 6, variance 2
    found = latent_metrics(jnp.asarray(x, jnp.float32))
    np.testing.assert_allclose(found["latent_mean"], 0.5, atol=0.02)
    np.testing.assert_allclose(found["latent_square"], 2.25, atol=0.05)
    np.testing.assert_allclose(found["latent_kurtosis"], 6, atol=0.4)


@pytest.fixture(scope="module")
def learnt():
    """Metrics of steps on eight pictures, and the evaluations before and after."""
    vae = VAE(WIDE)
    rate = optax.warmup_cosine_decay_schedule(0, 2e-3, 20, NUM_STEPS)
    objective = make_autoencoder(
        coder_of(vae),
        lambda key: vae.init(key, jnp.zeros((1, 16, 16, 3)))["params"],
        optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate, b2=0.99)),
        AutoencoderConfig(l1_weight=0.1, mse_weight=1.0, kl_weight=1e-6),
        ema_decay=0.9,
    )
    batch, key = PictureBatch(photographs()), jax.random.key(1)
    state = jax.jit(objective.init)(jax.random.key(0))
    evaluate, step = jax.jit(objective.evaluate), jax.jit(objective.step, donate_argnums=0)
    before = mean_metrics([evaluate(state.params, {}, batch, key)])
    rows = []
    for _ in range(NUM_STEPS):
        state, metrics = step(state, {}, batch, key)
        rows.append(metrics)
    return rows, before, mean_metrics([evaluate(state.params, {}, batch, key)])


@pytest.mark.slow
def test_eight_pictures_are_learnt_by_heart(learnt):
    rows, before, after = learnt
    print(f"loss {before['loss']:.0f} → {after['loss']:.0f}, PSNR {after['psnr']:.1f} dB")
    assert after["psnr"] > 30  # 34.8 with 300 steps
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
        ({"perceptual_net": "vgg16"}, "perceptual_net is 'vgg16', but .*perceptual_weight is 0"),
        ({"adversarial_start_step": 5}, "adversarial_start_step is 5, but .*_weight is 0"),
        ({"adversarial_loss": "non_saturating"}, "adversarial_loss is 'non_saturating', but"),
    ],
)
def test_weights_that_teach_nothing_are_refused(weights, message):
    with pytest.raises(ValueError, match=message):
        AutoencoderConfig(**weights)
