"""What the kernels add to the scores: a bias of the distance and one of the time between tokens.

The bias of the distance comes as whole tiles, one for each distance of tiles, since a kernel has no
gather; of the time between tokens the kernel finds the bucket by comparing with the buckets' edges,
only those that the tile's times can fall between.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, BFloat16, Float32, Int32

from pallas_kernels.hstu_attention.ref import time_bucket
from pallas_kernels.hstu_attention.tiles import TILE, WORK
from pallas_kernels.hstu_attention.walk import BY_COLUMN, BY_ROW, SCORES, Buffer, Own, Work

_SQRT2 = np.uint32(0xB504F333)  # √2·2^31, rounded down
_PIECE = 32  # columns whose times are looked up at once, for want of registers
_TABLE_MULTIPLE = 32  # entries; the copy engine takes whole lines of 128 bytes


class BiasArrays(NamedTuple):
    """Arguments of a kernel for its biases, halved; None for what is missing.

    Attributes:
      tiles: bias of the distances of a tile, by the distance of tiles from -1 on.
      times: of each row.
      table: bias of each bucket.
    """

    tiles: BFloat16[Array, "H N 64 64"] | None
    times: Int32[Array, "R"] | None
    table: Float32[Array, "H buckets"] | None


def bias_arrays(
    position_bias: Array | None,
    times: Array | None,
    time_bias: Array | None,
    *,
    by_keys: bool = False,
) -> BiasArrays:
    """Prepares the biases for a kernel whose tiles are [queries, keys], or [keys, queries].

    `times` are those of rows.
    """
    tiles = table = None
    if position_bias is not None:
        distance = _distances(position_bias.shape[1], by_keys)
        halves = (0.5 * position_bias.astype(jnp.float32)).astype(jnp.bfloat16)
        tiles = halves.at[:, distance].get(mode="promise_in_bounds")
    if times is not None and time_bias is not None:
        times = times.astype(jnp.int32)
        padding = -time_bias.shape[1] % _TABLE_MULTIPLE
        table = jnp.pad(0.5 * time_bias.astype(jnp.float32), ((0, 0), (0, padding)))
    return BiasArrays(tiles, times, table)


def _distances(max_len: int, by_keys: bool) -> Int32[Array, "N 64 64"]:
    """Distances, within max_len, of each pair of a tile's places, by the distance of tiles."""
    places = jnp.arange(TILE, dtype=jnp.int32)
    inside = places[:, None] - places
    tiles = TILE * jnp.arange(-1, (max_len - 1) // TILE + 1, dtype=jnp.int32)
    inside = inside.T if by_keys else inside
    return jnp.clip(tiles[:, None, None] + inside, 0, max_len - 1)


@dataclass(frozen=True)
class Biases:
    """Which biases a kernel adds.

    Attributes:
      alpha: factor on the products.
      tiles: of the bias of the distance; 0 for none.
      buckets: of the times; 0 for none.
      table: length of the table, padded.
      by_keys: whether tiles are [keys, queries].
    """

    alpha: float
    tiles: int
    buckets: int
    table: int
    by_keys: bool

    @classmethod
    def of(cls, arrays: BiasArrays, alpha: float, buckets: int, *, by_keys: bool = False):
        """For these arrays."""
        tiles = 0 if arrays.tiles is None else arrays.tiles.shape[1]
        table = 0 if arrays.table is None else arrays.table.shape[1]
        return cls(alpha, tiles, buckets, table, by_keys)

    @property
    def resident(self) -> tuple[Buffer, ...]:
        """What a work keeps: times of its rows, table of its head."""
        if not self.buckets:
            return ()
        return Buffer((WORK,), jnp.int32), Buffer((self.table,), jnp.float32)

    @property
    def streamed(self) -> tuple[Buffer, ...]:
        """What comes with a tile: one tile of bias for each warpgroup, times of its rows."""
        buffers = ()
        if self.tiles:
            buffers += (Buffer((2, TILE, TILE), copies=2),)
        if self.buckets:
            buffers += (Buffer((TILE,), jnp.int32),)
        return buffers

    def load_resident(self, refs: BiasArrays, work: Work, copy: Any, first: int) -> None:
        """Copies `resident`, whose first buffer is number `first`."""
        if self.buckets:
            assert refs.times is not None
            assert refs.table is not None
            copy(refs.times.at[pl.ds(work.tile_row(work.position), WORK)], first)
            copy(refs.table.at[work.head], first + 1)

    def load_tile(self, refs: BiasArrays, work: Work, position: Any, copy: Any, first: int) -> None:
        """Copies `streamed`."""
        if self.tiles:
            assert refs.tiles is not None
            for warpgroup in range(2):
                distance = work.position + warpgroup * TILE - position
                distance = lax.div(-distance if self.by_keys else distance, jnp.int32(TILE))
                place = jnp.minimum(jnp.maximum(distance, -1), self.tiles - 2) + 1
                copy(refs.tiles.at[work.head, place], first, warpgroup)
            first += 1
        if self.buckets:
            assert refs.times is not None
            copy(refs.times.at[pl.ds(work.tile_row(position), TILE)], first)

    def half_scores(
        self, products: Any, work: Work, own: Own, position: Any, resident: Any, streamed: Any
    ) -> Any:
        """(α·products + biases) / 2 of a tile."""
        half = (0.5 * self.alpha) * products
        if self.tiles:
            tile = plgpu.load(streamed[0].at[own.warpgroup], layout=SCORES)
            half += tile.astype(jnp.float32)
        if self.buckets:
            half += self._of_times(work, own, position, resident[0], streamed[-1], resident[1])
        return half

    def _of_times(self, work: Work, own: Own, position, times, tile_times, table):
        """The bias of the time between the tokens of each pair."""
        rows = plgpu.load(times.at[own.rows], layout=BY_ROW)
        columns = plgpu.load(tile_times, layout=BY_COLUMN)
        row_low, row_high = _range(rows, own.position, work, BY_ROW)
        low, high = _range(columns, position, work, BY_COLUMN)
        closest = jnp.maximum(jnp.maximum(row_low - high, low - row_high), 0)
        farthest = jnp.maximum(row_high - low, high - row_low)
        first, last = (time_bucket(seconds, self.buckets) for seconds in (closest, farthest))
        rows = lax.broadcast_in_dim(rows, (TILE, TILE), (0,))
        columns = lax.broadcast_in_dim(columns, (TILE, TILE), (1,))
        pieces = []
        for begin in range(0, TILE, _PIECE):
            piece = slice(begin, begin + _PIECE)
            elapsed = lax.abs(rows[:, piece] - columns[:, piece])
            pieces.append(_look_up(table, elapsed, first, last))
        return jnp.concatenate(pieces, axis=1)


def _look_up(table, elapsed, first, last):
    """table[bucket] of each pair: the last bucket whose edge it reaches."""

    def bucket(n, found):
        return jnp.where(elapsed >= _edge(n), table[n], found)

    found = plgpu.layout_cast(jnp.full(elapsed.shape, table[first], jnp.float32), SCORES)
    return lax.fori_loop(first + 1, last + 1, bucket, found)


def _edge(bucket):
    """The fewest seconds of a bucket above 0: 2^(bucket / 2), rounded up, less one."""
    octave = bucket >> 1
    whole = jnp.int32(1) << octave
    root = lax.shift_right_logical(jnp.uint32(_SQRT2), (31 - octave).astype(jnp.uint32))
    return jnp.where((bucket & 1) == 0, whole - 1, root.astype(jnp.int32))


def _range(times, position, work: Work, layout):
    """(least, greatest) of the times that belong to the sequence."""
    place = plgpu.broadcasted_iota(jnp.int32, (TILE,), 0, layout=layout)
    # Parts of 8 are constants in instructions; whole places would fill the registers.
    inside = (place & -8) < (work.shape.length - position) - (place & 7)
    limits = jnp.iinfo(jnp.int32)
    low = jnp.min(jnp.where(inside, times, limits.max))
    return low, jnp.max(jnp.where(inside, times, limits.min))
