"""The autoencoder's task: configs that fit, what they refuse, and a whole run that goes on."""

import dataclasses

import jax
import numpy as np
import pytest
from config_tasks import count, read_config, trace_step

from kontext_jax.data.config import DataConfig
from kontext_jax.models.judges.perceptual import ALEXNET
from kontext_jax.storage.safetensors_reader import TensorFileError
from kontext_jax.training import loop as train_loop
from kontext_jax.training import metrics
from kontext_jax.training.checkpoints import CheckpointConfig
from kontext_jax.training.tasks.table import make_task
from kontext_jax.trees import flatten
from kontext_jax.weights.perceptual import FOLDER_VARIABLE, perceptual_shapes, save_perceptual
from kontext_jax.weights.run import training_bundle
from kontext_jax.weights.untrained import untrained_bundle

OFF = (
    ("autoencoder.adversarial_weight", "0"),
    ("autoencoder.adversarial_start_step", "50000"),
)


def no_weights(path):
    raise AssertionError(f"{path} was opened")


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("vae_tiny", OFF[:1], "adversarial_start_step is 100, but .*adversarial_weight is 0"),
        ("vae_tiny", OFF, "discriminator.width is 32, but there is no discriminator"),
        ("scenes_vae", (("discriminator.norm", "none"),), "discriminator.norm is 'none', but"),
        ("scenes_vae", (("discriminator_optimizer.b1", "0.9"),), "discriminator_optimizer.b1 is"),
        ("scenes_vae", (("autoencoder.perceptual_net", "vgg16"),), "perceptual_weight is 0"),
        ("vae_tiny", (("num_steps", "100"),), "would never begin"),
        ("vae_tiny", (("discriminator_optimizer.name", "muon"),), "choose 'adamw'"),
        ("vae_flux", (("remat", "save_qkv"),), "an autoencoder takes 'none' or 'full'"),
        ("tiny", (("autoencoder.z_channels", "4"),), "acts with objective='autoencoder' only"),
        ("tiny", (("discriminator.width", "4"),), "there is no discriminator"),
    ],
)
def test_settings_without_effect_are_refused(name, settings, message):
    with pytest.raises(ValueError, match=message):
        read_config(name, settings)


def test_the_full_size_step_is_traced_as_it_stands():
    """Shapes of a whole step in bfloat16; nothing is computed."""
    config = dataclasses.replace(read_config("vae_flux"), batch_size=2, remat="full")
    state, found = trace_step(make_task(config, no_weights), (256, 256), 0)
    assert count(state.params) == 83_819_683  # BFL's autoencoder
    assert count(state.extra.params) == 2_765_633  # taming's discriminator
    assert {"lpips", "adversarial_weight/sum", "discriminator/loss/sum"} <= found.keys()


def test_latents_have_the_channels_asked_for():
    config = read_config("scenes_vae", (("autoencoder.z_channels", "4"),))
    shapes = jax.eval_shape(make_task(config, no_weights).objective.init, jax.random.key(0))
    assert shapes.params["decoder"]["conv_in"]["kernel"].shape[2] == 4

    config = dataclasses.replace(config, weights="somewhere")
    with pytest.raises(ValueError, match="z_channels is 4, but somewhere has 16"):
        make_task(config, lambda path: untrained_bundle("tiny-scenes"))


def test_absent_perceptual_weights_stop_a_run_with_the_command(tmp_path, monkeypatch):
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path))
    task = make_task(read_config("vae_tiny"), no_weights)
    assert task.frozen_shapes().keys() == {"perceptual"}
    with pytest.raises(TensorFileError, match=r"python -m kontext_jax\.evaluation\.fetch_percep"):
        task.load_frozen(None)


@pytest.mark.slow
def test_an_interrupted_run_with_a_discriminator_is_the_unbroken_one(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    leaves = {
        path: np.abs(rng.normal(scale=0.05, size=x.shape)).astype(np.float32)
        for path, x in flatten(perceptual_shapes(ALEXNET))
    }
    save_perceptual(tmp_path / "nets", "alexnet", leaves, "drawn")
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path / "nets"))
    tiny = read_config("vae_tiny", (("autoencoder.z_channels", "4"),))
    config = dataclasses.replace(
        tiny,
        num_steps=6,
        batch_size=2,
        autoencoder=dataclasses.replace(tiny.autoencoder, adversarial_start_step=2),
        optimizer=dataclasses.replace(tiny.optimizer, warmup_steps=2),
        discriminator=dataclasses.replace(tiny.discriminator, width=4),
        data=DataConfig(
            sources=("scenes:easy-crowded:any:16",),
            buckets=("64x64",),
            fraction_with_references=0.0,
        ),
        eval=dataclasses.replace(
            tiny.eval,
            sources=("scenes:easy-crowded:seen:4",),
            every_steps=3,
            num_batches=1,
            sample_every_steps=0,
        ),
        checkpoint=CheckpointConfig(every_steps=3),
        log=dataclasses.replace(tiny.log, every_steps=1),
    )

    def train(run, num_steps):
        lines = []
        train_loop.train(
            dataclasses.replace(config, num_steps=num_steps),
            str(run),
            open_weights=no_weights,
            tell=lines.append,
        )
        return lines

    whole, broken = tmp_path / "whole", tmp_path / "broken"
    train(whole, 6)
    train(broken, 4)
    assert any(line.startswith("going on from step 4") for line in train(broken, 6))
    rows = [
        [
            row
            for kind in ("train", "eval", "eval_ema")
            for row in metrics.read(run / metrics.FILE, kind)
        ]
        for run in (whole, broken)
    ]
    assert rows[0] == rows[1]
    assert "discriminator/loss" not in rows[0][1] and "discriminator/loss" in rows[0][2]

    bundle = training_bundle(whole, open_weights=no_weights)
    assert bundle.components["vae"].config.z_channels == 4
    loaded = bundle.components["vae"].load()
    assert loaded["encoder"]["conv_out"]["kernel"].shape[-1] == 8
