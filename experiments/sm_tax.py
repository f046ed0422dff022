"""What a transfer costs the computation beside it: by a copy engine, and by multiprocessors.

    python -m experiments.sm_tax                 # needs a GPU; some minutes
    python -m experiments.sm_tax --blocks 16 32 --scratch

A matrix product, or HSTU attention, runs alone, and then while bytes move: to the host's memory by
a copy engine, or within the device's memory by a kernel of so many thread blocks, as NCCL moves
them where it has no copy engine. Each transfer is first timed alone and made to last 0.8 of the
computation, so that it lies beneath it from end to end. The slowdown is the time of both over that
of the computation alone; a block takes a multiprocessor and memory bandwidth, a copy engine the
latter alone. One JSON file and a plot go to experiments/results/sm_tax/.
"""

import argparse
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.compute_on import compute_on
from jax.experimental.pallas import mosaic_gpu as plgpu

from experiments import record, report
from jaxrec.distributed import XlaOptions
from pallas_kernels import hstu_attention
from pallas_kernels._timing import Timing, time_interleaved

KERNEL_NAME = "block_copy"
BLOCKS = (4, 8, 16, 32)
TILE_ROWS, TILE_COLUMNS = 64, 128  # i32: 32 KiB
STAGES = 4
BUFFER_BYTES = 512 * 2**20  # ten times the L2 cache
SHARE = 0.8  # of the computation's time that a transfer lasts
ENGINE = "copy engine"


def block_copy(x: jax.Array, num_blocks: int, passes: jax.Array) -> jax.Array:
    """A copy of x, made `passes` times over by `num_blocks` thread blocks.

    Args:
      x: i32[rows, 128]; rows a multiple of 64 · num_blocks.
      passes: i32[1].

    Raises:
      ValueError: another shape.
    """
    step = TILE_ROWS * num_blocks
    if x.ndim != 2 or x.shape[1] != TILE_COLUMNS or x.shape[0] % step:
        raise ValueError(f"x is {x.shape}; expected a multiple of {step} rows of {TILE_COLUMNS}")
    own_tiles = x.shape[0] // step

    def body(source, passes, target, tiles, arrived):
        block, count = lax.axis_index("block"), own_tiles * passes[0]

        def rows(n):
            tile = block * own_tiles + lax.rem(n, own_tiles)
            return pl.ds(tile * TILE_ROWS, TILE_ROWS)

        def load(n):
            slot = lax.rem(n, STAGES)
            plgpu.copy_gmem_to_smem(source.at[rows(n)], tiles.at[slot], arrived.at[slot])

        def move(n, _):
            slot = lax.rem(n, STAGES)
            plgpu.barrier_wait(arrived.at[slot])
            plgpu.copy_smem_to_gmem(tiles.at[slot], target.at[rows(n)])
            plgpu.wait_smem_to_gmem(1, wait_read_only=True)  # the tile before has left its slot
            following = n - 1 + STAGES
            pl.when((n > 0) & (following < count))(lambda: load(following))

        for n in range(STAGES):
            pl.when(n < count)(lambda n=n: load(jnp.int32(n)))
        lax.fori_loop(0, count, move, None)
        plgpu.wait_smem_to_gmem(0)

    return plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct(x.shape, x.dtype),
        grid=(num_blocks,),
        grid_names=("block",),
        scratch_types={
            "tiles": plgpu.SMEM((STAGES, TILE_ROWS, TILE_COLUMNS), x.dtype),
            "arrived": plgpu.Barrier(num_barriers=STAGES),
        },
        kernel_name=KERNEL_NAME,
    )(x, passes)


@dataclasses.dataclass(frozen=True)
class Work:
    """A computation.

    Attributes:
      run: of `inputs`.
    """

    name: str
    run: Callable[..., jax.Array]
    inputs: tuple[jax.Array | jax.ShapeDtypeStruct, ...]


def matmul(size: int = 8192, repeats: int = 8) -> Work:
    """A chain of bf16 products, each of size × size."""

    def run(x, w):
        return lax.fori_loop(0, repeats, lambda _, x: x @ w, x)

    square = jax.ShapeDtypeStruct((size, size), jnp.bfloat16)
    return Work("matmul", run, (square, square))


def attention(tokens: int = 131_072, length: int = 4096, heads: int = 4, width: int = 128) -> Work:
    """HSTU attention in sequences of one length."""
    offsets = jnp.arange(0, tokens + 1, length, dtype=jnp.int32)

    def run(q, k, v):
        return hstu_attention(q, k, v, offsets, max_len=length, alpha=width**-0.5)

    part = jax.ShapeDtypeStruct((tokens, heads, width), jnp.bfloat16)
    return Work("attention", run, (part,) * 3)


def works() -> tuple[Work, ...]:
    """What a training step mostly computes."""
    return matmul(), attention()


def by_engine(buffer: jax.Array, passes: jax.Array) -> jax.Array:
    """The buffer in the host's memory; once."""
    return jax.device_put(buffer, jax.memory.Space.Host)


def by_blocks(num_blocks: int) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """`block_copy` by so many."""
    return lambda buffer, passes: block_copy(buffer, num_blocks, passes)


