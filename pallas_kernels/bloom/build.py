"""Building the bit rows of a Bloom index, on the device."""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Int32, UInt32

from pallas_kernels.bloom.hash import hash_steps, row_hash

_CHUNK_PAIRS = 1 << 16


def partition_width(num_terms: int, num_hashes: int, max_fpr: float) -> int:
    """Rows a partition needs, so that a term matches an item that lacks it at most `max_fpr` often.

    An item with n tail terms sets n random rows in each of the K partitions, so it matches a
    foreign term with probability (1 - (1 - 1/w)^n)^K. Without terms the width is 0.
    """
    if not 0 < max_fpr < 1:
        raise ValueError(f"max_fpr is {max_fpr}; expected a probability between 0 and 1")
    if num_terms == 0:
        return 0
    hit = max_fpr ** (1 / num_hashes)
    return math.ceil(1 / -math.expm1(math.log1p(-hit) / num_terms))


class _Pairs(NamedTuple):
    """Items and what they have, in the order of bundles; those of bundle g start at begins[g]."""

    items: Array
    values: Array
    begins: Array


def bloom_build(
    num_items: int,
    *,
    bundle_words: int,
    num_head: int,
    num_hashes: int,
    widths: Int32[np.ndarray, "G"],
    head_items: Int32[np.ndarray, "h"],
    head_rows: Int32[np.ndarray, "h"],
    tail_items: Int32[np.ndarray, "t"],
    tail_terms: UInt32[np.ndarray, "t 2"],
) -> tuple[UInt32[Array, "R W"], Int32[Array, "G1"]]:
    """Sets the bits of every (item, term) pair in the layout that `bloom_search` reads.

    The pairs are checked and ordered on the host; hashing and setting bits run on the device.

    Args:
      num_items: items of the catalogue, numbered from 0; W·32 of them go to each bundle.
      bundle_words: W; use a multiple of 128 for the GPU kernel.
      num_head: exact rows a bundle, one for each head value.
      num_hashes: K, Bloom rows a term.
      widths: rows w_g of each of the K partitions of bundle g; see `partition_width`.
      head_items, head_rows: pairs of an item and the head row it belongs to, in any order.
      tail_items, tail_terms: pairs of an item and the 64-bit hash of one of its terms, as (low,
        high), in any order; `row_hashes` makes K numbers of each.

    Returns:
      rows u32[R, W] and row_offsets i32[G + 1], R = Σ (num_head + K·w_g).

    Raises:
      ValueError: an item, a head row or the number of bundles is out of range, or a bundle of
        width 0 has a tail term.

    Cost: K writes of a byte for each tail pair and one for each head pair. Scratch beside inputs
    and result: one byte a bit of a bundle's largest partition.
    """
    bundle_items = bundle_words * 32
    num_bundles = -(-num_items // bundle_items)
    _check_build(num_items, num_bundles, num_head, widths, head_items, head_rows, tail_items)
    heights = num_head + num_hashes * widths.astype(np.int64)
    offsets = np.concatenate([[0], np.cumsum(heights)])
    if offsets[-1] > np.iinfo(np.int32).max:
        raise ValueError(f"{offsets[-1]} rows do not fit int32; use fewer, narrower bundles")
    lost = np.flatnonzero(widths[tail_items // bundle_items] == 0)
    if lost.size:
        item = tail_items[lost[0]]
        raise ValueError(
            f"bundle {item // bundle_items} has width 0 but item {item} has a tail term; "
            "give the bundle a width of at least 1"
        )
    row_offsets = jnp.asarray(offsets.astype(np.int32))
    rows = _set_bits(
        row_offsets,
        jnp.asarray(widths.astype(np.int32)),
        _by_bundle(head_items, head_rows, bundle_items, num_bundles),
        _by_bundle(tail_items, tail_terms, bundle_items, num_bundles),
        num_rows=int(offsets[-1]),
        bundle_words=bundle_words,
        num_head=num_head,
        num_hashes=num_hashes,
        max_width=int(widths.max(initial=0)),
    )
    return rows, row_offsets


def _by_bundle(items: np.ndarray, values: np.ndarray, bundle_items: int, num_bundles: int):
    """The pairs in the order of bundles, with a chunk of padding behind the last."""
    bundles = items // bundle_items
    if (np.diff(bundles) < 0).any():
        order = np.argsort(bundles, kind="stable")
        items, values, bundles = items[order], values[order], bundles[order]
    begins = np.searchsorted(bundles, np.arange(num_bundles + 1)).astype(np.int32)
    # A power of two or a multiple of the chunk: few shapes are ever compiled.
    chunk = _chunk_pairs(len(items))
    padding = -len(items) % chunk + chunk
    values = np.pad(values, ((0, padding),) + ((0, 0),) * (values.ndim - 1))
    items = np.pad(items % bundle_items, (0, padding))
    return _Pairs(*(jnp.asarray(x) for x in (items, values, begins)))


def _chunk_pairs(num_pairs: int) -> int:
    return min(_CHUNK_PAIRS, 1 << max(num_pairs - 1, 1).bit_length())


@functools.partial(
    jax.jit, static_argnames=("num_rows", "bundle_words", "num_head", "num_hashes", "max_width")
)
def _set_bits(
    row_offsets, widths, head: _Pairs, tail: _Pairs, *,
    num_rows: int, bundle_words: int, num_head: int, num_hashes: int, max_width: int,
) -> UInt32[Array, "R W"]:  # fmt: skip
    """Bundle after bundle, partition after partition: bytes are set, then packed to bits."""

    def place(rows, first_row, height, words):
        inside = jnp.arange(len(words), dtype=jnp.int32) < height
        numbers = jnp.where(inside, first_row + jnp.arange(len(words), dtype=jnp.int32), num_rows)
        return rows.at[numbers].set(words, mode="drop")

    def one_bundle(rows, g):
        first_row, width = row_offsets[g], widths[g]
        if num_head:
            words = _packed(head, g, num_head, bundle_words, lambda values: values)
            rows = place(rows, first_row, num_head, words)

        def one_partition(k, rows):
            def row_of(terms):
                hashes = row_hash(terms, steps[k])
                return (hashes % jnp.maximum(width, 1).astype(jnp.uint32)).astype(jnp.int32)

            words = _packed(tail, g, max_width, bundle_words, row_of)
            return place(rows, first_row + num_head + k * width, width, words)

        if max_width:
            rows = lax.fori_loop(0, num_hashes, one_partition, rows)
        return rows, None

    steps = jnp.asarray(hash_steps(num_hashes))
    rows = jnp.zeros((num_rows, bundle_words), jnp.uint32)
    bundles = jnp.arange(len(widths), dtype=jnp.int32)
    return lax.scan(one_bundle, rows, bundles)[0]


def _packed(pairs: _Pairs, g, height: int, bundle_words: int, row_of) -> UInt32[Array, "h W"]:
    """Rows with the bits of bundle g's pairs; equal bits may be set any number of times."""
    begin, end = pairs.begins[g], pairs.begins[g + 1]
    size = _chunk_pairs(len(pairs.items) // 2)

    def one_chunk(i, flags):
        start = begin + i * size
        items = lax.dynamic_slice_in_dim(pairs.items, start, size)
        rows = row_of(lax.dynamic_slice_in_dim(pairs.values, start, size))
        rows = jnp.where(start + jnp.arange(size, dtype=jnp.int32) < end, rows, height)
        return flags.at[rows, items].set(1, mode="drop")

    flags = jnp.zeros((height, bundle_words * 32), jnp.uint8)
    flags = lax.fori_loop(0, (end - begin + size - 1) // size, one_chunk, flags)
    bits = flags.reshape(height, bundle_words, 32).astype(jnp.uint32)
    return jnp.sum(bits << jnp.arange(32, dtype=jnp.uint32), axis=-1, dtype=jnp.uint32)


def _check_build(num_items, num_bundles, num_head, widths, head_items, head_rows, tail_items):
    if widths.shape != (num_bundles,) or (widths < 0).any():
        raise ValueError(
            f"widths has shape {widths.shape} and minimum {widths.min(initial=0)}; expected "
            f"{num_bundles} widths of 0 or more, one for each bundle of {num_items} items"
        )
    for name, values, end in (
        ("head_items", head_items, num_items),
        ("head_rows", head_rows, num_head),
        ("tail_items", tail_items, num_items),
    ):
        bad = np.flatnonzero((values < 0) | (values >= end))
        if bad.size:
            raise ValueError(
                f"{name}[{bad[0]}] is {values[bad[0]]}; expected a number from 0 to {end - 1}"
            )
