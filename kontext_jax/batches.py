"""What the training loop takes its examples from.

A batch is one process's share of the global batch of one step. Every process gets the same kind at
the same step: the same number of references, and pictures of the same sizes.
"""

import dataclasses
from typing import Any, Protocol

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
