"""The forward pass of `hstu_attention` on Hopper's tensor cores.

Each warpgroup takes 64 queries through the tiles of keys that they attend to: scores, bias and SiLU
in registers, the weights through shared memory into the product with the values.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels._parts import num_parts
from pallas_kernels.hstu_attention import walk as walking
from pallas_kernels.hstu_attention.biases import BiasArrays, Biases, bias_arrays
from pallas_kernels.hstu_attention.config import HstuConfig
from pallas_kernels.hstu_attention.operands import Operand, copy_rows, multiply, split
from pallas_kernels.hstu_attention.sizes import Walk, fitting, matrix
from pallas_kernels.hstu_attention.tiles import (
    TILE,
    Mask,
    Shape,
    Works,
    from_rows,
    list_works,
    pack,
    to_rows,
)
from pallas_kernels.hstu_attention.walk import BY_ROW, SCORES

_PIECE = 16  # columns that are masked at once


def products(pairs: list[tuple[Operand, Operand]], of_scores: Any, *, late: bool) -> list[Any]:
    """[of_scores(scores), d_weights] of a tile: of two pairs of operands, or the first alone.

    Both products are issued together, or, `late`, one after the other: registers of d_weights are
    then not taken, as an accumulator's are from the start, while `of_scores` needs them.
    """
    tile = plgpu.WGMMAAccumulatorRef((TILE, TILE), jnp.float32)

    def together(*accumulators):
        for accumulator, operands in zip(accumulators, pairs, strict=True):
            multiply(accumulator, *operands)
        scores, *rest = accumulators
        return [of_scores(scores[...]), *(accumulator[...] for accumulator in rest)]

    def alone(accumulator, operands):
        multiply(accumulator, *operands)
        return accumulator[...]

    if not late:
        return pl.run_scoped(together, *[tile] * len(pairs))
    scores, *rest = (functools.partial(alone, operands=operands) for operands in pairs)
    return [of_scores(pl.run_scoped(scores, tile)), *(pl.run_scoped(run, tile) for run in rest)]


def silu_and_slope(half: Any) -> tuple[Any, Any]:
    """SiLU and its derivative at 2·half."""
    tanh = jnp.tanh(half)
    return half + half * tanh, (0.5 + 0.5 * tanh) * (1 + half * (1 - tanh))


class _Columns:
    """Positions of some columns of a tile.

    As multiples of 8, which are constants in the instructions that compare them, and the rest,
    which is subtracted from the bounds: positions themselves would fill the registers.
    """

    def __init__(self, position: Any, piece: slice):
        self._position, self._piece = position, piece
        columns = plgpu.broadcasted_iota(jnp.int32, (TILE, TILE), 1, layout=SCORES)[:, piece]
        self._eights, self._rest = columns & -8, columns & 7

    def _inside(self, bound):
        bound = bound - self._position
        if bound.ndim:
            bound = lax.broadcast_in_dim(bound, (TILE, TILE), (0,))[:, self._piece]
        return bound - self._rest

    def below(self, bound):
        return self._eights < self._inside(bound)

    def from_(self, bound):
        return self._eights >= self._inside(bound)

    def at(self, bound):
        return self._eights == self._inside(bound)


def masked(
    mask: Mask, shape: Shape, row_position: Any, position: Any, *values: Any, by_keys: bool = False
) -> Any:
    """Values of a tile, zero for the pairs that do not attend; rows are keys with `by_keys`."""
    attends = mask.attending if by_keys else mask.attended

    def select(*values):
        row = row_position + plgpu.broadcasted_iota(jnp.int32, (TILE,), 0, layout=BY_ROW)
        pieces = []
        for first in range(0, TILE, _PIECE):  # for want of registers
            piece = slice(first, first + _PIECE)
            valid = attends(row, _Columns(position, piece), shape)
            zero = jnp.zeros((), values[0].dtype)
            pieces.append([jnp.where(valid, value[:, piece], zero) for value in values])
        return tuple(jnp.concatenate(own, axis=1) for own in zip(*pieces, strict=True))

    query, key = (position, row_position) if by_keys else (row_position, position)
    full = mask.is_full(query, key, shape)
    return lax.cond(full, lambda *values: values, select, *values)


def _kernel(fields, used, q, k, v, *refs, walk: Walk, biases: Biases):
    """out[i] = Σ silu(scores[i, j]) · v[j]."""
    *arrays, out, buffers, weights, staging = refs
    arrays = split_biases(biases, arrays)
    width = out.shape[2]

    def load_resident(work, copy):
        copy_rows(copy, q, pl.ds(work.row(work.position), walk.rows), work.head, 0, walk.parts)
        biases.load_resident(arrays, work, copy, 1)

    def load_tile(work, position, copy):
        rows = pl.ds(work.tile_row(position), TILE)
        copy_rows(copy, k, rows, work.head, 0, walk.parts)
        copy_rows(copy, v, rows, work.head, 1, walk.parts)
        biases.load_tile(arrays, work, position, copy, 2)

    def compute(work, own, loop, finished):
        own_weights = Operand(weights.at[own.warpgroup, 0], walk.parts)

        def sums(accumulator):
            def tile(position, resident, streamed, free):
                queries = Operand.of_rows(resident[0], own.rows, walk.parts)
                keys, values = (Operand(block, walk.parts) for block in streamed[:2])

                half_biases = biases.of_tile(
                    arrays, work, own, position, resident[1:], streamed[2:]
                )

                def half(scores):
                    free()
                    return biases.half_scores(scores, half_biases)

                (halves,) = products([(queries, keys.T)], half, late=False)
                silu = halves + halves * jnp.tanh(halves)
                (silu,) = masked(walk.mask, work.shape, own.position, position, silu)
                own_weights.put(silu)
                plgpu.commit_smem()
                multiply(accumulator, own_weights, values)

            loop(tile)
            return accumulator[...]

        total = pl.run_scoped(sums, plgpu.WGMMAAccumulatorRef((TILE, width), jnp.float32))
        finished()
        walking.store_rows(total, staging, out, work, own)

    walking.run(walk, (fields, used), buffers, load_resident, load_tile, compute)


def split_biases(biases: Biases, refs: list[Any]) -> BiasArrays:
    """The references of a kernel's biases, in their places."""
    rest = iter(refs)
    tiles = next(rest) if biases.tiles else None
    times, table = (next(rest), next(rest)) if biases.buckets else (None, None)
    return BiasArrays(tiles, times, table)


