"""Streams of tokens in parts: what is put together comes apart again, and nothing is lost."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType

from kontext_jax.models.token_layout import TokenLayout, attend
from kontext_jax.ops.attention import attention


def streams(num_txt, num_img):
    """[1, S, 2] each, numbered through; no token is zero."""
    numbers = jnp.arange(1.0, num_txt + num_img + 1)[None, :, None] * jnp.ones(2)
    return numbers[:, :num_txt], numbers[:, num_txt:]


@pytest.mark.parametrize("sizes", [(4, 8), (5, 16), (3, 1), (1, 9)])
@pytest.mark.parametrize("parts", [1, 2, 4])
def test_joined_streams_come_apart_and_plain_ones_come_back(sizes, parts):
    layout = TokenLayout(*sizes, parts)
    txt, img = streams(*sizes)
    padded = [layout.pad(x, 1) for x in (txt, img)]
    joined = layout.join(*padded, axis=1)
    for stream, again in zip(padded, layout.separate(joined, axis=-2), strict=True):
        np.testing.assert_array_equal(again, stream)
    plain = jnp.concatenate([txt, img], axis=1)
    np.testing.assert_array_equal(layout.lay(plain, axis=1), joined)
    np.testing.assert_array_equal(layout.uncut(layout.cut(joined, 1), 1), joined)
    tokens = np.asarray(layout.cut(joined, 1))[0, :, 0]
    assert sorted(tokens) == list(range(1, sum(sizes) + 1))
    assert layout.has_padding == (joined.shape[1] > sum(sizes))


def test_every_part_has_its_share_of_both_streams():
    layout = TokenLayout(4, 8, parts=2)
    joined = layout.join(*streams(4, 8), axis=1)[0, :, 0]
    np.testing.assert_array_equal(joined, [1, 2, 5, 6, 7, 8, 3, 4, 9, 10, 11, 12])


def test_one_part_is_the_plain_sequence():
    layout = TokenLayout(3, 5)
    txt, img = streams(3, 5)
    assert layout.pad(img, 1) is img and not layout.has_padding
    joined = layout.join(txt, img, axis=1)
    np.testing.assert_array_equal(joined[0, :, 0], np.arange(1, 9))


def test_heads_that_tensor_does_not_divide_are_refused():
    mesh = AbstractMesh((3,), ("tensor",), axis_types=(AxisType.Auto,))
    x = jnp.ones((1, 4, 6, 8))
    with (
        jax.sharding.use_abstract_mesh(mesh),
        pytest.raises(
            ValueError, match=r"has 4 heads, which the mesh's tensor = 3 does not divide; set it"
        ),
    ):
        attend(x, x, x, TokenLayout(2, 4), "reference")


def test_padding_gets_no_attention():
    layout = TokenLayout(3, 6, parts=4)  # padded to 4 and 8
    q, k, v = np.random.default_rng(0).standard_normal((3, 1, 2, 9, 8)).astype(np.float32)
    laid = [layout.lay(jnp.asarray(x), axis=2) for x in (q, k, v)]
    attended = layout.cut(attend(*laid, layout, "reference"), 2)
    np.testing.assert_allclose(attended, attention(q, k, v, backend="reference"), atol=1e-6)
