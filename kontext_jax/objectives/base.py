"""What the training loop runs: an `Objective`, and the gradient step that objectives share.

    step_key = fold_in(key of the run, step)
    gradient = mean over all samples of the batch, micro-batch by micro-batch, float32
    ema      = d·ema + (1 − d)·params,   d = min(ema_decay, (1 + n)/(10 + n)),   n updates before

Random numbers are drawn from (step_key, use, index of the sample in the global batch), so neither
the number of devices nor that of micro-batches changes what a sample gets.

Metrics are flat: name → float32 scalar. A pair `NAME/sum`, `NAME/count` is a mean over the samples
that a metric applies to, possibly none; it stays a pair until `mean_metrics` divides, so that steps
and batches combine by what they counted. Any other name is averaged as it is.
"""

import zlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from kontext_jax.objectives.state import TrainState
from kontext_jax.types import Array, Bool, Float, Int, Key, Params, RandomKey

Metrics = dict[str, jax.Array]

LossFn = Callable[[Params, Any, Any, jax.Array, jax.Array], tuple[jax.Array, Metrics]]
"""`loss_fn(params, frozen, batch, step_key, sample_index [b]) -> (loss, metrics)`.

`loss` is the mean over the samples of `batch`, which may be a micro-batch; `sample_index` says
where in the global batch they stand.
"""

GradientFn = Callable[[Any, Any, Any, jax.Array, jax.Array], tuple[tuple[jax.Array, Metrics], Any]]
"""What `jax.value_and_grad(loss_fn, has_aux=True)` is: → ((loss, metrics), gradient)."""


class Objective(NamedTuple):
    """What is trained and how, without the loop knowing which it is.

    `frozen` is a pytree of whatever the loss needs and nobody trains: a teacher, the base of LoRA;
    {} if there is nothing.
    """

    init: Callable[[jax.Array], TrainState]  # key → state; pure, to be jitted with out_shardings
    step: Callable[[TrainState, Any, Any, jax.Array], tuple[TrainState, Metrics]]
    # (state, frozen, batch, key of the run) → (state, metrics); pure, to be jitted donating state
    evaluate: Callable[[Params, Any, Any, jax.Array], Metrics]  # (params, frozen, batch, key)


def num_samples(batch: Any) -> int:
    """Samples of a batch: the length of the first axis that its fields share.

    Raises:
      ValueError: if fields differ in it.
    """
    lengths = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(batch):
        if not _is_shared(batch, path):
            lengths[jax.tree_util.keystr(path)] = leaf.shape[0]
    if len(set(lengths.values())) != 1:
        raise ValueError(f"the fields of a batch hold different numbers of samples: {lengths}")
    return next(iter(lengths.values()))


def _is_shared(batch: Any, path: tuple) -> bool:
    return getattr(path[0], "name", None) in getattr(batch, "SHARED", ()) if path else False


def micro_batch(batch: Any, index: Int[Array, ""] | int, count: int) -> Any:
    """The samples index, index + count, index + 2·count, … of a batch.

    Strided, so that each device, holding a run of neighbouring samples, has its share of every
    micro-batch and none are moved.
    """

    def take(path, leaf):
        if _is_shared(batch, path):
            return leaf
        parts = leaf.reshape(leaf.shape[0] // count, count, *leaf.shape[1:])
        return lax.dynamic_index_in_dim(parts, index, axis=1, keepdims=False)

    return jax.tree_util.tree_map_with_path(take, batch)


def use_key(key: RandomKey, use: str) -> RandomKey:
    """The key of one use of randomness; another use, added or removed, does not change it."""
    return jax.random.fold_in(key, np.uint32(zlib.crc32(use.encode())))


def sample_keys(key: RandomKey, use: str, sample_index: Int[Array, " B"]) -> Key[Array, " B"]:
    """One key per sample for one use."""
    return jax.vmap(jax.random.fold_in, (None, 0))(use_key(key, use), sample_index)


def make_gradient_step(
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    *,
    ema_decay: float = 0.0,
    accumulate_steps: int = 1,
    learning_rate: Callable[[jax.Array], jax.Array] | None = None,
) -> Callable[[TrainState, Any, Any, jax.Array], tuple[TrainState, Metrics]]:
    """One step of the optimizer: (state, frozen, batch, key of the run) → (state, metrics).

    A step whose loss or gradient is not finite changes neither parameters nor optimizer nor
    average; it is counted, and the step number goes on.

    Metrics are those of `loss_fn` and `loss`, `grad_norm` (before any clipping), `update_norm`,
    `param_norm`, `skipped` (0 or 1), `skipped_total`, `skipped_in_a_row`, and `learning_rate`.

    Args:
      optimizer: clips, if anything does.
      ema_decay: decay of the parameters' average, see this module's head; 0: no average.
      accumulate_steps: micro-batches of a batch, one after the other. Each must divide among the
        devices.
      learning_rate: updates made so far → rate, for the log alone.

    Raises:
      ValueError: if ema_decay is not in [0, 1) or accumulate_steps is below 1; when traced, if the
        batch does not divide into the micro-batches, or the state's average does not fit ema_decay.
    """
    check_step_options(ema_decay, accumulate_steps)
    gradient_fn = jax.value_and_grad(loss_fn, has_aux=True)

    def step(state, frozen, batch, key):
        step_key = jax.random.fold_in(key, state.step)
        loss, metrics, grads = mean_gradient(
            gradient_fn, state.params, frozen, batch, step_key, accumulate_steps
        )
        is_finite = jnp.isfinite(loss) & jnp.isfinite(optax.tree.norm(grads))
        new_state, norms = advance(state, grads, is_finite, optimizer, ema_decay=ema_decay)
        metrics = metrics | {"loss": loss} | norms
        if learning_rate is not None:
            metrics["learning_rate"] = learning_rate(num_updates(state))
        return new_state, {name: jnp.float32(value) for name, value in metrics.items()}

    return step


def check_step_options(ema_decay: float, accumulate_steps: int) -> None:
    """Raises ValueError if one of them means nothing."""
    if not 0 <= ema_decay < 1:
        raise ValueError(f"ema_decay is {ema_decay}; it must be in [0, 1), 0 for no average")
    if accumulate_steps < 1:
        raise ValueError(f"accumulate_steps is {accumulate_steps}; it must be at least 1")


def num_updates(state: TrainState) -> Float[Array, ""]:
    """How often the parameters were changed, float32."""
    return (state.step - state.skipped).astype(jnp.float32)


def mean_gradient(
    gradient_fn: GradientFn,
    params: Any,
    frozen: Any,
    batch: Any,
    step_key: RandomKey,
    accumulate_steps: int = 1,
) -> tuple[Float[Array, ""], Metrics, Any]:
    """Loss, metrics and gradient of a batch, one micro-batch after the other.

    Raises:
      ValueError: if the batch does not divide into the micro-batches.
    """
    samples = num_samples(batch)
    if samples % accumulate_steps:
        raise ValueError(
            f"a batch of {samples} samples does not divide into {accumulate_steps} "
            "micro-batches; change batch_size or accumulate_steps"
        )
    sample_index = jnp.arange(samples, dtype=jnp.int32)
    if accumulate_steps == 1:
        (loss, metrics), grads = gradient_fn(params, frozen, batch, step_key, sample_index)
        return loss, metrics, grads

    def add_micro_batch(total, index):
        part = micro_batch(batch, index, accumulate_steps)
        positions = micro_batch(sample_index, index, accumulate_steps)
        (loss, metrics), grads = gradient_fn(params, frozen, part, step_key, positions)
        return jax.tree.map(jnp.add, total, grads), (loss, metrics)

    zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params)
    total, (losses, metrics) = lax.scan(add_micro_batch, zeros, jnp.arange(accumulate_steps))
    grads = jax.tree.map(lambda g: g / accumulate_steps, total)
    return jnp.mean(losses), _combine(metrics), grads


