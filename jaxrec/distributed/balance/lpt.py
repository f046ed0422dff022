"""Longest processing time first under limits, and a local repair of the heaviest rank."""

import heapq

import numpy as np
from jaxtyping import Int64

from jaxrec.distributed.balance.limits import Problem
from jaxrec.distributed.balance.strategies import longest_first

TOLERANCE = 1e-3
"""Repair ends when no rank is above the mean, or the bound, by more than this share."""
MAX_EXCHANGES = 96
PARTNERS = 8


def longest_processing_time(
    problem: Problem, *, by_tokens: bool = False
) -> Int64[np.ndarray, "N"] | None:
    """Each sample, longest first, to the rank with the least so far that has room for it.

    Args:
      by_tokens: the least tokens instead of the least cost, which fills tight budgets better.

    Returns:
      The rank of each sample; None if one found no room.

    Cost: O(N log W); 4 ms for 8,192 samples on 256 ranks.
    """
    order = longest_first(problem)
    lengths = problem.lengths[order].tolist()
    costs = lengths if by_tokens else problem.costs[order].tolist()
    free = [problem.max_tokens] * problem.num_ranks
    slots = [problem.max_samples] * problem.num_ranks
    open_ranks = [(0, rank) for rank in range(problem.num_ranks)]
    # Ranks whose free tokens are too few for now. Lengths only fall, so each returns when the
    # samples have become short enough, and then gets at least one before it is parked again.
    parked: list[tuple[int, int, int]] = []
    found = []
    for length, cost in zip(lengths, costs, strict=True):
        while parked and -parked[0][0] >= length:
            _, load, rank = heapq.heappop(parked)
            heapq.heappush(open_ranks, (load, rank))
        while open_ranks and free[open_ranks[0][1]] < length:
            load, rank = heapq.heappop(open_ranks)
            heapq.heappush(parked, (-free[rank], load, rank))
        if not open_ranks:
            return None
        load, rank = open_ranks[0]
        found.append(rank)
        free[rank] -= length
        slots[rank] -= 1
        if slots[rank]:
            heapq.heapreplace(open_ranks, (load + cost, rank))
        else:
            heapq.heappop(open_ranks)
    ranks = np.empty(len(order), np.int64)
    ranks[order] = found
    return ranks


def repair(problem: Problem, ranks: Int64[np.ndarray, "N"]) -> Int64[np.ndarray, "N"]:
    """Moves or swaps samples between the heaviest rank and light ones while that helps.

    Every exchange lowers the heaviest load and keeps the limits. It ends within `TOLERANCE` of
    the mean or of the largest sample, when the lightest `PARTNERS` ranks offer nothing, or after
    `MAX_EXCHANGES`.

    Cost: 50 µs an exchange with 32 samples a rank.
    """
    if problem.num_ranks == 1 or not len(ranks):
        return ranks
    ranks = ranks.copy()
    loads = problem.loads(ranks)
    goal = max(int(loads.sum()) / problem.num_ranks, int(problem.costs.max())) * (1 + TOLERANCE)
    for _ in range(MAX_EXCHANGES):
        heavy = int(loads.argmax())
        if loads[heavy] <= goal or not _relieve(problem, ranks, loads, heavy):
            break
    return ranks


def _relieve(problem: Problem, ranks: np.ndarray, loads: np.ndarray, heavy: int) -> bool:
    """Makes the best exchange of the heaviest rank with the first light one that has any."""
    own = np.flatnonzero(ranks == heavy)
    for light in np.argsort(loads, kind="stable")[:PARTNERS].tolist():
        other = np.flatnonzero(ranks == light)
        # Row i, column j: give i for j; the last column gives i for nothing.
        costs, lengths = np.append(problem.costs[other], 0), np.append(problem.lengths[other], 0)
        moved = problem.costs[own, None] - costs
        tokens = problem.lengths[own, None] - lengths
        gap = loads[heavy] - loads[light]
        allowed = (moved > 0) & (moved < gap)
        allowed &= tokens <= problem.max_tokens - problem.lengths[other].sum()
        if len(other) == problem.max_samples:
            allowed[:, -1] = False
        if not allowed.any():
            continue
        misses = np.where(allowed, np.abs(2 * moved - gap), np.iinfo(np.int64).max)
        give, take = np.unravel_index(misses.argmin(), misses.shape)
        ranks[own[give]] = light
        if take < len(other):
            ranks[other[take]] = heavy
        loads[heavy] -= moved[give, take]
        loads[light] += moved[give, take]
        return True
    return False