def transfers(blocks: Sequence[int]) -> dict[str, Callable[[jax.Array, jax.Array], jax.Array]]:
    """Every way to move bytes, by name."""
    return {ENGINE: by_engine} | {f"{n} blocks": by_blocks(n) for n in blocks}


def beside(work: Work, transfer: Callable[..., jax.Array] | None) -> Callable[..., Any]:
    """One program: the transfer of its first two arguments, and the work on the others.

    The work is put on a stream of its own, as the scheduler starts what is there as early as it
    can, but would start the transfer as late.
    """

    def in_one(*inputs):
        with jax.disable_jit():  # calls within would become streams within a stream
            return work.run(*inputs)

    elsewhere = compute_on(
        in_one, compute_type="gpu_stream:1", out_memory_spaces=jax.memory.Space.Device
    )

    def both(buffer, passes, *inputs):
        result = elsewhere(*inputs)
        return result if transfer is None else (result, transfer(buffer, passes))

    return both


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """With asynchronous transfers, as training steps are."""
    return jax.jit(function, compiler_options=XlaOptions().compiler_options())


def buffer_of(num_bytes: float, blocks: Sequence[int]) -> jax.Array:
    """Something to transfer: about so many bytes, in rows that all numbers of blocks divide."""
    step = TILE_ROWS * math.lcm(*blocks)
    rows = max(1, round(num_bytes / (4 * TILE_COLUMNS) / step)) * step
    return jnp.zeros((rows, TILE_COLUMNS), jnp.int32)


def slowdowns(
    alone: Timing, transfer_us: Mapping[str, float], both: Mapping[str, Timing]
) -> list[dict[str, Any]]:
    """A row for each transfer: how much longer the computation takes beside it."""
    return [
        {
            "beside": name,
            "computation us": round(alone.p50_us, 1),
            "transfer us": round(transfer_us[name], 1),
            "both us": round(timing.p50_us, 1),
            "slowdown": round(timing.p50_us / alone.p50_us, 4),
        }
        for name, timing in both.items()
    ]


def measure(work: Work, blocks: Sequence[int], repeats: int) -> list[dict[str, Any]]:
    """Times the work alone and beside each transfer, which is made to fit first."""
    inputs = [
        jax.random.normal(jax.random.key(n), i.shape, i.dtype) / i.shape[-1] ** 0.5
        for n, i in enumerate(work.inputs)
    ]
    once, whole = jnp.ones(1, jnp.int32), buffer_of(BUFFER_BYTES, blocks)
    alone = compiled(beside(work, None))
    calls = {"alone": lambda: alone(whole, once, *inputs)}
    for name, transfer in transfers(blocks).items():
        run = compiled(transfer)
        calls[name] = lambda run=run: run(whole, once)
    first = time_interleaved(calls, repeats=repeats, flush_bytes=0)
    lasts = SHARE * first["alone"].p50_us

    both, sized = {}, {}
    for name, transfer in transfers(blocks).items():
        share = lasts / first[name].p50_us
        buffer, passes = whole, jnp.full(1, max(1, round(share)), jnp.int32)
        if share < 1 or name == ENGINE:
            buffer = buffer_of(share * whole.nbytes, blocks)
        run, together = compiled(transfer), compiled(beside(work, transfer))
        sized[name] = lambda run=run, b=buffer, p=passes: run(b, p)
        both[name] = lambda run=together, b=buffer, p=passes: run(b, p, *inputs)
    transfer_times = time_interleaved(sized, repeats=repeats, flush_bytes=0)
    timings = time_interleaved({"alone": calls["alone"], **both}, repeats=repeats, flush_bytes=0)
    base = timings.pop("alone")
    rows = slowdowns(base, {n: t.p50_us for n, t in transfer_times.items()}, timings)
    return [{"work": work.name, **row} for row in rows]


def picture(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """Slowdowns as bars, a group for each computation."""
    names = list(dict.fromkeys(row["work"] for row in rows))
    series: dict[str, list[float]] = {}
    for row in rows:
        series.setdefault(row["beside"], []).append(row["slowdown"])
    return report.bars(names, series, y="time / time alone")


def main() -> None:
    """Runs the experiment from the command line."""
    parser = argparse.ArgumentParser(description="Times computation beside transfers.")
    parser.add_argument("--blocks", type=int, nargs="+", default=list(BLOCKS))
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--scratch", action="store_true", help="the result is not for keeping")
    parser.add_argument("--results", type=Path, default=record.RESULTS)
    options = parser.parse_args()
    if jax.default_backend() != "gpu":
        raise SystemExit(
            "what a transfer costs can only be measured on a GPU, and JAX finds none here; "
            "`make aot` compiles these programs without one"
        )
    rows = [row for work in works() for row in measure(work, options.blocks, options.repeats)]
    report.print_table("Computation beside a transfer", rows)
    path = record.write(
        "sm_tax",
        config={"blocks": options.blocks, "repeats": options.repeats, "share": SHARE},
        measurements=[
            {"metric": "slowdown", "unit": "1", "value": row["slowdown"], **row} for row in rows
        ],
        scratch=options.scratch,
        folder=options.results,
    )
    path.with_suffix(".png").write_bytes(picture(rows))
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
