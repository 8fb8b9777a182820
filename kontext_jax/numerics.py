"""Where the published implementations differ in arithmetic, and which rule we follow.

Black Forest Labs' code and diffusers give different pixels from the same weights. `EXACT` is the
default: float32 arithmetic where the references round, with BFL's rules for sizes and defaults.
`BFL` and `DIFFUSERS` reproduce each reference for users who need the same picture. Every rounding
below is to the *compute dtype* of the run, so with float32 the three agree up to the rules for
sizes and bytes.
"""

import dataclasses
from typing import Literal


@dataclasses.dataclass(frozen=True)
class Numerics:
    """One implementation's choices; every field is one row where the references differ."""

    name: str
    default_guidance: float  # guidance input of a Kontext request that names none
    default_num_steps: int
    bucket_ratio_floors_to_16: bool  # floor W and H to 16 before the aspect ratio picks a size
    size_rounding: Literal["refuse", "ceil", "floor"]  # explicit sizes that 16 does not divide
    vae_encode_dtype: Literal["float32", "compute"]
    vae_decode_dtype: Literal["float32", "compute"]
    unscale_dtype: Literal["float32", "compute"]  # of latents / latent_scale + latent_shift
    timestep_rounding: Literal["none", "bfl", "diffusers"]
    euler_dtype: Literal["float32", "compute", "float32_then_compute"]
    rope_precision: Literal["float64", "float32"]
    rope_ids_in_compute_dtype: bool
    uint8_rule: Literal["round", "truncate"]


EXACT = Numerics(
    name="exact",
    default_guidance=2.5,
    default_num_steps=30,
    bucket_ratio_floors_to_16=False,
    size_rounding="refuse",
    vae_encode_dtype="float32",
    vae_decode_dtype="float32",
    unscale_dtype="float32",
    timestep_rounding="none",
    euler_dtype="float32",
    rope_precision="float64",
    rope_ids_in_compute_dtype=False,
    uint8_rule="round",
)
BFL = Numerics(
    name="bfl",
    default_guidance=2.5,
    default_num_steps=30,
    bucket_ratio_floors_to_16=False,
    size_rounding="ceil",
    vae_encode_dtype="float32",
    vae_decode_dtype="compute",
    unscale_dtype="float32",
    timestep_rounding="bfl",
    euler_dtype="compute",
    rope_precision="float32",
    rope_ids_in_compute_dtype=False,
    uint8_rule="truncate",
)
DIFFUSERS = Numerics(
    name="diffusers",
    default_guidance=3.5,
    default_num_steps=28,
    bucket_ratio_floors_to_16=True,
    size_rounding="floor",
    vae_encode_dtype="compute",
    vae_decode_dtype="compute",
    unscale_dtype="compute",
    timestep_rounding="diffusers",
    euler_dtype="float32_then_compute",
    rope_precision="float64",
    rope_ids_in_compute_dtype=True,
    uint8_rule="round",
)
NUMERICS = {n.name: n for n in (EXACT, BFL, DIFFUSERS)}
