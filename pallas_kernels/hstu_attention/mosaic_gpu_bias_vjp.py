"""Gradients of the biases on Hopper's tensor cores.

A work is one head, one distance of tiles and a part of the query tiles that have a tile of keys so
far before them (or, with contextual tokens, behind them). Its pairs share their place in the bias
of the distance, so that one tile of sums in registers takes them all; XLA then adds its diagonals.
Sums by time are kept in shared memory, for each bucket and row. Two warpgroups take turns where
their sums fit.
"""

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, BFloat16, Float32

from pallas_kernels.hstu_attention.biases import (
    MAX_BUCKETS,
    BiasArrays,
    Biases,
    Elapsed,
    by_distance,
)
from pallas_kernels.hstu_attention.config import MAX_WIDTH
from pallas_kernels.hstu_attention.mosaic_gpu import masked, products, silu_and_slope, split_biases
from pallas_kernels.hstu_attention.operands import (
    Operand,
    compiler_params,
    copier,
    copy_rows,
    unknown_zero,
)
from pallas_kernels.hstu_attention.sizes import Buffer, copies, line_of, matrix, most_stages
from pallas_kernels.hstu_attention.tiles import TILE, Mask, Packing, Shape, Tiles, list_tiles
from pallas_kernels.hstu_attention.walk import (
    BY_ROW,
    SCORES,
    row_multiple,
    share_registers,
)

_WORKS = 4  # for each program, at least


@dataclass(frozen=True)
class _Plan:
    """Static sizes of the kernel.

    Attributes:
      heads, programs, mask: as in `Walk`.
      distances: of tiles, from 0 on.
      shares: of the tiles of each distance.
      streamed: buffers of a stage.
      parts: of each operand, `operands.split`.
      biases: what is added to the scores.
    """

    heads: int
    programs: int
    mask: Mask
    distances: int
    shares: int
    streamed: tuple[Buffer, ...]
    parts: int
    biases: Biases

    @property
    def classes(self) -> int:
        """Distances back, and those ahead where contextual tokens look ahead."""
        return self.distances + (self.distances - 1) * (self.mask.contextual_len > 0)

    @property
    def items(self) -> int:
        """Works."""
        return self.classes * self.shares * self.heads

    @property
    def buckets(self) -> int:
        """Whose sums are kept; times reach no later ones."""
        return min(self.biases.buckets, MAX_BUCKETS)

    @property
    def line(self) -> int:
        """Columns of a line of shared memory."""
        return line_of(self.streamed)

    @property
    def warpgroups(self) -> int:
        """That compute: two where their sums fit, and what they add their registers."""
        widths = sum(buffer.shape[-1] for buffer in self.streamed[:2])
        crowded = widths == 2 * MAX_WIDTH and self.biases.tiles and self.biases.buckets
        fits = most_stages(self.streamed, 2 * self._sum_bytes) > 0
        return 2 if fits and not crowded else 1

    @property
    def stages(self) -> int:
        """Of the ring."""
        return most_stages(self.streamed, self.warpgroups * self._sum_bytes)

    @property
    def _sum_bytes(self) -> int:
        """Of a warpgroup's sums by time."""
        return 4 * TILE * self.buckets


class _Item(NamedTuple):
    """A work: its number, its head, its distance of tiles, and the later ones, begin … end."""

    number: Any
    head: Any
    distance: Any
    begin: Any
    end: Any


class _Pair(NamedTuple):
    """Two tiles of a sequence: where they start, and whether any of their pairs attends."""

    first_row: Any
    query: Any
    key: Any
    shape: Shape
    counts: Any

    def row(self, position):
        """Row of a position."""
        return row_multiple(self.first_row + position)


def _item(plan: _Plan, counts, n) -> _Item:
    head, rest = lax.rem(n, plan.heads), lax.div(n, plan.heads)
    share, distance = lax.rem(rest, plan.shares), lax.div(rest, plan.shares)
    distance = jnp.where(distance >= plan.distances, plan.distances - 1 - distance, distance)
    count = counts[jnp.maximum(distance, -distance)]
    begin, end = (lax.div(count * place, plan.shares) for place in (share, share + 1))
    return _Item(n, head, distance, begin, end)


def _pair(plan: _Plan, fields, item: _Item, n) -> _Pair:
    first_row, position, length, history_end = (fields[n, field] for field in range(4))
    # The listed tile is the later one, whether of queries or of keys.
    ahead = item.distance < 0
    other = position - TILE * jnp.maximum(item.distance, -item.distance)
    query, key = jnp.where(ahead, other, position), jnp.where(ahead, position, other)
    shape = Shape(length, history_end)
    runs = plan.mask.key_runs(query, jnp.minimum(query + TILE, length) - 1, shape)
    return _Pair(first_row, query, key, shape, runs.has(lax.div(key, TILE)))


