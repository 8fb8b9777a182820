"""The autoencoder: BFL's names (`ae.safetensors`) and diffusers' (`AutoencoderKL`).

Convolutions are OIHW there and HWIO here; BFL writes the attention's projections as 1×1
convolutions, diffusers as matrices. Both decoders run from the coarsest level to the finest, but
BFL counts the levels from the finest and diffusers in the order they run. diffusers-old is what
releases before 0.18 wrote: the attention's names only.
"""

from convert_weights.rules import OneByOne, Row, with_suffix
from kontext_jax.models.presets import VAEConfig

NAMINGS = ("bfl", "diffusers", "diffusers-old")
PREFIXES = ("first_stage_model.", "vae.")
TIED: dict[str, str] = {}
BUFFERS: frozenset[str] = frozenset()
OTHER_NETWORKS: tuple[str, ...] = ()

_ATTENTION = {  # ours and BFL's → diffusers', diffusers-old's
    "q": ("to_q", "query"),
    "k": ("to_k", "key"),
    "v": ("to_v", "value"),
    "proj_out": ("to_out.0", "proj_attn"),
}


def axis_sizes(config: VAEConfig) -> dict[str, int]:
    """None is shared by all rows: each states its own sizes."""
    del config
    return {}


def _names(bfl: str, diffusers: str, suffix: str) -> dict[str, str]:
    diffusers += suffix
    return {"bfl": bfl + suffix, "diffusers": diffusers, "diffusers-old": diffusers}


def _convolution(
    path: str, bfl: str, diffusers: str, channels: tuple[int, int], width: int = 3
) -> list[Row]:
    sizes = {"I": channels[0], "O": channels[1], "h": width, "w": width}
    return [
        Row(
            f"{path}/kernel",
            ("h", "w", "I", "O"),
            ("O", "I", "h", "w"),
            _names(bfl, diffusers, ".weight"),
            sizes=sizes,
        ),
        Row(f"{path}/bias", ("O",), ("O",), _names(bfl, diffusers, ".bias"), sizes=sizes),
    ]


def _norm(path: str, bfl: str, diffusers: str, channels: int) -> list[Row]:
    return [
        Row(f"{path}/{ours}", ("I",), ("I",), _names(bfl, diffusers, theirs), sizes={"I": channels})
        for ours, theirs in (("scale", ".weight"), ("bias", ".bias"))
    ]


def _residual(path: str, bfl: str, diffusers: str, channels: tuple[int, int]) -> list[Row]:
    before, after = channels
    rows = [
        *_norm(f"{path}/norm1", f"{bfl}.norm1", f"{diffusers}.norm1", before),
        *_convolution(f"{path}/conv1", f"{bfl}.conv1", f"{diffusers}.conv1", channels),
        *_norm(f"{path}/norm2", f"{bfl}.norm2", f"{diffusers}.norm2", after),
        *_convolution(f"{path}/conv2", f"{bfl}.conv2", f"{diffusers}.conv2", (after, after)),
    ]
    if before != after:
        rows += _convolution(
            f"{path}/nin_shortcut", f"{bfl}.nin_shortcut", f"{diffusers}.conv_shortcut", channels, 1
        )
    return rows


def _attention(path: str, bfl: str, diffusers: str, channels: int) -> list[Row]:
    rows = _norm(f"{path}/norm", f"{bfl}.norm", f"{diffusers}.group_norm", channels)
    for name, (new, old) in _ATTENTION.items():
        sizes = {"I": channels, "O": channels}
        diffusers_names = {"diffusers": f"{diffusers}.{new}", "diffusers-old": f"{diffusers}.{old}"}
        matrix: dict[str, str | OneByOne] = {"bfl": OneByOne(f"{bfl}.{name}"), **diffusers_names}
        vector = {"bfl": f"{bfl}.{name}", **diffusers_names}
        kernel, bias = f"{path}/{name}/kernel", f"{path}/{name}/bias"
        rows += [
            Row(kernel, ("I", "O"), ("O", "I"), with_suffix(matrix, ".weight"), sizes=sizes),
            Row(bias, ("O",), ("O",), with_suffix(vector, ".bias"), sizes=sizes),
        ]
    return rows


def _middle(path: str, channels: int) -> list[Row]:
    return [
        *_residual(
            f"{path}/mid/block_1",
            f"{path}.mid.block_1",
            f"{path}.mid_block.resnets.0",
            (channels, channels),
        ),
        *_attention(
            f"{path}/mid/attn_1", f"{path}.mid.attn_1", f"{path}.mid_block.attentions.0", channels
        ),
        *_residual(
            f"{path}/mid/block_2",
            f"{path}.mid.block_2",
            f"{path}.mid_block.resnets.1",
            (channels, channels),
        ),
    ]


def _ends(path: str, before: tuple[int, int], after: tuple[int, int]) -> list[Row]:
    return [
        *_convolution(f"{path}/conv_in", f"{path}.conv_in", f"{path}.conv_in", before),
        *_norm(f"{path}/norm_out", f"{path}.norm_out", f"{path}.conv_norm_out", after[0]),
        *_convolution(f"{path}/conv_out", f"{path}.conv_out", f"{path}.conv_out", after),
    ]


def _encoder(config: VAEConfig, widths: list[int]) -> list[Row]:
    rows, channels, last = [], config.ch, len(widths) - 1
    for i, width in enumerate(widths):
        ours, bfl, diffusers = f"encoder/down_{i}", f"encoder.down.{i}", f"encoder.down_blocks.{i}"
        for j in range(config.num_res_blocks):
            rows += _residual(
                f"{ours}/block_{j}",
                f"{bfl}.block.{j}",
                f"{diffusers}.resnets.{j}",
                (channels, width),
            )
            channels = width
        if i != last:
            rows += _convolution(
                f"{ours}/downsample/conv",
                f"{bfl}.downsample.conv",
                f"{diffusers}.downsamplers.0.conv",
                (width, width),
            )
    return rows


def _decoder(config: VAEConfig, widths: list[int]) -> list[Row]:
    rows, channels, last = [], widths[-1], len(widths) - 1
    for i in reversed(range(len(widths))):
        ours, bfl = f"decoder/up_{i}", f"decoder.up.{i}"
        diffusers = f"decoder.up_blocks.{last - i}"
        for j in range(config.num_res_blocks + 1):
            rows += _residual(
                f"{ours}/block_{j}",
                f"{bfl}.block.{j}",
                f"{diffusers}.resnets.{j}",
                (channels, widths[i]),
            )
            channels = widths[i]
        if i != 0:
            rows += _convolution(
                f"{ours}/upsample/conv",
                f"{bfl}.upsample.conv",
                f"{diffusers}.upsamplers.0.conv",
                (channels, channels),
            )
    return rows


def rows(config: VAEConfig) -> list[Row]:
    """The autoencoder's table for its levels and blocks.

    Raises:
      ValueError: it folds patches, which no published layout has.
    """
    if config.patch != 1:
        raise ValueError(
            f"the autoencoder folds patches of {config.patch}×{config.patch} pixels; published "
            "layouts have none (patch 1), so its weights stay in ours"
        )
    widths = [config.ch * m for m in config.ch_mult]
    return [
        *_ends("encoder", (config.in_channels, config.ch), (widths[-1], 2 * config.z_channels)),
        *_encoder(config, widths),
        *_middle("encoder", widths[-1]),
        *_ends("decoder", (config.z_channels, widths[-1]), (widths[0], config.out_channels)),
        *_decoder(config, widths),
        *_middle("decoder", widths[-1]),
    ]
