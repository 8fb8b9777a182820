"""`kontext edit PROMPT PICTURE…`: several pictures, one by one."""

from pathlib import Path

import pytest
from PIL import Image

from kontext_jax.__main__ import main
from kontext_jax.commands import edit
from kontext_jax.pictures import files as images
from kontext_jax.runtime.programs import CACHE_VARIABLE

SMALL = ("--model", "untrained", "--steps", "1")


@pytest.fixture
def cli(tmp_path, monkeypatch, capsys):
    """Runs `kontext edit` in an empty folder: (status, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))

    def run(*words):
        try:
            status = main(["edit", *map(str, words)])
        except SystemExit as stopped:
            status = stopped.code
        return status, *capsys.readouterr()

    return run


@pytest.fixture
def photos(tmp_path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for name, size in (("a.jpg", (64, 48)), ("b.png", (48, 64)), ("c.jpg", (64, 48))):
        Image.new("RGB", size, (90, 120, 200)).save(folder / name)
    (folder / "bad.jpg").write_text("a shopping list")
    (folder / "notes.txt").write_text("no picture by its name")
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_bad_file_fails_alone_and_is_named(cli, photos, tmp_path):
    names = sorted(path for path in photos.iterdir() if path.suffix != ".txt")
    status, out, err = cli("make it gray", *names, *SMALL, "-o", "out/")
    assert status == 1
    assert err.startswith(f"error: image {photos / 'bad.jpg'} is not a picture")
    assert err.count("\n") == 1 and "3 of 4 pictures done" in out
    assert sorted(contents(tmp_path / "out")) == ["a.png", "b.png", "c.png"]
    metadata = images.read_metadata(tmp_path / "out" / "a.png")
    assert metadata["request"]["prompt"] == "make it gray"
    assert metadata["request"]["images"] == [str(photos / "a.jpg")]
    assert metadata["place"]["batch_size"] == 2, "pictures of one shape share a batch"


def test_results_never_replace_a_file(cli, photos, tmp_path):
    before = contents(photos)
    assert cli("make it gray", "photos", *SMALL, "-o", "photos")[0] == 1
    after = contents(photos)
    assert {name: after[name] for name in before} == before
    assert sorted(after.keys() - before.keys()) == ["a.png", "b-2.png", "c.png"]
    for name in ("a.png", "a-2.png"):
        assert cli("make it gray", photos / "a.jpg", *SMALL, "-o", "out/")[0] == 0
        assert sorted(contents(tmp_path / "out"))[-1 if name == "a.png" else 0] == name


def test_many_pictures_are_read_a_part_at_a_time(cli, photos, monkeypatch):
    monkeypatch.setattr(edit, "PICTURES_AT_A_TIME", 1)
    status, out, _ = cli("make it gray", photos, *SMALL, "-o", "out")
    assert status == 1 and "3 of 4 pictures done" in out
    assert images.read_metadata("out/a.png")["place"]["batch_size"] == 1


def test_words_mean_what_the_flags_mean(cli, photos):
    assert cli(*SMALL, "-q", "make it gray", photos / "a.jpg", "-o", "a.png") == (0, "", "")
    flags = ("--prompt", "make it gray", "--image", photos / "a.jpg")
    assert cli(*SMALL, "-q", *flags, "-o", "b.png") == (0, "", "")
    assert Path("a.png").read_bytes() == Path("b.png").read_bytes()


def test_words_that_cannot_be_meant_are_refused(cli, photos, tmp_path):
    several = ("x", photos / "a.jpg", photos / "c.jpg")
    (tmp_path / "empty").mkdir()
    for words, said in (
        ((photos / "a.jpg",), "the prompt comes before the pictures"),
        ((*several, "-o", "c.png"), "-o names a folder"),
        ((*several, "--compile-only"), "takes no pictures beside it"),
        (("x", "empty"), "holds no pictures"),
    ):
        status, out, err = cli(*words)
        assert (status, out) == (2, "") and said in err and err.count("\n") == 1
