"""The forward pass of `moe_ffn` on Hopper's tensor cores.

Rows of x stand in groups that start on tile boundaries, one group an expert: XLA gathers them, with
zeroed rows behind an expert's pairs, or the kernel fetches them. `project` multiplies them with
both input matrices of their expert and applies the activation; `contract` multiplies the result
with the output matrix. What the gradient keeps, gate and up, is written without padding, row n for
pair n. f32 operands come in bf16 parts (`parts.split`).
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, BFloat16, Float, Float32, Int32

from pallas_kernels._parts import num_parts
from pallas_kernels.moe import grouped_gemm, ref
from pallas_kernels.moe.activation import Activation, activate
from pallas_kernels.moe.chunks import Chunks, join_chunks, map_chunks
from pallas_kernels.moe.config import MoeConfig
from pallas_kernels.moe.dispatch import moe_dispatch
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
)
from pallas_kernels.moe.parts import num_products, split, step_of
from pallas_kernels.moe.products import contract, scalars, wide_columns
from pallas_kernels.moe.ref import Experts, Kept
from pallas_kernels.moe.row_fetch import Rows

_COLUMNS = plgpu.Layout.WGMMA.reduce(0)  # one value a column of an accumulator
_TAIL = 8  # rows that are written apart: the last ones of an expert, if fewer than eight


def _project_kernel(expert, start, size, used, *refs, gemm, activation, group, keep, biased):
    """hidden = f(x · w_gate) ⊙ (x · w_up), or f(x · w_up), row tile by row tile."""
    tokens, x, *refs = refs if gemm.fetches else (None, *refs)
    count = len(gemm.accumulators)
    weights, refs = refs[:count], refs[count:]
    biases, refs = refs[: count * biased], refs[count * biased :]
    *out, ring, staging = refs
    kept, hidden = out[: 2 * count * keep], out[2 * count * keep :]
    columns = gemm.accumulators[0]
    num_columns = weights[0].shape[2] // columns
    num_steps = x.shape[1] // gemm.parts // TILE_DEPTH
    place = functools.partial(
        grouped_gemm.place, used=used[0], num_columns=num_columns, group=group
    )
    warpgroup = lax.axis_index("warpgroup")
    half = pl.ds(warpgroup * HALF_ROWS, HALF_ROWS)

    def load(work):
        tile, column = place(work)
        rows, across = pl.ds(tile * TILE_ROWS, TILE_ROWS), pl.ds(column * columns, columns)
        own = expert[tile]

        def stage(step, copy):
            at, left, right = step_of(step, num_steps, gemm.parts)
            depth = pl.ds((at + left * num_steps) * TILE_DEPTH, TILE_DEPTH)
            if tokens is None:
                copy(x.at[rows, depth], 0)
            else:
                copy(Rows(x.at[:, depth], tokens.at[rows]), 0)
            depth = pl.ds((at + right * num_steps) * TILE_DEPTH, TILE_DEPTH)
            for n, weight in enumerate(weights):
                copy(weight.at[own, depth, across], n + 1)

        return stage

    def multiply(accumulators, operands):
        rows = operands[0].at[half]
        for accumulator, weight in zip(accumulators, operands[1:], strict=True):
            plgpu.wgmma(accumulator, rows, weight)

    def block(values, n, tile, across, first):
        """A matrix's next columns, rounded as they are kept."""
        own = values[n][:, first : first + gemm.chunk]
        if biased:
            bias = biases[n].at[expert[tile], across]
            bias = plgpu.load(bias, layout=_COLUMNS, optimized=False)
            own += lax.broadcast_in_dim(bias, own.shape, (1,))
        return own.astype(gemm.dtype)

    def epilogue(work, values):
        tile, column = place(work)
        outbox = Outbox(staging)
        row = tile * TILE_ROWS + warpgroup * HALF_ROWS
        for first in range(0, columns, gemm.chunk):
            across = pl.ds(column * columns + first, gemm.chunk)
            matrices = [block(values, n, tile, across, first) for n in range(count)]
            for n in range(count * keep):
                store, tails = kept[2 * n : 2 * n + 2]
                send = _keep_rows(store, tails, tile, across, expert, start, size)
                outbox.put(matrices[n], send)
            for store in hidden:
                gate, up = matrices if count == 2 else (None, *matrices)
                activated = activate(activation, gate, up).astype(gemm.dtype)
                target = store.at[pl.ds(row, HALF_ROWS), across]
                outbox.put(activated, lambda slot, target=target: outbox.copy(slot, target))

    grouped_gemm.run(
        gemm,
        ring,
        lambda: used[0] * num_columns,
        lambda work: num_products(gemm.parts) * num_steps,
        load,
        multiply,
        epilogue,
    )


