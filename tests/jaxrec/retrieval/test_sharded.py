"""The split index against the whole one: same items, best first, on every placement."""

import functools
import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jaxrec.retrieval import ItemIndex, ShardedIndex
from jaxrec.retrieval.planner import SMALL_ROWS
from jaxrec.sharding import make_mesh

WIDTH, NUM_ITEMS, K = 8, 700, 30
FILTERS = ["language:en", "NOT tag IN [1, 2] AND language:de", None, "tag:7", "rare:yes", None,
           "NOT language:en", "tag:1 OR tag:2"]  # fmt: skip


def build(num_items=NUM_ITEMS, nlist=12):
    rng = np.random.default_rng(num_items)
    vectors = rng.normal(size=(num_items, WIDTH)).astype(np.float32)
    features = {
        "language": rng.choice(["en", "de", "fr"], num_items),
        "tag": [list(rng.integers(0, 90, rng.integers(0, 5))) for _ in range(num_items)],
        # In few shards only, though it is a head value nowhere and a tail value of a handful.
        "rare": ["yes" if item < 3 else None for item in range(num_items)],
    }
    columns = {
        "vector": vectors,
        "price": rng.integers(0, 99, num_items).astype(np.int32),
        "new": rng.random(num_items) < 0.5,
    }
    return ItemIndex.build(
        vectors, features, key=jax.random.key(0), ids=np.arange(num_items) * 3 + 5,
        columns=columns, nlist=nlist, recall=0.5,
    )  # fmt: skip


def queries(num_queries=8):
    return np.random.default_rng(9).normal(size=(num_queries, WIDTH)).astype(np.float32)


@pytest.fixture(scope="module")
def whole():
    return build()


@functools.partial(jax.jit, static_argnames=("k", "nprobe", "exact"))
def search_whole(whole, queries, plan, **options):
    return whole.search(queries, plan, **options)


