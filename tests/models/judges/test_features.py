"""What a discriminator sees of a frozen transformer, and the heads that judge it."""

import contextlib
import dataclasses
import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import print_saved_residuals

from kontext_jax.batches import Conditioning
from kontext_jax.models.judges.feature_heads import FeatureHeads, FeatureHeadsConfig
from kontext_jax.models.judges.features import evenly_spaced, make_feature_fn
from kontext_jax.models.judges.tapped import TappedMMDiT
from kontext_jax.models.mmdit import MMDiT, init_params, make_velocity_fn, unstacked
from kontext_jax.models.presets import MMDiTConfig
from kontext_jax.ops.rope import rope_table

CONFIG = MMDiTConfig(
    in_channels=8,
    out_channels=8,
    vec_in_dim=6,
    context_in_dim=12,
    hidden_size=32,
    num_heads=2,
    depth=2,
    depth_single_blocks=3,
    axes_dim=(4, 6, 6),
)
BLOCKS = (0, 2, 4)  # after a double, a single and the last block


@pytest.fixture(scope="module", autouse=True)
def exact_products():
    with jax.default_matmul_precision("highest"):
        yield


@pytest.fixture(scope="module")
def setting():
    """Parameters that answer their inputs, conditioning with references, x_t and t."""
    shapes = jax.eval_shape(lambda key: init_params(MMDiT(CONFIG), key), jax.random.key(0))
    random = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(random.standard_normal(shape), jnp.float32)  # noqa: E731
    params = jax.tree.map(lambda x: 0.2 * draw(*x.shape), shapes)
    pe = rope_table(random.integers(0, 9, (3 + 6 + 4, 3)), CONFIG.axes_dim, CONFIG.theta)
    cond = Conditioning(draw(2, 3, 12), draw(2, 6), jnp.full(2, 2.5), draw(2, 4, 8), pe)
    return params, cond, draw(2, 6, 8), jnp.array([0.3, 0.8])


def features_and_gradient(model, params, cond, x, t, blocks=BLOCKS):
    def score(x):
        found = make_feature_fn(model, params, cond, blocks)(x, t)
        return sum(jnp.sum(jnp.sin(f * f)) for f in found), found

    return jax.jit(jax.value_and_grad(score, has_aux=True))(x)


def test_features_are_target_tokens_after_the_blocks(setting):
    """Of the last block's the velocity is made."""
    params, cond, x, t = setting

    @jax.jit
    def run(x):
        model, variables = MMDiT(CONFIG), {"params": params}
        features = make_feature_fn(model, params, cond, BLOCKS)(x, t)
        velocity = make_velocity_fn(model, params, cond)(x, t, None)
        final = model.apply(variables, t, cond.guidance, cond.vec, method="modulation").final
        # LN(h) is what the final layer modulates.
        modulated = (1 + final[:, None, 1]) * features[2] + final[:, None, 0]
        last = params["final_layer"]
        return features, velocity, modulated @ last["kernel"] + last["bias"]

    features, velocity, of_features = run(x)
    assert [f.shape for f in features] == [(2, 6, 32)] * 3
    assert jnp.std(velocity) > 0.1
    np.testing.assert_allclose(of_features, velocity, atol=2e-5)


@pytest.fixture(scope="module")
def seen(setting):
    params, cond, x, t = setting
    (_, features), gradient = features_and_gradient(MMDiT(CONFIG), params, cond, x, t)
    assert jnp.all(jnp.max(jnp.abs(gradient), axis=(1, 2)) > 1e-3)
    return features, gradient


@pytest.mark.slow
def test_features_of_early_blocks_are_those_of_networks_that_end_there(setting, seen):
    params, cond, x, t = setting
    (_, earlier), _ = features_and_gradient(MMDiT(CONFIG), params, cond, x, t, (0,))
    np.testing.assert_allclose(earlier[0], seen[0][0], atol=1e-5)


@pytest.mark.slow
def test_nothing_after_the_last_chosen_block_is_read(setting, seen):
    """Weights that are not numbers there do no harm: they are not multiplied with anything."""
    params, cond, x, t = setting
    spoilt = params | {
        "single_blocks": jax.tree.map(lambda w: w.at[1:].set(jnp.nan), params["single_blocks"]),
        "single_mod": jax.tree.map(lambda w: w.at[1:].set(jnp.nan), params["single_mod"]),
    }
    (_, found), gradient = features_and_gradient(MMDiT(CONFIG), spoilt, cond, x, t, BLOCKS[:2])
    np.testing.assert_allclose(found[1], seen[0][1], atol=1e-5)
    assert np.isfinite(gradient).all()


