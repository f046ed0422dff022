"""HSTU attention over packed sequences in plain XLA, linear in memory."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels._banded import from_blocks, make_band, to_blocks, token_coordinates

_SQRT2 = np.uint32(0xB504F334)  # √2·2^31, rounded up


class Masking(NamedTuple):
    """Which earlier tokens a token attends to; see `api.hstu_attention`."""

    num_targets: jax.Array | None
    max_attn_len: int
    contextual_len: int
    min_full_attn_len: int


class Coordinates(NamedTuple):
    """Per token: sequence, mask id (targets share one, contextual tokens are 0) and last id."""

    segment: jax.Array
    mask_id: jax.Array
    last_id: jax.Array


def mask_coordinates(seq_offsets: jax.Array, num_tokens: int, masking: Masking) -> Coordinates:
    """Folds contextual prefix and targets into one id a token, so that masks compare ids."""
    segment, position = token_coordinates(seq_offsets, num_tokens)
    lengths = jnp.append(jnp.diff(seq_offsets), 0)
    last_id = lengths[segment]
    mask_id = position
    if masking.contextual_len > 0:
        mask_id = jnp.maximum(position - masking.contextual_len + 1, 0)
        last_id = last_id - masking.contextual_len + 1
    if masking.num_targets is not None:
        last_id = last_id - jnp.append(masking.num_targets, 0)[segment]
        mask_id = jnp.minimum(mask_id, last_id)
    return Coordinates(segment, mask_id, last_id)


def attends(
    query: Coordinates, key: Coordinates, same_token: jax.Array, masking: Masking
) -> jax.Array:
    """[…, block, block] mask of the pairs that take part."""
    q_id, k_id = query.mask_id[:, :, None], key.mask_id[:, None, :]
    last_id = query.last_id[:, :, None]
    distance = q_id - k_id
    valid = same_token | (distance > 0)
    if masking.max_attn_len > 0:
        near = distance <= masking.max_attn_len
        if masking.min_full_attn_len > 0:
            near |= q_id >= last_id - masking.min_full_attn_len
        valid &= near
    if masking.contextual_len > 0:
        valid |= (q_id == 0) & (k_id < last_id)
    return valid & (query.segment[:, :, None] == key.segment[:, None, :])


def time_bucket(seconds: jax.Array, num_buckets: int) -> jax.Array:
    """Two buckets an octave of elapsed time: floor(2·log2(1 + |seconds|)), clipped.

    In integers, since log2 in f32 misses many of the octaves' edges. n = 1 + |seconds| with its
    leading bit at 2^e is in bucket 2e, or 2e + 1 from 2^e·√2 on.
    """
    n = 1 + jnp.abs(seconds).astype(jnp.uint32)
    leading_zeros = lax.clz(n)
    upper_half = (n << leading_zeros) >= _SQRT2
    bucket = 2 * (31 - leading_zeros.astype(jnp.int32)) + upper_half
    return jnp.minimum(bucket, num_buckets - 1)


def hstu_attention_ref(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    seq_offsets: jax.Array,
    *,
    max_len: int,
    alpha: float,
    attn_scale: jax.Array,
    masking: Masking,
    position_bias: jax.Array | None,
    timestamps: jax.Array | None,
    time_bias: jax.Array | None,
) -> jax.Array:
    """The definition of correct; arguments as in `api.hstu_attention`."""
    num_tokens = q.shape[0]
    band = make_band(seq_offsets, num_tokens, max_len, look_ahead=masking.contextual_len > 0)
    coordinates = mask_coordinates(seq_offsets, num_tokens, masking)
    num_sequences = seq_offsets.shape[0] - 1
    query = Coordinates(*(band.split(x, fill=-1) for x in coordinates))
    key = Coordinates(*(band.surround(x, fill=-1) for x in query))
    q_blocks = to_blocks(band, q * alpha)
    k_blocks, v_blocks = (band.surround(to_blocks(band, x)) for x in (k, v))
    q_time = None if timestamps is None else band.split(timestamps)
    k_time = None if q_time is None else band.surround(q_time)
    slot = jnp.arange(band.block)

    def step(acc, offset):
        scores = jnp.einsum(
            "nhqd,nhkd->nhqk",
            q_blocks,
            band.at_offset(k_blocks, offset),
            preferred_element_type=jnp.float32,
        )
        distance = slot[:, None] - slot[None, :] + offset * band.block
        if position_bias is not None:
            scores += position_bias[:, jnp.clip(distance, 0, max_len - 1)]
        if time_bias is not None and q_time is not None and k_time is not None:
            elapsed = q_time[:, :, None] - band.at_offset(k_time, offset)[:, None, :]
            bucket = time_bucket(elapsed, time_bias.shape[1])
            # A table for each block: their gradients are summed one by one and then together, as
            # one sum of all pairs would lose digits.
            tables = jnp.broadcast_to(time_bias, (bucket.shape[0], *time_bias.shape))
            scores += jax.vmap(lambda table, own: table[:, own])(tables, bucket)
        at_offset = Coordinates(*(band.at_offset(x, offset) for x in key))
        valid = attends(query, at_offset, distance == 0, masking)
        valid &= (query.segment < num_sequences)[:, :, None]
        weights = jnp.where(valid[:, None], jax.nn.silu(scores), 0)
        return acc + jnp.einsum(
            "nhqk,nhkd->nhqd",
            weights.astype(v.dtype),
            band.at_offset(v_blocks, offset),
            preferred_element_type=jnp.float32,
        )

    init = jnp.zeros((*q_blocks.shape[:3], v.shape[-1]), jnp.float32)
    out = from_blocks(band, band.accumulate(step, init), num_tokens)
    return (out * attn_scale).astype(v.dtype)
