"""Embedding tables split by rows over the devices of a mesh.

    tables = ShardedTables(
        [EmbeddingTable("items", 10_000_000, 64), EmbeddingTable("users", 1_000_000, 64)],
        make_mesh({"data": 8}),
        axis="data",
    )
    state = tables.init(jax.random.key(0))

    @jax.jit
    def step(state, params, ids, batch):
        plan = tables.plan(ids, capacity)                # duplicates out, ids to owners
        rows = tables.lookup(state, plan)                # rows from owners
        def loss(params, rows):
            return model_loss(params, tables.embed(rows, plan), batch)
        d_params, d_rows = jax.grad(loss, argnums=(0, 1))(params, rows)
        return tables.update(state, plan, d_rows), ...   # gradients to owners, rows updated

Gradients are of the rows looked up, never of a table: nothing as large as a table is made.
`make_sharded_step` puts this together with a dense optimizer, `PrioritizedStep` lets the exchange
of the next batch run beside the computation of this one.

Letters: B examples, N ids of a device, S devices, D width, C places in a device's box for one owner
(the capacity), P = S · C, V rows of a table.

Bytes that a device sends each step, for each group of tables (1 / S of them to itself):

    row numbers      4 · S · C
    rows             D · itemsize · S · C
    gradients        D · itemsize · S · C

C need not exceed the different rows that one device asks of one owner: about N / S without
duplicates, fewer with. Without sharding a dense gradient's all-reduce sends 8 · V · D in f32.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int, Int32

from jaxrec.distributed.features import Bags, Feature, Ids, flat_ids, pool, shape_of
from jaxrec.distributed.tables import EmbeddingTable, TableGroup, group_tables
from jaxrec.ops.row_exchange import (
    RowPlan,
    own_gradients,
    plan_rows,
    spread_rows,
    swap_boxes,
)
from jaxrec.ops.row_optimizers import Moments, rate_at
from jaxrec.ops.row_runs import Runs
from jaxrec.ops.row_store import read_rows, update_rows

type Capacity = Mapping[str, int]
type Rows = dict[str, Float[Array, "_ _ _"]]
"""Rows, or their gradients, by group: [S, P, D] each, P and D being the group's own."""


class TableState(NamedTuple):
    """A group's rows and their optimizer's moments, split over devices by rows."""

    rows: Float[Array, "R D"]
    moments: Moments


class ExchangeReport(NamedTuple):
    """What a plan found; the same on all devices.

    Attributes:
      ok: everything fits, and with `checked` tables every id has a row. If not, updates with this
        plan change nothing; i.e. the step may be repeated.
      needed: capacity that suffices, by group; i32.
      rows: different rows asked for by each device, summed over devices; by group; i32.
      strays: (number, one of them) of ids outside their table, by feature; i32[2].
    """

    ok: Bool[Array, ""]
    needed: dict[str, Int32[Array, ""]]
    rows: dict[str, Int32[Array, ""]]
    strays: dict[str, Int32[Array, "2"]]


class EmbeddingPlan(NamedTuple):
    """Ids of a batch, and how their rows travel; split over devices.

    Attributes:
      ids: as given, by feature.
      groups: each device's plan, by group, along a first axis of S.
      report: what to look at before the results are trusted.
    """

    ids: dict[str, Any]
    groups: dict[str, RowPlan]
    report: ExchangeReport


class IdError(ValueError):
    """An id is outside its table."""


