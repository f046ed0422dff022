"""What the MoE kernels share: a persistent, warp-specialised loop over tiles of matrix products.

A program has three warpgroups. The last one fills a ring of shared-memory stages by TMA, or row by
row; the first two multiply, each its half of a tile's 128 rows, and run the epilogue. The ring goes
on from tile to tile, so the next tile's operands arrive while this one's results are written.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.moe import row_fetch
from pallas_kernels.moe.groups import TILE_ROWS

HALF_ROWS = TILE_ROWS // 2  # rows of one compute warpgroup
TILE_DEPTH = 64  # of the summed dimension, a stage
_SLOTS = 2  # results of a warpgroup that may be on their way to memory
_OUTBOX_BYTES = 2 * _SLOTS * HALF_ROWS * 128
_SHARED_BYTES = 224 * 1024  # of 227 KiB; the compiler needs the rest
_REGISTERS = (24, 240)  # of a producer's and a compute warpgroup's threads
_FETCHING_REGISTERS = (40, 232)


@dataclass(frozen=True)
class Gemm:
    """Static sizes of one kernel.

    Attributes:
      name: of the kernel.
      operands: blocks of bf16 that fill a stage: [rows, columns], or several of them stacked.
      accumulators: f32 blocks [64, columns] of one compute warpgroup.
      programs: thread blocks; they share the work.
      dtype: of the results that go through the outbox.
      other_bytes: shared memory beside the ring and the outbox.
      fetches: the first operand is fetched row by row.
      parts: of each operand, see `parts.split`.
    """

    name: str
    operands: tuple[tuple[int, ...], ...]
    accumulators: tuple[int, ...]
    programs: int
    dtype: Any = jnp.bfloat16
    other_bytes: int = 0
    fetches: bool = False
    parts: int = 1

    @property
    def arrivals(self) -> int:
        """Of a full stage: one for each TMA copy, and one for all rows that are fetched."""
        return sum(math.prod(shape[:-2]) for shape in self.operands)

    @property
    def lag(self) -> int:
        """Stages after a row fetch that its arrival is told.

        All but two: compute frees a stage when it has the next one, so a longer lag would wait for
        itself.
        """
        return self.stages - 2

    @property
    def chunk(self) -> int:
        """Columns that leave the registers at once: one line of 128 bytes."""
        return 128 // jnp.dtype(self.dtype).itemsize

    @property
    def stages(self) -> int:
        """Of the ring: as many as fit beside the outbox."""
        stage = sum(2 * math.prod(shape) for shape in self.operands)
        return (_SHARED_BYTES - _OUTBOX_BYTES - self.other_bytes) // stage


def swizzled(shape: Sequence[int], dtype: Any = jnp.bfloat16, *, rows: int = 8) -> Any:
    """Shared memory as TMA and wgmma want it: 128-byte lines, swizzled, in tiles of `rows` rows.

    Tiles of one row have the same bytes where the block is one line wide, and let TMA meet device
    memory at any row.
    """
    tiling = (rows, 128 // jnp.dtype(dtype).itemsize)
    return plgpu.SMEM(
        tuple(shape),
        dtype,
        transforms=(
            plgpu.TilingTransform(tiling),  # pyright: ignore[reportAbstractUsage]
            plgpu.SwizzleTransform(128),  # pyright: ignore[reportAbstractUsage]
        ),
    )


def place(work, used, num_columns: int, group: int):
    """(row tile, column tile) of a piece of work; `group` row tiles go through all columns first.

    Programs that run together then share both rows and weights from L2.
    """
    if num_columns == 1:
        return work, jnp.int32(0)
    span = group * num_columns
    block = lax.div(work, span)
    height = jnp.minimum(group, used - block * group)
    rest = work - block * span
    return block * group + lax.rem(rest, height), lax.div(rest, height)


def run(
    gemm: Gemm,
    ring: tuple[Any, ...],
    num_works: Callable[[], Any],
    num_steps: Callable[[Any], Any],
    load: Callable[[Any], Callable[[Any, Any], Any]],
    multiply: Callable[[Any, Any], Any],
    epilogue: Callable[[Any, Any], Any],
    prologue: Callable[[Any], Any] = lambda work: None,
) -> None:
    """The body of a kernel: all warpgroups of a program go through its share of the works.

    Args:
      gemm: static sizes.
      ring: (operand buffers, full barriers, empty barriers), which `call` gives the kernel.
      num_works: () -> i32; work w belongs to program w mod programs.
      num_steps: work -> steps along the summed dimension; may be 0.
      load: work -> (step, copy): calls copy(source, n, *block) for each block of each operand n;
        the source is a reference, or `row_fetch.Rows` if the kernel fetches its first operand.
      multiply: (accumulators, operands of a stage): issues the wgmmas.
      epilogue: (work, accumulators as values).
      prologue: (work), before the products, on the compute warpgroups.
    """
    buffers, full, empty = ring
    producer_registers, compute_registers = _FETCHING_REGISTERS if gemm.fetches else _REGISTERS
    program, warpgroup = lax.axis_index("program"), lax.axis_index("warpgroup")

    def each_work(body):
        def step(n, done):
            return body(program + n * gemm.programs, done)

        own_works = lax.div(num_works() - program + gemm.programs - 1, gemm.programs)
        return lax.fori_loop(0, own_works, step, jnp.int32(0))

    def tell(stage, latest):
        """Tells compute that the rows of a stage are there; `latest` fetches may be under way."""
        row_fetch.wait(latest)
        plgpu.commit_smem()  # wgmma reads through another proxy than the copies wrote
        plgpu.barrier_arrive(full.at[lax.rem(stage, gemm.stages)])

    def produce():
        plgpu.set_max_registers(producer_registers, action="decrease")

        def fill(work, done):
            load_stage = load(work)

            def stage(step, _):
                slot = lax.rem(done + step, gemm.stages)

                @pl.when(done + step >= gemm.stages)
                def _():
                    plgpu.barrier_wait(empty.at[slot])

                def copy(source, n, *block):
                    target = buffers[n].at[(slot, *block)]
                    if isinstance(source, row_fetch.Rows):
                        row_fetch.start(source, target)
                    else:
                        plgpu.copy_gmem_to_smem(source, target, full.at[slot])

                load_stage(step, copy)
                if gemm.fetches:
                    due = done + step - gemm.lag
                    pl.when(due >= 0)(lambda: tell(due, gemm.lag))

            steps = num_steps(work)
            lax.fori_loop(0, steps, stage, None)
            return done + steps

        done = each_work(fill)
        if gemm.fetches:
            last = jnp.maximum(done - gemm.lag, 0)
            lax.fori_loop(last, done, lambda stage, _: tell(stage, 0), None)

        def drain(step, _):
            plgpu.barrier_wait(empty.at[lax.rem(step, gemm.stages)])

        lax.fori_loop(jnp.maximum(done - gemm.stages, 0), done, drain, None)

    def compute():
        plgpu.set_max_registers(compute_registers, action="increase")

        def tile(work, done):
            steps = num_steps(work)
            prologue(work)

            def free(step):
                plgpu.barrier_arrive(empty.at[lax.rem(done + step, gemm.stages)])

            def stage(step, accumulators):
                slot = lax.rem(done + step, gemm.stages)
                plgpu.barrier_wait(full.at[slot])
                multiply(accumulators, [buffer.at[slot] for buffer in buffers])
                # All products but those just issued are done, so the stage before may be refilled.
                plgpu.wgmma_wait(len(accumulators))
                pl.when(step > 0)(lambda: free(step - 1))

            def products(*accumulators):
                def body(step, _):
                    stage(step, accumulators)

                lax.fori_loop(0, steps, body, None)
                return [accumulator[...] for accumulator in accumulators]  # waits for the rest

            values = pl.run_scoped(
                products,
                *(
                    plgpu.WGMMAAccumulatorRef((HALF_ROWS, n), jnp.float32)
                    for n in gemm.accumulators
                ),
            )
            pl.when(steps > 0)(lambda: free(steps - 1))
            epilogue(work, values)
            return done + steps

        each_work(tile)
        plgpu.wait_smem_to_gmem(0)

    pl.when(warpgroup < 2)(compute)
    pl.when(warpgroup == 2)(produce)


class Outbox:
    """The way of a compute warpgroup's results to memory, [64, 64] at a time."""

    def __init__(self, staging: Any):
        """Staging: what `call` gives the kernel."""
        self._staging = staging.at[lax.axis_index("warpgroup")]
        self._count = 0
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the tile before; long done

    def put(self, values: jax.Array, send: Callable[[Any], Any]) -> None:
        """Stages the values, then calls send(their reference), which starts copies from it."""
        slot = self._staging.at[self._count % _SLOTS]
        if self._count >= _SLOTS:
            plgpu.wait_smem_to_gmem(_SLOTS - 1, wait_read_only=True)
        self._count += 1
        slot[...] = values
        plgpu.commit_smem()
        send(slot)
        # One group for every put, even an empty one: the wait above counts groups.
        plgpu.commit_smem_to_gmem_group()

    @staticmethod
    def copy(source: Any, target: Any) -> None:
        """Starts a copy that belongs to the group of its put."""
        plgpu.copy_smem_to_gmem(source, target, commit_group=False)


