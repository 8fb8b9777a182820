"""Two models mixed: the transformer lies between theirs, all else is the second's."""

import json

import numpy as np
import pytest

from convert_weights.__main__ import main
from convert_weights.mix import mix
from kontext_jax.trees import flatten, unflatten
from kontext_jax.weights import bundle as checkpoint
from kontext_jax.weights.untrained import untrained_bundle

FAST = {"default_num_steps": 2, "default_sampler": "renoise", "default_timesteps": (1.0, 0.4)}


def save(folder, seed, dtype=np.float32, preset="tiny", kinds=checkpoint.KINDS, **card):
    """The untrained model of `preset` with drawn values; its leaves by component."""
    bundle, rng = untrained_bundle(preset), np.random.default_rng(seed)
    leaves = {}
    for kind in kinds:
        component = bundle.components[kind]
        leaves[kind] = {
            path: rng.normal(size=leaf.shape).astype(dtype)
            for path, leaf in flatten(component.load())
        }
        checkpoint.save_component(folder, kind, component.config, unflatten(leaves[kind]))
    checkpoint.write_manifest(folder, preset, kinds, f"draw {seed}", None, **card)
    return leaves


def read(folder):
    bundle = checkpoint.open_bundle(folder, (), require_tokenizers=False)
    found = {kind: dict(flatten(c.load())) for kind, c in bundle.components.items()}
    return bundle, found


def test_the_transformer_is_between_and_the_rest_is_the_seconds(tmp_path):
    theirs = save(tmp_path / "a", 0)
    ours = save(tmp_path / "b", 1, shift_timesteps=False, defaults=FAST)
    counted = []

    def start(total):
        counted.append(total)
        return counted.append

    mix(str(tmp_path / "a"), str(tmp_path / "b"), 0.75, tmp_path / "out", start=start)
    bundle, found = read(tmp_path / "out")
    assert found.keys() == ours.keys()
    for path, leaf in found["mmdit"].items():
        a, b = (x["mmdit"][path].astype(np.float64) for x in (theirs, ours))
        np.testing.assert_allclose(leaf, 0.25 * a + 0.75 * b, rtol=0, atol=1e-6)
    for kind in set(found) - {"mmdit"}:
        for path, leaf in found[kind].items():
            np.testing.assert_array_equal(leaf, ours[kind][path])
    preset = bundle.preset
    assert {name: getattr(preset, name) for name in FAST} == FAST and not preset.shift_timesteps
    assert bundle.source == "0.25 × draw 0 + 0.75 × draw 1"
    assert counted[0] == sum(counted[1:]) == sum(4 * x.size for x in ours["mmdit"].values())


def test_sums_are_in_float32_and_rounded_once(tmp_path):
    bfloat16 = checkpoint.as_dtype("bfloat16")
    theirs = save(tmp_path / "a", 0, bfloat16, kinds=("mmdit",))
    ours = save(tmp_path / "b", 1, bfloat16, kinds=("mmdit",))
    mix(str(tmp_path / "a"), str(tmp_path / "b"), 0.3, tmp_path / "out")
    mix(str(tmp_path / "a"), str(tmp_path / "b"), 0.3, tmp_path / "wide", np.dtype(np.float32))
    narrow, wide = read(tmp_path / "out")[1]["mmdit"], read(tmp_path / "wide")[1]["mmdit"]
    for path, leaf in wide.items():
        a, b = (x["mmdit"][path].astype(np.float64) for x in (theirs, ours))
        np.testing.assert_allclose(leaf, 0.7 * a + 0.3 * b, rtol=0, atol=1e-6)
        np.testing.assert_array_equal(narrow[path], np.asarray(leaf).astype(bfloat16))


REFUSED = {
    "nothing of B": ("a", "b", "0", "share is 0; expected a number between 0"),
    "no number": ("a", "b", "nan", "share is nan"),
    "another size": ("guided", "b", "0.5", "hidden_size 192 and 128"),
    "no transformer": ("a", "text", "0.5", "text holds no FLUX transformer"),
    "nothing there": ("a", "none", "0.5", "none: no such file or folder"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_mixed_is_told_and_nothing_is_left(tmp_path, capsys, case):
    a, b, share, said = REFUSED[case]
    save(tmp_path / "a", 0, kinds=("mmdit",))
    save(tmp_path / "b", 1, kinds=("mmdit",))
    save(tmp_path / "text", 2, kinds=("clip",))
    save(tmp_path / "guided", 3, preset="tiny-kontext-guided", kinds=("mmdit",))
    before = sorted(tmp_path.iterdir())
    words = ["mix", tmp_path / a, tmp_path / b, "--share", share, "--out", tmp_path / "out"]
    assert main([str(word) for word in words]) == 1
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("error: ") and said in captured.err
    assert sorted(tmp_path.iterdir()) == before


def test_the_command_says_what_it_made(tmp_path, capsys):
    save(tmp_path / "a", 0, kinds=("mmdit",))
    save(tmp_path / "b", 1, kinds=("mmdit",))
    words = ["mix", tmp_path / "a", tmp_path / "b", "--share", "0.5", "--out", tmp_path / "out"]
    assert main([str(word) for word in words]) == 0
    out = capsys.readouterr().out
    assert out.count("\n") == 1 and "FLUX transformer; tiny;" in out and "0.5 × draw 0" in out
    manifest = json.loads((tmp_path / "out" / checkpoint.MANIFEST).read_text())
    assert manifest["components"] == ["mmdit"]
    assert "mixed by kontext_jax" in (tmp_path / "out/NOTICE").read_text()
