"""Rows of a table fetched into shared memory by their numbers, without a gathered copy of them.

TMA cannot meet single rows of a tile that wgmma reads. So the 128 threads of a warpgroup copy 16
bytes each by `cp.async`: eight threads a row of 128 bytes, 16 rows at once, eight times for a tile
of 128 rows. The copies of a tile form a group; `wait` waits until all groups but the latest are
there.
"""

from typing import Any, NamedTuple

from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, nvvm

LINE = 128  # bytes of a row of the tile
_COPY = 16  # bytes that a thread copies at once: the most that cp.async can
_THREADS = 128
_AT_ONCE = _THREADS * _COPY // LINE  # rows


class Rows(NamedTuple):
    """Rows of a table in device memory, one line of 128 bytes of each.

    Attributes:
      table: reference [T, 64] of bf16.
      numbers: reference i32[R], R a multiple of 16: the rows wanted, each in 0 … T - 1.
    """

    table: Any
    numbers: Any


def start(rows: Rows, target: Any) -> None:
    """Starts the copies into a tile [R, 64] that is tiled and swizzled for wgmma, as one group.

    All threads of a warpgroup call it together.
    """
    tile = (
        plgpu.TilingTransform((8, LINE // 2)),  # pyright: ignore[reportAbstractUsage]
        plgpu.SwizzleTransform(LINE),  # pyright: ignore[reportAbstractUsage]
    )

    fetch: Any = plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(), plgpu.RefType(), plgpu.RefType(tile))
    )(_copy)
    fetch(rows.table, rows.numbers, target)


def wait(latest: int) -> None:
    """Waits until all groups that this thread started have arrived but the `latest` ones."""

    def wait_group(_) -> None:
        nvvm.cp_async_wait_group(latest)

    inline: Any = plgpu.inline_mgpu()(wait_group)
    inline()


def _copy(_, table, numbers, target) -> None:
    """The part of one thread: 16 bytes of every sixteenth row."""
    i8, i32, i64 = (ir.IntegerType.get_signless(bits) for bits in (8, 32, 64))

    def constant(value):
        return arith.constant(i32, value)

    thread = arith.andi(utils.thread_idx(), constant(_THREADS - 1))
    row = arith.divui(thread, constant(LINE // _COPY))
    chunk = arith.remui(thread, constant(LINE // _COPY))
    # The 128-byte swizzle: chunks of a line change places with the line's number mod 8.
    swapped = arith.xori(chunk, arith.remui(row, constant(8)))
    first = arith.addi(arith.muli(row, constant(LINE)), arith.muli(swapped, constant(_COPY)))
    place = utils.getelementptr(utils.memref_ptr(target), [first], i8)
    own = utils.getelementptr(_device_pointer(numbers), [row], i32)
    source = utils.getelementptr(_device_pointer(table), [arith.muli(chunk, constant(_COPY))], i8)
    (pitch, _), _ = ir.MemRefType(table.type).get_strides_and_offset()
    for done in range(0, ir.MemRefType(numbers.type).shape[0], _AT_ONCE):
        number = llvm.load(i32, utils.getelementptr(own, [done], i32))
        offset = arith.muli(arith.extsi(i64, number), arith.constant(i64, 2 * pitch))
        nvvm.cp_async_shared_global(
            # Sixteen rows on, a row's number mod 8 and so its swizzle are the same.
            utils.getelementptr(place, [done * LINE], i8),
            utils.getelementptr(source, [offset], i8),
            _COPY,
            nvvm.LoadCacheModifierKind.CG,
        )
    nvvm.cp_async_commit_group()


def _device_pointer(reference: Any) -> Any:
    return llvm.addrspacecast(llvm.PointerType.get(address_space=1), utils.memref_ptr(reference))
