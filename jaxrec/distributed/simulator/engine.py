"""Discrete events: ops that wait for each other, queue for resources and slow each other down."""

import heapq
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64

COMPUTE = "compute"
"""The resource whose ops run on the SMs, and are slowed by communication that takes SMs."""


@dataclass(slots=True)
class _Op:
    name: str
    rank: int
    work: float
    computes: bool
    queues: "tuple[deque[int], ...]"
    sms: float
    group: "_Group | None"
    waiting: int = 0
    followers: list[int] = field(default_factory=list)
    causes: tuple[int, ...] = ()


@dataclass(slots=True)
class _Group:
    members: list[int]
    arrived: int = 0


class Timeline(NamedTuple):
    """When each op came to the head of its queues, began and ended; seconds, by op number.

    Attributes:
      arrived: its causes were done and its resources free; a collective then waits for others.
      began: it started to make progress.
      ended: it was done.
    """

    arrived: Float64[np.ndarray, "O"]
    began: Float64[np.ndarray, "O"]
    ended: Float64[np.ndarray, "O"]


class Simulation:
    """Ops of W ranks, in program order, and the events that they lead to.

    - An op starts when its causes have ended and it is first in the queue of every resource that
      it uses; queues are in the order of `add`, as streams and copy engines are.
    - A collective is one op on every rank. It starts when all are ready, and ends for all at
      once. Ranks that wait for others hold their resources, as kernels that spin do.
    - Work on `COMPUTE` advances at the rate 1 - Σ sms of what has arrived on that rank.

    Deterministic. Cost: O(log) an event; about 10 µs an op.
    """

    def __init__(self, num_ranks: int):
        if num_ranks < 1:
            raise ValueError(f"num_ranks is {num_ranks}; expected at least 1")
        self.num_ranks = num_ranks
        self.ops: list[_Op] = []
        self._queues: dict[tuple[int, str], deque[int]] = {}
        self._played = False

    def add(
        self,
        name: str,
        rank: int,
        seconds: float,
        uses: Sequence[str],
        after: Sequence[int] = (),
        *,
        sms: float = 0.0,
    ) -> int:
        """Appends an op to a rank's program; returns its number.

        Args:
          seconds: on a rank that does nothing else.
          uses: resources held from arrival to end.
          after: ops that must end first.
          sms: share of the rank's SMs taken from its compute while this op is there.

        Raises:
          ValueError: a negative time, a share outside 0 … 1, or an op after one not yet added.
        """
        return self._append(name, rank, seconds, uses, after, sms, None)

    def add_collective(
        self,
        name: str,
        seconds: float,
        uses: Sequence[str],
        after: Sequence[Sequence[int]],
        *,
        sms: float = 0.0,
    ) -> list[int]:
        """Appends one op on every rank that start and end together; returns their numbers.

        Args:
          after: for each rank, the ops that must end first there.

        Raises:
          ValueError: as `add`, or causes for another number of ranks.
        """
        if len(after) != self.num_ranks:
            raise ValueError(f"causes for {len(after)} ranks; expected {self.num_ranks}")
        group = _Group([])
        for rank, causes in enumerate(after):
            group.members.append(self._append(name, rank, seconds, uses, causes, sms, group))
        return group.members

    def _append(self, name, rank, seconds, uses, after, sms, group) -> int:
        number = len(self.ops)
        if not 0 <= seconds < float("inf") or not 0 <= sms < 1:
            raise ValueError(f"{name}: {seconds} seconds and {sms} of the SMs")
        if any(not 0 <= cause < number for cause in after):
            raise ValueError(f"{name} comes after an op that was not added before it")
        queues = tuple(self._queues.setdefault((rank, use), deque()) for use in uses)
        op = _Op(name, rank, float(seconds), COMPUTE in uses, queues, sms, group)
        op.causes = tuple(after)
        self.ops.append(op)
        for queue in queues:
            queue.append(number)
        for cause in op.causes:
            self.ops[cause].followers.append(number)
        op.waiting = len(op.causes)
        return number

    def run(self) -> Timeline:
        """Plays all events.

        Ops wait only for what was added before them, so there is always one that can go on.

        Raises:
          RuntimeError: it was run before.
        """
        if self._played:
            raise RuntimeError("a simulation can be run once; make another with the same ops")
        self._played = True
        return _Run(self).play()


