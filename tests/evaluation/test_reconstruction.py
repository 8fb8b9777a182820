"""Reconstruction: metrics by closed forms and scikit-image, the protocol, the report."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from scipy.ndimage import gaussian_filter
from skimage import data
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from kontext_jax.evaluation import reconstruction
from kontext_jax.evaluation.reconstruction import (
    as_json,
    bootstrap,
    choose,
    evaluate,
    open_pictures,
    resize_and_crop,
    summaries,
    summarise,
    table,
)
from kontext_jax.evaluation.reconstruction_metrics import METRICS, psnr, ssim
from kontext_jax.models.judges.perceptual import Conv, Perceptual, PerceptualConfig
from kontext_jax.models.presets import VAEConfig
from kontext_jax.models.vae import VAE

SMALL = PerceptualConfig(stages=((Conv(4, stride=2),), (Conv(6),)), pools=(None, (2, 2)))
SMALL_VAE = VAEConfig(
    **{"ch": 4, "ch_mult": (1,), "num_res_blocks": 1, "norm_groups": 2, "patch": 4, "z_channels": 2}
)


@pytest.fixture(scope="module")
def measured():
    """Pairs of pictures [9, 2, 64, 80, 3] in [0, 1], and PSNR and SSIM of each.

    A photograph with itself, three times blurred, with noise and as a negative; an even picture
    with one a little brighter, where variances are nothing but rounding; values with their halves.
    """
    photo = data.astronaut()[100:164, 180:260] / 255
    noise = np.random.default_rng(0).normal(scale=0.05, size=photo.shape)
    others = [photo, *(gaussian_filter(photo, (s, s, 0)) for s in (0.5, 1, 2))]
    others += [np.clip(photo + noise, 0, 1), 1 - photo]
    even = np.full_like(photo, 0.7)
    pairs = [(photo, other) for other in others]
    pairs = np.array([*pairs, (even, even + 1e-3), (even, even - 0.1), (photo, photo / 2)])
    run = jax.jit(lambda a, b: (psnr(a, b), ssim(a, b)))
    return pairs, *(np.asarray(x) for x in run(*jnp.float32(pairs.swapaxes(0, 1))))


def test_psnr_and_ssim_are_those_of_scikit_image(measured):
    for (x, y), our_psnr, our_ssim in list(zip(*measured, strict=True))[1:]:
        theirs = structural_similarity(
            x, y, data_range=1, channel_axis=-1, gaussian_weights=True, sigma=1.5,
            use_sample_covariance=False,
        )  # fmt: skip
        assert our_ssim == pytest.approx(theirs, abs=1e-5)
        assert our_psnr == pytest.approx(peak_signal_noise_ratio(x, y, data_range=1), rel=1e-5)


def test_more_blur_is_worse_and_equals_are_equal(measured):
    _, our_psnr, our_ssim = measured
    assert (np.diff(our_psnr[:4]) < 0).all() and (np.diff(our_ssim[:4]) < 0).all()
    assert our_psnr[0] == np.inf and our_ssim[0] == 1
    assert our_psnr[7] == pytest.approx(20, abs=1e-4)  # 10·log10(1 / 0.1²)
    with pytest.raises(ValueError, match="8×16 are smaller"):
        ssim(jnp.zeros((1, 16, 8, 3)), jnp.zeros((1, 16, 8, 3)))


# Pictures


def test_the_middle_of_the_resized_picture_is_taken():
    ramp = np.broadcast_to(np.arange(200, dtype=np.uint8)[:, None, None], (200, 100, 3))
    middle = resize_and_crop(np.ascontiguousarray(ramp), 50)
    assert middle.shape == (50, 50, 3)
    # 200 rows become 100, of which 25 … 74 stay: row i covers the old rows 2i and 2i + 1.
    np.testing.assert_allclose(middle[:, 0, 0], 2 * np.arange(25, 75) + 0.5, atol=0.6)
    square = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    np.testing.assert_array_equal(resize_and_crop(square, 32), square)


def test_the_choice_depends_on_seed_and_names_alone():
    names = [f"{i}.png" for i in range(50)]
    chosen = choose(names, 10, 0)
    assert chosen == choose(names[::-1], 10, 0) != choose(names, 10, 1)
    without = [name for name in names if name != chosen[3]]
    assert choose(without, 9, 0) == chosen[:3] + chosen[4:]
    assert choose(names, 100, 0) == choose(names, 50, 0)


def test_folders_and_sources_are_read(tmp_path):
    (tmp_path / "below").mkdir()
    for name, level in (("a.png", 10), ("below/b.PNG", 20)):
        Image.new("RGB", (5, 4), (level,) * 3).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no picture")
    pictures = open_pictures(str(tmp_path))
    assert pictures.names == ("a.png", "below/b.PNG")
    assert pictures.read("below/b.PNG")[0, 0, 0] == 20
    scenes = open_pictures("scenes:easy:seen:3")
    assert len(scenes.names) == 3 and scenes.read("1").shape == (64, 64, 3)
    with pytest.raises(ValueError, match="no pictures in it"):
        open_pictures(_empty(tmp_path))


def _empty(tmp_path) -> str:
    (tmp_path / "empty").mkdir()
    return str(tmp_path / "empty")


# Measuring


def make_networks():
    vae, perceptual = VAE(SMALL_VAE), Perceptual(SMALL)
    picture = jnp.zeros((1, 16, 16, 3))
    shapes = jax.eval_shape(
        lambda key: (
            vae.init(key, picture)["params"],
            perceptual.init(key, picture, picture)["params"],
        ),
        jax.random.key(0),
    )
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: rng.normal(scale=0.3, size=x.shape).astype(np.float32), shapes)
    return vae, perceptual, params


networks = pytest.fixture(scope="module")(make_networks)


def in_batches(pixels, batch_size):
    for start in range(0, len(pixels), batch_size):
        part = pixels[start : start + batch_size]
        fill = np.repeat(part[:1], batch_size - len(part), axis=0)
        yield len(part), np.concatenate([part, fill])


PIXELS = np.random.default_rng(1).integers(0, 256, (5, 16, 16, 3), np.uint8)


def test_figures_do_not_depend_on_the_batch(networks):
    vae, perceptual, params = networks

    def run(batch_size):
        return evaluate(vae, perceptual, lambda where: params, in_batches(PIXELS, batch_size))

    by_two, by_three = run(2), run(3)
    for form in ("rounded", "unrounded"):
        for name in METRICS:
            assert by_two[form][name].shape == (5,)
            np.testing.assert_allclose(by_two[form][name], by_three[form][name], rtol=2e-5)
    # Rounding is a small change of its own.
    both = by_two["rounded"]["psnr"], by_two["unrounded"]["psnr"]
    assert 0 < np.abs(both[0] - both[1]).max() < 0.1


@pytest.mark.slow
def test_figures_do_not_depend_on_the_devices():
    script = f"""
