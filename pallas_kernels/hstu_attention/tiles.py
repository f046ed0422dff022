"""Which tiles of a sequence's scores hold pairs that attend, and who computes them.

A sequence's scores are cut into tiles of 64 queries × 64 keys that start at its first token. The
keys of some queries, or the queries of some keys, are a few runs of tiles. Everything is written
for scalars in a kernel and for arrays around it alike.
"""

from collections.abc import Sequence as Many
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int32

TILE = 64
"""Queries and keys of a tile: rows of one warpgroup's matrix instructions."""
WORK = 2 * TILE
"""Queries, or keys, that a program takes at once, where its memory has room for as many."""
ROW_MULTIPLE = 8
"""Rows that the copy engine and the tensor cores address together: where sequences may start."""


class Shape(NamedTuple):
    """One sequence: its tokens, and how many of them are no targets."""

    length: Any
    history_end: Any


@runtime_checkable
class Columns(Protocol):
    """Positions along the rows of a tile, compared with one bound for each row or for all."""

    def below(self, bound: Any) -> Any:
        """Positions < bound."""
        ...

    def from_(self, bound: Any) -> Any:
        """Positions ≥ bound."""
        ...

    def at(self, bound: Any) -> Any:
        """Positions = bound."""
        ...


class Mask(NamedTuple):
    """The static part of `ref.Masking`."""

    max_attn_len: int = 0
    contextual_len: int = 0
    min_full_attn_len: int = 0

    @property
    def shift(self) -> int:
        """Position of a token of the history, minus its mask id."""
        return max(self.contextual_len - 1, 0)

    def mask_id(self, position, shape: Shape):
        """As `ref.mask_coordinates`: 0 for contextual tokens, one id for all targets."""
        return jnp.minimum(jnp.maximum(position - self.shift, 0), shape.history_end - self.shift)

    def attends(self, query, key, shape: Shape):
        """Whether pairs of positions take part; `query` and `key` broadcast."""
        query_id, key_id = self.mask_id(query, shape), self.mask_id(key, shape)
        last_id = shape.history_end - self.shift
        earlier = key_id < query_id
        if self.max_attn_len > 0:
            near = query_id - key_id <= self.max_attn_len
            if self.min_full_attn_len > 0:
                near |= query_id >= last_id - self.min_full_attn_len
            earlier &= near
        valid = (query == key) | earlier
        if self.contextual_len > 0:
            valid |= (query < self.contextual_len) & (key_id < last_id)
        return valid & (query < shape.length)

    def attended(self, query, keys: "Columns", shape: Shape):
        """`attends`, for a query in each row: one run of keys, and the query itself."""
        query_id = self.mask_id(query, shape)
        begin, end = None, query_id + self.shift
        if self.max_attn_len > 0:
            oldest = query_id - self.max_attn_len
            begin = jnp.where(oldest > 0, oldest + self.shift, 0)
            if self.min_full_attn_len > 0:
                last_id = shape.history_end - self.shift
                begin = jnp.where(query_id >= last_id - self.min_full_attn_len, 0, begin)
        if self.contextual_len > 0:
            contextual = query < self.contextual_len
            begin = None if begin is None else jnp.where(contextual, 0, begin)
            end = jnp.where(contextual, shape.history_end, end)
        exists = query < shape.length
        valid = keys.below(jnp.where(exists, end, 0))
        if begin is not None:
            valid &= keys.from_(begin)
        return valid | keys.at(jnp.where(exists, query, -1))

    def attending(self, key, queries: "Columns", shape: Shape):
        """`attends`, for a key in each row: a run of queries, those at the end, and the key."""
        key_id = self.mask_id(key, shape)
        is_target = key >= shape.history_end
        valid = queries.from_(jnp.where(is_target, shape.length, key_id + self.shift + 1))
        inside = queries.below(shape.length)
        if self.max_attn_len > 0:
            newest = key_id + self.max_attn_len
            all_later = newest >= shape.history_end - self.shift
            near = queries.below(jnp.where(all_later, shape.length, newest + self.shift + 1))
            if self.min_full_attn_len > 0:
                near |= queries.from_(shape.history_end - self.min_full_attn_len)
            valid &= near
        if self.contextual_len > 0:
            valid |= queries.below(jnp.where(is_target, 0, self.contextual_len))
        return (valid | queries.at(key)) & inside

    def is_full(self, query, key, shape: Shape):
        """Whether all pairs of a tile take part, by the positions of its first query and key."""
        last_query, last_key = query + TILE - 1, key + TILE - 1
        last_id = shape.history_end - self.shift
        first_id = self.mask_id(query, shape)
        full = last_key < first_id + self.shift
        if self.max_attn_len > 0:
            near = self.mask_id(last_query, shape) - self.mask_id(key, shape) <= self.max_attn_len
            if self.min_full_attn_len > 0:
                near |= first_id >= last_id - self.min_full_attn_len
            full &= near
        if self.contextual_len > 0:
            full &= query >= self.contextual_len
            full |= (last_query < self.contextual_len) & (last_key < shape.history_end)
        return full & (last_query < shape.length)

    def key_runs(self, query, last_query, shape: Shape) -> "Runs":
        """Tiles of keys that a tile of queries (first and last position) attends to."""
        last_id = shape.history_end - self.shift
        end, begin = self.mask_id(last_query, shape) + self.shift, 0 * query
        if self.max_attn_len > 0:
            oldest = self.mask_id(query, shape) - self.max_attn_len
            begin = jnp.where(oldest > 0, oldest + self.shift, 0)
            if self.min_full_attn_len > 0:
                full = self.mask_id(last_query, shape) >= last_id - self.min_full_attn_len
                begin = jnp.where(full, 0, begin)
        if self.contextual_len > 0:
            contextual = query < self.contextual_len
            begin = jnp.where(contextual, 0, begin)
            end = jnp.where(contextual, shape.history_end, end)
        return Runs.of((_floor(begin), _ceil(end)), (_floor(query), _floor(last_query) + 1))

    def query_runs(self, key, last_key, shape: Shape) -> "Runs":
        """Tiles of queries that attend to a tile of keys (first and last position)."""
        last_id = shape.history_end - self.shift
        end = shape.length
        full_begin, context_end = shape.length, 0 * key
        if self.max_attn_len > 0:
            newest = self.mask_id(last_key, shape) + self.max_attn_len
            end = jnp.where(newest < last_id, newest + self.shift + 1, end)
            if self.min_full_attn_len > 0:
                full_begin = jnp.maximum(shape.history_end - self.min_full_attn_len, 0)
        if self.contextual_len > 0:
            context_end = jnp.minimum(self.contextual_len, shape.length)
        # Targets are attended to by themselves alone.
        targets = key >= shape.history_end
        end = jnp.where(targets, last_key + 1, jnp.maximum(end, last_key + 1))
        full_begin = jnp.where(targets, shape.length, full_begin)
        context_end = jnp.where(targets, 0, context_end)
        tiles = _ceil(shape.length)
        runs = [(_floor(key), jnp.minimum(_ceil(end), tiles))]
        if self.contextual_len > 0:
            runs.insert(0, (0 * key, _ceil(context_end)))
        if self.max_attn_len > 0 and self.min_full_attn_len > 0:
            runs.append((jnp.minimum(_floor(full_begin), tiles), tiles))
        return Runs.of(*runs)


