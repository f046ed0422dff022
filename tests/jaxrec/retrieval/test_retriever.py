"""The served model against brute force over the eligible items."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from mean_tower import MeanTower

from jaxrec.ops.jagged import JaggedBatch
from jaxrec.retrieval import IndexState, ItemIndex, Retriever
from jaxrec.retrieval.retriever import history

NUM_ITEMS, WIDTH, K = 1_500, 16, 20
LENGTHS = (6, 8, 10)
FILTERS = ["language:en", "NOT tag IN [1, 2] AND NOT tag:7", None, "tag:150 OR tag:151"]


@pytest.fixture(scope="module")
def catalogue():
    rng = np.random.default_rng(0)
    return {
        "language": rng.choice(["en", "de"], NUM_ITEMS),
        "tag": rng.permutation(NUM_ITEMS) % 300,
    }


@pytest.fixture(scope="module")
def retriever(catalogue):
    model = MeanTower(NUM_ITEMS + 1, WIDTH, rngs=nnx.Rngs(0))
    names = [f"raw-{item}" for item in range(1, NUM_ITEMS + 1)]
    return Retriever.build(model, catalogue, key=jax.random.key(0), vocabulary=names)


@pytest.fixture(scope="module")
def batch():
    items = np.random.default_rng(1).integers(1, NUM_ITEMS + 1, sum(LENGTHS) + 2).astype(np.int32)
    items[3] = items[1]
    items[-2:] = 0
    offsets = np.concatenate([[0], np.cumsum(LENGTHS)]).astype(np.int32)
    targets = np.array([5, 13, 23, 3], np.int32)
    return JaggedBatch(items, offsets, targets, np.zeros_like(targets), np.zeros_like(items))


@pytest.fixture(scope="module")
def eligible(catalogue):
    tag = catalogue["tag"]
    everything = np.ones(NUM_ITEMS, bool)
    english, rare = catalogue["language"] == "en", np.isin(tag, [150, 151])
    return np.stack([english, ~np.isin(tag, [1, 2, 7]), everything, rare])


def brute_force(retriever, batch, eligible):
    queries = np.asarray(retriever.queries(batch), np.float64)
    rows = np.asarray(retriever.model.item_embeddings(), np.float64)[1:]
    scores = np.where(eligible, queries @ rows.T, -np.inf)
    order = np.argsort(-scores, axis=1)[:, :K]
    filled = np.isfinite(np.take_along_axis(scores, order, axis=1))
    return np.where(filled, order + 1, -1)


def seen(batch, query):
    starts = np.asarray(batch.seq_offsets)
    target = batch.target_positions[query]
    start = starts[starts <= target][-1]
    return batch.item_ids[start : target + 1]


@pytest.mark.parametrize("exclude_history", [False, True])
def test_exact_equals_brute_force(retriever, batch, eligible, exclude_history):
    plan = retriever.compile(FILTERS)
    allowed = eligible.copy()
    if exclude_history:
        for query in range(4):
            allowed[query, seen(batch, query) - 1] = False
    found = retriever(batch, plan, k=K, exact=True, exclude_history=exclude_history)
    np.testing.assert_array_equal(found.ids, brute_force(retriever, batch, allowed))
    np.testing.assert_array_equal(found.filled, np.minimum(allowed.sum(axis=1), K))
    assert np.asarray(found.exact).all()
    # The tower's mean makes the sequence's own items the likeliest answers.
    with_history = brute_force(retriever, batch, eligible)
    assert exclude_history != np.array_equal(found.ids, with_history)


@pytest.mark.parametrize("nprobe", [None, 1])
def test_approximate_search_keeps_to_the_filter_and_fills_up(retriever, batch, eligible, nprobe):
    found = retriever(batch, retriever.compile(FILTERS), k=K, nprobe=nprobe)
    ids, filled = np.asarray(found.ids), np.asarray(found.filled)
    np.testing.assert_array_equal(filled, np.minimum(eligible.sum(axis=1), K))
    for query, own in enumerate(ids):
        assert eligible[query, own[: filled[query]] - 1].all()
        assert len(set(own[: filled[query]])) == filled[query]
    want = brute_force(retriever, batch, eligible)
    np.testing.assert_array_equal(np.sort(ids[3]), np.sort(want[3]))
    certain = np.asarray(found.exact)
    np.testing.assert_array_equal(ids[certain], want[certain])
    if nprobe is None:
        assert np.mean([np.isin(w, own).mean() for w, own in zip(want, ids, strict=True)]) > 0.9


def test_a_filter_of_mostly_false_positives_still_fills(catalogue, batch):
    # NOT of a long list of rare values leaves every item "possibly" eligible.
    model = MeanTower(NUM_ITEMS + 1, WIDTH, rngs=nnx.Rngs(0))
    tags = catalogue["tag"] % 60
    retriever = Retriever.build(model, {"tag": tags}, key=jax.random.key(0))
    assert isinstance(retriever.index, ItemIndex)
    assert retriever.index.bloom.num_head == 0
    plan = retriever.compile([f"NOT tag IN [{','.join(map(str, range(59)))}]"] * 4)
    possibly = retriever.index.bloom.search(plan)
    assert int(jnp.sum(jax.lax.population_count(possibly[0]))) == NUM_ITEMS
    eligible = np.broadcast_to(tags == 59, (4, NUM_ITEMS))
    for exact in (False, True):
        found = retriever(batch, plan, k=K, exact=exact)
        want = brute_force(retriever, batch, eligible)
        np.testing.assert_array_equal(found.ids, want)
        assert (np.asarray(found.filled) == min(eligible[0].sum(), K)).all()


@pytest.mark.parametrize("window", [4, 40])
def test_history_is_that_of_the_query_up_to_its_target(batch, window):
    items = np.asarray(history(batch, window))
    for query in range(4):
        want = seen(batch, query)[::-1][:window].tolist()
        assert items[query].tolist() == want + [-1] * (window - len(want))


def test_excluded_items_are_left_out(retriever, batch, eligible):
    plan = retriever.compile(FILTERS)
    best = np.asarray(retriever(batch, plan, k=K, exact=True).ids)[:, :3]
    exclude = np.concatenate([best, best[:, :1], np.full((4, 1), -1, np.int32)], axis=1)
    rest = retriever(batch, plan, k=K - 3, exact=True, exclude=exclude).ids
    want = brute_force(retriever, batch, eligible)[:, 3:]
    np.testing.assert_array_equal(rest, want)


def test_results_do_not_depend_on_the_other_queries(retriever, batch):
    filters = [FILTERS[0], FILTERS[1], FILTERS[0], FILTERS[0]]
    one, other = (retriever(batch, retriever.compile(f), k=K, nprobe=1) for f in (FILTERS, filters))
    np.testing.assert_array_equal(one.ids[:2], other.ids[:2])
    assert (np.asarray(one.ids[2:]) != np.asarray(other.ids[2:])).any(axis=1).all()


def test_index_is_apart_from_the_weights(retriever):
    params = nnx.state(retriever, nnx.Param)
    index = nnx.state(retriever, IndexState)
    assert [path for path, _ in nnx.to_flat_state(params)] == [("model", "table")]
    assert len(nnx.to_flat_state(index)) == len(jax.tree.leaves(retriever.index))
    optimizer = nnx.Optimizer(retriever.model, optax.sgd(0.1), wrt=nnx.Param)
    assert optimizer.step[...] == 0


def test_explain(retriever, batch, catalogue):
    query = retriever.queries(batch)[0]
    item = int(np.flatnonzero(catalogue["language"] == "de")[0]) + 1
    why = retriever.explain(query, "tag:1 OR language:en", item)
    assert why.rejected_by == ("tag:1 OR language:en" if catalogue["tag"][item - 1] != 1 else None)
    row = np.asarray(retriever.model.item_embeddings())[item]
    found = why.search["score"]
    assert why.value == found.score == pytest.approx(float(np.dot(row, query)), rel=1e-5)
    assert found.code_score == pytest.approx(found.score, abs=0.05)
    plan = retriever.compile([None, *FILTERS[1:]])
    best = int(retriever(batch, plan, k=K, nprobe=1).ids[0, 0])
    assert retriever.explain(query, None, best, nprobe=1).search["score"][:3] == (None, 0, True)
    other = retriever.explain(query, None, item, nprobe=found.list_rank)
    assert not other.search["score"].probed
    with pytest.raises(ValueError, match="holds no item 0"):
        retriever.explain(query, None, 0)


def test_raw_ids(retriever):
    assert retriever.raw_ids(np.array([[3, 1, -1]], np.int32)) == [["raw-3", "raw-1"]]


def test_clear_errors(retriever, batch, catalogue):
    plan = retriever.compile(FILTERS)
    search = functools.partial(retriever, batch, plan)
    with pytest.raises(ValueError, match="k is 1501; expected 1 to 1500"):
        search(k=NUM_ITEMS + 1)
    with pytest.raises(ValueError, match="nprobe is 0; expected 1 to 39"):
        search(k=1, nprobe=0)
    with pytest.raises(ValueError, match="the plan has 1 filters and the batch 4 target"):
        retriever(batch, retriever.compile([None]), k=1)
    model = MeanTower(NUM_ITEMS, WIDTH, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="language has 1500 entries; the model has 1499 items"):
        Retriever.build(model, catalogue, key=jax.random.key(0))
    with pytest.raises(ValueError, match="Linear has no method encode"):
        Retriever.build(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), catalogue, key=jax.random.key(0))
    model.table[...] = model.table[...].at[7, 0].set(jnp.nan)
    short = {name: column[1:] for name, column in catalogue.items()}
    with pytest.raises(ValueError, match=r"row 6 \(item 7\) has a NaN"):
        Retriever.build(model, short, key=jax.random.key(0))