def _each_item(plan: _Plan, counts, body, done):
    """body(item, done) for every work of this program."""
    program = lax.axis_index("program")

    def turn(n, done):
        back = lax.rem(n, 2)  # works become shorter: the last of one turn is first of the next
        place = n * plan.programs + program + back * (plan.programs - 1 - 2 * program)
        item = _item(plan, counts, jnp.minimum(place, plan.items - 1))
        end = jnp.where(place < plan.items, item.end, item.begin)
        return body(item._replace(end=end), place < plan.items, done)

    return lax.fori_loop(0, -(-plan.items // plan.programs), turn, done)


def _produce(plan: _Plan, fields, counts, sources, times, buffers, full, empty) -> None:
    def fill(item, _, done):
        def load(n, done):
            pair = _pair(plan, fields, item, n)

            @pl.when(pair.counts)
            def _():
                slot = lax.rem(done, plan.stages)

                @pl.when(done >= plan.stages)
                def _():
                    plgpu.barrier_wait(empty.at[slot])

                copy = copier(buffers, slot, full)
                places = (pair.query, pair.query, pair.key, pair.key)
                for buffer, (source, place) in enumerate(zip(sources, places, strict=True)):
                    rows = pl.ds(pair.row(place), TILE)
                    copy_rows(copy, source, rows, item.head, buffer, plan.parts)
                if plan.biases.buckets:
                    copy(times.at[pl.ds(pair.row(pair.query), TILE)], 4)
                    copy(times.at[pl.ds(pair.row(pair.key), TILE)], 5)

            return done + pair.counts.astype(jnp.int32)

        return lax.fori_loop(item.begin, item.end, load, done)

    done = _each_item(plan, counts, fill, jnp.int32(0))

    def drain(step, _):
        plgpu.barrier_wait(empty.at[lax.rem(step, plan.stages)])

    lax.fori_loop(jnp.maximum(done - plan.stages, 0), done, drain, None)


def _consume(plan: _Plan, fields, counts, arrays: BiasArrays, outs, buffers, full, empty, sums):
    warpgroup = lax.axis_index("warpgroup")
    by_place, by_bucket = outs

    def tile(item, pair, slot, zero, bias, total):
        """Adds a pair of tiles to the sums."""
        q, d_out, k, v, *times = (buffer.at[slot + zero] for buffer in buffers)

        elapsed = half_biases = None
        if arrays.table is not None:
            rows, columns = times
            buckets = plan.biases.buckets
            elapsed = Elapsed.of(rows, columns, pair.query, pair.key, pair.shape, buckets)
            half_biases = elapsed.half_bias(arrays.table.at[item.head])
        if bias is not None:
            wide = bias.astype(jnp.float32)
            half_biases = wide if half_biases is None else half_biases + wide

        def slope(scores):
            return silu_and_slope(plan.biases.half_scores(scores, half_biases))[1]

        late = elapsed is not None
        q, d_out, k, v = (Operand(block, plan.parts) for block in (q, d_out, k, v))
        slope_, d_weights = products([(q, k.T), (d_out, v.T)], slope, late=late)
        plgpu.commit_smem()
        plgpu.barrier_arrive(empty.at[slot])
        d_scores = d_weights * slope_
        (d_scores,) = masked(plan.mask, pair.shape, pair.query, pair.key, d_scores)
        if elapsed is not None:
            elapsed.add_sums(d_scores, sums.at[warpgroup], plan.biases.buckets)
        return total + d_scores

    def work(item, exists, done):
        bias = None
        if arrays.tiles is not None:
            place = jnp.maximum(item.distance, -1) + 1
            tiles: Any = arrays.tiles
            bias = plgpu.load(tiles.at[item.head, place], layout=SCORES, optimized=False)
        zero = plgpu.layout_cast(jnp.zeros((TILE, TILE), jnp.float32), SCORES)

        def step(n, carry):
            done, total = carry
            pair = _pair(plan, fields, item, n)
            slot = lax.rem(done, plan.stages)
            mine = pair.counts & (lax.rem(done, plan.warpgroups) == warpgroup)
            others = pair.counts & (lax.rem(done, plan.warpgroups) != warpgroup)

            @pl.when(pair.counts)
            def _():
                plgpu.barrier_wait(full.at[slot])

            @pl.when(others)
            def _():
                plgpu.barrier_arrive(empty.at[slot])

            add = functools.partial(tile, item, pair, slot, unknown_zero(done), bias)
            total = lax.cond(mine, add, lambda total: total, total)
            return done + pair.counts.astype(jnp.int32), total

        done, total = lax.fori_loop(item.begin, item.end, step, (done, zero))
        own = (item.number, warpgroup)

        @pl.when(exists)
        def _():
            if by_place is not None:
                by_place.at[own][...] = total
            if by_bucket is not None:
                _flush(sums.at[warpgroup], by_bucket.at[own], plan.buckets)

        return done

    if by_bucket is not None:
        _clear(sums.at[warpgroup], plan.buckets)
    _each_item(plan, counts, work, jnp.int32(0))


def _clear(sums, buckets: int) -> None:
    zero = plgpu.layout_cast(jnp.zeros((TILE,), jnp.float32), BY_ROW)

    def bucket(n, _):
        sums.at[n][...] = zero

    lax.fori_loop(0, buckets, bucket, None)


def _flush(sums, out, buckets: int) -> None:
    """Writes the sums and begins anew."""

    def bucket(n, _):
        out.at[n][...] = plgpu.load(sums.at[n], layout=BY_ROW)

    lax.fori_loop(0, buckets, bucket, None)
    _clear(sums, buckets)


def _kernel(fields, counts, q, k, v, d_out, *refs, plan: _Plan):
    biases = plan.biases
    refs = list(refs)
    inputs = 1 * bool(biases.tiles) + 2 * bool(biases.buckets)
    arrays = split_biases(biases, refs[:inputs])
    outputs = bool(biases.tiles) + bool(biases.buckets)
    outs = iter(refs[inputs : inputs + outputs])
    by_place = next(outs) if biases.tiles else None
    by_bucket = next(outs) if biases.buckets else None
    scratch = refs[inputs + outputs :]
    sums = scratch.pop() if biases.buckets else None
    *buffers, full, empty = scratch

    def consume():
        _consume(plan, fields, counts, arrays, (by_place, by_bucket), buffers, full, empty, sums)

    def produce():
        sources = (q, d_out, k, v)
        _produce(plan, fields, counts, sources, arrays.times, buffers, full, empty)

    share_registers(plan.warpgroups, produce, consume)


def bias_gradients(
    q: BFloat16[Array, "R H Dqk"],
    k: BFloat16[Array, "R H Dqk"],
    v: BFloat16[Array, "R H Dv"],
    d_out: BFloat16[Array, "R H Dv"],
    packing: Packing,
    arrays: BiasArrays,
    biases: Biases,
    *,
    num_tokens: int,
    max_len: int,
    mask: Mask,
    parts: int,
    programs: int,
) -> tuple[Float32[Array, "H max_len"] | None, Float32[Array, "H buckets"] | None]:
    """Of rows, in parts, as the other kernels take them."""
    heads = q.shape[1]
    matrices = [matrix(TILE, x.shape[2] // parts, parts) for x in (q, v)]
    distances = -(-max_len // TILE)
    plan = _Plan(
        heads,
        programs,
        mask,
        distances,
        shares=max(_WORKS * programs // (heads * distances), 1),
        streamed=(
            *(matrices[n] for n in (0, 1, 0, 1)),
            *[Buffer((TILE,), jnp.int32)] * 2 * bool(biases.buckets),
        ),
        parts=parts,
        biases=biases,
    )
    tiles = list_tiles(packing, num_tokens, distances)
    sums = _call(plan, tiles, q, k, v, d_out, arrays)
    leading = (plan.classes, plan.shares, heads, plan.warpgroups)
    by_place, by_bucket = (
        None
        if x is None
        else jnp.sum(x.reshape(*leading, *x.shape[2:]), axis=(1, 3)).swapaxes(0, 1)
        for x in sums
    )
    if by_place is not None:
        by_place = by_distance(by_place, distances)[:, :max_len]
    if by_bucket is not None:
        unused = biases.buckets - plan.buckets
        by_bucket = jnp.pad(jnp.sum(by_bucket, axis=(1, 3)), ((0, 0), (0, unused)))
    return by_place, by_bucket


def _call(plan: _Plan, tiles: Tiles, q, k, v, d_out, arrays: BiasArrays):
    biases = plan.biases
    leading = (plan.items, plan.warpgroups)
    out_type, sums = [], []
    if biases.tiles:
        out_type.append(jax.ShapeDtypeStruct((*leading, TILE, TILE), jnp.float32))
    if biases.buckets:
        out_type.append(jax.ShapeDtypeStruct((*leading, plan.buckets, TILE), jnp.float32))
        sums.append(plgpu.SMEM((plan.warpgroups, plan.buckets, TILE), jnp.float32))
    out = iter(
        plgpu.kernel(
            functools.partial(_kernel, plan=plan),
            out_type=out_type,
            grid=(plan.programs,),
            grid_names=("program",),
            num_threads=plan.warpgroups + 1,
            thread_name="warpgroup",
            scratch_types=[
                *(buffer.memory(plan.stages, plan.line) for buffer in plan.streamed),
                plgpu.Barrier(num_arrivals=copies(plan.streamed), num_barriers=plan.stages),
                plgpu.Barrier(num_arrivals=plan.warpgroups, num_barriers=plan.stages),
                *sums,
            ],
            compiler_params=compiler_params(plan.parts),
            kernel_name="hstu_bias_gradient",
        )(
            *(tiles.fields, tiles.counts, q, k, v, d_out),
            *(array for array in arrays if array is not None),
        )
    )
    return next(out) if biases.tiles else None, next(out) if biases.buckets else None
