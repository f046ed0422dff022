"""Prioritised steps equal plain ones to the bit; what travels early waits for no computation."""

from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from dataflow import ancestors, dataflow
from dense_twin import FEATURES, dense_params, pair_loss, random_batch, two_tables

from jaxrec.distributed import (
    LATE,
    EmbeddingTable,
    GrowingStep,
    IdError,
    PipelineState,
    PrioritizedStep,
    RowAdagrad,
    RowAdam,
    RowSGD,
    ShardedTables,
    init_sharded_state,
    make_sharded_step,
)
from jaxrec.sharding import make_mesh

MESH = make_mesh({"data": 8})
SGD = optax.sgd(0.05)
ROWS = (64, 48)


def sharded(specs) -> ShardedTables:
    return ShardedTables(specs, MESH, features=FEATURES, virtual_shards=16)


@cache
def both_kinds():
    """Compiled once for all collision rates: tables, the plain step, the prioritised step."""
    tables = sharded(two_tables(RowAdagrad(0.1), rows=ROWS))
    capacity = {"items+users": 14, "items+users" + LATE: 14}
    pipeline = PrioritizedStep(tables, pair_loss, SGD, capacity)
    return tables, make_sharded_step(tables, pair_loss, SGD, {"items+users": 14}), pipeline


def colliding_batches(count, share, seed=0):
    """Successive batches have a share of their ids in common, and the rest in none."""
    rng = np.random.default_rng(seed)

    def ids(number, rows, shape):
        third = (rows - 1) // 3
        total = int(np.prod(shape))
        common = round(share * total)
        own = 1 + third * (1 + number % 2) + rng.integers(0, third, total - common)
        flat = np.concatenate([1 + np.arange(common) % third, own])
        return rng.permutation(flat).astype(np.int32).reshape(shape)

    for number in range(count):
        found = {
            "history": ids(number, ROWS[0], (16, 5)),
            "item": ids(number, ROWS[0], (16,)),
            "user": ids(number, ROWS[1], (16,)),
        }
        yield found, rng.integers(0, 2, 16).astype(np.float32)


def run_plain(tables, step, batches):
    state = init_sharded_state(tables, dense_params(), SGD, key=jax.random.key(1))
    results = []
    for ids, batch in batches:
        state, metrics = step(state, ids, batch)
        assert metrics.exchange.ok
        results.append((metrics.loss, metrics.aux))
    return jax.device_get(state), jax.device_get(results)


def run_pipeline(tables, pipeline, batches, *, restart_at=None, settle_at=None):
    state = init_sharded_state(tables, dense_params(), SGD, key=jax.random.key(1))
    results, traffic = [], []
    carry = pipeline.start(state, *batches[0])
    for number, (ids, batch) in enumerate(batches[1:], 1):
        if number == settle_at:  # what was fetched is forgotten, and fetched again
            carry = pipeline.start(pipeline.settle(carry), *batches[number - 1])
        if number == restart_at:
            state, last = pipeline.finish(carry)
            results.append((last.loss, last.aux))
            carry = pipeline.start(state, ids, batch)
            continue
        carry, metrics = pipeline(carry, ids, batch)
        assert metrics.exchange.ok
        results.append((metrics.loss, metrics.aux))
        traffic.append(metrics.traffic)
    state, last = pipeline.finish(carry)
    results.append((last.loss, last.aux))
    return jax.device_get(state), jax.device_get(results), jax.device_get(traffic)


def assert_same(one, other):
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 1.0])
def test_equals_the_plain_run(share):
    tables, plain, pipeline = both_kinds()
    batches = list(colliding_batches(50, share))
    wanted = run_plain(tables, plain, batches)
    state, results, traffic = run_pipeline(tables, pipeline, batches)
    assert_same((state, results), wanted)
    late, early = (sum(getattr(t, n) for t in traffic[1:]) for n in ("late_rows", "early_rows"))
    assert (late == 0) == (share == 0)
    assert (early == 0) == (share == 1)
    if 0 < share < 1:
        assert late < early if share == 0.25 else late > 0.2 * early


def test_random_batches_through_a_restart():
    """Rows come again after one batch, two or more; the pipeline is emptied on the way."""
    tables, plain, pipeline = both_kinds()
    rng = np.random.default_rng(5)
    batches = [random_batch(rng, rows=ROWS) for _ in range(12)]
    wanted = run_plain(tables, plain, batches)
    found = run_pipeline(tables, pipeline, batches, restart_at=6, settle_at=4)
    assert_same(found[:2], wanted)


def test_a_single_batch():
    tables, plain, pipeline = both_kinds()
    batches = list(colliding_batches(1, 0.5))
    assert_same(run_pipeline(tables, pipeline, batches)[:2], run_plain(tables, plain, batches))


@pytest.mark.slow
def test_groups_of_several_kinds_with_growth():
    """Adam by schedule beside a table in host memory, from a capacity that is far too small."""
    schedule = lambda step: 0.05 / (1 + step)  # noqa: E731
    items = EmbeddingTable("items", ROWS[0], 4, RowAdam(schedule), std=0.5)
    users = EmbeddingTable("users", ROWS[1], 4, RowSGD(0.1), std=0.5, memory="pinned_host")
    tables = sharded([items, users])
    rng = np.random.default_rng(6)
    batches = [random_batch(rng, rows=ROWS) for _ in range(6)]
    tiny = {"items": 2, "users": 1}
    pipeline = PrioritizedStep(tables, pair_loss, SGD, tiny | {name + LATE: 1 for name in tiny})
    found = run_pipeline(tables, pipeline, batches)[:2]
    assert pipeline.capacity["items"] > 2
    assert pipeline.capacity["items" + LATE] > 1
    plain = GrowingStep(tables, lambda c: make_sharded_step(tables, pair_loss, SGD, c), tiny)
    assert_same(found, run_plain(tables, plain, batches))


