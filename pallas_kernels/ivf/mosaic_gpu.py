"""The IVF kernel: int8 codes streamed once past a block of queries; the best of each lane survive.

A *slot* is one query and up to `slot_tiles` tiles that it scans. A program scans the same tiles for
up to `block_queries` slots at once. Scores stay in registers: lane r of a slot is row r
of every tile, and keeps its `kept` best as floats whose lowest bits are the tile's number. These
survivors go to memory; XLA takes the best, and scores them again from their codes.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
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

KERNEL_NAME = "ivf_scan"
_MASKED = -3e38  # below every score; not -inf, which with a tag in its low bits would be NaN
_ROUNDING = 2.0**-21  # of a score in the kernel against the same score of the reference
_SCORES = plgpu.Layout.WGMMA
_COLUMNS = plgpu.Layout._WGMMA_ACC_32BIT  # the same owners; takes strided columns of memory


def _kernel(
    codes,
    scales,
    queries,
    words,
    tiles,
    counts,
    slots,
    survivors,
    code_tiles,
    scale_tiles,
    query_block,
    word_block,
    outbox,
    ready,
    full,
    empty,
    *,
    config,
):
    """survivors[slots[program, n]] = the best of each lane, over the program's tiles."""
    program, warpgroup = lax.axis_index("program"), lax.axis_index("warpgroup")
    count = counts[program]

    def each_slot(body):
        for n in range(config.block_queries):
            body(n, slots[program, n])

    def produce():
        plgpu.copy_gmem_to_smem(queries.at[program], query_block, ready)
        each_slot(  # a block with fewer slots reads slot 0 for the others, and drops them below
            lambda n, slot: plgpu.copy_gmem_to_smem(
                words.at[jnp.maximum(slot, 0)], word_block.at[n], ready
            )
        )

        def load(step, tile):
            stage = lax.rem(step, config.stages)
            following = tiles[program, jnp.minimum(step + 1, config.slot_tiles - 1)]

            @pl.when(step >= config.stages)
            def _():
                plgpu.barrier_wait(empty.at[stage])

            rows = pl.ds(tile * TILE_ROWS, TILE_ROWS)
            plgpu.copy_gmem_to_smem(codes.at[rows], code_tiles.at[stage], full.at[stage])
            plgpu.copy_gmem_to_smem(scales.at[rows], scale_tiles.at[stage], full.at[stage])
            return following

        lax.fori_loop(0, count, load, tiles[program, 0])

        def drain(step, _):
            plgpu.barrier_wait(empty.at[lax.rem(step, config.stages)])

        lax.fori_loop(jnp.maximum(count - config.stages, 0), count, drain, None)

    def consume():
        plgpu.barrier_wait(ready)
        step = _scorer(code_tiles, scale_tiles, query_block, word_block, full, empty, config)
        nothing = jnp.full((TILE_ROWS, config.block_queries), _MASKED, jnp.float32)
        nothing = plgpu.layout_cast(nothing, _SCORES)
        best = lax.fori_loop(0, count, step, (nothing,) * config.kept)
        for place, keys in enumerate(best):
            lanes = outbox.at[:, pl.ds(place * TILE_ROWS, TILE_ROWS)]
            lanes.T[...] = plgpu.layout_cast(keys, plgpu.Layout.WGMMA_TRANSPOSED)
        plgpu.commit_smem()

        def send(n, slot):
            @pl.when(slot >= 0)
            def _():
                plgpu.copy_smem_to_gmem(outbox.at[n], survivors.at[slot])

        each_slot(send)
        plgpu.wait_smem_to_gmem(0)

    pl.when((warpgroup == 0) & (count > 0))(consume)
    pl.when((warpgroup == 1) & (count > 0))(produce)


def _scorer(code_tiles, scale_tiles, query_block, word_block, full, empty, config):
    """The loop body over tiles: (step, best) -> best."""
    shape = (TILE_ROWS, config.block_queries)
    row = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=_SCORES)
    bit = jnp.int32(1) << (row & 31)
    bits = jnp.where(row < 32, bit, 0), jnp.where(row < 32, 0, bit)  # of the tile's two words

    def products(stage):
        def run(accumulator):
            plgpu.wgmma(accumulator, code_tiles.at[stage], query_block.T)
            return accumulator[...]  # waits until the tensor cores have read the tile: wait(0)

        return pl.run_scoped(run, plgpu.WGMMAAccumulatorRef(shape, jnp.int32))

    def row_scales(stage):
        layout = _SCORES.reduce(1)
        return lax.broadcast_in_dim(plgpu.load(scale_tiles.at[stage], layout=layout), shape, (0,))

    def passes(half, step):
        own = plgpu.load(
            word_block.at[:, 2 * step + half], layout=_COLUMNS.reduce(0), optimized=False
        )
        own = plgpu.layout_cast(lax.broadcast_in_dim(own, shape, (1,)), _COLUMNS)
        return plgpu.layout_cast(own, _SCORES) & bits[half]

    def step(step, best):
        stage = lax.rem(step, config.stages)
        plgpu.barrier_wait(full.at[stage])
        scores = products(stage).astype(jnp.float32) * row_scales(stage)
        # Only here may the producer refill the stage. `products` has waited for wgmma, which reads
        # shared memory on its own (the simulator cannot tell), and the scales are in registers; the
        # fence orders these reads before the copy engine's writes.
        plgpu.commit_smem()
        plgpu.barrier_arrive(empty.at[stage])
        key = lax.bitcast_convert_type(scores, jnp.int32) & ~config.tag_mask | step
        key = lax.bitcast_convert_type(key, jnp.float32)
        key = jnp.where((passes(0, step) | passes(1, step)) != 0, key, jnp.float32(_MASKED))
        sorted_best = []
        for kept in best:
            sorted_best.append(jnp.maximum(kept, key))
            key = jnp.minimum(kept, key)
        return tuple(sorted_best)

    return step


