"""Policies distilled in a plane: few steps that end where many guided steps of the teacher do.

The objective is the real one; network and data are those of `toy2d`. Three seeds, each with its own
teacher. `pytest -m slow -s` prints the figures of docs/distillation.md.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy2d

from kontext_jax.flow.samplers import policy_sample
from kontext_jax.objectives.policy_distillation import (
    PolicyDistillationConfig,
    make_policy_distillation,
)
from kontext_jax.objectives.state import make_train_state

GUIDANCE = 3.0
VELOCITIES = 8

guided = functools.partial(toy2d.guided_velocity, guidance=GUIDANCE)


def with_velocities(params):
    """`teacher.with_velocities`, for the MLP."""
    last = jax.tree.map(
        lambda x: jnp.tile(x, (1,) * (x.ndim - 1) + (VELOCITIES,)), params["final_layer"]
    )
    return params | {"final_layer": last}


def distil(teacher, key, num_steps):
    """The students of all seeds, averages of their parameters."""
    optimizer = toy2d.optimizer_for(num_steps, 2e-3)
    objective = make_policy_distillation(
        toy2d.predict,
        lambda frozen, *given: guided(frozen["teacher"], *given),
        toy2d.init_params,
        optimizer,
        PolicyDistillationConfig(guidance=GUIDANCE),
        takes_guidance=False,
        ema_decay=0.99,
    )
    start = functools.partial(make_train_state, optimizer=optimizer, with_ema=True)
    state = jax.vmap(lambda params: start(with_velocities(params)))(teacher)
    draw = functools.partial(toy2d.real_batch, neighbours=True)
    return toy2d.train(objective, state, {"teacher": teacher}, key, num_steps, draw)[0].ema_params


@pytest.mark.slow
def test_few_steps_along_policies_end_where_the_teacher_does():
    """Four steps: a tenth of the energy distance of the teacher's four, and both modes."""
    keys = jax.random.split(jax.random.key(0), 3)
    draw = functools.partial(toy2d.real_batch, neighbours=True)
    teacher = toy2d.train_teacher(keys, 2000, draw)
    policies = distil(teacher, keys, 3000)
    reference = toy2d.samples(guided, teacher, keys, 128)
    other = toy2d.samples(guided, teacher, jax.vmap(jax.random.fold_in, (0, None))(keys, 1), 128)
    energy = jax.jit(jax.vmap(toy2d.energy_distance))
    shares = functools.partial(toy2d.min_mode_share, classes=toy2d.POINT_CLASSES, neighbours=True)
    print("many steps", energy(reference, other), [shares(p) for p in reference])
    theirs = toy2d.samples(guided, teacher, keys, 4)
    ours = toy2d.samples(toy2d.velocity, policies, keys, 4, policy_sample)
    apart = [np.sqrt(np.mean((p - reference) ** 2, (1, 2))) for p in (theirs, ours)]
    far = [np.asarray(energy(p, other)) for p in (theirs, ours)]
    rarer = np.array([[shares(p) for p in points] for points in (reference, ours)])
    print("four steps", apart, far, rarer)
    assert (apart[1] <= 0.4 * apart[0]).all()
    assert (far[1] <= 0.1 * far[0]).all()
    assert (rarer[1] >= 0.9 * rarer[0]).all()
