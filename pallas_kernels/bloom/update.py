"""Rewriting the bits of some items of a Bloom index, on the device."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int32, UInt32

from pallas_kernels.bloom.hash import row_hashes

_CHUNK_CELLS = 1 << 24

type _Array = jax.Array | np.ndarray


def bloom_update(
    rows: UInt32[_Array, "R W"],
    row_offsets: Int32[_Array, "G1"],
    positions: Int32[np.ndarray, "M"],
    *,
    num_head: int,
    num_hashes: int,
    head_items: Int32[np.ndarray, "h"],
    head_rows: Int32[np.ndarray, "h"],
    tail_items: Int32[np.ndarray, "t"],
    tail_terms: UInt32[np.ndarray, "t 2"],
    donate: bool = False,
) -> UInt32[Array, "R W"]:
    """Gives the items at `positions` other terms: their old bits go, the new ones are set.

    The layout stays, so a bundle whose items gain many tail terms has more false positives than it
    was sized for; it never misses an item.

    Args:
      rows, row_offsets, num_head, num_hashes: the index, as of `bloom_build`.
      positions: items to rewrite, each once.
      head_items, head_rows: pairs of one of these items and a head row it belongs to.
      tail_items, tail_terms: pairs of one of these items and the 64-bit hash of one of its terms,
        as (low, high).
      donate: write in place, so that `rows` itself can no longer be used. Otherwise the rows are
        copied first.

    Returns:
      The new rows, u32[R, W].

    Raises:
      ValueError: a position out of range or given twice, a pair of another item, a head row out of
        range, or a tail term in a bundle of width 0.

    Cost: reads and writes 4 bytes for each row of the item's bundle, (num_head + K·w_g) an item at
    most, since items of one word share them; without `donate` also a copy of all rows. Shapes are
    rounded up to powers of two, so that few programs are ever compiled.
    """
    offsets = np.asarray(row_offsets).astype(np.int64)
    bundle_words = rows.shape[1]
    _check(offsets, bundle_words, positions, num_head, head_items, head_rows, tail_items)
    set_rows, set_items = _bits(
        offsets, bundle_words * 32, num_head, num_hashes, head_items, head_rows, tail_items,
        tail_terms,
    )  # fmt: skip
    columns, lanes = np.divmod(positions, 32)
    order = np.argsort(columns, kind="stable")
    columns, starts = np.unique(columns[order], return_index=True)
    masks = np.uint32(1) << lanes[order].astype(np.uint32)
    keep = ~np.bitwise_or.reduceat(masks, starts) if len(starts) else masks
    bundles = columns // bundle_words
    heights = offsets[bundles + 1] - offsets[bundles]
    cells = np.cumsum(heights)
    clear, add = (_clear_in_place, _add_in_place) if donate else (_clear, _add)
    new_rows = jnp.asarray(rows)
    done = 0
    while done < len(columns):
        before = cells[done] - heights[done]
        end = max(done + 1, int(np.searchsorted(cells, before + _CHUNK_CELLS, side="right")))
        part = slice(done, end)
        arrays = (offsets[bundles[part]], heights[part], columns[part] % bundle_words, keep[part])
        num_cells = _rounded(int(cells[end - 1] - before))
        new_rows = clear(new_rows, *_padded(*arrays), num_cells=num_cells)
        clear, done = _clear_in_place, end  # later chunks own what the first one made
    if not len(set_rows):
        return new_rows
    bits = np.uint32(1) << (set_items % 32).astype(np.uint32)
    padded = _padded(set_rows, set_items // 32 % bundle_words, bits, fill=rows.shape[0])
    return (_add_in_place if len(columns) else add)(new_rows, *padded)


def _bits(
    offsets, bundle_items, num_head, num_hashes, head_items, head_rows, tail_items, tail_terms
) -> tuple[np.ndarray, np.ndarray]:
    """(row, item) of every bit to set, each once."""
    bundles = tail_items // bundle_items
    first = offsets[bundles]
    widths = (offsets[bundles + 1] - first - num_head) // num_hashes
    lost = np.flatnonzero(widths == 0)
    if lost.size:
        item = tail_items[lost[0]]
        raise ValueError(
            f"bundle {item // bundle_items} has width 0 and cannot hold the tail term of item "
            f"{item}; build the index with widths of at least 1"
        )
    hashes = np.asarray(row_hashes(tail_terms, num_hashes)).astype(np.int64)
    partitions = np.arange(num_hashes) * widths[:, None]
    tail_rows = first[:, None] + num_head + partitions + hashes % widths[:, None]
    rows = np.concatenate([offsets[head_items // bundle_items] + head_rows, tail_rows.ravel()])
    items = np.concatenate([head_items, np.repeat(tail_items, num_hashes)]).astype(np.int64)
    pairs = np.unique(rows << 32 | items)
    return pairs >> 32, pairs & 0xFFFFFFFF


def _rounded(count: int) -> int:
    return max(256, 1 << (count - 1).bit_length())


def _padded(*arrays: np.ndarray, fill: int = 0) -> list[np.ndarray]:
    """The arrays at the next power of two; the first is filled up with `fill`."""
    size = _rounded(len(arrays[0])) - len(arrays[0])
    first, *rest = (x.astype(np.uint32 if x.dtype == np.uint32 else np.int32) for x in arrays)
    return [np.pad(first, (0, size), constant_values=fill)] + [np.pad(x, (0, size)) for x in rest]


def _clear_cells(rows, first_rows, heights, words, keep, *, num_cells: int):
    """rows[first_row up to first_row + height, word] &= keep, for each of the columns."""
    ends = jnp.cumsum(heights)
    cell = jnp.arange(num_cells, dtype=jnp.int32)
    column = jnp.minimum(jnp.searchsorted(ends, cell, side="right"), len(ends) - 1)
    row = first_rows[column] + cell - (ends[column] - heights[column])
    row = jnp.where(cell < ends[-1], row, rows.shape[0])
    kept = rows.at[row, words[column]].get(mode="clip") & keep[column]
    return rows.at[row, words[column]].set(kept, mode="drop")


def _add_bits(rows, numbers, words, bits):
    """Sets bits that are 0 so far; adding them is the same as OR, whatever cells they share."""
    return rows.at[numbers, words].add(bits, mode="drop")


_clear = functools.partial(jax.jit, static_argnames="num_cells")(_clear_cells)
_clear_in_place = functools.partial(jax.jit, static_argnames="num_cells", donate_argnums=0)(
    _clear_cells
)
_add = jax.jit(_add_bits)
_add_in_place = functools.partial(jax.jit, donate_argnums=0)(_add_bits)


def _check(offsets, bundle_words, positions, num_head, head_items, head_rows, tail_items):
    capacity = (len(offsets) - 1) * bundle_words * 32
    bad = np.flatnonzero((positions < 0) | (positions >= capacity))
    if bad.size:
        raise ValueError(
            f"positions[{bad[0]}] is {positions[bad[0]]}; expected 0 to {capacity - 1}"
        )
    ordered = np.sort(positions)
    twice = np.flatnonzero(ordered[1:] == ordered[:-1])
    if twice.size:
        raise ValueError(f"position {ordered[twice[0]]} is given more than once")
    for name, items in (("head_items", head_items), ("tail_items", tail_items)):
        foreign = np.flatnonzero(~np.isin(items, positions))
        if foreign.size:
            raise ValueError(
                f"{name}[{foreign[0]}] is {items[foreign[0]]}, which is not among positions"
            )
    bad = np.flatnonzero((head_rows < 0) | (head_rows >= num_head))
    if bad.size:
        raise ValueError(
            f"head_rows[{bad[0]}] is {head_rows[bad[0]]}; expected a number from 0 to "
            f"{num_head - 1}"
        )
