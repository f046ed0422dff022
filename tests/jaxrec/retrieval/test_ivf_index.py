"""The inverted file against brute force in float64."""

import jax
import numpy as np
import pytest

from jaxrec.retrieval import IVFIndex, tune_nprobe
from jaxrec.retrieval.kmeans import assign, kmeans
from jaxrec.retrieval.masks import pack_bits

N, D, NLIST = 3_000, 24, 20


@pytest.fixture(scope="module")
def rows():
    rng = np.random.default_rng(0)
    return (rng.normal(size=(N, D)) * np.exp(rng.normal(size=(N, 1)) * 0.3)).astype(np.float32)


@pytest.fixture(scope="module")
def queries():
    return np.random.default_rng(1).normal(size=(13, D)).astype(np.float32)


@pytest.fixture(scope="module")
def index(rows):
    return IVFIndex.build(rows, nlist=NLIST, key=jax.random.key(0))


def top(queries, rows, k, eligible=None):
    scores = queries.astype(np.float64) @ rows.astype(np.float64).T
    if eligible is not None:
        scores = np.where(eligible, scores, -np.inf)
    order = np.argsort(-scores, axis=1)[:, :k]
    return order, np.take_along_axis(scores, order, axis=1)


def recall(want, got):
    return np.mean([np.isin(w, g).mean() for w, g in zip(want, np.asarray(got), strict=True)])


@pytest.mark.parametrize(
    ("precision", "least"), [("int8", 0.985), ("rescored", 0.998), ("float", 1)]
)
def test_full_probes_equal_brute_force(index, rows, queries, precision, least):
    want, scores = top(queries, rows, 100)
    found = index.search(queries, k=100, nprobe=NLIST, precision=precision)
    assert recall(want, found.ids) >= least
    assert (np.asarray(found.filled) == 100).all()
    assert (np.diff(np.asarray(found.scores), axis=1) <= 0).all()
    if precision == "int8":
        assert not np.asarray(found.exact).any()
        np.testing.assert_allclose(found.scores, scores, rtol=0.02, atol=0.05)
    else:
        np.testing.assert_allclose(found.scores, scores, rtol=1e-5)
    if precision == "float":
        assert np.asarray(found.exact).all()


def test_the_certificate_tells_the_truth(index, rows, queries):
    want, _ = top(queries, rows, 10)
    found = index.search(queries, k=10, nprobe=NLIST)
    exact = np.asarray(found.exact)
    assert exact.any()
    np.testing.assert_array_equal(np.asarray(found.ids)[exact], want[exact])
    assert not np.asarray(index.search(queries, k=10, nprobe=5).exact).any()


def test_probing_scans_the_best_lists_only(index, rows, queries):
    found = index.search(queries, k=50, nprobe=5, precision="float")
    lists = np.asarray(assign(rows, index.centroids))
    probed = np.argsort(-(queries @ np.asarray(index.centroids).T), axis=1)[:, :5]
    eligible = np.stack([np.isin(lists, own) for own in probed])
    want, scores = top(queries, rows, 50, eligible)
    np.testing.assert_array_equal(found.ids, want)
    np.testing.assert_allclose(found.scores, scores, rtol=1e-5)


@pytest.mark.parametrize("nprobe", [5, NLIST])
def test_masked_search_returns_eligible_items_only(index, rows, queries, nprobe):
    eligible = np.random.default_rng(2).random((len(queries), N)) < 0.1
    eligible[3] = False
    eligible[4, 7:] = False
    eligible[4, :7] = True
    mask = np.stack([pack_bits(row) for row in eligible])
    found = index.search(queries, k=200, nprobe=nprobe, mask=mask, precision="float")
    ids, filled = np.asarray(found.ids), np.asarray(found.filled)
    for query, own in enumerate(ids):
        assert eligible[query, own[: filled[query]]].all()
        assert len(set(own[: filled[query]])) == filled[query]
        assert (own[filled[query] :] == -1).all()
    assert np.isneginf(np.asarray(found.scores)[ids == -1]).all()
    if nprobe == NLIST:
        np.testing.assert_array_equal(filled, np.minimum(eligible.sum(axis=1), 200))
        want, _ = top(queries, rows, 200, eligible)
        np.testing.assert_array_equal(ids[0], want[0])
        by_row = eligible[:, np.maximum(np.asarray(index.row_ids), 0)]
        row_mask = np.stack([pack_bits(row) for row in by_row])
        same = index.search(queries, k=200, nprobe=nprobe, mask=row_mask, mask_order="row",
                            precision="float")  # fmt: skip
        np.testing.assert_array_equal(same.ids, ids)


