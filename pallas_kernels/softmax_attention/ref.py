"""Causal softmax attention over packed sequences in plain XLA, linear in memory."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels._banded import Band, from_blocks, make_band, to_blocks, token_coordinates

MASKED = -1e30  # finite, so that a row with nothing to attend to yields zeros, not NaN


class _Blocks(NamedTuple):
    """Inputs cut for `band`: heads first, [blocks, H, block, D]; segments [blocks, block]."""

    band: Band
    q: jax.Array
    k: jax.Array
    v: jax.Array
    q_segment: jax.Array
    k_segment: jax.Array

    def scores(self, offset: Any) -> tuple[jax.Array, jax.Array]:
        """f32 scores of every query block with the key block `offset` before it, and their mask."""
        band, slot = self.band, jnp.arange(self.band.block)
        scores = jnp.einsum(
            "nhqd,nhkd->nhqk",
            self.q,
            band.at_offset(self.k, offset),
            preferred_element_type=jnp.float32,
        )
        causal = slot[None, :] - offset * band.block <= slot[:, None]
        same = self.q_segment[:, :, None] == band.at_offset(self.k_segment, offset)[:, None, :]
        return scores, (same & causal)[:, None]


def _cut(q: Any, k: Any, v: Any, seq_offsets: jax.Array, max_len: int, scale: float) -> _Blocks:
    num_tokens = q.shape[0]
    band = make_band(seq_offsets, num_tokens, max_len)
    segment, _ = token_coordinates(seq_offsets, num_tokens)
    inside = segment < seq_offsets.shape[0] - 1
    # Behind a barrier, as XLA would compute them again for every pair.
    q_segment, k_segment = jax.lax.optimization_barrier(
        (
            band.split(jnp.where(inside, segment, -1), fill=-1),
            band.surround(band.split(jnp.where(inside, segment, -2), fill=-2), fill=-2),
        )
    )
    return _Blocks(
        band,
        to_blocks(band, q * scale),
        band.surround(to_blocks(band, k)),
        band.surround(to_blocks(band, v)),
        q_segment,
        k_segment,
    )


def forward(
    q: jax.Array, k: jax.Array, v: jax.Array, seq_offsets: jax.Array, *, max_len: int, scale: float
) -> tuple[jax.Array, jax.Array]:
    """The output, and the log of each row's softmax denominator: f32[blocks, H, block].

    Rows that attend to nothing give zeros, and a large denominator, so that backward's
    probabilities are zero too.
    """
    blocks = _cut(q, k, v, seq_offsets, max_len, scale)

    def step(carry, offset):
        peak, total, acc = carry
        scores, valid = blocks.scores(offset)
        scores = jnp.where(valid, scores, MASKED)
        new_peak = jnp.maximum(peak, scores.max(-1))
        weights = jnp.exp(scores - new_peak[..., None])
        shrink = jnp.exp(peak - new_peak)
        values = jnp.einsum(
            "nhqk,nhkd->nhqd",
            weights.astype(v.dtype),
            blocks.band.at_offset(blocks.v, offset),
            preferred_element_type=jnp.float32,
        )
        return new_peak, total * shrink + weights.sum(-1), acc * shrink[..., None] + values

    rows = blocks.q.shape[:3]
    init = (
        # Above MASKED, so that masked scores weigh exactly nothing from the start.
        jnp.full(rows, MASKED / 2, jnp.float32),
        jnp.zeros(rows, jnp.float32),
        jnp.zeros((*rows, v.shape[-1]), jnp.float32),
    )
    peak, total, acc = blocks.band.accumulate(step, init)
    empty = total == 0
    out = acc / jnp.where(empty, 1, total)[..., None]
    log_total = jnp.where(empty, -MASKED, peak + jnp.log(jnp.where(empty, 1, total)))
    return from_blocks(blocks.band, out, q.shape[0]).astype(v.dtype), log_total


def backward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    seq_offsets: jax.Array,
    out: jax.Array,
    log_total: jax.Array,
    dout: jax.Array,
    *,
    max_len: int,
    scale: float,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients of q, k and v; probabilities are rebuilt block by block, never stored."""
    blocks = _cut(q, k, v, seq_offsets, max_len, scale)
    band = blocks.band
    do = to_blocks(band, dout)
    dot = to_blocks(band, out).astype(jnp.float32) * do.astype(jnp.float32)
    dot = dot.sum(-1, keepdims=True)

    def product(formula, left, right):
        return jnp.einsum(formula, left, right, preferred_element_type=jnp.float32)

    def step(carry, offset):
        dq, dk, dv = carry
        scores, valid = blocks.scores(offset)
        p = jnp.where(valid, jnp.exp(scores - log_total[..., None]), 0)
        dp = product("nhqd,nhkd->nhqk", do, band.at_offset(blocks.v, offset))
        ds = (p * (dp - dot)).astype(q.dtype)
        dq += product("nhqk,nhkd->nhqd", ds, band.at_offset(blocks.k, offset))
        dk = band.add_at_offset(dk, offset, product("nhqk,nhqd->nhkd", ds, blocks.q))
        dv = band.add_at_offset(dv, offset, product("nhqk,nhqd->nhkd", p.astype(v.dtype), do))
        return dq, dk, dv

    init = tuple(jnp.zeros(x.shape, jnp.float32) for x in (blocks.q, blocks.k, blocks.v))
    dq, dk, dv = band.accumulate(step, init)
    tokens = q.shape[0]
    return (
        (from_blocks(band, dq, tokens) * scale).astype(q.dtype),
        from_blocks(band, band.inner(dk), tokens).astype(k.dtype),
        from_blocks(band, band.inner(dv), tokens).astype(v.dtype),
    )
