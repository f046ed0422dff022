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
from jaxtyping import Array, BFloat16, Float, Float32, Int

from pallas_kernels.hstu_attention import walk as walking
from pallas_kernels.hstu_attention.biases import Biases, bias_arrays
from pallas_kernels.hstu_attention.config import HstuConfig
from pallas_kernels.hstu_attention.mosaic_gpu import masked, products, silu_and_slope, split_biases
from pallas_kernels.hstu_attention.mosaic_gpu_bias_vjp import bias_gradients
from pallas_kernels.hstu_attention.tiles import (
    TILE,
    WORK,
    Mask,
    from_rows,
    list_works,
    pack,
    to_rows,
)
from pallas_kernels.hstu_attention.walk import Buffer, Walk

_PIECE = 16  # columns
_MAX_WIDTHS = 128  # of keys and values, up to which the registers hold the sums of both gradients


def _by_pieces(function: Any, half: Any) -> list[Any]:
    """Results of an elementwise function in bf16, a few columns at a time.

    Rounded at once: whole tiles in f32 would not fit the registers.
    """
    pieces = []
    for first in range(0, TILE, _PIECE):
        results = function(half[:, first : first + _PIECE])
        pieces.append([result.astype(jnp.bfloat16) for result in results])
    return [jnp.concatenate(own, axis=1) for own in zip(*pieces, strict=True)]


def _times(d_weights: Any, slope: Any) -> Any:
    return (d_weights * slope.astype(jnp.float32)).astype(jnp.bfloat16)


def _query_kernel(fields, used, q, k, v, d_out, *refs, walk: Walk, biases: Biases):
    """dq[i] = α · Σ silu'(scores[i, j]) · ⟨d_out[i], v[j]⟩ · k[j]."""
    *arrays, dq, buffers, weights, staging = refs
    arrays = split_biases(biases, arrays)
    width = q.shape[2]

    def load_resident(work, copy):
        rows = pl.ds(work.row(work.position), WORK)
        copy(q.at[rows, work.head], 0)
        copy(d_out.at[rows, work.head], 1)
        biases.load_resident(arrays, work, copy, 2)

    def load_tile(work, position, copy):
        rows = pl.ds(work.tile_row(position), TILE)
        copy(k.at[rows, work.head], 0)
        copy(v.at[rows, work.head], 1)
        biases.load_tile(arrays, work, position, copy, 2)

    def compute(work, own, loop, finished):
        own_weights = weights.at[own.warpgroup, 0]

        def sums(accumulator):
            def tile(position, resident, streamed, free):
                queries, d_outs = (block.at[own.rows] for block in resident[:2])
                keys, values = streamed[:2]

                half_biases = biases.of_tile(work, own, position, resident[2:], streamed[2:])

                def slope(scores):
                    free()
                    half = biases.half_scores(scores, half_biases)
                    slope = _by_pieces(lambda half: silu_and_slope(half)[1:], half)
                    return masked(walk.mask, work.shape, own.position, position, *slope)

                pairs = [(queries, keys.T), (d_outs, values.T)]
                (slope_,), d_weights = products(pairs, slope, late=walk.is_wide)
                own_weights[...] = _times(d_weights, slope_)
                plgpu.commit_smem()
                plgpu.wgmma(accumulator, own_weights, keys)

            loop(tile)
            return accumulator[...]

        total = pl.run_scoped(sums, plgpu.WGMMAAccumulatorRef((TILE, width), jnp.float32))
        finished()
        walking.store_rows(biases.alpha * total, staging, dq, work, own, walk.line)

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
        rows = pl.ds(work.row(work.position), WORK)
        copy(k.at[rows, work.head], 0)
        if with_keys:
            copy(v.at[rows, work.head], 1)
        biases.load_resident(arrays, work, copy, kept)

    def load_tile(work, position, copy):
        rows = pl.ds(work.tile_row(position), TILE)
        copy(q.at[rows, work.head], 0)
        copy(d_out.at[rows, work.head], 1)
        biases.load_tile(arrays, work, position, copy, 2)

    def compute(work, own, loop, finished):
        def sums(*accumulators):
            def tile(position, resident, streamed, free):
                own_rows = [block.at[own.rows] for block in resident[:kept]]
                queries, d_outs = streamed[:2]

                half_biases = biases.of_tile(work, own, position, resident[kept:], streamed[2:])

                def weigh(scores):
                    free()
                    half = biases.half_scores(scores, half_biases)
                    values = _by_pieces(function, half)
                    mask, shape = walk.mask, work.shape
                    return masked(mask, shape, own.position, position, *values, by_keys=True)

                pairs = list(zip(own_rows, (queries.T, d_outs.T), strict=False))
                (*values,), *d_weights = products(pairs, weigh, late=walk.is_wide)
                if with_keys:
                    values[0] = _times(d_weights[0], values[0])
                for n, value in enumerate(values):
                    weights.at[own.warpgroup, n][...] = value
                plgpu.commit_smem()
                operands = [queries] * with_keys + [d_outs] * with_values
                for n, (accumulator, operand) in enumerate(
                    zip(accumulators, operands, strict=True)
                ):
                    plgpu.wgmma(accumulator, weights.at[own.warpgroup, n], operand)

            loop(tile)
            return [accumulator[...] for accumulator in accumulators]

        widths = [target.shape[2] for target in out]
        totals = pl.run_scoped(
            sums, *(plgpu.WGMMAAccumulatorRef((TILE, n), jnp.float32) for n in widths)
        )
        finished()
        for letter, total, target in zip(wanted, totals, out, strict=True):
            total = biases.alpha * total if letter == "k" else total
            walking.store_rows(total, staging, target, work, own, walk.line)

    walking.run(walk, (fields, used), buffers, load_resident, load_tile, compute)


