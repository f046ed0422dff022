"""The ops of a training step, plain and with each of FreeScale's mechanisms.

Plain is TorchRec's sparse pipeline: the next batch's copy and id exchange run beside the current
step, embeddings are looked up and exchanged when their rows are up to date, gradients come back
after backward, and dense gradients are reduced in buckets under backward.

Prioritised (TorchRec's PEC): rows of the next batch that this one does not touch are looked up
and exchanged under backward, gradients of rows that the next batch does not touch are exchanged
under its forward; only the colliding rest waits.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64, Int64

from jaxrec.distributed.balance import Strategy
from jaxrec.distributed.simulator.constants import MachineConstants, ModelConstants
from jaxrec.distributed.simulator.engine import COMPUTE, Simulation

COPY, NETWORK, HOST = "copy engine", "network", "host"
"""`NETWORK` is the NIC and the NVLink ports of a GPU: an exchange uses both at once."""


@dataclass(frozen=True)
class Mechanisms:
    """What is switched on.

    Attributes:
      balance: strategy of `balance.assign`; None leaves samples on the rank that read them.
      prioritised: early lookups and deferred gradients for rows that do not collide.
      sm_free: exchanges by copy engines and NICs; reductions keep their SMs.
    """

    balance: Strategy | None = None
    prioritised: bool = False
    sm_free: bool = False


class RankLoads(NamedTuple):
    """One step's batch, by rank.

    Attributes:
      compute: seconds of forward and backward; f64[W].
      tokens: i64[W].
      samples: of all ranks together.
    """

    compute: Float64[np.ndarray, "W"]
    tokens: Int64[np.ndarray, "W"]
    samples: int


class TrainingProgram:
    """Writes the ops of consecutive steps into a simulation.

    Args:
      steps: loads of every step.
    """

    def __init__(
        self,
        simulation: Simulation,
        machine: MachineConstants,
        model: ModelConstants,
        mechanisms: Mechanisms,
        steps: Sequence[RankLoads],
    ):
        self.simulation, self.machine, self.model = simulation, machine, model
        self.on, self.steps = mechanisms, steps
        self.ranks = range(simulation.num_ranks)
        self.nodes = -(-simulation.num_ranks // machine.gpus_per_node)
        self.ids: dict[int, list[int]] = {}  # step -> its ids are with the owners of their rows
        self.samples: dict[int, list[int]] = {}  # step -> its samples are on their ranks
        self.plans: dict[int, list[int]] = {}
        self.early: dict[int, list[int]] = {}  # step -> rows exchanged a step ahead
        self.deferred: list[int] | None = None  # the last step's gradients of untouched rows

    def write(self) -> list[list[int]]:
        """Adds all steps; returns, for each, the last op of every rank."""
        for step in range(3 if self.on.prioritised else 2):
            self._plan(step)
        self._move_samples(0)
        self._exchange_ids(0)
        if self.on.prioritised:
            self._move_samples(1)
            self._exchange_ids(1)
        done: list[list[int]] = []
        for step in range(len(self.steps)):
            write = self._prioritised_step if self.on.prioritised else self._plain_step
            done.append(write(step, done[-1] if done else None))
        return done

    # Parts of a step.

    def _plain_step(self, step: int, before: list[int] | None) -> list[int]:
        looked_up = self._compute("lookup", self._row_seconds(step), self.ids[step], before)
        rows = self._exchange("row exchange", self._row_bytes(step), looked_up)
        self._plan(step + 2)
        self._move_samples(step + 1)
        self._exchange_ids(step + 1)
        reduced, backward = self._forward_backward(step, [rows])
        gradients = self._exchange("gradient exchange", self._row_bytes(step), backward)
        dense = self._dense_update(reduced)
        return self._compute("row update", self._row_seconds(step), gradients, dense)

    def _prioritised_step(self, step: int, before: list[int] | None) -> list[int]:
        hit = self.model.collisions if step else 0.0  # nothing to collide with in the first
        looked_up = self._compute("lookup", hit * self._row_seconds(step), self.ids[step], before)
        rows = [self._exchange("row exchange", hit * self._row_bytes(step), looked_up)]
        rows.append(self.early.pop(step, None) or self._early_rows(step, looked_up))
        more = step + 1 < len(self.steps)
        masks = self._exchange_masks(step + 1) if more else None
        self._plan(step + 3)
        self._move_samples(step + 2)
        self._exchange_ids(step + 2)
        deferred = None
        if self.deferred is not None:
            late = (1 - self.model.collisions) * self._row_bytes(step - 1)
            deferred = self._exchange("deferred gradients", late, self.deferred)
        reduced, backward = self._forward_backward(step, rows, deferred, masks)
        colliding = self.model.collisions if more else 1.0  # the last step defers nothing
        gradients = self._exchange("gradient exchange", colliding * self._row_bytes(step), backward)
        self.deferred = backward
        dense = self._dense_update(reduced)
        return self._compute("row update", colliding * self._row_seconds(step), gradients, dense)

    def _forward_backward(
        self,
        step: int,
        rows: Sequence[list[int]],
        deferred: list[int] | None = None,
        masks: list[int] | None = None,
    ) -> tuple[list[int], list[int]]:
        """Forward, what may run between, backward in buckets; the last (reduction, backward)."""
        model, compute = self.model, self.steps[step].compute
        forward = self._compute("forward", model.forward_share * compute, *rows)
        if deferred is not None:
            late = (1 - model.collisions) * self._row_seconds(step - 1)
            self._compute("deferred row update", late, deferred)
        if masks is not None:
            early = (1 - model.collisions) * self._row_seconds(step + 1)
            looked_up = self._compute("early lookup", early, masks)
            share = (1 - model.collisions) * self._row_bytes(step + 1)
            self.early[step + 1] = self._exchange("early row exchange", share, looked_up)
        reduced = backward = forward
        for _ in range(model.buckets):
            part = (1 - model.forward_share) / model.buckets
            backward = self._compute("backward", part * compute)
            reduced = self._reduce(
                model.dense_params * model.bytes_per_gradient / model.buckets, backward
            )
        return reduced, backward

    def _early_rows(self, step: int, after: list[int]) -> list[int]:
        """All rows at once, for the first step."""
        return self._exchange("row exchange", self._row_bytes(step), after)

    def _dense_update(self, reduced: list[int]) -> list[int]:
        model = self.model
        seconds = model.dense_params * model.optimizer_bytes / self.machine.hbm + model.per_step
        return self._compute("dense update", np.full(len(self.ranks), seconds), reduced)

    # Preparation of later batches, beside the steps.

    def _plan(self, step: int) -> None:
        """All ranks learn all lengths, and each makes the same plan."""
        if self.on.balance is None or not step < len(self.steps):
            return
        samples = self.steps[step].samples
        gathered = self._collective(
            "length gather", self._transfer_seconds(4.0 * samples), [[] for _ in self.ranks]
        )
        seconds = samples * self.machine.plan_per_sample
        self.plans[step] = [
            self.simulation.add("plan", rank, seconds, (HOST,), (gathered[rank],))
            for rank in self.ranks
        ]

    def _move_samples(self, step: int) -> None:
        """Samples to their ranks, and onto the GPU."""
        if not step < len(self.steps):
            return
        num_bytes = self.steps[step].tokens * self.model.token_bytes
        after: list[list[int]] = [[] for _ in self.ranks]
        if step in self.plans:
            moved = self._exchange("sample exchange", num_bytes, self.plans.pop(step))
            after = [[op] for op in moved]
        self.samples[step] = [
            self.simulation.add(
                "host to device", rank, num_bytes[rank] / self.machine.pcie, (COPY,), after[rank]
            )
            for rank in self.ranks
        ]

    def _exchange_ids(self, step: int) -> None:
        """Ids to the owners of their rows."""
        if step < len(self.steps):
            unique = self.steps[step].tokens * self.model.unique_share
            num_bytes = unique * self.model.id_bytes
            self.ids[step] = self._exchange("id exchange", num_bytes, self.samples.pop(step))

    def _exchange_masks(self, step: int) -> list[int]:
        """Owners mark which rows of a batch collide with this one, and tell who asked."""
        unique = self.steps[step].tokens * self.model.unique_share
        seconds = 2 * unique.mean() * (self.model.id_bytes + self.model.mask_bytes)
        seconds /= self.machine.hbm * self.machine.gather_efficiency
        marked = self._compute("mask", np.full(len(self.ranks), seconds), self.ids[step])
        return self._exchange("mask exchange", 2 * unique * self.model.mask_bytes, marked)

    # Sizes and times.

    def _row_bytes(self, step: int) -> Float64[np.ndarray, "W"]:
        """Bytes of the distinct rows that each rank asks for."""
        model = self.model
        return self.steps[step].tokens * (model.unique_share * model.width * model.bytes_per_value)

    def _row_seconds(self, step: int) -> Float64[np.ndarray, "W"]:
        """Reading rows and writing them to be sent (or the other way about), at their owners.

        Rows are spread over owners by hash, so every owner has the mean.
        """
        mean = self._row_bytes(step).mean()
        seconds = 2 * mean / (self.machine.hbm * self.machine.gather_efficiency)
        return np.full(len(self.ranks), seconds)

    def _transfer_seconds(self, num_bytes: float) -> float:
        """An all-to-all in which the busiest rank sends or receives so many bytes in all.

        Traffic within the node goes over NVLink while that between nodes goes over the NIC.
        """
        machine, count = self.machine, len(self.ranks)
        near = (min(machine.gpus_per_node, count) - 1) / count
        far = max(0, count - machine.gpus_per_node) / count
        seconds = max(num_bytes * near / machine.nvlink, num_bytes * far / machine.nic)
        return seconds + machine.latency + machine.latency_per_node * (self.nodes - 1)

    def _reduce_seconds(self, num_bytes: float) -> float:
        """An all-reduce: within the node, between nodes on an eighth each, within the node."""
        machine, local = self.machine, min(self.machine.gpus_per_node, len(self.ranks))
        seconds = 2 * num_bytes * (local - 1) / local / machine.nvlink
        seconds += 2 * num_bytes / local * (self.nodes - 1) / self.nodes / machine.nic
        return seconds + 2 * (machine.latency + machine.latency_per_node * (self.nodes - 1))

    # Ops of every rank.

    def _compute(
        self, name: str, seconds: Float64[np.ndarray, "W"], *after: list[int] | None
    ) -> list[int]:
        causes = [[ops[rank] for ops in after if ops is not None] for rank in self.ranks]
        return [
            self.simulation.add(name, rank, seconds[rank], (COMPUTE,), causes[rank])
            for rank in self.ranks
        ]

    def _exchange(
        self, name: str, num_bytes: Float64[np.ndarray, "W"], after: list[int]
    ) -> list[int]:
        seconds = self._transfer_seconds(float(num_bytes.max()))
        return self._collective(name, seconds, [[op] for op in after])

    def _collective(self, name: str, seconds: float, after: Sequence[Sequence[int]]) -> list[int]:
        free = self.on.sm_free
        uses = (NETWORK, COPY) if free else (NETWORK,)
        sms = 0.0 if free else self.machine.sm_share
        return self.simulation.add_collective(name, seconds, uses, after, sms=sms)

    def _reduce(self, num_bytes: float, after: list[int]) -> list[int]:
        return self.simulation.add_collective(
            "reduction", self._reduce_seconds(num_bytes), (NETWORK,), [[op] for op in after],
            sms=self.machine.sm_share,
        )  # fmt: skip
