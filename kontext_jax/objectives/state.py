"""Everything a training run changes, in one pytree: what a checkpoint of a run holds."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from kontext_jax.types import Params


class TrainState(flax.struct.PyTreeNode):
    """The state between two steps. Random numbers need no state: they follow from key and step."""

    step: jax.Array  # int32 []; steps taken, skipped ones included
    params: Params  # float32: the master copy
    opt_state: Any
    ema_params: Params | None  # float32; None: no average is kept
    skipped: jax.Array  # int32 []; steps left out for a loss or gradient that was not finite
    skipped_in_a_row: jax.Array  # int32 []
    extra: Any = None  # what else an objective trains


def make_train_state(
    params: Params, optimizer: optax.GradientTransformation, *, with_ema: bool, extra: Any = None
) -> TrainState:
    """The state before the first step. The average begins as a copy of the parameters.

    Raises:
      TypeError: if a parameter is not float32; every one is named.
    """
    wrong = [
        f"{jax.tree_util.keystr(path, simple=True, separator='/')}: {leaf.dtype}"
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
        if leaf.dtype != jnp.float32
    ]
    if wrong:
        raise TypeError(
            "the trained parameters must be float32, whatever the compute dtype; cast "
            + ", ".join(sorted(wrong))
        )
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=optimizer.init(params),
        # Buffers of its own: the step donates both.
        ema_params=jax.tree.map(lambda p: jnp.array(p, copy=True), params) if with_ema else None,
        skipped=jnp.zeros((), jnp.int32),
        skipped_in_a_row=jnp.zeros((), jnp.int32),
        extra=extra,
    )
