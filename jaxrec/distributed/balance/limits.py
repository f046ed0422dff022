"""What a rank has room for, and the integers in which costs are added up."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Int, Int64

from jaxrec.distributed.balance.cost import CostModel

UNBOUNDED = np.iinfo(np.int64).max
UNITS = 1e11
"""Integer cost of the costliest sample; 90 million of them still add up without overflow."""


class Problem(NamedTuple):
    """N samples for W ranks.

    Costs are integers, in parts of the largest: sums of them are exact in any order, so that a plan
    does not depend on how some machine adds floating-point numbers.

    Attributes:
      lengths: tokens of each sample; i64[N].
      costs: i64[N]; never less for a longer sample.
      num_ranks: W.
      max_samples: of a rank.
      max_tokens: of a rank.
    """

    lengths: Int64[np.ndarray, "N"]
    costs: Int64[np.ndarray, "N"]
    num_ranks: int
    max_samples: int
    max_tokens: int

    def loads(self, ranks: Int[np.ndarray, "N"]) -> Int64[np.ndarray, "W"]:
        """Cost of each rank."""
        return _sums(ranks, self.costs, self.num_ranks)

    def overfull(self, ranks: Int[np.ndarray, "N"]) -> str:
        """Which limit an assignment breaks, and where; empty if none."""
        tokens = _sums(ranks, self.lengths, self.num_ranks)
        samples = np.bincount(ranks, minlength=self.num_ranks)
        if tokens.max() > self.max_tokens:
            rank = int(tokens.argmax())
            return f"rank {rank} would get {tokens[rank]} tokens, more than {self.max_tokens}"
        if samples.max() > self.max_samples:
            rank = int(samples.argmax())
            return f"rank {rank} would get {samples[rank]} samples, more than {self.max_samples}"
        return ""


def _sums(ranks: np.ndarray, values: np.ndarray, num_ranks: int) -> np.ndarray:
    """Sums of integers by rank, exact (np.bincount would add in floating point)."""
    order = np.argsort(ranks, kind="stable")
    ends = np.cumsum(np.bincount(ranks, minlength=num_ranks))
    totals = np.concatenate([[0], np.cumsum(values[order])])
    return np.diff(totals[np.concatenate([[0], ends])])


def make_problem(
    lengths: Int[np.ndarray, "N"],
    num_ranks: int,
    cost: CostModel,
    samples_per_rank: int | None,
    token_budget: int | None,
) -> Problem:
    """Checks the arguments of `assign`.

    Raises:
      ValueError: see there.
    """
    if num_ranks < 1:
        raise ValueError(f"num_ranks is {num_ranks}; expected at least 1")
    for name, limit in (("samples_per_rank", samples_per_rank), ("token_budget", token_budget)):
        if limit is not None and limit < 1:
            raise ValueError(f"{name} is {limit}; expected None or at least 1")
    if len(lengths) and lengths.min() < 0:
        raise ValueError(f"sample {int(lengths.argmin())} has {lengths.min()} tokens")
    lengths = lengths.astype(np.int64)
    if token_budget is not None and len(lengths):
        longest = int(lengths.argmax())
        if lengths[longest] > token_budget:
            raise ValueError(
                f"sample {longest} has {lengths[longest]} tokens, more than a rank's "
                f"token_budget={token_budget}: cap, split or defer it first "
                "(balance.treat_outliers), or raise the budget"
            )
        if lengths.sum() > num_ranks * token_budget:
            raise ValueError(
                f"{lengths.sum()} tokens do not fit {num_ranks} ranks of "
                f"token_budget={token_budget}"
            )
    if samples_per_rank is not None and len(lengths) > num_ranks * samples_per_rank:
        raise ValueError(
            f"{len(lengths)} samples do not fit {num_ranks} ranks of "
            f"samples_per_rank={samples_per_rank}"
        )
    costs = cost.sample_costs(lengths)
    units = np.rint(costs / (costs.max(initial=0) or 1.0) * UNITS)
    return Problem(
        lengths,
        units.astype(np.int64),
        num_ranks,
        UNBOUNDED if samples_per_rank is None else samples_per_rank,
        UNBOUNDED if token_budget is None else token_budget,
    )
