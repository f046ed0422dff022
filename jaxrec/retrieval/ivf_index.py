"""An inverted-file index over item embeddings: rows in list order, as int8 codes and in full."""

import functools
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Float32, Int, Int32, Key, UInt32

from jaxrec.retrieval.kmeans import assign, kmeans, normalise
from jaxrec.retrieval.masks import pack_bits, to_row_order
from pallas_kernels import (
    IVF_MAX_K,
    IVF_TILE_ROWS,
    ivf_search,
    probed_tiles_bound,
    quantise,
    rescore,
)

type Metric = Literal["ip", "cosine"]
type Precision = Literal["int8", "rescored", "float"]
type _Array = jax.Array | np.ndarray


class SearchResult(NamedTuple):
    """The best items of each query, best first; Q are the dimensions of the queries.

    Attributes:
      scores: inner products, or cosines; -inf behind the filled slots; f32[Q, k].
      ids: item ids; -1 there; i32[Q, k].
      filled: slots that hold an item; i32[Q].
      exact: these are certainly the best of all eligible items, by f32 scores; false means "not
        proved", as whenever lists were left out; bool[Q].
    """

    scores: Float32[Array, "*Q k"]
    ids: Int32[Array, "*Q k"]
    filled: Int32[Array, "*Q"]
    exact: Bool[Array, "*Q"]