def ivf_scan(
    codes: Int8[Array, "R D"],
    scales: Float32[Array, "R"],
    queries: Int8[Array, "W N D"],
    words: Int32[Array, "slots words"],
    tiles: Int32[Array, "W T"],
    counts: Int32[Array, "W"],
    slots: Int32[Array, "W N"],
    *,
    config: IvfKernelConfig,
) -> Float32[Array, "slots survivors"]:
    """Runs the kernel on W programs of N slots; slots that no program names are left undefined.

    Args:
      codes, scales: as `ivf_search`.
      queries: codes of the queries of each program.
      words: mask of each slot, two words a tile.
      tiles, counts: what each program scans, the first `counts` of its T = slot_tiles tiles.
      slots: -1 for none.
      config: tiles.
    """
    width, block = codes.shape[1], config.block_queries
    swizzle = next(size for size in (128, 64, 32) if width % size == 0)
    layout = (
        plgpu.TilingTransform((8, swizzle)),  # pyright: ignore[reportAbstractUsage]
        plgpu.SwizzleTransform(swizzle),  # pyright: ignore[reportAbstractUsage]
    )
    run = plgpu.kernel(
        functools.partial(_kernel, config=config),
        out_type=jax.ShapeDtypeStruct((words.shape[0], config.kept * TILE_ROWS), jnp.float32),
        grid=(tiles.shape[0],),
        grid_names=("program",),
        num_threads=2,
        thread_name="warpgroup",
        scratch_types=[
            plgpu.SMEM((config.stages, TILE_ROWS, width), jnp.int8, transforms=layout),
            plgpu.SMEM((config.stages, TILE_ROWS), jnp.float32),
            plgpu.SMEM((block, width), jnp.int8, transforms=layout),
            plgpu.SMEM((block, words.shape[1]), jnp.int32),
            plgpu.SMEM((block, config.kept * TILE_ROWS), jnp.float32),
            plgpu.Barrier(num_arrivals=1 + block),
            plgpu.Barrier(num_arrivals=2, num_barriers=config.stages),
            plgpu.Barrier(num_arrivals=1, num_barriers=config.stages),
        ],
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
        kernel_name=KERNEL_NAME,
    )
    return run(codes, scales, queries, words, tiles, counts, slots)


class _Slots(NamedTuple):
    """What each of a query's S slots scans: the first `counts` of its tiles."""

    tiles: Int32[Array, "Q S T"]
    counts: Int32[Array, "Q S"]


def _strided_slots(starts, sizes, num_slots: int, slot_tiles: int) -> _Slots:
    """Each query's lists of `sizes` tiles from `starts` on, dealt out to its slots in turn.

    Rows of a list lie together and so do the best of a query; dealing spreads them over all lanes.
    """
    ends = jnp.cumsum(sizes, axis=1)
    count = num_slots * slot_tiles
    position = jnp.arange(count, dtype=jnp.int32)
    first = jnp.take_along_axis(starts - (ends - sizes), _first_after(ends, count), axis=1)
    used = position < ends[:, -1:]
    tiles, used = (
        x.reshape(-1, slot_tiles, num_slots).swapaxes(1, 2)
        for x in (jnp.where(used, first + position, 0), used)
    )
    return _Slots(tiles, jnp.sum(used, axis=2, dtype=jnp.int32))


def _list_slots(starts, sizes, num_slots: int, slot_tiles: int) -> _Slots:
    """Each query's lists cut in slots: queries that probe a list have slots with the same tiles."""
    pieces = (sizes + slot_tiles - 1) // slot_tiles
    ends = jnp.cumsum(pieces, axis=1)
    slot = jnp.arange(num_slots, dtype=jnp.int32)
    which = _first_after(ends, num_slots)

    def own(of_list):
        return jnp.take_along_axis(of_list, which, axis=1)

    done = (slot - own(ends - pieces)) * slot_tiles
    counts = jnp.where(slot < ends[:, -1:], jnp.minimum(own(sizes) - done, slot_tiles), 0)
    step = jnp.arange(slot_tiles, dtype=jnp.int32)
    tiles = (own(starts) + done)[..., None] + step
    return _Slots(jnp.where(step < counts[..., None], tiles, 0), counts)


