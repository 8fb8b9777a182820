"""Our weight directory → BFL's files, or a folder that diffusers loads as it is."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from convert_weights import notice, scheduler
from convert_weights.io import OwnComponent, ThreadScratch, lossless_dtype
from convert_weights.layouts import (
    CONFIG_KEY,
    TITLES,
    preset_for,
)
from convert_weights.rules import Plan, WeightMismatchError, make_plan, natural_key
from convert_weights.tables import TABLES, clip
from convert_weights.to_jax import Advance, Summary, copy_tokenizer, require_room, run_jobs
from kontext_jax.models.presets import CLIPConfig, Config, MMDiTConfig, Preset, T5Config, VAEConfig
from kontext_jax.runtime.atomic import write_folder, write_json
from kontext_jax.storage.safetensors_reader import TensorInfo, dtype_name
from kontext_jax.storage.safetensors_writer import ShardedWriter
from kontext_jax.weights import bundle as checkpoint
from kontext_jax.weights.card import sampling_rule

LAYOUTS = ("bfl", "diffusers")
DIFFUSERS_VERSION = "0.34.0"  # the first with FluxKontextPipeline
FOLDERS = {"mmdit": "transformer", "vae": "vae", "clip": "text_encoder", "t5": "text_encoder_2"}
TOKENIZER_FOLDERS = {"clip": "tokenizer", "t5": "tokenizer_2"}
BFL_NAMES = {
    "kontext-dev": "flux1-kontext-dev",
    "flux-dev": "flux1-dev",
    "flux-schnell": "flux1-schnell",
    "krea-dev": "flux1-krea-dev",
}


def to_torch(
    directory: Path,
    out: Path,
    layout: str,
    dtype: np.dtype | None = None,
    max_shard_bytes: int = 10_000_000_000,
    start: Callable[[int], Advance] = lambda total: lambda count: None,
) -> Summary:
    """Writes the weight directory `directory` in a published layout to the new folder `out`.

    Args:
      directory: a folder that `to_jax` wrote, with all components or some.
      out: appears only when everything has been written.
      layout: "bfl" or "diffusers".
      dtype: dtype of the tensors; None keeps ours.
      max_shard_bytes: largest file in the layout of diffusers and in text encoders' folders.
      start: told the number of bytes, returns the progress callback.

    Raises:
      TensorFileError, WeightMismatchError, FileExistsError: and nothing is left on disk.
    """
    manifest = checkpoint.read_manifest(directory)
    components: dict[str, OwnComponent] = {}
    try:
        for kind in manifest["components"]:
            components[kind] = OwnComponent(directory, kind)
        configs = {kind: component.config for kind, component in components.items()}
        preset = (
            preset_for(manifest["preset"], configs, str(directory)) if manifest["preset"] else None
        )
        if preset is not None:
            preset = dataclasses.replace(preset, **sampling_rule(manifest))
        if layout == "diffusers":
            for kind, config in configs.items():
                require_expressible(kind, config)
        jobs = [_Job(component, layout, dtype) for component in components.values()]
        written = sum(info.nbytes for job in jobs for info in job.targets.values())
        require_room(out, written)
        advance = start(written)
        notes = []

        def fill(folder: Path) -> None:
            for job in jobs:
                job.write(folder, preset, max_shard_bytes, advance)
            for kind, name in TOKENIZER_FOLDERS.items():
                if (directory / "tokenizers" / kind).is_dir():
                    copy_tokenizer(directory / "tokenizers" / kind, folder / name)
            if layout == "diffusers":
                notes.extend(_write_pipeline(folder, preset, set(configs)))
            scheduler.write_defaults(folder, manifest.get("defaults") or {})
            what = f"converted by kontext_jax to the layout of {layout}"
            if dtype is not None:
                what += f", stored as {dtype_name(dtype)}"
            text = notice.notice_text(manifest["source"], what, manifest.get("license"))
            (folder / "NOTICE").write_text(text, "utf-8")

        write_folder(out, fill)
    finally:
        for component in components.values():
            component.close()
    return Summary(
        components=list(configs),
        num_parameters=sum(c.num_parameters for c in components.values()),
        num_bytes=written,
        preset=manifest["preset"],
        dtypes=sorted({dtype_name(i.dtype) for job in jobs for i in job.targets.values()}),
        notes=notes,
    )


@dataclasses.dataclass
class _Job:
    """One component's tensors in the published layout, and how each is put together."""

    component: OwnComponent
    layout: str
    dtype: np.dtype | None

    def __post_init__(self):
        kind, config = self.component.kind, self.component.config
        table = TABLES[kind]
        naming = self.layout if self.layout in table.NAMINGS else table.NAMINGS[0]
        self.plan: Plan = make_plan(table.rows(config), table.axis_sizes(config), naming)
        self.prefix = clip.WRITTEN_PREFIX if kind == "clip" else ""
        self.moves = self.plan.moves_by_source()
        self.targets = {
            self.prefix + name: TensorInfo(self._dtype(name), shape)
            for name, shape in sorted(
                self.plan.sources.items(), key=lambda item: natural_key(item[0])
            )
        }

    def _dtype(self, name: str) -> np.dtype:
        if self.dtype is not None:
            return self.dtype
        return lossless_dtype(self.component.leaves[move.path].dtype for move in self.moves[name])

    def write(
        self, folder: Path, preset: Preset | None, max_shard_bytes: int, advance: Advance
    ) -> None:
        """Writes the tensors and, where the layout has one, the `config.json`."""
        kind, config = self.component.kind, self.component.config
        metadata = {"format": "pt"}
        if self.layout == "bfl" and kind in ("mmdit", "vae"):
            name = preset.name if preset else "unknown"
            stem = "ae" if kind == "vae" else BFL_NAMES.get(name, f"flux1-{name}")
            # BFL's files have no config.json beside them: what shapes cannot tell goes in here.
            metadata[CONFIG_KEY] = json.dumps({kind: dataclasses.asdict(config)})
            max_shard_bytes = max(1, sum(info.nbytes for info in self.targets.values()))
        else:
            folder = folder / FOLDERS[kind]
            folder.mkdir()
            stem = "diffusion_pytorch_model" if kind in ("mmdit", "vae") else "model"
            dtypes = {info.dtype for info in self.targets.values()}
            write_json(folder / "config.json", foreign_config(config, lossless_dtype(dtypes)))
        with ShardedWriter(folder, stem, self.targets, metadata, max_shard_bytes) as writer:
            self._stream(writer, advance)

    def _stream(self, writer: ShardedWriter, advance: Advance) -> None:
        scratch = ThreadScratch()

        def convert(name: str) -> None:
            info = self.targets[self.prefix + name]
            out = scratch.buffer.take_array(info.shape, info.dtype)
            for move in self.moves[name]:
                move.to_theirs(self.component.read_slice(move.path, move.layer, info.dtype), out)
            writer.write(self.prefix + name, out)
            advance(info.nbytes)

        run_jobs(convert, self.moves)


