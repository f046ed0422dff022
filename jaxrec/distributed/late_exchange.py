"""The parts of a prioritised step that run on every device: what is early, what is late, who waits.

See `jaxrec.distributed.prioritized` for the whole and for the letters.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int32

from jaxrec.distributed.sharded_embedding import (
    Capacity,
    EmbeddingPlan,
    ExchangeReport,
    Rows,
    ShardedTables,
    TableState,
)
from jaxrec.ops.row_exchange import swap_boxes
from jaxrec.ops.row_priority import (
    LateMarks,
    flat_places,
    late_needed,
    late_places,
    mark_late,
)
from jaxrec.ops.row_runs import find_runs
from jaxrec.ops.row_store import read_rows

LATE = " late"
"""Behind a group's name: its L, in a capacity and in a report."""


class Ahead(NamedTuple):
    """The batch that is trained on next, as far as it is fetched; split over devices.

    Attributes:
      plan: of its ids.
      batch: what its loss needs besides.
      rows: early rows in place; places of late rows hold zeros.
      owner_late, asker_late: places whose rows are still to come, by group; bool[S, S, C].
    """

    plan: EmbeddingPlan
    batch: Any
    rows: Rows
    owner_late: dict[str, Bool[Array, "S S C"]]
    asker_late: dict[str, Bool[Array, "S S C"]]


class Deferred(NamedTuple):
    """Gradients of the batch before that are still to be sent; split over devices.

    Attributes:
      d_rows: by box place, those of late rows among them.
      owner_rows: the owners' rows at the places, R for late ones and for none; i32[S, S, C].
    """

    d_rows: Rows
    owner_rows: dict[str, Int32[Array, "S S C"]]


class Traffic(NamedTuple):
    """Bytes of rows and gradients sent in a step by all devices together, empty places left out.

    Attributes:
      early_rows, deferred_gradients: beneath computation; f32.
      late_rows, late_gradients: waited for; f32.
    """

    early_rows: Float[Array, ""]
    deferred_gradients: Float[Array, ""]
    late_rows: Float[Array, ""]
    late_gradients: Float[Array, ""]


