"""Tasks of distillation: where teacher and student come from, what does not fit, how runs go on."""

import dataclasses
import re

import encode_helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from config_tasks import count, read_config, trace_step
from encode_helpers import run, write_pairs
from interrupted_runs import run_whole_and_broken

from kontext_jax.data.config import DataConfig
from kontext_jax.data.mixing import MixedBatches
from kontext_jax.models.flops import mmdit_flops
from kontext_jax.models.presets import PRESETS
from kontext_jax.objectives.guidance_distillation import GuidanceDistillationConfig
from kontext_jax.plan import programs
from kontext_jax.training import config as train_config
from kontext_jax.training.checkpoints import CheckpointConfig
from kontext_jax.training.config import EvalConfig, TrainConfig
from kontext_jax.training.loop import dry_run
from kontext_jax.training.tasks import transformer
from kontext_jax.training.tasks.table import make_task
from kontext_jax.trees import flatten
from kontext_jax.weights.run import training_bundle
from kontext_jax.weights.untrained import untrained_bundle

TINY = read_config("tiny_guidance_distill")


def open_untrained(path):
    """Weights by the name of their preset, in place of a path."""
    return untrained_bundle(path)


def task_of(**changes):
    config = dataclasses.replace(TINY, weights="tiny-kontext", encoders="untrained", **changes)
    return make_task(config, open_untrained)


def test_the_student_is_its_teacher_with_an_input_for_guidance():
    task = task_of(dtype="bfloat16", attention_backend="reference")
    assert task.sources[0].endswith("an input for guidance added, its output zero")
    assert task.sources[1].startswith("teacher: tiny-kontext, untrained")
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    place = lambda path, shape: here  # noqa: E731
    teacher = dict(flatten(task.load_frozen(place)["teacher"]))
    student = dict(flatten(task.load_params(place)))
    added = {path for path in student if path not in teacher}
    assert added and all(path.startswith("guidance_in/") for path in added)
    assert {x.dtype for x in teacher.values()} == {jnp.dtype(jnp.bfloat16)}
    assert {x.dtype for x in student.values()} == {jnp.dtype(jnp.float32)}
    for path, leaf in teacher.items():
        np.testing.assert_array_equal(leaf, student[path].astype(jnp.bfloat16))
    shapes = jax.tree.map(lambda x: x.shape, task.frozen_shapes()["teacher"])
    assert dict(flatten(shapes)) == {path: leaf.shape for path, leaf in teacher.items()}


def test_a_teacher_of_its_own_is_read_beside_the_students_start():
    task = task_of(teacher="tiny-kontext-guided")
    assert task.sources[1].startswith("teacher: tiny-kontext-guided, untrained")
    assert "guidance_in" in task.frozen_shapes()["teacher"]


def test_a_step_does_five_thirds_of_flow_matching():
    task = task_of()
    work = task.work(task.abstract_batch(64, (64, 64), 1))
    forward = mmdit_flops(PRESETS["tiny-kontext-guided"].mmdit, 16, 32)
    assert work.flops == pytest.approx(64 * 5 * forward.forward)
    assert work.tokens == 64 * (16 + 32)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weights": ""}, "guidance_distillation starts from weights, and there are none"),
        ({"train": "lora"}, "train is 'lora', which the objective guidance_distillation has not"),
        ({"preset": "tiny-kontext"}, "tiny-kontext takes no guidance, so none can be distilled"),
        (
            {
                "objective": "flow_matching",
                "guidance_distillation": GuidanceDistillationConfig(),
                "teacher": "x",
            },
            "teacher is 'x', but the objective flow_matching has none",
        ),
    ],
)
def test_settings_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        dataclasses.replace(TINY, **changes)


def test_settings_of_another_objective_are_refused():
    config = train_config.config_dict(TrainConfig())
    with pytest.raises(ValueError, match="acts with objective='guidance_distillation' only"):
        train_config.parse(config, [("guidance_distillation.guide", "apg")])


def test_a_teacher_of_other_tokens_is_refused():
    with pytest.raises(
        ValueError, match=r"vec_in_dim 64, the student 128.*name another by teacher"
    ):
        task_of(teacher="tiny")


