"""Causal softmax attention over packed sequences."""

import jax
from jaxtyping import Float, Int

from pallas_kernels.softmax_attention.ref import softmax_attention_ref


def softmax_attention(
    q: Float[jax.Array, "T H Dqk"],
    k: Float[jax.Array, "T H Dqk"],
    v: Float[jax.Array, "T H Dv"],
    seq_offsets: Int[jax.Array, "B1"],
    *,
    max_len: int,
    scale: float | None = None,
) -> Float[jax.Array, "T H Dv"]:
    """Each token attends to itself and to the earlier tokens of its own sequence.

        out[t] = Σ_s softmax_s(scale · q[t]·k[s]) v[s],   s ≤ t in the same sequence

    Args:
      q, k, v: packed tokens; bf16 or f32; scores and sums are f32.
      seq_offsets: non-decreasing, starts at 0; slots behind `seq_offsets[-1]` give zeros.
      max_len: upper bound on the sequence lengths (static). Longer sequences are undefined.
      scale: None means Dqk ** -0.5.

    Cost: about 2·T·(max_len + block)·H·(Dqk + Dv) FLOPs; memory linear in T, never L × L.
    """
    if max_len < 1:
        raise ValueError(f"max_len must be at least 1, got {max_len}")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return softmax_attention_ref(q, k, v, seq_offsets, max_len=max_len, scale=scale)