def _keep_rows(store, tails, tile, across, expert, start, size):
    """Sends the rows of a staged block that are pairs to their places; `tails` takes the last ones.

    A half tile with n pairs goes as blocks of 64, 32, 16 and 8 rows, by the bits of n. What remains
    are fewer than eight rows, which only the last tile of an expert has.
    """
    begin = lax.axis_index("warpgroup") * HALF_ROWS
    own = jnp.clip(size[tile] - begin, 0, HALF_ROWS)
    row, last = start[tile] + begin, expert[tile]

    def send(slot):
        for count in (64, 32, 16, 8):
            done = 0 if count == 64 else pl.multiple_of(own & -2 * count & 63, 2 * count)

            @pl.when((own & count) != 0)
            def _(done=done, count=count):
                rows = pl.ds(row + done, count)
                Outbox.copy(slot.at[pl.ds(done, count)], store.at[rows, across])

        @pl.when((own & 7) != 0)
        def _():
            done = pl.multiple_of(own & ~7, _TAIL)
            Outbox.copy(slot.at[pl.ds(done, _TAIL)], tails.at[last, :, across])

    return send


class Projected(NamedTuple):
    """Result of `project`.

    Attributes:
      hidden: the activation of each row, if wanted.
      kept: gate and up of each pair, row n for pair n, if wanted.
    """

    hidden: Float[Array, "P H"] | None
    kept: Kept


def project(
    x: BFloat16[Array, "R D"],
    groups: Groups,
    offsets: Int32[Array, "E1"],
    experts: Experts,
    *,
    num_pairs: int,
    dtype: Any,
    activation: Activation,
    keep: bool,
    activated: bool = True,
    fetches: bool = False,
    config: MoeConfig,
) -> Projected:
    """The input products of every expert, and the activation before its output product.

    Args:
      x: rows in groups [P, D]; or tokens [T, D], of which the kernel fetches its rows; in parts.
      groups, offsets, num_pairs: where rows stand.
      experts: weights, in parts, and biases.
      dtype: bf16 or f32, that of the results, whose parts x and the weights are.
      activation: see `moe_ffn`.
      keep: writes gate and up.
      activated: writes the activation.
      fetches: x are tokens. Rows without a pair then are those of token 0, and as unused.
      config: how the kernel runs.
    """
    weights, biases = input_weights(experts), _input_biases(experts)
    num_experts, _, hidden = weights[0].shape
    # With one accumulator of f32 results, 256 columns would be a register too many.
    narrow = len(weights) > 1 or num_parts(dtype) > 1
    columns = 128 if narrow else wide_columns(hidden)
    gemm = Gemm(
        "moe_project",
        ((TILE_ROWS, TILE_DEPTH), *[(TILE_DEPTH, columns)] * len(weights)),
        (columns,) * len(weights),
        config.programs,
        dtype,
        fetches=fetches,
        parts=num_parts(dtype),
    )
    store_rows = max(num_pairs, HALF_ROWS)  # no copy may be larger than its target
    shapes = [(store_rows, hidden), (num_experts, _TAIL, hidden)] * (len(weights) * keep)
    shapes += [(groups.tokens.size, hidden)] * activated
    out = grouped_gemm.call(
        gemm,
        functools.partial(
            _project_kernel,
            gemm=gemm,
            activation=activation,
            group=config.shared_tiles,
            keep=keep,
            biased=bool(biases),
        ),
        [jax.ShapeDtypeStruct(shape, gemm.dtype) for shape in shapes],
        *scalars(groups),
        *[groups.tokens] * fetches,
        x,
        *weights,
        *biases,
    )
    rows = out[-1] if activated else None
    if not keep:
        return Projected(rows, Kept(None, None))
    kept = [_put_tails(out[2 * n], out[2 * n + 1], offsets) for n in range(len(weights))]
    kept = [store[:num_pairs] for store in kept]
    return Projected(rows, Kept(kept[0] if len(weights) == 2 else None, kept[-1]))


