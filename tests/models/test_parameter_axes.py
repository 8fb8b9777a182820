"""Axes of parameters: one table for sharding, Muon, LoRA and conversion, and what follows."""

import functools
import hashlib
import json
import math

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

from convert_weights.tables import TABLES
from kontext_jax.models.lora import LoraConfig, init_lora
from kontext_jax.models.mmdit import unstacked
from kontext_jax.models.parameter_axes import COPIED, kernel_axes, parameter_axes
from kontext_jax.models.parameter_sharding import parameter_spec, state_shardings
from kontext_jax.models.presets import CONFIG_CLASSES, PRESETS
from kontext_jax.objectives.state import make_train_state
from kontext_jax.runtime import sharding
from kontext_jax.runtime.sharding import path_name
from kontext_jax.training.optimizer import OptimizerConfig, make_optimizer, matrix_axes
from kontext_jax.weights.bundle import parameter_shapes

MESHES = (
    {"fsdp": 16},
    {"fsdp": 8, "tensor": 8},
    {"data": 2, "context": 2, "tensor": 4},
    {"fsdp": 7},
    {"slices": 2, "fsdp": 3, "tensor": 3},
)


def abstract_mesh(**sizes):
    shape = tuple(sizes.get(axis, 1) for axis in sharding.AXES)
    return AbstractMesh(shape, sharding.AXES, axis_types=(AxisType.Auto,) * len(shape))


def spec_or_refusal(sizes, path, shape) -> str:
    try:
        return str(parameter_spec(abstract_mesh(**sizes), path, shape))
    except ValueError:
        return "refused"


def decisions(kind: str, config) -> list:
    """Every parameter's path, shape, axes, sides for Muon, and place on each of the meshes."""
    shapes = parameter_shapes(kind, config)
    trees = [shapes]
    if kind == "mmdit":
        lora = LoraConfig(rank=16, targets=("all-linear",))
        draw = functools.partial(init_lora, lora, shapes, jax.random.key(0))
        trees += [jax.eval_shape(unstacked, shapes), jax.eval_shape(draw)]
    rows = []
    for tree in trees:
        for path, leaf in jax.tree.leaves_with_path(tree):
            name, axes = path_name(path), parameter_axes(path_name(path))
            sides = matrix_axes(name) if kind == "mmdit" and tree is shapes else None
            specs = [spec_or_refusal(sizes, name, leaf.shape) for sizes in MESHES]
            rows.append((name, leaf.shape, axes and axes.names, sides and tuple(sides), specs))
    return rows


@pytest.mark.parametrize(
    ("kind", "count", "digest"),
    [
        ("mmdit", 8353, "0d3f57fcce2330c9"),
        ("t5", 132, "56f94e4f03ace235"),
        ("clip", 220, "a7cef90c12577d95"),
        ("vae", 2104, "bfbc0396de6fc944"),
    ],
)
def test_decisions_are_those_of_the_separate_tables(kind, count, digest):
    """Digests of the same list from four tables: for sharding, Muon, LoRA, and for lists."""
    rows = [row for preset in PRESETS.values() for row in decisions(kind, getattr(preset, kind))]
    found = hashlib.sha256(json.dumps(rows).encode()).hexdigest()
    assert (len(rows), found[:16]) == (count, digest)


def test_sides_of_kernels_are_those_of_the_published_layers():
    """Conversion and this table agree which axes of ours are a weight's inputs."""
    num_kernels = 0
    for kind in ("mmdit", "t5"):
        for row in TABLES[kind].rows(getattr(PRESETS["kontext-dev"], kind)):
            if row.path.endswith("/kernel"):
                axes, (_, inputs) = kernel_axes(row.path.removesuffix("/kernel")), row.theirs
                inputs = inputs if isinstance(inputs, tuple) else (inputs,)
                assert len(axes.inputs) == len(inputs), row.path
                assert len(axes.inputs + axes.outputs) == len(row.ours), row.path
                assert bool(axes.stack) == (row.layers is not None), row.path
                num_kernels += 1
    assert num_kernels > 30


def test_a_kernel_without_sides_is_refused():
    assert parameter_axes("decoder/conv_in/kernel") == COPIED
    for module in ("decoder/conv_in", "heads/new"):
        with pytest.raises(ValueError, match=rf"{module}/kernel has no inputs .* add a rule"):
            kernel_axes(module)


def elements_per_device(mesh, shapes) -> int:
    places = state_shardings(mesh, shapes)
    sizes = jax.tree.map(lambda x, place: math.prod(place.shard_shape(x.shape)), shapes, places)
    return sum(jax.tree.leaves(sizes))


