"""The one rule for sizes, by its properties and by the references' own numbers."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kontext_jax.numerics import BFL, DIFFUSERS, EXACT, NUMERICS
from kontext_jax.pictures import files as images
from kontext_jax.pictures.latents import PREFERRED_SIZES
from kontext_jax.pictures.sizes import MAX_SIDE, plan_sizes, restoring_size

MEGAPIXEL = 1.048576
TINY = 0.065536
sides = st.integers(16, 6000)
sizes = st.tuples(sides, sides)
photo_sizes = sizes.filter(lambda s: 1 / 3 <= s[0] / s[1] <= 3)
all_numerics = st.sampled_from(list(NUMERICS.values()))


def plan(pictures, numerics=EXACT, preset_megapixels=MEGAPIXEL, **options):
    return plan_sizes(pictures, numerics=numerics, preset_megapixels=preset_megapixels, **options)


@given(st.lists(sizes, max_size=3), all_numerics, st.sampled_from([TINY, 0.3, MEGAPIXEL]))
def test_every_size_is_whole_tokens_near_the_presets_area(pictures, numerics, megapixels):
    planned = plan(pictures, numerics, megapixels)
    for width, height in (planned.output, *(fit.size for fit in planned.references)):
        assert width % 16 == height % 16 == 0
        assert 0.8 < width * height / (megapixels * 1e6) < 1.05


@given(sizes)
def test_default_is_the_nearest_preferred_ratio(picture):
    planned = plan([picture])
    ratio = picture[0] / picture[1]
    distance = min(abs(ratio - w / h) for w, h in PREFERRED_SIZES)
    assert planned.output in PREFERRED_SIZES
    assert abs(ratio - planned.output[0] / planned.output[1]) == distance
    assert planned.references[0].size == planned.output


# From what black-forest-labs/flux and diffusers 0.42.1 return: picture, BFL, diffusers.
PUBLISHED_CHOICES = [
    ((1920, 1080), (1392, 752), (1392, 752)),
    ((512, 512), (1024, 1024), (1024, 1024)),
    ((33, 47), (832, 1248), (1024, 1024)),
    ((127, 113), (1104, 944), (1024, 1024)),
]


@pytest.mark.parametrize(("picture", "bfl", "diffusers"), PUBLISHED_CHOICES)
def test_preferred_sizes_are_the_references(picture, bfl, diffusers):
    assert plan([picture], BFL).output == bfl
    assert plan([picture], EXACT).output == bfl
    assert plan([picture], DIFFUSERS).output == diffusers


@given(st.lists(sizes, min_size=2, max_size=4))
def test_each_reference_gets_a_size_of_its_own_and_the_first_decides(pictures):
    planned = plan(pictures)
    assert [fit.size for fit in planned.references] == [plan([p]).output for p in pictures]
    assert planned.output == planned.references[0].size


@given(st.integers(1, 256), st.integers(1, 256), st.booleans(), all_numerics)
def test_explicit_sizes_are_honoured_exactly(columns, rows, with_picture, numerics):
    pictures = [(400, 300)] if with_picture else []
    size = (16 * columns, 16 * rows)
    planned = plan(pictures, numerics, size="{}x{}".format(*size))
    assert planned.output == size
    assert [fit.size for fit in planned.references] == [
        plan([p], numerics).output for p in pictures
    ]


@given(st.integers(1, 4000), st.integers(1, 4000))
def test_sizes_between_tokens_are_refused_naming_a_valid_one(width, height):
    text = f"{width}x{height}"
    if width % 16 == height % 16 == 0:
        return
    with pytest.raises(ValueError, match="nearest valid size is") as caught:
        plan([], size=text)
    nearest = str(caught.value).split("nearest valid size is ")[1]
    planned = plan([], size=nearest).output
    for got, asked in zip(planned, (width, height), strict=True):
        assert abs(got - asked) <= 8 or got == 16


def test_published_roundings_of_sizes_between_tokens():
    assert plan([], BFL, size="1000x700").output == (1008, 704)
    assert plan([], DIFFUSERS, size="1000x700").output == (992, 688)
    with pytest.raises(ValueError, match="nearest valid size is 16x704"):
        plan([], DIFFUSERS, size="9x700")


@pytest.mark.parametrize(
    ("ratio", "size"),
    [("16:9", (1360, 768)), ("1:1", (1024, 1024)), ("9:21", (656, 1552)), ("1.91:1", (1408, 736))],
)
def test_ratios_are_bfls_sizes(ratio, size):
    assert plan([], size=ratio).output == size
    assert plan([(300, 400)], size=ratio).output == size


@pytest.mark.parametrize(
    "text", ["big", "10", "0x16", "16x0", "x", "0:1", "1:0", "-16x16", "1e3x16"]
)
def test_malformed_sizes_are_refused(text):
    with pytest.raises(ValueError, match=r"size .*(expected WIDTHxHEIGHT|nearest valid)"):
        plan([], size=text)


@given(st.integers(1, 200), st.integers(1, 200))
def test_match_resizes_nothing(columns, rows):
    picture = (16 * columns, 16 * rows)
    planned = plan([picture, (100, 70)], size="match")
    assert planned.output == planned.references[0].size == picture
    assert planned.references[1].size == plan([(100, 70)]).output


def test_match_refuses_other_sizes_and_names_the_way_out():
    with pytest.raises(ValueError, match="448x304; or use --restore-size"):
        plan([(451, 300)], size="match")
    assert plan([(451, 300)], BFL, size="match").output == (464, 304)
    assert plan([(451, 300)], DIFFUSERS, size="match").output == (448, 288)


def test_references_can_keep_their_sizes_while_the_target_has_another():
    planned = plan([(112, 80), (64, 64)], size="96x64", match_references=True)
    assert planned.output == (96, 64)
    assert [fit.size for fit in planned.references] == [(112, 80), (64, 64)]


@given(photo_sizes, st.floats(0.05, 4))
def test_megapixels_keep_the_ratio_of_target_and_reference(picture, megapixels):
    planned = plan([picture], megapixels=megapixels)
    width, height = planned.output
    assert planned.references[0].size == planned.output
    # Each side is floored to 16 pixels, of at least 129 here.
    assert abs(math.log(width / height * picture[1] / picture[0])) < math.log(145 / 128)
    assert 0.75 < width * height / (megapixels * 1e6) <= 1.01


@given(sizes, st.sampled_from([TINY, MEGAPIXEL]))
def test_restoring_stretches_nothing_and_returns_the_inputs_size(picture, megapixels):
    planned = plan([picture], preset_megapixels=megapixels, restore=True)
    fit, restore = planned.references[0], planned.restore
    scale_x = fit.size[0] / (fit.box[2] - fit.box[0])
    scale_y = fit.size[1] / (fit.box[3] - fit.box[1])
    assert math.isclose(scale_x, scale_y, rel_tol=1e-9)
    assert restore.size == planned.written == picture
    # The box of the result is where the picture lies in the reference.
    left, top, right, bottom = restore.box
    assert math.isclose((right - left) / scale_x, picture[0], rel_tol=1e-9)
    assert math.isclose((bottom - top) / scale_y, picture[1], rel_tol=1e-9)
    assert math.isclose(left / scale_x + fit.box[0], 0, abs_tol=1e-6 * picture[0])
    assert math.isclose(top / scale_y + fit.box[1], 0, abs_tol=1e-6 * picture[1])
    assert left >= -1e-9 and top >= -1e-9
    assert right <= fit.size[0] + 1e-6 and bottom <= fit.size[1] + 1e-6


@given(photo_sizes.filter(lambda s: 0.43 <= s[0] / s[1] <= 2.33))
def test_restoring_fills_up_at_most_a_few_per_cent(picture):
    width, height = restoring_size(*picture, 1024**2)
    ratio, own = width / height, picture[0] / picture[1]
    assert 1 - min(ratio, own) / max(ratio, own) < 0.015
    assert 0.85 < width * height / 1024**2 < 1.15


def test_an_unchanged_edit_restores_the_picture():
    y, x = np.mgrid[:300, :451] / 300
    waves = [np.sin(9 * x + 2 * y), np.cos(7 * y), np.sin(5 * (x + y))]
    picture = (127.5 + 100 * np.stack(waves, axis=-1)).astype(np.uint8)
    planned = plan([(451, 300)], restore=True)
    fit, restore = planned.references[0], planned.restore
    reference = images.resize(picture, *fit.size, box=fit.box)
    restored = images.resize(reference, *restore.size, box=restore.box)
    assert np.abs(restored.astype(int) - picture).max() <= 2


@pytest.mark.parametrize(
    ("pictures", "options", "said"),
    [
        ([], {"size": "match"}, "needs an image"),
        ([], {"restore": True}, "needs an image"),
        ([], {"match_references": True}, "needs an image"),
        ([(64, 64)], {"restore": True, "size": "64x64"}, "contradicts"),
        ([(64, 64)], {"restore": True, "match_references": True}, "contradicts"),
        ([(64, 64)], {"megapixels": 1.0, "size": "64x64"}, "contradicts"),
        ([(64, 64)], {"megapixels": 1.0, "size": "match"}, "contradicts"),
        ([], {"megapixels": 0.0}, "expected a number"),
        ([], {"megapixels": float("nan")}, "expected a number"),
        ([], {"megapixels": 1000.0}, "expected a number"),
        ([], {"size": f"{MAX_SIDE + 16}x16"}, "at most"),
        ([(64, 8192)], {"size": "match"}, "at most"),
    ],
)
def test_contradictions_and_absurd_values_are_refused(pictures, options, said):
    with pytest.raises(ValueError, match=said):
        plan(pictures, **options)
