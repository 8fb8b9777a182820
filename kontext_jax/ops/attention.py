"""The one door to attention: softmax(q·kᵀ·scale + bias)·v for head-major arrays [B, H, S, Dh].

    backend     runs on   memory   bias, mask   dtypes        notes
    reference   anywhere  O(S²)    yes          any           float32 throughout
    chunked     anywhere  O(S)     no           any           queries in blocks; exact softmax
    cudnn       CUDA      O(S)     no           bf16, fp16    Dh a multiple of 8, at most 128
    pallas_gpu  CUDA      O(S)     no           bf16, fp16,   Dh at most 256; pads S; interpreted on
                                                float32       CPU; no more queries than keys
    splash      TPU       O(S)     no           any           pads S; interpreted on CPU
    auto        anywhere                                      see `attention`

On a mesh (`kontext_jax.sharding`) all but reference run inside `jax.shard_map` on each device's
own examples and heads with whole tokens, or where `tensor` × `context` does not divide the heads,
on its own queries with all keys. No backend communicates.

JAX's own `dot_product_attention` holds all S² scores unless told otherwise, on GPU as well.
"""

import functools
import importlib.util
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from kontext_jax import sharding
from kontext_jax.ops import attention_pallas_gpu

Backend = Literal["auto", "reference", "chunked", "cudnn", "pallas_gpu", "splash"]

BACKENDS = ("auto", "reference", "chunked", "cudnn", "pallas_gpu", "splash")
QUERY_BLOCK = 384  # score rows held at a time by `chunked`
SPLASH_LANES = 128  # the TPU kernel's tiles are this wide
SPLASH_BLOCK_Q = 512
SPLASH_MAX_BLOCK_KV = 2176  # 8704 = 4·2176: 512 text and twice 4096 image tokens need no padding
# The backward kernel writes a whole dq for each block of keys, to be summed afterwards: one block
# for all keys where 32 MiB of VMEM hold them, whose products are taken in parts.
SPLASH_MAX_BLOCK_KV_BACKWARD = 8704
SPLASH_MAX_PART_KV_BACKWARD = 1536
# For policies of `jax.checkpoint`, see `keeps_attention`: splash's output and log-sum-exp, the
# output of chunked and reference.
SAVED_NAME = "attention"


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    backend: Backend = "auto",
    bias: jax.Array | None = None,
    mask: jax.Array | None = None,
    scale: float | None = None,
) -> jax.Array:
    """Attention of q over k and v: [B, H, S, Dh] → [B, H, S, Dh] in q's dtype.

    "auto" is decided by the platform the program is *compiled* for, which need not be the one it
    is traced on: splash on TPU (chunked if Dh is not a multiple of 128), cudnn on CUDA (pallas_gpu
    where it is not installed or does not take Dh, chunked for float32 and for Dh that neither
    takes), chunked elsewhere; and reference wherever a bias or a mask is given. Programs that
    differentiate should name a backend (`backend_for`): every platform's choice is differentiated
    before the unused ones are dropped.

    Args:
      bias: added to the scaled scores, broadcastable to [B, H, S, S].
      mask: True where a query may attend, broadcastable to [B, H, S, S].
      scale: of the scores; None for 1/sqrt(Dh).

    Raises:
      NotImplementedError: if the named backend cannot do what is asked.
      ValueError: for an unknown backend, or arrays that are not [B, H, S, Dh].
    """
    if backend not in BACKENDS:
        raise ValueError(f"unknown attention backend {backend!r}; choose one of {BACKENDS}")
    if not (q.ndim == k.ndim == v.ndim == 4 and k.shape == v.shape) or (
        q.shape[:2] != k.shape[:2] or q.shape[-1] != k.shape[-1]
    ):
        raise ValueError(
            f"attention takes [B, H, S, Dh] arrays, found q {q.shape}, k {k.shape}, v {v.shape}"
        )
    if scale is None:
        scale = 1 / math.sqrt(q.shape[-1])
    if backend == "reference" or (backend == "auto" and (bias is not None or mask is not None)):
        return _reference(q, k, v, bias, mask, scale)
    if bias is not None or mask is not None:
        given = "bias" if bias is not None else "mask"
        raise NotImplementedError(f"{backend} attention takes no {given}; use backend='reference'")
    if backend == "auto":
        return _by_platform(q, k, v, scale)
    limits = {"cudnn": _cudnn_limit, "pallas_gpu": attention_pallas_gpu.limit}
    if backend in limits and (limit := limits[backend](q.shape[-1], q.dtype)):
        raise NotImplementedError(f"{backend} attention {limit}; use 'auto' or 'chunked'")
    return _BACKENDS[backend](q, k, v, scale)