def assert_same(found, want):
    np.testing.assert_array_equal(found.ids, want.ids)
    np.testing.assert_allclose(found.scores, want.scores, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(found.filled, want.filled)


@pytest.mark.parametrize("axes", [{"items": 8}, {"items": 4, "data": 2}])
def test_exact_search_equals_the_whole_index(whole, axes):
    split = ShardedIndex.split(
        whole, make_mesh(axes), batch_axis="data" if "data" in axes else None
    )
    plan = split.compile(FILTERS)
    for leaf, own in zip(plan, whole.compile(FILTERS), strict=True):
        np.testing.assert_array_equal(leaf, own)
    exclude = np.array([[5, 8, -1]] * len(FILTERS), np.int32)
    want = search_whole(whole, queries(), plan, k=K, exact=True, exclude=exclude)
    found = split.search(queries(), plan, k=K, exact=True, exclude=exclude)
    assert_same(found, want)
    assert np.asarray(found.exact).all()
    assert not np.isin(found.ids, [5, 8]).any()
    assert int(want.filled.min()) < K == int(want.filled.max())


@pytest.fixture(scope="module")
def large():
    """Each of its eight shards is too large for brute force."""
    return build(8 * SMALL_ROWS)


@pytest.mark.parametrize("nprobe", [3, None])
def test_approximate_search_finds_no_less(large, nprobe):
    whole, split = large, ShardedIndex.split(large, make_mesh({"items": 8}))
    assert split.arrays[1].shape[1] > SMALL_ROWS
    plan = whole.compile(FILTERS)
    want = search_whole(whole, queries(), plan, k=K, nprobe=nprobe)
    found = split.search(queries(), plan, k=K, nprobe=nprobe)
    np.testing.assert_array_equal(found.filled, want.filled)
    truth = np.asarray(search_whole(whole, queries(), plan, k=K, exact=True).ids)
    for own, other, true in zip(found.ids, want.ids, truth, strict=True):
        assert np.isin(true, own).sum() >= np.isin(true, other).sum()
    certain = np.asarray(found.exact)
    np.testing.assert_array_equal(np.asarray(found.ids)[certain], truth[certain])


@pytest.mark.parametrize("num_items", [3, 70])
def test_few_items_uneven_and_empty_shards(num_items):
    whole = build(num_items, nlist=2)
    split = ShardedIndex.split(whole, make_mesh({"items": 8}))
    plan = whole.compile(FILTERS)
    want = search_whole(whole, queries(), plan, k=num_items, exact=True)
    assert_same(split.search(queries(), plan, k=num_items, exact=True), want)
    if num_items > 8:
        assert_same(split.search(queries(), plan, k=num_items), want)


def test_more_results_than_a_shard_has_rows():
    whole = build(1100, nlist=1)
    split = ShardedIndex.split(whole, make_mesh({"items": 8}))
    plan = whole.compile(FILTERS)
    assert split.arrays[1].shape[1] == 256
    want = search_whole(whole, queries(), plan, k=1000, exact=True)
    assert_same(split.search(queries(), plan, k=1000, exact=True), want)


def test_deleted_items_are_dealt_out_no_more(whole):
    fewer = replace(whole, ivf=whole.ivf.delete(np.array([5, 8, 300 * 3 + 5])))
    split = ShardedIndex.split(fewer, make_mesh({"items": 4}))
    plan = fewer.compile(FILTERS)
    want = search_whole(fewer, queries(), plan, k=K, exact=True)
    assert_same(split.search(queries(), plan, k=K, exact=True), want)
    assert split.num_items == NUM_ITEMS - 3


def score_candidates(weights, columns):
    """A ranking model that stands whole on each device."""
    return jnp.tanh(columns["vector"] @ weights) + columns["price"] + columns["new"]


@pytest.mark.parametrize("axes", [{"items": 4}, {"items": 4, "data": 2}])
@pytest.mark.parametrize("placement", ["replicated", "data-parallel"])
def test_candidates_columns_reach_a_replicated_ranking_model(whole, axes, placement):
    mesh = make_mesh(axes)
    batch_axis = "data" if "data" in axes else None
    index = ShardedIndex.split(whole, mesh, batch_axis=batch_axis)
    split = placement == "data-parallel"
    weights = np.ones(WIDTH, np.float32)

    @jax.jit
    def retrieve(index, weights, queries, plan):
        ids = index.search(queries, plan, k=K, exact=True).ids
        columns = index.gather(ids, split=split)
        return ids, columns, score_candidates(weights, columns)

    plan = whole.compile(FILTERS)
    ids, columns, scores = retrieve(index, weights, queries(), plan)
    want = whole.gather(np.asarray(ids))
    for name, column in want.items():
        np.testing.assert_array_equal(columns[name], column)
        assert columns[name].dtype == column.dtype
    np.testing.assert_allclose(scores, score_candidates(weights, want), rtol=1e-6)
    parts = tuple(name for name in (batch_axis, "items" if split else None) if name)
    assert columns["vector"].sharding.is_equivalent_to(
        jax.NamedSharding(mesh, P(parts) if parts else P()), columns["vector"].ndim
    )
    assert not np.asarray(index.gather(np.full((8, 1), -1))["vector"]).any()


def test_explain_asks_the_owner(whole):
    split = ShardedIndex.split(whole, make_mesh({"items": 8}))
    for item in (5, 8, 11, 1000 * 2 + 3):
        want = whole.explain(queries()[0], "language:en", item)
        own = split.explain(queries()[0], "language:en", item)
        assert own[:3] == want[:3]
        assert own.score == pytest.approx(want.score, rel=1e-6)
    with pytest.raises(ValueError, match="holds no item 4"):
        split.explain(queries()[0], None, 4)


def test_clear_errors(whole):
    mesh = make_mesh({"items": 4, "data": 2})
    with pytest.raises(ValueError, match="no axis 'model'; it has items, data"):
        ShardedIndex.split(whole, mesh, axis="model")
    with pytest.raises(ValueError, match="cannot both"):
        ShardedIndex.split(whole, mesh, batch_axis="items")
    split = ShardedIndex.split(whole, mesh, batch_axis="data")
    plan = whole.compile(FILTERS)
    with pytest.raises(ValueError, match="k is 701; expected 1 to 700"):
        split.search(queries(), plan, k=701)
    with pytest.raises(ValueError, match="nprobe is 13; expected 1 to 12"):
        split.search(queries(), plan, k=1, nprobe=13)
    with pytest.raises(ValueError, match="3 queries cannot be split into 2 equal parts; pad"):
        split.search(queries(3), whole.compile([None] * 3), k=1)
    with pytest.raises(ValueError, match="the plan has 2 filters for 4 queries"):
        split.search(queries(), whole.compile([None] * 4), k=1)


_WORKER = """
import sys
import jax
address, process, out = sys.argv[1], int(sys.argv[2]), sys.argv[3]
jax.config.update("jax_num_cpu_devices", 2)
jax.distributed.initialize(address, num_processes=2, process_id=process)
import numpy as np
from test_sharded import FILTERS, K, ShardedIndex, build, make_mesh, queries
assert len(jax.devices()) == 4
index = ShardedIndex.split(build(), make_mesh({"items": 4}))
plan = index.compile(FILTERS)
found = index.search(queries(), plan, k=K, exact=True)
prices = index.gather(np.asarray(found.ids))["price"]
np.savez(f"{out}{process}", *map(np.asarray, found), np.asarray(prices))
"""


@pytest.mark.slow
def test_two_processes_give_the_same_answer(whole, tmp_path):
    here = Path(__file__).parent
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    environment |= {"JAX_PLATFORMS": "cpu", "PYTHONPATH": f"{here}:{here.parents[2]}"}
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", _WORKER, address, str(process), str(tmp_path / "out")],
            env=environment, stderr=subprocess.PIPE, text=True,
        )
        for process in range(2)
    ]  # fmt: skip
    try:
        errors = [worker.communicate(timeout=200)[1] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert [worker.returncode for worker in workers] == [0, 0], "\n".join(errors)
    plan = whole.compile(FILTERS)
    want = search_whole(whole, queries(), plan, k=K, exact=True)
    for process in range(2):
        *found, prices = np.load(tmp_path / f"out{process}.npz").values()
        np.testing.assert_array_equal(found[1], want.ids)
        np.testing.assert_allclose(found[0], want.scores, rtol=1e-6)
        np.testing.assert_array_equal(prices, whole.gather(want.ids)["price"])
