"""The Python of README.md and of the docs' pages runs, page by page, from top to bottom."""

import contextlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
WORKED = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs/extend").glob("*.md"))


@pytest.mark.parametrize("page", ["README.md", "docs/python.md", *WORKED])
def test_the_pages_python_runs(page, tmp_path):
    text = (ROOT / page).read_text("utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert blocks, page
    namespace = {"__name__": Path(page).stem}
    with contextlib.chdir(tmp_path):
        for block in blocks:
            exec(compile(block, page, "exec"), namespace)
    written = re.findall(r'save\("([^"]+)"\)', "".join(blocks))
    assert all((tmp_path / path).is_file() for path in written)


def test_there_are_worked_pages():
    assert len(WORKED) >= 4
