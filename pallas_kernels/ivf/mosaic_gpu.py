"""The IVF kernel: int8 codes streamed once past a block of queries; the best of each lane survive.

A *slot* is one query and one segment, up to `segment_tiles` tiles of one list. A program scans one
segment for up to `block_queries` slots at once. Scores stay in registers: lane r of a slot is row r
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
from pallas_kernels.ivf.config import TILE_ROWS, IvfKernelConfig, group_queries, max_slots

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
    starts,
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
    """survivors[slots[program, n]] = the best of each lane, over a segment, of query n."""
    program, warpgroup = lax.axis_index("program"), lax.axis_index("warpgroup")
    start, count = starts[program], counts[program]

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

        def load(step, _):
            stage = lax.rem(step, config.stages)

            @pl.when(step >= config.stages)
            def _():
                plgpu.barrier_wait(empty.at[stage])

            rows = pl.ds((start + step) * TILE_ROWS, TILE_ROWS)
            plgpu.copy_gmem_to_smem(codes.at[rows], code_tiles.at[stage], full.at[stage])
            plgpu.copy_gmem_to_smem(scales.at[rows], scale_tiles.at[stage], full.at[stage])

        lax.fori_loop(0, count, load, None)

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

        return pl.run_scoped(run, plgpu.ACC(shape, jnp.int32))

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
    starts: Int32[Array, "W"],
    counts: Int32[Array, "W"],
    slots: Int32[Array, "W N"],
    *,
    config: IvfKernelConfig,
) -> Float32[Array, "slots survivors"]:
    """Runs the kernel on W programs of N slots; slots that no program names are left undefined.

    Args:
      codes, scales: as `ivf_search`.
      queries: codes of the queries of each program.
      words: mask of each slot, 2·segment_tiles words from its first tile on.
      starts, counts: first tile of each program and its tiles, 0 to segment_tiles.
      slots: -1 for none.
      config: tiles.
    """
    width, block = codes.shape[1], config.block_queries
    swizzle = next(size for size in (128, 64, 32) if width % size == 0)
    layout = (plgpu.TilingTransform((8, swizzle)), plgpu.SwizzleTransform(swizzle))
    run = plgpu.kernel(
        functools.partial(_kernel, config=config),
        out_type=jax.ShapeDtypeStruct((words.shape[0], config.kept * TILE_ROWS), jnp.float32),
        grid=(starts.shape[0],),
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
    return run(codes, scales, queries, words, starts, counts, slots)


class _Segments(NamedTuple):
    """What each slot [Q, S] scans; empty slots have no tiles."""

    starts: Int32[Array, "Q S"]
    counts: Int32[Array, "Q S"]


def _segments(lists, sizes, tile_offsets, num_slots: int, length: int) -> _Segments:
    """Cuts each query's lists, of `sizes` tiles, in segments of up to `length` tiles."""
    pieces = (sizes + length - 1) // length
    ends = jnp.cumsum(pieces, axis=1)
    slot = jnp.arange(num_slots, dtype=jnp.int32)
    which = jax.vmap(lambda e: jnp.searchsorted(e, slot, side="right", method="compare_all"))(ends)
    which = jnp.minimum(which, lists.shape[1] - 1).astype(jnp.int32)

    def own(of_list):
        return jnp.take_along_axis(of_list, which, axis=1)

    done = (slot - own(ends - pieces)) * length
    counts = jnp.where(slot < ends[:, -1:], jnp.minimum(own(sizes) - done, length), 0)
    return _Segments(jnp.where(counts > 0, own(tile_offsets[lists]) + done, 0), counts)


def _programs(segments: _Segments, num_programs: int, config: IvfKernelConfig):
    """(starts, counts, slots) of each program; slots of one segment share programs if wanted."""
    starts, counts = segments.starts.reshape(-1), segments.counts.reshape(-1)
    slot = jnp.arange(starts.size, dtype=jnp.int32)
    if not config.share:
        own = jnp.where(counts > 0, slot, -1)[:, None]
        others = jnp.full((slot.size, config.block_queries - 1), -1, jnp.int32)
        return starts, counts, jnp.concatenate([own, others], axis=1)
    nowhere = jnp.int32(2**31 - 1)
    by_start, order = lax.sort((jnp.where(counts > 0, starts, nowhere), slot), num_keys=1)
    is_new = jnp.concatenate([jnp.ones(1, bool), by_start[1:] != by_start[:-1]])
    rank = slot - lax.cummax(jnp.where(is_new, slot, 0))
    place = rank % config.block_queries
    used = by_start != nowhere
    program = jnp.cumsum(used & (place == 0), dtype=jnp.int32) - 1
    program = jnp.where(used, program, num_programs)  # out of range: dropped
    zeros = jnp.zeros(num_programs, jnp.int32)
    return (
        zeros.at[program].set(by_start, mode="drop"),
        zeros.at[program].set(counts[order], mode="drop"),
        jnp.full((num_programs, config.block_queries), -1, jnp.int32)
        .at[program, place]
        .set(order, mode="drop"),
    )


def _slot_words(live, mask, mask_of_query, segments: _Segments, length: int):
    """The eligible rows of each slot: live and let through by the mask of its query."""
    word = jnp.arange(2 * length, dtype=jnp.int32)
    columns = jnp.minimum(2 * segments.starts[..., None] + word, live.shape[0] - 1)
    words = live[columns]
    if mask is not None:
        words = words & mask[mask_of_query[:, None, None], columns]
    words = jnp.where(word < 2 * segments.counts[..., None], words, 0)
    return lax.bitcast_convert_type(words, jnp.int32).reshape(-1, 2 * length)


