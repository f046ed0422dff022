"""What can be retrieved: the items' vectors and their attributes, row for row in one order."""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Int32, Key, UInt32

from jaxrec.retrieval.bloom_index import BloomIndex, FilterLike
from jaxrec.retrieval.filtered_search import SearchOptions, plan_of, search_eligible
from jaxrec.retrieval.ivf_index import (
    IVFIndex,
    Metric,
    SearchResult,
    check_search,
    finite_queries,
    list_of_row,
    rank_lists,
    sample_vectors,
    search_rows,
    with_ids,
)
from jaxrec.retrieval.masks import chosen_rows
from jaxrec.retrieval.plan import FilterPlan
from jaxrec.retrieval.planner import CostModel, SearchPlan, Strategy, tuned_costs
from jaxrec.retrieval.tuning import tune
from pallas_kernels import IVF_MAX_K, IVF_TILE_ROWS

type _Array = jax.Array | np.ndarray


class Route(NamedTuple):
    """How the planner searches for one query that comes alone.

    Attributes:
      strategy: what it chose.
      eligible: rows that possibly pass the filter.
      probes: lists that are scanned; 0 where the strategy probes none.
      cost_us: what it reckons that to take, in microseconds.
    """

    strategy: Strategy
    eligible: int
    probes: int
    cost_us: float


