"""Streams of updates against the items themselves, and what must not change meanwhile."""

import copy
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrec.retrieval import BloomIndex, F, FilterError, unpack_mask

NUM_ITEMS = 300
FILTERS = [
    "language:en",
    "NOT language:en AND tag IN [1, 2, 3, 60]",
    "tag:7 OR NOT tag:8",
    "(tag:1 AND tag:2) OR language:fr",
    "NOT (tag:40 OR tag:61)",
    None,
]


def random_items(rng, count, most_tags=6, num_tags=50):
    tags = [
        list(rng.choice(num_tags, rng.integers(0, most_tags), replace=False)) for _ in range(count)
    ]
    return {"language": list(rng.choice(["en", "de"], count)), "tag": [t or None for t in tags]}


def merged(features, positions, changes):
    out = {name: list(column) for name, column in features.items()}
    for name, column in changes.items():
        for position, entry in zip(positions, column, strict=True):
            out[name][position] = entry
    return out


def truth(features):
    """What FILTERS say of the items, one by one."""
    tags = [set(tags or ()) for tags in features["tag"]]
    languages = features["language"]
    clauses = [
        lambda tags, language: language == "en",
        lambda tags, language: language != "en" and bool(tags & {1, 2, 3, 60}),
        lambda tags, language: 7 in tags or 8 not in tags,
        lambda tags, language: {1, 2} <= tags or language == "fr",
        lambda tags, language: not tags & {40, 61},
        lambda tags, language: True,
    ]
    return np.array([[c(*item) for item in zip(tags, languages, strict=True)] for c in clauses])


def exact(index):
    """The exact masks as bools; the other masks are held against them."""
    plan = index.compile(FILTERS)
    masks = index.masks(plan)
    mask = np.array(unpack_mask(index.search(plan, exact=True), index.num_items))
    possibly, surely = (np.asarray(unpack_mask(m, index.num_items)) for m in masks)
    assert not (mask & ~possibly).any()
    assert not (surely & ~mask).any()
    np.testing.assert_array_equal(unpack_mask(index.exact_mask(plan), index.num_items), mask)
    return mask


@pytest.mark.parametrize("donate", [False, True])
def test_a_stream_of_updates(donate):
    rng = np.random.default_rng(0)
    features = random_items(rng, NUM_ITEMS)
    index = BloomIndex.build(features, max_fpr=0.05, num_hashes=3, bundle_words=4)
    for round_number in range(12):
        positions = rng.choice(NUM_ITEMS, rng.integers(1, 40), replace=False)
        changes = random_items(rng, len(positions), num_tags=50 + 3 * round_number)
        if round_number == 3:
            changes["language"][0] = "fr"  # unknown so far
        features = merged(features, positions, changes)
        index = index.update(positions, changes, donate=donate)
        np.testing.assert_array_equal(exact(index), truth(features))


def test_the_bits_are_those_of_a_build():
    """Old bits are gone: after all items were replaced, rows equal those of the new items."""
    rng = np.random.default_rng(1)
    features = random_items(rng, NUM_ITEMS)
    index = BloomIndex.build(features, max_fpr=0.05, bundle_words=4)
    changes = random_items(rng, NUM_ITEMS)
    there = index.update(np.arange(NUM_ITEMS), changes)
    back = there.update(rng.permutation(NUM_ITEMS), {"language": [None] * 300, "tag": [None] * 300})
    assert not np.asarray(back.rows).any()
    again = back.update(np.arange(NUM_ITEMS), features)
    np.testing.assert_array_equal(again.rows, index.rows)
    assert (np.asarray(there.rows) != np.asarray(index.rows)).any()


def test_clear_and_refill():
    rng = np.random.default_rng(2)
    features = random_items(rng, NUM_ITEMS)
    index = BloomIndex.build(features)
    gone = np.array([0, 5, 31, 32, 299])
    cleared = index.clear(gone).clear(gone[:2])
    want = exact(index)
    want[:, gone] = False
    np.testing.assert_array_equal(exact(cleared), want)
    rows = np.tile(gone.astype(np.int32), (len(FILTERS), 1))
    assert not np.asarray(cleared.verify(cleared.compile(FILTERS), rows)).any()
    with pytest.raises(ValueError, match="position 31 holds no item"):
        cleared.explain(None, 31)
    refilled = cleared.update(
        gone, {n: [column[i] for i in gone] for n, column in features.items()}
    )
    np.testing.assert_array_equal(exact(refilled), exact(index))


