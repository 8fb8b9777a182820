"""Two networks from one forward pass: no leak either way, the adaptive weight, when it begins."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kontext_jax.models.judges.discriminators import DiscriminatorConfig, PatchDiscriminator
from kontext_jax.objectives.adversarial import (
    Adversary,
    adaptive_weight,
    discriminator_loss,
    generator_loss,
)
from kontext_jax.objectives.autoencoder import (
    AutoencoderConfig,
    Coder,
    PictureBatch,
    make_autoencoder,
)
from kontext_jax.objectives.base import mean_metrics, sample_keys

START, WEIGHT = 1, 0.8
LOSS = AutoencoderConfig(
    perceptual_weight=0.5,
    adversarial_weight=WEIGHT,
    adversarial_start_step=START,
    adversarial_loss="hinge",
)


@pytest.fixture(scope="module", autouse=True)
def exact_products():
    with jax.default_matmul_precision("highest"):
        yield


def blurred_distance(frozen, a, b):
    """Stands for a perceptual network: distances of means over 2×2 pixels."""
    means = [x.reshape(-1, 8, 2, 8, 2, 3).mean((2, 4)) for x in (a, b)]
    return frozen["scale"] * jnp.mean(jnp.square(means[0] - means[1]), axis=(1, 2, 3))


def toy_coder():
    """An autoencoder of 4×4 patches: a dense layer to mean and logvar, two back."""

    def patches(x):
        return x.reshape(-1, 4, 4, 4, 4, 3).swapaxes(2, 3).reshape(-1, 4, 4, 48)

    def output(last, h):
        x = (h @ last["kernel"] + last["bias"]).reshape(-1, 4, 4, 4, 4, 3)
        return x.swapaxes(2, 3).reshape(-1, 16, 16, 3)

    return Coder(
        moments=lambda p, x: tuple(jnp.split(patches(x) @ p["in"], 2, axis=-1)),
        features=lambda p, z: jnp.tanh(z @ p["middle"]),
        output=output,
        last=lambda p: p["last"],
    )


def toy_params(key):
    keys = jax.random.split(key, 3)
    return {
        "in": 0.2 * jax.random.normal(keys[0], (48, 8)),
        "middle": jax.random.normal(keys[1], (4, 8)),
        "last": {"kernel": jax.random.normal(keys[2], (8, 48)), "bias": jnp.zeros(48)},
    }


def toy_logits(p, x):
    cells = jnp.tanh(x.reshape(-1, 4, 4, 4, 4, 3).swapaxes(2, 3).reshape(-1, 16, 48) @ p["in"])
    return cells @ p["out"]


ADVERSARY = Adversary(
    logits=toy_logits,
    init=lambda key: {
        "in": 0.3 * jax.random.normal(key, (48, 6)),
        "out": jax.random.normal(jax.random.fold_in(key, 1), (6,)),
    },
    optimizer=optax.sgd(1.0),
    learning_rate=optax.linear_schedule(1.0, 0.0, 10),
)


def make_objective(adversary=ADVERSARY, loss=LOSS, accumulate_steps=1):
    return make_autoencoder(
        toy_coder(),
        toy_params,
        optax.sgd(1.0),
        loss,
        perceptual=blurred_distance,
        adversary=adversary,
        ema_decay=0.9,
        accumulate_steps=accumulate_steps,
    )


FROZEN = {"scale": jnp.float32(3.0)}
BATCH = PictureBatch(jax.random.uniform(jax.random.key(5), (4, 16, 16, 3), minval=-1, maxval=1))
KEY = jax.random.key(2)


@pytest.fixture(scope="module")
def stepped():
    """The step; states: fresh, after its step 0 and after its step START; metrics of both."""
    objective = make_objective()
    fresh, step = jax.jit(objective.init)(jax.random.key(0)), jax.jit(objective.step)
    results = [step(state, FROZEN, BATCH, KEY) for state in (fresh, started(fresh))]
    return step, (fresh, *(state for state, _ in results)), [row for _, row in results]


def started(state):
    return state.replace(step=jnp.int32(START))


@jax.jit
def posterior_noise(state_step):
    """What the step that `state_step` steps came before draws for its samples."""
    keys = sample_keys(jax.random.fold_in(KEY, state_step), "posterior", jnp.arange(4))
    return jax.vmap(lambda k: jax.random.normal(k, (4, 4, 4)))(keys)


def reconstruct(params, noise):
    """The reconstruction of BATCH, and the KL's term of the loss."""
    coder = toy_coder()
    mean, logvar = coder.moments(params, BATCH.image)
    features = coder.features(params, mean + jnp.exp(logvar / 2) * noise)
    kl = 0.5 * jnp.sum(mean**2 + jnp.exp(logvar) - 1 - logvar, axis=(1, 2, 3))
    return coder.output(params["last"], features), 1e-6 * jnp.mean(kl)


