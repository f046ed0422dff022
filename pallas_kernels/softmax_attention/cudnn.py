"""Causal softmax attention over packed sequences through cuDNN, by way of padded ones.

cuDNN knows packed sequences too, but JAX offers that in no public function, and the statistics that
it then keeps are f32[B, H, T] instead of f32[B, H, max_len].
"""

import os
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp

from pallas_kernels._banded import equal_blocks, sequence_rows

_DETERMINISTIC = ("xla_gpu_deterministic_ops", "xla_gpu_exclude_nondeterministic_ops")


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    seq_offsets: jax.Array,
    *,
    max_len: int,
    scale: float,
    implementation: Literal["cudnn", "xla"] = "cudnn",
) -> jax.Array:
    """As `api.softmax_attention`; the "xla" implementation computes the same on every device."""
    rows = sequence_rows(seq_offsets, q.shape[0], max_len)
    # An empty sequence has one token of zeros: a softmax of nothing is not defined everywhere.
    lengths = jnp.maximum(jnp.diff(seq_offsets), 1).astype(jnp.int32)
    out = jax.nn.dot_product_attention(
        *(rows.split(x) for x in (q, k, v)),
        scale=scale,
        is_causal=True,
        query_seq_lengths=lengths,
        key_value_seq_lengths=lengths,
        implementation=implementation,
    )
    return rows.join(out, q.shape[0])


def problem(
    q: jax.Array, k: jax.Array, v: jax.Array, seq_offsets: jax.Array, max_len: int
) -> str | None:
    """What keeps cuDNN from these arrays, in JAX's words, or None."""
    if not q.shape[0] or seq_offsets.shape[0] < 2:
        return "there is no token, or no sequence"
    flags = os.environ.get("XLA_FLAGS", "")
    if asked := [flag for flag in _DETERMINISTIC if flag in flags]:
        # https://github.com/openxla/xla/pull/46500: a second layer of one shape ends the program.
        return f"its gradient is not deterministic, which {asked[0]} in XLA_FLAGS asks for"
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (q, k, v, seq_offsets)]
    try:
        jax.eval_shape(partial(attention, max_len=max_len, scale=1.0), *shapes)
    except (NotImplementedError, RuntimeError, ValueError) as error:
        return str(error)
    return None


def wasteful(num_sequences: int, num_tokens: int, max_len: int, width: int) -> str | None:
    """Says so if padding moves more bytes than XLA's scores, which is slower; or None.

    Padded q, k, v and out are written and read once each: 16 bytes a place and column. XLA writes
    and reads f32 scores and 16 bit weights of every pair: 12 bytes.
    """
    places = num_sequences * max_len
    scores = 12 * min(equal_blocks(num_tokens, max_len).pairs, places * max_len)
    padded = 16 * places * width
    if padded <= scores:
        return None
    return f"padding would move {padded} bytes a head, and XLA's scores are {scores}"
