"""The op equals the dense formula, in values and gradients, for every mask and bias."""

from itertools import pairwise
from typing import Any

import attention_cases as cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import LENGTHS, MAX_LEN, NUM_TOKENS, on_device, qkv
from dense_hstu import dense_hstu, dense_mask
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.test_util import check_grads

from pallas_kernels import BackendError, hstu_attention
from pallas_kernels._testing import assert_close
from pallas_kernels.hstu_attention import HstuConfig
from pallas_kernels.hstu_attention.ref import time_bucket

STATIC = ("max_len", "alpha", "max_attn_len", "contextual_len", "min_full_attn_len")
attend: Any = jax.jit(hstu_attention, static_argnames=STATIC)

MASKS = [
    {},
    {"max_attn_len": 5},
    {"max_attn_len": 5, "min_full_attn_len": 3},
    {"contextual_len": 3},
    {"contextual_len": 2, "max_attn_len": 1},
    {"contextual_len": 4, "max_attn_len": 6, "min_full_attn_len": 2},
]


def biases(seed, num_tokens, heads=2, max_len=MAX_LEN, num_buckets=12):
    rng = np.random.default_rng(seed + 1)
    return {
        "position_bias": rng.normal(size=(heads, max_len)).astype(np.float32),
        "time_bias": rng.normal(size=(heads, num_buckets)).astype(np.float32),
        "timestamps": rng.integers(0, 300, num_tokens).astype(np.int32),
    }


def check(lengths, num_targets, mask_options, *, num_tokens, max_len, seed=0, with_biases=True):
    offsets = cases.offsets_of(lengths)
    arrays, bias = qkv(seed, num_tokens), {}
    if with_biases:
        bias = biases(seed, num_tokens, max_len=max_len)
    mask = dense_mask(offsets, num_tokens, num_targets=num_targets, **mask_options)
    wide = [x.astype(np.float64) for x in arrays]
    expected = dense_hstu(np, *wide, mask=mask, scale=1 / max_len, **bias)
    targets = None if num_targets is None else jnp.asarray(num_targets, jnp.int32)
    actual = attend(
        *on_device(*arrays, offsets),
        max_len=max_len,
        num_targets=targets,
        **mask_options,
        **jax.tree.map(jnp.asarray, bias),
    )
    assert_close(actual, expected, dtype="float32")
    assert not np.asarray(actual[offsets[-1] :]).any()


@pytest.mark.parametrize("options", MASKS, ids=str)
@settings(max_examples=12, deadline=None)
@given(LENGTHS, st.sampled_from([0, 20]), st.booleans(), st.integers(0, 2**16))
def test_equals_the_dense_formula(options, lengths, num_empty, with_targets, seed):
    """A block a sequence costs less than equal blocks, and with empty sequences more."""
    contextual = options.get("contextual_len", 0)
    lengths = [n if n >= contextual else 0 for n in lengths] + [0] * num_empty
    targets = np.zeros(len(lengths), np.int32)
    if with_targets:
        room = np.maximum(np.array(lengths) - contextual, 0)
        targets = np.random.default_rng(seed).integers(0, room + 1).astype(np.int32)
    if contextual:  # an empty sequence has no contextual tokens, and the dense mask counts none
        targets = np.where(np.array(lengths) == 0, 0, targets)
    check(lengths, targets, options, num_tokens=NUM_TOKENS, max_len=MAX_LEN, seed=seed)


@pytest.mark.parametrize(
    ("max_len", "lengths"),
    [(1, [1, 0, 1]), (16, [16, 15]), (17, [17, 16, 0, 1]), (33, [0, 33]), (600, [600, 3, 129])],
)
def test_every_band_width(max_len, lengths):
    check(lengths, None, {}, num_tokens=sum(lengths) + 3, max_len=max_len)


def test_long_bands_with_every_mask():
    check(
        [300, 7, 290],
        [4, 0, 20],
        {"contextual_len": 5, "max_attn_len": 50, "min_full_attn_len": 9},
        num_tokens=600,
        max_len=520,
    )


