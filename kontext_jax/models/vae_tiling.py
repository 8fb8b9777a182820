"""The autoencoder over tiles: bounded device memory, and the result of coding the whole picture.

Tiles that are coded one by one and blended show: group norms take their statistics, and the
middle's attention its keys, from the whole picture. Here every step of the encoder or decoder goes
over all tiles before the next step begins. Between steps the feature map lies in host memory; a
tile is cut with the neighbouring cells that its convolution reaches, and each step's tiles also
return their mean and variance, merged in float64 into the statistics of the next group norm.
Nothing is approximated, so the result equals the plain one to float rounding, for any weights,
sizes and tiles. All tiles of a picture have the same shape: a step is compiled once for each pair
of widths.

On the device this takes `vae_peak_bytes(…, tile_px)`; in host memory, at the published widths
c, 2c, 4c, 4c and for each byte of a number, 4·c bytes a pixel to decode (input 2c, middle c and
result c of the first block at full resolution) and 2·c to encode. Where the device is the CPU,
coding the whole picture at once takes no more than that.
"""

import collections
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from kontext_jax.models.presets import VAEConfig
from kontext_jax.models.vae import (
    VAE,
    AttentionBlock,
    Downsample,
    GroupNorm,
    Moments,
    ResnetBlock,
    Upsample,
    fold_patches,
    group_moments,
    unfold_patches,
)
from kontext_jax.types import Float, Latents, Params, RandomKey


def encode_tiled(
    vae: VAE, params: Params, image: Any, tile_px: int, *, key: RandomKey | None = None
) -> Latents:
    """Latents [B, h/8, w/8, Z] of an image [B, h, w, 3], as `VAE.encode` gives them.

    Args:
        image: In [-1, 1], best a NumPy array: only tiles of it are put on the device.
        tile_px: Longest side of a tile in pixels, a multiple of `vae.downsampling`.
        key: Samples the posterior instead of taking its mean.

    Raises:
        ValueError: The image's sides or `tile_px` are not multiples of `vae.downsampling`.
    """
    image = np.asarray(image)
    vae.check_image(image.shape)
    encoder = vae.bind({"params": params}).encoder
    folded = fold_patches(image.astype(vae.dtype), vae.config.patch)
    moments = _run(encoder, folded, vae, tile_px)
    return vae.to_latents(*vae.split_moments(jnp.asarray(moments)), key=key)


def decode_tiled(
    vae: VAE, params: Params, latents: Any, tile_px: int
) -> Float[np.ndarray, "B height width 3"]:
    """The image [B, 8h, 8w, 3] of latents [B, h, w, Z] as `VAE.decode` gives it, in host memory.

    Args:
        latents: Scaled latents, as `VAE.encode` and the transformer give them.
        tile_px: Longest side of a tile in pixels of the image, a multiple of `vae.downsampling`.

    Raises:
        ValueError: `tile_px` is not a multiple of `vae.downsampling`.
    """
    z = np.asarray(vae.from_latents(jnp.asarray(latents)))
    image = _run(vae.bind({"params": params}).decoder, z, vae, tile_px)
    return unfold_patches(image, vae.config.patch)


