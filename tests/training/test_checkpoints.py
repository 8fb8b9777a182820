"""Checkpoints: what is saved comes back, wherever to; what is damaged is found and passed over."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from etils import epath

from kontext_jax.objectives.state import make_train_state
from kontext_jax.storage import arrays as array_store
from kontext_jax.storage import step_folders
from kontext_jax.training.checkpoints import (
    CheckpointConfig,
    CheckpointError,
    Checkpoints,
    config_difference,
)

ROOT = Path(__file__).parents[2]
CONFIG = json.dumps({"seed": 3})
OPTIMIZER = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))


def make_state(seed: int = 0, with_ema: bool = True):
    generator = np.random.default_rng(seed)
    params = {
        "blocks": {"kernel": jnp.asarray(generator.normal(size=(3, 8, 16)), jnp.float32)},
        "bias": jnp.asarray(generator.normal(size=(16,)), jnp.float32),
    }
    state = make_train_state(params, OPTIMIZER, with_ema=with_ema)
    noisy = jax.tree.map(
        lambda x: x + 1 if x.dtype == jnp.int32 else x + generator.normal(size=x.shape), state
    )
    return jax.tree.map(lambda new, old: new.astype(old.dtype), noisy, state)


def abstract(state):
    return jax.eval_shape(lambda: state)


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def steps_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture(scope="module")
def three_steps(tmp_path_factory):
    """Steps 1, 2 and 3 of different states."""
    folder = tmp_path_factory.mktemp("run") / "checkpoints"
    with Checkpoints(folder) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, make_state(step), {"position": step}, CONFIG)
    return folder


@pytest.fixture
def folder(three_steps, tmp_path):
    shutil.copytree(three_steps, tmp_path / "checkpoints")
    return tmp_path / "checkpoints"


def largest_file(folder: Path) -> Path:
    return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def test_everything_comes_back(three_steps):
    checkpoints = Checkpoints(three_steps)
    assert checkpoints.latest_step() == 3
    restored = checkpoints.restore(abstract(make_state()))
    assert_same(restored.state, make_state(3))
    assert (restored.step, restored.data_state, restored.config_json) == (
        3,
        {"position": 3},
        CONFIG,
    )


def test_state_may_be_donated_while_it_is_being_saved(tmp_path):
    advance = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
    values = np.random.default_rng(0).normal(size=(4, 512, 512)).astype(np.float32)
    state = make_train_state({"w": jnp.asarray(values)}, optax.sgd(1.0), with_ema=False)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(0, state, {}, CONFIG)
    shapes = abstract(state)
    for _ in range(3):
        state = jax.block_until_ready(advance(state))
    checkpoints.wait()
    restored = checkpoints.restore(shapes).state
    np.testing.assert_array_equal(np.asarray(restored.params["w"]), values)
    assert float(state.params["w"][0, 0, 0]) != values[0, 0, 0]


def test_average_alone_is_read_and_cast_like_numpy(three_steps):
    arrays = step_folders.absolute(three_steps) / "3" / "arrays"
    stored = array_store.stored_leaves(arrays)
    assert set(stored) == {"params", "ema_params", "opt_state", "rest"}
    path = "blocks/kernel"
    wanted = jax.ShapeDtypeStruct(stored["ema_params"][path].shape, jnp.bfloat16)
    loaded = array_store.load(arrays, {"ema_params": {path: wanted}})
    expected = np.asarray(make_state(3).ema_params["blocks"]["kernel"]).astype(jnp.bfloat16)
    np.testing.assert_array_equal(np.asarray(loaded["ema_params"][path]), expected)


def test_policy_keeps_the_last_and_every_so_many(tmp_path):
    state = make_state()
    with Checkpoints(tmp_path, keep_last=2, keep_every=4) as checkpoints:
        for step in range(2, 12, 2):
            checkpoints.save(step, state, {}, CONFIG)
    assert steps_in(tmp_path) == ["10", "4", "8"]


def test_saving_a_step_twice_writes_once(folder):
    before = largest_file(folder / "3").stat()
    Checkpoints(folder).save(3, make_state(9), {}, CONFIG, wait=True)
    assert largest_file(folder / "3").stat() == before


DAMAGES = {
    "a flipped bit": lambda path: flip_bit(path),
    "a truncated file": lambda path: os.truncate(path, path.stat().st_size - 7),
    "a missing file": lambda path: path.unlink(),
}


def flip_bit(path: Path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_newest_is_passed_over_and_kept(folder, damage):
    path = largest_file(folder / "3")
    DAMAGES[damage](path)
    lines = []
    restored = Checkpoints(folder, tell=lines.append).restore(abstract(make_state()))
    assert_same(restored.state, make_state(2))
    assert restored.data_state == {"position": 2}
    text = "\n".join(lines)
    assert (path.name in text and "expected" in text) or "missing" in text
    assert "going on from step 2 instead" in text
    assert steps_in(folder) == ["1", "2", "3.damaged"]


def test_orbax_alone_does_not_notice_a_flipped_bit(folder):
    """Why there is a manifest."""
    flip_bit(largest_file(folder / "3" / "arrays" / "params"))
    arrays = step_folders.absolute(folder) / "3" / "arrays"
    stored = array_store.stored_leaves(arrays)
    loaded = array_store.load(arrays, {"params": stored["params"]})["params"]
    original = array_store.leaves_of(make_state(3).params)
    assert any((np.asarray(loaded[path]) != np.asarray(original[path])).any() for path in original)


def test_every_damaged_checkpoint_is_listed_when_none_is_whole(folder):
    for step in "123":
        flip_bit(largest_file(folder / step))
    for _ in range(2):  # starting once more must not begin anew
        checkpoints = Checkpoints(folder, tell=lambda line: None)
        assert checkpoints.latest_step() == 3
        with pytest.raises(CheckpointError) as error:
            checkpoints.restore(abstract(make_state()))
        assert all(f"/{step} is damaged" in str(error.value) for step in "123")
    assert steps_in(folder) == ["1", "2", "3"]


def test_damaged_manifest_is_damage(folder):
    (folder / "3" / "manifest.json").write_text('{"format": 1, "files"')
    lines = []
    assert Checkpoints(folder, tell=lines.append).restore(abstract(make_state())).step == 2
    assert "not a manifest" in lines[0]


def test_unfinished_newest_is_passed_over_until_a_later_one_is_whole(folder):
    (folder / "3" / "manifest.json").unlink()
    lines = []
    checkpoints = Checkpoints(folder, tell=lines.append)
    assert checkpoints.latest_step() == 2
    assert checkpoints.restore(abstract(make_state())).step == 2
    assert "never finished" in lines[0]
    assert "3" in steps_in(folder)
    checkpoints.save(3, make_state(3), {"position": 3}, CONFIG, wait=True)
    assert steps_in(folder) == ["1", "2", "3"]
    assert_same(checkpoints.restore(abstract(make_state())).state, make_state(3))


def test_named_step_supersedes_newer_ones(folder):
    checkpoints = Checkpoints(folder, tell=lambda line: None)
    assert checkpoints.restore(abstract(make_state()), step=2).step == 2
    assert steps_in(folder) == ["1", "2", "3.superseded"]
    with pytest.raises(CheckpointError, match="no finished checkpoint"):
        checkpoints.restore(abstract(make_state()), step=7)


def test_another_state_is_refused_with_every_difference(three_steps):
    other = abstract(make_state(with_ema=False))
    other.params["bias"] = jax.ShapeDtypeStruct((4,), jnp.float32)
    other.params["scale"] = jax.ShapeDtypeStruct((4,), jnp.float32)
    with pytest.raises(ValueError) as error:
        Checkpoints(three_steps).restore(other)
    lines = str(error.value).splitlines()[1:]
    assert [line.strip() for line in lines] == [
        "- params/scale",
        "+ ema_params/bias",
        "+ ema_params/blocks/kernel",
        "shape params/bias: float32 [16] in the checkpoint, float32 [4] here",
    ]


def test_full_disk_is_told_before_anything_is_written(folder, monkeypatch):
    usage = shutil.disk_usage(folder)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(CheckpointError) as error:
        Checkpoints(folder).save(4, make_state(), {}, CONFIG)
    assert "too full" in str(error.value) and "0.00 GB free" in str(error.value)
    assert "whole checkpoints there: 1, 2, 3" in str(error.value)
    assert steps_in(folder) == ["1", "2", "3"]


SAVE_UNDER_A_LIMIT = """
import resource, sys
import jax.numpy as jnp, numpy as np, optax
from kontext_jax.objectives.state import make_train_state
from kontext_jax.training.checkpoints import Checkpoints

