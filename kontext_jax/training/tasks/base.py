"""What the training loop is given to run: an objective, its weights and what feeds it.

The loop knows `Task` alone. A task is made without touching a device, so that a dry run can ask it
everything; weights are read when the loop says where they go.
"""

import dataclasses
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from kontext_jax.models.parameter_sharding import state_shardings
from kontext_jax.objectives.base import Objective
from kontext_jax.objectives.state import TrainState
from kontext_jax.runtime.chips import peak_flops
from kontext_jax.runtime.programs import Executables, Program
from kontext_jax.training.config import TrainConfig
from kontext_jax.types import Float, Params
from kontext_jax.weights.bundle import OpenWeights, Place

NullText = tuple[np.ndarray, np.ndarray]
"""Features of the empty prompt: txt [T, D] and vec [D]."""


Pictures = list[Float[np.ndarray, "B height width 3"]]
"""Columns of a grid of pictures, float32, about [-1, 1]; sizes may differ between columns."""


class Work(NamedTuple):
    """What one step does, on all devices together."""

    images: int
    tokens: int
    flops: float | None  # of the model's own products; None: not counted


@dataclasses.dataclass(frozen=True)
class Devices:
    """Where a task computes, and the programs compiled for it.

    Attributes:
      place: path and shape of a parameter → its sharding.
      precision: precision of float32 products, see `runtime.programs.precision_of`.
    """

    mesh: Mesh
    place: Place
    programs: Executables
    precision: str | None

    @property
    def everywhere(self) -> NamedSharding:
        return NamedSharding(self.mesh, PartitionSpec())

    def run(
        self, key: Hashable, make: Callable[[], Callable], *args: Any, out_shardings: Any
    ) -> Any:
        """Results of `make()`, whose program is compiled at the first call.

        Args:
          key, make, out_shardings: see `runtime.programs.Program`.
        """
        program = Program(key, make, args, out_shardings, precision=self.precision, mesh=self.mesh)
        return self.programs.get(program)(*args)


class Feed(Protocol):
    """Makes of a host batch what the objective's step takes, and pictures of what it learnt."""

    def __call__(self, batch: Any) -> Any: ...

    def sample(self, params: Params, frozen: Any, batch: Any) -> Pictures:
        """Columns of a grid of pictures of what the parameters make of a held-out batch."""
        ...


class Frozen(NamedTuple):
    """Weights that the step needs and nobody trains.

    Attributes:
      shapes: () → shapes of what `load` gives.
      load: place → the weights, each leaf straight to its place.
    """

    shapes: Callable[[], Any]
    load: Callable[[Place], Any]


NOTHING_FROZEN = Frozen(shapes=dict, load=lambda place: {})


def peak_of_mesh(mesh: Mesh) -> float | None:
    """Operations that all devices together can do in a second; None if unknown."""
    peak = peak_flops(mesh.devices.flat[0].device_kind)
    return None if peak is None else peak * mesh.size


class Task(NamedTuple):
    """One kind of training, as functions.

    Attributes:
      objective: what the loop runs.
      sources: one line for each of its weights: what they are, and where they come from.
      load_params: place → the weights to start from, float32; None if `objective.init` draws them.
      start: parameters → the state before the first step; pure.
      frozen_shapes: () → shapes of what `load_frozen` gives.
      load_frozen: place → the weights that the step needs and nobody trains.
      data_facts: () → what encoded examples on disk must have been made by.
      make_feed: (devices, features of the empty prompt, or None where examples come as pictures) →
        what feeds the step; reads the frozen networks in front of the objective.
      abstract_batch: (batch size, (width, height) of the target and of each reference, number of
        references) → shapes of what the feed makes of a batch.
      peak_flops: mesh → operations a second that `work` is measured against; None if unknown.
      work: batch → what a training step on it does.
    """

    objective: Objective
    sources: tuple[str, ...]
    load_params: Callable[[Place], Params | None]
    start: Callable[[Params], TrainState]
    frozen_shapes: Callable[[], Any]
    load_frozen: Callable[[Place], Any]
    data_facts: Callable[[], dict[str, Any]]
    make_feed: Callable[[Devices, NullText | None], Feed]
    abstract_batch: Callable[[int, tuple[int, int], int], Any]
    peak_flops: Callable[[Mesh], float | None]
    work: Callable[[Any], Work]


MakeTask = Callable[[TrainConfig, OpenWeights], Task]
"""Config and what opens weights → the task; nothing is read but headers of weights."""


def check_batch_size(config: TrainConfig, num_shards: int) -> None:
    """Raises ValueError if batches or their parts do not divide among the devices."""
    part = config.batch_size // config.accumulate_steps
    if part % num_shards:
        raise ValueError(
            f"batch_size {config.batch_size} in {config.accumulate_steps} part(s) of {part} does "
            f"not divide among {num_shards} groups of devices (mesh slices × data × fsdp); change "
            "--config.batch_size, --config.accumulate_steps or --config.mesh"
        )
    if (held_out := config.eval.batch_size) % num_shards:
        raise ValueError(
            f"eval.batch_size {held_out} does not divide among {num_shards} groups of devices"
        )


def abstract_state(task: Task, mesh: Mesh) -> Any:
    """Shapes and shardings of the training state."""
    shapes = jax.eval_shape(task.objective.init, jax.random.key(0))
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        shapes,
        state_shardings(mesh, shapes),
    )
