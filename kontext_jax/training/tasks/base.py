"""What the training loop is given to run: an objective, its weights and what feeds it.

The loop knows `Task` alone. A task is made without touching a device, so that a dry run can ask it
everything; weights are read when the loop says where they go.
"""

import dataclasses
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from kontext_jax.models.parameter_sharding import state_shardings
from kontext_jax.objectives.base import Objective
from kontext_jax.objectives.state import TrainState
from kontext_jax.runtime.programs import Executables, Program
from kontext_jax.training.config import TrainConfig
from kontext_jax.types import Params
from kontext_jax.weights.bundle import ModelBundle, Place

Tell = Callable[[str], None]
OpenWeights = Callable[[str], ModelBundle]
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


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

    def sample(self, params: Params, frozen: Any, batch: Any) -> list[np.ndarray]:
        """Columns of a grid of pictures: float32 [B, height, width, 3] each, about [-1, 1]."""


class Task(Protocol):
    """One kind of training.

    Attributes:
      objective: what the loop runs.
      sources: one line for each of its weights: what, and where from.
    """

    objective: Objective
    sources: list[str]

    def load_params(self, place: Place) -> Params | None:
        """The weights to start from, float32; None to draw them by `objective.init`."""

    def start(self, params: Params) -> TrainState:
        """The state before the first step, from given parameters; pure."""

    def frozen_shapes(self) -> Any:
        """Shapes of what `load_frozen` reads."""

    def load_frozen(self, place: Place) -> Any:
        """What the step needs and nobody trains."""

    def data_facts(self) -> dict[str, Any]:
        """What encoded examples on disk must have been made by."""

    def make_feed(self, devices: Devices, null_text: tuple[np.ndarray, np.ndarray] | None) -> Feed:
        """Reads the frozen networks in front of the objective.

        Args:
          null_text: features of the empty prompt, where the examples come encoded.
        """

    def abstract_batch(self, batch_size: int, size: tuple[int, int], num_references: int) -> Any:
        """Shapes of what the feed makes of a batch: targets and references of (width, height)."""

    def peak_flops(self, mesh: Mesh) -> float | None:
        """Operations that all devices together can do in a second; None if unknown."""

    def work(self, batch: Any) -> Work:
        """What a training step on such a batch does."""


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
