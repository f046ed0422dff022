"""Which items pass a filter: exact bit rows for common values, Bloom rows for the rest.

The index answers with two masks, of the items that possibly pass and of those that surely do, so
that NOT loses nothing to false positives. What lies between them is decided on the stored terms.
"""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Int, Int32, UInt32

from jaxrec.retrieval.bloom_layout import (
    bit_rows,
    bits_per_tail_term,
    placement,
    reordered,
    split_pairs,
    tail_counts,
    with_head,
)
from jaxrec.retrieval.bloom_update import (
    TermPool,
    checked_positions,
    clear_live,
    length_bound,
    make_pool,
    present_terms,
    replace_terms,
    spare_slots,
)
from jaxrec.retrieval.filter_text import FilterLike, to_tree
from jaxrec.retrieval.filters import Term, rejecting_part
from jaxrec.retrieval.masks import bit_at, pack_bits, set_bits, tile_word_numbers, unpack_bits
from jaxrec.retrieval.plan import FilterPlan, compile_plan, evaluate
from jaxrec.retrieval.terms import ItemTerms, TermCatalog, collect_terms, number_terms
from pallas_kernels import BloomMasks, bloom_search, bloom_update

_VERIFY_CHUNK = 1 << 16
_EXACT_CHUNK_WORDS = 1 << 14

