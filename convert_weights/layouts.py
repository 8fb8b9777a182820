"""What kind of weights a set of tensors is: component, naming, and the sizes of the network.

Names tell the component and whose naming it is; shapes tell nearly all sizes. What shapes cannot
tell comes from a `config.json` beside the file, from our own note in a file's metadata, or is the
published value; where there is none, the error says which flag or file supplies it.
"""

import dataclasses
import json
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from convert_weights.rules import WeightMismatchError
from convert_weights.tables import TABLES
from kontext_jax.models.presets import (
    PRESETS,
    CLIPConfig,
    Config,
    MMDiTConfig,
    Preset,
    T5Config,
    VAEConfig,
    config_from_json,
)

TITLES = {
    "mmdit": "FLUX transformer",
    "vae": "autoencoder",
    "t5": "T5 text encoder",
    "clip": "CLIP text encoder",
}
MAX_LAYERS, MAX_WIDTH = 1024, 2**24
LAYER_FIELDS = ("depth", "depth_single_blocks", "num_layers", "num_hidden_layers", "num_res_blocks")
MAY_BE_ZERO = ("eos_token_id",)
CONFIG_KEY = "kontext_jax_config"  # in the metadata of files we write
QUANTISED_SUFFIXES = (
    ".scale_weight",
    ".weight_scale",
    ".scale_input",
    ".input_scale",
    ".comfy_quant",
)

Shapes = Mapping[str, tuple[int, ...]]

# Names that every file of that kind and naming has, and no other kind.
_SIGNATURES = {
    ("mmdit", "bfl"): ("img_in.weight", "final_layer.linear.weight"),
    ("mmdit", "diffusers"): ("x_embedder.weight", "context_embedder.weight"),
    ("vae", "bfl"): ("decoder.conv_in.weight", "decoder.mid.attn_1.q.weight"),
    ("vae", "diffusers"): (
        "decoder.conv_in.weight",
        "decoder.mid_block.attentions.0.to_q.weight",
    ),
    ("vae", "diffusers-old"): (
        "decoder.conv_in.weight",
        "decoder.mid_block.attentions.0.query.weight",
    ),
    ("t5", "transformers"): (
        "encoder.final_layer_norm.weight",
        "encoder.block.0.layer.0.SelfAttention.q.weight",
    ),
    ("clip", "transformers"): (
        "embeddings.token_embedding.weight",
        "encoder.layers.0.self_attn.q_proj.weight",
    ),
}


@dataclasses.dataclass(frozen=True)
class Group:
    """The tensors of one component within a file: canonical names → names in the file."""

    kind: str
    naming: str
    names: dict[str, str]


def split_components(names: list[str], where: str) -> dict[str, Group]:
    """Divides a file's tensors among the components they belong to.

    Raises:
      WeightMismatchError: a set of names is none of the known components.
    """
    prefixes = sorted(
        ((prefix, kind) for kind, table in TABLES.items() for prefix in table.PREFIXES),
        key=lambda item: -len(item[0]),
    )
    bare: dict[str, dict[str, str]] = {}
    rest: dict[str, str] = {}
    for name in names:
        for prefix, kind in prefixes:
            if name.startswith(prefix):
                bare.setdefault(kind, {})[name[len(prefix) :]] = name
                break
        else:
            rest[name] = name
    own = next((kind for (kind, _), keys in _SIGNATURES.items() if set(keys) <= rest.keys()), None)
    if own is None and len(bare) == 1:
        own = next(iter(bare))
    if own is not None:
        bare[own] = {**rest, **bare.get(own, {})}
        rest = {}
    groups = {
        kind: Group(kind, naming, group)
        for kind, group in bare.items()
        if (naming := _naming(kind, group)) is not None
    }
    unknown = sorted([*rest, *(n for k, g in bare.items() if k not in groups for n in g.values())])
    if unknown:
        shown = "\n".join(f"  + {name}" for name in unknown[:20])
        more = f"\n  … and {len(unknown) - 20} more" if len(unknown) > 20 else ""
        if any("lora_" in name for name in unknown):
            more += (
                "\nThis looks like a LoRA, which changes other weights: give it with `sample.py "
                "--lora`, or translate it with `python -m convert_weights lora`"
            )
        raise WeightMismatchError(
            f"{where}: these tensors are not those of a {', '.join(TITLES.values())} "
            f"in a naming we know:\n{shown}{more}"
        )
    if not groups:
        raise WeightMismatchError(f"{where}: holds no tensors")
    return groups


