"""The notebooks run as they are, and lie here without their outputs."""

import contextlib
import json
from pathlib import Path

import pytest

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))


def cells(path: Path, kind: str) -> list[dict]:
    notebook = json.loads(path.read_text("utf-8"))
    return [cell for cell in notebook["cells"] if cell["cell_type"] == kind]


def test_the_three_are_there():
    assert [path.stem for path in NOTEBOOKS] == ["edit", "train", "velocity"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_outputs_are_stripped(path):
    assert all(
        cell["outputs"] == [] and cell["execution_count"] is None for cell in cells(path, "code")
    )


def run(path: Path, folder: Path) -> dict:
    """The names that a notebook leaves, its code cells having run in order in `folder`."""
    namespace = {"__name__": "__main__"}
    with contextlib.chdir(folder):
        for number, cell in enumerate(cells(path, "code"), start=1):
            code = compile("".join(cell["source"]), f"{path.name}, code cell {number}", "exec")
            exec(code, namespace)
    return namespace


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path, tmp_path, capsys):
    names = run(path, tmp_path)
    if path.stem == "edit":
        assert (tmp_path / "outputs" / "blue.png").is_file()
        assert "did you mean num_steps" in capsys.readouterr().out
    if path.stem == "velocity":
        assert "largest difference of a pixel: 0" in capsys.readouterr().out
        assert names["error"] < 0.01  # of Heun's method at the end
    if path.stem == "train":
        assert names["error"](names["after"]) < 0.4 * names["error"](names["before"])
