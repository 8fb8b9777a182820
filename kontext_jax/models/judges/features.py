"""Hidden states of a frozen transformer on target tokens, as what a discriminator sees (LADD).

    F_k = LN(target tokens after block k)          [B, L, D], no affine, k in ascending order

(arXiv:2403.12015.) Text and reference tokens take part in attention and are not among the features.
Blocks are counted from 0 over the double ones and on over the single ones. Nothing after the last
chosen block is computed, nor are its weights read.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from kontext_jax.batches import Conditioning
from kontext_jax.models.judges.tapped import TappedMMDiT
from kontext_jax.models.layers import NORM_EPS
from kontext_jax.models.mmdit import MMDiT
from kontext_jax.types import Params

FeatureFn = Callable[[jax.Array, jax.Array], tuple[jax.Array, ...]]
"""`feature_fn(x_t [B, L, C], t [B]) -> K of [B, L, D]`, differentiable by x_t."""


def evenly_spaced(num_blocks: int, count: int) -> tuple[int, ...]:
    """Numbers of `count` of the blocks, the last among them; all where there are no more."""
    count = min(count, num_blocks)
    return tuple((i + 1) * num_blocks // count - 1 for i in range(count))


def make_feature_fn(
    model: MMDiT, params: Params, cond: Conditioning, blocks: tuple[int, ...]
) -> FeatureFn:
    """The features after `blocks` as a function of target tokens and time.

    Args:
      model: its `remat` says what is kept for the gradient by x_t.
    """
    model, params = _up_to(model, params, blocks[-1])
    model = TappedMMDiT(
        model.config,
        model.dtype,
        model.attention_backend,
        model.remat,
        block_form=model.block_form,
        taps=tuple(blocks),
    )

    def feature_fn(x_t, t):
        variables = {"params": params}
        modulation = model.apply(variables, t, cond.guidance, cond.vec, method="modulation")
        img = x_t
        if cond.ctx is not None:
            img = jnp.concatenate([x_t, cond.ctx.astype(x_t.dtype)], axis=1)
        args = img, cond.txt, cond.pe, modulation, x_t.shape[1]
        hidden = model.apply(variables, *args, method="hidden_states")
        return tuple(map(_normed, hidden))

    return feature_fn


def _up_to(model: MMDiT, params: Params, last: int) -> tuple[MMDiT, Params]:
    """The model and its parameters without what comes after the block `last`."""
    config = model.config
    depth = min(config.depth, last + 1)
    # A model without single blocks is none; where no tap is among them they do not run.
    num_single = max(1, min(config.depth_single_blocks, last + 1 - config.depth))
    lengths = {"double": depth, "single": num_single}
    params = {
        name: _first_layers(tree, lengths[name.split("_")[0]])
        if name.endswith(("_blocks", "_mod")) and name != "final_mod"
        else tree
        for name, tree in params.items()
    }
    config = dataclasses.replace(config, depth=depth, depth_single_blocks=num_single)
    return model.clone(config=config), params


def _first_layers(params: Params, count: int) -> Params:
    """Of parameters stacked on axis 0, or of a list of layers."""
    if "0" in params:
        return {str(i): params[str(i)] for i in range(count)}
    return jax.tree.map(lambda leaf: leaf[:count], params)


def _normed(x: jax.Array) -> jax.Array:
    y = x.astype(jnp.float32)
    y = y - jnp.mean(y, axis=-1, keepdims=True)
    return (y * lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + NORM_EPS)).astype(x.dtype)
