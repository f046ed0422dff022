"""Reading and writing rows of an array in device memory, or in the host's beside it.

An array in host memory (`pinned_host`) is read and written where it lies, by the host's processor:
only the rows asked for cross the bus, in both directions. Beside a GPU, XLA's programs for the host
write results to memory of their own, so that an update also copies the array, within the host.

Letters: R rows of an array, U rows meant.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.compute_on import compute_on
from jaxtyping import Array, Float, Int

from jaxrec.ops.row_optimizers import Moments, RowOptimizer

_HOST, _DEVICE = jax.memory.Space.Host, jax.memory.Space.Device


def read_rows(array: Array, rows: Int[Array, "U"], *, on_host: bool = False) -> Array:
    """array[rows] in device memory, zeros for a row of R or more; [U, …]."""
    if not on_host:
        return array.at[rows].get(mode="fill", fill_value=0)
    # Rows beyond the table are cleared on the device: the host's part is one gather.
    inside = jnp.minimum(rows, array.shape[0] - 1)
    taken = _host_call(lambda a, r: a.at[r].get(mode="promise_in_bounds"), array, inside)
    there = (rows < array.shape[0]).reshape(-1, *[1] * (array.ndim - 1))
    return jnp.where(there, jax.device_put(taken, _DEVICE), jnp.zeros((), array.dtype))


def write_rows(
    array: Array, rows: Int[Array, "U"], values: Array, *, on_host: bool = False
) -> Array:
    """The array with `values` at `rows`, in place where it is donated.

    Args:
      rows: each once, rising; from R up for what is not to be written.
    """

    def write(array, rows, values):
        return array.at[rows].set(values, mode="drop", unique_indices=True, indices_are_sorted=True)

    values = values.astype(array.dtype)
    return _host_call(write, array, rows, values) if on_host else write(array, rows, values)


def update_rows(
    table: Float[Array, "R D"],
    moments: Moments,
    rows: Int[Array, "U"],
    grads: Float[Array, "U D"],
    optimizer: RowOptimizer,
    rate: Float[Array, ""],
    *,
    on_host: bool = False,
) -> tuple[Float[Array, "R D"], Moments]:
    """One optimizer step of the rows meant; the others stay as they are, bit for bit.

    Args:
      rows: as for `write_rows`.
      grads: f32.
      rate: the learning rate.
      on_host: whether table and moments are in host memory; the arithmetic is the device's.

    Cost: rows and their moments read once and written once.
    """
    old = read_rows(table, rows, on_host=on_host).astype(jnp.float32)
    old_moments = tuple(read_rows(moment, rows, on_host=on_host) for moment in moments)
    new, new_moments = optimizer.update(old, old_moments, grads, rate)
    table = write_rows(table, rows, new, on_host=on_host)
    pairs = zip(moments, new_moments, strict=True)
    return table, tuple(write_rows(m, rows, v, on_host=on_host) for m, v in pairs)


def _host_call(function: Any, array: Array, *device_arrays: Array) -> Array:
    moved = [jax.device_put(x, _HOST) for x in device_arrays]
    run: Any = compute_on(function, compute_type="device_host", out_memory_spaces=_HOST)
    return run(array, *moved)