def test_an_id_outside_its_table_leaves_the_carry():
    tables, plain, pipeline = both_kinds()
    batches = list(colliding_batches(3, 0.5))
    state = init_sharded_state(tables, dense_params(), SGD, key=jax.random.key(1))
    carry = pipeline.start(state, *batches[0])
    wrong = {name: ids.copy() for name, ids in batches[1][0].items()}
    wrong["user"][4] = 48
    with pytest.raises(IdError, match="'user' names id 48 of table 'users'"):
        pipeline(carry, wrong, batches[1][1])
    carry, _ = pipeline(pipeline.state_left, *batches[1])
    carry, _ = pipeline(carry, *batches[2])
    state, _ = pipeline.finish(carry)
    assert_same(jax.device_get(state), run_plain(tables, plain, batches)[0])


def test_a_step_needs_a_start():
    pipeline = PrioritizedStep(sharded(two_tables(RowSGD())), pair_loss, SGD)
    nothing: Any = None
    carry = PipelineState(nothing, nothing, nothing)
    with pytest.raises(RuntimeError, match="begins with start"):
        pipeline(carry, {}, None)


def exchanges_and_products(step, arguments):
    """(all-to-alls by kind, matrix products) of a traced step, as graph nodes."""
    nodes = dataflow(jax.make_jaxpr(step)(*arguments))
    exchanges = [node for node in nodes if node.name == "all_to_all"]
    products = [node for node in nodes if node.name == "dot_general"]
    assert len(products) >= 2, "forward and backward"
    return exchanges, products


def waits(exchanges, products):
    """For each exchange: whether it needs a product, and which part of the products need it."""
    before = [ancestors(product) for product in products]
    needed = [sum(node in own for own in before) / len(products) for node in exchanges]
    needs = [bool(ancestors(node) & set(products)) for node in exchanges]
    return list(zip(needs, needed, strict=True))


def traced(pipelined):
    """The nodes of one step, early exchange with C = 14 places and late with L = 6."""
    tables = sharded(two_tables(RowAdagrad(0.1), rows=ROWS))
    ids, batch = next(colliding_batches(1, 0.5))
    state = jax.eval_shape(
        lambda: init_sharded_state(tables, dense_params(), SGD, key=jax.random.key(0))
    )
    capacity = {"items+users": 14, "items+users" + LATE: 6}
    if not pipelined:
        step = make_sharded_step(tables, pair_loss, SGD, {"items+users": 14})
        return exchanges_and_products(step, (state, ids, batch))
    pipeline = PrioritizedStep(tables, pair_loss, SGD, capacity)
    begin = lambda tables: pipeline._exchange.begin(tables, ids, batch, (("items+users", 14),))  # noqa: E731
    ahead, deferred = jax.eval_shape(begin, state.tables)
    carry: Any = PipelineState(state, ahead, deferred)
    return exchanges_and_products(pipeline.build(capacity), (carry, ids, batch))


def test_what_waits_for_the_computation_and_what_the_computation_waits_for():
    exchanges, products = traced(pipelined=True)
    found = {}
    for node, own in zip(exchanges, waits(exchanges, products), strict=True):
        kind = {2: "ids" if node.dtype == jnp.int32 else "marks", 3: f"rows {node.shape[1:2]}"}
        found.setdefault(kind[len(node.shape)], []).append(own)
    # Beside the forward pass, which does not wait: the backward pass does.
    backward = found["ids"][0][1]
    assert 0 < backward < 1
    assert found["ids"] == [(False, backward)]
    # Deferred gradients too; the early rows are sent behind it, beside the backward pass.
    assert found["rows (14,)"] == [(False, backward), (True, 0)]
    assert found["marks"] == [(False, 0)]
    # What is waited for: late rows before the first product, late gradients after the last.
    assert found["rows (6,)"] == [(False, 1), (True, 0)]
    assert len(exchanges) == 6


def test_the_plain_exchange_and_the_computation_wait_for_each_other():
    exchanges, products = traced(pipelined=False)
    found = waits(exchanges, products)
    assert found == [(False, 1), (False, 1), (True, 0)], "ids, rows, gradients"


def test_tables_are_updated_in_place():
    size = 50_000
    specs = [
        EmbeddingTable("items", size, 4, RowAdam()), EmbeddingTable("users", 64, 4, RowSGD())
    ]  # fmt: skip
    tables = sharded(specs)
    ids, batch = random_batch(np.random.default_rng(0))
    state = init_sharded_state(tables, dense_params(), SGD, key=jax.random.key(0))
    pipeline = PrioritizedStep(tables, pair_loss, SGD)
    carry = pipeline.start(state, ids, batch)
    compiled = pipeline.build(pipeline.capacity).lower(carry, ids, batch).compile()  # pyright: ignore
    memory = compiled.memory_analysis()
    assert memory.temp_size_in_bytes < size * 4 * 4 / 8, "a copy of a shard would be larger"