type _Array = jax.Array | np.ndarray


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["rows", "row_offsets", "live", "term_spans", "term_values", "terms_used"],
    meta_fields=[
        "num_items",
        "num_head",
        "num_hashes",
        "max_item_terms",
        "tail_terms",
        "max_fpr",
        "catalog",
    ],
)
@dataclass(frozen=True, eq=False)
class BloomIndex:
    """Bit rows of all items' terms, and the terms themselves (N bit positions, an item each).

    Build with `BloomIndex.build`; `update` and `clear` change items. The object is a pytree: arrays
    are leaves, the rest is static, and neither changes shape or value as items change, up to the
    capacities that `update` states.

    Attributes:
      rows, row_offsets: what `pallas_kernels.bloom_search` reads; u32[R, W], i32[G + 1].
      live: the bits of positions that hold an item; u32[words].
      term_spans, term_values, terms_used: position n has the terms term_values[term_spans[n, 0] up
        to term_spans[n, 1]], ascending; slots from terms_used on are free; i32[N, 2], i32[S] and a
        number.
      num_items: N.
      num_head: values with an exact row.
      num_hashes: K.
      max_item_terms: at least the most terms of one item.
      tail_terms, max_fpr: what free positions are sized for.
      catalog: the known terms; on the host, and shared by all indexes made from this one.
    """

    rows: UInt32[_Array, "R W"]
    row_offsets: Int32[_Array, "G1"]
    live: UInt32[_Array, "words"]
    term_spans: Int32[_Array, "N 2"]
    term_values: Int32[_Array, "S"]
    terms_used: Int32[_Array, ""]
    num_items: int
    num_head: int
    num_hashes: int
    max_item_terms: int
    tail_terms: int
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
        capacity: int | None = None,
        tail_terms: int | None = None,
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
            512, its best, from 65,536 positions on and 128 below.
          order: the item at each bit position, -1 for none; `ivf.row_ids` lines the masks up with
            an `IVFIndex`. None keeps the items' own order.
          capacity: bit positions N, at least the number of items; further ones are free for
            `update`. None makes no free ones. With `order`, its length is the capacity.
          tail_terms: tail terms that free positions are sized for; None takes the items' mean.

        Raises:
          FilterError: unequal lengths, or a value of another type (naming feature and item).
          ValueError: max_fpr, num_hashes, order, capacity or tail_terms out of range.

        Cost: host time linear in the (item, value) pairs; per item one bit a head value, about
        K / -ln(1 - max_fpr^(1/K)) bits a tail value (17 by default), and 4 bytes a value.
        """
        if (
            not 0 < max_fpr < 1
            or num_hashes < 1
            or min(bundle_words or 1, 1 + (tail_terms or 0)) < 1
        ):
            raise ValueError(
                f"max_fpr is {max_fpr}, num_hashes {num_hashes}, bundle_words {bundle_words}, "
                f"tail_terms {tail_terms}; expected a probability between 0 and 1, at least 1 hash "
                "and word, and at least 0 terms"
            )
        pairs, catalog = collect_terms(features)
        placed = placement(pairs.num_items, order, capacity)
        pairs = reordered(pairs, placed)
        return _laid_out(
            pairs, catalog, placed >= 0, tail_terms, max_fpr=max_fpr, num_hashes=num_hashes,
            bundle_words=bundle_words,
        )  # fmt: skip

    def reordered(self, order: Int[_Array, "M"]) -> "BloomIndex":
        """The index whose position p holds what position order[p] held, nothing where that is -1.

        Built from the stored terms, under the same catalogue, so plans stay valid. Host only.

        Raises:
          ValueError: `order` names a position that does not exist, or one more than once.
        """
        order = np.asarray(order)
        live = unpack_bits(self.live, self.num_items)
        pool = TermPool(self.term_spans, self.term_values, self.terms_used)
        pairs = reordered(present_terms(pool, live), order)
        counts = tail_counts(pairs, self.catalog)
        held = (order >= 0) & live[np.maximum(order, 0)]
        return _assemble(
            pairs, self.catalog, held, np.where(held, counts, self.tail_terms),
            max_fpr=self.max_fpr, num_hashes=self.num_hashes, bundle_words=self.rows.shape[1],
            tail_terms=self.tail_terms, terms_per_item=len(pairs.terms) / max(int(held.sum()), 1),
            max_item_terms=self.max_item_terms,
        )  # fmt: skip

    def empty_like(self, capacity: int, *, tail_terms: int | None = None) -> "BloomIndex":
        """An index of the same catalogue with `capacity` free positions, to be filled by `update`.

        It understands every plan that this index understands, so that fresh items can be searched
        beside the others with one plan; values learnt by either are known to both.

        Args:
          capacity: bit positions.
          tail_terms: tail terms that a position is sized for; None takes what this index has.
        """
        tail_terms = self.tail_terms if tail_terms is None else tail_terms
        if capacity < 1 or tail_terms < 0:
            raise ValueError(
                f"capacity is {capacity} and tail_terms {tail_terms}; expected at least 1 and 0"
            )
        pairs = ItemTerms(capacity, np.zeros(0, np.int32), np.zeros(0, np.int32))
        num_live = int(np.bitwise_count(np.asarray(self.live)).sum())
        return _assemble(
            pairs, self.catalog, np.zeros(capacity, bool), np.full(capacity, tail_terms),
            max_fpr=self.max_fpr, num_hashes=self.num_hashes, bundle_words=None,
            tail_terms=tail_terms, terms_per_item=int(self.terms_used) / max(num_live, 1),
            max_item_terms=self.max_item_terms,
        )  # fmt: skip

    @classmethod
    def joined(cls, parts: Sequence["BloomIndex"], order: Int[_Array, "N"]) -> "BloomIndex":
        """One index of the items of several, laid out anew from the terms that they store.

        Which values get exact rows, and how many rows the others get, follows the items as they
        are now; values that no item has any more are forgotten. The catalogue is a new one: plans
        have to be compiled again.

        Args:
          parts: indexes that share one catalogue.
          order: what each bit position holds: a number that counts through the positions of all
            parts, one part after the other; -1 for none. Items left out are dropped.

        Raises:
          ValueError: parts of different catalogues, or an order with repeats or of free positions.

        Cost: as `build`, without hashing the values.
        """
        first = parts[0]
        if any(part.catalog is not first.catalog for part in parts):
            raise ValueError("the parts have different catalogues, whose term numbers differ")
        held = [unpack_bits(part.live, part.num_items) for part in parts]
        placed = np.asarray(order)
        if not np.concatenate(held)[placed[placed >= 0]].all():
            raise ValueError("order names a bit position that holds no item")
        stored = [
            present_terms(TermPool(part.term_spans, part.term_values, part.terms_used), own)
            for part, own in zip(parts, held, strict=True)
        ]
        starts = np.cumsum([0] + [part.num_items for part in parts])
        pairs = ItemTerms(
            int(starts[-1]),
            np.concatenate(
                [own.items + np.int32(n) for own, n in zip(stored, starts, strict=False)]
            ),
            np.concatenate([own.terms for own in stored]),
        )
        pairs = reordered(pairs, placed)
        used, terms = np.unique(pairs.terms, return_inverse=True)
        pairs = ItemTerms(pairs.num_items, pairs.items, terms.astype(np.int32))
        known = first.catalog
        catalog = TermCatalog(
            known.features, known.seed, known.hashes_at(used), np.full(len(used), -1, np.int32)
        )
        return _laid_out(
            pairs, catalog, placed >= 0, None, max_fpr=first.max_fpr, num_hashes=first.num_hashes,
            bundle_words=None,
        )  # fmt: skip

    def update(
        self,
        positions: Int[_Array, "M"] | Sequence[int],
        features: Mapping[str, Any],
        *,
        donate: bool = False,
    ) -> "BloomIndex":
        """The index in which these bit positions hold items with these attributes.

        What the positions held before is gone. Values that are new to the catalogue become tail
        terms; plans compiled before keep their meaning, in which such values are unknown. Results
        stay exact however far the items depart from those of the build: items with more terms than
        their bundle was sized for only cause more false positives, which verification removes.

        Shapes stay, so that nothing is compiled anew, until either an item has more than
        `max_item_terms` terms, or the present terms of all items outgrow `term_values`. That has
        slots for an average item at each position, and an eighth and 1024 more; slots of former
        items are reclaimed as needed.

        Args:
          positions: 0 to N - 1, each once.
          features: {name: M entries}, all features of the catalogue; values as for `build`.
          donate: write in place; this index can then no longer be used. Otherwise it stays as it
            is, and the new one begins with a copy of its arrays.

        Raises:
          ValueError: a position out of range or given twice.
          FilterError: missing or unknown features, another number of entries, or a bad value.
            The index is unchanged then.

        Cost: host time linear in the (item, value) pairs; on the device 8 bytes for each row of the
        items' bundles and K a tail term. Without `donate`, a copy of all arrays. Reclaiming former
        segments, once in as many pairs as slots are spare, reads all terms on the host.
        """
        positions = checked_positions(positions, self.num_items)
        pairs = number_terms(features, self.catalog, num_items=len(positions))
        placed = ItemTerms(pairs.num_items, positions[pairs.items], pairs.terms)
        rows = bloom_update(
            self.rows, self.row_offsets, positions, num_head=self.num_head,
            num_hashes=self.num_hashes, **split_pairs(placed, self.catalog), donate=donate,
        )  # fmt: skip
        pool = TermPool(self.term_spans, self.term_values, self.terms_used)
        pool, live = replace_terms(pool, self.live, positions, pairs, donate=donate)
        most = int(np.bincount(pairs.items, minlength=1).max())
        return replace(
            self, rows=rows, live=live, term_spans=pool.spans, term_values=pool.values,
            terms_used=pool.used, max_item_terms=max(self.max_item_terms, length_bound(most)),
        )  # fmt: skip

    def clear(
        self, positions: Int[_Array, "M"] | Sequence[int], *, donate: bool = False
    ) -> "BloomIndex":
        """The index in which these bit positions hold no item; they may have held none before.

        Args:
          positions: 0 to N - 1, each once.
          donate: write in place; this index can then no longer be used.

        Raises:
          ValueError: a position out of range or given twice.

        Cost: one word an item; without `donate` a copy of `live`.
        """
        live = clear_live(self.live, checked_positions(positions, self.num_items), donate=donate)
        return replace(self, live=live)

    def compile(self, filters: Sequence[FilterLike], *, share: bool = False) -> FilterPlan:
        """The programs of one filter a query: text, tree, or None for everything.

        Args:
          filters: one a query. Values that no item had so far match nothing, also later.
          share: equal filters become one program, evaluated once. The number of programs is rounded
            up to a power of two, so plans then come in a few more shapes. See also
            `FilterPlan.for_queries`.

        Raises:
          FilterError: with the place in the text; for an unknown feature also the known ones.
        """
        trees = [to_tree(f, self.catalog.features) for f in filters]
        return compile_plan(trees, self.catalog, self.num_hashes, share=share)

    def check_plan(self, plan: FilterPlan) -> None:
        """Raises ValueError for a plan of another catalogue; costs nothing, also while tracing."""
        if not self.catalog.accepts(plan.catalog.value):
            raise ValueError(
                "the plan was compiled for another catalogue, whose numbers mean other values; "
                "compile the filters with this index, or with one that shares its catalogue"
            )

    def masks(
        self,
        plan: FilterPlan,
        tiles: Int32[_Array, "Q T"] | None = None,
        *,
        tile_words: int = 2,
    ) -> BloomMasks:
        """(possibly, surely), u32[Q, words] each; traceable. Bits without an item are 0.

        Args:
          plan: from `compile`.
          tiles: for each query the tiles of `tile_words` words to look at, -1 for none, such as the
            64-item tiles of the lists that a search probes; the masks then are these tiles' words,
            u32[Q, T·tile_words]; see `spread_tiles`. None looks at all.
          tile_words: the GPU kernel needs a multiple of 128; see `pallas_kernels.bloom_search`.

        Raises:
          ValueError: the plan was compiled for another catalogue.
        """
        self.check_plan(plan)
        found = bloom_search(
            self.rows, self.row_offsets, plan.opcodes, plan.operands, plan.plan_of_query, tiles,
            num_head=self.num_head, num_items=self.num_items, tile_words=tile_words,
        )  # fmt: skip
        words = self.live.shape[0]
        if tiles is None:
            return BloomMasks(*(mask[:, :words] & self.live for mask in found))
        places = tile_word_numbers(tiles, tile_words)
        live = jnp.asarray(self.live).at[places].get(mode="fill", fill_value=0)
        return BloomMasks(*(mask & live for mask in found))

    def search(self, plan: FilterPlan, *, exact: bool = False) -> UInt32[Array, "Q words"]:
        """Mask of the items that pass: bit i % 32 of word i // 32, words = ceil(N / 32).

        Args:
          plan: from `compile`.
          exact: False gives a superset, and can be traced. True also checks every item that only
            possibly passes on its stored terms; it fetches the masks to the host.

        Raises:
          ValueError: the plan was compiled for another catalogue.
        """
        if not exact:
            return self.masks(plan).possibly
        filters = plan.distinct()
        possibly, surely = self.masks(filters)
        mask = np.array(possibly)
        numbers, positions = set_bits(mask & ~np.asarray(surely))
        wrong = ~self._verify_pairs(filters, numbers, positions)
        numbers, positions = numbers[wrong], positions[wrong]
        bits = np.uint32(1) << (positions % 32).astype(np.uint32)
        np.bitwise_and.at(mask, (numbers, positions // 32), ~bits)
        return plan.of_each_query(jnp.asarray(mask))

    def exact_mask(self, plan: FilterPlan) -> UInt32[Array, "Q words"]:
        """What `search(plan, exact=True)` gives, traceable: evaluates every item, filter by filter.

        Cost: P · log2(most terms of an item) gathers for each of the F · N pairs; memory for half a
        million items at a time.
        """
        self.check_plan(plan)
        return self._exact_mask(plan, min(self.live.shape[0], _EXACT_CHUNK_WORDS))

    @functools.partial(jax.jit, static_argnames="size")
    def _exact_mask(self, plan, size: int):
        filters, words = plan.distinct(), self.live.shape[0]
        places, lanes = jnp.arange(32 * size, dtype=jnp.int32), jnp.arange(32, dtype=jnp.uint32)

        def one_chunk(number, first_word):
            positions = jnp.minimum(32 * first_word + places, self.num_items - 1)
            passes = self._evaluate(filters, jnp.full_like(positions, number), positions)
            bits = passes.reshape(-1, 32).astype(jnp.uint32) << lanes
            return jnp.sum(bits, axis=1, dtype=jnp.uint32)

        def one_filter(number):
            starts = jnp.arange(0, words, size, dtype=jnp.int32)
            chunks = lax.map(lambda first: one_chunk(number, first), starts)
            return chunks.reshape(-1)[:words] & self.live

        numbers = jnp.arange(filters.num_queries, dtype=jnp.int32)
        return plan.of_each_query(lax.map(one_filter, numbers))

    def verify(self, plan: FilterPlan, rows: Int32[_Array, "Q M"]) -> Bool[Array, "Q M"]:
        """Whether each query's own items (bit positions) pass, exactly; False for -1. Traceable."""
        self.check_plan(plan)
        return self._verify(plan, rows)

    @jax.jit
    def _verify(self, plan, rows):
        queries = jnp.broadcast_to(jnp.arange(rows.shape[0], dtype=jnp.int32)[:, None], rows.shape)
        safe = jnp.maximum(rows, 0).ravel()
        passes = self._evaluate(plan, queries.ravel(), safe).reshape(rows.shape)
        return passes & bit_at(self.live, rows)

    def explain(self, filter: FilterLike, item: int) -> str | None:
        """The smallest part of the filter that rejects the item (bit position); None if it passes.

        Raises:
          ValueError: no such position, or no item there.
        """
        if not 0 <= item < self.num_items:
            raise ValueError(
                f"item is {item}; the index has the positions 0 to {self.num_items - 1}"
            )
        if not bit_at(self.live, np.array(item, np.int32)):
            raise ValueError(f"position {item} holds no item")
        begin, end = np.asarray(self.term_spans[item])
        held = {int(term) for term in self.term_values[begin:end]}
        tree = to_tree(filter, self.catalog.features)
        rejecting = rejecting_part(tree, lambda term: self._number(term) in held)
        return None if rejecting is None else str(rejecting)

    def _number(self, term: Term) -> int:
        return int(self.catalog.numbers_of(self.catalog.hashes_of([(term.feature, term.value)]))[0])

    def _evaluate(self, plan, queries, positions):
        return evaluate(
            plan, self.term_spans, self.term_values, queries, positions, self.max_item_terms
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


def _laid_out(
    pairs: ItemTerms, catalog: TermCatalog, held: np.ndarray, tail_terms: int | None, *,
    max_fpr: float, num_hashes: int, bundle_words: int | None,
) -> BloomIndex:  # fmt: skip
    """The index of these pairs, with exact rows where they pay."""
    num_live = int(held.sum())
    catalog = with_head(pairs, catalog, num_live, bits_per_tail_term(max_fpr, num_hashes))
    counts = tail_counts(pairs, catalog)
    if tail_terms is None:
        tail_terms = -(-int(counts.sum()) // max(num_live, 1))
    return _assemble(
        pairs, catalog, held, np.where(held, counts, tail_terms), max_fpr=max_fpr,
        num_hashes=num_hashes, bundle_words=bundle_words, tail_terms=tail_terms,
        terms_per_item=len(pairs.terms) / max(num_live, 1),
    )  # fmt: skip


def _assemble(
    pairs: ItemTerms, catalog: TermCatalog, held: np.ndarray, sized_for: np.ndarray, *,
    max_fpr: float, num_hashes: int, bundle_words: int | None, tail_terms: int,
    terms_per_item: float, max_item_terms: int = 0,
) -> BloomIndex:  # fmt: skip
    """The index of these pairs, its bits and its pool sized for the items still to come."""
    if bundle_words is None:
        bundle_words = 512 if pairs.num_items >= 1 << 16 else 128
    rows, row_offsets = bit_rows(pairs, catalog, sized_for, max_fpr, num_hashes, bundle_words)
    to_come = int(np.count_nonzero(~held) * max(terms_per_item, tail_terms))
    pool = make_pool(pairs, to_come + spare_slots(len(pairs.terms) + to_come))
    most = int(np.bincount(pairs.items, minlength=1).max())
    return BloomIndex(
        rows=rows,
        row_offsets=row_offsets,
        live=jnp.asarray(pack_bits(held)),
        term_spans=pool.spans,
        term_values=pool.values,
        terms_used=pool.used,
        num_items=pairs.num_items,
        num_head=int(catalog.head_rows.max(initial=-1)) + 1,
        num_hashes=num_hashes,
        max_item_terms=max(length_bound(most), max_item_terms),
        tail_terms=int(tail_terms),
        max_fpr=max_fpr,
        catalog=catalog,
    )
