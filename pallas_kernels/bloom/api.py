"""Searching a bit-sliced, partitioned Bloom index.

Letters: Q queries, F programs, P program steps, K hashes a term, G bundles, W words a bundle (32
items a word), R rows of all bundles together, T tiles a query.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
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
    tiles: Int32[jax.Array | np.ndarray, "Q T"] | None = None,
    *,
    num_head: int,
    num_items: int,
    tile_words: int = 2,
    backend: Backend | None = None,
    config: BloomConfig | None = None,
) -> BloomMasks:
    """Runs one Boolean program a query over the catalogue, or over chosen tiles (G = G1 - 1).

    Bundle g owns rows row_offsets[g] up to row_offsets[g+1]: `num_head` exact head rows, then K
    partitions of w_g = (rows of g - num_head) / K rows each. Hash k of a tail term selects row

        row_offsets[g] + num_head + k·w_g + operands[f, p, k] mod w_g

    so its K rows are always distinct. A bundle with w_g = 0 has no tail terms, and none matches.

    Args:
      rows: bit rows, as `bloom_build` makes them; the kernel wants W a multiple of 128.
      row_offsets: first row of each bundle, starting at 0 and ending at R.
      opcodes: postfix programs of `BloomOp`, padded with END. A program of END alone matches
        everything. Programs that `check_programs` rejects give undefined masks.
      operands: for HEAD the head row, in [0, num_head), in operands[f, p, 0]; for TAIL the K hashes
        of the term; ignored elsewhere.
      plan_of_query: the program of each query, in [0, F); None runs program q for query q. Over the
        whole catalogue a program runs once, however many queries have it.
      tiles: for each query the tiles to look at, -1 for none; None looks at the whole catalogue.
        Tile i is the words i·tile_words up to (i + 1)·tile_words, so 64 items with the default.
      num_head: head rows of each bundle.
      num_items: items of the catalogue; bits from there on are zero in both masks.
      tile_words: words of a tile, a divisor of W; for the kernel a multiple of 128.
      backend: None picks the best supported; a name never falls back.
      config: tiles of the kernel; None takes the heuristic. The XLA backend has none.

    Returns:
      Masks u32[Q, G·W]; with tiles u32[Q, T·tile_words], those words in the order of the tiles, and
      0 for tile -1.

    Raises:
      ValueError: wrong dtypes, shapes or bounds; `BackendError` for a named, unsupported backend.

    Cost: for each word 4 bytes read for a HEAD and 4·K for a TAIL, 8 written, two bitwise
    operations an instruction. Words are F·G·W, or Q·T·tile_words. Memory-bound. No gradient:
    everything is an integer.
    """
    _check(rows, row_offsets, opcodes, operands, num_head, num_items)
    _check_queries(rows, opcodes, plan_of_query, tiles, tile_words)
    num_steps, static = opcodes.shape[1], {"num_head": num_head, "num_items": num_items}
    block = rows.shape[1] if tiles is None else tile_words
    blocks = config or heuristic(block)
    chosen = resolve(
        "bloom_search",
        backend,
        lambda: kernel_problem(
            rows.shape,
            (row_offsets.shape[0] - 1) if tiles is None else tiles.shape[1],
            opcodes.shape[0],
            blocks,
            tile_words=block,
        ),
    )
    kernel = None if chosen == "xla" or num_steps == 0 else blocks
    arrays = (rows, row_offsets, opcodes, operands)
    if tiles is None:
        masks = _backend(kernel).bloom_search(*arrays, **static, **_config(kernel))
        if plan_of_query is not None:
            masks = (mask[jnp.asarray(plan_of_query)] for mask in masks)
    else:
        programs = np.arange(len(opcodes), dtype=np.int32)
        programs = programs if plan_of_query is None else plan_of_query
        masks = _backend(kernel).bloom_search_tiles(
            *arrays, programs, tiles, tile_words=tile_words, **static, **_config(kernel)
        )
    return BloomMasks(*masks)


def _backend(kernel: BloomConfig | None):
    if kernel is None:
        return ref
    from pallas_kernels.bloom import mosaic_gpu  # 1 s of imports that the CPU never needs

    return mosaic_gpu


def _config(kernel: BloomConfig | None) -> dict[str, BloomConfig]:
    return {} if kernel is None else {"config": kernel}


def _check_queries(
    rows: _Array,
    opcodes: _Array,
    plan_of_query: _Array | None,
    tiles: _Array | None,
    tile_words: int,
) -> None:
    num_queries = opcodes.shape[0]
    if plan_of_query is not None:
        if plan_of_query.ndim != 1 or plan_of_query.dtype != "int32":
            raise ValueError(
                f"bloom_search: plan_of_query is {plan_of_query.dtype}{list(plan_of_query.shape)}; "
                "expected int32 with 1 dimension"
            )
        num_queries = plan_of_query.shape[0]
    if tiles is None:
        return
    if tiles.ndim != 2 or tiles.dtype != "int32" or tiles.shape[0] != num_queries:
        raise ValueError(
            f"bloom_search: tiles is {tiles.dtype}{list(tiles.shape)}; expected int32 with "
            f"{num_queries} rows, one for each query"
        )
    if tile_words < 1 or rows.shape[1] % tile_words:
        raise ValueError(
            f"bloom_search: tile_words is {tile_words}; expected a divisor of the bundle's "
            f"{rows.shape[1]} words"
        )


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
