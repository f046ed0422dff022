"""Which items pass a filter: exact bit rows for common values, Bloom rows for the rest.

The index answers with two masks, of the items that possibly pass and of those that surely do, so
that NOT loses nothing to false positives. What lies between them is decided on the stored terms.
"""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Int, Int32, UInt32

from jaxrec.retrieval.filters import (
    And,
    Everything,
    Filter,
    FilterError,
    Not,
    Or,
    Term,
    parse_filter,
    unknown_feature,
)
from jaxrec.retrieval.masks import pack_bits, set_bits, unpack_mask
from jaxrec.retrieval.plan import FilterPlan, compile_plan, evaluate
from jaxrec.retrieval.terms import ItemTerms, TermCatalog, collect_terms, row_hashes
from pallas_kernels import BloomMasks, bloom_build, bloom_search

_VERIFY_CHUNK = 1 << 16

type _Array = jax.Array | np.ndarray
type FilterLike = str | Filter | None


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["rows", "row_offsets", "live", "term_offsets", "term_values"],
    meta_fields=["num_items", "num_head", "num_hashes", "max_item_terms", "max_fpr", "catalog"],
)
@dataclass(frozen=True, eq=False)
class BloomIndex:
    """Bit rows of all items' terms, and the terms themselves (N items, one bit position each).

    Build with `BloomIndex.build`. The object is a pytree: arrays are leaves, the rest is static.

    Attributes:
      rows, row_offsets: what `pallas_kernels.bloom_search` reads; u32[R, W], i32[G + 1].
      live: the bits of positions that hold an item; u32[words].
      term_offsets, term_values: position n has the terms term_values[term_offsets[n] up to
        term_offsets[n + 1]], ascending; i32[N + 1], i32[n].
      num_items: N.
      num_head: values with an exact row.
      num_hashes: K.
      max_item_terms: most terms of one item.
      max_fpr: what the Bloom rows are sized for.
      catalog: the known terms; on the host.
    """

    rows: UInt32[_Array, "R W"]
    row_offsets: Int32[_Array, "G1"]
    live: UInt32[_Array, "words"]
    term_offsets: Int32[_Array, "N1"]
    term_values: Int32[_Array, "n"]
    num_items: int
    num_head: int
    num_hashes: int
    max_item_terms: int
    max_fpr: float
    catalog: TermCatalog

    @classmethod
    def build(
        cls,
        features: Mapping[str, Any],
        *,
        max_fpr: float = 1e-3,
        num_hashes: int = 5,
        bundle_words: int | None = None,
        order: Int[_Array, "N"] | None = None,
    ) -> "BloomIndex":
        """Indexes one entry an item and feature.

        A value held by more than a few percent of the items gets an exact row of one bit an item,
        which is less than its Bloom bits would take. Bundles of items get as many Bloom rows as
        keep the mean false positive rate of a term below `max_fpr`.

        Args:
          features: {name: one entry an item}: a string or integer, a list of them, or None. 42 and
            "42" are the same value.
          max_fpr: chance that a tail term possibly matches an item without it, over the items.
          num_hashes: K, Bloom rows read for a tail term.
          bundle_words: 32-item words of a bundle, a multiple of 128 for the GPU kernel; None takes
            512, its best, for catalogues of several such bundles and 128 for smaller ones.
          order: the item at each bit position, -1 for none; `ivf.row_ids` lines the masks up with
            an `IVFIndex`. None keeps the items' own order.

        Raises:
          FilterError: unequal lengths, or a value of another type (naming feature and item).
          ValueError: max_fpr, num_hashes or order out of range.

        Cost: host time linear in the (item, value) pairs; per item one bit a head value, about
        K / -ln(1 - max_fpr^(1/K)) bits a tail value (17 by default), and 4 bytes a value.
        """
        if bundle_words is None:
            bundle_words = 512 if len(next(iter(features.values()), ())) >= 1 << 16 else 128
        if not 0 < max_fpr < 1 or num_hashes < 1 or bundle_words < 1:
            raise ValueError(
                f"max_fpr is {max_fpr}, num_hashes {num_hashes}, bundle_words {bundle_words}; "
                "expected a probability between 0 and 1, and at least 1 of each"
            )
        pairs, catalog = collect_terms(features)
        if order is not None:
            pairs = _reordered(pairs, np.asarray(order))
        placed = np.arange(pairs.num_items) if order is None else np.asarray(order)
        catalog = _with_head(pairs, catalog, bits_per_tail_term(max_fpr, num_hashes))
        return _assemble(pairs, catalog, placed >= 0, max_fpr, num_hashes, bundle_words)

    def reordered(self, order: Int[_Array, "M"]) -> "BloomIndex":
        """The index whose position p holds what position order[p] held, nothing where that is -1.

        Built from the stored terms, under the same catalogue, so plans stay valid. Host only.

        Raises:
          ValueError: `order` names a position that does not exist, or one more than once.
        """
        order = np.asarray(order)
        items = np.repeat(np.arange(self.num_items), np.diff(self.term_offsets)).astype(np.int32)
        pairs = _reordered(ItemTerms(self.num_items, items, np.asarray(self.term_values)), order)
        held = np.asarray(unpack_mask(self.live[None], self.num_items))[0]
        placed = (order >= 0) & held[np.maximum(order, 0)]
        bundle_words = self.rows.shape[1]
        return _assemble(pairs, self.catalog, placed, self.max_fpr, self.num_hashes, bundle_words)

    def compile(self, filters: Sequence[FilterLike]) -> FilterPlan:
        """The programs of one filter a query: text, tree, or None for everything.

        Raises:
          FilterError: with the place in the text; for an unknown feature also the known ones.
        """
        return compile_plan([self._tree(f) for f in filters], self.catalog, self.num_hashes)

    def masks(self, plan: FilterPlan) -> BloomMasks:
        """(possibly, surely), u32[Q, words] each; traceable. Bits without an item are 0."""
        found = bloom_search(
            self.rows, self.row_offsets, *plan[:2], num_head=self.num_head,
            num_items=self.num_items,
        )  # fmt: skip
        words = self.live.shape[0]
        return BloomMasks(*(mask[:, :words] & self.live for mask in found))

    def search(self, plan: FilterPlan, *, exact: bool = False) -> UInt32[Array, "Q words"]:
        """Mask of the items that pass: bit i % 32 of word i // 32, words = ceil(N / 32).

        Args:
          plan: from `compile`.
          exact: False gives a superset, and can be traced. True also checks every item that only
            possibly passes on its stored terms; it fetches the masks to the host.
        """
        possibly, surely = self.masks(plan)
        if not exact:
            return possibly
        mask = np.array(possibly)
        queries, positions = set_bits(mask & ~np.asarray(surely))
        wrong = ~self._verify_pairs(plan, queries, positions)
        queries, positions = queries[wrong], positions[wrong]
        bits = np.uint32(1) << (positions % 32).astype(np.uint32)
        np.bitwise_and.at(mask, (queries, positions // 32), ~bits)
        return jnp.asarray(mask)

    def exact_mask(self, plan: FilterPlan) -> UInt32[Array, "Q words"]:
        """What `search(plan, exact=True)` gives, traceable: evaluates every item, query by query.

        Cost: P · log2(most terms of an item) gathers for each of the Q · N pairs.
        """
        positions = jnp.arange(self.live.shape[0] * 32, dtype=jnp.int32)
        positions = jnp.minimum(positions, self.num_items - 1)
        lanes = jnp.arange(32, dtype=jnp.uint32)

        def one_query(query):
            passes = self._evaluate(plan, jnp.full_like(positions, query), positions)
            bits = passes.reshape(-1, 32).astype(jnp.uint32) << lanes
            return jnp.sum(bits, axis=1, dtype=jnp.uint32) & self.live

        return lax.map(one_query, jnp.arange(plan.opcodes.shape[0], dtype=jnp.int32))

    def verify(self, plan: FilterPlan, rows: Int32[_Array, "Q M"]) -> Bool[Array, "Q M"]:
        """Whether each query's own items (bit positions) pass, exactly; False for -1. Traceable."""
        queries = jnp.broadcast_to(jnp.arange(rows.shape[0], dtype=jnp.int32)[:, None], rows.shape)
        safe = jnp.maximum(rows, 0).ravel()
        passes = self._evaluate(plan, queries.ravel(), safe).reshape(rows.shape)
        held = (jnp.asarray(self.live)[safe // 32] >> (safe % 32).astype(jnp.uint32)) & 1
        return passes & (rows >= 0) & held.reshape(rows.shape).astype(bool)

    def explain(self, filter: FilterLike, item: int) -> str | None:
        """The smallest part of the filter that rejects the item (bit position); None if it passes.

        Raises:
          ValueError: no such item.
        """
        if not 0 <= item < self.num_items:
            raise ValueError(
                f"item is {item}; the index has the positions 0 to {self.num_items - 1}"
            )
        begin, end = np.asarray(self.term_offsets[item : item + 2])
        held = {int(term) for term in self.term_values[begin:end]}
        rejecting = _rejecting(self._tree(filter), lambda t: self._number(t) in held)
        return None if rejecting is None else str(rejecting)

    def _tree(self, filter: FilterLike) -> Filter:
        if filter is None:
            return Everything()
        if isinstance(filter, str):
            return parse_filter(filter, features=self.catalog.features)
        if not isinstance(filter, Filter):
            raise FilterError(f"a filter is a text, a tree or None, not {filter!r}")
        for term in terms_of(filter):
            if term.feature not in self.catalog.features:
                raise FilterError("; expected ".join(
                    unknown_feature(term.feature, self.catalog.features)))  # fmt: skip
        return filter

    def _number(self, term: Term) -> int:
        return int(self.catalog.lookup([(term.feature, term.value)])[0])

    def _evaluate(self, plan, queries, positions):
        return evaluate(
            plan, self.term_offsets, self.term_values, queries, positions, self.max_item_terms
        )

    def _verify_pairs(self, plan, queries, positions) -> Bool[np.ndarray, "n"]:
        """`_evaluate` from the host, in chunks of one of few sizes."""
        passes = []
        for begin in range(0, len(queries), _VERIFY_CHUNK):
            chunk = queries[begin : begin + _VERIFY_CHUNK], positions[begin : begin + _VERIFY_CHUNK]
            size = max(1024, 1 << (len(chunk[0]) - 1).bit_length())
            padded = [np.pad(x, (0, size - len(x))).astype(np.int32) for x in chunk]
            passes.append(np.asarray(self._evaluate(plan, *padded))[: len(chunk[0])])
        return np.concatenate(passes) if passes else np.zeros(0, bool)


def _assemble(
    pairs: ItemTerms, catalog: TermCatalog, placed: np.ndarray, max_fpr: float, num_hashes: int,
    bundle_words: int,
) -> BloomIndex:  # fmt: skip
    counts = np.bincount(pairs.items, minlength=pairs.num_items)
    rows, row_offsets = _bit_rows(pairs, catalog, max_fpr, num_hashes, bundle_words)
    return BloomIndex(
        rows=jnp.asarray(rows),
        row_offsets=jnp.asarray(row_offsets),
        live=jnp.asarray(pack_bits(placed)),
        term_offsets=jnp.asarray(np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)),
        term_values=jnp.asarray(pairs.terms),
        num_items=pairs.num_items,
        num_head=int((catalog.head_rows >= 0).sum()),
        num_hashes=num_hashes,
        max_item_terms=int(counts.max(initial=0)),
        max_fpr=max_fpr,
        catalog=catalog,
    )


def terms_of(tree: Filter) -> list[Term]:
    """All terms of a tree, from left to right."""
    match tree:
        case Term():
            return [tree]
        case Not(operand):
            return terms_of(operand)
        case And(operands) | Or(operands):
            return [term for operand in operands for term in terms_of(operand)]
    return []


def bits_per_tail_term(max_fpr: float, num_hashes: int) -> float:
    """Bloom bits that a term takes in each item that has it: K / -ln(1 - max_fpr^(1/K))."""
    return num_hashes / -np.log1p(-(max_fpr ** (1 / num_hashes)))


def _rejecting(tree: Filter, holds) -> Filter | None:
    """None if the item passes, else the part to blame: of an AND its first such operand."""
    match tree:
        case Everything():
            return None
        case Term():
            return None if holds(tree) else tree
        case Not(operand):
            return tree if _rejecting(operand, holds) is None else None
        case And(operands):
            return next((r for o in operands if (r := _rejecting(o, holds)) is not None), None)
        case Or(operands):
            return None if any(_rejecting(o, holds) is None for o in operands) else tree
    return tree


def _reordered(pairs: ItemTerms, order: np.ndarray) -> ItemTerms:
    """The pairs with items replaced by their positions; items without a position go."""
    placed = np.flatnonzero(order >= 0)
    items = order[placed]
    if items.size and items.max() >= pairs.num_items:
        raise ValueError(
            f"order names item {items.max()}; the features describe {pairs.num_items} items"
        )
    if len(np.unique(items)) != len(items):
        raise ValueError("order names an item more than once")
    position = np.full(pairs.num_items, -1, np.int64)
    position[items] = placed
    moved = position[pairs.items]
    kept = np.flatnonzero(moved >= 0)
    kept = kept[np.argsort(moved[kept], kind="stable")]
    return ItemTerms(len(order), moved[kept].astype(np.int32), pairs.terms[kept])


def _with_head(pairs: ItemTerms, catalog: TermCatalog, tail_bits: float) -> TermCatalog:
    """The catalogue with exact rows for the terms that cost less so: one bit for each item."""
    counts = np.bincount(pairs.terms, minlength=len(catalog.hashes))
    head = np.flatnonzero(counts * tail_bits > pairs.num_items)
    head_rows = np.full(len(counts), -1, np.int32)
    head_rows[head] = np.arange(len(head))
    return TermCatalog(catalog.features, catalog.seed, catalog.hashes, head_rows)


def _bit_rows(
    pairs: ItemTerms, catalog: TermCatalog, max_fpr: float, num_hashes: int, bundle_words: int
) -> tuple[np.ndarray, np.ndarray]:
    rows = catalog.head_rows[pairs.terms]
    head, tail = rows >= 0, rows < 0
    tail_counts = np.bincount(pairs.items[tail], minlength=pairs.num_items)
    return bloom_build(
        pairs.num_items,
        bundle_words=bundle_words,
        num_head=int((catalog.head_rows >= 0).sum()),
        widths=_bundle_widths(tail_counts, bundle_words * 32, max_fpr, num_hashes),
        head_items=pairs.items[head],
        head_rows=rows[head],
        tail_items=pairs.items[tail],
        tail_hashes=row_hashes(catalog.hashes[pairs.terms[tail]], num_hashes),
    )


def _bundle_widths(
    tail_counts: np.ndarray, bundle_items: int, max_fpr: float, num_hashes: int
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
