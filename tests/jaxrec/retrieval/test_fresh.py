"""An index under updates against brute force and against indexes built from scratch."""

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx
from mean_tower import MeanTower

from jaxrec.ops.jagged import JaggedBatch
from jaxrec.retrieval import (
    Drift,
    FilterError,
    FreshFullError,
    ItemIndex,
    LiveIndex,
    LiveServer,
    Retriever,
    brute_force,
    fresh,
)
from jaxrec.retrieval.planner import is_small

N, D, K, CAPACITY = 600, 12, 20, 256
FILTERS = ["colour:red", "tag IN [1, 2] AND NOT colour:blue", None, "NOT tag:new"]
COLOURS = ("red", "green", "blue")


def random_items(rng, count):
    """(vectors, features, columns) of so many items."""
    vectors = (rng.normal(size=(count, D)) + 1).astype(np.float32)
    colours = [COLOURS[i] for i in rng.integers(0, 3, count)]
    tags = [[str(t) for t in rng.choice(9, rng.integers(0, 4), replace=False)] for _ in colours]
    return vectors, {"colour": colours, "tag": tags}, {"price": rng.random(count, np.float32)}


class Catalogue:
    """The same items as an index under test, in dictionaries."""

    def __init__(self):
        self.vectors, self.colours, self.tags, self.prices = {}, {}, {}, {}

    def upsert(self, ids, vectors, features, columns):
        for i, item in enumerate(np.asarray(ids).tolist()):
            self.vectors[item], self.prices[item] = vectors[i], columns["price"][i]
            self.colours[item] = features["colour"][i]
            self.tags[item] = set(map(str, features["tag"][i] or ()))

    def delete(self, ids):
        for item in np.asarray(ids).tolist():
            for values in (self.vectors, self.colours, self.tags, self.prices):
                del values[item]

    def passes(self, which, item):
        colour, tags = self.colours[item], self.tags[item]
        return (
            colour == "red",
            bool(tags & {"1", "2"}) and colour != "blue",
            True,
            "new" not in tags,
        )[which]

    def top(self, queries, k):
        """Ids of the k best items of each query that pass FILTERS, by float64."""
        ids = np.array(sorted(self.vectors))
        table = np.zeros((max(ids, default=0) + 1, D), np.float32)
        for item in ids:
            table[item] = self.vectors[item]
        rows = [
            brute_force(queries[[q]], table, np.array(own, np.int32), k=k)
            for q in range(len(FILTERS))
            for own in [[item for item in ids.tolist() if self.passes(q, item)]]
        ]
        return np.concatenate(rows)


@pytest.fixture(scope="module")
def queries():
    return np.random.default_rng(7).normal(size=(len(FILTERS), D)).astype(np.float32)


@pytest.fixture(scope="module")
def built():
    """(index, catalogue) of the items 0..N-1; a test takes a copy of the catalogue."""
    vectors, features, columns = random_items(np.random.default_rng(0), N)
    main = ItemIndex.build(vectors, features, key=jax.random.key(0), columns=columns, nlist=8)
    catalogue = Catalogue()
    catalogue.upsert(range(N), vectors, features, columns)
    return LiveIndex.build(main, capacity=CAPACITY), catalogue


@pytest.fixture
def live(built):
    index, catalogue = built
    own = Catalogue()
    for name, values in vars(catalogue).items():
        setattr(own, name, dict(values))
    return index, own


def search(index, queries, k=K, exact=True):
    return index.search(queries, index.compile(FILTERS), k=k, exact=exact)


def check(index, catalogue, queries):
    """The index finds, holds and counts what the catalogue holds."""
    want = catalogue.top(queries, K)
    found = search(index, queries)
    np.testing.assert_array_equal(found.ids, want)
    np.testing.assert_array_equal(found.filled, (want >= 0).sum(axis=1))
    assert np.asarray(found.exact).all()
    for query, ids, scores in zip(queries, want, np.asarray(found.scores), strict=True):
        exact = [query @ catalogue.vectors[i] if i >= 0 else -np.inf for i in ids.tolist()]
        np.testing.assert_allclose(scores, exact, rtol=1e-5, atol=1e-5)
    prices = [[catalogue.prices.get(i, 0) for i in ids] for ids in want.tolist()]
    np.testing.assert_array_equal(index.gather(want)["price"], np.array(prices, np.float32))
    assert index.num_items == len(catalogue.vectors)


