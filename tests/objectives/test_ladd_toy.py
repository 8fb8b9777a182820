"""Adversarial distillation in a plane: one and four steps against the teacher's own.

The objective is the real one; network and data are those of `toy2d`. Three seeds, each with its own
teacher, since conclusions from one were reversed by others. `pytest -m slow -s` prints the figures
of docs/distillation.md.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy2d

from kontext_jax.flow.samplers import renoise_sample, seed_words
from kontext_jax.models.layers import modulated_norm
from kontext_jax.objectives.adversarial import Adversary
from kontext_jax.objectives.ladd import LADDConfig, make_ladd

HEAD_WIDTH = 64
POOL = 8192

guided = functools.partial(toy2d.guided_velocity, guidance=3.0)


def features(frozen, x_t, t, batch):
    """Normalised hidden states of the teacher, as `models.features` has them."""
    zero = jnp.zeros((len(x_t), toy2d.WIDTH))
    states = toy2d.hidden_states(frozen["teacher"], x_t, t, batch)
    return [modulated_norm(x, zero, zero) for x in states]


def init_heads(key):
    def dense(key, size_in, size_out):
        kernel = jax.random.normal(key, (size_in, size_out)) / size_in**0.5
        return {"kernel": kernel, "bias": jnp.zeros(size_out)}

    sizes = (toy2d.WIDTH + toy2d.EMBED + toy2d.CLASSES, HEAD_WIDTH, HEAD_WIDTH, 1)
    keys = jax.random.split(key, (toy2d.DEPTH, len(sizes) - 1))
    return [
        [dense(*layer) for layer in zip(head, sizes[:-1], sizes[1:], strict=True)] for head in keys
    ]


def head_logits(params, features, t, batch):
    told = jnp.concatenate([toy2d.timestep_embedding(100 * t, toy2d.EMBED), batch.vec], axis=-1)
    logits = []
    for head, x in zip(params, features, strict=True):
        x = jnp.concatenate([x, told[:, None]], axis=-1)
        for layer in head[:-1]:
            x = jax.nn.leaky_relu(x @ layer["kernel"] + layer["bias"], 0.2)
        logits.append(x @ head[-1]["kernel"] + head[-1]["bias"])
    return logits


def objective():
    adam = functools.partial(optax.adam, b1=0.0, b2=0.99)
    return make_ladd(
        toy2d.predict,
        features,
        Adversary(head_logits, init_heads, adam(1e-3)),
        toy2d.init_params,
        adam(2e-4),
        LADDConfig(probabilities=(0.4, 0.2, 0.2, 0.2), renoise_mean=0.0, r1_weight=1e-2),
        takes_guidance=False,
        ema_decay=0.99,
    )


@jax.jit
def make_examples(teacher, key):
    """What the teacher makes in 64 steps: the "real" examples, points and classes of each seed."""
    classes = jnp.arange(POOL) % toy2d.CLASSES
    times = jnp.linspace(1, 0, 65)

    def make(teacher, key):
        velocity = functools.partial(guided, teacher)
        return toy2d.sample(velocity, key, classes, times), classes

    return jax.vmap(make)(teacher, key)


def distil(teacher, key, pool, num_steps):
    """The students of all seeds, averages of their parameters."""
    ladd = objective()
    state = jax.vmap(ladd.init)(key).replace(params=teacher, ema_params=teacher)
    state, _ = toy2d.train(
        ladd, state, {"teacher": teacher}, key, num_steps, toy2d.pooled_batch, pool
    )
    return state.ema_params


def renoise(velocity_fn, x, timesteps):
    return renoise_sample(velocity_fn, x, timesteps, words=seed_words(range(len(x))))


energies = jax.jit(jax.vmap(toy2d.energy_distance))


def mode_shares(points):
    """Of the rarer of a class's modes, in the worst class, for each seed."""
    share = functools.partial(toy2d.min_mode_share, classes=toy2d.POINT_CLASSES, neighbours=True)
    return np.array([share(p) for p in points])


def more(keys, number):
    return jax.vmap(jax.random.fold_in, (0, None))(keys, number)


@pytest.fixture(scope="module")
def teachers():
    """Of three seeds; and what 64 guided steps give, which few steps are measured against."""
    keys = jax.random.split(jax.random.key(0), 3)
    draw = functools.partial(toy2d.real_batch, neighbours=True)
    teacher = toy2d.train_teacher(keys, 2000, draw)
    pool = make_examples(teacher, keys)
    return keys, teacher, pool, toy2d.samples(guided, teacher, more(keys, 5), 64)


@pytest.mark.slow
def test_few_steps_of_the_student_beat_those_of_its_teacher(teachers):
    """One step: a hundredth of the teacher's distance; four with noise: half; both modes stay."""
    keys, teacher, pool, reference = teachers
    student = distil(teacher, keys, pool, 3000)

    ways = {
        "teacher": (guided, teacher, toy2d.euler_sample),
        "euler": (toy2d.velocity, student, toy2d.euler_sample),
        "renoise": (toy2d.velocity, student, renoise),
    }
    far, rarer = {}, {}
    for steps in (1, 2, 4):
        for name, (velocity, params, sampler) in ways.items():
            points = toy2d.samples(velocity, params, more(keys, 6), steps, sampler)
            far[name, steps] = np.asarray(energies(points, reference))
            rarer[name, steps] = mode_shares(points)
            print(name, steps, far[name, steps].round(4), rarer[name, steps].round(2))
    assert (far["euler", 1] <= 0.01 * far["teacher", 1]).all()
    assert (far["renoise", 4] <= 0.5 * far["teacher", 4]).all()
    assert (rarer["renoise", 4] >= 0.6 * mode_shares(reference)).all()


@pytest.mark.slow
def test_zeros_for_real_examples_collapse_the_student(teachers):
    """A negative control: the same training, but the discriminator takes zeros for real."""
    keys, teacher, (points, classes), reference = teachers
    student = distil(teacher, keys, (jnp.zeros_like(points), classes), 1000)
    made = toy2d.samples(toy2d.velocity, student, more(keys, 6), 4, renoise)
    assert jnp.std(reference, axis=(1, 2)).min() > 1
    assert jnp.std(made, axis=(1, 2)).max() < 0.2
