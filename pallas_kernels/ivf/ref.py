"""The XLA reference of `ivf_search`: the definition of correct, and what runs without a kernel."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Float32, Int8, Int32, Shaped, UInt32

from pallas_kernels.ivf.config import TILE_ROWS, IvfConfig

_TILE_WORDS = TILE_ROWS // 32
_INT8_MAX = 127.0

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
    """`pallas_kernels.ivf_search` in plain jnp, scanning block after block into a running top-k.

    Queries go through in blocks (`lax.map`), each with its own scan over rows: all rows in order
    if every list is probed, else the tiles of its work list, gathered.
    """
    num_queries, query_block = queries.shape[0], config.query_block
    if num_queries == 0 or codes.shape[0] == 0:
        return jnp.full((num_queries, k), -jnp.inf), jnp.full((num_queries, k), -1, jnp.int32)
    full = nprobe == centroids.shape[0] and probes is None
    queries = queries.astype(jnp.float32)

    if mask is not None and mask_of_query is None:
        mask_of_query = jnp.arange(num_queries, dtype=jnp.int32)

    def one_block(operands):
        block, own_masks, own_probes = operands
        words = None if mask is None else mask[own_masks]
        scorer = _Scorer(block, codes, scales, live, words)
        if full:
            return _scan_rows(scorer, k, config.row_block)
        probed = _probed_lists(block, centroids, nprobe)
        work = _work_list(probed, own_probes, tile_offsets, max_tiles)
        return _scan_work_list(scorer, work, k, config.row_block // TILE_ROWS)

    num_blocks = -(-num_queries // query_block)
    padding = num_blocks * query_block - num_queries

    def blocked(x):
        x = jnp.pad(x, ((0, padding), *((0, 0),) * (x.ndim - 1)))
        return x.reshape(num_blocks, query_block, *x.shape[1:])

    operands = jax.tree.map(blocked, (queries, mask_of_query, probes))
    scores, rows = lax.map(one_block, operands)
    scores, rows = (x.reshape(-1, k)[:num_queries] for x in (scores, rows))
    return scores, jnp.where(jnp.isneginf(scores), -1, rows)


def _probed_lists(queries, centroids, nprobe: int) -> Int32[Array, "Q nprobe"]:
    scores = jnp.matmul(queries, centroids.astype(jnp.float32).T, precision=lax.Precision.HIGHEST)
    return lax.top_k(scores, nprobe)[1]


def _work_list(
    probed: Int32[Array, "Q nprobe"],
    probes: Int32[Array, "Q"] | None,
    tile_offsets: Int32[Array, "C1"],
    max_tiles: int,
) -> Int32[Array, "Q {max_tiles}"]:
    """The tiles of each query's lists one after the other; -1 behind the last."""
    sizes = (tile_offsets[1:] - tile_offsets[:-1])[probed]
    if probes is not None:
        sizes = jnp.where(jnp.arange(probed.shape[1]) < probes[:, None], sizes, 0)
    ends = jnp.cumsum(sizes, axis=1)
    slots = jnp.arange(max_tiles, dtype=jnp.int32)
    which = jax.vmap(lambda e: jnp.searchsorted(e, slots, side="right"))(ends)
    which = jnp.minimum(which, probed.shape[1] - 1)
    starts = tile_offsets[probed] - (ends - sizes)
    tiles = jnp.take_along_axis(starts, which, axis=1) + slots
    return jnp.where(slots < ends[:, -1:], tiles, -1)


