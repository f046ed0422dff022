"""Sharded tables equal dense ones with the same optimizer; nothing is dropped, nothing is dense."""

import re
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import optax
import pytest
from dense_twin import (
    FEATURES,
    OPTIMIZERS,
    DenseTwin,
    dense_params,
    pair_loss,
    random_batch,
    two_tables,
)
from jax.extend.core import jaxprs_in_params

from jaxrec.distributed import (
    Bags,
    EmbeddingTable,
    Feature,
    GrowingStep,
    IdError,
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
EVERYTHING = dict.fromkeys(("items", "users", "items+users"), 200)


def sharded(specs, mesh=MESH, features=FEATURES, **options: Any) -> ShardedTables:
    return ShardedTables(specs, mesh, features=features, virtual_shards=16, **options)


def growing(tables, capacity) -> GrowingStep:
    return GrowingStep(tables, lambda c: make_sharded_step(tables, pair_loss, SGD, c), capacity)


@cache
def both_tables(name) -> ShardedTables:
    return sharded(two_tables(OPTIMIZERS[name]))


@cache
def compiled(name, places):
    return make_sharded_step(both_tables(name), pair_loss, SGD, {"items+users": places})


def step_of(name, places=16) -> GrowingStep:
    """For `both_tables`; compiled once for all tests."""
    build = lambda capacity: compiled(name, capacity["items+users"])  # noqa: E731
    return GrowingStep(both_tables(name), build, {"items+users": places})


def start_of(tables):
    return init_sharded_state(tables, dense_params(), SGD, key=jax.random.key(1))


def assert_same_tables(tables, state, twin, *, atol):
    for name, values in twin.values.items():
        np.testing.assert_allclose(tables.dense(state.tables, name), values, atol=atol)


def assert_equals_twin(step, optimizer, batches, *, atol=1e-5):
    tables, state = step.tables, start_of(step.tables)
    start = {name: tables.dense(state.tables, name) for name in tables.tables}
    twin = DenseTwin(start, optimizer, dense_params())
    for ids, labels in batches:
        state, metrics = step(state, ids, labels)
        loss, scores = twin.step(ids, labels)
        np.testing.assert_allclose(metrics.loss, loss, rtol=1e-5)
        np.testing.assert_allclose(metrics.aux, scores, atol=atol)
    assert_same_tables(tables, state, twin, atol=atol)
    assert int(state.step) == len(batches)
    return state


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_equals_dense_tables(name):
    rng = np.random.default_rng(0)
    step = step_of(name)
    assert list(step.tables.groups) == ["items+users"], "one exchange for both"
    batches = [random_batch(rng) for _ in range(20)]
    assert_equals_twin(step, OPTIMIZERS[name], batches)
    assert step.retries == 0


def test_tables_of_different_kinds():
    rng = np.random.default_rng(1)
    adagrad = OPTIMIZERS["adagrad"]
    users = EmbeddingTable("users", 23, 4, adagrad, dtype="float32", memory="pinned_host", std=0.5)
    tables = sharded([two_tables(adagrad)[0], users])
    assert list(tables.groups) == ["items", "users"]
    batches = [random_batch(rng) for _ in range(6)]
    state = assert_equals_twin(growing(tables, EVERYTHING), adagrad, batches)
    kinds = {name: group.rows.sharding.memory_kind for name, group in state.tables.items()}
    assert kinds == {"items": "device", "users": "pinned_host"}


def test_overflow_grows_and_drops_nothing():
    rng = np.random.default_rng(2)
    batches = [random_batch(rng) for _ in range(8)]
    step = step_of("adam", 1)
    assert_equals_twin(step, OPTIMIZERS["adam"], batches)
    assert step.retries >= 1
    assert step.capacity["items+users"] > 1


def test_a_step_that_does_not_fit_changes_nothing():
    tables = both_tables("adam")
    state = start_of(tables)
    before = jax.tree.map(np.array, state)
    ids, labels = random_batch(np.random.default_rng(0))
    state, metrics = compiled("adam", 1)(state, ids, labels)
    assert not metrics.exchange.ok
    jax.tree.map(np.testing.assert_array_equal, jax.tree.map(np.asarray, state), before)
    grown = tables.grown({"items+users": 1}, metrics.exchange)
    assert grown["items+users"] >= int(metrics.exchange.needed["items+users"])


def everything_same(count, shape):
    return np.full(shape, min(7, count - 1), np.int32)


def padding_only(count, shape):
    return np.zeros(shape, np.int32)


@pytest.mark.parametrize("pick", [everything_same, padding_only])
def test_all_ids_equal_and_none_at_all(pick):
    rng = np.random.default_rng(3)
    batches = [random_batch(rng, pick=pick) for _ in range(3)]
    step = step_of("adagrad", 2)
    assert_equals_twin(step, OPTIMIZERS["adagrad"], batches)
    assert step.retries == 0, "one place is enough for an id, however often it comes"


def test_some_devices_have_no_ids():
    rng = np.random.default_rng(4)
    batches = [random_batch(rng) for _ in range(3)]
    for ids, _ in batches:
        for values in ids.values():
            values[:10] = 0
    assert_equals_twin(step_of("sgd"), OPTIMIZERS["sgd"], batches)


def test_rows_over_two_mesh_axes():
    rng = np.random.default_rng(5)
    mesh = make_mesh({"host": 2, "gpu": 4})
    tables = sharded(two_tables(OPTIMIZERS["adam"]), mesh, axis=("host", "gpu"))
    batches = [random_batch(rng) for _ in range(3)]
    assert_equals_twin(growing(tables, EVERYTHING), OPTIMIZERS["adam"], batches)


def test_the_same_on_any_number_of_devices():
    """A state goes on where it is restored to: its rows stand in the same order everywhere."""
    rng = np.random.default_rng(6)
    batches = [random_batch(rng) for _ in range(4)]
    few = sharded(two_tables(OPTIMIZERS["adam"]), make_mesh({"data": 2}))
    states = [start_of(both_tables("adam")), start_of(few)]
    assert_close(states[0], states[1])
    steps = [step_of("adam"), growing(few, EVERYTHING)]
    for batch in batches[:2]:
        states = [step(state, *batch)[0] for step, state in zip(steps, states, strict=True)]
    saved = jax.device_get(states[1])
    moved = saved._replace(tables=jax.device_put(saved.tables, both_tables("adam").shardings()))
    states[1], steps[1] = moved, steps[0]
    for batch in batches[2:]:
        states = [step(state, *batch)[0] for step, state in zip(steps, states, strict=True)]
    assert_close(*states)


def assert_close(one, other):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), one, other)


