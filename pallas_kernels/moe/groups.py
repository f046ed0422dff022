"""Rows of tokens in groups of whole tiles, one an expert: what XLA does around the kernels."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float32, Int32

from pallas_kernels.moe.dispatch import Dispatch, Tiles, group_tiles, in_expert_order

TILE_ROWS = 128


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


def combine(
    rows: Array, gates: Float32[Array, "T K"] | None, places: Int32[Array, "T K"]
) -> Float32[Array, "T D"]:
    """Sum of each token's rows, weighted if there are gates, in f32; one fusion, no [T, K, D]."""
    taken = rows.at[jnp.maximum(places, 0)].get(mode="promise_in_bounds").astype(jnp.float32)
    taken = taken if gates is None else gates[..., None] * taken
    # A choice, not a product with zero: what the unrouted take may be anything.
    return jnp.sum(jnp.where(places[..., None] >= 0, taken, 0), axis=1)


def row_gates(gates: Array, dispatch: Dispatch, groups: Groups) -> Float32[Array, "P"]:
    """The gate of each row, 0 where there is no pair."""
    own = in_expert_order(gates, dispatch)
    inside = jnp.arange(TILE_ROWS, dtype=jnp.int32)
    pairs = (groups.tiles.start[:, None] + inside).reshape(-1)
    return jnp.where(groups.filled, own[jnp.minimum(pairs, own.size - 1)], 0)


def gates_by_expert(
    gates: Float32[Array, "T K"], ids: Int32[Array, "T K"], num_experts: int
) -> Float32[Array, "T E"]:
    """Sum of each token's gates for each expert."""
    chosen = ids[..., None] == jnp.arange(num_experts)
    return jnp.sum(jnp.where(chosen, gates[..., None], 0), axis=1)


def sum_by_expert(rows: Array, groups: Groups, num_experts: int) -> Float32[Array, "E H"]:
    """Sum of each expert's rows in f32, tile by tile: no atomics."""
    tiles = rows.reshape(-1, TILE_ROWS, rows.shape[1])
    sums = jnp.sum(tiles.astype(jnp.float32), axis=1)
    # Tiles behind the last used one are never written, and may hold anything.
    used = (groups.tiles.size > 0)[:, None]
    owner = jnp.arange(num_experts)[:, None] == groups.tiles.expert
    return jnp.matmul(
        owner.astype(jnp.float32), jnp.where(used, sums, 0), precision=lax.Precision.HIGHEST
    )
