"""The backward pass of `moe_ffn` on Hopper's tensor cores.

Rows of x and dy are gathered as in the forward pass. `project_gradient` multiplies dy with the
output matrix and, while the result is in registers, rebuilds the activation and differentiates it;
`weight_gradient` sums products of rows, expert by expert; `contract` takes the gradients back to
the width of x. No expert output is needed: a gate's gradient is ⟨dy · w_downᵀ, activated⟩.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, BFloat16, Float, Float32, Int32

from pallas_kernels.moe import grouped_gemm
from pallas_kernels.moe.activation import Activation, nonlinear
from pallas_kernels.moe.config import MoeConfig
from pallas_kernels.moe.dispatch import Dispatch, in_expert_order, moe_dispatch
from pallas_kernels.moe.grouped_gemm import HALF_ROWS, TILE_DEPTH, TILE_ROWS, Gemm, Outbox
from pallas_kernels.moe.mosaic_gpu import (
    Chunks,
    Groups,
    combine,
    contract,
    gather_rows,
    group_rows,
    join_chunks,
    map_chunks,
    project,
    scalars,
    wide_columns,
)
from pallas_kernels.moe.ref import Experts, Kept

_ROWS = plgpu.Layout.WGMMA.reduce(1)  # one value a row of an accumulator


class ProjectedGradient(NamedTuple):
    """Result of `project_gradient`, in rows; zero where a row has no pair.

    Attributes:
      d_gate, d_up: gradients of gate and up.
      weighted: the activation times the row's gate, whose products with dy are w_down's gradient.
      d_gates: gradient of the row's gate, by tiles of columns that are yet to be summed.
    """

    d_gate: BFloat16[Array, "P H"]
    d_up: BFloat16[Array, "P H"]
    weighted: BFloat16[Array, "P H"]
    d_gates: Float32[Array, "C P"]


def _project_gradient_kernel(
    expert,
    start,
    size,
    used,
    gates,
    gate,
    up,
    dy,
    w_down,
    d_gate,
    d_up,
    weighted,
    d_gates,
    ring,
    staging,
    inbox,
    arrived,
    row_sums,
    *,
    gemm,
    activation,
    group,
):
    """dy · w_downᵀ, and what follows from it, gate and up."""
    columns = gemm.accumulators[0]
    num_columns = w_down.shape[1] // columns
    place = functools.partial(
        grouped_gemm.place, used=used[0], num_columns=num_columns, group=group
    )
    warpgroup = lax.axis_index("warpgroup")
    begin = warpgroup * HALF_ROWS

    def load(work, step, copy):
        tile, column = place(work)
        depth = pl.ds(step * TILE_DEPTH, TILE_DEPTH)
        copy(dy.at[pl.ds(tile * TILE_ROWS, TILE_ROWS), depth], 0)
        copy(w_down.at[expert[tile], pl.ds(column * columns, columns), depth], 1)

    def multiply(accumulators, operands):
        rows, weights = operands
        plgpu.wgmma(accumulators[0], rows.at[pl.ds(begin, HALF_ROWS)], weights.T)

    def fetch(tile, column, first):
        """Asks for a block of gate and up; rows behind the expert's last are another's."""
        rows = pl.ds(start[tile] + begin, HALF_ROWS)
        across = pl.ds(column * columns + first, gemm.chunk)
        for n, store in enumerate((gate, up)):
            target = inbox.at[warpgroup, n]
            plgpu.copy_gmem_to_smem(store.at[rows, across], target, arrived.at[warpgroup])

    def fetched(own):
        plgpu.barrier_wait(arrived.at[warpgroup])
        shape = (HALF_ROWS, gemm.chunk)
        row = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=plgpu.Layout.WGMMA)
        blocks = [plgpu.load(inbox.at[warpgroup, n], layout=plgpu.Layout.WGMMA) for n in (0, 1)]
        plgpu.commit_smem()  # orders these reads before the copy engine's next writes
        return [jnp.where(row < own, block, 0).astype(jnp.float32) for block in blocks]

    def prologue(work):
        fetch(*place(work), 0)

    def epilogue(work, values):
        tile, column = place(work)
        outbox = Outbox(staging)
        row = tile * TILE_ROWS + begin
        own = size[tile] - begin
        total = plgpu.layout_cast(jnp.zeros(HALF_ROWS, jnp.float32), _ROWS)
        for first in range(0, columns, gemm.chunk):
            g, u = fetched(own)
            if first + gemm.chunk < columns:
                fetch(tile, column, first + gemm.chunk)
            weight = plgpu.load(gates.at[pl.ds(row, HALF_ROWS)], layout=_ROWS, optimized=False)
            weight = lax.broadcast_in_dim(weight, (HALF_ROWS, gemm.chunk), (0,))
            d_activated = values[0][:, first : first + gemm.chunk]
            value, slope = nonlinear(activation, g)
            activated = (value * u).astype(gemm.dtype).astype(jnp.float32)
            total += jnp.sum(d_activated * activated, axis=1)
            d_activated = weight * d_activated
            # All are rounded before any is sent, so that no f32 block outlives a barrier.
            results = (d_activated * u * slope, d_activated * value, weight * activated)
            results = [result.astype(gemm.dtype) for result in results]
            across = pl.ds(column * columns + first, gemm.chunk)
            for store, result in zip((d_gate, d_up, weighted), results, strict=True):
                target = store.at[pl.ds(row, HALF_ROWS), across]
                outbox.put(result, lambda slot, target=target: outbox.copy(slot, target))
        sums = row_sums.at[warpgroup]
        sums[...] = total
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(sums, d_gates.at[column, pl.ds(row, HALF_ROWS)])

    grouped_gemm.run(
        gemm,
        ring,
        used[0] * num_columns,
        lambda work: dy.shape[1] // TILE_DEPTH,
        load,
        multiply,
        epilogue,
        prologue,
    )


def project_gradient(
    dy_rows: BFloat16[Array, "P D"],
    groups: Groups,
    row_gates: Float32[Array, "P"],
    gate: BFloat16[Array, "N H"],
    up: BFloat16[Array, "N H"],
    w_down: BFloat16[Array, "E H D"],
    *,
    activation: Activation,
    config: MoeConfig,
) -> ProjectedGradient:
    """The gradient before the activation, from that of the output and what was kept."""
    num_rows, hidden = dy_rows.shape[0], w_down.shape[1]
    columns = wide_columns(hidden)
    blocks = (2, 2, HALF_ROWS, TILE_DEPTH)
    gemm = Gemm(
        "moe_project_gradient",
        ((TILE_ROWS, TILE_DEPTH), (columns, TILE_DEPTH)),
        (columns,),
        config.programs,
        other_bytes=2 * 2 * 2 * HALF_ROWS * TILE_DEPTH + 2 * 4 * HALF_ROWS,
    )
    kernel = functools.partial(
        _project_gradient_kernel, gemm=gemm, activation=activation, group=config.shared_tiles
    )
    rows = jax.ShapeDtypeStruct((num_rows, hidden), gemm.dtype)
    d_gates = jax.ShapeDtypeStruct((hidden // columns, num_rows), jnp.float32)
    return ProjectedGradient(
        *grouped_gemm.call(
            gemm,
            kernel,
            [rows, rows, rows, d_gates],
            *scalars(groups),
            row_gates,
            gate,
            up,
            dy_rows,
            w_down,
            scratch=[
                grouped_gemm.swizzled(blocks, rows=1),
                plgpu.Barrier(num_arrivals=2, num_barriers=2),
                plgpu.SMEM((2, HALF_ROWS), jnp.float32),
            ],
        )
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

    def load(work, step, copy):
        expert, row, column = place(work)
        depth = pl.ds(pl.multiple_of(first_row[expert] + step * TILE_DEPTH, 8), TILE_DEPTH)
        for half in range(2):
            across = pl.ds(row * TILE_ROWS + half * HALF_ROWS, HALF_ROWS)
            copy(lhs.at[depth, across], 0, half)
        for n, rows in enumerate(rhs):
            copy(rows.at[depth, pl.ds(column * columns, columns)], n + 1)

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
        jnp.int32(num_experts * tiles),
        lambda work: steps[lax.div(work, tiles)],
        load,
        multiply,
        epilogue,
    )


def weight_gradient(
    lhs: BFloat16[Array, "P M"],
    rhs: list[BFloat16[Array, "P N"]],
    counts: Int32[Array, "E"],
    *,
    name: str,
    dtype: Any,
    config: MoeConfig,
) -> list[Float[Array, "E M N"]]:
    """lhsᵀ · rhs of each expert's rows; zeros for an expert without. Rows without a pair are 0."""
    whole = (counts + TILE_ROWS - 1) // TILE_ROWS * TILE_ROWS
    height, width = lhs.shape[1], rhs[0].shape[1]
    columns = wide_columns(width) // len(rhs)
    gemm = Gemm(
        name,
        ((2, TILE_DEPTH, HALF_ROWS), *[(TILE_DEPTH, columns)] * len(rhs)),
        (columns,) * len(rhs),
        config.programs,
        dtype,
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


@functools.partial(jax.jit, static_argnames=("activation", "chunk_tokens", "config"))
def backward(
    x: BFloat16[Array, "T D"],
    ids: Int32[Array, "T K"],
    gates: Float32[Array, "T K"],
    experts: Experts,
    kept: Chunks | None,
    dy: BFloat16[Array, "T D"],
    *,
    activation: Activation,
    chunk_tokens: int | None,
    config: MoeConfig,
) -> tuple[BFloat16[Array, "T D"], Float32[Array, "T K"], Experts]:
    """(dx, d_gates, d_experts) from what `mosaic_gpu.forward` kept; chunk after chunk."""
    own_dtype = experts.w_up.dtype
    experts = jax.tree.map(lambda w: w.astype(x.dtype), experts)
    whole = chunk_tokens is None or chunk_tokens >= x.shape[0]
    # Sums over several chunks are f32; a single chunk's come straight in the weights' dtype.
    dtype = own_dtype if whole else jnp.dtype(jnp.float32)

    def chunk(d_experts, part):
        x, ids, gates, dy, kept = part
        results, new = _chunk_gradient(x, ids, gates, experts, kept, dy, activation, dtype, config)
        return (new if whole else jax.tree.map(jnp.add, d_experts, new)), results

    zeros = jax.tree.map(lambda w: jnp.zeros(w.shape, dtype), experts)
    d_experts, results = map_chunks(chunk, zeros, (x, ids, gates, dy), chunk_tokens, kept)
    dx, d_gates = join_chunks(results)
    return dx, d_gates, d_experts


def _chunk_gradient(x, ids, gates, experts: Experts, kept: Kept, dy, activation, dtype, config):
    """((dx, d_gates), d_experts) of a chunk of tokens."""
    dispatch = moe_dispatch(ids, num_experts=experts.w_up.shape[0])
    groups = group_rows(dispatch)
    offsets = dispatch.expert_token_offsets
    counts = offsets[1:] - offsets[:-1]
    x_rows, dy_rows = gather_rows(x, groups), gather_rows(dy.astype(x.dtype), groups)
    gate, up = _gate_up(kept, x_rows, dispatch, groups, experts, activation, config)
    before = project_gradient(
        dy_rows,
        groups,
        _row_gates(gates, dispatch, groups),
        gate,
        up,
        experts.w_down,
        activation=activation,
        config=config,
    )
    gradient = functools.partial(weight_gradient, counts=counts, dtype=dtype, config=config)
    d_w_gate, d_w_up = gradient(
        x_rows, [before.d_gate, before.d_up], name="moe_input_weight_gradient"
    )
    (d_w_down,) = gradient(before.weighted, [dy_rows], name="moe_output_weight_gradient")
    dx_rows = contract(
        [(before.d_gate, experts.w_gate), (before.d_up, experts.w_up)],
        groups,
        name="moe_contract_gradient",
        transposed=True,
        config=config,
    )
    dx = combine(dx_rows, None, groups.rows).astype(x.dtype)
    d_gates = jnp.sum(before.d_gates, axis=0)[jnp.maximum(groups.rows, 0)]
    d_gates = jnp.where(groups.rows >= 0, d_gates, 0)
    return (dx, d_gates), Experts(d_w_gate, d_w_up, d_w_down, None, None, None)


def _gate_up(kept: Kept | None, x_rows, dispatch: Dispatch, groups, experts, activation, config):
    """What was kept, decoded; or both products anew."""
    if kept is None or kept.up is None:
        projected = project(
            x_rows,
            groups,
            dispatch.expert_token_offsets,
            experts.w_gate,
            experts.w_up,
            num_pairs=dispatch.expert_token_indices.shape[0],
            activation=activation,
            keep=True,
            activated=False,
            config=config,
        )
        return projected.gate, projected.up

    def decode(store):
        if not isinstance(store, tuple):
            return store
        codes, scales = store
        return (codes.astype(jnp.float32) * scales[:, None]).astype(x_rows.dtype)

    return decode(kept.gate), decode(kept.up)


def _row_gates(gates: Array, dispatch: Dispatch, groups: Groups) -> Float32[Array, "P"]:
    """The gate of each row, 0 where there is no pair."""
    own = in_expert_order(gates, dispatch)
    inside = jnp.arange(TILE_ROWS, dtype=jnp.int32)
    pairs = (groups.tiles.start[:, None] + inside).reshape(-1)
    return jnp.where(groups.filled, own[jnp.minimum(pairs, own.size - 1)], 0)
