"""The planner: right whatever it picks, cheapest by its model, and all of it on the device."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrec.retrieval import CostModel, ItemIndex, IVFIndex, Strategy, brute_force, recall
from jaxrec.retrieval.masks import chosen_rows, pack_bits, rows_at, unpack_mask
from jaxrec.retrieval.planner import needed_share, tuned_costs

N, D, K, QUERIES = 6_000, 16, 30, 8
PASSING = {"rare": 0.01, "some": 0.1, "many": 0.5}
FREE, DEAR = 0.0, 1e9
ALWAYS = {
    Strategy.COMPACT: CostModel(mask_word=FREE, eligible_row=FREE, eligible_score=FREE),
    Strategy.PROBE: CostModel(eligible_row=DEAR, probed_row=1.0, scanned_row=DEAR),
    Strategy.SCAN: CostModel(eligible_row=DEAR, probed_row=DEAR, scanned_row=FREE,
                             scanned_score=FREE),
}  # fmt: skip


def clustered(rng, num):
    centres = np.random.default_rng(7).normal(size=(60, D))
    return (centres[rng.integers(0, 60, num)] + 0.6 * rng.normal(size=(num, D))).astype(np.float32)


@pytest.fixture(scope="module")
def rows():
    return clustered(np.random.default_rng(0), N)


@pytest.fixture(scope="module")
def queries():
    return clustered(np.random.default_rng(1), QUERIES)


@pytest.fixture(scope="module")
def features(rows):
    rng = np.random.default_rng(2)
    features = {name: rng.random(N) < share for name, share in PASSING.items()}
    # A filter that follows the embedding: the tenth of the items farthest along one direction.
    along = rows @ np.random.default_rng(3).normal(size=D)
    features["near"] = along > np.quantile(along, 0.9)
    return {name: passes.astype(int) for name, passes in features.items()}


@pytest.fixture(scope="module")
def index(rows, features):
    return ItemIndex.build(
        rows, {n: v.tolist() for n, v in features.items()}, key=jax.random.key(0), nlist=60,
        sample_queries=clustered(np.random.default_rng(4), 128),
    )  # fmt: skip


def truth_of(rows, queries, passes, k=K):
    return brute_force(queries, rows, np.flatnonzero(passes), k=k)


@pytest.mark.parametrize("strategy", list(Strategy))
def test_every_strategy_keeps_to_the_filter_and_finds_its_recall(
    index, rows, queries, features, strategy
):
    names = ["some", "many", "near", "rare"] * 2
    plan = index.compile([f"{name}:1" for name in names])
    costs = ALWAYS[strategy]
    picked = index.plan_of(queries, plan, k=K, costs=costs)
    assert set(np.asarray(picked.strategy).tolist()) == {int(strategy)}
    np.testing.assert_array_equal(picked.eligible, [features[name].sum() for name in names])
    assert (np.asarray(picked.probes) > 0).all() == (strategy == Strategy.PROBE)
    found = index.search(queries, plan, k=K, costs=costs)
    truth = np.concatenate([
        truth_of(rows, queries[i : i + 1], features[name]) for i, name in enumerate(names)
    ])  # fmt: skip
    assert (np.asarray(found.filled) == K).all()
    if strategy == Strategy.PROBE:
        assert recall(found.ids, truth) >= 0.95
    else:
        np.testing.assert_array_equal(np.sort(found.ids), np.sort(truth))
    np.testing.assert_allclose(
        found.scores, np.sum(rows[np.asarray(found.ids)] * queries[:, None], axis=2), rtol=1e-4
    )


@pytest.mark.parametrize("name", ["some", "many", "near"])
def test_probing_holds_its_recall_under_filters(index, rows, features, name):
    asked = clustered(np.random.default_rng(5), 64)
    plan = index.compile([f"{name}:1"])
    costs = ALWAYS[Strategy.PROBE]
    picked = index.plan_of(asked[None], plan, k=100, costs=costs)
    assert np.asarray(picked.probes).max() < 60
    found = index.search(asked[None], plan, k=100, costs=costs)
    assert recall(found.ids[0], truth_of(rows, asked, features[name], 100)) >= 0.95


def test_a_query_gets_the_same_answer_in_any_company(index, queries, features):
    """Few-eligible queries are compacted beside probing ones, and each keeps its class."""
    costs = CostModel(eligible_row=200.0, probed_row=20.0, scanned_row=DEAR)
    names = ["rare", "many"] * 4
    plan = index.compile([f"{name}:1" for name in names])
    picked = np.asarray(index.plan_of(queries, plan, k=K, costs=costs).strategy)
    assert picked.tolist() == [Strategy.COMPACT, Strategy.PROBE] * 4
    together = index.search(queries, plan, k=K, costs=costs)
    assert np.asarray(together.exact)[::2].all()
    alone = index.search(queries[:1], index.compile(["rare:1"]), k=K, costs=costs)
    np.testing.assert_array_equal(together.ids[:1], alone.ids)


def test_a_query_that_is_not_finite_finds_nothing(index, queries):
    bad = queries.copy()
    bad[2, 3], bad[5] = np.nan, np.inf
    plan = index.compile(["some:1"] * QUERIES)
    got, want = (index.search(q, plan, k=K) for q in (bad, queries))
    alone = index.ivf.search(bad, k=K, nprobe=4)
    for found in (got, alone):
        assert np.asarray(found.filled)[[2, 5]].tolist() == [0, 0]
        assert (np.asarray(found.ids)[[2, 5]] == -1).all()
        assert np.isneginf(np.asarray(found.scores)[[2, 5]]).all()
        assert not np.asarray(found.exact)[[2, 5]].any()
    others = np.setdiff1d(np.arange(QUERIES), [2, 5])
    np.testing.assert_array_equal(np.asarray(got.ids)[others], np.asarray(want.ids)[others])


def test_queries_may_share_a_filter(index, queries):
    filters = ["some:1 AND NOT many:1", "near:1"]
    exclude = np.array([[3, 5, 3], [-1, 9, 8]], np.int32)
    heads = queries.reshape(2, 4, D)
    shared = index.search(heads, index.compile(filters), k=K, exclude=exclude, exact=True)
    plan = index.compile([f for f in filters for _ in range(4)])
    own = index.search(queries, plan, k=K, exclude=np.repeat(exclude, 4, axis=0), exact=True)
    assert (shared.ids.shape, shared.filled.shape) == ((2, 4, K), (2, 4))
    for a, b in zip(shared, own, strict=True):
        np.testing.assert_allclose(np.asarray(a).reshape(b.shape), b, rtol=1e-5)


def test_the_compiled_search_never_leaves_the_device(index, queries):
    filters = [["some:1"] * QUERIES, ["NOT many:1 AND near:1"] * QUERIES]
    plans = [index.compile(texts) for texts in filters]
    leaves, layout = jax.tree.flatten(index)

    @jax.jit
    def search(leaves, queries, plan):
        return jax.tree.unflatten(layout, leaves).search(queries, plan, k=K)

    text = search.lower(leaves, queries, plans[0]).compile().as_text() or ""
    assert "while" in text
    assert not re.findall(r"callback|infeed|outfeed|= \S+ send\(|= \S+ recv\(", text)
    for plan in plans:
        search(leaves, queries, plan)
    assert getattr(search, "_cache_size")() == 1  # noqa: B009 (pyright does not know it)


@pytest.mark.parametrize("text", ["rare:1", "some:1", "NOT many:1 AND near:1", None])
def test_an_explanation_tells_the_route_of_the_query(index, queries, text):
    plan = index.compile([text])
    planned = index.plan_of(queries[:1], plan, k=K)
    route = index.explain(queries[0], text, 3, k=K).route
    assert (route.strategy, route.eligible, route.probes) == tuple(int(x[0]) for x in planned)
    costs, (rows, width) = tuned_costs(), index.ivf.codes.shape
    if route.strategy == Strategy.COMPACT:
        want = costs.compact(rows // 32, route.eligible, 1, width)
    elif route.strategy == Strategy.PROBE:
        one, every = (costs.probe(rows / n, width) for n in (index.ivf.nlist, 1))
        assert one / 10 < 1e3 * route.cost_us <= every
        return
    else:
        want = costs.scan(rows, 1, width)
    assert route.cost_us == pytest.approx(float(want) / 1e3)


def test_needed_share_goes_through_its_points():
    shares = ((0.001, 0.2), (0.1, 0.6), (1.0, 1.0))
    found = needed_share(shares, jnp.array([1e-5, 0.001, 0.01, 0.1, 1.0, 5.0]))
    np.testing.assert_allclose(found, [0.2, 0.2, 0.4, 0.6, 1.0, 1.0], rtol=1e-5)


def test_rows_of_a_mask():
    bits = np.random.default_rng(0).random(500) < 0.3
    bits[64:200] = False
    words = pack_bits(bits)
    ends = np.cumsum([int(w).bit_count() for w in words]).astype(np.int32)
    rows = np.flatnonzero(bits)
    np.testing.assert_array_equal(
        rows_at(jnp.asarray(words), jnp.asarray(ends), jnp.arange(len(rows), dtype=jnp.int32)), rows
    )
    again = np.concatenate([rows, [-1, rows[0]]])[None].astype(np.int32)
    np.testing.assert_array_equal(unpack_mask(chosen_rows(again, len(words)), 500)[0], bits)


def outliers(rng, num, width=48):
    """Directions of very unequal variance, lengths that differ, five rows with a huge value."""
    x = rng.normal(size=(num, width)) * np.arange(1, width + 1) ** -0.7
    x *= np.exp(0.6 * rng.normal(size=(num, 1)))
    x[rng.choice(num, 5), -1] = 40
    return x.astype(np.float32)


def test_a_scale_for_each_row_keeps_the_recall_that_a_global_scale_loses():
    rows = outliers(np.random.default_rng(0), 8_000)
    queries = outliers(np.random.default_rng(1), 40)
    index = IVFIndex.build(rows, nlist=16, key=jax.random.key(0))
    truth = brute_force(queries, rows, np.arange(len(rows)), k=100)

    def found(precision):
        return recall(index.search(queries, k=100, nprobe=16, precision=precision).ids, truth)

    scale = np.abs(rows).max() / 127
    codes, query_scale = np.round(rows / scale), np.abs(queries).max(axis=1, keepdims=True) / 127
    scores = np.round(queries / query_scale) @ codes.T
    with_global = recall(np.argsort(-scores, axis=1)[:, :100], truth)
    assert with_global <= 0.92
    assert found("int8") >= 0.985
    assert found("rescored") >= 0.998
