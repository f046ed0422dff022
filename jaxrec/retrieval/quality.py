"""How good an approximate search is: its results against brute force."""

import jax
import numpy as np
from jaxtyping import Float, Int

type _Array = jax.Array | np.ndarray


def brute_force(
    queries: Float[_Array, "Q D"],
    table: Float[_Array, "V D"],
    eligible: Int[_Array, "N"],
    *,
    k: int,
) -> Int[np.ndarray, "Q {k}"]:
    """The k rows of `table` among `eligible` with the largest inner products, by NumPy in f64.

    Ties go to the row that stands first in `eligible`; -1 fills what is left where fewer than k
    are eligible. Cost: Q·N scores are held at once.
    """
    eligible = np.asarray(eligible)
    rows = np.asarray(table, np.float64)[eligible]
    order = np.argsort(-(np.asarray(queries, np.float64) @ rows.T), axis=1, kind="stable")[:, :k]
    best = np.full((len(order), k), -1)
    best[:, : order.shape[1]] = eligible[order]
    return best


def recall(found: Int[_Array, "Q k"], truth: Int[_Array, "Q K"]) -> float:
    """Part of the true results (-1: none) that was found, over all queries; 1 if there are none."""
    truth = np.asarray(truth)
    wanted = truth >= 0
    hits = (truth[:, :, None] == np.asarray(found)[:, None, :]).any(axis=2) & wanted
    return float(hits.sum() / wanted.sum()) if wanted.any() else 1.0
