"""Adversarial distillation: who learns from what, the penalty, the draws, what is refused."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kontext_jax.batches import TokenBatch
from kontext_jax.flow import path as flow
from kontext_jax.flow.samplers import euler_sample
from kontext_jax.models.judges.feature_heads import FeatureHeads, FeatureHeadsConfig
from kontext_jax.objectives.adversarial import Adversary
from kontext_jax.objectives.base import sample_keys, use_key
from kontext_jax.objectives.ladd import (
    LADD,
    LADDConfig,
    Seen,
    gradient_penalty,
    heads_loss,
    hinge_loss,
    make_ladd,
    mismatched,
    rollout,
    student_input,
    teacher_features,
)

B, L, C, D = 4, 3, 2, 5
KEY = jax.random.key(2)  # its logits do not cancel: losses compare by their own size
LOSS = LADDConfig(r1_weight=0.3, warmup_steps=3)


@pytest.fixture(scope="module", autouse=True)
def exact_products():
    with jax.default_matmul_precision("highest"):
        yield


def draw(*shape, seed):
    return jax.random.normal(jax.random.key(seed), shape)


BATCH = TokenBatch(
    x0=draw(B, L, C, seed=10),
    ctx=draw(B, 1, C, seed=11),
    txt=draw(B, 2, 3, seed=12),
    vec=draw(B, 3, seed=13),
    null_txt=jnp.zeros((2, 3)),
    null_vec=jnp.zeros(3),
    pe=jnp.zeros((2, 6, 1)),
)
FROZEN = {"teacher": [draw(C + 6, D, seed=20), draw(C + 6, D, seed=21)]}


def told(x_t, t, batch):
    """Each token beside its time, text and reference."""
    others = [batch.vec, t[:, None], batch.ctx[:, 0]]
    return jnp.concatenate([x_t, *(jnp.repeat(o[:, None], L, 1) for o in others)], axis=-1)


def predict(params, frozen, x_t, t, batch, guidance):
    del frozen
    velocity = jnp.tanh(told(x_t, t, batch) @ params["in"]) @ params["out"]
    return velocity if guidance is None else velocity + 0.1 * guidance[:, None, None]


def features(frozen, x_t, t, batch):
    return [jnp.tanh(told(x_t, t, batch) @ w) for w in frozen["teacher"]]


def logits(params, features, t, batch):
    told = t + batch.vec[:, 0]
    return [
        jnp.tanh(f @ w + told[:, None, None]) @ v
        for f, w, v in zip(features, params["w"], params["v"], strict=True)
    ]


HEADS = Adversary(
    logits=logits,
    init=lambda key: {
        "w": [jax.random.normal(key, (D, D)), jax.random.normal(key, (D, 4))],
        "v": [jnp.linspace(-1, 2, D), jnp.linspace(-2, 1, 4)],
    },
    optimizer=optax.sgd(1.0),
)


def init_params(key):
    keys = jax.random.split(key)
    return {
        "in": jax.random.normal(keys[0], (C + 6, 7)),
        "out": jax.random.normal(keys[1], (7, C)),
    }


def make_objective(loss=LOSS, heads=HEADS, accumulate_steps=1, takes_guidance=True):
    return make_ladd(
        predict,
        features,
        heads,
        init_params,
        optax.sgd(1.0),
        loss,
        takes_guidance=takes_guidance,
        ema_decay=0.9,
        accumulate_steps=accumulate_steps,
    )


def step_of(objective):
    """The step after the state's, for one state after another without compiling anew."""
    return jax.jit(objective.step)


@pytest.fixture(scope="module")
def fresh():
    return jax.jit(make_objective().init)(jax.random.key(0))


@pytest.fixture(scope="module")
def stepped(fresh):
    """The step; states after steps 0 (warm-up) and 3 from the same parameters; their metrics."""
    step = step_of(make_objective())
    return step, {i: step(fresh.replace(step=jnp.int32(i)), FROZEN, BATCH, KEY) for i in (0, 3)}


