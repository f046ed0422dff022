"""The Bloom kernel: a small virtual machine, one program and one tile of words a thread block.

The topmost pair of masks lives in registers, the pairs below it in shared memory. A leaf that the
next instruction folds at once (`x AND`, `x OR`) is fused with it and never touches the stack.
"""

import functools
from enum import IntEnum

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Int32, UInt32

from pallas_kernels.bloom.config import STACK_SLOTS, WARPGROUP, BloomConfig
from pallas_kernels.bloom.program import BloomOp

KERNEL_NAME = "bloom_search"
TILES_KERNEL_NAME = "bloom_search_tiles"
_ONES = 0xFFFFFFFF


class _Code(IntEnum):
    """Instructions beyond `BloomOp` that the host wrapper makes of two."""

    AND_HEAD = 8
    OR_HEAD = 9
    AND_TAIL = 10
    OR_TAIL = 11


def _catalogue_kernel(
    rows, row_offsets, codes, lengths, operands, possibly, surely, stack, *, block_words, **static
):
    """possibly, surely [query, block] = the program of `query` on every block of words."""
    block, query = lax.axis_index("block"), lax.axis_index("query")
    arrays = (rows, row_offsets, codes, operands, stack)
    p, s = _run(*arrays, query, lengths[query], block, block_words=block_words, **static)
    out = pl.ds(block * block_words, block_words)
    possibly[query, out] = p
    surely[query, out] = s


