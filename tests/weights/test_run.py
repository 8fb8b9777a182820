"""A run's folder serves as weights, sampled from and exported: bit for bit what was saved."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from convert_weights import read_component
from convert_weights.__main__ import main as convert
from convert_weights.lora.read import open_adapter
from convert_weights.open import open_weights
from kontext_jax.models.lora import LoraConfig, init_lora, merge
from kontext_jax.models.presets import PRESETS
from kontext_jax.objectives.state import make_train_state
from kontext_jax.storage.step_folders import CheckpointError
from kontext_jax.training.checkpoints import Checkpoints
from kontext_jax.trees import flatten
from kontext_jax.weights import bundle as checkpoint
from kontext_jax.weights.adapters import adapter_from_tree
from kontext_jax.weights.run import is_run, open_run

ROOT = Path(__file__).parents[2]
SETTINGS = {
    "objective": "flow_matching",
    "preset": "tiny",
    "weights": "",
    "encoders": "untrained",
    "autoencoder_weights": "",
    "train": "full",
}


def random_tree(shapes, seed: int):
    generator = np.random.default_rng(seed)
    return jax.tree.map(
        lambda x: jnp.asarray(generator.normal(0, 0.05, x.shape).astype(np.float32)), shapes
    )


def save_run(run: Path, params, ema, steps=(1,), **settings):
    """A run's folder with the same state at every step."""
    state = make_train_state(params, optax.sgd(1.0), with_ema=ema is not None)
    state = dataclasses.replace(state, ema_params=ema)
    with Checkpoints(run / "checkpoints", tell=lambda line: None) as checkpoints:
        for step in steps:
            checkpoints.save(step, state, {}, json.dumps(SETTINGS | settings))
    return run


def network(kind: str, seed: int):
    return random_tree(checkpoint.parameter_shapes(kind, getattr(PRESETS["tiny"], kind)), seed)


@pytest.fixture(scope="module")
def trained():
    return network("mmdit", 1), network("mmdit", 2)


@pytest.fixture(scope="module")
def run(trained, tmp_path_factory):
    return save_run(tmp_path_factory.mktemp("runs") / "full", *trained, steps=(3, 5))


def assert_same(tree, expected):
    tree, expected = dict(flatten(tree)), dict(flatten(expected))
    assert tree.keys() == expected.keys()
    for path in expected:
        assert tree[path].dtype == expected[path].dtype, path
        np.testing.assert_array_equal(np.asarray(tree[path]), np.asarray(expected[path]), path)


def test_average_is_the_default_and_parameters_can_be_had(run, trained):
    assert is_run(run) and not is_run(run / "checkpoints")
    params, ema = trained
    bundle = open_weights(run)
    assert set(bundle.components) == {"mmdit", "vae", "t5", "clip"}
    assert bundle.preset.name == "tiny"
    assert "average of the parameters after step 5" in bundle.source
    assert_same(bundle.components["mmdit"].load(), ema)
    raw = open_weights(run, which="params", step=3)
    assert_same(raw.components["mmdit"].load(), params)
    assert raw.identity != bundle.identity


def test_leaves_come_in_the_dtype_and_place_asked_for(run, trained, monkeypatch):
    monkeypatch.setattr("kontext_jax.weights.run.BATCH_BYTES", 2**16)  # many batches
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    asked = []

    def place(path, shape):
        asked.append(path)
        return sharding

    loaded = open_weights(run).components["mmdit"].load(dtype="bfloat16", device=place)
    assert_same(loaded, jax.tree.map(lambda x: x.astype(jnp.bfloat16), trained[1]))
    assert sorted(asked) == sorted(path for path, _ in flatten(trained[1]))


@pytest.mark.parametrize("layout", ["bfl", "diffusers"])
def test_published_layouts_hold_the_very_numbers(run, trained, layout, tmp_path):
    out = tmp_path / "out"
    flags = ["--which", "params", "--step", "5"] if layout == "bfl" else []
    assert convert(["to-torch", str(run), "--layout", layout, "--out", str(out), *flags]) == 0
    file = "flux1-tiny.safetensors" if layout == "bfl" else "transformer"
    _, params = read_component(out / file, "mmdit")
    assert_same(params, trained[0] if layout == "bfl" else trained[1])
    item = "parameters" if layout == "bfl" else "average of the parameters"
    origin = f"Source: {run}, {item} after step 5; trained from scratch\n"
    assert (out / "NOTICE").read_text().startswith(origin)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_own_directory_made_from_a_run_equals_it(run, trained, tmp_path):
    out = tmp_path / "out"
    assert convert(["to-jax", str(run), "--out", str(out), "--dtype", "bfloat16"]) == 0
    bundle = checkpoint.open_bundle(out, require=(), require_tokenizers=False)
    expected = jax.tree.map(lambda x: x.astype(jnp.bfloat16), trained[1])
    assert_same(bundle.components["mmdit"].load(), expected)


def test_run_without_average_gives_its_parameters(trained, tmp_path, capsys):
    run = save_run(tmp_path / "run", trained[0], None)
    assert open_run(run).item == "params"
    assert convert(["to-jax", str(run), "--out", str(tmp_path / "x"), "--which", "ema"]) == 1
    assert "keeps no average" in capsys.readouterr().err


