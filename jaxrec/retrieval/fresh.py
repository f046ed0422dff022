"""An index that changes while it serves: a large main part and a small fresh part.

New and changed items go to the fresh part, which has the layout of an `ItemIndex` with free rows,
and is scanned in full; deleted and replaced rows lose their live bit in either part. One call
searches both. No array changes its shape, so nothing is compiled anew. Once the fresh part fills
up, `LiveIndex.compact` merges both into a new main part; `LiveServer` does so while queries go on.
"""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int, Int32, Key

from jaxrec.retrieval.bloom_index import FilterLike
from jaxrec.retrieval.compaction import blank_items, merge_parts, spread_of
from jaxrec.retrieval.fresh_rows import (
    clear_rows,
    free_rows,
    free_rows_in_place,
    padded,
    write_rows,
    write_rows_in_place,
)
from jaxrec.retrieval.item_index import Explanation, ItemIndex, pick_rows
from jaxrec.retrieval.ivf_index import IVFIndex, Metric, SearchResult
from jaxrec.retrieval.masks import bit_at
from jaxrec.retrieval.plan import FilterPlan
from pallas_kernels import IVF_MAX_K

type _Array = jax.Array | np.ndarray


class FreshFullError(ValueError):
    """The fresh part has too few free rows for an upsert; nothing was changed. Compact first."""