def require_expressible(kind: str, config: Config) -> None:
    """Raises `WeightMismatchError` if diffusers' class has no setting for what `config` says."""
    reasons = []
    if kind == "mmdit":
        fixed = {"qkv_bias": True, "mlp_ratio": 4.0, "theta": 10_000}
        reasons = [
            f"{name} {getattr(config, name)} (diffusers: {value})"
            for name, value in fixed.items()
            if getattr(config, name) != value
        ]
    if reasons:
        raise WeightMismatchError(
            f"diffusers' class for the {TITLES[kind]} cannot express {', '.join(reasons)}; "
            "use --layout bfl"
        )


def foreign_config(config: Config, dtype: np.dtype) -> dict[str, Any]:
    """`config.json` as diffusers or transformers writes it.

    Args:
      config: config of the component.
      dtype: dtype of its tensors.
    """
    if isinstance(config, MMDiTConfig):
        return {
            "_class_name": "FluxTransformer2DModel",
            "_diffusers_version": DIFFUSERS_VERSION,
            "attention_head_dim": config.head_dim,
            "axes_dims_rope": list(config.axes_dim),
            "guidance_embeds": config.guidance_embed,
            "in_channels": config.in_channels,
            "joint_attention_dim": config.context_in_dim,
            "num_attention_heads": config.num_heads,
            "num_layers": config.depth,
            "num_single_layers": config.depth_single_blocks,
            "out_channels": config.out_channels,
            "patch_size": 1,
            "pooled_projection_dim": config.vec_in_dim,
        }
    if isinstance(config, VAEConfig):
        levels = len(config.ch_mult)
        return {
            "_class_name": "AutoencoderKL",
            "_diffusers_version": DIFFUSERS_VERSION,
            "act_fn": "silu",
            "block_out_channels": [config.ch * m for m in config.ch_mult],
            "down_block_types": ["DownEncoderBlock2D"] * levels,
            "force_upcast": True,
            "in_channels": config.in_channels,
            "latent_channels": config.z_channels,
            "layers_per_block": config.num_res_blocks,
            "mid_block_add_attention": True,
            "norm_num_groups": config.norm_groups,
            "out_channels": config.out_channels,
            "sample_size": 1024,
            "scaling_factor": config.latent_scale,
            "shift_factor": config.latent_shift,
            "up_block_types": ["UpDecoderBlock2D"] * levels,
            "use_post_quant_conv": False,
            "use_quant_conv": False,
        }
    if isinstance(config, T5Config):
        return {
            "architectures": ["T5EncoderModel"],
            "model_type": "t5",
            "d_ff": config.d_ff,
            "d_kv": config.d_kv,
            "d_model": config.d_model,
            "decoder_start_token_id": 0,
            "dense_act_fn": "gelu_new",
            "dropout_rate": 0.1,
            "eos_token_id": 1,
            "feed_forward_proj": "gated-gelu",
            "is_encoder_decoder": True,
            "is_gated_act": True,
            "layer_norm_epsilon": config.layer_norm_epsilon,
            "num_decoder_layers": config.num_layers,
            "num_heads": config.num_heads,
            "num_layers": config.num_layers,
            "pad_token_id": 0,
            "relative_attention_max_distance": config.relative_attention_max_distance,
            "relative_attention_num_buckets": config.relative_attention_num_buckets,
            "tie_word_embeddings": False,
            "torch_dtype": dtype_name(dtype),
            "use_cache": True,
            "vocab_size": config.vocab_size,
        }
    assert isinstance(config, CLIPConfig)
    return {
        "architectures": ["CLIPTextModel"],
        "model_type": "clip_text_model",
        "attention_dropout": 0.0,
        "bos_token_id": 0,
        "eos_token_id": config.eos_token_id,
        "hidden_act": config.hidden_act,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "layer_norm_eps": config.layer_norm_eps,
        "max_position_embeddings": config.max_position_embeddings,
        "num_attention_heads": config.num_attention_heads,
        "num_hidden_layers": config.num_hidden_layers,
        "pad_token_id": 1,
        "projection_dim": config.hidden_size,
        "torch_dtype": dtype_name(dtype),
        "vocab_size": config.vocab_size,
    }


