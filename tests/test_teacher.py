"""A frozen transformer as a teacher, and the input for guidance that its student gets."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_flow_matching import make_batch

from kontext_jax.checkpoint import Component, ModelBundle
from kontext_jax.conditioning import of_batch
from kontext_jax.models.mmdit import MMDiT, init_params, make_velocity_fn
from kontext_jax.models.presets import PRESETS, MMDiTConfig
from kontext_jax.teacher import Teacher, with_guidance_input
from kontext_jax.tensor_files import flatten

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
    params = init_params(MMDiT(config, zero_init=False), jax.random.key(0))

    def load(dtype=None, device=None, edits=None):
        del edits
        put = lambda x: jax.device_put(jnp.asarray(x, dtype or x.dtype), device)  # noqa: E731
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
    expected = teacher_of(plain).velocity(plain.load(), x_t, t, batch)
    assert float(jnp.std(expected)) > 0.1
    guided = with_guidance_input(plain)
    assert guided.config == GUIDED
    model = MMDiT(GUIDED, attention_backend="reference")
    cond = of_batch(batch, jnp.array([1, 1.7, 2.5, 3.5, 5, 30.0]))
    velocity = make_velocity_fn(model, guided.load(), cond)(x_t, t, None)
    np.testing.assert_array_equal(velocity, expected)


def test_an_added_input_can_be_learnt_and_keeps_dtype_and_place(plain):
    params = with_guidance_input(plain).load(dtype=jnp.bfloat16, device=jax.devices()[0])
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype(jnp.bfloat16)}
    added = params["guidance_in"]
    assert float(jnp.std(added["in_layer"]["kernel"].astype(jnp.float32))) > 0.01
    assert not any(jnp.any(x) for x in jax.tree.leaves(added["out_layer"]))
    shapes = dict(flatten(jax.eval_shape(lambda: init_params(MMDiT(GUIDED), jax.random.key(0)))))
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
    at_one = teacher.velocity(params, batch.x0, t, batch)
    at_three = teacher.velocity(params, batch.x0, t, batch, guidance=3.0)
    assert at_one.dtype == jnp.bfloat16 and not jnp.array_equal(at_one, at_three)
    assert teacher_of(plain).condition(batch, 3.0).guidance is None


def test_a_bundle_without_a_transformer_teaches_nothing():
    bundle = ModelBundle(PRESETS["tiny-kontext"], {}, {}, "runs/vae", "0")
    with pytest.raises(ValueError, match="runs/vae has no transformer"):
        Teacher(bundle, jnp.float32, "reference")
