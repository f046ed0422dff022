"""The IVF search by its kernel: one jitted program, from the centroids to the k best rows."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Float32, Int8, Int32, UInt32

from pallas_kernels.ivf import ref
from pallas_kernels.ivf.config import (
    TILE_ROWS,
    IvfKernelConfig,
    group_queries,
    max_slots,
    num_fetched,
    sorted_keys,
)
from pallas_kernels.ivf.mosaic_gpu import MASKED, ivf_scan
from pallas_kernels.ivf.slots import Slots, list_slots, programs, strided_slots

_ROUNDING = 2.0**-21  # of a score in the kernel against the same score of the reference


def _slot_words(live, mask, mask_of_query, slots: Slots) -> UInt32[Array, "slots words"]:
    """Eligible rows of each slot's tiles: live, and let through by the mask of its query."""
    columns = (2 * slots.tiles[..., None] + jnp.arange(2)).reshape(*slots.counts.shape, -1)
    words = live[columns]
    if mask is not None:
        words = words & mask[mask_of_query[:, None, None], columns]
    return words.reshape(slots.counts.size, -1)  # words behind the counts are not looked at


class _Found(NamedTuple):
    """The best rows, and a bound on the score of every row that was scanned and is not here."""

    scores: Float32[Array, "Q K"]
    rows: Int32[Array, "Q K"]
    bound: Float32[Array, "Q"]


def _best_survivors(survivors, slots: Slots, scorer, k: int, config: IvfKernelConfig) -> _Found:
    """The k best survivors [Q, S, kept, lane]."""
    fetched = num_fetched(k, survivors[0].size)  # a few more, as keys are rounded
    best, slot, lane = _best_keys(survivors, slots.counts > 0, fetched)
    step = lax.bitcast_convert_type(best, jnp.int32) & config.tag_mask
    tiles = slots.tiles.reshape(len(best), -1)
    tile = jnp.take_along_axis(tiles, slot * config.slot_tiles + step, axis=1)
    rows = jnp.where(best > MASKED, tile * TILE_ROWS + lane, -1)
    # What is not among them was pushed out of a full lane, or not fetched.
    pushed_out = jnp.where(slots.counts[..., None] > 0, survivors[:, :, -1], MASKED)
    lost = jnp.max(pushed_out, axis=(1, 2))
    if fetched < survivors[0].size:
        lost = jnp.maximum(lost, best[:, -1])
    scores, rows = _top(scorer.exact(rows), rows, k)
    return _Found(scores, rows, scorer.upper_bound(lost, config))


