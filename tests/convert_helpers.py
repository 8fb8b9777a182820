"""Small random weights in every published layout, for the converter's tests."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from convert_weights.io import ForeignComponent
from convert_weights.rules import make_plan
from convert_weights.tables import TABLES
from convert_weights.to_torch import FOLDERS, foreign_config
from kontext_jax.models.presets import CLIPConfig, MMDiTConfig, T5Config, VAEConfig
from kontext_jax.storage.safetensors_reader import DTYPES, TensorInfo
from kontext_jax.storage.safetensors_writer import SafetensorsWriter
from kontext_jax.weights import bundle as checkpoint

MMDIT = MMDiTConfig(
    in_channels=16,
    out_channels=16,
    vec_in_dim=24,
    context_in_dim=40,
    hidden_size=64,
    num_heads=2,
    depth=2,
    depth_single_blocks=3,
    axes_dim=(8, 12, 12),
)
VAE = VAEConfig(ch=8, ch_mult=(1, 2, 2), num_res_blocks=1, z_channels=4, norm_groups=4)
T5 = T5Config(vocab_size=40, d_model=32, d_kv=12, d_ff=48, num_layers=3, num_heads=4)
CLIP = CLIPConfig(
    vocab_size=50, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=1
)
CONFIGS = {"mmdit": MMDIT, "vae": VAE, "t5": T5, "clip": CLIP}
HEAD_128 = dataclasses.replace(
    MMDIT, hidden_size=256, depth=1, depth_single_blocks=1, axes_dim=(16, 56, 56)
)  # published head size, so that a bare file needs no config


def random_tensors(kind: str, config, naming: str, dtype: str = "F32", seed: int = 0) -> dict:
    """Random tensors of the component in that naming: all finite, all different."""
    plan = make_plan(TABLES[kind].rows(config), TABLES[kind].axis_sizes(config), naming)
    generator = np.random.default_rng(seed)
    return {
        name: generator.normal(0, 0.5, shape).astype(DTYPES[dtype])
        for name, shape in plan.sources.items()
    }


def write_tensors(path: Path, tensors: Mapping[str, np.ndarray], prefix: str = "") -> Path:
    """Writes the tensors, each name behind `prefix`, to one file."""
    infos = {prefix + n: TensorInfo(t.dtype, t.shape) for n, t in tensors.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    with SafetensorsWriter(path, infos, {"format": "pt"}) as writer:
        for name, tensor in tensors.items():
            writer.write(prefix + name, tensor)
    return path


def write_component(folder: Path, kind: str, config, naming: str, dtype: str = "F32") -> dict:
    """A folder of diffusers or transformers with its `config.json`; returns its tensors."""
    tensors = random_tensors(kind, config, naming, dtype)
    prefix = "text_model." if kind == "clip" else ""
    write_tensors(folder / "model.safetensors", tensors, prefix)
    (folder / "config.json").write_text(json.dumps(foreign_config(config, DTYPES[dtype])))
    return tensors


def write_pipeline(folder: Path, dtype: str = "F32", class_name: str = "FluxKontextPipeline"):
    """A diffusers folder with everything that one has, tokenizers included."""
    tensors = {}
    for kind, config in CONFIGS.items():
        naming = "diffusers" if kind in ("mmdit", "vae") else "transformers"
        tensors[kind] = write_component(folder / FOLDERS[kind], kind, config, naming, dtype)
    for kind, name in (("clip", "tokenizer"), ("t5", "tokenizer_2")):
        (folder / name).mkdir()
        for path in (checkpoint.ASSETS / "tokenizers" / kind).iterdir():
            (folder / name / path.name).write_bytes(path.read_bytes())
    (folder / "model_index.json").write_text(json.dumps({"_class_name": class_name}))
    return tensors


def read_tensors(component: ForeignComponent) -> dict[str, np.ndarray]:
    """The published tensors of an opened component, by canonical name."""
    return {name: component.read_source(name) for name in component.sources}
