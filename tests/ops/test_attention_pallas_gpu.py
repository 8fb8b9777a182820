"""The Triton kernel, interpreted on CPU, against the float32 reference."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kontext_jax.ops import attention as door
from kontext_jax.ops.attention import attention, backend_for, keeps_attention


def results(num_queries, num_keys, head_dim, dtype):
    """(output, gradients of q, k and v) of the kernel and of the reference, in float32."""
    keys = jax.random.split(jax.random.key(0), 4)
    lengths = (num_queries, num_keys, num_keys, num_queries)
    q, k, v, weights = (
        jax.random.normal(key, (1, 2, length, head_dim)).astype(dtype)
        for key, length in zip(keys, lengths, strict=True)
    )

    def run(backend, *qkv):
        def loss(*qkv):
            out = attention(*qkv, backend=backend).astype(jnp.float32)
            return jnp.sum(out * weights.astype(jnp.float32)), out

        (_, out), gradients = jax.value_and_grad(loss, (0, 1, 2), has_aux=True)(*qkv)
        return jax.tree.map(lambda x: x.astype(jnp.float32), (out, *gradients))

    with jax.default_matmul_precision("highest"):
        got = jax.jit(lambda *qkv: run("pallas_gpu", *qkv))(q, k, v)
        exact = (x.astype(jnp.float32) for x in (q, k, v))
        return got, jax.jit(lambda *qkv: run("reference", *qkv))(*exact)


# A whole number of blocks; padding of keys; of queries too, which are fewer, and of channels.
@pytest.mark.parametrize(
    ("num_queries", "num_keys", "head_dim"),
    [
        pytest.param(128, 128, 128, marks=pytest.mark.slow),
        pytest.param(200, 200, 64, marks=pytest.mark.slow),
        (50, 70, 40),
    ],
)
def test_the_kernel_and_its_gradients_equal_the_reference(num_queries, num_keys, head_dim):
    got, want = results(num_queries, num_keys, head_dim, jnp.float32)
    for ours, theirs in zip(got, want, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=5e-6)


@pytest.mark.slow
def test_bfloat16_stays_within_its_rounding():
    got, want = results(200, 200, 128, jnp.bfloat16)
    for ours, theirs in zip(got, want, strict=True):
        assert np.abs(ours - theirs).max() < 2**-7 * np.abs(theirs).max()


def test_the_backward_pass_does_not_run_attention_forward_again():
    def loss(q):
        attend = jax.checkpoint(
            lambda q: attention(2 * q, q, q, backend="pallas_gpu"), policy=keeps_attention
        )
        return jnp.sum(attend(q))

    q = jax.ShapeDtypeStruct((1, 1, 128, 64), jnp.bfloat16)
    text = jax.jit(jax.grad(loss)).trace(q).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count('name = "mha_backward"') == 1
    assert text.count('name = "mha_forward"') == 1


@pytest.mark.parametrize(
    ("head_dim", "dtype", "message"),
    [(512, jnp.bfloat16, "found 512"), (64, jnp.float64, "found float64")],
)
def test_it_says_what_it_cannot_take(head_dim, dtype, message):
    q = jnp.zeros((1, 1, 8, head_dim), jnp.bfloat16)
    with pytest.raises(NotImplementedError, match=f"pallas_gpu attention takes.*{message}"):
        attention(*(np.asarray(q, dtype),) * 3, backend="pallas_gpu")
    with pytest.raises(NotImplementedError, match="no more queries than keys, found 8 and 4"):
        attention(q[..., :64], q[:, :, :4, :64], q[:, :, :4, :64], backend="pallas_gpu")


@pytest.mark.parametrize(
    ("head_dim", "dtype", "cudnn", "backend"),
    [
        (128, jnp.bfloat16, True, "cudnn"),
        (128, jnp.bfloat16, False, "pallas_gpu"),
        (256, jnp.bfloat16, True, "pallas_gpu"),
        (128, jnp.float32, True, "chunked"),
        (512, jnp.bfloat16, True, "chunked"),
    ],
)
def test_auto_takes_it_on_cuda_where_cudnn_cannot(monkeypatch, head_dim, dtype, cudnn, backend):
    chosen = []
    monkeypatch.setattr(door, "_cuda_is_installed", lambda: True)
    monkeypatch.setattr(door, "_cudnn_is_installed", lambda *qkv: cudnn)
    for name in ("cudnn", "pallas_gpu"):
        monkeypatch.setattr(
            door, f"_{name}", lambda q, k, v, ids, scale, n=name: chosen.append(n) or q
        )
    q = jax.ShapeDtypeStruct((1, 1, 128, head_dim), dtype)
    jax.eval_shape(lambda *qkv: attention(*qkv), q, q, q)
    assert chosen[:1] == ([] if backend == "chunked" else [backend])
    if cudnn:
        assert backend_for("cuda", head_dim, dtype) == backend