def test_items_beyond_the_mask_are_not_eligible(index, queries):
    mask = np.full((len(queries), 2), 0xFFFFFFFF, np.uint32)
    found = index.search(queries, k=100, nprobe=NLIST, mask=mask)
    np.testing.assert_array_equal(
        np.sort(found.ids, axis=1)[:, 36:], [np.arange(64)] * len(queries)
    )


def test_cosine(rows, queries):
    index = IVFIndex.build(rows, nlist=NLIST, key=jax.random.key(0), metric="cosine")
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    unit_queries = queries / np.linalg.norm(queries, axis=1, keepdims=True)
    want, scores = top(unit_queries, unit, 30)
    found = index.search(queries, k=30, nprobe=NLIST)
    assert recall(want, found.ids) >= 0.998
    np.testing.assert_allclose(found.scores, scores, rtol=1e-5)


def test_layout(index, rows):
    row_ids, offsets = np.asarray(index.row_ids), np.asarray(index.tile_offsets)
    assert sorted(row_ids[row_ids >= 0]) == list(range(N))
    lists = np.repeat(np.arange(NLIST), np.diff(offsets) * 64)
    held = row_ids >= 0
    np.testing.assert_array_equal(
        lists[held], np.asarray(assign(rows, index.centroids))[row_ids[held]]
    )
    assert not np.asarray(index.codes)[~held].any()
    np.testing.assert_array_equal(index.vectors, np.where(held[:, None], rows[row_ids], 0))
    largest = np.abs(rows[row_ids[held]]).max(axis=1)
    np.testing.assert_allclose(np.asarray(index.scales)[held], largest / 127, rtol=1e-6)
    decoded = np.asarray(index.codes)[held] * np.asarray(index.scales)[held, None]
    assert (np.abs(decoded - rows[row_ids[held]]) <= largest[:, None] / 253).all()


def test_upsert_and_delete_equal_a_new_build(index, rows, queries):
    rng = np.random.default_rng(5)
    ids = np.array([7, 2_999, 3_000, 10_000])
    changed = 3 * rng.normal(size=(4, D)).astype(np.float32)
    gone = np.array([0, 7, 55])
    updated = index.upsert(ids, changed).delete(gone)
    all_ids = np.concatenate([np.setdiff1d(np.arange(N), [*ids, *gone]), ids[1:]])
    all_rows = np.concatenate([rows[all_ids[:-3]], changed[1:]])
    fresh = IVFIndex.build(all_rows, nlist=NLIST, key=jax.random.key(1), row_ids=all_ids)
    assert updated.num_items == fresh.num_items == N - 1
    a = updated.search(queries, k=100, nprobe=NLIST, precision="float")
    b = fresh.search(queries, k=100, nprobe=NLIST, precision="float")
    np.testing.assert_array_equal(a.ids, b.ids)
    held = np.asarray(updated.row_ids)
    assert sorted(held[held >= 0]) == sorted(all_ids)
    assert not np.isin(gone, a.ids).any()
    assert np.isin(7, np.asarray(index.row_ids))  # the old index is what it was


def test_deletes_keep_rows_in_place(index, queries):
    after = index.delete(np.array([3]))
    np.testing.assert_array_equal(after.codes, index.codes)
    everything = after.search(queries[:1], k=N - 1, nprobe=NLIST, precision="int8")
    assert set(np.asarray(everything.ids)[0]) == set(range(N)) - {3}
    with pytest.raises(ValueError, match="item 3 cannot be deleted"):
        after.delete(np.array([3]))


def test_the_key_decides_the_index(rows):
    first, again, other = (
        IVFIndex.build(rows, nlist=NLIST, key=jax.random.key(seed)) for seed in (3, 3, 4)
    )
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(a, b)
    assert not np.array_equal(first.centroids, other.centroids)


