"""Rows of tables that are split over devices: looked up by their owners, updated by their owners.

All functions run inside `shard_map`, on one device's part. A device asks for each different row
once, however often its ids name it. The rows it asks of one owner stand in a box of C places, so
shapes are static and no device waits for counts; what exceeds a box is not left out silently but
makes the plan not fit (`needed` > C), and the caller repeats the step with larger boxes.

Letters: N ids of a device, S devices, R rows that each owns, C places a box, P = S · C, D width.

    rows of a batch there    S · C · 4 bytes      row numbers
    and back                 S · C · D · itemsize rows
    their gradients          S · C · D · itemsize

a device, a step and a direction, of which 1 / S stays where it is.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Int32

from jaxrec.ops.row_runs import Runs, find_runs, sum_runs, take_rows

type Axis = str | tuple[str, ...]


class RowPlan(NamedTuple):
    """Which rows a device asks for and is asked for.

    Attributes:
      slots: box place of each id, P for none; i32[N].
      runs: equal ids of this device.
      starts: where in `runs` each box place begins, N for an empty place; i32[P].
      asked: own rows that device s asks for, R for an empty place; i32[S, C].
      asked_runs: equal rows among all that devices ask for.
      needed: places that the fullest box of all devices takes; the plan fits if it is at most C.
        i32 scalar, the same on all devices.
    """

    slots: Int32[Array, "N"]
    runs: Runs
    starts: Int32[Array, "P"]
    asked: Int32[Array, "S C"]
    asked_runs: Runs
    needed: Int32[Array, ""]


def exchange(boxes: Array, axis: Axis) -> Array:
    """Box s of this device to device s: [S, …] of what all others have for this one."""
    return lax.all_to_all(boxes, axis, split_axis=0, concat_axis=0, tiled=True)


def plan_rows(row_ids: Int[Array, "N"], *, num_own: int, capacity: int, axis: Axis) -> RowPlan:
    """Removes duplicates, boxes the rest by owner, and sends each owner what it is asked for.

    Args:
      row_ids: rows of all devices, row r belonging to device r // R; S · R and above for none.
      num_own: R.
      capacity: C.
      axis: the mesh axes that rows are split over.

    Cost: two sorts, of N and of S · C pairs of i32; an all-to-all of 4 · S · C bytes.
    """
    num_shards = lax.axis_size(axis)
    runs = find_runs(row_ids, num_shards * num_own)
    distinct = runs.distinct(fill=num_shards * num_own)
    owners = jnp.arange(num_shards + 1, dtype=jnp.int32)
    bounds = jnp.searchsorted(distinct, owners * num_own).astype(jnp.int32)
    # Rows in rising order are grouped by owner already: box s is a slice of them.
    places = bounds[:-1, None] + jnp.arange(capacity, dtype=jnp.int32)
    filled = places < bounds[1:, None]
    last = max(row_ids.shape[0] - 1, 0)
    places = jnp.minimum(places, last)
    sent = jnp.where(filled, distinct[places] - owners[:-1, None] * num_own, num_own)
    starts = jnp.where(filled, runs.firsts[places], row_ids.shape[0])
    asked = exchange(sent, axis)
    return RowPlan(
        slots=_slots(runs, bounds, num_own, capacity),
        runs=runs,
        starts=starts.reshape(-1),
        asked=asked,
        asked_runs=find_runs(asked.reshape(-1), num_own),
        needed=lax.pmax((bounds[1:] - bounds[:-1]).max(), axis),
    )


def _slots(runs: Runs, bounds: Array, num_own: int, capacity: int) -> Int32[Array, "N"]:
    num_shards, num = bounds.shape[0] - 1, runs.keys.shape[0]
    places = jnp.arange(num, dtype=jnp.int32)
    number = jnp.searchsorted(runs.firsts, places, side="right").astype(jnp.int32) - 1
    owner = jnp.minimum(runs.keys // num_own, num_shards)
    rank = number - bounds[jnp.minimum(owner, num_shards - 1)]
    fits = (owner < num_shards) & (rank < capacity)
    slots = jnp.where(fits, owner * capacity + rank, num_shards * capacity)
    return jnp.zeros(num, jnp.int32).at[runs.order].set(slots, unique_indices=True)


def spread_rows(rows: Float[Array, "P D"], plan: RowPlan) -> Float[Array, "N D"]:
    """Each id its row, zeros where there is none; differentiable in the rows."""
    return take_rows(rows, plan.slots, plan.runs, plan.starts)


class OwnGradients(NamedTuple):
    """Gradients of an owner's rows, those of all devices summed.

    Attributes:
      rows: rows that some device asked for, each once and rising; from R up, rising as well, where
        there is none; i32[P].
      values: f32[P, D].
    """

    rows: Int32[Array, "P"]
    values: Float[Array, "P D"]


def own_gradients(
    received: Float[Array, "P D"], runs: Runs, num_own: int, *, keep: Bool[Array, ""] | bool = True
) -> OwnGradients:
    """Sums what devices sent for the same row, in the order of the devices.

    Args:
      received: gradients by box place.
      runs: equal rows among the places.
      num_own: R.
      keep: False gives no rows at all, so that nothing is updated.
    """
    values = sum_runs(received, runs, runs.firsts)
    places = jnp.arange(runs.keys.shape[0], dtype=jnp.int32)
    there = (places < runs.num_runs) & keep
    # Places without a row have numbers of their own beyond the table: a scatter with unique rows
    # then leaves them out.
    rows = jnp.where(there, runs.distinct(fill=num_own), num_own + places)
    return OwnGradients(rows, values)


def swap_boxes(values: Float[Array, "P D"], axis: Axis) -> Float[Array, "P D"]:
    """What stands in box s to device s: gradients to the rows' owners, or rows from them."""
    boxes = values.reshape(lax.axis_size(axis), -1, values.shape[-1])
    return exchange(boxes, axis).reshape(values.shape)
