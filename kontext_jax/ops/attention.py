"""The one door to attention: softmax(q·kᵀ·scale + bias)·v for head-major arrays [B, H, S, Dh].

    backend     runs on   memory   bias, mask   segments   dtypes       heads
    reference   anywhere  O(S²)    yes          yes        any          any; float32 throughout
    chunked     anywhere  O(S)     no           yes        any          any; queries in blocks
    cudnn       CUDA      O(S)     no           no         bf16, fp16   Dh a multiple of 8, to 128
    splash      TPU       O(S)     no           yes        any          Dh a multiple of 128
    auto        anywhere                                                see `attention`

splash pads S, and is interpreted on CPU. A new backend is a line in `_BACKENDS`, one in `_limit`
and its place in `_by_platform`.

On a mesh (`kontext_jax.sharding`) all but reference run inside `jax.shard_map` on each device's
own examples and heads with whole tokens, or where `tensor` × `context` does not divide the heads,
on its own queries with all keys. No backend communicates.

In float32 outputs and gradients are within 2e-5 of the reference. With bfloat16 inputs they are
within 2⁻⁷ of the largest one from what float32 makes of the same inputs.

JAX's own `dot_product_attention` holds all S² scores unless told otherwise, on GPU as well.
"""

import functools
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from kontext_jax.ops import attention_splash
from kontext_jax.runtime import sharding
from kontext_jax.types import Array, Bool, Float, Int

Backend = Literal["auto", "reference", "chunked", "cudnn", "splash"]

BACKENDS = ("auto", "reference", "chunked", "cudnn", "splash")
QUERY_BLOCK = 384  # score rows held at a time by `chunked`
# For policies of `jax.checkpoint`, see `keeps_attention`: splash's output and log-sum-exp, the
# output of chunked and reference.
SAVED_NAME = "attention"

SegmentIds = tuple[Int[Array, "B S"], Int[Array, "B keys"]]


def attention(
    q: Float[Array, "B H S Dh"],
    k: Float[Array, "B H keys Dh"],
    v: Float[Array, "B H keys Dh"],
    *,
    backend: Backend = "auto",
    bias: Float[Array, "..."] | None = None,
    mask: Bool[Array, "..."] | None = None,
    segment_ids: SegmentIds | None = None,
    scale: float | None = None,
) -> Float[Array, "B H S Dh"]:
    """Attention of q over k and v: [B, H, S, Dh] → [B, H, S, Dh] in q's dtype.

    "auto" is decided by the platform the program is *compiled* for, which need not be the one it
    is traced on: splash on TPU (chunked if Dh is not a multiple of 128), cudnn on CUDA (chunked
    where it is not installed, and for float32, segments and Dh that it does not take), chunked
    elsewhere; and reference wherever a bias or a mask is given.
    Programs that differentiate should name a backend (`backend_for`): every platform's choice is
    differentiated before the unused ones are dropped.

    Args:
      bias: added to the scaled scores, broadcastable to [B, H, S, S].
      mask: True where a query may attend, broadcastable to [B, H, S, S].
      segment_ids: int32 [B, S] of the queries and of the keys, not negative: tokens attend to those
        of their own id, of which every query needs one. Pass one array twice where queries and keys
        are the same tokens.
      scale: factor of the scores; None for 1/sqrt(Dh).

    Raises:
      NotImplementedError: if the named backend cannot do what is asked.
      ValueError: for an unknown backend, arrays that are not [B, H, S, Dh], or segment ids that
        are not [B, S].
    """
    if backend not in BACKENDS:
        raise ValueError(f"unknown attention backend {backend!r}; choose one of {BACKENDS}")
    if not (q.ndim == k.ndim == v.ndim == 4 and k.shape == v.shape) or (
        q.shape[:2] != k.shape[:2] or q.shape[-1] != k.shape[-1]
    ):
        raise ValueError(
            f"attention takes [B, H, S, Dh] arrays, found q {q.shape}, k {k.shape}, v {v.shape}"
        )
    if segment_ids is not None:
        found = tuple(ids.shape for ids in segment_ids)
        if found != ((q.shape[0], q.shape[2]), (k.shape[0], k.shape[2])):
            raise ValueError(
                f"segment_ids are [B, S] of queries and keys; found {found} for q {q.shape} and "
                f"k {k.shape}"
            )
    if scale is None:
        scale = 1 / math.sqrt(q.shape[-1])
    if backend == "reference" or (backend == "auto" and (bias is not None or mask is not None)):
        return _reference(q, k, v, bias, mask, segment_ids, scale)
    if bias is not None or mask is not None:
        given = "bias" if bias is not None else "mask"
        raise NotImplementedError(f"{backend} attention takes no {given}; use backend='reference'")
    if backend == "auto":
        return _by_platform(q, k, v, segment_ids, scale)
    if limit := _limit(backend, q.shape[-1], q.dtype, segment_ids is not None):
        raise NotImplementedError(f"{backend} attention {limit}; use 'auto' or 'chunked'")
    return _BACKENDS[backend](q, k, v, segment_ids, scale)