def _write_pipeline(folder: Path, preset: Preset | None, kinds: set[str]) -> list[str]:
    """Writes the scheduler and `model_index.json`, or says why there is no whole pipeline."""
    missing = [FOLDERS[kind] for kind in FOLDERS if kind not in kinds]
    missing += [name for name in TOKENIZER_FOLDERS.values() if not (folder / name).is_dir()]
    if preset is None or missing:
        return [f"no model_index.json, since the directory lacks {', '.join(missing)}"]
    (folder / "scheduler").mkdir()
    write_json(
        folder / scheduler.FILE,
        {
            "_diffusers_version": DIFFUSERS_VERSION,
            **scheduler.scheduler_config(preset.shift_timesteps, preset.default_sampler),
        },
    )
    kontext = preset.takes_references
    write_json(
        folder / "model_index.json",
        {
            "_class_name": "FluxKontextPipeline" if kontext else "FluxPipeline",
            "_diffusers_version": DIFFUSERS_VERSION,
            "scheduler": ["diffusers", scheduler.CLASS_NAME],
            "text_encoder": ["transformers", "CLIPTextModel"],
            "text_encoder_2": ["transformers", "T5EncoderModel"],
            "tokenizer": ["transformers", "CLIPTokenizer"],
            "tokenizer_2": ["transformers", "T5TokenizerFast"],
            "transformer": ["diffusers", "FluxTransformer2DModel"],
            "vae": ["diffusers", "AutoencoderKL"],
        },
    )
    return []