values = jnp.asarray(np.random.default_rng(0).normal(size=(2**19,)), jnp.float32)
state = make_train_state({"w": values}, optax.sgd(1.0), with_ema=False)
checkpoints = Checkpoints(sys.argv[1], on_failed_save=sys.argv[2])
checkpoints.save(1, state, {}, "{}", wait=True)
resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))
checkpoints.save(2, state, {}, "{}")
checkpoints.wait()
print("went on")
"""


@pytest.mark.parametrize("on_failed_save", ["stop", "continue"])
def test_write_that_fails_halfway_leaves_earlier_checkpoints_whole(tmp_path, on_failed_save):
    """The operating system refuses to write on (here by a limit of size, as it would when full)."""
    done = subprocess.run(
        [sys.executable, "-c", SAVE_UNDER_A_LIMIT, tmp_path, on_failed_save],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        timeout=120,
    )
    output = done.stdout + done.stderr
    assert (done.returncode == 0) == (on_failed_save == "continue")
    assert ("went on" in output) == (on_failed_save == "continue")
    assert "checkpoint of step 2 could not be written" in output
    assert "whole checkpoints there: 1." in output
    assert output.count("Traceback") == (on_failed_save == "stop")  # Orbax's threads say it too
    assert steps_in(tmp_path) == ["1"]
    assert not step_folders.find_damage(epath.Path(tmp_path) / "1")


def test_config_difference_shows_was_and_is():
    old = {"seed": 1, "optimizer": {"name": "adamw", "rates": (1, 2)}, "mesh": {"data": 1}, "a": 1}
    new = {"seed": 1, "optimizer": {"name": "muon", "rates": [1, 2]}, "mesh": {"data": 4}, "b": 2}
    assert config_difference(old, new, free=("mesh.*",)) == [
        "- a: 1",
        "+ b: 2",
        '- optimizer.name: "adamw"',
        '+ optimizer.name: "muon"',
    ]
    assert config_difference(old, dict(old)) == []


def test_config_is_checked():
    with pytest.raises(ValueError, match="no multiple"):
        CheckpointConfig(every_steps=300, keep_every=1000)
    with pytest.raises(ValueError, match="keep_last is 0"):
        CheckpointConfig(keep_last=0)


SHARDED = """
import sys
import jax, jax.numpy as jnp, numpy as np, optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
port, count, index, folder, step = sys.argv[1], *map(int, sys.argv[2:4]), *sys.argv[4:]
if count > 1:
    jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=count, process_id=index)
