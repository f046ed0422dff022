"""The backward pass of `hstu_attention` on Hopper's tensor cores.

Scores are computed anew from q and k: nothing but the arguments is kept. Queries take one kernel,
keys and values another, in which the tiles are [keys, queries]: each gradient is summed by one
warpgroup in a fixed order, without atomics.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Float32, Int

from pallas_kernels._parts import num_parts
from pallas_kernels.hstu_attention import walk as walking
from pallas_kernels.hstu_attention.biases import Biases, bias_arrays
from pallas_kernels.hstu_attention.config import HstuConfig
from pallas_kernels.hstu_attention.mosaic_gpu import masked, products, silu_and_slope, split_biases
from pallas_kernels.hstu_attention.mosaic_gpu_bias_vjp import bias_gradients
from pallas_kernels.hstu_attention.operands import Operand, copy_rows, multiply, split
from pallas_kernels.hstu_attention.sizes import Walk, fitting, matrix
from pallas_kernels.hstu_attention.tiles import (
    TILE,
    Mask,
    from_rows,
    list_works,
    pack,
    to_rows,
)

_PIECE = 16  # columns
_MAX_WIDTHS = 128  # of keys and values, up to which the registers hold the sums of both gradients


def _by_pieces(function: Any, half: Any, parts: int) -> list[Any]:
    """Results of an elementwise function, a few columns at a time.

    In bf16 where the operands are, and rounded at once: whole tiles in f32 would not fit the
    registers beside wide sums.
    """
    dtype = jnp.bfloat16 if parts == 1 else jnp.float32
    pieces = []
    for first in range(0, TILE, _PIECE):
        results = function(half[:, first : first + _PIECE])
        pieces.append([result.astype(dtype) for result in results])
    return [jnp.concatenate(own, axis=1) for own in zip(*pieces, strict=True)]


def _times(d_weights: Any, slope: Any) -> Any:
    return (d_weights * slope.astype(jnp.float32)).astype(slope.dtype)


def _query_kernel(fields, used, q, k, v, d_out, *refs, walk: Walk, biases: Biases):
    """dq[i] = α · Σ silu'(scores[i, j]) · ⟨d_out[i], v[j]⟩ · k[j]."""
    *arrays, dq, buffers, weights, staging = refs
    arrays = split_biases(biases, arrays)
    width = dq.shape[2]

    def load_resident(work, copy):
        rows = pl.ds(work.row(work.position), walk.rows)
        copy_rows(copy, q, rows, work.head, 0, walk.parts)
        copy_rows(copy, d_out, rows, work.head, 1, walk.parts)
        biases.load_resident(arrays, work, copy, 2)

    def load_tile(work, position, copy):
        rows = pl.ds(work.tile_row(position), TILE)
        copy_rows(copy, k, rows, work.head, 0, walk.parts)
        copy_rows(copy, v, rows, work.head, 1, walk.parts)
        biases.load_tile(arrays, work, position, copy, 2)

    def compute(work, own, loop, finished):
        own_weights = Operand(weights.at[own.warpgroup, 0], walk.parts)

        def sums(accumulator):
            def tile(position, resident, streamed, free):
                queries, d_outs = (
                    Operand.of_rows(block, own.rows, walk.parts) for block in resident[:2]
                )
                keys, values = (Operand(block, walk.parts) for block in streamed[:2])

                half_biases = biases.of_tile(
                    arrays, work, own, position, resident[2:], streamed[2:]
                )

                def slope(scores):
                    free()
                    half = biases.half_scores(scores, half_biases)
                    slope = _by_pieces(lambda half: silu_and_slope(half)[1:], half, walk.parts)
                    return masked(walk.mask, work.shape, own.position, position, *slope)

                pairs = [(queries, keys.T), (d_outs, values.T)]
                (slope_,), d_weights = products(pairs, slope, late=walk.is_tight)
                own_weights.put(_times(d_weights, slope_))
                plgpu.commit_smem()
                multiply(accumulator, own_weights, keys)

            loop(tile)
            return accumulator[...]

        total = pl.run_scoped(sums, plgpu.WGMMAAccumulatorRef((TILE, width), jnp.float32))
        finished()
        walking.store_rows(biases.alpha * total, staging, dq, work, own)

    walking.run(walk, (fields, used), buffers, load_resident, load_tile, compute)


