"""Requests are checked before anything is computed, with messages a person can act on."""

import dataclasses
import json

import pytest
from PIL import Image

from kontext_jax.models.presets import PRESETS
from kontext_jax.sampling.jobs import read_jobs
from kontext_jax.sampling.requests import (
    FIELDS,
    SampleRequest,
    complete,
    find_image,
    prepare,
    request_from_dict,
    request_to_dict,
)

KONTEXT = PRESETS["kontext-dev"]


def test_fields_are_those_of_the_dataclass():
    assert tuple(field.name for field in dataclasses.fields(SampleRequest)) == FIELDS


def test_a_request_survives_json():
    request = SampleRequest(
        "naïve 猫", images=("a.png", "b.png"), then=["more"], guidance=3, restore_size=True
    )
    values = json.loads(json.dumps(request_to_dict(request)))
    assert request_from_dict(values) == request


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"num_steps": -3}, r"num_steps \(--steps\) is -3; expected 1 to 1000"),
        ({"num_steps": 0}, "expected 1 to"),
        ({"num_steps": 2.5}, "expected a whole number"),
        ({"num_steps": True}, "expected a whole number"),
        ({"seed": -1}, "expected 0 to"),
        ({"seed": 2**32 - 1, "num_images": 2}, "exceeds"),
        ({"num_images": 0}, "expected 1 to"),
        ({"guidance": float("nan")}, "expected a number"),
        ({"guidance": "high"}, "expected a number"),
        ({"prompt": "  "}, "prompt is empty"),
        ({"then": ["ok", ""]}, "prompt is empty"),
        ({"then": "more"}, "expected a list of strings"),
        ({"images": "a.png"}, "expected a list of strings"),
        ({"images": 3}, "expected a list of strings"),
        ({"restore_size": "yes"}, "expected true or false"),
        ({"numerics": "difusers"}, "did you mean diffusers"),
        ({"position_rule": "indx"}, "did you mean index"),
        ({"reference_size": "own"}, "expected one of auto, match"),
        ({"true_cfg_scale": 0.5, "negative_prompt": "dull"}, "expected 1 to"),
        ({"position_rule": "width"}, "there are none"),
        ({"num_step": 3}, "unknown key 'num_step' .did you mean num_steps"),
        ({"zzz": 3}, "valid keys are prompt"),
    ],
)
def test_bad_values_are_refused(values, said):
    with pytest.raises(ValueError, match=said) as caught:
        request_from_dict({"prompt": "make it red"} | values)
    assert "\n" not in str(caught.value)


def test_guidance_away_from_a_prompt_is_completed_by_the_model():
    plain = PRESETS["kontext-base"]
    guided = dataclasses.replace(plain, default_true_cfg_scale=2.5)

    def completed(preset, **options):
        request = complete(SampleRequest("x", **options), preset)
        assert complete(request, preset) == request  # as when a picture is made again
        return request.true_cfg_scale, request.negative_prompt

    assert completed(plain) == (1, None)
    assert completed(plain, true_cfg_scale=2.0, negative_prompt="") == (2, "")
    assert completed(guided) == (2.5, "")
    assert completed(guided, true_cfg_scale=4.0) == (4, "")
    assert completed(guided, negative_prompt="dull") == (2.5, "dull")
    assert completed(guided, true_cfg_scale=1.0) == (1, None)
    assert completed(guided, true_cfg_scale=1.0, negative_prompt="") == (1, None)
    for preset, options, said in (
        (plain, {"negative_prompt": "dull"}, "has no effect"),
        (plain, {"negative_prompt": ""}, "has no effect"),
        (plain, {"true_cfg_scale": 2.0}, "no negative prompt"),
        (guided, {"true_cfg_scale": 1.0, "negative_prompt": "dull"}, "has no effect"),
    ):
        with pytest.raises(ValueError, match=said):
            completed(preset, **options)


def test_a_prompt_is_needed():
    with pytest.raises(ValueError, match="no prompt"):
        request_from_dict({"seed": 1})