def draws(key, probabilities):
    """What a step draws by its key: noise, index of t; s and noise' of made and real."""
    index = jnp.arange(B)

    def normals(use, shape):
        return jax.vmap(lambda k: jax.random.normal(k, shape))(sample_keys(key, use, index))

    def s(use):
        return jnp.clip(jax.nn.sigmoid(1.0 + normals(use, ())), 0.02, 0.98)

    log = jnp.log(jnp.asarray(probabilities))
    where = jax.vmap(lambda k: jax.random.categorical(k, log))(sample_keys(key, "t", index))
    fake = s("fake_s"), normals("fake_noise", (L, C))
    return normals("noise", (L, C)), where, fake, (s("real_s"), normals("real_noise", (L, C)))


def written_out(config, drawn, x_t=None):
    """L_G by both networks' parameters and L_D likewise, with nothing stopped."""
    noise, where, (fake_s, fake_noise), (real_s, real_noise) = drawn
    t = jnp.asarray(config.timesteps)[where]
    x_t = flow.interpolate(BATCH.x0, noise, t) if x_t is None else x_t

    def fake_features(theta):
        guidance = jnp.full(B, 2.5)
        x0_hat = x_t - t[:, None, None] * predict(theta, FROZEN, x_t, t, BATCH, guidance)
        return features(FROZEN, flow.interpolate(x0_hat, fake_noise, fake_s), fake_s, BATCH)

    def g(theta, phi):
        return -sum(jnp.mean(x) for x in logits(phi, fake_features(theta), fake_s, BATCH))

    def d(theta, phi):
        real_f = features(FROZEN, flow.interpolate(BATCH.x0, real_noise, real_s), real_s, BATCH)
        real = logits(phi, real_f, real_s, BATCH)
        fake = logits(phi, fake_features(theta), fake_s, BATCH)
        loss = sum(jnp.mean(jnp.maximum(0, 1 - x)) for x in real)
        loss += sum(jnp.mean(jnp.maximum(0, 1 + x)) for x in fake)
        # One sample and one head at a time.
        penalty = 0.0
        for k in range(2):
            for b in range(B):

                def total(f, k=k, b=b):
                    single = BATCH.replace(vec=BATCH.vec[b : b + 1])
                    both = [x[b : b + 1] for x in real_f]
                    both[k] = f[None]
                    return jnp.sum(logits(phi, both, real_s[b : b + 1], single)[k])

                penalty += jnp.sum(jax.grad(total)(real_f[k][b]) ** 2) / B
        return loss + config.r1_weight * penalty, (loss, penalty)

    return g, d


def assert_trees_close(a, b, rtol=1e-4):
    norm = optax.tree.norm(b)
    assert norm > 1e-3
    difference = optax.tree.norm(jax.tree.map(jnp.subtract, a, b)) / norm
    assert difference < rtol, f"they differ by {difference:.2e} of their norm"


def change(before, after):
    return jax.tree.map(jnp.subtract, before, after)


def probabilities_at(step, config=LOSS):
    return config.warmup_probabilities if step < config.warmup_steps else config.probabilities


@jax.jit
def by_hand(theta, phi, key, probabilities):
    """L_G, its gradient by the student; L_D's gradients by both; L_D without penalty, and that."""
    g, d = written_out(LOSS, draws(key, probabilities))
    value, by_theta = jax.value_and_grad(g)(theta, phi)
    (leak, by_phi), losses = jax.grad(d, (0, 1), has_aux=True)(theta, phi)
    return value, by_theta, leak, by_phi, losses


