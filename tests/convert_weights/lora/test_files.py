"""LoRA files: layouts say the same, what is written is read, and what does not fit is named."""

import dataclasses
import json

import numpy as np
import pytest

from convert_weights.__main__ import main
from convert_weights.lora.read import read_lora
from convert_weights.lora.write import lora_tensors, write_lora
from convert_weights.rules import WeightMismatchError, make_plan
from convert_weights.tables import TABLES
from kontext_jax.models.presets import PRESETS
from kontext_jax.storage.safetensors_reader import TensorInfo
from kontext_jax.storage.safetensors_writer import SafetensorsWriter
from kontext_jax.weights.adapters import Adapter, leaf_edits
from tests.convert_helpers import CLIP, MMDIT, T5, random_tensors
from tests.lora_helpers import draw_adapter

CONFIGS = {"mmdit": MMDIT, "clip": CLIP, "t5": T5}
LAYOUTS = ("peft", "kohya", "bfl")
RANK = 2


def draw(*shape, seed=0):
    return np.random.default_rng((seed, *shape)).normal(0, 0.3, shape).astype(np.float32)


def written(tmp_path, tensors, metadata=None, name="lora.safetensors"):
    infos = {n: TensorInfo(x.dtype, x.shape) for n, x in tensors.items()}
    with SafetensorsWriter(tmp_path / name, infos, metadata) as writer:
        for n, x in tensors.items():
            writer.write(n, x)
    return tmp_path / name


def read(path, **configs) -> Adapter:
    return read_lora(path, CONFIGS | configs)


def factors(layers: dict[str, tuple[int, int]], form="{}.lora_{}.weight", seed=0) -> dict:
    """Drawn factors for layers of the given (out, in)."""
    tensors = {}
    for name, (num_out, num_in) in layers.items():
        tensors[form.format(name, "A")] = draw(RANK, num_in, seed=seed)
        tensors[form.format(name, "B")] = draw(num_out, RANK, seed=seed + 1)
    return tensors


def change_of(adapter: Adapter, kind="mmdit", config=MMDIT, scale=1.0) -> dict[str, np.ndarray]:
    """What an adapter adds to each leaf of zeros."""
    table = TABLES[kind]
    plan = make_plan(table.rows(config), table.axis_sizes(config), table.NAMINGS[0])
    edits = leaf_edits([(adapter.networks[kind], scale)])
    assert edits.keys() <= plan.leaves.keys()
    return {path: edit(np.zeros(plan.leaves[path], np.float32)) for path, edit in edits.items()}


def assert_same_change(a: Adapter, b: Adapter, atol: float = 1e-6) -> None:
    x, y = change_of(a), change_of(b)
    # A module that gets nothing may be left out.
    for path in x.keys() | y.keys():
        zero = np.zeros(1, np.float32)
        np.testing.assert_allclose(x.get(path, zero), y.get(path, zero), rtol=0, atol=atol)


# The converter of whole weights is the judge: a LoRA in the published layout, added there.


@pytest.mark.parametrize("naming", ["bfl", "diffusers"])
def test_an_adapter_of_every_layer_is_what_converting_the_sum_gives(tmp_path, naming):
    table = TABLES["mmdit"]
    plan = make_plan(table.rows(MMDIT), table.axis_sizes(MMDIT), naming)
    layers = {
        name.removesuffix(".weight"): shape
        for name, shape in plan.sources.items()
        if len(shape) == 2
    }
    tensors = factors(layers)
    sums = {name: np.zeros(shape, np.float32) for name, shape in plan.sources.items()}
    for name, (num_out, _) in layers.items():
        a, b = tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"]
        sums[f"{name}.weight"] = 0.5 * b @ a
        tensors[f"{name}.lora_B.bias"] = draw(num_out, seed=5)
        sums[f"{name}.bias"] = 0.5 * tensors[f"{name}.lora_B.bias"]
    scales = {m.source: plan.sources[m.source] for m in plan.moves if m.path.endswith("norm/scale")}
    for name, shape in scales.items():
        tensors[name] = sums[name] = draw(*shape, seed=7)

    found = change_of(read(written(tmp_path, tensors)), scale=0.5)
    assert found.keys() == plan.leaves.keys()
    for move in plan.moves:
        leaf = found[move.path] if move.layer is None else found[move.path][move.layer]
        expected = move.to_ours(sums[move.source])
        np.testing.assert_allclose(leaf, expected, rtol=0, atol=1e-6, err_msg=move.path)


