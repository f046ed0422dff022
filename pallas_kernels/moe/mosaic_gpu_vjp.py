"""The backward pass of `moe_ffn` on Hopper's tensor cores.

Rows of x and dy are gathered as in the forward pass. `project_gradient` multiplies dy with the
output matrix and, while the result is in registers, rebuilds the activation and differentiates it;
`weight_gradient` sums products of rows, expert by expert; `contract` takes the gradients back to
the width of x. No expert output is needed: a gate's gradient is ⟨dy · w_downᵀ, activated⟩.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, BFloat16, Float, Float32, Int32

from pallas_kernels._parts import num_parts
from pallas_kernels.moe import grouped_gemm
from pallas_kernels.moe.activation import Activation, scaled_nonlinear
from pallas_kernels.moe.chunks import Chunks, join_chunks, map_chunks
from pallas_kernels.moe.config import MoeConfig
from pallas_kernels.moe.dispatch import Dispatch, moe_dispatch
from pallas_kernels.moe.grouped_gemm import (
    HALF_ROWS,
    TILE_DEPTH,
    Gemm,
    Outbox,
)
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
from pallas_kernels.moe.mosaic_gpu import in_parts, input_weights, project
from pallas_kernels.moe.parts import num_products, split, step_of
from pallas_kernels.moe.products import contract, scalars, weight_gradient, wide_columns
from pallas_kernels.moe.ref import Experts, Kept

_PIECE = 8  # columns whose derivatives are computed at once
_ROWS = plgpu.Layout.WGMMA.reduce(1)  # one value a row of an accumulator


class ProjectedGradient(NamedTuple):
    """Result of `project_gradient`, in rows; zero where a row has no pair.

    Attributes:
      d_inputs: gradients of gate and up, or of up alone.
      weighted: the activation times the row's gate, whose products with dy are w_down's gradient.
      d_gates: gradient of the row's gate, by tiles of columns that are yet to be summed.
    """

    d_inputs: list[Float[Array, "P H"]]
    weighted: Float[Array, "P H"]
    d_gates: Float32[Array, "C P"]


def _project_gradient_kernel(
    expert, start, size, used, gates, dy, w_down, *refs, gemm, activation, group
):
    """dy · w_downᵀ, and what follows from it, gate and up."""
    *refs, ring, staging, inbox, arrived, row_sums = refs
    count = (len(refs) - 2) // 2
    kept, (*d_inputs, weighted, d_gates) = refs[:count], refs[count:]
    columns, hidden = gemm.accumulators[0], w_down.shape[1] // gemm.parts
    num_columns = hidden // columns
    num_steps = w_down.shape[2] // TILE_DEPTH
    place = functools.partial(
        grouped_gemm.place, used=used[0], num_columns=num_columns, group=group
    )
    warpgroup = lax.axis_index("warpgroup")
    begin = warpgroup * HALF_ROWS

    def load(work):
        tile, column = place(work)
        rows, own = pl.ds(tile * TILE_ROWS, TILE_ROWS), expert[tile]

        def stage(step, copy):
            at, left, right = step_of(step, num_steps, gemm.parts)
            copy(dy.at[rows, pl.ds((at + left * num_steps) * TILE_DEPTH, TILE_DEPTH)], 0)
            across = pl.ds(column * columns + right * hidden, columns)
            copy(w_down.at[own, across, pl.ds(at * TILE_DEPTH, TILE_DEPTH)], 1)

        return stage

    def multiply(accumulators, operands):
        rows, weights = operands
        plgpu.wgmma(accumulators[0], rows.at[pl.ds(begin, HALF_ROWS)], weights.T)

    def fetch(first_row, column, first):
        """Asks for a block of gate and up; rows behind the expert's last are another's."""
        rows = pl.ds(first_row, HALF_ROWS)
        across = pl.ds(column * columns + first, gemm.chunk)
        for n, store in enumerate(kept):
            target = inbox.at[warpgroup, n]
            plgpu.copy_gmem_to_smem(store.at[rows, across], target, arrived.at[warpgroup])

    def fetched(own):
        plgpu.barrier_wait(arrived.at[warpgroup])
        refs = [inbox.at[warpgroup, n] for n in range(count)]
        blocks = [plgpu.load(ref, layout=plgpu.Layout.WGMMA) for ref in refs]
        plgpu.commit_smem()  # orders these reads before the copy engine's next writes
        return [_first_rows(block, own) for block in blocks]

    def epilogue(work, values):
        tile, column = place(work)
        outbox = Outbox(staging)
        row, first_row, own = tile * TILE_ROWS + begin, start[tile] + begin, size[tile] - begin
        total = 0
        for first in range(0, columns, gemm.chunk):
            blocks = fetched(own)
            if first + gemm.chunk < columns:
                fetch(first_row, column, first + gemm.chunk)
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

    def prologue(work):
        tile, column = place(work)
        fetch(start[tile] + begin, column, 0)

    grouped_gemm.run(
        gemm,
        ring,
        lambda: used[0] * num_columns,
        lambda work: num_products(gemm.parts) * num_steps,
        load,
        multiply,
        epilogue,
        prologue=prologue,
    )


def _first_rows(block, count):
    """The first `count` rows of a block, then zeros; by bits, for two bf16 values at a time."""
    bits = jnp.int16 if block.dtype == jnp.bfloat16 else jnp.int32
    row = plgpu.broadcasted_iota(jnp.int32, block.shape, 0, layout=plgpu.Layout.WGMMA)
    own = ((row - count) >> 31).astype(bits)  # all ones if row < count
    return lax.bitcast_convert_type(lax.bitcast_convert_type(block, bits) & own, block.dtype)


def _differentiate(activation, blocks, d_activated, weight):
    """([d_gate, d_up, weighted activation], ⟨d_activated, activation⟩ a row) of a block.

    A few columns at a time, rounded at once: whole blocks in f32 would not fit the registers.
    """
    weight = lax.broadcast_in_dim(weight, (HALF_ROWS, _PIECE), (0,))
    pieces, total = [], 0
    for first in range(0, d_activated.shape[1], _PIECE):
        own = slice(first, first + _PIECE)
        *gate, up = (block[:, own].astype(jnp.float32) for block in blocks)
        value, weighted, slope = scaled_nonlinear(activation, gate[0] if gate else up, weight)
        d_value = d_activated[:, own]
        if gate:
            d_up, d_value = d_value * weighted, d_value * up
            results = [d_value * slope, d_up, up * weighted]
        else:
            results = [d_value * slope, weighted]
        pieces.append([out.astype(blocks[0].dtype) for out in results])
        total += d_value * value
    results = [jnp.concatenate(out, axis=1) for out in zip(*pieces, strict=True)]
    return results, jnp.sum(total, axis=1)


def project_gradient(
    dy_rows: BFloat16[Array, "P Dp"],
    groups: Groups,
    row_gates: Float32[Array, "P"],
    kept: list[Float[Array, "N H"]],
    w_down: BFloat16[Array, "E Hp D"],
    *,
    activation: Activation,
    config: MoeConfig,
) -> ProjectedGradient:
    """The gradient before the activation, from that of the output and what was kept.

    Rows and weights are in parts, their sizes Dp and Hp being those of D and H times the parts;
    results are in the dtype of what was kept.
    """
    dtype = kept[0].dtype
    num_rows, hidden = dy_rows.shape[0], kept[0].shape[1]
    columns = wide_columns(hidden)
    line = 128 // dtype.itemsize
    blocks = (2, len(kept), HALF_ROWS, line)
    gemm = Gemm(
        "moe_project_gradient",
        ((TILE_ROWS, TILE_DEPTH), (columns, TILE_DEPTH)),
        (columns,),
        config.programs,
        dtype,
        other_bytes=dtype.itemsize * math.prod(blocks) + 2 * 4 * HALF_ROWS,
        parts=num_parts(dtype),
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
            grouped_gemm.swizzled(blocks, dtype, rows=1),
            plgpu.Barrier(num_arrivals=len(kept), num_barriers=2),
            plgpu.SMEM((2, HALF_ROWS), jnp.float32),
        ],
    )
    return ProjectedGradient(d_inputs, weighted, d_gates)


@functools.partial(jax.jit, static_argnames=("activation", "chunk_tokens", "config"))
def backward(
    x: Float[Array, "T D"],
    ids: Int32[Array, "T K"],
    gates: Float32[Array, "T K"],
    experts: Experts,
    kept: Chunks | None,
    dy: Float[Array, "T D"],
    *,
    activation: Activation,
    chunk_tokens: int | None,
    config: MoeConfig,
) -> tuple[Float[Array, "T D"], Float32[Array, "T K"], Experts]:
    """(dx, d_gates, d_experts) from what `mosaic_gpu.forward` kept; chunk after chunk."""
    own_dtype, x_dtype = experts.w_up.dtype, x.dtype
    parts = in_parts(experts, x_dtype)
    whole = chunk_tokens is None or chunk_tokens >= x.shape[0]
    # Sums over several chunks are f32; a single chunk's come straight in the weights' dtype.
    dtype = own_dtype if whole else jnp.dtype(jnp.float32)

    def chunk(d_experts, part):
        how = {"activation": activation, "x_dtype": x_dtype, "dtype": dtype, "config": config}
        results, new = _chunk_gradient(parts, *part, **how)
        return (new if whole else jax.tree.map(jnp.add, d_experts, new)), results

    zeros = jax.tree.map(lambda w: jnp.zeros(w.shape, dtype), experts)
    d_experts, results = map_chunks(chunk, zeros, (split(x), ids, gates, dy), chunk_tokens, kept)
    dx, d_gates = join_chunks(results)
    return dx, d_gates, d_experts


def _chunk_gradient(experts, x, ids, gates, dy, kept, *, activation, x_dtype, dtype, config):
    """((dx, d_gates), d_experts) of a chunk of tokens; x and the weights are in parts."""
    num_experts = experts.w_up.shape[0]
    dispatch = moe_dispatch(ids, num_experts=num_experts)
    groups = group_rows(dispatch)
    counts = jnp.diff(dispatch.expert_token_offsets)
    dy = dy.astype(x_dtype)
    x_rows, dy_rows = gather_rows(x, groups), gather_rows(split(dy), groups)
    before = project_gradient(
        dy_rows,
        groups,
        row_gates(gates, dispatch, groups),
        _kept(kept, x_rows, dispatch, groups, experts, activation, x_dtype, config),
        experts.w_down,
        activation=activation,
        config=config,
    )
    gradient = functools.partial(
        weight_gradient, counts=counts, parts=num_parts(x_dtype), dtype=dtype, config=config
    )
    d_inputs = [split(rows) for rows in before.d_inputs]
    *d_w_gate, d_w_up = gradient(x_rows, d_inputs, name="moe_input_weight_gradient")
    (d_w_down,) = gradient(split(before.weighted), [dy_rows], name="moe_output_weight_gradient")
    dx_rows = contract(
        list(zip(d_inputs, input_weights(experts), strict=True)),
        groups,
        name="moe_contract_gradient",
        dtype=x_dtype,
        transposed=True,
        config=config,
    )
    dx = combine(dx_rows, None, groups.rows).astype(x_dtype)
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


def _kept(
    kept: Kept | None, x_rows, dispatch: Dispatch, groups, experts, activation, dtype, config
):
    """[gate, up] or [up]: what was kept, decoded; or the products anew."""
    if kept is None or kept.up is None:
        kept = project(
            x_rows,
            groups,
            dispatch.expert_token_offsets,
            experts,
            num_pairs=dispatch.expert_token_indices.shape[0],
            dtype=dtype,
            activation=activation,
            keep=True,
            activated=False,
            config=config,
        ).kept

    def decode(store):
        if not isinstance(store, tuple):
            return store
        codes, scales = store
        return (codes.astype(jnp.float32) * scales[:, None]).astype(dtype)

    return [decode(store) for store in kept if store is not None]