@pytest.mark.parametrize("at", [0, 3])
def test_both_gradients_are_those_of_the_written_out_losses(fresh, stepped, at):
    """SGD at rate 1: what changed is the gradient, L_G's for the student, L_D's for the heads.

    The student's goes through heads and teacher; were L_G to reach the heads as well, or L_D the
    student, the changes would differ. Step 0 draws times as the warm-up has them, step 3 no more.
    """
    after, metrics = stepped[1][at]
    theta, phi = fresh.params, fresh.extra.params
    key, probabilities = jax.random.fold_in(KEY, at), jnp.asarray(probabilities_at(at))
    value, by_theta, leak, by_phi, losses = by_hand(theta, phi, key, probabilities)
    assert_trees_close(change(theta, after.params), by_theta)
    assert_trees_close(change(phi, after.extra.params), by_phi)
    assert optax.tree.norm(leak) > 1e-2, "L_D depends on the student, had it been let"
    for name, expected in zip(
        ("loss", "discriminator/loss", "discriminator/r1"), (value, *losses), strict=True
    ):
        assert metrics[name] == pytest.approx(float(expected), rel=1e-4), name
    assert metrics["x0_grad"] > 1e-3
    assert after.extra.step == 1 and after.step == at + 1


@pytest.mark.slow
def test_the_student_does_not_feel_what_the_heads_learn(fresh, stepped):
    still = step_of(make_objective(heads=HEADS._replace(optimizer=optax.sgd(0.0))))
    state, metrics = still(fresh.replace(step=jnp.int32(3)), FROZEN, BATCH, KEY)
    jax.tree.map(np.testing.assert_array_equal, state.params, stepped[1][3][0].params)
    jax.tree.map(np.testing.assert_array_equal, state.extra.params, fresh.extra.params)
    assert metrics["discriminator/update_norm/sum"] == 0


@pytest.mark.slow
def test_micro_batches_give_the_gradients_of_the_whole(fresh, stepped):
    halves = step_of(make_objective(accumulate_steps=2))
    after, metrics = halves(fresh.replace(step=jnp.int32(3)), FROZEN, BATCH, KEY)
    whole, whole_metrics = stepped[1][3]
    assert_trees_close(after.params, whole.params)
    assert_trees_close(after.extra.params, whole.extra.params)
    assert metrics["loss"] == pytest.approx(float(whole_metrics["loss"]), rel=1e-4)
    counts = [
        sum(float(m[f"discriminator/accuracy/{i}/count"]) for i in range(4))
        for m in (metrics, whole_metrics)
    ]
    assert counts == [2 * B, 2 * B]


@pytest.mark.slow
def test_heads_may_be_updated_several_times_for_each_update_of_the_student(fresh):
    config = dataclasses.replace(LOSS, discriminator_steps=3)
    after, _ = step_of(make_objective(config))(fresh, FROZEN, BATCH, KEY)
    assert (after.step, after.extra.step) == (1, 3)

    @jax.jit
    def by_hand(theta, phi):
        # Twice the heads alone, each with its own draws, then both.
        own = use_key(jax.random.fold_in(KEY, 0), "heads alone")
        keys = [jax.random.fold_in(own, 0), jax.random.fold_in(own, 1), jax.random.fold_in(KEY, 0)]
        for key in keys:
            g, d = written_out(LOSS, draws(key, LOSS.warmup_probabilities))
            seen = phi
            grads = jax.grad(d, 1, has_aux=True)(theta, phi)[0]
            phi = jax.tree.map(jnp.subtract, phi, grads)
        return jax.grad(g)(theta, seen), phi

    by_theta, phi = by_hand(fresh.params, fresh.extra.params)
    # Updates at rate 1, one upon the other, enlarge what rounding leaves.
    assert_trees_close(change(fresh.params, after.params), by_theta, 1e-3)
    assert_trees_close(after.extra.params, phi, 1e-3)


@pytest.mark.slow
def test_on_policy_inputs_are_the_students_own_euler_states(fresh):
    config = dataclasses.replace(LOSS, on_policy=1.0, probabilities=(0.25,) * 4)
    state = fresh.replace(step=jnp.int32(3))
    after, _ = step_of(make_objective(config))(state, FROZEN, BATCH, KEY)
    drawn = draws(jax.random.fold_in(KEY, 3), config.probabilities)
    noise, where = drawn[:2]
    assert len(set(np.asarray(where))) > 1
    times = np.array([*config.timesteps, 0.0], np.float32)

    def velocity_fn(x, t, _):
        return predict(fresh.params, FROZEN, x, t, BATCH, jnp.full(B, 2.5))

    states = jnp.stack(
        [noise, *(euler_sample(velocity_fn, noise, times, stop=i) for i in (1, 2, 3))]
    )
    x_t = states[where, jnp.arange(B)]
    g, _ = written_out(config, drawn, x_t)
    by_theta = jax.jit(jax.grad(g))(fresh.params, fresh.extra.params)
    assert_trees_close(change(fresh.params, after.params), by_theta)


