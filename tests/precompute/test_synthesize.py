"""`python -m kontext_jax.data.synthesize`: what it writes, that nothing is lost or made twice."""

import dataclasses
import json

import encode_helpers
import numpy as np
import pytest
from encode_helpers import contents, run, text_of, write_pairs

import convert_weights.open
from kontext_jax.data.encoded.batches import CachedBatches, EncodedCache
from kontext_jax.data.encoded.records import CacheError, ShardWriter, shard_paths
from kontext_jax.flow.samplers import initial_noise
from kontext_jax.precompute import synthesis, synthesize
from kontext_jax.weights.untrained import untrained_bundle


class HandStages:
    """In place of `stages.Stages`: the result is computed by hand from everything it is given."""

    def __init__(self, bundle, *, dtype=None, mesh=None, tell=None):
        self.bundle, self.preset, self.dtype = bundle, bundle.preset, dtype or "float32"
        self.calls = []

    def denoise(self, asked):
        noise, (txt, vec), references = asked.noise, asked.text, asked.references
        assert len({len(x) for x in (noise, txt, vec, *references)}) == 1
        scale = next(
            (x for x in (asked.guidance, asked.true_cfg_scale) if x is not None), np.ones(len(txt))
        )
        told = asked.num_steps + np.asarray(scale) + np.asarray(txt, np.float32).mean((1, 2))
        told = told + sum(np.asarray(r, np.float32).mean((1, 2, 3)) for r in references)
        if asked.negative is not None:
            told = told + asked.negative[0].astype(np.float32).mean((1, 2))
        return np.asarray(noise) + told[:, None, None, None]


@pytest.fixture(scope="module", autouse=True)
def hand_networks():
    base = untrained_bundle("tiny-kontext")
    preset = dataclasses.replace(
        base.preset, vae=dataclasses.replace(base.preset.vae, z_channels=3)
    )
    bundle = dataclasses.replace(base, preset=preset)
    bundle.components = {"mmdit": base.components["mmdit"]}
    with pytest.MonkeyPatch.context() as patch:
        encode_helpers.use_hand_encoders(patch.setattr)
        patch.setattr(synthesize, "Stages", HandStages)
        patch.setattr(convert_weights.open, "open_weights", lambda path, complete: bundle)
        yield


@pytest.fixture(scope="module")
def encoded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("set")
    write_pairs(folder / "pairs", 18)
    assert run(folder / "pairs", folder / "encoded") == 0
    return folder / "encoded"


def make(encoded, out, *options):
    words = ["--model", "W", "--cache", str(encoded), "--out", str(out), "--batch_size", "4", "-q"]
    return synthesize.main([*words, "--steps", "3", "--guidance", "2.5", *map(str, options)])


@pytest.fixture(scope="module")
def whole(encoded, tmp_path_factory):
    """What an unbroken run writes."""
    out = tmp_path_factory.mktemp("whole") / "out"
    assert make(encoded, out) == 0
    return out


def test_targets_are_the_models_and_all_else_is_copied(encoded, whole):
    given, made = contents(encoded), contents(whole)
    assert given.keys() == made.keys() and len(made) == 18
    assert all(given[key][1:] == made[key][1:] for key in made)
    cache, before = EncodedCache(whole), EncodedCache(encoded)
    assert cache.kinds == before.kinds
    recipe = synthesis.Recipe(2.5, 3, 0)
    for number, id_ in enumerate(cache.ids):
        x0, contexts = cache.latents(number, 0)
        noise = initial_noise([recipe.noise_seed(id_, 0)], *x0.shape)[0]
        txt = cache.text(number)[0].astype(np.float32)
        told = 3 + 2.5 + txt.mean() + text_of("").mean()
        told += sum(c.astype(np.float32).mean() for c in contexts)
        np.testing.assert_allclose(x0.astype(np.float32), noise + told, rtol=1e-2)
    assert cache.null_text()[0].tobytes() == before.null_text()[0].tobytes()
    assert cache.facts["results"]["guidance"] == 2.5
    assert {k: v for k, v in cache.facts.items() if k != "results"} == before.facts