def backend_for(platform: str, head_dim: int, dtype: Any) -> Backend:
    """The backend that "auto" would take on a platform ("tpu", "gpu", "cuda", "cpu"), by name.

    For programs that differentiate, and know what they are compiled for.
    """
    if platform == "tpu" and not attention_splash.limit(head_dim):
        return "splash"
    if platform in ("gpu", "cuda") and not _cudnn_limit(head_dim, dtype):
        return "cudnn"
    return "chunked"


def keeps_attention(primitive: Any, *_: Any, **params: Any) -> bool:
    """A policy of `jax.checkpoint`: the backward pass does not run attention forward again.

    Of chunked and reference only the output is kept: their backward passes recompute the scores,
    and with them the log-sum-exp.
    """
    if primitive.name == "name":
        return params["name"] == SAVED_NAME
    return primitive.name == "dot_product_attention_fwd_wrapper"  # cuDNN's output and statistics


def _limit(backend: Backend, head_dim: int, dtype: Any, has_segments: bool) -> str | None:
    """What stops a backend from taking such arrays, or None."""
    if backend == "cudnn":
        return "takes no segment_ids" if has_segments else _cudnn_limit(head_dim, dtype)
    if backend == "splash":
        return attention_splash.limit(head_dim)
    return None


def _on_each_device(function, q, k, v, segment_ids):
    """Runs `function` where the examples and heads lie, if a mesh is active."""
    specs = sharding.attention_specs(q.shape, k.shape)
    if specs is None:
        return function(q, k, v, segment_ids)
    queries, keys = specs
    ids = None if segment_ids is None else tuple(PartitionSpec(s[0], s[2]) for s in specs)
    mapped = jax.shard_map(
        function, in_specs=(queries, keys, keys, ids), out_specs=queries, check_vma=False
    )
    return mapped(q, k, v, segment_ids)


def _by_platform(q, k, v, segment_ids, scale):
    def can(backend):
        return not _limit(backend, q.shape[-1], q.dtype, segment_ids is not None)

    choices = {}
    if can("splash"):
        choices["tpu"] = _splash
    if can("cudnn") and _cudnn_is_installed(q, k, v):
        choices["cuda"] = _cudnn

    def bound(backend):
        return lambda q, k, v: backend(q, k, v, segment_ids, scale)

    choices = {platform: bound(backend) for platform, backend in choices.items()}
    return lax.platform_dependent(q, k, v, **choices, default=bound(_chunked))


def _reference(q, k, v, bias, mask, segment_ids, scale):
    scores = jnp.einsum(
        "bhqd,bhkd->bhqk", q.astype(jnp.float32), k.astype(jnp.float32), optimize=True
    )
    scores = scores * scale
    if bias is not None:
        scores = scores + bias.astype(jnp.float32)
    if segment_ids is not None:
        q_ids, kv_ids = segment_ids
        scores = _within_segments(scores, q_ids[:, None], kv_ids[:, None])
    if mask is not None:
        scores = jnp.where(mask, scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1)
    out = jnp.einsum("bhqk,bhkd->bhqd", weights, v.astype(jnp.float32)).astype(q.dtype)
    return checkpoint_name(out, SAVED_NAME)


def _within_segments(scores, q_ids, kv_ids):
    """Scores [..., q, k], and the lowest number where ids [..., q] and [..., k] differ."""
    same = q_ids[..., :, None] == kv_ids[..., None, :]
    return jnp.where(same, scores, jnp.finfo(scores.dtype).min)