def random_update(rng, index, catalogue, size):
    """The index and catalogue after one random update of items 0..2N."""
    held = np.array(sorted(catalogue.vectors))
    if rng.random() < 0.35 and len(held) > size:
        ids = rng.choice(held, size, replace=False)
        catalogue.delete(ids)
        return index.delete(ids)
    ids = rng.choice(2 * N, size, replace=False)  # new, overwritten and reinserted ones
    items = random_items(rng, size)
    catalogue.upsert(ids, *items)
    return index.upsert(ids, *items)


def test_updates_show_in_the_next_search_and_leave_the_old_index(live, queries):
    index, catalogue = live
    check(index, catalogue, queries)
    before = search(index, queries)
    vectors = np.stack([9 * queries[0], 8 * queries[0], 7 * queries[3]])
    items = vectors, {"colour": ["red"] * 3, "tag": [["new"], None, "1"]}, {
        "price": np.array([1, 2, 3], np.float32)
    }  # fmt: skip
    catalogue.upsert([3, 5_000, 5_001], *items)
    updated = index.upsert([3, 5_000, 5_001], *items)
    check(updated, catalogue, queries)
    np.testing.assert_array_equal(np.asarray(search(updated, queries).ids)[0, :2], [3, 5_000])
    gone = np.array([5_000, *np.asarray(before.ids)[2, :3]])
    catalogue.delete(gone)
    updated = updated.delete(gone)
    check(updated, catalogue, queries)
    for a, b in zip(before, search(index, queries), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_reinserted_item_comes_back_with_its_new_attributes(live, queries):
    index, catalogue = live
    for colour in ("red", "blue", "red"):
        item = 9 * queries[:1], {"colour": [colour], "tag": [None]}, {"price": np.ones(1)}
        catalogue.upsert([N], *item)
        index = index.upsert([N], *item)
        check(index, catalogue, queries)
        catalogue.delete([N])
        index = index.delete([N])
        check(index, catalogue, queries)


def test_excluded_items_are_left_out_of_both_parts(live, queries):
    index, _ = live
    _, features, columns = random_items(np.random.default_rng(1), 1)
    index = index.upsert([N + 5], 9 * queries[2:3], features, columns)
    first = np.asarray(search(index, queries).ids)
    exclude = np.stack([first[:, 0], first[:, 1], np.full(4, -1)], axis=1)
    found = index.search(queries, index.compile(FILTERS), k=K, exact=True, exclude=exclude)
    np.testing.assert_array_equal(np.asarray(found.ids)[:, : K - 2], first[:, 2:])
    assert first[2, 0] == N + 5


def test_a_planned_search_of_the_main_part_is_merged_with_the_fresh_one(queries):
    vectors, features, columns = random_items(np.random.default_rng(2), 3_000)
    main = ItemIndex.build(vectors, features, key=jax.random.key(0), columns=columns, nlist=8)
    assert not is_small(main.ivf)
    index = LiveIndex.build(main, capacity=CAPACITY)
    assert is_small(index.fresh.ivf)
    own = random_items(np.random.default_rng(3), 4)
    index = index.upsert(range(5_000, 5_004), 9 * queries, *own[1:]).delete([0, 1])
    want = np.asarray(search(index, queries).ids)
    plan = index.compile(FILTERS)
    found = np.asarray(index.search(queries, plan, k=K).ids)
    shared = [np.isin(a[a >= 0], b).mean() for a, b in zip(want, found, strict=True)]
    assert np.mean(shared) > 0.8
    fresh = want >= 5_000
    np.testing.assert_array_equal(found[fresh], want[fresh])


def test_k_may_exceed_the_items(live, queries):
    index, _ = live
    found = search(index, queries, k=2_000)
    filled = np.asarray(found.filled)
    assert filled[2] == N
    assert (np.asarray(found.ids)[2, N:] == -1).all()
    assert np.isneginf(np.asarray(found.scores)[2, N:]).all()
    with pytest.raises(ValueError, match="k is 0; expected 1 to 16384"):
        search(index, queries, k=0)
    with pytest.raises(ValueError, match="nprobe is 9; expected 1 to 8"):
        index.search(queries, index.compile(FILTERS), k=3, nprobe=9)
    with pytest.raises(ValueError, match="queries are 5 wide; the index holds 12"):
        search(index, queries[:, :5])


def test_a_stream_compiles_nothing_after_its_first_steps(built, queries):
    index, _ = built
    rng, known = np.random.default_rng(3), Catalogue()
    known.upsert(range(N), *random_items(rng, N))

    def sizes():
        jitted: list[Any] = [fresh._search, fresh._rows_in_parts, fresh.write_rows,
                             fresh.free_rows, fresh.clear_rows]  # fmt: skip
        return [function._cache_size() for function in jitted]

    def step(size):
        nonlocal index
        index = random_update(rng, index, known, size)
        search(index, queries)

    index = index.upsert([0, N], *random_items(rng, 2)).delete([N, 1])  # each function once
    known.delete([1])
    for size in (1, 60):
        step(size)
    compiled = sizes()
    shapes = [x.shape for x in jax.tree.leaves(index)]
    structure = jax.tree.structure(index)
    for size in rng.integers(1, 17, 12):
        step(int(size))
    assert sizes() == compiled
    assert [x.shape for x in jax.tree.leaves(index)] == shapes
    assert jax.tree.structure(index) == structure


def test_donated_updates_equal_the_others(live, queries):
    index, catalogue = live
    items = random_items(np.random.default_rng(4), 5)
    catalogue.upsert(range(N, N + 5), *items)
    own = index.upsert(range(N, N + 5), *items)
    own = own.upsert(range(N, N + 5), *items, donate=True).delete([N + 1], donate=True)
    catalogue.delete([N + 1])
    check(own, catalogue, queries)


@pytest.mark.parametrize("recluster", [True, False])
def test_compaction_keeps_every_item(live, queries, recluster):
    index, catalogue = live
    rng = np.random.default_rng(5)
    for size in (40, 50, 30):
        index = random_update(rng, index, catalogue, size)
    compacted = index.compact(key=jax.random.key(2), recluster=recluster)
    check(compacted, catalogue, queries)
    drift = compacted.drift()
    assert drift[:3] == (0, 0, 0)
    assert compacted.main.num_items == len(catalogue.vectors)
    assert drift.spread == pytest.approx(1 if recluster else index.drift().spread, rel=1e-4)
    with pytest.raises(ValueError, match="another catalogue"):
        compacted.search(queries, index.upsert([N], *new_value()).compile(["tag:x9"] * 4), k=3)
    check(random_update(rng, compacted, catalogue, 20), catalogue, queries)


def new_value():
    return np.ones((1, D)), {"colour": [None], "tag": ["x9"]}, {"price": np.ones(1)}


def test_drift_tells_when_to_compact_and_to_cluster_anew(live):
    index, _ = live
    assert index.drift() == pytest.approx(Drift(0, 0, 0, 1))
    assert not index.drift().compaction_due()
    vectors, features, columns = random_items(np.random.default_rng(6), 200)
    drift = index.upsert(np.arange(500, 700), vectors - 9, features, columns).drift()
    assert drift.compaction_due()
    assert drift.recluster_due()
    assert drift.fill == 200 / CAPACITY
    assert drift.fresh_share == pytest.approx(200 / 700)
    assert drift.dead_share == pytest.approx(100 / N)
    same = index.upsert(np.arange(500, 560), vectors[:60], *first(60, features, columns)).drift()
    assert 0.9 < same.spread < 1.1 < drift.spread
    assert not same.recluster_due()


def first(count, *mappings):
    return [{name: x[:count] for name, x in mapping.items()} for mapping in mappings]


def test_explain_sees_both_parts(live, queries):
    index, _ = live
    index = index.upsert([N], 2 * queries[:1], {"colour": ["red"], "tag": [None]},
                         {"price": np.ones(1)}).delete([4])  # fmt: skip
    told = index.explain(queries[0], "colour:red AND tag:1", N)
    assert (told.rejected_by, told.list_rank, told.probed) == ("tag:1", 0, True)
    assert told.score == pytest.approx(2 * queries[0] @ queries[0], rel=1e-5)
    assert index.explain(queries[0], None, 7).rejected_by is None
    for absent in (4, N + 1):
        with pytest.raises(ValueError, match=f"holds no item {absent}"):
            index.explain(queries[0], None, absent)


GOOD = {"colour": ["red"], "tag": [None]}
PRICE = {"price": np.ones(1, np.float32)}
ONE = np.ones((1, D), np.float32)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([-1], ONE, GOOD, PRICE), ValueError, "ids go from -1 to -1"),
        (([2**31], ONE, GOOD, PRICE), ValueError, "expected 0 to 2³¹ - 1"),
        (([8, 8], np.ones((2, D)), {}, {}), ValueError, "item id 8 is given more than once"),
        (([1], ONE * np.nan, GOOD, PRICE), ValueError, "item 1 .* has a NaN or an infinity"),
        (([1], ONE * np.inf, GOOD, PRICE), ValueError, "NaN or an infinity"),
        (([1], ONE[:, :5], GOOD, PRICE), ValueError, r"shape \[1, 5\]; expected \[1, 12\]"),
        (([1, 2], ONE, GOOD, PRICE), ValueError, r"expected \[2, 12\]"),
        (([1], ONE, {"colour": ["new"]}, PRICE), FilterError, "features colour; expected"),
        (([1], ONE, GOOD | {"size": ["new"]}, PRICE), FilterError, "expected colour, tag"),
        (([1], ONE, GOOD | {"tag": [2.5]}, PRICE), FilterError, "'tag' of item 0"),
        (([1], ONE, GOOD | {"tag": []}, PRICE), FilterError, "entries"),
        (([1], ONE, GOOD, None), ValueError, "columns none; expected price"),
        (([1], ONE, GOOD, {"price": np.ones(2)}), ValueError, "expected float32"),
        (([1], ONE, GOOD, {"price": np.array(["a"])}), ValueError, "expected float32"),
    ],
)  # fmt: skip
def test_a_bad_upsert_changes_nothing(live, queries, arguments, error, message):
    index, catalogue = live
    known = len(index.main.bloom.catalog)
    with pytest.raises(error, match=message):
        index.upsert(*arguments)
    assert len(index.main.bloom.catalog) == known
    assert index.num_items == len(catalogue.vectors)


