"""A stack of equal blocks, in two forms that compute the same.

    scan  one block is compiled and runs N times; parameters stacked: {"q": {"kernel": [N, …]}, …}
    list  N blocks are compiled, each with its own: {"0": {"q": {"kernel": […]}, …}, "1": …}

On disk and in training parameters are stacked. XLA's GPU backend copies a layer's weights out of
the stack before it multiplies by them, whether the layer is a loop's index or a constant, and so
moves the whole network twice through memory in every pass; of a list it copies nothing
(docs/performance.md). Programs of lists take longer to compile, with the number of layers.
"""

from collections.abc import Callable
from typing import Any, Literal

import flax.linen as nn
import jax
from jax import lax

from kontext_jax.types import Params

BlockForm = Literal["scan", "list"]
Read = Callable[..., jax.Array]
"""`read(carry, *inputs) -> array`, of what a block returns as carry and of its further inputs."""


def make_stack(
    form: BlockForm,
    block: type[nn.Module],
    arguments: tuple[Any, ...],
    length: int,
    num_layered: int,
    num_shared: int,
) -> nn.Module:
    """The stack of `length` blocks `block(*arguments)`.

    It is called as a block is, `(carry, *layered, *shared) -> (carry, None)`, with the layers on
    axis 1 of each of the `num_layered` arrays; the `num_shared` others go to every block as they
    are.

    Raises:
      ValueError: for an unknown form.
    """
    if form == "list":
        return _BlockList(lambda name: block(*arguments, name=name), length, num_layered)
    if form != "scan":
        raise ValueError(f"unknown form of a stack {form!r}; choose scan or list")
    scanned = nn.scan(
        block,
        variable_axes={"params": 0, "lora": 0},
        split_rngs={"params": True},
        in_axes=(1,) * num_layered + (nn.broadcast,) * num_shared,
        length=length,
        # Checking traces the block once more, and refuses debug effects inside it.
        check_constancy_invariants=False,
    )
    return scanned(*arguments)


def tapped(block: type[nn.Module], read: Read) -> type[nn.Module]:
    """The block with a second carry [K, B, L, D]: what is read after some of the blocks.

    It is called `((carry, kept), slot [1], *inputs)`, and puts the first L tokens of
    `read(carry, *inputs)` in the given slot; blocks that nobody asked about share one. So only what
    was asked for is in memory, where outputs of a scan would hold every block's, and once more for
    their gradients. A rematerialised block goes in as such: nothing of `kept` is saved for it.
    """

    class Tapped(block):  # type: ignore[valid-type, misc]  # made from an argument
        def __call__(self, carry, slot, *inputs):
            carry, kept = carry
            carry, _ = super().__call__(carry, *inputs)
            seen = read(carry, *inputs)[:, : kept.shape[2]].astype(kept.dtype)
            return (carry, lax.dynamic_update_index_in_dim(kept, seen, slot[0], 0)), None

    return Tapped


class _BlockList(nn.Module):
    make_block: Callable[[str], nn.Module]
    length: int
    num_layered: int

    @nn.compact
    def __call__(self, carry, *inputs):
        if stacked := set(self.variables.get("lora", {})) - set(map(str, range(self.length))):
            raise ValueError(
                f"the adapters are stacked, for {sorted(stacked)}, but the blocks are a list; "
                "unstack them like the parameters"
            )
        layered, shared = inputs[: self.num_layered], inputs[self.num_layered :]
        for i in range(self.length):
            carry, _ = self.make_block(str(i))(carry, *(x[:, i] for x in layered), *shared)
            # Or XLA sums a residual again wherever it is read, and keeps all its terms until then.
            carry = jax.lax.optimization_barrier(carry)
        return carry, None


def unstack(params: Params) -> Params:
    """Stacked parameters of blocks as a list of layers, {"0": …}."""
    length = jax.tree.leaves(params)[0].shape[0]
    return {str(i): jax.tree.map(lambda leaf, i=i: leaf[i], params) for i in range(length)}
