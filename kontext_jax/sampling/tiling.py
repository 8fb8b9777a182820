"""Whether the autoencoder works on a picture in tiles."""

from typing import Literal

from kontext_jax.models.vae import VAE
from kontext_jax.models.vae_tiling import vae_peak_bytes

Tiling = Literal["auto", "on", "off"]
TILE_PX = 512
USABLE = 0.9  # share of the free memory; the rest is for fragments and other programs


def needs_tiles(vae: VAE, height_px: int, width_px: int, free_bytes: float | None) -> bool:
    """Whether a whole picture takes more memory than there is.

    Args:
      free_bytes: memory of the device that is left; None where tiles would lie in the same memory.
    """
    if free_bytes is None:
        return False
    return vae_peak_bytes(vae.config, height_px, width_px, vae.dtype) > USABLE * free_bytes


def tile_side(
    tiling: Tiling, vae: VAE, height_px: int, width_px: int, free_bytes: float | None
) -> int | None:
    """Side of the tiles in pixels for a picture of this size; None for the whole picture."""
    if tiling == "auto":
        tiling = "on" if needs_tiles(vae, height_px, width_px, free_bytes) else "off"
    return TILE_PX if tiling == "on" else None
