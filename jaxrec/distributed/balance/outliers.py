"""Samples too long to be balanced: cut, cut in pieces, or held back; never silently lost."""

from typing import Literal, NamedTuple, get_args

import numpy as np
from jaxtyping import Int, Int64

from jaxrec.distributed.balance.cost import HSTU_H100, CostModel

type OutlierPolicy = Literal["cap", "split", "defer"]


class Pieces(NamedTuple):
    """What becomes of samples: piece p is tokens starts[p] up to stops[p] of samples[p].

    Attributes:
      samples: i64[P], rising; every sample has a piece unless it is deferred.
      starts, stops: i64[P].
      deferred: samples held back whole for a later batch; i64[D].
      cut_tokens: tokens that are in no piece and not deferred: lost, by order of the policy.
    """

    samples: Int64[np.ndarray, "P"]
    starts: Int64[np.ndarray, "P"]
    stops: Int64[np.ndarray, "P"]
    deferred: Int64[np.ndarray, "D"]
    cut_tokens: int

    @property
    def lengths(self) -> Int64[np.ndarray, "P"]:
        """Tokens of each piece."""
        return self.stops - self.starts


def treat_outliers(lengths: Int[np.ndarray, "N"], limit: int, policy: OutlierPolicy) -> Pieces:
    """Applies a policy to every sample longer than `limit`; the others stay whole.

    What happens to a sample of L > limit tokens:

    - `cap`: its last `limit` tokens are kept, with their targets. The first L - limit and their
      targets are lost, and counted in `cut_tokens`.
    - `split`: it becomes ⌈L / limit⌉ samples of nearly equal length, in its order. Every token and
      target is kept, but no piece sees the tokens before its own.
    - `defer`: it is left out whole and named in `deferred`. Who calls must bring it back, as
      `BalancedBatches` does once there is one for each rank, and at the end of the data.

    Args:
      lengths: tokens of each sample.
      limit: the most tokens; see `outlier_limit`.

    Raises:
      ValueError: a limit below 1, an unknown policy.
    """
    if limit < 1:
        raise ValueError(f"limit is {limit}; expected at least 1 token")
    lengths = lengths.astype(np.int64)
    everyone = np.arange(len(lengths))
    none = np.zeros(0, np.int64)
    if policy == "cap":
        starts = np.maximum(lengths - limit, 0)
        return Pieces(everyone, starts, lengths, none, int(starts.sum()))
    if policy == "defer":
        kept = np.flatnonzero(lengths <= limit)
        held = np.flatnonzero(lengths > limit)
        return Pieces(kept, np.zeros(len(kept), np.int64), lengths[kept], held, 0)
    if policy != "split":
        known = ", ".join(get_args(OutlierPolicy.__value__))
        raise ValueError(f"unknown policy {policy!r}; expected one of {known}")
    counts = np.maximum(-(-lengths // limit), 1)
    samples = np.repeat(everyone, counts)
    place = np.arange(len(samples)) - np.repeat(np.cumsum(counts) - counts, counts)
    whole, parts = lengths[samples], counts[samples]
    return Pieces(samples, place * whole // parts, (place + 1) * whole // parts, none, 0)


def outlier_limit(
    lengths: Int[np.ndarray, "N"],
    num_ranks: int,
    policy: OutlierPolicy,
    *,
    cost: CostModel = HSTU_H100,
    max_over_mean: float | int = 1.0,
) -> int:
    """The longest length that still allows a `max_over_mean`: longer samples are outliers.

    A sample that costs more than `max_over_mean` times the mean rank makes every plan worse than
    that. The mean is that of what the policy leaves, which costs less than the whole samples
    did, so the limit is lowered until it holds. Where no sample is too long, or no limit helps
    since there are too few samples for so many ranks, it is the longest length there is.

    Raises:
      ValueError: no sample, or `max_over_mean` below 1.
    """
    if not len(lengths):
        raise ValueError("a batch without samples has no outliers")
    if not max_over_mean >= 1:
        raise ValueError(f"max_over_mean is {max_over_mean}; expected 1 or more")
    longest = max(1, int(lengths.max()))
    costs = cost.sample_costs(np.arange(longest + 1))
    limit = longest
    while limit >= 1:
        left = treat_outliers(lengths, limit, policy).lengths
        mean = costs[left].sum() / num_ranks
        allowed = int(np.searchsorted(costs, max_over_mean * mean, side="right")) - 1
        if allowed >= limit:
            return limit
        limit = allowed
    return longest