class RowResult(NamedTuple):
    """A `SearchResult` of row numbers, not ids: rows i32[Q, k], -1 behind the filled slots."""

    scores: Float32[Array, "Q k"]
    rows: Int32[Array, "Q k"]
    exact: Bool[Array, "Q"]


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["centroids", "codes", "scales", "vectors", "row_ids", "id_order", "live",
                 "tile_offsets", "error_bounds"],
    meta_fields=["metric", "num_items", "list_tiles"],
)  # fmt: skip
@dataclass(frozen=True, eq=False)
class IVFIndex:
    """Items sorted by list; every list starts on a tile of 64 rows (C lists, R rows, N items).

    Build with `IVFIndex.build`. The object is a pytree: arrays are leaves, the rest is static.

    Attributes:
      centroids: f32[C, D].
      codes: the rows in int8; i8[R, D].
      scales: a row is about codes · scales; f32[R].
      vectors: the rows themselves, for scores without quantisation error; f32 or bf16 [R, D].
      row_ids: the item of each row, -1 for padding and deleted rows; i32[R].
      id_order: the rows in ascending order of their row_ids; i32[R].
      live: bit r % 32 of word r // 32 is set where row_ids[r] is not -1; u32[R / 32].
      tile_offsets: list c owns the tiles tile_offsets[c] up to tile_offsets[c + 1]; i32[C + 1].
      error_bounds: largest |row| and largest |row - codes · scales|; f32[2].
      metric: "ip" or "cosine" (rows are normalised).
      num_items: N, the rows that are live.
      list_tiles: tiles of each list, as the bytes of an i32 array: it bounds a search's work.
    """

    centroids: Float32[_Array, "C D"]
    codes: Any
    scales: Float32[_Array, "R"]
    vectors: Any
    row_ids: Int32[_Array, "R"]
    id_order: Int32[_Array, "R"]
    live: UInt32[_Array, "words"]
    tile_offsets: Int32[_Array, "C1"]
    error_bounds: Float32[_Array, "2"]
    metric: Metric
    num_items: int
    list_tiles: bytes = field(repr=False)

    @property
    def nlist(self) -> int:
        """C, the number of lists."""
        return self.centroids.shape[0]

    @classmethod
    def build(
        cls,
        embeddings: Float[_Array, "N D"],
        *,
        nlist: int,
        key: Key[Array, ""],
        metric: Metric = "ip",
        row_ids: Int[_Array, "N"] | None = None,
        vector_dtype: Literal["float32", "bfloat16"] = "float32",
    ) -> "IVFIndex":
        """Clusters the embeddings, sorts them by list and quantises each row with its own scale.

        Lists come from k-means, which for "ip" runs on the rows as they are: at equal rows scanned
        it finds more than clusters of directions do (on Gaussian directions with log-normal
        lengths, recall@100 .76 scanning 13 % against .69 scanning 25 %). Long rows, which win inner
        products, fall into short lists.

        Args:
          embeddings: one row an item.
          nlist: C, 1 to N; the square root of N to four times that is usual.
          key: the only randomness.
          metric: "ip" or "cosine".
          row_ids: each row's item id, 0 or more and unique; None numbers the rows from 0.
          vector_dtype: how the rows are kept for rescoring; bfloat16 halves them.

        Raises:
          ValueError: a NaN or infinity (naming the row), nlist out of range, bad or repeated ids.

        Cost: k-means (see `kmeans`) and one assignment, 2·N·C·D operations; 5·D + 8 bytes a row.
        """
        rows = np.asarray(embeddings, np.float32)
        ids = _checked_ids(np.arange(len(rows)) if row_ids is None else row_ids, rows)
        if not len(rows):
            raise ValueError(
                "no items to index; begin with LiveIndex.empty, to which items are added"
            )
        if metric not in ("ip", "cosine"):
            raise ValueError(f"metric is {metric!r}; expected 'ip' or 'cosine'")
        if not 1 <= nlist <= len(rows):
            raise ValueError(f"nlist is {nlist}; expected 1 to {len(rows)}, the number of items")
        spherical = metric == "cosine"
        points = normalise(jnp.asarray(rows)) if spherical else jnp.asarray(rows)
        centroids = kmeans(key, points, nlist, spherical=spherical)
        return lay_out(
            centroids, np.asarray(assign(points, centroids)), ids,
            np.asarray(points.astype(vector_dtype)), metric,
        )  # fmt: skip

    @classmethod
    def blank(
        cls, width: int, capacity: int, metric: Metric, vector_dtype: Any, *,
        num_items: int | None = None,
    ) -> "IVFIndex":  # fmt: skip
        """One list of `capacity` rows, rounded up to whole tiles, without an item in them.

        Args:
          num_items: what the index says it holds, a bound on its results; None says `capacity`.
        """
        num_tiles = max(1, -(-capacity // IVF_TILE_ROWS))
        rows = num_tiles * IVF_TILE_ROWS
        return cls(
            centroids=jnp.zeros((1, width), jnp.float32),
            codes=jnp.zeros((rows, width), jnp.int8),
            scales=jnp.zeros(rows, jnp.float32),
            vectors=jnp.zeros((rows, width), vector_dtype),
            row_ids=jnp.full(rows, -1, jnp.int32),
            id_order=jnp.arange(rows, dtype=jnp.int32),
            live=jnp.zeros(rows // 32, jnp.uint32),
            tile_offsets=jnp.array([0, num_tiles], jnp.int32),
            error_bounds=jnp.zeros(2, jnp.float32),
            metric=metric,
            num_items=rows if num_items is None else num_items,
            list_tiles=np.array([num_tiles], np.int32).tobytes(),
        )

    def search(
        self,
        queries: Float[_Array, "Q D"],
        *,
        k: int,
        nprobe: int,
        mask: UInt32[_Array, "masks words"] | None = None,
        mask_order: Literal["item", "row"] = "item",
        precision: Precision = "rescored",
    ) -> SearchResult:
        """The k best items of the `nprobe` lists nearest to each query.

        Args:
          queries: f32 or bf16; normalised inside for the cosine metric.
          k: results a query, 1 to the number of items (and to 16,384).
          nprobe: lists to scan, 1 to nlist; nlist scans everything, in order and without centroids.
          mask: items that each query may return. In "item" order bit i % 32 of word i // 32 is item
            id i, as a stand-alone `BloomIndex` gives it; ids beyond the words are not eligible.
          mask_order: "row" for masks of a `BloomIndex` built with `order=index.row_ids`, which are
            used as they are; "item" order is permuted, one gather of R words a query.
          precision: "int8" ranks by the codes; "rescored" takes about 1.25·k survivors of that and
            ranks them by the rows themselves; "float" scans the rows themselves, 4 times the bytes.

        Fewer than k eligible items in the probed lists are no error: see `filled`.

        Raises:
          ValueError: k or nprobe out of range, or shapes that do not fit.
        """
        check_search(self, k, nprobe)
        words = -(-len(self.row_ids) // 32)
        if queries.shape[1] != self.codes.shape[1]:
            raise ValueError(
                f"queries are {queries.shape[1]} wide; the index holds {self.codes.shape[1]}"
            )
        if mask is not None and mask.shape[0] != queries.shape[0]:
            raise ValueError(f"{mask.shape[0]} masks for {queries.shape[0]} queries")
        if mask is not None and mask_order == "row" and mask.shape[1] != words:
            raise ValueError(f"a row-order mask has {words} words, not {mask.shape[1]}")
        return _search_ids(self, queries, mask, k, nprobe, mask_order, precision)

    def upsert(self, ids: Int[_Array, "M"], embeddings: Float[_Array, "rows D"]) -> "IVFIndex":
        """A new index in which these items have these embeddings; new ids are added.

        Centroids stay, every other item stays in its list, and rows move: build a `BloomIndex` of
        rows anew. Cost: copies the index once on the host.

        Raises:
          ValueError: as for `build`.
        """
        rows = np.asarray(embeddings, np.float32)
        new_ids = _checked_ids(ids, rows)
        if rows.shape[1] != self.codes.shape[1]:
            raise ValueError(
                f"rows are {rows.shape[1]} wide; the index holds {self.codes.shape[1]}"
            )
        points = normalise(jnp.asarray(rows)) if self.metric == "cosine" else jnp.asarray(rows)
        row_ids, vectors = np.asarray(self.row_ids), np.asarray(self.vectors)
        kept = np.flatnonzero((row_ids >= 0) & ~np.isin(row_ids, new_ids))
        lists = np.repeat(np.arange(self.nlist), np.diff(self.tile_offsets) * IVF_TILE_ROWS)
        return lay_out(
            self.centroids,
            np.concatenate([lists[kept], np.asarray(assign(points, self.centroids))]),
            np.concatenate([row_ids[kept], new_ids]),
            np.concatenate([vectors[kept], np.asarray(points.astype(vectors.dtype))]),
            self.metric,
        )

    def rows_of(self, ids: Int[_Array, "*shape"]) -> Int32[Array, "*shape"]:
        """The row of each item, -1 for ids that the index does not hold. Traceable.

        Cost: a binary search, log2(R) gathers an id.
        """
        return _rows_of(self.row_ids, self.id_order, jnp.asarray(ids))

    def delete(self, ids: Int[_Array, "M"]) -> "IVFIndex":
        """A new index without these items. Rows stay where they are, so Bloom rows stay valid.

        Raises:
          ValueError: an id that the index does not hold.
        """
        row_ids, gone = np.asarray(self.row_ids), np.asarray(ids)
        unknown = gone[~np.isin(gone, row_ids) | (gone < 0)]
        if unknown.size:
            raise ValueError(f"item {unknown[0]} cannot be deleted: the index does not hold it")
        row_ids = np.where(np.isin(row_ids, gone), -1, row_ids).astype(np.int32)
        return replace(
            self,
            row_ids=jnp.asarray(row_ids),
            id_order=jnp.asarray(np.argsort(row_ids, kind="stable").astype(np.int32)),
            live=jnp.asarray(pack_bits(row_ids >= 0)),
            num_items=int((row_ids >= 0).sum()),
        )


def sample_vectors(
    index: IVFIndex, key: Key[Array, ""], num_samples: int = 256
) -> Float32[Array, "S D"]:
    """Rows of random items, S = min(num_samples, items)."""
    rows = np.flatnonzero(np.asarray(index.row_ids) >= 0)
    return _sample(key, index.vectors, rows, min(num_samples, len(rows)))


@functools.partial(jax.jit, static_argnames="size")
def _sample(key, vectors, rows, size: int):
    picked = jax.random.choice(key, len(rows), (size,), replace=False)
    return vectors[rows[picked]].astype(jnp.float32)


@jax.jit
def _rows_of(row_ids, order, ids) -> Int32[Array, "*shape"]:
    num_rows = len(order)

    def halve(_, bounds):
        low, high = bounds
        middle = (low + high) // 2
        before = row_ids[order[jnp.minimum(middle, num_rows - 1)]] < ids
        before &= low < high
        return jnp.where(before, middle + 1, low), jnp.where(before, high, middle)

    bounds = jnp.zeros_like(ids), jnp.full_like(ids, num_rows)
    low, _ = lax.fori_loop(0, num_rows.bit_length(), halve, bounds)
    rows = order[jnp.minimum(low, num_rows - 1)]
    return jnp.where((ids >= 0) & (row_ids[rows] == ids), rows, -1)


def list_of_row(index: IVFIndex, rows: Int[np.ndarray, "*shape"]) -> Int[np.ndarray, "*shape"]:
    """The list that each row belongs to. Host only."""
    return np.searchsorted(np.asarray(index.tile_offsets), rows // IVF_TILE_ROWS, side="right") - 1


def as_queries(index: IVFIndex, queries: Float[_Array, "*Q D"]) -> Float32[Array, "*Q D"]:
    """Queries as they are scored: in f32, and for the cosine metric of length 1."""
    queries = jnp.asarray(queries, jnp.float32)
    if index.metric == "ip":
        return queries
    return normalise(queries.reshape(-1, queries.shape[-1])).reshape(queries.shape)


@jax.jit
def rank_lists(index: IVFIndex, queries: Float[_Array, "Q D"]) -> Int32[Array, "Q C"]:
    """The lists in the order in which each query probes them; traceable."""
    scores = jnp.matmul(
        as_queries(index, queries), index.centroids.T, precision=lax.Precision.HIGHEST
    )
    return lax.top_k(scores, index.nlist)[1]


def check_search(index: IVFIndex, k: int, nprobe: int) -> None:
    """Raises ValueError unless the index can be asked for k items of nprobe lists."""
    if not 1 <= k <= min(index.num_items, IVF_MAX_K):
        limit = (
            f"{index.num_items} items" if index.num_items < IVF_MAX_K else f"a limit of {IVF_MAX_K}"
        )
        raise ValueError(f"k is {k}; expected 1 to {min(index.num_items, IVF_MAX_K)} ({limit})")
    if not 1 <= nprobe <= index.nlist:
        raise ValueError(f"nprobe is {nprobe}; expected 1 to {index.nlist}, the number of lists")


def _checked_ids(row_ids: Any, rows: np.ndarray) -> np.ndarray:
    ids = np.asarray(row_ids)
    if rows.ndim != 2 or ids.shape != rows.shape[:1]:
        raise ValueError(f"embeddings have shape {rows.shape} and ids {ids.shape}; expected [N, D]")
    bad = np.flatnonzero(~np.isfinite(rows).all(axis=1))
    if bad.size:
        raise ValueError(
            f"the embedding in row {bad[0]} (item {ids[bad[0]]}) has a NaN or an infinity "
            f"({bad.size} such rows in all): retrain or drop these items"
        )
    if ids.size and (ids.min() < 0 or ids.max() > np.iinfo(np.int32).max):
        raise ValueError(f"item ids go from {ids.min()} to {ids.max()}; expected 0 to 2³¹ - 1")
    values, counts = np.unique(ids, return_counts=True)
    if (counts > 1).any():
        raise ValueError(f"item id {values[counts > 1][0]} is given more than once")
    return ids.astype(np.int32)


def lay_out(centroids, lists, ids, vectors, metric: Metric) -> IVFIndex:
    """The index of rows `vectors` whose lists are known: sorted by list, then by id. Host only."""
    nlist, width = centroids.shape
    order = np.lexsort((ids, lists))
    counts = np.bincount(lists, minlength=nlist)
    tiles = -(-counts // IVF_TILE_ROWS)
    tiles[-1] += tiles.sum() % 2  # masks are then a multiple of 16 bytes, so kernels copy parts
    tile_offsets = np.concatenate([[0], np.cumsum(tiles)]).astype(np.int32)
    first_in_order = np.concatenate([[0], np.cumsum(counts)])[:-1]
    places = (
        np.arange(len(order)) + (tile_offsets[:-1] * IVF_TILE_ROWS - first_in_order)[lists[order]]
    )
    num_rows = int(tile_offsets[-1]) * IVF_TILE_ROWS
    row_ids = np.full(num_rows, -1, np.int32)
    row_ids[places] = ids[order]
    row_vectors = np.zeros((num_rows, width), vectors.dtype)
    row_vectors[places] = vectors[order]
    codes, scales, bounds = _quantise_with_bounds(jnp.asarray(row_vectors))
    return IVFIndex(
        centroids=jnp.asarray(centroids),
        codes=codes,
        scales=scales,
        vectors=jnp.asarray(row_vectors),
        row_ids=jnp.asarray(row_ids),
        id_order=jnp.asarray(np.argsort(row_ids, kind="stable").astype(np.int32)),
        live=jnp.asarray(pack_bits(row_ids >= 0)),
        tile_offsets=jnp.asarray(tile_offsets),
        error_bounds=bounds,
        metric=metric,
        num_items=len(ids),
        list_tiles=tiles.astype(np.int32).tobytes(),
    )


@jax.jit
def _quantise_with_bounds(vectors):
    codes, scales = quantise(vectors)
    error = vectors.astype(jnp.float32) - codes * scales[:, None]
    norms = [jnp.max(jnp.linalg.norm(x.astype(jnp.float32), axis=1)) for x in (vectors, error)]
    return codes, scales, jnp.stack(norms)


@functools.partial(jax.jit, static_argnames=("k", "nprobe", "mask_order", "precision"))
def _search_ids(index, queries, mask, k, nprobe, mask_order, precision) -> SearchResult:
    if mask is not None and mask_order == "item":
        mask = to_row_order(mask, index.row_ids)
    queries, finite = finite_queries(queries)
    found = search_rows(index, queries, mask, k=k, nprobe=nprobe, precision=precision)
    return with_ids(index, found, finite)


def finite_queries(
    queries: Float[_Array, "*Q D"],
) -> tuple[Float[Array, "*Q D"], Bool[Array, "*Q"]]:
    """Zeros in place of queries with a NaN or an infinity, and which queries have none."""
    queries = jnp.asarray(queries)
    finite = jnp.isfinite(queries).all(axis=-1)
    return jnp.where(finite[..., None], queries, 0), finite


def with_ids(index: IVFIndex, found: RowResult, finite: Bool[Array, "Q"]) -> SearchResult:
    """Row numbers replaced by item ids; queries that were not finite find nothing."""
    scores = jnp.where(finite[:, None], found.scores, -jnp.inf)
    found = RowResult(scores, jnp.where(finite[:, None], found.rows, -1), found.exact & finite)
    ids = jnp.where(found.rows >= 0, index.row_ids[jnp.maximum(found.rows, 0)], -1)
    filled = jnp.sum(ids >= 0, axis=1, dtype=jnp.int32)
    return SearchResult(found.scores, ids, filled, found.exact)


def search_rows(
    index: IVFIndex,
    queries: Float[_Array, "Q D"],
    row_mask: UInt32[_Array, "M words"] | None,
    *,
    k: int,
    nprobe: int,
    precision: Precision,
    mask_of_query: Int32[_Array, "Q"] | None = None,
    probes: Int32[_Array, "Q"] | None = None,
) -> RowResult:
    """`IVFIndex.search` for row-order masks, giving rows; traceable, without checks.

    `mask_of_query` and `probes` are as for `ivf_search`.
    """
    queries = as_queries(index, queries)
    list_tiles = np.frombuffer(index.list_tiles, np.int32)
    offsets = np.concatenate([[0], np.cumsum(list_tiles)]).astype(np.int32)
    scan_k = (
        min(k + k // 4 + 16, max(k, index.num_items), IVF_MAX_K) if precision == "rescored" else k
    )
    scan = functools.partial(
        ivf_search, queries, index.centroids, k=scan_k, nprobe=nprobe,
        max_tiles=probed_tiles_bound(offsets, nprobe), max_list_tiles=int(list_tiles.max()),
        mask_of_query=mask_of_query, probes=probes,
    )  # fmt: skip
    rest = (index.tile_offsets, index.live, row_mask)
    all_lists = jnp.full(len(queries), nprobe) if probes is None else jnp.asarray(probes)
    all_lists = all_lists >= index.nlist
    is_f32 = index.vectors.dtype == jnp.float32
    if precision == "float":
        found = scan(index.vectors, jnp.ones(len(index.row_ids), jnp.float32), *rest)
        return RowResult(found.scores, found.rows, found.complete & all_lists & is_f32)
    found = scan(index.codes, index.scales, *rest)
    if precision == "int8":
        return RowResult(found.scores, found.rows, jnp.zeros(len(queries), bool))
    exact_scores = rescore(queries, index.vectors, found.rows)
    scores, places = lax.top_k(exact_scores, k)
    rows = jnp.take_along_axis(found.rows, places, axis=1)
    # A row that did not survive has a code score of at most the last survivor's, so its true score
    # is at most that plus the error: if this cannot beat the k-th, nothing was missed.
    ceiling = found.scores[:, -1] + _score_error(queries, index.error_bounds)
    nothing_missed = found.complete & (ceiling <= scores[:, -1])
    return RowResult(scores, rows, nothing_missed & all_lists & is_f32)


def _score_error(queries, error_bounds) -> Float32[Array, "Q"]:
    """|q·x - q̂·x̂| ≤ |q - q̂|·|x| + |q̂|·|x - x̂| for every row, with a little room for rounding."""
    codes, scales = quantise(queries)
    coded = codes * scales[:, None]
    norm = functools.partial(jnp.linalg.norm, axis=1)
    return 1.001 * (norm(queries - coded) * error_bounds[0] + norm(coded) * error_bounds[1])