# Writing and reading.


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("targets", [("all-linear",), ("kontext",), ("single_blocks/[qv]",)])
def test_trained_adapters_are_written_and_read_equal(tmp_path, layout, targets):
    trained = draw_adapter(MMDIT, targets, rank=3, alpha=2.0)
    path = tmp_path / "x.safetensors"
    write_lora(trained, path, layout, CONFIGS)
    back = read(path)
    assert back.layout == layout
    low_rank, found = trained.networks["mmdit"].low_rank, back.networks["mmdit"].low_rank
    assert found.keys() == low_rank.keys()
    if layout != "peft":  # there attn_out and mlp_out are one module too
        assert {k: c.rank for k, c in found.items()} == {k: 3 for k in low_rank}
    assert_same_change(trained, back)
    for place, change in low_rank.items():
        np.testing.assert_array_equal(found[place].a, change.a)


@pytest.mark.parametrize("layout", ["kohya", "bfl"])
def test_fused_files_go_there_and_back_bit_for_bit(tmp_path, layout):
    table = TABLES["mmdit"]
    plan = make_plan(table.rows(MMDIT), table.axis_sizes(MMDIT), "bfl")
    layers = {n.removesuffix(".weight"): s for n, s in plan.sources.items() if len(s) == 2}
    if layout == "bfl":
        tensors = factors(layers)
        scales = {n: s for n, s in plan.sources.items() if n.endswith(".scale")}
        tensors |= {name: draw(*shape) for name, shape in scales.items()}
        tensors |= {f"{n}.lora_B.bias": draw(s[0], seed=3) for n, s in layers.items()}
    else:
        layers = {"lora_unet_" + n.replace(".", "_"): s for n, s in layers.items()}
        tensors = factors(layers, "{}.lora_{}.weight")
        rename = {".lora_A.": ".lora_down.", ".lora_B.": ".lora_up."}
        for old, new in rename.items():
            tensors = {n.replace(old, new): x for n, x in tensors.items()}
        tensors |= {f"{n}.alpha": np.array(1.5, np.float32) for n in layers}
    back, metadata = lora_tensors(read(written(tmp_path, tensors)), layout, CONFIGS)
    assert back.keys() == tensors.keys()
    for name, x in tensors.items():
        assert back[name].tobytes() == x.tobytes(), name
    if layout == "kohya":
        assert (metadata["ss_network_dim"], metadata["ss_network_alpha"]) == ("2", "1.5")


def test_layouts_are_translated_into_each_other(tmp_path):
    adapter = draw_adapter(MMDIT, rank=2, alpha=3.0)
    for number, layout in enumerate(("peft", "bfl", "kohya", "peft")):
        path = tmp_path / f"{number}.safetensors"
        write_lora(adapter, path, layout, CONFIGS)
        following = read(path)
        assert_same_change(adapter, following)
        adapter = following


def test_dtypes_are_kept_and_can_be_chosen(tmp_path):
    adapter = draw_adapter(MMDIT, ("img_in",))
    write_lora(adapter, tmp_path / "half.safetensors", "bfl", CONFIGS, np.dtype(np.float16))
    half = read(tmp_path / "half.safetensors")
    assert half.dtype == np.float16
    write_lora(half, tmp_path / "again.safetensors", "kohya", CONFIGS)
    again = read(tmp_path / "again.safetensors")
    assert again.dtype == np.float16
    assert_same_change(half, again, atol=0)


# Names and scales that programs use.

QKV = {"double_blocks.1.img_attn.qkv": (192, 64)}
TO_Q = {
    "transformer_blocks.1.attn.to_q": (64, 64),
    "single_transformer_blocks.2.proj_out": (64, 320),
}


