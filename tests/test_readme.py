"""Whatever the README tells a person to type runs: its shell blocks, line by line.

Set-up lines are left to continuous integration, which types them itself. Where a line names
published weights, small random ones stand under that name, and the picture is made small.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from convert_weights.__main__ import main as convert_weights
from kontext_jax.weights import bundle as checkpoint
from kontext_jax.weights.untrained import untrained_bundle

ROOT = Path(__file__).parents[1]
SET_UP = ("python3 -m venv", ".venv/bin/")
SMALL = " --megapixels 0.02 --steps 2"


def readme_commands() -> list[str]:
    """Every line of the README's shell blocks but comments and set-up."""
    blocks = re.findall(r"```sh\n(.*?)```", (ROOT / "README.md").read_text("utf-8"), re.DOTALL)
    lines = [line.strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line and not line.startswith(("#", *SET_UP))]


def write_published_weights(folder: Path) -> None:
    """The tiny model as a diffusers folder and as BFL's files, under the README's names."""
    bundle = untrained_bundle("tiny")
    own = folder / "tiny"
    for kind, component in bundle.components.items():
        checkpoint.save_component(own, kind, component.config, component.load())
    shutil.copytree(checkpoint.ASSETS / "tokenizers", own / "tokenizers")
    checkpoint.write_manifest(own, "tiny", checkpoint.KINDS, bundle.source, None)
    diffusers, bfl = folder / "FLUX.1-Kontext-dev", folder / "bfl"
    for layout, out in (("diffusers", diffusers), ("bfl", bfl)):
        assert convert_weights(["to-torch", str(own), "--layout", layout, "--out", str(out)]) == 0
    (transformer,) = bfl.glob("flux1-*.safetensors")
    transformer.rename(folder / "flux1-kontext-dev.safetensors")


def test_the_readme_has_commands_of_each_program():
    programs = {" ".join(c.split()[:3]) if "-m" in c else c.split()[1] for c in readme_commands()}
    assert {"sample.py", "train.py", "python -m convert_weights"} <= programs


@pytest.mark.slow
def test_readme_commands_run(tmp_path):
    for name in ("sample.py", "train.py", "configs", "convert_weights", "kontext_jax"):
        (tmp_path / name).symlink_to(ROOT / name)
    for name in ("bin", "outputs"):
        (tmp_path / name).mkdir()
    (tmp_path / "bin" / "python").write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    (tmp_path / "bin" / "python").chmod(0o755)
    shutil.copy(ROOT / "kontext_jax" / "assets" / "cat.jpg", tmp_path / "cat.png")
    write_published_weights(tmp_path)
    environment = {**os.environ, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
    for command in readme_commands():
        typed = command + SMALL * ("--weights" in command)
        run = subprocess.run(
            typed, shell=True, cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert run.returncode == 0, f"{typed}\n{run.stdout}\n{run.stderr}"
        for name in re.findall(r"-o (\S+\.png)", command):
            stem = tmp_path / name
            assert list(stem.parent.glob(f"{stem.stem}*.png")), command
