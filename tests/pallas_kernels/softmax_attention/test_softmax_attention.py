"""The op equals the dense formula, in values and gradients, for every packing."""

from itertools import pairwise
from typing import Any

import attention_cases as cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import LENGTHS, MAX_LEN, NUM_TOKENS, on_device, qkv
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.test_util import check_grads

from pallas_kernels import BackendError, softmax_attention
from pallas_kernels._testing import assert_close
from pallas_kernels.softmax_attention import cudnn
from pallas_kernels.softmax_attention.workloads import WORKLOADS

attend: Any = jax.jit(softmax_attention, static_argnames=("max_len", "scale"))


def dense_softmax(xp, q, k, v, offsets, *, scale=None):
    """Softmax attention with the whole [T, T] matrix of scores; `xp` is numpy or jax.numpy."""
    mask = np.zeros((len(q), len(q)), bool)
    for start, end in pairwise(offsets):
        mask[start:end, start:end] = np.tri(end - start, dtype=bool)
    scores = xp.einsum("thd,shd->hts", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    scores = xp.where(mask, scores, -1e300)
    weights = xp.exp(scores - scores.max(-1, keepdims=True)) * mask
    total = weights.sum(-1, keepdims=True)
    return xp.einsum("hts,shd->thd", weights / xp.where(total == 0, 1, total), v)


def check(lengths, *, num_tokens, max_len, seed=0):
    offsets = cases.offsets_of(lengths)
    q, k, v = qkv(seed, num_tokens)
    expected = dense_softmax(np, *(x.astype(np.float64) for x in (q, k, v)), offsets=offsets)
    actual = attend(*on_device(q, k, v, offsets), max_len=max_len)
    assert_close(actual, expected, dtype="float32")
    assert not np.asarray(actual[offsets[-1] :]).any()


@settings(max_examples=25, deadline=None)
@given(LENGTHS, st.sampled_from([0, 20]), st.integers(0, 2**16))
def test_equals_the_dense_formula(lengths, num_empty, seed):
    """A block a sequence costs less than equal blocks, and with empty sequences more."""
    check([*lengths, *[0] * num_empty], num_tokens=NUM_TOKENS, max_len=MAX_LEN, seed=seed)


@pytest.mark.parametrize(
    ("max_len", "lengths"),
    [(1, [1, 0, 1]), (16, [16, 15]), (17, [17, 16, 0, 1]), (33, [0, 33]), (600, [600, 3, 129])],
)
def test_every_band_width(max_len, lengths):
    check(lengths, num_tokens=sum(lengths) + 3, max_len=max_len)


def test_large_scores_are_stable():
    offsets = cases.offsets_of([40, 3])
    q, k, v = qkv(1, 43)
    actual = np.asarray(attend(*on_device(q * 1e4, k * 1e4, v, offsets), max_len=40))
    hard = dense_softmax(np, *(x.astype(np.float64) for x in (q, k, v)), offsets=offsets, scale=1e6)
    np.testing.assert_allclose(actual, hard, atol=1e-5)


@pytest.mark.parametrize("max_len", [33, 600])
def test_gradients_equal_the_dense_formulas(max_len):
    lengths = [33, 0, 17, 1] if max_len == 33 else [550, 31]
    offsets, num_tokens = cases.offsets_of(lengths), sum(lengths) + 5
    args = qkv(3, num_tokens)

    def op(q, k, v):
        return softmax_attention(q, k, v, jnp.asarray(offsets), max_len=max_len, scale=0.4)

    actual = jax.jit(jax.grad(lambda *xs: cases.weighted_sum(op(*xs)), argnums=(0, 1, 2)))(
        *on_device(*args)
    )
    dense = cases.gradients64(
        lambda *xs: dense_softmax(jnp, *xs, offsets=offsets, scale=0.4), *args
    )
    for grad, expected in zip(actual, dense, strict=True):
        np.testing.assert_allclose(grad, expected, atol=1e-5 * np.abs(expected).max())
        assert not np.asarray(grad[offsets[-1] :]).any()


def test_gradients_by_finite_differences():
    offsets = jnp.asarray([0, 5, 5, 12], jnp.int32)
    arrays = on_device(*qkv(5, 14, heads=1, qk_width=3, v_width=2))
    function = jax.jit(lambda q, k, v: softmax_attention(q, k, v, offsets, max_len=7))
    check_grads(function, arrays, order=1, modes=["rev"], eps=1e-2, atol=5e-3, rtol=5e-3)


def test_gradients_are_zero_where_nothing_is_attended():
    q, k, v = on_device(*qkv(6, 20))
    offsets = jnp.zeros(3, jnp.int32)

    def loss(q, k, v):
        return cases.weighted_sum(softmax_attention(q, k, v, offsets, max_len=20))

    for grad in jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(q, k, v):
        assert not np.asarray(grad).any()


def test_a_sequence_alone_equals_itself_in_a_batch_of_any_order():
    lengths, order = [17, 0, 40, 64], [2, 3, 0, 1]
    offsets, arrays = cases.offsets_of(lengths), qkv(7, sum(lengths))
    together = np.asarray(attend(*on_device(*arrays, offsets), max_len=MAX_LEN))
    for b, length in enumerate(lengths):
        tokens = slice(offsets[b], offsets[b + 1])
        own = [x[tokens] for x in arrays]
        alone = attend(*on_device(*own, cases.offsets_of([length])), max_len=MAX_LEN)
        assert_close(alone, together[tokens])
    slots = np.concatenate([np.arange(offsets[b], offsets[b + 1]) for b in order])
    moved_offsets = cases.offsets_of([lengths[b] for b in order])
    moved = attend(*on_device(*(x[slots] for x in arrays), moved_offsets), max_len=MAX_LEN)
    assert_close(moved, together[slots])


def test_bf16_inputs_are_summed_in_f32():
    offsets = cases.offsets_of([60, 4])
    arrays = [jnp.asarray(x, jnp.bfloat16) for x in qkv(11, 64)]
    actual = attend(*arrays, jnp.asarray(offsets), max_len=60)
    wide = [np.asarray(x).astype(np.float64) for x in arrays]
    assert actual.dtype == jnp.bfloat16
    q, k, v = wide
    assert_close(actual, dense_softmax(np, q, k, v, offsets=offsets))

    def loss(q, k, v):
        out = softmax_attention(q, k, v, jnp.asarray(offsets), max_len=60)
        return cases.weighted_sum(out.astype(jnp.float32))

    grads = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(*arrays)
    dense = cases.gradients64(lambda *xs: dense_softmax(jnp, *xs, offsets=offsets), *wide)
    for grad, expected in zip(grads, dense, strict=True):
        assert grad.dtype == jnp.bfloat16
        cases.assert_near(grad, expected, 0.02)


@pytest.mark.parametrize("length", [1024, 4096])
def test_memory_is_linear_in_tokens(length):
    q = jax.ShapeDtypeStruct((length, 1, 16), jnp.float32)
    offsets = jax.ShapeDtypeStruct((2,), jnp.int32)

    def loss(q, k, v, offsets):
        return softmax_attention(q, k, v, offsets, max_len=length).sum()

    compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(q, q, q, offsets).compile()
    assert cases.largest_array(compiled) <= length * 128
    memory = compiled.memory_analysis()
    assert memory is not None
    assert memory.temp_size_in_bytes <= 8 * length * 128 * 4


def padded(q, k, v, offsets, *, max_len, scale):
    """What the cuDNN backend does, by JAX's XLA implementation."""
    how = {"max_len": max_len, "scale": scale, "implementation": "xla"}
    return cudnn.attention(q, k, v, jnp.asarray(offsets), **how)


@pytest.mark.parametrize("lengths", [[33, 0, 17, 1], [0, 0], [0, 33, 0]])
def test_the_padded_form_equals_the_dense_formula(lengths):
    offsets = cases.offsets_of(lengths)
    args = qkv(13, sum(lengths) + 5, v_width=8)

    def op(q, k, v):
        return padded(q, k, v, offsets, max_len=33, scale=0.4)

    out = np.asarray(jax.jit(op)(*on_device(*args)))
    wide = [x.astype(np.float64) for x in args]
    assert_close(out, dense_softmax(np, *wide, offsets=offsets, scale=0.4), dtype="float32")
    assert not out[offsets[-1] :].any()
    gradient = jax.grad(lambda *xs: cases.weighted_sum(op(*xs)), argnums=(0, 1, 2))
    lowered = jax.jit(gradient).lower(*on_device(*args))
    assert "scatter" not in lowered.as_text()
    dense = cases.gradients64(
        lambda *xs: dense_softmax(jnp, *xs, offsets=offsets, scale=0.4), *args
    )
    for grad, expected in zip(lowered.compile()(*on_device(*args)), dense, strict=True):
        np.testing.assert_allclose(grad, expected, atol=1e-5 * max(np.abs(expected).max(), 1))
        assert not np.asarray(grad[offsets[-1] :]).any()


def test_what_keeps_cudnn_away(monkeypatch):
    def problem(tokens=8, sequences=2):
        x = jnp.zeros((tokens, 2, 8), jnp.bfloat16)
        return cudnn.problem(x, x, x, jnp.zeros(sequences + 1, jnp.int32), 4)

    assert "no token" in str(problem(tokens=0))
    assert "no sequence" in str(problem(sequences=0))
    narrow = jnp.zeros((8, 2, 4), jnp.bfloat16)
    offsets = jnp.zeros(3, jnp.int32)
    wide = jnp.zeros((8, 2, 8), jnp.bfloat16)
    assert "value shape" in str(cudnn.problem(wide, wide, narrow, offsets, 4))
    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_deterministic_ops=true")
    assert "xla_gpu_deterministic_ops" in str(problem())


def test_padding_counts_against_short_sequences():
    width = 64
    assert cudnn.wasteful(64, 64 * 200, 200, width) is None
    assert "padding would move" in str(cudnn.wasteful(64, 64 * 50, 50, width))
    assert "padding would move" in str(cudnn.wasteful(4096, 64 * 200, 200, width))


@pytest.mark.parametrize(("offsets", "message"), cases.UNSOUND_OFFSETS, ids=str)
def test_unsound_offsets(offsets, message):
    arrays = on_device(*qkv(0, 4), np.asarray(offsets, np.int32))
    with pytest.raises(ValueError, match=f"softmax_attention: .*{message}"):
        softmax_attention(*arrays, max_len=3)
    assert np.isnan(attend(*arrays, max_len=3)).all()


def test_no_tokens():
    nothing = [x[:0] for x in qkv(0, 1)]
    assert attend(*on_device(*nothing, cases.offsets_of([0])), max_len=20).shape == (0, 2, 12)


def test_errors():
    arrays = on_device(*qkv(0, 4), cases.offsets_of([4]))
    with pytest.raises(ValueError, match="max_len is 0"):
        softmax_attention(*arrays, max_len=0)
    with pytest.raises(BackendError, match="unknown backend 'mosaic_gpu'; expected 'xla', 'cudnn'"):
        softmax_attention(*arrays, max_len=4, backend="mosaic_gpu")
    with pytest.raises(BackendError, match="backend 'cudnn' cannot run this call: it needs"):
        softmax_attention(*arrays, max_len=4, backend="cudnn")
    named = softmax_attention(*arrays, max_len=4, backend="xla")
    np.testing.assert_array_equal(named, softmax_attention(*arrays, max_len=4))


@pytest.mark.gpu
@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs an NVIDIA GPU")
class TestOnGpu:
    @pytest.mark.parametrize("width", [8, 64, 128, 256])
    @pytest.mark.parametrize("lengths", [[0, 1, 63, 64, 65, 200], [4096, 0, 17]])
    def test_cudnn_equals_the_dense_formula(self, lengths, width):
        offsets, num_tokens = cases.offsets_of(lengths), sum(lengths) + 5
        wide = qkv(17, num_tokens, qk_width=width, v_width=width)
        args = [jnp.asarray(x, jnp.bfloat16) for x in wide]

        def op(q, k, v):
            how = {"max_len": max(lengths), "backend": "cudnn"}
            return softmax_attention(q, k, v, jnp.asarray(offsets), **how).astype(jnp.float32)

        out = np.asarray(jax.jit(op)(*args))
        rounded = [np.asarray(x).astype(np.float64) for x in args]
        assert_close(out, dense_softmax(np, *rounded, offsets=offsets), dtype="bfloat16")
        assert not out[offsets[-1] :].any()
        gradient = jax.grad(lambda *xs: cases.weighted_sum(op(*xs)), argnums=(0, 1, 2))
        dense = cases.gradients64(lambda *xs: dense_softmax(jnp, *xs, offsets=offsets), *rounded)
        for grad, expected in zip(jax.jit(gradient)(*args), dense, strict=True):
            cases.assert_near(grad, expected, 0.02)

    @pytest.mark.parametrize("name", ["200", "1k", "4k"])
    def test_workloads_take_cudnn(self, name):
        workload = WORKLOADS[name]
        arrays = [jax.device_put(array) for array in workload.arrays(0)]
        compiled = jax.jit(workload.gradient).lower(*arrays).compile()
        assert "__cudnn$fmhaSoftmaxBackward" in (compiled.as_text() or "")
        wanted = workload.gradient(*arrays, backend="xla")
        for got, want in zip(compiled(*arrays), wanted, strict=True):
            cases.assert_near(got, np.asarray(want).astype(np.float64), 0.03)
