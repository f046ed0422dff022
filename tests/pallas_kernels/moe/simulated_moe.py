"""The op with its kernels named, whatever the device: for the simulator, and for shapes alone."""

import jax

from pallas_kernels.moe import api


def value_and_gradients(x, ids, gates, experts, dy, **how):
    """(y, (dx, d_gates, d_experts)) as `moe_ffn` differentiates, but on the kernels."""
    y, pull = residuals(x, ids, gates, experts, **how)
    return y, pull(dy)


def residuals(x, ids, gates, experts, **how):
    """(y, the function from dy to the gradients, which holds what is kept)."""
    how = api._How(backend="mosaic_gpu", **how)
    return jax.vjp(lambda x, g, e: api._ffn(x, ids, g, e, how), x, gates, experts)