def test_negatives_have_the_text_or_the_references_of_another_example():
    is_text = jnp.array([True, False, True, False])
    other = mismatched(BATCH, is_text)
    for name, exchanged in (("txt", is_text), ("vec", is_text), ("ctx", ~is_text)):
        for i in range(B):
            theirs = getattr(BATCH, name)[i - 1 if exchanged[i] else i]
            np.testing.assert_array_equal(getattr(other, name)[i], theirs)
    np.testing.assert_array_equal(other.x0, BATCH.x0)
    alone = mismatched(BATCH.replace(ctx=None), is_text)
    np.testing.assert_array_equal(alone.txt, jnp.roll(BATCH.txt, 1, axis=0))


@pytest.mark.slow
def test_negatives_teach_the_heads_alone(fresh, stepped):
    config = dataclasses.replace(LOSS, negative_share=0.5)
    step = step_of(make_objective(config))
    after, metrics = step(fresh.replace(step=jnp.int32(3)), FROZEN, BATCH, KEY)
    without = stepped[1][3][0]
    assert metrics["discriminator/negative_loss"] > 0
    assert optax.tree.norm(change(after.extra.params, without.extra.params)) > 1e-3
    jax.tree.map(np.testing.assert_array_equal, after.params, without.params)
    with pytest.raises(ValueError, match="needs the text of another example"):
        step_of(make_objective(config, accumulate_steps=B))(fresh, FROZEN, BATCH, KEY)


@pytest.mark.parametrize("share", [0.0, 0.4])
def test_heads_that_cannot_tell_stay_in_the_middle(share):
    """Real ones weigh as much as fakes of both kinds; else blind heads would say "fake"."""
    blind = Adversary(
        logits=lambda params, features, t, batch: [params + 0 * f[..., 0] for f in features],
        init=lambda key: jnp.zeros(()),
        optimizer=optax.sgd(1.0),
    )
    objective = make_objective(dataclasses.replace(LOSS, negative_share=share), blind)
    after, _ = step_of(objective)(objective.init(KEY), FROZEN, BATCH, KEY)
    assert abs(after.extra.params) < 1e-6


@pytest.mark.slow
def test_the_penalty_is_what_finite_differences_say():
    """Of real heads: by each input, and its own gradient by their parameters."""
    network = FeatureHeads(FeatureHeadsConfig(width=4, num_layers=1))
    seen = [draw(2, 4, 3, seed=i) for i in (1, 2)]
    t, vec = jnp.array([0.3, 0.9]), draw(2, 3, seed=5)
    params = jax.jit(network.init, static_argnums=4)(jax.random.key(3), seen, t, vec, (2, 2))

    def judge(params, f):
        return network.apply(params, f, t, vec, (2, 2))

    def penalty(params):
        return gradient_penalty(lambda f: judge(params, f), seen)

    @jax.jit
    def by_differences(params, h=1e-3):  # small: leaky ReLUs have kinks
        total = 0.0
        for k, f in enumerate(seen):

            def moved(delta, k=k, f=f):
                both = [*seen[:k], f + delta.reshape(f.shape), *seen[k + 1 :]]
                return jnp.sum(judge(params, both)[k])

            ends = [jax.vmap(moved)(sign * h * jnp.eye(f.size)) for sign in (1, -1)]
            total += jnp.sum(((ends[0] - ends[1]) / (2 * h)) ** 2) / len(f)
        return total

    value, grads = jax.jit(jax.value_and_grad(penalty))(params)
    assert value == pytest.approx(float(by_differences(params)), rel=1e-2)
    norm, h = optax.tree.norm(grads), 1e-3
    ends = [
        jax.jit(penalty)(jax.tree.map(lambda p, g, s=s: p + s * h * g / norm, params, grads))
        for s in (1, -1)
    ]
    assert (ends[0] - ends[1]) / (2 * h) == pytest.approx(float(norm), rel=2e-2)


