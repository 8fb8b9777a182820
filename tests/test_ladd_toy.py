"""Adversarial distillation in a plane: one and four steps against the teacher's own.

The objective is the real one; network and data are those of `toy2d`. Three seeds, each with its own
teacher, since conclusions from one were reversed by others.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy2d

from kontext_jax.models.layers import modulated_norm
from kontext_jax.objectives.adversarial import Adversary
from kontext_jax.objectives.ladd import LADDConfig, make_ladd
from kontext_jax.sampler import guided_velocity_fn, renoise_sample, seed_words

GUIDANCE = 3.0
HEAD_WIDTH = 64
POINTS = 1500
POOL = 8192


def teacher_velocity(params, x_t, t, batch):
    """With classifier-free guidance, as examples are made."""

    def velocity(batch):
        return lambda x, t, _: toy2d.predict(params, None, x, t, batch, None)

    none = batch.replace(vec=jnp.zeros_like(batch.vec))
    return guided_velocity_fn(velocity(batch), velocity(none), GUIDANCE)(x_t, t, None)


def student_velocity(params, x_t, t, batch):
    return toy2d.predict(params, None, x_t, t, batch, None)


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
        velocity = functools.partial(teacher_velocity, teacher)
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


@functools.partial(jax.jit, static_argnums=(0, 3, 4))
def samples(velocity, params, key, num_steps, sampler=toy2d.euler_sample):
    """Points of every seed, [S, POINTS, 2]."""
    classes = jnp.arange(POINTS) % toy2d.CLASSES
    times = jnp.linspace(1, 0, num_steps + 1)

    def make(params, key):
        return toy2d.sample(functools.partial(velocity, params), key, classes, times, sampler)

    return jax.vmap(make)(params, key)


energies = jax.jit(jax.vmap(toy2d.energy_distance))


def mode_shares(points):
    """Of the rarer of a class's modes, in the worst class, for each seed."""
    classes = jnp.arange(POINTS) % toy2d.CLASSES
    return np.array([toy2d.min_mode_share(p, classes, neighbours=True) for p in points])


def more(keys, number):
    return jax.vmap(jax.random.fold_in, (0, None))(keys, number)


@pytest.fixture(scope="module")
def teachers():
    """Of three seeds; and what 64 guided steps give, which few steps are measured against."""
    keys = jax.random.split(jax.random.key(0), 3)
    draw = functools.partial(toy2d.real_batch, neighbours=True)
    teacher = toy2d.train_teacher(keys, 2000, draw)
    pool = make_examples(teacher, keys)
    return keys, teacher, pool, samples(teacher_velocity, teacher, more(keys, 5), 64)


@pytest.mark.slow
def test_few_steps_of_the_student_beat_those_of_its_teacher(teachers):
    """One step: a hundredth of the teacher's distance; four with noise: half; both modes stay."""
    keys, teacher, pool, reference = teachers
    student = distil(teacher, keys, pool, 3000)

    def distance(velocity, params, num_steps, sampler=toy2d.euler_sample):
        points = samples(velocity, params, more(keys, 6), num_steps, sampler)
        return np.asarray(energies(points, reference)), mode_shares(points)

    one, _ = distance(student_velocity, student, 1)
    four, shares = distance(student_velocity, student, 4, renoise)
    assert (one <= 0.01 * distance(teacher_velocity, teacher, 1)[0]).all(), one
    assert (four <= 0.5 * distance(teacher_velocity, teacher, 4)[0]).all(), four
    assert (shares >= 0.6 * mode_shares(reference)).all(), shares


@pytest.mark.slow
def test_zeros_for_real_examples_collapse_the_student(teachers):
    """A negative control: the same training, but the discriminator takes zeros for real."""
    keys, teacher, (points, classes), reference = teachers
    student = distil(teacher, keys, (jnp.zeros_like(points), classes), 1000)
    made = samples(student_velocity, student, more(keys, 6), 4, renoise)
    assert jnp.std(reference, axis=(1, 2)).min() > 1
    assert jnp.std(made, axis=(1, 2)).max() < 0.2
