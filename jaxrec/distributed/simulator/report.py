"""From lengths to bubbles: batches are drawn up, steps simulated, and idle time accounted for."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

from jaxrec.distributed import balance
from jaxrec.distributed.simulator.constants import MachineConstants, ModelConstants
from jaxrec.distributed.simulator.engine import Simulation, Timeline
from jaxrec.distributed.simulator.step import Mechanisms, RankLoads, TrainingProgram

USEFUL = {"forward", "backward", "lookup", "early lookup", "row update", "deferred row update",
          "dense update"}  # fmt: skip
"""Ops that training consists of, whatever the mechanisms; all else is overhead."""
WARM_UP = 2


@dataclass(frozen=True)
class Report:
    """Steady-state figures of a simulated run; times in seconds a step, mean over ranks.

    The parts of the bubble add up to `bubble_seconds`.

    Attributes:
      step_seconds: wall time.
      useful_seconds: work of training at full speed.
      straggler_seconds: waiting at a collective that others had not reached.
      exposed_seconds: waiting for communication under way.
      sm_tax_seconds: work made slower by communication on the SMs.
      overhead_seconds: work that only the mechanisms need, and waits for host and copies.
      samples_per_second: of all ranks.
      max_over_mean: of the ranks' compute, mean over the steps.
    """

    step_seconds: float
    useful_seconds: float
    straggler_seconds: float
    exposed_seconds: float
    sm_tax_seconds: float
    overhead_seconds: float
    samples_per_second: float
    max_over_mean: float

    @property
    def bubble_seconds(self) -> float:
        """Time of a step in which a rank does no useful work."""
        return self.step_seconds - self.useful_seconds

    @property
    def bubble(self) -> float:
        """The bubble's share of the step."""
        return self.bubble_seconds / self.step_seconds

    @property
    def straggler_share(self) -> float:
        """Mean share of the step that ranks wait for others."""
        return self.straggler_seconds / self.step_seconds


def simulate(
    batches: Sequence[Int[np.ndarray, "W B"]],
    machine: MachineConstants,
    model: ModelConstants,
    mechanisms: Mechanisms,
    *,
    plan_cost: balance.CostModel | None = None,
    samples_per_rank: int | None = None,
    seed: int = 0,
) -> Report:
    """Simulates training on consecutive global batches.

    Args:
      batches: lengths of the samples that each rank reads, step by step; i[W, B] each. The first
        two steps and the last warm up and drain, and are not counted.
      plan_cost: what the balancer believes; None for the truth, `model.cost`.
      samples_per_rank: limit of the balancer; None lets numbers vary freely.
      seed: of the jitter.

    Raises:
      ValueError: fewer than five steps.

    Cost: about 15 µs an op; 256 ranks take half a second a step.
    """
    if len(batches) < WARM_UP + 3:
        raise ValueError(f"{len(batches)} steps; expected at least {WARM_UP + 3}")
    rng = np.random.default_rng(seed)
    num_ranks = batches[0].shape[0]
    believed = model.cost if plan_cost is None else plan_cost
    steps = []
    for lengths in batches:
        ranks = np.repeat(np.arange(num_ranks), lengths.shape[1])
        flat = lengths.reshape(-1)
        if mechanisms.balance is not None:
            ranks = balance.assign(
                flat, num_ranks, strategy=mechanisms.balance, cost=believed,
                samples_per_rank=samples_per_rank,
            )  # fmt: skip
        compute = np.bincount(ranks, model.cost.sample_costs(flat), num_ranks)
        compute *= np.exp(machine.jitter * rng.standard_normal(num_ranks))
        tokens = np.bincount(ranks, flat, num_ranks).astype(np.int64)
        steps.append(RankLoads(compute, tokens, len(flat)))
    simulation = Simulation(num_ranks)
    done = TrainingProgram(simulation, machine, model, mechanisms, steps).write()
    return account(simulation, simulation.run(), done, steps)


def account(
    simulation: Simulation,
    timeline: Timeline,
    done: Sequence[Sequence[int]],
    steps: Sequence[RankLoads],
) -> Report:
    """Splits the time between two steps' ends into work, its slowing, and each kind of wait."""
    first, last = WARM_UP - 1, len(steps) - 2
    began, ended = timeline.began.tolist(), timeline.ended.tolist()
    begin = timeline.ended[list(done[first])]
    end = timeline.ended[list(done[last])]
    sums: dict[str, float] = dict.fromkeys(
        ("useful", "straggler", "exposed", "tax", "overhead"), 0.0
    )
    previous_end = begin.tolist()
    for number, op in enumerate(simulation.ops):
        if not op.computes or not done[first][op.rank] < number <= done[last][op.rank]:
            continue
        start, stop = began[number], ended[number]
        waits = _waits(simulation, timeline, number, previous_end[op.rank], start)
        for kind, seconds in waits.items():
            sums[kind] += seconds
        sums["tax"] += stop - start - op.work
        sums["useful" if op.name in USEFUL else "overhead"] += op.work
        previous_end[op.rank] = stop
    count = simulation.num_ranks * (last - first)
    mean = {kind: float(seconds / count) for kind, seconds in sums.items()}
    step_seconds = float((end - begin).mean() / (last - first))
    counted = steps[first + 1 : last + 1]
    return Report(
        step_seconds=step_seconds,
        useful_seconds=mean["useful"],
        straggler_seconds=mean["straggler"],
        exposed_seconds=mean["exposed"],
        sm_tax_seconds=mean["tax"],
        overhead_seconds=mean["overhead"],
        samples_per_second=float(np.mean([s.samples for s in counted])) / step_seconds,
        max_over_mean=float(np.mean([s.compute.max() / s.compute.mean() for s in counted])),
    )


def _waits(
    simulation: Simulation, timeline: Timeline, number: int, idle_from: float, start: float
) -> dict[str, float]:
    """Why a rank's SMs were idle from `idle_from` until op `number` started.

    The wait is laid to the cause that ended last: up to the moment at which all had reached it
    to stragglers, from then on to communication. Before this rank itself reached it, it queued
    behind other communication.
    """
    causes = simulation.ops[number].causes
    if start <= idle_from or not causes:
        return {"overhead": max(0.0, start - idle_from)}
    blamed = max(causes, key=lambda cause: timeline.ended[cause])
    if simulation.ops[blamed].group is None:
        return {"overhead": start - idle_from}
    waited_from = max(idle_from, timeline.arrived[blamed])
    straggling = max(0.0, min(start, timeline.began[blamed]) - waited_from)
    return {"straggler": straggling, "exposed": start - idle_from - straggling}
