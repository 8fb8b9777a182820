"""Drawn adapters for the tests of LoRA."""

import jax
import numpy as np

from kontext_jax.models.lora import LoraConfig, init_lora
from kontext_jax.weights.adapters import Adapter, adapter_from_tree
from kontext_jax.weights.bundle import parameter_shapes


def draw_tree(config, targets=("all-linear",), rank: int = 3, seed: int = 0) -> dict:
    """Adapters of a transformer as training lays them out, a and b both random."""
    shapes = parameter_shapes("mmdit", config)
    lora = LoraConfig(rank, float(rank), tuple(targets))
    tree = jax.eval_shape(lambda key: init_lora(lora, shapes, key), jax.random.key(0))
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: rng.normal(0, 0.2, x.shape).astype(np.float32), tree)


def draw_adapter(
    config, targets=("all-linear",), rank: int = 3, alpha: float = 6.0, seed: int = 0
) -> Adapter:
    return adapter_from_tree(draw_tree(config, targets, rank, seed), alpha, f"drawn-{seed}")
