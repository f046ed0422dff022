"""The XLA reference of the IVF search against NumPy."""

import dataclasses
from typing import Any

import jaxtyping
import numpy as np
import pytest

from pallas_kernels import BackendError, ivf_search, probed_tiles_bound, quantise, rescore
from pallas_kernels.ivf import IvfConfig
from pallas_kernels.ivf.workloads import WORKLOADS

TINY = WORKLOADS["tiny"]


def bits(words):
    return np.unpackbits(words.view(np.uint8), axis=-1, bitorder="little").astype(bool)


def expected(arrays, k, nprobe):
    """Scores and rows by int64 products and a stable sort."""
    queries = arrays["queries"]
    scales = np.abs(queries).max(axis=1) * (1 / np.float32(127))  # so XLA divides by a constant
    codes = np.round(queries / scales[:, None]).astype(np.int64)
    products = codes @ arrays["codes"].astype(np.int64).T
    scores = products.astype(np.float32) * (scales[:, None] * arrays["scales"])
    probed = np.argsort(-(queries @ arrays["centroids"].T), axis=1)[:, :nprobe]
    lists = np.repeat(np.arange(len(arrays["centroids"])), np.diff(arrays["tile_offsets"]) * 64)
    eligible = np.stack([np.isin(lists, own) for own in probed]) & bits(arrays["live"])
    if arrays["mask"] is not None:
        eligible &= bits(arrays["mask"])
    scores = np.where(eligible, scores, -np.inf)
    rows = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    scores = np.take_along_axis(scores, rows, axis=1)
    return scores, np.where(np.isinf(scores), -1, rows)


def search(arrays, k, nprobe, **options):
    bound = probed_tiles_bound(arrays["tile_offsets"], nprobe)
    return ivf_search(*arrays.values(), k=k, nprobe=nprobe, max_tiles=bound, **options)


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("nprobe", [1, 4, 12])
@pytest.mark.parametrize("k", [10, 3_000])
def test_equals_numpy(k, nprobe, masked):
    arrays: dict[str, Any] = TINY.arrays()
    if not masked:
        arrays["mask"] = None
    scores, rows = expected(arrays, k, nprobe)
    # Blocks that do not divide queries, rows or tiles: every edge of the two loops.
    found = search(arrays, k, nprobe, config=IvfConfig(query_block=2, row_block=192))
    width = min(k, rows.shape[1])
    np.testing.assert_array_equal(found.scores[:, :width], scores)
    np.testing.assert_array_equal(np.sort(found.rows[:, :width]), np.sort(rows))
    assert (np.asarray(found.rows)[:, width:] == -1).all()
    assert np.isneginf(np.asarray(found.scores)[:, width:]).all()


@pytest.mark.parametrize("nprobe", [3, 12])
def test_blocks_do_not_change_the_result(nprobe):
    arrays = TINY.arrays(1)
    whole = search(arrays, 50, nprobe)
    for config in (IvfConfig(1, 64), IvfConfig(5, 128), IvfConfig(64, 1 << 20)):
        cut = search(arrays, 50, nprobe, config=config)
        np.testing.assert_array_equal(whole.scores, cut.scores)
        np.testing.assert_array_equal(np.sort(whole.rows), np.sort(cut.rows))


def test_queries_may_share_masks():
    arrays = TINY.arrays(3)
    mask_of_query = np.array([2, 0, 0, 2, 1], np.int32)
    shared = search(arrays | {"mask": arrays["mask"][:3]}, 50, 4, mask_of_query=mask_of_query)
    own = search(arrays | {"mask": arrays["mask"][mask_of_query]}, 50, 4)
    assert np.asarray(own.complete).all()
    for a, b in zip(shared, own, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("nprobe", [7, 12])
def test_each_query_may_scan_its_own_number_of_lists(nprobe):
    arrays = TINY.arrays(4)
    probes = np.array([0, 1, 4, nprobe, 3], np.int32)
    together = search(arrays, 50, nprobe, probes=probes)
    assert (np.asarray(together.rows)[0] == -1).all()
    for query, own in enumerate(probes[1:], start=1):
        scores, rows = expected(arrays, 50, own)
        np.testing.assert_array_equal(together.scores[query], scores[query])
        np.testing.assert_array_equal(np.sort(together.rows[query]), np.sort(rows[query]))


def test_float_rows_are_scored_in_float():
    arrays = TINY.arrays(2)
    arrays["codes"] = arrays["codes"].astype(np.float32) / 3
    found = search(arrays, 20, 12)
    scores = arrays["queries"].astype(np.float64) @ arrays["codes"].T.astype(np.float64)
    scores = np.where(
        bits(arrays["live"]) & bits(arrays["mask"]), scores * arrays["scales"], -np.inf
    )
    np.testing.assert_allclose(found.scores, -np.sort(-scores, axis=1)[:, :20], rtol=1e-5)


def test_an_empty_mask_finds_nothing():
    arrays = TINY.arrays()
    arrays["mask"][:] = 0
    for nprobe in (4, 12):
        found = search(arrays, 7, nprobe)
        assert (np.asarray(found.rows) == -1).all()
        assert np.isneginf(np.asarray(found.scores)).all()


def test_no_queries():
    arrays = dataclasses.replace(TINY, num_queries=0).arrays()
    assert search(arrays, 7, 4).rows.shape == (0, 7)


def test_quantise():
    x = np.array([[0, 0, 0], [1, -2, 0.5], [1e-20, 0, 0]], np.float32)
    codes, scales = quantise(x)
    np.testing.assert_array_equal(codes, [[0, 0, 0], [64, -127, 32], [127, 0, 0]])
    np.testing.assert_allclose(scales, [0, 2 / 127, 1e-20 / 127])


def test_rescore():
    rng = np.random.default_rng(0)
    queries, vectors = rng.normal(size=(3, 8)), rng.normal(size=(20, 8))
    rows = rng.integers(-1, 20, (3, 6)).astype(np.int32)
    rows[0, 0] = -1
    found = rescore(queries.astype(np.float32), vectors.astype(np.float32), rows)
    want = np.take_along_axis(queries @ vectors.T, np.maximum(rows, 0), axis=1)
    np.testing.assert_allclose(found, np.where(rows >= 0, want, -np.inf), rtol=1e-5, atol=1e-6)


def test_bound_is_that_of_the_largest_lists():
    assert probed_tiles_bound(np.array([0, 3, 3, 8, 9], np.int32), 2) == 8


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({}, {"k": 0}, "k is 0; expected 1 to 16384"),
        ({}, {"k": 16_385}, "k is 16385"),
        ({}, {"nprobe": 13}, "nprobe is 13; the index has 1 to 12 lists"),
        ({"queries": np.zeros((5, 8), np.float32)}, {}, "queries are 8 wide"),
        ({"tile_offsets": np.zeros(3, np.int32)}, {}, "tile_offsets has 3 entries; expected 13"),
        ({"mask": np.zeros((5, 1), np.uint32)}, {}, "expected 76 words"),
        ({"mask": np.zeros((4, 76), np.uint32)}, {}, "4 masks for 5 queries"),
    ],
)
def test_clear_errors(changes, options, message, monkeypatch):
    # Outside of tests nothing checks the annotations: the messages must.
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    arrays = TINY.arrays() | changes
    with pytest.raises(ValueError, match=message):
        ivf_search(*arrays.values(), **({"k": 5, "nprobe": 2, "max_tiles": 9} | options))


def test_a_named_backend_never_falls_back():
    with pytest.raises(BackendError, match="mosaic_gpu"):
        search(TINY.arrays(), 5, 2, backend="mosaic_gpu")