class LateExchange:
    """Early and late exchange of some tables' rows; every method is traceable, in a global view."""

    def __init__(self, tables: ShardedTables):
        self.tables, self.axis = tables, tables.axis

    def begin(
        self,
        state: dict[str, TableState],
        ids: Mapping[str, Any],
        batch: Any,
        capacity: tuple[tuple[str, int], ...],
    ) -> tuple[Ahead, Deferred]:
        """The first batch, all its rows early, and nothing deferred; capacity is the C by group."""
        plan = self.tables.plan(ids, dict(capacity))
        rows = self.tables.lookup(state, plan)

        def nothing(asked, rows):
            marks = jax.tree.map(lambda x: jnp.zeros_like(x, bool), asked)
            nowhere = {n: jnp.full_like(x, self.num_own(n)) for n, x in asked.items()}
            return marks, marks, Deferred(jax.tree.map(jnp.zeros_like, rows), nowhere)

        asked = _asked(plan)
        owner_late, asker_late, deferred = self.tables.on_devices(nothing)(asked, rows)
        return Ahead(plan, self.tables.placed(batch), rows, owner_late, asker_late), deferred

    def with_late(
        self, state: dict[str, TableState], ahead: Ahead, limits: Mapping[str, int]
    ) -> tuple[Rows, dict[str, TableState]]:
        """Rows of the batch ahead with the late ones among them; the tables wait for the read."""

        def of_group(name: str, state: TableState, early, asked, owner_late, asker_late):
            own = self._late_rows(name, asked, owner_late, limits)
            late, state = self._read(name, state, own)
            places = flat_places(late_places(asker_late, limits[name]), asked.shape[1])
            return early.at[places].set(swap_boxes(late, self.axis), mode="drop"), state

        others = (ahead.rows, _asked(ahead.plan), ahead.owner_late, ahead.asker_late)
        return self._each_group(of_group, state, *others)

    def marks(
        self, first: EmbeddingPlan, second: EmbeddingPlan
    ) -> tuple[dict[str, LateMarks], dict[str, Int32[Array, ""]]]:
        """Late places of two successive batches, and by group how many the fullest box has."""

        def local(first, second):
            marks, needed = {}, {}
            for name in self.tables.groups:
                own = self.num_own(name)
                mark = mark_late(first[name][0], second[name][0], num_own=own, axis=self.axis)
                sides = (mark.owner_first, mark.owner_second)
                needed[name] = jnp.maximum(*(late_needed(side, self.axis) for side in sides))
                marks[name] = mark
            return jax.tree.map(lambda x: x[None], marks), needed

        specs = (PartitionSpec(self.axis), PartitionSpec())
        return self.tables.on_devices(local, out_specs=specs)(_asked(first), _asked(second))

    def send_deferred(self, deferred: Deferred) -> Rows:
        """The batch before's remaining gradients, where their rows are."""

        def local(d_rows):
            return jax.tree.map(lambda x: swap_boxes(x[0], self.axis)[None], d_rows)

        return self.tables.on_devices(local)(deferred.d_rows)

    def apply_deferred(
        self,
        state: dict[str, TableState],
        received: Rows,
        deferred: Deferred,
        ok: Bool[Array, ""],
        step: Int32[Array, ""],
    ) -> dict[str, TableState]:
        """The tables with the batch before's remaining gradients, `received`, applied."""

        def of_group(name: str, state: TableState, received, rows, ok, step):
            runs = find_runs(rows.reshape(-1), self.num_own(name))
            return self.tables.apply_gradients(name, state, received, runs, ok, step)

        others = (received, deferred.owner_rows)
        return self._each_group(of_group, state, *others, everywhere=(ok, step))

    def early(
        self, state: dict[str, TableState], plan: EmbeddingPlan, marks: dict[str, LateMarks]
    ) -> tuple[Rows, dict[str, TableState]]:
        """The next batch's early rows; the tables wait for the read."""

        def of_group(name: str, state: TableState, asked, late):
            own = jnp.where(late, self.num_own(name), asked).reshape(-1)
            rows, state = self._read(name, state, own)
            return swap_boxes(rows, self.axis), state

        late = {name: mark.owner_second for name, mark in marks.items()}
        return self._each_group(of_group, state, _asked(plan), late)

    def apply_late(
        self,
        state: dict[str, TableState],
        plan: EmbeddingPlan,
        marks: dict[str, LateMarks],
        d_rows: Rows,
        limits: Mapping[str, int],
        ok: Bool[Array, ""],
        step: Int32[Array, ""],
    ) -> tuple[dict[str, TableState], Deferred]:
        """The tables with the gradients applied that the next batch needs; the others deferred.

        Unless ok neither happens.
        """

        def of_group(name: str, state: TableState, d_rows, asked, mark, ok, step):
            places = flat_places(late_places(mark.asker_first, limits[name]), asked.shape[1])
            late = d_rows.at[places].get(mode="fill", fill_value=0)
            received = swap_boxes(late, self.axis)
            own = self._late_rows(name, asked, mark.owner_first, limits)
            runs = find_runs(own, self.num_own(name))
            return self.tables.apply_gradients(name, state, received, runs, ok, step)

        asked = _asked(plan)
        state = self._each_group(of_group, state, d_rows, asked, marks, everywhere=(ok, step))
        rest = {
            name: jnp.where(mark.owner_first | ~ok, self.num_own(name), asked[name])
            for name, mark in marks.items()
        }
        return state, Deferred(d_rows, rest)

    def resized(
        self, ahead: Ahead, deferred: Deferred, capacity: Capacity
    ) -> tuple[Ahead, Deferred]:
        """Both with more places a box; what stands in them keeps its number."""
        plan = self.tables.plan(ahead.plan.ids, without_late(capacity))

        def local(ahead_parts, deferred):
            more = {n: capacity[n] - x.shape[2] for n, x in deferred.owner_rows.items()}

            def boxes(name, x, fill=0):
                return jnp.pad(x, ((0, 0), (0, 0), (0, more[name])), constant_values=fill)

            def values(name, x):
                own = x.reshape(1, self.tables.num_shards, -1, x.shape[-1])
                padded = jnp.pad(own, ((0, 0), (0, 0), (0, more[name]), (0, 0)))
                return padded.reshape(1, -1, x.shape[-1])

            rows, owner_late, asker_late = ahead_parts
            each = lambda change, by_group: {n: change(n, x) for n, x in by_group.items()}  # noqa: E731
            nowhere = {n: boxes(n, x, self.num_own(n)) for n, x in deferred.owner_rows.items()}
            marks = each(boxes, owner_late), each(boxes, asker_late)
            return each(values, rows), *marks, Deferred(each(values, deferred.d_rows), nowhere)

        parts = (ahead.rows, ahead.owner_late, ahead.asker_late)
        rows, owner_late, asker_late, deferred = self.tables.on_devices(local)(parts, deferred)
        return Ahead(plan, ahead.batch, rows, owner_late, asker_late), deferred

    def report(
        self, report: ExchangeReport, needed: Mapping[str, Array], capacity: Capacity
    ) -> ExchangeReport:
        """A plan's report, with late places as well."""
        late = {name + LATE: number for name, number in needed.items()}
        fits = [number <= capacity[name] for name, number in late.items()]
        ok = jnp.stack([report.ok, *fits]).all()
        return report._replace(ok=ok, needed=report.needed | late)

    def traffic(
        self,
        ahead: Ahead,
        deferred: Deferred,
        plan: EmbeddingPlan,
        marks: dict[str, LateMarks],
    ) -> Traffic:
        """What one step sends, from the places that are not empty."""

        def sent(places: Mapping[str, Array]) -> Float[Array, ""]:
            total = jnp.zeros((), jnp.float32)
            for name, there in places.items():
                group = self.tables.groups[name]
                row_bytes = group.dim * group.dtype.itemsize
                total += there.sum(dtype=jnp.int32).astype(jnp.float32) * row_bytes
            return total

        there = {name: asked < self.num_own(name) for name, asked in _asked(plan).items()}
        return Traffic(
            early_rows=sent({n: there[n] & ~mark.owner_second for n, mark in marks.items()}),
            deferred_gradients=sent(
                {n: rows < self.num_own(n) for n, rows in deferred.owner_rows.items()}
            ),
            late_rows=sent(ahead.owner_late),
            late_gradients=sent({n: mark.owner_first for n, mark in marks.items()}),
        )

    def num_own(self, name: str) -> int:
        """R of a group."""
        return self.tables.groups[name].num_rows // self.tables.num_shards

    def _late_rows(
        self, name: str, asked: Array, late: Array, limits: Mapping[str, int]
    ) -> Int32[Array, "Q"]:
        """Own rows at the late places, R for none."""
        places = flat_places(late_places(late, limits[name]), asked.shape[1])
        return asked.reshape(-1).at[places].get(mode="fill", fill_value=self.num_own(name))

    def _read(
        self, name: str, state: TableState, rows: Int32[Array, "Q"]
    ) -> tuple[Array, TableState]:
        """Rows, and the state behind a barrier: what writes to it next does so after the read.

        Without that order the compiler would keep a copy of the table for the reader.
        """
        taken = read_rows(state.rows, rows, on_host=self.tables.groups[name].on_host)
        taken, table = lax.optimization_barrier((taken, state.rows))
        return taken, state._replace(rows=table)

    def _each_group(
        self, function: Any, state: dict[str, TableState], *by_group: Any, everywhere: Any = ()
    ) -> Any:
        """function(name, state, its group's arrays, …, *everywhere), for each group on each device.

        It gives a state, or rows and a state; by group, so does this.
        """

        def local(states, others, everywhere):
            rows, after = {}, {}
            for name, state in states.items():
                arrays = jax.tree.map(lambda x: x[0], [other[name] for other in others])
                found = function(name, state, *arrays, *everywhere)
                if isinstance(found, TableState):
                    after[name] = found
                else:
                    rows[name], after[name] = found[0][None], found[1]
            return (rows, after) if rows else after

        split, whole = PartitionSpec(self.axis), PartitionSpec()
        mapped = self.tables.on_devices(local, in_specs=(split, split, whole))
        return mapped(state, by_group, everywhere)


def without_late(capacity: Capacity) -> dict[str, int]:
    """C by group alone."""
    return {name: size for name, size in capacity.items() if not name.endswith(LATE)}


def _asked(plan: EmbeddingPlan) -> dict[str, Int32[Array, "S S C"]]:
    return {name: group.asked for name, group in plan.groups.items()}
