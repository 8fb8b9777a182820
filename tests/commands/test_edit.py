"""`python sample.py` as a user types it: what is printed, written and returned."""

import importlib.util
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import rich.console
from jax.experimental.compilation_cache import compilation_cache
from PIL import Image

from convert_weights.lora.write import write_lora
from kontext_jax.commands import edit
from kontext_jax.models.presets import PRESETS
from kontext_jax.pictures import files as images
from kontext_jax.runtime.programs import CACHE_VARIABLE
from kontext_jax.sampling.requests import find_image
from kontext_jax.terminal import StepLine
from kontext_jax.weights import bundle as checkpoint
from kontext_jax.weights.untrained import untrained_bundle
from tests.lora_helpers import draw_adapter

SCRIPT = Path(__file__).parents[2] / "sample.py"
TINY = ["--steps", "1", "--megapixels", "0.004096"]
SMALL = ["--model", "untrained", *TINY]
CAT = str(find_image("example:cat"))
FAST = {
    "default_num_steps": 2,
    "default_sampler": "renoise",
    "default_timesteps": [1, 0.4],
    "default_guidance": 3,
}


@pytest.fixture(scope="module")
def sample():
    spec = importlib.util.spec_from_file_location("sample", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def cache_dir(tmp_path_factory):
    """Programs compiled once for all tests here, and JAX's settings as they were afterwards."""
    names = (
        "jax_compilation_cache_dir",
        "jax_persistent_cache_min_compile_time_secs",
        "jax_persistent_cache_min_entry_size_bytes",
        "jax_disable_most_optimizations",
    )
    before = {name: jax.config.values[name] for name in names}
    jax.config.update("jax_disable_most_optimizations", True)  # they run for milliseconds
    yield tmp_path_factory.mktemp("compiled")
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.fixture
def cli(sample, cache_dir, tmp_path, monkeypatch, capsys):
    """Runs the command line in an empty folder: (status, stdout, stderr)."""
    monkeypatch.setenv(CACHE_VARIABLE, str(cache_dir))
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        try:
            status = sample.main([str(argument) for argument in arguments])
        except SystemExit as exit:
            status = exit.code
        return status, *capsys.readouterr()

    return run


def files(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def test_one_command_edits_the_picture_that_ships(tmp_path):
    environment = {**os.environ, CACHE_VARIABLE: str(tmp_path / "cache"), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, SCRIPT, "--show", "timings"],
        cwd=tmp_path,
        env=environment | {"PYTHONPATH": str(SCRIPT.parent)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    assert "untrained" not in done.stdout and str(tmp_path / "cache") in done.stdout
    assert any(line.startswith("example:cat 451×300 → reference 64×48 (Lanczos") for line in lines)
    assert "sampling: 20 euler steps, classifier-free guidance 2.5" in lines
    assert "wrote outputs/edit-001.png (64×48, seed 0)" in lines
    stages = [line.split()[0] for line in lines if line.startswith("  ")]
    assert set(stages) == {"load", "compile", "encode", "denoise", "decode", "write", "total"}
    assert any((tmp_path / "cache").iterdir())
    asked = images.read_metadata(tmp_path / "outputs" / "edit-001.png")["request"]
    assert (asked["true_cfg_scale"], asked["negative_prompt"]) == (2.5, "")  # the model's own
    check_framed(tmp_path / "outputs" / "edit-001.png")


def check_framed(path: Path) -> None:
    """A red frame is around the cat, and the cat is still there."""
    made = images.load_picture(path).pixels
    border = np.ones(made.shape[:2], bool)
    border[3:-3, 3:-3] = False
    red, green, blue = made[border].mean(axis=0)
    assert red > 2 * max(green, blue), "the frame that was asked for"
    before = images.resize(images.load_picture(find_image("example:cat")).pixels, 64, 48)
    inside = (slice(12, -12), slice(12, -12))
    alike = np.corrcoef(made[inside].ravel(), before[inside].ravel())[0, 1]
    assert alike > 0.8, "what it does not touch stays"


@pytest.mark.parametrize(
    ("steps", "said"),
    [
        ((), "4 renoise steps at 1, 0.75, 0.5, 0.25, guidance 2.5"),
        (("--steps", "1"), "1 renoise step, guidance 2.5"),
    ],
)
def test_the_fast_model_edits_in_as_many_passes_as_steps(cli, tmp_path, steps, said):
    frame = "put a red frame around the picture"
    status, out, err = cli(
        "--model", "tiny-fast", *steps, "--image", "example:cat", "--prompt", frame, "-o", "a.png"
    )
    assert (status, err) == (0, "") and f"sampling: {said}" in out.splitlines()
    check_framed(tmp_path / "a.png")


def test_an_untrained_model_is_said_to_be_one(cli):
    status, out, _ = cli(*SMALL, "--image", CAT, "--prompt", "red", "-o", "a.png")
    assert status == 0 and "untrained: the picture shows that every part runs" in out
    assert any(x.startswith(f"{CAT} 451×300 → reference 64×48 (Lanczos") for x in out.splitlines())
    assert "wrote a.png (64×48, seed 0)" in out


def test_the_model_that_ships_is_found_again_from_its_picture(cli):
    assert cli(*TINY, "-o", "a.png")[0] == 0
    status, out, err = cli("--from-metadata", "a.png", "-o", "b.png")
    assert (status, err) == (0, "") and "making a.png again" in out
    assert Path("a.png").read_bytes() == Path("b.png").read_bytes()
    assert images.read_metadata("a.png")["weights"] == checkpoint.shipped_bundle().identity


def test_a_model_is_sampled_as_its_card_says_and_its_picture_made_again(cli, tmp_path, monkeypatch):
    save_weights(tmp_path / "w", "tiny", shift=False, defaults=FAST)
    small = ["--weights", "w", "--megapixels", "0.004096"]
    status, out, err = cli(*small, "-o", "a.png")
    assert (status, err) == (0, "")
    assert "sampling: 2 renoise steps at 1, 0.4, guidance 3" in out.splitlines()
    assert cli(*small, "--sampler", "euler", "-o", "b.png")[0] == 0
    assert Path("a.png").read_bytes() != Path("b.png").read_bytes()
    monkeypatch.setitem(checkpoint.PACKAGED, "tiny-fast", tmp_path / "w")
    status, out, err = cli("--from-metadata", "a.png", "-o", "again.png")
    assert (status, err) == (0, "") and "making a.png again" in out
    assert Path("a.png").read_bytes() == Path("again.png").read_bytes()
    status, out, _ = cli("--model", "tiny-fast", "--megapixels", "0.004096", "-o", "c.png")
    assert status == 0 and Path("a.png").read_bytes() == Path("c.png").read_bytes()


def test_turns_and_seeds_are_written_and_each_is_made_again_bit_for_bit(cli, tmp_path):
    status, _, err = cli(
        *SMALL, "--image", CAT, "--prompt", "red", "--then", "blue", "--num-images", 2,
        "--seed", 7, "-o", "o/a.png",
    )  # fmt: skip
    assert (status, err) == (0, "")
    names = ["o/a-seed7-2.png", "o/a-seed7.png", "o/a-seed8-2.png", "o/a-seed8.png"]
    assert files(tmp_path) == names
    assert len({(tmp_path / name).read_bytes() for name in names}) == 4
    for name in ("o/a-seed8.png", "o/a-seed8-2.png"):
        status, _, err = cli("--from-metadata", name, "-o", "again.png")
        assert (status, err) == (0, "")
        assert (tmp_path / "again.png").read_bytes() == (tmp_path / name).read_bytes()
        (tmp_path / "again.png").unlink()
        assert files(tmp_path) == names  # the first turn is not written again


def test_an_option_beside_metadata_makes_a_new_request(cli, tmp_path):
    assert cli(*SMALL, "-o", "a.png")[0] == 0
    status, out, _ = cli("--from-metadata", "a.png", "--seed", 3, "-o", "b.png")
    assert status == 0 and "a new request after a.png" in out
    old, new = (images.read_metadata(tmp_path / name)["request"] for name in ("a.png", "b.png"))
    assert new == old | {"seed": 3}


def test_metadata_notices_another_input_picture_and_finds_a_moved_one(cli, tmp_path):
    Image.open(CAT).resize((80, 64)).save("in.png")
    assert cli(*SMALL, "--image", "in.png", "--prompt", "red", "-o", "a.png")[0] == 0
    Path("in.png").rename("moved.png")
    status, _, err = cli("--from-metadata", "a.png", "-o", "b.png")
    assert status == 2 and "no such file" in err and "--image" in err
    status, _, err = cli("--from-metadata", "a.png", "--image", "moved.png", "-o", "b.png")
    assert (status, err) == (0, "")
    assert Path("b.png").read_bytes() == Path("a.png").read_bytes()
    Image.new("RGB", (80, 64)).save("in.png")
    status, _, err = cli("--from-metadata", "a.png", "-o", "c.png")
    assert status == 2 and "is not the picture that a.png was made from" in err


def test_metadata_notices_other_weights(cli, tmp_path):
    path = tmp_path / "a.png"
    assert cli(*SMALL, "-o", path)[0] == 0
    metadata = images.read_metadata(path) | {"weights": "0" * 64}
    images.write_png(path, np.zeros((48, 64, 3), np.uint8), metadata)
    status, _, err = cli("--from-metadata", path, "-o", "b.png")
    assert status == 2 and "give the same with --weights" in err


def test_metadata_notices_other_versions_and_makes_the_picture(cli, tmp_path):
    assert cli(*SMALL, "-o", "a.png")[0] == 0
    metadata = images.read_metadata("a.png")
    metadata["versions"] |= {"jax": "0.9.1", "flax": "0.11.0"}
    images.write_png(tmp_path / "old.png", np.zeros((48, 64, 3), np.uint8), metadata)
    status, out, err = cli("--from-metadata", "old.png", "-o", "b.png")
    assert (status, err) == (0, "")
    notes = [line for line in out.splitlines() if line.startswith("note: the last bits may differ")]
    assert [note.split(": ")[-1].split(",")[0] for note in notes] == [
        "flax 0.11.0 then",
        "jax 0.9.1 then",
    ]
    assert Path("a.png").read_bytes() == Path("b.png").read_bytes()


def test_jobs_are_told_line_by_line(cli, tmp_path):
    jobs = [
        {"prompt": "red", "images": ["in.png"], "output": "red.png"},
        {"prompt": "blue", "images": ["none.png"]},
        {"prompt": "blue", "images": ["example:cat"], "num_stps": 2},
        {"prompt": "blue", "images": ["in.png"]},
    ]
    (tmp_path / "j").mkdir()
    Image.open(CAT).save(tmp_path / "j" / "in.png")
    for job in jobs:
        job |= {"megapixels": 0.004096, "num_steps": 1}
    (tmp_path / "j" / "jobs.jsonl").write_text("\n".join(map(json.dumps, jobs)))
    status, out, err = cli("--jobs", "j/jobs.jsonl", "-o", "made")
    assert status == 1
    assert "line 2: image none.png: no such file" in err
    assert "line 3: unknown key 'num_stps' (did you mean num_steps?)" in err
    assert "2 of 4 jobs done" in out and "wrote made/red.png" in out
    assert files(tmp_path / "made") == ["jobs-4.png", "red.png"]
    places = [images.read_metadata(f"made/{n}.png")["place"] for n in ("red", "jobs-4")]
    assert places == [{"batch_size": 2, "row": 0}, {"batch_size": 2, "row": 1}]


def test_quiet_says_nothing(cli, tmp_path):
    assert cli(*SMALL, "-q", "-o", "a.png") == (0, "", "")


BAD_INPUT = {
    "missing image": (["--image", "none.png", "--prompt", "x"], "no such file"),
    "folder": (["--image", ".", "--prompt", "x"], "is a directory"),
    "text": (["--image", "text.png", "--prompt", "x"], "is not a picture"),
    "no prompt": (["--image", CAT], "no prompt"),
    "unwritable output": (["-o", "text.png/out.png"], "not a directory"),
    "jpeg output": (["-o", "out.jpg"], "does not end in .png"),
    "output is input": (["--image", "in.png", "--prompt", "x", "-o", "in.png"], "also an input"),
    "model that is not packaged": (["--model", "tiny-fast"], "has no model tiny-fast"),
    "unknown sampler": (["--sampler", "eulr"], "did you mean euler"),
    "rising timesteps": (["--timesteps", "0.5", "1"], "falling from 1"),
    "unknown model": (["--model", "kontxt-dev"], "did you mean kontext-dev"),
    "model without weights": (["--model", "kontext-dev"], "needs its weights"),
    "missing weights": (["--weights", "none"], "none"),
    "uneven size": (["--size", "100x64"], "nearest valid size is 96x64"),
    "negative steps": (["--steps", "-1"], "expected 1 to"),
    "word for a number": (["--steps", "many"], "invalid int value"),
    "unknown flag": (["--promt", "x"], "did you mean --prompt"),
    "restoring without image": (["--prompt", "x", "--restore-size"], "needs an image"),
    "two sources": (["--jobs", "a", "--from-metadata", "b"], "cannot be used together"),
    "flags with jobs": (["--jobs", "a", "--seed", "1"], "belongs into the file"),
    "untrained weights": (["--weights", "w", "--model", "untrained"], "there is no model"),
    "negative prompt alone": (
        ["--model", "untrained", "--prompt", "x", "--negative-prompt", "y"],
        "has no effect",
    ),
    "missing LoRA": (["--lora", "none.safetensors:0.5"], "there is no file none.safetensors"),
    "LoRA's scale": (["--lora", "in.png:strong"], "the scale is 'strong'"),
    "a picture as LoRA": (["--lora", "in.png"], "not a sound safetensors file"),
    "no metadata": (["--from-metadata", "in.png"], "holds no kontext_jax metadata"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_ends_in_one_line_and_writes_nothing(cli, tmp_path, case, monkeypatch):
    monkeypatch.setitem(checkpoint.PACKAGED, "tiny-fast", tmp_path / "none")
    arguments, said = BAD_INPUT[case]
    Image.new("RGB", (32, 32)).save(tmp_path / "in.png")
    (tmp_path / "text.png").write_text("a shopping list")
    status, out, err = cli(*arguments)
    assert status == 2
    assert err.startswith("error: ") and said in err and err.count("\n") == 1
    assert out == ""  # found before anything was begun
    assert files(tmp_path) == ["in.png", "text.png"]


def save_weights(
    folder: Path, preset: str, spoil: str | None = None, shift=None, defaults=None
) -> None:
    """The untrained tiny model as a weight directory that says it is `preset`."""
    bundle = untrained_bundle("tiny")
    for kind, component in bundle.components.items():
        params = component.load()
        if kind == spoil:
            leaf = next(iter(params.values()))
            leaf["bias" if "bias" in leaf else next(iter(leaf))] = np.array([np.nan], np.float32)
        checkpoint.save_component(folder, kind, component.config, params)
    for name, source in bundle.tokenizer_dirs.items():
        target = folder / "tokenizers" / name
        target.mkdir(parents=True)
        for file in source.iterdir():
            (target / file.name).write_bytes(file.read_bytes())
    checkpoint.write_manifest(folder, preset, bundle.components, "a test", None, shift, defaults)


def test_converted_weights_are_used_and_must_be_those_of_the_model(cli, tmp_path):
    save_weights(tmp_path / "w", "tiny")
    status, out, err = cli(*TINY, "--weights", "w", "-o", "a.png")
    assert (status, err) == (0, "") and "untrained:" not in out
    assert cli(*SMALL, "-o", "b.png")[0] == 0
    a, b = (images.load_picture(name).pixels for name in ("a.png", "b.png"))
    np.testing.assert_array_equal(a, b)
    status, _, err = cli("--weights", "w", "--model", "flux-dev", "-o", "c.png")
    assert status == 2 and "holds tiny, not flux-dev" in err


def write_loras(folder: Path) -> None:
    """Two small adapters of the tiny model, in layouts of different programs."""
    config = PRESETS["tiny"].mmdit
    for seed, (name, layout) in enumerate((("hats", "peft"), ("ink", "kohya"))):
        adapter = draw_adapter(config, ("kontext",), rank=2, alpha=1.0, seed=seed)
        write_lora(adapter, folder / f"{name}.safetensors", layout, {"mmdit": config})


def test_loras_change_the_picture_and_are_found_again(cli, tmp_path):
    write_loras(tmp_path)
    both = ["--lora", "hats.safetensors", "--lora", "ink.safetensors:0.5"]
    for name, loras in (("plain", []), ("both", both), ("none", ["--lora", "ink.safetensors:0"])):
        status, out, err = cli(*SMALL, *loras, "-o", f"{name}.png")
        assert (status, err) == (0, "")
        assert ("LoRA: ink.safetensors, scale 0.5" in out.splitlines()) == (name == "both")
    plain, changed, none = (
        images.load_picture(f"{name}.png").pixels for name in ("plain", "both", "none")
    )
    np.testing.assert_array_equal(none, plain)
    assert np.abs(changed.astype(int) - plain).max() > 2
    noted = images.read_metadata("both.png")["loras"]
    assert [(x["name"], x["scale"]) for x in noted] == [
        ("hats.safetensors", 1.0),
        ("ink.safetensors", 0.5),
    ]
    assert images.read_metadata("plain.png")["loras"] == []

    status, _, err = cli("--from-metadata", "both.png", "-o", "again.png")
    assert (status, err) == (0, "")
    assert Path("again.png").read_bytes() == Path("both.png").read_bytes()
    status, out, _ = cli("--from-metadata", "both.png", *both[:2], "-o", "new.png")
    assert status == 0 and "a new request after both.png" in out


def test_a_lora_that_moved_is_asked_for_and_another_one_noticed(cli, tmp_path):
    write_loras(tmp_path)
    assert cli(*SMALL, "--lora", "hats.safetensors:0.7", "-o", "a.png")[0] == 0
    Path("hats.safetensors").rename("moved.safetensors")
    status, _, err = cli("--from-metadata", "a.png", "-o", "b.png")
    assert status == 2 and "LoRAs that are not where they were: hats.safetensors" in err
    assert "--lora hats.safetensors:0.7" in err
    moved = ["--lora", "moved.safetensors:0.7"]
    assert cli("--from-metadata", "a.png", *moved, "-o", "b.png")[0] == 0
    assert Path("b.png").read_bytes() == Path("a.png").read_bytes()
    Path("ink.safetensors").rename("hats.safetensors")
    status, _, err = cli("--from-metadata", "a.png", "-o", "c.png")
    assert status == 2 and "is not the one that a.png was made with" in err


def test_models_of_text_only_are_not_asked_to_edit(cli, tmp_path):
    save_weights(tmp_path / "w", "flux-schnell")
    status, _, err = cli("--weights", "w", "--image", CAT, "--prompt", "x")
    assert status == 2 and "flux-schnell makes pictures from text only" in err
    assert PRESETS["flux-schnell"].takes_references is False


def test_nan_in_weights_is_refused(cli, tmp_path):
    save_weights(tmp_path / "w", "tiny", spoil="mmdit")
    status, _, err = cli(*TINY, "--weights", "w", "-o", "a.png")
    assert status == 2 and "NaN" in err and "mmdit" in err
    assert not (tmp_path / "a.png").exists()


def test_ctrl_c_ends_quietly(cli, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(edit, "choose_weights", interrupt)
    assert cli() == (130, "", "interrupted\n")


def test_the_step_line_ends_by_clearing_itself():
    stream, now = io.StringIO(), iter(range(100))
    console = rich.console.Console(file=stream, force_terminal=True, width=78, height=20)
    line = StepLine(console, clock=lambda: next(now))
    for done in (0, 1, 2, 3):
        line(done, 3)
    shown = stream.getvalue().split("step ")
    assert [text[:3] for text in shown[1:4]] == ["0/3", "1/3", "2/3"]
    assert "s a step" not in shown[1] and "s a step" in shown[2] and "s left" in shown[3]
    assert shown[-1].rsplit("step", 1)[-1].endswith("\x1b[1A\x1b[2K")  # the line is erased
