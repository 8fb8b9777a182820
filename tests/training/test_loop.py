"""The loop, on a task without a network: an interrupted run is the unbroken one."""

import dataclasses
import functools
import json
import os
import shutil
import signal

import jax
import numpy as np
import pytest
from config_tasks import read_config
from light_task import light_task

from kontext_jax.pictures.files import read_metadata
from kontext_jax.runtime.sharding import MeshConfig, make_mesh
from kontext_jax.storage import step_folders
from kontext_jax.training import config as train_config
from kontext_jax.training import loop as train_loop
from kontext_jax.training import metrics
from kontext_jax.training.checkpoints import CheckpointConfig, Checkpoints
from kontext_jax.training.tasks.base import abstract_state
from kontext_jax.training.tasks.table import TASKS

KINDS = ("train", "eval", "eval_ema")


def small_config(**changes) -> train_config.TrainConfig:
    """configs/tiny.py with twelve steps of four edits of 32-pixel scenes."""
    tiny = read_config("tiny")
    config = dataclasses.replace(
        tiny,
        num_steps=12,
        batch_size=4,
        optimizer=dataclasses.replace(tiny.optimizer, warmup_steps=0, learning_rate=1e-2),
        data=dataclasses.replace(
            tiny.data,
            sources=("scenes:easy:train:30",),
            buckets=("32x32",),
            fraction_with_references=1.0,
        ),
        eval=dataclasses.replace(
            tiny.eval,
            every_steps=3,
            sources=("scenes:easy:seen:12",),
            num_batches=2,
            sample_every_steps=6,
            sample_rows=2,
        ),
        log=dataclasses.replace(tiny.log, every_steps=2, print_every_s=0.0, tensorboard=False),
        checkpoint=CheckpointConfig(every_steps=5),
    )
    return dataclasses.replace(config, **changes)


@pytest.fixture(autouse=True)
def without_a_network(monkeypatch):
    monkeypatch.setitem(TASKS, "flow_matching", light_task)


def poison(monkeypatch, *endings: str) -> None:
    """Makes the loss of samples whose ids end so no number."""
    task = functools.partial(light_task, poison=endings)
    monkeypatch.setitem(TASKS, "flow_matching", task)


def no_weights(path):
    raise AssertionError(f"{path} was opened")


def train(config, workdir, tell=lambda line: None) -> int:
    return train_loop.train(config, str(workdir), open_weights=no_weights, tell=tell)


def lines_of(run, *kinds) -> list[dict]:
    return [line for kind in kinds for line in metrics.read(run / metrics.FILE, kind)]


def state_of(run, step) -> list[np.ndarray]:
    config = small_config()
    mesh = make_mesh(MeshConfig(), jax.devices())
    abstract = abstract_state(light_task(config, no_weights), mesh)
    state = Checkpoints(run / train_loop.CHECKPOINTS).restore(abstract, step).state
    return [np.asarray(leaf) for leaf in jax.tree.leaves(state)]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    run, lines = tmp_path_factory.mktemp("unbroken"), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(TASKS, "flow_matching", light_task)
        assert train(small_config(), run, lines.append) == 12
    return run, lines