def nll_of(decoded):
    error = decoded - BATCH.image
    sums = jnp.sum(jnp.abs(error), axis=(1, 2, 3))
    return jnp.mean(sums + 0.5 * 16 * 16 * 3 * blurred_distance(FROZEN, BATCH.image, decoded))


def assert_trees_close(a, b, rtol):
    norm = optax.tree.norm(b)
    assert norm > 0
    difference = optax.tree.norm(jax.tree.map(jnp.subtract, a, b)) / norm
    assert difference < rtol, f"they differ by {difference:.2e} of their norm"


def change(before, after):
    return jax.tree.map(jnp.subtract, before, after)


def test_the_weight_and_both_gradients_are_those_of_the_written_out_losses(stepped):
    _, states, rows = stepped
    before, _, after = states
    phi = before.extra.params

    def losses(params, noise):
        decoded, kl = reconstruct(params, noise)
        return jnp.stack([nll_of(decoded), -jnp.mean(toy_logits(phi, decoded)), kl])

    @jax.jit
    def by_hand(params, noise):
        # Three whole backward passes, as taming-transformers does it.
        jacobian = jax.jacrev(losses)(params, noise)
        nll, g, kl = (jax.tree.map(lambda x, i=i: x[i], jacobian) for i in range(3))
        norms = [jnp.linalg.norm(x["last"]["kernel"].ravel()) for x in (nll, g)]
        weight = WEIGHT * jnp.clip(norms[0] / (norms[1] + 1e-4), 0, 1e4)
        total = jax.tree.map(lambda a, b, c: a + weight * b + c, nll, g, kl)
        decoded, _ = reconstruct(params, noise)

        def discriminator(phi):
            real, fake = toy_logits(phi, BATCH.image), toy_logits(phi, decoded)
            return 0.5 * (jnp.mean(jax.nn.relu(1 - real)) + jnp.mean(jax.nn.relu(1 + fake)))

        return weight, total, jax.grad(discriminator)(phi)

    weight, total, by_phi = by_hand(before.params, posterior_noise(START))
    assert 1e-3 < weight < 1e4, "neither bound hides the quotient"
    np.testing.assert_allclose(rows[START]["adversarial_weight/sum"], weight, rtol=1e-4)
    # SGD at rate 1: what changed is the gradient. Were D's loss to leak into the autoencoder, or g
    # into D, the changes would differ.
    assert_trees_close(change(before.params, after.params), total, 2e-4)
    assert_trees_close(change(phi, after.extra.params), by_phi, 1e-4)


@pytest.mark.slow
def test_the_autoencoder_does_not_feel_what_the_discriminator_learns(stepped):
    # The same step with a discriminator that is not updated changes the autoencoder alike.
    _, states, rows = stepped
    still = make_objective(ADVERSARY._replace(optimizer=optax.sgd(0.0)))
    state, metrics = jax.jit(still.step)(started(states[0]), FROZEN, BATCH, KEY)
    for mine, theirs in zip(
        jax.tree.leaves(state.params), jax.tree.leaves(states[2].params), strict=True
    ):
        np.testing.assert_array_equal(mine, theirs)
    assert metrics["discriminator/update_norm/sum"] == 0
    assert rows[START]["discriminator/update_norm/sum"] > 0


