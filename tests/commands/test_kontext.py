"""The command `kontext`: its sub-commands, their help and exit codes."""

import subprocess
import sys
import time

import pytest

from kontext_jax.__main__ import CHECKS, COMMANDS, EVALUATIONS, main
from kontext_jax.runtime.versions import VERSION


def test_alone_it_names_its_commands(capsys):
    assert main([]) == 0
    shown = capsys.readouterr().out
    assert all(f"\n  {name} " in shown for name in COMMANDS)


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"kontext_jax {VERSION}\n"


@pytest.mark.parametrize(
    ("typed", "meant"),
    [("edti", "edit"), ("evaluate scens", "scenes"), ("check wieghts", "weights")],
)
def test_a_wrong_word_ends_with_2_and_the_nearest(typed, meant, capsys):
    assert main(typed.split()) == 2
    assert f"did you mean {meant}?" in capsys.readouterr().err


EVERY = [
    *(name.split() for name in COMMANDS if name not in ("check", "evaluate")),
    *(["check", name] for name in CHECKS),
    *(["evaluate", name] for name in EVALUATIONS),
    *(["convert", name] for name in ("to-jax", "to-torch", "inspect", "check", "lora", "mix")),
]


@pytest.mark.parametrize("words", EVERY, ids=" ".join)
def test_every_help_names_the_command_that_was_typed(words, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([*words, "--help"])
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    assert shown.startswith(f"usage: kontext {' '.join(words)}")
    assert "python -m kontext_jax" not in shown and "python -m convert_weights" not in shown


@pytest.mark.parametrize("command", ["edit", "train", "check data", "plan"])
def test_help_shows_what_most_need_and_help_all_the_rest(command, capsys):
    lengths = []
    for flag in ("--help", "--help-all"):
        with pytest.raises(SystemExit):
            main([*command.split(), flag])
        lengths.append(len(capsys.readouterr().out))
    assert lengths[0] < lengths[1]


@pytest.mark.parametrize(
    "typed",
    [
        "edit --weights nowhere --prompt x",
        "edit --no-such-flag",
        "train --config tny",
        "convert inspect nowhere",
        "check weights nowhere",
        "check data nowhere",
        "encode nowhere --out x",
        "synthesize --model nowhere --cache x --out y",
        "plan --sample --topology nowhere",
        "evaluate scenes --weights nowhere --out x",
    ],
)
def test_bad_input_ends_with_2(typed, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    try:
        status = main(typed.split())
    except SystemExit as stopped:
        status = stopped.code
    assert status == 2
    assert capsys.readouterr().err.strip()
    assert not list(tmp_path.iterdir()), "nothing is left behind"


def test_a_config_is_found_by_its_name(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--config", "tiny", "--print-config"]) == 0
    assert '"preset": "tiny"' in capsys.readouterr().out


def test_help_is_there_before_jax_is():
    """In a process of its own: 0.3 s on a quiet machine, and JAX is not imported."""
    script = "import sys; from kontext_jax.commands.edit import main\n"
    script += "try: main(['--help'])\nexcept SystemExit: assert 'jax' not in sys.modules"
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
        seconds.append(time.perf_counter() - start)
        assert done.returncode == 0, done.stderr
    assert min(seconds) < 3  # other tests compile beside this one