def advance(
    state: TrainState,
    grads: Any,
    is_finite: Bool[Array, ""],
    optimizer: optax.GradientTransformation,
    *,
    ema_decay: float = 0.0,
) -> tuple[TrainState, Metrics]:
    """The state after one update, and norms; a state not `is_finite` only counts as skipped.

    Raises:
      ValueError: if the state's average does not fit ema_decay.
    """
    if (state.ema_params is None) != (ema_decay == 0):
        raise ValueError(
            f"ema_decay is {ema_decay}, but the state "
            f"{'has no' if state.ema_params is None else 'has an'} average of the parameters"
        )
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)

    def keep_if_skipped(new, old):
        return jax.tree.map(lambda n, o: jnp.where(is_finite, n, o), new, old)

    params = keep_if_skipped(optax.apply_updates(state.params, updates), state.params)
    ema_params = state.ema_params
    if ema_params is not None:
        count = num_updates(state)
        decay = jnp.minimum(ema_decay, (1 + count) / (10 + count))
        average = jax.tree.map(lambda e, p: decay * e + (1 - decay) * p, ema_params, params)
        ema_params = keep_if_skipped(average, ema_params)
    is_skipped = (~is_finite).astype(jnp.int32)
    new_state = state.replace(
        step=state.step + 1,
        params=params,
        opt_state=keep_if_skipped(opt_state, state.opt_state),
        ema_params=ema_params,
        skipped=state.skipped + is_skipped,
        skipped_in_a_row=jnp.where(is_finite, 0, state.skipped_in_a_row + 1),
    )
    return new_state, {
        "grad_norm": optax.tree.norm(grads),
        "update_norm": jnp.where(is_finite, optax.tree.norm(updates), 0),
        "param_norm": optax.tree.norm(params),
        "skipped": is_skipped,
        "skipped_total": new_state.skipped,
        "skipped_in_a_row": new_state.skipped_in_a_row,
    }


def _is_additive(name: str) -> bool:
    return name.endswith(("/sum", "/count"))


def _combine(stacked: Metrics) -> Metrics:
    """Metrics of all micro-batches, stacked on axis 0, as those of the batch."""
    return {
        name: jnp.sum(values, axis=0) if _is_additive(name) else jnp.mean(values, axis=0)
        for name, values in stacked.items()
    }


def mean_metrics(rows: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """One number per name over several steps or batches, on the host.

    `NAME/sum` and `NAME/count` become NAME, the sum of sums over the sum of counts; a NAME that
    counted nothing is left out. Any other name is averaged over the rows that have it. A skipped
    step, whose numbers are not finite, is heard only under names that begin with "skipped".
    """
    columns: dict[str, list[float]] = {}
    for row in rows:
        is_skipped = bool(row.get("skipped", False))
        for name, value in row.items():
            if not is_skipped or name.startswith("skipped"):
                columns.setdefault(name, []).append(float(value))
    means = {}
    for name, values in columns.items():
        if name.endswith("/count"):
            continue
        if name.endswith("/sum"):
            name = name.removesuffix("/sum")
            count = sum(columns[f"{name}/count"])
            if count:
                means[name] = sum(values) / count
        else:
            means[name] = sum(values) / len(values)
    return means