class Drift(NamedTuple):
    """How far a `LiveIndex` is from one that was just built.

    Attributes:
      fill: part of the fresh part's rows in use; each is scanned by every query.
      fresh_share: part of all items that lie in the fresh part.
      dead_share: part of the main part's rows with an item that were deleted or replaced since;
        they are still read and then masked out.
      spread: mean squared distance of all items to the centroid of their list (for fresh items, of
        the list they would join), relative to that of the items at the last clustering. Above 1 the
        lists describe the items worse than they did, and nprobe finds less.
    """

    fill: float
    fresh_share: float
    dead_share: float
    spread: float

    def compaction_due(self, *, fill: float = 0.5, dead_share: float = 0.2) -> bool:
        """Whether to merge the parts: the fresh part is this full, or the main part this dead."""
        return self.fill >= fill or self.dead_share >= dead_share

    def recluster_due(self, *, spread: float = 1.1, fresh_share: float = 0.3) -> bool:
        """Whether a merge should also cluster anew, and not only join items to the old lists.

        In `experiments/fresh_updates.py`, where 29 % of the items came around other topics (spread
        1.96), recall@50 was .50 after a merge into the old lists and .97 after one with new lists.
        """
        return self.spread >= spread or self.fresh_share >= fresh_share


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["main", "fresh", "built_spread"],
    meta_fields=[],
)
@dataclass(frozen=True, eq=False)
class LiveIndex:
    """A `SearchIndex` with upserts and deletes; every update gives a new index and keeps the old.

    Make with `LiveIndex.build` or `LiveIndex.empty`. The object is a pytree: arrays are leaves, and
    updates leave shapes and static parts as they are. The two exceptions are those of
    `BloomIndex.update`: items with more terms than any before, and a full pool of terms.

    Attributes:
      main: the bulk of the items; rows that were deleted or replaced have no live bit.
      fresh: one list with a row for each further item; `fresh.num_items` is its capacity.
      built_spread: mean squared distance to the centroids at the last clustering; f32[].
    """

    main: ItemIndex
    fresh: ItemIndex
    built_spread: Any

    @classmethod
    def build(cls, main: ItemIndex, *, capacity: int, tail_terms: int | None = None) -> "LiveIndex":
        """An index of the same items that takes updates.

        Args:
          main: as built; its columns are those that upserts must give.
          capacity: items that the fresh part can hold, rounded up to a multiple of 64.
          tail_terms: what the fresh items' Bloom rows are sized for; see `BloomIndex.empty_like`.

        Raises:
          ValueError: capacity below 1.

        Cost: a scan takes 2 · capacity · D operations a query; memory as of `capacity` more items.
        """
        return cls(main, _fresh_part(main, capacity, tail_terms), spread_of(main.ivf))

    @classmethod
    def empty(
        cls,
        width: int,
        features: Sequence[str],
        *,
        capacity: int,
        columns: Mapping[str, _Array] | None = None,
        metric: Metric = "ip",
        max_fpr: float = 1e-3,
        tail_terms: int = 8,
        vector_dtype: Any = "float32",
    ) -> "LiveIndex":
        """An index without items, to be filled by `upsert`.

        Args:
          width: D.
          features: names of the attributes.
          capacity, tail_terms: see `build`.
          columns: for each further value an array [0, ...] that tells its shape and dtype.
          metric, max_fpr: see `ItemIndex.build`.
          vector_dtype: float32 or bfloat16; see `IVFIndex.build`.
        """
        main = blank_items(width, features, columns or {}, metric, max_fpr, vector_dtype)
        return cls.build(main, capacity=capacity, tail_terms=tail_terms)

    @property
    def capacity(self) -> int:
        """Items that the fresh part can hold."""
        return self.fresh.num_items

    @property
    def num_items(self) -> int:
        """Items that can be found. Host only: counts the live bits of both parts."""
        return int(self.count())

    @property
    def max_k(self) -> int:
        """The most results that `search` takes; static."""
        return IVF_MAX_K

    def count(self) -> Int32[Array, ""]:
        """Items that can be found; traceable."""
        return _count_live(self.main) + _count_live(self.fresh)

    def compile(self, filters: Sequence[FilterLike]) -> FilterPlan:
        """One filter a query to a plan for both parts; see `BloomIndex.compile`.

        A value that no item has yet matches nothing, also where an item gets it later: compile at
        the time of the query.
        """
        return self.main.compile(filters)

    def check_search(self, k: int, nprobe: int | None = None) -> None:
        """Raises ValueError unless `search` takes these numbers."""
        if not 1 <= k <= IVF_MAX_K:
            raise ValueError(f"k is {k}; expected 1 to {IVF_MAX_K}")
        if nprobe is not None and not 1 <= nprobe <= self.main.ivf.nlist:
            raise ValueError(
                f"nprobe is {nprobe}; expected 1 to {self.main.ivf.nlist}, the number of lists"
            )

    def search(
        self,
        queries: Float[_Array, "Q *heads D"],
        plan: FilterPlan,
        *,
        k: int,
        nprobe: int | None = None,
        exact: bool = False,
        exclude: Int[_Array, "Q X"] | None = None,
    ) -> SearchResult:
        """The k best items of both parts for each query that pass its filter; one jitted call.

        An item is found once, in its latest version: a replaced row is dead before the search.

        Args:
          queries: f32 or bf16, [Q, D], or [Q, H, D] where H queries share each filter.
          plan: from `compile` of this index or one it was updated from, with Q programs.
          k: results, 1 to 16,384. The number of items is no bound, as it changes under the caller:
            `filled` tells how many there are, with ids -1 behind them.
          nprobe: lists of the main part to scan; None takes the default chosen at its build. The
            fresh part is always scanned in full.
          exact: scan every item's own row: the result equals brute force over the eligible items.
          exclude: ids that a query must not return; -1 for none.

        Raises:
          ValueError: k or nprobe out of range, another number of programs or width than queries,
            or a plan of another catalogue, as from before a compaction.
        """
        self.check_search(k, nprobe)
        width = self.main.ivf.centroids.shape[1]
        if queries.shape[-1] != width:
            raise ValueError(f"queries are {queries.shape[-1]} wide; the index holds {width}")
        return _search(self, queries, plan, exclude, k, nprobe, exact)

    def gather(self, ids: Int[_Array, "*shape"]) -> dict[str, Array]:
        """The columns' values for these items, [*shape, ...] each; zeros for ids not held."""
        rows = _rows_in_parts(self, jnp.asarray(ids))
        return _pick_in_parts(self.main.columns, self.fresh.columns, *rows)

    def vectors_of(self, ids: Int[_Array, "*shape"]) -> Float[Array, "*shape D"]:
        """The items' vectors in f32, as they are searched; zeros for ids not held."""
        rows = _rows_in_parts(self, jnp.asarray(ids))
        vectors = _pick_in_parts(self.main.ivf.vectors, self.fresh.ivf.vectors, *rows)
        return vectors.astype(jnp.float32)

    @property
    def columns(self) -> Mapping[str, Any]:
        """The main part's columns; `gather` reads both parts'."""
        return self.main.columns

    def explain(
        self,
        query: Float[_Array, "D"],
        filter: FilterLike,
        item: int,
        *,
        k: int = 100,
        nprobe: int | None = None,
    ) -> Explanation:
        """What the search makes of one item for one query vector. Host only.

        Fresh items lie in one list, of rank 0, that is always scanned. The route is that through
        the item's own part.

        Raises:
          ValueError: the index holds no such item.
        """
        main_row, fresh_row = (int(rows[0]) for rows in self._rows([item]))
        if fresh_row >= 0:
            return self.fresh.explain(query, filter, item, k=k)
        if main_row >= 0:
            return self.main.explain(query, filter, item, k=k, nprobe=nprobe)
        raise ValueError(f"the index holds no item {item}")

    def upsert(
        self,
        ids: Int[_Array, "M"] | Sequence[int],
        embeddings: Float[_Array, "rows D"],
        features: Mapping[str, Any],
        columns: Mapping[str, _Array] | None = None,
        *,
        donate: bool = False,
    ) -> "LiveIndex":
        """The index in which these items have these vectors, attributes and columns.

        Items that the index holds are replaced, whatever part they are in; others are added.
        With any error, this index and its catalogue are as before.

        Args:
          ids: item ids, each once, 0 or more.
          embeddings: a row an item; a row of zeros is allowed and scores 0 with either metric.
          features: {name: M entries}, all features of the catalogue, None for no value; new values
            are learnt.
          columns: {name: M entries}, all columns of the main index.
          donate: write the fresh part in place; this index can then no longer be used. For one
            thread only: a query may not run beside it.

        Raises:
          FreshFullError: too few free rows; see `compact`.
          ValueError: an id below 0 or given twice, a NaN or infinity, another width, or columns
            that are missing, unknown or of another shape.
          FilterError: features that are missing or unknown, or a bad value.

        Cost: host time linear in M, and 4 · capacity bytes fetched to find free rows. On the device
        D + K terms' bits an item, and a sort of `capacity` ids. Without `donate`, further a copy of
        the fresh part's arrays: about 5 · capacity · D bytes, and its Bloom rows and terms.
        """
        new_ids, rows = self._checked_items(ids, embeddings)
        new_columns = self._checked_columns(columns or {}, len(new_ids))
        if not len(new_ids):
            return self
        main_rows, fresh_rows = self._rows(new_ids)
        slots = self._slots(fresh_rows)
        bloom = self.fresh.bloom.update(slots, features, donate=donate)
        write = write_rows_in_place if donate else write_rows
        ivf, held = write(
            self.fresh.ivf, dict(self.fresh.columns), *padded(self.capacity, slots, new_ids, rows),
            {name: padded(0, slots, column)[1] for name, column in new_columns.items()},
        )  # fmt: skip
        fresh = replace(self.fresh, ivf=ivf, bloom=bloom, columns=held)
        return replace(self, main=self._without(main_rows), fresh=fresh)

    def delete(self, ids: Int[_Array, "M"] | Sequence[int], *, donate: bool = False) -> "LiveIndex":
        """The index without these items; their fresh rows are free again.

        Raises:
          ValueError: an id that the index does not hold, or given twice; nothing is deleted then.

        Cost: as `upsert`, without vectors and attributes; R / 8 bytes of the main part are copied.
        """
        gone = _checked_ids(ids)
        if not len(gone):
            return self
        main_rows, fresh_rows = self._rows(gone)
        absent = np.flatnonzero((main_rows < 0) & (fresh_rows < 0))
        if absent.size:
            raise ValueError(
                f"item {gone[absent[0]]} cannot be deleted: the index does not hold it "
                f"({absent.size} such ids in all)"
            )
        fresh, slots = self.fresh, fresh_rows[fresh_rows >= 0]
        if len(slots):
            free = free_rows_in_place if donate else free_rows
            ivf = free(fresh.ivf, padded(self.capacity, slots)[0])
            bloom = fresh.bloom.clear(slots, donate=donate)
            fresh = replace(fresh, ivf=ivf, bloom=bloom)
        return replace(self, main=self._without(main_rows), fresh=fresh)

    def drift(self) -> Drift:
        """How far the index is from a new build. Cost: reads every vector once; waits for it."""
        main, fresh = int(_count_live(self.main)), int(_count_live(self.fresh))
        spread = 1.0
        if self.main.num_items and main + fresh:
            built = max(float(self.built_spread), 1e-30)
            means = spread_of(self.main.ivf), spread_of(self.fresh.ivf, self.main.ivf.centroids)
            spread = (main * float(means[0]) + fresh * float(means[1])) / (main + fresh) / built
        return Drift(
            fill=fresh / self.capacity,
            fresh_share=fresh / max(main + fresh, 1),
            dead_share=1 - main / self.main.num_items if self.main.num_items else 0.0,
            spread=spread,
        )

    def compact(
        self,
        *,
        key: Key[Array, ""],
        recluster: bool | None = None,
        capacity: int | None = None,
        nlist: int | None = None,
        recall: float = 0.95,
        sample_queries: Float[_Array, "S D"] | None = None,
    ) -> "LiveIndex":
        """The same items, all in the main part, with an empty fresh part.

        Attributes are laid out anew from the stored terms, in a new catalogue: compile plans again.

        Args:
          key: seeds k-means and the measurement of recall.
          recluster: True runs k-means on all items and chooses nprobe anew. False keeps the
            centroids and every main item's list; fresh items join the nearest. None decides by
            `drift().recluster_due()`.
          capacity: of the new fresh part; None keeps it.
          nlist, recall, sample_queries: as for `ItemIndex.build`, used when clustering. nlist None
            takes the square root of the number of items.

        Raises:
          ValueError: nlist above the number of items.

        Cost: a build, without reading features; on the host, with two copies of the vectors.
        """
        recluster = self.drift().recluster_due() if recluster is None else recluster
        recluster |= self.main.num_items == 0
        main = merge_parts(
            self.main, self.fresh, key=key, recluster=recluster, nlist=nlist, recall=recall,
            sample_queries=sample_queries,
        )  # fmt: skip
        capacity = self.capacity if capacity is None else capacity
        tail_terms = max(main.bloom.tail_terms, self.fresh.bloom.tail_terms)
        new = LiveIndex.build(main, capacity=capacity, tail_terms=tail_terms)
        return new if recluster else replace(new, built_spread=self.built_spread)

    def _rows(self, ids: Any) -> tuple[Int32[np.ndarray, "M"], Int32[np.ndarray, "M"]]:
        """The live row of each item in main and in fresh, -1 where it has none."""
        wanted = padded(0, np.asarray(ids, np.int32))[0]
        main_rows, fresh_rows = _rows_in_parts(self, wanted)
        return np.asarray(main_rows)[: len(ids)], np.asarray(fresh_rows)[: len(ids)]

    def _slots(self, fresh_rows: Int32[np.ndarray, "M"]) -> Int32[np.ndarray, "M"]:
        """A row of the fresh part for each item: its own if it has one, else a free one."""
        new = np.flatnonzero(fresh_rows < 0)
        free = np.flatnonzero(np.asarray(self.fresh.ivf.row_ids) < 0)
        if len(new) > len(free):
            raise FreshFullError(
                f"{len(new)} new items, but {len(free)} of the fresh part's {self.capacity} rows "
                "are free: compact() first, or build with a larger capacity"
            )
        slots = fresh_rows.copy()
        slots[new] = free[: len(new)]
        return slots

    def _without(self, main_rows: Int32[np.ndarray, "M"]) -> ItemIndex:
        """The main part without these rows; -1 is none."""
        if (main_rows < 0).all():
            return self.main
        live = clear_rows(self.main.ivf.live, *padded(-1, main_rows))
        return replace(self.main, ivf=replace(self.main.ivf, live=live))

    def _checked_items(self, ids, embeddings) -> tuple[np.ndarray, np.ndarray]:
        new_ids, rows = _checked_ids(ids), np.asarray(embeddings, np.float32)
        width = self.main.ivf.centroids.shape[1]
        if rows.shape != (len(new_ids), width):
            raise ValueError(
                f"embeddings have shape {list(rows.shape)}; expected {[len(new_ids), width]}, "
                "a row an id, as wide as the index"
            )
        bad = np.flatnonzero(~np.isfinite(rows).all(axis=1))
        if bad.size:
            raise ValueError(
                f"the embedding of item {new_ids[bad[0]]} (row {bad[0]}) has a NaN or an infinity "
                f"({bad.size} such rows in all)"
            )
        return new_ids, rows

    def _checked_columns(self, columns: Mapping[str, Any], count: int) -> dict[str, np.ndarray]:
        held = self.main.columns
        if set(columns) != set(held):
            raise ValueError(
                f"the items have the columns {', '.join(sorted(columns)) or 'none'}; "
                f"expected {', '.join(sorted(held)) or 'none'}"
            )
        checked = {}
        for name, column in columns.items():
            values, shape = np.asarray(column), (count, *held[name].shape[1:])
            if values.shape != shape or not np.can_cast(
                values.dtype, held[name].dtype, "same_kind"
            ):
                raise ValueError(
                    f"column {name!r} is {values.dtype}{list(values.shape)}; "
                    f"expected {held[name].dtype}{list(shape)}"
                )
            checked[name] = values.astype(held[name].dtype)
        return checked