def vae_peak_bytes(
    config: VAEConfig, height_px: int, width_px: int, dtype: Any, tile_px: int | None = None
) -> int:
    """Device memory beside the parameters at the peak of decoding one picture; encoding takes less.

    The largest set of feature maps that live together, as XLA's memory analysis shows it when it
    compiles for an H100 (without cuDNN's workspace) and, in float32, for CPU. On CPUs bfloat16
    takes as much as float32, in which XLA convolves there.

    Args:
        dtype: The compute dtype.
        tile_px: side of a tile, see `decode_tiled`; None for the whole picture at once.
    """
    widths = [config.ch * mult for mult in config.ch_mult]
    cell = config.downsampling
    latent_height, latent_width = -(-height_px // cell), -(-width_px // cell)
    itemsize = jnp.dtype(dtype).itemsize
    if tile_px is not None:
        grid = _Grid(latent_height, latent_width, tile_px // cell)
        keys_and_values = 2 * widths[-1] * latent_height * latent_width
        latent_height, latent_width = grid.tile_height, grid.tile_width
    cell //= config.patch  # cells of the finest map that the network has
    num_values = []  # while the first block of each level runs
    for i, (width, wider) in enumerate(zip(widths, widths[1:] + widths[-1:], strict=True)):
        area = latent_height * latent_width * (cell // 2**i) ** 2
        if tile_px is None:  # the block's input, that normalised, and the middle
            num_values.append(area * (2 * wider + width))
        else:  # two tiles: input, middle, shortcut, three maps within the second half, result
            num_values.append(2 * area * (wider + 6 * width) + keys_and_values)
    return max(num_values) * itemsize


class _Grid:
    """Equal tiles over a latent map; the last of a row or column may reach beyond it."""

    def __init__(self, latent_height: int, latent_width: int, tile_cells: int):
        self.latent_height, self.latent_width = latent_height, latent_width
        self.tile_height = _even_share(latent_height, tile_cells)
        self.tile_width = _even_share(latent_width, tile_cells)

    def origins(self) -> list[tuple[int, int]]:
        rows = range(0, self.latent_height, self.tile_height)
        columns = range(0, self.latent_width, self.tile_width)
        return [(row, column) for row in rows for column in columns]

    def spans(self, origin: tuple[int, int], factor: int) -> tuple[range, range]:
        """Rows and columns of a tile at `factor` cells to a latent cell."""
        row, column = (start * factor for start in origin)
        return (
            range(row, row + self.tile_height * factor),
            range(column, column + self.tile_width * factor),
        )


def _even_share(cells: int, largest: int) -> int:
    num_tiles = -(-cells // largest)
    return -(-cells // num_tiles)


def _run(network: nn.Module, x: np.ndarray, vae: VAE, tile_px: int) -> np.ndarray:
    """Walks the steps of a bound encoder or decoder; one feature map in, one out."""
    cell = vae.downsampling
    if tile_px < cell or tile_px % cell:
        raise ValueError(f"tile_px {tile_px} must be a positive multiple of {cell}")
    factor = 1 if network.name == "decoder" else cell // vae.config.patch
    grid = _Grid(x.shape[1] // factor, x.shape[2] // factor, tile_px // cell)
    over_tiles = functools.partial(_over_tiles, grid=grid)
    groups = vae.config.norm_groups
    moments = None
    steps = network.steps()
    for i, bound in enumerate(steps):
        step = bound.unbind()
        if isinstance(bound, ResnetBlock):
            (h,), middle = over_tiles(
                step, "first_half", (x,), moments=moments, halo=(1, 1), groups=groups
            )
            out = x if bound.in_channels == bound.out_channels else None
            (x,), moments = over_tiles(
                step, "second_half", (h, x), moments=middle, halo=(1, 1), groups=groups, out=out
            )
        elif isinstance(bound, AttentionBlock):
            (q, k, v), _ = over_tiles(step, "qkv", (x,), moments=moments)
            everywhere = (jnp.asarray(k), jnp.asarray(v))
            (x,), moments = over_tiles(
                step, "attend", (q, x), constants=everywhere, groups=groups, out=x
            )
        elif isinstance(bound, GroupNorm):
            (x,), _ = over_tiles(step, "__call__", (x,), moments=moments, out=x)
        else:  # a convolution, alone or with a change of resolution
            halo, resampling = (1, 1), 1.0
            if isinstance(bound, Downsample):
                halo, resampling = (0, 1), 0.5
            elif isinstance(bound, Upsample):
                resampling = 2.0
            (x,), moments = over_tiles(
                step,
                "__call__",
                (x,),
                halo=halo,
                resampling=resampling,
                groups=groups if i + 1 < len(steps) else None,
            )
    return x


def _over_tiles(
    step: tuple[nn.Module, Any],
    method: str,
    maps: Sequence[np.ndarray],
    *,
    grid: _Grid,
    constants: tuple[jax.Array, ...] = (),
    moments: Moments | None = None,
    halo: tuple[int, int] = (0, 0),
    resampling: float = 1.0,
    groups: int | None = None,
    out: np.ndarray | None = None,
) -> tuple[list[np.ndarray], Moments | None]:
    """Runs one method of a step over all tiles of some feature maps.

    Args:
        step: A module and its variables.
        method: Takes a tile of each map, then `constants`, then `moments` if there are any and, if
            there is a halo, `inside`.
        halo: Neighbouring cells before and after, on both axes, that the tile of the first map
            brings.
        resampling: Size of the result in terms of the input's.
        groups: Also measure the result's statistics, for the group norm that follows.
        out: the result's place, if it is no new array; may be a map without a halo.

    Returns:
        The resulting maps, and their statistics if `groups` is given.
    """
    module, variables = step
    variables = jax.device_put(variables)  # once, not for every tile
    factor = maps[0].shape[1] // grid.latent_height
    out_factor = int(factor * resampling)
    out_height, out_width = (n * out_factor for n in (grid.latent_height, grid.latent_width))
    outs: list[np.ndarray] | None = None if out is None else [out]
    measured: list[Any] = []

    def collect(rows, columns, results, statistics):
        nonlocal outs
        if outs is None:
            shapes = [(y.shape[0], out_height, out_width, y.shape[3]) for y in results]
            outs = [np.empty(s, y.dtype) for s, y in zip(shapes, results, strict=True)]
        for whole, y in zip(outs, results, strict=True):
            part = whole[:, rows.start : rows.stop, columns.start : columns.stop]
            part[:] = np.asarray(y)[:, : part.shape[1], : part.shape[2]]
        if statistics is not None:
            measured.append(jax.tree.map(np.asarray, statistics))

    # The device works on one tile while the one before is copied to the host.
    in_flight: collections.deque[tuple] = collections.deque()
    for origin in grid.origins():
        spans = grid.spans(origin, factor)
        bordered = [range(s.start - halo[0], s.stop + halo[1]) for s in spans]
        tiles = [_cut(maps[0], *bordered), *(_cut(m, *spans) for m in maps[1:])]
        given: dict[str, Any] = {} if moments is None else {"moments": moments}
        if halo != (0, 0):
            given["inside"] = _inside(bordered, maps[0].shape[1:3])
        out_spans = grid.spans(origin, out_factor)
        counted = _inside(out_spans, (out_height, out_width))
        results = _apply(module, method, groups, variables, (*tiles, *constants), given, counted)
        in_flight.append((*out_spans, *results))
        if len(in_flight) > 1:
            collect(*in_flight.popleft())
    while in_flight:
        collect(*in_flight.popleft())
    assert outs is not None, "there is a tile"
    return outs, _merge(measured) if groups else None


@functools.partial(jax.jit, static_argnames=("module", "method", "groups"))
def _apply(module, method, groups, variables, args, given, counted):
    results = module.apply(variables, *args, **given, method=method)
    results = results if isinstance(results, tuple) else (results,)
    if groups is None:
        return results, None
    weight = counted.astype(jnp.float32)
    return results, (jnp.sum(weight), *group_moments(results[0], groups, weight))


def _cut(whole: np.ndarray, rows: range, columns: range) -> np.ndarray:
    """A copy of some rows and columns; those outside the map are zero."""
    tile = np.zeros((whole.shape[0], len(rows), len(columns), whole.shape[3]), whole.dtype)
    top, left = max(0, -rows.start), max(0, -columns.start)
    part = whole[:, rows.start + top : rows.stop, columns.start + left : columns.stop]
    tile[:, top : top + part.shape[1], left : left + part.shape[2]] = part
    return tile


def _inside(spans: Sequence[range], size: tuple[int, int]) -> np.ndarray:
    """[rows, columns], true for the cells of the spans that a map of this size has."""
    rows, columns = (
        np.array([0 <= i < n for i in span]) for span, n in zip(spans, size, strict=True)
    )
    return rows[:, None] & columns[None, :]


def _merge(measured: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]]) -> Moments:
    """Mean and variance of the union of tiles from (cells, mean, variance) of each."""
    cells, means, variances = (
        np.stack(part).astype(np.float64) for part in zip(*measured, strict=True)
    )
    share = (cells / cells.sum())[:, None, None]
    mean = np.sum(share * means, axis=0)
    variance = np.sum(share * (variances + np.square(means - mean)), axis=0)
    return jnp.asarray(mean, jnp.float32), jnp.asarray(variance, jnp.float32)
