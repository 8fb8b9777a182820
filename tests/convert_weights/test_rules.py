"""The tables: complete, invertible, agreeing with the models, and equal to the facts by hand."""

import dataclasses

import numpy as np
import pytest

from convert_weights.rules import Flip, Part, Row, make_plan, tiled_copy
from convert_weights.tables import TABLES
from kontext_jax.models.presets import PRESETS
from kontext_jax.trees import flatten
from kontext_jax.weights import bundle as checkpoint
from tests.convert_helpers import CONFIGS, MMDIT, VAE, random_tensors


def plan_of(kind, config, naming=None):
    table = TABLES[kind]
    return make_plan(table.rows(config), table.axis_sizes(config), naming or table.NAMINGS[0])


def to_ours(kind, config, naming, tensors):
    plan = plan_of(kind, config, naming)
    leaves = {path: np.empty(shape, np.float32) for path, shape in plan.leaves.items()}
    for move in plan.moves:
        out = leaves[move.path] if move.layer is None else leaves[move.path][move.layer]
        move.to_ours(tensors[move.source], out)
    return leaves


@pytest.mark.parametrize("kind", TABLES)
@pytest.mark.parametrize("preset", ["tiny", "kontext-dev", "flux-schnell"])
def test_every_parameter_of_the_models_has_its_row_with_its_shape(kind, preset):
    config = getattr(PRESETS[preset], kind)
    model = {p: x.shape for p, x in flatten(checkpoint.parameter_shapes(kind, config))}
    assert plan_of(kind, config).leaves == model


@pytest.mark.parametrize(
    ("kind", "millions"), [("mmdit", 11901.4), ("vae", 83.8), ("t5", 4762.3), ("clip", 123.1)]
)
def test_published_parameter_counts(kind, millions):
    for naming in TABLES[kind].NAMINGS:
        plan = plan_of(kind, getattr(PRESETS["kontext-dev"], kind), naming)
        count = sum(int(np.prod(shape)) for shape in plan.sources.values())
        assert count == sum(int(np.prod(shape)) for shape in plan.leaves.values())
        assert round(count / 1e6, 1) == millions


VARIANTS = [
    *((kind, config) for kind, config in CONFIGS.items()),
    ("mmdit", dataclasses.replace(MMDIT, depth=1, depth_single_blocks=1, guidance_embed=False)),
    ("mmdit", dataclasses.replace(MMDIT, num_heads=4, axes_dim=(4, 6, 6), mlp_ratio=3.0)),
    ("mmdit", dataclasses.replace(MMDIT, qkv_bias=False, out_channels=8)),
    ("vae", dataclasses.replace(VAE, ch_mult=(1, 1, 2, 4), num_res_blocks=2)),
]


@pytest.mark.parametrize(("kind", "config"), VARIANTS)
def test_there_and_back_is_the_identity_in_every_naming(kind, config):
    for naming in TABLES[kind].NAMINGS:
        tensors = random_tensors(kind, config, naming)
        leaves = to_ours(kind, config, naming, tensors)
        back = {name: np.full(tensor.shape, np.nan, np.float32) for name, tensor in tensors.items()}
        for move in plan_of(kind, config, naming).moves:
            ours = leaves[move.path] if move.layer is None else leaves[move.path][move.layer]
            move.to_theirs(ours, back[move.source])
        for name, tensor in tensors.items():
            assert back[name].tobytes() == tensor.tobytes(), name


def half_split(x, heads):
    """Rows of interleaved rotary pairs, head by head → evens first, odds second."""
    x = x.reshape(heads, -1, *x.shape[1:])
    return np.concatenate([x[:, 0::2], x[:, 1::2]], 1)


def test_bfl_transformer_by_hand():
    w = random_tensors("mmdit", MMDIT, "bfl")
    ours = to_ours("mmdit", MMDIT, "bfl", w)
    width, heads = MMDIT.hidden_size, MMDIT.num_heads
    for stream in ("img", "txt"):
        block, path = f"double_blocks.1.{stream}_", f"double_blocks/{stream}_"
        q, k, v = np.split(w[block + "attn.qkv.weight"], 3)
        for name, part in (("q", half_split(q, heads)), ("k", half_split(k, heads))):
            assert (ours[f"{path}attn/{name}/kernel"][1] == part.transpose(2, 0, 1)).all()
        assert (ours[f"{path}attn/v/kernel"][1] == v.T.reshape(width, heads, -1)).all()
        k_bias = half_split(np.split(w[block + "attn.qkv.bias"], 3)[1], heads)
        assert (ours[f"{path}attn/k/bias"][1] == k_bias).all()
        scale = w[block + "attn.norm.query_norm.scale"]
        assert (ours[f"{path}attn/query_norm/scale"][1] == half_split(scale, 1)[0]).all()
        proj = w[block + "attn.proj.weight"].T.reshape(heads, -1, width)
        assert (ours[f"{path}attn/proj/kernel"][1] == proj).all()
        assert (ours[f"{path}mlp/in_layer/kernel"][1] == w[block + "mlp.0.weight"].T).all()
        assert (ours[f"{path}mlp/out_layer/bias"][1] == w[block + "mlp.2.bias"]).all()
        mod = w[block + "mod.lin.weight"].reshape(6, width, width)
        assert (ours[f"double_mod/{stream}/kernel"][1] == mod.transpose(2, 0, 1)).all()
    q, k, v, mlp = np.split(w["single_blocks.2.linear1.weight"], np.arange(1, 4) * width)
    assert (ours["single_blocks/k/kernel"][2] == half_split(k, heads).transpose(2, 0, 1)).all()
    assert (ours["single_blocks/v/kernel"][2] == v.T.reshape(width, heads, -1)).all()
    assert (ours["single_blocks/mlp_in/kernel"][2] == mlp.T).all()
    linear2 = w["single_blocks.2.linear2.weight"].T
    assert (
        ours["single_blocks/attn_out/kernel"][2] == linear2[:width].reshape(heads, -1, width)
    ).all()
    assert (ours["single_blocks/mlp_out/kernel"][2] == linear2[width:]).all()
    assert (ours["single_blocks/mlp_out/bias"][2] == w["single_blocks.2.linear2.bias"]).all()
    final = w["final_layer.adaLN_modulation.1.weight"].reshape(2, width, width)
    assert (ours["final_mod/kernel"] == final.transpose(2, 0, 1)).all()