class ShardedTables:
    """Embedding tables split by rows over mesh axes; see the module.

    Args:
      tables: of any widths; alike ones share an exchange.
      mesh: of all devices.
      axis: one or several axes; both the tables' rows and the batch are split over their S devices.
      features: what a batch has, by name; None for one feature a table, of its name, unpooled.
      virtual_shards: W, a multiple of S; see `jaxrec.distributed.tables`.
      checked: an id outside its table makes a plan not ok, and `raise_strays` names it. Otherwise
        it gives zeros, gets no gradient, and is counted in the report.

    Raises:
      ValueError: an axis that the mesh does not have, W no multiple of S, a feature of an unknown
        table, a table without a feature, or tables that do not go together.
    """

    def __init__(
        self,
        tables: Sequence[EmbeddingTable],
        mesh: Mesh,
        *,
        axis: str | tuple[str, ...] = "data",
        features: Mapping[str, Feature] | None = None,
        virtual_shards: int = 256,
        checked: bool = True,
    ):
        self.mesh, self.checked = mesh, checked
        self.axis = (axis,) if isinstance(axis, str) else tuple(axis)
        for name in self.axis:
            if name not in mesh.axis_names:
                known = ", ".join(mesh.axis_names)
                raise ValueError(f"the mesh has no axis {name!r}; it has {known}")
        self.num_shards = math.prod(mesh.shape[name] for name in self.axis)
        if virtual_shards < 1 or virtual_shards % self.num_shards:
            raise ValueError(
                f"virtual_shards is {virtual_shards}; expected a multiple of the "
                f"{self.num_shards} devices along {', '.join(self.axis)}"
            )
        self.tables = {table.name: table for table in tables}
        self.groups = {group.name: group for group in group_tables(tables, virtual_shards)}
        by_table = {name: Feature(name) for name in self.tables}
        self.features = by_table if features is None else dict(features)
        for name, feature in self.features.items():
            if feature.table not in self.tables:
                raise ValueError(
                    f"feature {name!r} is of table {feature.table!r}; there are "
                    f"{', '.join(self.tables)}"
                )
        if unused := set(self.tables) - {feature.table for feature in self.features.values()}:
            raise ValueError(f"no feature is of table {', '.join(sorted(unused))}")
        self._group_of = {t.name: group for group in self.groups.values() for t in group.tables}

    # Tables as a whole.

    def init(self, key: jax.Array) -> dict[str, TableState]:
        """Rows drawn anew, and their moments, made where they are kept.

        The same for any number of devices.
        """
        shardings = self.shardings()

        def make(key: jax.Array) -> dict[str, TableState]:
            keys = jax.random.split(key, len(self.groups))
            pairs = zip(self.groups.items(), keys, strict=True)
            return {name: self._fresh(group, key) for (name, group), key in pairs}

        device = jax.tree.map(lambda s: s.with_memory_kind("device"), shardings)
        made = jax.jit(make, out_shardings=device)(key)
        return jax.device_put(made, shardings)

    def shardings(self) -> dict[str, TableState]:
        """Where each array of a state is kept: what `jax.device_put` or a restore asks for."""
        shapes = jax.eval_shape(
            lambda: {n: self._fresh(g, jax.random.key(0)) for n, g in self.groups.items()}
        )
        spec = PartitionSpec(self.axis)
        return {
            name: jax.tree.map(
                lambda _, kind=group.tables[0].memory: NamedSharding(
                    self.mesh, spec, memory_kind=kind
                ),
                shapes[name],
            )
            for name, group in self.groups.items()
        }

    def with_rows(
        self, state: Mapping[str, TableState], values: Mapping[str, Float[Any, "V D"]]
    ) -> dict[str, TableState]:
        """The state with tables' rows replaced by these, by table; moments stay.

        Raises:
          ValueError: an unknown table, or values of another shape.
        """
        state = dict(state)
        for name, value in values.items():
            table = self._table(name)
            if np.shape(value) != (table.num_rows, table.dim):
                raise ValueError(
                    f"rows of table {name!r} have shape {np.shape(value)}; expected "
                    f"{(table.num_rows, table.dim)}"
                )
            group = self._group_of[name]
            state[group.name] = state[group.name]._replace(
                rows=self._replaced(group, table, state[group.name].rows, np.asarray(value))
            )
        return state

    def dense(self, state: Mapping[str, TableState], table: str) -> Float[Array, "V D"]:
        """All rows of a table in the order of their ids; for scoring, publishing and tests."""
        group = self._group_of[self._table(table).name]
        rows = self._in_device_memory(group, state[group.name].rows)
        return rows[group.rows_of(self.tables[table])]

    def dense_moments(self, state: Mapping[str, TableState], table: str) -> Moments:
        """The optimizer's moments of all rows of a table in the order of their ids."""
        group = self._group_of[self._table(table).name]
        at = group.rows_of(self.tables[table])
        moments = state[group.name].moments
        return tuple(self._in_device_memory(group, moment)[at] for moment in moments)

    # One batch.

    def plan(self, ids: Mapping[str, Ids], capacity: Capacity | None = None) -> EmbeddingPlan:
        """Removes duplicates and tells the owners which rows are wanted; traceable.

        Args:
          ids: by feature, each split over devices along its first axis; i32.
          capacity: C by group; None takes N, which always suffices.

        Raises:
          ValueError: features other than the tables', or a first axis that S does not divide.
        """
        ids = self._checked_ids(ids)
        sizes = {name: capacity[name] if capacity else None for name in self.groups}

        def local(ids):
            plans, strays = {}, {}
            for name, group in self.groups.items():
                rows = []
                for feature, values in self._features_of(name, ids):
                    table = self.tables[self.features[feature].table]
                    flat = flat_ids(values)
                    rows.append(group.row_ids(table, flat))
                    strays[feature] = self._strays(table, flat)
                rows = jnp.concatenate(rows)
                plans[name] = plan_rows(
                    rows,
                    num_own=group.num_rows // self.num_shards,
                    capacity=sizes[name] or rows.shape[0],
                    axis=self.axis,
                )
            report = self._report(plans, strays)
            return jax.tree.map(lambda x: x[None], plans), report

        plans, report = self.on_devices(local, out_specs=(self._spec, PartitionSpec()))(ids)
        return EmbeddingPlan(ids, plans, report)

    def lookup(self, state: Mapping[str, TableState], plan: EmbeddingPlan) -> Rows:
        """The rows of a plan from their owners, each once for a device that wants it; traceable.

        Returns:
          rows by group, in the tables' dtype, split over devices: what a loss is differentiated by.
        """

        def local(state, plans):
            return {
                name: swap_boxes(self._own_rows(name, state[name], plan), self.axis)[None]
                for name, plan in _unstacked(plans).items()
            }

        return self.on_devices(local)(dict(state), plan.groups)

    def embed(self, rows: Rows, plan: EmbeddingPlan) -> dict[str, Float[Array, "B *shape D"]]:
        """What each feature's ids stand for; traceable, and differentiable in the rows.

        Returns:
          by feature: [B, …, D] for ids [B, …], zeros for padding; [B, D] if pooled; [G, B, D] for
          bags.
        """

        def local(rows, plans, ids):
            found = {}
            for name, group_plan in _unstacked(plans).items():
                spread = spread_rows(rows[name][0], group_plan)
                have_row = group_plan.slots < rows[name].shape[1]
                at = 0
                for feature, values in self._features_of(name, ids):
                    size = flat_ids(values).shape[0]
                    part = slice(at, at + size)
                    pooling = self.features[feature].pooling
                    found[feature] = pool(spread[part], have_row[part], values, pooling)
                    at += size
            return found

        return self.on_devices(local)(rows, plan.groups, plan.ids)

    def update(
        self,
        state: Mapping[str, TableState],
        plan: EmbeddingPlan,
        d_rows: Rows,
        step: Int[Array, ""] | int = 0,
        *,
        keep: Bool[Array, ""] | None = None,
    ) -> dict[str, TableState]:
        """One optimizer step of the rows looked up, in place if the state is donated; traceable.

        All devices' gradients of a row are added up first, in a fixed order: results repeat to the
        bit. A plan that is not ok changes nothing.

        Args:
          state: from which the rows were looked up.
          plan: of the lookup.
          d_rows: gradients of the loss of all devices by `rows`.
          step: number of the step, for learning rates by schedule.
          keep: False changes nothing; None asks whether the plan is ok.
        """

        def local(state, plans, d_rows, ok, step):
            new = {}
            for name, group_plan in _unstacked(plans).items():
                received = swap_boxes(d_rows[name][0], self.axis)
                new[name] = self.apply_gradients(
                    name, state[name], received, group_plan.asked_runs, ok, step
                )
            return new

        everywhere = PartitionSpec()
        specs = (self._spec, self._spec, self._spec, everywhere, everywhere)
        keep = plan.report.ok if keep is None else keep
        return self.on_devices(local, in_specs=specs)(
            dict(state), plan.groups, d_rows, keep, jnp.asarray(step, jnp.int32)
        )

    # Capacity and errors: on the host, between steps.

    def start_capacity(self, ids: Mapping[str, Ids], *, spare: float = 1.25) -> dict[str, int]:
        """A first guess by group: `spare` times what ids without duplicates would take."""
        counts = {
            name: sum(math.prod(shape_of(values)) for _, values in self._features_of(name, ids))
            // self.num_shards
            for name in self.groups
        }
        return {
            name: min(count, _rounded(spare * count / self.num_shards))
            for name, count in counts.items()
        }

    def grown(self, capacity: Capacity, report: ExchangeReport) -> dict[str, int]:
        """Capacity in which the reported plan fits: where it did not, with an eighth to spare."""
        needed = jax.device_get(report.needed)
        return {
            name: size if needed[name] <= size else _rounded(1.125 * int(needed[name]))
            for name, size in capacity.items()
        }

    def raise_strays(self, report: ExchangeReport) -> None:
        """Raises IdError if ids were outside their table, naming the table and one such id."""
        for feature, (count, one) in jax.device_get(report.strays).items():
            if count:
                table = self.tables[self.features[feature].table]
                raise IdError(
                    f"feature {feature!r} names id {one} of table {table.name!r}, which has rows "
                    f"0 to {table.num_rows - 1} ({count} such ids in the batch). Nothing was "
                    "updated. Map or hash the ids (IdMap, hash_ids), or make the table larger."
                )

    def exchange_bytes(self, capacity: Capacity) -> dict[str, int]:
        """Bytes that a device sends in one step, by "ids", "rows" and "gradients"."""
        places = {name: self.num_shards * capacity[name] for name in self.groups}
        row_bytes = sum(
            places[name] * group.dim * group.dtype.itemsize for name, group in self.groups.items()
        )
        return {"ids": 4 * sum(places.values()), "rows": row_bytes, "gradients": row_bytes}

    # Inside shard_map, on one device's part.

    def _own_rows(self, name: str, state: TableState, plan: RowPlan) -> Array:
        return read_rows(state.rows, plan.asked.reshape(-1), on_host=self.groups[name].on_host)

    def apply_gradients(
        self,
        name: str,
        state: TableState,
        received: Float[Array, "P D"],
        runs: Runs,
        ok: Bool[Array, ""],
        step: Int[Array, ""],
    ) -> TableState:
        """A device's part of a group after gradients that others sent; inside `on_devices`.

        Args:
          name: of the group.
          received: by place; `runs` are equal rows among the places.
          ok: False changes nothing.
          step: number of the step that the gradients are of.
        """
        group = self.groups[name]
        own = own_gradients(received, runs, state.rows.shape[0], keep=ok)
        return TableState(
            *update_rows(
                state.rows, state.moments, own.rows, own.values, group.optimizer,
                rate_at(group.optimizer, step), on_host=group.on_host,
            )
        )  # fmt: skip

    def _strays(self, table: EmbeddingTable, ids: Array) -> Int32[Array, "2"]:
        outside = table.present(ids) & ~table.inside(ids)
        count = lax.psum(outside.sum(dtype=jnp.int32), self.axis)
        least = jnp.iinfo(jnp.int32).min
        one = lax.pmax(jnp.where(outside, ids, least).max(initial=least), self.axis)
        return jnp.stack([count, one])

    def _report(self, plans: Mapping[str, RowPlan], strays: dict[str, Array]) -> ExchangeReport:
        needed = {name: plan.needed for name, plan in plans.items()}
        fits = [plan.needed <= plan.asked.shape[1] for plan in plans.values()]
        good = [pair[0] == 0 for pair in strays.values()] if self.checked else []
        rows = {n: lax.psum(plan.runs.num_runs, self.axis) for n, plan in plans.items()}
        return ExchangeReport(jnp.stack([*fits, *good]).all(), needed, rows, strays)

    # Helpers.

    @property
    def _spec(self) -> PartitionSpec:
        return PartitionSpec(self.axis)

    def placed(self, batch: Any) -> Any:
        """A batch's arrays where the devices share them by their first axis; else on all devices.

        Traceable.
        """

        def place(x: Any) -> Array:
            x = jnp.asarray(x)
            shared = x.ndim > 0 and x.shape[0] % self.num_shards == 0
            spec = self._spec if shared else PartitionSpec()
            return lax.with_sharding_constraint(x, NamedSharding(self.mesh, spec))

        return jax.tree.map(place, batch)

    def on_devices(self, function: Any, *, in_specs: Any = None, out_specs: Any = None) -> Any:
        """`jax.shard_map` over the mesh; arrays are split along their first axis by default."""
        return jax.shard_map(
            function,
            mesh=self.mesh,
            in_specs=self._spec if in_specs is None else in_specs,
            out_specs=self._spec if out_specs is None else out_specs,
            check_vma=False,  # the same maximum everywhere is not known to be the same
        )

    def _fresh(self, group: TableGroup, key: jax.Array) -> TableState:
        rows = jax.random.normal(key, (group.num_rows, group.dim))
        number = jnp.arange(group.num_rows, dtype=jnp.int32)
        rows = jnp.where(group.is_padding(number)[:, None], 0, rows * group.stds(number)[:, None])
        return TableState(
            rows.astype(group.dtype), group.optimizer.moments(group.num_rows, group.dim)
        )

    def _replaced(
        self, group: TableGroup, table: EmbeddingTable, rows: Array, values: np.ndarray
    ) -> Array:
        """A group's rows with those of one table replaced, where they are kept."""
        replace = jax.jit(
            lambda rows, values: rows.at[group.rows_of(table)].set(values.astype(group.dtype)),
            out_shardings=NamedSharding(self.mesh, self._spec, memory_kind="device"),
        )
        new = replace(self._in_device_memory(group, rows), values)
        return jax.device_put(new, self.shardings()[group.name].rows)

    def _in_device_memory(self, group: TableGroup, rows: Array) -> Array:
        if not group.on_host:
            return rows
        return jax.device_put(rows, NamedSharding(self.mesh, self._spec, memory_kind="device"))

    def _table(self, name: str) -> EmbeddingTable:
        if name not in self.tables:
            raise ValueError(f"there is no table {name!r}; there are {', '.join(self.tables)}")
        return self.tables[name]

    def _features_of(self, group: str, ids: Mapping[str, Any]) -> list[tuple[str, Any]]:
        return [
            (name, ids[name])
            for name, feature in self.features.items()
            if self._group_of[feature.table].name == group
        ]

    def _checked_ids(self, ids: Mapping[str, Ids]) -> dict[str, Any]:
        if set(ids) != set(self.features):
            raise ValueError(
                f"ids are of the features {sorted(ids)}; expected {sorted(self.features)}"
            )
        for name, values in ids.items():
            shape = shape_of(values)
            if not shape or shape[0] == 0 or shape[0] % self.num_shards:
                raise ValueError(
                    f"ids of feature {name!r} have shape {shape}; expected a first axis that the "
                    f"{self.num_shards} devices share equally: pad it with ids that mean no row"
                )
            if isinstance(values, Bags) and self.features[name].pooling is None:
                raise ValueError(f"feature {name!r} has bags but no pooling; expected sum or mean")
        return self.placed({name: ids[name] for name in self.features})


def _unstacked(plans: Mapping[str, RowPlan]) -> dict[str, RowPlan]:
    return {name: jax.tree.map(lambda x: x[0], plan) for name, plan in plans.items()}


def _rounded(places: float) -> int:
    """Up to a multiple of 8, so that growth seldom compiles anew for little."""
    return 8 * math.ceil(max(places, 1) / 8)
