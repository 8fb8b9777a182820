"""What the training loop takes its examples from.

A batch is one process's share of the global batch of one step. Every process gets the same kind at
the same step: the same number of references, and pictures of the same sizes.
"""

import dataclasses
from typing import Any, ClassVar, Protocol

import flax.struct
import jax
import numpy as np

Array = np.ndarray | jax.Array


@dataclasses.dataclass(frozen=True)
class ImageBatch:
    """Pictures and prompts of one process, on the host.

    Attributes:
      ids: sample ids, B of them.
      target: uint8 [B, height, width, 3].
      contexts: references in order, each uint8 [B, height, width, 3]; () for text to image.
      prompts: instructions, or captions without references.
    """

    ids: tuple[str, ...]
    target: np.ndarray
    contexts: tuple[np.ndarray, ...]
    prompts: tuple[str, ...]


@flax.struct.dataclass
class EncodedBatch:
    """Latents and text features of a batch, NumPy from the cache or JAX from the encoders.

    Attributes:
      x0: latents of the target, scaled, [B, latent_height, latent_width, Z].
      contexts: those of the references in order, each [B, its height, its width, Z]; empty for text
        to image.
      txt: T5 features [B, T, context_in_dim], padding included.
      vec: pooled CLIP features [B, vec_in_dim].
    """

    x0: Array
    contexts: tuple[Array, ...]
    txt: Array
    vec: Array


class Batches(Protocol):
    """An endless, resumable stream of batches.

    Attributes:
      counts: how often what happened since this object was made, by its name, for the log: examples
        skipped by reason, filtered, epochs begun.
    """

    counts: dict[str, int]

    def __iter__(self) -> "Batches": ...

    def __next__(self) -> Any:
        """This process's part of the next global batch: an `ImageBatch` or an `EncodedBatch`."""

    def state(self) -> dict[str, Any]:
        """The position as small JSON, the same on every process."""

    def restore(self, state: dict[str, Any]) -> None:
        """Goes to `state`: the next batch is the one that the run it comes from would have got.

        The number of processes may differ from that run's; the global batches are the same.

        Raises:
          ValueError: the state belongs to other data or to other options that decide the order.
        """

    def close(self) -> None:
        """Ends threads and worker processes."""


class Conditioning(flax.struct.PyTreeNode):
    """What a batch of images is made from, besides noise and time."""

    txt: jax.Array  # [B, T, context_in_dim]
    vec: jax.Array  # [B, vec_in_dim]
    guidance: jax.Array | None  # [B]; None for a model that takes none
    ctx: jax.Array | None  # [B, Lc, C] tokens of the references; None for text to image
    pe: jax.Array  # [2, S, Dh/2] or [B, 2, S, Dh/2] for text, target and references, in this order


class TokenBatch(flax.struct.PyTreeNode):
    """Examples of one optimizer step. All fields but SHARED lead with the axis of the samples."""

    SHARED: ClassVar[frozenset[str]] = frozenset({"null_txt", "null_vec", "pe"})

    x0: jax.Array  # [B, L, C] clean tokens of the target
    ctx: jax.Array | None  # [B, Lc, C] tokens of the references; None for text to image
    txt: jax.Array  # [B, T, D_txt]
    vec: jax.Array  # [B, D_vec]
    null_txt: jax.Array  # [T, D_txt] features of the empty prompt
    null_vec: jax.Array  # [D_vec]
    pe: jax.Array  # [2, S, Dh/2] rotary table of text, target and references
    grid: tuple[int, int] | None = flax.struct.field(pytree_node=False, default=None)
