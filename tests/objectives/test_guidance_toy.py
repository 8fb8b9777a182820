"""Guidance distilled in a plane: how well, for guidance never drawn too, and how it is lost again.

The objectives are the real ones; network and data are those of `toy2d`, three seeds at once, each
with its own teacher. `pytest -m slow -s` prints the figures of docs/distillation.md.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy2d

from kontext_jax.flow import path as flow
from kontext_jax.flow.guidance import cfg
from kontext_jax.objectives.flow_matching import FlowMatchingConfig, make_flow_matching
from kontext_jax.objectives.guidance_distillation import (
    GuidanceDistillationConfig,
    make_guidance_distillation,
    teacher_velocities,
)
from kontext_jax.objectives.state import make_train_state
from kontext_jax.training.checkpoints import Checkpoints

SEEDS = 3
POOL = 2048
TEACHER_STEPS, STUDENT_STEPS, SPOILING_STEPS = 1200, 2500, 400
GUIDANCE = (1.0, 1.7, 2.0, 2.5, 3.0, 3.3, 4.0, 5.0)
CLASSES_OF_POOL = jnp.arange(POOL) % toy2d.CLASSES

guided = functools.partial(toy2d.guided_velocity, guidance=3.0)


def distillation(optimizer):
    return make_guidance_distillation(
        toy2d.predict,
        toy2d.teach,
        functools.partial(toy2d.init_params, guided=True),
        optimizer,
        GuidanceDistillationConfig(timestep_mode="const"),
        ema_decay=0.99,
    )


def start(teacher, key, optimizer):
    """The student's state, which is its teacher but for the input for guidance."""
    return make_train_state(toy2d.with_guidance_input(teacher, key), optimizer, with_ema=True)


@functools.cache
def keys():
    return jax.random.split(jax.random.key(0), SEEDS)


@pytest.fixture(scope="module")
def teachers():
    """Parameters of each seed's teacher, and points that it makes with guidance 3."""

    def make(teacher, key):
        times = flow.timestep_schedule(24, None)
        return toy2d.sample(functools.partial(guided, teacher), key, CLASSES_OF_POOL, times)

    params = toy2d.train_teacher(keys(), TEACHER_STEPS)
    points = jax.jit(jax.vmap(make))(params, keys())
    return params, (points, jnp.broadcast_to(CLASSES_OF_POOL, (SEEDS, POOL)))


@pytest.fixture(scope="module")
def students(teachers):
    """Averages of the parameters of each seed's student."""
    params, pool = teachers
    optimizer = toy2d.optimizer_for(STUDENT_STEPS, 5e-3)
    state = jax.vmap(functools.partial(start, optimizer=optimizer))(params, keys())
    frozen = {"teacher": params}
    return toy2d.train(
        *(distillation(optimizer), state, frozen, keys(), STUDENT_STEPS),
        *(toy2d.half_pooled_batch, pool),
    )[0].ema_params


@jax.jit
@functools.partial(jax.vmap, in_axes=(0, 0, 0, 0, None))
def errors(student, teacher, pool, key, guidance):
    """‖v − v_g‖/‖v_g‖ over many points: of the student, and of the conditional velocity."""
    keys = jax.random.split(key, 3)
    batch = toy2d.half_pooled_batch(pool, keys[0], 4096)
    t = jax.random.uniform(keys[1], (4096,), minval=0.01)
    x_t = flow.interpolate(batch.x0, jax.random.normal(keys[2], batch.x0.shape), t)
    v_uncond, v_cond = teacher_velocities(toy2d.teach, {"teacher": teacher}, x_t, t, batch)
    target = cfg(v_uncond, v_cond, x_t, t, guidance)
    told = jnp.full(t.shape, guidance)
    velocity = toy2d.predict(student, None, x_t, t, batch, told)
    norm = jnp.linalg.norm(target)
    return jnp.linalg.norm(velocity - target) / norm, jnp.linalg.norm(v_cond - target) / norm