def _floor(position):
    return lax.div(position, jnp.int32(TILE))


def _ceil(position):
    return lax.div(position + (TILE - 1), jnp.int32(TILE))


class Runs(NamedTuple):
    """Disjoint runs of tiles in ascending order: [begin, end) each."""

    begins: Many[Any]
    ends: Many[Any]

    @classmethod
    def of(cls, *runs: tuple[Any, Any]) -> "Runs":
        """Of runs that begin in ascending order and may overlap or be empty."""
        begins, ends, done = [], [], None
        for begin, end in runs:
            begin = begin if done is None else jnp.maximum(begin, done)
            done = jnp.maximum(begin, end)
            begins.append(begin)
            ends.append(done)
        return cls(tuple(begins), tuple(ends))

    @property
    def count(self):  # pyright: ignore[reportIncompatibleMethodOverride]
        """Tiles of all runs together."""
        return sum(end - begin for begin, end in zip(self.begins, self.ends, strict=True))

    def has(self, tile):
        """Whether a tile is in a run."""
        inside = False
        for begin, end in zip(self.begins, self.ends, strict=True):
            inside |= (begin <= tile) & (tile < end)
        return inside

    def tile(self, step):
        """The tile at a place in the order of the runs."""
        skipped, tile, end = self.begins[0], step + self.begins[0], self.ends[0]
        for begin, next_end in zip(self.begins[1:], self.ends[1:], strict=True):
            skipped = skipped + (begin - end)
            tile = jnp.where(tile >= end, step + skipped, tile)
            end = next_end
        return tile

    def place(self, tile):
        """How many tiles of the runs come before a tile."""
        return sum(
            jnp.minimum(jnp.maximum(tile - begin, 0), end - begin)
            for begin, end in zip(self.begins, self.ends, strict=True)
        )

    def within(self, own: "Runs"):
        """(first, end): places that cover the tiles that `own` has among these."""
        first, last = own.ends[-1], own.begins[0]
        for begin, end in zip(reversed(own.begins), reversed(own.ends), strict=True):
            first = jnp.where(end > begin, begin, first)
        for begin, end in zip(own.begins, own.ends, strict=True):
            last = jnp.where(end > begin, end, last)
        return self.place(first), self.place(last)


