"""Jagged batches: sequences of any length packed one after the other, without padding between."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from jaxrec.typing import PADDING_ID


class JaggedBatch(NamedTuple):
    """B sequences packed into T token slots, and the M positions to learn from or to answer.

    Every shape is static: unused sequences are empty and stand last, unused token slots hold
    `PADDING_ID` behind `seq_offsets[-1]`, unused targets have `target_ids == PADDING_ID`.

    Attributes:
      item_ids: item numbers, 1-based; i32[T].
      seq_offsets: sequence b is the tokens seq_offsets[b] up to seq_offsets[b + 1]; i32[B + 1].
      target_positions: token slots whose output is scored; i32[M].
      target_ids: the item that followed each of them; i32[M].
      timestamps: seconds since the dataset's first event; i32[T]; zeros where there are none.
    """

    item_ids: Int[jax.Array | np.ndarray, "T"]
    seq_offsets: Int[jax.Array | np.ndarray, "B1"]
    target_positions: Int[jax.Array | np.ndarray, "M"]
    target_ids: Int[jax.Array | np.ndarray, "M"]
    timestamps: Int[jax.Array | np.ndarray, "T"]


def segment_ids(
    seq_offsets: Int[jax.Array | np.ndarray, "B1"], num_tokens: int
) -> Int[jax.Array, "{num_tokens}"]:
    """The sequence that each token slot belongs to; B for the slots behind the last sequence."""
    slots = jnp.arange(num_tokens, dtype=jnp.int32)
    return jnp.searchsorted(seq_offsets[1:], slots, side="right").astype(jnp.int32)


def positions(
    seq_offsets: Int[jax.Array | np.ndarray, "B1"], num_tokens: int
) -> Int[jax.Array, "{num_tokens}"]:
    """Each token's place in its own sequence, from 0."""
    slots = jnp.arange(num_tokens, dtype=jnp.int32)
    return slots - jnp.asarray(seq_offsets)[segment_ids(seq_offsets, num_tokens)]


def positions_from_end(
    seq_offsets: Int[jax.Array | np.ndarray, "B1"], num_tokens: int
) -> Int[jax.Array, "{num_tokens}"]:
    """Each token's distance to the last token of its sequence; 0 for the last one itself."""
    offsets = jnp.append(jnp.asarray(seq_offsets), num_tokens)
    slots = jnp.arange(num_tokens, dtype=jnp.int32)
    return offsets[segment_ids(seq_offsets, num_tokens) + 1] - 1 - slots


def valid_tokens(
    seq_offsets: Int[jax.Array | np.ndarray, "B1"], num_tokens: int
) -> Bool[jax.Array, "{num_tokens}"]:
    """True for the slots that hold a token of some sequence."""
    return jnp.arange(num_tokens, dtype=jnp.int32) < seq_offsets[-1]


def to_padded(
    values: Float[jax.Array, "T D"],
    seq_offsets: Int[jax.Array | np.ndarray, "B1"],
    max_len: int,
) -> Float[jax.Array, "B1-1 {max_len} D"]:
    """Sequences as rows, left-aligned, cut to `max_len` and filled with zeros."""
    offsets = jnp.asarray(seq_offsets)
    slots = offsets[:-1, None] + jnp.arange(max_len, dtype=jnp.int32)
    inside = slots < offsets[1:, None]
    rows = values[jnp.minimum(slots, values.shape[0] - 1)]
    return jnp.where(inside[..., None], rows, 0)


__all__ = [
    "PADDING_ID",
    "JaggedBatch",
    "positions",
    "positions_from_end",
    "segment_ids",
    "to_padded",
    "valid_tokens",
]
