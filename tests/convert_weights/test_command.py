"""The command line, as a person types it: exit codes, one line of summary, errors to act on."""

import json

import numpy as np
import pytest

from convert_weights.__main__ import main, parse_axes, parse_size
from tests.convert_helpers import (
    HEAD_128,
    MMDIT,
    random_tensors,
    write_pipeline,
    write_tensors,
)


def run(capsys, *arguments):
    code = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_a_model_goes_there_and_back_and_checks_equal(tmp_path, capsys):
    write_pipeline(tmp_path / "source", "BF16")
    code, out, _ = run(capsys, "to-jax", tmp_path / "source", "--out", tmp_path / "ours")
    assert code == 0
    assert out.count("\n") == 1
    assert "FLUX transformer, autoencoder, T5 text encoder, CLIP text encoder; kontext-dev" in out
    for layout in ("bfl", "diffusers"):
        target = tmp_path / layout
        code, *_ = run(
            capsys, "to-torch", tmp_path / "ours", "--layout", layout, "--out", target,
            "--max-shard-size", "50KB",
        )  # fmt: skip
        assert code == 0
        code, out, _ = run(capsys, "check", tmp_path / "source", target)
        assert (code, out.strip().endswith("the same weights")) == (0, True)


def test_check_lists_every_difference_and_exits_1(tmp_path, capsys):
    w = random_tensors("mmdit", HEAD_128, "bfl")
    a = write_tensors(tmp_path / "a-dev.safetensors", w)
    w["img_in.bias"][3] += 1
    w["single_blocks.0.linear1.weight"][0, 0] += 0.5
    b = write_tensors(tmp_path / "b-dev.safetensors", w)
    code, out, _ = run(capsys, "check", a, b)
    assert code == 1
    assert "mmdit: img_in/bias values differ by up to 1" in out
    assert "mmdit: single_blocks/q/kernel [0] values differ by up to 0.5" in out
    assert "2 differences" in out
    write_pipeline(tmp_path / "whole")
    code, out, _ = run(capsys, "check", a, tmp_path / "whole")
    assert code == 1
    assert "+ autoencoder is only in the second" in out
    assert "config hidden_size 256 and 64" in out


def test_check_tells_a_change_of_dtype_from_a_change_of_value(tmp_path, capsys):
    w = random_tensors("mmdit", HEAD_128, "bfl", "BF16")
    a = write_tensors(tmp_path / "a-dev.safetensors", w)
    b = write_tensors(
        tmp_path / "b-dev.safetensors", {n: t.astype(np.float32) for n, t in w.items()}
    )
    code, out, _ = run(capsys, "check", a, b)
    assert code == 0
    assert "tensors stored as bfloat16 and float32" in out


def test_inspect_says_what_a_file_is(tmp_path, capsys):
    w = random_tensors("mmdit", HEAD_128, "bfl", "BF16")
    source = write_tensors(tmp_path / "flux1-dev.safetensors", w, "model.diffusion_model.")
    code, out, _ = run(capsys, "inspect", source)
    assert code == 0
    for words in ("FLUX transformer", "flux-dev", "bfl", f"{len(w)} bfloat16"):
        assert words in out
    assert f"{sum(t.size for t in w.values()):,}" in out


@pytest.mark.parametrize("command", ["to-jax", "to-torch", "check", "inspect"])
def test_errors_go_to_stderr_with_exit_code_1_and_leave_nothing(tmp_path, capsys, command):
    (tmp_path / "broken.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{}")
    before = sorted(tmp_path.iterdir())
    arguments = {
        "to-jax": ["broken.safetensors", "--out", "out"],
        "to-torch": [".", "--out", "out", "--layout", "bfl"],
        "check": ["broken.safetensors", "broken.safetensors"],
        "inspect": ["broken.safetensors"],
    }[command]
    paths = [str(tmp_path / a) if a in (".", "out") or "." in a else a for a in arguments]
    code, out, err = run(capsys, command, *paths)
    assert (code, out) == (1, "")
    assert err.startswith("error: ")
    assert sorted(tmp_path.iterdir()) == before


def test_a_bare_file_of_small_heads_wants_axes(tmp_path, capsys):
    source = write_tensors(tmp_path / "dev.safetensors", random_tensors("mmdit", MMDIT, "bfl"))
    code, _, err = run(capsys, "to-jax", source, "--out", tmp_path / "ours")
    assert code == 1 and "--axes-dim" in err
    code, *_ = run(capsys, "to-jax", source, "--out", tmp_path / "ours", "--axes-dim", "8,12,12")
    assert code == 0
    config = json.loads((tmp_path / "ours/mmdit/config.json").read_text())
    assert config["config"]["axes_dim"] == [8, 12, 12]


def test_a_model_of_unknown_origin_wants_a_preset(tmp_path, capsys, monkeypatch):
    folder = tmp_path / "w"
    source = write_tensors(folder / "model.safetensors", random_tensors("mmdit", HEAD_128, "bfl"))
    code, _, err = run(capsys, "to-jax", source, "--out", tmp_path / "ours")
    assert code == 1 and "pass --preset kontext-dev | flux-dev | krea-dev" in err
    code, out, _ = run(capsys, "to-jax", source, "--out", tmp_path / "ours", "--preset", "krea-dev")
    assert code == 0 and "krea-dev" in out


def test_a_full_disk_is_noticed_before_anything_is_written(tmp_path, capsys, monkeypatch):
    source = write_tensors(tmp_path / "dev.safetensors", random_tensors("mmdit", HEAD_128, "bfl"))
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    code, _, err = run(capsys, "to-jax", source, "--out", tmp_path / "deep/ours")
    assert code == 1 and "GB free" in err
    assert not (tmp_path / "deep").exists()


def test_sizes_and_axes_are_parsed_or_refused():
    assert parse_size("10GB") == 10**10
    assert parse_size("1.5 mib") == 3 * 2**19
    assert parse_size("77") == 77
    assert parse_axes("16,56,56") == (16, 56, 56)
    for function, text in ((parse_size, "ten"), (parse_size, "0GB"), (parse_axes, "8,12")):
        with pytest.raises(Exception, match="is not"):
            function(text)


@pytest.mark.parametrize("command", ["to-jax", "to-torch", "check", "inspect"])
def test_help_names_what_it_takes(capsys, command):
    with pytest.raises(SystemExit) as error:
        main([command, "--help"])
    assert error.value.code == 0
    assert "usage: python -m convert_weights" in capsys.readouterr().out


def test_inspect_describes_a_model_that_no_published_layout_holds(capsys):
    from kontext_jax.weights.bundle import PACKAGED

    assert main(["inspect", str(PACKAGED["tiny"])]) == 0
    assert "none: the autoencoder folds patches of 4×4" in " ".join(capsys.readouterr().out.split())
    assert main(["to-torch", str(PACKAGED["tiny"]), "--layout", "diffusers", "--out", "x"]) != 0
