"""How good an assignment is: how even, how far from the bound, and how well mixed."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from jaxrec.distributed.balance.cost import HSTU_H100, CostModel

LENGTH_CLASSES = 4


class Quality(NamedTuple):
    """Figures of an assignment.

    Attributes:
      max_over_mean: cost of the heaviest rank over the mean: how much longer a step takes than
        it had to. 1 is perfect; also 1 where nothing costs anything.
      bound: max(1, costliest sample over the mean rank): no assignment of whole samples can have
        a lower `max_over_mean`.
      idle: share of all ranks' time that is spent waiting, 1 - 1 / max_over_mean.
      min_samples, max_samples: of a rank.
      max_tokens: of a rank.
      empty_ranks: ranks without a sample; they take part in the step with weight 0.
      moved: share of the samples that change rank; 0 where their sources are not known.
      length_mixing: whether ranks differ in which lengths they get: χ² per degree of freedom of
        the table rank × quartile of length. A uniformly random assignment has 1 on average;
        below, ranks are more alike than chance makes them; far above, they specialise.
      source_mixing: the same for the table rank × source rank; 1 where sources are not known.
    """

    max_over_mean: float
    bound: float
    idle: float
    min_samples: int
    max_samples: int
    max_tokens: int
    empty_ranks: int
    moved: float
    length_mixing: float
    source_mixing: float


def measure(
    lengths: Int[np.ndarray, "N"],
    ranks: Int[np.ndarray, "N"],
    num_ranks: int,
    *,
    cost: CostModel = HSTU_H100,
    sources: Int[np.ndarray, "N"] | None = None,
) -> Quality:
    """Figures of any assignment.

    Args:
      lengths: tokens of each sample.
      ranks: of each sample, in [0, num_ranks).
      sources: the rank that each sample was read on.

    Raises:
      ValueError: a rank out of range.
    """
    if len(ranks) and not (ranks.min() >= 0 and ranks.max() < num_ranks):
        raise ValueError(f"a sample is on rank {ranks.min()} … {ranks.max()} of {num_ranks}")
    costs = cost.sample_costs(lengths)
    loads = np.bincount(ranks, costs, num_ranks)
    samples = np.bincount(ranks, minlength=num_ranks)
    mean = loads.mean()
    max_over_mean = float(loads.max() / mean) if mean else 1.0
    edges = (
        np.unique(np.quantile(lengths, np.arange(1, LENGTH_CLASSES) / LENGTH_CLASSES))
        if len(lengths)
        else np.zeros(0)
    )
    classes = np.searchsorted(edges, lengths)
    return Quality(
        max_over_mean=max_over_mean,
        bound=float(max(1.0, costs.max() / mean)) if mean else 1.0,
        idle=1 - 1 / max_over_mean,
        min_samples=int(samples.min()),
        max_samples=int(samples.max()),
        max_tokens=int(np.bincount(ranks, lengths, num_ranks).max()),
        empty_ranks=int((samples == 0).sum()),
        moved=0.0 if sources is None or not len(ranks) else float((sources != ranks).mean()),
        length_mixing=_reduced_chi_squared(ranks, classes),
        source_mixing=1.0 if sources is None else _reduced_chi_squared(ranks, sources),
    )


def _reduced_chi_squared(rows: np.ndarray, columns: np.ndarray) -> float:
    """χ² / degrees of freedom of two labellings' independence; 1 where there is nothing to tell."""
    _, row = np.unique(rows, return_inverse=True)
    _, column = np.unique(columns, return_inverse=True)
    if not len(rows) or not row.max() * column.max():
        return 1.0
    shape = int(row.max()) + 1, int(column.max()) + 1
    table = np.bincount(row * shape[1] + column, minlength=shape[0] * shape[1]).reshape(shape)
    expected = np.outer(table.sum(axis=1), table.sum(axis=0)) / len(rows)
    freedom = (shape[0] - 1) * (shape[1] - 1)
    return float(((table - expected) ** 2 / expected).sum() / freedom)
