"""Merging the parts of an index that took updates into one, and measuring whether that is due."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Float32, Int, Key

from jaxrec.retrieval.bloom_index import BloomIndex
from jaxrec.retrieval.item_index import ItemIndex, positions_of
from jaxrec.retrieval.ivf_index import (
    IVFIndex,
    Metric,
    lay_out,
    list_of_row,
    sample_vectors,
)
from jaxrec.retrieval.kmeans import assign
from jaxrec.retrieval.masks import unpack_bits
from jaxrec.retrieval.tuning import tune
from pallas_kernels import IVF_TILE_ROWS

type _Array = jax.Array | np.ndarray


def blank_items(
    width: int,
    features: Sequence[str],
    columns: Mapping[str, Any],
    metric: Metric,
    max_fpr: float,
    vector_dtype: Any,
) -> ItemIndex:
    """An index without items: one list of a single tile, all of it padding."""
    ivf = IVFIndex.blank(width, IVF_TILE_ROWS, metric, vector_dtype, num_items=0)
    nobody = np.full(IVF_TILE_ROWS, -1)
    bloom = BloomIndex.build({name: [] for name in features}, max_fpr=max_fpr, order=nobody)
    rows = {
        name: jnp.zeros((IVF_TILE_ROWS, *column.shape[1:]), column.dtype)
        for name, column in columns.items()
    }
    return ItemIndex(ivf, bloom, rows, nprobe=1, shares=((1.0, 1.0),))


def merge_parts(
    main: ItemIndex,
    fresh: ItemIndex,
    *,
    key: Key[Array, ""],
    recluster: bool,
    nlist: int | None,
    recall: float,
    sample_queries: Float[_Array, "S D"] | None,
) -> ItemIndex:
    """One index of the live items of both; see `LiveIndex.compact`. Host only."""
    parts = (main, fresh)
    held = [np.flatnonzero(_held(part.ivf)) for part in parts]
    starts = (0, main.ivf.row_ids.shape[0])
    own_rows = list(zip(parts, held, strict=True))
    ids = np.concatenate([np.asarray(part.ivf.row_ids)[rows] for part, rows in own_rows])
    vectors = np.concatenate([np.asarray(part.ivf.vectors)[rows] for part, rows in own_rows])
    if not len(ids):
        return blank_items(
            vectors.shape[1], main.bloom.catalog.features, main.columns, main.ivf.metric,
            main.bloom.max_fpr, vectors.dtype,
        )  # fmt: skip
    build_key, tune_key = jax.random.split(key)
    if recluster:
        nlist = max(1, round(len(ids) ** 0.5)) if nlist is None else nlist
        ivf = IVFIndex.build(
            vectors, nlist=nlist, key=build_key, metric=main.ivf.metric, row_ids=ids,
            vector_dtype=str(vectors.dtype),  # type: ignore[arg-type]
        )  # fmt: skip
        samples = sample_vectors(ivf, tune_key) if sample_queries is None else sample_queries
        nprobe, shares = tune(ivf, samples, recall=recall)
    else:
        ivf = lay_out(
            main.ivf.centroids, _lists(main, held[0], vectors), ids, vectors, main.ivf.metric
        )
        nprobe, shares = main.nprobe, main.shares
    places = positions_of(ids, np.asarray(ivf.row_ids))
    numbers = np.concatenate([own + start for own, start in zip(held, starts, strict=True)])
    order = np.where(places >= 0, numbers[places], -1)
    bloom = BloomIndex.joined([part.bloom for part in parts], order)
    return ItemIndex(ivf, bloom, _joined_columns(parts, order), nprobe, shares)


def spread_of(ivf: IVFIndex, centroids: Float[_Array, "C D"] | None = None) -> Float32[Array, ""]:
    """Mean squared distance of the live rows to their list's centroid; 0 without rows.

    Args:
      centroids: take the nearest of these instead.
    """
    tiles = ivf.row_ids.shape[0] // IVF_TILE_ROWS
    lists = list_of_row(ivf, np.arange(tiles) * IVF_TILE_ROWS).astype(np.int32)
    return _spread(ivf, jnp.asarray(lists), centroids)


@jax.jit
def _spread(ivf: IVFIndex, lists, centroids) -> Float32[Array, ""]:
    width = ivf.vectors.shape[1]

    def one_tile(operands):
        vectors, own_list = operands
        vectors = vectors.astype(jnp.float32)
        own = jnp.broadcast_to(jnp.asarray(ivf.centroids)[own_list], vectors.shape)
        if centroids is not None:
            own = jnp.asarray(centroids)[assign(vectors, centroids)]
        return jnp.sum((vectors - own) ** 2, axis=1)

    tiles = jnp.asarray(ivf.vectors).reshape(-1, IVF_TILE_ROWS, width)
    distances = lax.map(one_tile, (tiles, lists)).ravel()
    lanes = jnp.arange(32, dtype=jnp.uint32)
    live = ((jnp.asarray(ivf.live)[:, None] >> lanes) & 1).ravel().astype(bool)
    return jnp.sum(jnp.where(live, distances, 0)) / jnp.maximum(jnp.sum(live), 1)


def _held(ivf: IVFIndex) -> Bool[np.ndarray, "R"]:
    return unpack_bits(ivf.live, ivf.row_ids.shape[0])


def _lists(main: ItemIndex, rows: np.ndarray, vectors: np.ndarray) -> Int[np.ndarray, "N"]:
    """The list of each item: its own for those of the main part, the nearest for the others."""
    own = list_of_row(main.ivf, rows)
    others = vectors[len(rows) :]
    nearest = np.asarray(assign(others, main.ivf.centroids)) if len(others) else own[:0]
    return np.concatenate([own, nearest])


def _joined_columns(parts: Sequence[ItemIndex], order: np.ndarray) -> dict[str, Array]:
    def join(name: str) -> Array:
        column = np.concatenate([np.asarray(part.columns[name]) for part in parts])
        placed = (order >= 0).reshape(-1, *[1] * (column.ndim - 1))
        return jnp.asarray(np.where(placed, column[order], np.zeros((), column.dtype)))

    return {name: join(name) for name in parts[0].columns}