def _first_after(ends: Int32[Array, "Q P"], count: int) -> Int32[Array, "Q {count}"]:
    """In each row of rising `ends` the first beyond position 0, 1, … count - 1, or the last."""
    if ends.shape[1] == 1:
        return jnp.zeros((len(ends), count), jnp.int32)
    each = jnp.arange(len(ends), dtype=jnp.int32)[:, None]
    ending = jnp.zeros((len(ends), count), jnp.int32).at[each, ends].add(1, mode="drop")
    return jnp.minimum(jnp.cumsum(ending, axis=1), ends.shape[1] - 1)


def _programs(slots: _Slots, num_programs: int, config: IvfKernelConfig):
    """Slots [W, N] of each program, -1 for none; those of the same first tile share, if wanted."""
    counts, block = slots.counts.reshape(-1), config.block_queries
    slot = jnp.arange(counts.size, dtype=jnp.int32)
    if not config.share:
        own = jnp.where(counts > 0, slot, -1)[:, None]
        return jnp.pad(own, ((0, 0), (0, block - 1)), constant_values=-1)
    nowhere = jnp.int32(2**31 - 1)
    first = jnp.where(counts > 0, slots.tiles[:, :, 0].reshape(-1), nowhere)
    first, order = lax.sort((first, slot), num_keys=1)
    is_new = jnp.concatenate([jnp.ones(1, bool), first[1:] != first[:-1]])
    rank = slot - lax.cummax(jnp.where(is_new, slot, 0))
    opens = (first != nowhere) & (rank % block == 0)
    program = jnp.where(first != nowhere, jnp.cumsum(opens, dtype=jnp.int32) - 1, num_programs)
    nobody = jnp.full((num_programs, block), -1, jnp.int32)
    return nobody.at[program, rank % block].set(order, mode="drop")


def _slot_words(live, mask, mask_of_query, slots: _Slots) -> Int32[Array, "slots words"]:
    """Eligible rows of each slot's tiles: live, and let through by the mask of its query."""
    columns = (2 * slots.tiles[..., None] + jnp.arange(2)).reshape(*slots.counts.shape, -1)
    words = live[columns]
    if mask is not None:
        words = words & mask[mask_of_query[:, None, None], columns]
    words = lax.bitcast_convert_type(words, jnp.int32)
    return words.reshape(slots.counts.size, -1)  # words behind the counts are not looked at


class _Found(NamedTuple):
    """The best rows, and a bound on the score of every row that was scanned and is not here."""

    scores: Float32[Array, "Q K"]
    rows: Int32[Array, "Q K"]
    bound: Float32[Array, "Q"]


def _best_survivors(survivors, slots: _Slots, scorer, k: int, config: IvfKernelConfig) -> _Found:
    """The k best survivors [Q, S, kept, lane]."""
    fetched = num_fetched(k, survivors[0].size)  # a few more, as keys are rounded
    best, slot, lane = _best_keys(survivors, slots.counts > 0, fetched)
    step = lax.bitcast_convert_type(best, jnp.int32) & config.tag_mask
    tiles = slots.tiles.reshape(len(best), -1)
    tile = jnp.take_along_axis(tiles, slot * config.slot_tiles + step, axis=1)
    rows = jnp.where(best > _MASKED, tile * TILE_ROWS + lane, -1)
    # What is not among them was pushed out of a full lane, or not fetched.
    pushed_out = jnp.where(slots.counts[..., None] > 0, survivors[:, :, -1], _MASKED)
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
        keys = jnp.where(used[..., None, None], survivors, _MASKED).reshape(num_queries, -1)
        best, place = lax.top_k(keys, count)
        return best, place // (kept * num_lanes), place % num_lanes
    first = jnp.where(used[..., None], survivors[:, :, 0], _MASKED).reshape(num_queries, -1)
    first, column = lax.top_k(first, count)
    slot, lane = column // num_lanes, column % num_lanes
    keys = survivors[jnp.arange(num_queries)[:, None], slot, :, lane]
    keys = jnp.where(first[..., None] > _MASKED, keys, _MASKED).reshape(num_queries, -1)
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
        return jnp.where(keys > _MASKED, bound + jnp.abs(bound) * _ROUNDING, -jnp.inf)


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
        distinct = num_tiles // config.slot_tiles + centroids.shape[0]
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
        slots = _strided_slots(starts, sizes, num_slots, config.slot_tiles)
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
    make_slots = _list_slots if config.share else _strided_slots
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
    of_program = _programs(slots, num_programs, config)
    first = jnp.maximum(of_program[:, 0], 0)
    survivors = ivf_scan(
        codes,
        scales,
        queries[jnp.maximum(of_program, 0) // slots.counts.shape[1]],
        _slot_words(live, mask, mask_of_query, slots),
        slots.tiles.reshape(-1, config.slot_tiles)[first],
        jnp.where(of_program[:, 0] >= 0, slots.counts.reshape(-1)[first], 0),
        of_program,
        config=config,
    )
    survivors = survivors.reshape(*slots.counts.shape, config.kept, TILE_ROWS)
    scorer = _Scorer(queries, query_scales, codes, scales)
    return _best_survivors(survivors, slots, scorer, k, config)
