"""The IVF kernel: int8 codes streamed once past a block of queries; the best of each lane survive.

A *slot* is one query and up to `slot_tiles` tiles that it scans. A program scans the same tiles for
up to `block_queries` slots at once. Scores stay in registers: lane r of a slot is row r
of every tile, and keeps its `kept` best as floats whose lowest bits are the tile's number. These
survivors go to memory; `search` takes the best, and scores them again from their codes.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float32, Int8, Int32

from pallas_kernels.ivf.config import TILE_ROWS, IvfKernelConfig

KERNEL_NAME = "ivf_scan"
MASKED = -3e38  # below every score; not -inf, which with a tag in its low bits would be NaN
_SCORES = plgpu.Layout.WGMMA
_COLUMNS = plgpu.Layout._WGMMA_ACC_32BIT  # the same owners; takes strided columns of memory


def _kernel(
    codes,
    scales,
    queries,
    masks,
    live,
    tiles,
    counts,
    slots,
    mask_rows,
    survivors,
    code_tiles,
    scale_tiles,
    query_block,
    word_block,
    live_block,
    outbox,
    ready,
    full,
    empty,
    *,
    config,
    in_place,
):
    """survivors[slots[program, n]] = the best of each lane, over the program's tiles."""
    program, warpgroup = lax.axis_index("program"), lax.axis_index("warpgroup")
    count = counts[program]
    first = tiles[program, 0] if in_place else jnp.int32(0)
    start = jnp.minimum(first, masks.shape[1] // 2 - config.slot_tiles)  # masks end there
    words = pl.ds(2 * start, 2 * config.slot_tiles)

    def each_slot(body, otherwise=lambda: None):
        for n in range(config.block_queries):
            slot = slots[program, n]
            pl.when(slot >= 0)(functools.partial(body, n, slot))
            pl.when(slot < 0)(otherwise)

    def load_words(n, _):
        own = masks.at[mask_rows[program, n], words]
        plgpu.copy_gmem_to_smem(own, word_block.at[n], ready)

    def produce():
        plgpu.copy_gmem_to_smem(queries.at[program], query_block, ready)
        if in_place:
            plgpu.copy_gmem_to_smem(live.at[words], live_block, ready)
        each_slot(load_words, otherwise=lambda: plgpu.barrier_arrive(ready))

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
        passes = _passes(word_block, live_block if in_place else None, first - start, config)
        step = _scorer(code_tiles, scale_tiles, query_block, passes, full, empty, config)
        nothing = jnp.full((TILE_ROWS, config.block_queries), MASKED, jnp.float32)
        nothing = plgpu.layout_cast(nothing, _SCORES)
        best = lax.fori_loop(0, count, step, (nothing,) * config.kept)
        for place, keys in enumerate(best):
            lanes = outbox.at[:, pl.ds(place * TILE_ROWS, TILE_ROWS)]
            lanes.T[...] = plgpu.layout_cast(keys, plgpu.Layout.WGMMA_TRANSPOSED)
        plgpu.commit_smem()

        each_slot(lambda n, slot: plgpu.copy_smem_to_gmem(outbox.at[n], survivors.at[slot]))
        plgpu.wait_smem_to_gmem(0)

    pl.when((warpgroup == 0) & (count > 0))(consume)
    pl.when((warpgroup == 1) & (count > 0))(produce)


def _passes(word_block, live_block, first, config):
    """step -> whether rows [row, query] of tile first + step of the words may be returned."""
    shape = (TILE_ROWS, config.block_queries)
    row = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=_SCORES)
    bit = jnp.int32(1) << (row & 31)
    bits = jnp.where(row < 32, bit, 0), jnp.where(row < 32, 0, bit)  # of the tile's two words

    def half(word, bits):
        own = plgpu.load(word_block.at[:, word], layout=_COLUMNS.reduce(0), optimized=False)
        own = plgpu.layout_cast(lax.broadcast_in_dim(own, shape, (1,)), _COLUMNS)
        if live_block is not None:
            bits = bits & live_block[word]
        return plgpu.layout_cast(own, _SCORES) & bits

    def passes(step):
        word = 2 * ((first + step) & config.tag_mask)
        return (half(word, bits[0]) | half(word + 1, bits[1])) != 0

    return passes


def _scorer(code_tiles, scale_tiles, query_block, passes, full, empty, config):
    """The loop body over tiles: (step, best) -> best."""
    shape = (TILE_ROWS, config.block_queries)

    def products(stage):
        def run(accumulator):
            plgpu.wgmma(accumulator, code_tiles.at[stage], query_block.T)
            return accumulator[...]  # waits until the tensor cores have read the tile: wait(0)

        return pl.run_scoped(run, plgpu.WGMMAAccumulatorRef(shape, jnp.int32))

    def row_scales(stage):
        layout = _SCORES.reduce(1)
        return lax.broadcast_in_dim(plgpu.load(scale_tiles.at[stage], layout=layout), shape, (0,))

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
        key = jnp.where(passes(step), key, jnp.float32(MASKED))
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
    masks: Int32[Array, "M words"],
    live: Int32[Array, "live_words"],
    tiles: Int32[Array, "W T"],
    counts: Int32[Array, "W"],
    slots: Int32[Array, "W N"],
    mask_rows: Int32[Array, "W N"],
    *,
    num_slots: int,
    config: IvfKernelConfig,
    in_place: bool,
) -> Float32[Array, "{num_slots} survivors"]:
    """Runs the kernel on W programs of N slots; slots that no program names are left undefined.

    Args:
      codes, scales: as `ivf_search`.
      queries: codes of the queries of each program.
      masks: two words a tile: of all tiles, if read in place; otherwise of a slot's T in turn.
      live: of all tiles; only read in place.
      tiles, counts: what each program scans, the first `counts` of its T = slot_tiles tiles.
      slots: -1 for none.
      mask_rows: the mask of each slot.
      num_slots: rows of the result.
      config: tiles.
      in_place: the tiles of each program follow each other, so that their words do.
    """
    width, block = codes.shape[1], config.block_queries
    num_words = 2 * config.slot_tiles
    swizzle = next(size for size in (128, 64, 32) if width % size == 0)
    layout = (
        plgpu.TilingTransform((8, swizzle)),  # pyright: ignore[reportAbstractUsage]
        plgpu.SwizzleTransform(swizzle),  # pyright: ignore[reportAbstractUsage]
    )
    run = plgpu.kernel(
        functools.partial(_kernel, config=config, in_place=in_place),
        out_type=jax.ShapeDtypeStruct((num_slots, config.kept * TILE_ROWS), jnp.float32),
        grid=(tiles.shape[0],),
        grid_names=("program",),
        num_threads=2,
        thread_name="warpgroup",
        scratch_types=[
            plgpu.SMEM((config.stages, TILE_ROWS, width), jnp.int8, transforms=layout),
            plgpu.SMEM((config.stages, TILE_ROWS), jnp.float32),
            plgpu.SMEM((block, width), jnp.int8, transforms=layout),
            plgpu.SMEM((block, num_words), jnp.int32),
            plgpu.SMEM((num_words,), jnp.int32),
            plgpu.SMEM((block, config.kept * TILE_ROWS), jnp.float32),
            plgpu.Barrier(num_arrivals=1 + block + in_place),
            plgpu.Barrier(num_arrivals=2, num_barriers=config.stages),
            plgpu.Barrier(num_arrivals=1, num_barriers=config.stages),
        ],
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
        kernel_name=KERNEL_NAME,
    )
    return run(codes, scales, queries, masks, live, tiles, counts, slots, mask_rows)