@pytest.mark.slow
@pytest.mark.parametrize(("form", "remat"), [("scan", "full"), ("list", "none")])
def test_scan_list_and_rematerialised_blocks_give_the_same(setting, seen, form, remat):
    params, cond, x, t = setting
    model = MMDiT(CONFIG, remat=remat, block_form=form)
    given = unstacked(params) if form == "list" else params
    (_, features), gradient = features_and_gradient(model, given, cond, x, t)
    for ours, theirs in zip(features, seen[0], strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)
    np.testing.assert_allclose(gradient, seen[1], atol=3e-5)


def test_the_backward_pass_keeps_no_copies_of_the_features_for_each_block(setting):
    params, cond, x, t = setting
    model = MMDiT(CONFIG, remat="full")

    def score(x):
        return sum(jnp.sum(f) for f in make_feature_fn(model, params, cond, BLOCKS)(x, t))

    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        print_saved_residuals(score, x)
    saved = text.getvalue()
    assert "f32[3,2,13,32]" in saved, "inputs of the single blocks: three layers, all tokens"
    assert "f32[3,4,2,6,32]" not in saved and "f32[2,4,2,6,32]" not in saved


def test_blocks_that_are_none_are_refused(setting):
    params, cond, x, _ = setting
    for blocks in ((1, 5), (2, 1), (-1, 2)):
        with pytest.raises(ValueError, match=r"taps are .*expected ascending numbers .*0 to 4"):
            TappedMMDiT(CONFIG, taps=blocks).apply(
                {"params": params}, x, cond.txt, cond.pe, None, 6, method="hidden_states"
            )


def test_evenly_spaced_blocks_end_with_the_last():
    assert evenly_spaced(57, 8) == (6, 13, 20, 27, 34, 41, 48, 56)
    assert evenly_spaced(6, 4) == (0, 2, 3, 5)
    assert evenly_spaced(3, 8) == (0, 1, 2)


@pytest.fixture(scope="module")
def heads():
    network = FeatureHeads(FeatureHeadsConfig(width=8))
    features = tuple(jax.random.normal(jax.random.key(i), (2, 6, 16)) for i in range(2))
    told = jnp.array([0.2, 0.7]), jnp.ones((2, 5))
    init = jax.jit(network.init, static_argnums=4)
    params = init(jax.random.key(3), features, *told, (2, 3))["params"]

    def logits(features, t, vec, grid=(2, 3)):
        return network.apply({"params": params}, features, t, vec, grid)

    return params, jax.jit(logits, static_argnums=3), features, told


def test_heads_judge_every_place_of_any_aspect_ratio(heads):
    params, logits, features, told = heads
    maps = logits(features, *told)
    assert [m.shape for m in maps] == [(2, 2, 3)] * 2
    assert logits(features, *told, (1, 6))[0].shape == (2, 1, 6)
    with pytest.raises(ValueError, match="6 tokens are no grid of 2×2"):
        logits(features, *told, (2, 2))
    # The grid counts, not only the number of tokens: neighbours differ.
    assert (
        np.abs(logits(features, *told, (3, 2))[0].reshape(2, 6) - maps[0].reshape(2, 6)).max()
        > 0.01
    )
    assert params.keys() == {"head_0", "head_1"}


def test_a_head_sees_its_own_features_of_one_sample_and_what_it_is_told(heads):
    _, logits, features, (t, vec) = heads
    maps = logits(features, t, vec)
    changed = logits((features[0].at[1].add(1.0 + features[1][1]), features[1]), t, vec)
    np.testing.assert_allclose(changed[0][0], maps[0][0], atol=1e-6)
    np.testing.assert_array_equal(changed[1], maps[1])
    for other in ((t + 0.1, vec), (t, 2 * vec)):
        assert np.abs(logits(features, *other)[0] - maps[0]).max() > 1e-3
    assert np.abs(changed[0][1] - maps[0][1]).max() > 1e-3


def test_head_settings_out_of_range_are_refused():
    for wrong in ({"width": 0}, {"num_layers": -1}, {"blocks": (3, 1)}, {"blocks": (-1,)}):
        with pytest.raises(ValueError, match=f"heads.{next(iter(wrong))} is"):
            dataclasses.replace(FeatureHeadsConfig(), **wrong)
