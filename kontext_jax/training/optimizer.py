"""Optimizers and learning-rate schedules, as optax transformations with their options checked.

    adamw    m̂ / (sqrt(v̂) + eps) + weight_decay·p, times the rate (torch.optim.AdamW)
    muon     orthogonalised momentum for the hidden matrices of the blocks, adamw for the rest
    rate(n)  learning_rate · min(1, (n + 1)/warmup) · decay((n − warmup)/(num_steps − warmup))

n counts updates; steps that were skipped are not among them.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers, scale_by_muon

from kontext_jax.fields import check_acting, option
from kontext_jax.models.parameter_axes import BLOCK_STACKS, parameter_axes
from kontext_jax.types import Params

Name = Literal["adamw", "muon"]
Schedule = Literal["constant", "linear", "cosine"]
DecayOn = Literal["all", "matrices"]

_NOT_MATRICES = ("bias", "scale")
_NO_MUON = (
    "{name} is {value!r}, but the optimizer is {other}; choose name muon; leave it at {default}"
)


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """How parameters follow their gradients.

    Attributes:
      name: "adamw", or "muon": the hidden matrices of the blocks by Muon, and embeddings,
        modulation, norms, biases and the final layer by AdamW.
      learning_rate: the peak. With Muon it serves both halves, since Muon's updates are scaled to
        the size of AdamW's (0.2·sqrt(max(in, out)), arXiv:2502.16982).
      schedule: course of the rate after the warm-up: "constant", or "linear" or "cosine", down to
        `end_fraction` at num_steps.
      warmup_steps: updates over which the rate rises to the peak in a straight line.
      end_fraction: the rate at num_steps, as a share of the peak.
      b1: decay of AdamW's first moment.
      b2: decay of AdamW's second moment.
      eps: added to AdamW's denominator.
      weight_decay: decoupled, times the rate.
      decay_on: "all" parameters, as torch.optim.AdamW does, or "matrices": all but biases and
        the scales of norms.
      clip_norm: the gradient is scaled down to this global norm; 0: never.
      muon_momentum: decay of Muon's momentum (Nesterov's form).
      muon_steps: Newton-Schulz iterations.
    """

    name: Name = "adamw"
    learning_rate: float = 1e-4
    schedule: Schedule = "constant"
    warmup_steps: int = 0
    end_fraction: float = option(
        0.0,
        acts_with=("schedule", "linear", "cosine"),
        otherwise="{name} is {value!r}, but schedule is constant and ends at the peak; leave it at "
        "{default}",
    )
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.0
    decay_on: DecayOn = option(
        "all",
        acts_with=("weight_decay",),
        otherwise="{name} is {value!r}, but weight_decay is 0; leave it at {default}",
    )
    clip_norm: float = 1.0
    muon_momentum: float = option(0.95, acts_with=("name", "muon"), otherwise=_NO_MUON)
    muon_steps: int = option(5, acts_with=("name", "muon"), otherwise=_NO_MUON)

    def __post_init__(self):
        choices = {"name": Name, "schedule": Schedule, "decay_on": DecayOn}
        for field, literal in choices.items():
            value = getattr(self, field)
            if value not in get_args(literal):
                raise ValueError(
                    f"optimizer.{field} is {value!r}; choose {', '.join(get_args(literal))}"
                )
        limits = {
            "learning_rate": (0, math.inf),
            "warmup_steps": (0, math.inf),
            "end_fraction": (0, 1),
            "weight_decay": (0, math.inf),
            "clip_norm": (0, math.inf),
            "muon_steps": (1, math.inf),
        }
        for field, (low, high) in limits.items():
            value = getattr(self, field)
            if not low <= value <= high:
                allowed = f"at least {low}" if high == math.inf else f"in [{low}, {high}]"
                raise ValueError(f"optimizer.{field} is {value}; it must be {allowed}")
        for field in ("b1", "b2", "muon_momentum"):
            if not 0 <= getattr(self, field) < 1:
                raise ValueError(
                    f"optimizer.{field} is {getattr(self, field)}; it must be in [0, 1)"
                )
        if self.eps <= 0:
            raise ValueError(f"optimizer.eps is {self.eps}; it must be positive")
        check_acting(self, "optimizer")


def make_schedule(config: OptimizerConfig, num_steps: int) -> Callable[[jax.Array], jax.Array]:
    """Updates made so far → learning rate.

    Raises:
      ValueError: if the warm-up is as long as the run.
    """
    if not config.warmup_steps < num_steps:
        raise ValueError(
            f"optimizer.warmup_steps is {config.warmup_steps}, but the run has {num_steps} steps"
        )
    end, warmup = config.end_fraction, config.warmup_steps

    def learning_rate(count):
        count = jnp.asarray(count, jnp.float32)
        factor = jnp.minimum(1.0, (count + 1) / max(1, warmup))
        done = jnp.clip((count - warmup) / (num_steps - warmup), 0.0, 1.0)
        if config.schedule == "linear":
            factor *= 1 - (1 - end) * done
        elif config.schedule == "cosine":
            factor *= end + (1 - end) * 0.5 * (1 + jnp.cos(jnp.pi * done))
        return config.learning_rate * factor

    return learning_rate


def make_optimizer(config: OptimizerConfig, num_steps: int) -> optax.GradientTransformation:
    """Clipping, optimizer, weight decay and schedule in one transformation.

    Its `init` raises ValueError if Muon is asked for and the parameters have no matrix it is for.
    """
    rate = make_schedule(config, num_steps)
    decay_mask = None if config.decay_on == "all" else _is_matrix
    adamw = optax.adamw(
        rate,
        b1=config.b1,
        b2=config.b2,
        eps=config.eps,
        weight_decay=config.weight_decay,
        mask=decay_mask,
    )
    if config.name == "adamw":
        optimizer = adamw
    else:
        muon = optax.chain(
            scale_by_muon(
                ns_steps=config.muon_steps,
                beta=config.muon_momentum,
                weight_dimension_numbers=_muon_dimensions,
            ),
            optax.stateless(_scale_to_adam),
            optax.add_decayed_weights(config.weight_decay),  # matrices all
            optax.scale_by_learning_rate(rate),
        )
        optimizer = optax.partition({"muon": muon, "adamw": adamw}, _muon_labels)
    if config.clip_norm == 0:
        return optimizer
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), optimizer)


def _name(path: tuple) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _is_matrix(params: Params) -> Params:
    """Whether each parameter is decayed when only matrices are."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: _name(path).rsplit("/", 1)[-1] not in _NOT_MATRICES, params
    )


