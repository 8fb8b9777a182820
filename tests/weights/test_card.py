"""How models say they want to be sampled, and that sampling obeys."""

import dataclasses
import json

import numpy as np
import pytest

from kontext_jax.flow import path as flow
from kontext_jax.flow.names import check_timesteps
from kontext_jax.models.presets import PRESETS
from kontext_jax.objectives.ladd import LADDConfig
from kontext_jax.sampling.recipes import prepare_again
from kontext_jax.sampling.requests import SampleRequest, complete, prepare, request_from_dict
from kontext_jax.storage.safetensors_reader import TensorFileError
from kontext_jax.training.config import TrainConfig
from kontext_jax.training.config_tree import to_dict
from kontext_jax.weights import bundle as checkpoint
from kontext_jax.weights.card import check_defaults, defaults_of_run, sampling_rule

FAST = {
    "default_num_steps": 4,
    "default_sampler": "renoise",
    "default_timesteps": [1, 0.75, 0.5, 0.25],
    "default_guidance": 3,
    "default_true_cfg_scale": 1,
    "megapixels": 0.1,
}


def distilled():
    rule = sampling_rule({"shift_timesteps": False, "defaults": FAST})
    return dataclasses.replace(PRESETS["kontext-dev"], **rule)


def test_a_card_decides_what_a_request_leaves_open():
    request = complete(SampleRequest("x"), distilled())
    found = request.num_steps, request.sampler, request.timesteps, request.guidance
    assert found == (4, "renoise", (1, 0.75, 0.5, 0.25), 3)
    assert request.true_cfg_scale == 1 and complete(request, distilled()) == request
    assert prepare(SampleRequest("x"), distilled()).sampling_line() == (
        "sampling: 4 renoise steps at 1, 0.75, 0.5, 0.25, guidance 3"
    )
    plain = prepare(SampleRequest("x", num_steps=1), PRESETS["kontext-dev"])
    assert plain.sampling_line() == "sampling: 1 euler step, guidance 2.5"


def test_a_request_decides_against_the_card():
    other = complete(SampleRequest("x", num_steps=2, sampler="euler", guidance=1), distilled())
    found = other.num_steps, other.sampler, other.timesteps, other.guidance
    assert found == (2, "euler", None, 1)
    own = complete(SampleRequest("x", timesteps=[1, 0.3]), distilled())
    assert (own.num_steps, own.timesteps) == (2, (1, 0.3))
    again = request_from_dict(json.loads(json.dumps(dataclasses.asdict(own))))
    assert again == own


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"sampler": "eulr"}, "did you mean euler"),
        ({"timesteps": "1"}, "expected a list of numbers"),
        ({"timesteps": [1, "0.5"]}, "expected a number"),
        ({"timesteps": [0.9, 0.5]}, "falling from 1"),
        ({"timesteps": [1, 1]}, "falling from 1"),
        ({"timesteps": [1, 0]}, "falling from 1"),
        ({"timesteps": []}, "are none"),
        ({"timesteps": [1, 0.5], "num_steps": 3}, "num_steps .* is 3, but timesteps .* 2 steps"),
    ],
)
def test_bad_samplers_and_timesteps_are_refused(values, said):
    with pytest.raises(ValueError, match=said):
        request_from_dict({"prompt": "x", **values})


def test_schnell_takes_four_euler_steps_on_the_even_grid():
    schnell = PRESETS["flux-schnell"]
    request = complete(SampleRequest("x"), schnell)
    assert (request.num_steps, request.sampler, request.guidance) == (4, "euler", None)
    times = flow.sampling_schedule(4, 4096, schnell.shift_timesteps, request.timesteps)
    np.testing.assert_array_equal(times, [1, 0.75, 0.5, 0.25, 0])


def test_the_times_of_a_request():
    even = flow.sampling_schedule(3, 256, False)
    np.testing.assert_array_equal(even, flow.timestep_schedule(3, None))
    shifted = flow.sampling_schedule(3, 256, True)
    np.testing.assert_array_equal(shifted, flow.timestep_schedule(3, 0.5))
    own = flow.sampling_schedule(3, 256, True, (1, 0.5, 0.1))
    np.testing.assert_array_equal(own, np.float32([1, 0.5, 0.1, 0]))
    with pytest.raises(ValueError, match="2 timesteps for 3 steps"):
        flow.sampling_schedule(3, 256, True, (1, 0.5))
    assert check_timesteps([1, 0.5]) == (1, 0.5)


