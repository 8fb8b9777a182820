"""A frozen transformer as a teacher, and the input for guidance that its student gets."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from token_batches import make_batch

from kontext_jax.models.conditioning import of_batch
from kontext_jax.models.mmdit import MMDiT, make_velocity_fn
from kontext_jax.models.presets import PRESETS, MMDiTConfig
from kontext_jax.training.teacher import Teacher
from kontext_jax.trees import flatten, unflatten
from kontext_jax.weights.bundle import Component, ModelBundle, parameter_shapes
from kontext_jax.weights.grown import with_guidance_input
from kontext_jax.weights.untrained import untrained_leaf

CONFIG = MMDiTConfig(
    in_channels=4,
    out_channels=4,
    vec_in_dim=5,
    context_in_dim=6,
    hidden_size=32,
    num_heads=2,
    depth=1,
    depth_single_blocks=1,
    axes_dim=(4, 6, 6),
    guidance_embed=False,
)
GUIDED = dataclasses.replace(CONFIG, guidance_embed=True)


def component(config) -> Component:
    """Fixed parameters of a network that answers its inputs."""
    shapes = dict(flatten(parameter_shapes("mmdit", config)))
    params = unflatten({path: untrained_leaf("mmdit", path, shapes) for path in shapes})

    def load(dtype=None, device=None, edits=None):
        del edits
        put = lambda x: jax.device_put(x.astype(dtype or x.dtype), device)  # noqa: E731
        return jax.tree.map(put, params)

    return Component(config, load)


def teacher_of(component: Component, dtype=jnp.float32) -> Teacher:
    bundle = ModelBundle(PRESETS["tiny-kontext"], {"mmdit": component}, {}, "a run", "0")
    return Teacher(bundle, dtype, "reference")


@pytest.fixture(scope="module")
def plain() -> Component:
    return component(CONFIG)


def test_an_added_input_for_guidance_changes_nothing_at_any_guidance(plain):
    batch = make_batch()
    x_t, t = batch.x0, jnp.linspace(0.1, 1, 6)
    teacher = teacher_of(plain)
    expected = jax.jit(lambda p: teacher.velocity(p, x_t, t, batch))(plain.load())
    assert float(jnp.std(expected)) > 0.1
    guided = with_guidance_input(plain)
    assert guided.config == GUIDED
    model = MMDiT(GUIDED, attention_backend="reference")
    cond = of_batch(batch, jnp.array([1, 1.7, 2.5, 3.5, 5, 30.0]))
    velocity = jax.jit(lambda p: make_velocity_fn(model, p, cond)(x_t, t, None))(guided.load())
    np.testing.assert_array_equal(velocity, expected)


def test_an_added_input_can_be_learnt_and_keeps_dtype_and_place(plain):
    params = with_guidance_input(plain).load(dtype=jnp.bfloat16, device=jax.devices()[0])
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype(jnp.bfloat16)}
    added = params["guidance_in"]
    assert float(jnp.std(added["in_layer"]["kernel"].astype(jnp.float32))) > 0.01
    assert not any(jnp.any(x) for x in jax.tree.leaves(added["out_layer"]))
    shapes = dict(flatten(parameter_shapes("mmdit", GUIDED)))
    assert {p: x.shape for p, x in flatten(params)} == {p: x.shape for p, x in shapes.items()}
    with pytest.raises(ValueError, match="takes guidance already"):
        with_guidance_input(with_guidance_input(plain))


def test_a_teacher_is_kept_in_the_compute_dtype_and_told_one_guidance(plain):
    batch = make_batch()
    t = jnp.full(6, 0.5)
    guided = component(GUIDED)
    teacher = teacher_of(guided, jnp.bfloat16)
    params = teacher.load(jax.devices()[0])
    shape_of = lambda x: (x.shape, x.dtype)  # noqa: E731
    assert jax.tree.map(shape_of, params) == jax.tree.map(shape_of, teacher.shapes())
    np.testing.assert_array_equal(teacher.condition(batch).guidance, np.ones(6))
    np.testing.assert_array_equal(teacher.condition(batch, 3.0).guidance, np.full(6, 3.0))
    assert teacher_of(plain).condition(batch, 3.0).guidance is None
    velocity = jax.eval_shape(lambda p: teacher.velocity(p, batch.x0, t, batch), params)
    assert shape_of(velocity) == (batch.x0.shape, jnp.bfloat16)


def test_a_bundle_without_a_transformer_teaches_nothing():
    bundle = ModelBundle(PRESETS["tiny-kontext"], {}, {}, "runs/vae", "0")
    with pytest.raises(ValueError, match="runs/vae has no transformer"):
        Teacher(bundle, jnp.float32, "reference")
