"""Small differentiable pieces that the models share."""

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from jaxrec.ops.jagged import positions


def dropout(
    x: Float[jax.Array, "*shape"], rate: float, key: jax.Array | None
) -> Float[jax.Array, "*shape"]:
    """Zeros a share `rate` < 1 of the elements and scales up the rest; nothing without a key.

    The share is rate to the nearest 2⁻¹⁶, and the scale that of the rounded share.
    """
    dropped = min(round(rate * 2**16), 2**16 - 1)
    if key is None or dropped == 0:
        return x
    # Drawing bits takes most of the time; drawn as u16, they would take as long as u32.
    pairs = jax.random.bits(key, (-(-x.size // 2),), jnp.uint32)
    bits = jax.lax.bitcast_convert_type(pairs, jnp.uint16).reshape(-1)[: x.size]
    scale = 2**16 / (2**16 - dropped)
    return jnp.where(bits.reshape(x.shape) >= dropped, x * scale, 0)


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
        return acc + _lagged(padded, position, lag, taps.shape[0]) * tap, None

    init = jnp.zeros(x.shape, jnp.float32)
    return jax.lax.scan(add_tap, init, _taps_and_lags(taps))[0].astype(x.dtype)


def _taps_and_lags(taps: jax.Array) -> tuple[jax.Array, jax.Array]:
    return taps.astype(jnp.float32), jnp.arange(taps.shape[0])


def _lagged(padded: jax.Array, position: jax.Array, lag: jax.Array, num_taps: int) -> jax.Array:
    """x[t - lag], 0 where that is another sequence; `padded` has num_taps - 1 zeros before x."""
    rows = jax.lax.dynamic_slice_in_dim(padded, num_taps - 1 - lag, position.shape[0])
    return jnp.where((position >= lag)[:, None], rows, 0)


def _causal_filter_forward(x, seq_offsets, taps):
    return causal_filter(x, seq_offsets, taps), (x, seq_offsets, taps)


def _causal_filter_backward(inputs, dout):
    x, seq_offsets, taps = inputs
    num_tokens, num_taps = x.shape[0], taps.shape[0]
    position = positions(seq_offsets, num_tokens)
    padded = jnp.pad(x.astype(jnp.float32), ((num_taps - 1, 0), (0, 0)))
    dout = dout.astype(jnp.float32)
    behind = jnp.pad(dout, ((0, num_taps - 1), (0, 0)))
    position_behind = jnp.pad(position, (0, num_taps - 1), constant_values=-1)

    def add_tap(dx, tap_and_lag):
        tap, lag = tap_and_lag
        ahead = jax.lax.dynamic_slice_in_dim(behind, lag, num_tokens)
        reached = jax.lax.dynamic_slice_in_dim(position_behind, lag, num_tokens) >= lag
        dx += jnp.where(reached[:, None], ahead, 0) * tap
        return dx, (dout * _lagged(padded, position, lag, num_taps)).sum(0)

    dx, dtaps = jax.lax.scan(add_tap, jnp.zeros(x.shape, jnp.float32), _taps_and_lags(taps))
    return dx.astype(x.dtype), None, dtaps.astype(taps.dtype)


causal_filter.defvjp(_causal_filter_forward, _causal_filter_backward)