def test_weights_of_another_size_are_refused_but_for_guidance():
    config = dataclasses.replace(TINY, weights="tiny-scenes", encoders="untrained")
    with pytest.raises(ValueError, match="tiny-scenes is no tiny-kontext-guided: hidden_size 128"):
        make_task(config, open_untrained)
    plain = dataclasses.replace(
        TINY, objective="flow_matching", weights="tiny-kontext", encoders="untrained"
    )
    with pytest.raises(ValueError, match="guidance_embed False, expected True"):
        make_task(plain, open_untrained)


def test_the_full_size_is_planned_with_a_teacher_that_takes_no_guidance():
    config = read_config("guidance_distill")
    ready = programs.without_weights(config, "cpu")
    assert ready.weights and not ready.teacher
    assert programs.default_inputs(config) == ((1024, 1024), 1)
    task = make_task(ready, lambda path: untrained_bundle("kontext-base"))
    teacher = task.frozen_shapes()["teacher"]
    assert "guidance_in" not in teacher
    student = jax.eval_shape(task.objective.init, jax.random.key(0)).params
    assert student["guidance_in"]["out_layer"]["kernel"].shape == (3072, 3072)


@pytest.fixture(scope="module")
def encoded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("set")
    write_pairs(folder / "pairs", 24)
    with pytest.MonkeyPatch.context() as patch:
        encode_helpers.use_hand_encoders(patch.setattr)
        assert run(folder / "pairs", folder / "real") == 0
        assert run(folder / "pairs", folder / "guided") == 0
    return folder


def test_a_dry_run_reads_real_and_synthetic_examples(encoded, tmp_path, monkeypatch):
    monkeypatch.setattr(transformer, "encoder_facts", lambda bundle, tokens: {"max": 128})
    real = str(encoded / "real")
    data = dataclasses.replace(TINY.data, cache=real, synthetic_cache=str(encoded / "guided"))
    config = dataclasses.replace(
        TINY, weights="tiny-kontext", encoders="untrained", batch_size=4, data=data,
        eval=dataclasses.replace(TINY.eval, cache=real, num_batches=1),
    )  # fmt: skip
    told = []
    dry_run(config, str(tmp_path / "run"), open_weights=open_untrained, tell=told.append)
    text = "\n".join(told)
    assert "teacher: tiny-kontext, untrained" in text and "48 examples an epoch" in text
    assert "5,244,864 trained parameters beside 5,158,464 frozen" in text


class Stream:
    """Numbers from 0, as a stream of batches."""

    def __init__(self, name):
        self.name, self.at, self.counts = name, 0, {"epochs": 1, "skipped": 2}

    def __next__(self):
        self.at += 1
        return self.name, self.at - 1

    def state(self):
        return {"at": self.at}

    def restore(self, state):
        self.at = state["at"]

    def close(self):
        self.at = None


def mixed(seed=0, shares=(0.7, 0.3)):
    return MixedBatches([Stream("real"), Stream("synthetic")], shares, seed)


def test_each_step_is_of_one_stream_and_shares_are_kept():
    batches = mixed()
    names, numbers = zip(*[next(batches) for _ in range(4000)], strict=True)
    assert abs(names.count("synthetic") / 4000 - 0.3) < 0.03
    for name in ("real", "synthetic"):  # nothing of a stream is left out
        mine = [number for n, number in zip(names, numbers, strict=True) if n == name]
        assert mine == list(range(len(mine)))
    assert [batches.part_of(n) for n in range(64)] != [mixed(1).part_of(n) for n in range(64)]
    assert batches.counts == {"epochs": 1, "skipped": 4}


