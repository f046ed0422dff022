"""The XLA reference of `bloom_search`: the definition of correct, and what a CPU runs."""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int32, UInt32

from pallas_kernels.bloom.program import DEPTH_CHANGE, MAX_DEPTH

_CHUNK_WORDS = 1 << 14  # one pair of masks is 128 KB: it stays in a CPU core's L2 cache
_ONES = 0xFFFFFFFF


@functools.partial(jax.jit, static_argnames=("num_head", "num_items", "chunk_words"))
def bloom_search(
    rows: UInt32[Array, "R W"],
    row_offsets: Int32[Array, "G1"],
    opcodes: Int32[Array, "F P"],
    operands: UInt32[Array, "F P K"],
    *,
    num_head: int,
    num_items: int,
    chunk_words: int = _CHUNK_WORDS,
) -> tuple[UInt32[Array, "F words"], UInt32[Array, "F words"]]:
    """`pallas_kernels.bloom_search` of all tiles in plain jnp: a bundle is one tile.

    A CPU takes the programs one by one, so that it branches to the one operation needed; elsewhere
    they run side by side and every operation is computed, then selected. Temporaries: 16 masks of
    a chunk of tiles for each program in flight, whatever the catalogue's size.
    """
    num_bundles, width = row_offsets.shape[0] - 1, rows.shape[1]
    bundles = jnp.arange(num_bundles, dtype=jnp.int32)
    chunks = _chunks(jnp.broadcast_to(bundles, (1, num_bundles)), width, chunk_words)[0]
    one_program = functools.partial(
        _search_one, rows[:, None], row_offsets, num_head=num_head, num_items=num_items
    )

    def search(program):
        return one_program(chunks, *program)

    masks = _each(search, (opcodes, operands))
    possibly, surely = (mask[:, : num_bundles * width] for mask in masks)
    return possibly, surely


@functools.partial(jax.jit, static_argnames=("tile_words", "num_head", "num_items", "chunk_words"))
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
    chunk_words: int = _CHUNK_WORDS,
) -> tuple[UInt32[Array, "Q tile_words_all"], UInt32[Array, "Q tile_words_all"]]:
    """`pallas_kernels.bloom_search` of each query's own tiles; bounded like `bloom_search`."""
    sliced = rows.reshape(rows.shape[0], rows.shape[1] // tile_words, tile_words)
    chunks = _chunks(tiles, tile_words, chunk_words)
    one_program = functools.partial(
        _search_one, sliced, row_offsets, num_head=num_head, num_items=num_items
    )

    def search(query):
        program, own = query
        return one_program(own, opcodes[program], operands[program])

    masks = _each(search, (programs, chunks))
    possibly, surely = (mask[:, : tiles.shape[1] * tile_words] for mask in masks)
    return possibly, surely


def _each(search, queries):
    """`search` of every query: one by one on a CPU, side by side elsewhere."""
    return lax.platform_dependent(
        queries, cpu=lambda given: lax.map(search, given), default=jax.vmap(search)
    )


def _chunks(tiles: Int32[Array, "Q T"], tile_words: int, chunk_words: int) -> Int32[Array, "Q C c"]:
    """Each query's tiles cut in chunks of equal size, filled up with -1."""
    num_queries, num_tiles = tiles.shape
    most = max(1, chunk_words // max(tile_words, 1))
    num_chunks = max(1, math.ceil(num_tiles / most))
    size = math.ceil(num_tiles / num_chunks)
    padded = jnp.pad(tiles, ((0, 0), (0, num_chunks * size - num_tiles)), constant_values=-1)
    return padded.reshape(num_queries, num_chunks, size)


def _search_one(rows, row_offsets, chunks, opcodes, operands, *, num_head, num_items):
    """Runs one program over chunks of tiles i32[C, c]: two masks u32[C · c · tile words]."""
    _, tiles_per_bundle, tile_words = rows.shape
    if rows.size == 0:
        # Nothing to look up: programs still decide between everything and nothing.
        rows = jnp.zeros((1, tiles_per_bundle, tile_words), jnp.uint32)

    def one_chunk(tiles):
        present = tiles >= 0
        tiles = jnp.maximum(tiles, 0)
        bundles, places = tiles // tiles_per_bundle, tiles % tiles_per_bundle
        first_rows = row_offsets[bundles]
        widths = (row_offsets[bundles + 1] - first_rows - num_head) // operands.shape[1]
        step = functools.partial(_step, rows, places, first_rows, widths, num_head)
        everything = jnp.full((2, *tiles.shape, tile_words), _ONES, jnp.uint32)
        stack = jnp.zeros((MAX_DEPTH + 1, *everything.shape), jnp.uint32)
        (_, top, _), _ = lax.scan(step, (jnp.int32(0), everything, stack), (opcodes, operands))
        words = tiles[:, None] * tile_words + jnp.arange(tile_words, dtype=jnp.int32)
        real = jnp.where(present[:, None], valid_bits(words, num_items), 0)
        return top[0] & real, top[1] & real

    possibly, surely = lax.map(one_chunk, chunks)
    return possibly.reshape(-1), surely.reshape(-1)


def _step(rows, places, first_rows, widths, num_head, state, instruction):
    """One instruction on (depth, top pair, stack of the pairs below)."""
    depth, top, stack = state
    opcode, operand = instruction
    # The slot at `depth` is free, so saving there is always harmless; doing it outside the switch
    # keeps the stack out of the branches, which would copy it.
    stack = lax.dynamic_update_index_in_dim(stack, top, depth, 0)

    def below():
        return lax.dynamic_index_in_dim(stack, depth - 1, 0, keepdims=False)

    def head():
        row = rows[first_rows + operand[0].astype(jnp.int32), places]
        return jnp.stack([row, row])

    def tail():
        row = jnp.full(top.shape[1:], _ONES, jnp.uint32)
        for k in range(operand.shape[0]):
            slot = (operand[k] % jnp.maximum(widths, 1).astype(jnp.uint32)).astype(jnp.int32)
            row &= rows[first_rows + num_head + k * widths + slot, places]
        row = jnp.where((widths > 0)[:, None], row, 0)
        return jnp.stack([row, jnp.zeros_like(row)])

    new_top = lax.switch(
        opcode,
        [
            lambda: top,
            head,
            tail,
            lambda: top & below(),
            lambda: top | below(),
            lambda: ~top[::-1],
            lambda: jnp.full_like(top, _ONES),
            lambda: jnp.zeros_like(top),
        ],
    )
    return (depth + jnp.asarray(DEPTH_CHANGE)[opcode], new_top, stack), None


def valid_bits(words: Int32[Array, "*shape"], num_items: int) -> UInt32[Array, "*shape"]:
    """For each word number, the bits that stand for items below `num_items`."""
    full, rest = divmod(num_items, 32)
    partial = jnp.where(words == full, jnp.uint32((1 << rest) - 1), jnp.uint32(0))
    return jnp.where(words < full, jnp.uint32(_ONES), partial)
