"""One whole edit against diffusers' pipeline, from a clone alone."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import kontext_jax
from convert_weights import open_foreign_bundle
from kontext_jax.numerics import DIFFUSERS
from kontext_jax.pictures import latents
from kontext_jax.sampling.denoising import Denoising
from kontext_jax.sampling.stages import Stages

GOLDENS = Path(__file__).parents[1] / "goldens"
TOKENIZERS = Path(kontext_jax.__file__).parent / "assets" / "tokenizers"


@pytest.fixture
def diffusers_folder(tmp_path):
    """The goldens' model, with the tokenizers that ship with the package."""
    shutil.copytree(GOLDENS / "model", tmp_path / "model")
    for kind, name in (("clip", "tokenizer"), ("t5", "tokenizer_2")):
        shutil.copytree(TOKENIZERS / kind, tmp_path / "model" / name)
    return tmp_path / "model"


def test_an_edit_equals_diffusers(diffusers_folder):
    g = load_file(GOLDENS / "networks.safetensors")
    asked = json.loads((GOLDENS / "edit.json").read_text())
    bundle = open_foreign_bundle(diffusers_folder)
    preset = dataclasses.replace(bundle.preset, max_text_tokens=asked["max_text_tokens"])
    stages = Stages(dataclasses.replace(bundle, preset=preset), dtype="float32")

    text = stages.encode_text(asked["prompt"])
    reference = stages.encode_picture(g["edit.reference"], DIFFUSERS)
    given = Denoising(
        jnp.asarray(np.moveaxis(g["edit.noise"], 1, -1)),
        text,
        asked["num_steps"],
        guidance=np.array([asked["guidance"]], np.float32),
        references=[reference],
        numerics=DIFFUSERS,
    )
    final = stages.denoise(given)
    decoded = stages.decode(final, DIFFUSERS)

    np.testing.assert_allclose(latents.pack(final), g["edit.final_tokens"], rtol=0, atol=1e-3)
    image = np.clip(decoded / 2 + 0.5, 0, 1)
    np.testing.assert_allclose(image, g["edit.image"], rtol=0, atol=2e-4)
    ours = latents.model_to_pixels(decoded, DIFFUSERS.uint8_rule).astype(np.int16)
    assert np.abs(ours - np.round(g["edit.image"] * 255)).max() <= 1