def test_repeats_to_the_bit():
    ends = []
    for _ in range(2):
        rng = np.random.default_rng(7)
        state = start_of(both_tables("adagrad"))
        for _ in range(3):
            state, _ = step_of("adagrad")(state, *random_batch(rng))
        ends.append(jax.device_get(state))
    jax.tree.map(np.testing.assert_array_equal, *ends)


def test_bf16_rows():
    optimizer = OPTIMIZERS["adagrad"]
    tables = sharded(two_tables(optimizer, dtype="bfloat16"))
    rng = np.random.default_rng(8)
    state = start_of(tables)
    start = {name: tables.dense(state.tables, name) for name in tables.tables}
    assert {value.dtype for value in start.values()} == {jnp.bfloat16.dtype}
    twin = DenseTwin(start, optimizer, dense_params())
    step = growing(tables, EVERYTHING)
    for _ in range(5):
        ids, labels = random_batch(rng)
        state, _ = step(state, ids, labels)
        twin.step(ids, labels)
    assert state.tables["items+users"].moments[0].dtype == jnp.float32
    for name, values in twin.values.items():
        np.testing.assert_allclose(
            np.asarray(tables.dense(state.tables, name), np.float32), values, atol=2e-2
        )


def test_lookups_of_every_kind():
    table = EmbeddingTable("t", 30, 3)
    features = {
        "sequence": Feature("t"),
        "sum": Feature("t", "sum"),
        "mean": Feature("t", "mean"),
        "bag_sum": Feature("t", "sum"),
        "bag_mean": Feature("t", "mean"),
    }
    tables = sharded([table], features=features)
    state = tables.init(jax.random.key(0))
    dense = np.asarray(tables.dense(state, "t"))
    assert not dense[0].any(), "padding's row"
    rng = np.random.default_rng(0)
    ids: dict[str, Any] = {
        name: rng.integers(0, 30, (8, 2, 3)).astype(np.int32) for name in list(features)[:3]
    }
    bags = Bags(rng.integers(0, 30, (8, 9)).astype(np.int32), np.tile([0, 2, 2, 7], (8, 1)))
    ids |= {"bag_sum": bags, "bag_mean": bags}

    @jax.jit
    def find(state, weights):
        plan = tables.plan(ids)
        rows = tables.lookup(state, plan)

        def total(rows):
            found = tables.embed(rows, plan)
            return sum((found[name] * weights[name]).sum() for name in found), found

        d_rows, found = jax.grad(total, has_aux=True)(rows)
        return found, tables.update(state, plan, d_rows)

    def by_hand(table):
        present = {n: (x if n[:3] != "bag" else x.ids) > 0 for n, x in ids.items()}
        spread = {n: table[x if n[:3] != "bag" else x.ids] for n, x in ids.items()}
        spread = {n: jnp.where(present[n][..., None], x, 0) for n, x in spread.items()}
        out = {"sequence": spread["sequence"], "sum": spread["sum"].sum((1, 2))}
        out["mean"] = spread["mean"].sum((1, 2)) / jnp.maximum(
            present["mean"].sum((1, 2)), 1
        )[:, None]  # fmt: skip
        for name in ("bag_sum", "bag_mean"):
            spans = zip(bags.offsets[0], bags.offsets[0][1:], strict=False)
            parts = []
            for a, b in spans:
                count = np.maximum(present[name][:, a:b].sum(1), 1)[:, None]
                total = spread[name][:, a:b].sum(1)
                parts.append(total / count if name == "bag_mean" else total)
            out[name] = jnp.stack(parts, 1)
        return out

    wanted = jax.jit(by_hand)(dense)
    weights = {name: rng.standard_normal(x.shape).astype(np.float32) for name, x in wanted.items()}
    found, after = find(state, weights)
    for name in features:
        np.testing.assert_allclose(found[name], wanted[name], atol=1e-6, err_msg=name)

    def total_by_hand(table):
        return sum((x * weights[n]).sum() for n, x in by_hand(table).items())

    grad = jax.jit(jax.grad(total_by_hand))(dense)
    total = np.mean(np.asarray(grad) ** 2, axis=1)
    step = 0.01 * np.asarray(grad) / (np.sqrt(total) + 1e-8)[:, None]
    np.testing.assert_allclose(tables.dense(after, "t"), dense - step, atol=1e-5)