def _tiles_kernel(
    rows, row_offsets, codes, lengths, operands, programs, tiles, possibly, surely, stack, *,
    block_words, tile_words, **static,
):  # fmt: skip
    """The same on the blocks of each query's own tiles; nothing is read for tile -1."""
    place, query = lax.axis_index("block"), lax.axis_index("query")
    blocks_per_tile = tile_words // block_words
    last = row_offsets.shape[0] - 2
    last = (last + 1) * (rows.shape[1] // tile_words) - 1
    tile = tiles[query, lax.div(place, blocks_per_tile)]
    program = jnp.clip(programs[query], 0, codes.shape[0] - 1)
    num_steps = jnp.where(tile >= 0, lengths[program], 0)
    block = jnp.clip(tile, 0, last) * blocks_per_tile + lax.rem(place, blocks_per_tile)
    arrays = (rows, row_offsets, codes, operands, stack)
    p, s = _run(*arrays, program, num_steps, block, block_words=block_words, **static)
    present = jnp.where(tile >= 0, jnp.uint32(_ONES), jnp.uint32(0))
    out = pl.ds(place * block_words, block_words)
    possibly[query, out] = p & present
    surely[query, out] = s & present


def _run(
    rows, row_offsets, codes, operands, stack, query, num_steps, tile, *,
    num_head, num_items, block_words,
):  # fmt: skip
    """(possibly, surely) of program `query` on one block of words, number `tile`.

    Wrong programs may compute nonsense but never leave the arrays: rows and stack slots are
    clamped. The stack needs no barrier: in the one layout that all accesses share, a thread reads
    only the words that it wrote itself.
    """
    num_rows, bundle_words = rows.shape
    num_hashes = operands.shape[2]
    tiles_per_bundle = bundle_words // block_words
    bundle = tile // tiles_per_bundle
    words = pl.ds(lax.rem(tile, tiles_per_bundle) * block_words, block_words)
    first_row = row_offsets[bundle]
    width = lax.div(row_offsets[bundle + 1] - first_row - num_head, num_hashes)
    vec_size = next(size for size in (4, 2, 1) if block_words % (WARPGROUP * size) == 0)
    layout = plgpu.Layout.WG_STRIDED((block_words,), vec_size=vec_size)

    def constant(word):
        return plgpu.layout_cast(jnp.full((block_words,), word, jnp.uint32), layout)

    def load_row(row):
        return plgpu.load(rows.at[jnp.clip(row, 0, num_rows - 1), words], layout=layout)

    def head(step):
        return load_row(first_row + operands[query, step, 0].astype(jnp.int32))

    def tail(step):
        modulus = jnp.maximum(width, 1).astype(jnp.uint32)
        row = constant(_ONES) & jnp.where(width > 0, jnp.uint32(_ONES), jnp.uint32(0))
        for k in range(num_hashes):
            slot = lax.rem(operands[query, step, k], modulus).astype(jnp.int32)
            row &= load_row(first_row + num_head + k * width + slot)
        return row

    def slot(position, plane):
        return stack.at[jnp.clip(position, 0, STACK_SLOTS - 1), plane]

    def instruction(state):
        step, depth, p, s = state
        code = codes[query, step]

        def push(new_p, new_s):
            slot(depth - 1, 0)[...] = p  # the first push saves "everything" for nobody
            slot(depth - 1, 1)[...] = s
            return depth + 1, new_p, new_s

        def push_head():
            row = head(step)
            return push(row, row)

        def pop():
            read = functools.partial(plgpu.load, layout=layout)
            return depth - 1, read(slot(depth - 2, 0)), read(slot(depth - 2, 1))

        def fold_and():
            below, other_p, other_s = pop()
            return below, p & other_p, s & other_s

        def fold_or():
            below, other_p, other_s = pop()
            return below, p | other_p, s | other_s

        def and_head():
            row = head(step)
            return depth, p & row, s & row

        def or_head():
            row = head(step)
            return depth, p | row, s | row

        depth, p, s = lax.switch(
            code,
            [
                lambda: (depth, p, s),  # END
                push_head,
                lambda: push(tail(step), constant(0)),
                fold_and,
                fold_or,
                lambda: (depth, ~s, ~p),  # NOT
                lambda: push(constant(_ONES), constant(_ONES)),  # ALL
                lambda: push(constant(0), constant(0)),  # NONE
                and_head,
                or_head,
                lambda: (depth, p & tail(step), constant(0)),  # AND_TAIL
                lambda: (depth, p | tail(step), s),  # OR_TAIL
            ],
        )
        return step + jnp.where(code >= _Code.AND_HEAD, 2, 1), depth, p, s

    everything = constant(_ONES)
    start = (jnp.int32(0), jnp.int32(0), everything, everything)
    _, _, p, s = lax.while_loop(lambda state: state[0] < num_steps, instruction, start)

    first_word = tile * block_words
    word = first_word + plgpu.broadcasted_iota(jnp.int32, (block_words,), 0, layout=layout)
    full, rest = divmod(num_items, 32)
    partial = jnp.where(word == full, jnp.uint32((1 << rest) - 1), jnp.uint32(0))
    real = jnp.where(word < full, jnp.uint32(_ONES), partial)
    return p & real, s & real


def _fuse(opcodes: Int32[Array, "Q P"]) -> Int32[Array, "Q P"]:
    """Joins each leaf with the AND or OR that follows it; the follower is then stepped over."""
    following = jnp.pad(opcodes[:, 1:], ((0, 0), (0, 1)))
    leaf = (opcodes == BloomOp.HEAD) | (opcodes == BloomOp.TAIL)
    fold = (following == BloomOp.AND) | (following == BloomOp.OR)
    fused = _Code.AND_HEAD + 2 * (opcodes - BloomOp.HEAD) + (following - BloomOp.AND)
    return jnp.where(leaf & fold, fused, opcodes)


def _lengths(opcodes: Int32[Array, "Q P"]) -> Int32[Array, "Q"]:
    """Steps up to the last one that is not END."""
    steps = jnp.arange(1, opcodes.shape[1] + 1, dtype=jnp.int32)
    return jnp.max(jnp.where(opcodes != BloomOp.END, steps, 0), axis=1)


@functools.partial(jax.jit, static_argnames=("num_head", "num_items", "config"))
def bloom_search(
    rows: UInt32[Array, "R W"],
    row_offsets: Int32[Array, "G1"],
    opcodes: Int32[Array, "F P"],
    operands: UInt32[Array, "F P K"],
    *,
    num_head: int,
    num_items: int,
    config: BloomConfig,
) -> tuple[UInt32[Array, "F words"], UInt32[Array, "F words"]]:
    """Runs the kernel; arguments as `pallas_kernels.bloom_search`, which checks them."""
    static = {"num_head": num_head, "num_items": num_items, "block_words": config.block_words}
    run = _launch(
        functools.partial(_catalogue_kernel, **static),
        KERNEL_NAME,
        num_queries=opcodes.shape[0],
        num_words=(row_offsets.shape[0] - 1) * rows.shape[1],
        config=config,
    )
    possibly, surely = run(rows, row_offsets, _fuse(opcodes), _lengths(opcodes), operands)
    return possibly, surely


@functools.partial(jax.jit, static_argnames=("tile_words", "num_head", "num_items", "config"))
def bloom_search_tiles(
    rows: UInt32[Array, "R W"],
    row_offsets: Int32[Array, "G1"],
    opcodes: Int32[Array, "F P"],
    operands: UInt32[Array, "F P K"],
    programs: Int32[Array, "Q"],
    tiles: Int32[Array, "Q T"],
    *,
    tile_words: int,
    num_head: int,
    num_items: int,
    config: BloomConfig,
) -> tuple[UInt32[Array, "Q words"], UInt32[Array, "Q words"]]:
    """Runs the kernel on each query's own tiles."""
    static = {"num_head": num_head, "num_items": num_items, "block_words": config.block_words}
    run = _launch(
        functools.partial(_tiles_kernel, tile_words=tile_words, **static),
        TILES_KERNEL_NAME,
        num_queries=tiles.shape[0],
        num_words=tiles.shape[1] * tile_words,
        config=config,
    )
    programs, tiles = jnp.asarray(programs), jnp.asarray(tiles)
    possibly, surely = run(
        rows, row_offsets, _fuse(opcodes), _lengths(opcodes), operands, programs, tiles
    )
    return possibly, surely


def _launch(kernel, name: str, *, num_queries: int, num_words: int, config: BloomConfig):
    return plgpu.kernel(
        kernel,
        out_type=[jax.ShapeDtypeStruct((num_queries, num_words), jnp.uint32)] * 2,
        # The last axis is the fastest: programs that run together read the same bundle from L2.
        grid=(num_words // config.block_words, num_queries),
        grid_names=("block", "query"),
        scratch_types=[plgpu.SMEM((STACK_SLOTS, 2, config.block_words), jnp.uint32)],
        # Safe, since no thread reads what another wrote: see `_run`.
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
        kernel_name=name,
    )
