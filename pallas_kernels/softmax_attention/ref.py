"""Causal softmax attention over packed sequences in plain XLA, linear in memory."""

import jax
import jax.numpy as jnp

from pallas_kernels._banded import make_band, token_coordinates

MASKED = -1e30  # finite, so that a row with nothing to attend to yields zeros, not NaN


def softmax_attention_ref(
    q: jax.Array, k: jax.Array, v: jax.Array, seq_offsets: jax.Array, *, max_len: int, scale: float
) -> jax.Array:
    """The definition of correct; arguments as in `api.softmax_attention`."""
    num_tokens, num_heads, _ = q.shape
    band = make_band(num_tokens, max_len)
    segment, _ = token_coordinates(seq_offsets, num_tokens)
    inside = segment < seq_offsets.shape[0] - 1
    slot = jnp.arange(band.num_blocks * band.block).reshape(band.num_blocks, band.block)
    q_blocks, q_segment = band.split(q * scale), band.split(jnp.where(inside, segment, -1))
    k_blocks, v_blocks = band.keys(k), band.keys(v)
    k_segment = band.keys(jnp.where(inside, segment, -2), fill=-2)

    def step(carry, offset):
        peak, total, acc = carry
        scores = jnp.einsum(
            "nqhd,nkhd->nhqk",
            q_blocks,
            band.at_offset(k_blocks, offset),
            preferred_element_type=jnp.float32,
        )
        causal = slot[0][None, :] - offset * band.block <= slot[0][:, None]
        same = q_segment[:, :, None] == band.at_offset(k_segment, offset)[:, None, :]
        scores = jnp.where((same & causal)[:, None], scores, MASKED)
        new_peak = jnp.maximum(peak, jax.lax.stop_gradient(scores.max(-1)))
        weights = jnp.where((same & causal)[:, None], jnp.exp(scores - new_peak[..., None]), 0)
        shrink = jnp.exp(peak - new_peak)
        values = jnp.einsum(
            "nhqk,nkhd->nhqd",
            weights.astype(v.dtype),
            band.at_offset(v_blocks, offset),
            preferred_element_type=jnp.float32,
        )
        total = total * shrink + weights.sum(-1)
        return new_peak, total, acc * shrink[..., None] + values

    rows = (band.num_blocks, num_heads, band.block)
    init = (
        jnp.full(rows, MASKED, jnp.float32),
        jnp.zeros(rows, jnp.float32),
        jnp.zeros((*rows, v.shape[-1]), jnp.float32),
    )
    _, total, acc = band.accumulate(step, init)
    out = acc / jnp.maximum(total, 1e-30)[..., None]
    return (
        out.transpose(0, 2, 1, 3).reshape(-1, num_heads, v.shape[-1])[:num_tokens].astype(v.dtype)
    )