@pytest.mark.parametrize("kind", CONFIG_CLASSES)
@pytest.mark.parametrize("preset", ["kontext-dev", "tiny"])
def test_every_parameter_of_every_network_has_a_rule(kind, preset):
    shapes = parameter_shapes(kind, getattr(PRESETS[preset], kind))
    for path, leaf in jax.tree.leaves_with_path(shapes):
        axes = parameter_axes(path_name(path))
        assert axes is not None, path_name(path)
        assert len(axes.names) in (0, leaf.ndim), path_name(path)


@pytest.mark.parametrize(("kind", "slack"), [("mmdit", 0.02), ("t5", 0.05)])
def test_large_networks_are_split_over_fsdp_and_tensor(kind, slack):
    shapes = parameter_shapes(kind, getattr(PRESETS["kontext-dev"], kind))
    total = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    for sizes in ({"fsdp": 16}, {"data": 2, "fsdp": 32}, {"fsdp": 64}):
        held = elements_per_device(abstract_mesh(**sizes), shapes)
        assert total / sizes["fsdp"] <= held < (1 + slack) * total / sizes["fsdp"], sizes
    split = elements_per_device(abstract_mesh(fsdp=8, tensor=8), shapes)
    assert split < 1.2 * total / 64  # embeddings of the inputs are not split over tensor


def test_small_frozen_networks_are_copied():
    for kind in ("vae", "clip"):
        shapes = parameter_shapes(kind, getattr(PRESETS["kontext-dev"], kind))
        total = sum(leaf.size for leaf in jax.tree.leaves(shapes))
        assert elements_per_device(abstract_mesh(fsdp=16, tensor=4), shapes) == total


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_moments_and_averages_follow_their_parameter(optimizer):
    mesh = abstract_mesh(fsdp=8, tensor=2)
    shapes = parameter_shapes("mmdit", PRESETS["kontext-dev"].mmdit)
    transform = make_optimizer(OptimizerConfig(name=optimizer), num_steps=10)
    state = jax.eval_shape(
        functools.partial(make_train_state, optimizer=transform, with_ema=True), shapes
    )
    by_path = {
        path_name(path): place.spec
        for path, place in jax.tree.leaves_with_path(state_shardings(mesh, state))
    }
    for path, leaf in jax.tree.leaves_with_path(shapes):
        name, places = path_name(path), set()
        copies = [spec for key, spec in by_path.items() if key.endswith("/" + name)]
        assert len(copies) >= 3, name  # parameter, average, one moment or two
        places = set(copies)
        assert len(places) == 1, (name, places)
        if leaf.size > 2**24:
            assert "fsdp" in str(places), name
    assert by_path["step"] == PartitionSpec()


def test_adapters_are_split_along_the_wide_axis():
    mesh = abstract_mesh(fsdp=8)
    shapes = parameter_shapes("mmdit", PRESETS["kontext-dev"].mmdit)
    adapters = jax.eval_shape(lambda: init_lora(LoraConfig(rank=16), shapes, jax.random.key(0)))
    total = sum(leaf.size for leaf in jax.tree.leaves(adapters))
    assert elements_per_device(mesh, adapters) < 0.2 * total


def test_an_axis_that_does_not_divide():
    mesh = abstract_mesh(fsdp=7)
    spec = functools.partial(parameter_spec, mesh, "single_blocks/mlp_in/kernel")
    assert spec((2, 32, 128)) == PartitionSpec(None, None, None)  # small: copied
    assert spec((2, 1024, 7 * 512)) == PartitionSpec(None, None, "fsdp")
    with pytest.raises(
        ValueError, match=r"mlp_in/kernel .* no free axis .* fsdp = 7; change --con"
    ):
        spec((2, 1024, 4096))


def test_a_large_unknown_parameter_is_refused():
    mesh = abstract_mesh(fsdp=8)
    assert parameter_spec(mesh, "heads/new", (8, 8)) == PartitionSpec()
    with pytest.raises(ValueError, match=r"heads/new .* matches no rule of PARAMETER_AXES"):
        parameter_spec(mesh, "heads/new", (1024, 1024))
    with pytest.raises(ValueError, match=r"matches the rule \('layers', 'embed', 'mlp'\)"):
        parameter_spec(mesh, "single_blocks/mlp_in/kernel", (1024, 1024))


def test_optax_moments_are_found_by_path():
    params = {"img_in": {"kernel": jax.ShapeDtypeStruct((64, 2**15), jnp.float32)}}
    state = jax.eval_shape(optax.adam(0.1).init, params)
    places = state_shardings(abstract_mesh(fsdp=4), state)
    assert places[0].mu["img_in"]["kernel"].spec == PartitionSpec(None, "fsdp")
    assert places[0].count.spec == PartitionSpec()
