"""Published sizes: the configurations of every model, and what a preset asks for by default.

A config holds what the network's shape depends on, nothing of how it is run. `Preset` adds the
defaults of the published command lines (BFL `cli*.py`, and `util.py` for the sizes).
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from kontext_jax.flow.names import Sampler
from kontext_jax.numerics import EXACT, Numerics


@dataclasses.dataclass(frozen=True)
class MMDiTConfig:
    """Rectified-flow transformer with double- and single-stream blocks (BFL `FluxParams`)."""

    in_channels: int = 64
    out_channels: int = 64
    vec_in_dim: int = 768
    context_in_dim: int = 4096
    hidden_size: int = 3072
    mlp_ratio: float = 4.0
    num_heads: int = 24
    depth: int = 19
    depth_single_blocks: int = 38
    axes_dim: tuple[int, ...] = (16, 56, 56)
    theta: int = 10_000
    qkv_bias: bool = True
    guidance_embed: bool = True

    def __post_init__(self):
        if self.hidden_size % self.num_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not divisible by num_heads {self.num_heads}"
            )
        if sum(self.axes_dim) != self.head_dim or any(d % 2 for d in self.axes_dim):
            raise ValueError(
                f"axes_dim {self.axes_dim} must be even and sum to the head's "
                f"{self.head_dim} channels (hidden_size / num_heads)"
            )

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def mlp_dim(self) -> int:
        return int(self.hidden_size * self.mlp_ratio)


@dataclasses.dataclass(frozen=True)
class VAEConfig:
    """Convolutional autoencoder, 8× down, no quant convolutions (BFL `AutoEncoderParams`)."""

    in_channels: int = 3
    out_channels: int = 3
    ch: int = 128
    ch_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    z_channels: int = 16
    norm_groups: int = 32
    latent_scale: float = 0.3611  # latents = latent_scale · (z − latent_shift)
    latent_shift: float = 0.1159
    patch: int = 1  # patch × patch pixels enter and leave as one cell; 1 in all published models

    def with_channels(self, z_channels: int) -> "VAEConfig":
        """The same with another number of latent channels; 0 changes nothing."""
        return dataclasses.replace(self, z_channels=z_channels or self.z_channels)

    @property
    def downsampling(self) -> int:
        """Pixels along one side of a latent cell."""
        return self.patch * 2 ** (len(self.ch_mult) - 1)


@dataclasses.dataclass(frozen=True)
class T5Config:
    """T5 v1.1 encoder (gated GELU, no biases)."""

    vocab_size: int = 32128
    d_model: int = 4096
    d_kv: int = 64
    d_ff: int = 10240
    num_layers: int = 24
    num_heads: int = 64
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    layer_norm_epsilon: float = 1e-6


@dataclasses.dataclass(frozen=True)
class CLIPConfig:
    """CLIP text encoder (causal; pooled at the end-of-text token)."""

    vocab_size: int = 49408
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    max_position_embeddings: int = 77
    hidden_act: Literal["quick_gelu", "gelu"] = "quick_gelu"
    layer_norm_eps: float = 1e-5
    eos_token_id: int = (
        2  # 2: legacy pooling, at the highest token id; otherwise at the first such id
    )


Config = MMDiTConfig | VAEConfig | T5Config | CLIPConfig
CONFIG_CLASSES = {"mmdit": MMDiTConfig, "vae": VAEConfig, "t5": T5Config, "clip": CLIPConfig}


def config_from_json(kind: str, values: Mapping[str, Any]) -> Config:
    """The config of a network from its fields as JSON stores them, tuples as lists."""
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    return CONFIG_CLASSES[kind](**values)


@dataclasses.dataclass(frozen=True)
class Preset:
    """A whole model: four networks, and the defaults of a request that names none."""

    name: str
    mmdit: MMDiTConfig
    vae: VAEConfig = VAEConfig()
    t5: T5Config = T5Config()
    clip: CLIPConfig = CLIPConfig()
    shift_timesteps: bool = True  # schnell samples on the unshifted grid
    default_num_steps: int | None = None  # None: the numerics' default
    default_sampler: Sampler = "euler"
    default_timesteps: tuple[float, ...] | None = None  # where as many steps begin; None: evenly
    default_guidance: float | None = None  # likewise; unused without guidance_embed
    default_true_cfg_scale: float = 1.0  # above 1: guided away from the empty prompt
    max_text_tokens: int = 512
    megapixels: float = 1.048576  # area of pictures when a request names no size
    takes_references: bool = True
    non_commercial: bool = False  # published under the FLUX.1 [dev] Non-Commercial License

    def steps(self, numerics: Numerics = EXACT) -> int:
        """Number of steps of a request that names none."""
        return self.default_num_steps or numerics.default_num_steps

    @property
    def num_velocities(self) -> int:
        """That the transformer gives for a token: 1, or N of a policy (`kontext_jax.policy`)."""
        return max(1, self.mmdit.out_channels // (4 * self.vae.z_channels))

    def check_sampler(self, sampler: Sampler) -> None:
        """Raises ValueError if the transformer is not made for it."""
        if (sampler == "policy") != (self.num_velocities > 1):
            count = self.num_velocities
            given = f"{count} velocities" if count > 1 else "one velocity"
            fitting = "policy" if count > 1 else "euler or renoise"
            raise ValueError(
                f"the sampler is {sampler}, but this transformer gives {given} a step; choose "
                f"{fitting}, or leave the choice to the model"
            )

    def timesteps_of(self, num_steps: int) -> tuple[float, ...] | None:
        """The model's own times for so many steps; None where it has none."""
        own = self.default_timesteps
        return own if own is not None and len(own) == num_steps else None


