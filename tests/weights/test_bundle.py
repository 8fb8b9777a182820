"""Our weight directory: what is saved is loaded, and what is damaged or missing is named."""

import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from kontext_jax.models.presets import PRESETS
from kontext_jax.storage.safetensors_reader import TensorFileError
from kontext_jax.trees import flatten
from kontext_jax.weights import bundle as checkpoint
from kontext_jax.weights.bundle import open_bundle, save_component, write_manifest
from kontext_jax.weights.untrained import untrained_bundle

TINY = PRESETS["tiny"]


def params_of(kind, dtype=np.float32):
    generator = np.random.default_rng(0)
    return jax.tree.map(
        lambda x: generator.normal(size=x.shape).astype(dtype),
        checkpoint.parameter_shapes(kind, getattr(TINY, kind)),
    )


@pytest.fixture(scope="module")
def text_only(tmp_path_factory):
    directory = tmp_path_factory.mktemp("weights") / "model"
    for kind in ("t5", "clip"):
        save_component(directory, kind, getattr(TINY, kind), params_of(kind))
    write_manifest(directory, "tiny", ["t5", "clip"], "a test", None)
    return directory


def test_a_saved_component_is_loaded_bit_for_bit(text_only):
    bundle = open_bundle(text_only, require=["clip"], require_tokenizers=False)
    assert bundle.components["clip"].config == TINY.clip
    assert bundle.source == "a test"
    loaded = dict(flatten(bundle.components["clip"].load()))
    for path, leaf in flatten(params_of("clip")):
        assert np.asarray(loaded[path]).tobytes() == leaf.tobytes()
    halved = bundle.components["clip"].load(dtype=jnp.bfloat16)
    assert {leaf.dtype for _, leaf in flatten(halved)} == {jnp.dtype(jnp.bfloat16)}


def test_weights_have_one_identity_until_they_change(text_only, tmp_path):
    own = open_bundle(text_only, require=["clip"], require_tokenizers=False).components["clip"]
    in_memory = checkpoint.Component(own.config, own.load)
    identity = checkpoint.component_identity(own)
    assert identity == checkpoint.component_identity(in_memory)
    changed = params_of("clip")
    changed["final_layer_norm"]["bias"][3] += 1e-6
    save_component(tmp_path, "clip", TINY.clip, changed)
    write_manifest(tmp_path, "tiny", ["clip"], "a test", None)
    other = open_bundle(tmp_path, require=["clip"], require_tokenizers=False).components["clip"]
    assert identity != checkpoint.component_identity(other)


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, np.float16])
def test_other_dtypes_survive(tmp_path, dtype):
    params = params_of("clip", dtype)
    save_component(tmp_path, "clip", TINY.clip, jax.tree.map(jnp.asarray, params))
    with checkpoint.open_params(tmp_path, "clip") as file:
        for path, leaf in flatten(params):
            assert file.read(path).tobytes() == leaf.tobytes()


def test_a_component_is_never_overwritten_nor_half_written(tmp_path):
    save_component(tmp_path, "clip", TINY.clip, {"a": np.ones(3)})
    with pytest.raises(FileExistsError, match="already exists"):
        save_component(tmp_path, "clip", TINY.clip, {"a": np.zeros(3)})
    with pytest.raises(ValueError, match="declared float32"):
        save_component(
            tmp_path, "t5", TINY.t5, {"a": np.ones(3), "b": jax.ShapeDtypeStruct((2,), "f4")}
        )
    assert [path.name for path in tmp_path.iterdir()] == ["clip"]


def test_what_a_whole_model_lacks_is_listed(text_only):
    with pytest.raises(TensorFileError) as error:
        open_bundle(text_only)
    for part in ("mmdit/", "vae/", "tokenizers/t5/", "tokenizers/clip/", "to-jax"):
        assert part in str(error.value)


def test_any_other_folder_is_told_from_ours(tmp_path):
    with pytest.raises(TensorFileError, match=r"no kontext_jax\.json.*to-jax"):
        open_bundle(tmp_path)


@pytest.mark.parametrize(
    ("manifest", "reason"),
    [
        ("{", "damaged"),
        ("[]", "damaged"),
        ({"format": 9}, "format 9; this version reads format 1"),
        ({"components": ["unet"]}, "components"),
        ({"preset": "flux-3"}, "preset 'flux-3'; known are kontext-dev"),
        ({"preset": None}, "names no preset"),
    ],
)
def test_a_damaged_manifest_is_refused(tmp_path, manifest, reason):
    good = {"format": 1, "preset": "tiny", "components": [], "source": "x", "license": None}
    text = manifest if isinstance(manifest, str) else json.dumps(good | manifest)
    (tmp_path / "kontext_jax.json").write_text(text)
    with pytest.raises(TensorFileError, match=reason):
        open_bundle(tmp_path, require=())


@pytest.mark.parametrize(
    "config",
    ["{", "{}", '{"kind": "t5", "config": {}}', '{"kind": "clip", "config": {"depth": 3}}', None],
)
def test_a_damaged_config_is_refused(tmp_path, config):
    (tmp_path / "clip").mkdir()
    if config is not None:
        (tmp_path / "clip/config.json").write_text(config)
    with pytest.raises(TensorFileError, match="not the config of a clip"):
        checkpoint.read_config(tmp_path, "clip")


def test_nan_in_weights_is_named_when_they_are_loaded(tmp_path):
    params = params_of("clip")
    params["final_layer_norm"]["bias"][1] = np.nan
    save_component(tmp_path, "clip", TINY.clip, params)
    write_manifest(tmp_path, "tiny", ["clip"], "a test", None)
    bundle = open_bundle(tmp_path, require=["clip"], require_tokenizers=False)
    with pytest.raises(TensorFileError, match="NaN or infinity in weights: final_layer_norm/bias"):
        bundle.components["clip"].load()


def test_identity_follows_values_and_layout(tmp_path, text_only):
    def identity(name, params):
        save_component(tmp_path / name, "clip", TINY.clip, params)
        write_manifest(tmp_path / name, "tiny", ["clip"], name, None)
        return open_bundle(tmp_path / name, ["clip"], False).identity

    one = identity("one", params_of("clip"))
    assert identity("same", params_of("clip")) == one
    other = jax.tree.map(lambda x: x + 1, params_of("clip"))
    assert identity("other", other) != one
    assert identity("half", params_of("clip", np.float16)) != one


def test_untrained_weights_are_whole_deterministic_and_finite():
    bundles = [untrained_bundle("tiny"), untrained_bundle("tiny")]
    assert bundles[0].identity == bundles[1].identity
    assert "untrained" in bundles[0].source
    for kind in checkpoint.KINDS:
        first, second = (dict(flatten(b.components[kind].load())) for b in bundles)
        shapes = dict(flatten(checkpoint.parameter_shapes(kind, getattr(TINY, kind))))
        assert {p: x.shape for p, x in first.items()} == {p: x.shape for p, x in shapes.items()}
        assert all(
            np.asarray(x).tobytes() == np.asarray(second[p]).tobytes() for p, x in first.items()
        )
        for path, leaf in first.items():
            spread = float(np.asarray(leaf).std())
            assert (0.005 < spread < 1) == (path.rpartition("/")[2] in ("kernel", "embedding")), (
                path
            )
    for folder in bundles[0].tokenizer_dirs.values():
        assert (folder / "tokenizer.json").is_file()
    with pytest.raises(ValueError, match="no preset 'huge'"):
        untrained_bundle("huge")