@functools.partial(jax.jit, static_argnames=("max_len", "alpha", "mask", "config"))
def backward(
    q: BFloat16[Array, "T H Dqk"],
    k: BFloat16[Array, "T H Dqk"],
    v: BFloat16[Array, "T H Dv"],
    offsets: Int[Array, "B1"],
    num_targets: Int[Array, "B"] | None,
    position_bias: Float[Array, "H max_len"] | None,
    timestamps: Int[Array, "T"] | None,
    time_bias: Float[Array, "H buckets"] | None,
    d_out: BFloat16[Array, "T H Dv"],
    *,
    max_len: int,
    alpha: float,
    mask: Mask,
    config: HstuConfig,
) -> tuple[
    BFloat16[Array, "T H Dqk"],
    BFloat16[Array, "T H Dqk"],
    BFloat16[Array, "T H Dv"],
    Float32[Array, "H max_len"] | None,
    Float32[Array, "H buckets"] | None,
]:
    """Gradients of q, k, v and the biases, for that of `mosaic_gpu.forward`."""
    num_tokens, heads, width = q.shape
    v_width = v.shape[2]
    packing = pack(offsets.astype(jnp.int32), num_targets, num_tokens, aligned=config.aligned)
    rows = [to_rows(x, packing) for x in (q, k, v, d_out)]
    times = None if timestamps is None else to_rows(timestamps, packing)
    buckets = 0 if time_bias is None else time_bias.shape[1]

    def run(name, kernel, widths, *, by_keys, resident, weights, **static):
        arrays = bias_arrays(position_bias, times, time_bias, by_keys=by_keys)
        biases = Biases.of(arrays, alpha, buckets, by_keys=by_keys)
        walk = Walk(
            name,
            heads,
            config.programs,
            mask,
            by_keys=by_keys,
            resident=(*(Buffer((WORK, n)) for n in resident), *biases.resident),
            streamed=(Buffer((TILE, width)), Buffer((TILE, v_width)), *biases.streamed),
            weights=weights,
            sums=sum(widths),
        )
        works = list_works(packing, mask, num_tokens, by_keys=by_keys)
        out = walking.call(
            walk,
            functools.partial(kernel, walk=walk, biases=biases, **static),
            [jax.ShapeDtypeStruct((*rows[0].shape[:2], n), q.dtype) for n in widths],
            works.fields,
            works.used,
            *rows,
            *(array for array in arrays if array is not None),
        )
        return [from_rows(x, packing) for x in out]

    both = (width, v_width)
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
    arrays = bias_arrays(position_bias, times, time_bias)
    biases = Biases.of(arrays, alpha, buckets)
    d_position = d_time = None
    if biases.tiles or biases.buckets:
        d_position, d_time = bias_gradients(
            rows[0],
            rows[1],
            rows[2],
            rows[3],
            packing,
            arrays,
            biases,
            num_tokens=num_tokens,
            max_len=max_len,
            mask=mask,
            programs=config.programs,
        )
    return dq, dk, dv, d_position, d_time
