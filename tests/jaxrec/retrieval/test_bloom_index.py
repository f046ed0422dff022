"""Random catalogues and expressions: nothing eligible is lost, exact masks equal brute force."""

import resource
import time

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from jaxrec.retrieval import BloomIndex, F, FilterError, bloom_index, spread_tiles, unpack_mask
from jaxrec.retrieval import terms as terms_module
from jaxrec.retrieval.filters import And, Everything, Not, Nothing, Or, Term
from jaxrec.retrieval.terms import hash_texts

LANGUAGES = np.array(["en", "de", "fr"])


def catalogue(rng, num_items):
    """A head feature, a many-valued one, and a long-tailed integer with gaps."""
    categories = [list(rng.choice(40, rng.integers(0, 6), replace=False)) for _ in range(num_items)]
    return {
        "language": rng.choice(LANGUAGES, num_items, p=[0.7, 0.28, 0.02]),
        "category": [c if len(c) != 1 else c[0] for c in categories],
        "creator": rng.zipf(1.4, num_items) % 3_000,
        "rare": [None if rng.random() < 0.95 else "yes" for _ in range(num_items)],
    }


def random_tree(rng, depth):
    kind = rng.integers(0, 5) if depth else 4
    if kind == 4:
        feature = rng.choice(["language", "category", "creator", "rare"])
        values = {
            "language": LANGUAGES,
            "category": range(42),
            "creator": range(20),
            "rare": ["yes"],
        }
        return F(str(feature)) == rng.choice(list(values[str(feature)]))
    if kind == 3:
        return ~random_tree(rng, depth - 1)
    parts = [random_tree(rng, depth - 1) for _ in range(rng.integers(2, 4))]
    tree = parts[0]
    for part in parts[1:]:
        tree = tree & part if kind < 2 else tree | part
    return tree


