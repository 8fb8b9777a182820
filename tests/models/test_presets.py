"""Published sizes."""

import dataclasses

import pytest

from kontext_jax.models.presets import PRESETS, MMDiTConfig
from kontext_jax.pictures import latents


def test_published_transformers_are_the_same_but_for_guidance():
    full = PRESETS["kontext-dev"].mmdit
    assert full == PRESETS["flux-dev"].mmdit == PRESETS["krea-dev"].mmdit
    assert PRESETS["flux-schnell"].mmdit == dataclasses.replace(full, guidance_embed=False)
    assert (full.head_dim, full.mlp_dim) == (128, 12288)


def test_names_are_keys():
    assert all(name == preset.name for name, preset in PRESETS.items())


def test_kontext_and_the_small_models_take_references():
    assert {n for n, p in PRESETS.items() if p.takes_references} == {
        *("kontext-dev", "kontext-base", "tiny", "tiny-scenes"),
        *("kontext-dev-policy", "tiny-kontext", "tiny-kontext-guided", "tiny-kontext-policy"),
    }


def test_networks_of_a_preset_fit_together():
    for preset in PRESETS.values():
        assert preset.mmdit.in_channels == 4 * preset.vae.z_channels
        velocities = 10 if preset.name.endswith("-policy") else 1
        assert preset.num_velocities == velocities
        assert preset.mmdit.out_channels == velocities * preset.mmdit.in_channels
        assert preset.mmdit.context_in_dim == preset.t5.d_model
        assert preset.mmdit.vec_in_dim == preset.clip.hidden_size
        assert preset.clip.max_position_embeddings == 77
        assert preset.vae.downsampling * latents.PATCH == latents.PIXELS_PER_TOKEN


def test_widths_that_do_not_fit_the_heads_are_refused():
    with pytest.raises(ValueError, match="hidden_size 100 is not divisible by num_heads 3"):
        MMDiTConfig(hidden_size=100, num_heads=3)
    with pytest.raises(ValueError, match="must be even and sum to the head's 32 channels"):
        MMDiTConfig(hidden_size=96, num_heads=3, axes_dim=(8, 12, 14))
    with pytest.raises(ValueError, match="must be even"):
        MMDiTConfig(hidden_size=96, num_heads=3, axes_dim=(8, 11, 13))
