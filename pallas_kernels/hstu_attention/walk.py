"""What the HSTU kernels share: a persistent, warp-specialised walk over works of one head each.

A program has three warpgroups. The last one loads: what a work keeps all along (`resident`, for
its 128 rows), then tile after tile of 64 rows of what it meets (`streamed`), through a ring that
goes on from work to work. The first two compute, each 64 of the work's rows.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hstu_attention.tiles import ROW_MULTIPLE, TILE, WORK, Mask, Runs, Shape

_SHARED_BYTES = 224 * 1024  # of 227 KiB; barriers and reductions take the rest
_SHARED_MULTIPLE = 1024  # where the compiler lets a buffer start
_MAX_STAGES = 4
_PRODUCER_REGISTERS, _COMPUTE_REGISTERS = 40, 232  # for each thread of a warpgroup; 504 of three
_WIDE = 128  # columns of sums, from which on registers are short
SCORES = plgpu.Layout.WGMMA
BY_ROW, BY_COLUMN = SCORES.reduce(1), SCORES.reduce(0)
COMPILER_PARAMS = plgpu.CompilerParams(
    lowering_semantics=plgpu.LoweringSemantics.Lane,
    approx_math=True,
    # A reduction across warps is an error: all warpgroups would use the same scratch at once, which
    # the simulator does not see.
    reduction_scratch_bytes=0,
)


def swizzled(shape: Sequence[int], line: int) -> Any:
    """bf16 in shared memory as TMA and wgmma want it, in lines of 64 or 32 columns."""
    return plgpu.SMEM(
        tuple(shape),
        jnp.bfloat16,
        transforms=(
            plgpu.TilingTransform((8, line)),  # pyright: ignore[reportAbstractUsage]
            plgpu.SwizzleTransform(2 * line),  # pyright: ignore[reportAbstractUsage]
        ),
    )


@dataclass(frozen=True)
class Buffer:
    """One operand in shared memory; matrices are bf16 and vectors i32 or f32."""

    shape: tuple[int, ...]
    dtype: Any = jnp.bfloat16
    copies: int = 1

    def num_bytes(self, slots: int) -> int:
        """Of `slots` blocks."""
        own = slots * math.prod(self.shape) * jnp.dtype(self.dtype).itemsize
        return -(-own // _SHARED_MULTIPLE) * _SHARED_MULTIPLE

    def memory(self, slots: int, line: int) -> Any:
        """`slots` blocks."""
        if self.dtype == jnp.bfloat16:
            return swizzled((slots, *self.shape), line)
        return plgpu.SMEM((slots, *self.shape), self.dtype)


@dataclass(frozen=True)
class Walk:
    """Static sizes of one kernel.

    Attributes:
      name: of the kernel.
      heads: H; work w is head w mod H of its rows.
      programs: thread blocks.
      mask: which tiles count.
      by_keys: works are keys that meet tiles of queries, not queries that meet tiles of keys.
      resident: blocks that a work keeps.
      streamed: blocks of a stage of the ring.
      weights: matrices [64, 64] that a warpgroup hands to the tensor cores through shared memory.
      sums: columns that a warpgroup sums up in registers.
      cached: what works meet stands in rows of its own; a fifth field tells where they start.
    """

    name: str
    heads: int
    programs: int
    mask: Mask
    by_keys: bool
    resident: tuple[Buffer, ...]
    streamed: tuple[Buffer, ...]
    weights: int
    sums: int
    cached: bool = False

    @property
    def line(self) -> int:
        """Columns of a line of shared memory, of which all operands of a product have the same."""
        matrices = [buffer.shape for buffer in self.resident + self.streamed if buffer.shape[1:]]
        return min(64 if shape[-1] % 64 == 0 else 32 for shape in matrices)

    @property
    def is_wide(self) -> bool:
        """Whether the sums leave few registers for anything else."""
        return self.sums > _WIDE

    @property
    def has_staging(self) -> bool:
        """Whether results need memory of their own; else they leave through that of the weights."""
        return self.line != TILE

    def _shared_bytes(self, slots: int, stages: int) -> int:
        staging = 2 * TILE * self.line * 2 * self.has_staging
        return (
            sum(buffer.num_bytes(slots) for buffer in self.resident)
            + sum(buffer.num_bytes(stages) for buffer in self.streamed)
            + 2 * self.weights * TILE * TILE * 2
            + staging
        )

    @property
    def stages(self) -> int:
        """Of the ring: as many as fit beside one work's residents, at most four."""
        stages = most_stages(self.streamed, self._shared_bytes(1, 0))
        if not stages:
            raise ValueError(f"{self.name}: heads this wide do not fit shared memory")
        return stages

    @property
    def slots(self) -> int:
        """Works whose residents fit: two where there is room, so that the next arrive early."""
        return 2 if self._shared_bytes(2, self.stages) <= _SHARED_BYTES else 1


