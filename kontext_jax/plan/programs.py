"""What would run, as programs to compile: from configs and requests to functions and shapes.

The functions are those of the training loop and of the sampling stages themselves. No weights are
read: shapes follow from the preset.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from kontext_jax.data.buckets import bucket_sizes
from kontext_jax.models import conditioning
from kontext_jax.models.parameter_sharding import state_shardings
from kontext_jax.models.presets import PRESETS, Preset
from kontext_jax.ops.attention import backend_for
from kontext_jax.plan.targets import Target
from kontext_jax.runtime import sharding
from kontext_jax.runtime.compiler_options import Purpose
from kontext_jax.runtime.programs import Program
from kontext_jax.runtime.sharding import tree_bytes
from kontext_jax.training.config import DISTILLATIONS, TrainConfig
from kontext_jax.training.programs import step_program
from kontext_jax.training.tasks.base import abstract_state, check_batch_size
from kontext_jax.training.tasks.table import make_task
from kontext_jax.types import DTYPES
from kontext_jax.weights.bundle import parameter_shapes
from kontext_jax.weights.untrained import UNTRAINED, untrained_bundle


@dataclasses.dataclass(frozen=True)
class Planned:
    """A program to compile, and what is known of it before.

    Attributes:
      title: name of the program, for people.
      program: the program, whose arguments are shapes with shardings.
      mesh: devices that it runs on; a mesh of one device where one does all.
      purpose: names the compiler's options.
      held: name → bytes of one device that are held throughout, arguments of the program or not.
      beside: names in `held` that are no arguments: other programs' weights.
      flops: operations of the model itself, on all devices together; None: they are not counted.
      images: number of images that one run makes or learns from, on all devices together.
    """

    title: str
    program: Program
    mesh: Mesh
    purpose: Purpose
    held: Mapping[str, float] = dataclasses.field(default_factory=dict)
    beside: tuple[str, ...] = ()
    flops: float | None = None
    images: int = 1


def without_weights(config: TrainConfig, platform: str) -> TrainConfig:
    """The config with nothing to read from disk, and attention named for the platform."""
    backend = config.attention_backend
    if backend == "auto":
        backend = backend_for(platform, config.model.mmdit.head_dim, DTYPES[config.dtype])
    trains_mmdit = config.objective != "autoencoder"
    begins_with_some = config.train == "lora" or config.objective in DISTILLATIONS
    return dataclasses.replace(
        config,
        weights=UNTRAINED if begins_with_some else "",
        teacher="",
        encoders=UNTRAINED if trains_mmdit else "",
        autoencoder_weights="",
        attention_backend=backend,
    )


def default_inputs(config: TrainConfig) -> tuple[tuple[int, int], int]:
    """(size, number of references) of the config's largest examples: (width, height), 0 or 1."""
    sizes = bucket_sizes(config.data.resolution, config.data.buckets)
    square = (config.data.resolution,) * 2
    size = square if square in sizes else max(sizes, key=math.prod)
    has_references = config.data.fraction_with_references > 0
    return size, int(has_references and config.objective != "autoencoder")


def training_step(
    config: TrainConfig, target: Target, size: tuple[int, int], num_references: int
) -> Planned:
    """The step of `train.py` with this config, on the target's devices.

    Raises:
      ValueError: the mesh or the batch does not divide among the devices.
    """
    mesh = sharding.make_mesh(config.mesh, target.devices)
    check_batch_size(config, sharding.num_batch_shards(mesh))
    ready = without_weights(config, target.chip.platform)
    preset = config.preset
    if config.objective == "guidance_distillation":
        preset = _unguided(preset)  # what it starts from, and its teacher
    task = make_task(ready, lambda path: untrained_bundle(preset))
    state = abstract_state(task, mesh)
    frozen = _placed(mesh, task.frozen_shapes(), state_shardings)
    batch = _placed(
        mesh,
        task.abstract_batch(config.batch_size, size, num_references),
        sharding.batch_shardings,
    )
    everywhere = NamedSharding(mesh, PartitionSpec())
    key = jax.eval_shape(lambda: jax.random.key(0))
    key = jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=everywhere)
    held = {
        "parameters": tree_bytes(state.params),
        "optimizer": tree_bytes(state.opt_state),
        "average of parameters": tree_bytes(state.ema_params),
        "other trained": tree_bytes(state.extra),
        "frozen": tree_bytes(frozen),
        "batch": tree_bytes(batch),
    }
    if config.objective != "autoencoder" and not config.data.cache:
        held["encoders"] = _encoder_bytes(config, mesh)
    work = task.work(batch)
    width, height = size
    references = f" + {num_references} reference(s)" if num_references else ""
    parts = f" in {config.accumulate_steps} parts" if config.accumulate_steps > 1 else ""
    return Planned(
        title=f"training step, {config.batch_size} × {width}×{height}{references}{parts}, "
        f"{work.tokens // work.images} tokens, remat {config.remat}",
        program=step_program(task, state, frozen, batch, key, mesh, config.dtype),
        mesh=mesh,
        purpose="train",
        held={name: size for name, size in held.items() if size},
        beside=("encoders",),
        flops=work.flops,
        images=work.images,
    )


def _unguided(name: str) -> str:
    """The preset whose transformer is that of preset `name` but for the input for guidance.

    Raises:
      ValueError: there is none.
    """
    wanted = dataclasses.replace(PRESETS[name].mmdit, guidance_embed=False)
    for other in PRESETS.values():
        if other.mmdit == wanted and other.takes_references == PRESETS[name].takes_references:
            return other.name
    raise ValueError(f"no preset is {name} without its input for guidance")


def _encoder_bytes(config: TrainConfig, mesh: Mesh) -> float:
    """Of the frozen encoders on one device, where the examples come as pictures and prompts."""
    preset, dtype = config.model, DTYPES[config.dtype]
    stored = {kind: dtype for kind in conditioning.ENCODER_KINDS} | {"vae": jnp.float32}
    return tree_bytes(
        {
            kind: _placed(mesh, network_shapes(preset, kind, dtype), state_shardings)
            for kind, dtype in stored.items()
        }
    )


def network_shapes(preset: Preset, kind: str, dtype: Any) -> Any:
    """Shapes of a network's parameters, stored in `dtype`."""
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, dtype),
        parameter_shapes(kind, getattr(preset, kind)),
    )


def _placed(mesh: Mesh, tree: Any, shardings_of: Callable) -> Any:
    return jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
        tree,
        shardings_of(mesh, tree),
    )
