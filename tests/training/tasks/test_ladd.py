"""The task of adversarial distillation: what it refuses, its step's shapes, a run that goes on."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from config_tasks import abstract_state, count, read_config, trace_step
from interrupted_runs import run_whole_and_broken

from kontext_jax.data.config import DataConfig
from kontext_jax.models.judges.feature_heads import FeatureHeadsConfig
from kontext_jax.objectives.ladd import LADDConfig
from kontext_jax.training.checkpoints import CheckpointConfig
from kontext_jax.training.config import EvalConfig
from kontext_jax.training.tasks.table import make_task
from kontext_jax.weights.run import training_bundle
from kontext_jax.weights.untrained import untrained_bundle


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("tiny", (("ladd.on_policy", "0.5"),), "acts with objective='ladd' only"),
        ("tiny", (("heads.width", "8"),), "acts with objective='ladd' only"),
        ("tiny", (("discriminator_optimizer.b1", "0.0"),), "there is no discriminator"),
        ("tiny_ladd", (("discriminator.width", "8"),), "there is no discriminator"),
        ("tiny_ladd", (("discriminator_optimizer.name", "muon"),), "choose 'adamw'"),
        ("tiny_ladd", (("weights", ""),), "starts from weights"),
        ("tiny_ladd", (("train", "lora"),), "which the objective ladd has not"),
        ("tiny_ladd", (("flow.text_dropout", "0.2"),), "acts with objective='flow_matching' only"),
    ],
)
def test_settings_without_effect_are_refused(name, settings, message):
    with pytest.raises(ValueError, match=message):
        read_config(name, settings)


def test_heads_and_guidance_must_fit_the_networks():
    config = dataclasses.replace(
        read_config("tiny_ladd"), weights="tiny-kontext", encoders="tiny-kontext"
    )
    far = dataclasses.replace(config, heads=FeatureHeadsConfig(blocks=(1, 6)))
    with pytest.raises(ValueError, match=r"heads.blocks has 6, but .* are 0 to 5"):
        make_task(far, untrained_bundle)
    unguided = dataclasses.replace(
        config,
        preset="tiny-kontext",
        ladd=LADDConfig(guidance=4.0),
        eval=dataclasses.replace(config.eval, sample_guidance=2.5),
    )
    with pytest.raises(ValueError, match=r"ladd.guidance is 4, but neither"):
        make_task(unguided, untrained_bundle)


def task_of(config, preset):
    return make_task(dataclasses.replace(config, weights=preset, encoders=preset), untrained_bundle)


def test_the_teacher_is_frozen_in_the_compute_dtype_and_heads_are_trained():
    config = dataclasses.replace(read_config("tiny_ladd"), dtype="bfloat16")
    task = task_of(config, "tiny-kontext")
    heads = abstract_state(task).extra.params
    assert {x.dtype for x in jax.tree.leaves(task.frozen_shapes())} == {jnp.dtype("bfloat16")}
    assert {x.dtype for x in jax.tree.leaves(heads)} == {jnp.dtype("float32")}
    assert heads.keys() == {f"head_{i}" for i in range(4)}
    assert "heads: after blocks 0, 1, 3, 5" in " ".join(task.sources)


@pytest.mark.slow
def test_the_full_size_step_is_traced_as_it_stands():
    """With pictures that are not square."""
    config = dataclasses.replace(
        read_config("ladd"), batch_size=2, accumulate_steps=1, attention_backend="reference"
    )
    state, found = trace_step(task_of(config, "kontext-dev"), (1024, 768), 1)
    assert count(state.params) == 11_901_408_320 and count(state.extra.params) == 22_040_584
    assert {"discriminator/real/7", "x0_grad"} <= found.keys()


@pytest.mark.slow
def test_an_interrupted_run_with_heads_is_the_unbroken_one(tmp_path):
    """To the last bit, heads and their optimizer too; and it samples as its card says."""
    tiny = read_config("tiny_ladd")
    config = dataclasses.replace(
        tiny,
        preset="tiny-scenes",
        weights="tiny-scenes",
        encoders="tiny-scenes",
        num_steps=4,
        batch_size=2,
        optimizer=dataclasses.replace(tiny.optimizer, warmup_steps=2),
        ladd=LADDConfig(warmup_steps=2),
        heads=FeatureHeadsConfig(blocks=(1, 3), width=8),
        data=DataConfig(sources=("scenes:easy:train:30",), buckets=("64x64",)),
        eval=EvalConfig(),
        checkpoint=CheckpointConfig(every_steps=3),
        log=dataclasses.replace(tiny.log, every_steps=1),
    )
    whole, rows, states = run_whole_and_broken(config, tmp_path, untrained_bundle)
    assert rows[0] == rows[1]
    norms = [row["discriminator/param_norm"] for row in rows[0]]
    assert len(set(norms)) == 4, "the heads learn in every step"
    assert states[0].extra.step == 4
    jax.tree.map(np.testing.assert_array_equal, *states)

    preset = training_bundle(whole, open_weights=untrained_bundle).preset
    assert preset.default_sampler == "renoise" and preset.default_num_steps == 4
    assert preset.default_timesteps == (1.0, 0.75, 0.5, 0.25) and not preset.shift_timesteps
