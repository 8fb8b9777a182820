"""LoRA beside and inside the weights: what it changes, what it leaves, and that it learns."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest

from kontext_jax.batches import Conditioning, TokenBatch
from kontext_jax.models.lora import (
    TARGETS,
    LoraConfig,
    init_lora,
    linear_modules,
    merge,
    scaled,
    targeted_modules,
    trainable_share,
    unmerge,
)
from kontext_jax.models.mmdit import MMDiT, init_params, make_velocity_fn
from kontext_jax.models.presets import PRESETS
from kontext_jax.objectives.base import mean_metrics
from kontext_jax.objectives.flow_matching import FlowMatchingConfig, make_flow_matching
from kontext_jax.ops.rope import rope_table
from kontext_jax.trees import flatten, unflatten
from kontext_jax.weights import bundle as checkpoint
from kontext_jax.weights.adapters import (
    Adapter,
    Changes,
    LowRank,
    adapter_from_tree,
    leaf_edits,
    with_adapters,
)
from kontext_jax.weights.bundle import parameter_shapes
from kontext_jax.weights.untrained import untrained_bundle
from tests.convert_helpers import MMDIT
from tests.lora_helpers import draw_adapter, draw_tree

CONFIG = dataclasses.replace(MMDIT, hidden_size=32, num_heads=2, axes_dim=(4, 6, 6))
MODEL = MMDiT(CONFIG, zero_init=False)
B, L, T = 2, 6, 3
PE = rope_table(np.arange(3 * (T + L)).reshape(T + L, 3) % 5, CONFIG.axes_dim, CONFIG.theta)


@pytest.fixture(autouse=True, scope="module")
def exact_matrix_products():
    with jax.default_matmul_precision("highest"):
        yield


merge_jit = jax.jit(merge)


def draw(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


@pytest.fixture(scope="module")
def params():
    """Weights drawn by NumPy from shapes: every one of them matters."""
    rng = np.random.default_rng(1)
    shapes = parameter_shapes("mmdit", CONFIG)
    leaves = {
        path: jnp.asarray(rng.normal(0, 1 / np.sqrt(CONFIG.hidden_size), x.shape), jnp.float32)
        for path, x in flatten(shapes)
    }
    return unflatten(leaves)


@pytest.fixture(scope="module")
def forward():
    """(params, adapters or None) → velocity; compiled once for each of the two."""
    inputs = (
        draw(B, L, CONFIG.in_channels),
        draw(B, T, CONFIG.context_in_dim, seed=1),
        draw(B, CONFIG.vec_in_dim, seed=2),
        np.array([0.2, 0.7], np.float32),
        np.array([1.0, 3.0], np.float32),
    )

    @jax.jit
    def run(params, lora):
        cond = Conditioning(inputs[1], inputs[2], inputs[4], None, PE)
        return make_velocity_fn(MODEL, params, cond, lora)(inputs[0], inputs[3], None)

    return lambda params, lora=None: np.asarray(run(params, lora))


def test_fresh_adapters_are_drawn_and_zero(params):
    config = LoraConfig(rank=4, targets=("single_blocks/mlp_in", "double_blocks/img_attn/proj"))
    lora = jax.jit(lambda key: init_lora(config, params, key))(jax.random.key(0))
    shapes = {path: leaf.shape for path, leaf in flatten(lora)}
    assert shapes == {
        "double_blocks/img_attn/proj/a": (2, 2, 16, 4),
        "double_blocks/img_attn/proj/b": (2, 4, 32),
        "single_blocks/mlp_in/a": (3, 32, 4),
        "single_blocks/mlp_in/b": (3, 4, 128),
    }
    for path, leaf in flatten(lora):
        spread = float(jnp.std(leaf)) * config.rank
        assert leaf.dtype == jnp.float32
        assert spread == 0 if path.endswith("b") else abs(spread - 1) < 0.15


def test_zero_b_leaves_every_bit_of_the_output(params, forward):
    lora = draw_tree(CONFIG)
    leaves = {p: x * (not p.endswith("/b")) for p, x in flatten(lora)}
    assert {path.rpartition("/")[0] for path in leaves} == linear_modules(params).keys()
    np.testing.assert_array_equal(forward(params, scaled(unflatten(leaves), 3.0)), forward(params))


def test_beside_the_weights_is_inside_the_weights(params, forward):
    lora, alpha = draw_tree(CONFIG), 1.5
    beside, inside = (
        forward(params, scaled(lora, alpha)),
        forward(merge_jit(params, lora, alpha, 1.0)),
    )
    change, difference = np.abs(inside - forward(params)).max(), np.abs(inside - beside).max()
    print(f"change {change:.2f}, merge error {difference:.1e}")
    assert change > 0.1
    assert difference < 1e-5


def test_unmerging_gives_the_weights_back(params):
    lora = draw_tree(CONFIG, ("single_blocks/[qkv]", "final_mod"))
    base = {name: params[name] for name in lora}
    merged = merge(base, lora, 6.0, scale=0.7)
    back = unmerge(merged, lora, 6.0, scale=0.7)
    gaps = [
        [float(jnp.abs(x - y).max()) for x, y in zip(*map(jax.tree.leaves, pair), strict=True)]
        for pair in ((base, merged), (base, back))
    ]
    print(f"merging changes weights by {max(gaps[0]):.2f}, unmerging leaves {max(gaps[1]):.1e}")
    assert max(gaps[0]) > 0.1 and max(gaps[1]) < 1e-6


def test_the_output_moves_away_as_the_scale_grows(params, forward):
    lora = draw_tree(CONFIG)
    base = forward(params)
    scales = (0.0, 0.125, 0.25, 0.5, 1.0)
    away = [
        float(np.sqrt(np.mean((forward(merge_jit(params, lora, 1.0, s)) - base) ** 2)))
        for s in scales
    ]
    print("distance by scale:", dict(zip(scales, np.round(away, 4).tolist(), strict=True)))
    assert away[0] == 0
    assert all(near < far for near, far in itertools.pairwise(away))


def test_float32_adapters_run_in_bfloat16(params):
    lora = scaled(jax.tree.map(jnp.asarray, draw_tree(CONFIG)), 3.0)
    model = MMDiT(CONFIG, dtype=jnp.bfloat16)
    cond = Conditioning(
        draw(B, T, CONFIG.context_in_dim), draw(B, CONFIG.vec_in_dim), np.ones(B), None, PE
    )
    run = lambda x: make_velocity_fn(model, params, cond, lora)(x, np.ones(B), None)  # noqa: E731
    velocity = jax.eval_shape(run, draw(B, L, CONFIG.in_channels))
    assert velocity.dtype == jnp.bfloat16


def test_the_default_targets_are_those_of_diffusers_script(params):
    found = set(targeted_modules(("kontext",), params))
    double = {
        f"double_blocks/{s}_attn/{n}" for s in ("img", "txt") for n in ("q", "k", "v", "proj")
    }
    double |= {f"double_blocks/{s}_mlp/{n}_layer" for s in ("img", "txt") for n in ("in", "out")}
    assert found == double | {f"single_blocks/{n}" for n in ("q", "k", "v", "mlp_in")}
    assert LoraConfig().targets == ("kontext",)


def test_trainable_shares_of_the_published_model():
    shapes = parameter_shapes("mmdit", PRESETS["kontext-dev"].mmdit)
    shares = {}
    for name in TARGETS:
        config = LoraConfig(targets=(name,))
        lora = jax.eval_shape(lambda k, c=config: init_lora(c, shapes, k), jax.random.key(0))
        shares[name] = trainable_share(lora, shapes)
    print("trainable, rank 16:", ", ".join(f"{n} {s:.3%}" for n, s in shares.items()))
    assert shares["attention"] < shares["kontext"] < shares["all-linear"] < 0.02
    # 19 double blocks of two streams and 38 single ones; D = 3072 = H·Dh, M = 4·D, rank 16.
    width, mlp = 3072, 4 * 3072
    expected = 16 * (
        19 * 2 * (4 * 2 * width + 2 * (width + mlp)) + 38 * (3 * 2 * width + width + mlp)
    )
    assert shares["kontext"] == pytest.approx(expected / 11_901_408_320)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, "lora.rank is 0"),
        ({"alpha": 0.0}, "lora.alpha is 0.0"),
        ({"targets": ()}, "lora.targets is empty; choose of kontext, attention, all-linear"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        LoraConfig(**settings)


def test_a_target_that_means_nothing_is_named_with_the_nearest(params):
    with pytest.raises(
        ValueError, match=r"'single_blocks/qkv' matches no linear .*single_blocks/q"
    ):
        targeted_modules(("attention", "single_blocks/qkv"), params)


def test_an_adapter_of_another_model_is_not_merged(params):
    lora = {"triple_blocks": {"q": {"a": jnp.ones((2, 1)), "b": jnp.ones((1, 2))}}}
    with pytest.raises(ValueError, match="triple_blocks/q fits no kernel"):
        merge(params, lora, 1.0)


# Merging while a bundle's weights are loaded.


def test_loading_merges_in_float32_and_rounds_once(params, tmp_path):
    stored = jax.tree.map(lambda x: np.asarray(x).astype(ml_dtypes.bfloat16), params)
    checkpoint.save_component(tmp_path, "mmdit", CONFIG, stored)
    checkpoint.write_manifest(tmp_path, "tiny", ["mmdit"], "a test", None)
    bundle = checkpoint.open_bundle(tmp_path, ["mmdit"], require_tokenizers=False)
    first, second = draw_tree(CONFIG), draw_tree(CONFIG, ("attention",), rank=2, seed=1)
    given = [(adapter_from_tree(first, 6.0, "a"), 0.7), (adapter_from_tree(second, 2.0, "b"), -1.0)]
    together = with_adapters(bundle, given)
    one_by_one = with_adapters(with_adapters(bundle, given[:1]), given[1:])

    wide = jax.tree.map(lambda x: x.astype(np.float32), stored)
    merged = merge_jit(merge_jit(wide, first, 6.0, 0.7), second, 2.0, -1.0)
    expected = dict(flatten(merged))
    for dtype in (None, "float32"):
        for loaded in (b.components["mmdit"].load(dtype) for b in (together, one_by_one)):
            for path, leaf in flatten(loaded):
                target = np.dtype(dtype or ml_dtypes.bfloat16)
                assert leaf.dtype == target
                # Sums of three numbers in another order: a bit or two of the dtype that is kept.
                gap = np.abs(np.float64(leaf) - np.float64(expected[path])).max()
                assert gap <= 4 * float(ml_dtypes.finfo(target).eps), path
    assert [(a.name, a.scale) for a in together.adapters] == [("a", 0.7), ("b", -1.0)]
    assert one_by_one.adapters == together.adapters
    plain = dict(flatten(bundle.components["mmdit"].load()))
    for path, leaf in flatten(stored):
        np.testing.assert_array_equal(plain[path], leaf)


def test_untrained_weights_take_adapters_too():
    bundle = untrained_bundle("tiny")
    adapter = draw_adapter(bundle.preset.mmdit, ("single_blocks/attn_out",))
    changed = with_adapters(bundle, [(adapter, 1.0)])
    before, after = (dict(flatten(b.components["mmdit"].load())) for b in (bundle, changed))
    different = {path for path in before if not np.array_equal(before[path], after[path])}
    assert different == {"single_blocks/attn_out/kernel"}
    assert changed.identity == bundle.identity


def test_bias_and_replaced_scales_of_control_loras():
    low_rank = LowRank(np.zeros((4, 1), np.float32), np.zeros((1, 3), np.float32), 1.0, np.ones(3))
    changes = Changes({("m", 1): low_rank}, {("n/scale", 0): np.full(2, 7, np.float32)})
    edits = leaf_edits([(changes, 0.5)])
    bias = edits["m/bias"](np.zeros((2, 3), np.float32))
    np.testing.assert_array_equal(bias, [[0, 0, 0], [0.5, 0.5, 0.5]])
    scale = edits["n/scale"](np.ones((2, 2), np.float32))
    np.testing.assert_array_equal(scale, [[7, 7], [1, 1]])  # whatever the scale
    with pytest.raises(ValueError, match="two of the LoRAs replace n/scale"):
        leaf_edits([(changes, 0.5), (changes, 0.5)])


def test_the_hash_of_a_runs_adapters_tells_them_apart():
    tree = draw_tree(CONFIG, ("img_in",))
    hashes = {adapter_from_tree(tree, alpha, "a").sha256 for alpha in (1.0, 2.0)}
    other = jax.tree.map(lambda x: x + 1, tree)
    assert len(hashes | {adapter_from_tree(other, 1.0, "a").sha256}) == 3
    again: Adapter = adapter_from_tree(tree, 1.0, "elsewhere")
    assert again.sha256 in hashes


@pytest.mark.slow
def test_training_only_the_adapters_learns_a_pair_and_leaves_the_base(params):
    """RECIPES' micro-test of LoRA: one target, one reference, one prompt, learnt by heart."""
    num_context, alpha = 4, 8.0
    model = MMDiT(CONFIG, zero_init=False)
    base = init_params(model, jax.random.key(0))
    kept = jax.tree.map(np.array, base)
    positions = np.arange(3 * (T + L + num_context)).reshape(-1, 3) % 5
    batch = TokenBatch(
        x0=jnp.tile(draw(1, L, CONFIG.in_channels), (8, 1, 1)),
        ctx=jnp.tile(draw(1, num_context, CONFIG.in_channels, seed=3), (8, 1, 1)),
        txt=jnp.tile(draw(1, T, CONFIG.context_in_dim, seed=1), (8, 1, 1)),
        vec=jnp.tile(draw(1, CONFIG.vec_in_dim, seed=2), (8, 1)),
        null_txt=jnp.zeros((T, CONFIG.context_in_dim)),
        null_vec=jnp.zeros(CONFIG.vec_in_dim),
        pe=rope_table(positions, CONFIG.axes_dim, CONFIG.theta),
    )

    def predict(lora, frozen, x_t, t, batch, guidance):
        cond = Conditioning(batch.txt, batch.vec, guidance, batch.ctx, batch.pe)
        return make_velocity_fn(model, frozen["mmdit"], cond, scaled(lora, alpha))(x_t, t, None)

    config = LoraConfig(rank=8, alpha=alpha)
    objective = make_flow_matching(
        predict,
        lambda key: init_lora(config, base, key),
        optax.adam(3e-3),
        FlowMatchingConfig(text_dropout=0.0),
        takes_guidance=True,
    )
    frozen = {"mmdit": base}
    state = objective.init(jax.random.key(1))
    step, evaluate = jax.jit(objective.step, donate_argnums=0), jax.jit(objective.evaluate)

    def loss():
        metrics = evaluate(state.params, frozen, batch, jax.random.key(2))
        return float(mean_metrics([metrics])["loss"])

    losses = [loss()]
    for _ in range(4):
        for _ in range(50):
            state, _ = step(state, frozen, batch, jax.random.key(3))
        losses.append(loss())
    share = trainable_share(state.params, base)
    print(f"loss {' → '.join(f'{x:.3f}' for x in losses)}; trainable {share:.1%}")
    assert state.params.keys() == {"double_blocks", "single_blocks"}
    assert losses[-1] < 0.5 * losses[0]
    for path, leaf in flatten(kept):
        assert np.asarray(dict(flatten(base))[path]).tobytes() == leaf.tobytes(), path
