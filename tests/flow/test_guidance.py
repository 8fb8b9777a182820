"""Guide functions against their papers' formulas."""

import jax.numpy as jnp
import numpy as np
import pytest

from kontext_jax.flow.guidance import cfg, make_apg, make_interval

RNG = np.random.default_rng(0)
V_UNCOND, V_COND, X_T = RNG.standard_normal((3, 4, 5, 6), np.float32)
T = np.array([0.1, 0.4, 0.6, 1.0], np.float32)
G = np.array([0.0, 1.0, 2.5, 5.0], np.float32)
PREDICTIONS = V_UNCOND, V_COND, X_T, T


def test_cfg_moves_from_the_unconditional_velocity_through_the_conditional_one():
    guided = cfg(*PREDICTIONS, G)
    np.testing.assert_array_equal(guided[0], V_UNCOND[0])
    np.testing.assert_allclose(guided[1], V_COND[1], atol=1e-6)
    expected = V_UNCOND[2] + 2.5 * (V_COND[2] - V_UNCOND[2])
    np.testing.assert_allclose(guided[2], expected, rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(cfg(*PREDICTIONS, 2.5)[2], guided[2])


def test_the_difference_is_taken_in_float32():
    low, high = (jnp.asarray(x, jnp.bfloat16) for x in (V_UNCOND, V_COND))
    guided = cfg(low, high, X_T, T, G)
    assert guided.dtype == jnp.float32
    exact = cfg(low.astype(jnp.float32), high.astype(jnp.float32), X_T, T, G)
    np.testing.assert_array_equal(guided, exact)


def test_an_interval_guides_inside_of_it_alone():
    guided = np.asarray(make_interval(0.4, 0.7)(*PREDICTIONS, 3.0))
    np.testing.assert_array_equal(guided[[0, 3]], V_COND[[0, 3]])
    np.testing.assert_array_equal(guided[1:3], cfg(*PREDICTIONS, 3.0)[1:3])


def apg_of_clean_estimates(parallel, norm_limit, guidance):
    """As arXiv:2410.02416, algorithm 1, in the space of clean estimates; a sample at a time."""
    guided = []
    for v_uncond, v_cond, x_t, t in zip(*PREDICTIONS, strict=True):
        clean, without = x_t - t * v_cond, x_t - t * v_uncond
        difference = clean - without
        if norm_limit:
            difference *= min(1, norm_limit / np.linalg.norm(difference))
        direction = clean / np.linalg.norm(clean)
        along = np.sum(difference * direction) * direction
        clean = clean + (guidance - 1) * (difference - along + parallel * along)
        guided.append((x_t - clean) / t)
    return np.stack(guided)


@pytest.mark.parametrize(("parallel", "norm_limit"), [(0.0, 0.0), (0.3, 0.0), (0.0, 1.5)])
def test_projected_guidance_is_that_of_clean_estimates(parallel, norm_limit):
    guided = make_apg(parallel, norm_limit)(*PREDICTIONS, 3.0)
    expected = apg_of_clean_estimates(parallel, norm_limit, 3.0)
    np.testing.assert_allclose(guided, expected, rtol=2e-4, atol=2e-4)


def test_projected_guidance_with_all_of_it_is_cfg_and_without_guidance_conditional():
    np.testing.assert_allclose(make_apg(1.0)(*PREDICTIONS, G), cfg(*PREDICTIONS, G), atol=1e-5)
    np.testing.assert_array_equal(make_apg()(*PREDICTIONS, 1.0), V_COND)
    np.testing.assert_array_equal(make_interval(0, 1)(*PREDICTIONS, G), cfg(*PREDICTIONS, G))