def error_table(students, teachers):
    """[len(GUIDANCE), SEEDS] of students, and of the conditional velocity."""
    params, pool = teachers
    rows = [errors(students, params, pool, keys(), jnp.float32(g)) for g in GUIDANCE]
    table = np.asarray(rows).swapaxes(0, 1)
    for g, found, no_op in zip(GUIDANCE, *table, strict=True):
        print(f"g {g}: {found.round(4)}, untold {no_op.round(3)}")
    return table


@pytest.mark.slow
def test_every_guidance_is_learnt_those_never_drawn_too(students, teachers):
    found, no_op = error_table(students, teachers)
    assert found.max() <= 0.06
    assert (found[2:] <= 0.12 * no_op[2:]).all()


@pytest.mark.slow
def test_one_pass_a_step_ends_where_two_did(students, teachers):
    def ends(student, teacher, key):
        times = flow.timestep_schedule(16, None)
        classes = CLASSES_OF_POOL[:512]

        def told(x_t, t, batch):
            return toy2d.predict(student, None, x_t, t, batch, jnp.full(t.shape, 3.0))

        both = [
            toy2d.sample(v, key, classes, times) for v in (told, functools.partial(guided, teacher))
        ]
        return jnp.linalg.norm(both[0] - both[1], axis=-1), toy2d.energy_distance(*both)

    distance, energy = map(np.asarray, jax.jit(jax.vmap(ends))(students, teachers[0], keys()))
    root_mean_square = np.sqrt(np.mean(distance**2, axis=1))
    print("median", np.median(distance, axis=1), "root mean square", root_mean_square)
    print("share beyond 0.5", np.mean(distance > 0.5, axis=1), "energy", energy)
    assert np.median(distance, axis=1).max() <= 0.05 * toy2d.RADIUS
    assert root_mean_square.max() <= 0.15 * toy2d.RADIUS
    assert energy.max() <= 0.002


@pytest.mark.slow
def test_flow_matching_told_a_guidance_takes_it_from_the_network(students, teachers):
    """A negative control: what flow matching teaches is unguided, whatever it is told."""
    found = {}
    for told in (3.5, 1.0):
        objective = make_flow_matching(
            toy2d.predict,
            functools.partial(toy2d.init_params, guided=True),
            optax.adam(1e-3),
            FlowMatchingConfig(
                timestep_mode="const", text_dropout=0.0, guidance="fixed", guidance_value=told
            ),
            takes_guidance=True,
        )
        begin = functools.partial(make_train_state, optimizer=optax.adam(1e-3), with_ema=False)
        state = jax.vmap(begin)(students)
        state, _ = toy2d.train(objective, state, {}, keys(), SPOILING_STEPS)
        at = jnp.float32(3.5)
        found[told], no_op = errors(state.params, *teachers, keys(), at)
    before, _ = errors(students, *teachers, keys(), at)
    print("before", before, "told 3.5", found[3.5], "told 1", found[1.0], "conditional", no_op)
    assert (found[3.5] > 0.8 * no_op).all()
    assert (found[1.0] < 0.5 * found[3.5]).all()


def test_a_run_that_stops_goes_on_bit_for_bit(tmp_path):
    """Through checkpoints on disk, of the whole state with its average."""
    optimizer, key = toy2d.optimizer_for(4, 1e-3), jax.random.key(3)
    teacher = toy2d.init_params(jax.random.key(1))
    teacher["final_layer"]["kernel"] = jax.random.normal(key, (toy2d.WIDTH, 2))
    step = jax.jit(distillation(optimizer).step)

    def advance(state, steps):
        for index in steps:
            batch = toy2d.real_batch(None, jax.random.fold_in(key, index), 16)
            state, metrics = step(state, {"teacher": teacher}, batch, key)
        return state, metrics

    begin = start(teacher, key, optimizer)
    whole, expected = advance(begin, range(4))
    half, _ = advance(begin, range(2))
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        checkpoints.save(2, half, {}, "{}", wait=True)
        restored = checkpoints.restore(jax.eval_shape(lambda: half)).state
    joined, metrics = advance(restored, range(2, 4))
    jax.tree.map(np.testing.assert_array_equal, joined, whole)
    assert metrics == expected
    assert float(jnp.abs(whole.params["guidance_in"]["out_layer"]["kernel"]).max()) > 0
