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

from kontext_jax.types import Params

BlockForm = Literal["scan", "list"]


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