def assert_equal_runs(run, other):
    assert lines_of(run, *KINDS) == lines_of(other, *KINDS)
    for ours, theirs in zip(state_of(run, 12), state_of(other, 12), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_a_run_leaves_what_the_page_says(unbroken):
    run, lines = unbroken
    assert train_config.from_json((run / "config.json").read_text()) == small_config()
    assert [line["step"] for line in lines_of(run, "train")] == [2, 4, 6, 8, 10, 12]
    assert [line["step"] for line in lines_of(run, "eval")] == [3, 6, 9, 12]
    assert lines_of(run, "eval") != lines_of(run, "eval_ema")
    assert {"loss", "grad_norm", "skipped"} <= lines_of(run, "train")[0].keys()
    assert {"images_per_s", "tokens_per_s", "mfu"} <= lines_of(run, "speed")[-1].keys()
    assert lines_of(run, "speed")[-1]["data/epochs"] == 2
    assert read_metadata(run / "samples" / "6.png")["step"] == 6
    assert len(read_metadata(run / "samples" / "12.png")["prompts"]) == 2
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["10", "12", "5"]
    assert any(line.startswith("compiled step in ") for line in lines)
    assert lines_of(run, "eval")[0]["loss"] > lines_of(run, "eval")[-1]["loss"]


class Killed(BaseException):
    """Stands for SIGKILL: nothing in the loop catches it."""


def killed_at(step):
    def tell(line):
        if line.startswith(f"step {step}/"):
            raise Killed

    return tell


def test_a_killed_run_goes_on_as_if_nothing_had_happened(unbroken, tmp_path):
    for step in (2, 9, 11):
        with pytest.raises(Killed):
            train(small_config(), tmp_path, killed_at(step))
        with (tmp_path / metrics.FILE).open("a") as file:
            file.write('{"step": 4, "ki')  # cut short
    lines = []
    assert train(small_config(), tmp_path, lines.append) == 12
    assert any(line.startswith("going on from step 10") for line in lines)
    assert_equal_runs(tmp_path, unbroken[0])


def test_sigterm_saves_and_ends_in_order(unbroken, tmp_path):
    told = []

    def tell(line):
        told.append(line)
        if line.startswith("step 6/"):
            os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    stopped = train(small_config(), tmp_path, tell)
    assert signal.getsignal(signal.SIGTERM) is before
    assert stopped == 7
    assert told[-1].startswith("SIGTERM: stopped after step 7, which is saved")
    assert train(small_config(), tmp_path) == 12
    assert_equal_runs(tmp_path, unbroken[0])


def test_a_finished_run_is_left_alone(unbroken):
    before, lines = (unbroken[0] / metrics.FILE).read_text(), []
    assert train(small_config(), unbroken[0], lines.append) == 12
    assert lines[-1] == f"{unbroken[0]} is finished: step 12 of 12 is saved"
    assert (unbroken[0] / metrics.FILE).read_text() == before


def test_other_settings_are_refused_with_their_difference(unbroken):
    changed = small_config(
        batch_size=2, optimizer=dataclasses.replace(small_config().optimizer, learning_rate=1.0)
    )
    for attempt in (train_loop.train, train_loop.dry_run):
        with pytest.raises(ValueError, match="begun with other settings") as error:
            attempt(changed, str(unbroken[0]), open_weights=no_weights, tell=lambda line: None)
        lines = str(error.value).splitlines()
        assert "  - batch_size: 4" in lines and "  + batch_size: 2" in lines
        assert "  + optimizer.learning_rate: 1.0" in lines


def test_what_decides_nothing_may_change(unbroken, tmp_path):
    with pytest.raises(Killed):
        train(small_config(), tmp_path, killed_at(9))
    other = small_config(
        checkpoint=CheckpointConfig(every_steps=6, keep_last=1),
        mesh=MeshConfig(data=1, fsdp=1),
    )
    assert train(other, tmp_path) == 12
    assert_equal_runs(tmp_path, unbroken[0])
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["12"]


def test_micro_batches_change_the_result_by_rounding_alone(unbroken, tmp_path):
    config = small_config(accumulate_steps=2)
    train(dataclasses.replace(config, eval=train_config.EvalConfig()), tmp_path)
    ours, theirs = lines_of(tmp_path, "train"), lines_of(unbroken[0], "train")
    np.testing.assert_allclose(
        [line["loss"] for line in ours], [line["loss"] for line in theirs], rtol=1e-5
    )


def test_steps_without_finite_numbers_are_skipped_and_counted(monkeypatch, tmp_path):
    poison(monkeypatch, "-3", "-17")
    log = dataclasses.replace(small_config().log, every_steps=1)
    train(small_config(log=log), tmp_path)
    lines = lines_of(tmp_path, "train")
    skipped = [line["step"] for line in lines if line["skipped"]]
    assert 0 < len(skipped) < 12
    assert lines[-1]["skipped_total"] == len(skipped)
    assert all(lines[step - 1].get("loss") is None for step in skipped)
    assert all(np.isfinite(leaf).all() for leaf in state_of(tmp_path, 12))


def test_too_many_skipped_in_a_row_stop_the_run(monkeypatch, tmp_path):
    config = small_config(max_skipped_in_a_row=3)
    with pytest.raises(Killed):
        train(config, tmp_path, killed_at(7))
    before = state_of(tmp_path, 5)
    poison(monkeypatch, "")
    with pytest.raises(FloatingPointError, match="last 3 steps, up to 8, gave no finite"):
        train(config, tmp_path)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["5"]
    for ours, theirs in zip(state_of(tmp_path, 5), before, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert lines_of(tmp_path, "train")[-1]["skipped_in_a_row"] == 3


def test_a_profile_of_some_steps(tmp_path):
    log = dataclasses.replace(small_config().log, profile_from_step=3, profile_num_steps=2)
    evaluation = train_config.EvalConfig()
    train(small_config(num_steps=6, log=log, eval=evaluation), tmp_path)
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))


