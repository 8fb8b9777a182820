"""Where arrays lie on a mesh, and that a mesh changes nothing but that."""

import collections
import importlib.util
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

from kontext_jax.batches import TokenBatch
from kontext_jax.runtime import sharding
from kontext_jax.runtime.sharding import MeshConfig
from kontext_jax.training import config_tree
from kontext_jax.training.checkpoints import config_difference

ROOT = Path(__file__).parents[2]


def abstract_mesh(**sizes):
    shape = tuple(sizes.get(axis, 1) for axis in sharding.AXES)
    return AbstractMesh(shape, sharding.AXES, axis_types=(AxisType.Auto,) * len(shape))


@pytest.mark.parametrize(
    ("sizes", "devices", "shape"),
    [
        ({}, 8, (1, 1, 8, 1, 1)),
        ({"data": -1, "fsdp": 2, "tensor": 2}, 8, (1, 2, 2, 1, 2)),
        ({"slices": 2, "data": 2, "context": 2}, 16, (2, 2, 2, 2, 1)),
    ],
)
def test_the_rest_of_the_devices_is_filled_in(sizes, devices, shape):
    assert sharding.mesh_shape(MeshConfig(**sizes), devices) == shape


def test_a_mesh_that_does_not_fit_says_so():
    with pytest.raises(
        ValueError, match=r"fsdp 3 × context 1 × tensor 1 does not fit 8 devices; change --conf"
    ):
        sharding.mesh_shape(MeshConfig(fsdp=3), 8)
    with pytest.raises(ValueError, match="only one mesh size may be -1"):
        MeshConfig(data=-1)
    with pytest.raises(ValueError, match="must be positive"):
        MeshConfig(tensor=0)


def test_runs_from_before_an_axis_existed_go_on():
    old = {"slices": 1, "data": 2, "fsdp": -1, "tensor": 1}
    config = config_tree.from_dict(MeshConfig, old)
    assert config == MeshConfig(data=2)
    now = {"mesh": config_tree.to_dict(config)}
    assert config_difference({"mesh": old}, now, free=["mesh.*"]) == []


def test_tpu_slices_must_be_named():
    class Device:
        def __init__(self, index):
            self.slice_index = index // 4

    with pytest.raises(ValueError, match=r"2 TPU slices, but mesh.slices is 1; set --config.mesh"):
        sharding.make_mesh(MeshConfig(), [Device(i) for i in range(8)])


def test_a_batch_is_split_over_all_axes_but_context_and_tensor():
    shape = lambda *s: jax.ShapeDtypeStruct(s, jnp.float32)  # noqa: E731
    batch = TokenBatch(
        x0=shape(16, 4, 8), ctx=None, txt=shape(16, 3, 8), vec=shape(16, 8),
        null_txt=shape(3, 8), null_vec=shape(8), pe=shape(2, 7, 4),
    )  # fmt: skip
    mesh = abstract_mesh(slices=2, data=2, fsdp=2, context=2, tensor=2)
    places = sharding.batch_shardings(mesh, batch)
    split = PartitionSpec(("slices", "data", "fsdp"))
    assert {p.spec for p in (places.x0, places.txt, places.vec)} == {split}
    assert {p.spec for p in (places.null_txt, places.null_vec, places.pe)} == {PartitionSpec()}
    with pytest.raises(
        ValueError, match=r"x0: a global batch of 16 .* = 32; change --config.batch"
    ):
        sharding.batch_shardings(abstract_mesh(fsdp=32), batch)


def test_one_device_holds_the_whole_batch():
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    assert sharding.process_share(mesh) == (0, 1)
    batch = {"x0": np.arange(6.0).reshape(3, 2), "pe": np.ones((2, 3, 4))}
    placed = sharding.shard_batch(mesh, batch)
    jax.tree.map(np.testing.assert_array_equal, placed, batch)


def test_constrain_is_nothing_without_a_mesh():
    x = jnp.ones((2, 3))
    assert sharding.constrain(x, "batch", "width") is x


def test_constrain_wants_a_name_for_each_axis():
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    with sharding.activation_rules(mesh), pytest.raises(ValueError, match="1 logical axes"):
        sharding.constrain(jnp.ones((2, 3)), "batch")


def run_on_eight_devices(*args: str) -> dict:
    flags = (
        "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0 "
        "--xla_llvm_disable_expensive_passes=true"
    )
    environment = os.environ | {
        "XLA_FLAGS": flags,
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(ROOT),
    }
    command = [sys.executable, str(ROOT / "tests" / "mesh_driver.py"), *args]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


# Meshes of eight devices → one device's part of a kernel [1, 32, 128] with axes layers, embed, mlp.
TRAINED = {
    "none": [1, 32, 128],
    "slices=2,data=2,fsdp=2": [1, 16, 128],
    "context=8": [1, 32, 128],  # more parts than heads: queries are split
    "fsdp=2,context=2,tensor=2": [1, 16, 64],  # all-to-all
}
SAMPLED = ("none", "tensor=4", "context=4,tensor=2", "slices=2,data=2,context=2")


