"""How each reference rounds, bit for bit: goldens made by PyTorch and diffusers.

`tools/make_goldens.py` says how they are made. What a reference does in bfloat16 is compared
exactly: a rounding that is off by one bit embeds another timestep.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from kontext_jax.flow import path as flow
from kontext_jax.flow.samplers import euler_sample
from kontext_jax.models.layers import scale_time
from kontext_jax.numerics import BFL, DIFFUSERS
from kontext_jax.ops.rope import rope_table
from kontext_jax.pictures import latents

RULES = pytest.mark.parametrize("rules", [BFL, DIFFUSERS], ids=lambda rules: rules.name)
SCHEDULES = pytest.mark.parametrize(
    ("num_steps", "num_tokens"), [(4, 24), (28, 4096), (30, 4056)], ids=lambda n: str(n)
)


@pytest.fixture(scope="module")
def goldens():
    return load_file(Path(__file__).parents[1] / "goldens" / "numerics.safetensors")


@RULES
@SCHEDULES
def test_schedule(goldens, rules, num_steps, num_tokens):
    expected = goldens[f"schedule.{num_steps}_steps_{num_tokens}_tokens.{rules.name}"]
    ours = flow.timestep_schedule(num_steps, flow.timestep_mu(num_tokens))
    np.testing.assert_allclose(ours, expected, rtol=0, atol=3e-7)  # a few float32 ulps at 1
    assert ours[0] == expected[0] == 1 and ours[-1] == expected[-1] == 0


@RULES
@SCHEDULES
def test_embedded_timesteps_in_bfloat16(goldens, rules, num_steps, num_tokens):
    expected = goldens[f"schedule.{num_steps}_steps_{num_tokens}_tokens.{rules.name}_embedded"]
    t = flow.timestep_schedule(num_steps, flow.timestep_mu(num_tokens))[:-1]
    scale = jax.jit(scale_time, static_argnums=(1, 2))
    ours = scale(t, rules.timestep_rounding, jnp.bfloat16)
    np.testing.assert_array_equal(ours, expected.astype(np.float32))


def test_the_two_references_embed_different_timesteps(goldens):
    name = "schedule.28_steps_4096_tokens"
    bfl, diffusers = (
        goldens[f"{name}.{r}_embedded"].astype(np.float32) for r in ("bfl", "diffusers")
    )
    assert np.sum(bfl != diffusers) == 7
    assert np.abs(bfl - diffusers).max() == 4


@RULES
def test_embedded_guidance_in_bfloat16(goldens, rules):
    rounding = "none" if rules.timestep_rounding == "none" else "bfl"
    ours = scale_time(jnp.asarray(goldens["guidance"]), rounding, jnp.bfloat16)
    np.testing.assert_array_equal(ours, goldens["guidance.embedded"].astype(np.float32))


@RULES
def test_euler_updates_in_bfloat16(goldens, rules):
    velocity = jnp.asarray(goldens["euler.velocity"])
    img = jnp.asarray(goldens["euler.img"])
    assert img.dtype == velocity.dtype == jnp.bfloat16
    sample = jax.jit(
        lambda img: euler_sample(
            lambda x_t, t, step_input: velocity,
            img,
            goldens["euler.timesteps"],
            euler_dtype=rules.euler_dtype,
        )
    )
    ours = sample(img)
    np.testing.assert_array_equal(
        np.asarray(ours, np.float32), goldens[f"euler.{rules.name}"].astype(np.float32)
    )


def test_rotary_table_of_diffusers(goldens):
    table = rope_table(goldens["rope.ids"], (4, 6, 6), 10_000, precision=DIFFUSERS.rope_precision)
    np.testing.assert_allclose(table, goldens["rope.float64"], rtol=0, atol=1e-7)


def test_bfloat16_positions_of_diffusers_merge_above_256(goldens):
    assert DIFFUSERS.rope_ids_in_compute_dtype
    table = rope_table(goldens["rope.ids"], (4, 6, 6), 10_000, ids_dtype=ml_dtypes.bfloat16)
    expected = goldens["rope.float64_bf16_ids"]
    np.testing.assert_allclose(table, expected, rtol=0, atol=1e-7)
    assert np.abs(expected - goldens["rope.float64"]).max() > 0.1


def test_rotary_table_of_bfl(goldens):
    table = rope_table(goldens["rope.ids"], (4, 6, 6), 10_000, precision=BFL.rope_precision)
    # One ulp of an angle near 301 is 3e-5: the last bit of a power decides.
    np.testing.assert_allclose(table, goldens["rope.float32"], rtol=0, atol=6e-5)


@RULES
def test_bytes(goldens, rules):
    ours = latents.model_to_pixels(goldens["bytes.image"], rules.uint8_rule)
    np.testing.assert_array_equal(ours, goldens[f"bytes.{rules.name}"])
