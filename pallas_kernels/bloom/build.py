"""Building the bit rows of a Bloom index, on the host."""

import math

import numpy as np
from jaxtyping import Int32, UInt32


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


def bloom_build(
    num_items: int,
    *,
    bundle_words: int,
    num_head: int,
    widths: Int32[np.ndarray, "G"],
    head_items: Int32[np.ndarray, "h"],
    head_rows: Int32[np.ndarray, "h"],
    tail_items: Int32[np.ndarray, "t"],
    tail_hashes: UInt32[np.ndarray, "t K"],
) -> tuple[UInt32[np.ndarray, "R W"], Int32[np.ndarray, "G1"]]:
    """Sets the bits of every (item, term) pair in the layout that `bloom_search` reads.

    Args:
      num_items: items of the catalogue, numbered from 0; W·32 of them go to each bundle.
      bundle_words: W; use a multiple of 128 for the GPU kernel.
      num_head: exact rows a bundle, one for each head value.
      widths: rows w_g of each of the K partitions of bundle g; see `partition_width`.
      head_items, head_rows: pairs of an item and the head row it belongs to, in any order.
      tail_items, tail_hashes: pairs of an item and the K hashes of one of its terms, in any order.

    Returns:
      rows u32[R, W] and row_offsets i32[G + 1], R = Σ (num_head + K·w_g); NumPy arrays.

    Raises:
      ValueError: an item, a head row or the number of bundles is out of range, or a bundle of
        width 0 has a tail term.

    Cost: one byte a bit of the largest bundle in scratch memory, beside the result; one write for
    each head pair and K for each tail pair.
    """
    bundle_items = bundle_words * 32
    num_bundles = -(-num_items // bundle_items)
    num_hashes = tail_hashes.shape[1]
    _check_build(num_items, num_bundles, num_head, widths, head_items, head_rows, tail_items)
    heights = num_head + num_hashes * widths.astype(np.int64)
    offsets = np.concatenate([[0], np.cumsum(heights)])
    if offsets[-1] > np.iinfo(np.int32).max:
        raise ValueError(f"{offsets[-1]} rows do not fit int32; use fewer, narrower bundles")
    rows = np.empty((offsets[-1], bundle_words), np.uint32)
    heads = _by_bundle(head_items // bundle_items, num_bundles)
    tails = _by_bundle(tail_items // bundle_items, num_bundles)
    for g, (head, tail) in enumerate(zip(heads, tails, strict=True)):
        bits = np.zeros((heights[g], bundle_items), np.uint8)
        bits[head_rows[head], head_items[head] % bundle_items] = 1
        if tail.size and widths[g] == 0:
            raise ValueError(
                f"bundle {g} has width 0 but item {tail_items[tail[0]]} has a tail term; "
                "give the bundle a width of at least 1"
            )
        for k in range(num_hashes if tail.size else 0):
            row = num_head + k * widths[g] + tail_hashes[tail, k] % np.uint32(widths[g])
            bits[row, tail_items[tail] % bundle_items] = 1
        packed = np.packbits(bits, axis=1, bitorder="little")
        rows[offsets[g] : offsets[g + 1]] = packed.view("<u4")
    return rows, offsets.astype(np.int32)


def _by_bundle(bundle_of_pair: np.ndarray, num_bundles: int) -> list[np.ndarray]:
    """The numbers of each bundle's pairs."""
    order = np.argsort(bundle_of_pair, kind="stable")
    ends = np.searchsorted(bundle_of_pair[order], np.arange(1, num_bundles))
    return np.split(order, ends) if num_bundles else []


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