def share_registers(produce: Callable[[], None], compute: Callable[[], None]) -> None:
    """Runs both roles, computing on the registers that loading does not need."""

    def with_few():
        plgpu.set_max_registers(_PRODUCER_REGISTERS, action="decrease")
        produce()

    def with_many():
        plgpu.set_max_registers(_COMPUTE_REGISTERS, action="increase")
        compute()

    lax.cond(lax.axis_index("warpgroup") < 2, with_many, with_few)


def row_multiple(row: Any) -> Any:
    """A row where a sequence or a tile of it starts, as the copy engine must know it."""
    return pl.multiple_of(row, ROW_MULTIPLE)


def most_stages(streamed: Sequence[Buffer], other_bytes: int) -> int:
    """Stages of a ring that fit beside `other_bytes`; 0 if not even one does."""
    for stages in range(_MAX_STAGES, 0, -1):
        if sum(buffer.num_bytes(stages) for buffer in streamed) + other_bytes <= _SHARED_BYTES:
            return stages
    return 0


class Work(NamedTuple):
    """What a program does next.

    Attributes:
      head: its head.
      first_row: where its sequence starts.
      first_tile_row: where the sequence starts among the rows that the work meets.
      position: of its first token in the sequence.
      shape: of the sequence.
      runs: tiles that it meets.
    """

    head: Any
    first_row: Any
    first_tile_row: Any
    position: Any
    shape: Shape
    runs: Runs

    def row(self, position):
        """Row of a position that is a multiple of 8."""
        return row_multiple(self.first_row + position)

    def tile_row(self, position):
        """The same among the rows that the work meets."""
        return row_multiple(self.first_tile_row + position)


class Own(NamedTuple):
    """A warpgroup's share of a work.

    Attributes:
      warpgroup: 0 or 1.
      position: of its first token.
      rows: slice of the residents.
    """

    warpgroup: Any
    position: Any
    rows: Any