def test_damage_is_named_when_weights_are_read(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    item = tmp_path / "run/checkpoints/5/arrays/ema_params"
    file = max((p for p in item.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"CRC-32 .*\n.*finished are: 3"):
        open_weights(tmp_path / "run").components["mmdit"].load()
    open_weights(tmp_path / "run", which="params").components["mmdit"].load()
    file.write_bytes(data[:-1])
    lines = []
    assert open_run(tmp_path / "run", tell=lines.append).step == 3  # seen without reading it all
    assert "expected" in lines[0]


def test_missing_steps_and_lost_beginnings_are_told(run, trained, tmp_path):
    with pytest.raises(CheckpointError, match="there are: 3, 5"):
        open_run(run, step=4)
    other = save_run(tmp_path / "run", trained[0], None, weights=str(tmp_path / "gone"))
    with pytest.raises(ValueError, match=r"used .*gone \(weights\), which cannot be opened"):
        open_weights(other)
    assert convert(["to-jax", str(other), "--out", str(tmp_path / "out")]) == 0


def test_adapters_of_a_run_are_merged_into_what_it_began_from(run, trained, tmp_path):
    base = trained[1]
    config = LoraConfig(rank=2, alpha=3.0, targets=("kontext",))
    lora = random_tree(init_lora(config, base, jax.random.key(0)), 7)
    settings = {"train": "lora", "weights": str(run), "lora": {"rank": 2, "alpha": 3.0}}
    adapted = save_run(tmp_path / "lora", lora, None, **settings)
    bundle = open_weights(adapted)
    loaded = bundle.components["mmdit"].load()
    for (path, got), (_, expected) in zip(
        sorted(flatten(loaded)), sorted(flatten(merge(base, lora, 3.0))), strict=True
    ):
        np.testing.assert_allclose(got, expected, rtol=0, atol=1e-6, err_msg=path)
    assert not bundle.adapters  # the identity tells which they are
    out = tmp_path / "out"
    assert convert(["to-torch", str(adapted), "--layout", "bfl", "--out", str(out)]) == 0
    assert_same(read_component(out / "flux1-tiny.safetensors", "mmdit")[1], loaded)


@pytest.mark.parametrize("which", ["ema", "params"])
def test_adapters_of_a_run_become_a_lora_file(trained, tmp_path, which):
    config = LoraConfig(rank=2, alpha=3.0, targets=("attention", "img_in"))
    shapes = jax.eval_shape(lambda key: init_lora(config, trained[0], key), jax.random.key(0))
    trees = {"params": random_tree(shapes, 7), "ema": random_tree(shapes, 8)}
    settings = {"train": "lora", "weights": "w", "lora": {"rank": 2, "alpha": 3.0}}
    adapted = save_run(tmp_path / "hats", trees["params"], trees["ema"], **settings)
    out, sizes = tmp_path / "hats.safetensors", {"mmdit": PRESETS["tiny"].mmdit}
    assert (
        convert(["lora", str(adapted), "--layout", "peft", "--which", which, "--out", str(out)])
        == 0
    )
    expected = adapter_from_tree(trees[which], 3.0, "hats").networks["mmdit"].low_rank
    direct = open_adapter(adapted, sizes, which)
    assert direct.name == str(adapted)
    for adapter in (direct, open_adapter(out, sizes)):
        found = adapter.networks["mmdit"].low_rank
        assert found.keys() == expected.keys()
        for place, change in expected.items():
            np.testing.assert_array_equal(found[place].a, change.a)
            gap = found[place].factor * found[place].b - change.factor * change.b
            assert np.abs(gap).max() < 1e-7
    with pytest.raises(ValueError, match=r"another transformer.*\n  \+ single_blocks/k \[2\]"):
        open_adapter(adapted, {"mmdit": dataclasses.replace(sizes["mmdit"], depth_single_blocks=2)})


def test_autoencoder_of_a_run_stands_in_for_that_of_the_encoders(trained, tmp_path):
    vae = network("vae", 5)
    settings = {"objective": "autoencoder", "encoders": "", "autoencoder": {}}
    first = save_run(tmp_path / "vae", vae, None, **settings)
    assert set(open_weights(first, complete=False).components) == {"vae"}
    with pytest.raises(ValueError, match="without mmdit, t5, clip"):
        open_weights(first)
    second = save_run(tmp_path / "run", trained[0], None, autoencoder_weights=str(first))
    assert_same(open_weights(second).components["vae"].load(), vae)


@pytest.mark.slow
def test_sample_makes_a_picture_from_a_run(run, tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(ROOT)
    import sample

    common = ["--prompt", "a cat", "--size", "32x32", "--steps", "2", "--no-cache"]
    for name, flags in (("ema", []), ("raw", ["--raw-params", "--checkpoint", "3"])):
        out = tmp_path / f"{name}.png"
        assert sample.main(["--weights", str(run), "-o", str(out), *common, *flags]) == 0
    assert (tmp_path / "ema.png").read_bytes() != (tmp_path / "raw.png").read_bytes()
    output = capsys.readouterr().out
    assert "average of the parameters after step 5" in output
    assert "parameters after step 3" in output


def test_sample_chooses_step_and_parameters_of_runs_only(run, monkeypatch, capsys):
    monkeypatch.syspath_prepend(ROOT)
    import sample
    from kontext_jax.commands.edit_weights import open_weights

    bundle = open_weights(str(run), None, raw_params=True, step=3)
    assert "full, parameters after step 3 (tiny)" in bundle.source
    flags = ["--weights", str(ROOT / "tests"), "--raw-params"]
    assert sample.main([*flags, "--prompt", "a cat"]) == 2
    assert "is no training run" in capsys.readouterr().err
