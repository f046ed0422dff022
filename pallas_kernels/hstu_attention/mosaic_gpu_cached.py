"""`hstu_attention_cached` on the kernel of the forward pass.

Queries get rows of their own, in tiles that start at multiples of 64 in their sequence, as they do
where all queries are computed: the sums are then the same to the bit. A cache in bf16 stays where
it is; one in f32 is copied, in parts.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, Int32

from pallas_kernels.hstu_attention import mosaic_gpu
from pallas_kernels.hstu_attention.biases import BiasArrays, Biases, bias_arrays
from pallas_kernels.hstu_attention.config import HstuConfig
from pallas_kernels.hstu_attention.tiles import ROW_MULTIPLE, TILE, WORK, Mask, Shape, Works


@functools.partial(jax.jit, static_argnames=("alpha", "mask", "config"))
def forward(
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
    config: HstuConfig,
) -> Float[Array, "B N H Dv"]:
    """As `cached.cached_ref`."""
    batch, new = q.shape[:2]
    k, v = _aligned(k), _aligned(v)
    capacity = k.shape[1]
    stride = -(-(new + TILE - 1) // TILE) * TILE
    first = jnp.maximum(shape.length - new, 0) // TILE * TILE
    # Row j of a sequence is its position first + j, which is query number:
    number = first[:, None] + jnp.arange(stride) - (shape.length - new)[:, None]
    arrays = _bias_arrays(position_bias, timestamps, time_bias, capacity, q.dtype)
    buckets = 0 if time_bias is None else time_bias.shape[1]
    out = mosaic_gpu.attend(
        _query_rows(q, number),
        k.reshape(batch * capacity, *k.shape[2:]),
        v.reshape(batch * capacity, *v.shape[2:]),
        lambda rows: _works(shape, first, rows, stride, capacity, mask),
        arrays,
        Biases.of(arrays, alpha, buckets),
        mask=mask,
        config=config,
        cached=True,
    )
    out = out[: batch * stride].reshape(batch, stride, *out.shape[1:])
    query = shape.length[:, None] - new + jnp.arange(new)
    place = jnp.clip(query - first[:, None], 0, stride - 1)
    taken = jnp.take_along_axis(out, place[:, :, None, None], axis=1)
    return jnp.where((query >= 0)[:, :, None, None], taken, 0)


def _aligned(cache: Array) -> Array:
    """A cache that the kernel can read: as it comes, or with more slots."""
    batch, capacity = cache.shape[:2]
    if capacity % ROW_MULTIPLE == 0 and batch * capacity >= WORK:
        return cache
    return jnp.pad(cache, ((0, 0), (0, -capacity % WORK), (0, 0), (0, 0)))


def _query_rows(
    q: Float[Array, "B N H D"], number: Int32[Array, "B stride"]
) -> Float[Array, "R H D"]:
    """Queries by number, zeros for none, and a tile that the last work may run into."""
    batch, new, heads, width = q.shape
    taken = jnp.take_along_axis(q, jnp.clip(number, 0, new - 1)[:, :, None, None], axis=1)
    rows = jnp.where(((number >= 0) & (number < new))[:, :, None, None], taken, 0)
    rows = rows.reshape(batch * number.shape[1], heads, width)
    return jnp.pad(rows, ((0, TILE), (0, 0), (0, 0)))


def _bias_arrays(position_bias, timestamps, time_bias, capacity, dtype) -> BiasArrays:
    """`biases.bias_arrays` for the slots of a cache, and times of a work behind the last one."""
    times = None
    if timestamps is not None:
        padding = capacity - timestamps.shape[1]
        times = jnp.pad(timestamps, ((0, 0), (0, padding))).reshape(-1)
        times = jnp.pad(times, (0, WORK))
    return bias_arrays(position_bias, times, time_bias, dtype=dtype)


def _works(shape: Shape, first: Array, rows: int, stride: int, capacity: int, mask: Mask) -> Works:
    """`rows` positions each from `first` on, the longest first."""
    sequence = jnp.arange(first.size, dtype=jnp.int32)[:, None]
    position = first[:, None] + rows * jnp.arange(-(-stride // rows), dtype=jnp.int32)
    length, history_end = (jnp.broadcast_to(x[:, None], position.shape) for x in shape)
    last = jnp.minimum(position + rows, length) - 1
    count = mask.key_runs(position, last, Shape(length, history_end)).count
    tiles = jnp.where(position < length, count, 0)
    first_row, first_key = sequence * stride - first[:, None], sequence * capacity
    fields = jnp.broadcast_arrays(first_row, position, length, history_end, first_key)
    order, *fields = lax.sort((-tiles.ravel(), *(x.ravel() for x in fields)), num_keys=1)
    return Works(jnp.stack(fields, axis=1), jnp.sum(order < 0, keepdims=True), -order)
