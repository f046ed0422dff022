"""Arrays in .npy files, written and read in pieces: neither needs memory for a second copy."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Shaped

PIECE_BYTES = 1 << 26
"""What is on its way between a device and a file at a time."""


def write_array(file: Path, array: Shaped[Array | np.ndarray, "..."]) -> None:
    """Writes an array, a device's in pieces of `PIECE_BYTES` (or of one row, if that is more).

    Dtypes that .npy does not know, such as bfloat16, are written as unsigned integers.
    """
    dtype = _stored_as(array.dtype)
    header = {
        "descr": np.lib.format.dtype_to_descr(dtype),
        "fortran_order": False,
        "shape": array.shape,
    }
    with file.open("wb") as stream:
        np.lib.format.write_array_header_1_0(stream, header)
        flat = array.reshape(-1) if array.ndim == 0 else array
        step = _rows_of_a_piece(flat.shape, dtype)
        for begin in range(0, len(flat), step):
            stream.write(_piece(flat, begin, min(step, len(flat) - begin)).view(dtype).data)


def read_array(file: Path, dtype: str) -> Array:
    """The array that `write_array` wrote, on the default device, read in pieces like it.

    Args:
      dtype: what the array was; for bfloat16 the file does not say.

    Raises:
      ValueError: no .npy file of this kind, or fewer values than its head says.
    """
    with file.open("rb") as stream:
        if np.lib.format.read_magic(stream) != (1, 0):
            raise ValueError(f"{file} is of another .npy version than write_array makes")
        shape, _, stored = np.lib.format.read_array_header_1_0(stream)

        def read(rows: tuple[int, ...]) -> np.ndarray:
            values = np.fromfile(stream, stored, count=int(np.prod((*rows, *shape[1:]))))
            return values.reshape((*rows, *shape[1:])).view(jnp.dtype(dtype))

        step = _rows_of_a_piece(shape, stored)
        if not shape or shape[0] <= step:
            return jnp.array(read(shape[:1]))
        array = jnp.zeros(shape, jnp.dtype(dtype))
        for begin in range(0, shape[0], step):
            array = _place(array, read((min(step, shape[0] - begin),)), np.int32(begin))
        return array


def _stored_as(dtype: np.dtype) -> np.dtype:
    return np.dtype(f"u{dtype.itemsize}") if dtype.kind == "V" else np.dtype(dtype)


def _rows_of_a_piece(shape: tuple[int, ...], dtype: np.dtype) -> int:
    row_bytes = int(np.prod(shape[1:])) * dtype.itemsize
    return max(1, PIECE_BYTES // max(row_bytes, 1))


def _piece(array: Array | np.ndarray, begin: int, size: int) -> np.ndarray:
    if isinstance(array, np.ndarray):
        return np.ascontiguousarray(array[begin : begin + size])
    # The start is an argument of the compiled program, so that all pieces share one.
    return np.ascontiguousarray(lax.dynamic_slice_in_dim(array, np.int32(begin), size))


@functools.partial(jax.jit, donate_argnums=0)
def _place(array: Array, piece: Array, begin: Array) -> Array:
    return lax.dynamic_update_slice_in_dim(array, piece, begin, axis=0)