@pytest.mark.parametrize("fresh_of", ["empty_like", "capacity", "order"])
def test_an_empty_index_grows(fresh_of):
    rng = np.random.default_rng(3)
    features = random_items(rng, 100)
    if fresh_of == "empty_like":
        index = BloomIndex.build(features).empty_like(100)
    elif fresh_of == "capacity":
        index = BloomIndex.build({"language": [], "tag": []}, capacity=100, tail_terms=5)
    else:
        index = BloomIndex.build(features, order=np.full(100, -1))
    assert not exact(index).any()
    slots = index.term_values.shape
    for begin in range(0, 100, 20):
        part = {name: column[begin : begin + 20] for name, column in features.items()}
        index = index.update(np.arange(begin, begin + 20), part)
    assert index.term_values.shape == slots
    np.testing.assert_array_equal(exact(index), truth(features))


def test_one_plan_serves_the_main_and_the_fresh_index():
    rng = np.random.default_rng(4)
    main = BloomIndex.build(random_items(rng, NUM_ITEMS))
    early = main.compile(["language:en", "tag:new"])
    fresh = main.empty_like(64).update([3], {"language": ["en"], "tag": [["new", 1]]})
    late = main.compile(["language:en AND tag:new", "tag:new"])
    for index in (main, fresh):
        for plan in (early, late):
            index.search(plan, exact=True)
    assert unpack_mask(fresh.search(late, exact=True), 64).sum(1).tolist() == [1, 1]
    assert unpack_mask(fresh.search(early, exact=True), 64).sum(1).tolist() == [1, 0]
    assert unpack_mask(main.search(late, exact=True), NUM_ITEMS).sum(1).tolist() == [0, 0]
    assert fresh.explain("tag:other", 3) == "tag:other"
    assert fresh.explain("tag:new", 3) is None


def test_updates_compile_nothing_anew():
    rng = np.random.default_rng(5)
    index = BloomIndex.build(random_items(rng, NUM_ITEMS), max_fpr=0.05)
    traced = []

    @jax.jit
    def search(index, plan):
        traced.append(1)
        return index.masks(plan), index.exact_mask(plan)

    plan = index.compile(["tag:1", "NOT tag:2"])
    search(index, plan)
    shapes = [x.shape for x in jax.tree.leaves(index)]
    for step in range(60):  # long enough for the pool of terms to be compacted several times
        positions = rng.choice(NUM_ITEMS, 100, replace=False)
        index = index.update(positions, random_items(rng, 100, num_tags=50 + step))
        index = index.clear(positions[:3])
        search(index, plan)
    assert len(traced) == 1
    assert [x.shape for x in jax.tree.leaves(index)] == shapes


def test_the_pool_grows_when_items_do():
    rng = np.random.default_rng(6)
    features = random_items(rng, 40)
    index = BloomIndex.build(features)
    changes = {"language": ["en"] * 20, "tag": [list(range(i, 500 + i)) for i in range(20)]}
    index = index.update(np.arange(20), changes)
    np.testing.assert_array_equal(exact(index), truth(merged(features, range(20), changes)))
    assert index.max_item_terms >= 501


def test_donating_writes_in_place():
    rng = np.random.default_rng(7)
    index = BloomIndex.build(random_items(rng, NUM_ITEMS))
    index = index.update([0], random_items(rng, 1))  # arrays of its own
    rows, values = jnp.asarray(index.rows), jnp.asarray(index.term_values)
    place = rows.unsafe_buffer_pointer()
    updated = index.update([1], random_items(rng, 1), donate=True)
    assert jnp.asarray(updated.rows).unsafe_buffer_pointer() == place
    assert rows.is_deleted()
    assert values.is_deleted()
    live = jnp.asarray(updated.live)
    updated.clear([1], donate=True)
    assert live.is_deleted()


def test_without_donation_the_old_index_stays():
    rng = np.random.default_rng(8)
    index = BloomIndex.build(random_items(rng, NUM_ITEMS))
    before = exact(index)
    index.update(np.arange(50), random_items(rng, 50))
    index.clear(np.arange(50))
    np.testing.assert_array_equal(exact(index), before)