def test_before_its_step_the_discriminator_neither_learns_nor_counts(stepped):
    _, states, rows = stepped
    before, after, _ = states
    for a, b in zip(jax.tree.leaves(before.extra), jax.tree.leaves(after.extra), strict=True):
        np.testing.assert_array_equal(a, b)
    assert after.extra.step == 0 and states[2].extra.step == 1

    def loss(params, noise):
        decoded, kl = reconstruct(params, noise)
        return nll_of(decoded) + kl

    value, grads = jax.jit(jax.value_and_grad(loss))(before.params, posterior_noise(0))
    assert_trees_close(change(before.params, after.params), grads, 1e-4)
    assert rows[0]["loss"] == pytest.approx(float(value), rel=1e-5)
    means = mean_metrics([jax.device_get(rows[0])])
    assert not [name for name in means if name.startswith(("adversarial", "discriminator"))]


def test_the_perceptual_gradient_reaches_the_autoencoder(stepped):
    """diffusers' trainer computes this term without gradients; ours moves the first layer."""
    _, states, _ = stepped

    noise = posterior_noise(0)

    def term(params):
        decoded, _ = reconstruct(params, noise)
        return jnp.mean(blurred_distance(FROZEN, BATCH.image, decoded))

    params, value_and_grad = states[0].params, jax.jit(jax.value_and_grad(term))
    grad = value_and_grad(params)[1]["in"]
    norm = float(jnp.linalg.norm(grad))
    ends = [
        value_and_grad(params | {"in": params["in"] + h * grad / norm})[0] for h in (-1e-3, 1e-3)
    ]
    assert (ends[1] - ends[0]) / 2e-3 == pytest.approx(norm, rel=1e-2)
    assert norm > 1e-3


def test_metrics_of_the_discriminator_are_logged_from_its_first_step_on(stepped):
    _, _, rows = stepped
    means = mean_metrics([jax.device_get(row) for row in rows])
    names = {"adversarial", "adversarial_weight"} | {
        f"discriminator/{name}"
        for name in (
            *("loss", "real", "fake"),
            *("grad_norm", "update_norm", "param_norm", "learning_rate"),
        )
    }
    assert names <= means.keys()
    assert means["adversarial"] == pytest.approx(-means["discriminator/fake"], rel=1e-5)
    assert means["discriminator/learning_rate"] == 1.0  # its own first step, not the run's second
    assert means["grad_norm"] > 0 and means["lpips"] > 0


def test_a_step_without_finite_numbers_changes_neither_network(stepped):
    step, states, _ = stepped
    broken = BATCH.replace(image=BATCH.image.at[1, 3, 3, 0].set(jnp.nan))
    after, metrics = step(started(states[0]), FROZEN, broken, KEY)
    trees = [(s.params, s.opt_state, s.extra.params, s.extra.opt_state) for s in (states[0], after)]
    for a, b in zip(*map(jax.tree.leaves, trees), strict=True):
        np.testing.assert_array_equal(a, b)
    assert metrics["skipped"] == 1 and after.step == START + 1
    assert after.extra.step == 1 and after.extra.skipped == 1


def test_losses_by_numbers():
    real, fake = jnp.array([[2.0, -0.5]]), jnp.array([[-3.0, 0.5]])
    assert discriminator_loss(real, fake, "hinge") == pytest.approx(0.5 * (1.5 / 2 + 1.5 / 2))
    assert generator_loss(fake, "hinge") == pytest.approx(1.25)
    soft = np.logaddexp(0, np.array([-2.0, 0.5, -3.0, 0.5]))
    expected = 0.5 * (soft[:2].mean() + soft[2:].mean())
    assert discriminator_loss(real, fake, "non_saturating") == pytest.approx(expected, rel=1e-6)
    expected = np.logaddexp(0, np.array([3.0, -0.5])).mean()
    assert generator_loss(fake, "non_saturating") == pytest.approx(expected, rel=1e-6)