def test_bad_deletes_change_nothing(live):
    index, _ = live
    with pytest.raises(ValueError, match=r"item 601 cannot be deleted.*2 such ids"):
        index.delete([3, N + 1, N + 2])
    with pytest.raises(ValueError, match="item id 3 is given more than once"):
        index.delete([3, 3])
    with pytest.raises(ValueError, match="item 3 cannot be deleted"):
        index.delete([3]).delete([3])
    assert index.num_items == N
    assert index.delete([]) is index


def test_a_full_fresh_part_refuses_and_loses_nothing(live, queries):
    index, catalogue = live
    items = random_items(np.random.default_rng(8), CAPACITY)
    ids = np.arange(N, N + CAPACITY)
    catalogue.upsert(ids, *items)
    index = index.upsert(ids, *items)
    for item in (7, N + CAPACITY):
        with pytest.raises(FreshFullError, match="1 new items, but 0 of the fresh part's 256"):
            index.upsert([item], ONE, GOOD, PRICE)
    check(index, catalogue, queries)
    again = random_items(np.random.default_rng(9), CAPACITY)  # overwriting needs no further room
    catalogue.upsert(ids, *again)
    check(index.upsert(ids, *again), catalogue, queries)
    with pytest.raises(ValueError, match="capacity is 0"):
        LiveIndex.build(index.main, capacity=0)


