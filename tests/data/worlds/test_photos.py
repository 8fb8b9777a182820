"""Photographs of packages: what is held out, crops, edits with known results, the data source."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from kontext_jax.data.config import DataConfig
from kontext_jax.data.dataset import open_dataset
from kontext_jax.data.sources.open import open_source
from kontext_jax.data.worlds import photo_edits, photos
from kontext_jax.data.worlds.photo_edits import KINDS, PICTURE_EDITS, PhotoSource, alternatives
from kontext_jax.evaluation import photographs


@pytest.fixture(scope="module", autouse=True)
def photographs_at_hand():
    """The test extra brings scikit-image alone; what others ship is left out here."""
    pytest.importorskip("skimage")
    known = photos.PHOTOS
    here = tuple(p for p in known if p.package in ("skimage", "kontext_jax"))
    photos.PHOTOS = here
    yield
    photos.PHOTOS = known


def examples(split: str, count: int = 60, **options) -> list[photo_edits.PhotoExample]:
    source = PhotoSource(split, seed=3, count=count, **options)
    return [source[i] for i in range(count)]


def test_no_photograph_is_trained_on_and_held_out():
    names = {split: {e.photo for e in examples(split)} for split in photo_edits.SPLITS}
    assert not names["train"] & names["held_out"]
    assert "cat" in names["held_out"]
    assert {p.name for p in photos.photos_of("train")} >= names["train"]


def test_every_photograph_says_whose_it_is_and_under_which_licence():
    for photo in photos.PHOTOS:
        assert photo.author and photo.licence in (
            *("CC0 1.0", "CC BY 2.0"),
            *(photos.PUBLIC, photos.UNRESTRICTED),
        )


def test_a_missing_photograph_names_the_command_that_brings_it():
    absent = dataclasses.replace(photos.PHOTOS[0], package="no_such_package")
    with pytest.raises(FileNotFoundError, match=r"no_such_package is not installed; pip install"):
        photos.find_photo(absent)
    moved = dataclasses.replace(photos.PHOTOS[0], file="data/gone.png")
    with pytest.raises(FileNotFoundError, match=r"has no data/gone\.png"):
        photos.find_photo(moved)


def test_examples_are_a_function_of_split_seed_and_index():
    first, again = examples("train", 8), examples("train", 8)
    for a, b in zip(first, again, strict=True):
        assert a.text == b.text
        np.testing.assert_array_equal(a.target, b.target)
    assert any(a.text != b.text for a, b in zip(first, examples("held_out", 8), strict=True))


def test_all_kinds_of_edits_occur_and_change_what_they_say():
    drawn = examples("train", 200)
    assert {e.kind for e in drawn} == set(KINDS)
    for example in drawn:
        same = np.array_equal(example.source, example.target)
        assert same == (example.kind == "keep") or example.kind in ("gray", "mirror", "flip")
        height, width = example.crop.shape[:2]
        assert (width, height) in photo_edits.crop_sizes(64)
        assert example.target.shape == example.source.shape == (height, width, 3)


def test_training_never_shows_a_held_out_combination():
    scenes = PhotoSource("train", count=10)._scenes
    for source in scenes.values():
        for i in range(10):
            assert not source.is_held_out(source[i])


@pytest.mark.parametrize("kind", ["invert", "mirror", "flip"])
def test_some_edits_undo_themselves(kind):
    crop = examples("held_out", 1)[0].crop
    (edit,) = PICTURE_EDITS[kind].values()
    np.testing.assert_array_equal(edit(edit(crop)), crop)
    assert not np.array_equal(edit(crop), crop)


def test_flat_pictures_stay_flat_and_light_is_kept():
    flat = np.full((48, 64, 3), 90, np.uint8)
    for kind in ("blur", "pixelate", "gray"):
        (edit,) = PICTURE_EDITS[kind].values()
        np.testing.assert_array_equal(edit(flat), flat)
    crop = examples("held_out", 1)[0].crop
    blurred = PICTURE_EDITS["blur"]["blur the picture"](crop)
    assert abs(blurred.mean() - crop.mean()) < 1
    assert blurred.std() < crop.std()


def test_the_target_is_nearer_to_itself_than_to_what_other_instructions_make():
    for example in examples("held_out", 30):
        others = alternatives(example)
        assert len(others) > 15
        target = example.target.astype(int)
        assert min(np.abs(other - target).max() for other in others) > 0


def test_crops_lie_in_the_photograph_and_are_not_enlarged():
    ramp = np.arange(200, dtype=np.uint8)[None, :, None] + np.zeros((150, 1, 3), np.uint8)
    rng = np.random.default_rng(0)
    for _ in range(20):
        crop = photos.draw_crop(rng, ramp, 64, 48)
        assert crop.shape == (48, 64, 3)
        steps = np.diff(crop[10, 4:-4, 0].astype(float)).mean()
        assert 0.99 < steps < 200 / 64 + 0.1  # one pixel of the photograph a pixel, or more


@pytest.mark.parametrize("what", ["edits", "crops", "squares"])
def test_the_source_gives_pictures_to_the_loader(what):
    path = f"photos:{what}-64:train:12"
    config = DataConfig(
        sources=(path,), resolution=64, fraction_with_references=float(what == "edits")
    )
    dataset = open_dataset(config, tell=lambda line: None)
    example, pictures = dataset.pictures(0, int(what == "edits"))
    assert len(example.contexts) == (what == "edits")
    drawn = PhotoSource("train", count=12, square=what == "squares")[0]
    np.testing.assert_array_equal(pictures[0], drawn.target)
    assert {size for kind in dataset.kinds for size in (kind.target, *kind.contexts)} <= set(
        photo_edits.crop_sizes(64)
    )


@pytest.mark.parametrize("path", ["photos:edits:train:3", "photos:edits-96:train:3", "photos:x"])
def test_a_wrong_path_is_told_what_was_expected(path):
    with pytest.raises(ValueError, match="such as photos:edits-64:train:512"):
        open_source(path)


def test_photographs_are_graded_by_what_the_result_is_nearest_to():
    for example in examples("held_out", 24):
        noise = np.random.default_rng(0).normal(0, 8, example.target.shape)
        noisy = np.clip(example.target + noise, 0, 255).astype(np.uint8)
        got = photographs.grade(example, noisy)
        assert got.psnr == pytest.approx(30, abs=2)
        if example.kind not in ("keep", "gray"):  # what is gray already looks alike
            assert got.success
            other = alternatives(example)[0]
            assert not photographs.grade(example, other).success
    right = [photographs.grade(e, e.target) for e in examples("held_out", 24)]
    summary = photographs.summarise(examples("held_out", 24), right)
    assert summary["success"]["percent"] == 100 and summary["psnr"]["mean"] == 60
    text = photographs.tables({"rows": {"ideal": summary}})
    assert "| ideal | 100.0 [" in text and "60.0 ± 0.0" in text


def test_the_sheet_of_photographs_takes_pictures_of_several_sizes():
    drawn = examples("held_out", 6)
    shown = photographs.sheet(drawn, [e.target for e in drawn], columns=3)
    assert shown.dtype == np.uint8 and shown.shape[1] % 3 == 0


def test_the_page_names_all_photographs_with_author_and_licence():
    text = (Path(__file__).parents[3] / "docs/tiny.md").read_text("utf-8")
    for photo in photos.PHOTOS:
        split = photo.split.replace("_", " ")
        line = f"| {photo.name} | `{photo.package}` | {photo.author} | {photo.licence} | {split} |"
        assert line in text