def check_activations(mesh: str, activations: list[list]) -> None:
    """Every constrained activation lies on the devices as its logical axes say."""
    pairs = (part.split("=") for part in mesh.split(",") if mesh != "none")
    sizes = collections.defaultdict(lambda: 1, {name: int(size) for name, size in pairs})
    divided_by = {
        "batch": sizes["slices"] * sizes["data"] * sizes["fsdp"],
        "tokens": sizes["context"],  # padded where it does not divide them
        "stream": sizes["context"] * sizes["tensor"],
        "heads": sizes["tensor"],
        "mlp": sizes["tensor"],
        "attended_heads": sizes["tensor"] * sizes["context"],
    }
    assert activations
    for *names, shape, part in activations:
        wanted = [n / divided_by.get(name, 1) for n, name in zip(shape, names, strict=True)]
        assert part == wanted, (mesh, names)


@pytest.fixture(scope="module")
def on_eight_devices():
    return run_on_eight_devices(
        *("--attention", "fsdp=2,tensor=2", "context=4"),
        *("--sample", "none", "fsdp=2,context=2,tensor=2"),
    )


@pytest.mark.parametrize(
    ("mesh", "shard"), [("fsdp=2,tensor=2", [1, 1, 132, 128]), ("context=4", [2, 2, 33, 128])]
)
def test_attention_runs_on_each_devices_heads_or_queries(on_eight_devices, mesh, shard):
    for backend, result in on_eight_devices["attention"][mesh].items():
        assert result["shard"] == shard, backend
        assert result["deviation"] < 1e-5, backend


def test_activations_lie_where_their_axes_say(on_eight_devices):
    found = on_eight_devices["sample"]["fsdp=2,context=2,tensor=2"]
    assert found["deviation"] < 1e-5
    check_activations("fsdp=2,context=2,tensor=2", found["activations"])
    axes = {tuple(names) for *names, _, _ in found["activations"]}
    assert {
        ("batch", "stream", "width"),
        ("batch", "tokens", "mlp"),
        ("batch", "heads", "tokens", "head_dim"),
        ("batch", "attended_heads", None, "head_dim"),
    } <= axes
    assert "all-to-all" in found["collectives"]


@pytest.mark.slow
def test_a_mesh_changes_training_and_samples_by_rounding_alone():
    results = run_on_eight_devices("--train", *TRAINED, "--sample", *SAMPLED)
    for mesh, shard in TRAINED.items():
        found = results["train"][mesh]
        print(mesh, {k: found[k] for k in ("loss", "gradient_deviation", "params_deviation")})
        assert found["loss"] == pytest.approx(results["train"]["none"]["loss"], rel=1e-5)
        assert found["gradient_deviation"] < 5e-5
        # Adam divides by the gradient's size: its step keeps the gradient's relative rounding.
        assert found["params_deviation"] < 1e-3
        assert found["kernel_shards"] == [shard] * 3  # parameter, first moment, average
    for mesh in SAMPLED:
        found = results["sample"][mesh]
        print(mesh, found["deviation"], found["collectives"])
        assert found["deviation"] < 1e-5
        check_activations(mesh, found["activations"])


TPU_GRADIENT = """
    import json
    import jax, jax.numpy as jnp
    from jax.experimental import topologies
    from kontext_jax.models.parameter_sharding import state_shardings
    from kontext_jax.weights.bundle import parameter_shapes
    from kontext_jax.runtime.compiler_options import options
    from kontext_jax.hlo.collectives import collectives
    from kontext_jax.models.mmdit import MMDiT
    from kontext_jax.models.presets import MMDiTConfig
    from kontext_jax.runtime.sharding import (
        MeshConfig, activation_rules, batch_shardings, make_mesh
    )

    config = MMDiTConfig(hidden_size=512, num_heads=4, depth=1, depth_single_blocks=2)
    model = MMDiT(config, jnp.bfloat16, "splash", "save_attention")
    devices = topologies.get_topology_desc("v5e:2x2", "tpu").devices
    mesh = make_mesh(MeshConfig(fsdp=2, context=2), devices)
    shape = lambda *dims: jax.ShapeDtypeStruct(dims, jnp.float32)
    batch = {
        "img": shape(2, 1024, 64), "txt": shape(2, 256, 4096), "vec": shape(2, 768),
        "t": shape(2), "guidance": shape(2), "pe": shape(2, 1280, 64),
    }
    params = parameter_shapes("mmdit", config)
    places = state_shardings(mesh, params)
    on_mesh = lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)
    given = jax.tree.map(on_mesh, (params, batch), (places, batch_shardings(mesh, batch)))
    loss = lambda params, batch: jnp.sum(model.apply({"params": params}, **batch) ** 2)
    with activation_rules(mesh):
        lowered = jax.jit(jax.grad(loss), out_shardings=places).lower(*given)
        text = lowered.compile(compiler_options=options("tpu", "train")).as_text()
    print(json.dumps([[*key, row.full_bytes] for key, row in collectives(text).items()]))
"""


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs jax[tpu]")
def test_a_tpu_gathers_and_attends_in_bfloat16_and_reduces_gradients_in_float32():
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "PYTHONPATH": str(ROOT),
    }
    command = [sys.executable, "-c", textwrap.dedent(TPU_GRADIENT)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    found = {(kind, dtype): size for kind, dtype, size in json.loads(done.stdout.splitlines()[-1])}
    print(found)
    total = sum(found.values())
    kinds = {kind for kind, _ in found}
    assert {"all-gather", "reduce-scatter", "all-to-all"} <= kinds
    right = {
        "all-gather": "bf16",
        "all-to-all": "bf16",
        "reduce-scatter": "f32",
        "all-reduce": "f32",
    }
    wrong = {k: v for k, v in found.items() if right.get(k[0], k[1]) != k[1]}
    assert sum(wrong.values()) < 0.02 * total, wrong
