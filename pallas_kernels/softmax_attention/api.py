"""Causal softmax attention over packed sequences."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from pallas_kernels._backend import Backend, resolve
from pallas_kernels.softmax_attention import ref


def softmax_attention(
    q: Float[jax.Array, "T H Dqk"],
    k: Float[jax.Array, "T H Dqk"],
    v: Float[jax.Array, "T H Dv"],
    seq_offsets: Int[jax.Array, "B1"],
    *,
    max_len: int,
    scale: float | None = None,
    backend: Backend | None = None,
    config: None = None,
) -> Float[jax.Array, "T H Dv"]:
    """Each token attends to itself and to the earlier tokens of its own sequence.

        out[t] = Σ_s softmax_s(scale · q[t]·k[s]) v[s],   s ≤ t in the same sequence

    Args:
      q, k, v: packed tokens; bf16 or f32; scores and sums are f32.
      seq_offsets: non-decreasing, starts at 0; slots behind `seq_offsets[-1]` give zeros.
      max_len: upper bound on the sequence lengths (static). Longer sequences are undefined.
      scale: None means Dqk ** -0.5.
      backend: "xla", or None for the best supported; a name never falls back.
      config: tiles of a kernel; the XLA backend has none.

    Raises:
      ValueError: max_len < 1; a config for XLA; `BackendError` for any other named backend.

    Gradient: of q, k and v; only the output and one f32 a token and head are kept for it.
    Cost: about 2·T·(max_len + 1.5·block)·H·(Dqk + Dv) FLOPs forward and 2.5 times that backward,
    block = 16 … 128 near max_len / 2; memory 4·T·block·H bytes a matrix of scores, never L × L.
    """
    if max_len < 1:
        raise ValueError(f"softmax_attention: max_len is {max_len}; expected at least 1")
    if config is not None:
        raise ValueError("softmax_attention: the xla backend takes no config; leave it None")
    resolve("softmax_attention", backend, lambda: "softmax_attention has no GPU kernel")
    scale = float(q.shape[-1] ** -0.5 if scale is None else scale)
    return _attention(q, k, v, jnp.asarray(seq_offsets), max_len, scale)


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _attention(q: Any, k: Any, v: Any, seq_offsets: Any, max_len: int, scale: float) -> jax.Array:
    return ref.forward(q, k, v, seq_offsets, max_len=max_len, scale=scale)[0]


def _forward(q: Any, k: Any, v: Any, seq_offsets: Any, max_len: int, scale: float) -> Any:
    out, log_total = ref.forward(q, k, v, seq_offsets, max_len=max_len, scale=scale)
    return out, (q, k, v, seq_offsets, out, log_total)


def _backward(max_len: int, scale: float, residuals: Any, dout: jax.Array) -> Any:
    q, k, v, seq_offsets, out, log_total = residuals
    gradients = ref.backward(
        q, k, v, seq_offsets, out, log_total, dout, max_len=max_len, scale=scale
    )
    return (*gradients, None)


_attention.defvjp(_forward, _backward)
