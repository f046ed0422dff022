"""The forward pass of `moe_ffn` on Hopper's tensor cores.

Rows of x are gathered by XLA into groups that start on tile boundaries, one group an expert, with
zeroed rows behind its pairs. `project` multiplies them with both input matrices of their expert and
applies the activation; `contract` multiplies the result with the output matrix. What the gradient
keeps, gate and up, is written without padding, row n for pair n.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, BFloat16, Bool, Float32, Int32

from pallas_kernels.moe import grouped_gemm, ref
from pallas_kernels.moe.activation import Activation, activate
from pallas_kernels.moe.config import MoeConfig
from pallas_kernels.moe.dispatch import Dispatch, Tiles, group_tiles, moe_dispatch
from pallas_kernels.moe.grouped_gemm import HALF_ROWS, TILE_DEPTH, TILE_ROWS, Gemm, Outbox
from pallas_kernels.moe.ref import Experts, Kept

_PAIR_COLUMNS = 128  # of gate and up each: their accumulators fill the registers
_TAIL = 8  # rows that are written apart: the last ones of an expert, if fewer than eight


class Groups(NamedTuple):
    """Where pairs stand among the padded rows; P = 128·L.

    Attributes:
      tiles: what each 128 rows hold.
      tokens: token of each row, 0 where there is none; i32[P].
      filled: rows with a pair; bool[P].
      rows: row of each (token, slot), -1 for the unrouted; i32[T, K].
    """

    tiles: Tiles
    tokens: Int32[Array, "P"]
    filled: Bool[Array, "P"]
    rows: Int32[Array, "T K"]


def group_rows(dispatch: Dispatch) -> Groups:
    """Groups of whole tiles; an expert without pairs has none."""
    offsets = dispatch.expert_token_offsets
    num_pairs = dispatch.expert_token_indices.shape[0]
    tiles = group_tiles(offsets, num_pairs, TILE_ROWS)
    inside = jnp.arange(TILE_ROWS, dtype=jnp.int32)
    pairs = (tiles.start[:, None] + inside).reshape(-1)
    filled = (inside < tiles.size[:, None]).reshape(-1)
    tokens = dispatch.expert_token_indices[jnp.minimum(pairs, num_pairs - 1)]
    counts = offsets[1:] - offsets[:-1]
    whole = (counts + TILE_ROWS - 1) // TILE_ROWS * TILE_ROWS
    shift = jnp.cumsum(whole) - whole - offsets[:-1]
    experts = jnp.clip(dispatch.token_expert_indices, 0, counts.size - 1)
    shift = shift[experts].reshape(dispatch.token_index_map.shape)
    rows = jnp.where(dispatch.token_index_map < 0, -1, dispatch.token_index_map + shift)
    return Groups(tiles, jnp.where(filled, tokens, 0), filled, rows)


def gather_rows(x: Array, groups: Groups) -> Array:
    """Rows of x in groups [P, D], zeros where there is no pair: one fusion."""
    rows = x.at[groups.tokens].get(mode="promise_in_bounds")
    return jnp.where(groups.filled[:, None], rows, 0)


def scalars(groups: Groups) -> tuple[Array, ...]:
    """What the kernels read about tiles: expert, first pair and pairs of each, and their number."""
    tiles = groups.tiles
    return tiles.expert, tiles.start, tiles.size, tiles.used.reshape(1)


def _project_kernel(
    expert, start, size, used, x, w_gate, w_up, *refs, gemm, activation, group, keep
):
    """hidden = f(x · w_gate) ⊙ (x · w_up), row tile by row tile."""
    *out, ring, staging = refs
    kept, hidden = out[: 4 * keep], out[4 * keep :]
    columns = gemm.accumulators[0]
    num_columns = w_up.shape[2] // columns
    place = functools.partial(
        grouped_gemm.place, used=used[0], num_columns=num_columns, group=group
    )
    warpgroup = lax.axis_index("warpgroup")
    half = pl.ds(warpgroup * HALF_ROWS, HALF_ROWS)

    def load(work, step, copy):
        tile, column = place(work)
        depth = pl.ds(step * TILE_DEPTH, TILE_DEPTH)
        across = pl.ds(column * columns, columns)
        copy(x.at[pl.ds(tile * TILE_ROWS, TILE_ROWS), depth], 0)
        copy(w_gate.at[expert[tile], depth, across], 1)
        copy(w_up.at[expert[tile], depth, across], 2)

    def multiply(accumulators, operands):
        rows = operands[0].at[half]
        for accumulator, weights in zip(accumulators, operands[1:], strict=True):
            plgpu.wgmma(accumulator, rows, weights)

    def epilogue(work, values):
        tile, column = place(work)
        outbox = Outbox(staging)
        row = tile * TILE_ROWS + warpgroup * HALF_ROWS
        for first in range(0, columns, gemm.chunk):
            gate, up = (v[:, first : first + gemm.chunk].astype(gemm.dtype) for v in values)
            across = pl.ds(column * columns + first, gemm.chunk)
            if keep:
                for matrix, (store, tails) in zip((gate, up), (kept[:2], kept[2:]), strict=True):
                    outbox.put(matrix, _keep_rows(store, tails, tile, across, expert, start, size))
            for store in hidden:
                activated = activate(activation, gate, up).astype(gemm.dtype)
                target = store.at[pl.ds(row, HALF_ROWS), across]
                outbox.put(activated, lambda slot, target=target: outbox.copy(slot, target))

    grouped_gemm.run(
        gemm,
        ring,
        used[0] * num_columns,
        lambda work: x.shape[1] // TILE_DEPTH,
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
    """Result of `project`: the activation of each row, and gate and up of each pair if kept."""

    hidden: BFloat16[Array, "P H"] | None
    gate: BFloat16[Array, "N H"] | None
    up: BFloat16[Array, "N H"] | None


def project(
    x_rows: BFloat16[Array, "P D"],
    groups: Groups,
    offsets: Int32[Array, "E1"],
    w_gate: BFloat16[Array, "E D H"],
    w_up: BFloat16[Array, "E D H"],
    *,
    num_pairs: int,
    activation: Activation,
    keep: bool,
    activated: bool = True,
    config: MoeConfig,
) -> Projected:
    """Both input products of every expert, and the activation between them and the output's.

    Args:
      x_rows, groups, offsets, num_pairs: rows and where they stand.
      w_gate, w_up: of all experts.
      activation: see `moe_ffn`.
      keep: writes gate and up.
      activated: writes the activation.
      config: how the kernel runs.
    """
    num_experts, _, hidden = w_up.shape
    weights = (TILE_DEPTH, _PAIR_COLUMNS)
    gemm = Gemm(
        "moe_project",
        ((TILE_ROWS, TILE_DEPTH), weights, weights),
        (_PAIR_COLUMNS, _PAIR_COLUMNS),
        config.programs,
    )
    shapes = [(num_pairs, hidden), (num_experts, _TAIL, hidden)] * 2 if keep else []
    shapes += [(x_rows.shape[0], hidden)] if activated else []
    out_type = [jax.ShapeDtypeStruct(shape, gemm.dtype) for shape in shapes]
    kernel = functools.partial(
        _project_kernel, gemm=gemm, activation=activation, group=config.shared_tiles, keep=keep
    )
    out = grouped_gemm.call(gemm, kernel, out_type, *scalars(groups), x_rows, w_gate, w_up)
    rows = out[-1] if activated else None
    if not keep:
        return Projected(rows, None, None)
    gate, up = (_put_tails(store, tails, offsets) for store, tails in (out[:2], out[2:4]))
    return Projected(rows, gate, up)


def _put_tails(store: Array, tails: Array, offsets: Int32[Array, "E1"]) -> Array:
    """Puts the last rows of each expert, fewer than eight, in their places."""
    counts = offsets[1:] - offsets[:-1]
    rest = counts % _TAIL
    inside = jnp.arange(_TAIL, dtype=jnp.int32)
    rows = (offsets[1:] - rest)[:, None] + inside
    rows = jnp.where(inside < rest[:, None], rows, store.shape[0]).reshape(-1)
    values = tails.reshape(-1, store.shape[1])
    return store.at[rows].set(values, mode="drop", unique_indices=True)


def _contract_kernel(expert, start, size, used, *refs, gemm, group, transposed):
    """out = the sum of rows · weights over all pairs of them, row tile by row tile."""
    del start, size
    *terms, out, ring, staging = refs
    rows, weights = terms[::2], terms[1::2]
    columns, width = gemm.accumulators[0], out.shape[1]
    place = functools.partial(
        grouped_gemm.place, used=used[0], num_columns=width // columns, group=group
    )
    warpgroup = lax.axis_index("warpgroup")
    steps = rows[0].shape[1] // TILE_DEPTH

    def load(work, step, copy):
        tile, column = place(work)
        across = pl.ds(column * columns, columns)

        def term(lhs, rhs):
            depth = pl.ds(lax.rem(step, steps) * TILE_DEPTH, TILE_DEPTH)
            block = (across, depth) if transposed else (depth, across)
            copy(lhs.at[pl.ds(tile * TILE_ROWS, TILE_ROWS), depth], 0)
            copy(rhs.at[expert[tile], *block], 1)

        for n, (lhs, rhs) in enumerate(zip(rows, weights, strict=True)):
            if len(rows) == 1:
                term(lhs, rhs)
            else:
                pl.when(lax.div(step, steps) == n)(functools.partial(term, lhs, rhs))

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
        used[0] * (width // columns),
        lambda work: len(rows) * steps,
        load,
        multiply,
        epilogue,
    )


def contract(
    terms: list[tuple[BFloat16[Array, "P M"], BFloat16[Array, "E ..."]]],
    groups: Groups,
    *,
    name: str,
    transposed: bool,
    config: MoeConfig,
) -> BFloat16[Array, "P N"]:
    """Sum over the terms of rows · weights [E, M, N] of their expert; transposed: of [E, N, M]."""
    rows, weights = terms[0]
    width = weights.shape[1 if transposed else 2]
    columns = wide_columns(width)
    block = (columns, TILE_DEPTH) if transposed else (TILE_DEPTH, columns)
    gemm = Gemm(name, ((TILE_ROWS, TILE_DEPTH), block), (columns,), config.programs)
    kernel = functools.partial(
        _contract_kernel, gemm=gemm, group=config.shared_tiles, transposed=transposed
    )
    out_type = jax.ShapeDtypeStruct((rows.shape[0], width), rows.dtype)
    operands = [operand for term in terms for operand in term]
    return grouped_gemm.call(gemm, kernel, out_type, *scalars(groups), *operands)


def wide_columns(width: int) -> int:
    """Columns of a tile with one accumulator."""
    return 256 if width % 256 == 0 else 128


def combine(
    rows: Array, gates: Float32[Array, "T K"] | None, places: Int32[Array, "T K"]
) -> Float32[Array, "T D"]:
    """Sum of each token's rows, weighted if there are gates, in f32; one fusion, no [T, K, D]."""
    taken = rows.at[jnp.maximum(places, 0)].get(mode="promise_in_bounds").astype(jnp.float32)
    taken = taken if gates is None else gates[..., None] * taken
    # A choice, not a product with zero: what the unrouted take may be anything.
    return jnp.sum(jnp.where(places[..., None] >= 0, taken, 0), axis=1)


