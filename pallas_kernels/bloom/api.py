"""Searching a bit-sliced, partitioned Bloom index.

Letters: Q queries, P program steps, K hashes a term, G bundles, W words a bundle (32 items a word),
R rows of all bundles together.
"""

from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Int32, UInt32

from pallas_kernels._backend import Backend, resolve
from pallas_kernels.bloom import ref
from pallas_kernels.bloom.config import BloomConfig, heuristic, kernel_problem

type _Array = jax.Array | np.ndarray


class BloomMasks(NamedTuple):
    """Two bit masks over the catalogue: item i is bit i % 32 of word i // 32.

    Attributes:
      possibly: every item that satisfies the program, and false positives; u32[Q, G·W].
      surely: only items that satisfy the program; a subset of `possibly`; u32[Q, G·W].
    """

    possibly: UInt32[jax.Array, "Q words"]
    surely: UInt32[jax.Array, "Q words"]


def bloom_search(
    rows: UInt32[jax.Array | np.ndarray, "R W"],
    row_offsets: Int32[jax.Array | np.ndarray, "G1"],
    opcodes: Int32[jax.Array | np.ndarray, "F P"],
    operands: UInt32[jax.Array | np.ndarray, "F P K"],
    plan_of_query: Int32[jax.Array | np.ndarray, "Q"] | None = None,
    *,
    num_head: int,
    num_items: int,
    backend: Backend | None = None,
    config: BloomConfig | None = None,
) -> BloomMasks:
    """Runs one Boolean program a query over the whole catalogue (G = G1 - 1 bundles).

    Bundle g owns rows row_offsets[g] up to row_offsets[g+1]: `num_head` exact head rows, then K
    partitions of w_g = (rows of g - num_head) / K rows each. Hash k of a tail term selects row

        row_offsets[g] + num_head + k·w_g + operands[q, p, k] mod w_g

    so its K rows are always distinct. A bundle with w_g = 0 has no tail terms, and none matches.

    Args:
      rows: bit rows, as `bloom_build` makes them; the kernel wants W a multiple of 128.
      row_offsets: first row of each bundle, starting at 0 and ending at R.
      opcodes: postfix programs of `BloomOp`, padded with END. A program of END alone matches
        everything. Programs that `check_programs` rejects give undefined masks.
      operands: for HEAD the head row, in [0, num_head), in operands[q, p, 0]; for TAIL the K hashes
        of the term; ignored elsewhere.
      num_head: head rows of each bundle.
      num_items: items of the catalogue; bits from there on are zero in both masks.
      backend: None picks the best supported; a name never falls back.
      config: tiles of the kernel; None takes the heuristic. The XLA backend has none.

    Returns:
      Masks u32[Q, G·W].

    Raises:
      ValueError: wrong dtypes, shapes or bounds; `BackendError` for a named, unsupported backend.

    Cost: reads 4·W bytes a bundle for a HEAD and 4·K·W for a TAIL, writes 8·Q·G·W; two bitwise
    operations a word. Memory-bound. No gradient: everything is an integer.
    """
    _check(rows, row_offsets, opcodes, operands, num_head, num_items)
    width, num_steps = rows.shape[1], opcodes.shape[1]
    tiles = config or heuristic(width)
    chosen = resolve(
        "bloom_search",
        backend,
        lambda: kernel_problem(rows.shape, row_offsets.shape[0] - 1, opcodes.shape[0], tiles),
    )
    if chosen == "xla" or num_steps == 0:
        run = ref.bloom_search
    else:
        from pallas_kernels.bloom import mosaic_gpu  # 1 s of imports that the CPU never needs

        run = mosaic_gpu.with_config(tiles)
    masks = run(rows, row_offsets, opcodes, operands, num_head=num_head, num_items=num_items)
    if plan_of_query is not None:
        masks = (mask[plan_of_query] for mask in masks)
    return BloomMasks(*masks)


def _check(
    rows: _Array,
    row_offsets: _Array,
    opcodes: _Array,
    operands: _Array,
    num_head: int,
    num_items: int,
) -> None:
    for name, array, ndim, dtype in (
        ("rows", rows, 2, "uint32"),
        ("row_offsets", row_offsets, 1, "int32"),
        ("opcodes", opcodes, 2, "int32"),
        ("operands", operands, 3, "uint32"),
    ):
        if array.ndim != ndim or array.dtype != dtype:
            raise ValueError(
                f"bloom_search: {name} is {array.dtype}{list(array.shape)}; "
                f"expected {dtype} with {ndim} dimensions"
            )
    if operands.shape[:2] != opcodes.shape or operands.shape[2] == 0:
        raise ValueError(
            f"bloom_search: operands has shape {operands.shape}; expected "
            f"{opcodes.shape} followed by the number of hashes, at least 1"
        )
    capacity = (row_offsets.shape[0] - 1) * rows.shape[1] * 32
    if capacity < 0:
        raise ValueError("bloom_search: row_offsets is empty; expected one entry more than bundles")
    if not 0 <= num_items <= capacity:
        raise ValueError(
            f"bloom_search: num_items is {num_items}; the bundles hold 0 to {capacity} items"
        )
    if num_head < 0:
        raise ValueError(f"bloom_search: num_head is {num_head}; expected 0 or more")
