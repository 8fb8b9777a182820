"""Sizes, packing, positions and pixel scaling."""

import math

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kontext_jax.pictures import latents


def test_packing_puts_channels_slowest():
    cells = jnp.arange(2 * 4 * 3, dtype=jnp.float32).reshape(1, 2, 4, 3)
    tokens = latents.pack(cells)
    assert tokens.shape == (1, 2, 12)
    first = cells[0, :2, :2]  # [2, 2, Z]
    np.testing.assert_array_equal(tokens[0, 0], first.transpose(2, 0, 1).ravel())


@settings(max_examples=8)
@given(st.integers(1, 3), st.integers(1, 5), st.integers(1, 5), st.integers(1, 4))
def test_unpacking_inverts_packing(batch, rows, columns, channels):
    shape = batch, 2 * rows, 2 * columns, channels
    cells = jnp.arange(math.prod(shape), dtype=jnp.float32).reshape(shape)
    restored = latents.unpack(latents.pack(cells), 2 * rows, 2 * columns)
    np.testing.assert_array_equal(restored, cells)


def test_sizes_that_do_not_pack_are_refused():
    with pytest.raises(ValueError, match="must be even to be packed, found 3×4"):
        latents.pack(jnp.zeros((1, 3, 4, 16)))
    with pytest.raises(ValueError, match="6 tokens cannot be 4×4 latents"):
        latents.unpack(jnp.zeros((1, 6, 64)), 4, 4)


def test_preferred_sizes_are_about_a_megapixel_and_fit_tokens():
    for width, height in latents.PREFERRED_SIZES:
        assert width % 16 == height % 16 == 0
        assert 0.98 < width * height / 1024**2 < 1.02
        assert (height, width) in latents.PREFERRED_SIZES


@pytest.mark.parametrize("size", latents.PREFERRED_SIZES)
@pytest.mark.parametrize("floor_first", [False, True])
def test_a_preferred_size_prefers_itself(size, floor_first):
    assert latents.preferred_size(*size, floor_first=floor_first) == size
    assert latents.preferred_size(3 * size[0], 3 * size[1], floor_first=floor_first) == size


def test_flooring_first_can_choose_another_size():
    assert latents.preferred_size(1232, 989) != latents.preferred_size(1232, 989, floor_first=True)


def test_a_tie_takes_the_narrower():
    assert latents.preferred_size(100, 100, sizes=((150, 100), (50, 100))) == (50, 100)


@pytest.mark.parametrize(("args", "least"), [((0, 10, False), 1), ((15, 100, True), 16)])
def test_images_too_small_are_refused(args, least):
    width, height, floor_first = args
    with pytest.raises(ValueError, match=f"at least {least} pixels"):
        latents.preferred_size(width, height, floor_first=floor_first)


def test_size_of_area_is_the_rule_of_both_references():
    assert latents.size_of_area(16, 9, 1024**2) == (1360, 768)
    assert latents.size_of_area(672, 1568, 1024**2) == (656, 1552)
    assert latents.size_of_area(1, 1000, 256) == (16, 496)  # a side is at least one token


def test_rounding_to_tokens():
    assert [latents.floor_to_token(p) for p in (15, 16, 31)] == [0, 16, 16]
    assert [latents.ceil_to_token(p) for p in (1, 16, 17)] == [16, 16, 32]
    assert latents.num_tokens(1024, 768) == 64 * 48


def test_positions_are_index_row_column():
    ids = latents.image_ids(2, 3, index=5)
    assert ids.dtype == np.float32
    np.testing.assert_array_equal(ids[[0, 1, 3, 5]], [[5, 0, 0], [5, 0, 1], [5, 1, 0], [5, 1, 2]])
    np.testing.assert_array_equal(latents.text_ids(2), np.zeros((2, 3)))


def test_position_rules_for_two_references():
    grids = [(2, 3), (1, 2)]
    index, bfl, width = (latents.context_ids(grids, rule) for rule in ("index", "bfl", "width"))
    np.testing.assert_array_equal(index[:, 0], [1] * 6 + [2] * 2)
    np.testing.assert_array_equal(bfl[:, 0], np.ones(8))
    np.testing.assert_array_equal(index[:, 1:], bfl[:, 1:])
    np.testing.assert_array_equal(width[6:], [[1, 0, 3], [1, 0, 4]])
    assert len(np.unique(index, axis=0)) == len(np.unique(width, axis=0)) == 8
    assert len(np.unique(bfl, axis=0)) == 6  # several references share positions


def test_no_reference_has_no_positions():
    assert latents.context_ids([]).shape == (0, 3)


def test_an_unknown_position_rule_is_refused():
    with pytest.raises(ValueError, match="choose index, bfl or width"):
        latents.context_ids([(1, 1)], "height")


def test_bytes_survive_the_model_range():
    every_byte = np.arange(256, dtype=np.uint8)
    values = latents.pixels_to_model(every_byte)
    assert values.dtype == np.float32
    assert (values[0], values[-1]) == (-1.0, 1.0)
    np.testing.assert_array_equal(latents.model_to_pixels(values), every_byte)


def test_bytes_are_rounded_or_truncated_and_clamped():
    values = np.array([-2.0, 0.0, 0.999, 5.0], np.float32)
    np.testing.assert_array_equal(latents.model_to_pixels(values), [0, 128, 255, 255])
    truncated = latents.model_to_pixels(values, "truncate")
    np.testing.assert_array_equal(truncated, [0, 127, 254, 255])
