"""The network that a task of the transformer trains: the whole of it, or adapters beside it."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kontext_jax.batches import Conditioning
from kontext_jax.models import conditioning
from kontext_jax.models.flops import Flops
from kontext_jax.models.lora import LoraConfig, init_lora, scaled
from kontext_jax.models.mmdit import MMDiT, init_params, make_velocity_fn
from kontext_jax.objectives.flow_matching import Predict
from kontext_jax.training.tasks.base import NOTHING_FROZEN, Frozen
from kontext_jax.types import Params, VelocityFn
from kontext_jax.weights.bundle import Component, Place, parameter_shapes


class Student(NamedTuple):
    """What is trained, as functions of its parameters.

    Attributes:
      init: key → fresh float32 parameters.
      velocity_fn: (params, frozen, conditioning) → the network as a function of tokens and time.
      load: place → float32 parameters to start from; None if `init` draws them.
      frozen: the student's own frozen weights.
      training_flops: operations of a forward pass → those of forward and backward pass.
    """

    init: Callable[[jax.Array], Params]
    velocity_fn: Callable[[Params, Any, Conditioning], VelocityFn]
    load: Callable[[Place], Params | None]
    frozen: Frozen
    training_flops: Callable[[Flops], float]


def whole(model: MMDiT, start: Component | None) -> Student:
    """Trains every parameter of the transformer.

    Args:
      start: weights to start from; None draws them.
    """

    def load(place: Place) -> Params | None:
        return None if start is None else start.load(dtype=jnp.float32, device=place)

    return Student(
        init=lambda key: init_params(model, key),
        velocity_fn=lambda params, frozen, cond: make_velocity_fn(model, params, cond),
        load=load,
        frozen=NOTHING_FROZEN,
        training_flops=lambda flops: flops.training(),
    )


def adapted(model: MMDiT, base: Component, config: LoraConfig) -> Student:
    """Trains low-rank adapters beside a frozen transformer, `frozen["mmdit"]`.

    Args:
      base: the frozen transformer, kept in the model's compute dtype.
    """

    def base_shapes() -> Params:
        return parameter_shapes("mmdit", model.config)

    def frozen_shapes() -> dict[str, Params]:
        cast = lambda x: jax.ShapeDtypeStruct(x.shape, model.dtype)  # noqa: E731
        return {"mmdit": jax.tree.map(cast, base_shapes())}

    def velocity_fn(params: Params, frozen: Any, cond: Conditioning) -> VelocityFn:
        return make_velocity_fn(model, frozen["mmdit"], cond, scaled(params, config.alpha))

    return Student(
        init=lambda key: init_lora(config, base_shapes(), key),
        velocity_fn=velocity_fn,
        load=lambda place: None,
        frozen=Frozen(
            shapes=frozen_shapes,
            load=lambda place: {"mmdit": base.load(dtype=model.dtype, device=place)},
        ),
        training_flops=lambda flops: flops.training(trains_kernels=False),
    )


def predict_by(student: Student) -> Predict:
    """The student as objectives of the transformer ask it: see `Predict`."""

    def predict(params, frozen, x_t, t, batch, guidance):
        cond = conditioning.of_batch(batch, guidance)
        return student.velocity_fn(params, frozen, cond)(x_t, t, None)

    return predict