# The parts of a step, each by itself


def parts(**changes) -> LADD:
    config = dataclasses.replace(LOSS, **changes)
    return LADD(predict, features, HEADS, config, True, jnp.asarray(config.timesteps))


def test_the_student_is_given_an_example_with_noise_at_a_time_of_its_own(fresh):
    """A time whose probability is 0 is never drawn; a sample gets what its place says."""
    probabilities = jnp.asarray([0.5, 0.0, 0.5, 0.0])
    index = jnp.arange(B)
    given = parts(), fresh.params, FROZEN
    x_t, t = student_input(*given, BATCH, probabilities, KEY, index)
    noise, where, *_ = draws(KEY, probabilities)
    np.testing.assert_array_equal(t, jnp.asarray(LOSS.timesteps)[where])
    np.testing.assert_allclose(x_t, flow.interpolate(BATCH.x0, noise, t), rtol=1e-6)
    times = [
        student_input(*given, BATCH, probabilities, k, index)[1] for k in jax.random.split(KEY)
    ]
    assert {float(x) for x in jnp.concatenate(times)} <= {1.0, 0.5}

    half = jax.tree.map(lambda x: x[2:] if x.ndim == 3 and len(x) == B else x, BATCH)
    half = half.replace(vec=BATCH.vec[2:], null_txt=BATCH.null_txt, pe=BATCH.pe)
    np.testing.assert_array_equal(
        student_input(*given, half, probabilities, KEY, index[2:])[0], x_t[2:]
    )


def test_on_policy_the_student_is_given_its_own_states(fresh):
    probabilities, index = jnp.asarray([0.25] * 4), jnp.arange(B)
    own = parts(on_policy=1.0)
    x_t, t = student_input(own, fresh.params, FROZEN, BATCH, probabilities, KEY, index)
    noise, where, *_ = draws(KEY, probabilities)
    np.testing.assert_array_equal(x_t, rollout(own, fresh.params, FROZEN, BATCH, noise, where))
    np.testing.assert_array_equal(t, jnp.asarray(LOSS.timesteps)[where])


def test_features_are_taken_at_a_random_time_within_the_range():
    index, x = jnp.arange(B), BATCH.x0
    drawn = draws(KEY, LOSS.probabilities)
    for use, (s, noise) in zip(("fake", "real"), drawn[2:], strict=True):
        features_of, at = teacher_features(parts(), FROZEN, BATCH, KEY, use, index)
        np.testing.assert_allclose(at, s, rtol=1e-6)
        wanted = features(FROZEN, flow.interpolate(x, noise, s), s, BATCH)
        for ours, theirs in zip(features_of(x), wanted, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-5)
    narrow = parts(renoise_range=(0.4, 0.41), renoise_sigma=9.0)
    _, at = teacher_features(narrow, FROZEN, BATCH, KEY, "real", index)
    assert at.min() >= 0.4 and at.max() <= 0.41
    assert not np.array_equal(drawn[2][1], drawn[3][1]), "made and real ones have their own noise'"


def shown(value: float) -> Seen:
    """Examples whose one feature is everywhere `value`."""
    return Seen([jnp.full((B, L, 1), value)], jnp.full(B, 0.5), BATCH)


