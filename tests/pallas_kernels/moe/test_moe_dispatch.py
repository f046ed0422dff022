"""The routing structures equal those of a stable sort, however they are built."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import jaxtyping
import moe_cases as cases
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import BackendError, moe_dispatch
from pallas_kernels._testing import simulate
from pallas_kernels.moe import dispatch as dispatch_module
from pallas_kernels.moe import mosaic_gpu_dispatch
from pallas_kernels.moe.dispatch import group_tiles


def naive(ids, num_experts):
    flat = ids.reshape(-1)
    routed = np.flatnonzero((flat >= 0) & (flat < num_experts))
    order = routed[np.argsort(flat[routed], kind="stable")]
    indices, places = np.full(flat.size, -1), np.full(flat.size, -1)
    indices[: len(order)] = order // ids.shape[1]
    places[order] = np.arange(len(order))
    offsets = np.searchsorted(flat[order], np.arange(num_experts + 1))
    return indices, offsets, flat, places.reshape(ids.shape)


dispatch: Any = jax.jit(moe_dispatch, static_argnames=("num_experts", "method"))


def check(ids, num_experts, method):
    equal(dispatch(jnp.asarray(ids), num_experts=num_experts, method=method), ids, num_experts)


def equal(actual, ids, num_experts):
    for mine, theirs in zip(actual, naive(ids, num_experts), strict=True):
        np.testing.assert_array_equal(mine, theirs)


def random_ids(seed, tokens, slots, num_experts, padded):
    rng = np.random.default_rng(seed)
    return rng.integers(-padded, num_experts + padded, (tokens, slots)).astype(np.int32)


@pytest.mark.parametrize("method", ["count", "sort"])
def test_published_example(method):
    ids = np.array([[2, 3], [0, 1], [0, 3], [1, 2], [0, 3]])
    found = moe_dispatch(ids, num_experts=4, method=method)
    np.testing.assert_array_equal(found.expert_token_indices, [1, 2, 4, 1, 3, 0, 3, 0, 2, 4])
    np.testing.assert_array_equal(found.expert_token_offsets, [0, 3, 5, 7, 10])
    np.testing.assert_array_equal(found.token_index_map[0], [5, 7])


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from([0, 1, 37, 130]),
    st.sampled_from([1, 3]),
    st.just(7),
    st.booleans(),
    st.integers(0, 2**16),
)
def test_equals_a_stable_sort(tokens, slots, num_experts, padded, seed):
    ids = random_ids(seed, tokens, slots, num_experts, padded)
    check(ids, num_experts, "count")
    check(ids, num_experts, "sort")


def ranks_by_definition(ids, *, num_experts, programs):
    """What the kernel is to return, for `programs` shares of whole blocks of 64."""
    ids = np.asarray(ids)
    share = 64 * -(-ids.size // (64 * programs))
    own = ids[:, None] == np.arange(num_experts)
    shares = [own[at : at + share] for at in range(0, ids.size, share)]
    before = np.concatenate([np.cumsum(rows, axis=0) - rows for rows in shares])
    ranks = (before * own).sum(1).astype(np.int32)
    counts = np.stack([rows.sum(0) for rows in shares]).astype(np.int32)
    return jnp.asarray(ranks), jnp.asarray(counts), share


@settings(max_examples=30, deadline=None)
@given(
    st.sampled_from([1, 37, 130]),
    st.sampled_from([1, 3]),
    st.sampled_from([1, 2, 5]),
    st.booleans(),
    st.integers(0, 2**16),
)
def test_shares_of_the_kernel_join_to_a_stable_sort(tokens, slots, programs, padded, seed):
    ids = random_ids(seed, tokens, slots, 7, padded)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dispatch_module, "_backend", lambda *_: "mosaic_gpu")
        kernel = partial(ranks_by_definition, programs=programs)
        patch.setattr(mosaic_gpu_dispatch, "rank_pairs", kernel)
        equal(moe_dispatch(ids, num_experts=7), ids, 7)


@pytest.mark.slow
def test_simulated_kernel_equals_a_stable_sort_without_races():
    """Shares of several blocks, the last one not full; experts that fill columns, and that do not.

    40 experts have ids with digits in two pieces and a padded column; 16 fill theirs.
    """
    cases = [(0, 75, 2, 16, True, 2), (1, 100, 3, 40, True, 2), (2, 65, 1, 256, False, 1)]
    given_ids = [random_ids(*case[:5]) for case in cases]
    calls = [
        ((ids,), {"num_experts": case[3], "programs": case[5]})
        for ids, case in zip(given_ids, cases, strict=True)
    ]
    results = simulate("simulated_moe:dispatched", calls, timeout_s=400)
    for found, ids, case in zip(results, given_ids, cases, strict=True):
        equal(found, ids, case[3])


@pytest.mark.parametrize("num_experts", [1, 4, 72, 256, 1920])
@pytest.mark.parametrize("pairs", [1, 63, 64, 65, 3001])
def test_sizes(pairs, num_experts):
    ids = np.random.default_rng(pairs).zipf(1.3, (pairs, 1)) % num_experts
    for method in ("count", "sort"):
        check(ids.astype(np.int32), num_experts, method)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("pairs", "num_experts", "method"),
    [(2_097_152, 64, "sort"), (524_288, 64, "count"), (100_003, 50_000, None)],
)
def test_large_sizes(pairs, num_experts, method):
    ids = np.random.default_rng(0).integers(0, num_experts, (pairs // 2, 2)).astype(np.int32)
    check(ids, num_experts, method)


def test_counting_is_chosen_for_few_experts_on_a_gpu_and_sorts_nothing():
    def text(num_experts, platform):
        ids = jax.ShapeDtypeStruct((1000, 2), jnp.int32)
        traced = jax.jit(lambda i: moe_dispatch(i, num_experts=num_experts)).trace(ids)
        return traced.lower(lowering_platforms=(platform,)).as_text()

    assert "sort" not in text(256, "cuda").replace("indices_are_sorted", "")
    assert "stablehlo.sort" in text(257, "cuda")
    assert "stablehlo.sort" in text(256, "cpu")


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 20), min_size=4, max_size=4), st.sampled_from([1, 5]))
def test_tiles_cover_every_pair_once_within_one_expert(counts, tile_rows):
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    tiles = group_tiles(jnp.asarray(offsets), 80, tile_rows)
    pairs = [
        (expert, pair)
        for expert, start, size in zip(*map(np.asarray, tiles[:3]), strict=True)
        for pair in range(start, start + size)
    ]
    assert pairs == [
        (e, p) for e, c in enumerate(counts) for p in range(offsets[e], offsets[e] + c)
    ]
    assert int(tiles.used) == int((np.asarray(tiles.size) > 0).sum())


def test_checked_ids_are_named():
    ids = cases.distinct_experts(np.random.default_rng(0), 5, 2, 4)
    moe_dispatch(ids, num_experts=4, checked=True)
    ids[3, 1] = 4
    with pytest.raises(ValueError, match=r"slot 1 of token 3 names expert 4; expected 0 to 3"):
        moe_dispatch(ids, num_experts=4, checked=True)
    with pytest.raises(ValueError, match="outside jit"):
        jax.jit(lambda i: moe_dispatch(i, num_experts=4, checked=True))(ids)


def test_errors(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    ids = np.zeros((3, 2), np.int32)
    with pytest.raises(ValueError, match="2 experts a token, but only 1 exist"):
        moe_dispatch(ids, num_experts=1)
    with pytest.raises(ValueError, match="num_experts is 0"):
        moe_dispatch(ids, num_experts=0)
    with pytest.raises(ValueError, match="method is 'radix'"):
        moe_dispatch(ids, num_experts=3, method="radix")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="method 'sort' is XLA's"):
        moe_dispatch(ids, num_experts=3, method="sort", backend="mosaic_gpu")
    with pytest.raises(BackendError, match="moe_dispatch: backend 'mosaic_gpu' cannot run"):
        moe_dispatch(ids, num_experts=3, backend="mosaic_gpu")


@pytest.mark.gpu
@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("num_experts", [1, 8, 40, 72, 128, 256])
@pytest.mark.parametrize("pairs", [1, 65, 3001, 196_608])
def test_kernel_on_a_gpu(pairs, num_experts):
    ids = random_ids(pairs, pairs, 1, num_experts, True)
    run = jax.jit(partial(moe_dispatch, num_experts=num_experts, backend="mosaic_gpu"))
    assert "moe_dispatch_mosaic_gpu" in (run.lower(ids).compile().as_text() or "")
    equal(run(ids), ids, num_experts)
