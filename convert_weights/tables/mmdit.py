"""The transformer: BFL's names (`flux/model.py`) and diffusers' (`FluxTransformer2DModel`).

BFL fuses q, k, v (and in single blocks the MLP's input) into one tensor, and the attention's and
the MLP's output projections into one. Its final layer's modulation is (shift, scale); diffusers
stores (scale, shift). Both interleave the channels of a rotary pair; ours are half-split.
"""

from typing import Any

from convert_weights.rules import Flip, Part, Row, dense
from kontext_jax.models.presets import MMDiTConfig

NAMINGS = ("bfl", "diffusers")
PREFIXES = ("model.diffusion_model.",)
TIED: dict[str, str] = {}
BUFFERS: frozenset[str] = frozenset()
OTHER_NETWORKS: tuple[str, ...] = ()

TIME_CHANNELS = 256  # width of the sinusoidal embedding of t and guidance

_PAIRED = ("H", "P", "R")  # heads, rotary pairs, members of a pair: theirs, interleaved
_HALF_SPLIT = ("H", ("R", "P"))  # ours


def axis_sizes(config: MMDiTConfig) -> dict[str, int]:
    """Length of every axis that a row names; a primed axis is the same width on the other side."""
    return {
        "C": config.in_channels,
        "C_out": config.out_channels,
        "D": config.hidden_size,
        "D'": config.hidden_size,
        "M": config.mlp_dim,
        "H": config.num_heads,
        "Dh": config.head_dim,
        "P": config.head_dim // 2,
        "R": 2,
        "vec": config.vec_in_dim,
        "txt": config.context_in_dim,
        "time": TIME_CHANNELS,
        "two": 2,
        "three": 3,
        "six": 6,
        "double": config.depth,
        "single": config.depth_single_blocks,
    }


def _embedder(path: str, channels: str, diffusers: str) -> list[Row]:
    diffusers = f"time_text_embed.{diffusers}"
    return [
        *dense(
            f"{path}/in_layer",
            channels,
            "D",
            {"bfl": f"{path}.in_layer", "diffusers": f"{diffusers}.linear_1"},
        ),
        *dense(
            f"{path}/out_layer",
            "D",
            "D'",
            {"bfl": f"{path}.out_layer", "diffusers": f"{diffusers}.linear_2"},
        ),
    ]


def _qkv(path: str, fused: str, sections: tuple, split: dict, layers: str, bias: bool) -> list[Row]:
    rows = []
    for index, name in enumerate("qkv"):
        names = {"bfl": Part(fused, sections, index), "diffusers": split[name]}
        if name == "v":
            rows += dense(f"{path}/v", "D", ("H", "Dh"), names, layers, bias)
        else:
            rows += dense(f"{path}/{name}", "D", _PAIRED, names, layers, bias, _HALF_SPLIT)
    return rows


def _qk_norms(path: str, bfl: str, diffusers: dict, layers: str) -> list[Row]:
    return [
        Row(
            f"{path}/{name}_norm/scale",
            (("R", "P"),),
            (("P", "R"),),
            {"bfl": f"{bfl}.{name}_norm.scale", "diffusers": f"{diffusers[name]}.weight"},
            layers,
        )
        for name in ("query", "key")
    ]


_DIFFUSERS_STREAM: dict[str, dict[str, Any]] = {
    "img": {
        "mod": "norm1",
        "qkv": {n: f"attn.to_{n}" for n in "qkv"},
        "norms": {"query": "attn.norm_q", "key": "attn.norm_k"},
        "proj": "attn.to_out.0",
        "mlp": "ff",
    },
    "txt": {
        "mod": "norm1_context",
        "qkv": {n: f"attn.add_{n}_proj" for n in "qkv"},
        "norms": {"query": "attn.norm_added_q", "key": "attn.norm_added_k"},
        "proj": "attn.to_add_out",
        "mlp": "ff_context",
    },
}


