"""Finding a model's parts, telling what they are, and opening them without converting first."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest

import convert_weights
from convert_weights import (
    NonFiniteError,
    WeightMismatchError,
    open_foreign_bundle,
    read_component,
    scheduler,
)
from convert_weights.compare import describe
from convert_weights.layouts import guess_preset
from convert_weights.to_jax import to_jax
from convert_weights.to_torch import to_torch
from kontext_jax.models.presets import PRESETS, MMDiTConfig
from kontext_jax.storage.safetensors_reader import TensorFileError
from kontext_jax.trees import flatten
from kontext_jax.weights import bundle as checkpoint
from tests.convert_helpers import (
    CLIP,
    CONFIGS,
    HEAD_128,
    MMDIT,
    T5,
    VAE,
    random_tensors,
    write_component,
    write_pipeline,
    write_tensors,
)


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "a-model"
    write_pipeline(folder)
    return folder


@pytest.fixture(scope="module")
def ours(pipeline):
    to_jax([str(pipeline)], pipeline.parent / "ours")
    return pipeline.parent / "ours"


@pytest.fixture(scope="module")
def bfl(ours):
    to_torch(ours, ours.parent / "bfl", "bfl")
    return ours.parent / "bfl"


def leaves_of(bundle, kind, **options):
    return dict(flatten(bundle.components[kind].load(**options)))


def test_three_places_give_the_same_model(pipeline, ours, bfl):
    bundles = [
        open_foreign_bundle(pipeline),
        open_foreign_bundle(bfl),
        open_foreign_bundle(bfl / "flux1-kontext-dev.safetensors"),
        checkpoint.open_bundle(ours),
    ]
    for bundle in bundles:
        assert bundle.preset.name == "kontext-dev"
        assert {kind: c.config for kind, c in bundle.components.items()} == CONFIGS
        assert bundle.preset.mmdit == MMDIT
        assert bundle.tokenizer_dirs.keys() == {"t5", "clip"}
        assert all(any(folder.iterdir()) for folder in bundle.tokenizer_dirs.values())
    for kind in CONFIGS:
        first, *others = [leaves_of(bundle, kind) for bundle in bundles]
        for other in others:
            assert first.keys() == other.keys()
            assert all(
                np.asarray(first[p]).tobytes() == np.asarray(other[p]).tobytes() for p in first
            )
        components = [bundle.components[kind] for bundle in bundles]
        assert len({checkpoint.component_identity(component) for component in components}) == 1
    assert (
        len({bundle.identity for bundle in bundles}) == 3
    )  # the file beside its folder is the same


def test_loading_casts_and_places_every_leaf(pipeline, ours):
    device = jax.devices()[0]
    sharding = jax.sharding.SingleDeviceSharding(device)
    for bundle in (open_foreign_bundle(pipeline), checkpoint.open_bundle(ours)):
        for target in (None, device, sharding):
            leaves = leaves_of(bundle, "clip", dtype="bfloat16", device=target)
            assert {leaf.dtype.name for leaf in leaves.values()} == {"bfloat16"}
            assert {leaf.device for leaf in leaves.values()} <= {device, sharding}


def test_a_loaded_leaf_is_the_only_one_on_the_host(pipeline, monkeypatch):
    """Each leaf is on its device before the next one is read."""
    events = []
    component = open_foreign_bundle(pipeline).components["t5"]
    read, put = convert_weights.io.ForeignComponent.read_leaf, jax.device_put
    monkeypatch.setattr(
        convert_weights.io.ForeignComponent,
        "read_leaf",
        lambda self, path, dtype=None: events.append("read") or read(self, path, dtype),
    )
    monkeypatch.setattr(jax, "device_put", lambda *args: events.append("put") or put(*args))
    component.load()
    assert events == ["read", "put"] * (len(events) // 2)


def test_what_is_missing_is_listed_with_the_places_looked_at(pipeline, tmp_path):
    shutil.copytree(pipeline, tmp_path / "m")
    shutil.rmtree(tmp_path / "m/vae")
    shutil.rmtree(tmp_path / "m/tokenizer_2")
    with pytest.raises(WeightMismatchError) as error:
        open_foreign_bundle(tmp_path / "m")
    assert "- autoencoder: none of vae/, ae.safetensors" in str(error.value)
    assert "- T5 tokenizer: none of tokenizer_2/, tokenizers/t5/" in str(error.value)
    assert "CLIP" not in str(error.value)


def test_two_candidates_for_a_part_are_not_chosen_between(bfl, tmp_path):
    shutil.copytree(bfl, tmp_path / "m")
    shutil.copy(bfl / "flux1-kontext-dev.safetensors", tmp_path / "m/flux1-other.safetensors")
    with pytest.raises(WeightMismatchError, match="several files may be the FLUX transformer"):
        open_foreign_bundle(tmp_path / "m")


def test_a_part_of_the_wrong_kind_is_named(pipeline, tmp_path):
    shutil.copytree(pipeline, tmp_path / "m")
    shutil.rmtree(tmp_path / "m/transformer")
    shutil.copytree(pipeline / "text_encoder_2", tmp_path / "m/transformer")
    with pytest.raises(
        WeightMismatchError, match="holds a T5 text encoder, not a FLUX transformer"
    ):
        open_foreign_bundle(tmp_path / "m")
    shutil.copy(pipeline / "vae/config.json", tmp_path / "m/transformer/config.json")
    with pytest.raises(WeightMismatchError, match=r"config\.json describes autoencoder"):
        read_component(tmp_path / "m/transformer")


def test_the_wrong_preset_is_one_clear_error(pipeline, tmp_path):
    with pytest.raises(WeightMismatchError, match=r"wrong weights for flux-schnell.*guidance"):
        open_foreign_bundle(pipeline, preset="flux-schnell")
    with pytest.raises(WeightMismatchError, match="wrong weights for flux-schnell"):
        to_jax([str(pipeline)], tmp_path / "ours", preset="flux-schnell")
    with pytest.raises(WeightMismatchError, match="no preset 'flux'; there are kontext-dev"):
        open_foreign_bundle(pipeline, preset="flux")
    assert open_foreign_bundle(pipeline, preset="krea-dev").preset.default_guidance == 4.5


def test_names_and_shapes_tell_the_preset():
    def guess(*hints, guidance=True):
        return guess_preset(MMDiTConfig(guidance_embed=guidance), list(hints), "x")

    assert guess("flux1-kontext-dev_bf16") == "kontext-dev"
    assert guess("FLUX.1-Krea-dev") == "krea-dev"
    assert guess("flux1-dev-fp8") == "flux-dev"
    assert guess("transformer", "FLUX.1-Kontext-dev") == "kontext-dev"
    assert guess("abc123", "black-forest-labs/FLUX.1-dev") == "flux-dev"
    assert guess("anything", guidance=False) == "flux-schnell"
    with pytest.raises(WeightMismatchError, match=r"same shapes(.|\n)*pass --preset kontext-dev"):
        guess("model", "weights", "developer")


def test_a_hub_id_is_downloaded_or_the_reason_told(pipeline, monkeypatch):
    import huggingface_hub

    def offline(*args, **options):
        raise ConnectionError("no route to the hub")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", offline)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(
        WeightMismatchError, match=r"owner/name: no such file(.|\n)*no route to the hub"
    ):
        open_foreign_bundle("owner/name")
    with pytest.raises(WeightMismatchError, match="no such file or folder"):
        open_foreign_bundle("a/b/c")

    class Info:
        siblings = tuple(
            type("Sibling", (), {"rfilename": name})
            for name in ("model_index.json", "flux1-dev.safetensors", "vae/model.safetensors")
        )

    asked = {}

    def download(repo, **options):
        asked.update(options, repo=repo)
        return str(pipeline)

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *args, **options: Info)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert open_foreign_bundle("owner/name").preset.name == "kontext-dev"
    (pipeline / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    try:
        assert open_foreign_bundle("owner/FLUX.1-dev").preset.name == "flux-dev"
        (pipeline / "model_index.json").write_text("[")
        with pytest.raises(WeightMismatchError, match=r"model_index\.json: not readable as JSON"):
            open_foreign_bundle(pipeline)
    finally:
        (pipeline / "model_index.json").write_text('{"_class_name": "FluxKontextPipeline"}')
    assert asked["ignore_patterns"] == ["flux1-dev.safetensors"]
    assert not any("bin" in pattern or "pt" in pattern for pattern in asked["allow_patterns"])


def test_nan_in_foreign_weights_is_named_when_they_are_loaded(tmp_path):
    write_pipeline(tmp_path / "m")
    w = random_tensors("clip", CLIP, "transformers")
    w["encoder.layers.1.mlp.fc1.bias"][3] = np.nan
    write_tensors(tmp_path / "m/text_encoder/model.safetensors", w)
    bundle = open_foreign_bundle(tmp_path / "m")
    with pytest.raises(NonFiniteError, match=r"NaN(.|\n)*encoder\.layers\.1\.mlp\.fc1\.bias"):
        bundle.components["clip"].load()


def test_parts_may_be_named_one_by_one(pipeline, tmp_path, ours):
    parts = ("transformer", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
    to_jax([str(pipeline / part) for part in parts], tmp_path / "out", preset="kontext-dev")
    bundle = checkpoint.open_bundle(tmp_path / "out")
    assert bundle.identity == checkpoint.open_bundle(ours).identity
    with pytest.raises(WeightMismatchError, match="both hold a"):
        to_jax([str(pipeline), str(pipeline / "vae")], tmp_path / "twice")


def test_bare_files_infer_their_config_or_say_what_would_help(tmp_path):
    source = write_tensors(tmp_path / "x.safetensors", random_tensors("mmdit", HEAD_128, "bfl"))
    assert read_component(source)[0] == HEAD_128
    source = write_tensors(tmp_path / "y.safetensors", random_tensors("mmdit", MMDIT, "diffusers"))
    with pytest.raises(WeightMismatchError, match="--axes-dim 8,12,12"):
        read_component(source)
    assert read_component(source, "mmdit", MMDIT)[0] == MMDIT
    source = write_tensors(tmp_path / "z.safetensors", random_tensors("t5", T5, "transformers"))
    assert read_component(source)[0] == T5
    small = dataclasses.replace(CLIP, hidden_size=32)
    source = write_tensors(
        tmp_path / "c.safetensors", random_tensors("clip", small, "transformers")
    )
    with pytest.raises(WeightMismatchError, match=r"put transformers' config\.json beside"):
        read_component(source)
    source = write_tensors(tmp_path / "v.safetensors", random_tensors("vae", VAE, "bfl"))
    assert read_component(source)[0] == dataclasses.replace(VAE, norm_groups=32)


@pytest.mark.parametrize(
    ("kind", "change", "reason"),
    [
        ("mmdit", {"num_layers": 10**9}, "depth 1000000000"),
        ("mmdit", {"num_layers": -1}, "depth -1"),
        ("mmdit", {"num_attention_heads": "two"}, "not describe|not a config|no FLUX"),
        ("mmdit", {"axes_dims_rope": [1, 2]}, "axes_dim"),
        ("mmdit", {"patch_size": 2}, "patch_size 2"),
        ("mmdit", {"num_layers": 3}, r"- transformer_blocks\.2"),
        ("vae", {"use_quant_conv": True}, "use_quant_conv"),
        ("vae", {"block_out_channels": [8, 12]}, "not multiples"),
        ("vae", {"scaling_factor": "big"}, "latent_scale 'big'"),
        ("t5", {"feed_forward_proj": "relu"}, "gated-gelu"),
        ("t5", {"d_model": 31}, "shape"),
        ("clip", {"hidden_act": "relu"}, "hidden_act 'relu'"),
        ("clip", {"num_attention_heads": 0}, "num_attention_heads 0"),
    ],
)
def test_a_config_that_cannot_be_is_refused(tmp_path, kind, change, reason):
    naming = "diffusers" if kind in ("mmdit", "vae") else "transformers"
    write_component(tmp_path / "m", kind, CONFIGS[kind], naming)
    path = tmp_path / "m/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(WeightMismatchError, match=reason):
        read_component(tmp_path / "m")


def test_a_config_that_is_no_json_object_is_refused(tmp_path):
    write_component(tmp_path / "m", "t5", T5, "transformers")
    for text, reason in (("{", "not readable as JSON"), ("[1]", "not a JSON object")):
        (tmp_path / "m/config.json").write_text(text)
        with pytest.raises(WeightMismatchError, match=reason):
            read_component(tmp_path / "m")


def test_unknown_tensors_are_shown(tmp_path):
    source = write_tensors(tmp_path / "x.safetensors", {"lora.down": np.ones((2, 2))})
    with pytest.raises(WeightMismatchError, match=r"\+ lora\.down"):
        read_component(source)
    with pytest.raises(WeightMismatchError, match="holds no tensors"):
        read_component(write_tensors(tmp_path / "e.safetensors", {}))
    (tmp_path / "empty").mkdir()
    with pytest.raises(WeightMismatchError, match="no weights and no tokenizer"):
        to_jax([str(tmp_path / "empty")], tmp_path / "out")
    with pytest.raises(TensorFileError, match="found none"):
        read_component(tmp_path / "empty")


def test_inspect_describes_before_anyone_converts(bfl, ours):
    described = dict(describe(str(bfl / "flux1-kontext-dev.safetensors")))
    rows = dict(described["FLUX transformer"])
    assert rows["layout"] == "bfl"
    assert rows["model"].startswith("kontext-dev")
    assert rows["config"] == MMDIT
    assert int(rows["parameters"].replace(",", "")) == sum(
        t.size for t in random_tensors("mmdit", MMDIT, "bfl").values()
    )
    assert list(dict(describe(str(ours)))) == [
        "FLUX transformer",
        "autoencoder",
        "T5 text encoder",
        "CLIP text encoder",
    ]
    assert PRESETS["kontext-dev"].mmdit != MMDIT and "not the size of a preset" in rows["model"]


def write_scheduler(folder, **changes) -> None:
    (folder / "scheduler").mkdir()
    config = scheduler.scheduler_config(True) | changes
    (folder / scheduler.FILE).write_text(json.dumps(config))


@pytest.mark.parametrize("dynamic", [True, False])
def test_the_folders_scheduler_decides_the_grid_and_survives_conversion(tmp_path, dynamic):
    write_pipeline(tmp_path / "theirs")
    write_scheduler(tmp_path / "theirs", use_dynamic_shifting=dynamic, shift=1.0)
    assert open_foreign_bundle(tmp_path / "theirs").preset.shift_timesteps is dynamic
    to_jax([str(tmp_path / "theirs")], tmp_path / "ours")
    assert checkpoint.open_bundle(tmp_path / "ours").preset.shift_timesteps is dynamic
    to_torch(tmp_path / "ours", tmp_path / "back", "diffusers")
    assert scheduler.read_sampling(tmp_path / "back") == {"shift_timesteps": dynamic}


def test_a_few_step_model_stays_one_through_every_layout(tmp_path):
    write_pipeline(tmp_path / "theirs")
    write_scheduler(
        tmp_path / "theirs", use_dynamic_shifting=False, shift=1.0, stochastic_sampling=True
    )
    scheduler.write_defaults(tmp_path / "theirs", {"default_num_steps": 4})
    to_jax([str(tmp_path / "theirs")], tmp_path / "ours")
    for layout in ("diffusers", "bfl"):
        to_torch(tmp_path / "ours", tmp_path / layout, layout)
        to_jax([str(tmp_path / layout)], tmp_path / f"{layout}-back", preset="kontext-dev")
    assert scheduler.read_sampling(tmp_path / "diffusers")["default_sampler"] == "renoise"
    for name in ("ours", "diffusers-back", "bfl-back"):
        preset = checkpoint.open_bundle(tmp_path / name).preset
        assert (preset.default_num_steps, preset.default_sampler) == (4, "renoise"), name
    scheduler.write_defaults(tmp_path / "theirs", {"default_num_steps": -4})
    with pytest.raises(WeightMismatchError, match="default_num_steps is -4: expected"):
        open_foreign_bundle(tmp_path / "theirs")


def test_without_a_scheduler_the_preset_decides_the_grid(pipeline):
    assert scheduler.read_sampling(pipeline) == {}
    assert open_foreign_bundle(pipeline).preset.shift_timesteps


def test_a_grid_that_we_do_not_have_is_refused_with_every_key(tmp_path):
    write_pipeline(tmp_path / "theirs")
    write_scheduler(tmp_path / "theirs", max_shift=1.3, use_karras_sigmas=True)
    with pytest.raises(WeightMismatchError) as error:
        open_foreign_bundle(tmp_path / "theirs")
    assert "max_shift: found 1.3, supported 1.15" in str(error.value)
    assert "use_karras_sigmas: found True, supported False" in str(error.value)