def test_starting_from_nothing(queries):
    index = LiveIndex.empty(D, ["tag"], capacity=64, metric="cosine")
    assert index.num_items == 0
    plan = index.compile(["tag:1"] * 4)
    assert (np.asarray(index.search(queries, plan, k=3).ids) == -1).all()
    rows = np.concatenate([3 * queries, np.zeros((1, D), np.float32)])
    index = index.upsert(range(5), rows, {"tag": [1, 1, 2, 1, 1]})
    for own in (index, index.compact(key=jax.random.key(0))):
        found = own.search(queries, own.compile(["tag:1"] * 4), k=4, exact=True)
        np.testing.assert_array_equal(np.asarray(found.filled), 4)
        best = np.asarray(found.ids)[:, 0]
        np.testing.assert_array_equal(best[[0, 1, 3]], [0, 1, 3])
        place = np.asarray(found.ids) == 4  # a row of zeros scores 0
        np.testing.assert_array_equal(np.asarray(found.scores)[place], 0)
    emptied = own.delete(range(5)).compact(key=jax.random.key(0))
    assert emptied.num_items == 0
    assert emptied.upsert([1], queries[:1], {"tag": ["x"]}).num_items == 1


def test_fewer_items_than_lists():
    vectors, features, _ = random_items(np.random.default_rng(1), 2)
    index = LiveIndex.build(ItemIndex.build(vectors, features, key=jax.random.key(0)), capacity=8)
    assert index.capacity == 64
    with pytest.raises(ValueError, match="nlist is 5; expected 1 to 2"):
        index.compact(key=jax.random.key(0), nlist=5, recluster=True)
    assert index.compact(key=jax.random.key(0), recluster=True).num_items == 2


