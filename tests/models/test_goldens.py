"""Each network against PyTorch, from a clone alone: goldens of small random models.

`tools/make_goldens.py` says how they are made. Weights go through `convert_weights`, in both
namings where there are two, and everything is computed in float32.
"""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from convert_weights import read_component
from kontext_jax.models.clip import CLIPText
from kontext_jax.models.mmdit import MMDiT
from kontext_jax.models.t5 import T5Encoder
from kontext_jax.models.vae import VAE
from kontext_jax.ops.rope import rope_table

GOLDENS = Path(__file__).parents[1] / "goldens"
MODEL = GOLDENS / "model"
NAMINGS = pytest.mark.parametrize("naming", ["diffusers", "bfl"])


@pytest.fixture(autouse=True)
def exact_matrix_products():
    with jax.default_matmul_precision("highest"):
        yield


@pytest.fixture(scope="module")
def goldens():
    return {k: jnp.asarray(v) for k, v in load_file(GOLDENS / "networks.safetensors").items()}


def read(folder: str, kind: str, naming: str = "diffusers"):
    """Config and float32 parameters; BFL's lone files do not say how the heads are split."""
    config, params = read_component(MODEL / folder, kind, dtype="float32")
    if naming == "bfl":
        file = {"mmdit": "flux1-tiny", "vae": "ae"}[kind]
        _, params = read_component(
            GOLDENS / "bfl" / f"{file}.safetensors", kind, config, dtype="float32"
        )
    return config, {"params": jax.tree.map(jnp.asarray, params)}


@functools.cache
def compiled(network: type, config, method: str | None = None):
    """A network's method in float32; the namings of one config share the program."""
    return jax.jit(functools.partial(network(config, dtype=jnp.float32).apply, method=method))


def assert_close(ours, expected, atol: float):
    np.testing.assert_allclose(np.asarray(ours), expected, rtol=0, atol=atol)


@NAMINGS
def test_transformer(goldens, naming):
    g = {k.removeprefix("mmdit."): v for k, v in goldens.items() if k.startswith("mmdit.")}
    config, variables = read("transformer", "mmdit", naming)
    ids = np.concatenate([g["txt_ids"], g["img_ids"]])
    velocity = compiled(MMDiT, config)(
        variables,
        *(g[name] for name in ("img", "txt", "vec", "t", "guidance")),
        rope_table(ids, config.axes_dim, config.theta),
    )
    # The sinusoids of 1000·t magnify float32's last bit; the second row has a small t.
    assert_close(velocity[0], g["velocity"][0], atol=3e-4)
    assert_close(velocity[1], g["velocity"][1], atol=3e-5)


@NAMINGS
def test_autoencoder(goldens, naming):
    config, variables = read("vae", "vae", naming)
    image, latents = (jnp.moveaxis(goldens[f"vae.{n}"], 1, -1) for n in ("image", "latents"))
    outputs = (
        *compiled(VAE, config, "moments")(variables, image),
        compiled(VAE, config, "encode")(variables, image),
        compiled(VAE, config, "decode")(variables, latents),
    )
    for name, value in zip(("mean", "logvar", "latents", "decoded"), outputs, strict=True):
        assert_close(jnp.moveaxis(value, -1, 1), goldens[f"vae.{name}"], atol=2e-5)


def test_t5(goldens):
    config, variables = read("text_encoder_2", "t5")
    hidden = jax.jit(T5Encoder(config, dtype=jnp.float32).apply)(variables, goldens["t5.token_ids"])
    assert_close(hidden, goldens["t5.hidden"], atol=1e-4)


def test_clip(goldens):
    config, variables = read("text_encoder", "clip")
    hidden, pooled = compiled(CLIPText, config)(variables, goldens["clip.token_ids"])
    assert_close(hidden, goldens["clip.hidden"], atol=3e-5)
    assert_close(pooled, goldens["clip.pooled"], atol=3e-5)