def test_the_adaptive_weight_is_bounded():
    last = {"kernel": jnp.ones((2, 2))}
    features, d_nll = jnp.ones((3, 2)), jnp.full((3, 2), 5.0)

    def weight(d_g):
        return adaptive_weight(lambda p, h: h @ p["kernel"], last, features, d_nll, d_g)

    assert weight(jnp.zeros((3, 2))) == 1e4
    assert weight(d_nll) == pytest.approx(1, rel=1e-4)


def test_weights_and_networks_must_agree():
    args = toy_coder(), toy_params, optax.sgd(1.0)
    with pytest.raises(ValueError, match=r"perceptual_weight is 0\.5, but there is no network"):
        make_autoencoder(*args, LOSS, adversary=ADVERSARY)
    with pytest.raises(ValueError, match="adversarial_weight is 0, but there is a network"):
        make_autoencoder(*args, AutoencoderConfig(), adversary=ADVERSARY)


def test_norms_and_published_sizes():
    """Group norm keeps pictures apart, batch norm mixes them."""
    rng = np.random.default_rng(0)
    for norm, is_apart in (("group", True), ("batch", False)):
        network = PatchDiscriminator(DiscriminatorConfig(width=4, num_layers=1, norm=norm))
        shapes = jax.eval_shape(network.init, jax.random.key(0), BATCH.image)
        params = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), shapes)
        difference = jax.jit(lambda p, x, f=network.apply: f(p, x)[1:2] - f(p, x[1:2]))
        assert (np.abs(difference(params, BATCH.image)).max() < 1e-5) == is_apart, norm

    published = PatchDiscriminator(DiscriminatorConfig(norm="batch"))
    picture = jax.ShapeDtypeStruct((1, 256, 256, 3), jnp.float32)
    shapes = jax.eval_shape(published.init, jax.random.key(0), picture)
    # taming's NLayerDiscriminator(ndf=64, n_layers=3): five kernels, two biases, three norms.
    kernels = 16 * (3 * 64 + 64 * 128 + 128 * 256 + 256 * 512 + 512)
    assert sum(x.size for x in jax.tree.leaves(shapes)) == kernels + 65 + 2 * (128 + 256 + 512)
    assert jax.eval_shape(published.apply, shapes, picture).shape == (1, 30, 30)


def test_pictures_without_a_patch_are_refused():
    network = PatchDiscriminator(DiscriminatorConfig(width=4, num_layers=4))
    with pytest.raises(ValueError, match=r"16×16 pixels leave no patch .*num_layers"):
        jax.eval_shape(network.init, jax.random.key(0), BATCH.image)
    for changed in ({"width": 0}, {"num_layers": 0}, {"norm": "layer"}):
        with pytest.raises(ValueError, match=f"discriminator.{next(iter(changed))} is"):
            dataclasses.replace(DiscriminatorConfig(), **changed)


@pytest.mark.slow
def test_micro_batches_give_the_gradient_of_the_discriminator_of_the_whole(stepped):
    """L_D is a mean over samples; the adaptive weight is each micro-batch's own."""
    _, states, rows = stepped
    halves = make_objective(accumulate_steps=2)
    after, metrics = jax.jit(halves.step)(started(states[0]), FROZEN, BATCH, KEY)
    whole = change(states[0].extra.params, states[2].extra.params)
    assert_trees_close(change(states[0].extra.params, after.extra.params), whole, 1e-4)
    assert rows[START]["loss"] == pytest.approx(float(metrics["loss"]), rel=1e-5)