def test_diffusers_stores_the_final_scale_before_the_shift():
    w = random_tensors("mmdit", MMDIT, "diffusers")
    ours = to_ours("mmdit", MMDIT, "diffusers", w)
    scale, shift = np.split(w["norm_out.linear.bias"], 2)
    assert (ours["final_mod/bias"] == np.stack([shift, scale])).all()
    q = half_split(w["transformer_blocks.0.attn.add_q_proj.weight"], MMDIT.num_heads)
    assert (ours["double_blocks/txt_attn/q/kernel"][0] == q.transpose(2, 0, 1)).all()
    time = w["time_text_embed.guidance_embedder.linear_2.weight"]
    assert (ours["guidance_in/out_layer/kernel"] == time.T).all()


def test_autoencoder_by_hand_in_both_namings():
    w = random_tensors("vae", VAE, "bfl")
    ours = to_ours("vae", VAE, "bfl", w)
    conv = w["decoder.up.2.block.1.conv2.weight"]
    assert (ours["decoder/up_2/block_1/conv2/kernel"] == conv.transpose(2, 3, 1, 0)).all()
    assert (
        ours["encoder/mid/attn_1/q/kernel"] == w["encoder.mid.attn_1.q.weight"][..., 0, 0].T
    ).all()
    d = random_tensors("vae", VAE, "diffusers")
    theirs = to_ours("vae", VAE, "diffusers", d)
    conv = d["decoder.up_blocks.0.resnets.1.conv2.weight"]  # the coarsest level runs first
    assert (theirs["decoder/up_2/block_1/conv2/kernel"] == conv.transpose(2, 3, 1, 0)).all()
    old = to_ours("vae", VAE, "diffusers-old", random_tensors("vae", VAE, "diffusers-old"))
    assert old.keys() == theirs.keys()


def test_text_encoders_by_hand():
    t5, clip = CONFIGS["t5"], CONFIGS["clip"]
    w = random_tensors("t5", t5, "transformers")
    ours = to_ours("t5", t5, "transformers", w)
    q = w["encoder.block.2.layer.0.SelfAttention.q.weight"]
    assert (ours["blocks/q/kernel"][2] == q.T.reshape(t5.d_model, t5.num_heads, t5.d_kv)).all()
    o = w["encoder.block.1.layer.0.SelfAttention.o.weight"]
    assert (ours["blocks/o/kernel"][1] == o.T.reshape(t5.num_heads, t5.d_kv, t5.d_model)).all()
    assert (ours["shared/embedding"] == w["shared.weight"]).all()
    w = random_tensors("clip", clip, "transformers")
    ours = to_ours("clip", clip, "transformers", w)
    assert (ours["blocks/fc1/kernel"][1] == w["encoder.layers.1.mlp.fc1.weight"].T).all()
    assert (ours["blocks/layer_norm2/scale"][0] == w["encoder.layers.0.layer_norm2.weight"]).all()


def test_rows_that_overlap_leave_holes_or_disagree_are_refused():
    a = Row("a", ("D",), ("D",), {"x": Part("w", ("D", "E"), 0)})
    b = Row("b", ("E",), ("E",), {"x": Part("w", ("D", "E"), 1)})
    sizes = {"D": 2, "E": 3, "two": 2}
    assert make_plan([a, b], sizes, "x").sources == {"w": (5,)}
    for rows in ([a], [a, b, dataclasses.replace(b, path="c")]):
        with pytest.raises(ValueError, match="overlap or leave a hole"):
            make_plan(rows, sizes, "x")
    with pytest.raises(ValueError, match="has two rows"):
        make_plan([a, a], sizes, "x")
    with pytest.raises(ValueError, match="not a reordering"):
        make_plan([Row("a", ("D",), ("E",), {"x": "w"})], sizes, "x")
    with pytest.raises(ValueError, match="in another row"):
        make_plan([a, b, Row("c", ("E",), ("E",), {"x": "w"})], sizes, "x")
    flip = Row("a", ("two", "D"), (("two", "D"),), {"x": Flip("w", "two")})
    (move,) = make_plan([flip], sizes, "x").moves
    assert move.to_ours(np.arange(4)).tolist() == [[2, 3], [0, 1]]


@pytest.mark.parametrize(
    ("shape", "permutation"),
    [
        ((700, 300), (1, 0)),
        ((6, 70, 2, 310), (3, 0, 2, 1)),
        ((6, 70, 310), (2, 0, 1)),
        ((300, 500), (0, 1)),
        ((5, 1, 70000), (2, 1, 0)),
        ((400, 300, 3, 3), (2, 3, 1, 0)),
    ],
)
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_tiled_copies_are_copies(shape, permutation, dtype):
    source = np.arange(np.prod(shape)).astype(dtype).reshape(shape).transpose(permutation)
    out = np.zeros(source.shape, dtype)
    tiled_copy(out, source)
    assert (out == source).all()
    back = np.zeros(shape, dtype)
    tiled_copy(back.transpose(permutation), out)
    assert (back.transpose(permutation) == source).all()
