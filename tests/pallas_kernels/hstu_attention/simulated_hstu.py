"""The op with its kernels named, whatever the device: for the simulator."""

import jax

from pallas_kernels.hstu_attention import api


def value_and_gradients(q, k, v, position_bias, time_bias, lists, d_out, how):
    """(out, gradients of q, k, v and the biases) as the op differentiates, but on the kernels."""
    lists, how = api._Lists(*lists), api._How(*how)
    out, pull = jax.vjp(
        lambda *args: api._attend(*args, lists, how), q, k, v, position_bias, time_bias
    )
    return out, *pull(d_out)
