"""Prioritised exchange: rows that two successive batches do not share travel beneath computation.

Step n trains on batch n and knows the ids of batch n + 1. The owner of each row compares the two:

    late rows of n        named by n - 1 as well: read after its update, so before anything else
    early rows of n + 1   not named by n: read, and sent, while n computes
    late gradients of n   rows that n + 1 names as well: sent and applied at the end of step n
    deferred gradients    the other rows of n: sent while n + 1 computes

so that only late rows and late gradients are waited for. Each row is updated once a batch by the
sum of all its gradients, always before it is read again: results are those of the plain step.

One jitted program holds a whole step. Deferred gradients travel beside the forward pass, behind the
late rows, and are applied after it; then the next batch's early rows are read and travel beside the
backward pass, and late gradients wait for them. Barriers say so: with no dependency at all the
scheduler moves both exchanges behind the computation, one after the other. Compiled for H200s with
`XlaOptions()`, both travel beneath matrix products that take longer, on 8 devices and on 256
(`Schedule` reads it, `python -m experiments.overlap_report` draws it).

    pipeline = PrioritizedStep(tables, loss, optimizer)
    state = pipeline.start(sharded_state, *batches[0])
    for ids, batch in batches[1:]:
        state, metrics = pipeline(state, ids, batch)     # trains on the batch before
    sharded_state, metrics = pipeline.finish(state)      # trains on the last

Letters: S devices, C and L places of a box for all rows and for late ones, D width, R rows of an
owner, P = S · C.

Bytes that a device sends each step, for each group of tables:

    beneath computation   4 · P (row numbers) + P (marks) + 2 · D · itemsize · P
    waited for            2 · D · itemsize · S · L

against 4 · P + 2 · D · itemsize · P waited for in the plain step. Memory beyond the plain step's:
rows, gradients and plan of one batch, and two bitmaps of R bytes.

Source: FreeScale (arXiv 2604.24073); TorchRec's PEC pipeline has the same order of events.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from jaxrec.distributed.late_exchange import (
    LATE,
    Ahead,
    Deferred,
    LateExchange,
    Traffic,
    without_late,
)
from jaxrec.distributed.sharded_embedding import Capacity, ExchangeReport, ShardedTables
from jaxrec.distributed.sharded_step import (
    EmbeddingLoss,
    GradientReport,
    GrowingStep,
    ShardedMetrics,
    ShardedState,
    dense_forward,
    dense_step,
    dense_update,
    inspect_gradients,
    keep_if,
)
from jaxrec.typing import PyTree


class PipelineState(NamedTuple):
    """What a prioritised step carries to the next."""

    state: ShardedState
    ahead: Ahead
    deferred: Deferred


class PrioritizedMetrics(NamedTuple):
    """Results of one step; on all devices.

    Attributes:
      loss, aux: of the batch trained on.
      exchange: of the batch ahead; where it is not ok the step changed nothing. `needed` tells of
        late places as well.
      gradients: of the batch trained on.
      traffic: see there; late rows and deferred gradients are those sent in this step, early rows
        and late gradients likewise.
    """

    loss: jax.Array
    aux: PyTree
    exchange: ExchangeReport
    gradients: GradientReport
    traffic: Traffic


class PrioritizedStep:
    """Training steps whose exchange is split into early and late; see the module.

    The capacity grows as `GrowingStep` lets it grow: what does not fit is repeated.

    Args:
      tables, loss, optimizer: as for `make_sharded_step`.
      capacity: C by group, and L with `LATE` behind the group's name; None guesses from the first
        batch, L a quarter of C.
    """

    def __init__(
        self,
        tables: ShardedTables,
        loss: EmbeddingLoss,
        optimizer: optax.GradientTransformation,
        capacity: Capacity | None = None,
    ):
        self.tables, self._loss, self._optimizer = tables, loss, optimizer
        self._exchange = LateExchange(tables)
        self._first = capacity
        self._begin = jax.jit(self._exchange.begin, static_argnums=3)
        self._growing: GrowingStep | None = None
        self._finish = jax.jit(self._last_step, donate_argnums=0)
        self._settle = jax.jit(self._without_ahead, donate_argnums=0)

    @property
    def capacity(self) -> dict[str, int]:
        """C and L by group, as they are now; empty before the start."""
        return {} if self._growing is None else self._growing.capacity

    @property
    def retries(self) -> int:
        """Steps repeated with a larger capacity."""
        return 0 if self._growing is None else self._growing.retries

    @property
    def state_left(self) -> Any:
        """The state that a step which raised left behind: that from before it."""
        return None if self._growing is None else self._growing.state

    def start(self, state: ShardedState, ids: Mapping[str, Any], batch: Any) -> PipelineState:
        """Fetches the first batch; trains on nothing.

        Args:
          state: belongs to the pipeline from now on, which donates it.
          ids, batch: of the same shapes in all batches; as for `make_sharded_step`.

        Raises:
          IdError: an id is outside its table (`checked` tables only).
        """
        capacity = self._start_capacity(ids)
        while True:
            sizes = tuple(without_late(capacity).items())
            ahead, deferred = self._begin(state.tables, ids, batch, sizes)
            report = ahead.plan.report
            if bool(report.ok):
                break
            if self.tables.checked:
                self.tables.raise_strays(report)
            capacity = capacity | self.tables.grown(without_late(capacity), report)
        if capacity != self.capacity:
            self._growing = GrowingStep(self.tables, self.build, capacity, resize=self._resized)
        return PipelineState(state, ahead, deferred)

    def fetch(self, state: ShardedState, ids: Mapping[str, Any], batch: Any) -> PipelineState:
        """What `start` does for the capacity as given, whether the batch fits or not; traceable."""
        sizes = tuple(without_late(self._start_capacity(ids)).items())
        return PipelineState(state, *self._exchange.begin(state.tables, ids, batch, sizes))

    def __call__(
        self, carry: PipelineState, ids: Mapping[str, Any], batch: Any
    ) -> tuple[PipelineState, PrioritizedMetrics]:
        """Trains on the batch that was given before, and fetches this one; the carry is donated.

        Raises:
          RuntimeError: before `start`.
          IdError: an id of this batch is outside its table (`checked` tables only); nothing was
            trained, and `state_left` is the carry as it was.
        """
        if self._growing is None:
            raise RuntimeError("a prioritised step begins with start(state, ids, batch)")
        return self._growing(carry, ids, batch)

    def finish(self, carry: PipelineState) -> tuple[ShardedState, ShardedMetrics]:
        """Trains on the last batch and applies all that is deferred; the carry is donated."""
        return self._finish(*carry)

    def settle(self, carry: PipelineState) -> ShardedState:
        """Applies all that is deferred and forgets the batch ahead; the carry is donated.

        For a checkpoint or an evaluation: training goes on with `start` and the batch that was
        ahead, and the results are the same, to the bit.
        """
        return self._settle(carry)

    def build(self, capacity: Capacity) -> Callable[..., tuple[Any, Any]]:
        """The jitted step for a capacity, which `__call__` runs."""
        return jax.jit(
            lambda carry, ids, batch: self._one_step(carry, ids, batch, capacity), donate_argnums=0
        )

    def _one_step(
        self, carry: PipelineState, ids: Mapping[str, Any], batch: Any, capacity: Capacity
    ) -> tuple[PipelineState, PrioritizedMetrics]:
        (state, ahead, deferred), parts = carry, self._exchange
        limits = {name: capacity[name + LATE] for name in self.tables.groups}
        # Waited for: rows that the step before updated.
        rows, tables = parts.with_late(state.tables, ahead, limits)
        plan = self.tables.plan(ids, without_late(capacity))
        marks, needed = parts.marks(ahead.plan, plan)
        report = parts.report(plan.report, needed, capacity)
        # Beside the forward pass, on the link behind the late rows: the batch before's gradients.
        rows, deferred = lax.optimization_barrier((rows, deferred))
        received = parts.send_deferred(deferred)
        value, aux, pull = dense_forward(
            self.tables, self._loss, state.params, rows, ahead.plan, ahead.batch
        )
        value, received = lax.optimization_barrier((value, received))
        tables = parts.apply_deferred(tables, received, deferred, report.ok, state.step - 1)
        early, tables = parts.early(tables, plan, marks)
        # Beside the backward pass, which begins when they are read: the next batch's early rows.
        one, tables = lax.optimization_barrier((jnp.ones_like(value), tables))
        d_params, d_rows = pull(one)
        early, d_rows = lax.optimization_barrier((early, d_rows))
        gradients = inspect_gradients(value, d_params, d_rows)
        keep = report.ok & gradients.finite
        params, opt_state = dense_update(
            self._optimizer, (state.params, state.opt_state), d_params, keep
        )
        # Waited for: gradients of rows that the next step reads.
        tables, rest = parts.apply_late(tables, ahead.plan, marks, d_rows, limits, keep, state.step)
        owner_late = {name: mark.owner_second for name, mark in marks.items()}
        asker_late = {name: mark.asker_second for name, mark in marks.items()}
        following = Ahead(plan, self.tables.placed(batch), early, owner_late, asker_late)
        following, rest = keep_if(report.ok, (following, rest), (ahead, deferred))
        new = ShardedState(state.step + report.ok, tables, params, opt_state)
        traffic = parts.traffic(ahead, deferred, plan, marks)
        metrics = PrioritizedMetrics(value, aux, report, gradients, traffic)
        return PipelineState(new, following, rest), metrics

    def _last_step(
        self, state: ShardedState, ahead: Ahead, deferred: Deferred
    ) -> tuple[ShardedState, ShardedMetrics]:
        parts = self._exchange
        ok = ahead.plan.report.ok
        limits = {name: late.shape[2] for name, late in ahead.owner_late.items()}
        rows, tables = parts.with_late(state.tables, ahead, limits)
        received = parts.send_deferred(deferred)
        tables = parts.apply_deferred(tables, received, deferred, ok, state.step - 1)
        value, aux, (params, opt_state), d_rows, gradients = dense_step(
            self.tables, self._loss, self._optimizer, (state.params, state.opt_state),
            rows, ahead.plan, ahead.batch, ok,
        )  # fmt: skip
        tables = self.tables.update(
            tables, ahead.plan, d_rows, state.step, keep=ok & gradients.finite
        )
        new = ShardedState(state.step + 1, tables, params, opt_state)
        return new, ShardedMetrics(value, aux, ahead.plan.report, gradients)

    def _without_ahead(self, carry: PipelineState) -> ShardedState:
        state, _, deferred = carry
        received = self._exchange.send_deferred(deferred)
        tables = self._exchange.apply_deferred(
            state.tables, received, deferred, jnp.bool_(True), state.step - 1
        )
        return state._replace(tables=tables)

    def _resized(self, carry: PipelineState, capacity: Capacity) -> PipelineState:
        resize = jax.jit(lambda ahead, late: self._exchange.resized(ahead, late, capacity))
        return PipelineState(carry.state, *resize(carry.ahead, carry.deferred))

    def _start_capacity(self, ids: Mapping[str, Any]) -> dict[str, int]:
        if self._growing is not None:
            return self._growing.capacity
        if self._first is not None:
            return dict(self._first)
        whole = self.tables.start_capacity(ids)
        return whole | {name + LATE: -(-size // 4) for name, size in whole.items()}
