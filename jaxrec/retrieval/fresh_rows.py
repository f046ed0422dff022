"""Writing rows of a fresh part: on the device, in few compiled sizes."""

import functools
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int32, UInt32

from jaxrec.retrieval.ivf_index import IVFIndex
from jaxrec.retrieval.kmeans import normalise
from pallas_kernels import quantise

_LEAST_UPDATE = 64  # smaller updates are padded to this size


def padded(fill: int, first: np.ndarray, *arrays: np.ndarray) -> list[np.ndarray]:
    """The arrays at the next power of two; the first is filled up with `fill`."""
    missing = max(_LEAST_UPDATE, 1 << (len(first) - 1).bit_length()) - len(first)
    rest = [np.pad(x, ((0, missing),) + ((0, 0),) * (x.ndim - 1)) for x in arrays]
    return [np.pad(first, (0, missing), constant_values=fill), *rest]


def _write_rows(ivf: IVFIndex, columns, slots, ids, vectors, values):
    """(the index with these items in these rows, the columns with these values there)."""
    vectors = normalise(vectors) if ivf.metric == "cosine" else vectors
    stored = vectors.astype(ivf.vectors.dtype)
    codes, scales = quantise(stored)
    wide = stored.astype(jnp.float32)
    error = wide - codes * scales[:, None]
    bounds = jnp.stack([jnp.max(jnp.linalg.norm(x, axis=1)) for x in (wide, error)])
    written = replace(
        ivf,
        codes=ivf.codes.at[slots].set(codes, mode="drop"),
        scales=jnp.asarray(ivf.scales).at[slots].set(scales, mode="drop"),
        vectors=ivf.vectors.at[slots].set(stored, mode="drop"),
        error_bounds=jnp.maximum(ivf.error_bounds, bounds),
    )
    columns = {
        name: column.at[slots].set(values[name], mode="drop") for name, column in columns.items()
    }
    row_ids = jnp.asarray(ivf.row_ids).at[slots].set(ids, mode="drop")
    return _with_row_ids(written, row_ids), columns


def _free_rows(ivf: IVFIndex, slots) -> IVFIndex:
    return _with_row_ids(ivf, jnp.asarray(ivf.row_ids).at[slots].set(-1, mode="drop"))


def _with_row_ids(ivf: IVFIndex, row_ids: Int32[Array, "R"]) -> IVFIndex:
    lanes = jnp.arange(32, dtype=jnp.uint32)
    bits = (row_ids >= 0).reshape(-1, 32).astype(jnp.uint32) << lanes
    return replace(
        ivf,
        row_ids=row_ids,
        id_order=jnp.argsort(row_ids).astype(jnp.int32),
        live=jnp.sum(bits, axis=1, dtype=jnp.uint32),
    )


@jax.jit
def clear_rows(live: UInt32[Any, "words"], rows: Int32[Any, "M"]) -> UInt32[Array, "words"]:
    """The live bits without those of the rows, which are set; -1 is no row."""
    bits = jnp.where(rows >= 0, jnp.uint32(1) << (rows % 32).astype(jnp.uint32), 0)
    return jnp.asarray(live).at[jnp.maximum(rows, 0) // 32].add(-bits)


write_rows = jax.jit(_write_rows)
write_rows_in_place = functools.partial(jax.jit, donate_argnums=(0, 1))(_write_rows)
free_rows = jax.jit(_free_rows)
free_rows_in_place = functools.partial(jax.jit, donate_argnums=0)(_free_rows)