import sys; sys.path[:0] = [{str(Path(__file__).parent)!r}]
import jax, json, numpy as np
from test_reconstruction import METRICS, PIXELS, evaluate, in_batches, make_networks
vae, perceptual, params = make_networks()
found = [
    evaluate(vae, perceptual, lambda where: jax.device_put(params, where), in_batches(PIXELS, 4),
             jax.devices()[:count])
    for count in (1, 4)
]
print(json.dumps(jax.tree.map(np.ndarray.tolist, found)))
"""
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
        "PYTHONPATH": str(Path(__file__).parents[2]),
    }
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr[-2000:]
    one, four = json.loads(done.stdout.splitlines()[-1])
    for form, values in one.items():
        for name in METRICS:
            np.testing.assert_allclose(values[name], four[form][name], rtol=2e-5)


# Figures


def test_the_interval_is_that_of_a_mean():
    values = np.random.default_rng(0).normal(30, 4, 400)
    found = summarise(values)
    assert found["mean"] == pytest.approx(values.mean())
    assert found["sd"] == pytest.approx(values.std(ddof=1))
    assert found["se"] == pytest.approx(found["sd"] / 20)
    low, high = bootstrap(values)
    assert (found["low"], found["high"]) == (low, high)
    assert low == pytest.approx(found["mean"] - 1.96 * found["se"], abs=0.04)
    assert high == pytest.approx(found["mean"] + 1.96 * found["se"], abs=0.04)


def test_the_report_names_both_distances_and_shows_the_paper():
    rng = np.random.default_rng(0)
    measured = {
        form: {name: rng.uniform(0.2, 0.4, 12) for name in METRICS} for form in reconstruction.FORMS
    }
    measured["rounded"]["psnr"][3] = np.inf
    text = table("mine", 12, summaries(measured))
    assert "| | PDist-A | PDist-B (LPIPS-VGG) | SSIM | PSNR, dB |" in text
    assert "| Flux-VAE | 0.332 ± 0.003 | 0.896 ± 0.004 | 31.1 ± 0.08 |" in text
    assert "mine, mean of 12" in text and "∞" in text
    kept = json.loads(json.dumps(as_json({}, "here", ["x"] * 12, measured), allow_nan=False))
    assert kept["by_picture"]["rounded"]["psnr"][3] is None
    assert kept["summary"]["rounded"]["psnr"]["mean"] is None
    assert kept["summary"]["rounded"]["ssim"]["mean"] == pytest.approx(
        measured["rounded"]["ssim"].mean()
    )


def test_wrong_arguments_are_told_in_one_line(tmp_path, capsys):
    base = ["--weights", "untrained", "--images", _empty(tmp_path)]
    assert reconstruction.main(base) == 2
    assert "error:" in (first := capsys.readouterr().err) and "no pictures in it" in first
    assert reconstruction.main([*base, "--num", "0"]) == 2
    assert "--num is 0; expected at least 1" in capsys.readouterr().err