class _Scorer:
    """Scores of a block of queries against blocks of rows."""

    def __init__(self, queries, codes, scales, live, mask):
        self.codes, self.scales, self.live, self.mask = codes, scales, live, mask
        if codes.dtype == jnp.int8:
            self.queries, self.query_scales = quantise(queries)
        else:
            self.queries, self.query_scales = queries, jnp.ones(len(queries), jnp.float32)

    def rows(self, start, count: int) -> Float32[Array, "Q {count}"]:
        """Rows start up to start + count, the same for every query."""
        codes = lax.dynamic_slice_in_dim(self.codes, start, count)
        scales = lax.dynamic_slice_in_dim(self.scales, start, count)
        words = lax.dynamic_slice_in_dim(self.live, start // 32, count // 32)[None]
        if self.mask is not None:
            words = words & lax.dynamic_slice_in_dim(self.mask, start // 32, count // 32, axis=1)
        scores = _products(self.queries, codes) * (self.query_scales[:, None] * scales)
        return jnp.where(_bits(words), scores, -jnp.inf)

    def tiles(self, tiles: Int32[Array, "Q t"]) -> Float32[Array, "Q rows"]:
        """Each query's own tiles; -inf for tile -1.

        A CPU takes the queries one by one: XLA has fast int8 products there, but not batched ones.
        """
        operands = (self.queries, self.query_scales, tiles, self.mask)
        return lax.platform_dependent(
            operands,
            cpu=lambda each: lax.map(self._own_tiles, each),
            default=jax.vmap(self._own_tiles),
        )

    def _own_tiles(self, operands) -> Float32[Array, "rows"]:
        query, query_scale, tiles, mask = operands
        safe = jnp.maximum(tiles, 0)
        codes = self.codes.reshape(-1, TILE_ROWS, len(query))[safe].reshape(-1, len(query))
        scales = self.scales.reshape(-1, TILE_ROWS)[safe].reshape(-1)
        words = self.live.reshape(-1, _TILE_WORDS)[safe]
        if mask is not None:
            words = words & mask.reshape(-1, _TILE_WORDS)[safe]
        words = jnp.where(tiles[:, None] >= 0, words, 0).reshape(1, -1)
        scores = _products(query[None], codes)[0] * (query_scale * scales)
        return jnp.where(_bits(words)[0], scores, -jnp.inf)


def _products(queries, codes) -> Float32[Array, "Q n"]:
    dims = (((1,), (1,)), ((), ()))
    if codes.dtype == jnp.int8:
        products = lax.dot_general(queries, codes, dims, preferred_element_type=jnp.int32)
        return products.astype(jnp.float32)
    codes = codes.astype(jnp.float32)
    return lax.dot_general(queries, codes, dims, precision=lax.Precision.HIGHEST)


def _bits(words: UInt32[Array, "Q n"]) -> Bool[Array, "Q bits"]:
    bits = (words[..., None] >> jnp.arange(32, dtype=jnp.uint32)) & 1
    return bits.reshape(words.shape[0], -1).astype(bool)


def _scan_rows(scorer: _Scorer, k: int, row_block: int):
    num_rows = scorer.codes.shape[0]
    row_block = min(row_block, num_rows)
    lanes = jnp.arange(row_block, dtype=jnp.int32)

    def step(best, block):
        # The last block is moved back to end with the rows; what it shares is skipped.
        start = jnp.minimum(block * row_block, num_rows - row_block)
        scores = scorer.rows(start, row_block)
        scores = jnp.where(start + lanes >= block * row_block, scores, -jnp.inf)
        return _merge(best, scores, jnp.broadcast_to(start + lanes, scores.shape), k), None

    blocks = jnp.arange(-(-num_rows // row_block), dtype=jnp.int32)
    return lax.scan(step, _nothing(len(scorer.queries), k), blocks)[0]


def _scan_work_list(scorer: _Scorer, work: Int32[Array, "Q t"], k: int, tile_block: int):
    tile_block = max(1, min(tile_block, work.shape[1]))
    num_blocks = -(-work.shape[1] // tile_block)
    work = jnp.pad(work, ((0, 0), (0, num_blocks * tile_block - work.shape[1])), constant_values=-1)

    def step(block, best):
        tiles = lax.dynamic_slice_in_dim(work, block * tile_block, tile_block, axis=1)
        lanes = jnp.arange(TILE_ROWS, dtype=jnp.int32)
        rows = (tiles[..., None] * TILE_ROWS + lanes).reshape(len(tiles), -1)
        return _merge(best, scorer.tiles(tiles), rows, k)

    # The bound allows for the largest lists; most queries probe smaller ones and end earlier.
    longest = jnp.max(jnp.sum(work >= 0, axis=1))
    used_blocks = (longest + tile_block - 1) // tile_block
    return lax.fori_loop(0, used_blocks, step, _nothing(len(work), k))


def _nothing(num_queries: int, k: int):
    return jnp.full((num_queries, k), -jnp.inf), jnp.full((num_queries, k), -1, jnp.int32)


def _merge(best, scores, rows, k: int):
    """The k best of those so far and of a block; the block is cut to its own k best first."""
    if scores.shape[1] > k:
        scores, places = lax.top_k(scores, k)
        rows = jnp.take_along_axis(rows, places, axis=1)
    scores = jnp.concatenate([best[0], scores], axis=1)
    rows = jnp.concatenate([best[1], rows], axis=1)
    scores, places = lax.top_k(scores, k)
    return scores, jnp.take_along_axis(rows, places, axis=1)
