"""What the HSTU kernels share: a persistent, warp-specialised walk over works of one head each.

The last warpgroup of a program loads: what a work keeps all along (`resident`, for its 128 or 64
rows), then tile after tile of 64 rows of what it meets (`streamed`), through a ring that goes on
from work to work. The others, two or one, compute 64 of the work's rows each.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hstu_attention.operands import compiler_params, copier, unknown_zero
from pallas_kernels.hstu_attention.sizes import Walk, copies
from pallas_kernels.hstu_attention.tiles import ROW_MULTIPLE, TILE, Runs, Shape

_PRODUCER_REGISTERS, _COMPUTE_REGISTERS = 40, 232  # for each thread of a warpgroup; 504 of three
SCORES = plgpu.Layout.WGMMA
BY_ROW, BY_COLUMN = SCORES.reduce(1), SCORES.reduce(0)


def share_registers(
    warpgroups: int, produce: Callable[[], None], compute: Callable[[], None]
) -> None:
    """Runs both roles, computing on the registers that loading does not need."""
    computes = lax.axis_index("warpgroup") < warpgroups
    if warpgroups == 1:  # both have as many registers as an instruction can name
        lax.cond(computes, compute, produce)
        return

    def with_few():
        plgpu.set_max_registers(_PRODUCER_REGISTERS, action="decrease")
        produce()

    def with_many():
        plgpu.set_max_registers(_COMPUTE_REGISTERS, action="increase")
        compute()

    lax.cond(computes, with_many, with_few)


def row_multiple(row: Any) -> Any:
    """A row where a sequence or a tile of it starts, as the copy engine must know it."""
    return pl.multiple_of(row, ROW_MULTIPLE)


class Work(NamedTuple):
    """What a program does next.

    Attributes:
      head: its head.
      first_row: where its sequence starts.
      first_tile_row: where the sequence starts among the rows that the work meets.
      position: of its first token in the sequence.
      shape: of the sequence.
      runs: tiles that it meets.
      size: rows that it has, of which some may lie behind its sequence.
    """

    head: Any
    first_row: Any
    first_tile_row: Any
    position: Any
    shape: Shape
    runs: Runs
    size: int

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
        runs = _runs(walk, position, walk.rows, shape)
        return Work(head, first_row, first_tile_row, position, shape, runs, walk.rows)

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

    share_registers(walk.warpgroups, produce, consume)


def _runs(walk: Walk, position, rows: int, shape: Shape) -> Runs:
    last = jnp.minimum(position + rows, shape.length) - 1
    runs = walk.mask.query_runs if walk.by_keys else walk.mask.key_runs
    return runs(position, last, shape)


def store_rows(values, staging, out, work: Work, own: Own) -> None:
    """Writes a warpgroup's [64, width] result in out's dtype, the rows of its sequence only.

    The rows go as blocks of 64, 32, 16 and 8, by the bits of their number, which is rounded up to a
    multiple of 8: no other sequence starts before.
    """
    staging = staging.at[own.warpgroup]
    line = staging.shape[1]
    left = jnp.minimum(jnp.maximum(work.shape.length - own.position, 0), TILE)
    count = (left + ROW_MULTIPLE - 1) & -ROW_MULTIPLE
    row = work.row(own.position)
    for first in range(0, values.shape[1], line):
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        staging[...] = values[:, first : first + line].astype(out.dtype)
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
    staged = walk.staging_memory
    scratch = [
        *resident,
        *streamed,
        plgpu.Barrier(num_arrivals=copies(walk.resident), num_barriers=walk.slots),
        plgpu.Barrier(num_arrivals=walk.warpgroups, num_barriers=walk.slots),
        plgpu.Barrier(num_arrivals=copies(walk.streamed), num_barriers=walk.stages),
        plgpu.Barrier(num_arrivals=walk.warpgroups, num_barriers=walk.stages),
        walk.weight_memory,
        *([] if staged is None else [staged]),
    ]

    def body(*refs):
        split = len(refs) - len(scratch)
        own, inputs = iter(refs[split:]), refs[:split]
        kept, ring, barriers = (
            [next(own) for _ in range(n)] for n in (len(resident), len(streamed), 4)
        )
        weights = next(own)
        staging = weights.at[:, 0] if staged is None else next(own)
        kernel(*inputs, (kept, ring, barriers), weights, staging)

    return plgpu.kernel(
        body,
        out_type=out_type,
        grid=(walk.programs,),
        grid_names=("program",),
        num_threads=walk.warpgroups + 1,
        thread_name="warpgroup",
        scratch_types=scratch,
        compiler_params=compiler_params(walk.parts),
        kernel_name=walk.name,
    )(*args)
