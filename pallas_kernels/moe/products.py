"""Products of grouped rows that have no epilogue: back from the hidden width, and of weights.

f32 operands come in parts (`parts.split`).
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, BFloat16, Float, Int32

from pallas_kernels._parts import num_parts
from pallas_kernels.moe import grouped_gemm
from pallas_kernels.moe.config import MoeConfig
from pallas_kernels.moe.grouped_gemm import HALF_ROWS, TILE_DEPTH, Gemm, Outbox
from pallas_kernels.moe.groups import TILE_ROWS, Groups
from pallas_kernels.moe.parts import num_products, step_of


def scalars(groups: Groups) -> tuple[Array, ...]:
    """What the kernels read about tiles: expert, first pair and pairs of each, and their number."""
    tiles = groups.tiles
    return tiles.expert, tiles.start, tiles.size, tiles.used.reshape(1)


def wide_columns(width: int) -> int:
    """Columns of a tile with one accumulator."""
    return 256 if width % 256 == 0 else 128


def contract(
    pairs: list[tuple[BFloat16[Array, "P M"], BFloat16[Array, "E ..."]]],
    groups: Groups,
    *,
    name: str,
    dtype: Any,
    transposed: bool,
    config: MoeConfig,
) -> Float[Array, "P N"]:
    """Sum over the pairs of rows · weights [E, M, N] of their expert; transposed: of [E, N, M].

    Rows and weights are the parts of values in `dtype`, that of the result.
    """
    rows, weights = pairs[0]
    parts = num_parts(dtype)
    width = weights.shape[1] // parts if transposed else weights.shape[2]
    columns = wide_columns(width)
    block = (columns, TILE_DEPTH) if transposed else (TILE_DEPTH, columns)
    operands = ((TILE_ROWS, TILE_DEPTH), block)
    gemm = Gemm(name, operands, (columns,), config.programs, dtype, parts=parts)
    kernel = functools.partial(
        _contract_kernel, gemm=gemm, group=config.shared_tiles, transposed=transposed
    )
    out_type = jax.ShapeDtypeStruct((rows.shape[0], width), dtype)
    arrays = [array for pair in pairs for array in pair]
    return grouped_gemm.call(gemm, kernel, out_type, *scalars(groups), *arrays)


def _contract_kernel(expert, start, size, used, *refs, gemm, group, transposed):
    """out = the sum of rows · weights over all pairs of them, row tile by row tile."""
    del start, size
    *pairs, out, ring, staging = refs
    rows, weights = pairs[::2], pairs[1::2]
    columns, width = gemm.accumulators[0], out.shape[1]
    place = functools.partial(
        grouped_gemm.place, used=used[0], num_columns=width // columns, group=group
    )
    warpgroup = lax.axis_index("warpgroup")
    num_steps = rows[0].shape[1] // gemm.parts // TILE_DEPTH
    steps = num_products(gemm.parts) * num_steps

    def load(work):
        tile, column = place(work)
        down, own = pl.ds(tile * TILE_ROWS, TILE_ROWS), expert[tile]

        def stage(step, copy):
            def pair(n):
                at, left, right = step_of(step - n * steps, num_steps, gemm.parts)
                depth = pl.ds((at + left * num_steps) * TILE_DEPTH, TILE_DEPTH)
                copy(rows[n].at[down, depth], 0)
                across, depth = column * columns, at * TILE_DEPTH
                # The weights' parts stand along their second axis, whichever is summed.
                begin = right * (weights[n].shape[1] // gemm.parts)
                if transposed:
                    block = pl.ds(begin + across, columns), pl.ds(depth, TILE_DEPTH)
                else:
                    block = pl.ds(begin + depth, TILE_DEPTH), pl.ds(across, columns)
                copy(weights[n].at[own, *block], 1)

            if len(rows) == 1:
                pair(0)
            else:
                lax.cond(step < steps, lambda: pair(0), lambda: pair(1))

        return stage

    def multiply(accumulators, operands):
        lhs, rhs = operands
        lhs = lhs.at[pl.ds(warpgroup * HALF_ROWS, HALF_ROWS)]
        plgpu.wgmma(accumulators[0], lhs, rhs.T if transposed else rhs)

    def epilogue(work, values):
        tile, column = place(work)
        outbox = Outbox(staging)
        row = tile * TILE_ROWS + warpgroup * HALF_ROWS
        for first in range(0, columns, gemm.chunk):
            target = out.at[pl.ds(row, HALF_ROWS), pl.ds(column * columns + first, gemm.chunk)]
            block = values[0][:, first : first + gemm.chunk].astype(out.dtype)
            outbox.put(block, lambda slot, target=target: outbox.copy(slot, target))

    grouped_gemm.run(
        gemm,
        ring,
        lambda: used[0] * (width // columns),
        lambda work: len(rows) * steps,
        load,
        multiply,
        epilogue,
    )


def weight_gradient(
    lhs: BFloat16[Array, "P Mp"],
    rhs: list[BFloat16[Array, "P Np"]],
    counts: Int32[Array, "E"],
    *,
    name: str,
    parts: int,
    dtype: Any,
    config: MoeConfig,
) -> list[Float[Array, "E M N"]]:
    """lhsᵀ · rhs of each expert's rows; zeros for an expert without. Rows without a pair are 0.

    Both sides are in that many parts, Mp and Np wide; the results' dtype is another matter.
    """
    whole = (counts + TILE_ROWS - 1) // TILE_ROWS * TILE_ROWS
    height, width = lhs.shape[1] // parts, rhs[0].shape[1] // parts
    columns = wide_columns(width) // len(rhs)
    gemm = Gemm(
        name,
        ((2, TILE_DEPTH, HALF_ROWS), *[(TILE_DEPTH, columns)] * len(rhs)),
        (columns,) * len(rhs),
        config.programs,
        dtype,
        parts=parts,
    )
    return grouped_gemm.call(
        gemm,
        functools.partial(_weight_gradient_kernel, gemm=gemm),
        [jax.ShapeDtypeStruct((counts.size, height, width), dtype)] * len(rhs),
        jnp.cumsum(whole) - whole,
        (counts + TILE_DEPTH - 1) // TILE_DEPTH,
        lhs,
        *rhs,
    )


def _weight_gradient_kernel(first_row, steps, lhs, *refs, gemm):
    """out[e] = the sum of lhsᵀ · rhs over the rows of expert e."""
    *refs, ring, staging = refs
    rhs, out = refs[: len(refs) // 2], refs[len(refs) // 2 :]
    columns = gemm.accumulators[0]
    num_experts, height, width = out[0].shape
    num_columns = width // columns
    tiles = height // TILE_ROWS * num_columns
    warpgroup = lax.axis_index("warpgroup")

    def place(work):
        expert, tile = lax.div(work, tiles), lax.rem(work, tiles)
        return expert, lax.div(tile, num_columns), lax.rem(tile, num_columns)

    def load(work):
        expert, row, column = place(work)
        begin, num_steps = first_row[expert], steps[expert]

        def stage(step, copy):
            at, left, right = step_of(step, num_steps, gemm.parts)
            depth = pl.ds(pl.multiple_of(begin + at * TILE_DEPTH, TILE_DEPTH), TILE_DEPTH)
            for half in range(2):
                first = row * TILE_ROWS + half * HALF_ROWS + left * height
                copy(lhs.at[depth, pl.ds(first, HALF_ROWS)], 0, half)
            across = pl.ds(column * columns + right * width, columns)
            for n, rows in enumerate(rhs):
                copy(rows.at[depth, across], n + 1)

        return stage

    def multiply(accumulators, operands):
        for accumulator, rows in zip(accumulators, operands[1:], strict=True):
            plgpu.wgmma(accumulator, operands[0].at[warpgroup].T, rows)

    def epilogue(work, values):
        expert, row, column = place(work)
        outbox = Outbox(staging)
        down = pl.ds(row * TILE_ROWS + warpgroup * HALF_ROWS, HALF_ROWS)
        for store, value in zip(out, values, strict=True):
            for first in range(0, columns, gemm.chunk):
                target = store.at[expert, down, pl.ds(column * columns + first, gemm.chunk)]
                block = value[:, first : first + gemm.chunk].astype(gemm.dtype)
                outbox.put(block, lambda slot, target=target: outbox.copy(slot, target))

    grouped_gemm.run(
        gemm,
        ring,
        lambda: jnp.int32(num_experts * tiles),
        lambda work: num_products(gemm.parts) * steps[lax.div(work, tiles)],
        load,
        multiply,
        epilogue,
    )