def test_ids_outside_their_table():
    ids, labels = random_batch(np.random.default_rng(0))
    ids["user"][3], ids["item"][5] = 23, -4
    step = step_of("sgd")
    state = start_of(step.tables)
    before = jax.tree.map(np.array, state)
    with pytest.raises(
        IdError, match=r"'item' names id -4 of table 'items', which has rows 0 to 39"
    ):
        step(state, ids, labels)
    jax.tree.map(np.testing.assert_array_equal, jax.tree.map(np.asarray, step.state), before)
    ids["item"][5] = 0
    with pytest.raises(
        IdError, match=r"'user' names id 23 of table 'users', which has rows 0 to 22"
    ):
        step(step.state, ids, labels)


def test_unchecked_ids_outside_give_zeros_and_are_counted():
    rng = np.random.default_rng(0)
    optimizer = OPTIMIZERS["adam"]
    tables = sharded(two_tables(optimizer), checked=False)
    batches = [random_batch(rng) for _ in range(3)]
    for ids, _ in batches:
        ids["user"][3], ids["history"][5, 1:4] = 23, [-1, -2_000_000_000, 2**31 - 1]
    assert_equals_twin(growing(tables, EVERYTHING), optimizer, batches)
    plan = jax.jit(lambda ids: tables.plan(ids))(batches[0][0])
    strays = {name: x.tolist() for name, x in plan.report.strays.items()}
    assert strays["user"] == [1, 23]
    assert strays["history"] == [3, 2**31 - 1]
    assert strays["item"][0] == 0


