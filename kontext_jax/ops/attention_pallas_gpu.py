"""JAX's Triton kernel of attention, for GPUs and head sizes that cuDNN is not there for.

Padded to blocks, with padded keys masked out. Block sizes are those whose registers do not spill on
an H100 for heads of 128 channels, by the assembler's account; no GPU has timed them. Products of
float32 heads are as precise as `jax.default_matmul_precision` asks, and then leave the tensor
cores, so that "auto" prefers chunked for them. Its backward pass sums out·d_out over channels in
the heads' dtype: in bfloat16 the gradients of q and k carry that rounding.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

BLOCK = 128  # of queries; the sequence is padded to a multiple
BLOCK_KV = 64
BLOCK_BACKWARD = 64
BLOCK_FLOAT32 = 32  # both directions: larger ones spill
NUM_WARPS = 8
MAX_HEAD_DIM = 256  # heads are padded to a power of 2, and their blocks have to fit on the chip
FORWARD_KERNEL = "mha_forward"  # of the Pallas call, whose results are worth keeping


def limit(head_dim: int, dtype: Any) -> str | None:
    """What stops the kernel from taking such heads, or None."""
    if dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        return f"takes bfloat16, float16 and float32, found {jnp.dtype(dtype)}"
    if head_dim > MAX_HEAD_DIM:
        return f"takes head sizes up to {MAX_HEAD_DIM}, found {head_dim}"
    return None


def mha(
    q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array | None, scale: float
) -> jax.Array:
    """Attention of q over k and v: [B, H, S, Dh] → [B, H, S, Dh]; interpreted on CPU.

    Args:
      q: no more queries than keys.
      segment_ids: [B, S], not negative, of as many queries as keys; None where all attend to all.
    """
    # Importing Pallas takes seconds; only programs that may run this pay for it.
    from jax.experimental.pallas.ops.gpu import attention as kernel

    num_queries, num_keys = q.shape[2], k.shape[2]
    padded = -(-num_keys // BLOCK) * BLOCK
    ids = segment_ids
    if padded != num_keys:
        # One row of ids serves queries and keys; no query that counts stands beside padding.
        ids = jnp.zeros((q.shape[0], num_keys), jnp.int32) if ids is None else ids
        ids = jnp.pad(ids, ((0, 0), (0, padded - num_keys)), constant_values=-1)
    blocks = (BLOCK, BLOCK_KV) + (BLOCK_BACKWARD,) * 4
    if q.dtype == jnp.float32:
        blocks = (BLOCK_FLOAT32,) * 6

    def run(interpret, q, k, v):
        # Positional: functions with a custom derivative take no keywords.
        options = scale, False, kernel.BlockSizes(*blocks), "triton", NUM_WARPS, 2, None, interpret
        return kernel.mha(q, k, v, ids, *options)

    def tokens_first(x):  # [B, S, H, Dh], padded
        x = jnp.swapaxes(x, 1, 2)
        return jnp.pad(x, ((0, 0), (0, padded - x.shape[1]), (0, 0), (0, 0)))

    out = lax.platform_dependent(
        *(tokens_first(x) for x in (q, k, v)),
        cpu=functools.partial(run, True),
        default=functools.partial(run, False),
    )
    return jnp.swapaxes(out[:, :num_queries], 1, 2)