def test_configs_read_them_as_encoded_examples(whole):
    batches = CachedBatches(EncodedCache(whole), batch_size=4, seed=0)
    assert next(batches).x0.shape[0] == 4
    batches.close()


@pytest.mark.parametrize("stop_at", [1, 7])
def test_a_run_that_was_killed_goes_on_after_the_last_whole_file(
    encoded, whole, tmp_path, monkeypatch, stop_at
):
    add_sample, added = ShardWriter.add_sample, []

    def add(self, *args):
        added.append(args)
        if len(added) == stop_at:
            raise KeyboardInterrupt
        add_sample(self, *args)
        self.finish_shard()

    with monkeypatch.context() as patch:
        patch.setattr(ShardWriter, "add_sample", add)
        assert make(encoded, tmp_path) == 130
    with pytest.raises(CacheError, match="is not complete"):
        EncodedCache(tmp_path)
    kept = len(shard_paths(tmp_path))
    assert kept == stop_at - 1
    assert make(encoded, tmp_path) == 0
    assert contents(tmp_path) == contents(whole)
    made_by = json.loads((tmp_path / "manifest.json").read_text())["hash"]
    stored = synthesize.read_stored(tmp_path, made_by)
    assert len(stored.text_of) == 18


def test_processes_and_larger_limits_add_up_to_the_same(encoded, whole, tmp_path):
    assert make(encoded, tmp_path, "--limit", 5) == 0
    few = contents(tmp_path)
    assert len(few) == 5
    for index in (0, 1):
        assert make(encoded, tmp_path, "--process_count", 2, "--process_index", index) == 0
    assert contents(tmp_path) == contents(whole)
    assert few.items() <= contents(whole).items()


def test_variants_differ_in_noise_alone(encoded, whole, tmp_path):
    assert make(encoded, tmp_path, "--variants", 2) == 0
    made = contents(tmp_path)
    assert {key: made[key] for key in made if key[1] == 0} == contents(whole)
    assert all(made[i, 0][0] != made[i, 1][0] and made[i, 0][1:] == made[i, 1][1:] for i, _ in made)


def test_old_shards_are_closed(encoded, tmp_path, monkeypatch):
    monkeypatch.setattr(synthesis, "SHARD_S", 0.0)
    assert make(encoded, tmp_path) == 0
    assert len(shard_paths(tmp_path)) >= 5


def test_another_model_or_guidance_needs_another_folder(encoded, whole, capsys):
    assert make(encoded, whole, "--guidance", 3) == 2
    assert "results/guidance: stored 2.5, now 3" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--size", "64x64"], "--size goes with --prompts"),
        (["--limit", "0"], "--limit is 0; expected at least 1"),
        (["--process_index", "2"], "process_index 2 is none of 1 processes"),
        (["--mesh", "tensr=2"], "expected sizes such as tensor=4"),
    ],
)
def test_wrong_options_are_named(encoded, tmp_path, capsys, options, message):
    assert make(encoded, tmp_path, *options) == 2
    assert message in capsys.readouterr().err


def test_prompts_of_a_file(tmp_path, monkeypatch):
    class HandNetworks(encode_helpers.HandEncoders):
        pass

    monkeypatch.setattr(synthesize, "Networks", HandNetworks)
    monkeypatch.setattr(synthesize, "encoder_facts", lambda bundle, tokens: {"max": tokens})
    (tmp_path / "lines.txt").write_text("a cat\n\na dog \na cat\n")
    words = ["--model", "W", "--prompts", str(tmp_path / "lines.txt"), "--out", str(tmp_path / "o")]
    assert synthesize.main([*words, "--size", "32x48", "-q", "--batch_size", "3"]) == 0
    cache = EncodedCache(tmp_path / "o")
    assert [cache.prompt(n) for n in range(2)] in (["a cat", "a dog"], ["a dog", "a cat"])
    assert cache.kinds[0].target == (32, 48) and cache.kinds[0].contexts == ()
    assert cache.latents(0, 0)[0].shape == (6, 4, 3)
    assert synthesize.main([*words, "--size", "30x48", "-q"]) == 2
