"""HSTU attention of new tokens to cached keys and values: what serving runs for each click."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels._backend import Backend, resolve
from pallas_kernels.hstu_attention.api import check_arguments
from pallas_kernels.hstu_attention.config import HstuConfig, kernel_problem
from pallas_kernels.hstu_attention.ref import time_bucket
from pallas_kernels.hstu_attention.tiles import Mask, Shape

_KEYS = 512  # of a step of the reference


def hstu_attention_cached(
    q: Float[Array, "B N H Dqk"],
    k: Float[Array, "B S H Dqk"],
    v: Float[Array, "B S H Dv"],
    lengths: Int[Array, "B"],
    *,
    max_len: int,
    alpha: float | None = None,
    attn_scale: float | Float[Array, "B N"] | Float[Array, ""] | None = None,
    num_targets: Int[Array, "B"] | None = None,
    max_attn_len: int = 0,
    contextual_len: int = 0,
    min_full_attn_len: int = 0,
    position_bias: Float[Array, "H {max_len}"] | None = None,
    timestamps: Int[Array, "B S"] | None = None,
    time_bias: Float[Array, "H buckets"] | None = None,
    backend: Backend | None = None,
    config: HstuConfig | None = None,
) -> Float[Array, "B N H Dv"]:
    """The last rows of `hstu_attention` alone: N queries a sequence, keys and values from a cache.

    Query n of sequence b is its token lengths[b] - N + n. Everything else is as there.

    Args:
      q: queries of each sequence's last N tokens; those before its first token give zeros.
      k, v: room for S tokens of each sequence, the new ones included; the slots behind
        `lengths[b]` hold finite values.
      lengths: tokens of each sequence so far, the new ones included; at most S and max_len.
      timestamps: of each slot.
      config: only `programs` counts: the cache is always read where it is.

    Raises:
      ValueError: as `hstu_attention`.
      NotImplementedError: on differentiation; train with `hstu_attention`.

    Cost: 2·(Dqk + Dv) FLOPs a query, key and head, and the cache read once. The kernels round N up
    to tiles of 64 queries, which costs nothing while the cache's bytes are the bound, and copy the
    cache only if S is no multiple of 8 (or all of it is shorter than 128 slots), or if it is in
    f32, as bf16 parts of 6 bytes a value. Memory: the XLA
    backend keeps scores of 512 keys at a time, 2,048·B·N·H bytes a matrix.
    """
    check_arguments(max_len, max_attn_len, contextual_len, min_full_attn_len, timestamps, time_bias)

    chosen = resolve("hstu_attention_cached", backend, lambda: kernel_problem(q, k, v), wgmma=True)
    q, k, v, position_bias, time_bias = _without_gradient((q, k, v, position_bias, time_bias))
    lengths = jnp.asarray(lengths, jnp.int32)
    history_end = lengths if num_targets is None else lengths - num_targets
    arguments = (
        *(q, k, v, Shape(lengths, history_end.astype(jnp.int32))),
        *(position_bias, timestamps, time_bias),
    )
    static = {
        "alpha": 1.0 if alpha is None else alpha,
        "mask": Mask(max_attn_len, contextual_len, min_full_attn_len),
    }
    if chosen == "mosaic_gpu" and q.size and k.shape[1]:
        from pallas_kernels.hstu_attention import mosaic_gpu_cached

        total = mosaic_gpu_cached.forward(*arguments, **static, config=config or HstuConfig())
    else:
        total = cached_ref(*arguments, **static)
    scale = jnp.asarray(1 / max_len if attn_scale is None else attn_scale, jnp.float32)
    scale = scale[:, :, None, None] if scale.ndim else scale
    return (total.astype(jnp.float32) * scale).astype(v.dtype)


@jax.custom_jvp
def _without_gradient(arrays: Any) -> Any:
    return arrays


@_without_gradient.defjvp
def _refuse(primals, tangents):
    raise NotImplementedError(
        "hstu_attention_cached has no gradient: it serves; train with hstu_attention"
    )


def cached_ref(
    q: Float[Array, "B N H Dqk"],
    k: Float[Array, "B S H Dqk"],
    v: Float[Array, "B S H Dv"],
    shape: Shape,
    position_bias: Float[Array, "H max_len"] | None,
    timestamps: Int[Array, "B S"] | None,
    time_bias: Float[Array, "H buckets"] | None,
    *,
    alpha: float,
    mask: Mask,
) -> Float[Array, "B N H Dv"]:
    """The definition of correct, in f32 and without the scale; `shape` is i32[B] each."""
    batch, new, heads, _ = q.shape
    capacity = k.shape[1]
    total = jnp.zeros((batch, new, heads, v.shape[3]), jnp.float32)
    if not capacity:
        return total
    block = min(_KEYS, capacity)
    query = shape.length[:, None] - new + jnp.arange(new, dtype=jnp.int32)
    shape = Shape(*(x[:, None, None] for x in shape))
    q = q * alpha
    times = query_times(timestamps, query)

    def step(n, total):
        first = jnp.minimum(n * block, capacity - block)  # the last block may overlap
        key = first + jnp.arange(block, dtype=jnp.int32)
        keys, values = (lax.dynamic_slice_in_dim(x, first, block, axis=1) for x in (k, v))
        scores = jnp.einsum("bnhd,bshd->bhns", q, keys, preferred_element_type=jnp.float32)
        if position_bias is not None:
            distance = jnp.clip(query[:, :, None] - key, 0, position_bias.shape[1] - 1)
            scores += jnp.moveaxis(position_bias[:, distance], 0, 1)
        if timestamps is not None and time_bias is not None:
            key_times = lax.dynamic_slice_in_dim(timestamps, first, block, axis=1)
            bucket = time_bucket(times[:, :, None] - key_times[:, None], time_bias.shape[1])
            scores += jnp.moveaxis(time_bias[:, bucket], 0, 1)
        valid = mask.attends(query[:, :, None], key, shape)
        valid &= (query[:, :, None] >= 0) & (key >= n * block)
        weights = jnp.where(valid[:, None], jax.nn.silu(scores), 0).astype(v.dtype)
        return total + jnp.einsum(
            "bhns,bshd->bnhd", weights, values, preferred_element_type=jnp.float32
        )

    return lax.fori_loop(0, -(-capacity // block), step, total)


def query_times(timestamps: Array | None, query: Array) -> Any:
    """Timestamps at these places of each sequence."""
    if timestamps is None:
        return None
    return jnp.take_along_axis(timestamps, jnp.maximum(query, 0), axis=1)
