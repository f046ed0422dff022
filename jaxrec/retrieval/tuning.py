"""How many lists a search has to probe, measured on sample queries."""

import functools

import jax
import numpy as np
from jaxtyping import Array, Float, Int

from jaxrec.retrieval.ivf_index import IVFIndex, list_of_row, rank_lists, search_rows
from pallas_kernels import IVF_MAX_K

_K = 100  # results for which `ItemIndex.nprobe` is tuned, and the first point of a recall curve
_MOST = 6_400  # the last one, at most

type _Array = jax.Array | np.ndarray


def tune_nprobe(
    index: IVFIndex,
    queries: Float[_Array, "S D"],
    *,
    recall: float = 0.95,
    k: int = _K,
) -> tuple[int, float]:
    """The fewest lists that hold `recall` of the queries' true top k, and what they hold.

    Each query's true top k comes from a scan of all rows, and the ranks of the lists they lie in
    tell the recall of every nprobe at once. Host only.
    """
    return _fewest_lists(*_true_lists(index, queries, min(k, index.num_items)), recall)


def tune(
    index: IVFIndex, queries: Float[_Array, "S D"], *, recall: float
) -> tuple[int, tuple[tuple[float, float], ...]]:
    """(nprobe, recall curve) of an `ItemIndex` from one scan; the former is that of `tune_nprobe`.

    The curve is (part of all items, share of the rows to scan to find `recall` of that best part),
    ascending. A filter that passes e items asks for the best k/e of them. If these lie among the
    passing items as the best k/e lie among all items, the same share finds the same recall.
    Measured for the best 100, 200, 400 … up to 6,400 of the items, aiming a fifth of the way above
    `recall`; all rows for all items. Host only.

    Cost: one scan of all rows for all queries.
    """
    most = min(_MOST, index.num_items, IVF_MAX_K)
    order, lists = _true_lists(index, queries, most)
    nprobe, _ = _fewest_lists(order, lists[:, :_K], recall)
    rows = list_of_row(index, np.flatnonzero(np.asarray(index.row_ids) >= 0))
    sizes = np.bincount(rows, minlength=index.nlist)
    scanned = np.empty(order.shape)
    np.put_along_axis(scanned, order, np.cumsum(sizes[order], axis=1) / index.num_items, axis=1)
    needed = np.take_along_axis(scanned, lists, axis=1)
    aim, points, count = recall + (1 - recall) / 5, {}, min(_K, most)
    while count <= most and count < index.num_items:
        points[count / index.num_items] = float(np.quantile(needed[:, :count], min(aim, 1.0)))
        count *= 2
    return nprobe, (*points.items(), (1.0, 1.0))


def _fewest_lists(order, lists, recall: float) -> tuple[int, float]:
    ranks = np.argsort(order, axis=1)
    needed = np.sort(np.take_along_axis(ranks, lists, axis=1).ravel())
    nprobe = int(needed[int(np.ceil(recall * needed.size)) - 1]) + 1
    return nprobe, float((needed < nprobe).mean())


def _true_lists(
    index: IVFIndex, queries: Float[_Array, "S D"], k: int
) -> tuple[Int[np.ndarray, "S C"], Int[np.ndarray, "S k"]]:
    """(lists in the order each query probes them, lists of its true k best rows, best first)."""
    order, rows = _scan(index, np.asarray(queries, np.float32), k)
    return np.asarray(order), list_of_row(index, np.asarray(rows))


@functools.partial(jax.jit, static_argnames="k")
def _scan(index: IVFIndex, queries: Float[Array, "S D"], k: int) -> tuple[Array, Array]:
    found = search_rows(index, queries, None, k=k, nprobe=index.nlist, precision="rescored")
    return rank_lists(index, queries), found.rows