@pytest.mark.parametrize("max_len", [33, 600])
def test_gradients_equal_the_dense_formulas(max_len):
    lengths = [33, 0, 17, 1] if max_len == 33 else [550, 31]
    offsets, num_tokens = cases.offsets_of(lengths), sum(lengths) + 5
    bias = biases(3, num_tokens, max_len=max_len)
    args = [*qkv(3, num_tokens), bias["position_bias"], bias["time_bias"]]
    times = bias["timestamps"]
    options: Any = {"max_attn_len": 9, "contextual_len": 1, "min_full_attn_len": 2}
    targets = np.array([min(n - 1, 2) if n else 0 for n in lengths], np.int32)
    mask = dense_mask(offsets, num_tokens, num_targets=targets, **options)

    def dense(q, k, v, position_bias, time_bias):
        return dense_hstu(
            jnp,
            q,
            k,
            v,
            mask,
            alpha=0.7,
            scale=0.1,
            position_bias=position_bias,
            time_bias=time_bias,
            timestamps=times,
        )

    def op(q, k, v, position_bias, time_bias):
        return hstu_attention(
            q,
            k,
            v,
            jnp.asarray(offsets),
            max_len=max_len,
            alpha=0.7,
            attn_scale=0.1,
            num_targets=jnp.asarray(targets),
            position_bias=position_bias,
            time_bias=time_bias,
            timestamps=jnp.asarray(times),
            **options,
        )

    actual = jax.jit(jax.grad(lambda *xs: cases.weighted_sum(op(*xs)), argnums=range(5)))(
        *on_device(*args)
    )
    for grad, expected in zip(actual, cases.gradients64(dense, *args), strict=True):
        scale = np.abs(expected).max()
        np.testing.assert_allclose(grad / scale, expected / scale, atol=1e-5)
    for grad in actual[:3]:
        assert not np.asarray(grad[offsets[-1] :]).any()


@pytest.mark.slow
def test_short_and_long_sequences_together_in_float64():
    lengths, heads = [0, 1, 63, 64, 65, 200, 4096], 1
    offsets, num_tokens, max_len = cases.offsets_of(lengths), sum(lengths), max(lengths)
    bias = biases(12, num_tokens, heads=heads, max_len=max_len)
    tables = [bias["position_bias"], bias["time_bias"]]
    rows = qkv(12, num_tokens, heads=heads)
    d_out = np.random.default_rng(12).normal(size=rows[2].shape).astype(np.float32)

    def op(*args):
        q, k, v, position_bias, time_bias = args
        return hstu_attention(
            q, k, v, jnp.asarray(offsets), max_len=max_len, position_bias=position_bias,
            timestamps=jnp.asarray(bias["timestamps"]), time_bias=time_bias,
        )  # fmt: skip

    out, pull = jax.vjp(jax.jit(op), *on_device(*rows, *tables))
    q_grad, k_grad, v_grad, *table_grads = pull(jnp.asarray(d_out))
    wanted_tables = [np.zeros_like(table, np.float64) for table in tables]
    for start, end in pairwise(offsets):
        own = slice(start, end)
        wanted = dense_value_and_gradients(
            [x[own] for x in rows], tables, d_out[own], bias["timestamps"][own], max_len
        )
        cases.assert_near(out[own], wanted[0], 2e-5)
        for got, want in zip((q_grad, k_grad, v_grad), wanted[1:4], strict=True):
            cases.assert_near(got[own], want, 1e-4)
        wanted_tables = [total + one for total, one in zip(wanted_tables, wanted[4:], strict=True)]
    for got, want in zip(table_grads, wanted_tables, strict=True):
        cases.assert_near(got, want, 1e-4)