def backend_for(platform: str, head_dim: int, dtype: Any) -> Backend:
    """The backend that "auto" would take on a platform ("tpu", "gpu", "cuda", "cpu"), by name.

    For programs that differentiate, and know what they are compiled for.
    """
    if platform == "tpu" and head_dim % SPLASH_LANES == 0:
        return "splash"
    if platform in ("gpu", "cuda") and not _cudnn_limit(head_dim, dtype):
        return "cudnn"
    if platform in ("gpu", "cuda") and _pallas_gpu_is_preferred(head_dim, dtype):
        return "pallas_gpu"
    return "chunked"


def keeps_attention(primitive: Any, *_: Any, **params: Any) -> bool:
    """A policy of `jax.checkpoint`: the backward pass does not run attention forward again.

    Of chunked and reference only the output is kept: their backward passes recompute the scores,
    and with them the log-sum-exp.
    """
    if primitive.name == "name":
        return params["name"] == SAVED_NAME
    if primitive.name == "pallas_call":
        return params["name"] == attention_pallas_gpu.FORWARD_KERNEL
    return primitive.name == "dot_product_attention_fwd_wrapper"  # cuDNN's output and statistics


def _on_each_device(function, q, k, v):
    """Runs `function` where the examples and heads lie, if a mesh is active."""
    specs = sharding.attention_specs(q.shape, k.shape)
    if specs is None:
        return function(q, k, v)
    queries, keys = specs
    mapped = jax.shard_map(
        function, in_specs=(queries, keys, keys), out_specs=queries, check_vma=False
    )
    return mapped(q, k, v)


def _by_platform(q, k, v, scale):
    choices = {}
    if q.shape[-1] % SPLASH_LANES == 0:
        choices["tpu"] = functools.partial(_splash, scale=scale)
    if not _cudnn_limit(q.shape[-1], q.dtype) and _cudnn_is_installed(q, k, v):
        choices["cuda"] = functools.partial(_cudnn, scale=scale)
    elif (
        _cuda_is_installed()
        and _pallas_gpu_is_preferred(q.shape[-1], q.dtype)
        and q.shape[2] <= k.shape[2]
    ):
        choices["cuda"] = functools.partial(_pallas_gpu, scale=scale)
    return lax.platform_dependent(
        q, k, v, **choices, default=functools.partial(_chunked, scale=scale)
    )


def _reference(q, k, v, bias, mask, scale):
    scores = jnp.einsum(
        "bhqd,bhkd->bhqk", q.astype(jnp.float32), k.astype(jnp.float32), optimize=True
    )
    scores = scores * scale
    if bias is not None:
        scores = scores + bias.astype(jnp.float32)
    if mask is not None:
        scores = jnp.where(mask, scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1)
    out = jnp.einsum("bhqk,bhkd->bhqd", weights, v.astype(jnp.float32)).astype(q.dtype)
    return checkpoint_name(out, SAVED_NAME)


def _chunked(q, k, v, scale):
    """Whole score rows of a block of queries at a time; the backward pass recomputes them.

    On the CPU also one head at a time: its products are faster alone than as a batch, and the
    scores of one head stay in cache.
    """

    def by_head(q, k, v):
        heads = (x.reshape(-1, *x.shape[2:]) for x in (q, k, v))
        return lax.map(lambda head: _in_query_blocks(*head, scale), tuple(heads)).reshape(q.shape)

    def run(q, k, v):
        return lax.platform_dependent(
            q, k, v, cpu=by_head, default=functools.partial(_in_query_blocks, scale=scale)
        )

    return checkpoint_name(_on_each_device(run, q, k, v), SAVED_NAME)


def _in_query_blocks(q, k, v, scale):
    """[..., S, Dh] → [..., S, Dh], holding [..., block, S] scores."""
    *batch, num_queries, head_dim = q.shape
    num_blocks = -(-num_queries // QUERY_BLOCK)
    block = -(-num_queries // num_blocks)
    padding = [(0, 0)] * len(batch) + [(0, num_blocks * block - num_queries), (0, 0)]
    blocks = jnp.pad(q, padding).reshape(*batch, num_blocks, block, head_dim)

    @jax.checkpoint
    def attend(rows):
        scores = jnp.einsum("...qd,...kd->...qk", rows, k, preferred_element_type=jnp.float32)
        peak = lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True))
        weights = jnp.exp((scores - peak) * scale)
        total = jnp.sum(weights, axis=-1, keepdims=True)
        out = jnp.einsum(
            "...qk,...kd->...qd", weights.astype(v.dtype), v, preferred_element_type=jnp.float32
        )
        return (out / total).astype(q.dtype)

    out = lax.map(attend, jnp.moveaxis(blocks, -3, 0))  # [num_blocks, ..., block, Dh]
    out = jnp.moveaxis(out, 0, -3).reshape(*batch, num_blocks * block, head_dim)
    return out[..., :num_queries, :]


