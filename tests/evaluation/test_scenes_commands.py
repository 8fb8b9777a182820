"""The commands of docs/learning.md, in order, each for a few steps."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# What makes each command short; its own options come before.
SHORTER = {
    "configs/scenes_vae.py": "--config.num_steps=4 --config.optimizer.warmup_steps=2 "
    "--config.eval.every_steps=0 --config.eval.sample_every_steps=4",
    "configs/scenes_kontext.py": "--config.num_steps=10 --config.optimizer.warmup_steps=2 "
    "--config.eval.every_steps=10 --config.eval.sample_every_steps=10",
    "kontext_jax.evaluation.edits": "--steps 2 --sheet 2",
}
COUNTS = [(r"(scenes:[\w-]+:\w+):\d+", r"\1:64"), (r"--num 250", "--num 20")]


def commands() -> list[str]:
    text = (ROOT / "docs/learning.md").read_text()
    block = re.search(r"## How to repeat it\n\n```\n(.*?)```", text, re.DOTALL).group(1)
    return block.replace("\\\n", " ").splitlines()


@pytest.mark.slow
def test_the_learning_run_can_be_repeated(tmp_path):
    for folder in ("configs", "tools", "experiments", "docs"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    (tmp_path / "train.py").symlink_to(ROOT / "train.py")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    for command in commands():
        for pattern, replacement in COUNTS:
            command = re.sub(pattern, replacement, command)
        words = shlex.split(command)
        for name, options in SHORTER.items():
            if name in words:
                words += options.split()
        words[-1] = words[-1].replace("docs/learning.png", "learning.png")
        if "configs/scenes_vae.py" in words:
            sizes = "--config.data.sources=scenes:easy-crowded:any:64"
            words += [sizes] if "data.sources" not in command else []
        done = subprocess.run(
            [sys.executable, *words[1:]],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
    report = json.loads((tmp_path / "runs/edits/edits.json").read_text())["report"]
    assert report["held_out"]["copy"]["success"]["percent"] == 0
    assert (tmp_path / "learning.png").stat().st_size > 1000
    assert (tmp_path / "runs/edits/edits.png").exists()