class Packing(NamedTuple):
    """Where sequences stand among rows: each starts at a multiple of `ROW_MULTIPLE`.

    Attributes:
      offsets: of the sequences among the tokens; i32[B + 1].
      starts: first row of each sequence; i32[B].
      shapes: of each sequence; i32[B] each.
      tokens: token of each row, -1 where there is none; i32[R]. None where rows are the tokens.
      rows: row of each token, -1 behind the last sequence; i32[T]. None where rows are the tokens.
    """

    offsets: Int32[Array, "B1"]
    starts: Int32[Array, "B"]
    shapes: Shape
    tokens: Int32[Array, "R"] | None
    rows: Int32[Array, "T"] | None


def pack(
    offsets: Int32[Array, "B1"],
    num_targets: Array | None,
    num_tokens: int,
    *,
    aligned: bool = False,
) -> Packing:
    """Rows for sequences of any length; R = T + 7·B and a tile that the last one may run into.

    `aligned` promises that all sequences start at multiples of `ROW_MULTIPLE` already; rows then
    are the tokens themselves, if there are enough for a tile.
    """
    num_sequences = offsets.shape[0] - 1
    lengths = jnp.maximum(jnp.diff(offsets), 0)  # whatever comes in, kernels must come to an end
    history_end = lengths if num_targets is None else jnp.maximum(lengths - num_targets, 0)
    shapes = Shape(lengths, history_end.astype(jnp.int32))
    if aligned and num_tokens % ROW_MULTIPLE == 0 and num_tokens >= WORK:
        return Packing(offsets, offsets[:-1], shapes, None, None)
    padded = (lengths + ROW_MULTIPLE - 1) // ROW_MULTIPLE * ROW_MULTIPLE
    ends = jnp.cumsum(padded, dtype=jnp.int32)
    starts = ends - padded
    num_rows = num_tokens + (ROW_MULTIPLE - 1) * num_sequences
    num_rows = -(-num_rows // ROW_MULTIPLE) * ROW_MULTIPLE + WORK
    row = jnp.arange(num_rows, dtype=jnp.int32)
    owner = jnp.minimum(_count_until(ends, row), num_sequences - 1)
    inside = row - starts[owner]
    tokens = jnp.where((inside >= 0) & (inside < lengths[owner]), inside + offsets[owner], -1)
    token = jnp.arange(num_tokens, dtype=jnp.int32)
    own = jnp.minimum(_count_until(offsets[1:], token), num_sequences - 1)
    rows = jnp.where(token < offsets[-1], token + (starts - offsets[:-1])[own], -1)
    return Packing(offsets, starts, shapes, tokens, rows)


def _count_until(ends, values):
    return jnp.searchsorted(ends, values, side="right", method="scan_unrolled").astype(jnp.int32)


def to_rows(x: Array, packing: Packing) -> Array:
    """[T, …] → [R, …], zeros where a row has no token: one fusion."""
    if packing.tokens is None:
        return x
    taken = x.at[jnp.maximum(packing.tokens, 0)].get(mode="promise_in_bounds")
    return jnp.where(_like(packing.tokens, x) >= 0, taken, 0)


def from_rows(x: Array, packing: Packing) -> Array:
    """[R, …] → [T, …], zeros behind the last sequence; one fusion. NaN for a broken promise."""
    if packing.rows is None:
        token = jnp.arange(x.shape[0], dtype=jnp.int32)
        taken = jnp.where(_like(token, x) < packing.offsets[-1], x, 0)
        return jnp.where(jnp.any(packing.starts % ROW_MULTIPLE), jnp.nan, taken)
    taken = x.at[jnp.maximum(packing.rows, 0)].get(mode="promise_in_bounds")
    return jnp.where(_like(packing.rows, x) >= 0, taken, 0)


def _like(index, x):
    return index.reshape(-1, *[1] * (x.ndim - 1))


class Works(NamedTuple):
    """What programs do: 128 or 64 queries, or keys, of a sequence each, the longest first.

    Attributes:
      fields: first row of the sequence, first position of the work, length and history's end of
        the sequence.
      used: how many works there are.
      tiles: columns of tiles that each work goes through; 0 for works that are not used.
    """

    fields: Int32[Array, "W 4"]
    used: Int32[Array, "1"]
    tiles: Int32[Array, "W"]


def list_works(
    packing: Packing, mask: Mask, num_tokens: int, *, rows: int = WORK, by_keys: bool = False
) -> Works:
    """All works of that many rows, sorted by their tiles; W = T / rows + B."""
    shapes = packing.shapes
    num_sequences = packing.starts.shape[0]
    counts = (shapes.length + rows - 1) // rows
    ends = jnp.cumsum(counts, dtype=jnp.int32)
    work = jnp.arange(num_tokens // rows + num_sequences, dtype=jnp.int32)
    owner = jnp.minimum(_count_until(ends, work), num_sequences - 1)
    position = rows * (work - (ends - counts)[owner])
    shape = Shape(shapes.length[owner], shapes.history_end[owner])
    runs = mask.query_runs if by_keys else mask.key_runs
    last = jnp.minimum(position + rows, shape.length) - 1
    tiles = jnp.where(work < ends[-1], runs(position, last, shape).count, 0)
    fields = (packing.starts[owner], position, *shape)
    order, *fields = lax.sort((-tiles, *fields), num_keys=1)
    used = jnp.minimum(ends[-1:], work.size)
    return Works(jnp.stack(fields, axis=1), used, -order)


class Tiles(NamedTuple):
    """All tiles of 64 tokens, the last ones of their sequences first.

    Attributes:
      fields: as `Works.fields`.
      counts: at n, how many have n tiles or more before them in their sequence.
    """

    fields: Int32[Array, "N 4"]
    counts: Int32[Array, "distances"]


def list_tiles(packing: Packing, num_tokens: int, distances: int) -> Tiles:
    """All tiles, and counts up to `distances`; N = T / 64 + B."""
    shapes = packing.shapes
    num_sequences = packing.starts.shape[0]
    counts = (shapes.length + TILE - 1) // TILE
    ends = jnp.cumsum(counts, dtype=jnp.int32)
    tile = jnp.arange(num_tokens // TILE + num_sequences, dtype=jnp.int32)
    owner = jnp.minimum(_count_until(ends, tile), num_sequences - 1)
    place = jnp.where(tile < ends[-1], tile - (ends - counts)[owner], -1)
    shape = (shapes.length[owner], shapes.history_end[owner])
    order, *fields = lax.sort((-place, packing.starts[owner], *shape), num_keys=1)
    fields.insert(1, -TILE * order)
    counts = _count_until(order, -jnp.arange(distances, dtype=jnp.int32))
    return Tiles(jnp.stack(fields, axis=1), counts)