def test_bfloat16_rows_are_never_called_exact(rows, queries):
    index = IVFIndex.build(rows, nlist=NLIST, key=jax.random.key(0), vector_dtype="bfloat16")
    found = index.search(queries, k=100, nprobe=NLIST)
    assert recall(top(queries, rows, 100)[0], found.ids) >= 0.985
    assert not np.asarray(found.exact).any()


def test_tuned_nprobe_reaches_the_recall(index, rows):
    nprobe, promised = tune_nprobe(index, rows, recall=0.9, k=50)
    assert 1 < nprobe < NLIST
    want, _ = top(rows, rows, 50)
    found = index.search(rows, k=50, nprobe=nprobe, precision="float")
    assert recall(want, found.ids) == pytest.approx(promised, abs=2e-3)
    assert promised >= 0.9


def test_kmeans_leaves_no_cluster_empty_for_distinct_points():
    centres = np.repeat(np.arange(8.0)[:, None] * 10, 3, axis=1).astype(np.float32)
    points = np.concatenate([np.repeat(centres[:1], 93, axis=0), centres[1:]])
    points += np.random.default_rng(0).normal(size=points.shape).astype(np.float32) * 1e-3
    found = kmeans(jax.random.key(0), points, 8)
    assert len(set(np.asarray(assign(points, found)).tolist())) == 8


@pytest.mark.parametrize("metric", ["ip", "cosine"])
def test_vectors_of_length_zero_score_zero(rows, queries, metric):
    rows, queries = rows[:200].copy(), queries[:3].copy()
    rows[[5, 99]], queries[0] = 0, 0
    index = IVFIndex.build(rows, nlist=4, key=jax.random.key(0), metric=metric)
    found = index.search(queries, k=200, nprobe=4)
    assert np.isfinite(np.asarray(found.scores)).all()
    assert np.asarray(found.filled).tolist() == [200] * 3
    assert not np.asarray(found.scores)[0].any()
    ids, scores = np.asarray(found.ids[1:]), np.asarray(found.scores[1:])
    assert not scores[np.isin(ids, [5, 99])].any()


def test_clear_errors(index, rows, queries):
    key = jax.random.key(0)
    bad = rows.copy()
    bad[41, 3] = np.nan
    with pytest.raises(ValueError, match=r"row 41 \(item 141\) has a NaN"):
        IVFIndex.build(bad, nlist=4, key=key, row_ids=np.arange(100, 100 + N))
    bad[41, 3] = -np.inf
    with pytest.raises(ValueError, match=r"row 41 \(item 41\) has a NaN or an infinity"):
        IVFIndex.build(bad, nlist=4, key=key)
    with pytest.raises(ValueError, match="no items to index; begin with LiveIndex"):
        IVFIndex.build(rows[:0], nlist=1, key=key)
    with pytest.raises(ValueError, match="item 9999 cannot be deleted: the index does not hold it"):
        index.delete(np.array([3, 9999]))
    with pytest.raises(ValueError, match="item id 5 is given more than once"):
        IVFIndex.build(rows[:2], nlist=1, key=key, row_ids=np.array([5, 5]))
    with pytest.raises(ValueError, match="nlist is 3; expected 1 to 2"):
        IVFIndex.build(rows[:2], nlist=3, key=key)
    with pytest.raises(ValueError, match=f"k is {N + 1}; expected 1 to {N}"):
        index.search(queries, k=N + 1, nprobe=1)
    with pytest.raises(ValueError, match=f"nprobe is 21; expected 1 to {NLIST}"):
        index.search(queries, k=1, nprobe=21)
    with pytest.raises(ValueError, match="queries are 23 wide; the index holds 24"):
        index.search(queries[:, 1:], k=1, nprobe=1)
    with pytest.raises(ValueError, match="1 masks for 13 queries"):
        index.search(queries, k=1, nprobe=1, mask=np.zeros((1, 4), np.uint32))
    with pytest.raises(ValueError, match="row-order mask"):
        index.search(queries, k=1, nprobe=1, mask=np.zeros((13, 4), np.uint32), mask_order="row")
    with pytest.raises(ValueError, match=r"expected \[N, D\]"):
        index.upsert(np.array([1, 2]), rows[:1])
