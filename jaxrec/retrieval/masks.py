"""Bit masks over items or rows: number i is bit i % 32 of word i // 32 of uint32[Q, words]."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Int, Int32, UInt32

type _Array = jax.Array | np.ndarray


def pack_bits(bits: Bool[np.ndarray, "R"]) -> UInt32[np.ndarray, "words"]:
    """Bit i % 32 of word i // 32; the last word is filled up with zeros. Host only."""
    padded = np.pad(bits, (0, -len(bits) % 32))
    return np.packbits(padded, bitorder="little").view("<u4").astype(np.uint32)


def unpack_bits(words: UInt32[_Array, "words"], num_bits: int) -> Bool[np.ndarray, "{num_bits}"]:
    """The first bits of `words`, as a new array. Host only; undoes `pack_bits`."""
    as_bytes = np.ascontiguousarray(words).astype("<u4").view(np.uint8)
    return np.unpackbits(as_bytes, bitorder="little")[:num_bits].astype(bool)


@functools.partial(jax.jit, static_argnames="num_items")
def unpack_mask(mask: UInt32[_Array, "Q words"], num_items: int) -> Bool[Array, "Q {num_items}"]:
    """One bool an item instead of one bit."""
    if num_items > mask.shape[1] * 32:
        raise ValueError(f"{mask.shape[1]} words hold {mask.shape[1] * 32} items, not {num_items}")
    bits = (jnp.asarray(mask)[..., None] >> jnp.arange(32, dtype=jnp.uint32)) & 1
    return bits.reshape(mask.shape[0], -1)[:, :num_items].astype(bool)


def set_bits(
    mask: UInt32[np.ndarray, "Q words"],
) -> tuple[Int[np.ndarray, "n"], Int[np.ndarray, "n"]]:
    """(query, position) of every bit that is set. Host only."""
    queries, words = np.nonzero(mask)
    bits = (mask[queries, words][:, None] >> np.arange(32, dtype=np.uint32)) & 1
    which, lanes = np.nonzero(bits)
    return queries[which], words[which] * 32 + lanes


def bits_by_word(
    positions: Int[np.ndarray, "n"],
) -> tuple[Int[np.ndarray, "w"], UInt32[np.ndarray, "w"]]:
    """(words, their bits) that stand for the positions, each word once. Host only."""
    words, lanes = np.divmod(np.sort(positions), 32)
    words, starts = np.unique(words, return_index=True)
    bits = np.uint32(1) << lanes.astype(np.uint32)
    return words, np.bitwise_or.reduceat(bits, starts) if len(starts) else bits


def tile_word_numbers(tiles: Int32[_Array, "Q T"], tile_words: int) -> Int32[Array, "Q words"]:
    """The numbers of the words of each query's tiles; beyond every mask for tile -1."""
    tiles = jnp.asarray(tiles)
    first = jnp.where(tiles >= 0, tiles * tile_words, np.iinfo(np.int32).max - tile_words)
    words = first[..., None] + jnp.arange(tile_words, dtype=jnp.int32)
    return words.reshape(tiles.shape[0], -1)


def spread_tiles(
    tile_masks: UInt32[_Array, "Q tile_words_all"],
    tiles: Int32[_Array, "Q T"],
    num_words: int,
) -> UInt32[Array, "Q {num_words}"]:
    """Masks over all words from those of some tiles; all other words are 0. Traceable.

    Args:
      tile_masks: as `BloomIndex.masks(plan, tiles)` gives them.
      tiles: the same tiles; -1 for none.
      num_words: words of the result; tiles beyond are left out.
    """
    places = tile_word_numbers(tiles, tile_masks.shape[1] // max(tiles.shape[1], 1))
    queries = jnp.arange(tiles.shape[0], dtype=jnp.int32)[:, None]
    masks = jnp.zeros((tiles.shape[0], num_words), jnp.uint32)
    return masks.at[queries, places].set(jnp.asarray(tile_masks), mode="drop")


def bit_at(
    words: UInt32[_Array, "words"], positions: Int[_Array, "*shape"]
) -> Bool[Array, "*shape"]:
    """Whether the bit of each position is set; False for -1. Traceable."""
    safe = jnp.maximum(positions, 0)
    bits = jnp.asarray(words)[safe // 32] >> (safe % 32).astype(jnp.uint32)
    return (bits & 1).astype(bool) & (positions >= 0)


def to_row_order(
    mask: UInt32[_Array, "Q item_words"], row_ids: Int32[_Array, "R"]
) -> UInt32[Array, "Q words"]:
    """Bit r of the result is bit row_ids[r] of the mask; 0 for row_ids outside the mask."""
    inside = (row_ids >= 0) & (row_ids < mask.shape[1] * 32)
    safe = jnp.where(inside, row_ids, 0)
    lanes = jnp.arange(32, dtype=jnp.uint32)

    def one_query(words):
        bits = (words[safe // 32] >> (safe % 32).astype(jnp.uint32)) & inside
        return jnp.sum(bits.reshape(-1, 32) << lanes, axis=1, dtype=jnp.uint32)

    return lax.map(one_query, jnp.asarray(mask))


def chosen_rows(rows: Int32[_Array, "Q n"], words: int) -> UInt32[Array, "Q {words}"]:
    """The mask of these rows; -1 is none, and a row may stand more than once."""
    num_rows = 32 * words
    rows = jnp.sort(jnp.where(rows >= 0, rows, num_rows), axis=1)
    first = jnp.diff(rows, axis=1, prepend=-1) > 0
    # Distinct rows have distinct bits, so adding them up is the same as OR.
    bits = jnp.where(first & (rows < num_rows), _bit(rows), 0)
    queries = jnp.arange(len(rows))[:, None]
    words_of = jnp.minimum(rows // 32, words - 1)
    return jnp.zeros((len(rows), words), jnp.uint32).at[queries, words_of].add(bits)


def rows_at(
    words: UInt32[_Array, "words"], ends: Int32[_Array, "words"], places: Int32[_Array, "n"]
) -> Int32[Array, "n"]:
    """The rows of the set bits number `places`; any row for places behind the last.

    Args:
      words: a mask.
      ends: set bits up to and with each word.
      places: counted from 0.

    Cost: a binary search, log2(words) gathers a place.
    """
    word = jnp.searchsorted(ends, places, side="right").astype(jnp.int32)
    word = jnp.minimum(word, len(words) - 1)
    bits = words[word]
    left = places - (ends[word] - lax.population_count(bits).astype(jnp.int32))
    lane = jnp.zeros_like(places)
    for half in (16, 8, 4, 2, 1):
        low = lax.population_count(bits & jnp.uint32((1 << half) - 1)).astype(jnp.int32)
        above = left >= low
        lane, left = lane + half * above, left - low * above
        bits = jnp.where(above, bits >> half, bits)
    return word * 32 + jnp.minimum(lane, 31)


def _bit(rows: Int32[Array, "*shape"]) -> UInt32[Array, "*shape"]:
    return jnp.uint32(1) << (rows % 32).astype(jnp.uint32)