def _checked_ids(ids: Any) -> Int32[np.ndarray, "M"]:
    given = np.asarray(ids)
    if given.ndim != 1 or (given.size and given.dtype.kind not in "iu"):
        raise ValueError(f"ids are {given.dtype}{list(given.shape)}; expected a list of integers")
    if given.size and (given.min() < 0 or given.max() > np.iinfo(np.int32).max):
        raise ValueError(f"item ids go from {given.min()} to {given.max()}; expected 0 to 2³¹ - 1")
    values, counts = np.unique(given, return_counts=True)
    if (counts > 1).any():
        raise ValueError(
            f"item id {values[counts > 1][0]} is given more than once; one update changes an item "
            "once, so that the order within it does not matter"
        )
    return given.astype(np.int32)


def _fresh_part(main: ItemIndex, capacity: int, tail_terms: int | None) -> ItemIndex:
    if capacity < 1:
        raise ValueError(f"capacity is {capacity}; expected at least 1")
    ivf = main.ivf
    fresh = IVFIndex.blank(ivf.centroids.shape[1], capacity, ivf.metric, ivf.vectors.dtype)
    num_rows = fresh.row_ids.shape[0]
    bloom = main.bloom.empty_like(num_rows, tail_terms=tail_terms)
    columns = {
        name: jnp.zeros((num_rows, *column.shape[1:]), column.dtype)
        for name, column in main.columns.items()
    }
    return ItemIndex(fresh, bloom, columns, nprobe=1, shares=((1.0, 1.0),))


