"""Causal softmax attention over packed sequences."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from pallas_kernels._backend import Backend, resolve
from pallas_kernels._sequences import checked_offsets
from pallas_kernels.softmax_attention import cudnn, ref


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
      max_len: upper bound on the sequence lengths (static).
      scale: None means Dqk ** -0.5.
      backend: "xla", "cudnn" (`jax.nn.dot_product_attention` on padded sequences: an NVIDIA GPU,
        bf16 or f16, Dqk = Dv), or None for the best supported; a name never falls back.
      config: tiles of a kernel; neither backend has any.

    Raises:
      ValueError: max_len < 1; a config; outside of `jax.jit`, unsound offsets (not from 0, falling,
        behind T, a sequence longer than max_len), which inside give NaN.
      BackendError: the named backend cannot run this call.

    Gradient: of q, k and v. XLA keeps the output and one f32 a token and head for it; cuDNN the
    padded q, k, v and output, and sums q's gradient in no fixed order.
    Cost: XLA about 2·T·(max_len + 1.5·block)·H·(Dqk + Dv) FLOPs forward and 2.5 times that
    backward, block = 16 … 128 near max_len / 2; or 2·B·max_len²·H·(Dqk + Dv), a block for each of
    the B = B1 - 1 sequences, where that is less and max_len ≤ 256. Memory: 4·T·block·H bytes a
    matrix of scores, linear in T. cuDNN: half of B·max_len² pairs at most; 8·B·max_len·H·Dv bytes.
    """
    if max_len < 1:
        raise ValueError(f"softmax_attention: max_len is {max_len}; expected at least 1")
    if config is not None:
        raise ValueError("softmax_attention: no backend takes a config; leave it None")
    offsets, sound = checked_offsets(
        "softmax_attention", seq_offsets, num_tokens=q.shape[0], max_len=max_len
    )

    def problem() -> str | None:
        sizes = offsets.shape[0] - 1, q.shape[0], max_len, q.shape[-1]
        waste = cudnn.wasteful(*sizes) if backend is None else None
        return waste or cudnn.problem(q, k, v, offsets, max_len)

    chosen = resolve("softmax_attention", backend, problem, kernel="cudnn")
    scale = float(q.shape[-1] ** -0.5 if scale is None else scale)
    if chosen == "cudnn":
        out = cudnn.attention(q, k, v, offsets, max_len=max_len, scale=scale)
    else:
        out = jnp.asarray(_attention(q, k, v, offsets, max_len, scale))
    return out if sound is True else jnp.where(sound, out, jnp.nan)


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