def test_the_index_is_a_pytree(live, queries):
    index, _ = live
    index = index.upsert([N], ONE, GOOD, PRICE)
    leaves, structure = jax.tree.flatten(index)
    again = jax.tree.unflatten(structure, [np.asarray(x) for x in leaves])
    for a, b in zip(search(index, queries), search(again, queries), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.slow
def test_ten_thousand_mixed_updates_equal_a_new_build(queries):
    rng, catalogue = np.random.default_rng(11), Catalogue()
    items = random_items(rng, N)
    catalogue.upsert(range(N), *items)
    main = ItemIndex.build(items[0], items[1], key=jax.random.key(0), columns=items[2], nlist=8)
    index, done, compactions = LiveIndex.build(main, capacity=5 * CAPACITY), 0, 0
    while done < 10_000:
        size = int(rng.integers(1, 64))
        if index.drift().fill > 0.45:
            index, compactions = index.compact(key=jax.random.key(done)), compactions + 1
        index, done = random_update(rng, index, catalogue, size), done + size
        if rng.random() < 0.1:
            check(index, catalogue, queries)
    assert compactions > 1
    check(index, catalogue, queries)
    ids = np.array(sorted(catalogue.vectors))
    rebuilt = ItemIndex.build(
        np.stack([catalogue.vectors[i] for i in ids.tolist()]),
        {"colour": [catalogue.colours[i] for i in ids.tolist()],
         "tag": [sorted(catalogue.tags[i]) for i in ids.tolist()]},
        key=jax.random.key(1), ids=ids, nlist=8,
    )  # fmt: skip
    a, b = search(index, queries), search(rebuilt, queries)
    np.testing.assert_array_equal(a.ids, b.ids)
    np.testing.assert_allclose(a.scores, b.scores, rtol=1e-5)
    approximate = np.asarray(search(index, queries, exact=False).ids)
    hits = [np.isin(w, g).mean() for w, g in zip(np.asarray(a.ids), approximate, strict=True)]
    assert np.mean(hits) > 0.9


@pytest.mark.slow
def test_queries_updates_and_compaction_at_once(built, queries):
    """Version v of an item is v times a fixed vector: one answer tells which versions it saw."""
    start, _ = built
    mark = 500 * queries[2] / np.linalg.norm(queries[2])
    ids = np.arange(N, N + 8)

    def version(v):
        return np.tile(mark * v, (8, 1)), {"colour": ["red"] * 8, "tag": [None] * 8}, {
            "price": np.full(8, v, np.float32)
        }  # fmt: skip

    server = LiveServer(start.upsert(ids, *version(1)))
    search(server.index, queries)
    latest, stop, seen = [1], threading.Event(), []

    def write():
        for v in range(2, 40):
            server.upsert(ids, *version(v))
            latest[0] = v
            server.upsert([N + 100 + v], *random_items(np.random.default_rng(v), 1))
            server.delete([v])
        stop.set()

    def read():
        while not stop.is_set():
            least = latest[0]
            found = server.search(queries, FILTERS, k=8, exact=True)
            versions = np.asarray(found.scores)[2] / float(queries[2] @ mark)
            most = latest[0] + 1  # an update may show before it is counted
            seen.append((least, versions, most, np.asarray(found.ids)[2]))

    with ThreadPoolExecutor(3) as pool:
        jobs = [pool.submit(read), pool.submit(read), pool.submit(write)]
        done = server.compact_in_background(recluster=False)
        for job in jobs:
            job.result()
        done.result()
    assert seen
    for least, versions, most, found_ids in seen:
        assert sorted(found_ids) == ids.tolist()
        np.testing.assert_allclose(versions, versions[0], rtol=1e-4)  # all of an update or nothing
        assert least - 0.01 <= versions[0] <= most + 0.01
    assert server.index.main is not start.main
    assert server.index.num_items == N + 8
    assert (np.asarray(server.index.gather(ids)["price"]) == 39).all()


def test_the_server_compacts_when_full_and_loses_nothing(live, queries):
    index, catalogue = live
    server = LiveServer(index)
    rng = np.random.default_rng(12)
    for begin in (N, N + 200):
        items = random_items(rng, 200)
        catalogue.upsert(range(begin, begin + 200), *items)
        server.upsert(range(begin, begin + 200), *items)
    assert server.index.main.num_items == N + 200
    check(server.index, catalogue, queries)
    with pytest.raises(FreshFullError):
        server.upsert(range(300), *random_items(rng, 300))
    with pytest.raises(ValueError, match="cannot be deleted"):
        server.delete([50_000])
    failed = server.compact_in_background(nlist=10**6, recluster=True)
    with pytest.raises(ValueError, match="nlist"):
        failed.result()
    check(server.index, catalogue, queries)


def test_updates_during_a_compaction_are_replayed(live, queries):
    index, catalogue = live
    server, items = LiveServer(index), random_items(np.random.default_rng(13), 3)

    def meanwhile(compacted):
        search(compacted, queries)
        server.upsert([1, N, N + 1], *items)
        server.delete([2, N])
        assert server.index.main.bloom is index.main.bloom  # the old one serves, with the updates
        assert server.index.num_items == N

    catalogue.upsert([1, N, N + 1], *items)
    catalogue.delete([2, N])
    server.compact(warm_up=meanwhile)
    assert server.index.main.bloom is not index.main.bloom
    check(server.index, catalogue, queries)


def test_a_retriever_serves_a_live_index():
    model = MeanTower(30, D, rngs=nnx.Rngs(0))
    features = {"even": [i % 2 == 0 for i in range(1, 30)]}
    retriever = Retriever.build(model, features, key=jax.random.key(0), nlist=4)
    assert isinstance(retriever.index, ItemIndex)
    index = LiveIndex.build(retriever.index, capacity=64)
    items, targets = np.array([3, 4, 5, 6, 7], np.int32), np.array([2, 4], np.int32)
    offsets = np.array([0, 3, 5], np.int32)
    batch = JaggedBatch(items, offsets, targets, np.zeros_like(targets), np.zeros_like(items))
    query = np.asarray(retriever.queries(batch))
    live = retriever.with_index(index.upsert([40], 9 * query[:1], {"even": [True]}).delete([4]))
    found = live(batch, live.compile(["even:true"] * 2), k=29, exact=True)
    assert np.asarray(found.ids)[0, 0] == 40
    for ids in np.asarray(found.ids):
        assert sorted(ids[ids >= 0]) == [2, *range(6, 30, 2), 40]
