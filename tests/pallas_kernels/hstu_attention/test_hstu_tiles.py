"""Tiles and works: every pair that attends is in one, few others are, and all rows are found."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import offsets_of
from dense_hstu import dense_mask

from pallas_kernels.hstu_attention.tiles import (
    TILE,
    WORK,
    Mask,
    Shape,
    from_rows,
    list_tiles,
    list_works,
    pack,
    to_rows,
)

# length, targets and mask
SEQUENCES = [
    (1, 0, Mask()),
    (64, 64, Mask()),
    (500, 150, Mask()),
    (450, 3, Mask(max_attn_len=100)),
    (450, 140, Mask(max_attn_len=64, min_full_attn_len=80)),
    (330, 70, Mask(contextual_len=3)),
    (520, 130, Mask(contextual_len=70, max_attn_len=40, min_full_attn_len=9)),
    (300, 297, Mask(contextual_len=3, max_attn_len=5)),
]


class _Columns:
    """Positions as they are."""

    def __init__(self, positions):
        self.below = lambda bound: positions < bound
        self.from_ = lambda bound: positions >= bound
        self.at = lambda bound: positions == bound


@pytest.mark.parametrize(("length", "targets", "mask"), SEQUENCES)
def test_runs_cover_what_attends(length, targets, mask):
    shape = Shape(np.int32(length), np.int32(length - targets))
    position = jnp.arange(length)
    attends = np.asarray(mask.attends(position[:, None], position, shape))
    wanted = dense_mask(
        [0, length],
        length,
        num_targets=[targets],
        max_attn_len=mask.max_attn_len,
        contextual_len=mask.contextual_len,
        min_full_attn_len=mask.min_full_attn_len,
    )
    np.testing.assert_array_equal(attends, wanted)
    behind = length + 3  # rows and columns of a tile that the sequence does not fill
    columns, row = _Columns(np.arange(behind)), np.arange(behind)[:, None]
    padded = np.pad(wanted, (0, 3))
    np.testing.assert_array_equal(mask.attended(row, columns, shape), padded)
    np.testing.assert_array_equal(mask.attending(row, columns, shape), padded.T)
    for runs, pairs in ((mask.key_runs, attends), (mask.query_runs, attends.T)):
        check_runs(runs, pairs, shape)


def needed_tiles(pairs, begin, end):
    columns = np.flatnonzero(pairs[begin:end].any(0))
    return set((columns // TILE).tolist())


def check_runs(runs, pairs, shape):
    length = int(shape.length)
    for begin in range(0, length, WORK):
        last = min(begin + WORK, length) - 1
        work = runs(np.int32(begin), np.int32(last), shape)
        listed = [int(work.tile(np.int32(step))) for step in range(int(work.count))]
        assert listed == sorted(set(listed))
        assert set(listed) <= set(range(-(-length // TILE)))
        for first in range(begin, last + 1, TILE):
            end = min(first + TILE, length)
            own = runs(np.int32(first), np.int32(end - 1), shape)
            low, high = (int(place) for place in work.within(own))
            assert needed_tiles(pairs, first, end) <= set(listed[low:high])


@pytest.mark.parametrize(("length", "targets", "mask"), SEQUENCES)
def test_full_tiles_are_full(length, targets, mask):
    shape = Shape(np.int32(length), np.int32(length - targets))
    position = jnp.arange(length)
    attends = np.asarray(mask.attends(position[:, None], position, shape))
    claimed = exist = 0
    for query in range(0, length - TILE + 1, TILE):
        for key in range(0, length - TILE + 1, TILE):
            is_full = attends[query : query + TILE, key : key + TILE].all()
            says = bool(mask.is_full(np.int32(query), np.int32(key), shape))
            assert is_full or not says
            claimed, exist = claimed + says, exist + is_full
    assert claimed >= 0.8 * exist


@pytest.mark.parametrize("lengths", [[65, 0, 1, 130], [0, 0, 7], [8, 16, 64]])
def test_rows_hold_every_token_once(lengths):
    num_tokens = sum(lengths) + 5
    x = jnp.arange(1, num_tokens + 1)[:, None]

    @jax.jit
    def there_and_back(offsets):
        packing = pack(offsets, None, num_tokens)
        rows = to_rows(x, packing)
        return packing.starts, rows, from_rows(rows, packing)

    starts, rows, back = map(np.asarray, there_and_back(offsets_of(lengths)))
    assert not np.any(starts % 8)
    assert sorted(rows[rows > 0]) == list(range(1, sum(lengths) + 1))
    np.testing.assert_array_equal(back[: sum(lengths)], x[: sum(lengths)])
    assert not back[sum(lengths) :].any()


@pytest.mark.parametrize(("lengths", "keeps"), [([72, 0, 128, 53], True), ([71, 129, 53], False)])
def test_a_broken_promise_of_alignment_gives_nan(lengths, keeps):
    x = jnp.ones((256, 1))
    packing = pack(jnp.asarray(offsets_of(lengths)), None, 256, aligned=True)
    rows = to_rows(x, packing)
    assert rows is x, "rows are the tokens"
    got = from_rows(rows, packing)
    np.testing.assert_array_equal(got[: sum(lengths)], 1 if keeps else np.nan)


def test_tiles_are_listed_from_the_last_places_on():
    lengths = np.array([65, 0, 1, 200, 64])
    packing = pack(jnp.asarray(offsets_of(lengths)), None, int(lengths.sum()) + 3)
    tiles = jax.jit(list_tiles, static_argnums=(1, 2))(packing, int(lengths.sum()) + 3, 5)
    starts = np.asarray(packing.starts)
    wanted = [(s, p, n, n) for s, n in zip(starts, lengths, strict=True) for p in range(0, n, TILE)]
    assert sorted(map(tuple, np.asarray(tiles.fields)[: len(wanted)].tolist())) == sorted(wanted)
    places = np.asarray(tiles.fields)[: len(wanted), 1]
    assert np.all(np.diff(places) <= 0)
    np.testing.assert_array_equal(tiles.counts, [np.sum(places >= TILE * n) for n in range(5)])


@functools.partial(jax.jit, static_argnames=("mask", "num_tokens"))
def tiles_of_warpgroups(offsets, mask, num_tokens):
    """(works, tiles that each half of each goes through)."""
    works = list_works(pack(offsets, None, num_tokens), mask, num_tokens)
    _, position, length, history_end = works.fields.T
    shape = Shape(length, history_end)
    work = mask.key_runs(position, jnp.minimum(position + WORK, length) - 1, shape)
    tiles = []
    for own in (position, position + TILE):
        low, high = work.within(mask.key_runs(own, jnp.minimum(own + TILE, length) - 1, shape))
        tiles.append(jnp.where(own < length, high - low, 0))
    return works, jnp.stack(tiles)


def computed_pairs(lengths, mask):
    """Pairs in the tiles that warpgroups go through."""
    lengths = np.asarray(lengths)
    works, tiles = tiles_of_warpgroups(offsets_of(lengths), mask, int(lengths.sum()))
    assert np.all(np.diff(works.tiles) <= 0), "the longest first"
    used = int(works.used[0])
    assert used == np.sum(-(-lengths // WORK))
    return int(np.asarray(tiles)[:, :used].sum(dtype=np.int64)) * TILE**2


@pytest.mark.parametrize(
    ("shortest", "longest", "limit"),
    [(64, 512, 1.5), (64, 16_384, 1.1), (512, 16_384, 1.1)],
)
def test_few_pairs_are_computed_in_vain(shortest, longest, limit):
    """Beside the lower triangle of each sequence; lengths by Zipf's law with exponent 1.2."""
    rng = np.random.default_rng(0)
    choices = np.arange(shortest, longest + 1)
    weights = choices**-1.2
    lengths = rng.choice(choices, 256, p=weights / weights.sum())
    needed = np.sum(lengths.astype(np.int64) * (lengths + 1) // 2)
    assert computed_pairs(lengths, Mask()) <= limit * needed


def test_a_window_bounds_the_work():
    windowed = computed_pairs([4096], Mask(max_attn_len=128))
    assert windowed <= 4096 * (128 + 2 * TILE)
