"""What LoRA files call their tensors, beyond the layers' published names: facts, as data.

A tensor's name is PREFIX + LAYER + SUFFIX. The layer is what the networks' own tables call it, in
any of their namings, either dotted or (kohya's scripts) with every dot written as an underscore;
the suffix says which part of the adapter it is.

    transformer.transformer_blocks.0.attn.to_q.lora_A.weight       PEFT, diffusers, ai-toolkit
    lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight        kohya (sd-scripts)
    double_blocks.0.img_attn.qkv.lora_A.weight                     BFL's control LoRAs
    base_model.model.double_blocks.0.img_attn.qkv.lora_A.weight    fal's Kontext trainer
    diffusion_model.double_blocks.0.img_attn.qkv.lora_A.weight     ComfyUI
    double_blocks.0.processor.qkv_lora1.down.weight                XLabs

Where a file has several such prefixes the longest one that fits is taken.
"""

DOTTED_PREFIXES = {
    "mmdit": (
        "",
        "transformer.",
        "diffusion_model.",
        "model.diffusion_model.",
        "base_model.model.",
        "base_model.model.transformer.",
    ),
    "clip": (
        "text_encoder.",
        "text_encoder.text_model.",
        "text_encoders.clip_l.transformer.",
        "text_encoders.clip_l.transformer.text_model.",
    ),
    "t5": ("text_encoder_2.", "text_encoders.t5xxl.transformer."),
}
FLAT_PREFIXES = {
    "mmdit": ("lora_unet_", "lora_transformer_"),
    "clip": ("lora_te_text_model_", "lora_te1_text_model_"),
    "t5": ("lora_te3_",),
}

# What diffusers puts in front of the keys of PEFT's config, in the header of its files.
PEFT_CONFIG_PREFIX = {"mmdit": "transformer.", "clip": "text_encoder.", "t5": "text_encoder_2."}

# Suffix → part. "a" is [rank, in], "b" is [out, rank], the change alpha / rank · b·a.
SUFFIXES = {
    ".lora_A.weight": "a",
    ".lora_B.weight": "b",
    ".lora_A.default.weight": "a",
    ".lora_B.default.weight": "b",
    ".lora_down.weight": "a",
    ".lora_up.weight": "b",
    ".lora.down.weight": "a",
    ".lora.up.weight": "b",
    ".lora_linear_layer.down.weight": "a",
    ".lora_linear_layer.up.weight": "b",
    ".down.weight": "a",
    ".up.weight": "b",
    ".alpha": "alpha",
    ".lora_B.bias": "bias",
    ".lora_B.default.bias": "bias",
    ".diff_b": "bias",
}
# ComfyUI writes this behind the name of a parameter that takes the place of the model's.
SET_SUFFIX = ".set_weight"

# Endings or parts of names of adapters that are no plain LoRA → what they are.
REFUSED = {
    ".dora_scale": "DoRA",
    ".lora_magnitude_vector": "DoRA",
    ".lokr_": "LoKr",
    ".hada_": "LoHa",
    ".oft_": "OFT",
    ".boft_": "BOFT",
    ".a1.weight": "GLoRA",
    ".lora_mid.": "LoCon of convolutions",
    ".vera_lambda": "VeRA",
    ".ia3_": "IA³",
    ".on_input": "IA³",
    ".diff": "full differences of weights",
    ".reshape_weight": "a control LoRA that widens the model's input",
}
REFUSED_AT_END = frozenset({".diff"})

# XLabs' names of the transformer's layers → BFL's. The one of single blocks has only the rows of q,
# k and v of `linear1`.
XLABS = {
    "double_blocks.{}.processor.qkv_lora1": "double_blocks.{}.img_attn.qkv",
    "double_blocks.{}.processor.qkv_lora2": "double_blocks.{}.txt_attn.qkv",
    "double_blocks.{}.processor.proj_lora1": "double_blocks.{}.img_attn.proj",
    "double_blocks.{}.processor.proj_lora2": "double_blocks.{}.txt_attn.proj",
    "single_blocks.{}.processor.qkv_lora": "single_blocks.{}.linear1",
    "single_blocks.{}.processor.proj_lora": "single_blocks.{}.linear2",
}
XLABS_SECTIONS = {"single_blocks.{}.processor.qkv_lora": 3}

# How each layout is written: naming of the networks' tables, and names of the parts.
WRITTEN = {
    "peft": {"a": ".lora_A.weight", "b": ".lora_B.weight", "bias": ".lora_B.bias"},
    "bfl": {"a": ".lora_A.weight", "b": ".lora_B.weight", "bias": ".lora_B.bias"},
    "kohya": {"a": ".lora_down.weight", "b": ".lora_up.weight", "alpha": ".alpha"},
}
WRITTEN_NAMING = {"peft": "diffusers", "bfl": "bfl", "kohya": "bfl"}
WRITTEN_PREFIX = {
    "peft": {"mmdit": "transformer.", "clip": "text_encoder.text_model."},
    "bfl": {"mmdit": ""},
    "kohya": {"mmdit": "lora_unet_", "clip": "lora_te1_text_model_", "t5": "lora_te3_"},
}