def _cudnn_limit(head_dim: int, dtype: Any) -> str | None:
    """What stops cuDNN's flash kernel from taking such heads, or None."""
    if dtype not in (jnp.bfloat16, jnp.float16):
        return f"takes bfloat16 and float16, found {jnp.dtype(dtype)}"
    if head_dim % 8 or head_dim > 128:
        return f"takes head sizes that are multiples of 8 up to 128, found {head_dim}"
    return None


def _cudnn(q, k, v, scale):
    def run(q, k, v):
        q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q, k, v))  # [B, S, H, Dh]
        out = jax.nn.dot_product_attention(q, k, v, scale=scale, implementation="cudnn")
        return jnp.swapaxes(out, 1, 2)

    return _on_each_device(run, q, k, v)


def _cuda_is_installed() -> bool:
    """Without JAX's plug-in nothing can be compiled for CUDA."""
    return any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13))


def _cudnn_is_installed(q, k, v) -> bool:
    """Tracing cuDNN raises without it, or without JAX's plug-in for CUDA."""
    try:
        jax.eval_shape(functools.partial(_cudnn, scale=1.0), q, k, v)
    except RuntimeError:
        return False
    return True


def _pallas_gpu_is_preferred(head_dim: int, dtype: Any) -> bool:
    """To chunked, which is faster where products cannot use the tensor cores."""
    return dtype != jnp.float32 and not attention_pallas_gpu.limit(head_dim, dtype)


def _pallas_gpu(q, k, v, scale):
    return _on_each_device(functools.partial(attention_pallas_gpu.mha, scale=scale), q, k, v)


def splash_blocks(num_tokens: int) -> tuple[int, int, int]:
    """(padded length, query block, key block) for the TPU kernel, whose blocks must divide S.

    Few padded tokens first, then the largest key block up to 2176.
    """
    step = SPLASH_BLOCK_Q if num_tokens > SPLASH_BLOCK_Q else SPLASH_LANES
    padded = -(-num_tokens // step) * step
    block_kv = _largest_block(padded, SPLASH_MAX_BLOCK_KV)
    return padded, min(SPLASH_BLOCK_Q, padded), block_kv


def _largest_block(num_tokens: int, limit: int) -> int:
    """The largest part of `num_tokens` that the kernel's tiles take, up to `limit`."""
    sizes = range(SPLASH_LANES, min(num_tokens, limit) + 1, SPLASH_LANES)
    return max(size for size in sizes if num_tokens % size == 0)


def _splash(q, k, v, scale):
    """JAX's TPU kernel."""
    # Importing Pallas takes seconds; only programs that may run on a TPU pay for it.
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    def on_device(q, k, v):
        num_queries, num_keys = q.shape[2], k.shape[2]
        padded_q, block_q, _ = splash_blocks(num_queries)
        padded_kv, _, block_kv = splash_blocks(num_keys)
        block_kv_dkv = _largest_block(padded_kv, SPLASH_MAX_BLOCK_KV_BACKWARD)
        blocks = splash.BlockSizes(
            block_q=block_q,
            block_kv=block_kv,
            block_q_dkv=block_q,
            block_kv_dkv=block_kv_dkv,
            block_kv_dkv_compute=_largest_block(block_kv_dkv, SPLASH_MAX_PART_KV_BACKWARD),
            use_fused_bwd_kernel=True,
        )
        segments = None
        if padded_kv != num_keys:
            is_padding = (jnp.arange(padded_kv) >= num_keys).astype(jnp.int32)
            segments = splash.SegmentIds(q=jnp.zeros(padded_q, jnp.int32), kv=is_padding)

        def run(interpret, q, k, v):
            mask = splash.MultiHeadMask([splash.FullMask((padded_q, padded_kv))] * q.shape[1])
            kernel = splash.make_splash_mha_single_device(
                mask, block_sizes=blocks, residual_checkpoint_name=SAVED_NAME, interpret=interpret
            )
            return jax.vmap(lambda q, k, v: kernel(q, k, v, segment_ids=segments))(q, k, v)

        def pad(x, num_tokens):
            return jnp.pad(x, ((0, 0), (0, 0), (0, num_tokens - x.shape[2]), (0, 0)))

        if scale != 1:  # the kernel does not scale
            q = (q.astype(jnp.float32) * scale).astype(q.dtype)
        out = lax.platform_dependent(
            *(pad(q, padded_q), pad(k, padded_kv), pad(v, padded_kv)),
            cpu=functools.partial(run, True),
            default=functools.partial(run, False),
        )
        return out[:, :, :num_queries]

    return _on_each_device(on_device, q, k, v)


_BACKENDS = {
    "chunked": _chunked,
    "cudnn": _cudnn,
    "pallas_gpu": _pallas_gpu,
    "splash": _splash,
}