def _double_block_stream(stream: str, qkv_bias: bool) -> list[Row]:
    names, n = _DIFFUSERS_STREAM[stream], "double"
    bfl, diffusers = f"double_blocks.{{}}.{stream}", "transformer_blocks.{}."
    attn, mlp = f"double_blocks/{stream}_attn", f"double_blocks/{stream}_mlp"
    return [
        *dense(
            f"double_mod/{stream}",
            "D",
            ("six", "D'"),
            {"bfl": f"{bfl}_mod.lin", "diffusers": f"{diffusers}{names['mod']}.linear"},
            n,
        ),
        *_qkv(
            attn,
            f"{bfl}_attn.qkv",
            ("D", "D", "D"),
            {k: diffusers + v for k, v in names["qkv"].items()},
            n,
            qkv_bias,
        ),
        *_qk_norms(
            attn, f"{bfl}_attn.norm", {k: diffusers + v for k, v in names["norms"].items()}, n
        ),
        *dense(
            f"{attn}/proj",
            ("H", "Dh"),
            "D",
            {"bfl": f"{bfl}_attn.proj", "diffusers": diffusers + names["proj"]},
            n,
        ),
        *dense(
            f"{mlp}/in_layer",
            "D",
            "M",
            {"bfl": f"{bfl}_mlp.0", "diffusers": f"{diffusers}{names['mlp']}.net.0.proj"},
            n,
        ),
        *dense(
            f"{mlp}/out_layer",
            "M",
            "D",
            {"bfl": f"{bfl}_mlp.2", "diffusers": f"{diffusers}{names['mlp']}.net.2"},
            n,
        ),
    ]


def _single_blocks() -> list[Row]:
    n, bfl, diffusers = "single", "single_blocks.{}.", "single_transformer_blocks.{}."
    inputs, outputs = ("D", "D", "D", "M"), ("D", "M")  # linear1's rows, linear2's columns

    def output(index: int) -> dict[str, Part]:
        return {
            "bfl": Part(f"{bfl}linear2", outputs, index, axis=1),
            "diffusers": Part(f"{diffusers}proj_out", outputs, index, axis=1),
        }

    return [
        *dense(
            "single_mod",
            "D",
            ("three", "D'"),
            {"bfl": f"{bfl}modulation.lin", "diffusers": f"{diffusers}norm.linear"},
            n,
        ),
        *_qkv(
            "single_blocks",
            f"{bfl}linear1",
            inputs,
            {name: f"{diffusers}attn.to_{name}" for name in "qkv"},
            n,
            bias=True,
        ),
        *_qk_norms(
            "single_blocks",
            f"{bfl}norm",
            {"query": f"{diffusers}attn.norm_q", "key": f"{diffusers}attn.norm_k"},
            n,
        ),
        *dense(
            "single_blocks/mlp_in",
            "D",
            "M",
            {"bfl": Part(f"{bfl}linear1", inputs, 3), "diffusers": f"{diffusers}proj_mlp"},
            n,
        ),
        *dense("single_blocks/attn_out", ("H", "Dh"), "D", output(0), n, bias=False),
        *dense("single_blocks/mlp_out", "M", "D", output(1), n, bias=False),
        Row(
            "single_blocks/mlp_out/bias",  # of the sum of both projections
            ("D",),
            ("D",),
            {"bfl": f"{bfl}linear2.bias", "diffusers": f"{diffusers}proj_out.bias"},
            n,
        ),
    ]


def rows(config: MMDiTConfig) -> list[Row]:
    """The transformer's table; without guidance embedding or qkv biases their rows are absent."""
    final_mod = dense(
        "final_mod",
        "D",
        ("two", "D'"),
        {
            "bfl": "final_layer.adaLN_modulation.1",
            "diffusers": Flip("norm_out.linear", "two"),
        },
    )
    return [
        *dense("img_in", "C", "D", {"bfl": "img_in", "diffusers": "x_embedder"}),
        *dense("txt_in", "txt", "D", {"bfl": "txt_in", "diffusers": "context_embedder"}),
        *_embedder("time_in", "time", "timestep_embedder"),
        *(_embedder("guidance_in", "time", "guidance_embedder") if config.guidance_embed else ()),
        *_embedder("vector_in", "vec", "text_embedder"),
        *_double_block_stream("img", config.qkv_bias),
        *_double_block_stream("txt", config.qkv_bias),
        *_single_blocks(),
        *final_mod,
        *dense("final_layer", "D", "C_out", {"bfl": "final_layer.linear", "diffusers": "proj_out"}),
    ]
