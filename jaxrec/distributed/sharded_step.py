"""Training with sharded tables: one jitted step, and what repeats it when an exchange overflows."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxrec.distributed.sharded_embedding import (
    Capacity,
    EmbeddingPlan,
    ExchangeReport,
    Rows,
    ShardedTables,
    TableState,
)
from jaxrec.sharding import replicated
from jaxrec.typing import PyTree

type EmbeddingLoss = Callable[[PyTree, dict[str, jax.Array], Any], tuple[jax.Array, PyTree]]
"""(params, embeddings by feature, batch) → (loss of all devices' examples, anything besides)."""


class ShardedState(NamedTuple):
    """What training with sharded tables carries from step to step.

    Attributes:
      step: updates done; i32 scalar.
      tables: by group; split over devices.
      params: dense weights; on every device.
      opt_state: of the dense weights' optimizer.
    """

    step: jax.Array
    tables: dict[str, TableState]
    params: PyTree
    opt_state: PyTree


class GradientReport(NamedTuple):
    """What was found of a step's gradients; on all devices.

    Attributes:
      norm: of the dense weights' gradient; f32. (The rows' is summed where the rows are kept, in
        part after the step, so nobody has its norm.)
      nonfinite: number of the first leaf, of params and then of the tables' rows by group, whose
        gradient is not finite, or the number of leaves if only the loss is not; -1 if all are. In
        any other case no weight and no row was changed. i32.
    """

    norm: jax.Array
    nonfinite: jax.Array

    @property
    def finite(self) -> jax.Array:
        """Whether all are."""
        return self.nonfinite < 0


class ShardedMetrics(NamedTuple):
    """Results of one step; on all devices.

    Attributes:
      loss, aux: as the loss gave them.
      exchange: whether they count: if it is not ok, the step changed nothing.
      gradients: of this step.
    """

    loss: jax.Array
    aux: PyTree
    exchange: ExchangeReport
    gradients: GradientReport


type Step = Callable[..., tuple[Any, Any]]


def init_sharded_state(
    tables: ShardedTables,
    params: PyTree,
    optimizer: optax.GradientTransformation,
    *,
    key: jax.Array,
) -> ShardedState:
    """The state before the first step; `params` are copied, so they stay usable."""

    def everywhere(tree: PyTree) -> PyTree:
        return jax.device_put(jax.tree.map(jnp.copy, tree), replicated(tables.mesh))

    return ShardedState(
        everywhere(jnp.zeros((), jnp.int32)),
        tables.init(key),
        everywhere(params),
        everywhere(optimizer.init(params)),
    )


def make_sharded_step(
    tables: ShardedTables,
    loss: EmbeddingLoss,
    optimizer: optax.GradientTransformation,
    capacity: Capacity | None = None,
) -> Step:
    """The jitted step (state, ids, batch) → (state, `ShardedMetrics`); the state is donated.

    Args:
      tables: whose optimizers update their rows.
      loss: of the whole batch, all devices' examples, from dense weights and embeddings.
      optimizer: of the dense weights.
      capacity: see `ShardedTables.plan`; `GrowingStep` repeats a step that does not fit.

    Cost: see `jaxrec.distributed.sharded_embedding`.
    """

    def step(state: ShardedState, ids: Mapping[str, Any], batch: Any) -> tuple[Any, Any]:
        plan = tables.plan(ids, capacity)
        rows = tables.lookup(state.tables, plan)
        value, aux, (params, opt_state), d_rows, gradients = dense_step(
            tables, loss, optimizer, (state.params, state.opt_state), rows, plan,
            tables.placed(batch), plan.report.ok,
        )  # fmt: skip
        updated = tables.update(
            state.tables, plan, d_rows, state.step, keep=plan.report.ok & gradients.finite
        )
        new = ShardedState(state.step + plan.report.ok, updated, params, opt_state)
        return new, ShardedMetrics(value, aux, plan.report, gradients)

    return jax.jit(step, donate_argnums=0)


def dense_step(
    tables: ShardedTables,
    loss: EmbeddingLoss,
    optimizer: optax.GradientTransformation,
    dense: tuple[PyTree, PyTree],
    rows: Rows,
    plan: EmbeddingPlan,
    batch: Any,
    ok: jax.Array,
) -> tuple[jax.Array, PyTree, tuple[PyTree, PyTree], Rows, GradientReport]:
    """Loss, aux, next params and optimizer state, gradients of rows and what was found of them.

    Params and their state stay as they were unless ok and all is finite.
    """
    value, aux, pull = dense_forward(tables, loss, dense[0], rows, plan, batch)
    d_params, d_rows = pull(jnp.ones_like(value))
    gradients = inspect_gradients(value, d_params, d_rows)
    new = dense_update(optimizer, dense, d_params, ok & gradients.finite)
    return value, aux, new, d_rows, gradients


def inspect_gradients(value: jax.Array, d_params: PyTree, d_rows: Rows) -> GradientReport:
    """What a step reports of its gradients."""
    leaves = [*jax.tree.leaves(d_params), *jax.tree.leaves(d_rows)]
    bad = jnp.stack([*(~jnp.isfinite(leaf).all() for leaf in leaves), ~jnp.isfinite(value)])
    first = jnp.where(bad.any(), jnp.argmax(bad), -1).astype(jnp.int32)
    return GradientReport(optax.tree.norm(d_params), first)


def dense_forward(
    tables: ShardedTables,
    loss: EmbeddingLoss,
    params: PyTree,
    rows: Rows,
    plan: EmbeddingPlan,
    batch: Any,
) -> tuple[jax.Array, PyTree, Callable[[jax.Array], tuple[PyTree, Rows]]]:
    """Loss, aux, and what gives the gradients of params and rows for that of the loss."""

    def value_of(params: PyTree, rows: Rows) -> tuple[jax.Array, PyTree]:
        return loss(params, tables.embed(rows, plan), batch)

    value, pull, aux = jax.vjp(value_of, params, rows, has_aux=True)
    return value, aux, pull


def dense_update(
    optimizer: optax.GradientTransformation,
    dense: tuple[PyTree, PyTree],
    d_params: PyTree,
    ok: jax.Array,
) -> tuple[PyTree, PyTree]:
    """Next params and optimizer state, as they were unless ok."""
    params, opt_state = dense
    updates, next_opt_state = optimizer.update(d_params, opt_state, params)
    next_params = optax.apply_updates(params, updates)
    return keep_if(ok, (next_params, next_opt_state), (params, opt_state))


def keep_if(ok: jax.Array, new: PyTree, old: PyTree) -> PyTree:
    """`new` if ok, else `old`."""
    return jax.tree.map(lambda a, b: jnp.where(ok, a, b), new, old)


class GrowingStep:
    """Runs steps whose exchange has a fixed capacity, and lets it grow: nothing is ever left out.

    A step that does not fit changes nothing and says what it needs; then the step is compiled for a
    larger capacity and the same batch runs again. Growth is rare: capacity only rises, by an eighth
    beyond what was needed.

        build = lambda capacity: make_sharded_step(tables, loss, optimizer, capacity)
        step = GrowingStep(tables, build, tables.start_capacity(ids))
        state, metrics = step(state, ids, batch)

    Each call waits for the report of its step, some scalars. In a run of several processes all see
    the same report and grow alike.

    Attributes:
      capacity: as it is now.
      retries: steps repeated so far.
      state: what a step that did not count left behind: the state from before it.

    Args:
      tables: whose exchange it is.
      build: the jitted step for a capacity.
      capacity: to begin with, such as `tables.start_capacity(ids)`.
      resize: makes the state, as one step left it, fit a larger capacity; None if nothing in it
        depends on that.
    """

    def __init__(
        self,
        tables: ShardedTables,
        build: Callable[[Capacity], Step],
        capacity: Capacity,
        *,
        resize: Callable[[Any, Capacity], Any] | None = None,
    ):
        self.tables, self.capacity = tables, dict(capacity)
        self.retries = 0
        self.state: Any = None
        self._build, self._resize = build, resize
        self._step = build(self.capacity)

    def __call__(self, state: Any, *batch: Any) -> tuple[Any, Any]:
        """One step of `build`, repeated until it fits.

        Raises:
          IdError: an id is outside its table (`checked` tables only); the state given was donated,
            and what the step left, which is the same, is in `self.state`.
        """
        while True:
            state, metrics = self._step(state, *batch)
            report = metrics.exchange
            if bool(report.ok):
                return state, metrics
            self.state = state
            if self.tables.checked:
                self.tables.raise_strays(report)
            self._grow(report)
            if self._resize is not None:
                state = self._resize(state, self.capacity)

    def _grow(self, report: ExchangeReport) -> None:
        grown = self.tables.grown(self.capacity, report)
        if grown == self.capacity:
            raise RuntimeError(f"a step did not fit though its capacity {grown} suffices")
        self.retries += 1
        self.capacity = grown
        self._step = self._build(grown)