def run(
    walk: Walk,
    works: tuple[Any, Any],
    buffers: tuple[Any, ...],
    load_resident: Callable[[Work, Any], None],
    load_tile: Callable[[Work, Any, Any], None],
    compute: Callable[..., None],
) -> None:
    """The body of a kernel.

    Args:
      walk: static sizes.
      works: (fields, used) of `Works`.
      buffers: what `call` gives the kernel for this.
      load_resident: (work, copy) calls copy(source, n, *block) for each block of resident n.
      load_tile: (work, position of the tile, copy), for the streamed ones.
      compute: (work, own, steps, finished); steps(body) runs body(position of the tile, resident,
        streamed, free) for each tile that this warpgroup needs; the body must end with products
        issued but not waited for, and begin with a wait for them, after which it calls free.
        finished() comes when all products are done.
    """
    fields, used = works
    resident, streamed, (kept_full, kept_empty, full, empty) = buffers
    program, warpgroup = lax.axis_index("program"), lax.axis_index("warpgroup")
    # A tile goes when the next one is there: with room for one, it must go before.
    has_ring = walk.stages > 1

    def get(item):
        index, head = lax.div(item, walk.heads), lax.rem(item, walk.heads)
        first_row, position, length, history_end = (fields[index, n] for n in range(4))
        first_tile_row = fields[index, 4] if walk.cached else first_row
        shape = Shape(length, history_end)
        runs = _runs(walk, position, WORK, shape)
        return Work(head, first_row, first_tile_row, position, shape, runs)

    def each_work(body):
        items = used[0] * walk.heads
        rounds = lax.div(items + walk.programs - 1, walk.programs)

        def turn(n, done):
            # Back and forth, since works become shorter: the last of one turn is first of the next.
            back = lax.rem(n, 2)
            place = program + back * (walk.programs - 1 - 2 * program)
            item = n * walk.programs + place
            # An item behind the last one has no tiles.
            work = get(jnp.minimum(item, items - 1))
            steps = jnp.where(item < items, work.runs.count, 0)
            return body(n, work, steps, item < items, done)

        return lax.fori_loop(0, rounds, turn, jnp.int32(0))

    def produce():
        def fill(n, work, steps, exists, done):
            slot = lax.rem(n, walk.slots)

            @pl.when(exists)
            def _():
                @pl.when(n >= walk.slots)
                def _():
                    plgpu.barrier_wait(kept_empty.at[slot])

                load_resident(work, copier(resident, slot, kept_full))

            def stage(step, _):
                slot = lax.rem(done + step, walk.stages)

                @pl.when(done + step >= walk.stages)
                def _():
                    plgpu.barrier_wait(empty.at[slot])

                tile = work.runs.tile(step)
                load_tile(work, tile * TILE, copier(streamed, slot, full))

            lax.fori_loop(0, steps, stage, None)
            return done + steps

        done = each_work(fill)

        def drain(step, _):
            plgpu.barrier_wait(empty.at[lax.rem(step, walk.stages)])

        lax.fori_loop(jnp.maximum(done - walk.stages, 0), done, drain, None)
        items = used[0] * walk.heads
        turns = lax.div(items + walk.programs - 1, walk.programs)
        # Only the last turn may be without a work for this program.
        back = lax.rem(turns - 1, 2)
        last = (turns - 1) * walk.programs + program + back * (walk.programs - 1 - 2 * program)
        turns = turns - jnp.where(last < items, 0, 1)

        def drain_kept(n, _):
            plgpu.barrier_wait(kept_empty.at[lax.rem(n, walk.slots)])

        lax.fori_loop(jnp.maximum(turns - walk.slots, 0), turns, drain_kept, None)

    def consume():
        def one(n, work, steps, exists, done):
            slot = lax.rem(n, walk.slots)
            begin = warpgroup * TILE
            own = Own(warpgroup, work.position + begin, pl.ds(begin, TILE))
            needed = work.runs.within(_runs(walk, own.position, TILE, work.shape))
            is_empty = own.position >= work.shape.length
            first, end = (jnp.where(is_empty, 0, bound) for bound in needed)

            def release(step):
                plgpu.barrier_arrive(empty.at[lax.rem(done + step, walk.stages)])

            def skip(step, _):
                plgpu.barrier_wait(full.at[lax.rem(done + step, walk.stages)])
                release(step)

            def loop(body):
                def stage(step, _):
                    stage_slot = lax.rem(done + step, walk.stages)
                    plgpu.barrier_wait(full.at[stage_slot])
                    zero = unknown_zero(done + step)
                    kept = [buffer.at[slot + zero] for buffer in resident]
                    blocks = [buffer.at[stage_slot + zero] for buffer in streamed]

                    def free():
                        if has_ring:
                            pl.when(step > first)(lambda: release(step - 1))

                    body(work.runs.tile(step) * TILE, kept, blocks, free)
                    if not has_ring:
                        plgpu.wgmma_wait(0)
                        release(step)

                lax.fori_loop(first, end, stage, None)

            def finished():
                """The products are done: the last tile and the residents may go."""
                plgpu.commit_smem()
                if has_ring:
                    pl.when(end > first)(lambda: release(end - 1))
                lax.fori_loop(end, steps, skip, None)
                plgpu.barrier_arrive(kept_empty.at[slot])

            @pl.when(exists)
            def _():
                lax.fori_loop(0, first, skip, None)
                # Results of the work before leave through memory that this one writes.
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                plgpu.barrier_wait(kept_full.at[slot])
                compute(work, own, loop, finished)

            return done + steps

        each_work(one)
        plgpu.wait_smem_to_gmem(0)

    share_registers(produce, consume)