class _Run:
    """The state between events; see `Simulation`."""

    def __init__(self, simulation: Simulation):
        self.ops = simulation.ops
        count = len(self.ops)
        # Lists, since reading single elements of arrays is slow; -1 is "not yet".
        self.arrived, self.began, self.ended = ([-1.0] * count for _ in range(3))
        self.taken = [0.0] * simulation.num_ranks  # share of the SMs that communication has
        self.computing: list[int | None] = [None] * simulation.num_ranks
        self.left = [0.0] * simulation.num_ranks  # seconds at full rate
        self.since = [0.0] * simulation.num_ranks
        self.version = [0] * simulation.num_ranks
        self.events: list[tuple[float, int, int, int]] = []
        self.ties = 0

    def play(self) -> Timeline:
        for number in range(len(self.ops)):
            self.try_to_arrive(number, 0.0)
        while self.events:
            now, _, number, version = heapq.heappop(self.events)
            rank = self.ops[number].rank
            if version >= 0 and (version != self.version[rank] or self.computing[rank] != number):
                continue  # its rate has changed since; a later event ends it
            group = self.ops[number].group
            for member in group.members if group else [number]:
                self.end(member, now)
        return Timeline(*(np.array(times) for times in (self.arrived, self.began, self.ended)))

    def try_to_arrive(self, number: int, now: float) -> None:
        op = self.ops[number]
        if op.waiting or self.arrived[number] >= 0:
            return
        for queue in op.queues:
            if queue[0] != number:
                return
        self.arrived[number] = now
        if op.sms:
            self.take_sms(op.rank, op.sms, now)
        group = op.group
        if group is None:
            self.begin(number, now)
            return
        group.arrived += 1
        if group.arrived == len(group.members):
            for member in group.members:
                self.began[member] = now
            self.push(now + op.work, number, -1)

    def begin(self, number: int, now: float) -> None:
        op = self.ops[number]
        self.began[number] = now
        if not op.computes:
            self.push(now + op.work, number, -1)
            return
        rank = op.rank
        self.computing[rank], self.left[rank], self.since[rank] = number, op.work, now
        self.schedule_end(rank, now)

    def schedule_end(self, rank: int, now: float) -> None:
        number = self.computing[rank]
        assert number is not None
        self.version[rank] += 1
        rate = max(1.0 - self.taken[rank], 1e-3)
        self.push(now + self.left[rank] / rate, number, self.version[rank])

    def take_sms(self, rank: int, share: float, now: float) -> None:
        """Changes what communication has of a rank's SMs, and with it the speed of its compute."""
        if self.computing[rank] is not None:
            rate = max(1.0 - self.taken[rank], 1e-3)
            self.left[rank] -= (now - self.since[rank]) * rate
            self.since[rank] = now
        self.taken[rank] = max(0.0, self.taken[rank] + share)
        if self.computing[rank] is not None:
            self.schedule_end(rank, now)

    def end(self, number: int, now: float) -> None:
        op = self.ops[number]
        self.ended[number] = now
        if self.computing[op.rank] == number:
            self.computing[op.rank] = None
        if op.sms:
            self.take_sms(op.rank, -op.sms, now)
        heads = []
        for queue in op.queues:
            queue.popleft()
            if queue:
                heads.append(queue[0])
        for follower in op.followers:
            self.ops[follower].waiting -= 1
        for candidate in (*heads, *op.followers):
            self.try_to_arrive(candidate, now)

    def push(self, time: float, number: int, version: int) -> None:
        self.ties += 1
        heapq.heappush(self.events, (time, self.ties, number, version))