def in_parts(experts: Experts, dtype: Any) -> Experts:
    """Weights as parts of their values in `dtype`; biases in it."""
    cast: Any = jax.tree.map(lambda w: jnp.asarray(w, dtype), experts)
    return Experts(*jax.tree.map(split, tuple(cast[:3])), *cast[3:])


def input_weights(experts: Experts) -> list[Array]:
    """w_gate, if there is one, and w_up."""
    return [jnp.asarray(w) for w in (experts.w_gate, experts.w_up) if w is not None]


def _input_biases(experts: Experts) -> list[Float32[Array, "E H"]]:
    """Biases of `input_weights`, zeros for one that lacks; nothing if all do."""
    if experts.b_gate is None and experts.b_up is None:
        return []
    biases = [experts.b_up] if experts.w_gate is None else [experts.b_gate, experts.b_up]
    zeros = jnp.zeros((experts.w_up.shape[0], experts.w_up.shape[2]), jnp.float32)
    return [zeros if b is None else jnp.asarray(b, jnp.float32) for b in biases]


def _put_tails(store: Array, tails: Array, offsets: Int32[Array, "E1"]) -> Array:
    """Puts the last rows of each expert, fewer than eight, in their places."""
    counts = offsets[1:] - offsets[:-1]
    rest = counts % _TAIL
    inside = jnp.arange(_TAIL, dtype=jnp.int32)
    rows = (offsets[1:] - rest)[:, None] + inside
    rows = jnp.where(inside < rest[:, None], rows, store.shape[0]).reshape(-1)
    values = tails.reshape(-1, store.shape[1])
    return store.at[rows].set(values, mode="drop", unique_indices=True)


@functools.partial(jax.jit, static_argnames=("activation", "keep", "chunk_tokens", "config"))
def forward(
    x: Float[Array, "T D"],
    ids: Int32[Array, "T K"],
    gates: Float32[Array, "T K"],
    experts: Experts,
    *,
    activation: Activation,
    keep: str | None,
    chunk_tokens: int | None,
    config: MoeConfig,
) -> tuple[Float[Array, "T D"], Chunks]:
    """(y, what `keep` asks for, by chunks of tokens), as `ref.forward`."""
    dtype, experts = x.dtype, in_parts(experts, x.dtype)

    def chunk(carry, part):
        x, ids, gates, _ = part
        dispatch = moe_dispatch(ids, num_experts=experts.w_up.shape[0])
        groups = group_rows(dispatch)
        fetches = config.fetch == "fused"
        projected = project(
            x if fetches else gather_rows(x, groups),
            groups,
            dispatch.expert_token_offsets,
            experts,
            num_pairs=ids.size,
            dtype=dtype,
            activation=activation,
            keep=keep is not None,
            fetches=fetches,
            config=config,
        )
        hidden: Any = projected.hidden
        rows = contract(
            [(split(hidden), jnp.asarray(experts.w_down))],
            groups,
            name="moe_contract",
            dtype=dtype,
            transposed=False,
            config=config,
        )
        y = combine(rows, gates, groups.rows)
        if experts.b_down is not None:
            y += jnp.matmul(
                gates_by_expert(gates, ids, experts.w_up.shape[0]),
                experts.b_down.astype(jnp.float32),
                precision=lax.Precision.HIGHEST,
            )
        kept = projected.kept
        if keep == "gate_up_fp8":
            kept = jax.tree.map(ref.to_fp8, kept)
        return carry, (y.astype(dtype), kept)

    _, results = map_chunks(chunk, None, (split(x), ids, gates), chunk_tokens)
    y = join_chunks(Chunks(*(None if part is None else part[0] for part in results)))
    return y, Chunks(*(None if part is None else part[1] for part in results))