def unknown_zero(count: Any) -> Any:
    """Zero for any count, which the compiler cannot know.

    Addresses of operands that depend on it are computed in each step. Those that do not are kept in
    registers all along, two for each 16 columns of each operand: with wide heads, more than there
    are.
    """
    return lax.shift_right_arithmetic(count, jnp.int32(31))


def copies(buffers: Sequence[Buffer]) -> int:
    """Arrivals that fill a slot of these."""
    return sum(buffer.copies for buffer in buffers)


def _runs(walk: Walk, position, rows: int, shape: Shape) -> Runs:
    last = jnp.minimum(position + rows, shape.length) - 1
    runs = walk.mask.query_runs if walk.by_keys else walk.mask.key_runs
    return runs(position, last, shape)


def copier(buffers: Sequence[Any], slot: Any, barrier: Any) -> Callable[..., None]:
    """copy(source, n, *block): into a block of buffer n, and arrives when it is there."""

    def copy(source, n, *block):
        plgpu.copy_gmem_to_smem(source, buffers[n].at[(slot, *block)], barrier.at[slot])

    return copy


def store_rows(values, staging, out, work: Work, own: Own, line: int) -> None:
    """Writes a warpgroup's [64, width] result in bf16, the rows of its sequence only.

    The rows go as blocks of 64, 32, 16 and 8, by the bits of their number, which is rounded up to a
    multiple of 8: no other sequence starts before.
    """
    staging = staging.at[own.warpgroup]
    left = jnp.minimum(jnp.maximum(work.shape.length - own.position, 0), TILE)
    count = (left + ROW_MULTIPLE - 1) & -ROW_MULTIPLE
    row = work.row(own.position)
    for first in range(0, values.shape[1], line):
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        staging[...] = values[:, first : first + line].astype(jnp.bfloat16)
        plgpu.commit_smem()
        for rows in (64, 32, 16, 8):
            done = 0 if rows == TILE else pl.multiple_of(count & -2 * rows & 63, 2 * rows)

            @pl.when((count & rows) != 0)
            def _(done=done, rows=rows, first=first):
                target = out.at[pl.ds(row + done, rows), work.head, pl.ds(first, line)]
                plgpu.copy_smem_to_gmem(staging.at[pl.ds(done, rows)], target, commit_group=False)

        plgpu.commit_smem_to_gmem_group()


def call(walk: Walk, kernel: Callable[..., None], out_type: Any, *args: jax.Array) -> Any:
    """Launches kernel(*args, *outputs, buffers of `run`, weights, staging)."""
    resident = [buffer.memory(walk.slots, walk.line) for buffer in walk.resident]
    streamed = [buffer.memory(walk.stages, walk.line) for buffer in walk.streamed]
    scratch = [
        *resident,
        *streamed,
        plgpu.Barrier(num_arrivals=copies(walk.resident), num_barriers=walk.slots),
        plgpu.Barrier(num_arrivals=2, num_barriers=walk.slots),
        plgpu.Barrier(num_arrivals=copies(walk.streamed), num_barriers=walk.stages),
        plgpu.Barrier(num_arrivals=2, num_barriers=walk.stages),
        swizzled((2, walk.weights, TILE, TILE), walk.line),
    ]
    if walk.has_staging:
        scratch.append(swizzled((2, TILE, walk.line), walk.line))

    def body(*refs):
        split = len(refs) - len(scratch)
        own, inputs = iter(refs[split:]), refs[:split]
        kept, ring, barriers = (
            [next(own) for _ in range(n)] for n in (len(resident), len(streamed), 4)
        )
        weights = next(own)
        staging = next(own) if walk.has_staging else weights.at[:, 0]
        kernel(*inputs, (kept, ring, barriers), weights, staging)

    return plgpu.kernel(
        body,
        out_type=out_type,
        grid=(walk.programs,),
        grid_names=("program",),
        num_threads=3,
        thread_name="warpgroup",
        scratch_types=scratch,
        compiler_params=COMPILER_PARAMS,
        kernel_name=walk.name,
    )(*args)
