"""Small differentiable pieces that the models share."""

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from jaxrec.ops.jagged import positions


def dropout(
    x: Float[jax.Array, "*shape"], rate: float, key: jax.Array | None
) -> Float[jax.Array, "*shape"]:
    """Zeros a share `rate` < 1 of the elements and scales up the rest; nothing without a key."""
    if key is None or rate == 0:
        return x
    keep = jax.random.bernoulli(key, 1 - rate, x.shape)
    return jnp.where(keep, x / (1 - rate), 0)


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


def causal_filter(
    x: Float[jax.Array, "T D"],
    seq_offsets: Int[jax.Array, "B1"],
    taps: Float[jax.Array, "W D"],
) -> Float[jax.Array, "T D"]:
    """Filters every channel along its sequence, looking only back.

        out[t, d] = Σ_n taps[n, d] · x[t - n, d],   t - n in the same sequence

    Slots behind the last sequence are filtered among themselves. Products are summed in f32.

    Cost: 2·T·W·D FLOPs.
    """
    position = positions(seq_offsets, x.shape[0])
    padded = jnp.pad(x, ((taps.shape[0] - 1, 0), (0, 0)))

    def tap(n):
        start = taps.shape[0] - 1 - n
        shifted = jax.lax.slice_in_dim(padded, start, start + x.shape[0], axis=0)
        return jnp.where((position >= n)[:, None], shifted, 0) * taps[n].astype(jnp.float32)

    return sum((tap(n) for n in range(1, taps.shape[0])), tap(0)).astype(x.dtype)
