"""Equal keys brought together by a sort, and sums over each: the transpose of a gather, in order.

A sum of values by key as a scatter would add with atomics on a GPU, in any order. Here each sum is
a tree of fixed shape over the key's values in their order, so it is the same bits every time, also
when other keys come or go.

Letters: N keys, P sums wanted, D width.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, Int32

_RADIX = 8  # values that one pass adds


class Runs(NamedTuple):
    """Keys in rising order; equal ones, a run, stand together in the order they came in.

    Attributes:
      order: the key's number before sorting; i32[N].
      keys: sorted; i32[N].
      firsts: where each run begins, N behind the last run; keys at or above `limit` are in no
        run; i32[N].
      num_runs: i32 scalar.
    """

    order: Int32[Array, "N"]
    keys: Int32[Array, "N"]
    firsts: Int32[Array, "N"]
    num_runs: Int32[Array, ""]

    def distinct(self, fill: int) -> Int32[Array, "N"]:
        """The key of each run, `fill` behind the last."""
        return self.keys.at[self.firsts].get(mode="fill", fill_value=fill)


def find_runs(keys: Int[Array, "N"], limit: int) -> Runs:
    """Sorts keys; those at or above `limit` are none and stand last.

    Cost: one stable sort of N pairs of i32, and a scan.
    """
    num = keys.shape[0]
    numbers = jnp.arange(num, dtype=jnp.int32)
    keys = jnp.minimum(keys.astype(jnp.int32), limit)
    keys, order = lax.sort((keys, numbers), num_keys=1, is_stable=True)
    before = jnp.concatenate([jnp.full(1, -1, jnp.int32), keys[:-1]])
    begins = (keys != before) & (keys < limit)
    (firsts,) = jnp.nonzero(begins, size=num, fill_value=num)
    return Runs(order, keys, firsts.astype(jnp.int32), begins.sum(dtype=jnp.int32))


def sum_runs(
    values: Float[Array, "N D"], runs: Runs, starts: Int[Array, "P"]
) -> Float[Array, "P D"]:
    """The sum of the run that begins at each of `starts`, in f32; 0 for a start of N.

    Args:
      values: of the keys, before sorting; bf16 or f32.
      runs: of the keys.
      starts: places in sorted order.

    Cost: log₈ of the longest run passes over N · D f32 elements; none if no key repeats.
    """
    num = runs.keys.shape[0]
    ends = jnp.searchsorted(runs.keys, runs.keys, side="right").astype(jnp.int32)
    lengths = ends.at[runs.firsts].get(mode="fill", fill_value=0) - runs.firsts
    longest = jnp.max(jnp.where(runs.firsts < num, lengths, 0), initial=0)
    return _sums_at(starts, values[runs.order], ends, longest)


def _sums_at(starts: Array, values: Array, ends: Array, longest: Array) -> Array:
    """Sums of values from each start up to the end of its run, in f32."""
    places = jnp.arange(values.shape[0], dtype=jnp.int32)

    def one_pass(state):
        stride, sums = state
        total = sums
        for step in range(1, _RADIX):
            other = places + step * stride
            value = sums.at[other].get(mode="fill", fill_value=0)
            total = total + jnp.where((other < ends)[:, None], value, 0)
        return stride * _RADIX, total

    _, sums = lax.while_loop(
        lambda state: state[0] < longest, one_pass, (jnp.int32(1), values.astype(jnp.float32))
    )
    return sums.at[starts].get(mode="fill", fill_value=0)


@jax.custom_vjp
def take_rows(
    rows: Float[Array, "P D"],
    slots: Int[Array, "N"],
    runs: Runs,
    starts: Int[Array, "P"],
) -> Float[Array, "N D"]:
    """rows[slots], zeros for a slot of P.

    Args:
      rows: f32 or bf16.
      slots: of each key, P for none; keys of one slot are a run of `runs`.
      starts: where the run of each slot begins, N for a slot that no key has.

    Gradient: of rows alone, by `sum_runs`: deterministic.
    """
    del runs, starts
    return rows.at[slots].get(mode="fill", fill_value=0)


def _take_fwd(rows, slots, runs, starts):
    return take_rows(rows, slots, runs, starts), (runs, starts, rows[:0])


def _take_bwd(kept, d_out):
    runs, starts, like = kept
    return sum_runs(d_out, runs, starts).astype(like.dtype), None, None, None


take_rows.defvjp(_take_fwd, _take_bwd)


@jax.custom_vjp
def sum_bags(values: Float[Array, "N D"], offsets: Int[Array, "B1"]) -> Float[Array, "B1-1 D"]:
    """Sums of consecutive values: bag b is values offsets[b] up to offsets[b + 1]; in their dtype.

    Added up in f32, in the order of `sum_runs`. Values behind offsets[-1] are in no bag.

    Gradient: of values, a gather.
    """
    lengths = offsets[1:] - offsets[:-1]
    ends = offsets[1:].at[_bag_of(offsets, values.shape[0])].get(mode="fill", fill_value=0)
    starts = jnp.where(lengths > 0, offsets[:-1], values.shape[0])
    return _sums_at(starts, values, ends, lengths.max(initial=0)).astype(values.dtype)


def _bag_of(offsets: Array, num: int) -> Array:
    places = jnp.arange(num, dtype=jnp.int32)
    return jnp.searchsorted(offsets[1:], places, side="right").astype(jnp.int32)


def _bags_fwd(values, offsets):
    return sum_bags(values, offsets), (offsets, values[:, :0])


def _bags_bwd(kept, d_out):
    offsets, like = kept
    bags = _bag_of(offsets, like.shape[0])
    taken = d_out.at[bags].get(mode="fill", fill_value=0)
    return taken.astype(like.dtype), None


sum_bags.defvjp(_bags_fwd, _bags_bwd)


def number_distinct(
    keys: Int[Array, "N"], limit: int
) -> tuple[Int32[Array, "N"], Int32[Array, "N"]]:
    """(distinct keys in rising order, `limit` behind the last; the number of each key among them).

    distinct[number] == keys. Keys are below `limit`.
    """
    distinct = find_runs(keys, limit).distinct(fill=limit)
    return distinct, jnp.searchsorted(distinct, keys).astype(jnp.int32)