def call(
    gemm: Gemm,
    kernel: Callable[..., None],
    out_type: Any,
    *args: jax.Array,
    scratch: Sequence[Any] = (),
) -> Any:
    """Launches kernel(*args, *outputs, ring, staging of the outbox, *scratch)."""
    buffers = [swizzled((gemm.stages, *shape)) for shape in gemm.operands]
    own_scratch = [
        *buffers,
        plgpu.Barrier(num_arrivals=gemm.arrivals, num_barriers=gemm.stages),
        plgpu.Barrier(num_arrivals=2, num_barriers=gemm.stages),
        swizzled((2, _SLOTS, HALF_ROWS, gemm.chunk), gemm.dtype, rows=1),
        *scratch,
    ]

    def body(*refs):
        split = len(refs) - len(own_scratch)
        own, others = refs[split:][: len(buffers) + 2], refs[split:][len(buffers) + 2 :]
        kernel(*refs[:split], (own[:-2], *own[-2:]), *others)

    return plgpu.kernel(
        body,
        out_type=out_type,
        grid=(gemm.programs,),
        grid_names=("program",),
        num_threads=3,
        thread_name="warpgroup",
        scratch_types=own_scratch,
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Lane,
            approx_math=gemm.parts == 1,  # its tanh is right to 2^-11 only
            # Safe: what a thread writes to shared memory only the copy engine reads, and the waits
            # and `commit_smem` around both are barriers of the warpgroup.
            unsafe_no_auto_barriers=True,
        ),
        kernel_name=gemm.name,
    )(*args)