def _naming(kind: str, names: Mapping[str, str]) -> str | None:
    for (signature_kind, naming), keys in _SIGNATURES.items():
        if signature_kind == kind and set(keys) <= names.keys():
            return naming
    return None


def infer_config(
    kind: str,
    naming: str,
    shapes: Shapes,
    foreign: Mapping[str, Any] | None,
    metadata: Mapping[str, str],
    where: str,
    axes_dim: tuple[int, ...] | None = None,
) -> Config:
    """The component's config from its shapes, its `config.json` and our note in its metadata.

    Args:
      kind: the component.
      naming: whose names the shapes carry.
      shapes: by canonical name.
      foreign: the parsed `config.json` of diffusers or transformers, or None.
      metadata: the file's own metadata.
      where: the file, for messages.
      axes_dim: rotary axes of a transformer whose head size is not the published one.
    """
    if CONFIG_KEY in metadata and foreign is None:
        try:
            noted = json.loads(metadata[CONFIG_KEY])[kind]
        except (ValueError, KeyError, TypeError, RecursionError):
            noted = None  # a note for another component, or none of ours
        if isinstance(noted, dict):
            return noted_config(kind, noted, where)

    def shape(name: str) -> tuple[int, ...]:
        if name not in shapes:
            raise WeightMismatchError(
                f"{where}: {name} is missing, without which the {TITLES[kind]}'s sizes are unknown"
            )
        return shapes[name]

    inferences: dict[str, Callable[..., Config]] = {
        "mmdit": _infer_mmdit,
        "vae": _infer_vae,
        "t5": _infer_t5,
        "clip": _infer_clip,
    }
    infer = inferences[kind]
    try:
        if kind == "mmdit":
            config = infer(naming, shapes, shape, foreign, where, axes_dim)
        else:
            config = infer(naming, shapes, shape, foreign, where)
        return checked_config(kind, config, where)
    except WeightMismatchError:
        raise
    except (KeyError, TypeError, ValueError, IndexError, ArithmeticError) as error:
        raise WeightMismatchError(
            f"{where}: its tensors or config.json do not describe a {TITLES[kind]}: {error!r}"
        ) from None


def noted_config(kind: str, values: Mapping[str, Any], where: str) -> Config:
    """The config whose fields are `values`, as JSON stores them.

    Raises:
      WeightMismatchError: they are not those of one.
    """
    try:
        config = config_from_json(kind, values)
    except (TypeError, ValueError, ArithmeticError, AttributeError) as error:
        raise WeightMismatchError(f"{where}: not a config of a {TITLES[kind]}: {error}") from None
    return checked_config(kind, config, where)


def checked_config(kind: str, config: Config, where: str) -> Config:
    """`config` itself, if its fields have the types and magnitudes that a network can have.

    Raises:
      WeightMismatchError: they do not; a plan of a billion layers is never begun.
    """
    wrong = []
    for field in dataclasses.fields(config):
        value, default = getattr(config, field.name), field.default
        items = value if isinstance(default, tuple) else (value,)
        kind_of = type(default[0]) if isinstance(default, tuple) else type(default)
        limit = MAX_LAYERS if field.name in LAYER_FIELDS else MAX_WIDTH
        if not isinstance(items, tuple) or len(items) > 16 or not items:
            wrong.append(f"{field.name} {value!r}")
        elif kind_of is int:
            least = 0 if field.name in MAY_BE_ZERO else 1
            if not all(type(item) is int and least <= item <= limit for item in items):
                wrong.append(f"{field.name} {value!r}")
        elif kind_of is float:
            if not all(type(item) in (int, float) and math.isfinite(item) for item in items):
                wrong.append(f"{field.name} {value!r}")
        elif not all(type(item) is kind_of for item in items):
            wrong.append(f"{field.name} {value!r}")
    if (
        not wrong
        and isinstance(config, CLIPConfig)
        and config.hidden_size % config.num_attention_heads
    ):
        wrong.append(f"{config.num_attention_heads} heads in a width of {config.hidden_size}")
    if wrong:
        raise WeightMismatchError(
            f"{where}: no {TITLES[kind]} has {', '.join(wrong)}; its config is damaged"
        )
    return config