@pytest.mark.parametrize(
    ("layers", "form"),
    [
        (QKV, "diffusion_model.{}.lora_{}.weight"),
        (QKV, "base_model.model.{}.lora_{}.weight"),
        (QKV, "model.diffusion_model.{}.lora_{}.default.weight"),
        (TO_Q, "transformer.{}.lora_{}.weight"),
        (TO_Q, "base_model.model.{}.lora_{}.weight"),
        (TO_Q, "base_model.model.transformer.{}.lora_{}.default.weight"),
    ],
)
def test_prefixes_of_many_programs_mean_the_same(tmp_path, layers, form):
    plain = read(written(tmp_path, factors(layers), name="plain.safetensors"))
    assert_same_change(read(written(tmp_path, factors(layers, form))), plain, atol=0)


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (".lora_down.weight", ".lora_up.weight"),
        (".lora.down.weight", ".lora.up.weight"),
        (".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight"),
    ],
)
@pytest.mark.parametrize("flat", [False, True])
def test_suffixes_of_many_programs_mean_the_same(tmp_path, a, b, flat):
    tensors = factors(TO_Q)
    plain = read(written(tmp_path, tensors, name="plain.safetensors"))
    renamed = {}
    for name, x in tensors.items():
        layer, _, part = name.removesuffix(".weight").rpartition(".lora_")
        layer = "lora_transformer_" + layer.replace(".", "_") if flat else f"transformer.{layer}"
        renamed[layer + {"A": a, "B": b}[part]] = x
    assert_same_change(read(written(tmp_path, renamed)), plain, atol=0)


def test_xlabs_names(tmp_path):
    tensors = {}
    for name, num_out, num_in in (
        ("double_blocks.0.processor.qkv_lora2", 192, 64),
        ("double_blocks.1.processor.proj_lora1", 64, 64),
        ("single_blocks.2.processor.qkv_lora", 192, 64),
        ("single_blocks.2.processor.proj_lora", 64, 320),
    ):
        tensors |= {
            f"{name}.down.weight": draw(RANK, num_in),
            f"{name}.up.weight": draw(num_out, RANK),
        }
    adapter = read(written(tmp_path, tensors))
    assert adapter.layout == "xlabs"
    places = adapter.networks["mmdit"].low_rank.keys()
    assert places == {
        *((f"double_blocks/txt_attn/{n}", 0) for n in "qkv"),
        ("double_blocks/img_attn/proj", 1),
        *((f"single_blocks/{n}", 2) for n in ("q", "k", "v", "attn_out", "mlp_out")),
    }


def test_text_encoders_are_adapted_too(tmp_path):
    kohya = {
        "lora_te1_text_model_encoder_layers_1_mlp_fc1": (96, 64),
        "lora_te3_encoder_block_2_layer_0_SelfAttention_q": (48, 32),
    }
    tensors = factors(kohya)
    tensors = {
        n.replace("lora_A", "lora_down").replace("lora_B", "lora_up"): x for n, x in tensors.items()
    }
    adapter = read(written(tmp_path, tensors))
    assert adapter.networks["clip"].low_rank.keys() == {("blocks/fc1", 1)}
    assert adapter.networks["t5"].low_rank.keys() == {("blocks/q", 2)}
    change = change_of(adapter, "clip", CLIP)["blocks/fc1/kernel"][1]
    a, b = (x for n, x in tensors.items() if "te1" in n)
    np.testing.assert_allclose(change, (b @ a).T, rtol=0, atol=1e-6)
    back, _ = lora_tensors(adapter, "kohya", CONFIGS)
    for name, x in tensors.items():
        np.testing.assert_array_equal(back[name], x)
    with pytest.raises(WeightMismatchError, match=r"layout peft cannot hold .* T5 text encoder"):
        lora_tensors(adapter, "peft", CONFIGS)


def factor_of(path) -> dict:
    return {place: c.factor for place, c in read(path).networks["mmdit"].low_rank.items()}


