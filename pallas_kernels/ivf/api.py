"""Top-k inner products over the probed lists of an inverted file.

Letters: Q queries, D width, C lists, R rows (a multiple of 64), M masks, K results a query.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Float32, Int32, Shaped, UInt32

from pallas_kernels._backend import Backend, resolve
from pallas_kernels.ivf import ref
from pallas_kernels.ivf.config import (
    FEW,
    MAX_K,
    TILE_ROWS,
    IvfConfig,
    IvfKernelConfig,
    kernel_heuristic,
    kernel_problem,
)

type _Array = jax.Array | np.ndarray


class IvfTopK(NamedTuple):
    """The best rows of each query, best first.

    Attributes:
      scores: inner products; -inf where fewer than K rows were eligible; f32[Q, K].
      rows: row numbers; -1 there; i32[Q, K].
      complete: these are certainly the best K, by the op's own scores, of the rows that the query
        scanned; always true of the XLA reference; the kernel's proof allows for what it dropped and
        for the rounding of its keys, so it may fail where the answer is right; bool[Q].
    """

    scores: Float32[jax.Array, "Q K"]
    rows: Int32[jax.Array, "Q K"]
    complete: Bool[jax.Array, "Q"]


def ivf_search(
    queries: Float[jax.Array | np.ndarray, "Q D"],
    centroids: Float[jax.Array | np.ndarray, "C D"],
    codes: Shaped[jax.Array | np.ndarray, "R D"],
    scales: Float32[jax.Array | np.ndarray, "R"],
    tile_offsets: Int32[jax.Array | np.ndarray, "C1"],
    live: UInt32[jax.Array | np.ndarray, "words"],
    mask: UInt32[jax.Array | np.ndarray, "M words"] | None = None,
    *,
    mask_of_query: Int32[jax.Array | np.ndarray, "Q"] | None = None,
    probes: Int32[jax.Array | np.ndarray, "Q"] | None = None,
    k: int,
    nprobe: int,
    max_tiles: int,
    max_list_tiles: int | None = None,
    backend: Backend | None = None,
    config: IvfConfig | IvfKernelConfig | None = None,
) -> IvfTopK:
    """The k best live rows of the `nprobe` lists whose centroids score highest.

    List c owns the tiles tile_offsets[c] up to tile_offsets[c+1], of 64 rows each. A query q is
    quantised to q̂ = round(q / s_q), s_q = max|q| / 127, and row r scores

        s_q · scales[r] · Σ_d q̂[d] · codes[r, d]        the sum in int32, so without rounding

    Float codes (f32, bf16) are scored as q · codes[r] · scales[r] in f32 instead.

    Args:
      queries: one a row; scored in f32.
      centroids: one a list. Probing all C lists skips their scoring and reads rows in order.
      codes: rows in list order, int8 or float; padding rows may hold anything finite.
      scales: the row's factor.
      tile_offsets: non-decreasing from 0 to R / 64.
      live: bit r % 32 of word r // 32 is set for the rows that exist (no padding, not deleted).
      mask: the same bits, of the rows that a query may return; None allows all.
      mask_of_query: the mask that each query uses, as where the heads of one user share a filter;
        None takes one mask a query, M = Q.
      probes: lists that each query scans, its best; 0 to nprobe; None takes nprobe for all.
      k: results wanted, 1 to 16,384.
      nprobe: lists scanned, 1 to C.
      max_tiles: static bound on the tiles of any `nprobe` lists; see `probed_tiles_bound`. A lower
        value would drop rows.
      max_list_tiles: static bound on the tiles of one list, `probed_tiles_bound(tile_offsets, 1)`:
        less scratch for queries that share lists. None allows for any.
      backend: None picks the best supported; a name never falls back. "mosaic_gpu" is for int8
        codes on Hopper, of a width that 32 divides.
      config: an `IvfConfig` for the XLA backend, an `IvfKernelConfig` for the kernel; None takes
        the heuristic.

    Of rows with equal scores any may win. The kernel can miss a row where more of the best share
    one of its lanes than the lane keeps: `complete` is then false.

    Raises:
      ValueError: k, nprobe, shapes or dtypes out of range.

    Cost: per query 2·rows·D operations for the rows of its lists, and rows·(D + 4) bytes. Probing
    all lists, a block of queries shares these bytes; about R/8 bytes a query hold the best score of
    each group of rows. Scores exist for a block at a time. No gradient.
    """
    _check(queries, centroids, codes, tile_offsets, live, mask, mask_of_query, k, nprobe)
    heuristic = functools.partial(
        kernel_heuristic, queries.shape[0], centroids.shape[0], k=k, codes_shape=codes.shape,
        max_list_tiles=max_list_tiles,
    )  # fmt: skip
    kernel_tiles = config or heuristic(nprobe, max_tiles, probes_vary=probes is not None)
    chosen = resolve(
        "ivf_search",
        backend,
        lambda: kernel_problem(codes.shape, str(codes.dtype), queries.shape[0], kernel_tiles),
        wgmma=True,
    )
    if chosen == "mosaic_gpu" and isinstance(kernel_tiles, IvfKernelConfig):
        from pallas_kernels.ivf import search  # 1 s of imports that the CPU never needs

        few = max(1, nprobe // FEW), max(1, max_tiles // FEW)
        found = search.ivf_search(
            queries, centroids, codes, scales, tile_offsets, live, mask, mask_of_query, probes,
            k=k, nprobe=nprobe, max_tiles=max_tiles, max_list_tiles=max_list_tiles,
            config=kernel_tiles,
            few=None if probes is None else (*few, kernel_tiles if config else heuristic(*few)),
        )  # fmt: skip
        return IvfTopK(*found)
    full = nprobe == centroids.shape[0] and probes is None
    num_rows = codes.shape[0] if full else max_tiles * TILE_ROWS
    tiles = config if isinstance(config, IvfConfig) else None
    tiles = tiles or IvfConfig.heuristic(queries.shape[0], num_rows, shared=full)
    scores, rows = ref.ivf_search(
        queries, centroids, codes, scales, tile_offsets, live, mask, mask_of_query, probes,
        k=k, nprobe=nprobe, max_tiles=max_tiles, config=tiles,
    )  # fmt: skip
    return IvfTopK(scores, rows, jnp.ones(len(queries), bool))


def _check(
    queries: _Array,
    centroids: _Array,
    codes: _Array,
    tile_offsets: _Array,
    live: _Array,
    mask: _Array | None,
    mask_of_query: _Array | None,
    k: int,
    nprobe: int,
) -> None:
    num_rows, num_lists = codes.shape[0], centroids.shape[0]
    if not 1 <= k <= MAX_K:
        raise ValueError(f"ivf_search: k is {k}; expected 1 to {MAX_K}")
    if not 1 <= nprobe <= num_lists:
        raise ValueError(f"ivf_search: nprobe is {nprobe}; the index has 1 to {num_lists} lists")
    if num_rows % TILE_ROWS:
        raise ValueError(f"ivf_search: {num_rows} rows; expected a multiple of {TILE_ROWS}")
    if queries.shape[1] != codes.shape[1] or centroids.shape[1] != codes.shape[1]:
        raise ValueError(
            f"ivf_search: queries are {queries.shape[1]} wide, centroids {centroids.shape[1]}; "
            f"expected {codes.shape[1]} like the codes"
        )
    if tile_offsets.shape[0] != num_lists + 1:
        raise ValueError(
            f"ivf_search: tile_offsets has {tile_offsets.shape[0]} entries; "
            f"expected {num_lists + 1}, one more than lists"
        )
    words = num_rows // 32
    if live.shape != (words,) or (mask is not None and mask.shape[1:] != (words,)):
        got = live.shape if mask is None else (live.shape, mask.shape)
        raise ValueError(
            f"ivf_search: live and mask have shape {got}; expected {words} words, one bit a row"
        )
    if mask is not None and mask_of_query is None and len(mask) != len(queries):
        raise ValueError(
            f"ivf_search: {len(mask)} masks for {len(queries)} queries; expected one each, or "
            "mask_of_query"
        )
