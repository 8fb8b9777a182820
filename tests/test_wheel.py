"""The wheel, installed outside the checkout, is the whole product: commands, configs, assets."""

import os
import re
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

from kontext_jax.runtime.versions import VERSION

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", folder, ROOT]
    subprocess.run(list(map(str, build)), check=True, capture_output=True)
    (found,) = folder.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """The `bin` folder of an environment that has the wheel, and this one's other packages."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False)
    site = Path(sysconfig.get_path("purelib", vars={"base": folder, "platbase": folder}))
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", site, wheel]
    subprocess.run(list(map(str, install)), check=True, capture_output=True)
    # The dependencies of the environment that runs the tests; its own kontext_jax comes after.
    (site / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    script = folder / "bin" / "kontext"
    script.write_text(
        f"#!{folder / 'bin' / 'python'}\nimport sys\nfrom kontext_jax.__main__ import main\n"
        "sys.exit(main())\n"
    )
    script.chmod(0o755)
    return folder / "bin"


def run(words, cwd: Path) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        list(map(str, words)), cwd=cwd, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{words}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def test_it_holds_commands_configs_assets_and_types(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    assert wheel.name.startswith(f"kontext_jax-{VERSION}-")
    assert {
        "kontext_jax/py.typed",
        "kontext_jax/configs/tiny.py",
        "kontext_jax/commands/edit.py",
        "kontext_jax/assets/models/tiny/mmdit/params.safetensors",
        "kontext_jax/plan/h100.txtpb",
        "convert_weights/__main__.py",
    } <= names
    assert any(name.endswith("entry_points.txt") for name in names)
    assert not any(name.startswith(("tests/", "tools/", "experiments/")) for name in names)


def test_commands_run_outside_the_checkout(installed, tmp_path):
    kontext, python = installed / "kontext", installed / "python"
    where = run([python, "-c", "import kontext_jax; print(kontext_jax.__file__)"], tmp_path)
    assert str(installed.parent) in where
    assert VERSION in run([kontext, "--version"], tmp_path)
    run([kontext, "edit", "--steps", "2", "-o", "edited.png"], tmp_path)
    assert (tmp_path / "edited.png").stat().st_size > 1000
    short = ["--config.num_steps=12", "--config.eval.every_steps=0"]
    run([kontext, "train", "--config", "tiny", *short], tmp_path)
    assert (tmp_path / "runs/tiny/checkpoints/12/manifest.json").exists()
    assert "to-torch" in run([kontext, "convert", "--help"], tmp_path)


def test_the_python_of_the_readme_runs(installed, tmp_path):
    (block,) = re.findall(
        r"```python\n(.*?)```", (ROOT / "README.md").read_text("utf-8"), re.DOTALL
    )
    (tmp_path / "outputs").mkdir()
    run([installed / "python", "-c", block], tmp_path)
    assert list((tmp_path / "outputs").glob("*.png"))
