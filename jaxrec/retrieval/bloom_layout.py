"""Where a Bloom index puts what: exact rows for common values, widths of the bundles, the bits."""

import jax
import numpy as np
from jaxtyping import Array, Int, Int32, UInt32

from jaxrec.retrieval.terms import ItemTerms, TermCatalog, split_hashes
from pallas_kernels import bloom_build

type _Array = jax.Array | np.ndarray


def bits_per_tail_term(max_fpr: float, num_hashes: int) -> float:
    """Bloom bits that a term takes in each item that has it: K / -ln(1 - max_fpr^(1/K))."""
    return num_hashes / -np.log1p(-(max_fpr ** (1 / num_hashes)))


def placement(
    num_items: int, order: Int[_Array, "N"] | None, capacity: int | None
) -> Int[np.ndarray, "N"]:
    """The item at each bit position, -1 for none."""
    if order is not None:
        if capacity not in (None, len(order)):
            raise ValueError(f"capacity is {capacity} and order has {len(order)} positions")
        return np.asarray(order)
    capacity = num_items if capacity is None else capacity
    if capacity < num_items:
        raise ValueError(f"capacity is {capacity}; the features describe {num_items} items")
    return np.pad(np.arange(num_items), (0, capacity - num_items), constant_values=-1)


def reordered(pairs: ItemTerms, order: Int[np.ndarray, "N"]) -> ItemTerms:
    """The pairs with items replaced by their positions; items without a position go.

    Raises:
      ValueError: `order` names an item that does not exist, or one item more than once.
    """
    placed = np.flatnonzero(order >= 0)
    items = order[placed]
    if items.size and items.max() >= pairs.num_items:
        raise ValueError(
            f"order names item {items.max()}; the features describe {pairs.num_items} items"
        )
    if (np.bincount(items, minlength=1) > 1).any():
        raise ValueError("order names an item more than once")
    position = np.full(pairs.num_items, -1, np.int64)
    position[items] = placed
    moved = position[pairs.items]
    kept = np.flatnonzero(moved >= 0)
    kept = kept[np.argsort(moved[kept], kind="stable")]
    return ItemTerms(len(order), moved[kept].astype(np.int32), pairs.terms[kept])


def with_head(
    pairs: ItemTerms, catalog: TermCatalog, num_items: int, tail_bits: float
) -> TermCatalog:
    """The catalogue with exact rows for the terms that cost less so: one bit for each item."""
    counts = np.bincount(pairs.terms, minlength=len(catalog))
    return catalog.with_head(np.flatnonzero(counts * tail_bits > num_items))


def tail_counts(pairs: ItemTerms, catalog: TermCatalog) -> Int[np.ndarray, "N"]:
    """Terms of each position that have no exact row."""
    tail = catalog.head_rows_of(pairs.terms) < 0
    return np.bincount(pairs.items[tail], minlength=pairs.num_items)


def split_pairs(pairs: ItemTerms, catalog: TermCatalog) -> dict[str, np.ndarray]:
    """The pairs as `bloom_build` and `bloom_update` take them: head rows and tail hashes."""
    rows = catalog.head_rows_of(pairs.terms)
    head, tail = rows >= 0, rows < 0
    return {
        "head_items": pairs.items[head],
        "head_rows": rows[head],
        "tail_items": pairs.items[tail],
        "tail_terms": split_hashes(catalog.hashes_at(pairs.terms[tail])),
    }


def bit_rows(
    pairs: ItemTerms,
    catalog: TermCatalog,
    counts: Int[np.ndarray, "N"],
    max_fpr: float,
    num_hashes: int,
    bundle_words: int,
) -> tuple[UInt32[Array, "R W"], Int32[Array, "G1"]]:
    """The rows of all bundles, each sized for `counts` tail terms at its positions.

    Every bundle has a partition width of at least 1, so that any item can be put anywhere later.
    """
    widths = bundle_widths(counts, bundle_words * 32, max_fpr, num_hashes)
    return bloom_build(
        pairs.num_items,
        bundle_words=bundle_words,
        num_head=int(catalog.head_rows.max(initial=-1)) + 1,
        num_hashes=num_hashes,
        widths=np.maximum(widths, 1),
        **split_pairs(pairs, catalog),
    )


def bundle_widths(
    tail_counts: Int[np.ndarray, "N"], bundle_items: int, max_fpr: float, num_hashes: int
) -> Int32[np.ndarray, "G"]:
    """For each bundle the fewest rows a partition for a mean false positive rate of `max_fpr`.

    An item with n terms sets n of the w rows of a partition, with repeats, so it matches a foreign
    term with probability (1 - (1 - 1/w)^n)^K. Found by bisection for all bundles at once.
    """
    padded = np.pad(tail_counts, (0, -len(tail_counts) % bundle_items)).reshape(-1, bundle_items)
    sizes = np.full(len(padded), bundle_items)
    sizes[-1:] -= padded.size - len(tail_counts)
    low = np.zeros(len(padded), np.int64)
    high = np.full(len(padded), int(tail_counts.max(initial=0)))
    high = np.ceil(high * bits_per_tail_term(max_fpr, num_hashes) / num_hashes).astype(int) + 1
    distinct, ranks = np.unique(padded, return_inverse=True)
    keys = ranks.reshape(padded.shape) + np.arange(len(padded))[:, None] * len(distinct)
    counts = np.bincount(keys.ravel(), minlength=len(padded) * len(distinct))
    counts = counts.reshape(len(padded), len(distinct))
    while (low + 1 < high).any():
        width = np.maximum((low + high) // 2, 1)
        hit = -np.expm1(distinct * np.log1p(-1 / np.maximum(width, 1.0000001))[:, None])
        enough = (counts * hit**num_hashes).sum(axis=1) <= max_fpr * sizes
        low, high = np.where(enough, low, width), np.where(enough, width, high)
    has_tail = padded.any(axis=1)
    return np.where(has_tail, high, 0).astype(np.int32)