def _count(shapes: Shapes, pattern: str) -> int:
    matches = (re.match(pattern, name) for name in shapes)
    return max((int(m.group(1)) + 1 for m in matches if m), default=0)


def _infer_mmdit(
    naming: str,
    shapes: Shapes,
    shape: Callable,
    foreign: Mapping[str, Any] | None,
    where: str,
    axes_dim: tuple[int, ...] | None,
) -> Config:
    bfl = naming == "bfl"
    img_in, txt_in, vector_in, out, scale, mlp, bias, guidance = (
        (
            "img_in.weight",
            "txt_in.weight",
            "vector_in.in_layer.weight",
            "final_layer.linear.weight",
            "single_blocks.0.norm.query_norm.scale",
            "double_blocks.0.img_mlp.0.weight",
            "double_blocks.0.img_attn.qkv.bias",
            "guidance_in.in_layer.weight",
        )
        if bfl
        else (
            "x_embedder.weight",
            "context_embedder.weight",
            "time_text_embed.text_embedder.linear_1.weight",
            "proj_out.weight",
            "single_transformer_blocks.0.attn.norm_q.weight",
            "transformer_blocks.0.ff.net.0.proj.weight",
            "transformer_blocks.0.attn.to_q.bias",
            "time_text_embed.guidance_embedder.linear_1.weight",
        )
    )
    width, channels = shape(img_in)
    (head_dim,) = shape(scale)
    if foreign is not None:
        if foreign.get("patch_size", 1) != 1:
            raise WeightMismatchError(
                f"{where}: patch_size {foreign['patch_size']} in config.json; only 1 is supported"
            )
        axes_dim = tuple(foreign.get("axes_dims_rope", (16, 56, 56)))
    if axes_dim is None and head_dim == 128:
        axes_dim = (16, 56, 56)
    if axes_dim is None:
        raise WeightMismatchError(
            f"{where}: heads of {head_dim} channels, where published models have 128, so the "
            "rotary axes cannot be told from the shapes; put diffusers' config.json beside the "
            "file or pass --axes-dim, for example --axes-dim 8,12,12"
        )
    values = {
        "in_channels": channels,
        "out_channels": shape(out)[0],
        "vec_in_dim": shape(vector_in)[1],
        "context_in_dim": shape(txt_in)[1],
        "hidden_size": width,
        "mlp_ratio": shape(mlp)[0] / width,
        "num_heads": width // head_dim,
        "depth": _count(shapes, r"(?:double|transformer)_blocks\.(\d+)\."),
        "depth_single_blocks": _count(shapes, r"single_(?:transformer_)?blocks\.(\d+)\."),
        "axes_dim": axes_dim,
        "qkv_bias": bias in shapes,
        "guidance_embed": guidance in shapes,
    }
    if foreign is not None:
        values["depth"] = foreign.get("num_layers", 19)
        values["depth_single_blocks"] = foreign.get("num_single_layers", 38)
        values["guidance_embed"] = foreign.get("guidance_embeds", False)
        values["num_heads"] = foreign.get("num_attention_heads", 24)
        values["context_in_dim"] = foreign.get("joint_attention_dim", 4096)
        values["vec_in_dim"] = foreign.get("pooled_projection_dim", 768)
        values["in_channels"] = foreign.get("in_channels", 64)
        values["out_channels"] = foreign.get("out_channels") or values["in_channels"]
        values["hidden_size"] = values["num_heads"] * foreign.get("attention_head_dim", 128)
    return noted_config("mmdit", values, where)


