"""The T5 v1.1 encoder, in the names of transformers' `T5EncoderModel`."""

from convert_weights.rules import Row, dense
from kontext_jax.models.presets import T5Config

NAMINGS = ("transformers",)
PREFIXES = ("text_encoders.t5xxl.transformer.", "text_encoders.t5xxl.")
TIED = {"encoder.embed_tokens.weight": "shared.weight"}
BUFFERS = frozenset({"logit_scale", "spiece_model"})
OTHER_NETWORKS = ("decoder.", "lm_head.")


def axis_sizes(config: T5Config) -> dict[str, int]:
    """Length of every axis that a row names."""
    return {
        "V": config.vocab_size,
        "D": config.d_model,
        "F": config.d_ff,
        "H": config.num_heads,
        "Dkv": config.d_kv,
        "buckets": config.relative_attention_num_buckets,
        "layers": config.num_layers,
    }


def _same(path: str, axes: tuple[str, ...], name: str, layers: str | None = None) -> Row:
    return Row(path, axes, axes, {"transformers": name}, layers)


def _linear(path: str, in_axes, out_axes, name: str) -> list[Row]:
    names = {"transformers": f"encoder.block.{{}}.layer.{name}"}
    return dense(f"blocks/{path}", in_axes, out_axes, names, "layers", bias=False)


def rows(config: T5Config) -> list[Row]:
    """The encoder's table. Layer 0 alone stores the position bias that all layers share."""
    del config
    block = "encoder.block.{}.layer."
    bias = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    heads = ("H", "Dkv")
    return [
        _same("shared/embedding", ("V", "D"), "shared.weight"),
        _same("relative_attention_bias/embedding", ("buckets", "H"), bias),
        _same("blocks/attn_norm/scale", ("D",), f"{block}0.layer_norm.weight", "layers"),
        *_linear("q", "D", heads, "0.SelfAttention.q"),
        *_linear("k", "D", heads, "0.SelfAttention.k"),
        *_linear("v", "D", heads, "0.SelfAttention.v"),
        *_linear("o", heads, "D", "0.SelfAttention.o"),
        _same("blocks/mlp_norm/scale", ("D",), f"{block}1.layer_norm.weight", "layers"),
        *_linear("wi_0", "D", "F", "1.DenseReluDense.wi_0"),
        *_linear("wi_1", "D", "F", "1.DenseReluDense.wi_1"),
        *_linear("wo", "F", "D", "1.DenseReluDense.wo"),
        _same("final_norm/scale", ("D",), "encoder.final_layer_norm.weight"),
    ]