def dense_value_and_gradients(rows, tables, d_out, timestamps, max_len):
    """(out, gradients of q, k, v and the biases) of one sequence, in float64."""
    mask = np.tri(len(d_out), dtype=bool)

    def dense(q, k, v, position_bias, time_bias):
        return dense_hstu(
            jnp, q, k, v, mask, scale=1 / max_len, position_bias=position_bias,
            time_bias=time_bias, timestamps=timestamps,
        )  # fmt: skip

    with jax.enable_x64(True):
        out, pull = jax.vjp(dense, *(jnp.asarray(x, jnp.float64) for x in (*rows, *tables)))
        return [np.asarray(x) for x in (out, *pull(jnp.asarray(d_out, jnp.float64)))]


def test_gradients_by_finite_differences():
    offsets = jnp.asarray([0, 5, 5, 12], jnp.int32)
    arrays = on_device(*qkv(5, 14, heads=1, qk_width=3, v_width=2))
    function = jax.jit(lambda q, k, v: hstu_attention(q, k, v, offsets, max_len=7))
    check_grads(function, arrays, order=1, modes=["rev"], eps=1e-2, atol=5e-3, rtol=5e-3)


def test_a_sequence_alone_equals_itself_in_a_batch():
    lengths = [17, 0, 40, 64]
    offsets, arrays = cases.offsets_of(lengths), qkv(7, sum(lengths))
    together = np.asarray(attend(*on_device(*arrays, offsets), max_len=MAX_LEN))
    for b, length in enumerate(lengths):
        tokens = slice(offsets[b], offsets[b + 1])
        own = [x[tokens] for x in arrays]
        alone = attend(*on_device(*own, cases.offsets_of([length])), max_len=MAX_LEN)
        assert_close(alone, together[tokens])


def test_permuted_sequences_give_permuted_results():
    lengths, order = [9, 33, 1, 20], [2, 0, 3, 1]
    offsets, arrays = cases.offsets_of(lengths), qkv(8, sum(lengths))
    slots = np.concatenate([np.arange(offsets[b], offsets[b + 1]) for b in order])
    moved_offsets = cases.offsets_of([lengths[b] for b in order])
    straight = attend(*on_device(*arrays, offsets), max_len=40)
    moved = attend(*on_device(*(x[slots] for x in arrays), moved_offsets), max_len=40)
    assert_close(moved, np.asarray(straight)[slots])


def test_scale_alpha_and_no_tokens():
    arrays, offsets = qkv(9, 20), cases.offsets_of([20])
    scales = np.linspace(0.1, 1, 20, dtype=np.float32)
    mask = dense_mask(offsets, 20)
    actual = attend(*on_device(*arrays, offsets), max_len=20, alpha=0.3, attn_scale=scales)
    expected = dense_hstu(np, *arrays, mask=mask, alpha=0.3, scale=scales[:, None, None])
    assert_close(actual, expected)
    nothing = [x[:0] for x in arrays]
    assert attend(*on_device(*nothing, cases.offsets_of([0])), max_len=20).shape == (0, 2, 12)


def test_bf16_inputs_are_summed_in_f32():
    offsets = cases.offsets_of([60, 4])
    arrays = [jnp.asarray(x, jnp.bfloat16) for x in qkv(11, 64)]
    actual = attend(*arrays, jnp.asarray(offsets), max_len=60)
    assert actual.dtype == jnp.bfloat16
    wide = [np.asarray(x).astype(np.float64) for x in arrays]
    assert_close(actual, dense_hstu(np, *wide, mask=dense_mask(offsets, 64), scale=1 / 60))


def test_time_buckets_are_exact_at_every_edge():
    edges = np.unique(np.concatenate([2 ** np.arange(31) + d for d in (-2, -1, 0)]))
    edges = edges[(edges >= 0) & (edges < 2**31 - 1)]
    edges = np.unique(np.concatenate([edges, (2 ** (np.arange(61) / 2)).astype(int)]))
    seconds = jnp.asarray(np.concatenate([edges, -edges]), jnp.int32)
    # 4^(bucket / 2) ≤ (1 + s)² in Python's integers: no rounding.
    exact = [(int(1 + abs(s)) ** 2).bit_length() - 1 for s in np.asarray(seconds)]
    np.testing.assert_array_equal(time_bucket(seconds, 100), exact)
    np.testing.assert_array_equal(time_bucket(seconds, 8), np.minimum(exact, 7))