def _infer_vae(
    naming: str, shapes: Shapes, shape: Callable, foreign: Mapping[str, Any] | None, where: str
) -> VAEConfig:
    if foreign is not None:
        for key in ("use_quant_conv", "use_post_quant_conv"):
            if foreign.get(key, True):  # AutoencoderKL's default
                raise WeightMismatchError(
                    f"{where}: config.json has {key}; FLUX's autoencoder has no such convolution"
                )
        widths = foreign["block_out_channels"]
        return VAEConfig(
            in_channels=foreign.get("in_channels", 3),
            out_channels=foreign.get("out_channels", 3),
            ch=widths[0],
            ch_mult=_multiples(widths, where),
            num_res_blocks=foreign.get("layers_per_block", 1),
            z_channels=foreign.get("latent_channels", 4),
            norm_groups=foreign.get("norm_num_groups", 32),
            latent_scale=foreign.get("scaling_factor", 0.18215),
            latent_shift=foreign.get("shift_factor") or 0.0,
        )
    level = (
        r"encoder\.down\.{}\.block\." if naming == "bfl" else r"encoder\.down_blocks\.{}\.resnets\."
    )
    levels = _count(shapes, level.format(r"(\d+)"))
    blocks = _count(shapes, level.format("0") + r"(\d+)\.")
    first = (level + "0.conv1.weight").replace("\\", "")
    widths = [shape(first.format(i))[0] for i in range(levels)]
    return VAEConfig(
        in_channels=shape("encoder.conv_in.weight")[1],
        out_channels=shape("decoder.conv_out.weight")[0],
        ch=shape("encoder.conv_in.weight")[0],
        ch_mult=_multiples(widths, where),
        num_res_blocks=blocks,
        z_channels=shape("decoder.conv_in.weight")[1],
    )