class Chunks(NamedTuple):
    """Results for parts of the tokens: those of the equal parts stacked, and of what remains."""

    equal: Any
    rest: Any


def map_chunks(
    fn: Callable[..., tuple[Any, Any]],
    carry: Any,
    arrays: tuple[Array, ...],
    chunk_tokens: int | None,
    chunks: Chunks | None = None,
) -> tuple[Any, Chunks]:
    """(carry, results) of fn(carry, (*part of the arrays, its chunk)), part after part.

    Args:
      fn: what to do with a part.
      carry: handed from part to part.
      arrays: each with T tokens along its first axis.
      chunk_tokens: tokens of a part; None takes all at once.
      chunks: results of an earlier pass over the same parts, if wanted.
    """
    chunks = chunks or Chunks(None, None)
    num_tokens = arrays[0].shape[0]
    size = min(chunk_tokens or num_tokens, num_tokens)
    count, rest = divmod(num_tokens, size)
    if count == 1 and rest == 0:
        carry, results = fn(carry, (*arrays, chunks.rest))
        return carry, Chunks(None, results)
    parts = [a[: count * size].reshape(count, size, *a.shape[1:]) for a in arrays]
    carry, equal = lax.scan(fn, carry, (*parts, chunks.equal))
    if rest == 0:
        return carry, Chunks(equal, None)
    carry, results = fn(carry, (*(a[count * size :] for a in arrays), chunks.rest))
    return carry, Chunks(equal, results)


