"""Sizes of a batch, and that a pair stays aligned when it is cut."""

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from kontext_jax.data.buckets import (
    Kind,
    aspect_mismatch,
    assign_kinds,
    bucket_sizes,
    covering_box,
    crop_boxes,
    nearest_buckets,
)
from kontext_jax.data.transforms import fit_pictures, names_a_side
from kontext_jax.pictures import latents

SMALL = bucket_sizes(64)
places = st.tuples(st.floats(0, 1), st.floats(0, 1))


def test_at_1024_the_buckets_are_the_preferred_sizes():
    assert bucket_sizes(1024) == latents.PREFERRED_SIZES


@pytest.mark.parametrize("resolution", [64, 256, 512])
def test_scaled_buckets_keep_area_and_unit(resolution):
    for width, height in bucket_sizes(resolution):
        assert width % 16 == height % 16 == 0
        assert 0.5 < width * height / resolution**2 <= 1
    assert (resolution, resolution) in bucket_sizes(resolution)


def test_given_buckets_are_taken_as_they_are():
    assert bucket_sizes(1024, ("64x48", "48X64", "64x48")) == ((64, 48), (48, 64))


@pytest.mark.parametrize(("text", "found"), [("60x64", "nearest size is 64x64"), ("a", "'a'")])
def test_a_bucket_that_cannot_be_is_refused(text, found):
    with pytest.raises(ValueError, match=found):
        bucket_sizes(1024, (text,))


def test_the_nearest_bucket_is_by_the_logarithm_of_the_ratio():
    """A picture turned on its side gets its bucket turned on its side; not so by the ratio."""
    rng = np.random.default_rng(0)
    sizes = rng.integers(20, 4000, (500, 2))
    upright = nearest_buckets(sizes, latents.PREFERRED_SIZES)
    turned = nearest_buckets(sizes[:, ::-1], latents.PREFERRED_SIZES)
    assert (upright + turned == 16).all()


def test_pairs_share_a_bucket_and_others_get_their_own():
    square, wide, tall = (64, 64), (80, 48), (48, 80)
    pictures = np.array(
        [
            [(100, 100), (50, 50)],  # one scaled
            [(100, 100), (160, 100)],  # another ratio
            [(100, 100), (0, 0)],  # text to image
            [(100, 160), (101, 160)],  # one pixel wider
        ]
    )
    kind_of, kinds = assign_kinds(pictures, (square, wide, tall))
    assert [kinds[k] for k in kind_of] == [
        Kind(square, (square,)),
        Kind(square, (wide,)),
        Kind(square),
        Kind(tall, (tall,)),
    ]
    assert list(kinds) == sorted(kinds)


def test_a_pair_is_not_split_where_its_ratio_lies_between_two_buckets():
    """Rounding to pixels alone would send the halves to different sides."""
    ratio = (800 / 1328 * 832 / 1248) ** 0.5
    target = (round(2000 * ratio), 2000)
    sides = {nearest_buckets(np.array((round(h * ratio), h)), latents.PREFERRED_SIZES).item()
             for h in range(90, 130)}  # fmt: skip
    assert len(sides) == 2
    for height in range(90, 130):
        pair = np.array([[target, (round(height * ratio), height)]])
        _, (kind,) = assign_kinds(pair, latents.PREFERRED_SIZES)
        assert kind.contexts == (kind.target,)


@given(st.integers(1, 5000), st.integers(1, 5000), st.sampled_from(latents.PREFERRED_SIZES), places)
def test_what_is_kept_has_the_ratio_of_the_bucket_and_touches_two_edges(width, height, size, place):
    left, top, right, bottom = covering_box((width, height), size, place)
    assert 0 <= left < right <= 1 + 1e-12 and 0 <= top < bottom <= 1 + 1e-12
    ratio = (right - left) * width / ((bottom - top) * height)
    assert np.isclose(ratio, size[0] / size[1], rtol=1e-9)
    assert np.isclose(max(right - left, bottom - top), 1)


@settings(max_examples=60)
@given(
    st.integers(40, 160),
    st.integers(40, 160),
    st.floats(0.5, 2),
    places,
    st.tuples(st.floats(0.2, 0.8), st.floats(0.2, 0.8)),
    st.booleans(),
)
def test_a_pair_stays_aligned_to_within_a_pixel(width, height, scale, place, at, mirrored):
    """A blob at the same relative place of both lands on the same place of both."""
    sizes = [(width, height), (round(width * scale), round(height * scale))]
    _, (kind,) = assign_kinds(np.array([sizes]), SMALL)
    assume(kind.contexts == (kind.target,))
    left, top, right, bottom = covering_box(sizes[0], kind.target, place)
    # Somewhere inside of what is kept.
    x, y = left + at[0] * (right - left), top + at[1] * (bottom - top)
    target, context = fit_pictures([_blob(*size, x, y) for size in sizes], kind, place, mirrored)
    assert target.shape == context.shape == (kind.target[1], kind.target[0], 3)
    expected = np.array([(1 - at[0] if mirrored else at[0]), at[1]]) * kind.target
    assert np.abs(_centre(target) - expected).max() < 1
    assert np.abs(_centre(target) - _centre(context)).max() < 1


def _blob(width: int, height: int, x: float, y: float) -> np.ndarray:
    """A soft spot at the fractions (x, y) of a black picture, its size relative too."""
    columns = ((np.arange(width) + 0.5) / width - x) * 16
    rows = ((np.arange(height) + 0.5) / height - y) * 16
    spot = np.exp(-(columns**2) - rows[:, None] ** 2)
    return np.repeat(np.round(255 * spot).astype(np.uint8)[..., None], 3, axis=-1)


def _centre(pixels: np.ndarray) -> np.ndarray:
    """(x, y) of the spot in pixels; of its top, so that what is cut off does not matter."""
    weight = np.maximum(pixels[..., 0].astype(float) - 0.5 * pixels.max(), 0)
    rows, columns = np.indices(weight.shape) + 0.5
    return np.array([(weight * columns).sum(), (weight * rows).sum()]) / weight.sum()


def test_a_reference_of_another_ratio_is_cut_on_its_own():
    kind = Kind((64, 64), ((80, 48), (64, 64)))
    target, wide, pair = crop_boxes([(100, 140), (160, 90), (50, 70)], kind, (0, 0))
    assert target == pytest.approx((0, 0, 100, 100))
    assert pair == pytest.approx((0, 0, 50, 50))
    assert wide == pytest.approx((0, 0, 150, 90))


def test_the_mismatch_is_the_largest_of_the_references():
    sizes = np.array([[(100, 100), (200, 200), (0, 0)], [(100, 100), (110, 100), (100, 150)]])
    assert aspect_mismatch(sizes) == pytest.approx([1, 1.5])


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("Move the cat to the LEFT", True),
        ("turn it clockwise", True),
        ("change the sign to say OPEN", True),
        ("make the sky brighter", False),
        ("the theft of a copyright", False),
    ],
)
def test_texts_that_name_a_side_are_known(text, named):
    assert names_a_side(text) == named