def test_alpha_comes_from_a_tensor_a_header_or_a_config_beside(tmp_path):
    layers = {
        "transformer_blocks.0.attn.to_k": (64, 64),
        "single_transformer_blocks.1.proj_mlp": (256, 64),
    }
    tensors = factors(layers, "transformer.{}.lora_{}.weight")
    k, mlp = ("double_blocks/img_attn/k", 0), ("single_blocks/mlp_in", 1)
    assert factor_of(written(tmp_path, tensors)) == {k: 1, mlp: 1}
    alpha = {"transformer.transformer_blocks.0.attn.to_k.alpha": np.array(3, np.float32)}
    assert factor_of(written(tmp_path, tensors | alpha)) == {k: 1.5, mlp: 1}

    options = {"r": 2, "lora_alpha": 8, "alpha_pattern": {"attn.to_k": 1}, "use_rslora": False}
    header = json.dumps({f"transformer.{name}": value for name, value in options.items()})
    assert factor_of(written(tmp_path, tensors, {"lora_adapter_metadata": header})) == {
        k: 0.5,
        mlp: 4,
    }
    header = json.dumps({"transformer.lora_alpha": 8, "transformer.use_rslora": True})
    stabilised = factor_of(written(tmp_path, tensors, {"lora_adapter_metadata": header}))
    assert stabilised[k] == pytest.approx(8 / 2**0.5)

    folder = tmp_path / "peft"
    folder.mkdir()
    bare = factors(layers, "base_model.model.{}.lora_{}.weight")
    written(folder, bare, name="adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(options | {"alpha_pattern": {}}))
    assert factor_of(folder) == {k: 4, mlp: 4}
    (folder / "adapter_config.json").write_text(json.dumps({"use_dora": True}))
    with pytest.raises(WeightMismatchError, match="says DoRA"):
        read(folder)


def test_ranks_differ_from_module_to_module(tmp_path):
    tensors = {}
    for rank, name in enumerate(("to_q", "to_k", "to_v"), start=1):
        stem = f"transformer.transformer_blocks.1.attn.{name}"
        tensors |= {
            f"{stem}.lora_A.weight": draw(rank, 64),
            f"{stem}.lora_B.weight": draw(64, rank),
        }
    adapter = read(written(tmp_path, tensors))
    assert [c.rank for c in adapter.networks["mmdit"].low_rank.values()] == [1, 2, 3]
    fused, _ = lora_tensors(adapter, "bfl", CONFIGS)
    assert fused["double_blocks.1.img_attn.qkv.lora_A.weight"].shape == (1 + 2 + 3, 64)
    b = fused["double_blocks.1.img_attn.qkv.lora_B.weight"]
    assert not b[:64, 1:].any() and not b[64:128, :1].any() and not b[128:, :3].any()
    back = read(written(tmp_path, fused, name="fused.safetensors"))
    assert [c.rank for c in back.networks["mmdit"].low_rank.values()] == [1, 2, 3]
    assert_same_change(adapter, back)


# What does not fit.


def test_everything_that_does_not_fit_is_listed(tmp_path):
    tensors = factors(QKV | {"double_blocks.0.img_mlp.0": (256, 64), "img_in": (64, 16)})
    tensors["double_blocks.9.img_mlp.0.lora_A.weight"] = draw(RANK, 64)
    tensors["double_blocks.0.img_mlp.1.lora_A.weight"] = draw(RANK, 64)
    tensors["some_position_embedding"] = draw(3)
    del tensors["double_blocks.1.img_attn.qkv.lora_B.weight"]
    tensors["img_in.lora_A.weight"] = draw(RANK, 32)
    with pytest.raises(WeightMismatchError) as error:
        read(written(tmp_path, tensors))
    assert str(error.value).splitlines()[1:] == [
        "  + double_blocks.0.img_mlp.1.lora_A.weight [2, 64]",
        "  - double_blocks.1.img_attn.qkv: no factor b (there is "
        "double_blocks.1.img_attn.qkv.lora_A.weight)",
        "  + double_blocks.9.img_mlp.0.lora_A.weight [2, 64]",
        "  shape img_in.lora_A.weight expected [2, 16], found [2, 32]",
        "  + some_position_embedding [3]",
    ]
    assert "5 differences" in str(error.value)


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("transformer.transformer_blocks.0.attn.to_q.lora_magnitude_vector", "DoRA"),
        ("lora_unet_double_blocks_0_img_attn_qkv.dora_scale", "DoRA"),
        ("lycoris_double_blocks_0_img_attn_qkv.lokr_w1", "LoKr"),
        ("lora_unet_double_blocks_0_img_attn_qkv.hada_w1_a", "LoHa"),
        ("lora_unet_double_blocks_0_img_attn_qkv.oft_blocks", "OFT"),
        ("diffusion_model.img_in.diff", "full differences of weights"),
        ("diffusion_model.img_in.reshape_weight", "widens the model's input"),
    ],
)
def test_other_kinds_of_adapters_are_refused_by_name(tmp_path, name, method):
    with pytest.raises(WeightMismatchError, match=f"not supported: .*{method}.*{name}"):
        read(written(tmp_path, factors(QKV) | {name: draw(4)}))