def join_chunks(chunks: Chunks) -> Any:
    """The results of all tokens, which lie along the first axis."""
    if chunks.equal is None:
        return chunks.rest
    equal = jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), chunks.equal)
    if chunks.rest is None:
        return equal
    return jax.tree.map(lambda a, b: jnp.concatenate([a, b]), equal, chunks.rest)


@functools.partial(jax.jit, static_argnames=("activation", "keep", "chunk_tokens", "config"))
def forward(
    x: BFloat16[Array, "T D"],
    ids: Int32[Array, "T K"],
    gates: Float32[Array, "T K"],
    experts: Experts,
    *,
    activation: Activation,
    keep: str | None,
    chunk_tokens: int | None,
    config: MoeConfig,
) -> tuple[BFloat16[Array, "T D"], Chunks]:
    """(y, what `keep` asks for, by chunks of tokens), as `ref.forward`."""
    experts = jax.tree.map(lambda w: w.astype(x.dtype), experts)

    def chunk(carry, part):
        x, ids, gates, _ = part
        dispatch = moe_dispatch(ids, num_experts=experts.w_up.shape[0])
        groups = group_rows(dispatch)
        projected = project(
            gather_rows(x, groups),
            groups,
            dispatch.expert_token_offsets,
            experts.w_gate,
            experts.w_up,
            num_pairs=ids.size,
            activation=activation,
            keep=keep is not None,
            config=config,
        )
        rows = contract(
            [(projected.hidden, experts.w_down)],
            groups,
            name="moe_contract",
            transposed=False,
            config=config,
        )
        kept = Kept(projected.gate, projected.up)
        if keep == "gate_up_fp8":
            kept = jax.tree.map(ref.to_fp8, kept)
        return carry, (combine(rows, gates, groups.rows).astype(x.dtype), kept)

    _, results = map_chunks(chunk, None, (x, ids, gates), chunk_tokens)
    y = join_chunks(Chunks(*(None if part is None else part[0] for part in results)))
    return y, Chunks(*(None if part is None else part[1] for part in results))