def _key_kernel(fields, used, q, k, v, d_out, *refs, walk: Walk, biases: Biases, wanted: str):
    """dk[j] = α · Σ silu'(scores) · ⟨d_out[i], v[j]⟩ · q[i]; dv[j] = Σ silu(scores) · d_out[i]."""
    *refs, buffers, weights, staging = refs
    arrays, out = refs[: -len(wanted)], refs[-len(wanted) :]
    arrays = split_biases(biases, arrays)
    with_keys, with_values = "k" in wanted, "v" in wanted

    def function(half):
        silu, slope = silu_and_slope(half)
        return [slope] * with_keys + [silu] * with_values

    kept = 1 + with_keys  # residents: keys, and values where they are needed

    def load_resident(work, copy):
        rows = pl.ds(work.row(work.position), walk.rows)
        copy_rows(copy, k, rows, work.head, 0, walk.parts)
        if with_keys:
            copy_rows(copy, v, rows, work.head, 1, walk.parts)
        biases.load_resident(arrays, work, copy, kept)

    def load_tile(work, position, copy):
        rows = pl.ds(work.tile_row(position), TILE)
        copy_rows(copy, q, rows, work.head, 0, walk.parts)
        copy_rows(copy, d_out, rows, work.head, 1, walk.parts)
        biases.load_tile(arrays, work, position, copy, 2)

    def compute(work, own, loop, finished):
        own_weights = [
            Operand(weights.at[own.warpgroup, n], walk.parts) for n in range(walk.weights)
        ]

        def sums(*accumulators):
            def tile(position, resident, streamed, free):
                own_rows = [
                    Operand.of_rows(block, own.rows, walk.parts) for block in resident[:kept]
                ]
                queries, d_outs = (Operand(block, walk.parts) for block in streamed[:2])

                half_biases = biases.of_tile(
                    arrays, work, own, position, resident[kept:], streamed[2:]
                )

                def weigh(scores):
                    free()
                    half = biases.half_scores(scores, half_biases)
                    values = _by_pieces(function, half, walk.parts)
                    mask, shape = walk.mask, work.shape
                    return masked(mask, shape, own.position, position, *values, by_keys=True)

                pairs = list(zip(own_rows, (queries.T, d_outs.T), strict=False))
                (*values,), *d_weights = products(pairs, weigh, late=walk.is_tight)
                if with_keys:
                    values[0] = _times(d_weights[0], values[0])
                for operand, value in zip(own_weights, values, strict=True):
                    operand.put(value)
                plgpu.commit_smem()
                operands = [queries] * with_keys + [d_outs] * with_values
                for n, accumulator in enumerate(accumulators):
                    multiply(accumulator, own_weights[n], operands[n])

            loop(tile)
            return [accumulator[...] for accumulator in accumulators]

        widths = [target.shape[2] for target in out]
        totals = pl.run_scoped(
            sums, *(plgpu.WGMMAAccumulatorRef((TILE, n), jnp.float32) for n in widths)
        )
        finished()
        for letter, total, target in zip(wanted, totals, out, strict=True):
            total = biases.alpha * total if letter == "k" else total
            walking.store_rows(total, staging, target, work, own)

    walking.run(walk, (fields, used), buffers, load_resident, load_tile, compute)


@functools.partial(jax.jit, static_argnames=("max_len", "alpha", "mask", "config"))
def backward(
    q: Float[Array, "T H Dqk"],
    k: Float[Array, "T H Dqk"],
    v: Float[Array, "T H Dv"],
    offsets: Int[Array, "B1"],
    num_targets: Int[Array, "B"] | None,
    position_bias: Float[Array, "H max_len"] | None,
    timestamps: Int[Array, "T"] | None,
    time_bias: Float[Array, "H buckets"] | None,
    d_out: Float[Array, "T H Dv"],
    *,
    max_len: int,
    alpha: float,
    mask: Mask,
    config: HstuConfig,
) -> tuple[
    Float[Array, "T H Dqk"],
    Float[Array, "T H Dqk"],
    Float[Array, "T H Dv"],
    Float32[Array, "H max_len"] | None,
    Float32[Array, "H buckets"] | None,
]:
    """Gradients of q, k, v and the biases, for that of `mosaic_gpu.forward`."""
    num_tokens, heads, width = q.shape
    v_width, dtype, parts = v.shape[2], q.dtype, num_parts(q.dtype)
    packing = pack(offsets.astype(jnp.int32), num_targets, num_tokens, aligned=config.aligned)
    q, k, v, d_out = (split(to_rows(x, packing)) for x in (q, k, v, d_out))
    times = None if timestamps is None else to_rows(timestamps, packing)
    buckets = 0 if time_bias is None else time_bias.shape[1]

    both = (width, v_width)

    def run(name, kernel, widths, *, by_keys, resident, weights, **static):
        arrays = bias_arrays(position_bias, times, time_bias, dtype=dtype, by_keys=by_keys)
        biases = Biases.of(arrays, alpha, buckets, by_keys=by_keys)

        def walk_of(rows):
            return Walk(
                name,
                heads,
                config.programs,
                mask,
                by_keys=by_keys,
                resident=(*(matrix(rows, n, parts) for n in resident), *biases.resident(rows)),
                streamed=(*(matrix(TILE, n, parts) for n in both), *biases.streamed(rows)),
                rows=rows,
                parts=parts,
                weights=weights,
                sums=sum(widths),
            )

        walk = fitting(walk_of)
        works = list_works(packing, mask, num_tokens, rows=walk.rows, by_keys=by_keys)
        out = walking.call(
            walk,
            functools.partial(kernel, walk=walk, biases=biases, **static),
            [jax.ShapeDtypeStruct((*q.shape[:2], n), dtype) for n in widths],
            works.fields,
            works.used,
            *(q, k, v, d_out),
            *(array for array in arrays if array is not None),
        )
        return [from_rows(x, packing) for x in out]

    (dq,) = run(
        "hstu_query_gradient", _query_kernel, both[:1], by_keys=False, resident=both, weights=1
    )
    key_kernel = functools.partial(run, "hstu_key_gradient", _key_kernel, by_keys=True)
    if sum(both) <= _MAX_WIDTHS:
        dk, dv = key_kernel(both, resident=both, weights=2, wanted="kv")
    else:  # sums of both would not fit the registers
        (dk,) = key_kernel(both[:1], resident=both, weights=1, wanted="k")
        (dv,) = run(
            "hstu_value_gradient",
            _key_kernel,
            both[1:],
            by_keys=True,
            resident=both[:1],
            weights=1,
            wanted="v",
        )
    arrays = bias_arrays(position_bias, times, time_bias, dtype=dtype)
    biases = Biases.of(arrays, alpha, buckets)
    d_position = d_time = None
    if biases.tiles or biases.buckets:
        d_position, d_time = bias_gradients(
            q,
            k,
            v,
            d_out,
            packing,
            arrays,
            biases,
            num_tokens=num_tokens,
            max_len=max_len,
            mask=mask,
            parts=parts,
            programs=config.programs,
        )
    return dq, dk, dv, d_position, d_time
