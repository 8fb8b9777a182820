"""Filters of the user's: decisions kept and counted, failures told."""

import sys
from pathlib import Path

import pytest
from data_helpers import pairs, write_folder

from kontext_jax.data.config import DataConfig
from kontext_jax.data.dataset import open_dataset
from kontext_jax.data.filters import FilterError

FUNCTION = """
def keep(image, text, metadata):
    assert image.dtype == "uint8" and image.shape[-1] == 3
    assert metadata["contexts"][0].shape == image.shape and metadata["origin"] == "test"
    if text.endswith("3"):
        return False, "has a three"
    return not metadata["id"].endswith("1.png")

def fail(image, text, metadata):
    raise KeyError("no model")

def nonsense(image, text, metadata):
    return 0.7
"""

COMMAND = """
import base64, json, sys
from pathlib import Path
for line in sys.stdin:
    sample = json.loads(line)
    assert base64.b64decode(sample["image"]).startswith(b"\\x89PNG")
    assert len(sample["contexts"]) == 1 and sample["metadata"] == {"origin": "test"}
    with open(sys.argv[1], "a") as file:
        file.write(sample["id"] + "\\n")
    if sample["text"].endswith("5"):
        sys.exit(3)
    if sample["text"].endswith("4"):
        sample["id"] = "another"
    keep = not sample["text"].endswith("2")
    print(json.dumps({"id": sample["id"], "keep": keep, "reason": "two"}), flush=True)
"""


@pytest.fixture
def module(tmp_path, monkeypatch) -> str:
    """Name of a module with the functions."""
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "filter_of_a_user.py").write_text(FUNCTION)
    monkeypatch.syspath_prepend(tmp_path / "code")
    yield "filter_of_a_user"
    sys.modules.pop("filter_of_a_user", None)


def open_filtered(tmp_path: Path, count: int, told=None, **options):
    if not (tmp_path / "data").exists():
        write_folder(tmp_path / "data", pairs(count))
    config = DataConfig(sources=(str(tmp_path / "data"),), resolution=64, threads=2, **options)
    told = [] if told is None else told
    return open_dataset(config, index_dir=tmp_path / "index", tell=told.append)


def counts(dataset) -> dict[str, int]:
    return {reason: len(found) for reason, found in dataset.not_used().items()}


def test_a_function_drops_with_its_reasons(tmp_path, module):
    told = []
    dataset = open_filtered(tmp_path, 5, told, filter_function=f"{module}:keep")
    assert counts(dataset) == {"filtered: dropped": 1, "filtered: has a three": 1}
    assert (dataset.kind_of >= 0).tolist() == [True, False, True, False, True]
    assert any("data/3.png: filtered: has a three" in line for line in told)


def test_a_dropped_sample_is_not_a_bad_one(tmp_path, module):
    open_filtered(tmp_path, 5, filter_function=f"{module}:keep", on_bad_sample="stop")


def test_a_command_is_started_once_and_its_decisions_are_kept(tmp_path):
    (tmp_path / "filter.py").write_text(COMMAND)
    asked = tmp_path / "asked"
    command = f"{sys.executable} {tmp_path / 'filter.py'} {asked}"
    first = open_filtered(tmp_path, 4, filter_command=command)
    assert counts(first) == {"filtered: two": 1}
    assert sorted(asked.read_text().split()) == [f"data/{i}.png" for i in range(4)]
    again = open_filtered(tmp_path, 4, filter_command=command)
    assert again.fingerprint() == first.fingerprint()
    assert len(asked.read_text().split()) == 4
    without = open_filtered(tmp_path, 4)
    assert counts(without) == {}


def test_a_function_that_was_edited_is_asked_again(tmp_path, module):
    open_filtered(tmp_path, 5, filter_function=f"{module}:keep")
    path = tmp_path / "code" / f"{module}.py"
    path.write_text(FUNCTION.replace('"3"', '"0"'))
    sys.modules.pop(module)
    dataset = open_filtered(tmp_path, 5, filter_function=f"{module}:keep")
    assert (dataset.kind_of >= 0).tolist() == [False, False, True, True, True]


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("fail", FilterError, r"failed at sample data/\d\.png: KeyError\('no model'\)"),
        ("nonsense", FilterError, "returned 0.7 for sample .*expected a bool"),
        ("missing", ValueError, "cannot be imported.*no attribute 'missing'"),
    ],
)
def test_a_function_that_fails_stops_the_run(tmp_path, module, name, error, message):
    with pytest.raises(error, match=message):
        open_filtered(tmp_path, 2, filter_function=f"{module}:{name}")


@pytest.mark.parametrize(
    ("count", "message"),
    [
        (5, r'answered .*another.* to sample data/4\.png; expected {"id": "data/4\.png"'),
        (6, r"ended with exit status 3 at sample data/5\.png"),
    ],
)
def test_a_command_that_fails_stops_the_run(tmp_path, count, message):
    code = COMMAND if count == 5 else COMMAND.replace('"another"', 'sample["id"]')
    (tmp_path / "filter.py").write_text(code)
    command = f"{sys.executable} {tmp_path / 'filter.py'} {tmp_path / 'asked'}"
    with pytest.raises(FilterError, match=message):
        open_filtered(tmp_path, count, filter_command=command)


def test_a_command_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(ValueError, match="none cannot be run"):
        open_filtered(tmp_path, 1, filter_command=str(tmp_path / "none"))