_TINY_MMDIT = MMDiTConfig(
    vec_in_dim=64,
    context_in_dim=64,
    hidden_size=128,
    num_heads=4,
    depth=2,
    depth_single_blocks=4,
    axes_dim=(8, 12, 12),
)

_SMALL_MMDIT = dataclasses.replace(
    _TINY_MMDIT, vec_in_dim=128, context_in_dim=128, guidance_embed=False
)
_SCENES = Preset(  # learns the scenes of `kontext_jax.data.scenes` on two CPU cores
    "tiny-scenes",
    _SMALL_MMDIT,
    vae=VAEConfig(ch=48, ch_mult=(1, 1), num_res_blocks=1, norm_groups=8, patch=4),
    t5=T5Config(vocab_size=1024, d_model=128, d_kv=32, d_ff=256, num_layers=2, num_heads=4),
    clip=CLIPConfig(
        vocab_size=1024,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
    ),
    shift_timesteps=False,
    default_num_steps=20,
    max_text_tokens=16,
    megapixels=0.004096,
)
_SMALL: tuple[Preset, ...] = (
    _SCENES,
    dataclasses.replace(  # learns photographs too (configs/tiny_kontext.py)
        _SCENES,
        name="tiny-kontext",
        mmdit=dataclasses.replace(_SMALL_MMDIT, hidden_size=192, num_heads=6),
        vae=dataclasses.replace(_SCENES.vae, ch=64),
    ),
)
_SMALL += (  # what guidance is distilled into (configs/tiny_guidance_distill.py)
    dataclasses.replace(
        _SMALL[-1],
        name="tiny-kontext-guided",
        mmdit=dataclasses.replace(_SMALL[-1].mmdit, guidance_embed=True),
    ),
)


def _with_policy(preset: Preset, name: str) -> Preset:
    """The same with ten velocities a token, as many as arXiv:2510.14974 takes for FLUX.1."""
    mmdit = dataclasses.replace(preset.mmdit, out_channels=10 * preset.mmdit.out_channels)
    return dataclasses.replace(preset, name=name, mmdit=mmdit, default_sampler="policy")


_DEV = Preset("kontext-dev", MMDiTConfig(), non_commercial=True)

PRESETS = {
    preset.name: preset
    for preset in (
        _DEV,
        _with_policy(_DEV, "kontext-dev-policy"),
        Preset(
            "flux-dev",
            MMDiTConfig(),
            default_num_steps=50,
            default_guidance=2.5,
            takes_references=False,
            non_commercial=True,
        ),
        Preset(
            "krea-dev",
            MMDiTConfig(),
            default_num_steps=28,
            default_guidance=4.5,
            takes_references=False,
            non_commercial=True,
        ),
        Preset(
            "flux-schnell",
            MMDiTConfig(guidance_embed=False),
            shift_timesteps=False,
            default_num_steps=4,
            max_text_tokens=256,
            takes_references=False,
        ),
        # What training begins with: guidance is distilled into a model, and takes an input, later.
        Preset("kontext-base", MMDiTConfig(guidance_embed=False)),
        Preset(
            "tiny",
            _TINY_MMDIT,
            vae=VAEConfig(ch=32, ch_mult=(1, 1, 2, 2), num_res_blocks=1),
            t5=T5Config(vocab_size=1024, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4),
            clip=CLIPConfig(
                vocab_size=1024,
                hidden_size=64,
                intermediate_size=128,
                num_hidden_layers=2,
                num_attention_heads=4,
            ),
            default_num_steps=8,
            max_text_tokens=128,
            megapixels=0.065536,
        ),
        *_SMALL,
        _with_policy(_SMALL[-1], "tiny-kontext-policy"),
    )
}