def test_the_same_layer_twice_is_refused(tmp_path):
    both = factors(QKV) | factors(
        {"transformer_blocks.1.attn.to_q": (64, 64)}, "transformer.{}.lora_{}.weight"
    )
    with pytest.raises(WeightMismatchError, match=r"twice .*to_q and double_blocks.1.img_attn.qkv"):
        read(written(tmp_path, both))
    both = factors(QKV) | factors(QKV, "diffusion_model.{}.lora_{}.weight")
    with pytest.raises(WeightMismatchError, match=r"twice diffusion_model.* and double_blocks.1"):
        read(written(tmp_path, both))


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({}, "holds no adapters"),
        (random_tensors("mmdit", MMDIT, "bfl"), "not a LoRA of a FLUX model"),
        ({"img_in.lora_A.weight": np.ones((2, 16), np.int32)}, "is int32, not floating-point"),
        ({"img_in.lora_A.weight": np.full((2, 16), np.nan, np.float32)}, "no factor b"),
    ],
)
def test_other_files_are_no_loras(tmp_path, tensors, message):
    with pytest.raises(WeightMismatchError, match=message):
        read(written(tmp_path, tensors))


def test_nan_and_damaged_headers_are_refused(tmp_path):
    tensors = factors(QKV)
    tensors["double_blocks.1.img_attn.qkv.lora_B.weight"][3, 1] = np.nan
    with pytest.raises(WeightMismatchError, match=r"NaN or infinity in double_blocks.1.*lora_B"):
        read(written(tmp_path, tensors))
    for header in (
        "{",
        "[1]",
        '{"transformer.lora_alpha": "8"}',
        '{"lora_alpha": 8, "alpha_pattern": {"(": 1}}',
    ):
        with pytest.raises(WeightMismatchError, match=r"damaged|lora_alpha '8'"):
            read(written(tmp_path, factors(QKV), {"lora_adapter_metadata": header}))


def test_a_bias_needs_one_in_the_model(tmp_path):
    tensors = factors(QKV) | {"double_blocks.1.img_attn.qkv.lora_B.bias": draw(192)}
    assert read(written(tmp_path, tensors)).networks["mmdit"].low_rank
    with pytest.raises(WeightMismatchError, match=r"lora_B.bias: the model has no bias there"):
        read(written(tmp_path, tensors), mmdit=dataclasses.replace(MMDIT, qkv_bias=False))
    with pytest.raises(WeightMismatchError, match=r"kohya cannot hold the bias of double_blocks.1"):
        lora_tensors(read(written(tmp_path, tensors)), "kohya", CONFIGS)


# The commands.


def test_a_lora_in_place_of_weights_is_recognised(tmp_path, capsys):
    path = written(tmp_path, factors(QKV))
    assert main(["inspect", str(path)]) == 1
    assert "looks like a LoRA" in capsys.readouterr().err


def test_the_command_translates_a_file(tmp_path, capsys):
    tiny = PRESETS["tiny"].mmdit
    source, out = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    write_lora(draw_adapter(tiny, ("kontext",), rank=2), source, "peft", {"mmdit": tiny})
    arguments = ["lora", str(source), "--layout", "kohya", "--out", str(out)]
    assert main([*arguments, "--base", "tiny"]) == 0
    line = capsys.readouterr().out
    assert line.startswith(f"{out}: kohya layout, ") and "rank 2" in line and str(source) in line
    a, b = (read_lora(path, {"mmdit": tiny}) for path in (source, out))
    assert a.networks["mmdit"].low_rank.keys() == b.networks["mmdit"].low_rank.keys()
    assert main([*arguments, "--base", "tiny"]) == 1
    assert "already exists" in capsys.readouterr().err
    out.unlink()
    assert main(arguments) == 1  # the published size
    assert "expected [2, 3072]" in capsys.readouterr().err
    assert main([*arguments, "--step", "3"]) == 1
    assert "is none" in capsys.readouterr().err
    assert not out.exists()