@pytest.mark.parametrize(
    ("section", "changes", "message"),
    [
        ("mesh", {"data": 2}, "does not fit 1 device"),
        ("eval", {"sources": ("nowhere",)}, "nowhere: no such file"),
        ("data", {"sources": ("REQUIRED",)}, "data.sources must be given: --config.data.sources=…"),
    ],
)
def test_what_does_not_fit_is_said_before_any_work(section, changes, message, tmp_path):
    config = small_config()
    changed = {section: dataclasses.replace(getattr(config, section), **changes)}
    config = dataclasses.replace(config, **changed)
    for attempt in (train_loop.dry_run, train_loop.train):
        with pytest.raises((ValueError, OSError), match=message):
            attempt(config, str(tmp_path), open_weights=no_weights, tell=lambda line: None)
    assert not (tmp_path / "checkpoints").exists()


def test_a_dry_run_finds_a_checkpoint_cut_short(unbroken, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(unbroken[0], run)
    files = [path for path in (run / "checkpoints" / "12").rglob("*") if path.is_file()]
    largest = max(files, key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:-1])
    with pytest.raises(OSError, match=f"is damaged:\n  .*{largest.name}"):
        train_loop.dry_run(
            small_config(), str(run), open_weights=no_weights, tell=lambda line: None
        )


def lines_after_resuming(run, made_with, tmp_path) -> list[str]:
    """What going on and a dry run tell of a checkpoint with such versions in its manifest."""
    copy = shutil.copytree(run, tmp_path / "run")
    path = copy / "checkpoints" / "12" / "manifest.json"
    manifest = json.loads(path.read_text())
    assert manifest.pop("made_with") == step_folders.made_with()
    path.write_text(json.dumps(manifest | made_with))
    lines = []
    train_loop.dry_run(small_config(), str(copy), open_weights=no_weights, tell=lines.append)
    assert train(small_config(), copy, lines.append) == 12
    assert sum("from step 12" in line for line in lines) == 2
    return [line for line in lines if "made with" in line]


def test_going_on_under_other_versions_is_told(unbroken, tmp_path):
    then = step_folders.made_with() | {"jax": "0.9.1", "numpy": "2.0.1"}
    lines = lines_after_resuming(unbroken[0], {"made_with": then}, tmp_path)
    told = (
        "checkpoint 12 was made with jax 0.9.1, numpy 2.0.1; here are "
        f"jax {jax.__version__}, numpy {np.__version__}: the next loss should be the same, "
        "later steps may differ by about 1e-7 of their values"
    )
    assert lines == [told, told]


@pytest.mark.parametrize("made_with", [{"made_with": step_folders.made_with()}, {}])
def test_equal_versions_and_checkpoints_without_them_are_taken_silently(
    unbroken, made_with, tmp_path
):
    assert lines_after_resuming(unbroken[0], made_with, tmp_path) == []


def test_a_dry_run_tells_what_would_run(tmp_path):
    lines = []
    train_loop.dry_run(
        small_config(), str(tmp_path / "run"), open_weights=no_weights, tell=lines.append
    )
    text = "\n".join(lines)
    for part in ("9 trained parameters", "12 steps of 4", "examples an epoch", "a new run"):
        assert part in text
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