def test_nothing_as_large_as_a_table_is_made():
    """The step's only arrays of a table's size are its tables, updated in place by scatters."""
    size = 50_000
    specs = [EmbeddingTable("items", size, 4, RowAdam()), EmbeddingTable("users", 64, 4, RowSGD())]
    tables = sharded(specs)
    state = jax.eval_shape(
        lambda: init_sharded_state(tables, dense_params(), SGD, key=jax.random.key(0))
    )
    ids, labels = random_batch(np.random.default_rng(0))
    step: Any = make_sharded_step(tables, pair_loss, SGD)
    makers = set()
    for equation in equations(step.trace(state, ids, labels).jaxpr.jaxpr):
        if any(getattr(out.aval, "size", 0) >= size // 8 for out in equation.outvars):
            makers.add(equation.primitive.name)
    assert makers <= {"jit", "pjit", "shard_map", "scatter"}, makers
    placed = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        state.tables, tables.shardings(),
    )  # fmt: skip
    compiled = step.lower(state._replace(tables=placed), ids, labels).compile()
    memory = compiled.memory_analysis()
    assert memory is not None
    assert memory.temp_size_in_bytes < size * 4 * 4 / 8, "a copy of a shard would be larger"
    assert not re.search(rf"copy\S* = f32\[{size // 8},4\]", compiled.as_text() or "")


def equations(jaxpr):
    for equation in jaxpr.eqns:
        yield equation
        for inner in jaxprs_in_params(equation.params):
            yield from equations(inner)


def test_what_a_device_sends():
    specs = [*two_tables(RowSGD()), EmbeddingTable("tags", 10, 8, dtype="bfloat16")]
    tables = sharded(specs, features=FEATURES | {"tags": Feature("tags", "sum")})
    capacity = {"items+users": 6, "tags": 3}
    rows = 8 * (6 * 4 * 4 + 3 * 8 * 2)
    assert tables.exchange_bytes(capacity) == {"ids": 4 * 8 * 9, "rows": rows, "gradients": rows}
    ids = random_batch(np.random.default_rng(0))[0] | {"tags": np.zeros((16, 4), np.int32)}
    state = jax.eval_shape(tables.init, jax.random.key(0))

    def there_and_back(state, ids):
        plan = tables.plan(ids, capacity)
        rows = tables.lookup(state, plan)
        return tables.update(state, plan, rows)

    jaxpr = jax.make_jaxpr(there_and_back)(state, ids).jaxpr
    sent = [e.invars[0].aval for e in equations(jaxpr) if e.primitive.name == "all_to_all"]
    total = sum(x.size * x.dtype.itemsize for x in sent)  # pyright: ignore
    assert total == sum(tables.exchange_bytes(capacity).values())


def test_neighbouring_ids_are_spread_over_devices():
    (group,) = ShardedTables([EmbeddingTable("t", 100_000, 1)], MESH).groups.values()
    rows = np.asarray(group.rows_of(group.tables[0]))
    assert len(np.unique(rows)) == 100_000
    owners = rows // (group.num_rows // 8)
    for start in (0, 17, 5_000):
        for length in (16, 64, 1000):
            counts = np.bincount(owners[start : start + length], minlength=8)
            assert counts.max() <= length / 8 + 2, "any stretch of ids burdens devices evenly"


