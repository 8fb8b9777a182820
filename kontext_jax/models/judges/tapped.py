"""The transformer, read after some of its blocks: hidden states for those who judge by them (LADD).

The blocks carry, beside their tokens, an array [K + 1, B, L, D] through scan or list: after each
block the target's tokens are put in that block's slot, and blocks without a tap share the last one.
So memory holds what was asked for; outputs of a scan would hold every block's, and a second time
for their gradients.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from kontext_jax.models.block_stack import make_stack
from kontext_jax.models.mmdit import MMDiT, ModulationVectors, SingleBlock
from kontext_jax.runtime.sharding import constrain
from kontext_jax.types import Array, Float


class TappedMMDiT(MMDiT):
    """An `MMDiT` of which only `hidden_states` and `modulation` are called, on its parameters.

    Attributes:
      taps: blocks after which `hidden_states` reads, ascending, counted from 0 over the double ones
        and on over the single ones.
    """

    taps: tuple[int, ...] = ()

    def _stack(
        self, block: type[nn.Module], arguments: tuple[Any, ...], length: int, num_layered: int
    ) -> nn.Module:
        read = _img_of_stream if block is SingleBlock else _img_of_both
        # A rematerialised block goes in as such: nothing of what is kept is saved for it.
        block = _tapped(self._rematerialised(block), read)
        return make_stack(self.block_form, block, arguments, length, num_layered + 1, num_shared=2)

    def hidden_states(
        self,
        img: Float[Array, "B L inputs"],
        txt: Float[Array, "B T features"],
        pe: Float[Array, "... S half"],
        modulation: ModulationVectors,
        num_target: int,
    ) -> Float[Array, "taps B num_target D"]:
        """The first `num_target` image tokens as each of the K blocks of `taps` leaves them.

        Other arguments as in `denoise`. The single blocks do not run where no tap is among them.

        Raises:
          ValueError: pe does not have one position per token, or a tap is no block of this model.
        """
        depth, num_single = self.config.depth, self.config.depth_single_blocks
        taps = self.taps
        if list(taps) != sorted(set(taps)) or not 0 <= taps[0] <= taps[-1] < depth + num_single:
            raise ValueError(
                f"taps are {taps}; expected ascending numbers of blocks from 0 to "
                f"{depth + num_single - 1}"
            )
        slots = np.full((1, depth + num_single), len(taps), np.int32)
        slots[0, list(taps)] = np.arange(len(taps))
        carry, rotations, layout = self._enter(img, txt, pe)
        kept = jnp.zeros((len(taps) + 1, len(img), num_target, self.config.hidden_size), self.dtype)
        kept = constrain(kept, None, "batch", "stream", "width")
        double = modulation.double_img, modulation.double_txt
        (streams, kept), _ = self.double_blocks(
            (carry, kept), slots[:, :depth], *double, rotations, layout
        )
        if taps[-1] >= depth:
            img, txt = streams
            stream = layout.join(txt, img, axis=1)
            (_, kept), _ = self.single_blocks(
                (stream, kept), slots[:, depth:], modulation.single, rotations, layout
            )
        return kept[: len(taps)]


def _tapped(block: type[nn.Module], read: Callable[..., jax.Array]) -> type[nn.Module]:
    """The block with a second carry [K + 1, B, L, D]: `read(carry, *inputs)` after some blocks.

    It is called `((carry, kept), slot [1], *inputs)`, and puts the first L tokens of what it reads
    in the given slot.
    """

    class Tapped(block):  # type: ignore[valid-type, misc]  # made from an argument
        def __call__(self, carry, slot, *inputs):
            carry, kept = carry
            carry, _ = super().__call__(carry, *inputs)
            seen = read(carry, *inputs)[:, : kept.shape[2]].astype(kept.dtype)
            return (carry, lax.dynamic_update_index_in_dim(kept, seen, slot[0], 0)), None

    return Tapped


def _img_of_both(carry, *_):
    return carry[0]


def _img_of_stream(stream, _, pe, layout):
    return layout.separate(stream, axis=1)[1]
