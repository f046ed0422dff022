"""Assignments that know nothing of limits; all return i64[N], the rank of each sample."""

import heapq

import numpy as np
from jaxtyping import Int64

from jaxrec.distributed.balance.limits import Problem

type Ranks = Int64[np.ndarray, "N"]


def random(problem: Problem, seed: int) -> Ranks:
    """Shuffled and dealt out: as equal in number as can be, whatever they cost."""
    ranks = np.arange(len(problem.lengths)) % problem.num_ranks
    np.random.default_rng(seed).shuffle(ranks)
    return ranks


def zigzag(problem: Problem) -> Ranks:
    """Longest first, dealt to the ranks to and fro: 0 1 2 2 1 0 0 1 2 …; equal in number.

    Source: FreeScale's fixed batch size (arXiv 2604.24073); also known as snake.
    """
    ways = np.arange(problem.num_ranks)
    to_and_fro = np.concatenate([ways, ways[::-1]])
    ranks = np.empty(len(problem.lengths), np.int64)
    ranks[longest_first(problem)] = np.resize(to_and_fro, len(ranks))
    return ranks


def segments(problem: Problem) -> Ranks:
    """The samples as they stand, cut where the running cost passes each W-th of the total.

    Batches vary in size, neighbours stay together, and no sample needs to be compared with
    another. A sample belongs to the segment that its middle lies in.

    Source: FreeScale's variable batch size, with the cost model for its weight L^α.
    """
    middles = np.cumsum(problem.costs) - problem.costs // 2
    total = max(1, int(problem.costs.sum()))
    # Float division would round the same everywhere; integers cannot surprise at all.
    ranks = middles // -(-total // problem.num_ranks)
    return np.clip(ranks, 0, problem.num_ranks - 1)


def karmarkar_karp(problem: Problem) -> Ranks:
    """Largest differencing with equal numbers of samples a rank (± 1 where W does not divide N).

    Groups of W samples of like cost are partial solutions; the two with the widest spread are
    merged, the heaviest part of one with the lightest of the other, until one is left. It is
    what verl and NVIDIA's recsys-examples balance with.

    Cost: N/W merges of W parts; 1 ms for 8,192 samples on 256 ranks.
    """
    width, count = problem.num_ranks, len(problem.lengths)
    order = longest_first(problem)
    order = np.concatenate([order, np.full(-count % width, count)])  # the last group's gaps
    costs = np.append(problem.costs, 0)
    heap = []
    for start in range(0, len(order), width):
        members = order[start : start + width, None]
        loads = costs[members[:, 0]]
        heap.append((int(loads[-1] - loads[0]), start, loads, members))
    heapq.heapify(heap)
    while len(heap) > 1:
        _, tie, loads, members = heapq.heappop(heap)
        _, _, others, other_members = heapq.heappop(heap)
        loads = loads + others[::-1]
        members = np.concatenate([members, other_members[::-1]], axis=1)
        heaviest_first = np.argsort(-loads, kind="stable")
        loads, members = loads[heaviest_first], members[heaviest_first]
        heapq.heappush(heap, (int(loads[-1] - loads[0]), tie, loads, members))
    ranks = np.empty(count + 1, np.int64)
    for _, _, _, members in heap:
        ranks[members] = np.arange(width)[:, None]
    return ranks[:count]


def longest_first(problem: Problem) -> Int64[np.ndarray, "N"]:
    """Sample numbers by falling length (and so cost); equal ones in their order."""
    return np.argsort(-problem.lengths, kind="stable")