@pytest.mark.parametrize("length", [1024, 4096])
def test_memory_is_linear_in_tokens(length):
    q = jax.ShapeDtypeStruct((length, 1, 16), jnp.float32)
    bias = jax.ShapeDtypeStruct((1, length), jnp.float32)
    offsets = jax.ShapeDtypeStruct((2,), jnp.int32)

    def loss(q, k, v, bias, offsets):
        return hstu_attention(q, k, v, offsets, max_len=length, position_bias=bias).sum()

    compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3))).lower(q, q, q, bias, offsets).compile()
    assert cases.largest_array(compiled) <= length * 128
    memory = compiled.memory_analysis()
    assert memory is not None
    assert memory.temp_size_in_bytes <= 8 * length * 128 * 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_len": 0}, "max_len is 0"),
        ({"max_attn_len": -1}, "max_attn_len is -1"),
        ({"contextual_len": -2}, "contextual_len is -2"),
        ({"min_full_attn_len": -3}, "min_full_attn_len is -3"),
        ({"timestamps": jnp.zeros(4, jnp.int32)}, "both timestamps and time_bias"),
        ({"time_bias": jnp.zeros((2, 4))}, "both timestamps and time_bias"),
    ],
    ids=str,
)
def test_errors(options, message):
    arrays = on_device(*qkv(0, 4), cases.offsets_of([4]))
    with pytest.raises(ValueError, match=message):
        hstu_attention(*arrays, **{"max_len": 4} | options)


@pytest.mark.parametrize(("offsets", "message"), cases.UNSOUND_OFFSETS, ids=str)
def test_unsound_offsets_are_explained_or_give_nan(offsets, message):
    arrays = on_device(*qkv(0, 4), np.array(offsets, np.int32))
    with pytest.raises(ValueError, match=message):
        hstu_attention(*arrays, max_len=3)
    assert np.isnan(attend(*arrays, max_len=3)).all()


def test_a_broken_promise_of_alignment_is_explained():
    arrays = on_device(*qkv(0, 32), cases.offsets_of([8, 16, 3]))
    config = HstuConfig(aligned=True)
    kept = hstu_attention(*arrays, max_len=16, config=config)
    np.testing.assert_array_equal(kept, hstu_attention(*arrays, max_len=16))
    arrays[3] = jnp.asarray(cases.offsets_of([8, 3, 16]))
    with pytest.raises(ValueError, match=r"sequence 2 starts at slot 11, .* multiples of 8: have"):
        hstu_attention(*arrays, max_len=16, config=config)


def test_timestamps_count_by_their_distance_alone():
    args = on_device(*qkv(4, 30), cases.offsets_of([17, 13]))
    bias = jax.tree.map(jnp.asarray, biases(4, 30, max_len=17))
    times = bias.pop("timestamps")  # in no order
    moved, turned = (
        attend(*args, max_len=17, timestamps=x, **bias) for x in (times - 10_000, -times)
    )
    straight = attend(*args, max_len=17, timestamps=times, **bias)
    np.testing.assert_array_equal(moved, straight)
    np.testing.assert_array_equal(turned, straight)


def test_a_named_backend_never_falls_back():
    arrays = on_device(*qkv(0, 4), cases.offsets_of([4]))
    named = hstu_attention(*arrays, max_len=4, backend="xla")
    np.testing.assert_array_equal(named, hstu_attention(*arrays, max_len=4))
    with pytest.raises(BackendError, match="mosaic_gpu"):
        hstu_attention(*arrays, max_len=4, backend="mosaic_gpu")
