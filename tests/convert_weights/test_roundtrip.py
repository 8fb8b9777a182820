"""to-jax and to-torch on real files: bit-exact in every naming and dtype, all or nothing."""

import dataclasses
import hashlib
import json
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from convert_weights import NonFiniteError, TensorFileError, WeightMismatchError, read_component
from convert_weights.io import OwnComponent, open_components
from convert_weights.to_jax import to_jax
from convert_weights.to_torch import to_torch
from kontext_jax.models.presets import MMDiTConfig
from kontext_jax.storage.safetensors_reader import DTYPES, SafetensorsFile, open_tensors
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
    read_tensors,
    write_component,
    write_pipeline,
    write_tensors,
)


def hashes(tensors) -> dict[str, str]:
    return {n: f"{t.dtype} {hashlib.sha256(t.tobytes()).hexdigest()}" for n, t in tensors.items()}


def file_hashes(path) -> dict[str, str]:
    with open_tensors(path) as file:
        return hashes({name: file.read(name) for name in file.tensors})


@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16", "F8_E4M3", "F8_E5M2"])
def test_a_diffusers_folder_comes_back_bit_for_bit_in_both_layouts(tmp_path, dtype):
    tensors = write_pipeline(tmp_path / "source", dtype)
    to_jax([str(tmp_path / "source")], tmp_path / "ours")
    to_torch(tmp_path / "ours", tmp_path / "diffusers", "diffusers", max_shard_bytes=100_000)
    to_torch(tmp_path / "ours", tmp_path / "bfl", "bfl")
    for kind, folder in (
        ("mmdit", "transformer"),
        ("vae", "vae"),
        ("t5", "text_encoder_2"),
        ("clip", "text_encoder"),
    ):
        back = open_components(tmp_path / "diffusers" / folder)[kind]
        assert back.config == CONFIGS[kind]
        assert hashes(read_tensors(back)) == hashes(tensors[kind])
    # BFL's files once more through our layout, and to diffusers' again
    to_jax([str(tmp_path / "bfl")], tmp_path / "again")
    for kind in CONFIGS:
        assert file_hashes(tmp_path / "again" / kind) == file_hashes(tmp_path / "ours" / kind)
    assert len(list((tmp_path / "diffusers/transformer").glob("*-of-*.safetensors"))) > 1
    index = json.loads((tmp_path / "diffusers/model_index.json").read_text())
    assert index["_class_name"] == "FluxKontextPipeline"
    for name in ("tokenizer", "tokenizer_2"):
        for path in (tmp_path / "source" / name).iterdir():
            assert (tmp_path / "diffusers" / name / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16", "F8_E4M3"])
@pytest.mark.parametrize(
    "config",
    [
        dataclasses.replace(HEAD_128, guidance_embed=False),
        dataclasses.replace(HEAD_128, qkv_bias=False, depth=2),
        dataclasses.replace(HEAD_128, mlp_ratio=2.0),
    ],
)
def test_bfl_files_come_back_bit_for_bit(tmp_path, config, dtype):
    w = random_tensors("mmdit", config, "bfl", dtype)
    source = write_tensors(tmp_path / "flux1-dev.safetensors", w)
    a = write_tensors(tmp_path / "ae.safetensors", random_tensors("vae", VAE, "bfl", dtype))
    # the autoencoder's group count is no shape: 32 is assumed, and these weights do not care
    to_jax([str(source), str(a)], tmp_path / "ours")
    assert checkpoint.read_config(tmp_path / "ours", "mmdit") == config
    to_torch(tmp_path / "ours", tmp_path / "back", "bfl")
    preset = "flux1-dev" if config.guidance_embed else "flux1-schnell"
    assert file_hashes(tmp_path / "back" / f"{preset}.safetensors") == hashes(w)
    assert file_hashes(tmp_path / "back/ae.safetensors") == file_hashes(a)


def test_files_of_bfl_that_we_wrote_know_their_config(tmp_path):
    write_pipeline(tmp_path / "source")
    to_jax([str(tmp_path / "source")], tmp_path / "ours")
    to_torch(tmp_path / "ours", tmp_path / "bfl", "bfl")
    config, _ = read_component(tmp_path / "bfl/flux1-kontext-dev.safetensors")
    assert config == MMDIT  # heads of 32 channels, which a bare file cannot say


def test_both_namings_of_the_same_weights_give_the_same_leaves(tmp_path):
    write_pipeline(tmp_path / "a")
    to_jax([str(tmp_path / "a")], tmp_path / "ours")
    to_torch(tmp_path / "ours", tmp_path / "bfl", "bfl")
    for name, folder in (("flux1-kontext-dev", "transformer"), ("ae", "vae")):
        one = dict(flatten(read_component(tmp_path / "bfl" / f"{name}.safetensors")[1]))
        two = dict(flatten(read_component(tmp_path / "a" / folder)[1]))
        assert hashes(one) == hashes(two)


def test_dtype_casts_every_tensor_and_says_so(tmp_path):
    write_pipeline(tmp_path / "source", "F32")
    summary = to_jax([str(tmp_path / "source")], tmp_path / "ours", DTYPES["BF16"])
    assert summary.dtypes == ["bfloat16"]
    assert "float32 stored as bfloat16" in "; ".join(summary.notes)
    _, whole = read_component(tmp_path / "source/transformer")
    leaves = dict(flatten(whole))
    with SafetensorsFile(tmp_path / "ours/mmdit/params.safetensors") as file:
        for path in file.tensors:
            assert file.read(path).tobytes() == leaves[path].astype(ml_dtypes.bfloat16).tobytes()
    assert "float32 stored as bfloat16" in (tmp_path / "ours/NOTICE").read_text()
    to_torch(tmp_path / "ours", tmp_path / "f16", "diffusers", DTYPES["F16"])
    with open_tensors(tmp_path / "f16/transformer") as file:
        assert {info.dtype for info in file.tensors.values()} == {DTYPES["F16"]}


def test_values_too_large_for_the_dtype_are_an_error_and_nothing_is_left(tmp_path):
    w = random_tensors("mmdit", HEAD_128, "bfl")
    w["single_blocks.0.linear2.weight"][3, 5] = 1e5
    source = write_tensors(tmp_path / "flux1-dev.safetensors", w)
    with pytest.raises(TensorFileError, match=r"single_blocks\.0\.linear2\.weight.*float16"):
        to_jax([str(source)], tmp_path / "ours", DTYPES["F16"])
    assert [p.name for p in tmp_path.iterdir()] == ["flux1-dev.safetensors"]


def test_nan_in_weights_is_an_error_that_names_every_tensor(tmp_path):
    w = random_tensors("mmdit", HEAD_128, "bfl", "BF16")
    w["img_in.bias"][0] = np.nan
    w["single_blocks.0.linear2.weight"][3, 5] = -np.inf
    source = write_tensors(tmp_path / "flux1-dev.safetensors", w)
    with pytest.raises(NonFiniteError) as error:
        to_jax([str(source)], tmp_path / "ours")
    assert error.value.names == ["img_in.bias", "single_blocks.0.linear2.weight"]
    assert [p.name for p in tmp_path.iterdir()] == ["flux1-dev.safetensors"]
    with pytest.raises(NonFiniteError, match=r"img_in\.bias"):
        read_component(source)


def test_all_differences_are_listed_in_one_error(tmp_path):
    w = random_tensors("mmdit", HEAD_128, "bfl")
    del w["double_blocks.0.txt_mlp.2.bias"]
    w["txt_in.bias"] = w["txt_in.bias"][:-1]
    w["surplus.weight"] = np.zeros((2, 2), np.float32)
    w["img_in.bias"] = np.zeros(w["img_in.bias"].shape, np.int32)
    source = write_tensors(tmp_path / "flux1-dev.safetensors", w)
    with pytest.raises(WeightMismatchError) as error:
        to_jax([str(source)], tmp_path / "ours")
    lines = [line.strip() for line in str(error.value).splitlines()[1:]]
    assert lines == [
        "- double_blocks.0.txt_mlp.2.bias [256]",
        "+ surplus.weight [2, 2]",
        "shape txt_in.bias expected [256], found [255]",
        "dtype img_in.bias is int32, not a floating-point weight",
    ]
    assert [p.name for p in tmp_path.iterdir()] == ["flux1-dev.safetensors"]


def test_an_existing_directory_is_not_touched(tmp_path):
    source = write_tensors(
        tmp_path / "flux1-dev.safetensors", random_tensors("mmdit", HEAD_128, "bfl")
    )
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours/precious").write_text("x")
    with pytest.raises(FileExistsError, match="already exists"):
        to_jax([str(source)], tmp_path / "ours")
    assert [p.name for p in (tmp_path / "ours").iterdir()] == ["precious"]


def test_comfyui_prefix_and_whole_checkpoints(tmp_path):
    parts = {
        "model.diffusion_model.": random_tensors("mmdit", HEAD_128, "bfl"),
        "vae.": random_tensors("vae", VAE, "bfl"),
        "text_encoders.clip_l.transformer.text_model.": random_tensors(
            "clip", CLIP, "transformers"
        ),
        "text_encoders.t5xxl.transformer.": random_tensors("t5", T5, "transformers"),
    }
    everything = {prefix + n: t for prefix, part in parts.items() for n, t in part.items()}
    everything["text_encoders.clip_l.logit_scale"] = np.array(4.6, np.float32)
    source = write_tensors(tmp_path / "flux1-dev-all.safetensors", everything)
    summary = to_jax([str(source)], tmp_path / "ours")
    assert summary.components == ["mmdit", "vae", "t5", "clip"]
    alone = write_tensors(tmp_path / "m.safetensors", parts["model.diffusion_model."])
    assert hashes(dict(flatten(read_component(alone)[1]))) == file_hashes(tmp_path / "ours/mmdit")


def scaled_fp8(tensors, new_names: bool):
    """The same weights as ComfyUI's scaled 8-bit files hold them, and their exact values."""
    stored, exact = {}, {}
    for name, tensor in tensors.items():
        if tensor.ndim != 2:
            stored[name] = exact[name] = tensor.astype(ml_dtypes.bfloat16)
            continue
        scale = np.float32(np.abs(tensor).max() / 448)
        layer = name.removesuffix(".weight")
        stored[name] = (tensor / scale).astype(ml_dtypes.float8_e4m3fn)
        exact[name] = (stored[name].astype(np.float32) * scale).astype(ml_dtypes.bfloat16)
        stored[f"{layer}.{'weight_scale' if new_names else 'scale_weight'}"] = np.array(scale)
        stored[f"{layer}.{'input_scale' if new_names else 'scale_input'}"] = np.array(
            [1.0], np.float32
        )
        if new_names:
            note = json.dumps({"format": "float8_e4m3fn"}).encode()
            stored[f"{layer}.comfy_quant"] = np.frombuffer(note, np.uint8)
    if not new_names:
        stored["scaled_fp8"] = np.zeros(0, ml_dtypes.float8_e4m3fn)
    return stored, exact


@pytest.mark.parametrize("new_names", [False, True])
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_scaled_fp8_files_are_expanded_by_their_scales(tmp_path, new_names, prefix):
    stored, exact = scaled_fp8(random_tensors("mmdit", HEAD_128, "bfl"), new_names)
    source = write_tensors(tmp_path / "flux1-dev-fp8.safetensors", stored, prefix)
    summary = to_jax([str(source)], tmp_path / "ours")
    assert "8-bit weights times their scales, as bfloat16" in "; ".join(summary.notes)
    to_torch(tmp_path / "ours", tmp_path / "back", "bfl")
    assert file_hashes(tmp_path / "back/flux1-dev.safetensors") == hashes(exact)


def test_other_quantised_files_are_refused(tmp_path):
    stored, _ = scaled_fp8(random_tensors("mmdit", HEAD_128, "bfl"), True)
    note = np.frombuffer(b'{"format": "nvfp4"}', np.uint8)
    source = write_tensors(tmp_path / "a.safetensors", stored | {"img_in.comfy_quant": note})
    with pytest.raises(WeightMismatchError, match="'nvfp4'"):
        read_component(source)
    rows = np.ones(256, np.float32)
    source = write_tensors(tmp_path / "b.safetensors", stored | {"img_in.weight_scale": rows})
    with pytest.raises(WeightMismatchError, match="only one finite scale per tensor"):
        read_component(source)
    plain = {"img_in.weight": np.zeros((256, 16), np.float32)}
    source = write_tensors(tmp_path / "c.safetensors", stored | plain)
    with pytest.raises(WeightMismatchError, match="not an 8-bit float tensor"):
        read_component(source)


def test_mixed_dtypes_in_a_stack_keep_every_value(tmp_path):
    config = dataclasses.replace(HEAD_128, depth_single_blocks=2)
    w = random_tensors("mmdit", config, "bfl", "BF16")
    w["single_blocks.1.linear1.weight"] = w["single_blocks.1.linear1.weight"].astype(np.float16)
    source = write_tensors(tmp_path / "flux1-dev.safetensors", w)
    leaves = dict(flatten(read_component(source)[1]))
    assert leaves["single_blocks/mlp_in/kernel"].dtype == np.float32
    assert leaves["single_blocks/mlp_out/kernel"].dtype == ml_dtypes.bfloat16
    assert (
        leaves["single_blocks/mlp_in/kernel"][1]
        == w["single_blocks.1.linear1.weight"][3 * 256 :].T.astype(np.float32)
    ).all()


def test_clip_with_and_without_prefix_and_its_buffers(tmp_path):
    tensors = write_component(tmp_path / "a", "clip", CLIP, "transformers")
    write_component(tmp_path / "b", "clip", CLIP, "transformers")
    extra = {"embeddings.position_ids": np.arange(77)[None]}
    write_tensors(tmp_path / "b/model.safetensors", tensors | extra)
    whole = {f"text_model.{n}": t for n, t in (tensors | extra).items()}
    for name in ("vision_model.x", "logit_scale", "text_projection.weight"):
        whole[name] = np.zeros((2, 2))
    write_component(tmp_path / "c", "clip", CLIP, "transformers")
    write_tensors(tmp_path / "c/model.safetensors", whole)
    read = [hashes(dict(flatten(read_component(tmp_path / n)[1]))) for n in "abc"]
    assert read[0] == read[1] == read[2]


def test_t5_takes_either_name_of_its_embedding_and_refuses_two_that_differ(tmp_path):
    tensors = write_component(tmp_path / "a", "t5", T5, "transformers")
    expected = hashes(dict(flatten(read_component(tmp_path / "a")[1])))
    alias = {"encoder.embed_tokens.weight": tensors["shared.weight"]}
    write_tensors(tmp_path / "a/model.safetensors", tensors | alias)
    assert hashes(dict(flatten(read_component(tmp_path / "a")[1]))) == expected
    only = {n: t for n, t in tensors.items() if n != "shared.weight"} | alias
    write_tensors(tmp_path / "a/model.safetensors", only)
    assert hashes(dict(flatten(read_component(tmp_path / "a")[1]))) == expected
    alias["encoder.embed_tokens.weight"] = tensors["shared.weight"] + 1
    write_tensors(tmp_path / "a/model.safetensors", tensors | alias)
    with pytest.raises(WeightMismatchError, match="must be the same tensor and differ"):
        read_component(tmp_path / "a")


def test_old_attention_names_of_diffusers_autoencoder(tmp_path):
    w = random_tensors("vae", VAE, "diffusers")
    write_component(tmp_path / "new", "vae", VAE, "diffusers")
    write_component(tmp_path / "old", "vae", VAE, "diffusers-old")
    new, old = (dict(flatten(read_component(tmp_path / n)[1])) for n in ("new", "old"))
    assert hashes(new) == hashes(old)
    with open_tensors(tmp_path / "old") as file:
        assert "encoder.mid_block.attentions.0.proj_attn.weight" in file.tensors
        assert "encoder.mid_block.attentions.0.proj_attn.weight" not in w


def test_diffusers_cannot_express_every_config_and_is_told_so(tmp_path):
    config = dataclasses.replace(HEAD_128, qkv_bias=False)
    source = write_tensors(
        tmp_path / "flux1-dev.safetensors", random_tensors("mmdit", config, "bfl")
    )
    to_jax([str(source)], tmp_path / "ours")
    with pytest.raises(WeightMismatchError, match=r"qkv_bias False(.|\n)*use --layout bfl"):
        to_torch(tmp_path / "ours", tmp_path / "out", "diffusers")
    assert not (tmp_path / "out").exists()


def test_notices_state_source_modification_and_licence(tmp_path):
    write_pipeline(tmp_path / "kontext")
    to_jax([str(tmp_path / "kontext")], tmp_path / "ours")
    text = (tmp_path / "ours/NOTICE").read_text()
    for words in (
        str(tmp_path / "kontext"),
        "Modification: converted",
        "Non-Commercial",
        "Derivative",
    ):
        assert words in text
    manifest = json.loads((tmp_path / "ours/kontext_jax.json").read_text())
    assert manifest["license"] == "FLUX.1 [dev] Non-Commercial License"
    to_torch(tmp_path / "ours", tmp_path / "back", "bfl")
    assert "Non-Commercial" in (tmp_path / "back/NOTICE").read_text()
    config = dataclasses.replace(HEAD_128, guidance_embed=False)
    schnell = write_tensors(tmp_path / "s.safetensors", random_tensors("mmdit", config, "bfl"))
    to_jax([str(schnell)], tmp_path / "free")
    text = (tmp_path / "free/NOTICE").read_text()
    assert "Modification: converted" in text and "Non-Commercial" not in text


def test_a_damaged_own_directory_is_refused_with_its_differences(tmp_path):
    write_pipeline(tmp_path / "source")
    to_jax([str(tmp_path / "source")], tmp_path / "ours")
    path = tmp_path / "ours/t5/params.safetensors"
    with SafetensorsFile(path) as file:
        leaves = {name: file.read(name) for name in file.tensors}
    leaves["blocks/surplus"] = leaves.pop("final_norm/scale")
    write_tensors(path, leaves)
    with pytest.raises(WeightMismatchError, match=r"\+ blocks/surplus(.|\n)*- final_norm/scale"):
        OwnComponent(tmp_path / "ours", "t5")
    with pytest.raises(WeightMismatchError):
        to_torch(tmp_path / "ours", tmp_path / "out", "bfl")
    assert not (tmp_path / "out").exists()


PEAK = """
import resource, sys
from pathlib import Path
from convert_weights.to_jax import to_jax
from convert_weights.to_torch import to_torch
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
if sys.argv[3] == "jax":
    to_jax([sys.argv[1]], Path(sys.argv[2]))
else:
    to_torch(Path(sys.argv[1]), Path(sys.argv[2]), "bfl")
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


def test_memory_is_bounded_by_one_tensor_a_thread_and_not_by_the_file(tmp_path):
    config = MMDiTConfig(hidden_size=512, num_heads=4, depth=1, depth_single_blocks=24)
    w = random_tensors("mmdit", config, "bfl", "BF16")
    source = write_tensors(tmp_path / "flux1-dev.safetensors", w)
    largest = max(t.nbytes for t in w.values())
    total = sum(t.nbytes for t in w.values())
    assert total > 20 * largest
    repository = Path(__file__).resolve().parents[2]
    for arguments in (
        (source, tmp_path / "ours", "jax"),
        (tmp_path / "ours", tmp_path / "back", "torch"),
    ):
        result = subprocess.run(
            [sys.executable, "-c", PEAK, *map(str, arguments)],
            capture_output=True,
            text=True,
            check=True,
            cwd=repository,
        )
        # Two threads hold what they read and what they write; the rest is the interpreter's.
        assert int(result.stdout) < 2 * 3 * largest + 24 * 2**20
