"""The reference against brute force and against the items' real attributes."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from bloom_cases import brute_force, random_catalogue, random_programs, truth, unpack
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import bloom_search
from pallas_kernels.bloom import ref


def search(catalogue, opcodes, operands):
    possibly, surely = bloom_search(
        catalogue.rows,
        catalogue.row_offsets,
        opcodes,
        operands,
        num_head=catalogue.num_head,
        num_items=catalogue.num_items,
        backend="xla",
    )
    return unpack(possibly), unpack(surely)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**32 - 1),
    shape=st.sampled_from([(1, 0, 1), (65, 3, 3), (200, 3, 2), (192, 0, 3)]),
)
def test_equals_brute_force_and_brackets_the_truth(seed, shape):
    num_items, num_head, num_hashes = shape
    rng = np.random.default_rng(seed)
    catalogue = random_catalogue(
        rng, num_items=num_items, bundle_words=2, num_head=num_head, num_hashes=num_hashes
    )
    opcodes, operands, terms = random_programs(rng, catalogue, num_queries=5, num_steps=9)
    possibly, surely = search(catalogue, opcodes, operands)
    want_possibly, want_surely = brute_force(catalogue, opcodes, operands)
    np.testing.assert_array_equal(possibly[:, :num_items], want_possibly)
    np.testing.assert_array_equal(surely[:, :num_items], want_surely)
    assert not possibly[:, num_items:].any()
    assert not surely[:, num_items:].any()
    eligible = truth(catalogue, opcodes, operands, terms)
    assert (possibly[:, :num_items] >= eligible).all(), "an eligible item was lost"
    assert (surely[:, :num_items] <= eligible).all(), "an ineligible item is called sure"


def test_not_of_a_false_positive_keeps_the_item():
    """Where items are told apart badly, NOT must still lose none of them."""
    rng = np.random.default_rng(1)
    catalogue = random_catalogue(rng, num_items=400, bundle_words=2, max_fpr=0.6, num_terms=12)
    hashes = catalogue.hashes_of_term
    opcodes = np.tile(np.array([[2, 5]], np.int32), (12, 1))
    operands = np.repeat(hashes[:, None], 2, axis=1)
    possibly, _ = search(catalogue, opcodes, operands)
    lacks = ~catalogue.terms_of_item.T
    assert (possibly[:, :400] >= lacks).all()
    tail, _ = search(catalogue, opcodes[:, :1], operands[:, :1])
    assert (tail[:, :400] & lacks).any(), "the case has no false positive to speak of"


def test_deepest_stack():
    rng = np.random.default_rng(2)
    catalogue = random_catalogue(rng, num_items=300, bundle_words=2, num_head=3)
    opcodes = np.array([[1] * 8 + [4, 3] * 3 + [3]], np.int32)
    operands = rng.integers(0, 3, (1, opcodes.shape[1], 2)).astype(np.uint32)
    np.testing.assert_array_equal(
        search(catalogue, opcodes, operands)[0][:, :300],
        brute_force(catalogue, opcodes, operands)[0],
    )


def test_chunks_of_bundles_do_not_show():
    rng = np.random.default_rng(3)
    catalogue = random_catalogue(rng, num_items=64 * 7 - 5, bundle_words=2)
    opcodes, operands, _ = random_programs(rng, catalogue, num_queries=4, num_steps=7)
    static = {"num_head": catalogue.num_head, "num_items": catalogue.num_items}
    arrays = [jnp.asarray(x) for x in (catalogue.rows, catalogue.row_offsets, opcodes, operands)]
    assert ref._chunks(jnp.zeros((1, 7), jnp.int32), 2, 6).shape == (1, 3, 3)
    whole = ref.bloom_search(*arrays, **static)
    pieces = ref.bloom_search(*arrays, **static, chunk_words=6)
    for a, b in zip(whole, pieces, strict=True):
        np.testing.assert_array_equal(a, b)


def test_queries_side_by_side_equal_one_by_one():
    """What other devices than a CPU run: all queries at once, every operation computed."""
    rng = np.random.default_rng(4)
    catalogue = random_catalogue(rng, num_items=64 * 5, bundle_words=2)
    opcodes, operands, _ = random_programs(rng, catalogue, num_queries=4, num_steps=7)
    rows, row_offsets = jnp.asarray(catalogue.rows), jnp.asarray(catalogue.row_offsets)
    static = {"num_head": catalogue.num_head, "num_items": catalogue.num_items}
    chunks = ref._chunks(jnp.arange(5, dtype=jnp.int32)[None], 2, 6)[0]
    one_query = functools.partial(ref._search_one, rows[:, None], row_offsets, chunks, **static)
    together = jax.jit(jax.vmap(one_query))(opcodes, operands)
    wanted = ref.bloom_search(rows, row_offsets, opcodes, operands, **static)
    for a, b in zip(together, wanted, strict=True):
        np.testing.assert_array_equal(a[:, : b.shape[1]], b)


@pytest.mark.parametrize(("tile_words", "chunk_words"), [(1, 8), (2, 1000), (4, 4)])
def test_tiles_are_words_of_the_whole(tile_words, chunk_words):
    """Any tiles in any order, repeated or absent, for queries that share programs."""
    rng = np.random.default_rng(5)
    catalogue = random_catalogue(rng, num_items=128 * 5 - 9, bundle_words=4)
    opcodes, operands, _ = random_programs(rng, catalogue, num_queries=3, num_steps=7)
    index = (catalogue.rows, catalogue.row_offsets)
    static: Any = {"num_head": catalogue.num_head, "num_items": catalogue.num_items}
    plan_of_query = np.array([2, 0, 0, 1, 2], np.int32)
    tiles = rng.integers(-1, 20 // tile_words, (5, 11)).astype(np.int32)
    whole = bloom_search(*index, opcodes, operands, plan_of_query, **static)
    alone = bloom_search(*index, opcodes, operands, **static)
    part = bloom_search(
        *index, opcodes, operands, plan_of_query, tiles, tile_words=tile_words, **static
    )
    pieces = ref.bloom_search_tiles(
        *map(jnp.asarray, (*index, opcodes, operands, plan_of_query, tiles)),
        tile_words=tile_words, chunk_words=chunk_words, **static,
    )  # fmt: skip
    for all_words, own, words, chunked in zip(whole, alone, part, pieces, strict=True):
        np.testing.assert_array_equal(all_words, np.asarray(own)[plan_of_query])
        cut = np.asarray(all_words).reshape(5, -1, tile_words)
        want = cut[np.arange(5)[:, None], tiles] * (tiles >= 0)[..., None]
        np.testing.assert_array_equal(words, want.reshape(5, -1))
        np.testing.assert_array_equal(chunked, want.reshape(5, -1))


def test_index_without_rows_still_answers():
    rows, offsets = np.zeros((0, 2), np.uint32), np.zeros(3, np.int32)
    opcodes = np.array([[0, 0], [2, 5], [2, 0]], np.int32)
    operands = np.ones((3, 2, 2), np.uint32)
    masks = bloom_search(rows, offsets, opcodes, operands, num_head=0, num_items=100)
    assert unpack(masks.possibly).sum(1).tolist() == [100, 100, 0]
    assert unpack(masks.surely).sum(1).tolist() == [100, 100, 0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_items": 129}, "hold 0 to 128"),
        ({"num_items": -1}, "num_items is -1"),
        ({"num_head": -1}, "num_head is -1"),
        ({"opcodes": np.zeros((1, 3), np.int32)}, "operands has shape"),
        ({"rows": np.zeros((4, 2), np.int32)}, "rows is int32"),
        ({"tiles": np.zeros((2, 1), np.int32)}, "with 1 rows, one for each query"),
        ({"tiles": np.zeros((1, 1), np.int32), "tile_words": 3}, "a divisor of the bundle's 2"),
        ({"plan_of_query": np.zeros((1, 1), np.int32)}, "plan_of_query is int32"),
        ({"backend": "mosaic_gpu"}, "backend 'mosaic_gpu' cannot run this call"),
        ({"backend": "triton"}, "unknown backend 'triton'"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_errors_say_what_to_do(change, message):
    arguments = {
        "rows": np.zeros((4, 2), np.uint32),
        "row_offsets": np.array([0, 2, 4], np.int32),
        "opcodes": np.zeros((1, 2), np.int32),
        "operands": np.zeros((1, 2, 2), np.uint32),
        "num_head": 0,
        "num_items": 128,
    } | change
    plain = getattr(bloom_search, "__wrapped__", bloom_search)  # without the test-time type checks
    with pytest.raises(ValueError, match=message):
        plain(**arguments)
