"""What the kernels add to the scores: a bias of the distance and one of the time between tokens.

The bias of the distance comes as whole tiles, one for each distance of tiles, since a kernel has no
gather: those in bf16 with the keys, those in f32, for which shared memory has no room, when they
are needed. Of the time between tokens the kernel finds the bucket by comparing with the buckets'
edges, only those that the tile's times can fall between.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Float32, Int32

from pallas_kernels.hstu_attention.ref import time_bucket
from pallas_kernels.hstu_attention.sizes import Buffer
from pallas_kernels.hstu_attention.tiles import TILE, Shape
from pallas_kernels.hstu_attention.walk import BY_COLUMN, BY_ROW, SCORES, Own, Work

_SQRT2 = np.uint32(0xB504F333)  # √2·2^31, rounded down
MAX_BUCKETS = 63  # 2^31 seconds are in the last one
_PIECE = 16  # columns whose times are looked up at once, for want of registers
_TABLE_MULTIPLE = 32  # entries; the copy engine takes whole lines of 128 bytes


class BiasArrays(NamedTuple):
    """Arguments of a kernel for its biases, halved; None for what is missing.

    Attributes:
      tiles: bias of the distances of a tile, by the distance of tiles from -1 on; bf16 or f32.
      times: of each row.
      table: bias of each bucket.
    """

    tiles: Float[Array, "H N 64 64"] | None
    times: Int32[Array, "R"] | None
    table: Float32[Array, "H buckets"] | None


def bias_arrays(
    position_bias: Array | None,
    times: Array | None,
    time_bias: Array | None,
    *,
    dtype: Any = jnp.bfloat16,
    by_keys: bool = False,
) -> BiasArrays:
    """Prepares the biases for a kernel whose tiles are [queries, keys], or [keys, queries].

    `times` are those of rows; `dtype` is that of the queries.
    """
    tiles = table = None
    if position_bias is not None:
        distance = _distances(position_bias.shape[1], by_keys)
        halves = (0.5 * position_bias.astype(jnp.float32)).astype(dtype)
        tiles = halves.at[:, distance].get(mode="promise_in_bounds")
    if times is not None and time_bias is not None:
        times = times.astype(jnp.int32)
        reached = time_bias[:, :MAX_BUCKETS]
        padding = -reached.shape[1] % _TABLE_MULTIPLE
        table = jnp.pad(0.5 * reached.astype(jnp.float32), ((0, 0), (0, padding)))
    return BiasArrays(tiles, times, table)


def _distances(max_len: int, by_keys: bool) -> Int32[Array, "N 64 64"]:
    """Distances, within max_len, of each pair of a tile's places, by the distance of tiles."""
    places = jnp.arange(TILE, dtype=jnp.int32)
    inside = places[:, None] - places
    tiles = TILE * jnp.arange(-1, (max_len - 1) // TILE + 1, dtype=jnp.int32)
    inside = inside.T if by_keys else inside
    return jnp.clip(tiles[:, None, None] + inside, 0, max_len - 1)


def by_distance(tiles: Float32[Array, "H C 64 64"], distances: int) -> Float32[Array, "H L"]:
    """Sums of all pairs at each distance; those that look ahead count as distance 0."""
    heads = tiles.shape[0]
    back, ahead = tiles[:, :distances], tiles[:, distances:]
    # Rows of 128 read as rows of 127 move each row one place to the right of the row before.
    wide = jnp.pad(back[..., ::-1], ((0, 0), (0, 0), (0, 0), (0, TILE)))
    wide = wide.reshape(heads, distances, -1)[..., : TILE * (2 * TILE - 1)]
    diagonals = jnp.sum(wide.reshape(heads, distances, TILE, 2 * TILE - 1), axis=2)
    before, own = diagonals[..., : TILE - 1], diagonals[..., TILE - 1 :]
    # What lies before a tile's distance belongs to the tile before.
    own = own.at[:, :-1, 1:].add(before[:, 1:])
    looks_ahead = jnp.sum(before[:, 0], axis=1) + jnp.sum(ahead, axis=(1, 2, 3))
    return own.at[:, 0, 0].add(looks_ahead).reshape(heads, -1)


@dataclass(frozen=True)
class Biases:
    """Which biases a kernel adds.

    Attributes:
      alpha: factor on the products.
      tiles: of the bias of the distance; 0 for none.
      streams: whether these come with the keys.
      buckets: of the times; 0 for none.
      table: length of the table, padded.
      by_keys: whether tiles are [keys, queries].
    """

    alpha: float
    tiles: int
    streams: bool
    buckets: int
    table: int
    by_keys: bool

    @classmethod
    def of(cls, arrays: BiasArrays, alpha: float, buckets: int, *, by_keys: bool = False):
        """For these arrays."""
        tiles = 0 if arrays.tiles is None else arrays.tiles.shape[1]
        streams = arrays.tiles is not None and arrays.tiles.dtype == jnp.bfloat16
        table = 0 if arrays.table is None else arrays.table.shape[1]
        return cls(alpha, tiles, streams, buckets, table, by_keys)

    def resident(self, rows: int) -> tuple[Buffer, ...]:
        """What a work keeps: times of its rows, table of its head."""
        if not self.buckets:
            return ()
        return Buffer((rows,), jnp.int32), Buffer((self.table,), jnp.float32)

    def streamed(self, rows: int) -> tuple[Buffer, ...]:
        """What comes with a tile: one tile of bias for each warpgroup, times of its rows."""
        buffers = ()
        if self.streams:
            warpgroups = rows // TILE
            buffers += (Buffer((warpgroups, TILE, TILE), copies=warpgroups),)
        if self.buckets:
            buffers += (Buffer((TILE,), jnp.int32),)
        return buffers

    def load_resident(self, refs: BiasArrays, work: Work, copy: Any, first: int) -> None:
        """Copies `resident`, whose first buffer is number `first`."""
        if self.buckets:
            assert refs.times is not None
            assert refs.table is not None
            copy(refs.times.at[pl.ds(work.tile_row(work.position), work.size)], first)
            copy(refs.table.at[work.head], first + 1)

    def load_tile(self, refs: BiasArrays, work: Work, position: Any, copy: Any, first: int) -> None:
        """Copies `streamed`."""
        if self.streams:
            for warpgroup in range(work.size // TILE):
                own_position = work.position + warpgroup * TILE
                copy(self._tile(refs, work, own_position, position), first, warpgroup)
            first += 1
        if self.buckets:
            assert refs.times is not None
            copy(refs.times.at[pl.ds(work.tile_row(position), TILE)], first)

    def _tile(self, refs: BiasArrays, work: Work, own_position: Any, position: Any) -> Any:
        """The tile of bias for tiles that start at these positions."""
        assert refs.tiles is not None
        tiles: Any = refs.tiles
        distance = own_position - position
        distance = lax.div(-distance if self.by_keys else distance, jnp.int32(TILE))
        place = jnp.minimum(jnp.maximum(distance, -1), self.tiles - 2) + 1
        return tiles.at[work.head, place]

    def of_tile(
        self, refs: BiasArrays, work: Work, own: Own, position: Any, resident: Any, streamed: Any
    ) -> Any:
        """Half of the biases of a tile, None without any.

        Wanted before the products are issued: what it takes to look times up is then done with when
        their results come into the registers.
        """
        half = None
        if self.buckets:
            elapsed = Elapsed.of(
                resident[0].at[own.rows],
                streamed[-1],
                own.position,
                position,
                work.shape,
                self.buckets,
            )
            half = elapsed.half_bias(resident[1])
        if self.tiles:
            if self.streams:
                tile = plgpu.load(streamed[0].at[own.warpgroup], layout=SCORES)
            else:
                tile = self._tile(refs, work, own.position, position)
                tile = plgpu.load(tile, layout=SCORES, optimized=False)
            tile = tile.astype(jnp.float32)
            half = tile if half is None else half + tile
        return half

    def half_scores(self, products: Any, half_biases: Any) -> Any:
        """(α·products + biases) / 2 of a tile, with what `of_tile` gave."""
        half = (0.5 * self.alpha) * products
        return half if half_biases is None else half + half_biases


class Elapsed(NamedTuple):
    """Time between the tokens of a tile's pairs.

    Attributes:
      rows, columns: times, [64, 64] each.
      first, last: buckets that they can be in.
    """

    rows: Any
    columns: Any
    first: Any
    last: Any

    @classmethod
    def of(cls, rows, columns, row_position, position, shape: Shape, buckets: int) -> "Elapsed":
        """From references to the times of rows and columns, and the tile's first positions."""
        # The range of the rows' times too is found by column, among the lanes of each warp: by row
        # it takes memory between warps, and Mosaic gives both warpgroups the same.
        row_low, row_high = _range(plgpu.load(rows, layout=BY_COLUMN), row_position, shape)
        rows, columns = plgpu.load(rows, layout=BY_ROW), plgpu.load(columns, layout=BY_COLUMN)
        low, high = _range(columns, position, shape)
        closest = jnp.maximum(jnp.maximum(row_low - high, low - row_high), 0)
        farthest = jnp.maximum(row_high - low, high - row_low)
        return cls(
            lax.broadcast_in_dim(rows, (TILE, TILE), (0,)),
            lax.broadcast_in_dim(columns, (TILE, TILE), (1,)),
            *(time_bucket(seconds, buckets) for seconds in (closest, farthest)),
        )

    def pieces(self):
        """(columns, seconds) of some columns after the other, for want of registers."""
        for begin in range(0, TILE, _PIECE):
            piece = slice(begin, begin + _PIECE)
            yield piece, lax.abs(self.rows[:, piece] - self.columns[:, piece])

    def half_bias(self, table):
        """table[bucket] of each pair: of the last bucket whose edge it reaches."""

        def found(seconds):
            def bucket(n, bias):
                return jnp.where(seconds >= _edge(n), table[n], bias)

            bias = jnp.full(seconds.shape, table[self.first], jnp.float32)
            bias = plgpu.layout_cast(bias, SCORES)
            return lax.fori_loop(self.first + 1, self.last + 1, bucket, bias)

        return jnp.concatenate([found(seconds) for _, seconds in self.pieces()], axis=1)

    def add_sums(self, values, sums, buckets: int) -> None:
        """Adds the sum of each row's values in bucket n to sums[n]."""

        def bucket(n, _):
            is_last = n >= min(buckets, MAX_BUCKETS) - 1
            end = jnp.where(is_last, jnp.iinfo(jnp.int32).max, _edge(n + 1) - 1)
            total = plgpu.load(sums.at[n], layout=BY_ROW)
            for piece, seconds in self.pieces():
                inside = (seconds >= _edge(n)) & (seconds <= end)
                total += jnp.sum(jnp.where(inside, values[:, piece], 0.0), axis=1)
            sums.at[n][...] = total

        lax.fori_loop(self.first, self.last + 1, bucket, None)


def _edge(bucket):
    """The fewest seconds of a bucket above 0: 2^(bucket / 2), rounded up, less one."""
    octave = bucket >> 1
    whole = jnp.int32(1) << octave
    root = lax.shift_right_logical(jnp.uint32(_SQRT2), (31 - octave).astype(jnp.uint32))
    return jnp.where((bucket & 1) == 0, whole - 1, root.astype(jnp.int32))


def _range(times, position, shape: Shape):
    """(least, greatest) of the times, laid out by column, that belong to the sequence."""
    place = plgpu.broadcasted_iota(jnp.int32, (TILE,), 0, layout=BY_COLUMN)
    # Parts of 8 are constants in instructions; whole places would fill the registers.
    inside = (place & -8) < (shape.length - position) - (place & 7)
    limits = jnp.iinfo(jnp.int32)
    low = jnp.min(jnp.where(inside, times, limits.max))
    return low, jnp.max(jnp.where(inside, times, limits.min))
