"""Attention to a cache equals the last rows of attention over whole sequences."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import offsets_of

from pallas_kernels import BackendError, hstu_attention, hstu_attention_cached
from pallas_kernels._testing import assert_close, simulate
from pallas_kernels.hstu_attention.config import HstuConfig
from pallas_kernels.hstu_attention.tiles import Mask

BUCKETS = 12
CALL = "simulated_hstu:whole_and_cached"


def whole(lengths, *, max_len, widths=(8, 12), heads=2, dtype="float32", seed=0) -> dict[str, Any]:
    """Arguments of `hstu_attention` with both biases."""
    rng = np.random.default_rng(seed)
    tokens = sum(lengths)
    shapes = {"q": widths[0], "k": widths[0], "v": widths[1]}
    arrays = {
        name: np.asarray(rng.standard_normal((tokens, heads, width)), jnp.dtype(dtype))
        for name, width in shapes.items()
    }
    return arrays | {
        "seq_offsets": offsets_of(lengths),
        "position_bias": rng.standard_normal((heads, max_len)).astype(np.float32),
        "time_bias": rng.standard_normal((heads, BUCKETS)).astype(np.float32),
        "timestamps": rng.integers(0, 300, tokens).astype(np.int32),
    }


def cached(arrays, new, capacity) -> dict[str, Any]:
    """The same for `hstu_attention_cached`; unused slots hold large values."""
    offsets = arrays["seq_offsets"]
    lengths = np.diff(offsets)
    place = np.arange(capacity)
    slots = np.minimum(offsets[:-1, None] + place, len(arrays["q"]) - 1)

    def cache(x):
        inside = (place < lengths[:, None]).reshape(*slots.shape, *[1] * (x.ndim - 1))
        return np.where(inside, x[slots], np.asarray(1e4, x.dtype))

    queries = np.maximum(offsets[1:, None] - new + np.arange(new), 0)
    names = ("position_bias", "time_bias")
    return {name: arrays[name] for name in names} | {
        "q": arrays["q"][queries],
        **{name: cache(arrays[name]) for name in ("k", "v", "timestamps")},
        "lengths": lengths.astype(np.int32),
    }


def last_rows(out, offsets, new):
    """[B, new, …] of the last tokens, zeros before the first."""
    rows = np.asarray(out)[np.maximum(offsets[1:, None] - new + np.arange(new), 0)]
    real = np.arange(new) >= new - np.diff(offsets)[:, None]
    return np.where(real[:, :, None, None], rows, 0)


@pytest.mark.parametrize(
    ("lengths", "new", "capacity", "targets", "mask"),
    [
        ([30, 1, 0, 17], 1, 30, None, Mask()),
        ([30, 5, 0, 17], 8, 64, None, Mask(max_attn_len=6)),
        ([40, 24], 12, 41, [10, 0], Mask(9, 3, 4)),
        ([20, 33], 33, 40, [2, 5], Mask(0, 2, 0)),
        ([600, 513], 3, 601, None, Mask()),
    ],
)
def test_equals_the_last_rows_of_whole_sequences(lengths, new, capacity, targets, mask):
    max_len = max(lengths)
    arrays = whole(lengths, max_len=max_len)
    options: Any = {
        "max_len": max_len,
        "alpha": 0.4,
        "num_targets": None if targets is None else jnp.asarray(targets, jnp.int32),
        **mask._asdict(),
    }
    whole_call = jax.jit(lambda arrays: hstu_attention(**arrays, **options))
    want = whole_call(jax.tree.map(jnp.asarray, arrays))
    own = jax.tree.map(jnp.asarray, cached(arrays, new, capacity))
    got = jax.jit(lambda own: hstu_attention_cached(**own, **options))(own)
    assert_close(got, last_rows(want, arrays["seq_offsets"], new))


def test_scale_for_each_query_and_half_precision():
    arrays = whole([20, 9], max_len=20, dtype="bfloat16")
    own = jax.tree.map(jnp.asarray, cached(arrays, 4, 24))
    scale = jnp.linspace(0.1, 1, 8).reshape(2, 4)
    got = hstu_attention_cached(**own, max_len=20, attn_scale=scale)
    assert got.dtype == jnp.bfloat16
    own |= {name: own[name].astype(jnp.float32) for name in ("q", "k", "v")}
    want = hstu_attention_cached(**own, max_len=20, attn_scale=1.0) * scale[:, :, None, None]
    assert_close(got, want)


def test_an_empty_cache_gives_zeros():
    own = jax.tree.map(jnp.asarray, cached(whole([3], max_len=4), 2, 3))
    own |= {name: own[name][:, :0] for name in ("k", "v", "timestamps")}
    assert not np.any(hstu_attention_cached(**own | {"lengths": jnp.zeros(1, int)}, max_len=4))


def test_bad_calls_are_explained():
    own = jax.tree.map(jnp.asarray, cached(whole([5], max_len=8), 1, 8))
    with pytest.raises(ValueError, match="both timestamps and time_bias"):
        hstu_attention_cached(**own | {"timestamps": None}, max_len=8)
    with pytest.raises(BackendError, match="hstu_attention_cached: backend 'mosaic_gpu'"):
        hstu_attention_cached(**own, max_len=8, backend="mosaic_gpu")
    with pytest.raises(NotImplementedError, match="train with hstu_attention"):
        jax.grad(lambda q: hstu_attention_cached(**own | {"q": q}, max_len=8).sum())(own["q"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("new", "capacity", "targets", "mask", "dtype"),
    [
        (1, 136, None, Mask(), "bfloat16"),
        (70, 131, [3, 0, 20], Mask(40, 2, 10), "bfloat16"),
        (3, 131, None, Mask(), "float32"),
    ],
)
def test_simulated_kernel_gives_the_bits_of_whole_sequences(new, capacity, targets, mask, dtype):
    lengths = [65, 3, 130]
    arrays = whole(lengths, max_len=130, widths=(32, 32), heads=1, dtype=dtype)
    own = cached(arrays, new, capacity)
    targets = None if targets is None else np.minimum(targets, lengths).astype(np.int32)
    static = {"alpha": 0.2, "mask": mask, "config": HstuConfig(programs=2)}
    [(out, got)] = simulate(CALL, [((arrays, own, targets), static)], timeout_s=280)
    np.testing.assert_array_equal(got, last_rows(out, arrays["seq_offsets"], new))