def test_copies_share_the_catalogue_and_pickles_carry_it():
    rng = np.random.default_rng(9)
    index = BloomIndex.build(random_items(rng, NUM_ITEMS))
    early, copied = index.compile(["tag:1"]), copy.deepcopy(index)
    index = index.update([0], {"language": ["xx"], "tag": [None]})
    copied.update([0], {"language": ["yy"], "tag": [None]})
    late = index.compile(["language:xx"])
    assert unpack_mask(index.search(late, exact=True), NUM_ITEMS).sum() == 1
    restored = pickle.loads(pickle.dumps(index))
    assert (
        unpack_mask(restored.search(restored.compile(["language:xx"]), exact=True), 300).sum() == 1
    )
    for stale in (early, late):
        with pytest.raises(ValueError, match="compiled for another catalogue"):
            restored.search(stale)


def test_plans_of_another_catalogue_are_refused_everywhere():
    one = BloomIndex.build({"tag": [1, 2]})
    other = BloomIndex.build({"tag": [1, 3]})
    same = BloomIndex.build({"tag": [1, 2]})
    plan = one.compile(["tag:1"])
    same.search(plan)  # the same terms under the same numbers
    rows = np.zeros((1, 1), np.int32)
    for call in (
        lambda: other.search(plan),
        lambda: other.masks(plan),
        lambda: other.exact_mask(plan),
        lambda: other.verify(plan, rows),
        lambda: jax.jit(lambda index, plan: index.masks(plan))(other, plan),
    ):
        with pytest.raises(ValueError, match="compiled for another catalogue"):
            call()
    one.update([0], {"tag": ["late"]})
    late = one.compile(["tag:late"])
    with pytest.raises(ValueError, match="compiled for another catalogue"):
        same.search(late)


@pytest.mark.parametrize(
    ("positions", "features", "message"),
    [
        ([300], {"language": ["en"], "tag": [1]}, r"positions\[0\] is 300.* 0 to 299"),
        ([-1], {"language": ["en"], "tag": [1]}, r"positions\[0\] is -1"),
        ([4, 4], {"language": ["en"] * 2, "tag": [1, 2]}, "position 4 is given more than once"),
        ([1], {"language": ["en"]}, "expected language, tag, with None"),
        ([1], {"language": ["en"], "tag": [1], "x": [1]}, "have the features language, tag, x"),
        ([1], {"language": ["en"] * 2, "tag": [1, 2]}, "2 entries for 1 items"),
        ([1], {"language": ["en"], "tag": [["new", 1.5]]}, "feature 'tag' of item 0: .*1.5"),
    ],
)
def test_bad_updates_are_named_and_change_nothing(positions, features, message):
    index = BloomIndex.build(random_items(np.random.default_rng(10), NUM_ITEMS))
    known = len(index.catalog)
    with pytest.raises((ValueError, FilterError), match=message):
        index.update(np.array(positions), features)
    assert len(index.catalog) == known


def test_bad_capacities():
    with pytest.raises(ValueError, match="capacity is 1; the features describe 2 items"):
        BloomIndex.build({"a": [1, 2]}, capacity=1)
    with pytest.raises(ValueError, match="capacity is 3 and order has 2"):
        BloomIndex.build({"a": [1, 2]}, order=np.array([0, 1]), capacity=3)
    with pytest.raises(ValueError, match="tail_terms -1"):
        BloomIndex.build({"a": [1, 2]}).empty_like(3, tail_terms=-1)
    with pytest.raises(ValueError, match="tail_terms -1"):
        BloomIndex.build({"a": [1, 2]}, tail_terms=-1)


def test_a_large_fresh_index_has_room_for_its_items():
    main = BloomIndex.build({"tag": [list(range(i, i + 20)) for i in range(500)]})
    fresh = main.empty_like(2_000)
    tags = [list(range(i, i + 20)) for i in range(2_000)]
    filled = fresh.update(np.arange(2_000), {"tag": tags})
    assert filled.term_values.shape == fresh.term_values.shape
    plan = main.compile(["tag:7"])
    found = np.asarray(unpack_mask(filled.search(plan, exact=True), 2_000))
    assert np.flatnonzero(found[0]).tolist() == list(range(8))


def test_updated_items_match_no_foreign_terms():
    index = BloomIndex.build({"a": [[f"t{i}", f"u{i}"] for i in range(64)]}, capacity=128)
    index = index.update(np.arange(64, 128), {"a": [[f"v{i}"] for i in range(64)]})
    plan = index.compile([F("a") == f"v{i}" for i in range(64)])
    found = np.asarray(unpack_mask(index.search(plan), 128))
    assert found[np.arange(64), np.arange(64, 128)].all()
    assert found.sum() < 64 + 64 * 128 * 0.01
