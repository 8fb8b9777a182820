"""The loop on a small run: an interrupted one is the unbroken one, and what goes wrong is said."""

import dataclasses
import importlib.util
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from kontext_jax import metrics, train_config, train_loop
from kontext_jax.checkpoint import open_bundle
from kontext_jax.images import read_metadata
from kontext_jax.sharding import MeshConfig, make_mesh
from kontext_jax.task_table import make_task
from kontext_jax.training_checkpoints import CheckpointConfig, Checkpoints

ROOT = Path(__file__).parents[1]


def config_of(name: str):
    spec = importlib.util.spec_from_file_location(name, ROOT / "configs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config()


def small_config(**changes) -> train_config.TrainConfig:
    """configs/tiny.py, smaller still: six steps of two 32-pixel scenes."""
    tiny = train_config.parse(config_of("tiny"))
    config = dataclasses.replace(
        tiny,
        num_steps=6,
        batch_size=2,
        optimizer=dataclasses.replace(tiny.optimizer, warmup_steps=2),
        data=dataclasses.replace(tiny.data, sources=("scenes:easy:train:48",), buckets=("32x32",)),
        eval=dataclasses.replace(
            tiny.eval,
            every_steps=3,
            sources=("scenes:easy:seen:32",),
            num_batches=1,
            sample_every_steps=6,
            sample_rows=2,
            sample_num_steps=2,
        ),
        log=dataclasses.replace(tiny.log, every_steps=2, print_every_s=0.0, tensorboard=False),
        checkpoint=CheckpointConfig(every_steps=3),
    )
    return dataclasses.replace(config, **changes)


def train(config, workdir, lines=None, **options) -> int:
    told = [] if lines is None else lines
    return train_loop.train(
        config, str(workdir), open_weights=open_bundle, tell=told.append, **options
    )


def state_of(config, workdir, step):
    """The state that a run saved, as NumPy leaves."""
    abstract = train_loop.abstract_state(
        make_task(config, open_bundle), make_mesh(MeshConfig(), jax.devices()[:1])
    )
    state = Checkpoints(workdir / train_loop.CHECKPOINTS).restore(abstract, step).state
    return [np.asarray(leaf) for leaf in jax.tree.leaves(state)]


def lines_of(workdir, *kinds) -> list[dict]:
    path = workdir / metrics.FILE
    return [line for kind in kinds for line in metrics.read(path, kind)]


@pytest.fixture(scope="module", autouse=True)
def kept_programs(tmp_path_factory):
    """Programs compiled once for all runs here."""
    names = (
        "jax_compilation_cache_dir",
        "jax_persistent_cache_min_compile_time_secs",
        "jax_disable_most_optimizations",
    )
    before = {name: jax.config.values[name] for name in names}
    jax.config.update("jax_compilation_cache_dir", str(tmp_path_factory.mktemp("compiled")))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_disable_most_optimizations", True)
    compilation_cache.reset_cache()
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    run = tmp_path_factory.mktemp("unbroken")
    lines = []
    assert train(small_config(), run, lines) == 6
    return run, lines


class Killed(BaseException):
    """Stands for SIGKILL: nothing in the loop may catch it."""


def test_a_run_leaves_what_its_page_says(unbroken):
    run, lines = unbroken
    assert {path.name for path in run.iterdir()} >= {"config.json", "checkpoints", "metrics.jsonl"}
    assert train_config.from_json((run / "config.json").read_text()) == small_config()
    assert [line["step"] for line in lines_of(run, "train")] == [2, 4, 6]
    assert [line["step"] for line in lines_of(run, "eval", "eval_ema")] == [3, 6, 3, 6]
    assert {"loss", "grad_norm", "learning_rate", "skipped"} <= lines_of(run, "train")[0].keys()
    assert {"images_per_s", "tokens_per_s"} <= lines_of(run, "speed")[-1].keys()
    told = read_metadata(run / "samples" / "6.png")
    assert told["step"] == 6 and len(told["prompts"]) == 2
    assert any(line.startswith("compiled step in ") for line in lines)


def test_an_interrupted_run_goes_on_as_if_nothing_had_happened(unbroken, tmp_path):
    def tell(line):
        if line.startswith("step 5/6"):
            raise Killed

    with pytest.raises(Killed):
        train_loop.train(small_config(), str(tmp_path), open_weights=open_bundle, tell=tell)
    with (tmp_path / metrics.FILE).open("a") as file:
        file.write('{"step": 5, "ki')
    assert [line["step"] for line in lines_of_whole(tmp_path)] == [2, 4]
    lines = []
    assert train(small_config(), tmp_path, lines) == 6
    assert any(line.startswith("going on from step 3") for line in lines)
    assert lines_of(tmp_path, "train", "eval", "eval_ema") == lines_of(
        unbroken[0], "train", "eval", "eval_ema"
    )
    for ours, theirs in zip(
        state_of(small_config(), tmp_path, 6),
        state_of(small_config(), unbroken[0], 6),
        strict=True,
    ):
        np.testing.assert_array_equal(ours, theirs)


def lines_of_whole(run) -> list[dict]:
    """Training lines of a file whose last line may be cut short."""
    lines = (run / metrics.FILE).read_text().splitlines()
    whole = [json.loads(line) for line in lines if line.endswith("}")]
    return [line for line in whole if line["kind"] == "train"]
