"""The XLA reference of `ivf_search`: the definition of correct, and what runs without a kernel."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Float32, Int8, Int32, Shaped, UInt32

from pallas_kernels.ivf.config import TILE_ROWS, IvfConfig

_TILE_WORDS = TILE_ROWS // 32
_INT8_MAX = 127.0
_EXACT_F32_WIDTH = 2**24 // 127**2  # up to this width f32 holds every sum of int8 products
_LEAST_GEMM_QUERIES = 16  # with fewer, XLA's CPU products fall back to slow loops

type _Array = jax.Array | np.ndarray


def probed_tiles_bound(tile_offsets: Int32[np.ndarray, "C1"], nprobe: int) -> int:
    """Tiles of the `nprobe` largest lists: no choice of lists has more. Host only."""
    return int(np.sort(np.diff(tile_offsets))[::-1][:nprobe].sum())


def quantise(x: Float[_Array, "N D"]) -> tuple[Int8[Array, "N D"], Float32[Array, "N"]]:
    """Codes in [-127, 127] and scales with x ≈ codes · scales; a row of zeros gets scale 0."""
    x = jnp.asarray(x, jnp.float32)
    scales = jnp.max(jnp.abs(x), axis=1) / _INT8_MAX
    safe = jnp.where(scales > 0, scales, 1)
    codes = jnp.clip(jnp.round(x / safe[:, None]), -_INT8_MAX, _INT8_MAX)
    return codes.astype(jnp.int8), scales


def rescore(
    queries: Float[_Array, "Q D"], vectors: Float[_Array, "R D"], rows: Int32[_Array, "Q M"]
) -> Float32[Array, "Q M"]:
    """Inner products in f32 of each query with its own rows; -inf where the row is -1.

    Cost: one query at a time gathers M·D values.
    """

    vectors, rows = jnp.asarray(vectors), jnp.asarray(rows)

    def one_query(operands):
        query, own_rows = operands
        own = vectors[jnp.maximum(own_rows, 0)].astype(jnp.float32)
        return jnp.dot(own, query, precision=lax.Precision.HIGHEST)

    scores = lax.map(one_query, (jnp.asarray(queries, jnp.float32), rows), batch_size=16)
    return jnp.where(rows >= 0, scores, -jnp.inf)


@functools.partial(jax.jit, static_argnames=("k", "nprobe", "max_tiles", "config"))
def ivf_search(
    queries: Float[Array, "Q D"],
    centroids: Float[Array, "C D"],
    codes: Shaped[Array, "R D"],
    scales: Float32[Array, "R"],
    tile_offsets: Int32[Array, "C1"],
    live: UInt32[Array, "words"],
    mask: UInt32[Array, "M words"] | None,
    mask_of_query: Int32[Array, "Q"] | None,
    probes: Int32[Array, "Q"] | None,
    *,
    k: int,
    nprobe: int,
    max_tiles: int,
    config: IvfConfig,
) -> tuple[Float32[Array, "Q {k}"], Int32[Array, "Q {k}"]]:
    """`pallas_kernels.ivf_search` in plain jnp.

    With every list probed, all rows are scored in order for a block of queries at once. Else each
    query walks through the tiles of its own lists.
    """
    num_queries = queries.shape[0]
    if num_queries == 0 or codes.shape[0] == 0:
        return jnp.full((num_queries, k), -jnp.inf), jnp.full((num_queries, k), -1, jnp.int32)
    if mask is not None and mask_of_query is None:
        mask_of_query = jnp.arange(num_queries, dtype=jnp.int32)
    queries = queries.astype(jnp.float32)
    rows = _Rows(codes, scales, live, mask)
    scored = _Queries(*_like_codes(queries, codes.dtype), mask_of_query)
    if nprobe == centroids.shape[0] and probes is None:
        scan = functools.partial(_scan_all, rows, k=k, row_block=config.row_block)
        scores, found = _in_blocks(scan, scored, min(config.query_block, num_queries))
    else:
        probed = _probed_lists(queries, centroids, nprobe)
        scan = functools.partial(
            _scan_lists, rows, tile_offsets, k=k, max_tiles=max_tiles, row_block=config.row_block
        )
        scores, found = _each(scan, (scored, probed, probes), config.query_block)
    return scores, jnp.where(jnp.isneginf(scores), -1, found)


class _Rows(NamedTuple):
    """What is searched; R rows, M masks."""

    codes: Shaped[Array, "R D"]
    scales: Float32[Array, "R"]
    live: UInt32[Array, "words"]
    mask: UInt32[Array, "M words"] | None


class _Queries(NamedTuple):
    """Queries in the type of the codes, Q of them or one; `mask` is the number of a mask."""

    codes: Shaped[Array, "*Q D"]
    scale: Float32[Array, "*Q"]
    mask: Int32[Array, "*Q"] | None


def _like_codes(queries, dtype):
    return quantise(queries) if dtype == jnp.int8 else (queries, jnp.ones(len(queries)))


def _in_blocks(scan, queries: _Queries, size: int):
    """`scan` of blocks of queries, one after the other."""
    num_queries = len(queries.codes)
    num_blocks = -(-num_queries // size)

    def blocked(x):
        x = jnp.pad(x, ((0, num_blocks * size - num_queries), *((0, 0),) * (x.ndim - 1)))
        return x.reshape(num_blocks, size, *x.shape[1:])

    found = lax.map(scan, jax.tree.map(blocked, queries))
    return jax.tree.map(lambda x: x.reshape(-1, x.shape[-1])[:num_queries], found)


def _each(scan, operands, batch_size: int):
    """`scan` of each query: one by one on a CPU, side by side elsewhere."""
    return lax.platform_dependent(
        operands,
        cpu=functools.partial(lax.map, lambda each: scan(*each)),
        default=functools.partial(lax.map, lambda each: scan(*each), batch_size=batch_size),
    )


def _scan_all(rows: _Rows, queries: _Queries, *, k: int, row_block: int):
    """The k best of all rows for a block of queries, in two passes.

    The first keeps only the best score of each small group of rows. The k best rows lie in the k
    groups with the best such scores, and only these groups are scored again.
    """
    num_rows = rows.codes.shape[0]
    row_block, group = min(row_block, num_rows), _group_rows(num_rows, k)

    def best_of_groups(block):
        # The last block is moved back to end with the rows; what it shares is skipped.
        start = jnp.minimum(block * row_block, num_rows - row_block)
        scores = _score_block(rows, queries, start, row_block)
        fresh = start + jnp.arange(row_block, dtype=jnp.int32) >= block * row_block
        scores = jnp.where(fresh, scores, -jnp.inf).reshape(len(scores), -1, group)
        return jnp.max(scores, axis=2), start // group

    blocks = jnp.arange(-(-num_rows // row_block), dtype=jnp.int32)
    best, first_groups = lax.map(best_of_groups, blocks)
    best = best.transpose(1, 0, 2).reshape(best.shape[1], -1)
    best, places = lax.top_k(best, min(k, best.shape[1]))
    in_block = row_block // group
    groups = first_groups[places // in_block] + places % in_block

    def rank(query, groups, best):
        found = (groups[:, None] * group + jnp.arange(group, dtype=jnp.int32)).ravel()
        scores = _score_rows(rows, query, found)
        scores = jnp.where(jnp.repeat(jnp.isneginf(best), group), -jnp.inf, scores)
        return _best(scores, found, k)

    return _each(rank, (queries, groups, best), len(best))


def _group_rows(num_rows: int, k: int) -> int:
    """Rows of a group, 8 to 64: k groups are scored again and R / group best scores compared.

    The first costs some 8 times as much a row as the second an entry.
    """
    ideal = (num_rows / (8 * k)) ** 0.5
    return next((size for size in (8, 16, 32) if ideal < 1.5 * size), TILE_ROWS)


def _score_block(rows: _Rows, queries: _Queries, start, count: int) -> Float32[Array, "Q {count}"]:
    codes = lax.dynamic_slice_in_dim(rows.codes, start, count)
    scales = lax.dynamic_slice_in_dim(rows.scales, start, count)
    words = lax.dynamic_slice_in_dim(rows.live, start // 32, count // 32)[None]
    if rows.mask is not None:
        own = lax.dynamic_slice_in_dim(rows.mask, start // 32, count // 32, axis=1)
        words = words & own[queries.mask]
    scores = _products(queries.codes, codes) * (queries.scale[:, None] * scales)
    return jnp.where(_bits(words), scores, -jnp.inf)


def _products(queries, codes) -> Float32[Array, "Q n"]:
    dims, num_queries = (((1,), (1,)), ((), ())), len(queries)
    if codes.dtype != jnp.int8:
        codes = codes.astype(jnp.float32)
        return lax.dot_general(queries, codes, dims, precision=lax.Precision.HIGHEST)
    if codes.shape[1] > _EXACT_F32_WIDTH:
        products = lax.dot_general(queries, codes, dims, preferred_element_type=jnp.int32)
        return products.astype(jnp.float32)
    queries = jnp.pad(queries, ((0, max(0, _LEAST_GEMM_QUERIES - num_queries)), (0, 0)))
    queries, codes = queries.astype(jnp.bfloat16), codes.astype(jnp.bfloat16)
    products = lax.dot_general(queries, codes, dims, preferred_element_type=jnp.float32)
    return products[:num_queries]


def _score_rows(rows: _Rows, query: _Queries, chosen: Int32[Array, "n"]) -> Float32[Array, "n"]:
    """One query's scores of some rows."""
    scores = _row_products(query.codes, rows.codes[chosen]) * (query.scale * rows.scales[chosen])
    words = rows.live[chosen // 32]
    if rows.mask is not None:
        words = words & rows.mask[query.mask, chosen // 32]
    passes = (words >> (chosen % 32).astype(jnp.uint32)) & 1
    return jnp.where(passes.astype(bool), scores, -jnp.inf)


def _row_products(query, codes) -> Float32[Array, "n"]:
    if codes.dtype == jnp.int8 and codes.shape[1] > _EXACT_F32_WIDTH:
        products = codes.astype(jnp.int32) * query.astype(jnp.int32)
        return jnp.sum(products, axis=1).astype(jnp.float32)
    query, codes = query.astype(jnp.float32), codes.astype(jnp.float32)
    return jnp.dot(codes, query, precision=lax.Precision.HIGHEST)


def _probed_lists(queries, centroids, nprobe: int) -> Int32[Array, "Q nprobe"]:
    scores = jnp.matmul(queries, centroids.astype(jnp.float32).T, precision=lax.Precision.HIGHEST)
    return lax.top_k(scores, nprobe)[1]


def _scan_lists(
    rows: _Rows, tile_offsets, query: _Queries, probed, probes, *, k, max_tiles, row_block
):
    """The k best rows of one query's lists, tile by tile into a running top-k."""
    work, num_tiles = _work_list(probed, probes, tile_offsets, max_tiles)
    tile_block = max(1, min(row_block // TILE_ROWS, max_tiles))
    lanes = jnp.arange(TILE_ROWS, dtype=jnp.int32)

    def one_block(block, best):
        first = block * tile_block

        def one_tile(i, scores):
            found = _score_tile(rows, query, work[first + i])
            return lax.dynamic_update_slice(scores, found, (i * TILE_ROWS,))

        scores = jnp.full(tile_block * TILE_ROWS, -jnp.inf)
        scores = lax.fori_loop(0, jnp.minimum(tile_block, num_tiles - first), one_tile, scores)
        places = jnp.minimum(first + jnp.arange(tile_block, dtype=jnp.int32), max_tiles - 1)
        found = (work[places][:, None] * TILE_ROWS + lanes).ravel()
        return _merge(best, _best(scores, found, k), k)

    nothing = jnp.full(k, -jnp.inf), jnp.full(k, -1, jnp.int32)
    return lax.fori_loop(0, (num_tiles + tile_block - 1) // tile_block, one_block, nothing)


def _work_list(
    probed: Int32[Array, "nprobe"],
    probes: Int32[Array, ""] | None,
    tile_offsets: Int32[Array, "C1"],
    max_tiles: int,
) -> tuple[Int32[Array, "{max_tiles}"], Int32[Array, ""]]:
    """The tiles of a query's lists one after the other, and how many they are."""
    sizes = (tile_offsets[1:] - tile_offsets[:-1])[probed]
    if probes is not None:
        sizes = jnp.where(jnp.arange(len(probed)) < probes, sizes, 0)
    ends = jnp.cumsum(sizes)
    slots = jnp.arange(max_tiles, dtype=jnp.int32)
    which = jnp.minimum(jnp.searchsorted(ends, slots, side="right"), len(probed) - 1)
    tiles = (tile_offsets[probed] - (ends - sizes))[which] + slots
    return jnp.where(slots < ends[-1], tiles, 0), ends[-1]


def _score_tile(rows: _Rows, query: _Queries, tile) -> Float32[Array, "rows"]:
    codes = lax.dynamic_slice_in_dim(rows.codes, tile * TILE_ROWS, TILE_ROWS)
    scales = lax.dynamic_slice_in_dim(rows.scales, tile * TILE_ROWS, TILE_ROWS)
    words = lax.dynamic_slice_in_dim(rows.live, tile * _TILE_WORDS, _TILE_WORDS)
    if rows.mask is not None and query.mask is not None:
        start = (query.mask, tile * _TILE_WORDS)
        words = words & lax.dynamic_slice(rows.mask, start, (1, _TILE_WORDS))[0]
    scores = _row_products(query.codes, codes) * (query.scale * scales)
    return jnp.where(_bits(words), scores, -jnp.inf)


def _bits(words: UInt32[Array, "*Q n"]) -> Bool[Array, "*Q bits"]:
    bits = (words[..., None] >> jnp.arange(32, dtype=jnp.uint32)) & 1
    return bits.reshape(*words.shape[:-1], -1).astype(bool)


def _best(scores: Float32[Array, "n"], rows: Int32[Array, "n"], k: int):
    """The k best of n scored rows, -inf and -1 behind the last."""
    scores, places = lax.top_k(scores, min(k, len(scores)))
    rows, missing = rows[places], k - len(scores)
    return (
        jnp.pad(scores, (0, missing), constant_values=-jnp.inf),
        jnp.pad(rows, (0, missing), constant_values=-1),
    )


def _merge(best, others, k: int):
    scores, rows = (jnp.concatenate(pair) for pair in zip(best, others, strict=True))
    return _best(scores, rows, k)