def matrix_axes(path: str) -> MuonDimensionNumbers | None:
    """Input and output axes of a hidden matrix of the blocks; None for all other parameters.

    Heads and their channels are one side of a matrix, as in the published q, k, v and proj.
    """
    axes = parameter_axes(path) if path.split("/")[0] in BLOCK_STACKS else None
    if axes is None or not axes.inputs:
        return None
    first, num_axes = len(axes.stack), len(axes.names)
    split = first + len(axes.inputs)
    return MuonDimensionNumbers(tuple(range(first, split)), tuple(range(split, num_axes)))


def _muon_dimensions(updates: Any) -> Any:
    """Input and output axes of each matrix; `updates` holds no others."""
    return jax.tree_util.tree_map_with_path(lambda path, _: matrix_axes(_name(path)), updates)


def _muon_labels(params: Params) -> Params:
    labels = jax.tree_util.tree_map_with_path(
        lambda path, _: "adamw" if matrix_axes(_name(path)) is None else "muon", params
    )
    if "muon" not in jax.tree.leaves(labels):
        raise ValueError(
            "optimizer.name is muon, but none of the trained parameters is a hidden matrix of the "
            "transformer's blocks; choose adamw"
        )
    return labels


def _scale_to_adam(updates: Any, params: Any) -> Any:
    """Gives an orthogonal update the root mean square 0.2, usual for AdamW (arXiv:2502.16982)."""
    del params

    def scale(path, update):
        dimensions = matrix_axes(_name(path))
        sides = (
            math.prod(update.shape[axis] for axis in axes)
            for axes in (dimensions.reduction_axis, dimensions.output_axis)
        )
        return 0.2 * math.sqrt(max(sides)) * update

    return jax.tree_util.tree_map_with_path(scale, updates)