def _multiples(widths: list[int], where: str) -> tuple[int, ...]:
    if not widths or any(width % widths[0] for width in widths):
        raise WeightMismatchError(
            f"{where}: level widths {widths} are not multiples of the first; BFL's autoencoder "
            "has no such levels"
        )
    return tuple(width // widths[0] for width in widths)


def _infer_t5(
    naming: str, shapes: Shapes, shape: Callable, foreign: Mapping[str, Any] | None, where: str
) -> T5Config:
    del naming
    if foreign is not None and foreign.get("feed_forward_proj", "relu") != "gated-gelu":
        raise WeightMismatchError(
            f"{where}: feed_forward_proj {foreign.get('feed_forward_proj')!r} in config.json; FLUX "
            "uses T5 v1.1, which is gated-gelu"
        )
    block = "encoder.block.0.layer."
    vocab_size, width = shape("shared.weight")
    buckets, heads = shape(f"{block}0.SelfAttention.relative_attention_bias.weight")
    values = {
        "vocab_size": vocab_size,
        "d_model": width,
        "d_kv": shape(f"{block}0.SelfAttention.q.weight")[0] // heads,
        "d_ff": shape(f"{block}1.DenseReluDense.wi_0.weight")[0],
        "num_layers": _count(shapes, r"encoder\.block\.(\d+)\."),
        "num_heads": heads,
        "relative_attention_num_buckets": buckets,
    }
    return T5Config(**values | _fields(T5Config, foreign))


def _infer_clip(
    naming: str, shapes: Shapes, shape: Callable, foreign: Mapping[str, Any] | None, where: str
) -> CLIPConfig:
    del naming
    vocab_size, width = shape("embeddings.token_embedding.weight")
    if foreign is None and width % 64:
        raise WeightMismatchError(
            f"{where}: a width of {width}, where CLIP has 64 channels a head, so the number of "
            "heads cannot be told from the shapes; put transformers' config.json beside the file"
        )
    values = {
        "vocab_size": vocab_size,
        "hidden_size": width,
        "intermediate_size": shape("encoder.layers.0.mlp.fc1.weight")[0],
        "num_hidden_layers": _count(shapes, r"encoder\.layers\.(\d+)\."),
        "num_attention_heads": width // 64,
        "max_position_embeddings": shape("embeddings.position_embedding.weight")[0],
    }
    if foreign is not None:
        values |= {"num_attention_heads": 8, "eos_token_id": 49407}  # CLIPTextConfig's defaults
    config = CLIPConfig(**values | _fields(CLIPConfig, foreign))
    if config.hidden_act not in ("quick_gelu", "gelu"):
        raise WeightMismatchError(
            f"{where}: hidden_act {config.hidden_act!r}; known are quick_gelu and gelu"
        )
    return config


def _fields(config_class: type, foreign: Mapping[str, Any] | None) -> dict[str, Any]:
    names = {field.name for field in dataclasses.fields(config_class)}
    return {k: v for k, v in (foreign or {}).items() if k in names and v is not None}


def read_json_object(path: Path) -> dict[str, Any]:
    """What a JSON file holds; raises `WeightMismatchError` unless it is an object."""
    try:
        value = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise WeightMismatchError(f"{path}: not readable as JSON: {error}") from None
    if not isinstance(value, dict):
        raise WeightMismatchError(f"{path}: not a JSON object")
    return value


def read_foreign_config(path: Path, kind: str) -> dict[str, Any] | None:
    """diffusers' or transformers' `config.json` at `path` if there is one and it is of `kind`."""
    if not path.is_file():
        return None
    config = read_json_object(path)
    names = {
        config.get("_class_name"),
        config.get("model_type"),
        *(config.get("architectures") or ()),
    }
    expected = {
        "mmdit": {"FluxTransformer2DModel"},
        "vae": {"AutoencoderKL"},
        "t5": {"t5", "T5EncoderModel", "T5ForConditionalGeneration"},
        "clip": {"clip_text_model", "clip", "CLIPTextModel", "CLIPModel"},
    }
    if not names & expected[kind]:
        if not names - {None}:
            return None  # some other tool's file
        found = next((k for k, v in expected.items() if names & v), None)
        what = TITLES[found] if found else sorted(names - {None})
        raise WeightMismatchError(
            f"{path} describes {what}, and the weights beside it are a {TITLES[kind]}"
        )
    if kind == "clip" and isinstance(config.get("text_config"), dict):
        return config["text_config"]
    return config


_TELLING_WORDS = (
    ("kontext", "kontext-dev"),
    ("krea", "krea-dev"),
    ("(?<![a-z])dev(?![a-z])", "flux-dev"),
)


def guess_preset(config: MMDiTConfig, hints: list[str], where: str) -> str:
    """The preset a transformer belongs to; its shapes tell schnell from the rest, names the rest.

    Args:
      config: the transformer's.
      hints: names of files and folders, titles and classes, most telling first.
      where: for the message.

    Raises:
      WeightMismatchError: no name tells which of the models with guidance it is.
    """
    if not config.guidance_embed:
        return "flux-schnell"
    for hint in hints:
        for word, preset in _TELLING_WORDS:
            if re.search(word, hint.lower()):
                return preset
    fitting = (p for p in PRESETS.values() if p.mmdit.guidance_embed and p.num_velocities == 1)
    choices = " | ".join(p.name for p in fitting)
    raise WeightMismatchError(
        f"{where}: kontext-dev, flux-dev and krea-dev have the same shapes, and no name here says "
        f"which one this is; pass --preset {choices}"
    )


def preset_for(name: str, configs: Mapping[str, Config], where: str) -> Preset:
    """The preset `name` with the components' own configs.

    Raises:
      WeightMismatchError: the name is unknown, or the transformer is of another kind than it.
    """
    if name not in PRESETS:
        raise WeightMismatchError(f"no preset {name!r}; there are {', '.join(PRESETS)}")
    preset = PRESETS[name]
    mmdit = configs.get("mmdit")
    if isinstance(mmdit, MMDiTConfig) and mmdit.guidance_embed != preset.mmdit.guidance_embed:
        has = "a" if mmdit.guidance_embed else "no"
        needs = "one" if preset.mmdit.guidance_embed else "none"
        others = [
            p.name for p in PRESETS.values() if p.mmdit.guidance_embed == mmdit.guidance_embed
        ]
        raise WeightMismatchError(
            f"{where}: wrong weights for {name}: they have {has} guidance embedding and {name} has "
            f"{needs}; these weights fit {', '.join(others)}"
        )
    own: dict[str, Any] = dict(configs)
    return dataclasses.replace(preset, **own)