def attend(
    q: Float[Array, "R H Dqk"],
    k: Float[Array, "S H Dqk"],
    v: Float[Array, "S H Dv"],
    works_of: Callable[[int], Works],
    arrays: BiasArrays,
    biases: Biases,
    *,
    mask: Mask,
    config: HstuConfig,
    cached: bool = False,
) -> Float[Array, "R H Dv"]:
    """Runs the kernel on rows; rows without a token are left undefined.

    `works_of` lists the works, given their rows. With `cached`, q's rows are not those of k and v.
    """
    num_rows, heads, _ = q.shape
    parts, (width, v_width) = num_parts(q.dtype), (x.shape[2] for x in (q, v))

    def walk_of(rows):
        return Walk(
            "hstu_attention_cached" if cached else "hstu_attention",
            heads,
            config.programs,
            mask,
            by_keys=False,
            resident=(matrix(rows, width, parts), *biases.resident(rows)),
            streamed=(
                *(matrix(TILE, n, parts) for n in (width, v_width)),
                *biases.streamed(rows),
            ),
            rows=rows,
            parts=parts,
            weights=1,
            sums=v_width,
            cached=cached,
        )

    walk = fitting(walk_of)
    works = works_of(walk.rows)
    return walking.call(
        walk,
        functools.partial(_kernel, walk=walk, biases=biases),
        jax.ShapeDtypeStruct((num_rows, heads, v_width), v.dtype),
        works.fields,
        works.used,
        *(split(x) for x in (q, k, v)),
        *(array for array in arrays if array is not None),
    )


@functools.partial(jax.jit, static_argnames=("alpha", "mask", "config"))
def forward(
    q: Float[Array, "T H Dqk"],
    k: Float[Array, "T H Dqk"],
    v: Float[Array, "T H Dv"],
    offsets: Int[Array, "B1"],
    num_targets: Int[Array, "B"] | None,
    position_bias: Float[Array, "H max_len"] | None,
    timestamps: Int[Array, "T"] | None,
    time_bias: Float[Array, "H buckets"] | None,
    *,
    alpha: float,
    mask: Mask,
    config: HstuConfig,
) -> Float[Array, "T H Dv"]:
    """The op without its scale."""
    num_tokens = q.shape[0]
    packing = pack(offsets.astype(jnp.int32), num_targets, num_tokens, aligned=config.aligned)
    times = None if timestamps is None else to_rows(timestamps, packing)
    arrays = bias_arrays(position_bias, times, time_bias, dtype=q.dtype)
    buckets = 0 if time_bias is None else time_bias.shape[1]
    biases = Biases.of(arrays, alpha, buckets)
    q, k, v = (to_rows(x, packing) for x in (q, k, v))
    works_of = lambda rows: list_works(packing, mask, num_tokens, rows=rows)  # noqa: E731
    out = attend(q, k, v, works_of, arrays, biases, mask=mask, config=config)
    return from_rows(out, packing)
