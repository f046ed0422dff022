"""Changing some items of a Bloom index in place: their bits, and their place in the term pool."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, Int32, UInt32

from jaxrec.retrieval.masks import bits_by_word, unpack_bits
from jaxrec.retrieval.terms import ItemTerms

type _Array = jax.Array | np.ndarray


def checked_positions(
    positions: Int[_Array, "M"] | Sequence[int], num_items: int
) -> Int32[np.ndarray, "M"]:
    """The positions as an array, each of them inside the index and named once.

    Raises:
      ValueError: otherwise.
    """
    given = np.asarray(positions)
    bad = np.flatnonzero((given < 0) | (given >= num_items))
    if bad.size:
        raise ValueError(
            f"positions[{bad[0]}] is {given[bad[0]]}; the index has the positions 0 to "
            f"{num_items - 1}"
        )
    values, counts = np.unique(given, return_counts=True)
    if (counts > 1).any():
        raise ValueError(f"position {values[counts > 1][0]} is given more than once")
    return given.astype(np.int32)


class TermPool(NamedTuple):
    """The stored terms of N positions, in segments of one array of S slots.

    Attributes:
      spans: position n has values[spans[n, 0] up to spans[n, 1]], ascending; i32[N, 2].
      values: term numbers; i32[S].
      used: slots up to this one are taken, by present or former segments; i32[].
    """

    spans: Int32[_Array, "N 2"]
    values: Int32[_Array, "S"]
    used: Int32[_Array, ""]


def make_pool(pairs: ItemTerms, spare: int) -> TermPool:
    """The pool of these items' terms, with `spare` free slots."""
    ends = np.cumsum(np.bincount(pairs.items, minlength=pairs.num_items))
    spans = np.stack([np.concatenate([[0], ends[:-1]])[: len(ends)], ends], axis=1)
    if len(pairs.terms) + spare > np.iinfo(np.int32).max:
        raise ValueError(f"{len(pairs.terms)} terms do not fit int32; shard the index")
    return TermPool(
        jnp.asarray(spans.astype(np.int32)),
        jnp.asarray(np.pad(pairs.terms, (0, spare))),
        jnp.asarray(len(pairs.terms), jnp.int32),
    )


def spare_slots(num_terms: int) -> int:
    """Slots that a pool of `num_terms` keeps free: an eighth, and some."""
    return num_terms // 8 + 1024


def replace_terms(
    pool: TermPool,
    live: UInt32[_Array, "words"],
    positions: Int32[np.ndarray, "M"],
    pairs: ItemTerms,
    *,
    donate: bool,
) -> tuple[TermPool, UInt32[Array, "words"]]:
    """(pool, live bits) in which position positions[i] holds the terms of item i of `pairs`.

    New segments go to the free end of the pool. Once that is full, segments move together and leave
    former ones out; only if this does not help either does the pool get another size.
    """
    counts = np.bincount(pairs.items, minlength=pairs.num_items)
    used = int(pool.used)
    place = _place_in_place if donate else _place
    if used + len(pairs.terms) > pool.values.shape[0]:
        pool = _compacted(pool, np.asarray(live), positions, len(pairs.terms))
        used = int(pool.used)
    begins = used + np.concatenate([[0], np.cumsum(counts)[:-1]])[: len(counts)]
    slots = used + np.arange(len(pairs.terms))
    words, bits = bits_by_word(positions)
    return place(
        pool, jnp.asarray(live),
        *_padded(pool.spans.shape[0], positions, np.stack([begins, begins + counts], axis=1)),
        *_padded(pool.values.shape[0], slots, pairs.terms),
        *_padded(live.shape[0], words, bits), np.int32(used + len(pairs.terms)),
    )  # fmt: skip


def clear_live(
    live: UInt32[_Array, "words"], positions: Int32[np.ndarray, "M"], *, donate: bool
) -> UInt32[Array, "words"]:
    """The live bits without those of `positions`."""
    words, bits = bits_by_word(positions)
    clear = _clear_in_place if donate else _clear
    return clear(jnp.asarray(live), *_padded(live.shape[0], words, bits))


def _place_terms(pool, live, positions, spans, slots, terms, words, bits, used):
    pool = TermPool(
        pool.spans.at[positions].set(spans, mode="drop"),
        pool.values.at[slots].set(terms, mode="drop"),
        used,
    )
    return pool, live.at[words].set(live.at[words].get(mode="clip") | bits, mode="drop")


def _clear_bits(live, words, bits):
    return live.at[words].set(live.at[words].get(mode="clip") & ~bits, mode="drop")


_place = jax.jit(_place_terms)
_place_in_place = functools.partial(jax.jit, donate_argnums=(0, 1))(_place_terms)
_clear = jax.jit(_clear_bits)
_clear_in_place = functools.partial(jax.jit, donate_argnums=0)(_clear_bits)


def _padded(end: int, places: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both at the next power of two: few shapes are ever compiled. Place `end` is dropped."""
    size = max(256, 1 << (len(places) - 1).bit_length()) - len(places)
    values = values.astype(np.uint32 if values.dtype == np.uint32 else np.int32)
    return (
        np.pad(places.astype(np.int32), (0, size), constant_values=end),
        np.pad(values, ((0, size),) + ((0, 0),) * (values.ndim - 1)),
    )


def present_terms(pool: TermPool, held: Bool[np.ndarray, "N"]) -> ItemTerms:
    """The stored terms of the positions that are held. Host only."""
    spans = np.asarray(pool.spans)
    lengths = np.where(held, spans[:, 1] - spans[:, 0], 0)
    within = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    values = np.asarray(pool.values)[np.repeat(spans[:, 0], lengths) + within]
    return ItemTerms(len(spans), np.repeat(np.arange(len(spans)), lengths).astype(np.int32), values)


def _compacted(pool: TermPool, live: np.ndarray, leaving: np.ndarray, wanted: int) -> TermPool:
    """The pool without former segments, those of free positions and of the positions `leaving`."""
    num_positions, size = len(pool.spans), pool.values.shape[0]
    held = unpack_bits(live, num_positions)
    held[leaving] = False
    pairs = present_terms(pool, held)
    used = len(pairs.terms)
    if used + wanted + spare_slots(used + wanted) // 2 > size:
        size = max(used + wanted + spare_slots(used + wanted), size + size // 2)
    return make_pool(pairs, size - used)


def length_bound(num_terms: int) -> int:
    """The most terms that a search of as many steps finds: verification compiles for steps."""
    return (1 << num_terms.bit_length()) - 1
