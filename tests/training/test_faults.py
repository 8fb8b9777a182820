"""Runs that are killed, stopped or damaged end as the unbroken run does, bit for bit."""

import importlib.util
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow


def load_tool():
    spec = importlib.util.spec_from_file_location(
        "fault_table", ROOT / "experiments" / "fault_table.py"
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclasses look for their module
    spec.loader.exec_module(module)
    return module


faults = load_tool()
# Steps enough that a fast machine does not reach the end before the last kill.
LIGHT = faults.Command(
    (sys.executable, str(ROOT / "tests" / "light_training.py"), "{run}", "240", "4"),
    {"JAX_PLATFORMS": "cpu", "JAX_ENABLE_COMPILATION_CACHE": "0"},
)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    run = tmp_path_factory.mktemp("light") / "unbroken"
    status, output = LIGHT.finish(run)
    assert status == 0, output
    return run


def test_twenty_kills_lose_nothing(unbroken, tmp_path):
    kills = faults.kill_again_and_again(LIGHT, tmp_path / "run", 20, seed=0, tell=print)
    assert not faults.differences(tmp_path / "run", unbroken)
    assert sum(kill.during_save for kill in kills) >= 4, kills
    assert any(kill.resumed for kill in kills)


def test_sigterm_saves_and_the_rest_is_the_same(unbroken, tmp_path):
    row = faults.terminate_row(LIGHT, tmp_path / "run", unbroken, at_step=40)
    assert "exit status 0" in row.what_happened


def test_full_disk_keeps_what_was_saved(unbroken, tmp_path):
    size = faults.state_bytes_of(unbroken)
    if faults.full_disk_row(LIGHT, tmp_path / "run", unbroken, size) is None:
        pytest.skip("no file system may be mounted here")


def test_kills_of_train_py_lose_nothing(tmp_path):
    """The command itself; the table in docs/faults.md is of many more."""
    command = faults.train_command(26, 2, "data.fraction_with_references=1.0")
    status, output = command.finish(tmp_path / "unbroken")
    assert status == 0, output
    kills = faults.kill_again_and_again(command, tmp_path / "run", 3, seed=1, tell=print)
    assert not faults.differences(tmp_path / "run", tmp_path / "unbroken")
    assert any(kill.during_save for kill in kills), kills
