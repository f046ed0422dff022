"""Triton kernels of the retrieval benchmarks' peers; imported only where Triton is.

They do what SilverTorch's published operators do: Bloom rows are combined in registers, a block of
words at a time, with NOT as a plain complement; scores of all scanned rows go to memory.
"""

import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]


@triton.jit
def _tail(rows, start, width, hashes, place, WORDS: tl.constexpr, HASHES: tl.constexpr):
    """All rows of a term: row start + k·width + hash k mod width."""
    mask = tl.load(rows + (start + tl.load(hashes) % width) * WORDS + place)
    for k in tl.static_range(1, HASHES):
        row = start + k * width + tl.load(hashes + k) % width
        mask &= tl.load(rows + row * WORDS + place)
    return mask


@triton.jit
def _program(
    rows, offsets, operands, bundle, query, place, num_head,
    WORDS: tl.constexpr, STEPS: tl.constexpr, HASHES: tl.constexpr,
):  # fmt: skip
    """(head OR term 1) AND term 3 AND NOT term 5, the program of `BloomWorkload`."""
    begin, end = tl.load(offsets + bundle), tl.load(offsets + bundle + 1)
    width = (end - begin - num_head) // HASHES
    own = operands + query * STEPS * HASHES
    mask = tl.load(rows + (begin + tl.load(own)) * WORDS + place)
    tails = begin + num_head
    mask |= _tail(rows, tails, width, own + HASHES, place, WORDS, HASHES)
    mask &= _tail(rows, tails, width, own + 3 * HASHES, place, WORDS, HASHES)
    return mask & ~_tail(rows, tails, width, own + 5 * HASHES, place, WORDS, HASHES)


@triton.jit
def bloom_all(
    rows, offsets, operands, out, num_head, num_words,
    WORDS: tl.constexpr, STEPS: tl.constexpr, HASHES: tl.constexpr,
):  # fmt: skip
    """Program (bundle, query): the words of a bundle."""
    bundle, query = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    place = tl.arange(0, WORDS)
    mask = _program(
        rows, offsets, operands, bundle, query, place, num_head, WORDS, STEPS, HASHES
    )  # fmt: skip
    tl.store(out + query * num_words + bundle * WORDS + place, mask)


@triton.jit
def bloom_tiles(
    rows, offsets, operands, tiles, out, num_head, max_tiles,
    WORDS: tl.constexpr, STEPS: tl.constexpr, HASHES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program (block of tiles, query): two words of each tile, 0 for tile -1."""
    query = tl.program_id(1).to(tl.int64)
    lane = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    slot = lane // 2
    inside = slot < max_tiles
    tile = tl.load(tiles + query * max_tiles + slot, mask=inside, other=-1).to(tl.int64)
    word = tl.maximum(tile, 0) * 2 + lane % 2
    mask = _program(
        rows, offsets, operands, word // WORDS, query, word % WORDS, num_head,
        WORDS, STEPS, HASHES,
    )  # fmt: skip
    mask = tl.where(tile >= 0, mask, 0)
    tl.store(out + query * max_tiles * 2 + lane, mask, mask=inside)


@triton.jit
def ivf_scan(
    codes, scales, queries, words, tiles, scores, max_tiles, num_words,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, BY_SLOT: tl.constexpr,
):  # fmt: skip
    """Program (slot, query): scores of a tile's rows, -inf for those that the mask bars.

    BY_SLOT: words are those of the query's tiles in order; else those of all rows.
    """
    slot, query = tl.program_id(0), tl.program_id(1).to(tl.int64)
    tile = tl.load(tiles + query * max_tiles + slot).to(tl.int64)
    lane, column = tl.arange(0, ROWS), tl.arange(0, WIDTH)
    out = scores + query * max_tiles * ROWS + slot * ROWS + lane
    if tile < 0:
        tl.store(out, tl.full((ROWS,), float("-inf"), tl.float32))
    else:
        row = tile * ROWS + lane
        own = tl.load(codes + row[:, None] * WIDTH + column[None, :]).to(tl.int32)
        wanted = tl.load(queries + query * WIDTH + column).to(tl.int32)
        score = tl.sum(own * wanted[None, :], axis=1).to(tl.float32) * tl.load(scales + row)
        first = slot * ROWS if BY_SLOT else tile * ROWS
        word = tl.load(words + query * num_words + (first + lane) // 32)
        passes = (word >> (lane % 32)) & 1
        tl.store(out, tl.where(passes != 0, score, float("-inf")))
