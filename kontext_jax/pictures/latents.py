"""From pixels to tokens and back: sizes, packing, positions, pixel scaling.

The autoencoder makes one latent cell of 8×8 pixels; 2×2 cells fold into one token, so a token
covers 16×16 pixels. Positions are (index, row, column) in units of tokens: text (0, 0, 0), the
target (0, row, column), and reference i (i, row, column) by the rule of the paper
(arXiv:2506.15742, sec. 3).
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np

from kontext_jax.types import AnyArray, Array, Float, Tokens, UInt8, typed

PATCH = 2  # latent cells per token, each way
# Pixels per token, each way: PATCH cells of `VAEConfig.downsampling` pixels, 8 in all presets.
PIXELS_PER_TOKEN = 16

# (width, height) in pixels, about one megapixel each: the sizes Kontext was trained on.
PREFERRED_SIZES: tuple[tuple[int, int], ...] = (
    (672, 1568),
    (688, 1504),
    (720, 1456),
    (752, 1392),
    (800, 1328),
    (832, 1248),
    (880, 1184),
    (944, 1104),
    (1024, 1024),
    (1104, 944),
    (1184, 880),
    (1248, 832),
    (1328, 800),
    (1392, 752),
    (1456, 720),
    (1504, 688),
    (1568, 672),
)

PositionRule = Literal["index", "bfl", "width"]


def floor_to_token(pixels: int) -> int:
    """Largest multiple of 16 not above `pixels`."""
    return pixels // PIXELS_PER_TOKEN * PIXELS_PER_TOKEN


def ceil_to_token(pixels: int) -> int:
    """Smallest multiple of 16 not below `pixels`."""
    return -(-pixels // PIXELS_PER_TOKEN) * PIXELS_PER_TOKEN


def preferred_size(
    width_px: int,
    height_px: int,
    sizes: Sequence[tuple[int, int]] = PREFERRED_SIZES,
    floor_first: bool = False,
) -> tuple[int, int]:
    """The (width, height) of `sizes` whose ratio is nearest to the image's; ties → the narrower.

    The difference is of the ratios, not of their logarithms (BFL `prepare_kontext`).

    Args:
      floor_first: floor both sides to multiples of 16 before taking the ratio, as diffusers does.

    Raises:
      ValueError: if a side is not positive, or, with floor_first, below 16 pixels.
    """
    if floor_first:
        width_px, height_px = floor_to_token(width_px), floor_to_token(height_px)
    if width_px < 1 or height_px < 1:
        least = PIXELS_PER_TOKEN if floor_first else 1
        raise ValueError(f"image sides must be at least {least} pixels")
    ratio = width_px / height_px
    return min((abs(ratio - w / h), w, h) for w, h in sizes)[1:]


def size_of_area(width_px: float, height_px: float, area_px: float) -> tuple[int, int]:
    """(width, height) with the ratio of the arguments and about `area_px` pixels, floored to 16.

    diffusers' rule for `max_area` and, with area 1024², BFL's for `--aspect_ratio` (both round the
    scaled sides to whole pixels first).
    """
    ratio = width_px / height_px
    width = floor_to_token(round((area_px * ratio) ** 0.5))
    height = floor_to_token(round((area_px / ratio) ** 0.5))
    return max(width, PIXELS_PER_TOKEN), max(height, PIXELS_PER_TOKEN)


@typed
def pack(latents: Float[Array, "B latent_height latent_width Z"]) -> Tokens:
    """Folds each 2×2 latent patch into one token, channel slowest: [B, 2h, 2w, Z] → [B, h·w, 4Z].

    Raises:
      ValueError: if a side is odd.
    """
    b, height, width, z = latents.shape
    if height % PATCH or width % PATCH:
        raise ValueError(f"latent sides must be even to be packed, found {height}×{width}")
    x = latents.reshape(b, height // PATCH, PATCH, width // PATCH, PATCH, z)
    x = x.transpose(0, 1, 3, 5, 2, 4)  # B h w Z 2 2
    return x.reshape(b, (height // PATCH) * (width // PATCH), z * PATCH * PATCH)


@typed
def unpack(
    tokens: Tokens, latent_height: int, latent_width: int
) -> Float[Array, "B latent_height latent_width Z"]:
    """Inverse of `pack`: [B, h·w, 4Z] → [B, latent_height, latent_width, Z]."""
    h, w = latent_height // PATCH, latent_width // PATCH
    b, num_tokens, c = tokens.shape
    if num_tokens != h * w:
        raise ValueError(f"{num_tokens} tokens cannot be {latent_height}×{latent_width} latents")
    x = tokens.reshape(b, h, w, c // PATCH**2, PATCH, PATCH)
    x = x.transpose(0, 1, 4, 2, 5, 3)  # B h 2 w 2 Z
    return x.reshape(b, latent_height, latent_width, c // PATCH**2)


def image_ids(
    rows: int, columns: int, index: int = 0, first_column: int = 0
) -> Float[np.ndarray, "tokens 3"]:
    """Positions (index, row, column) of rows × columns tokens: float32 [rows·columns, 3]."""
    ids = np.zeros((rows, columns, 3), np.float32)
    ids[..., 0] = index
    ids[..., 1] = np.arange(rows)[:, None]
    ids[..., 2] = first_column + np.arange(columns)[None, :]
    return ids.reshape(-1, 3)


def text_ids(num_text_tokens: int) -> Float[np.ndarray, "T 3"]:
    """Positions of text tokens, all zero: float32 [T, 3]."""
    return np.zeros((num_text_tokens, 3), np.float32)


def context_ids(
    grids: Sequence[tuple[int, int]], rule: PositionRule = "index"
) -> Float[np.ndarray, "tokens 3"]:
    """Positions of reference images on one sequence axis: float32 [sum of rows·columns, 3].

    Args:
      grids: (rows, columns) in tokens of each reference, in order.
      rule: "index": reference i (from 1) gets index i, the paper's rule. "bfl": all get index 1, as
        BFL's code does, so several references share positions. "width": all get index 1 and each
        stands to the right of the one before.
    """
    parts, first_column = [np.zeros((0, 3), np.float32)], 0
    for i, (rows, columns) in enumerate(grids, start=1):
        if rule == "index":
            parts.append(image_ids(rows, columns, index=i))
        elif rule == "bfl":
            parts.append(image_ids(rows, columns, index=1))
        elif rule == "width":
            parts.append(image_ids(rows, columns, index=1, first_column=first_column))
            first_column += columns
        else:
            raise ValueError(f"unknown position rule {rule!r}; choose index, bfl or width")
    return np.concatenate(parts)


def pixels_to_model(image_uint8: UInt8[AnyArray, "..."]) -> Float[AnyArray, "..."]:
    """Bytes to the autoencoder's range: x/127.5 − 1, float32 in [-1, 1]."""
    return image_uint8.astype(np.float32) / np.float32(127.5) - np.float32(1)


def model_to_pixels(
    image: Float[np.ndarray, "..."], rule: Literal["round", "truncate"] = "round"
) -> UInt8[np.ndarray, "..."]:
    """The autoencoder's range to bytes; values outside [-1, 1] are clamped.

    Args:
      rule: "round" to the nearest byte (diffusers), or "truncate" (BFL).
    """
    image = np.clip(np.asarray(image, np.float32), -1, 1)
    if rule == "truncate":
        return (np.float32(127.5) * (image + 1)).astype(np.uint8)
    return np.round((image / 2 + np.float32(0.5)) * 255).astype(np.uint8)


def num_tokens(width_px: int, height_px: int) -> int:
    """Image tokens of a picture whose sides are multiples of 16."""
    return (width_px // PIXELS_PER_TOKEN) * (height_px // PIXELS_PER_TOKEN)
