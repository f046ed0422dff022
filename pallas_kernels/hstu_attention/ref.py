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


class BlockPairs:
    """Scores of the pairs of blocks one offset apart; arguments as `hstu_attention_ref`."""

    def __init__(
        self, q, k, seq_offsets, *, max_len, alpha, masking, position_bias, timestamps, time_bias
    ):
        num_tokens = q.shape[0]
        self.band = band = make_band(num_tokens, max_len, look_ahead=masking.contextual_len > 0)
        coordinates = mask_coordinates(seq_offsets, num_tokens, masking)
        self._num_sequences = seq_offsets.shape[0] - 1
        self._query = Coordinates(*(band.split(x, fill=-1) for x in coordinates))
        self._key = Coordinates(*(band.surround(x, fill=-1) for x in self._query))
        self._q = to_blocks(band, q * alpha)
        self._k = self.keys(k)
        self._masking, self._max_len = masking, max_len
        self._position_bias, self._time_bias = position_bias, time_bias
        self._q_time = None if timestamps is None else band.split(timestamps)
        self._k_time = None if self._q_time is None else band.surround(self._q_time)

    def keys(self, x: jax.Array) -> jax.Array:
        """[T, H, D] as blocks of keys, for `at_offset`."""
        return self.band.surround(to_blocks(self.band, x))

    def distances(self, offset) -> jax.Array:
        """[block, block] slots from key to query."""
        slot = jnp.arange(self.band.block)
        return slot[:, None] - slot[None, :] + offset * self.band.block

    def buckets(self, offset) -> jax.Array | None:
        """[n, block, block] buckets of the time between, if that counts."""
        if self._time_bias is None or self._q_time is None or self._k_time is None:
            return None
        elapsed = self._q_time[:, :, None] - self.band.at_offset(self._k_time, offset)[:, None, :]
        return time_bucket(elapsed, self._time_bias.shape[1])

    def scores(self, offset) -> jax.Array:
        """[n, H, block, block] products and biases."""
        scores = _products(self._q, self.band.at_offset(self._k, offset))
        if self._position_bias is not None:
            distance = jnp.clip(self.distances(offset), 0, self._max_len - 1)
            scores += self._position_bias[:, distance]
        bucket = self.buckets(offset)
        if bucket is not None:
            scores += jnp.moveaxis(self._time_bias[:, bucket], 0, 1)
        return scores

    def valid(self, offset) -> jax.Array:
        """[n, 1, block, block] pairs that take part."""
        key = Coordinates(*(self.band.at_offset(x, offset) for x in self._key))
        valid = attends(self._query, key, self.distances(offset) == 0, self._masking)
        return (valid & (self._query.segment < self._num_sequences)[:, :, None])[:, None]


def _products(queries: jax.Array, keys: jax.Array) -> jax.Array:
    return jnp.einsum("nhqd,nhkd->nhqk", queries, keys, preferred_element_type=jnp.float32)


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
    pairs = BlockPairs(
        q,
        k,
        seq_offsets,
        max_len=max_len,
        alpha=alpha,
        masking=masking,
        position_bias=position_bias,
        timestamps=timestamps,
        time_bias=time_bias,
    )
    v_blocks = pairs.keys(v)

    def step(acc, offset):
        weights = jnp.where(pairs.valid(offset), jax.nn.silu(pairs.scores(offset)), 0)
        return acc + jnp.einsum(
            "nhqk,nhkd->nhqd",
            weights.astype(v.dtype),
            pairs.band.at_offset(v_blocks, offset),
            preferred_element_type=jnp.float32,
        )

    band = pairs.band
    init = jnp.zeros((band.num_blocks, q.shape[1], band.block, v.shape[-1]), jnp.float32)
    out = from_blocks(band.accumulate(step, init), q.shape[0])
    return (out * attn_scale).astype(v.dtype)


def bias_gradients(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    seq_offsets: jax.Array,
    d_out: jax.Array,
    *,
    max_len: int,
    alpha: float,
    masking: Masking,
    position_bias: jax.Array | None,
    timestamps: jax.Array | None,
    time_bias: jax.Array | None,
) -> tuple[jax.Array | None, jax.Array | None]:
    """f32 gradients of position_bias and time_bias, from that of the output before its scale.

    Summed block pair by block pair in a fixed order: automatic differentiation would scatter.
    """
    pairs = BlockPairs(
        q,
        k,
        seq_offsets,
        max_len=max_len,
        alpha=alpha,
        masking=masking,
        position_bias=position_bias,
        timestamps=timestamps,
        time_bias=time_bias,
    )
    band, heads = pairs.band, q.shape[1]
    v_blocks, d_blocks = pairs.keys(v), to_blocks(band, d_out)
    # Of every distance between slots of any two blocks, whether such pairs exist or not.
    before = (band.ahead + 1) * band.block - 1
    by_distance = jnp.zeros((heads, before + (band.reach + 1) * band.block), jnp.float32)
    by_bucket = jnp.zeros((heads, 0 if time_bias is None else time_bias.shape[1]), jnp.float32)

    def step(sums, offset):
        by_distance, by_bucket = sums
        scores = pairs.scores(offset)
        sigmoid = jax.nn.sigmoid(scores)
        d_scores = _products(d_blocks, band.at_offset(v_blocks, offset))
        d_scores *= sigmoid * (1 + scores * (1 - sigmoid))
        d_scores = jnp.where(pairs.valid(offset), d_scores, 0)
        if position_bias is not None:
            start = (offset + band.ahead) * band.block
            own = _sum_diagonals(jnp.sum(d_scores, axis=0))
            total = own + lax.dynamic_slice_in_dim(by_distance, start, own.shape[1], axis=1)
            by_distance = lax.dynamic_update_slice_in_dim(by_distance, total, start, axis=1)
        bucket = pairs.buckets(offset)
        if bucket is not None:
            inside = [bucket[:, None] == n for n in range(by_bucket.shape[1])]
            sums = [jnp.sum(jnp.where(own, d_scores, 0), axis=(0, 2, 3)) for own in inside]
            by_bucket += jnp.stack(sums, axis=1)
        return by_distance, by_bucket

    by_distance, by_bucket = band.accumulate(step, (by_distance, by_bucket))
    first = jnp.sum(by_distance[:, : before + 1], axis=1, keepdims=True)
    by_distance = jnp.concatenate([first, by_distance[:, before + 1 : before + max_len]], axis=1)
    return (
        None if position_bias is None else by_distance,
        None if time_bias is None else by_bucket,
    )


def _sum_diagonals(tiles: jax.Array) -> jax.Array:
    """[H, b, b] → [H, 2b - 1]: sums over row - column, from 1 - b on."""
    heads, block, _ = tiles.shape
    # Rows of 2b read as rows of 2b - 1 move each row one place to the right of the row before.
    wide = jnp.pad(tiles[:, :, ::-1], ((0, 0), (0, 0), (0, block))).reshape(heads, -1)
    skewed = wide[:, : block * (2 * block - 1)].reshape(heads, block, 2 * block - 1)
    return jnp.sum(skewed, axis=1)
