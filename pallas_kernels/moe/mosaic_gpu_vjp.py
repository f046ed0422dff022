"""The backward pass of `moe_ffn` on Hopper's tensor cores.

Rows of x and dy are gathered as in the forward pass. `project_gradient` multiplies dy with the
output matrix and, while the result is in registers, rebuilds the activation and differentiates it;
`weight_gradient` sums products of rows, expert by expert; `contract` takes the gradients back to
the width of x. No expert output is needed: a gate's gradient is ⟨dy · w_downᵀ, activated⟩.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, BFloat16, Float, Float32, Int32

from pallas_kernels.moe import grouped_gemm
from pallas_kernels.moe.activation import Activation, nonlinear
from pallas_kernels.moe.chunks import Chunks, join_chunks, map_chunks
from pallas_kernels.moe.config import MoeConfig
from pallas_kernels.moe.dispatch import Dispatch, moe_dispatch
from pallas_kernels.moe.grouped_gemm import HALF_ROWS, TILE_DEPTH, Gemm, Outbox
from pallas_kernels.moe.groups import (
    TILE_ROWS,
    Groups,
    combine,
    gates_by_expert,
    gather_rows,
    group_rows,
    row_gates,
    sum_by_expert,
)
from pallas_kernels.moe.mosaic_gpu import contract, input_weights, project, scalars, wide_columns
from pallas_kernels.moe.ref import Experts, Kept

_PIECE = 16  # columns whose derivatives are computed at once
_ROWS = plgpu.Layout.WGMMA.reduce(1)  # one value a row of an accumulator


class ProjectedGradient(NamedTuple):
    """Result of `project_gradient`, in rows; zero where a row has no pair.

    Attributes:
      d_inputs: gradients of gate and up, or of up alone.
      weighted: the activation times the row's gate, whose products with dy are w_down's gradient.
      d_gates: gradient of the row's gate, by tiles of columns that are yet to be summed.
    """

    d_inputs: list[BFloat16[Array, "P H"]]
    weighted: BFloat16[Array, "P H"]
    d_gates: Float32[Array, "C P"]


def _project_gradient_kernel(
    expert, start, size, used, gates, dy, w_down, *refs, gemm, activation, group
):
    """dy · w_downᵀ, and what follows from it, gate and up."""
    *refs, ring, staging, inbox, arrived, row_sums = refs
    count = (len(refs) - 2) // 2
    kept, (*d_inputs, weighted, d_gates) = refs[:count], refs[count:]
    columns = gemm.accumulators[0]
    num_columns = w_down.shape[1] // columns
    place = functools.partial(
        grouped_gemm.place, used=used[0], num_columns=num_columns, group=group
    )
    warpgroup = lax.axis_index("warpgroup")
    begin = warpgroup * HALF_ROWS

    def load(work):
        tile, column = place(work)
        rows, across = pl.ds(tile * TILE_ROWS, TILE_ROWS), pl.ds(column * columns, columns)
        own = expert[tile]

        def stage(step, copy):
            depth = pl.ds(step * TILE_DEPTH, TILE_DEPTH)
            copy(dy.at[rows, depth], 0)
            copy(w_down.at[own, across, depth], 1)

        return stage

    def multiply(accumulators, operands):
        rows, weights = operands
        plgpu.wgmma(accumulators[0], rows.at[pl.ds(begin, HALF_ROWS)], weights.T)

    def fetch(tile, column, first):
        """Asks for a block of gate and up; rows behind the expert's last are another's."""
        rows = pl.ds(start[tile] + begin, HALF_ROWS)
        across = pl.ds(column * columns + first, gemm.chunk)
        for n, store in enumerate(kept):
            target = inbox.at[warpgroup, n]
            plgpu.copy_gmem_to_smem(store.at[rows, across], target, arrived.at[warpgroup])

    def fetched(own):
        plgpu.barrier_wait(arrived.at[warpgroup])
        shape = (HALF_ROWS, gemm.chunk)
        row = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=plgpu.Layout.WGMMA)
        refs = [inbox.at[warpgroup, n] for n in range(count)]
        blocks = [plgpu.load(ref, layout=plgpu.Layout.WGMMA) for ref in refs]
        plgpu.commit_smem()  # orders these reads before the copy engine's next writes
        return [jnp.where(row < own, block, 0) for block in blocks]

    def epilogue(work, values):
        tile, column = place(work)
        outbox = Outbox(staging)
        row = tile * TILE_ROWS + begin
        total = 0
        for first in range(0, columns, gemm.chunk):
            blocks = fetched(size[tile] - begin)  # read again, as registers are scarce here
            if first + gemm.chunk < columns:
                fetch(tile, column, first + gemm.chunk)
            weight = plgpu.load(gates.at[pl.ds(row, HALF_ROWS)], layout=_ROWS, optimized=False)
            d_activated = values[0][:, first : first + gemm.chunk]
            results, sums = _differentiate(activation, blocks, d_activated, weight)
            total += sums
            across = pl.ds(column * columns + first, gemm.chunk)
            for store, result in zip((*d_inputs, weighted), results, strict=True):
                target = store.at[pl.ds(row, HALF_ROWS), across]
                outbox.put(result, lambda slot, target=target: outbox.copy(slot, target))
        sums = row_sums.at[warpgroup]
        sums[...] = total
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(sums, d_gates.at[column, pl.ds(row, HALF_ROWS)])

    grouped_gemm.run(
        gemm,
        ring,
        lambda: used[0] * num_columns,
        lambda work: dy.shape[1] // TILE_DEPTH,
        load,
        multiply,
        epilogue,
        prologue=lambda work: fetch(*place(work), 0),
    )


def _differentiate(activation, blocks, d_activated, weight):
    """([d_gate, d_up, weighted activation], ⟨d_activated, activation⟩ a row) of a block.

    A few columns at a time, rounded at once: whole blocks in f32 would not fit the registers.
    """
    dtype = blocks[0].dtype
    weight = lax.broadcast_in_dim(weight, d_activated.shape, (0,))
    *gate, up = (block.astype(jnp.float32) for block in blocks)
    value, slope = nonlinear(activation, gate[0]) if gate else nonlinear("swiglu", up)
    activated = (value * up if gate else value).astype(dtype).astype(jnp.float32)
    total = jnp.sum(d_activated * activated, axis=1)
    d = weight * d_activated
    d_inputs = [d * up * slope, d * value] if gate else [d * slope]
    return [out.astype(dtype) for out in (*d_inputs, weight * activated)], total


def project_gradient(
    dy_rows: BFloat16[Array, "P D"],
    groups: Groups,
    row_gates: Float32[Array, "P"],
    kept: list[BFloat16[Array, "N H"]],
    w_down: BFloat16[Array, "E H D"],
    *,
    activation: Activation,
    config: MoeConfig,
) -> ProjectedGradient:
    """The gradient before the activation, from that of the output and what was kept."""
    num_rows, hidden = dy_rows.shape[0], w_down.shape[1]
    columns = wide_columns(hidden)
    blocks = (2, len(kept), HALF_ROWS, TILE_DEPTH)
    gemm = Gemm(
        "moe_project_gradient",
        ((TILE_ROWS, TILE_DEPTH), (columns, TILE_DEPTH)),
        (columns,),
        config.programs,
        other_bytes=2 * math.prod(blocks) + 2 * 4 * HALF_ROWS,
    )
    missing = max(0, HALF_ROWS - kept[0].shape[0])  # no copy may be larger than its source
    kept = [jnp.pad(store, ((0, missing), (0, 0))) if missing else store for store in kept]
    rows = jax.ShapeDtypeStruct((num_rows, hidden), gemm.dtype)
    *d_inputs, weighted, d_gates = grouped_gemm.call(
        gemm,
        functools.partial(
            _project_gradient_kernel, gemm=gemm, activation=activation, group=config.shared_tiles
        ),
        [
            *[rows] * (len(kept) + 1),
            jax.ShapeDtypeStruct((hidden // columns, num_rows), jnp.float32),
        ],
        *scalars(groups),
        row_gates,
        dy_rows,
        w_down,
        *kept,
        scratch=[
            grouped_gemm.swizzled(blocks, rows=1),
            plgpu.Barrier(num_arrivals=len(kept), num_barriers=2),
            plgpu.SMEM((2, HALF_ROWS), jnp.float32),
        ],
    )
    return ProjectedGradient(d_inputs, weighted, d_gates)


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
        begin = first_row[expert]

        def stage(step, copy):
            depth = pl.ds(pl.multiple_of(begin + step * TILE_DEPTH, TILE_DEPTH), TILE_DEPTH)
            for half in range(2):
                across = pl.ds(row * TILE_ROWS + half * HALF_ROWS, HALF_ROWS)
                copy(lhs.at[depth, across], 0, half)
            for n, rows in enumerate(rhs):
                copy(rows.at[depth, pl.ds(column * columns, columns)], n + 1)

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
    num_experts = experts.w_up.shape[0]
    dispatch = moe_dispatch(ids, num_experts=num_experts)
    groups = group_rows(dispatch)
    counts = jnp.diff(dispatch.expert_token_offsets)
    w_down, dy = jnp.asarray(experts.w_down), dy.astype(x.dtype)
    x_rows, dy_rows = gather_rows(x, groups), gather_rows(dy, groups)
    before = project_gradient(
        dy_rows,
        groups,
        row_gates(gates, dispatch, groups),
        _kept(kept, x_rows, dispatch, groups, experts, activation, config),
        w_down,
        activation=activation,
        config=config,
    )
    gradient = functools.partial(weight_gradient, counts=counts, dtype=dtype, config=config)
    *d_w_gate, d_w_up = gradient(x_rows, before.d_inputs, name="moe_input_weight_gradient")
    (d_w_down,) = gradient(before.weighted, [dy_rows], name="moe_output_weight_gradient")
    dx_rows = contract(
        list(zip(before.d_inputs, input_weights(experts), strict=True)),
        groups,
        name="moe_contract_gradient",
        transposed=True,
        config=config,
    )
    dx = combine(dx_rows, None, groups.rows).astype(x.dtype)
    d_gates = jnp.sum(before.d_gates, axis=0)[jnp.maximum(groups.rows, 0)]
    d_gates = jnp.where(groups.rows >= 0, d_gates, 0)
    d_biases = [sum_by_expert(rows, groups, num_experts).astype(dtype) for rows in before.d_inputs]
    d_b_down = None
    if experts.b_down is not None:
        d_b_down, of_gates = _output_bias_gradient(experts.b_down, gates, ids, dy, dtype)
        d_gates += jnp.where(groups.rows >= 0, of_gates, 0)
    return (dx, d_gates), Experts(
        d_w_gate[0] if d_w_gate else None,
        d_w_up,
        d_w_down,
        None if experts.b_gate is None else d_biases[0],
        None if experts.b_up is None else d_biases[-1],
        d_b_down,
    )


def _output_bias_gradient(b_down, gates, ids, dy, dtype):
    """(d_b_down, its part of d_gates): both are products over all experts, since K·D is wider."""
    num_experts, f32 = b_down.shape[0], jnp.float32
    matmul = functools.partial(jnp.matmul, precision=lax.Precision.HIGHEST)
    weights = gates_by_expert(gates, ids, num_experts)
    d_b_down = matmul(weights.T, dy.astype(f32)).astype(dtype)
    products = matmul(dy.astype(f32), b_down.astype(f32).T)
    experts = jnp.clip(ids, 0, num_experts - 1)
    return d_b_down, jnp.take_along_axis(products, experts, axis=1)


def _kept(kept: Kept | None, x_rows, dispatch: Dispatch, groups, experts, activation, config):
    """[gate, up] or [up]: what was kept, decoded; or the products anew."""
    if kept is None or kept.up is None:
        kept = project(
            x_rows,
            groups,
            dispatch.expert_token_offsets,
            experts,
            num_pairs=dispatch.expert_token_indices.shape[0],
            activation=activation,
            keep=True,
            activated=False,
            config=config,
        ).kept

    def decode(store):
        if not isinstance(store, tuple):
            return store
        codes, scales = store
        return (codes.astype(jnp.float32) * scales[:, None]).astype(x_rows.dtype)

    return [decode(store) for store in kept if store is not None]
