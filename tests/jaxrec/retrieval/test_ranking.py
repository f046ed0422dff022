"""Merge, over-arch and value model behind the search, against the same done by hand."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from mean_tower import MeanTower

from jaxrec.nn import (
    AttentionOverArch,
    AttentionOverArchConfig,
    MixtureOfLogits,
    MixtureOfLogitsConfig,
    MLPOverArch,
    MLPOverArchConfig,
    TaskHeads,
    TaskHeadsConfig,
    ValueModel,
)
from jaxrec.ops.jagged import JaggedBatch
from jaxrec.retrieval import (
    ItemIndex,
    LiveIndex,
    PublishError,
    Quota,
    Retriever,
    ShardedIndex,
    load_retriever,
    save_retriever,
)
from jaxrec.retrieval.retriever import _retrieve
from jaxrec.sharding import make_mesh

NUM_ITEMS, WIDTH, K = 300, 8, 10
TASKS = ("click", "like")
FILTERS = ["parity:0", None, "NOT parity:0 AND NOT third:1"]
OVERARCHS: dict[str, Any] = {
    "mol": lambda: MixtureOfLogits(
        MixtureOfLogitsConfig(WIDTH, component_width=4, scale=0.5), rngs=nnx.Rngs(3)
    ),
    "own parts": lambda: MixtureOfLogits(
        MixtureOfLogitsConfig(
            WIDTH, component_width=4, own_components=2, num_items=NUM_ITEMS, scale=0.5
        ),
        rngs=nnx.Rngs(3),
    ),
    "mlp": lambda: MLPOverArch(MLPOverArchConfig(WIDTH, hidden=(8,), scale=2.0), rngs=nnx.Rngs(3)),
    "attention": lambda: AttentionOverArch(
        AttentionOverArchConfig(WIDTH, hidden=8, scale=2.0), rngs=nnx.Rngs(3)
    ),
}


class Model(MeanTower):
    """A tower with what is asked for on it."""

    def __init__(self, *, tasks=(), overarch=None):
        super().__init__(NUM_ITEMS + 1, WIDTH, rngs=nnx.Rngs(0))
        self.heads = TaskHeads(TaskHeadsConfig(WIDTH, tasks), rngs=nnx.Rngs(1)) if tasks else None
        if self.heads is not None:
            down = self.heads.down
            down[...] = jax.random.normal(jax.random.key(2), down.shape)
        self.overarch = overarch


FEATURES = {"parity": np.arange(NUM_ITEMS) % 2, "third": np.arange(NUM_ITEMS) % 3}
SWAPPED = ValueModel("like", tasks=("like", "click"))
COLUMNS = {"age": np.random.default_rng(5).random(NUM_ITEMS).astype(np.float32)}


def build(model, **options) -> Retriever:
    return Retriever.build(model, FEATURES, key=jax.random.key(0), columns=COLUMNS, **options)


@pytest.fixture(scope="module")
def batch():
    items = np.random.default_rng(1).integers(1, NUM_ITEMS + 1, 12).astype(np.int32)
    targets = np.array([3, 7, 11], np.int32)
    return JaggedBatch(
        items, np.array([0, 4, 8, 12], np.int32), targets, np.zeros_like(targets),
        np.zeros_like(items),
    )  # fmt: skip


ELIGIBLE = np.stack(
    [
        FEATURES["parity"] == 0,
        np.ones(NUM_ITEMS, bool),
        (FEATURES["parity"] != 0) & (FEATURES["third"] != 1),
    ]
)


def all_scores(retriever, batch) -> np.ndarray:
    """[M, V - 1, T] scores of every item, with all eligible items as candidates."""
    model: Any = retriever.model
    queries = retriever.queries(batch).reshape(3, len(retriever.tasks), WIDTH)
    return np.asarray(scores_of(model, queries))


@nnx.jit
def scores_of(model, queries):
    table = model.item_embeddings()[1:]
    if model.overarch is None:
        return jnp.einsum("mtd,vd->mvt", queries, table)
    components = model.overarch.item_components(model.item_embeddings())
    components = jax.tree.map(lambda x: jnp.broadcast_to(x[1:], (3, *x[1:].shape)), components)
    return model.overarch(queries, components, jnp.asarray(ELIGIBLE))


def check(retriever, batch, values, **options):
    """The result is the best K of `values` among the eligible."""
    plan = retriever.compile(FILTERS)
    found = retriever(batch, plan, k=K, **options)
    values = np.where(ELIGIBLE, values, -np.inf)
    order = np.argsort(-values, axis=1)[:, :K]
    np.testing.assert_array_equal(found.ids, order + 1)
    best = np.take_along_axis(values, order, axis=1)
    np.testing.assert_allclose(found.scores, best, rtol=2e-4, atol=2e-4)
    return found


def test_over_arch_ranks_the_candidates(batch):
    retriever = build(Model(overarch=OVERARCHS["own parts"]()))
    scores = all_scores(retriever, batch)
    found = check(retriever, batch, scores[..., 0], exact=True, num_candidates=NUM_ITEMS)
    assert np.asarray(found.exact).all()
    plan = retriever.compile(FILTERS)
    few = retriever(batch, plan, k=K, num_candidates=K)
    assert not np.asarray(few.exact).any()
    by_dot = build(Model())(batch, plan, k=K)
    np.testing.assert_array_equal(np.sort(few.ids), np.sort(by_dot.ids))
    assert (np.asarray(few.ids) != np.asarray(by_dot.ids)).any()


@pytest.mark.parametrize("overarch", [None, "mol"])
def test_tasks_are_merged_and_valued(overarch, batch):
    formula = "click + 0.5 * like if age < 0.3 else max(click, 2 * like) - age"
    value_model = ValueModel(formula, tasks=TASKS, features=("age",))
    part = OVERARCHS[overarch]() if overarch else None
    retriever = build(Model(tasks=TASKS, overarch=part), value_model=value_model)
    assert retriever.tasks == TASKS
    assert retriever.queries(batch).shape == (3, 2, WIDTH)
    scores, age = all_scores(retriever, batch), COLUMNS["age"]
    click, like = scores[..., 0], scores[..., 1]
    values = np.where(age < 0.3, click + 0.5 * like, np.maximum(click, 2 * like) - age)
    found = check(retriever, batch, values, exact=True, num_candidates=NUM_ITEMS)
    assert np.asarray(found.exact).all()


@pytest.mark.parametrize("merge", ["union", "intersection", "quota"])
def test_candidates_are_those_of_the_policy(merge, batch):
    value_model = ValueModel("click + like", tasks=TASKS)
    retriever = build(Model(tasks=TASKS), value_model=value_model, merge=merge)
    found = retriever(batch, retriever.compile(FILTERS), k=K, exact=True, num_candidates=K)
    scores = np.where(ELIGIBLE[..., None], all_scores(retriever, batch), -np.inf)
    best = np.argsort(-scores, axis=1)[:, :K] + 1
    for user in range(3):
        mine = {int(i) for i in np.asarray(found.ids)[user] if i > 0}
        first, second = (set(best[user, :, task].tolist()) for task in range(2))
        assert mine <= first | second
        if merge == "intersection":
            assert mine == first & second
        if merge == "quota":
            assert len(mine & first) >= K // 2
            assert len(mine & second) >= K // 2


def test_fewer_candidates_than_results_leave_slots_empty(batch):
    retriever = build(Model(overarch=OVERARCHS["mol"]()))
    plan = retriever.compile(["parity:0 AND parity:1", "third:0 AND parity:0", None])
    found = retriever(batch, plan, k=60)
    np.testing.assert_array_equal(found.filled, [0, 50, 60])
    assert (np.asarray(found.ids)[0] == -1).all()
    assert np.isneginf(np.asarray(found.scores)[1, 50:]).all()


def test_history_is_left_out_of_every_task(batch):
    value_model = ValueModel("click + like", tasks=TASKS)
    retriever = build(Model(tasks=TASKS), value_model=value_model)
    found = retriever(batch, retriever.compile([None] * 3), k=50, exclude_history=True)
    for user, ids in enumerate(np.asarray(found.ids)):
        assert not set(ids) & set(batch.item_ids[4 * user : 4 * user + 4])


def test_explanation_adds_up(batch):
    formula = "click + like * age"
    value_model = ValueModel(formula, tasks=TASKS, features=("age",))
    retriever = build(Model(tasks=TASKS, overarch=OVERARCHS["mlp"]()), value_model=value_model)
    found = retriever(batch, retriever.compile(FILTERS), k=K)
    query, item = retriever.queries(batch)[0], int(found.ids[0, 0])
    why = retriever.explain(query, FILTERS[0], item)
    assert why.rejected_by is None
    assert why.value == pytest.approx(float(found.scores[0, 0]), rel=1e-4)
    assert why.value == pytest.approx(
        why.scores["click"] + why.scores["like"] * COLUMNS["age"][item - 1], rel=1e-4
    )
    assert [part.text for part in why.parts][-1] == value_model.formula
    assert set(why.search) == set(TASKS)
    assert retriever.explain(query, "parity:1 OR third:5", 1).rejected_by is not None


def test_a_value_model_alone_reorders_one_tasks_scores(batch):
    value_model = ValueModel("score - 10 * age", tasks=("score",), features=("age",))
    retriever = build(Model(), value_model=value_model)
    values = all_scores(retriever, batch)[..., 0] - 10 * COLUMNS["age"]
    check(retriever, batch, values, exact=True, num_candidates=NUM_ITEMS)


def test_components_may_be_kept_in_half(batch):
    full = build(Model(overarch=OVERARCHS["mol"]()))
    half = build(Model(overarch=OVERARCHS["mol"]()), component_dtype="bfloat16")
    sizes = [sum(c.nbytes for n, c in r.index.columns.items() if n != "age") for r in (full, half)]
    assert sizes[1] * 2 == sizes[0]
    plan = full.compile(FILTERS)
    a, b = (r(batch, plan, k=K, exact=True) for r in (full, half))
    np.testing.assert_allclose(a.scores, b.scores, rtol=0.05, atol=0.05)


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        ({"tasks": TASKS}, {}, "the tasks click, like: a value_model must say"),
        (
            {"tasks": TASKS},
            {"value_model": ValueModel("like", tasks=("like", "click"))},
            "this order",
        ),
        (
            {},
            {"value_model": ValueModel("a + b", tasks=("a", "b"))},
            "for 2 tasks; the model has 1",
        ),
        (
            {},
            {"value_model": ValueModel("s * cost", tasks=("s",), features=("cost",))},
            "reads the columns cost; the index has age",
        ),
        ({}, {"merge": "both"}, "unknown merge policy 'both'"),
    ],
)
def test_parts_that_do_not_fit(model, options, message):
    with pytest.raises(ValueError, match=message):
        build(Model(**model), **options)


def test_an_index_without_components_is_refused():
    plain = build(Model())
    with pytest.raises(ValueError, match="lacks the over-arch's item components"):
        Retriever(Model(overarch=OVERARCHS["mol"]()), plain.index)


def test_too_few_candidates_are_an_error(batch):
    retriever = build(Model(overarch=OVERARCHS["mol"]()))
    with pytest.raises(ValueError, match="num_candidates is 5; expected k = 10 or more"):
        retriever(batch, retriever.compile(FILTERS), k=K, num_candidates=5)


def test_everything_is_published_together(batch, tmp_path):
    value_model = ValueModel("click + like * age", tasks=TASKS, features=("age",))
    model = Model(tasks=TASKS, overarch=OVERARCHS["mlp"]())
    first = build(model, value_model=value_model, merge=Quota((0.7, 0.3)))
    save_retriever(first, tmp_path)
    again = load_retriever(
        tmp_path, build_model=lambda _: Model(tasks=TASKS, overarch=OVERARCHS["mlp"]())
    )
    assert again.merge == Quota((0.7, 0.3))
    assert again.value_model is not None
    assert again.value_model.formula == value_model.formula
    plan = first.compile(FILTERS)
    for mine, theirs in zip(first(batch, plan, k=K), again(batch, plan, k=K), strict=True):
        np.testing.assert_array_equal(mine, theirs)


@pytest.mark.parametrize("num_devices", [8, 4, 1])
def test_a_published_ranker_is_served_by_any_number_of_devices(published, batch, num_devices):
    """The index is split over the devices, tower and over-arch stand whole on each."""
    folder, first = published
    again = load_retriever(
        folder, build_model=lambda _: Model(tasks=TASKS, overarch=OVERARCHS["mol"]())
    )
    assert isinstance(again.index, ItemIndex)
    split = again.with_index(ShardedIndex.split(again.index, make_mesh({"items": num_devices})))
    options = {"k": K, "exact": True, "num_candidates": 50, "exclude_history": True}
    want = first(batch, first.compile(FILTERS), **options)
    found = split(batch, split.compile(FILTERS), **options)
    np.testing.assert_array_equal(found.ids, want.ids)
    np.testing.assert_allclose(found.scores, want.scores, rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A ranker with two tasks, and where it is published."""
    value_model = ValueModel("click + like * age", tasks=TASKS, features=("age",))
    first = build(Model(tasks=TASKS, overarch=OVERARCHS["mol"]()), value_model=value_model)
    folder = tmp_path_factory.mktemp("published")
    save_retriever(first, folder)
    return folder, first


def test_a_policy_of_ones_own_is_not_published(tmp_path):
    own = build(Model(), merge=lambda ids, scores, num: scores)
    with pytest.raises(PublishError, match="cannot be published"):
        save_retriever(own, tmp_path)


def test_a_live_index_is_ranked_and_its_updates_compile_nothing(batch):
    model = Model(overarch=OVERARCHS["mol"]())
    built = build(model)
    assert isinstance(built.index, ItemIndex)
    live = LiveIndex.build(built.index, capacity=64)
    served = built.with_index(live)
    plan, options = served.compile(FILTERS), {"k": K, "exact": True, "num_candidates": NUM_ITEMS}
    first = served(batch, plan, **options)
    for mine, theirs in zip(first, built(batch, plan, **options), strict=True):
        np.testing.assert_array_equal(mine, theirs)
    compiled = _retrieve._cache_size()  # pyright: ignore[reportAttributeAccessIssue]
    best = int(first.ids[1, 0])
    later = built.with_index(live.delete([best]))(batch, plan, **options)
    assert _retrieve._cache_size() == compiled  # pyright: ignore[reportAttributeAccessIssue]
    assert best not in np.asarray(later.ids)
    np.testing.assert_array_equal(later.ids[1, :-1], first.ids[1, 1:])