@pytest.mark.parametrize(
    ("defaults", "said"),
    [
        ({"default_num_step": 4}, "no default default_num_step; there are default_num_steps"),
        ({"default_num_steps": 0}, "default_num_steps is 0: expected a whole number"),
        ({"default_num_steps": True}, "expected a whole number"),
        ({"default_sampler": "ddim"}, "default_sampler is 'ddim': expected one of euler, renoise"),
        ({"default_timesteps": [0.5]}, "falling from 1"),
        ({"default_timesteps": 1}, "expected a list of numbers"),
        ({"default_true_cfg_scale": 0.5}, "expected a number from 1"),
        ({"megapixels": float("nan")}, "expected a number"),
    ],
)
def test_cards_that_make_no_sense_are_refused(defaults, said, tmp_path):
    with pytest.raises(ValueError, match=said):
        check_defaults(defaults)
    with pytest.raises(ValueError, match=said):
        checkpoint.write_manifest(tmp_path, "tiny", ["clip"], "a test", None, defaults=defaults)
    assert not any(tmp_path.iterdir())


def test_a_card_travels_with_its_folder(tmp_path):
    checkpoint.write_manifest(tmp_path, "kontext-dev", [], "a test", None, False, FAST)
    found = checkpoint.open_bundle(tmp_path, (), require_tokenizers=False).preset
    assert found == distilled()
    manifest = json.loads((tmp_path / checkpoint.MANIFEST).read_text())
    manifest["defaults"]["default_sampler"] = "ddim"
    (tmp_path / checkpoint.MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(TensorFileError, match=r"kontext_jax.json: default_sampler is 'ddim'"):
        checkpoint.open_bundle(tmp_path, (), require_tokenizers=False)


def test_what_a_run_was_for_decides_how_it_is_sampled():
    teacher = {"default_true_cfg_scale": 2.5, "default_num_steps": 20, "megapixels": 0.004}
    guided = defaults_of_run({"objective": "guidance_distillation"}, teacher)
    expected = teacher | {"default_true_cfg_scale": 1, "default_guidance": 2.5}
    assert guided == expected
    ladd = LADDConfig((1.0, 0.5), (0.5, 0.5), (0.0, 1.0))
    settings = to_dict(TrainConfig(objective="ladd", preset="tiny", weights="w", ladd=ladd))
    fast = defaults_of_run(settings, guided)
    assert fast == guided | {
        "shift_timesteps": False,
        "default_num_steps": 2,
        "default_sampler": "renoise",
        "default_timesteps": (1, 0.5),
        "default_guidance": settings["ladd"]["guidance"],
    }
    assert check_defaults({k: v for k, v in fast.items() if k != "shift_timesteps"})
    assert defaults_of_run({"objective": "flow_matching"}, teacher) == teacher


def test_packaged_models_are_named_and_a_missing_one_is_told(monkeypatch, tmp_path):
    monkeypatch.setitem(checkpoint.PACKAGED, "tiny-fast", tmp_path / "none")
    with pytest.raises(FileNotFoundError, match=r"has no model tiny-fast .*it has tiny\. tools"):
        checkpoint.shipped_bundle("tiny-fast")


def test_a_picture_made_again_with_other_steps_leaves_its_times(tmp_path):
    class Recipe:
        request = complete(SampleRequest("x", size="64x64"), distilled())
        image_hashes, path = (), tmp_path

    same = prepare_again(Recipe, distilled(), {})
    assert same[1] and same[0].request.timesteps == (1, 0.75, 0.5, 0.25)
    fewer, again = prepare_again(Recipe, distilled(), {"num_steps": 2})
    assert not again and (fewer.request.num_steps, fewer.request.timesteps) == (2, None)
    other, again = prepare_again(Recipe, distilled(), {"timesteps": [1, 0.9]})
    assert not again and other.request.num_steps == 2
