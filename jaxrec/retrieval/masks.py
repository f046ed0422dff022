"""Bit masks over items or rows: number i is bit i % 32 of word i // 32 of uint32[Q, words]."""

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
