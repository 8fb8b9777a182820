"""The CLIP text encoder, in the names of transformers' `CLIPTextModel` behind `text_model.`.

Published files have that prefix, files saved by transformers ≥ 5 do not; we read both and write it.
"""

from convert_weights.rules import Row, dense
from kontext_jax.models.presets import CLIPConfig

NAMINGS = ("transformers",)
PREFIXES = (
    "text_encoders.clip_l.transformer.text_model.",
    "text_encoders.clip_l.transformer.",
    "text_encoders.clip_l.",
    "text_model.",
)
WRITTEN_PREFIX = "text_model."
TIED: dict[str, str] = {}
# The projection belongs to CLIP's contrastive head; FLUX uses the pooled state before it.
BUFFERS = frozenset({"embeddings.position_ids", "logit_scale", "text_projection.weight"})
OTHER_NETWORKS = ("vision_model.", "visual_projection.")


def axis_sizes(config: CLIPConfig) -> dict[str, int]:
    """Length of every axis that a row names."""
    return {
        "V": config.vocab_size,
        "T": config.max_position_embeddings,
        "D": config.hidden_size,
        "D'": config.hidden_size,
        "F": config.intermediate_size,
        "H": config.num_attention_heads,
        "Dh": config.hidden_size // config.num_attention_heads,
        "layers": config.num_hidden_layers,
    }


def _norm(path: str, name: str, layers: str | None = None) -> list[Row]:
    return [
        Row(f"{path}/{ours}", ("D",), ("D",), {"transformers": f"{name}.{theirs}"}, layers)
        for ours, theirs in (("scale", "weight"), ("bias", "bias"))
    ]


def rows(config: CLIPConfig) -> list[Row]:
    """The text encoder's table."""
    del config
    layer = "encoder.layers.{}."
    attention = f"{layer}self_attn."

    def linear(path: str, in_axes, out_axes, name: str) -> list[Row]:
        return dense(f"blocks/{path}", in_axes, out_axes, {"transformers": name}, "layers")

    return [
        *(
            Row(
                f"{name}_embedding/embedding",
                (rows_axis, "D"),
                (rows_axis, "D"),
                {"transformers": f"embeddings.{name}_embedding.weight"},
            )
            for name, rows_axis in (("token", "V"), ("position", "T"))
        ),
        *_norm("blocks/layer_norm1", f"{layer}layer_norm1", "layers"),
        *linear("q_proj", "D", ("H", "Dh"), f"{attention}q_proj"),
        *linear("k_proj", "D", ("H", "Dh"), f"{attention}k_proj"),
        *linear("v_proj", "D", ("H", "Dh"), f"{attention}v_proj"),
        *linear("out_proj", ("H", "Dh"), "D", f"{attention}out_proj"),
        *_norm("blocks/layer_norm2", f"{layer}layer_norm2", "layers"),
        *linear("fc1", "D", "F", f"{layer}mlp.fc1"),
        *linear("fc2", "F", "D", f"{layer}mlp.fc2"),
        *_norm("final_layer_norm", "final_layer_norm"),
    ]
