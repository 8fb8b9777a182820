"""The count of errors of types falls and never rises (tools/types_ratchet.py)."""

import importlib
import json
import sys
from pathlib import Path

import pytest

TOOLS = Path(__file__).parents[1] / "tools"

OUTPUT = """\
kontext_jax/data/index.py:12: error: Incompatible return value type  [return-value]
kontext_jax/data/index.py:12: note: said about it
kontext_jax/types.py:3: error: Missing  [name-defined]
convert_weights/io.py:7: error: Item "None" has no attribute "x"  [union-attr]
Found 3 errors in 3 files (checked 9 source files)
"""


@pytest.fixture
def ratchet(monkeypatch):
    monkeypatch.syspath_prepend(str(TOOLS))
    monkeypatch.delitem(sys.modules, "types_ratchet", raising=False)
    return importlib.import_module("types_ratchet")


@pytest.fixture
def allow(ratchet, monkeypatch, tmp_path):
    """Sets what is allowed and what mypy says; returns the file of the former."""

    def set_up(allowed: dict[str, int], output: str = OUTPUT) -> Path:
        path = tmp_path / "allowed.json"
        path.write_text(json.dumps(allowed))
        monkeypatch.setattr(ratchet, "ALLOWED", path)
        monkeypatch.setattr(ratchet, "run_mypy", lambda python: output)
        return path

    return set_up


def test_errors_are_counted_by_room(ratchet):
    counts = {room: len(lines) for room, lines in ratchet.errors(OUTPUT).items()}
    assert counts == {"data": 1, "types": 1, "convert_weights": 1}


def test_a_rise_fails_and_is_not_written(ratchet, allow, capsys):
    output = OUTPUT.replace("convert_weights/io", "kontext_jax/data/x")
    path = allow({"data": 1, "types": 1}, output)
    assert ratchet.main(["--write"]) == 1
    assert json.loads(path.read_text()) == {"data": 1, "types": 1}
    printed = capsys.readouterr().out
    assert "data: 2 errors of types, 1 allowed" in printed
    assert "kontext_jax/data/x.py:7" in printed and "types.py" not in printed


def test_a_required_room_has_none_whatever_is_allowed(ratchet, allow):
    allow({"data": 1, "types": 1, "convert_weights": 5})
    assert ratchet.main([]) == 1


def test_a_fall_passes_and_is_kept_by_writing(ratchet, allow, capsys):
    output = OUTPUT.replace("convert_weights/io.py:7: error", "convert_weights/io.py:7: note")
    path = allow({"data": 4, "types": 1}, output)
    assert ratchet.main([]) == 0
    assert "--write" in capsys.readouterr().out
    assert json.loads(path.read_text())["data"] == 4
    assert ratchet.main(["--write"]) == 0
    assert json.loads(path.read_text()) == {"data": 1, "types": 1}


def test_required_rooms_are_allowed_nothing(ratchet):
    allowed = json.loads(ratchet.ALLOWED.read_text())
    assert not set(allowed) & set(ratchet.REQUIRED)
    assert all(count > 0 for count in allowed.values())
