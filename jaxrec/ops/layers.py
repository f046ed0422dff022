"""Small differentiable pieces that the models share."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int, UInt32

from jaxrec.ops.jagged import positions

_GRADIENT_ROWS = 32  # of the filter's taps, at a time


def dropout(
    x: Float[jax.Array, "*shape"], rate: float, key: jax.Array | None
) -> Float[jax.Array, "*shape"]:
    """Zeros a share `rate` < 1 of the elements and scales up the rest; nothing without a key.

    Which ones depends on the key and an element's place alone, whatever device draws.
    """
    if key is None or rate == 0:
        return x
    kept = hash_bits(key, x.shape) >= jnp.uint32(min(round(rate * 2**32), 2**32 - 1))
    return jnp.where(kept, x / (1 - rate), 0)


def hash_bits(key: jax.Array, shape: tuple[int, ...]) -> UInt32[jax.Array, "*shape"]:
    """Random bits by a hash of an element's number and the key.

    Meant for dropout: a small part of the time that `jax.random.bits` takes on a CPU, and on a GPU
    fused into what uses them, so that no bits are written to memory. Repeats after 2³² elements.

    Cost: 5 multiplications an element.
    Source: Wellons' hash-prospector, its two-round function of least bias.
    """
    words = jax.random.key_data(key)
    number = jnp.arange(math.prod(shape), dtype=jnp.uint32).reshape(shape)
    return _mixed(_mixed(number * jnp.uint32(0x9E3779B9) + words[0]) ^ words[-1])


def _mixed(x: jax.Array) -> jax.Array:
    """A permutation of the 32-bit numbers in which every bit depends on every other."""
    for shift, factor in ((16, 0x21F0AAAD), (15, 0x735A2D97)):
        x = (x ^ (x >> shift)) * jnp.uint32(factor)
    return x ^ (x >> 15)


def split_or_none(key: jax.Array | None, num: int) -> list[jax.Array | None]:
    """`num` keys for `dropout`, or as many None without a key."""
    return [None] * num if key is None else list(jax.random.split(key, num))


def layer_norm(
    x: Float[jax.Array, "*rows D"],
    scale: Float[jax.Array, "D"] | None = None,
    bias: Float[jax.Array, "D"] | None = None,
    *,
    eps: float = 1e-6,
) -> Float[jax.Array, "*rows D"]:
    """Normalises each row to mean 0 and variance 1 in f32."""
    x32 = x.astype(jnp.float32)
    centred = x32 - x32.mean(-1, keepdims=True)
    normed = centred * jax.lax.rsqrt((centred * centred).mean(-1, keepdims=True) + eps)
    if scale is not None:
        normed = normed * scale
    if bias is not None:
        normed = normed + bias
    return normed.astype(x.dtype)


@jax.custom_vjp
def causal_filter(
    x: Float[jax.Array, "T D"],
    seq_offsets: Int[jax.Array, "B1"],
    taps: Float[jax.Array, "W D"],
) -> Float[jax.Array, "T D"]:
    """Filters every channel along its sequence, looking only back.

        out[t, d] = Σ_n taps[n, d] · x[t - n, d],   t - n in the same sequence

    Slots behind the last sequence are filtered among themselves. Products are summed in f32.

    Cost: 2·T·W·D FLOPs, three times that with gradients; nothing but the inputs is kept for them.
    """
    position = positions(seq_offsets, x.shape[0])
    padded = jnp.pad(x.astype(jnp.float32), ((taps.shape[0] - 1, 0), (0, 0)))

    def add_tap(acc, tap_and_lag):
        tap, lag = tap_and_lag
        lagged = jax.lax.dynamic_slice_in_dim(padded, taps.shape[0] - 1 - lag, x.shape[0])
        return acc + jnp.where((position >= lag)[:, None], lagged, 0) * tap, None

    init = jnp.zeros(x.shape, jnp.float32)
    return jax.lax.scan(add_tap, init, _taps_and_lags(taps))[0].astype(x.dtype)


def _taps_and_lags(taps: jax.Array) -> tuple[jax.Array, jax.Array]:
    return taps.astype(jnp.float32), jnp.arange(taps.shape[0])


def _causal_filter_forward(x, seq_offsets, taps):
    return causal_filter(x, seq_offsets, taps), (x, seq_offsets, taps)


def _causal_filter_backward(inputs, dout):
    x, seq_offsets, taps = inputs
    num_tokens, num_taps = x.shape[0], taps.shape[0]
    position = positions(seq_offsets, num_tokens)
    dout = dout.astype(jnp.float32)
    behind = jnp.pad(dout, ((0, num_taps - 1), (0, 0)))
    position_behind = jnp.pad(position, (0, num_taps - 1), constant_values=-1)

    def add_tap(dx, tap_and_lag):
        tap, lag = tap_and_lag
        ahead = jax.lax.dynamic_slice_in_dim(behind, lag, num_tokens)
        reached = jax.lax.dynamic_slice_in_dim(position_behind, lag, num_tokens) >= lag
        return dx + jnp.where(reached[:, None], ahead, 0) * tap, None

    dx, _ = jax.lax.scan(add_tap, jnp.zeros(x.shape, jnp.float32), _taps_and_lags(taps))
    dtaps = _taps_gradient(x.astype(jnp.float32), position, dout, num_taps)
    return dx.astype(x.dtype), None, dtaps.astype(taps.dtype)


def _taps_gradient(x: jax.Array, position: jax.Array, dout: jax.Array, num_taps: int) -> jax.Array:
    """Σ_t dout[t, d] · x[t - n, d] for every n; f32[W, D].

    Some rows at a time, whose products become one loop: a sum over the rows for every lag takes
    three times as long on a CPU.
    """
    num_tokens, rows = x.shape[0], _GRADIENT_ROWS
    filled = -(-num_tokens // rows) * rows
    behind = ((0, filled - num_tokens), (0, 0))
    dout, position = jnp.pad(dout, behind), jnp.pad(position, behind[0])
    # Newest first, so that the x[t - n] of all lags are a slice.
    newest_first = jnp.pad(jnp.pad(x, behind)[::-1], ((0, num_taps - 1), (0, 0)))
    lag = jnp.arange(num_taps)

    def add_rows(acc, start):
        d = jax.lax.dynamic_slice_in_dim(dout, start, rows)
        last = jax.lax.dynamic_slice_in_dim(position, start, rows)
        begin = filled - rows - start
        past = jax.lax.dynamic_slice_in_dim(newest_first, begin, rows + num_taps - 1)
        for row in range(rows):
            lagged = past[rows - 1 - row : rows - 1 - row + num_taps]
            acc += jnp.where((last[row] >= lag)[:, None], lagged, 0) * d[row]
        return acc, None

    init = jnp.zeros((num_taps, x.shape[1]), jnp.float32)
    return jax.lax.scan(add_rows, init, jnp.arange(0, filled, rows))[0]


causal_filter.defvjp(_causal_filter_forward, _causal_filter_backward)
