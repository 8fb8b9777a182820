"""Random weights of a small autoencoder, for its tests."""

import jax
import jax.numpy as jnp
import numpy as np

from kontext_jax.models.vae import VAE


def random_params(vae: VAE):
    """Parameters with biases and norms away from zeros and ones, so that they count."""
    shapes = jax.eval_shape(vae.init, jax.random.key(0), jnp.zeros((1, 16, 16, 3)))["params"]
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        noise = rng.standard_normal(leaf.shape).astype(np.float32)
        if path[-1].key == "kernel":
            return noise / np.sqrt(np.prod(leaf.shape[:-1]), dtype=np.float32)
        return 0.1 * noise + (path[-1].key == "scale")

    return jax.tree.map_with_path(draw, shapes)
