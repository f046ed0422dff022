"""Dropout, normalisation and the causal filter against their formulas."""

from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.test_util import check_grads

from jaxrec.ops.layers import causal_filter, dropout, hash_bits, layer_norm

T, D = 18, 3
apply_filter = jax.jit(causal_filter)


def test_dropout_without_a_key_or_a_rate_is_the_identity():
    x = jnp.arange(6.0).reshape(2, 3)
    assert dropout(x, 0.5, None) is x
    assert dropout(x, 0.0, jax.random.key(0)) is x


def test_dropout_of_nearly_everything():
    dropped = dropout(jnp.ones((20, 20)), 1 - 1e-12, jax.random.key(0))
    np.testing.assert_array_equal(dropped, 0)


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_dropout_keeps_the_mean_and_drops_its_share(rate):
    x = jnp.full((200, 500), 2.0, jnp.bfloat16)
    out = np.asarray(dropout(x, rate, jax.random.key(1)), np.float32)
    share = (out == 0).mean()
    assert share == pytest.approx(rate, abs=5 * np.sqrt(rate * (1 - rate) / x.size))
    np.testing.assert_allclose(out[out != 0], 2 / (1 - rate), rtol=1e-2)
    again = np.asarray(dropout(x, rate, jax.random.key(2)), np.float32)
    assert ((out == 0) != (again == 0)).any()


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg"])
def test_hashed_bits_are_independent_of_place_and_key(impl):
    keys = jax.random.split(jax.random.key(5, impl=impl), 4)
    words = np.stack([np.asarray(hash_bits(key, (512, 64))) for key in keys])
    bits = np.unpackbits(words.view(np.uint8).reshape(4, 512, 64, 4), axis=-1, bitorder="little")
    signs = 2.0 * bits.reshape(4, 512, 64, 32) - 1
    noise = 5.5 / np.sqrt(512 * 64)  # standard deviations of a mean; some 500 of them are looked at
    assert np.abs(signs.mean((1, 2))).max() < noise
    for axis, lag in ((0, 1), (0, 2), (1, 1), (1, 7), (2, 1), (2, 8), (3, 1), (3, 16)):
        beside = (signs * np.roll(signs, lag, axis)).mean((1, 2))
        assert np.abs(beside).max() < noise, (axis, lag)
    assert len(np.unique(words)) > words.size - 50  # birthdays: 4 are expected


def test_dropout_drops_the_gradient_of_the_same_elements():
    x, key = jnp.ones((8, 8)), jax.random.key(3)
    grad = jax.grad(lambda x: dropout(x, 0.4, key).sum())(x)
    np.testing.assert_array_equal(grad, dropout(x, 0.4, key))


def test_layer_norm_equals_float64():
    rng = np.random.default_rng(0)
    x = rng.normal(5, 3, size=(2, 4, 16)).astype(np.float32)
    scale, bias = rng.normal(size=(2, 16)).astype(np.float32)
    wide = x.astype(np.float64)
    normed = (wide - wide.mean(-1, keepdims=True)) / np.sqrt(wide.var(-1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(layer_norm(jnp.asarray(x)), normed, atol=1e-5)
    scaled = layer_norm(jnp.asarray(x), jnp.asarray(scale), jnp.asarray(bias))
    np.testing.assert_allclose(scaled, normed * scale + bias, atol=2e-5)
    half = layer_norm(jnp.asarray(x, jnp.bfloat16), jnp.asarray(scale), jnp.asarray(bias))
    assert half.dtype == jnp.bfloat16
    check_grads(jax.jit(layer_norm), (jnp.asarray(x[0]),), 1, ["rev"], eps=1e-2, atol=1e-2)


def test_layer_norm_of_a_constant_row_is_zero():
    x = jnp.full((2, 8), 7.0)
    np.testing.assert_array_equal(layer_norm(x), 0)
    assert np.isfinite(jax.grad(lambda x: layer_norm(x)[0, 0])(x)).all()


def naive_filter(x, offsets, taps):
    out = np.zeros(x.shape)
    for start, end in pairwise(offsets):
        for t in range(start, end):
            for n in range(min(len(taps), t - start + 1)):
                out[t] += taps[n] * x[t - n]
    return out


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.integers(0, 6), min_size=3, max_size=3),
    st.sampled_from([1, 4, 30]),
    st.integers(0, 2**16),
)
def test_causal_filter_equals_the_naive_loop(lengths, num_taps, seed):
    rng = np.random.default_rng(seed)
    offsets = np.cumsum([0, *lengths]).astype(np.int32)
    x = rng.normal(size=(T, D)).astype(np.float32)
    taps = rng.normal(size=(num_taps, D)).astype(np.float32)
    actual = apply_filter(*map(jnp.asarray, (x, offsets, taps)))
    end = offsets[-1]
    np.testing.assert_allclose(actual[:end], naive_filter(x, offsets, taps)[:end], atol=1e-5)


def test_causal_filter_gradients_and_bf16():
    rng = np.random.default_rng(4)
    x, taps = jnp.asarray(rng.normal(size=(8, D))), jnp.asarray(rng.normal(size=(4, D)))
    offsets = jnp.asarray([0, 3, 8], jnp.int32)
    filtered = jax.jit(lambda x, taps: causal_filter(x, offsets, taps))
    check_grads(filtered, (x, taps), 1, ["rev"], eps=1e-2, atol=5e-3, rtol=5e-3)
    long = jnp.asarray(rng.normal(size=(75, D)), jnp.float32)  # several groups of rows
    ends = jnp.asarray([0, 30, 33, 71], jnp.int32)
    weight = jnp.asarray(rng.normal(size=(75, D)), jnp.float32).at[71:].set(0)
    dtaps = jax.grad(lambda taps: (causal_filter(long, ends, taps) * weight).sum())(taps)
    for n in range(4):
        one_hot = np.zeros((4, D))
        one_hot[n] = 1
        expected = (naive_filter(long, ends, one_hot) * weight).sum(0)
        np.testing.assert_allclose(dtaps[n], expected, atol=1e-4)
    half = filtered(x.astype(jnp.bfloat16), taps)
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(half, np.float32), filtered(x, taps), atol=0.1)