def _count_live(part: ItemIndex) -> Int32[Array, ""]:
    return jnp.sum(lax.population_count(jnp.asarray(part.ivf.live)), dtype=jnp.int32)


@jax.jit
def _rows_in_parts(index: LiveIndex, ids) -> tuple[Int32[Array, "*shape"], Int32[Array, "*shape"]]:
    rows = (part.ivf.rows_of(ids) for part in (index.main, index.fresh))
    parts = zip((index.main, index.fresh), rows, strict=True)
    main, fresh = (jnp.where(bit_at(part.ivf.live, own), own, -1) for part, own in parts)
    return main, fresh


@jax.jit
def _pick_in_parts(main, fresh, main_rows, fresh_rows):
    """These rows of every column of the two parts; zeros where both have row -1."""

    def merged(old, new):
        is_new = (fresh_rows >= 0).reshape(fresh_rows.shape + (1,) * (new.ndim - fresh_rows.ndim))
        return jnp.where(is_new, new, old)

    return jax.tree.map(merged, pick_rows(main, main_rows), pick_rows(fresh, fresh_rows))


@functools.partial(jax.jit, static_argnames=("k", "nprobe", "exact"))
def _search(index: LiveIndex, queries, plan, exclude, k, nprobe, exact) -> SearchResult:
    found = []
    for part, lists in ((index.main, nprobe), (index.fresh, 1)):
        if part.num_items:  # known while tracing: 0 only for a main part that was made empty
            own_k = min(k, part.num_items)
            own = part.search(queries, plan, k=own_k, nprobe=lists, exact=exact, exclude=exclude)
            found.append(own)
    scores = jnp.concatenate([own.scores for own in found], axis=-1)
    ids = jnp.concatenate([own.ids for own in found], axis=-1)
    room = [(0, 0)] * (ids.ndim - 1) + [(0, max(0, k - ids.shape[-1]))]
    scores, places = lax.top_k(jnp.pad(scores, room, constant_values=-jnp.inf), k)
    ids = jnp.take_along_axis(jnp.pad(ids, room, constant_values=-1), places, axis=-1)
    filled = jnp.sum(ids >= 0, axis=-1, dtype=jnp.int32)
    return SearchResult(
        scores, ids, filled, functools.reduce(jnp.logical_and, [own.exact for own in found])
    )