def _best_keys(survivors: Float32[Array, "Q S kept lane"], used: Bool[Array, "Q S"], count: int):
    """The `count` best keys of each query's `used` slots, and the slots and lanes they come from.

    Lanes keep their keys in order, so the best lie in the `count` lanes of the best first keys:
    two small sorts, of a key for each lane and of the keys of these lanes, replace a large one.
    """
    num_queries, _, kept, num_lanes = survivors.shape
    if sorted_keys(survivors[0].size, kept, count) == survivors[0].size:
        keys = jnp.where(used[..., None, None], survivors, MASKED).reshape(num_queries, -1)
        best, place = lax.top_k(keys, count)
        return best, place // (kept * num_lanes), place % num_lanes
    first = jnp.where(used[..., None], survivors[:, :, 0], MASKED).reshape(num_queries, -1)
    first, column = lax.top_k(first, count)
    slot, lane = column // num_lanes, column % num_lanes
    keys = survivors[jnp.arange(num_queries)[:, None], slot, :, lane]
    keys = jnp.where(first[..., None] > MASKED, keys, MASKED).reshape(num_queries, -1)
    best, place = lax.top_k(keys, count)
    slot, lane = (jnp.take_along_axis(x, place // kept, axis=1) for x in (slot, lane))
    return best, slot, lane


def _top(scores: Float32[Array, "Q n"], rows: Int32[Array, "Q n"], k: int):
    """The k best and their rows; -inf and -1 where there are fewer."""
    best, order = lax.top_k(scores, min(k, scores.shape[1]))
    missing = ((0, 0), (0, k - best.shape[1]))
    rows = jnp.pad(jnp.take_along_axis(rows, order, axis=1), missing, constant_values=-1)
    return jnp.pad(best, missing, constant_values=-jnp.inf), rows


class _Scorer(NamedTuple):
    """Scores of single rows, as the reference computes them."""

    queries: Int8[Array, "Q D"]
    query_scales: Float32[Array, "Q"]
    codes: Int8[Array, "R D"]
    scales: Float32[Array, "R"]

    def exact(self, rows: Int32[Array, "Q n"]) -> Float32[Array, "Q n"]:
        """Each query's own rows; -inf for row -1."""
        safe = jnp.maximum(rows, 0)
        products = self.codes[safe].astype(jnp.int32) * self.queries[:, None].astype(jnp.int32)
        scores = jnp.sum(products, axis=2).astype(jnp.float32)
        scores = scores * (self.query_scales[:, None] * self.scales[safe])
        return jnp.where(rows >= 0, scores, -jnp.inf)

    def upper_bound(self, keys: Float32[Array, "Q"], config: IvfKernelConfig):
        """No row with this key or a lower one scores higher; -inf for the key of no row."""
        bits = lax.bitcast_convert_type(keys, jnp.int32)
        bits = jnp.where(keys >= 0, bits | config.tag_mask, bits & ~config.tag_mask)
        bound = lax.bitcast_convert_type(bits, jnp.float32) * self.query_scales
        return jnp.where(keys > MASKED, bound + jnp.abs(bound) * _ROUNDING, -jnp.inf)


@functools.partial(
    jax.jit, static_argnames=("k", "nprobe", "max_tiles", "max_list_tiles", "config", "few")
)
def ivf_search(
    queries: Float[Array, "Q D"],
    centroids: Float[Array, "C D"],
    codes: Int8[Array, "R D"],
    scales: Float32[Array, "R"],
    tile_offsets: Int32[Array, "C1"],
    live: UInt32[Array, "words"],
    mask: UInt32[Array, "M words"] | None,
    mask_of_query: Int32[Array, "Q"] | None,
    probes: Int32[Array, "Q"] | None,
    *,
    k: int,
    nprobe: int,
    max_tiles: int,
    max_list_tiles: int | None,
    config: IvfKernelConfig,
    few: tuple[int, int, IvfKernelConfig] | None = None,
) -> tuple[Float32[Array, "Q {k}"], Int32[Array, "Q {k}"], Bool[Array, "Q"]]:
    """`pallas_kernels.ivf_search` and `complete`, by the kernel.

    `few` are (lists, tiles, config) of a second program: for batches whose `probes` stay below
    these bounds, so that they do not pay for the largest.

    Work that takes more scratch than the configuration allows is cut: if all lists are probed in
    parts of the rows, which all queries pass together, else in groups of queries.
    """
    num_queries, num_tiles = queries.shape[0], codes.shape[0] // TILE_ROWS
    if mask_of_query is None:
        mask_of_query = jnp.arange(num_queries, dtype=jnp.int32)
    query_codes, query_scales = ref.quantise(queries)
    search = functools.partial(_search_tiles, codes, scales, live, mask, k=k)
    own = query_codes, query_scales, mask_of_query
    if nprobe == centroids.shape[0] and probes is None:
        found = _search_all(functools.partial(search, config=config), own, num_tiles, k, config)
        return _certified(found)
    lists = ref._probed_lists(queries.astype(jnp.float32), centroids, nprobe)
    starts, sizes = tile_offsets[lists], (tile_offsets[1:] - tile_offsets[:-1])[lists]
    if probes is not None:
        sizes = jnp.where(jnp.arange(nprobe) < probes[:, None], sizes, 0)

    def probe(nprobe: int, max_tiles: int, config: IvfKernelConfig) -> _Found:
        num_slots = max_slots(
            nprobe, max_tiles, config, strided=not config.share, max_list_tiles=max_list_tiles
        )
        distinct = config.distinct_slots(centroids.shape[0], num_tiles, max_list_tiles)
        each = (*own, starts[:, :nprobe], sizes[:, :nprobe])
        by_tiles = functools.partial(search, config=config)
        return _search_groups(by_tiles, each, num_slots, distinct, config)

    if probes is None or few is None or few[0] >= nprobe:
        return _certified(probe(nprobe, max_tiles, config))
    is_few = (probes.max() <= few[0]) & (jnp.sum(sizes, axis=1).max() <= few[1])
    whole = functools.partial(probe, nprobe, max_tiles, config)
    return _certified(lax.cond(is_few, functools.partial(probe, *few), whole))


def _certified(found: _Found):
    """Scores, rows, and whether nothing better can have been dropped."""
    return found.scores, found.rows, found.bound <= found.scores[:, -1]


def _search_all(search, own, num_tiles: int, k: int, config: IvfKernelConfig) -> _Found:
    """Scans all rows, in parts."""
    num_queries = own[0].shape[0]
    num_slots = max_slots(1, num_tiles, config, strided=True)
    num_parts = -(-num_queries // group_queries(num_slots, own[0].shape[1], config))
    tiles = -(-num_tiles // num_parts)
    num_slots = max_slots(1, tiles, config, strided=True)
    num_programs = config.num_programs(num_queries * num_slots, num_slots)

    def part(first):
        starts = jnp.full((num_queries, 1), first, jnp.int32)
        sizes = jnp.full((num_queries, 1), jnp.minimum(tiles, num_tiles - first), jnp.int32)
        slots = strided_slots(starts, sizes, num_slots, config.slot_tiles)
        return search(*own, slots, num_programs)

    if num_parts == 1:
        return part(jnp.int32(0))
    found = lax.map(part, jnp.arange(0, num_tiles, tiles, dtype=jnp.int32))
    scores, rows = (x.swapaxes(0, 1).reshape(num_queries, -1) for x in (found.scores, found.rows))
    return _Found(*_top(scores, rows, k), jnp.max(found.bound, axis=0))


def _search_groups(
    search, own, num_slots: int, distinct_slots: int, config: IvfKernelConfig
) -> _Found:
    """Scans the lists of each query, in groups of queries."""
    num_queries = own[-1].shape[0]
    make_slots = list_slots if config.share else strided_slots
    num_groups = -(-num_queries // group_queries(num_slots, own[0].shape[1], config))
    size = -(-num_queries // num_groups)

    def group(own):
        *query, starts, sizes = own
        slots = make_slots(starts, sizes, num_slots, config.slot_tiles)
        return search(*query, slots, config.num_programs(num_slots * size, distinct_slots))

    if num_groups == 1:
        return group(own)

    def grouped(x):
        x = jnp.pad(x, ((0, num_groups * size - num_queries), *((0, 0),) * (x.ndim - 1)))
        return x.reshape(num_groups, size, *x.shape[1:])

    found = lax.map(group, jax.tree.map(grouped, own))
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:num_queries], found)


def _search_tiles(
    codes, scales, live, mask, queries, query_scales, mask_of_query, slots, num_programs,
    *, k: int, config: IvfKernelConfig,
) -> _Found:  # fmt: skip
    """The k best of each query among the rows of its slots."""
    of_program = programs(slots, num_programs, config)
    owner = jnp.maximum(of_program, 0) // slots.counts.shape[1]
    first = jnp.maximum(of_program[:, 0], 0)
    fits = len(live) >= 2 * config.slot_tiles and len(live) % 4 == 0  # TMA: rows of 16 bytes
    in_place = slots.in_order and fits
    if in_place:
        masks = live[None] if mask is None else mask
        mask_rows = jnp.zeros_like(owner) if mask is None else mask_of_query[owner]
    else:
        masks, mask_rows = _slot_words(live, mask, mask_of_query, slots), of_program
    survivors = ivf_scan(
        codes,
        scales,
        queries[owner],
        lax.bitcast_convert_type(masks, jnp.int32),
        lax.bitcast_convert_type(live, jnp.int32),
        slots.tiles.reshape(-1, config.slot_tiles)[first],
        jnp.where(of_program[:, 0] >= 0, slots.counts.reshape(-1)[first], 0),
        of_program,
        mask_rows,
        num_slots=slots.counts.size,
        config=config,
        in_place=in_place,
    )
    survivors = survivors.reshape(*slots.counts.shape, config.kept, TILE_ROWS)
    scorer = _Scorer(queries, query_scales, codes, scales)
    return _best_survivors(survivors, slots, scorer, k, config)