def brute_force(tree, features):
    match tree:
        case Everything():
            return np.ones(len(features["creator"]), bool)
        case Nothing():
            return np.zeros(len(features["creator"]), bool)
        case Term(feature, value):
            column = features[feature]
            if isinstance(column, np.ndarray):
                return column.astype(str) == value
            sets = [{str(v) for v in (x if isinstance(x, list) else [x])} for x in column]
            return np.array([value in values for values in sets])
        case Not(operand):
            return ~brute_force(operand, features)
        case And(operands):
            return np.all([brute_force(o, features) for o in operands], axis=0)
        case Or(operands):
            return np.any([brute_force(o, features) for o in operands], axis=0)
    raise TypeError(tree)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_masks_of_random_expressions(seed):
    rng = np.random.default_rng(seed)
    num_items = (1_000, 333, 2_100)[seed]
    features = catalogue(rng, num_items)
    index = BloomIndex.build(features, max_fpr=0.05, num_hashes=3, bundle_words=8)
    trees = [random_tree(rng, rng.integers(0, 4)) for _ in range(700)]
    plan = index.compile([str(tree) if i % 2 else tree for i, tree in enumerate(trees)])
    want = np.stack([brute_force(tree, features) for tree in trees])
    possibly = np.asarray(index.search(plan))
    assert possibly.shape == (700, -(-num_items // 32))
    unpacked = np.asarray(unpack_mask(possibly, num_items))
    assert not (want & ~unpacked).any()
    assert (unpacked & ~want).any()  # the filter is loose enough for verification to matter
    exact = index.search(plan, exact=True)
    np.testing.assert_array_equal(unpack_mask(exact, num_items), want)
    beyond = np.asarray(unpack_mask(exact, exact.shape[1] * 32))[:, num_items:]
    assert not beyond.any()
    surely = np.asarray(unpack_mask(index.masks(plan).surely, num_items))
    assert not (surely & ~want).any()


def test_traceable_exactness_and_verify(monkeypatch):
    rng = np.random.default_rng(3)
    features = catalogue(rng, 500)
    index = BloomIndex.build(features, max_fpr=0.05)
    trees = [random_tree(rng, 3) for _ in range(20)]
    plan = index.compile(trees)
    want = np.stack([brute_force(tree, features) for tree in trees])
    np.testing.assert_array_equal(unpack_mask(index.exact_mask(plan), 500), want)
    monkeypatch.setattr(bloom_index, "_EXACT_CHUNK_WORDS", 5)  # the last chunk is not full
    np.testing.assert_array_equal(unpack_mask(index.exact_mask(plan), 500), want)
    rows = rng.integers(-1, 500, (20, 60)).astype(np.int32)
    passes = np.take_along_axis(want, np.maximum(rows, 0), axis=1) & (rows >= 0)
    np.testing.assert_array_equal(index.verify(plan, jnp.asarray(rows)), passes)


@pytest.mark.parametrize("max_fpr", [1e-2, 1e-3])
def test_false_positive_rate(max_fpr):
    rng = np.random.default_rng(4)
    num_items = 20_000
    tags = [list(rng.choice(2_000, rng.integers(0, 12), replace=False)) for _ in range(num_items)]
    index = BloomIndex.build({"tag": tags}, max_fpr=max_fpr, bundle_words=32)
    assert index.num_head == 0
    plan = index.compile([F("tag") == tag for tag in range(400)])
    possibly = np.asarray(unpack_mask(index.search(plan), num_items))
    held = np.zeros_like(possibly)
    for item, own in enumerate(tags):
        held[[tag for tag in own if tag < 400], item] = True
    rate = (possibly & ~held).sum() / (~held).sum()
    assert 0.5 * max_fpr < rate <= 1.2 * max_fpr


def test_common_values_are_exact():
    index = BloomIndex.build({"language": ["en", "de"] * 50, "id": range(100)})
    assert index.num_head == 2
    masks = index.masks(index.compile(["language:en", "NOT language:en", "id:3"]))
    np.testing.assert_array_equal(masks.possibly[:2], masks.surely[:2])
    assert not np.asarray(masks.surely[2]).any()


@pytest.mark.parametrize("kind", [np.array, jnp.asarray, list])
def test_columns_of_any_kind(kind):
    index = BloomIndex.build({"n": kind([7, 8, 7]), "on": kind([True, False, True])})
    mask = index.search(index.compile(["n:7 AND on:true"]), exact=True)
    np.testing.assert_array_equal(unpack_mask(mask, 3)[0], [True, False, True])


def test_order_moves_the_bits_and_leaves_gaps_out():
    features = {"n": range(6)}
    order = np.array([4, -1, 0, 5, -1, 1])
    index = BloomIndex.build(features, order=order)
    plan = index.compile(["n:4 OR n:1", None, "NOT n:0", "n:2"])
    want = [
        [True, False, False, False, False, True],
        [True, False, True, True, False, True],
        [True, False, False, True, False, True],
        [False] * 6,
    ]
    for mask in (index.search(plan), index.search(plan, exact=True), index.exact_mask(plan)):
        np.testing.assert_array_equal(np.asarray(unpack_mask(mask, 6)) & (order >= 0), want)
    assert not np.asarray(index.verify(plan, np.array([[1]] * 4, np.int32))).any()


def test_masks_of_tiles_are_words_of_the_whole():
    rng = np.random.default_rng(5)
    index = BloomIndex.build(catalogue(rng, 500), max_fpr=0.05, bundle_words=8).clear([70, 71])
    plan = index.compile([random_tree(rng, 2) for _ in range(6)])
    tiles = np.stack([rng.permutation(8)[:5] for _ in range(6)]).astype(np.int32)
    tiles[:, 2] = -1
    for whole, part in zip(index.masks(plan), index.masks(plan, tiles), strict=True):
        spread = np.asarray(spread_tiles(part, tiles, whole.shape[1]))
        looked_at = np.zeros(whole.shape, bool)
        for query, own in enumerate(tiles):
            looked_at[query, [w for t in own[own >= 0] for w in (2 * t, 2 * t + 1)]] = True
        np.testing.assert_array_equal(spread, np.where(looked_at, whole, 0))


def test_queries_share_filters():
    rng = np.random.default_rng(6)
    index = BloomIndex.build(catalogue(rng, 300), max_fpr=0.1)
    trees = [random_tree(rng, 2) for _ in range(3)]
    filters = [trees[i] for i in (0, 1, 0, 2, 1, 0)]
    apart, shared = index.compile(filters), index.compile(filters, share=True)
    grouped = index.compile(trees).for_queries(np.array([0, 1, 0, 2, 1, 0]))
    assert (apart.opcodes.shape[0], shared.opcodes.shape[0], grouped.opcodes.shape[0]) == (6, 4, 3)
    rows = rng.integers(-1, 300, (6, 20)).astype(np.int32)
    tiles = rng.integers(-1, 5, (6, 3)).astype(np.int32)
    backwards = np.arange(6)[::-1]
    for plan in (shared, grouped.for_queries(backwards).for_queries(backwards)):
        assert plan.num_queries == 6
        for a, b in (
            (index.masks(plan), index.masks(apart)),
            (index.masks(plan, tiles), index.masks(apart, tiles)),
            ([index.search(plan, exact=True)], [index.search(apart, exact=True)]),
            ([index.exact_mask(plan)], [index.exact_mask(apart)]),
            ([index.verify(plan, rows)], [index.verify(apart, rows)]),
        ):
            for x, y in zip(a, b, strict=True):
                np.testing.assert_array_equal(x, y)
    with pytest.raises(ValueError, match="names the queries 0 to 6; the plan has 0 to 5"):
        apart.for_queries(np.array([0, 6]))


@pytest.mark.slow
@settings(max_examples=5, deadline=None, phases=(Phase.explicit, Phase.reuse, Phase.generate))
@given(st.integers(0, 2**32 - 1))
def test_ten_thousand_expressions_lose_nothing(seed):
    """Random catalogues and expressions, two thousand a plan; some items change in between."""
    rng = np.random.default_rng(seed)
    num_items = int(rng.integers(50, 400))
    features = catalogue(rng, num_items)
    index = BloomIndex.build(
        features, max_fpr=float(rng.choice([0.3, 0.05, 1e-3])),
        num_hashes=int(rng.integers(1, 6)), bundle_words=int(rng.choice([2, 8, 64])),
    )  # fmt: skip
    positions = rng.choice(num_items, 20, replace=False)
    changes = catalogue(rng, 20)
    for name, column in changes.items():
        features[name] = np.array(features[name], object)
        for position, entry in zip(positions, column, strict=True):
            features[name][position] = entry
    features = {name: list(column) for name, column in features.items()}
    index = index.update(positions, changes)
    trees = [random_tree(rng, rng.integers(0, 4)) for _ in range(2_000)]
    plan = index.compile(trees)
    want = np.stack([brute_force(tree, features) for tree in trees])
    possibly = np.asarray(unpack_mask(index.search(plan), num_items))
    assert not (want & ~possibly).any()
    exact = unpack_mask(index.search(plan, exact=True), num_items)
    np.testing.assert_array_equal(exact, want)


def test_unknown_values_match_nothing_and_unknown_features_fail():
    index = BloomIndex.build({"language": ["en", "de"]})
    plan = index.compile(["language:xx", "NOT language:xx", ""])
    np.testing.assert_array_equal(
        unpack_mask(index.search(plan), 2), [[False, False], [True, True], [True, True]]
    )
    for bad in ("lnguage:en", F("lnguage") == "en"):
        with pytest.raises(FilterError, match="did you mean 'language'"):
            index.compile([bad])


def test_explain_names_the_rejecting_clause():
    index = BloomIndex.build({"language": ["en", "de"], "tag": [["pop", "live"], None]})
    assert index.explain("language:en AND NOT tag:pop", 0) == "NOT tag:pop"
    assert index.explain("language:en AND NOT tag:pop", 1) == "language:en"
    assert index.explain("tag:rock OR tag:jazz", 0) == "tag:rock OR tag:jazz"
    assert index.explain("tag:live", 0) is None
    assert index.explain(None, 1) is None
    with pytest.raises(ValueError, match="positions 0 to 1"):
        index.explain("tag:live", 2)


def test_ten_thousand_terms():
    index = BloomIndex.build({"n": range(12_000)}, bundle_words=8)
    mask = index.search(index.compile([F("n").isin(range(0, 12_000, 2))]), exact=True)
    want = np.arange(12_000) % 2 == 0
    np.testing.assert_array_equal(unpack_mask(mask, 12_000)[0], want)


def test_entangled_filters_are_a_clear_error():
    tree = F("n") == 0
    for level in range(40):
        tree = tree & (F("n") == level) if level % 2 else tree | (F("n") == level)
    index = BloomIndex.build({"n": range(10)})
    index.compile([tree])  # deep on one side only: fits

    def full(depth):
        if depth == 0:
            return F("n") == 1
        left, right = full(depth - 1), full(depth - 1)
        return left & right if depth % 2 else left | right

    with pytest.raises(FilterError, match="needs a stack of 9 masks"):
        index.compile([full(8)])


@pytest.mark.parametrize(
    ("features", "message"),
    [
        ({}, "features is empty"),
        ({"a": [1, 2], "b": [1]}, "'b' has 1 entries and 'a' has 2"),
        ({"a": ["x", 1.5]}, "feature 'a' of item 1: .* not 1.5"),
        ({"": [1]}, "cannot be the name"),
        ({"a": ["x", float("nan")]}, "feature 'a' of item 1: .*None for a missing value"),
        ({"a": ["x", ["y", None]]}, "feature 'a' of item 1: .*None for a missing value"),
        ({"a": [1, b"x"]}, "feature 'a' of item 1: .*not b'x'"),
    ],
)
def test_bad_features(features, message):
    with pytest.raises(FilterError, match=message):
        BloomIndex.build(features)


def test_a_feature_may_change_its_type_from_item_to_item():
    index = BloomIndex.build({"a": [1, "1", [1, "x"], True, None, ("true",), {"1"}, np.int8(1)]})
    mask = index.search(index.compile(["a:1", "a:true", "NOT a:1"]), exact=True)
    want = [[1, 1, 1, 0, 0, 0, 1, 1], [0, 0, 0, 1, 0, 1, 0, 0], [0, 0, 0, 1, 1, 1, 0, 0]]
    np.testing.assert_array_equal(unpack_mask(mask, 8), np.array(want, bool))


def test_two_dimensional_columns_hold_a_value_a_place():
    values = np.array([[1, 2], [2, 2], [3, 1]])
    index = BloomIndex.build({"a": values})
    mask = index.search(index.compile(["a:1", "a:2"]), exact=True)
    np.testing.assert_array_equal(unpack_mask(mask, 3), [[True, False, True], [True, True, False]])


def test_an_item_with_ten_thousand_values():
    """It is found by each of them, and does not widen the rows for everybody else."""
    tags = [[f"t{i}"] for i in range(20_000)]
    tags[7] = [f"t{i}" for i in range(10_000)]
    index = BloomIndex.build({"tag": tags})
    small = BloomIndex.build({"tag": [[f"t{i}"] for i in range(20_000)]})
    assert index.rows.shape[0] < 2 * small.rows.shape[0]
    plan = index.compile(["tag:t9999", "tag:t10000"])
    found = np.asarray(unpack_mask(index.search(plan, exact=True), 20_000))
    assert np.flatnonzero(found[0]).tolist() == [7, 9_999]
    assert np.flatnonzero(found[1]).tolist() == [10_000]


@pytest.mark.slow
def test_a_million_distinct_values():
    """About 20 s on an idle core, and a few hundred bytes a value."""
    count = 1_000_000
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    index = BloomIndex.build({"creator": np.arange(count), "name": [f"n{i}" for i in range(count)]})
    seconds = time.monotonic() - began
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert seconds < 180
    assert grown < 1_500 * count
    assert index.num_head == 0
    plan = index.compile(["creator:999999", "name:n5", "name:n1000000"])
    masks = np.asarray(index.search(plan, exact=True))
    assert [np.flatnonzero(m).tolist() for m in masks] == [[999_999 // 32], [0], []]


def test_bad_arguments():
    with pytest.raises(ValueError, match="max_fpr is 1"):
        BloomIndex.build({"a": [1]}, max_fpr=1.0)
    with pytest.raises(ValueError, match="order names item 3"):
        BloomIndex.build({"a": [1]}, order=np.array([0, 3]))
    with pytest.raises(ValueError, match="more than once"):
        BloomIndex.build({"a": [1]}, order=np.array([0, 0]))
    with pytest.raises(ValueError, match="hold 32 items, not 33"):
        unpack_mask(np.zeros((1, 1), np.uint32), 33)


def test_hash_depends_on_every_byte_and_its_place():
    texts = ["", "a", "b", "ab", "ba", "aa", "aaa", "abcdefgh", "abcdefhg", "ä"]
    hashes = hash_texts(texts, 0)
    assert len(set(hashes.tolist())) == len(texts)
    assert not (hashes == hash_texts(texts, 1)).any()
    np.testing.assert_array_equal(hash_texts(texts[::-1], 0), hashes[::-1])


def test_colliding_hashes_get_another_seed(monkeypatch):
    def weak(texts, seed):
        return hash_texts(texts, seed) if seed else np.zeros(len(texts), np.uint64)

    monkeypatch.setattr(terms_module, "hash_texts", weak)
    index = BloomIndex.build({"a": ["x", "y"]})
    assert index.catalog.seed == 1
    mask = index.search(index.compile(["a:x"]), exact=True)
    np.testing.assert_array_equal(unpack_mask(mask, 2)[0], [True, False])
