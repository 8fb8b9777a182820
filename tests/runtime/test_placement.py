"""Where a sampling run computes: meshes as a user names them, and pictures that do not change."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from PIL import Image

from kontext_jax.runtime import sharding
from kontext_jax.runtime.placement import (
    Placement,
    format_mesh,
    num_batch_parts,
    parse_mesh,
    sampling_mesh,
)
from kontext_jax.runtime.sharding import MeshConfig

ROOT = Path(__file__).parents[2]
RUN_COMMANDS = """
import json, sys
import jax
jax.config.update("jax_disable_most_optimizations", True)  # they run for milliseconds
import sample
for arguments in json.loads(sys.argv[1]):
    assert sample.main(["--no-cache", *arguments]) == 0
"""


def test_meshes_are_read_as_they_are_written():
    assert parse_mesh("tensor=4") == {"tensor": 4}
    sizes = parse_mesh("context=2, data=3,fsdp=1")
    assert sizes == {"data": 3, "context": 2} and num_batch_parts(sizes) == 3
    assert parse_mesh(format_mesh(sizes)) == sizes
    assert parse_mesh("data=1") == parse_mesh(format_mesh({})) == {}


@pytest.mark.parametrize("text", ["", "4", "tensor", "tensor=-1", "heads=2", "data=2,data=2"])
def test_other_meshes_are_refused(text):
    with pytest.raises(ValueError, match=r"--mesh .*; expected sizes such as tensor=4 .* context"):
        parse_mesh(text)


def test_too_few_devices_are_told_with_what_to_do():
    with pytest.raises(ValueError, match=r"context=4 needs 4 devices, found 1 cpu; .*count=4"):
        sampling_mesh({"context": 4}, jax.devices()[:1])
    assert sampling_mesh({}) is None


def test_without_a_mesh_nothing_is_placed():
    placement, batch = Placement(), {"x": np.ones(3)}
    assert placement.place(batch) is batch
    assert (placement.split(), placement.num_batch_parts) == (None, 1)


def test_a_mesh_places_weights_batches_and_results():
    placement = Placement(sharding.make_mesh(MeshConfig(), jax.devices()[:1]))
    assert placement.sizes == {} and placement.num_batch_parts == 1
    assert placement.split(1).spec == PartitionSpec(None, ("slices", "data", "fsdp"))
    assert placement.split(None).spec == PartitionSpec()
    placed = placement.place({"x": np.ones((2, 3)), "pe": np.ones((2, 4, 5))})
    assert placed["pe"].sharding.spec == PartitionSpec()
    assert placed["x"].sharding.spec == placement.split().spec


@pytest.mark.slow
def test_pictures_of_a_mesh_are_those_of_one_device_and_are_made_again(tmp_path):
    common = ["--model", "untrained", "--steps", "2", "--size", "64x48", "--num-images", "3"]
    commands = [
        [*common, "-o", "one.png"],
        [*common, "--mesh", "data=2,context=2", "-o", "mesh.png"],
        [*common, "--mesh", "tensor=4", "-o", "tensor.png"],
        [*common, "--sampler", "renoise", "-o", "one-renoise.png"],
        [
            *common,
            *("--sampler", "renoise", "--mesh", "data=2,context=2", "-o", "mesh-renoise.png"),
        ],
        ["--from-metadata", "mesh-seed1.png", "-o", "again.png"],
    ]
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(ROOT),
    }
    done = subprocess.run(
        [sys.executable, "-c", RUN_COMMANDS, json.dumps(commands)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "mesh: data=2,context=2 of 4 devices" in done.stdout
    assert "making mesh-seed1.png again" in done.stdout

    def pixels(name):
        return np.asarray(Image.open(tmp_path / name)).astype(int)

    for seed in range(3):
        for mesh, one in (("mesh", "one"), ("tensor", "one"), ("mesh-renoise", "one-renoise")):
            difference = pixels(f"{mesh}-seed{seed}.png") - pixels(f"{one}-seed{seed}.png")
            assert np.abs(difference).max() <= 1, (mesh, seed)
    np.testing.assert_array_equal(pixels("again.png"), pixels("mesh-seed1.png"))