from kontext_jax.objectives.state import make_train_state
from kontext_jax.training.checkpoints import Checkpoints

mesh = Mesh(np.array(jax.devices()), ("fsdp",))
values = np.arange(64 * 32, dtype=np.float32).reshape(64, 32)
make = lambda: make_train_state({"w": jnp.asarray(values)}, optax.adam(1e-3), with_ema=True)
shardings = jax.tree.map(
    lambda x: NamedSharding(mesh, P("fsdp") if x.ndim else P()), jax.eval_shape(make)
)
state = jax.jit(make, out_shardings=shardings)()
checkpoints = Checkpoints(folder, tell=lambda line: print(index, line, flush=True))
shapes = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
)
if checkpoints.latest_step() is not None:
    restored = checkpoints.restore(shapes)
    print(index, "restored", restored.step, restored.data_state)
    for x, y, s in zip(*map(jax.tree.leaves, (restored.state, state, shapes)), strict=True):
        assert x.sharding == s.sharding
        for a, b in zip(x.addressable_shards, y.addressable_shards, strict=True):
            np.testing.assert_array_equal(np.asarray(a.data), np.asarray(b.data))
checkpoints.save(int(step), state, {"position": int(step)}, "{}")
checkpoints.close()
print(index, "saved", flush=True)
"""


def run_processes(count: int, devices: int, folder: Path, step: int) -> list[str]:
    """Runs SHARDED in `count` processes of so many devices; their outputs."""
    port = 20000 + os.getpid() % 20000
    env = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
    }
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", SHARDED, *map(str, (port, count, i, folder, step))],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=env,
        )
        for i in range(count)
    ]
    outputs = [process.communicate(timeout=180)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * count, "\n".join(outputs)
    return outputs


@pytest.mark.slow
def test_another_mesh_and_number_of_processes_reads_it(tmp_path):
    folder = tmp_path / "checkpoints"
    run_processes(2, 2, folder, 1)
    (output,) = run_processes(1, 2, folder, 2)
    assert "restored 1 {'position': 1}" in output
    outputs = run_processes(2, 2, folder, 3)
    assert all("restored 2 {'position': 2}" in text for text in outputs)
    assert steps_in(folder) == ["1", "2", "3"]
    flip_bit(largest_file(folder / "3"))
    outputs = run_processes(2, 1, folder, 4)
    assert all("is damaged" in text and "restored 2" in text for text in outputs)
    assert steps_in(folder) == ["1", "2", "3.damaged", "4"]