def test_what_cannot_be_built(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # it would speak first
    table = EmbeddingTable("t", 10, 4)
    with pytest.raises(ValueError, match="num_rows of table 'x' is 0"):
        EmbeddingTable("x", 0, 4)
    with pytest.raises(ValueError, match="dtype of table 'x' is 'int8'"):
        EmbeddingTable("x", 1, 4, dtype="int8")  # pyright: ignore
    with pytest.raises(ValueError, match="memory of table 'x' is 'disk'"):
        EmbeddingTable("x", 1, 4, memory="disk")  # pyright: ignore
    with pytest.raises(ValueError, match="the mesh has no axis 'model'; it has data"):
        ShardedTables([table], MESH, axis="model")
    with pytest.raises(ValueError, match="virtual_shards is 12; expected a multiple of the 8"):
        ShardedTables([table], MESH, virtual_shards=12)
    with pytest.raises(ValueError, match="each name once"):
        ShardedTables([table, table], MESH)
    with pytest.raises(ValueError, match="feature 'a' is of table 'u'; there are t"):
        ShardedTables([table], MESH, features={"a": Feature("u"), "b": Feature("t")})
    with pytest.raises(ValueError, match="no feature is of table t"):
        ShardedTables([table], MESH, features={})
    with pytest.raises(ValueError, match="expected None, sum or mean"):
        Feature("t", "max")  # pyright: ignore
    with pytest.raises(ValueError, match="row numbers are i32"):
        ShardedTables([EmbeddingTable("t", 2**31 - 1, 4)], MESH)


def test_ids_that_do_not_fit_the_features():
    tables = sharded([EmbeddingTable("t", 10, 4)], features={"a": Feature("t")})
    with pytest.raises(ValueError, match=r"of the features \['b'\]; expected \['a'\]"):
        tables.plan({"b": np.zeros(8, np.int32)})
    with pytest.raises(ValueError, match=r"have shape \(7,\); expected a first axis that the 8"):
        tables.plan({"a": np.zeros(7, np.int32)})
    bags = Bags(np.zeros((8, 2), np.int32), np.zeros((8, 2), np.int32))
    with pytest.raises(ValueError, match="'a' has bags but no pooling"):
        tables.plan({"a": bags})
    state = tables.init(jax.random.key(0))
    with pytest.raises(ValueError, match="no table 'b'; there are t"):
        tables.dense(state, "b")
    with pytest.raises(ValueError, match=r"shape \(3, 4\); expected \(10, 4\)"):
        tables.with_rows(state, {"t": np.zeros((3, 4))})


def test_rows_put_in_come_out():
    tables = sharded(two_tables(RowAdagrad()))
    values = {
        "items": np.arange(160, dtype=np.float32).reshape(40, 4),
        "users": -np.arange(92, dtype=np.float32).reshape(23, 4),
    }
    state = tables.with_rows(tables.init(jax.random.key(0)), values)
    for name, value in values.items():
        np.testing.assert_array_equal(tables.dense(state, name), value)
    assert state["items+users"].rows.sharding == tables.shardings()["items+users"].rows


def test_large_tables_part_into_groups():
    half = 2**30
    tables = [EmbeddingTable(name, half, 4) for name in "abc"]
    assert [group.name for group in ShardedTables(tables, MESH).groups.values()] == ["a", "b", "c"]


def test_learning_rate_by_schedule():
    optimizer = RowSGD(lambda step: 0.1 * (step + 1))
    tables = sharded([EmbeddingTable("t", 10, 2, optimizer)], features=None)
    state = tables.init(jax.random.key(0))
    dense = np.asarray(tables.dense(state, "t"))

    @jax.jit
    def step(state, ids):
        plan = tables.plan({"t": ids})
        d_rows = jax.tree.map(jnp.ones_like, tables.lookup(state, plan))
        return tables.update(state, plan, d_rows, step=4)

    state = step(state, np.array([3] + 7 * [0], np.int32))
    np.testing.assert_allclose(np.asarray(tables.dense(state, "t"))[3], dense[3] - 0.5, atol=1e-6)
