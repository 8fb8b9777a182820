"""Programs kept in files: found again without tracing, and refused where anything differs."""

import json
import os
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kontext_jax.runtime import program_files
from kontext_jax.runtime.program_files import ExecutableFiles
from kontext_jax.runtime.programs import Executables, Program, Timings


class Pair(NamedTuple):
    first: jax.Array
    second: jax.Array


TREE = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(3, np.float32)}


def function(tree, factor):
    return Pair(tree["a"] * factor, jnp.sum(tree["a"])), None, (tree["b"],)


@pytest.fixture
def start(tmp_path):
    """A new process, as far as programs go: run(*args), what was traced, what was told."""

    def make(**options):
        traced, told = [], []
        files = ExecutableFiles(tmp_path / "programs", (Pair,), told.append)
        executables = Executables(Timings(), files=files, **options)

        def run(*args, key="f", precision=None):
            def made():
                traced.append(key)
                return function

            return executables.get(Program(key, made, args, precision=precision))(*args)

        return run, traced, told

    return make


def the_file(tmp_path):
    (path,) = (tmp_path / "programs").iterdir()
    return path


def test_the_second_start_traces_nothing_and_computes_the_same(start):
    run, traced, _ = start()
    first = run(TREE, 2.0)
    assert traced == ["f"]
    run, traced, told = start()
    second = run(TREE, 2.0)
    assert (traced, told) == ([], [])
    assert type(second[0]) is Pair and second[1] is None
    jax.tree.map(np.testing.assert_array_equal, second, first)
    np.testing.assert_array_equal(second[0].first, 2 * TREE["a"])
    np.testing.assert_array_equal(run(TREE, 3.0)[0].first, 3 * TREE["a"])


def test_whatever_a_program_depends_on_makes_another_one(start, monkeypatch):
    start()[0](TREE, 2.0)
    variants = {
        "key": lambda run: run(TREE, 2.0, key="g"),
        "shape": lambda run: run({**TREE, "b": np.ones(4, np.float32)}, 2.0),
        "dtype": lambda run: run({**TREE, "b": np.ones(3, np.int32)}, 2.0),
        "tree": lambda run: run({"a": TREE["a"], "b": [TREE["b"]]}, 2.0),
    }
    for name, call in variants.items():
        run, traced, _ = start()
        if name == "tree":
            with pytest.raises(TypeError):  # traced, which is the point, but not our function's
                call(run)
        else:
            call(run)
        assert traced, name
    run, traced, _ = start(compiler_options={"xla_cpu_enable_fast_math": False})
    run(TREE, 2.0)
    assert traced
    run, traced, _ = start()
    run(TREE, 2.0, precision="highest")
    assert traced
    monkeypatch.setattr(program_files, "source_hash", lambda: "other source")
    run, traced, _ = start()
    run(TREE, 2.0)
    assert traced


def test_a_program_of_other_versions_is_not_used_and_stays(start, monkeypatch):
    first = start()[0](TREE, 2.0)
    with monkeypatch.context() as other:
        other.setattr(program_files, "versions", lambda names: dict.fromkeys(names, "0.9.1"))
        run, traced, told = start()
        jax.tree.map(np.testing.assert_array_equal, run(TREE, 2.0), first)
        assert (traced, told) == (["f"], [])
    run, traced, told = start()
    run(TREE, 2.0)
    assert (traced, told) == ([], [])


@pytest.mark.parametrize("damage", ["flipped", "cut", "renamed", "no header"])
def test_a_damaged_file_is_told_of_and_made_anew(start, tmp_path, damage):
    start()[0](TREE, 2.0)
    path = the_file(tmp_path)
    content = bytearray(path.read_bytes())
    if damage == "flipped":
        content[-20] ^= 1
    elif damage == "cut":
        del content[-100:]
    elif damage == "no header":
        content = content[10:]
    else:
        header, _, payload = bytes(content).partition(b"\n")
        header = json.loads(header)
        header["facts"]["key"] = "'g'"
        content = json.dumps(header).encode() + b"\n" + payload
    path.write_bytes(content)
    run, traced, told = start()
    run(TREE, 2.0)
    assert traced == ["f"]
    assert len(told) == 1 and "cannot be used" in told[0] and "made anew" in told[0]
    run, traced, told = start()
    run(TREE, 2.0)
    assert (traced, told) == ([], [])


def test_a_folder_that_others_can_write_to_is_not_used(start, tmp_path):
    start()[0](TREE, 2.0)
    assert (tmp_path / "programs").stat().st_mode & 0o777 == 0o700
    os.chmod(tmp_path / "programs", 0o770)
    run, traced, told = start()
    run(TREE, 2.0)
    assert traced == ["f"]
    assert len(told) == 1 and "others can write" in told[0] and "chmod go-w" in told[0]


def test_a_kept_program_refuses_other_arguments(tmp_path):
    files = ExecutableFiles(tmp_path)
    facts = files.facts("f", (np.ones(3, np.float32),), {})
    compiled = jax.jit(lambda x: (x,), keep_unused=True).lower(np.ones(3, np.float32)).compile()
    files.save(facts, compiled)
    program = files.load(facts)
    assert program.out_info[0].shape == (3,) and program.out_info[0].dtype == np.float32
    with pytest.raises(TypeError, match="takes arrays"):
        program(np.ones(4, np.float32))


def test_names_and_results_that_cannot_be_kept_are_refused(tmp_path):
    files = ExecutableFiles(tmp_path)
    with pytest.raises(ValueError, match="has an address"):
        files.facts(("f", object()), (), {})
    compiled = jax.jit(lambda: {"a": 1.0}).lower().compile()
    with pytest.raises(TypeError, match="arrays, None and tuples"):
        files.save(files.facts("f", (), {}), compiled)


def test_the_oldest_files_go_first(start, tmp_path, monkeypatch):
    monkeypatch.setattr(program_files, "MOST_FILES", 1)
    start()[0](TREE, 2.0)
    os.utime(the_file(tmp_path), (1, 1))
    start()[0](TREE, 2.0, key="g")
    assert json.loads(the_file(tmp_path).read_bytes().partition(b"\n")[0])["facts"]["key"] == "'g'"
