"""HSTU's pointwise (SiLU) attention over packed sequences."""

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from pallas_kernels.hstu_attention.ref import Masking, hstu_attention_ref


def hstu_attention(
    q: Float[jax.Array, "T H Dqk"],
    k: Float[jax.Array, "T H Dqk"],
    v: Float[jax.Array, "T H Dv"],
    seq_offsets: Int[jax.Array, "B1"],
    *,
    max_len: int,
    alpha: float | None = None,
    attn_scale: float | Float[jax.Array, "T"] | None = None,
    num_targets: Int[jax.Array, "B1-1"] | None = None,
    max_attn_len: int = 0,
    contextual_len: int = 0,
    min_full_attn_len: int = 0,
    position_bias: Float[jax.Array, "H {max_len}"] | None = None,
    timestamps: Int[jax.Array, "T"] | None = None,
    time_bias: Float[jax.Array, "H buckets"] | None = None,
    backend: str | None = None,
    config: None = None,
) -> Float[jax.Array, "T H Dv"]:
    """Each token sums the earlier tokens of its own sequence, weighted without a softmax.

        out[t] = attn_scale · Σ_s silu(alpha · q[t]·k[s] + bias[t, s]) v[s]

    Args:
      q, k, v: packed tokens; bf16 or f32; scores and sums are f32.
      seq_offsets: non-decreasing, starts at 0; slots behind `seq_offsets[-1]` give zeros.
      max_len: upper bound on the sequence lengths (static). Longer sequences are undefined.
      alpha: factor on q·k; None means 1.
      attn_scale: factor on the sum, one for all or one a token; None means 1 / max_len.
      num_targets: the last tokens of each sequence that attend to the history and to themselves,
        but not to each other.
      max_attn_len: 0, or how far back a token sees.
      contextual_len: this many first tokens of each sequence see the whole sequence.
      min_full_attn_len: with `max_attn_len`: the last tokens that see everything all the same.
      position_bias: added to the scores by distance t - s.
      timestamps, time_bias: added by bucket floor(2·log2(1 + |seconds between|)).
      backend: "xla", or None for the best supported.

    Cost: about 2·T·(max_len + block)·H·(Dqk + Dv) FLOPs; memory linear in T, never L × L.
    Source: HSTU (arXiv 2402.17152); the masks are those of generative-recommenders' operator.
    """
    if max_len < 1:
        raise ValueError(f"max_len must be at least 1, got {max_len}")
    if (time_bias is None) != (timestamps is None):
        raise ValueError("timestamps and time_bias go together: give both or neither")
    if backend not in (None, "xla"):
        raise ValueError(f"hstu_attention has the backend 'xla', not {backend!r}")
    if config is not None:
        raise ValueError("the xla backend of hstu_attention takes no config")
    scale = jnp.asarray(1 / max_len if attn_scale is None else attn_scale, jnp.float32)
    return hstu_attention_ref(
        q,
        k,
        v,
        jnp.asarray(seq_offsets),
        max_len=max_len,
        alpha=1.0 if alpha is None else alpha,
        attn_scale=scale[:, None, None] if scale.ndim else scale,
        masking=Masking(num_targets, max_attn_len, contextual_len, min_full_attn_len),
        position_bias=position_bias,
        timestamps=timestamps,
        time_bias=time_bias,
    )