def _best_survivors(survivors, segments: _Segments, scorer, k: int, config: IvfKernelConfig):
    """(scores, rows, complete) of the k best survivors [Q, S, kept, lane]."""
    num_queries, num_slots = segments.counts.shape
    survivors = jnp.where(segments.counts[..., None, None] > 0, survivors, _MASKED)
    keys = survivors.reshape(num_queries, -1)
    fetched = min(k + k // 16 + 32, keys.shape[1])  # a few more, as keys are rounded
    best, places = lax.top_k(keys, fetched)
    slot, lane = places // (config.kept * TILE_ROWS), places % TILE_ROWS
    tile = jnp.take_along_axis(segments.starts, slot, axis=1)
    tile += lax.bitcast_convert_type(best, jnp.int32) & config.tag_mask
    rows = jnp.where(best > _MASKED, tile * TILE_ROWS + lane, -1)
    scores = scorer.exact(rows)
    scores, order = lax.top_k(scores, min(k, fetched))
    rows = jnp.take_along_axis(rows, order, axis=1)
    missing = ((0, 0), (0, k - scores.shape[1]))
    scores = jnp.pad(scores, missing, constant_values=-jnp.inf)
    rows = jnp.pad(rows, missing, constant_values=-1)
    # Whatever is not among them was pushed out of a full lane or not fetched: no better than these.
    lost = jnp.max(survivors[:, :, -1], axis=(1, 2))
    if fetched < keys.shape[1]:
        lost = jnp.maximum(lost, best[:, -1])
    complete = (lost <= _MASKED) | (scorer.upper_bound(lost, config) <= scores[:, -1])
    return scores, rows, complete


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
        """No row with this key or a lower one scores higher."""
        bits = lax.bitcast_convert_type(keys, jnp.int32)
        bits = jnp.where(keys >= 0, bits | config.tag_mask, bits & ~config.tag_mask)
        bound = lax.bitcast_convert_type(bits, jnp.float32) * self.query_scales
        return bound + jnp.abs(bound) * _ROUNDING


@functools.partial(jax.jit, static_argnames=("k", "nprobe", "max_tiles", "config"))
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
    config: IvfKernelConfig,
) -> tuple[Float32[Array, "Q {k}"], Int32[Array, "Q {k}"], Bool[Array, "Q"]]:
    """`pallas_kernels.ivf_search`, with `complete`, by the kernel; queries in groups of bounded size.

    With every list probed, the rows are one list: no centroid is scored.
    """
    num_queries = queries.shape[0]
    if mask_of_query is None:
        mask_of_query = jnp.arange(num_queries, dtype=jnp.int32)
    if nprobe == centroids.shape[0] and probes is None:
        centroids, nprobe, max_tiles = centroids[:1], 1, codes.shape[0] // TILE_ROWS
        tile_offsets = jnp.array([0, max_tiles], jnp.int32)
    num_slots = max_slots(nprobe, max_tiles, config)
    group = functools.partial(
        _search_group, centroids, codes, scales, tile_offsets, live, mask,
        k=k, nprobe=nprobe, num_slots=num_slots, config=config,
    )  # fmt: skip
    size = min(group_queries(num_slots, config), num_queries)
    per_query = (queries.astype(jnp.float32), mask_of_query, probes)
    if size == num_queries:
        return group(per_query)
    num_groups = -(-num_queries // size)

    def grouped(x):
        x = jnp.pad(x, ((0, num_groups * size - num_queries), *((0, 0),) * (x.ndim - 1)))
        return x.reshape(num_groups, size, *x.shape[1:])

    scores, rows, complete = lax.map(group, jax.tree.map(grouped, per_query))
    scores, rows = (x.reshape(-1, k)[:num_queries] for x in (scores, rows))
    return scores, rows, complete.reshape(-1)[:num_queries]


def _search_group(
    centroids, codes, scales, tile_offsets, live, mask, per_query, *, k, nprobe, num_slots, config
):
    queries, mask_of_query, probes = per_query
    lists = ref._probed_lists(queries, centroids, nprobe)
    sizes = (tile_offsets[1:] - tile_offsets[:-1])[lists]
    if probes is not None:
        sizes = jnp.where(jnp.arange(nprobe) < probes[:, None], sizes, 0)
    segments = _segments(lists, sizes, tile_offsets, num_slots, config.segment_tiles)
    num_programs = config.num_programs(segments.counts.size, tile_offsets.size - 1, codes.shape[0])
    starts, counts, slots = _programs(segments, num_programs, config)
    query_codes, query_scales = ref.quantise(queries)
    survivors = ivf_scan(
        codes, scales, query_codes[jnp.maximum(slots, 0) // num_slots],
        _slot_words(live, mask, mask_of_query, segments, config.segment_tiles),
        starts, counts, slots, config=config,
    )  # fmt: skip
    survivors = survivors.reshape(*segments.counts.shape, config.kept, TILE_ROWS)
    scorer = _Scorer(query_codes, query_scales, codes, scales)
    return _best_survivors(survivors, segments, scorer, k, config)
