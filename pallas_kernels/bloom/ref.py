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
    opcodes: Int32[Array, "Q P"],
    operands: UInt32[Array, "Q P K"],
    *,
    num_head: int,
    num_items: int,
    chunk_words: int = _CHUNK_WORDS,
) -> tuple[UInt32[Array, "Q words"], UInt32[Array, "Q words"]]:
    """`pallas_kernels.bloom_search` in plain jnp; bundles are walked in cache-sized chunks.

    A CPU takes the queries one by one, so that it branches to the one operation needed; elsewhere
    they run side by side and every operation is computed, then selected. Temporaries: 16 masks of
    a chunk for each query in flight, whatever the catalogue's size.
    """
    num_bundles, width = row_offsets.shape[0] - 1, rows.shape[1]
    if num_bundles == 0 or width == 0 or rows.shape[0] == 0:
        # Nothing to look up: programs still decide between everything and nothing.
        rows = jnp.zeros((1, width), jnp.uint32)
    chunks = _bundle_chunks(num_bundles, width, chunk_words)
    one_query = functools.partial(
        _search_one, rows, row_offsets, chunks, num_head=num_head, num_items=num_items
    )
    masks = lax.platform_dependent(
        opcodes,
        operands,
        cpu=lambda ops, args: lax.map(lambda program: one_query(*program), (ops, args)),
        default=jax.vmap(one_query),
    )
    possibly, surely = (
        mask.reshape(len(opcodes), chunks.size * width)[:, : num_bundles * width] for mask in masks
    )
    return possibly, surely


def _bundle_chunks(num_bundles: int, width: int, chunk_words: int) -> Int32[Array, "C Gc"]:
    """Bundle numbers cut in chunks of equal size; the last few may repeat the last bundle."""
    most = max(1, chunk_words // max(width, 1))
    num_chunks = max(1, math.ceil(num_bundles / most))
    size = math.ceil(num_bundles / num_chunks)
    bundles = jnp.minimum(jnp.arange(num_chunks * size, dtype=jnp.int32), num_bundles - 1)
    return bundles.reshape(num_chunks, size)


def _search_one(rows, row_offsets, chunks, opcodes, operands, *, num_head, num_items):
    """Runs one program over all chunks: two masks u32[C, Gc, W]."""

    def one_chunk(bundles):
        shape = (*bundles.shape, rows.shape[1])
        first_rows = row_offsets[bundles]
        num_hashes = operands.shape[1]
        widths = (row_offsets[bundles + 1] - first_rows - num_head) // num_hashes
        step = functools.partial(_step, rows, first_rows, widths, num_head)
        everything = jnp.full((2, *shape), _ONES, jnp.uint32)
        stack = jnp.zeros((MAX_DEPTH + 1, *everything.shape), jnp.uint32)
        (_, top, _), _ = lax.scan(step, (jnp.int32(0), everything, stack), (opcodes, operands))
        masks = top & _real_items(bundles, rows.shape[1], num_items)
        return masks[0], masks[1]

    return lax.map(one_chunk, chunks)


def _step(rows, first_rows, widths, num_head, state, instruction):
    """One instruction on (depth, top pair, stack of the pairs below)."""
    depth, top, stack = state
    opcode, operand = instruction
    # The slot at `depth` is free, so saving there is always harmless; doing it outside the switch
    # keeps the stack out of the branches, which would copy it.
    stack = lax.dynamic_update_index_in_dim(stack, top, depth, 0)

    def below():
        return lax.dynamic_index_in_dim(stack, depth - 1, 0, keepdims=False)

    def head():
        row = rows[first_rows + operand[0].astype(jnp.int32)]
        return jnp.stack([row, row])

    def tail():
        row = jnp.full(top.shape[1:], _ONES, jnp.uint32)
        for k in range(operand.shape[0]):
            slot = (operand[k] % jnp.maximum(widths, 1).astype(jnp.uint32)).astype(jnp.int32)
            row &= rows[first_rows + num_head + k * widths + slot]
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


def _real_items(bundles, width, num_items):
    """Words u32[Gc, W] whose bits are set for the items below `num_items`."""
    words = bundles[:, None] * width + jnp.arange(width, dtype=jnp.int32)
    return valid_bits(words, num_items)


def valid_bits(words: Int32[Array, "*shape"], num_items: int) -> UInt32[Array, "*shape"]:
    """For each word number, the bits that stand for items below `num_items`."""
    full, rest = divmod(num_items, 32)
    partial = jnp.where(words == full, jnp.uint32((1 << rest) - 1), jnp.uint32(0))
    return jnp.where(words < full, jnp.uint32(_ONES), partial)
