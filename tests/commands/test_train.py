"""The commands of docs/training.md, typed in order; the real networks in the real loop."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from kontext_jax.training import metrics
from kontext_jax.training.journal import SAMPLES

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "training.md"


def commands() -> list[str]:
    blocks = re.findall(r"```sh\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if line]


def test_the_page_names_every_config():
    listed = set(re.findall(r"^\| `(\w+)` \|", PAGE.read_text("utf-8"), re.MULTILINE))
    elsewhere = ("scenes_", "tiny_")  # docs/learning.md, docs/tiny.md
    configs = {path.stem for path in (ROOT / "configs").glob("*.py")}
    assert {name for name in configs if not name.startswith(elsewhere)} == listed


@pytest.mark.slow
def test_the_commands_of_the_page(tmp_path):
    for name in ("train.py", "configs", "kontext_jax", "convert_weights"):
        (tmp_path / name).symlink_to(ROOT / name)
    environment = {
        **os.environ,
        "KONTEXT_JAX_CACHE": str(tmp_path / "cache"),
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    }
    outputs = []
    for command in commands():
        typed = re.sub(r"^python", sys.executable, command)
        ran = subprocess.run(
            typed, shell=True, cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert ran.returncode == 0, f"{command}\n{ran.stdout}\n{ran.stderr}"
        outputs.append(ran.stdout)
    first, again, printed, dry, adapter = outputs
    assert "step 30/30" in first and "compiled step in" in first
    assert "going on from step 30" in again and "step 36/36" in again
    assert '"learning_rate": 0.001' in printed
    assert "nothing was compiled" in dry
    assert "beside 2,358,080 frozen" in adapter

    run = tmp_path / "runs" / "tiny"
    lines = metrics.read(run / metrics.FILE)
    assert [line["step"] for line in lines] == list(range(1, 37))
    assert {"loss_edit", "loss_t2i"} <= {name for line in lines for name in line}
    held_out = [line["loss"] for line in metrics.read(run / metrics.FILE, "eval")]
    assert held_out[-1] < 0.8 * held_out[0]
    assert (run / SAMPLES / "30.png").exists()
    params = tmp_path / "runs" / "adapter" / "checkpoints" / "30" / "arrays" / "params"
    assert sum(path.stat().st_size for path in params.rglob("*") if path.is_file()) < 2e6