def test_a_mixed_stream_goes_on_where_it_stopped():
    whole, first, second = mixed(), mixed(), mixed()
    expected = [next(whole) for _ in range(20)]
    found = [next(first) for _ in range(7)]
    second.restore(first.state())
    assert found + [next(second) for _ in range(13)] == expected
    with pytest.raises(ValueError, match="shares was"):
        mixed(shares=(0.5, 0.5)).restore(first.state())
    with pytest.raises(ValueError, match="do not sum to 1"):
        mixed(shares=(0.5, 0.6))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"synthetic_cache": "x", "sources": ("y",)}, "mixed with data.cache, which is empty"),
        ({"synthetic_cache": "x", "cache": "y", "synthetic_share": 1.0}, "between 0 and 1"),
        ({"cache": "y", "synthetic_share": 0.2}, "but there is no data.synthetic_cache"),
    ],
)
def test_a_mixture_of_nothing_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        DataConfig(**fields).check()


# Policies


def policy_task(weights="tiny-kontext-guided", **changes):
    config = dataclasses.replace(
        read_config("tiny_policy"), weights=weights, encoders="untrained", **changes
    )
    return make_task(config, open_untrained)


@pytest.mark.parametrize(("weights", "passes"), [("tiny-kontext-guided", 1), ("tiny-kontext", 2)])
def test_a_policy_starts_as_its_teachers_velocity(weights, passes):
    """Ten times; and a teacher that takes no guidance is asked twice."""
    task = policy_task(weights)
    assert "its last layer repeated for 10 velocities" in task.sources[0]
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    place = lambda path, shape: here  # noqa: E731
    teacher = dict(flatten(task.load_frozen(place)["teacher"]))
    student = dict(flatten(task.load_params(place)))
    wanted = np.tile(teacher["final_layer/kernel"], (1, 10))
    np.testing.assert_array_equal(student["final_layer/kernel"], wanted)
    assert ("guidance_in/in_layer/kernel" in teacher) == (passes == 1)
    work = task.work(task.abstract_batch(4, (64, 64), 1))
    student, teacher = (
        mmdit_flops(PRESETS[name].mmdit, 16, 32) for name in ("tiny-kontext-policy", weights)
    )
    assert work.flops == pytest.approx(4 * (student.training() + 2 * passes * teacher.forward))


def test_a_policy_teaches_no_other():
    with pytest.raises(ValueError, match=r"takes other tokens .*out_channels 640, the student 64"):
        policy_task(teacher="tiny-kontext-policy")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "weights", "parameters"),
    [
        ("guidance_distill", "kontext-base", 11_901_408_320),
        ("policy_distill", "kontext-dev", 11_903_178_368),
    ],
)
def test_the_full_size_step_is_traced_as_it_stands(name, weights, parameters):
    """With pictures that are not square."""
    config = dataclasses.replace(
        read_config(name),
        weights=weights,
        encoders=weights,
        batch_size=2,
        accumulate_steps=1,
        attention_backend="reference",
    )
    state, _ = trace_step(make_task(config, open_untrained), (1024, 768), 1)
    assert count(state.params) == parameters


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tiny_guidance_distill", "tiny_policy"])
def test_an_interrupted_run_is_the_unbroken_one(tmp_path, name):
    """To the last bit; and it samples as its card says."""
    tiny = read_config(name)
    config = dataclasses.replace(
        tiny,
        weights="tiny-kontext",
        encoders="tiny-kontext",
        num_steps=4,
        batch_size=2,
        optimizer=dataclasses.replace(tiny.optimizer, warmup_steps=2),
        data=DataConfig(sources=("scenes:easy:train:30",), buckets=("64x64",)),
        eval=EvalConfig(),
        checkpoint=CheckpointConfig(every_steps=3),
        log=dataclasses.replace(tiny.log, every_steps=1),
    )
    whole, rows, states = run_whole_and_broken(config, tmp_path, open_untrained)
    assert rows[0] == rows[1] and len({row["param_norm"] for row in rows[0]}) == 4
    jax.tree.map(np.testing.assert_array_equal, *states)

    preset = training_bundle(whole, open_weights=open_untrained).preset
    if name == "tiny_policy":
        assert preset.default_sampler == "policy" and preset.num_velocities == 10
        assert preset.default_timesteps == (1.0, 0.75, 0.5, 0.25) and not preset.shift_timesteps
    else:
        assert preset.mmdit.guidance_embed and preset.default_true_cfg_scale == 1
