"""JAX's splash kernel of attention, for TPUs and heads of a multiple of 128 channels.

Queries and keys are padded to whole blocks, padded keys masked out by segment ids. Blocks are safe
on every TPU with the 32 MiB of scoped VMEM that `kontext_jax.compiler_options` gives our programs
(compiled for v5e, v5p and v6e, in both directions); the forward kernel also fits the compiler's
default of 16 MiB.

    queries    512 at a time
    keys       forward: the largest part of the padded length up to 2176, since every block of
               queries reads all of them again; 8704 tokens (512 of text, 4096 of the target and of
               one reference) are 4 · 2176 and need no padding, 4608 are 3 · 1536
               backward: all of them up to 8704, since the kernel writes a whole dq for each
               block of keys, to be summed afterwards; their products are taken in parts up to 1536

Scores and softmax are float32, the products of bfloat16 heads accumulate in float32.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from kontext_jax.types import Array, Float, Int

LANES = 128  # the kernel's tiles are this wide
BLOCK_Q = 512
MAX_BLOCK_KV = 2176
MAX_BLOCK_KV_BACKWARD = 8704
MAX_PART_KV_BACKWARD = 1536
PADDING_ID = -1  # the segment of padded keys


def limit(head_dim: int) -> str | None:
    """What stops the kernel from taking such heads, or None."""
    if head_dim % LANES:
        return f"takes head sizes that are multiples of {LANES}, found {head_dim}"
    return None


def padded_length(num_tokens: int) -> int:
    """A number of tokens up to whole blocks: of 512, or of 128 up to 512."""
    step = BLOCK_Q if num_tokens > BLOCK_Q else LANES
    return -(-num_tokens // step) * step


def largest_block(num_tokens: int, limit: int) -> int:
    """The largest part of a padded length that the kernel's tiles take, up to `limit`."""
    sizes = range(LANES, min(num_tokens, limit) + 1, LANES)
    return max(size for size in sizes if num_tokens % size == 0)


def mha(
    q: Float[Array, "B H S Dh"],
    k: Float[Array, "B H keys Dh"],
    v: Float[Array, "B H keys Dh"],
    segment_ids: tuple[Int[Array, "B S"], Int[Array, "B keys"]] | None,
    scale: float,
    saved_name: str,
) -> Float[Array, "B H S Dh"]:
    """Attention of q over k and v: [B, H, S, Dh] → [B, H, S, Dh]; interpreted on CPU.

    Args:
      segment_ids: segments of queries and keys, [B, S], not negative; None where all attend to all.
      saved_name: for `jax.checkpoint`, of what the backward pass needs: output and log-sum-exp.
    """
    # Importing Pallas takes seconds; only programs that may run on a TPU pay for it.
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    num_queries, num_keys = q.shape[2], k.shape[2]
    padded_q, padded_kv = padded_length(num_queries), padded_length(num_keys)
    block_kv_backward = largest_block(padded_kv, MAX_BLOCK_KV_BACKWARD)
    blocks = splash.BlockSizes(
        block_q=min(BLOCK_Q, padded_q),
        block_kv=largest_block(padded_kv, MAX_BLOCK_KV),
        block_q_dkv=min(BLOCK_Q, padded_q),
        block_kv_dkv=block_kv_backward,
        block_kv_dkv_compute=largest_block(block_kv_backward, MAX_PART_KV_BACKWARD),
        use_fused_bwd_kernel=True,
    )
    if segment_ids is None and padded_kv != num_keys:
        one_segment = [jnp.zeros((q.shape[0], n), jnp.int32) for n in (num_queries, num_keys)]
        segment_ids = one_segment[0], one_segment[1]
    segments = None
    if segment_ids is not None:  # they cost a little even where nothing is padded
        q_ids, kv_ids = segment_ids
        # A padded query attends as the last one does: a row without any key would have no softmax.
        q_ids = jnp.pad(q_ids, ((0, 0), (0, padded_q - num_queries)), mode="edge")
        padding = (0, 0), (0, padded_kv - num_keys)
        segments = splash.SegmentIds(q_ids, jnp.pad(kv_ids, padding, constant_values=PADDING_ID))

    def run(interpret, q, k, v, segments):
        mask = splash.MultiHeadMask([splash.FullMask((padded_q, padded_kv))] * q.shape[1])
        kernel = splash.make_splash_mha_single_device(
            mask, block_sizes=blocks, residual_checkpoint_name=saved_name, interpret=interpret
        )
        return jax.vmap(lambda q, k, v, s: kernel(q, k, v, segment_ids=s))(q, k, v, segments)

    def pad(x, num_tokens):
        return jnp.pad(x, ((0, 0), (0, 0), (0, num_tokens - x.shape[2]), (0, 0)))

    if scale != 1:  # the kernel does not scale
        q = (q.astype(jnp.float32) * scale).astype(q.dtype)
    out = lax.platform_dependent(
        *(pad(q, padded_q), pad(k, padded_kv), pad(v, padded_kv)),
        segments,
        cpu=functools.partial(run, True),
        default=functools.partial(run, False),
    )
    return out[:, :, :num_queries]