@pytest.mark.parametrize(
    ("preset", "numerics", "num_steps", "guidance"),
    [
        ("kontext-dev", "exact", 30, 2.5),
        ("kontext-dev", "bfl", 30, 2.5),
        ("kontext-dev", "diffusers", 28, 3.5),
        ("flux-schnell", "exact", 4, None),
        ("krea-dev", "exact", 28, 4.5),
    ],
)
def test_defaults_are_those_of_the_published_command_lines(preset, numerics, num_steps, guidance):
    request = complete(SampleRequest("x", numerics=numerics), PRESETS[preset])
    assert (request.num_steps, request.guidance) == (num_steps, guidance)
    own = complete(SampleRequest("x", numerics=numerics, num_steps=7), PRESETS[preset])
    assert own.num_steps == 7


@pytest.mark.parametrize(
    ("preset", "options", "said"),
    [
        ("flux-schnell", {"guidance": 3.0}, "flux-schnell takes no guidance"),
        ("flux-dev", {"images": ["a.png"]}, "leave out --image"),
        ("krea-dev", {"then": ["more"]}, "leave out --then"),
    ],
)
def test_options_that_a_model_lacks_are_refused(preset, options, said):
    with pytest.raises(ValueError, match=said):
        complete(SampleRequest("x", **options), PRESETS[preset])


def test_one_line_says_what_is_done_to_every_image(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("L", (300, 451)).save(tmp_path / "a.png", exif=exif)
    Image.new("RGB", (1024, 1024)).save(tmp_path / "b.png")
    request = SampleRequest("x", images=["a.png", "b.png"])
    assert prepare(request, KONTEXT, tmp_path).lines() == [
        "a.png 451×300 [turned by 90° (EXIF orientation 6); grey → RGB] → reference 1248×832 "
        "(Lanczos, stretched 0.22 %) → output 1248×832",
        "b.png 1024×1024 → reference 1024×1024 (as it is)",
    ]
    restored = prepare(dataclasses.replace(request, restore_size=True), KONTEXT, tmp_path)
    assert restored.lines()[0].endswith(
        "→ reference 1248×832 (Lanczos, 0.2 % filled up, stretched 0 %) → output 1248×832 → "
        "451×300, stretched 0 %"
    )
    assert prepare(SampleRequest("x"), KONTEXT).lines() == ["no image → output 1024×1024"]


def test_the_example_ships_with_the_package():
    assert find_image("example:cat").is_file()
    with pytest.raises(ValueError, match="did you mean example:cat"):
        find_image("example:catt")


def test_jobs_keep_going_after_a_bad_line(tmp_path):
    path = tmp_path / "jobs.jsonl"
    path.write_text(
        '{"prompt": "a"}\n\n{"prompt": "b", "output": "b.png"}\n{"promt": "c"}\nnot json\n[1]\n'
        '{"prompt": "d", "output": "b.png"}\n{"prompt": "e", "output": "../e.png"}\n'
        '{"prompt": "f", "output": "f.jpg"}\n'
    )
    jobs = read_jobs(path)
    assert [job.line for job in jobs] == [1, 3, 4, 5, 6, 7, 8, 9]
    assert [job.output for job in jobs[:2]] == ["jobs-1.png", "b.png"]
    assert [job.error is None for job in jobs] == [True, True] + [False] * 6
    for job, said in zip(
        jobs[2:],
        [
            "did you mean prompt",
            "Expecting value",
            "an object",
            "taken",
            "leaves",
            "ending in .png",
        ],
        strict=True,
    ):
        assert said in job.error and job.request is None


def test_jobs_files_without_jobs_are_refused(tmp_path):
    (tmp_path / "empty").write_text("\n\n")
    with pytest.raises(ValueError, match="has no lines"):
        read_jobs(tmp_path / "empty")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="no UTF-8"):
        read_jobs(tmp_path / "binary")
    with pytest.raises(OSError):
        read_jobs(tmp_path / "missing")
