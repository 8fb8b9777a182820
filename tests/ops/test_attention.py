"""Attention: every backend gives the same answer, and says what it cannot do."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kontext_jax.ops import attention as door
from kontext_jax.ops import attention_splash
from kontext_jax.ops.attention import attention, backend_for


@pytest.fixture(autouse=True)
def _full_precision():
    with jax.default_matmul_precision("highest"):
        yield


def random_qkv(batch=2, heads=2, num_tokens=50, head_dim=16, dtype=jnp.float32, seed=0):
    keys = jax.random.split(jax.random.key(seed), 3)
    return [jax.random.normal(k, (batch, heads, num_tokens, head_dim), dtype) for k in keys]


def plain(q, k, v, scale):
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    scores = np.einsum("bhqd,bhkd->bhqk", q, k) * scale
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("bhqk,bhkd->bhqd", weights / weights.sum(-1, keepdims=True), v)


# 1 token, one block, several blocks of equal size, and several that need padding.
@pytest.mark.parametrize("num_tokens", [1, 50, 384, 768, 770])
@pytest.mark.parametrize("backend", ["reference", "chunked", "auto"])
def test_backends_compute_softmax_attention(backend, num_tokens):
    q, k, v = random_qkv(num_tokens=num_tokens)
    out = jax.jit(lambda *a: attention(*a, backend=backend))(q, k, v)
    np.testing.assert_allclose(out, plain(q, k, v, 0.25), atol=2e-6)


@pytest.mark.parametrize("num_tokens", [128, 200])  # without and with padding
def test_splash_interpreted_computes_softmax_attention(num_tokens):
    q, k, v = random_qkv(heads=1, num_tokens=num_tokens, head_dim=128)
    out = attention(q, k, v, backend="splash")
    np.testing.assert_allclose(out, plain(q, k, v, 128**-0.5), atol=5e-6)


@pytest.mark.parametrize(("backend", "head_dim"), [("chunked", 16), ("splash", 128)])
def test_gradients_equal_those_of_the_reference(backend, head_dim):
    qkv = random_qkv(batch=1, heads=1, num_tokens=390, head_dim=head_dim)
    if backend == "splash":
        qkv = [x[:, :, :150] for x in qkv]
    weights = jax.random.normal(jax.random.key(9), qkv[0].shape)

    def gradients(backend):
        loss = lambda *a: jnp.sum(weights * attention(*a, backend=backend))  # noqa: E731
        return jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(*qkv)

    for got, want in zip(gradients(backend), gradients("reference"), strict=True):
        np.testing.assert_allclose(got, want, atol=2e-5)


def test_chunked_holds_no_square_of_the_sequence():
    shape = jax.ShapeDtypeStruct((1, 4, 8192, 64), jnp.float32)

    def forward(*a, backend="chunked"):
        return attention(*a, backend=backend)

    def program(function):
        return jax.jit(function).lower(shape, shape, shape).compile().as_text()

    backward = jax.grad(lambda *a: forward(*a).sum(), argnums=(0, 1, 2))
    assert "8192,8192" not in program(forward)
    assert "8192,8192" not in program(backward)
    assert "8192,8192" in program(functools.partial(forward, backend="reference"))


def test_output_keeps_the_dtype_with_a_float32_softmax():
    q, k, v = random_qkv(dtype=jnp.bfloat16)
    exact = plain(q, k, v, 0.25)
    for backend in ("reference", "chunked"):
        out = attention(q, k, v, backend=backend)
        assert out.dtype == jnp.bfloat16
        np.testing.assert_allclose(np.asarray(out, np.float32), exact, atol=0.02)


def test_large_scores_do_not_overflow():
    q, k, v = random_qkv()
    for backend in ("reference", "chunked"):
        out = attention(1e4 * q, k, v, backend=backend)
        assert np.isfinite(out).all()


def test_mask_equals_leaving_the_masked_keys_out():
    q, k, v = random_qkv()
    mask = jnp.arange(50) < 30
    masked = attention(q, k, v, mask=mask[None, None, None])
    np.testing.assert_allclose(masked, attention(q, k[:, :, :30], v[:, :, :30]), atol=2e-6)


def test_bias_is_added_to_the_scaled_scores():
    q, k, v = random_qkv()
    bias = jnp.where(jnp.arange(50) < 30, 0.0, -1e9)[None, None, None]
    biased = attention(q, k, v, bias=bias, scale=1.0)
    without = attention(q, k[:, :, :30], v[:, :, :30], scale=1.0)
    np.testing.assert_allclose(biased, without, atol=1e-5)  # scores reach 20 at this scale


@pytest.mark.parametrize("backend", ["chunked", "cudnn", "splash"])
@pytest.mark.parametrize("given", ["bias", "mask"])
def test_backends_without_bias_and_mask_say_so(backend, given):
    q, k, v = random_qkv(dtype=jnp.bfloat16)
    extra = jnp.ones((1, 1, 50, 50), bool if given == "mask" else jnp.float32)
    with pytest.raises(NotImplementedError, match=f"{backend} attention takes no {given}"):
        attention(q, k, v, backend=backend, **{given: extra})


@pytest.mark.parametrize(
    ("head_dim", "dtype", "message"),
    [
        (16, jnp.float32, "found float32"),
        (12, jnp.bfloat16, "found 12"),
        (256, jnp.float16, "found 256"),
    ],
)
def test_cudnn_says_what_it_cannot_take(head_dim, dtype, message):
    with pytest.raises(NotImplementedError, match=message):
        attention(*random_qkv(head_dim=head_dim, dtype=dtype), backend="cudnn")


@pytest.mark.parametrize(
    ("platform", "head_dim", "dtype", "backend"),
    [
        ("tpu", 128, jnp.bfloat16, "splash"),
        ("tpu", 64, jnp.bfloat16, "chunked"),
        ("gpu", 128, jnp.bfloat16, "cudnn"),
        ("cuda", 128, jnp.float32, "chunked"),
        ("cuda", 256, jnp.bfloat16, "chunked"),
        ("cpu", 128, jnp.bfloat16, "chunked"),
    ],
)
def test_a_platform_has_a_backend_by_name(platform, head_dim, dtype, backend):
    assert backend_for(platform, head_dim, dtype) == backend


@pytest.mark.parametrize(
    ("head_dim", "dtype", "cudnn", "backend"),
    [
        (128, jnp.bfloat16, True, "cudnn"),
        (128, jnp.bfloat16, False, "chunked"),
        (256, jnp.bfloat16, True, "chunked"),
        (128, jnp.float32, True, "chunked"),
    ],
)
def test_auto_takes_chunked_on_cuda_where_cudnn_cannot(
    monkeypatch, head_dim, dtype, cudnn, backend
):
    chosen = []
    monkeypatch.setattr(door, "_cudnn_is_installed", lambda *qkv: cudnn)
    monkeypatch.setattr(door, "_cudnn", lambda q, *_: chosen.append("cudnn") or q)
    q = jax.ShapeDtypeStruct((1, 1, 128, head_dim), dtype)
    jax.eval_shape(lambda *qkv: attention(*qkv), q, q, q)
    assert chosen == ([] if backend == "chunked" else [backend])
    if cudnn:
        assert backend_for("cuda", head_dim, dtype) == backend


def test_a_retired_backend_is_refused_by_the_door():
    with pytest.raises(ValueError, match=r"'pallas_gpu'; choose one of \('auto', .*'cudnn'"):
        attention(*random_qkv(), backend="pallas_gpu")


@pytest.mark.parametrize(("backend", "head_dim"), [("chunked", 16), ("splash", 128)])
def test_some_of_the_queries_attend_as_among_all(backend, head_dim):
    q, k, v = random_qkv(head_dim=head_dim)
    out = attention(q[:, :, :40], k, v, backend=backend)
    np.testing.assert_allclose(out, plain(q, k, v, head_dim**-0.5)[:, :, :40], atol=5e-6)


def test_wrong_arguments_are_refused():
    q, k, v = random_qkv()
    with pytest.raises(ValueError, match="unknown attention backend 'flash'"):
        attention(q, k, v, backend="flash")
    with pytest.raises(ValueError, match=r"takes \[B, H, S, Dh\] arrays"):
        attention(q[0], k[0], v[0])
    with pytest.raises(ValueError, match=r"takes \[B, H, S, Dh\] arrays"):
        attention(q, k[:, :1], v[:, :1])


def test_auto_follows_the_platform_of_the_program_not_of_the_trace():
    q = jax.ShapeDtypeStruct((1, 2, 256, 128), jnp.bfloat16)
    exported = {
        platform: jax.export.export(jax.jit(attention), platforms=[platform])(q, q, q)
        for platform in ("tpu", "cpu")
    }
    assert "tpu_custom_call" in exported["tpu"].mlir_module()
    assert "custom_call" not in exported["cpu"].mlir_module()


def test_auto_on_tpu_falls_to_chunked_for_heads_the_kernel_does_not_take():
    q = jax.ShapeDtypeStruct((1, 2, 256, 32), jnp.bfloat16)
    exported = jax.export.export(jax.jit(attention), platforms=["tpu"])(q, q, q)
    assert "tpu_custom_call" not in exported.mlir_module()


@pytest.mark.parametrize(
    ("num_tokens", "padded", "block_kv", "backward"),
    [
        (8704, 8704, 2176, (8704, 512)),  # 512 text, 4096 target, 4096 reference
        (4608, 4608, 1536, (4608, 1536)),  # 512 text, 4096 target
        (8744, 9216, 1536, (4608, 1536)),  # 512 text, twice 4116
        (40, 128, 128, (128, 128)),
        (513, 1024, 1024, (1024, 1024)),
    ],
)
def test_splash_blocks_divide_the_padded_sequence(num_tokens, padded, block_kv, backward):
    largest = attention_splash.largest_block
    assert attention_splash.padded_length(num_tokens) == padded
    assert largest(padded, attention_splash.MAX_BLOCK_KV) == block_kv
    block = largest(padded, attention_splash.MAX_BLOCK_KV_BACKWARD)
    part = largest(block, attention_splash.MAX_PART_KV_BACKWARD)
    assert (block, part) == backward
    assert padded % block == block % part == part % attention_splash.LANES == 0


def test_splash_pads_any_length_by_less_than_a_block():
    for num_tokens in range(1, 20_000):
        padded = attention_splash.padded_length(num_tokens)
        assert 0 <= padded - num_tokens < attention_splash.BLOCK_Q
        assert padded % min(padded, attention_splash.BLOCK_Q) == 0


def segments_of(batch, num_tokens, seed=3):
    """Ids in no order, every one of which occurs."""
    ids = np.random.default_rng(seed).permutation(np.arange(batch * num_tokens) % 3)
    return jnp.asarray(ids.reshape(batch, num_tokens), jnp.int32)


def test_segments_equal_attention_within_each():
    q, k, v = random_qkv(batch=1)
    ids = segments_of(1, 50)
    for backend in ("reference", "chunked", "auto"):
        out = attention(q, k, v, backend=backend, segment_ids=(ids, ids))
        for segment in range(3):
            chosen = np.asarray(ids[0] == segment)
            alone = plain(*(x[:, :, chosen] for x in (q, k, v)), 0.25)
            np.testing.assert_allclose(out[:, :, chosen], alone, atol=2e-6)


def result_and_gradients(backend, qkv, ids, weights):
    def loss(*qkv):
        out = attention(*qkv, backend=backend, segment_ids=ids).astype(jnp.float32)
        return jnp.sum(weights * out), out

    (_, out), gradients = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(*qkv)
    return [np.asarray(x, np.float32) for x in (out, *gradients)]


# Two blocks of queries and padding; for the kernels, padding of a block in which segments go on.
@pytest.mark.parametrize(
    ("backend", "head_dim", "num_tokens"),
    [("chunked", 16, 390), ("splash", 128, 150)],
)
def test_segments_have_the_results_and_gradients_of_the_reference(backend, head_dim, num_tokens):
    qkv = random_qkv(batch=2, heads=1, num_tokens=num_tokens, head_dim=head_dim)
    weights = jax.random.normal(jax.random.key(9), qkv[0].shape)
    ids = segments_of(2, num_tokens)
    got, want = (
        result_and_gradients(name, qkv, (ids, ids), weights) for name in (backend, "reference")
    )
    for ours, theirs in zip(got, want, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5)


@pytest.mark.parametrize(("backend", "head_dim"), [("chunked", 16), ("splash", 128)])
def test_queries_and_keys_have_segments_of_their_own(backend, head_dim):
    q, k, v = random_qkv(head_dim=head_dim)
    ids = segments_of(2, 40), segments_of(2, 50, seed=4)
    got, want = (
        attention(q[:, :, :40], k, v, backend=name, segment_ids=ids)
        for name in (backend, "reference")
    )
    np.testing.assert_allclose(got, want, atol=5e-6)


def test_segments_are_refused_where_they_cannot_be_kept():
    q, k, v = random_qkv(dtype=jnp.bfloat16)
    ids = segments_of(2, 50)
    with pytest.raises(NotImplementedError, match="cudnn attention takes no segment_ids"):
        attention(q, k, v, backend="cudnn", segment_ids=(ids, ids))
    with pytest.raises(ValueError, match=r"segment_ids are \[B, S\].*\(2, 50\), \(50,\)"):
        attention(q, k, v, segment_ids=(ids, ids[0]))


@pytest.mark.parametrize(("backend", "head_dim"), [("chunked", 16), ("splash", 128)])
def test_bfloat16_stays_within_its_rounding_of_the_float32_reference(backend, head_dim):
    qkv = random_qkv(batch=1, heads=2, num_tokens=200, head_dim=head_dim, dtype=jnp.bfloat16)
    weights = jax.random.normal(jax.random.key(9), qkv[0].shape, jnp.bfloat16).astype(jnp.float32)
    exact = [x.astype(jnp.float32) for x in qkv]
    got = result_and_gradients(backend, qkv, None, weights)
    want = result_and_gradients("reference", exact, None, weights)
    for ours, theirs in zip(got, want, strict=True):
        assert np.abs(ours - theirs).max() < 2**-7 * np.abs(theirs).max()


def test_memory_of_the_cpu_path_grows_with_the_tokens_not_with_their_square():
    def temporaries(num_tokens, backward):
        shape = jax.ShapeDtypeStruct((1, 2, num_tokens, 64), jnp.float32)
        run = lambda *qkv: attention(*qkv, backend="chunked").sum()  # noqa: E731
        function = jax.grad(run, argnums=(0, 1, 2)) if backward else run
        compiled = jax.jit(function).lower(shape, shape, shape).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    for backward in (False, True):
        small, large = (temporaries(n, backward) for n in (1536, 3072))
        assert 1 < large / small < 2.3
        assert large < 2 * 3072**2  # half of one head's scores