class Explanation(NamedTuple):
    """Why an item was, or was not, returned.

    Attributes:
      rejected_by: smallest part of the filter that rejects the item; None if it passes.
      list_rank: how many lists score better than the item's own; it is scanned if below nprobe.
      probed: whether the item's list is scanned where lists are probed, which `route` tells.
      score: inner product of the query and the item's row.
      code_score: the same from the int8 codes.
      route: how this query is searched if it comes alone.
    """

    rejected_by: str | None
    list_rank: int
    probed: bool
    score: float
    code_score: float
    route: Route


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["ivf", "bloom", "columns"],
    meta_fields=["nprobe", "shares"],
)
@dataclass(frozen=True, eq=False)
class ItemIndex:
    """An `IVFIndex` and a `BloomIndex` over the same rows (R of them), searched together.

    Build with `ItemIndex.build`. The object is a pytree: arrays are leaves, the rest is static.

    Attributes:
      ivf: vectors; its row order is everybody's.
      bloom: attributes; position r is row r.
      columns: further values of each row by name, as of `gather`; arrays [R, ...].
      nprobe: lists that hold the wanted recall of the best 100 without a filter.
      shares: the recall curve, by which a search decides how many lists it scans under a filter;
        see `tuning.tune`.
    """

    ivf: IVFIndex
    bloom: BloomIndex
    columns: Mapping[str, Any]
    nprobe: int
    shares: tuple[tuple[float, float], ...]

    def __post_init__(self):
        # Unflattening puts arbitrary objects in the place of arrays, which have no length.
        if not isinstance(self.ivf, IVFIndex) or not hasattr(self.ivf.row_ids, "shape"):
            return
        num_rows = self.ivf.row_ids.shape[0]
        if isinstance(self.bloom, BloomIndex) and self.bloom.num_items != num_rows:
            raise ValueError(
                f"the Bloom index has {self.bloom.num_items} positions and the IVF index "
                f"{num_rows} rows; build the first with order=ivf.row_ids"
            )

    @classmethod
    def build(
        cls,
        embeddings: Float[_Array, "N D"],
        features: Mapping[str, Any],
        *,
        key: Key[Array, ""],
        ids: Int[_Array, "N"] | None = None,
        columns: Mapping[str, _Array] | None = None,
        nlist: int | None = None,
        metric: Metric = "ip",
        max_fpr: float = 1e-3,
        recall: float = 0.95,
        sample_queries: Float[_Array, "S D"] | None = None,
    ) -> "ItemIndex":
        """Indexes N items.

        Args:
          embeddings: one row an item.
          features: as for `BloomIndex.build`, one entry an item.
          key: seeds k-means and the measurement of recall.
          ids: the items' ids, 0 or more and unique; None numbers them from 0.
          columns: further values of the items, [N, ...] each; see `gather`.
          nlist: lists of the IVF index; None takes the square root of N.
          metric: "ip" or "cosine".
          max_fpr: of the Bloom index.
          recall: part of the sample queries' true results that a search should find.
          sample_queries: vectors like those that will be asked; None takes 256 of the items, which
            look like queries only where queries look like items.

        Raises:
          ValueError: columns of another length, and what the two indexes raise.
        """
        build_key, tune_key = jax.random.split(key)
        num_items = len(embeddings)
        ids = np.arange(num_items) if ids is None else np.asarray(ids)
        for name, column in (columns or {}).items():
            if len(column) != num_items:
                raise ValueError(f"column {name!r} has {len(column)} entries for {num_items} items")
        nlist = max(1, round(num_items**0.5)) if nlist is None else nlist
        ivf = IVFIndex.build(embeddings, nlist=nlist, key=build_key, metric=metric, row_ids=ids)
        order = positions_of(ids, np.asarray(ivf.row_ids))
        bloom = BloomIndex.build(features, max_fpr=max_fpr, order=order)
        if sample_queries is None:
            sample_queries = sample_vectors(ivf, tune_key)
        nprobe, shares = tune(ivf, sample_queries, recall=recall)
        return cls(ivf, bloom, _in_rows(columns or {}, order), nprobe, shares)

    @property
    def num_items(self) -> int:
        """Items that the index holds."""
        return self.ivf.num_items

    @property
    def max_k(self) -> int:
        """The most results that `search` takes; static."""
        return min(self.num_items, IVF_MAX_K)

    def count(self) -> Int32[Array, ""]:
        """Items that can be found; traceable."""
        return jnp.asarray(self.num_items, jnp.int32)

    def compile(self, filters: Sequence[FilterLike]) -> FilterPlan:
        """One filter a query to a plan; see `BloomIndex.compile`."""
        return self.bloom.compile(filters)

    def check_search(self, k: int, nprobe: int | None = None) -> None:
        """Raises ValueError unless `search` takes these numbers."""
        check_search(self.ivf, k, self.ivf.nlist if nprobe is None else nprobe)

    def search(
        self,
        queries: Float[_Array, "*Q D"],
        plan: FilterPlan,
        *,
        k: int,
        nprobe: int | None = None,
        exact: bool = False,
        exclude: Int[_Array, "M X"] | None = None,
        costs: CostModel | None = None,
    ) -> SearchResult:
        """The k best items for each query that pass its filter; traceable.

        Items returned always pass their filter: survivors of the search are checked on the stored
        attributes. `filled` is below k only where fewer than k items are eligible. A query with a
        NaN or an infinity finds nothing, and does not disturb the others.

        How each query is searched is decided on the device from the number of items that pass its
        filter (see `plan_of`): these items alone, the nearest lists, or everything for the batch.

        Args:
          queries: f32 or bf16 [M, D], or [M, H, D] where H queries share each filter, as the heads
            of a user or a batch with one filter; the result then is [M, H, k].
          plan: from `compile`, with M programs.
          k: results, 1 to the number of items.
          nprobe: lists to scan at least, 1 to nlist; None takes as many as the recall asked for at
            the build needs under each query's filter.
          exact: score every eligible item's own row: the result equals brute force.
          exclude: ids that a filter's queries must not return; -1 for none.
          costs: what the planner reckons with; None takes what was measured for this device. An
            index of up to `planner.SMALL_ROWS` rows is searched by brute force without it.

        Raises:
          ValueError: k or nprobe out of range, or another number of programs than M.
        """
        options = self._options(queries, plan, k, nprobe, exact, costs)
        return _search(self.ivf, self.bloom, jnp.asarray(queries), plan, exclude, options)

    def plan_of(
        self,
        queries: Float[_Array, "*Q D"],
        plan: FilterPlan,
        *,
        k: int,
        nprobe: int | None = None,
        exact: bool = False,
        exclude: Int[_Array, "M X"] | None = None,
        costs: CostModel | None = None,
    ) -> SearchPlan:
        """How `search` with the same arguments searches first; traceable.

        Where results are lacking, since items found did not pass or the lists held too few, the
        search goes on over all rows.
        """
        options = self._options(queries, plan, k, nprobe, exact, costs)
        return _plan_of(self.ivf, self.bloom, jnp.asarray(queries), plan, exclude, options)

    def _options(self, queries, plan, k, nprobe, exact, costs) -> SearchOptions:
        """What is asked for, checked against the index."""
        self.check_search(k, nprobe)
        if queries.ndim not in (2, 3):
            raise ValueError(f"queries have shape {queries.shape}; expected [M, D] or [M, H, D]")
        if plan.num_queries != queries.shape[0]:
            raise ValueError(
                f"the plan has {plan.num_queries} filters for {queries.shape[0]} queries; "
                "compile one filter for each, or give queries that share one as [filters, H, D]"
            )
        return SearchOptions(k, nprobe, exact, self.shares, costs or tuned_costs())

    def gather(self, ids: Int[_Array, "*shape"]) -> dict[str, Array]:
        """The columns' values for these items, [*shape, ...] each; zeros for ids not held."""
        return pick_rows(self.columns, self.ivf.rows_of(ids))

    def vectors_of(self, ids: Int[_Array, "*shape"]) -> Float[Array, "*shape D"]:
        """The items' vectors in f32, as they are searched; zeros for ids not held."""
        return pick_rows(self.ivf.vectors, self.ivf.rows_of(ids)).astype(jnp.float32)

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

        Args:
          k, nprobe: of the search that is explained; k is cut to the number of items.

        Raises:
          ValueError: the index holds no such item.
        """
        ivf = self.ivf
        row = np.atleast_1d(np.asarray(ivf.rows_of(np.array([item], np.int32))))
        if row[0] < 0:
            raise ValueError(f"the index holds no item {item}")
        own = int(list_of_row(ivf, row)[0])
        rank = int(np.flatnonzero(np.asarray(rank_lists(ivf, query[None]))[0] == own)[0])
        mask = np.zeros((1, ivf.live.shape[0]), np.uint32)
        mask[0, row // 32] = np.uint32(1) << np.uint32(row[0] % 32)
        score, code_score = map(float, _best_scores(ivf, query[None], mask))
        return Explanation(
            rejected_by=self.bloom.explain(filter, int(row[0])),
            list_rank=rank,
            probed=rank < (self.nprobe if nprobe is None else nprobe),
            score=score,
            code_score=code_score,
            route=self._route(query[None], self.compile([filter]), min(k, self.max_k), nprobe),
        )

    def _route(self, query, plan: FilterPlan, k: int, nprobe: int | None) -> Route:
        """Host only."""
        planned = self.plan_of(query, plan, k=k, nprobe=nprobe)
        strategy, eligible, probes = (int(values[0]) for values in planned)
        (num_rows, width), costs = self.ivf.codes.shape, tuned_costs()
        match Strategy(strategy):
            case Strategy.COMPACT:
                cost = float(costs.compact(num_rows // 32, eligible, 1, width))
            case Strategy.PROBE:
                tiles = np.diff(self.ivf.tile_offsets)
                lists = np.asarray(rank_lists(self.ivf, query))[0, :probes]
                cost = float(costs.probe(int(tiles[lists].sum()) * IVF_TILE_ROWS, width))
            case Strategy.SCAN:
                cost = float(costs.scan(num_rows, 1, width))
        return Route(Strategy(strategy), eligible, probes, cost / 1e3)


@jax.jit
def pick_rows(columns: Any, rows: Int32[Array, "*shape"]) -> Any:
    """These rows of every column; zeros for row -1."""

    def pick(column):
        picked = column[jnp.maximum(rows, 0)]
        held = (rows >= 0).reshape(rows.shape + (1,) * (picked.ndim - rows.ndim))
        return jnp.where(held, picked, jnp.zeros((), picked.dtype))

    return jax.tree.map(pick, columns)


@jax.jit
def _best_scores(ivf, query, mask):
    """The best score among the rows of the mask, from the vectors and from their codes."""
    parts: list[Literal["float", "int8"]] = ["float", "int8"]
    found = (search_rows(ivf, query, mask, k=1, nprobe=ivf.nlist, precision=part) for part in parts)
    return [part.scores[0, 0] for part in found]


@functools.partial(jax.jit, static_argnames="options")
def _search(ivf, bloom, queries, plan, exclude, options: SearchOptions) -> SearchResult:
    queries, finite = finite_queries(queries)
    by_filter, excluded = _by_filter(queries), _excluded(ivf, exclude)
    found = search_eligible(ivf, bloom, plan, by_filter, excluded, options)
    found = with_ids(ivf, found, finite.reshape(-1))
    return SearchResult(*(x.reshape(*queries.shape[:-1], *x.shape[1:]) for x in found))


@functools.partial(jax.jit, static_argnames="options")
def _plan_of(ivf, bloom, queries, plan, exclude, options: SearchOptions) -> SearchPlan:
    return plan_of(ivf, bloom, plan, _by_filter(queries), _excluded(ivf, exclude), options)


def _by_filter(queries: Float[Array, "M *heads D"]) -> Float[Array, "M H D"]:
    return queries.reshape(queries.shape[0], -1, queries.shape[-1])


def _excluded(ivf: IVFIndex, exclude) -> UInt32[Array, "M words"] | None:
    return None if exclude is None else chosen_rows(ivf.rows_of(exclude), ivf.live.shape[0])


def positions_of(
    ids: Int[np.ndarray, "N"], row_ids: Int32[np.ndarray, "R"]
) -> Int[np.ndarray, "R"]:
    """For each row the place of its item in `ids`, -1 for rows without one."""
    by_id = np.argsort(ids)
    places = by_id[np.minimum(np.searchsorted(ids[by_id], row_ids), len(ids) - 1)]
    return np.where(row_ids >= 0, places, -1)


def _in_rows(columns: Mapping[str, _Array], order: Int[np.ndarray, "R"]) -> dict[str, Array]:
    """Columns of items as columns of rows; zeros where a row has no item."""
    held = np.flatnonzero(order >= 0)

    def place(column):
        column = np.asarray(column)
        rows = np.zeros((len(order), *column.shape[1:]), column.dtype)
        rows[held] = column[order[held]]
        return jnp.asarray(rows)

    return {name: place(column) for name, column in columns.items()}