def _chunked(q, k, v, segment_ids, scale):
    """Whole score rows of a block of queries at a time; the backward pass recomputes them.

    On the CPU also one head at a time: its products are faster alone than as a batch, and the
    scores of one head stay in cache.
    """

    def by_head(q, k, v, ids):
        num_heads = q.shape[1]
        arrays = q, k, v, jax.tree.map(lambda x: jnp.repeat(x[:, None], num_heads, axis=1), ids)
        heads = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), arrays)
        return lax.map(lambda head: _in_query_blocks(*head, scale), heads).reshape(q.shape)

    def by_batch(q, k, v, ids):
        return _in_query_blocks(q, k, v, jax.tree.map(lambda x: x[:, None], ids), scale)

    def run(q, k, v, ids):
        return lax.platform_dependent(q, k, v, ids, cpu=by_head, default=by_batch)

    return checkpoint_name(_on_each_device(run, q, k, v, segment_ids), SAVED_NAME)


def _in_query_blocks(q, k, v, segment_ids, scale):
    """[..., S, Dh] → [..., S, Dh], holding [..., block, S] scores; ids are [..., S]."""
    num_queries = q.shape[-2]
    num_blocks = -(-num_queries // QUERY_BLOCK)
    block = -(-num_queries // num_blocks)

    def blocks(x, axis):
        """[…, S, …] → [num_blocks, …, block, …]."""
        axis %= x.ndim
        padding = [(0, num_blocks * block - num_queries if i == axis else 0) for i in range(x.ndim)]
        x = jnp.pad(x, padding)
        x = x.reshape(*x.shape[:axis], num_blocks, block, *x.shape[axis + 1 :])
        return jnp.moveaxis(x, axis, 0)

    q_ids, kv_ids = (None, None) if segment_ids is None else segment_ids

    @jax.checkpoint
    def attend(given):
        rows, row_ids = given
        scores = jnp.einsum("...qd,...kd->...qk", rows, k, preferred_element_type=jnp.float32)
        if row_ids is not None:
            scores = _within_segments(scores, row_ids, kv_ids)
        peak = lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True))
        weights = jnp.exp((scores - peak) * scale)
        total = jnp.sum(weights, axis=-1, keepdims=True)
        out = jnp.einsum(
            "...qk,...kd->...qd", weights.astype(v.dtype), v, preferred_element_type=jnp.float32
        )
        return (out / total).astype(q.dtype)

    out = lax.map(attend, (blocks(q, -2), None if q_ids is None else blocks(q_ids, -1)))
    out = jnp.moveaxis(out, 0, -3)  # [..., num_blocks, block, Dh]
    return out.reshape(*out.shape[:-3], -1, out.shape[-1])[..., :num_queries, :]


def _cudnn_limit(head_dim: int, dtype: Any) -> str | None:
    """What stops cuDNN's flash kernel from taking such heads, or None."""
    if dtype not in (jnp.bfloat16, jnp.float16):
        return f"takes bfloat16 and float16, found {jnp.dtype(dtype)}"
    if head_dim % 8 or head_dim > 128:
        return f"takes head sizes that are multiples of 8 up to 128, found {head_dim}"
    return None


def _cudnn(q, k, v, segment_ids, scale):
    def run(q, k, v, _):
        q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q, k, v))  # [B, S, H, Dh]
        out = jax.nn.dot_product_attention(q, k, v, scale=scale, implementation="cudnn")
        return jnp.swapaxes(out, 1, 2)

    return _on_each_device(run, q, k, v, segment_ids)


def _cudnn_is_installed(q, k, v) -> bool:
    """Tracing cuDNN raises without it, or without JAX's plug-in for CUDA."""
    try:
        jax.eval_shape(functools.partial(_cudnn, segment_ids=None, scale=1.0), q, k, v)
    except RuntimeError:
        return False
    return True


def _splash(q, k, v, segment_ids, scale):
    run = functools.partial(attention_splash.mha, scale=scale, saved_name=SAVED_NAME)
    return _on_each_device(run, q, k, v, segment_ids)


_BACKENDS = {
    "chunked": _chunked,
    "cudnn": _cudnn,
    "splash": _splash,
}