@pytest.mark.parametrize("share", [0.0, 0.25])
def test_the_loss_of_the_heads_by_numbers(share):
    """Heads that say p·f: at p = 2 the features are logits of half the size."""
    scaled = HEADS._replace(logits=lambda p, f, s, batch: [p * x[..., 0] for x in f])
    ladd = parts(r1_weight=0.5, negative_share=share)._replace(heads=scaled)
    negative = shown(1.0) if share else None
    loss, metrics = heads_loss(jnp.float32(2), ladd, shown(0.25), shown(-0.25), negative)
    hinges = (1 - 0.5) + (1 - 0.5)
    assert metrics["discriminator/loss"] == pytest.approx(hinges)
    # R1: each of a sample's L places gives p² for its one feature.
    assert metrics["discriminator/r1"] == pytest.approx(L * 2.0**2)
    assert loss == pytest.approx(hinges + share * (3 - 0.5) + 0.5 * L * 2.0**2)
    assert (metrics["discriminator/real/0"], metrics["discriminator/fake/0"]) == (0.5, -0.5)
    accuracy = sum(float(metrics[f"discriminator/accuracy/{i}/sum"]) for i in range(4))
    assert accuracy == 2 * B and metrics["discriminator/active"] == 1


def test_losses_by_numbers():
    real = [jnp.array([2.0, -0.5]), jnp.array([[0.5]])]
    fake = [jnp.array([-3.0, 0.5]), jnp.array([[-0.5]])]
    assert hinge_loss(real, fake) == pytest.approx(0.75 + 0.5 + 0.75 + 0.5)


def test_evaluation_is_the_same_every_time_and_zero_for_a_student_that_knows(fresh):
    def knows(params, frozen, x_t, t, batch, guidance):
        assert guidance is None
        return (x_t - batch.x0) / t[:, None, None] + params["error"]

    objective = make_ladd(
        knows, features, HEADS, init_params, optax.sgd(1.0), LOSS, takes_guidance=False
    )
    evaluate = jax.jit(objective.evaluate)
    exact = evaluate({"error": jnp.zeros(())}, FROZEN, BATCH, KEY)
    again = evaluate({"error": jnp.zeros(())}, FROZEN, BATCH, KEY)
    assert exact == again and exact["loss"] < 1e-10
    assert exact["x0_std/0"] == pytest.approx(1, abs=1e-5)
    off = evaluate({"error": jnp.ones(())}, FROZEN, BATCH, KEY)
    distances = [float(off[f"feature_distance/{i}"]) for i in range(4)]
    assert distances == sorted(distances, reverse=True) and distances[-1] > 1e-4
    assert off["loss"] == pytest.approx(np.mean(distances), rel=1e-5)


def test_a_step_without_finite_numbers_changes_neither_network(fresh, stepped):
    step, _ = stepped
    broken = BATCH.replace(x0=BATCH.x0.at[1, 0, 0].set(jnp.nan))
    after, metrics = step(fresh, FROZEN, broken, KEY)
    for a, b in ((fresh, after), (fresh.extra, after.extra)):
        jax.tree.map(
            np.testing.assert_array_equal, (a.params, a.ema_params), (b.params, b.ema_params)
        )
    assert metrics["skipped"] == 1 and after.extra.skipped == 1


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"timesteps": (0.9, 0.5), "probabilities": (0.5, 0.5)},
            "ladd.timesteps: .* falling from 1",
        ),
        ({"timesteps": (1.0, 0.5, 0.5, 0.2)}, "ladd.timesteps: .* falling from 1"),
        ({"timesteps": (1.0, 0.5, 0.2, 0.0)}, "falling from 1 .noise. to above 0"),
        ({"probabilities": (0.5, 0.5)}, "expected 4 numbers that add up to 1"),
        ({"warmup_probabilities": (0.5, 0.5, 0.5, -0.5)}, "warmup_probabilities is"),
        ({"renoise_range": (0.5, 0.1)}, "0 < low < high < 1"),
        ({"renoise_sigma": 0.0}, "must be positive"),
        ({"discriminator_steps": 0}, "must be at least 1"),
        ({"on_policy": 1.5}, r"must be in \[0, 1\]"),
        ({"negative_share": 1.0}, r"must be in \[0, 1\)"),
    ],
)
def test_settings_out_of_range_are_refused(changed, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(LADDConfig(), **changed)
