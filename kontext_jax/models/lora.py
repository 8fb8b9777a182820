"""LoRA (Hu et al., arXiv:2106.09685): trained low-rank changes beside frozen weights.

    y = x·W + (alpha / rank) · (x·a)·b        a drawn, b zero: at the start y is the base's

The adapters are a tree of their own that mirrors the parameters, {"a", "b"} where a kernel is:

    kernel [N?, *in, *out]  →  a [N?, *in, rank], b [N?, rank, *out]

`scaled` makes of it the Flax collection "lora", which the linear maps of `layers.py` add beside
their product; no merged copy of the weights is made. In a training step the adapters are the
parameters and the base is frozen.
"""

import dataclasses
import fnmatch
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np

from kontext_jax.models.parameter_axes import kernel_axes
from kontext_jax.terminal import nearest_words
from kontext_jax.trees import flatten, unflatten
from kontext_jax.types import Params, RandomKey

# Names for sets of patterns over our modules.
TARGETS: dict[str, tuple[str, ...]] = {
    # The thirteen patterns of diffusers' script for Kontext; the output of single blocks, which
    # mixes attention and MLP, and the modulation are not among them.
    "kontext": (
        "double_blocks/*_attn/*",
        "double_blocks/*_mlp/*",
        "single_blocks/[qkv]",
        "single_blocks/mlp_in",
    ),
    "attention": ("double_blocks/*_attn/*", "single_blocks/[qkv]"),
    "all-linear": ("*",),
}


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Which adapters to train.

    Attributes:
      rank: rank of every adapter.
      alpha: the change is multiplied by alpha / rank; alpha = rank leaves it as it is.
      targets: names of `TARGETS` or patterns of modules, as `fnmatch` understands them:
        "single_blocks/*", "double_blocks/img_attn/[qv]".
    """

    rank: int = 16
    alpha: float = 16.0
    targets: tuple[str, ...] = ("kontext",)

    def __post_init__(self):
        if self.rank < 1:
            raise ValueError(f"lora.rank is {self.rank}; expected at least 1")
        if not self.alpha > 0:
            raise ValueError(f"lora.alpha is {self.alpha}; expected a positive number")
        if not self.targets:
            raise ValueError(f"lora.targets is empty; choose of {', '.join(TARGETS)}")


def linear_modules(params: Params) -> dict[str, tuple[int, ...]]:
    """Every module with a kernel → the kernel's shape; of parameters or their shapes."""
    suffix = "/kernel"
    return {p.removesuffix(suffix): x.shape for p, x in flatten(params) if p.endswith(suffix)}


def targeted_modules(targets: Iterable[str], params: Params) -> list[str]:
    """The modules that targets mean, in the order of the parameters.

    Raises:
      ValueError: a pattern means none; the message names the nearest modules.
    """
    modules, chosen = linear_modules(params), set()
    for target in targets:
        for pattern in TARGETS.get(target, (target,)):
            found = fnmatch.filter(modules, pattern)
            if not found:
                near = nearest_words(target, [*TARGETS, *modules], count=3, least=0.3)
                raise ValueError(
                    f"lora.targets: {pattern!r} matches no linear module; there are "
                    f"{', '.join(TARGETS)} and, for instance, {', '.join(near or modules)}"
                )
            chosen.update(found)
    return [module for module in modules if module in chosen]


def init_lora(config: LoraConfig, params: Params, key: RandomKey) -> Params:
    """Fresh float32 adapters: a from N(0, 1/rank²) as diffusers' script draws it, b zero.

    Args:
      params: parameters of the transformer, or their shapes.
    """
    shapes, leaves = linear_modules(params), {}
    for index, module in enumerate(targeted_modules(config.targets, params)):
        shape, axes = shapes[module], kernel_axes(module)
        stack = shape[: len(axes.stack)]
        split = len(stack) + len(axes.inputs)
        a_shape = (*shape[:split], config.rank)
        a = jax.random.normal(jax.random.fold_in(key, index), a_shape, jnp.float32)
        leaves[f"{module}/a"] = a / config.rank
        leaves[f"{module}/b"] = jnp.zeros((*stack, config.rank, *shape[split:]), jnp.float32)
    return unflatten(leaves)


def scaled(lora: Params, alpha: float) -> Params:
    """The collection "lora" that the model applies: b times alpha / rank."""
    return unflatten(
        {
            path: leaf * (alpha / _rank(path, leaf)) if path.endswith("/b") else leaf
            for path, leaf in flatten(lora)
        }
    )


def _rank(path: str, b: jax.Array) -> int:
    return b.shape[len(kernel_axes(path.removesuffix("/b")).stack)]


def merge(params: Params, lora: Params, alpha: float, scale: float = 1.0) -> Params:
    """The parameters with scale · alpha/rank · a·b added to their kernels.

    Sums are made in float32 and rounded to the parameter's dtype once.

    Raises:
      ValueError: an adapter has no kernel.
    """
    leaves = dict(flatten(params))
    factors = dict(flatten(lora))
    for path, a in factors.items():
        module, _, name = path.rpartition("/")
        if name != "a":
            continue
        if f"{module}/kernel" not in leaves:
            raise ValueError(f"the adapter of {module} fits no kernel of these parameters")
        kernel, b = leaves[f"{module}/kernel"], factors[f"{module}/b"]
        stack = kernel.shape[: len(kernel_axes(module).stack)]
        rank = a.shape[-1]
        a = a.astype(jnp.float32).reshape(*stack, -1, rank)
        b = b.astype(jnp.float32).reshape(*stack, rank, -1) * (scale * alpha / rank)
        change = jnp.matmul(a, b, precision="highest").reshape(kernel.shape)
        leaves[f"{module}/kernel"] = (kernel.astype(jnp.float32) + change).astype(kernel.dtype)
    return unflatten(leaves)


def unmerge(params: Params, lora: Params, alpha: float, scale: float = 1.0) -> Params:
    """Inverse of `merge`, up to float32 rounding."""
    return merge(params, lora, alpha, -scale)


def trainable_share(lora: Params, params: Params) -> float:
    """Parameters of the adapters over those of the base."""
    count = [sum(int(np.prod(x.shape)) for x in jax.tree.leaves(tree)) for tree in (lora, params)]
    return count[0] / count[1]
