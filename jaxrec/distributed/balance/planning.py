"""The plan of a global batch: which rank gets which sample, and in which order."""

from typing import Literal, NamedTuple, get_args

import numpy as np
from jaxtyping import Int, Int32

from jaxrec.distributed.balance import strategies
from jaxrec.distributed.balance.cost import HSTU_H100, CostModel
from jaxrec.distributed.balance.limits import Problem, make_problem
from jaxrec.distributed.balance.lpt import longest_processing_time, repair
from jaxrec.distributed.balance.quality import Quality, measure

type Strategy = Literal["lpt", "karmarkar_karp", "zigzag", "segments", "random"]
type Order = Literal["given", "longest_first", "interleaved"]


def assign(
    lengths: Int[np.ndarray, "N"],
    num_ranks: int,
    *,
    strategy: Strategy = "lpt",
    cost: CostModel = HSTU_H100,
    samples_per_rank: int | None = None,
    token_budget: int | None = None,
    seed: int = 0,
) -> Int32[np.ndarray, "N"]:
    """The rank of each sample.

    - `lpt`: longest first to the least loaded rank with room, then a local repair; never worse
      than `karmarkar_karp` where that keeps the limits. Ranks get different numbers of samples.
    - `karmarkar_karp`: largest differencing, as verl and recsys-examples; equal numbers.
    - `zigzag`: sorted and dealt to and fro, FreeScale's fixed batch size; equal numbers.
    - `segments`: neighbours, cut at equal cost, FreeScale's variable batch size.
    - `random`: shuffled with `seed`; equal numbers.

    Only `lpt` arranges itself with the limits; the others are as they are, and refused where they
    break one. With fewer samples than ranks, or few long ones, some ranks get none.

    Args:
      lengths: tokens of each sample of the global batch, from 0.
      num_ranks: W.
      strategy: see above.
      cost: what is balanced.
      samples_per_rank: the most samples of a rank; None for no limit. N / W forces equal
        numbers; a quarter more is nearly as good as no limit.
      token_budget: the most tokens of a rank; None for no limit.
      seed: of `random`.

    Raises:
      ValueError: a sample longer than `token_budget` (named), more samples or tokens than all
        ranks have room for, a strategy that breaks a limit, or no way found to keep both limits.

    Cost: O(N log N); 8,192 samples on 256 ranks take under 20 ms on one core.
    """
    problem = make_problem(lengths, num_ranks, cost, samples_per_rank, token_budget)
    if not len(lengths):
        return np.zeros(0, np.int32)
    if strategy == "lpt":
        return _within_limits(problem).astype(np.int32)
    if strategy == "random":
        ranks = strategies.random(problem, seed)
    elif strategy in get_args(Strategy.__value__):
        ranks = getattr(strategies, strategy)(problem)
    else:
        known = ", ".join(get_args(Strategy.__value__))
        raise ValueError(f"unknown strategy {strategy!r}; expected one of {known}")
    broken = problem.overfull(ranks)
    if broken:
        raise ValueError(f"with strategy {strategy!r} {broken}; raise the limit or use 'lpt'")
    return ranks.astype(np.int32)


def _within_limits(problem: Problem) -> np.ndarray:
    """The best of the greedy assignments that keep the limits, repaired."""
    candidates = [longest_processing_time(problem), strategies.karmarkar_karp(problem)]
    kept = [ranks for ranks in candidates if ranks is not None and not problem.overfull(ranks)]
    if not kept:
        fallback = longest_processing_time(problem, by_tokens=True)
        if fallback is None:
            room = problem.num_ranks * problem.max_tokens
            raise ValueError(
                f"found no way to keep {problem.max_samples} samples and {problem.max_tokens} "
                f"tokens on each of {problem.num_ranks} ranks: the {len(problem.lengths)} samples "
                f"would fill {problem.lengths.sum() / room:.1%} of all token slots; raise a limit"
            )
        kept = [fallback]
    best = min(kept, key=lambda ranks: int(problem.loads(ranks).max()))
    return repair(problem, best)


class Plan(NamedTuple):
    """An assignment with the order of samples on their ranks.

    Attributes:
      ranks: of each sample; i32[N].
      order: sample numbers, rank after rank; i32[N].
      offsets: rank r has order[offsets[r] : offsets[r + 1]]; i32[W + 1].
      quality: figures of the assignment.
    """

    ranks: Int32[np.ndarray, "N"]
    order: Int32[np.ndarray, "N"]
    offsets: Int32[np.ndarray, "W1"]
    quality: Quality

    def samples_of(self, rank: int) -> Int32[np.ndarray, "_"]:
        """The samples of a rank, in order."""
        return self.order[self.offsets[rank] : self.offsets[rank + 1]]


def plan(
    lengths: Int[np.ndarray, "N"],
    num_ranks: int,
    *,
    strategy: Strategy = "lpt",
    cost: CostModel = HSTU_H100,
    samples_per_rank: int | None = None,
    token_budget: int | None = None,
    order: Order = "longest_first",
    sources: Int[np.ndarray, "N"] | None = None,
    seed: int = 0,
) -> Plan:
    """`assign`, with an order within each rank and the quality of the whole.

    Args:
      order: "given" keeps the samples' order; "longest_first" lets kernels that take a block a
        sequence end with short ones; "interleaved" goes on from the longest with the shortest,
        the second longest and so on, so that parts of the batch (micro-batches) weigh alike.
      sources: the rank that each sample was read on, for `Quality`.

    Raises:
      ValueError: an unknown order; else as `assign`.
    """
    ranks = assign(
        lengths,
        num_ranks,
        strategy=strategy,
        cost=cost,
        samples_per_rank=samples_per_rank,
        token_budget=token_budget,
        seed=seed,
    )
    offsets = np.concatenate([[0], np.cumsum(np.bincount(ranks, minlength=num_ranks))])
    quality = measure(lengths, ranks, num_ranks, cost=cost, sources=sources)
    ordered = _ordered(lengths, ranks, offsets, order)
    return Plan(ranks, ordered.astype(np.int32), offsets.astype(np.int32), quality)


def _ordered(
    lengths: np.ndarray, ranks: np.ndarray, offsets: np.ndarray, order: Order
) -> np.ndarray:
    if order == "given":
        return np.argsort(ranks, kind="stable")
    by_length = np.lexsort((-lengths, ranks))
    if order == "longest_first":
        return by_length
    if order != "interleaved":
        raise ValueError(
            f"unknown order {order!r}; expected one of {', '.join(get_args(Order.__value__))}"
        )
    starts, sizes = offsets[:-1], np.diff(offsets)
    place = np.arange(len(ranks)) - np.repeat(starts, sizes)
    last = np.repeat(sizes, sizes) - 1
    within = np.where(place % 2, last - place // 2, place // 2)
    return by_length[np.repeat(starts, sizes) + within]
