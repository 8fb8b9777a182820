"""Whatever the README tells a person to type runs: its shell blocks, line by line.

Set-up lines are left to continuous integration, which types them itself. Where a line names
published weights, small random ones stand under that name, and the picture is made small.
"""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from convert_weights.__main__ import main as convert_weights
from kontext_jax.__main__ import main as kontext
from kontext_jax.weights import bundle as checkpoint
from kontext_jax.weights.untrained import untrained_bundle

ROOT = Path(__file__).parents[1]
SET_UP = ("python3 -m venv", ".venv/bin/", ". .venv")
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
    assert {"edit", "train", "convert"} <= programs


def test_it_is_short():
    assert len((ROOT / "README.md").read_text("utf-8").split()) <= 1300


def type_command(words: list[str], folder: Path) -> int:
    """Runs a command: `kontext` in this process, `python` in one of its own."""
    if words[0] == "kontext":
        return kontext(words[1:])
    assert words[0] == "python"
    run = subprocess.run([sys.executable, *words[1:]], cwd=folder, capture_output=True, text=True)
    print(run.stdout, run.stderr)
    return run.returncode


@pytest.mark.slow
def test_readme_commands_run(tmp_path, monkeypatch):
    for name in ("sample.py", "train.py", "configs", "convert_weights", "kontext_jax"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "outputs").mkdir()
    shutil.copy(ROOT / "kontext_jax" / "assets" / "cat.jpg", tmp_path / "cat.png")
    write_published_weights(tmp_path)
    monkeypatch.chdir(tmp_path)
    for command in readme_commands():
        words = shlex.split(command + SMALL * ("--weights FLUX" in command))
        assert type_command(words, tmp_path) == 0, command
        for name in re.findall(r"-o (\S+\.png)", command):
            stem = tmp_path / name
            assert list(stem.parent.glob(f"{stem.stem}*.png")), command
        for name in re.findall(r"-o (\S+/)", command):
            assert list((tmp_path / name).glob("*.png")), command
